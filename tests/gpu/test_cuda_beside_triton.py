"""The CUDA kernels of the memory-bound operators beside the Triton kernels, on a GPU."""

import pytest
import torch
from promises import randn

from fastcnn import backends

from .test_cuda_kernels import SHAPES, dtypes, formats, ident, run, tails

pytestmark = pytest.mark.gpu


@tails
@formats
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=ident)
def test_within_4_ulp_of_each_other(cuda, shape, dtype, format, tail):
    """Of the largest of the terms that an element is a sum of. Near-ties may make the two pick different maxima."""
    x = randn(*shape, dtype=dtype, format=format).cuda()
    dy, ours = run(x, None, **tail)
    with backends.use("triton"):
        _, theirs = run(x, None, **tail)
    different = (ours[1] != theirs[1]).sum()
    assert different <= 1e-4 * ours[1].numel()
    same = different == 0
    terms = [ours[0], dy.abs().max().expand_as(ours[2])]
    for a, b, term in zip(ours[::2][: 1 + bool(same)], theirs[::2], terms, strict=False):
        ulp = torch.finfo(dtype).eps * torch.maximum(torch.maximum(a.abs(), b.abs()), term.abs())
        assert ((a - b).abs() <= 4 * ulp).all()
