"""The tensors of a file beside those of a model: which is which, by their keys and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints import Entry

WRAPPERS = frozenset(  # of modules: DataParallel and EMA; torch.compile; Lightning and others; FSDP; checkpointing
    ("module", "_orig_mod", "model", "net", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
)
AVERAGED = re.compile(r"(?i:(^|[._])(ema|swa|avg|averaged?|shadow|polyak|teacher)([._]|$))|EMA")
CONVERTED = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.complex128, torch.complex64, torch.bool),
}
LONGEST_PREFIX, LONGEST_SHOWN = 8, 200  # names of modules; letters of a key


@dataclass(eq=False)
class Candidate:
    """Tensors of a file that may be those of a model.

    Attributes:
        entry: what they are in.
        prefix: of their keys there; empty for all of the entry.
        tensors: by key without the prefix.
        keys: that of the tensor for each key of the model that has one.
        alternatives: names of other candidates that fit.
    """

    entry: Entry
    prefix: str
    tensors: dict[str, Tensor]
    keys: dict[str, str] = field(default_factory=dict)
    alternatives: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return ".".join(filter(None, (self.entry.name, self.prefix)))

    @property
    def beside(self) -> int:
        """How many other tensors the entry holds."""
        return len(self.entry.tensors) - len(self.tensors)

    def is_tried(self, chosen: str | None) -> bool:
        """Whether it may be loaded: prefixes count that all keys have, that are names of wrappers, or are chosen."""
        if chosen is None:
            return not self.beside or _are_wrappers(self.prefix)
        if not f"{self.name}.".startswith(f"{chosen}."):
            return False
        rest = self.name[len(chosen) + 1 :]
        return not rest or not self.beside or _are_wrappers(self.prefix) or _are_wrappers(rest)

    def state(self) -> dict[str, Tensor]:
        """By the keys of the model."""
        return {key: self.tensors[theirs] for key, theirs in self.keys.items()}

    def fits(self, own: Mapping[str, Tensor]) -> bool:
        """Whether nothing is missing, left over, or of another shape."""
        complete = len(self.keys) == len(self.tensors) and all(key in self.keys or may_be_missing(key) for key in own)
        return complete and not misfits(own, self.state())

    def mismatches(self, own: Mapping[str, Tensor]) -> list[str]:
        """Why it does not fit, one per line."""
        used = set(self.keys.values())
        left_over = {key: tensor for key, tensor in self.tensors.items() if key not in used}
        others = {} if self.prefix else self.entry.others
        lines = missing(own, self.state(), left_over, others) + misfits(own, self.state())
        if lines:
            lines += self._alternatives()
        return lines

    def notes(self) -> list[str]:
        """What a person should know of one that fits."""
        lines = []
        if self.name:
            beside = f"; {self.beside} other tensors in {self.entry.name!r} were ignored" if self.beside else ""
            lines.append(f"from entry {self.name!r}{beside}")
        renamed = [f"{theirs} -> {key}" for key, theirs in self.keys.items() if key != theirs]
        if renamed:
            lines.append(f"{len(renamed)} keys differ in wrappers' names: {renamed[0]}, ...")
        return lines + self._alternatives()

    def _alternatives(self) -> list[str]:
        return [f"the file also holds {name!r}, which fits: entry={name!r}" for name in self.alternatives]


def choose(entries: list[Entry], own: Mapping[str, Tensor], chosen: str | None) -> Candidate:
    """The tensors of a file that fit a model; if none do, those of which most fit.

    Args:
        entries: of the file.
        own: the model's tensors.
        chosen: their name, or how it begins. If None, all entries are tried, and within them prefixes that all keys
            have or that are names of wrappers. Of several that fit, averages of the weights (EMA, SWA) are not taken.

    Raises:
        ValueError: nothing has the chosen name, or several fit.
    """
    bare = _by_bare_name(own)
    candidates = [candidate for entry in entries for candidate in _candidates(entry)]
    tried = [candidate for candidate in candidates if candidate.is_tried(chosen)]
    if not tried:
        names = [repr(entry.name) if entry.name else "'' (the top level)" for entry in entries]
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        raise ValueError(f"no entry {chosen!r}; available: {', '.join(names[:10])}{more}")
    for candidate in tried:
        candidate.keys = _matched(own, bare, candidate.tensors)
    fitting: dict[frozenset[Any], Candidate] = {}  # one of those that are the same tensors for the same keys
    for candidate in tried:
        if candidate.fits(own):
            fitting.setdefault(frozenset((k, _place(t)) for k, t in candidate.state().items()), candidate)
    found = list(fitting.values())
    plain = [c for c in found if not _is_average(c, chosen)]
    rivals = [] if plain else [c for c in tried if not _is_average(c, chosen) and _alike(own, c)]
    if rivals or not found:
        best = max(rivals or tried, key=lambda c: (_alike(own, c), -len(c.tensors)))
        needed = sum(not may_be_missing(key) for key in own)
        others = [c for c in candidates if c not in tried and len(c.tensors) >= needed]
        for candidate in others:
            candidate.keys = _matched(own, bare, candidate.tensors)
        best.alternatives = [c.name for c in [*found, *others] if c.fits(own)]
        return best
    plain = plain or found
    if len(plain) > 1:
        raise ValueError(f"several entries fit: {', '.join(repr(c.name) for c in plain)}; choose one with entry=")
    first = plain[0]
    if first.beside and chosen != first.name:
        rest = {k: t for k, t in first.entry.tensors.items() if not k.startswith(f"{first.prefix}.")}
        if _alike(own, Candidate(first.entry, "", rest, _matched(own, bare, rest))) == len(first.keys):
            raise ValueError(
                f"its keys fit with and without the prefix {first.prefix!r}; entry={first.name!r} loads the former"
            )
    first.alternatives = [c.name for c in found if c is not first]
    return first


def _candidates(entry: Entry) -> Iterator[Candidate]:
    """All tensors of an entry, then those of each prefix."""
    yield Candidate(entry, "", entry.tensors)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in entry.tensors.items():
        names = key.split(".", LONGEST_PREFIX)
        for depth in range(1, len(names)):
            parts.setdefault(".".join(names[:depth]), {})[".".join(names[depth:])] = tensor
    yield from (Candidate(entry, prefix, tensors) for prefix, tensors in parts.items())


def _are_wrappers(prefix: str) -> bool:
    return WRAPPERS.issuperset(prefix.split("."))


def _is_average(candidate: Candidate, chosen: str | None) -> bool:
    return AVERAGED.search(candidate.name[len(chosen or "") :]) is not None


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _matched(own: Mapping[str, Tensor], bare: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The key of the file for each key of the model that has one: the same, or the same but for wrappers' names.

    Args:
        own, bare: the model's tensors by their keys, and its keys by what they are without wrappers.
        tensors: the file's.
    """
    theirs = _by_bare_name(tensors)
    matched = {bare[name]: key for name, key in theirs.items() if name in bare}
    return matched | {key: key for key in tensors if key in own}


