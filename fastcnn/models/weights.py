"""Other people's weights: torch, safetensors and ONNX files into a model, all of them or none."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..params import LRNParams
from .errors import GraphError, WeightsError

T = TypeVar("T")


@dataclass
class WeightsReport:
    """What :func:`load_weights` read and did; ``str()`` of it is for people.

    Attributes:
        path: the file.
        format: "torch", "safetensors" or "ONNX".
        tensors: how many it held for the model.
        lrn: ONNX: the parameters of each LRN, in graph order. The model's now are the same.
        changes: ONNX: what was changed in the model besides its parameters, to compute what the file computes.
        colours: the order of the channels that the weights expect, "RGB" or "BGR"; None if the file does not tell.
        mean: the mean to subtract, in this order, on the scale of ``pixels``; None if the file does not tell.
        pixels: the range of the pixels before that, as text; None if the file does not tell.
        verified: ||a - b|| / ||b|| of the model's output and onnxruntime's; None if that was not asked for.
        notes: where colours and mean are known from; what the file does to images and logits itself.
    """

    path: Path
    format: str
    tensors: int = 0
    lrn: list[LRNParams] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    colours: str | None = None
    mean: tuple[float, ...] | None = None
    pixels: str | None = None
    verified: float | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.tensors} tensors from {self.path} ({self.format})"]
        for lrn, times in {p: self.lrn.count(p) for p in self.lrn}.items():
            lines.append(f"LRN: {lrn}" + f", {times} times" * (times > 1))
        lines += [f"changed in the model: {line}" for line in self.changes]
        lines.append(f"colours: {self.colours or 'the file does not tell'}")
        lines.append(
            f"mean: {self.mean or 'the file does not tell'}" + f", of pixels {self.pixels}" * bool(self.pixels)
        )
        if self.verified is not None:
            lines.append(
                f"verified: the output differs from onnxruntime's by {self.verified:.1e}, relative to its norm"
            )
        return "\n  ".join([*lines, *(f"note: {line}" for line in self.notes)])


def load_weights(
    model: nn.Module, path: str | os.PathLike[str], *, adapt: bool = False, verify: bool = False
) -> WeightsReport:
    """Load a file of weights into a model, strictly: every tensor of both must have a counterpart of its shape.

    Args:
        model: one of :func:`create_model`, or any other whose keys (torch, safetensors) or graph (ONNX) are those of
            the file.
        path: by its suffix, ``.safetensors``, ``.onnx``, or otherwise a ``state_dict`` saved by :func:`torch.save`,
            which is read with ``weights_only=True``: a file that holds other objects is refused, not run. A
            ``state_dict`` under the key "state_dict", "model_state_dict" or "model" is found, and the prefix "module."
            of DistributedDataParallel removed.

            An ONNX graph is walked from its output to the image, beside the graph of what the model's forward calls in
            evaluation mode (on no data: nothing is computed). The operations must be the same in the same order, and
            so must be their settings: padding, strides, dilation, groups, rounding of pools, epsilon, LRN. Where the
            file takes images of one size only, padding and rounding may differ as long as they do not matter at that
            size; where it leaves the size open, that is ``model.input_size``, if the model has one. Biases that the
            file leaves out are 0, and dropout is not compared.
        adapt: ONNX: give the model the file's settings where it has others. Further, where one of the two multiplies
            the input of a layer by a factor, as the paper's dropout does, that goes into the weights; and a softmax at
            the end of the file and arithmetic with the image at its beginning may be missing in the model: the report
            says so. The model then computes what the file does *between* them.
        verify: ONNX: also run both on a random image, the file in onnxruntime, and compare. Costs a forward in each,
            loading the file into onnxruntime, and memory for it and for a copy of the model's old weights.

    Returns:
        What was read and changed, a :class:`WeightsReport`. Tensors are converted to the dtype and device of the model.
        For graphs converted from Caffe, ``model.preprocessing`` becomes Caffe's.

    Raises:
        WeightsError: the file is of another format, truncated, or does not fit; the message lists every mismatch. A
            RuntimeError, as of ``load_state_dict``. The model is then exactly as it was.
        FileNotFoundError: there is no such file.
        ImportError: the package onnx or safetensors is missing (``fastcnn[models]`` brings both), or onnxruntime with
            ``verify``.
        ValueError: ``adapt`` or ``verify`` for a file that is not ONNX.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_weights(): there is no file {path}")
    format = {".onnx": "ONNX", ".safetensors": "safetensors"}.get(path.suffix.lower(), "torch")
    if format == "ONNX":
        from .onnx_files import load_onnx  # takes longer to import than all of this

        return load_onnx(model, path, adapt=adapt, verify=verify)
    for option, value in (("adapt", adapt), ("verify", verify)):
        if value:
            raise ValueError(f"load_weights(): {option}={value} needs an ONNX file, but got {path}")
    reader = _read_safetensors if format == "safetensors" else _read_torch
    state = read(reader, path, format, "load_weights")
    own = model.state_dict()
    refuse(path, missing(own, state) + misfits(own, state))
    load(model, state)
    return WeightsReport(path, format, len(state))


def read(reader: Callable[[Path], T], path: Path, format: str, function: str) -> T:
    """What a reader makes of a file; its errors as WeightsError, in the name of a public function."""
    try:
        return reader(path)
    except ImportError as error:
        raise ImportError(f"{function}(): {error}") from None
    except GraphError as error:
        raise WeightsError(f"{function}(): {path} is not supported:", str(error).splitlines()) from error
    except Exception as error:  # each reader raises what it likes for a broken file
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise WeightsError(f"{function}(): {path} cannot be read as a file of {format} weights: {reason}") from error


def refuse(path: Path, mismatches: list[str]) -> None:
    """Raise WeightsError if there are mismatches."""
    if mismatches:
        raise WeightsError(f"load_weights(): {path} does not fit the model:", mismatches)


def load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state that is known to fit."""
    counters = {key: value for key, value in model.state_dict().items() if _may_be_missing(key)}
    model.load_state_dict({**counters, **state})


def _read_torch(path: Path) -> dict[str, Tensor]:
    content: Any = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"it holds a {type(content).__name__}, not a state_dict")
    others = [f"{key!r} is a {type(value).__name__}" for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"it holds other things than tensors: {', '.join(others)}")
    prefix = "module." if all(key.startswith("module.") for key in content) else ""
    return {key.removeprefix(prefix): value for key, value in content.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError("reading safetensors needs the package of this name: pip install fastcnn[models]") from None
    return load_file(path)


def _may_be_missing(key: str) -> bool:
    """Old versions of torch did not count batches."""
    return key.endswith("num_batches_tracked")


def missing(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """The keys that only one of them has, one per line."""
    missing = [key for key in own if key not in state and not _may_be_missing(key)]
    lines = [f"{key} is missing in the file; it is {tuple(own[key].shape)} in the model" for key in missing]
    return lines + [f"{key} {tuple(state[key].shape)} is in the file only" for key in state if key not in own]


def misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """The tensors that both have and that cannot be copied, one per line."""
    lines = []
    for key in (key for key in own if key in state):
        ours, theirs = own[key], state[key]
        if ours.shape != theirs.shape:
            lines.append(f"{key} is {tuple(theirs.shape)} in the file and {tuple(ours.shape)} in the model")
        elif ours.is_floating_point() != theirs.is_floating_point():
            lines.append(f"{key} is {theirs.dtype} in the file and {ours.dtype} in the model")
        elif ours.is_meta:
            lines.append(f"{key} of the model is on the meta device, and can take no values")
    return lines
