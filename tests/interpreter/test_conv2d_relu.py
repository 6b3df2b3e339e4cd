"""The Triton kernels of conv2d_relu keep the operator's promises, on small and awkward shapes."""

# ruff: noqa: F401 (the tests that are imported run here too)
import pytest
import torch
from ops.test_conv2d_relu import (
    SMALL,
    case,
    op_args,
    test_any_input_agrees_with_torch,
    test_any_strides,
    test_any_strides_of_a_single_image,
    test_any_subset_of_gradients,
    test_empty_batch,
    test_error_is_at_most_twice_that_of_torch,
    test_frozen_weights_keep_a_bit_an_output_and_the_weight,
    test_gradient_in_any_memory_format,
    test_non_finite_values_propagate_as_in_torch,
    test_opcheck,
    test_opcheck_of_narrow_dtypes,
    test_output_strides_are_channels_last_only_for_channels_last,
    test_relu_passes_the_gradient_of_all_but_values_up_to_zero,
    test_same_bits_in_every_run,
    test_single_image,
    torch_conv_relu,
)
from promises import FORMATS, assert_bitwise, ident

from fastcnn.ops import select_conv2d_relu
from fastcnn.ops.autotune import agree
from fastcnn.ops.cudnn import conv2d_relu as cudnn
from fastcnn.ops.triton import conv2d_relu
from fastcnn.params import ConvParams

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, on infinities and NaN


@pytest.mark.parametrize("name", ["alexnet_conv1", *SMALL])
@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=ident)
@pytest.mark.parametrize("index", ["int32", "int64"])
def test_every_configuration_of_the_kernel_agrees_with_torch(monkeypatch, index, dtype, format, name):
    """On the inputs, and by the measure, by which a GPU's tuner judges them; also with the indices of huge tensors."""
    language = pytest.importorskip("triton.language")
    monkeypatch.setattr(conv2d_relu, "index_dtype", lambda items: getattr(language, index))
    tensors, kwargs = case(name, dtype, format)
    kwargs = {"padding": 0} if kwargs.get("padding") == "same" else kwargs
    args = ConvParams(*op_args(tensors, kwargs)), True
    runs = select_conv2d_relu.candidates(*tensors[:2], args[0])
    assert len(runs) > 1
    for checked in select_conv2d_relu._check_inputs(*tensors):
        truth, _ = cudnn.forward(*checked, *args)
        assert_bitwise(truth.isnan(), torch_conv_relu(*checked, **kwargs).isnan())
        for run in runs.values():
            y, bits = run(*checked, *args)
            assert agree(y, truth, select_conv2d_relu.tolerance(dtype))
            assert_bitwise(conv2d_relu.mask_backward(y, bits), y)
