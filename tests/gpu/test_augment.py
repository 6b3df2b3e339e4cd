"""augment on a GPU: the Triton kernel in every configuration, and choices on either device."""

import pytest
import torch
from operators import augment
from promises import DTYPES, FORMATS, assert_bitwise, assert_same_answer, ident

import fastcnn.functional as FF
from fastcnn import reference
from fastcnn.ops.triton import augment as launcher
from fastcnn.params import AugmentParams

pytestmark = pytest.mark.gpu
CASES = [augment.augment_case((5, 70, 80, 3), (65, 67), resized) for resized in (False, True)]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@cases
@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("config", launcher.FORWARD_CONFIGS, ids=ident)
def test_every_configuration(triton, case, format, config):
    case = augment.in_form(case, torch.bfloat16, format)
    x, *choices = case.tensors()
    y = launcher.forward(x.cuda(), *choices, AugmentParams(**case.kwargs), config=config).cpu()
    assert_same_answer(y, reference.augment(x, *choices, **{**case.kwargs, "dtype": torch.float64}))
    assert y.stride() == augment.output_strides(case, x, y.shape)


@cases
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_choices_may_stay_on_the_cpu(case, dtype):
    x, *choices = case.tensors()
    on_gpu = [None if t is None else t.cuda() for t in choices]
    kwargs = {**case.kwargs, "dtype": dtype}
    assert_bitwise(FF.augment(x.cuda(), *choices, **kwargs).cpu(), FF.augment(x.cuda(), *on_gpu, **kwargs).cpu())
    offsets, *rest = on_gpu
    with pytest.raises(ValueError, match="not within"):
        FF.augment(x.cuda(), offsets + 999, *rest, **kwargs)
