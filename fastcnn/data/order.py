"""The order of an epoch, and the random numbers of a picture in it: functions of (seed, epoch, index) without state.

So where a run stands is (epoch, step) and nothing else. All randomness is :func:`fastcnn.reference.philox4x32`, whose
key is the seed and whose counter is ``(index % 2**32, index // 2**32, epoch, stream)``; one stream for each purpose.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from ..reference import philox4x32
from .workers import integer


class Stream(IntEnum):
    """What random numbers are for: the last word of their counter."""

    ORDER = 0
    CROP = 1
    NOISE = 2
    DROPOUT = 3  # index: of a step in its epoch
    INIT = 4  # of the weights: epoch and index are 0


def random_words(seed: int, epoch: int, indices: Tensor, stream: Stream) -> Tensor:
    """Four random words from 0 to 2**32 - 1 for each of the pictures ``indices``: int64 tensor of shape (n, 4)."""
    fixed = torch.tensor((epoch, stream), device=indices.device).expand(len(indices), 2)
    counter = torch.cat((torch.stack((indices & 0xFFFFFFFF, indices >> 32), 1), fixed), 1)
    return philox4x32(counter, seed)


def epoch_order(pictures: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch: a permutation of ``0 ... pictures - 1``, int64.

    Pictures are sorted by 63 random bits, ``words[0] * 2**31 + words[1] // 2`` of the stream ORDER; equal ones by
    index.
    """
    words = random_words(seed, epoch, torch.arange(pictures, device="cpu"), Stream.ORDER)
    return ((words[:, 0] << 31) | (words[:, 1] >> 1)).sort(stable=True).indices


@dataclass(frozen=True)
class Order:
    """Which pictures make each batch of an epoch.

    A global batch is ``epoch_order(...)[step * batch : (step + 1) * batch]``; the last one has what is left, unless it
    is dropped. Of ``b`` pictures in it rank ``r`` of ``w`` has those from ``b * r // w`` to ``b * (r + 1) // w``: the
    parts differ by at most one, are empty where there are fewer pictures than ranks, and in the order of ranks they are
    the global batch. So each rank makes as many steps, and each picture comes once.

    Args:
        pictures: of the data set.
        batch: of a global batch.
        seed: from 0 to 2**64 - 1.
        shuffle: whether each epoch has an order of its own, or that of the data set.
        drop_last: whether the last batch is left out if it is incomplete.
        rank, world: of this process, and of all.

    Raises:
        TypeError: an argument is no integer.
        ValueError: it is out of range.
    """

    pictures: int
    batch: int
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        for name in ("pictures", "batch", "seed", "rank", "world"):
            object.__setattr__(self, name, integer(name, getattr(self, name)))
        if self.pictures < 0 or self.batch < 1 or not 0 <= self.seed < 2**64 or not 0 <= self.rank < self.world:
            raise ValueError(
                "expected pictures >= 0, batch >= 1, 0 <= seed < 2**64 and 0 <= rank < world, but got pictures="
                f"{self.pictures}, batch={self.batch}, seed={self.seed}, rank={self.rank}, world={self.world}"
            )

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return self.pictures // self.batch if self.drop_last else -(-self.pictures // self.batch)

    @property
    def largest(self) -> int:
        """Pictures in the largest batch of any rank."""
        return -(-min(self.batch, self.pictures) // self.world)

    def epoch(self, epoch: int, step: int = 0) -> list[Tensor]:
        """The pictures of this rank, int64, in each batch of an epoch from a step on.

        Raises:
            TypeError: ``epoch`` or ``step`` is no integer.
            ValueError: ``epoch`` is not from 0 to 2**32 - 1, or ``step`` not from 0 to the number of steps.
        """
        epoch, step = integer("epoch", epoch), integer("step", step)
        if not 0 <= epoch < 2**32 or not 0 <= step <= self.steps:
            raise ValueError(
                f"expected 0 <= epoch < 2**32 and 0 <= step <= {self.steps}, but got epoch={epoch}, step={step}"
            )
        all_ranks = torch.arange(self.pictures, device="cpu")
        if self.shuffle:
            all_ranks = epoch_order(self.pictures, self.seed, epoch)
        return [self._part(batch) for batch in all_ranks.split(self.batch)[step : self.steps]]

    def _part(self, batch: Tensor) -> Tensor:
        return batch[len(batch) * self.rank // self.world : len(batch) * (self.rank + 1) // self.world]
