"""What is special to the Triton kernels of the memory-bound operators."""

import pytest
import torch
from operators import WIDE, augment, max_pool2d, relu_lrn_max_pool2d
from places import Place
from promises import assert_same_answer, ident, integers, randn

from fastcnn import PoolParams, backends, reference
from fastcnn.ops.triton import augment as launcher
from fastcnn.params import AugmentParams


def test_cpu_tensors_run_the_triton_kernels():
    assert all(
        backends.choose(op, ("reference", "cpu", "triton"), torch.zeros(1)) == "triton"
        for op in ("augment", "lrn", "max_pool2d", "relu_lrn_max_pool2d")
    )


def test_tail_with_windows_too_large_to_unroll():
    case = relu_lrn_max_pool2d.stage((1, 2, 4, 3), {"relu": True, "pool": PoolParams((16, 3), 3, (8, 1))})
    relu_lrn_max_pool2d.check_bits_of_torch(Place("triton"), case, [integers(1, 2, 4, 3), integers(2, seed=1)])


@pytest.mark.parametrize("pool", [WIDE, PoolParams((16, 16), 3, 8)], ids=ident)
def test_pool_of_up_to_and_of_more_than_256_places(pool):
    """Whose windows are not unrolled; slow, so at one size."""
    case = max_pool2d.pool_case((1, 2, 4, 3), pool)
    max_pool2d.check(Place("triton"), case, case.tensors(format=torch.channels_last))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # lanes without an element divide by 0
@pytest.mark.parametrize("resized", [False, True], ids=["", "resized"])
@pytest.mark.parametrize("config", launcher.FORWARD_CONFIGS, ids=ident)
def test_augment_in_every_configuration(config, resized):
    """Crops of more rows than a program goes through at once."""
    case = augment.augment_case((2, 21, 30, 3), (19, 23), resized)
    tensors = case.tensors()
    y = launcher.forward(*tensors, AugmentParams(**case.kwargs), config=config)
    assert_same_answer(y, reference.augment(*tensors, **{**case.kwargs, "dtype": torch.float64}))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_augment_adds_up_thousands_of_pixels_row_by_row():
    """In a single sum of float32 the error would be larger than is allowed."""
    x = integers(1, 400, 400, 3, dtype=torch.uint8, low=0, high=256)
    given = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([True]), torch.zeros(1, 3), torch.tensor([[8, 8]])
    y = launcher.forward(x, *given, AugmentParams((2, 3)))
    assert_same_answer(y, reference.augment(x, *given, crop=(2, 3), dtype=torch.float64))


def test_ops_called_directly_refuse_tensors_that_do_not_fit():
    x, args = randn(1, 4, 5, 5), (3, 0.5, 0.75, 1.0, 1)
    with pytest.raises(RuntimeError, match=r"lrn_backward\(\): expected grad of size \[1, 4, 5, 5\]"):
        torch.ops.fastcnn.lrn_backward(x[:, :2], x, *args)