def _by_bare_name(keys: Iterable[str]) -> dict[str, str]:
    """Keys by what they are without wrappers' names, of those that still differ then."""
    bare: dict[str, list[str]] = {}
    for key in keys:
        bare.setdefault(without_wrappers(key), []).append(key)
    return {name: keys[0] for name, keys in bare.items() if len(keys) == 1}


def without_wrappers(key: str) -> str:
    return ".".join(name for name in key.split(".") if name not in WRAPPERS)


def _alike(own: Mapping[str, Tensor], candidate: Candidate) -> int:
    """How many tensors have their counterpart."""
    return sum(own[key].shape == tensor.shape for key, tensor in candidate.state().items())


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
        line = f"{_shown(key)} {tuple(tensor.shape)} is in the file only"
        if tell_nearest and (near := _nearest(key, tensor, absent)):
            line += f"; nearest in the model: {near} {tuple(absent[near].shape)}"
        lines.append(line)
    return lines


def _nearest(key: str, tensor: Tensor, others: Mapping[str, Tensor]) -> str | None:
    """The most similar key, of those of the same shape if there are any."""
    if len(key) > LONGEST_SHOWN:
        return None
    names = [other for other in others if len(other) <= LONGEST_SHOWN]
    same = [other for other in names if others[other].shape == tensor.shape]
    found = get_close_matches(key, same, 1, 0) or get_close_matches(key, names, 1)
    return found[0] if found else None


def _shown(key: str) -> str:
    return key if len(key) <= LONGEST_SHOWN else f"{key[:LONGEST_SHOWN]}..."


def split(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """The tensors of the file that differ where the model has one tensor of several keys, one pair per line."""
    lines: list[str] = []
    first: dict[tuple[Any, ...], str] = {}
    for key in (key for key in own if key in state and own[key].data_ptr()):
        other = first.setdefault(_place(own[key]), key)
        a, b = state[other], state[key]
        if _place(a) != _place(b) and not (a.dtype == b.dtype and torch.allclose(a, b, 0, 0, equal_nan=True)):
            lines.append(f"{other} and {key} are one tensor in the model, and differ in the file")
    return lines


def misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """The tensors that both have and that cannot be copied, one per line."""
    lines = ((key, _misfit(own[key], state[key])) for key in own if key in state)
    return [f"{key} {line}" for key, line in lines if line]


def _misfit(ours: Tensor, theirs: Tensor) -> str | None:
    if theirs.layout != torch.strided:
        return f"is sparse in the file ({theirs.layout})"
    if theirs.is_meta or theirs.is_quantized or type(theirs) not in (Tensor, nn.Parameter):
        kind = "without values" if theirs.is_meta else "quantized" if theirs.is_quantized else type(theirs).__name__
        return f"is {kind} in the file"
    if theirs.dtype not in CONVERTED and theirs.dtype != ours.dtype:
        return f"is {theirs.dtype} in the file, which is not supported"
    if ours.shape != theirs.shape:
        return f"is {tuple(theirs.shape)} in the file and {tuple(ours.shape)} in the model"
    if _category(ours.dtype) != _category(theirs.dtype):
        return f"is {theirs.dtype} in the file and {ours.dtype} in the model"
    if not _holds(ours.dtype, theirs):
        return f"has values in the file that are too large for {ours.dtype}"
    if ours.is_meta:
        return "of the model is on the meta device; materialize it first (to_empty)"
    if ours.is_inference() and not torch.is_inference_mode_enabled():
        return "of the model was created in inference mode, outside of which it cannot be set"
    if any(stride == 0 and length > 1 for stride, length in zip(ours.stride(), ours.shape, strict=True)):
        return "of the model is expanded: its elements share memory"
    return None


def _category(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "bool"
    return "complex" if dtype.is_complex else "float" if dtype.is_floating_point else "int"


def _holds(dtype: torch.dtype, tensor: Tensor) -> bool:
    """Whether all finite values are in the range of a dtype of the same category."""
    if dtype == tensor.dtype or _category(dtype) == "bool":
        return True
    if _category(dtype) == "int":  # a wrong sign, too, makes a large difference
        return torch.equal(tensor.to(dtype).double(), tensor.double())
    if torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max:
        return True
    parts = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor.double()
    finite = parts[parts.isfinite()].abs()
    return not len(finite) or float(finite.max()) <= torch.finfo(dtype).max
