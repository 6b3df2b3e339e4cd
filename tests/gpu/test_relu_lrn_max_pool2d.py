"""relu_lrn_max_pool2d on a GPU by the Triton kernels, in every configuration."""

import pytest
from operators import STAGE
from promises import FORMATS, assert_tail_answer, ident, randn

from fastcnn.ops.triton import relu_lrn_max_pool2d
from fastcnn.params import TailParams

pytestmark = pytest.mark.gpu
formats = pytest.mark.parametrize("format", FORMATS, ids=ident)


@formats
@pytest.mark.parametrize("forward", relu_lrn_max_pool2d.FORWARD_CONFIGS, ids=ident)
@pytest.mark.parametrize("backward", relu_lrn_max_pool2d.BACKWARD_CONFIGS[1:], ids=ident)
def test_every_configuration(triton, forward, backward, format):
    x, tail = randn(3, 96, 13, 17, format=format).cuda(), TailParams(**STAGE)
    y, argmax = relu_lrn_max_pool2d.forward(x, None, tail, True, config=forward)
    dy = 2 + randn(*y.shape, seed=2).cuda()
    dx, dbias = relu_lrn_max_pool2d.backward(dy, x, None, argmax, tail, config=backward)
    assert_tail_answer(x.cpu(), None, *(t.cpu() for t in (y, argmax, dy, dx, dbias)), **STAGE)
