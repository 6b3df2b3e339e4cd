"""Other people's weights: torch, safetensors and ONNX files into a model, all of them or none."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..params import LRNParams
from .match import Match, match
from .onnx_graph import OnnxGraph, read_onnx
from .preprocessing import CAFFE


class WeightsError(RuntimeError):
    """A file that cannot be read, or does not fit the model.

    Attributes:
        mismatches: what does not fit, a line each; empty if the file could not be read.
    """

    def __init__(self, message: str, mismatches: list[str] | None = None) -> None:
        self.mismatches = mismatches or []
        super().__init__(message + "".join(f"\n  {line}" for line in self.mismatches))


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
        notes: where colours and mean are known from; what the file does to the image itself.
    """

    path: Path
    format: str
    tensors: int = 0
    lrn: list[LRNParams] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    colours: str | None = None
    mean: tuple[float, ...] | None = None
    pixels: str | None = None
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
        return "\n  ".join([*lines, *(f"note: {line}" for line in self.notes)])


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> WeightsReport:
    """Load a file of weights into a model, strictly: every tensor of both must have a counterpart of its shape.

    Args:
        model: one of :func:`create_model`, or any other whose keys (torch, safetensors) or layers (ONNX) are those of
            the file.
        path: by its suffix, ``.safetensors``, ``.onnx``, or otherwise a ``state_dict`` saved by :func:`torch.save`,
            which is read with ``weights_only=True``: a file that holds other objects is refused, not run. A
            ``state_dict`` under the key "state_dict", "model_state_dict" or "model" is found, and the prefix "module."
            of DistributedDataParallel removed.

            The layers of an ONNX graph are matched in graph order with the model's modules in their order; kinds,
            shapes, groups, strides and paddings in front must agree. Then the model is set to compute what the graph
            computes: LRN parameters (and ``groups=1``: ONNX has no others) are taken over, and whether pools round up
            and how many zeros are behind the image, where that matters for images of ``model.input_size``. Where the
            model scales the input of a layer, as the paper's dropout does, the weights are divided by that factor. For
            graphs converted from Caffe, ``model.preprocessing`` becomes Caffe's. LRN must be the operator LRN:
            graphs that write it as arithmetic are refused.

    Returns:
        What was read and changed, a :class:`WeightsReport`. Tensors are converted to the dtype and device of the model.

    Raises:
        WeightsError: the file is of another format, truncated, or does not fit; the message lists every mismatch. A
            RuntimeError, as of ``load_state_dict``. The model is then exactly as it was.
        FileNotFoundError: there is no such file.
        ImportError: the package onnx or safetensors is missing (``fastcnn[models]`` brings both).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_weights(): there is no file {path}")
    format = {".onnx": "ONNX", ".safetensors": "safetensors"}.get(path.suffix.lower(), "torch")
    content = _read(path, format)
    if isinstance(content, OnnxGraph):
        found = match(model, content.steps)
        mismatches = content.problems + found.mismatches
    else:
        found = Match(content)
        mismatches = _missing(model.state_dict(), content)
    mismatches += _misfits(model.state_dict(), found.state)
    if mismatches:
        raise WeightsError(f"load_weights(): {path} does not fit the model:", mismatches)
    counters = {key: value for key, value in model.state_dict().items() if _may_be_missing(key)}
    model.load_state_dict({**counters, **found.state})
    found.change_model()
    report = WeightsReport(path, format, len(found.state), found.lrn, found.changes)
    if isinstance(content, OnnxGraph):
        _tell_images(model, content, report)
    return report


def _read(path: Path, format: str) -> OnnxGraph | dict[str, Tensor]:
    try:
        if format == "ONNX":
            return read_onnx(path)
        return _read_safetensors(path) if format == "safetensors" else _read_torch(path)
    except ImportError as error:
        raise ImportError(f"load_weights(): {error}") from None
    except Exception as error:  # each reader raises what it likes for a broken file
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise WeightsError(f"load_weights(): {path} cannot be read as a file of {format} weights: {reason}") from error


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


def _missing(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """The keys that only one of them has, a line each."""
    missing = [key for key in own if key not in state and not _may_be_missing(key)]
    lines = [f"{key} is missing in the file; it is {tuple(own[key].shape)} in the model" for key in missing]
    return lines + [f"{key} {tuple(state[key].shape)} is in the file only" for key in state if key not in own]


def _misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """The tensors that both have and that cannot be copied, a line each."""
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


def _tell_images(model: nn.Module, graph: OnnxGraph, report: WeightsReport) -> None:
    """What the images should be, as far as it is known."""
    if graph.image_steps:
        report.notes.append(f"the file does this to the image, and the model does not: {'; '.join(graph.image_steps)}")
    elif graph.producer == "onnx-caffe2" and not graph.steps[0].name.startswith("gpu_"):
        report.colours, report.mean, report.pixels = CAFFE.colours, CAFFE.mean, "0 to 255"
        report.notes.append("colours and mean are not in the file: they are Caffe's, from which it was converted")
        if hasattr(model, "preprocessing"):
            model.preprocessing = CAFFE  # type: ignore[assignment]
            report.changes.append("preprocessing became Caffe's")
