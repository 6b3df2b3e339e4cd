"""What is special to the Triton kernels of the memory-bound operators."""

import pytest
import torch
from operators import relu_lrn_max_pool2d
from places import Place
from promises import integers, randn

from fastcnn import PoolParams, backends


def test_cpu_tensors_run_the_triton_kernels():
    assert all(
        backends.choose(op, ("reference", "cpu", "triton"), torch.zeros(1)) == "triton"
        for op in ("lrn", "max_pool2d", "relu_lrn_max_pool2d")
    )


def test_tail_with_windows_too_large_to_unroll():
    case = relu_lrn_max_pool2d.stage((1, 2, 4, 3), {"relu": True, "pool": PoolParams((16, 3), 3, (8, 1))})
    relu_lrn_max_pool2d.check_bits_of_torch(Place("triton"), case, [integers(1, 2, 4, 3), integers(2, seed=1)])


def test_ops_called_directly_refuse_tensors_that_do_not_fit():
    x, args = randn(1, 4, 5, 5), (3, 0.5, 0.75, 1.0, 1)
    with pytest.raises(RuntimeError, match=r"lrn_backward\(\): expected grad of size \[1, 4, 5, 5\]"):
        torch.ops.fastcnn.lrn_backward(x[:, :2], x, *args)
