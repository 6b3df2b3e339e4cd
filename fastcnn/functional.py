"""The public operators, as functions. Names, defaults, argument order and exceptions follow torch.nn.functional."""

from .ops.augment import augment
from .ops.batch_norm_relu_max_pool2d import batch_norm_relu_max_pool2d
from .ops.conv2d_relu import conv2d_relu
from .ops.lrn import local_response_norm
from .ops.max_pool2d import max_pool2d
from .ops.relu_lrn_max_pool2d import relu_lrn_max_pool2d

__all__ = [
    "augment",
    "batch_norm_relu_max_pool2d",
    "conv2d_relu",
    "local_response_norm",
    "max_pool2d",
    "relu_lrn_max_pool2d",
]
