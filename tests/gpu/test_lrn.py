"""lrn on a GPU by the Triton kernels, in every configuration."""

import pytest
import torch
from ops.test_lrn import LRN, LRN_BACKWARD, STRONG
from promises import DTYPES, FORMATS, assert_tail_answer, ident, randn

from fastcnn import LRNParams
from fastcnn.ops.triton import lrn

pytestmark = pytest.mark.gpu
formats = pytest.mark.parametrize("format", FORMATS, ids=ident)
SHAPES = [(3, 96, 13, 17), (2, 17, 9, 31), (1, 256, 27, 27), (5, 3, 55, 55)]


def assert_lrn(x, dy, y, dx, *args):
    """LRN is the tail without its other parts."""
    assert_tail_answer(x.cpu(), None, y.cpu(), None, dy.cpu(), dx.cpu(), None, relu=False, lrn=LRNParams(*args))


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@formats
@pytest.mark.parametrize("shape", SHAPES, ids=ident)
@pytest.mark.parametrize("args", [(*STRONG, 1), (2, 0.5, 0.6, 2.0, 1), (40, 9.0, 0.5, 1.0, 1)], ids=ident)
def test_same_answer(triton, args, shape, format, dtype):
    x, dy = (randn(*shape, dtype=dtype, format=format, seed=s).cuda() for s in (0, 1))
    assert_lrn(x, dy, LRN(x, *args), LRN_BACKWARD(dy, x, *args), *args)


@formats
@pytest.mark.parametrize("i", range(len(lrn.FORWARD_CONFIGS)))
def test_every_configuration(triton, i, format):
    x, dy = (randn(3, 96, 13, 17, dtype=torch.bfloat16, format=format, seed=s).cuda() for s in (0, 1))
    args = (*STRONG, 2)
    y = lrn.forward(x, LRNParams(*args), config=lrn.FORWARD_CONFIGS[i])
    assert_lrn(x, dy, y, lrn.backward(dy, x, LRNParams(*args), config=lrn.BACKWARD_CONFIGS[i]), *args)
