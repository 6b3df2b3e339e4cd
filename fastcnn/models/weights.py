"""Other people's weights: torch, TorchScript, safetensors and ONNX files into a model, all of them or none."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..params import LRNParams
from .checkpoints import format_of, read_entries
from .errors import GraphError, WeightsError
from .matching import choose, split, without_wrappers
from .preprocessing import PREPROCESSINGS, Preprocessing

T = TypeVar("T")
KINDS = {
    "torch": "a PyTorch checkpoint",
    "TorchScript": "a TorchScript archive",
    "safetensors": "a safetensors file",
    "shards": "a sharded checkpoint",
    "ONNX": "an ONNX file",
}


@dataclass
class WeightsReport:
    """What :func:`load_weights` read and did; ``str()`` of it is for people.

    Attributes:
        path: the file.
        format: "torch", "TorchScript", "safetensors", "shards" or "ONNX".
        tensors: how many it held for the model.
        lrn: ONNX: the parameters of each LRN, in graph order. The model's now are the same.
        changes: ONNX: what was changed in the model besides its parameters, to compute what the file computes.
        colours: the order of the channels that the weights expect, "RGB" or "BGR"; None if not stated in the file.
        mean: the mean to subtract, in this order, on the scale of ``pixels``; None if not stated in the file.
        pixels: the range of the pixels before that, as text; None if not stated in the file.
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
        lines.append(f"colours: {self.colours or 'not stated in the file'}")
        lines.append(
            f"mean: {self.mean or 'not stated in the file'}" + f", of pixels {self.pixels}" * bool(self.pixels)
        )
        if self.verified is not None:
            lines.append(
                f"verified: the output differs from onnxruntime's by {self.verified:.1e}, relative to its norm"
            )
        return "\n  ".join([*lines, *(f"note: {line}" for line in self.notes)])


