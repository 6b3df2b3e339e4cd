"""What is special to the augmentation; its promises are tested in test_promises.py."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy
import pytest
import torch
from operators import augment
from promises import DTYPES, FORMATS, assert_bitwise, assert_same_answer, ident

import fastcnn
import fastcnn.functional as FF
from fastcnn import reference
from fastcnn.params import MOST_RESIZED

CASE = augment.augment_case((3, 40, 36, 3), (29, 31))
RESIZED = augment.augment_case((3, 40, 36, 3), (29, 31), resized=True)
TENSORS = dict(zip(("input", "offsets", "mirror", "mean"), CASE.tensors(), strict=False))


def call(**changed):
    return FF.augment(**{**TENSORS, "crop": 29, **changed})


# -- its answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_a_new_size_that_is_the_old_one_changes_nothing(backend, dtype, format):
    """Each pixel has the weight 1 in its own place, and no other has any."""
    options = {"crop": (20, 31), "scale": (0.1, 1.0, 7.0), "dtype": dtype, "memory_format": format}
    x, _, mirror, mean, _ = CASE.tensors()
    offsets = torch.tensor([[0, 0], [20, 5], [7, 1]])
    sizes = torch.tensor([[40, 36]]).expand(3, 2)
    assert_bitwise(
        FF.augment(x, offsets, mirror, mean, sizes, **options), FF.augment(x, offsets, mirror, mean, **options)
    )


@pytest.mark.parametrize("sizes", [(1, 1), (1, 300), (13, 12), (80, 72), (41, 37), (39, 7)], ids=ident)
def test_a_picture_of_one_colour_stays_so(backend, sizes):
    """Weights add up to 1 at the borders too."""
    x = torch.tensor([3, 250, 128], dtype=torch.uint8).expand(2, 40, 36, 3)
    zeros = torch.zeros(2, 2, dtype=torch.int64)
    y = FF.augment(
        x, zeros, zeros[:, 0].bool(), zeros.float()[:, :1].expand(2, 3), zeros + torch.tensor(sizes), crop=sizes
    )
    torch.testing.assert_close(y, x[:, :1, :1].permute(0, 3, 1, 2).float().expand_as(y), rtol=3e-7, atol=0)


def test_the_largest_pictures_that_can_be_resized(kernel):
    """Positions in them take all of 32 bits."""
    x = torch.randint(0, 256, (1, 2, MOST_RESIZED, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    others = torch.tensor([False]), torch.zeros(1, 3)
    for height, width, left in ((3, MOST_RESIZED - 1, MOST_RESIZED - 9), (MOST_RESIZED, 128, 8), (3, 32, 8)):
        args = torch.tensor([[1, left]]), *others, torch.tensor([[height, width]])
        exact = reference.augment(x, *args, crop=(2, 8), dtype=torch.float64)
        assert_same_answer(FF.augment(x, *args, crop=(2, 8)), exact)


def test_pictures_of_a_memory_map_are_read_in_place(tmp_path: Path, best_backend, monkeypatch):
    """Though they cannot be written, and end where the file does."""
    numpy.save(tmp_path / "pictures.npy", CASE.tensors()[0].numpy())
    mapped = numpy.load(tmp_path / "pictures.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the tensor could be written
        pictures = torch.from_numpy(mapped)
    monkeypatch.setattr(torch.Tensor, "clone", None)
    for case in (CASE, RESIZED):
        assert_bitwise(case(pictures, *case.tensors()[1:]), case(*case.tensors()))


# -- no gradient ------------------------------------------------------------------------------------------------------


def test_an_argument_that_asks_for_a_gradient_raises():
    mean = TENSORS["mean"].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'mean'"):
        call(mean=mean)
    with torch.no_grad():
        assert not call(mean=mean).requires_grad
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'mean'"):
        torch.func.grad(lambda mean: call(mean=mean).sum())(mean.detach())
    pictures, offsets, mirror, _ = TENSORS.values()
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'mean'"):
        torch.ops.fastcnn.augment(pictures, offsets, mirror, mean, None, [29, 29], [1.0] * 3, torch.float32, True)


@pytest.mark.parametrize(
    "run",
    [
        lambda mean: reference.augment(**{**TENSORS, "mean": mean}, crop=29),
        lambda mean: torch.jit.trace(fastcnn.nn.Augment(29), (*[*TENSORS.values()][:3], mean)),
        lambda mean: torch.func.jvp(lambda mean: call(mean=mean), (mean.detach(),), (mean.detach(),)),
        lambda mean: torch.compile(lambda mean: call(mean=mean), backend="eager")(mean),
    ],
    ids=["reference", "trace", "jvp", "compile"],
)
def test_no_other_way_gives_one(run):
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'mean'"):
        run(TENSORS["mean"].clone().requires_grad_())


def test_traced_it_takes_other_pictures_and_choices():
    """But no sizes, on which depends what would be traced."""
    layer = CASE.layer()
    traced = torch.jit.trace(layer, CASE.tensors()[:4])
    other = augment.varied(CASE, 1, 9).tensors(seed=5)[:4]
    assert_bitwise(traced(*other), layer(*other))
    with pytest.raises(RuntimeError, match="cannot be traced with sizes"):
        torch.jit.trace(RESIZED.layer(), RESIZED.tensors())


@pytest.mark.parametrize("dynamo", [False, True])
def test_onnxruntime_computes_the_same_bits(tmp_path: Path, dynamo):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file, layer, tensors = tmp_path / "augment.onnx", CASE.layer(), CASE.tensors()[:4]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the tracing exporter will go, and what it does not see
        torch.onnx.export(layer, tuple(tensors), file, dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    feeds = {t.name: value.numpy() for t, value in zip(session.get_inputs(), tensors, strict=True)}
    assert_bitwise(torch.from_numpy(session.run(None, feeds)[0]), layer(*tensors).contiguous())


def test_zeros_of_either_sign_are_factors_of_their_own(each_backend):
    """Whatever was called before."""
    for factor in (0.0, -0.0):
        y = call(mean=torch.zeros(3, 3), scale=(factor,) * 3)
        assert_bitwise(torch.signbit(y), torch.signbit(torch.full_like(y, factor)))


@pytest.mark.parametrize("case", [CASE, RESIZED], ids=lambda case: case.id)
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export(case, strict):
    layer, tensors = case.layer(), case.tensors()
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = tuple(None if t is None else {0: batch} for t in tensors)
    exported = torch.export.export(layer, tuple(tensors), dynamic_shapes=shapes, strict=strict).module()
    for n in (4, 5):
        tensors = augment.varied(case, n - 3, 0).tensors(seed=n)
        assert_bitwise(exported(*tensors), layer(*tensors))


# -- bad input --------------------------------------------------------------------------------------------------------

INT = torch.zeros(3, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"crop": 2.5}, TypeError, "'crop' must be int or a tuple of two ints, not float"),
        ({"crop": True}, TypeError, "'crop' must be int or a tuple of two ints, not bool"),
        ({"crop": 0}, RuntimeError, r"crop must be greater than zero, but got crop=\[0, 0\]"),
        ({"crop": (1, 2, 3)}, RuntimeError, "crop must either be a single int"),
        ({"scale": 1.0}, TypeError, "'scale' must be a tuple of three numbers, not 1.0"),
        ({"scale": (1.0, "a", 1.0)}, TypeError, "'scale' must be a tuple of three numbers"),
        ({"scale": (1.0, 1.0)}, RuntimeError, "scale must have three factors"),
        ({"dtype": "float32"}, TypeError, "'dtype' must be torch.dtype, not str"),
        ({"dtype": torch.uint8}, NotImplementedError, "not implemented for dtype=torch.uint8"),
        ({"memory_format": torch.channels_last_3d}, RuntimeError, "memory_format must be torch.channels_last or"),
        ({"memory_format": None}, TypeError, "'memory_format' must be torch.memory_format, not NoneType"),
        ({"input": torch.zeros(3, 40, 36, 4).byte()}, RuntimeError, r"expected a 4D \(N, H, W, 3\) input"),
        ({"offsets": INT[:2]}, RuntimeError, r"expected offsets of size \[3, 2\] and torch.int64, but got size"),
        ({"offsets": INT.int()}, RuntimeError, "expected offsets of .* torch.int32"),
        ({"mirror": INT[:, 0]}, RuntimeError, r"expected mirror of size \[3\] and torch.bool"),
        ({"mean": INT}, RuntimeError, r"expected mean of size \[3, 3\]"),
        ({"mean": torch.zeros(3, 3).int()}, RuntimeError, "expected mean of a floating-point dtype"),
        ({"mean": [1.0] * 3}, TypeError, "argument 'mean' must be Tensor, not list"),
        ({"offsets": None}, TypeError, "argument 'offsets' must be Tensor, not NoneType"),
        ({"mean": torch.zeros(3, 3).to_sparse()}, NotImplementedError, "mean must have layout torch.strided"),
        ({"sizes": INT[0]}, RuntimeError, r"expected sizes of size \[3, 2\]"),
        ({"sizes": 256}, TypeError, "argument 'sizes' must be Tensor, not int"),
        ({"mean": torch.zeros(3, 3, device="meta")}, RuntimeError, "expected mean on the CPU or with the input on cpu"),
    ],
    ids=str,
)
def test_what_is_refused(changed, error, match):
    for function in (FF.augment, reference.augment):
        with pytest.raises(error, match=match) as raised:
            function(**{**TENSORS, "crop": 29, **changed})
        assert raised.type is error


@pytest.mark.parametrize("offset", [(-1, 0), (0, -1), (12, 0), (0, 8), (2**62, 0), (0, -(2**63))], ids=ident)
def test_crops_must_be_within_their_pictures(each_backend, offset):
    """Wherever the reference is asked, and each backend, before anything is read."""
    offsets = torch.tensor([(0, 0), offset, (0, 0)])
    for function in (FF.augment, reference.augment):
        with pytest.raises(ValueError, match="there are crops of 29x29 that are not within pictures of 40x36"):
            function(**{**TENSORS, "offsets": offsets}, crop=29)
        with pytest.raises(ValueError, match="not within the resized pictures"):
            function(**{**TENSORS, "offsets": offsets}, sizes=torch.tensor([(40, 36)] * 3), crop=29)


def test_sizes_must_be_those_of_pictures(each_backend):
    for sizes in ((0, 36), (40, -1), (MOST_RESIZED + 1, 36), (2**62, 2**62)):
        with pytest.raises(ValueError, match="pictures can be resized from and to 1 to 16384 pixels"):
            call(sizes=torch.tensor([(40, 36), sizes, (40, 36)]))
    for height, width in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match=f"but got pictures of {height}x{width}"):
            FF.augment(
                torch.zeros(1, height, width, 3).byte(),
                INT[:1],
                torch.tensor([False]),
                torch.zeros(1, 3),
                INT[:1] + 4,
                crop=2,
            )
    long = torch.zeros(1, 1, MOST_RESIZED + 1, 3, dtype=torch.uint8)
    rest = INT[:1], torch.tensor([False]), torch.zeros(1, 3)
    with pytest.raises(ValueError, match="but got pictures of 1x16385"):
        FF.augment(long, *rest, torch.tensor([[4, 4]]), crop=1)
    assert FF.augment(long, *rest, crop=1).shape == (1, 3, 1, 1)
    assert FF.augment(long[:0], *(t[:0] for t in rest), INT[:0], crop=1).shape == (0, 3, 1, 1)


def test_the_op_called_directly_refuses_what_does_not_fit(each_backend):
    x, offsets, mirror, mean = TENSORS.values()
    wrong = (
        (x.float(), offsets, mirror, mean),
        (x[..., :2], offsets, mirror, mean),
        (x, offsets[:1], mirror, mean),
        (x, offsets.int(), mirror, mean),
        (x, offsets, mirror[:1], mean),
        (x, offsets, mirror, mean[:1]),
    )
    for tensors in wrong:
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.ops.fastcnn.augment(*tensors, None, [29, 29], [1.0] * 3, torch.float32, True)


@pytest.mark.skipif("cpu" not in fastcnn.backends.available(), reason="C++ kernels are not built")
def test_the_private_op_reads_nothing_out_of_bounds():
    x, offsets, mirror, mean = TENSORS.values()
    y = torch.empty(3, 3, 29, 29)
    run = torch.ops.fastcnn_cpu.augment
    for bad in (offsets - 40, offsets + 40):
        with pytest.raises(RuntimeError, match="a crop is not within its picture"):
            run(x, bad, mirror, mean, None, y, False, 1.0, 1.0, 1.0)
    for size in (MOST_RESIZED + 1, 0, -1, -(2**63), 2**63 - 1):
        with pytest.raises(RuntimeError, match="a picture cannot be resized"):
            run(x, INT, mirror, mean, INT + size, y, False, 1.0, 1.0, 1.0)
    for tensors in ((x[:, :9], offsets, mirror, mean), (x, offsets[:2], mirror, mean), (x, offsets, mirror, mean[:1])):
        with pytest.raises(RuntimeError):
            run(*tensors, None, y, False, 1.0, 1.0, 1.0)
