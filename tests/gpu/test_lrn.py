"""lrn on a GPU by the Triton kernels, in every configuration."""

import pytest
import torch
from operators import STRONG
from promises import FORMATS, assert_tail_answer, ident, randn

from fastcnn import LRNParams
from fastcnn.ops.triton import lrn

pytestmark = pytest.mark.gpu
formats = pytest.mark.parametrize("format", FORMATS, ids=ident)


def assert_lrn(x, dy, y, dx, *args):
    """LRN is the tail without its other parts."""
    assert_tail_answer(x.cpu(), None, y.cpu(), None, dy.cpu(), dx.cpu(), None, relu=False, lrn=LRNParams(*args))


@formats
@pytest.mark.parametrize("i", range(len(lrn.FORWARD_CONFIGS)))
def test_every_configuration(triton, i, format):
    x, dy = (randn(3, 96, 13, 17, dtype=torch.bfloat16, format=format, seed=s).cuda() for s in (0, 1))
    args = (*STRONG.op_args()[:4], 2)
    y = lrn.forward(x, LRNParams(*args), config=lrn.FORWARD_CONFIGS[i])
    assert_lrn(x, dy, y, lrn.backward(dy, x, LRNParams(*args), config=lrn.BACKWARD_CONFIGS[i]), *args)
