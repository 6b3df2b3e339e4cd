"""The public operators, as functions. Names, defaults, argument order and exceptions follow torch.nn.functional."""

from .ops.lrn import local_response_norm
from .ops.relu_lrn_max_pool2d import relu_lrn_max_pool2d

__all__ = ["local_response_norm", "relu_lrn_max_pool2d"]
