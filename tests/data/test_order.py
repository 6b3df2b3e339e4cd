"""Order and random choices without state: the published test vectors, and the same batches whoever reads them."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from fastcnn.data import Order, epoch_order
from fastcnn.data.augment import choices, normal_deviates
from fastcnn.data.order import Stream, random_words
from fastcnn.reference import philox4x32

# Random123's kat_vectors: counter, key, output
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox_of_numpy(counter: list[int], key: int) -> list[int]:
    """The same rounds in Python's integers, as the paper writes them."""
    (a, b, c, d), low, high = counter, key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (q >> 32) ^ b ^ low, q & 0xFFFFFFFF, (p >> 32) ^ d ^ high, p & 0xFFFFFFFF
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return [a, b, c, d]


# Philox


@pytest.mark.parametrize(("counter", "key", "output"), VECTORS)
def test_philox_gives_the_published_vectors(counter: str, key: str, output: str) -> None:
    low, high = words(key)
    got = philox4x32(torch.tensor(words(counter)), high << 32 | low)
    assert got.tolist() == words(output) == philox_of_numpy(words(counter), high << 32 | low)


def test_philox_is_elementwise() -> None:
    counters = torch.randint(2**32, (3, 5, 4), generator=torch.Generator().manual_seed(0))
    got = philox4x32(counters, 2**64 - 1)
    assert got.shape == counters.shape
    for index in itertools.product(range(3), range(5)):
        assert got[index].tolist() == philox_of_numpy(counters[index].tolist(), 2**64 - 1)


def test_each_counter_and_key_gives_words_of_its_own() -> None:
    far = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**40 + 1])
    found = [
        tuple(row)
        for seed, epoch, stream in itertools.product((0, 1, 2**32, 2**64 - 1), (0, 1, 2**32 - 1), Stream)
        for row in random_words(seed, epoch, far, stream).tolist()
    ]
    assert len(set(found)) == len(found) == 4 * 3 * len(Stream) * 5


# The order of an epoch


