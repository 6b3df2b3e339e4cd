"""Stages: the layers they become, and the sizes of their maps."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from promises import FORMATS, assert_bitwise, ident, in_format, randn

from fastcnn import LRNParams, PoolParams
from fastcnn.models.layers import ConvReLULRNMaxPool2d, GroupedLocalResponseNorm
from fastcnn.models.stages import Stage, build_features, map_sizes
from fastcnn.nn import ConvReLU2d

LRN = LRNParams(5, 0.5, 0.75, 2.0, groups=2)
POOL = PoolParams(3, 2, ceil_mode=True)
STAGES = [
    Stage("1", 3, 8, 5, stride=2, pad_end=1, lrn=LRN, pool=POOL),
    Stage("2", 8, 12, 3, padding=1, groups=2),
    Stage("3", 12, 6, 3, lrn=dataclasses.replace(LRN, groups=1)),
    Stage("4", 6, 4, 2, pool=PoolParams(2)),
]


def test_each_fused_layer_is_a_stage():
    layers = dict(build_features(STAGES, plain=False).named_children())
    assert list(layers) == ["pad1", "conv1", "conv2", "conv3", "conv4"]
    assert [type(layer) for layer in layers.values()][1:] == [
        ConvReLULRNMaxPool2d,
        ConvReLU2d,
        ConvReLULRNMaxPool2d,
        ConvReLULRNMaxPool2d,
    ]


def test_each_plain_layer_is_a_step():
    layers = dict(build_features(STAGES, plain=True).named_children())
    assert " ".join(layers) == ("pad1 conv1 relu1 norm1 pool1 conv2 relu2 conv3 relu3 norm3 conv4 relu4 pool4")
    own = {name for name, layer in layers.items() if not type(layer).__module__.startswith("torch.nn.")}
    assert own == {"norm1"}  # torch has no LRN with groups


@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_fused_and_plain_stages_agree(each_backend, format):
    torch.manual_seed(0)
    fused = build_features(STAGES, plain=False).double()
    torch.manual_seed(0)
    plain = build_features(STAGES, plain=True).double()
    x = randn(2, 3, 32, 34, dtype=torch.float64, format=format)
    y, expected = fused(x), plain(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for (name, p), (same_name, q) in zip(fused.named_parameters(), plain.named_parameters(), strict=True):
        assert name == same_name
        torch.testing.assert_close(p.grad, q.grad)


@given(size=st.integers(0, 60), ceil_mode=st.booleans())
def test_maps_have_the_sizes_of_torch_up_to_the_layer_that_torch_refuses(size, ceil_mode):
    stages = [*STAGES[:-1], dataclasses.replace(STAGES[-1], pool=PoolParams(3, 2, 1, ceil_mode=ceil_mode))]
    expected = {}
    with torch.device("meta"):
        x = torch.empty(1, 3, size, size)
        for name, layer in build_features(stages, plain=True).named_children():
            try:
                x = layer(x)
            except RuntimeError:
                expected[name] = None
                break
            if name.startswith(("conv", "pool")):
                expected[name] = x.shape[-1]
    sizes = map_sizes(stages, size)
    assert {name: left if left > 0 else None for name, left in sizes.items()} == expected


def test_a_stage_without_bias(each_backend):
    layer = ConvReLULRNMaxPool2d(3, 8, 3, bias=False, lrn=LRN, pool=POOL)
    with_bias = ConvReLULRNMaxPool2d(3, 8, 3, lrn=LRN, pool=POOL)
    with_bias.load_state_dict({**layer.state_dict(), "bias": torch.zeros(8)})
    x = randn(2, 3, 9, 11)
    assert_bitwise(layer(x), with_bias(x))


def test_repr_of_a_stage_names_its_tail():
    layer = ConvReLULRNMaxPool2d(3, 8, 3, lrn=LRN, pool=POOL)
    assert repr(layer).startswith(repr(torch.nn.Conv2d(3, 8, 3)).replace("Conv2d", "ConvReLULRNMaxPool2d")[:-1])
    assert f"lrn={LRN}, pool={POOL}" in repr(layer)


@pytest.mark.parametrize("size", [1, 4, 5, 9])
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_grouped_lrn_is_that_of_torch_in_each_group(size, groups, format):
    x = randn(2, 12, 5, 7, dtype=torch.float64, format=format)
    y = GroupedLocalResponseNorm(size, 0.5, 0.75, 2.0, groups)(x)
    parts = [F.local_response_norm(part, size, 0.5, 0.75, 2.0) for part in x.chunk(groups, 1)]
    torch.testing.assert_close(y, torch.cat(parts, 1))
    assert y.is_contiguous(memory_format=format)


def test_grouped_lrn_of_an_empty_batch_and_its_repr():
    norm = GroupedLocalResponseNorm(5, 0.5, 0.75, 2.0, 2)
    assert norm(torch.zeros(0, 12, 5, 7)).shape == (0, 12, 5, 7)
    assert repr(norm).endswith("(5, alpha=0.5, beta=0.75, k=2.0, groups=2)")


def test_channels_last_stays_channels_last(each_backend):
    layer = ConvReLULRNMaxPool2d(3, 8, 3, lrn=LRN, pool=POOL).to(memory_format=torch.channels_last)
    y = layer(in_format(randn(2, 3, 9, 11), torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
