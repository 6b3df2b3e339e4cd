"""conv2d_relu on a GPU: every configuration of the Triton kernel that the tuner may choose, beside cuDNN."""

import pytest
from promises import FORMATS, ident, randn

from fastcnn.bench.operators import CONVOLUTIONS
from fastcnn.ops.autotune import agree
from fastcnn.ops.cudnn import conv2d_relu as cudnn
from fastcnn.ops.select_conv2d_relu import tolerance
from fastcnn.ops.triton import conv2d_relu

from .test_conv2d_relu import numbers, settings  # noqa: F401

pytestmark = pytest.mark.gpu
LAYERS = ("AlexNet conv1", "AlexNet conv2", "AlexNet conv4", "VGG-16 conv1_1", "VGG-16 conv3_1")


@numbers
@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("layer", LAYERS)
def test_is_right(layer, format, dtype, precision):
    conv = CONVOLUTIONS[layer]
    x = randn(8, conv.channels, conv.size, conv.size, dtype=dtype, format=format).cuda()
    weight = randn(conv.outputs, conv.channels // conv.groups, conv.window, conv.window, dtype=dtype, format=format)
    weight, bias = weight.cuda() / weight[0].numel() ** 0.5, randn(conv.outputs, dtype=dtype).cuda()
    args = conv.params, False
    truth = cudnn.forward(x, weight, bias, *args)[0]
    wrong = []
    for config in conv2d_relu.configurations(x, weight, conv.groups):
        if not agree(conv2d_relu.forward(x, weight, bias, *args, config=config)[0], truth, tolerance(dtype)):
            wrong.append(str(config))
    assert not wrong