def test_the_order_is_as_specified() -> None:
    keys = [philox_of_numpy([index, 0, 7, 0], 2**33 + 5) for index in range(50)]
    expected = sorted(range(50), key=lambda index: (keys[index][0] * 2**31 + keys[index][1] // 2, index))
    assert epoch_order(50, 2**33 + 5, 7).tolist() == expected


def test_orders_are_permutations_that_differ() -> None:
    orders = [tuple(epoch_order(30, seed, epoch).tolist()) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    assert all(sorted(order) == list(range(30)) for order in orders)


def test_all_orders_are_equally_likely() -> None:
    seen = Counter(tuple(epoch_order(4, 1, epoch).tolist()) for epoch in range(4800))
    assert len(seen) == 24
    chi2 = sum((count - 200) ** 2 / 200 for count in seen.values())
    assert chi2 < 49.7  # of 23 degrees of freedom, exceeded once in a thousand times


def test_torch_and_its_settings_have_no_say() -> None:
    expected, state = epoch_order(9, 0, 0), torch.get_rng_state()
    torch.manual_seed(5)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            assert torch.equal(epoch_order(9, 0, 0), expected)
    finally:
        torch.set_default_dtype(before)
        torch.set_rng_state(state)


# Batches


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_have_the_global_batches_between_them(world: int, drop_last: bool) -> None:
    """In their order: the position of a rank's pictures within a batch does not depend on the number of ranks."""
    alone = Order(23, 5, seed=3, drop_last=drop_last).epoch(2)
    ranks = [Order(23, 5, seed=3, drop_last=drop_last, rank=rank, world=world).epoch(2) for rank in range(world)]
    assert [len(parts) for parts in ranks] == [len(alone)] * world
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert torch.cat(parts).tolist() == whole.tolist()
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert max(map(len, parts)) <= Order(23, 5, world=world).largest


def test_an_epoch_shows_each_picture_once() -> None:
    order = Order(23, 5)
    assert [len(batch) for batch in order.epoch(0)] == [5, 5, 5, 5, 3]
    assert sorted(torch.cat(order.epoch(0)).tolist()) == list(range(23))
    dropped = Order(23, 5, drop_last=True)
    assert [len(batch) for batch in dropped.epoch(0)] == [5] * 4
    assert torch.equal(torch.cat(dropped.epoch(0)), torch.cat(order.epoch(0))[:20])
    assert torch.cat(Order(23, 5, shuffle=False).epoch(9)).tolist() == list(range(23))
    assert (order.steps, dropped.steps, Order(20, 5).steps, Order(3, 5, drop_last=True).steps) == (5, 4, 4, 0)


def test_a_resumed_rank_goes_on_in_the_right_order() -> None:
    """Restored after 100 batches of the third epoch, two ranks: elsewhere, they had the position but another order.

    https://github.com/huggingface/accelerate/issues/4195
    """
    alone = Order(2000, 8, seed=11).epoch(3)
    for rank in range(2):
        resumed = Order(2000, 8, seed=11, rank=rank, world=2).epoch(3, step=100)
        assert len(resumed) == 150
        for part, whole in zip(resumed, alone[100:], strict=True):
            assert torch.equal(part, whole[4 * rank : 4 * rank + 4])


def test_every_step_can_be_resumed_at() -> None:
    order = Order(23, 5, seed=1)
    whole = order.epoch(4)
    for step in range(order.steps + 1):
        rest = order.epoch(4, step)
        assert [batch.tolist() for batch in rest] == [batch.tolist() for batch in whole[step:]]


@pytest.mark.parametrize(
    "wrong",
    [{"batch": 0}, {"batch": -1}, {"seed": -1}, {"seed": 2**64}, {"rank": 2}, {"rank": -1}, {"world": 0}],
)
def test_what_an_order_refuses(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        Order(**{"pictures": 10, "batch": 2, "world": 2, **wrong})


@pytest.mark.parametrize(("epoch", "step"), [(-1, 0), (2**32, 0), (0, -1), (0, 6)])
def test_epochs_and_steps_that_there_are_not(epoch: int, step: int) -> None:
    with pytest.raises(ValueError, match=f"epoch={epoch}, step={step}"):
        Order(10, 2).epoch(epoch, step)


# Crops, mirrors, noise


def drawn(count: int = 20_000, **changed: int) -> tuple[Tensor, Tensor, Tensor]:
    return drawn_for(torch.arange(count), changed.get("seed", 0), changed.get("epoch", 0))


def drawn_for(indices: Tensor, seed: int, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets, mirror and noise."""
    return *choices(seed, epoch, indices, (256, 240), 227)[:2], normal_deviates(seed, epoch, indices)


def test_choices_are_as_specified() -> None:
    offsets, mirror, normal = drawn_for(torch.tensor([3, 2**32 + 4]), 5, 6)
    sizes = choices(5, 6, torch.tensor([3, 2**32 + 4]), (240, 360), 227, (256, 512)).sizes
    assert sizes is not None
    for row, (low, high) in enumerate([(3, 0), (4, 1)]):
        w = philox_of_numpy([low, high, 6, 1], 5)
        assert offsets[row].tolist() == [w[0] * 30 // 2**32, w[1] * 14 // 2**32]
        assert bool(mirror[row]) == (w[2] >= 2**31)
        short = 256 + w[3] * 257 // 2**32
        assert sizes[row].tolist() == [short, 360 * short // 240]
        w = philox_of_numpy([low, high, 6, 2], 5)
        radius = [math.sqrt(-2 * math.log((w[k] + 1) / 2**32)) for k in (0, 2)]
        first, second = (2 * math.pi * w[k] / 2**32 for k in (1, 3))
        expected = radius[0] * math.cos(first), radius[0] * math.sin(first), radius[1] * math.cos(second)
        assert normal[row].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_choices_depend_on_nothing_but_seed_epoch_and_index() -> None:
    whole = drawn(100)
    some = torch.tensor([17, 3, 99])
    for one, part in zip(whole, drawn_for(some, 0, 0), strict=True):
        assert torch.equal(one[some], part)
    for changed in ({"seed": 1}, {"epoch": 1}):
        assert not any(torch.equal(one, other) for one, other in zip(whole, drawn(100, **changed), strict=True))


def test_crops_are_anywhere_and_half_are_mirrored() -> None:
    offsets, mirror, _ = drawn()
    for column, places in ((0, 30), (1, 14)):
        counts = torch.bincount(offsets[:, column], minlength=places)
        assert len(counts) == places
        expected = 20_000 / places
        assert float(((counts - expected) ** 2 / expected).sum()) < places + 4 * math.sqrt(2 * places)
    assert abs(float(mirror.double().mean()) - 0.5) < 0.015


def test_noise_is_normal_and_everything_independent() -> None:
    offsets, mirror, normal = drawn()
    sorted_, _ = normal.flatten().sort()
    exact = 0.5 * (1 + torch.special.erf(sorted_ / math.sqrt(2)))
    empirical = (torch.arange(60_000) + 0.5) / 60_000
    assert float((exact - empirical).abs().max()) < 1.95 / math.sqrt(60_000)  # Kolmogorov and Smirnov's, once in 1000
    columns = torch.cat((offsets.double(), mirror[:, None].double(), normal), 1)
    for other in (columns, torch.cat((columns[1:], columns[:1])), torch.cat(drawn(epoch=1)[2:], 1)):
        both = torch.corrcoef(torch.cat((columns, other), 1).T)[: columns.shape[1], columns.shape[1] :]
        off = both.fill_diagonal_(0) if other is columns else both
        assert float(off.abs().max()) < 0.03
