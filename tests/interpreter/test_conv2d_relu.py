"""Every configuration of the Triton kernel of conv2d_relu, on small and awkward shapes."""

from dataclasses import replace

import pytest
import torch
from operators import AWKWARD, conv2d_relu
from promises import FORMATS, assert_bitwise, ident

from fastcnn.ops import select_conv2d_relu
from fastcnn.ops.autotune import agree
from fastcnn.ops.cudnn import conv2d_relu as cudnn
from fastcnn.ops.triton import conv2d_relu as kernel
from fastcnn.params import ConvParams

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, on infinities and NaN


@pytest.mark.parametrize("name", ["alexnet_conv1", *AWKWARD])
@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=ident)
@pytest.mark.parametrize("index", ["int32", "int64"])
def test_every_configuration_of_the_kernel_agrees_with_torch(monkeypatch, index, dtype, format, name):
    """On the inputs, and by the measure, by which a GPU's tuner judges them; also with the indices of huge tensors."""
    language = pytest.importorskip("triton.language")
    monkeypatch.setattr(kernel, "index_dtype", lambda items: getattr(language, index))
    case = conv2d_relu.convolution(name)
    tensors, kwargs = case.tensors(dtype, format), case.kwargs
    kwargs = {"padding": 0} if kwargs.get("padding") == "same" else kwargs
    args = ConvParams(*conv2d_relu.params(replace(case, kwargs=kwargs), tensors)), True
    runs = select_conv2d_relu.candidates(*tensors[:2], args[0])
    assert len(runs) > 1
    for checked in select_conv2d_relu._check_inputs(*tensors):
        truth, _ = cudnn.forward(*checked, *args)
        assert_bitwise(truth.isnan(), conv2d_relu.counterpart(*checked, **kwargs).isnan())
        for run in runs.values():
            y, bits = run(*checked, *args)
            assert agree(y, truth, select_conv2d_relu.tolerance(dtype))
            assert_bitwise(kernel.mask_backward(y, bits), y)