def load_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    entry: str | None = None,
    preprocessing: str | Preprocessing | None = None,
    adapt: bool = False,
    verify: bool = False,
) -> WeightsReport:
    """Load a file of weights into a model, strictly: every tensor of both must have a counterpart of its shape.

    Args:
        model: one of :func:`create_model`, or any other whose keys (torch, safetensors) or graph (ONNX) are those of
            the file.
        path: by its suffix, ``.safetensors``, ``.onnx``, ``.index.json`` of a model in several such files ("shards"),
            or otherwise of :func:`torch.save` or :func:`torch.jit.save`. No code in a file is executed: pickles are
            read with ``weights_only=True``, and of TorchScript only attributes that are tensors.

            The weights are looked for in every dictionary of a checkpoint ("state_dict", "model", ...), and names that
            wrappers add, such as "module" of DataParallel and "_orig_mod" of ``torch.compile``, are ignored, wherever
            they are in a key.

            An ONNX graph is walked from its output to the image, beside the graph of what the model's forward calls in
            evaluation mode (on no data: nothing is computed). The operations must be the same in the same order, and
            so must be their settings: padding, strides, dilation, groups, rounding of pools, epsilon, LRN. Where the
            file takes images of one size only, padding and rounding may differ as long as they do not matter at that
            size; where it leaves the size open, that is ``model.input_size``, if the model has one. Biases that the
            file leaves out are 0, and dropout is not compared.
        entry: not ONNX: which of the file's dictionaries, or which prefix of its keys, holds the weights: "model_ema",
            "state_dict.generator". If None, the one that fits; averages of the weights (EMA, SWA) are passed over.
        preprocessing: what the weights expect of images, a name in PREPROCESSINGS or your own; for files that do not
            tell. Those that come from Caffe take "caffe", that is BGR. ``model.preprocessing`` becomes this.
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
        WeightsError: the file is of another format, truncated, or does not fit; the message lists every mismatch, and
            the nearest name. A RuntimeError, as of ``load_state_dict``. The model is then exactly as it was.
        FileNotFoundError: there is no such file.
        ImportError: the package onnx or safetensors is missing (``fastcnn[models]`` brings both), or onnxruntime with
            ``verify``.
        TypeError: ``preprocessing`` is neither a name nor a :class:`Preprocessing`; ``entry`` is no string.
        ValueError: ``adapt`` or ``verify`` for a file that is not ONNX, ``entry`` for one that is; no preprocessing has
            this name.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_weights(): there is no file {path}")
    if not isinstance(entry, str | None):
        raise TypeError(f"load_weights(): argument 'entry' must be str, not {type(entry).__name__}")
    expected = None if preprocessing is None else _preprocessing(preprocessing)
    format = format_of(path)
    given = {"entry": entry} if format == "ONNX" else {"adapt": adapt or None, "verify": verify or None}
    for option, value in given.items():
        if value is not None:
            other = "a file of another format" if format == "ONNX" else "an ONNX file"
            raise ValueError(f"load_weights(): {option}={value!r} needs {other}, but got {path}")
    if format == "ONNX":
        from .onnx_files import load_onnx  # takes longer to import than all of this

        report = load_onnx(model, path, adapt=adapt, verify=verify)
    else:
        report = _load_checkpoint(model, path, format, entry)
    if expected is not None:
        model.preprocessing = expected  # type: ignore[assignment]
        report.colours, report.mean = expected.colours, expected.mean
        report.pixels = f"0 to {255 * expected.scale:g}"
    return report


def _load_checkpoint(model: nn.Module, path: Path, format: str, entry: str | None) -> WeightsReport:
    content = model.state_dict()
    own = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    lazy = [key for key, value in own.items() if is_lazy(value)]
    if lazy:
        raise WeightsError(f"load_weights(): {', '.join(lazy)} of the model have no shape yet; run a forward first")
    entries = read(lambda path: read_entries(path, format), path, format, "load_weights")
    try:
        found = choose(entries, own, entry)
    except ValueError as error:
        raise WeightsError(f"load_weights(): {path} cannot be loaded: {error}") from None
    lines, state = found.mismatches(own), found.state()
    if lines and re.search(r"-\d+-of-\d+\.", path.name):
        lines.append("this file is one of several shards: give load_weights() their .index.json")
    if not lines:
        lines = split(own, state)
    others = {without_wrappers(key) for key in found.entry.others}
    for key in content:
        if key not in own and without_wrappers(key) in others:
            lines.append(f"{key} is not a tensor; load_weights() loads tensors only")
    refuse(path, lines, found.name)
    load(model, state)
    return WeightsReport(path, format, len(state), notes=found.notes())


def _preprocessing(given: str | Preprocessing) -> Preprocessing:
    if isinstance(given, Preprocessing):
        return given
    if not isinstance(given, str):
        raise TypeError(
            f"load_weights(): argument 'preprocessing' must be str or Preprocessing, not {type(given).__name__}"
        )
    if given not in PREPROCESSINGS:
        raise ValueError(f"load_weights(): preprocessing must be one of {', '.join(PREPROCESSINGS)}, not {given!r}")
    return PREPROCESSINGS[given]


def read(reader: Callable[[Path], T], path: Path, format: str, function: str) -> T:
    """What a reader makes of a file; its errors as WeightsError, in the name of a public function."""
    try:
        return reader(path)
    except ImportError as error:
        raise ImportError(f"{function}(): {error}") from None
    except WeightsError:
        raise
    except GraphError as error:
        raise WeightsError(f"{function}(): {path} is not supported:", str(error).splitlines()) from error
    except Exception as error:  # each reader raises what it likes for a broken file
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise WeightsError(f"{function}(): {path} cannot be read as {KINDS[format]}: {reason}") from error


def refuse(path: Path, mismatches: list[str], entry: str = "") -> None:
    """Raise WeightsError if there are mismatches."""
    if mismatches:
        where = f"entry {entry!r} of {path}" if entry else path
        raise WeightsError(f"load_weights(): {where} does not fit the model:", mismatches)


def load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state that is known to fit."""
    content = model.state_dict()  # with what else it needs: counters of batches, versions of modules
    content.update(state)
    model.load_state_dict(content)
