"""The tensors of a file beside those of a model: which is which, by their keys and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

import torch
from torch import Tensor

from .checkpoints import Entry

WRAPPERS = frozenset(  # of modules: DataParallel and EMA; torch.compile; Lightning and others; FSDP; checkpointing
    ("module", "_orig_mod", "model", "net", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
)
AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged)([._]|$)", re.IGNORECASE)
LONGEST_PREFIX = 8


@dataclass
class Candidate:
    """Tensors of a file that may be those of a model.

    Attributes:
        name: of their entry, and their prefix there.
        tensors: by key without the prefix.
        others: types of what else the entry holds, by key.
        beside: how many other tensors the entry holds.
        automatic: whether it is tried without being asked for.
        keys: that of the tensor for each key of the model that has one.
        alternatives: names of candidates that fit, and are not this one.
    """

    name: str
    tensors: dict[str, Tensor]
    others: dict[str, str] = field(default_factory=dict)
    beside: int = 0
    automatic: bool = True
    keys: dict[str, str] = field(default_factory=dict)
    alternatives: list[str] = field(default_factory=list)

    def state(self) -> dict[str, Tensor]:
        """By the keys of the model."""
        return {key: self.tensors[theirs] for key, theirs in self.keys.items()}

    def fits(self, own: Mapping[str, Tensor]) -> bool:
        """Whether nothing is missing, left over, or of another shape."""
        complete = all(key in self.keys or may_be_missing(key) for key in own)
        return complete and len(self.keys) == len(self.tensors) and not misfits(own, self.state())

    def mismatches(self, own: Mapping[str, Tensor]) -> list[str]:
        """Why it does not fit, one per line."""
        used = set(self.keys.values())
        left_over = {key: tensor for key, tensor in self.tensors.items() if key not in used}
        lines = missing(own, self.state(), left_over, self.others) + misfits(own, self.state())
        return lines + [f"its entry {name!r} fits; entry={name!r} loads that" for name in self.alternatives if lines]

    def notes(self) -> list[str]:
        """What a person should know of one that fits."""
        lines = [f"its entry {name!r} fits too; entry={name!r} loads that" for name in self.alternatives]
        renamed = [f"{theirs} -> {key}" for key, theirs in self.keys.items() if key != theirs]
        if renamed:
            lines.insert(0, f"{len(renamed)} keys have other wrappers in the model: {renamed[0]}, ...")
        if self.name:
            beside = f"; tensors beside it: {self.beside}" if self.beside else ""
            lines.insert(0, f"from its entry {self.name!r}{beside}")
        return lines


def choose(entries: list[Entry], own: Mapping[str, Tensor], chosen: str | None) -> Candidate:
    """The tensors of a file that fit a model; if none do, those of which most fit.

    Args:
        entries: of the file.
        own: the model's tensors.
        chosen: their name, or how it begins. If None, all entries are tried, and within them prefixes that all keys
            have or that are names of wrappers. Of several that fit, averages over the training (EMA) are not taken.

    Raises:
        ValueError: nothing has the chosen name, or several fit.
    """
    candidates = [candidate for entry in entries for candidate in _candidates(entry)]
    for candidate in candidates:
        candidate.keys = _matched(own, candidate.tensors)
    if chosen is None:
        allowed = [c for c in candidates if c.automatic]
    else:
        allowed = [c for c in candidates if c.name == chosen or c.name.startswith(f"{chosen}.")]
    if not allowed:
        raise ValueError(f"it has no entry {chosen!r}, but {', '.join(repr(entry.name) for entry in entries)}")
    fitting: dict[frozenset[int], Candidate] = {}  # by the tensors: prefixes that all keys have make no difference
    for candidate in allowed:
        if candidate.fits(own):
            fitting.setdefault(frozenset(map(id, candidate.tensors.values())), candidate)
    if not fitting:
        best = max(allowed, key=lambda c: (_alike(own, c.state()), -len(c.tensors)))
        best.alternatives = [c.name for c in candidates if c.fits(own)]
        return best
    found = list(fitting.values())
    plain = [c for c in found if not AVERAGED.search(c.name.removeprefix(chosen or ""))] or found
    if len(plain) > 1:
        raise ValueError(f"several entries fit: {', '.join(repr(c.name) for c in plain)}; say which, as entry=")
    plain[0].alternatives = [c.name for c in found if c is not plain[0]]
    return plain[0]


def _candidates(entry: Entry) -> Iterator[Candidate]:
    """All tensors of an entry, then those of each prefix."""
    yield Candidate(entry.name, entry.tensors, entry.others)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in entry.tensors.items():
        names = key.split(".", LONGEST_PREFIX)
        for depth in range(1, len(names)):
            parts.setdefault(".".join(names[:depth]), {})[".".join(names[depth:])] = tensor
    for prefix, tensors in parts.items():
        name = f"{entry.name}.{prefix}" if entry.name else prefix
        beside = len(entry.tensors) - len(tensors)
        automatic = not beside or WRAPPERS.issuperset(prefix.split("."))
        yield Candidate(name, tensors, beside=beside, automatic=automatic)


def _matched(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The key of the file for each key of the model that has one: the same but for the names of wrappers."""
    same = {key: key for key in own if key in tensors}
    ours, theirs = (_without_wrappers(key for key in keys if key not in same) for keys in (own, tensors))
    return same | {ours[bare]: theirs[bare] for bare in ours if bare in theirs}


