"""Batches on a GPU are those of the CPU, through pinned memory or from a set that is kept there."""

import pytest
import torch

from fastcnn.data import Augmentation, Statistics, loader
from fastcnn.data.dataset import Arrays

pytestmark = pytest.mark.gpu


@pytest.fixture
def dataset(gpu):
    pixels = torch.randint(256, (50, 40, 36, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return Arrays("noise", "train", "all", ["a", "b"], torch.arange(50) % 2, [pixels[:30], pixels[30:]])


@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"cache": "device"}], ids=["here", "workers", "cached"])
def test_batches_are_those_of_the_cpu(dataset, options):
    statistics = Statistics.of(dataset.arrays[0])
    for augment in (None, Augmentation(31, mean=statistics.mean, noise=0.1, statistics=statistics)):
        expected = loader(dataset, 16, augment=augment)
        batches = loader(dataset, 16, augment=augment, device="cuda", **options)
        for epoch in range(2):
            kept = list(batches.epoch(epoch))
            for got, right in zip(kept, expected.epoch(epoch), strict=True):
                assert got.images.is_cuda
                assert got.labels.is_cuda
                for one, other in zip(got, right, strict=True):
                    assert torch.equal(one.cpu(), other)


def test_jitter_is_that_of_the_cpu(dataset):
    augment = Augmentation(31, jitter=(31, 90))
    batches = (loader(dataset, 16, augment=augment, device=device).epoch(1) for device in ("cuda", "cpu"))
    for got, right in zip(*batches, strict=True):
        torch.testing.assert_close(got.images.cpu(), right.images, rtol=1e-5, atol=1e-4)


def test_a_set_that_does_not_fit_is_refused(dataset):
    free = torch.cuda.mem_get_info()[0]
    dataset.arrays = [torch.empty(1, dtype=torch.uint8).expand(free // (40 * 36 * 3) + 1, 40, 36, 3)]
    with pytest.raises(ValueError, match="are to be cached on cuda"):
        loader(dataset, 16, device="cuda", cache="device")
