"""relu_lrn_max_pool2d on a GPU by the Triton kernels, in every configuration."""

import pytest
import torch
from ops.test_relu_lrn_max_pool2d import PARTS, STAGE, TAIL, TAIL_BACKWARD, parts_id
from promises import DTYPES, FORMATS, NARROW, assert_bitwise, assert_tail_answer, ident, randn, tail_args

from fastcnn import LRNParams
from fastcnn.ops.triton import relu_lrn_max_pool2d
from fastcnn.params import TailParams

pytestmark = pytest.mark.gpu
formats = pytest.mark.parametrize("format", FORMATS, ids=ident)
SHAPES = [(3, 96, 13, 17), (2, 17, 9, 31)]


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@formats
@pytest.mark.parametrize("tail", PARTS, ids=parts_id)
@pytest.mark.parametrize("shape", SHAPES, ids=ident)
def test_same_answer_with_any_part_absent(triton, shape, tail, format, dtype):
    x = randn(*shape, dtype=dtype, format=format).cuda()
    bias = randn(shape[1], dtype=torch.float32 if dtype in NARROW else dtype, seed=1).cuda()
    y, argmax = TAIL(x, bias, *tail_args(**tail), tail["pool"] is not None)
    dy = 2 + randn(*y.shape, dtype=dtype, seed=2).cuda()
    dx, dbias = TAIL_BACKWARD(dy, x, bias, argmax, *tail_args(**tail))
    assert_tail_answer(*(t.cpu() for t in (x, bias, y, argmax, dy, dx, dbias)), **tail)


@formats
@pytest.mark.parametrize("forward", relu_lrn_max_pool2d.FORWARD_CONFIGS, ids=ident)
@pytest.mark.parametrize("backward", relu_lrn_max_pool2d.BACKWARD_CONFIGS[1:], ids=ident)
def test_every_configuration(triton, forward, backward, format):
    x, tail = randn(3, 96, 13, 17, format=format).cuda(), TailParams(**STAGE)
    y, argmax = relu_lrn_max_pool2d.forward(x, None, tail, True, config=forward)
    dy = 2 + randn(*y.shape, seed=2).cuda()
    dx, dbias = relu_lrn_max_pool2d.backward(dy, x, None, argmax, tail, config=backward)
    assert_tail_answer(x.cpu(), None, *(t.cpu() for t in (y, argmax, dy, dx, dbias)), **STAGE)


@pytest.mark.parametrize("tail", [STAGE, {"relu": True, "lrn": LRNParams(5), "pool": None}], ids=parts_id)
@formats
def test_same_bits_in_every_run(triton, format, tail):
    x, bias = randn(16, 96, 55, 55, format=format).cuda(), randn(96, seed=1).cuda()

    def run():
        y, argmax = TAIL(x, bias, *tail_args(**tail), tail["pool"] is not None)
        return [y, argmax, *TAIL_BACKWARD(y, x, bias, argmax, *tail_args(**tail))]

    for ours, first in zip(run(), run(), strict=True):
        assert_bitwise(ours, first)
