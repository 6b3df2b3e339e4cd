"""Augmentation: picture by picture what its documentation says."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F

from fastcnn import reference
from fastcnn.data import Augmentation, Statistics, photographs
from fastcnn.data.augment import choices, normal_deviates

PICTURES = photographs(40).permute(0, 2, 3, 1).contiguous()[:, :36]
INDICES = torch.tensor([4, 0, 2**33, 7])
STATISTICS = Statistics.of(PICTURES)


def one_by_one(augment: Augmentation, epoch: int) -> Any:
    """The same in numpy, for each picture, in float64."""
    made = choices(3, epoch, INDICES, (36, 40), augment.crop, augment.jitter)
    offsets, mirror, normal = (x.numpy() for x in (*made[:2], normal_deviates(3, epoch, INDICES)))
    results = []
    for n, picture in enumerate(PICTURES.numpy().astype(float)):
        if augment.jitter is not None:
            short = sum(augment.jitter) // 2 if not augment.random else int(made.sizes[n, 0])
            resized = F.interpolate(
                torch.from_numpy(picture).permute(2, 0, 1)[None],
                (short, 40 * short // 36),
                mode="bilinear",
                antialias=True,
            )
            picture = resized[0].permute(1, 2, 0).numpy()
        centre = [(size - augment.crop) // 2 for size in picture.shape[:2]]
        top, left = offsets[n] if augment.random else centre
        crop = picture[top : top + augment.crop, left : left + augment.crop]
        if augment.random and mirror[n]:
            crop = crop[:, ::-1]
        for a, value, vector in zip(normal[n], STATISTICS.eigenvalues, STATISTICS.eigenvectors, strict=True):
            crop = crop + augment.noise * a * value**0.5 * numpy.array(vector)
        results.append((crop - augment.mean) / augment.std)
    return numpy.stack(results).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("random", [True, False])
@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize(("crop", "jitter"), [(1, None), (29, None), (36, None), (29, (29, 81)), (40, (40, 40))])
def test_each_picture_is_augmented_as_documented(
    random: bool, noise: float, crop: int, jitter: tuple[int, int] | None
) -> None:
    augment = Augmentation(
        crop,
        random=random,
        mean=(123.68, 116.779, 103.939),
        std=(58.4, 57.1, 57.4),
        noise=noise,
        statistics=STATISTICS,
        jitter=jitter,
    )
    for epoch in range(3):
        y = augment(PICTURES, 3, epoch, INDICES)
        assert (y.shape, y.dtype) == ((4, 3, crop, crop), torch.float32)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert numpy.abs(y.numpy() - one_by_one(augment, epoch)).max() < 1e-5


def test_both_mirrored_and_not_are_tested() -> None:
    mirrored = torch.stack([choices(3, epoch, INDICES, (36, 40), 29).mirror for epoch in range(3)])
    assert mirrored.any()
    assert not mirrored.all()


def test_every_size_of_the_jitter_is_as_likely() -> None:
    sizes = choices(3, 0, torch.arange(60_000), (30, 45), 9, (10, 15)).sizes
    assert sizes is not None
    short, counts = sizes[:, 0].unique(return_counts=True)
    assert short.tolist() == [10, 11, 12, 13, 14, 15]
    assert ((counts - 10_000).abs() < 400).all()
    assert torch.equal(sizes[:, 1], 45 * sizes[:, 0] // 30)


def test_offsets_reach_every_place_of_the_resized_picture() -> None:
    made = choices(5, 0, torch.arange(20_000), (8, 8), 9, (9, 12))
    assert made.sizes is not None
    for size in range(9, 13):
        assert made.offsets[made.sizes[:, 0] == size].unique().tolist() == list(range(size - 8))


def test_what_is_drawn_stays_the_same() -> None:
    """With other code too, or a run that was interrupted would go on with other pictures."""
    made = choices(3, 1, INDICES, (36, 40), 29)
    assert made.offsets.tolist() == [[3, 4], [3, 0], [4, 9], [5, 10]]
    assert made.mirror.all()
    assert made.sizes is None
    expected = torch.tensor([[-0.1876, 0.3850, -0.9395], [-0.1348, 0.3016, 0.6726]], dtype=torch.float64)
    torch.testing.assert_close(normal_deviates(3, 1, INDICES)[:2], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_results_are_rounded_once(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    options: dict[str, Any] = {"mean": (100.0, 90.5, 80.25), "std": (2.0, 3.0, 7.0)}
    y = Augmentation(29, dtype=dtype, memory_format=memory_format, **options)(PICTURES, 3, 0, INDICES)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    assert torch.equal(y, Augmentation(29, **options)(PICTURES, 3, 0, INDICES).to(dtype))


def test_strided_pictures_will_do() -> None:
    wide = torch.zeros(4, 36, 40, 4, dtype=torch.uint8)
    wide[..., :3] = PICTURES
    augment = Augmentation(29)
    assert torch.equal(augment(wide[..., :3], 3, 0, INDICES), augment(PICTURES, 3, 0, INDICES))


def test_the_reference_rounds_difference_and_product() -> None:
    mean = torch.tensor([[0.1, 0.2, 0.3]])
    y = reference.augment(
        torch.full((1, 2, 2, 3), 9, dtype=torch.uint8),
        torch.tensor([[1, 1]]),
        torch.tensor([False]),
        mean,
        crop=1,
        scale=(0.3, 0.7, 1.0),
    )
    expected = (numpy.float32(9) - mean[0].numpy()) * numpy.array([0.3, 0.7, 1.0], numpy.float32)
    assert y.flatten().tolist() == expected.tolist()


def test_crops_must_be_within_the_pictures() -> None:
    for random in (True, False):
        with pytest.raises(ValueError, match="pictures of 36x40 pixels are smaller than a crop of 37"):
            Augmentation(37, random=random)(PICTURES, 3, 0, INDICES)
    for offset in ((-1, 0), (0, -1), (8, 0), (0, 12)):
        offsets = torch.tensor([(0, 0), (7, 11), offset, (0, 0)])
        with pytest.raises(ValueError, match="crops of 29x29 that are not within pictures of"):
            reference.augment(PICTURES, offsets, torch.zeros(4).bool(), torch.zeros(4, 3), crop=29)


def test_pictures_that_cannot_be_resized_are_refused_whatever_is_drawn() -> None:
    augment = Augmentation(9, jitter=(9, 512))
    for size in ((10, 320), (1, 1), (16384, 16384)):
        augment.check(*size)
    for height, width in ((10, 321), (16385, 16385), (0, 5)):
        with pytest.raises(ValueError, match=f"pictures of {height}x{width} pixels"):
            augment(torch.zeros(1, height, width, 3, dtype=torch.uint8), 0, 0, torch.tensor([0]))


@pytest.mark.parametrize(
    "options",
    [
        {"crop": 5, "dtype": "float32"},
        {"crop": 5, "memory_format": None},
        {"crop": 2.5},
        {"crop": True},
        {"crop": 5, "dtype": torch.uint8},
        {"crop": 5, "jitter": 256},
        {"crop": 5, "jitter": (256.0, 512)},
        {"crop": 5, "jitter": (256,)},
    ],
)
def test_types_that_an_augmentation_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="must be"):
        Augmentation(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": 0}, "crop=0"),
        ({"crop": 5, "noise": float("inf"), "statistics": STATISTICS}, "noise=inf"),
        ({"crop": 5, "mean": (1.0,)}, r"mean=\(1.0,\)"),
        ({"crop": 5, "std": (1.0, 0.0, 1.0)}, r"std=\(1.0, 0.0, 1.0\)"),
        ({"crop": 5, "std": (1.0, float("nan"), 1.0)}, r"std=\(1.0, nan, 1.0\)"),
        ({"crop": 5, "noise": -0.1}, "noise=-0.1"),
        ({"crop": 5, "noise": float("nan")}, "noise=nan"),
        ({"crop": 5, "jitter": (4, 9)}, r"jitter=\(4, 9\), crop=5"),
        ({"crop": 5, "jitter": (9, 8)}, r"jitter=\(9, 8\)"),
        ({"crop": 5, "jitter": (9, 16385)}, "the second at most 16384"),
        ({"crop": 5, "mean": (1.0, float("nan"), 2.0)}, "must be finite"),
        ({"crop": 5, "noise": 0.1}, "noise needs the statistics of the training set"),
    ],
)
def test_what_an_augmentation_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)