def _without_wrappers(keys: Iterable[str]) -> dict[str, str]:
    """Keys by what they are without wrappers, of those that differ then."""
    bare: dict[str, list[str]] = {}
    for key in keys:
        bare.setdefault(".".join(name for name in key.split(".") if name not in WRAPPERS), []).append(key)
    return {name: keys[0] for name, keys in bare.items() if len(keys) == 1}


def _alike(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> int:
    return sum(own[key].shape == tensor.shape for key, tensor in state.items())


def may_be_missing(key: str) -> bool:
    """Old versions of torch did not count batches."""
    return key.endswith("num_batches_tracked")


def missing(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    left_over: Mapping[str, Tensor] | None = None,
    others: Mapping[str, str] | None = None,
) -> list[str]:
    """What only one of both has, one per line.

    Args:
        own: the model's tensors.
        state: the file's, by the keys of the model.
        left_over: the file's others.
        others: types of what else the file holds, by key.
    """
    left_over, others = left_over or {}, others or {}
    absent = {key: own[key] for key in own if key not in state and not may_be_missing(key)}
    tell_nearest = len(absent) * len(left_over) <= 20_000  # which takes a second
    lines = []
    for key, tensor in absent.items():
        line = f"{key} is missing in the file; it is {tuple(tensor.shape)} in the model"
        if key in others:
            line = f"{key} is of type {others[key]} in the file, not a tensor; it is {tuple(tensor.shape)} in the model"
        elif tell_nearest and (near := _nearest(key, tensor, left_over)):
            line += f"; nearest in the file: {near} {tuple(left_over[near].shape)}"
        lines.append(line)
    for key, tensor in left_over.items():
        line = f"{key} {tuple(tensor.shape)} is in the file only"
        if tell_nearest and (near := _nearest(key, tensor, absent)):
            line += f"; nearest in the model: {near} {tuple(absent[near].shape)}"
        lines.append(line)
    return lines


def _nearest(key: str, tensor: Tensor, others: Mapping[str, Tensor]) -> str | None:
    """The most similar key, of those of the same shape if there are any."""
    same = [other for other in others if others[other].shape == tensor.shape]
    found = get_close_matches(key, same, 1, 0) or get_close_matches(key, others, 1)
    return found[0] if found else None


def misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """The tensors that both have and that cannot be copied, one per line."""
    lines = []
    for key in (key for key in own if key in state):
        ours, theirs = own[key], state[key]
        if ours.shape != theirs.shape:
            lines.append(f"{key} is {tuple(theirs.shape)} in the file and {tuple(ours.shape)} in the model")
        elif ours.is_floating_point() != theirs.is_floating_point():
            lines.append(f"{key} is {theirs.dtype} in the file and {ours.dtype} in the model")
        elif theirs.layout != torch.strided:
            lines.append(f"{key} is sparse in the file ({theirs.layout})")
        elif _overflows(theirs, ours.dtype):
            lines.append(
                f"{key} has values of up to {theirs[theirs.isfinite()].abs().max():g}, too large for {ours.dtype}"
            )
        elif ours.is_meta:
            lines.append(f"{key} of the model is on the meta device, and can take no values")
    return lines


def _overflows(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether finite values become infinite."""
    if not tensor.is_floating_point() or torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max:
        return False
    return bool((tensor.to(dtype).isinf() & tensor.isfinite()).any())
