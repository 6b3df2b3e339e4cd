"""ONNX files: weights of them into a model, a network of one, and a network into one."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from .._version import __version__
from .errors import GraphError, WeightsError
from .graph.fit import Fit, applied, fit, image_shape, lrns
from .graph.module import build
from .graph.node import nodes_of
from .graph.onnxruntime import Runtime, difference
from .graph.read import OnnxGraph, read_onnx
from .graph.trace import Traced, evaluating, trace
from .graph.write import onnx_model
from .matching import misfits, missing
from .preprocessing import CAFFE
from .weights import WeightsReport, load, read, refuse


def load_onnx(model: nn.Module, path: Path, *, adapt: bool, verify: bool) -> WeightsReport:
    size = getattr(model, "input_size", None)
    graph = read_graph(path, "load_weights", size if isinstance(size, int) else None)
    runtime = read(Runtime, path, "ONNX", "load_weights") if verify else None
    found = fit(model, graph, adapt=adapt)
    own = model.state_dict()
    report = WeightsReport(path, "ONNX", len(found.state), lrns(graph), found.lines)
    before = {key: value.clone() for key, value in own.items()} if verify else {}
    try:
        if not found.mismatches:
            found.mismatches += missing(own, found.state)
        refuse(path, found.mismatches + misfits(own, found.state))
        load(model, found.state)
        if runtime is not None:
            report.verified = _verified(model, path, runtime, graph, found)
    except Exception:
        found.changes.undo()
        if before:
            model.load_state_dict(before)
        raise
    _tell_images(model, graph, found, report)
    return report


def read_graph(path: Path, function: str, size: int | None = None) -> OnnxGraph:
    """The graph of a file, its errors as those of one of our functions; ``size`` is for images of any size."""
    return read(lambda path: read_onnx(path, size), path, "ONNX", function)


def _verified(model: nn.Module, path: Path, runtime: Runtime, graph: OnnxGraph, found: Fit) -> float:
    """By how much the model's output differs from onnxruntime's; WeightsError if that is more than rounding."""
    parameter = next(t for t in model.state_dict().values() if t.is_floating_point())
    shape = (graph.batch or 1, image_shape(graph)[0], *found.size)
    x = _random(*shape)
    with evaluating(model), torch.no_grad():
        own = model(applied(found.before, x).to(parameter.device, parameter.dtype)).cpu().float()
    try:
        theirs = runtime(x)
    except Exception as error:  # whatever onnxruntime raises
        raise WeightsError(f"load_weights(): onnxruntime cannot run {path}: {error}. The model is as it was") from error
    theirs = theirs.flatten(1) if theirs.shape[2:] == (1, 1) else theirs
    differs = difference(applied(found.after, own), theirs)
    allowed = {torch.float16: 1e-2, torch.bfloat16: 5e-2}.get(parameter.dtype, 1e-4)
    if not differs <= allowed:
        raise WeightsError(
            f"load_weights(): {path} was loaded, but the output then differs from onnxruntime's by {differs:.1e}, "
            f"relative to its norm; allowed is {allowed:g}. The model is as it was"
        )
    return differs


def _random(*shape: int) -> Tensor:
    """Random images on the scale of pixels, in float32 on the CPU, whatever the defaults are."""
    generator = torch.Generator("cpu").manual_seed(0)
    return 64 * torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _tell_images(model: nn.Module, graph: OnnxGraph, found: Fit, report: WeightsReport) -> None:
    """What the images should be, as far as it is known, and what the file computes besides the model."""
    if found.before:
        steps = "; ".join(f"{node} {_values(node.tensors['constant'])}" for node in found.before)
        report.notes.append(f"the file applies this to the image, and the model does not: {steps}")
    elif graph.producer == "onnx-caffe2" and not _is_of_caffe2(graph):
        report.colours, report.mean, report.pixels = CAFFE.colours, CAFFE.mean, "0 to 255"
        report.notes.append("colours and mean are not in the file: they are Caffe's, from which it was converted")
        if hasattr(model, "preprocessing"):
            model.preprocessing = CAFFE  # type: ignore[assignment]
            report.changes.append("preprocessing became Caffe's")
    if found.after:
        report.notes.append(f"the file ends with {found.after[-1].kind}; the model returns the values before it")


def _is_of_caffe2(graph: OnnxGraph) -> bool:
    """Whether the network was trained by Caffe2, whose images are not Caffe's."""
    return any(key.startswith("gpu_") for node in nodes_of(graph.output) for key in node.keys.values())


def _values(constant: Tensor) -> str:
    values = constant.flatten() if constant.numel() <= 3 else constant.float().flatten(-2).mean(-1).flatten()
    return ", ".join(f"{v:g}" for v in values.tolist())


def from_onnx(path: str | os.PathLike[str]) -> fx.GraphModule:
    """The network of an ONNX file, with its weights: layers of torch and of :mod:`fastcnn.nn` in the file's order.

    For AlexNet-, VGG-, ZFNet-, SqueezeNet- and Inception-era files that :func:`load_weights` has no model for. Layers
    are named after their weights in the file, so that what torch exported has its own ``state_dict`` keys; the
    network's ``code`` shows how they are called. It can be trained, and :func:`fastcnn.optimize` fuses it.

    Args:
        path: an ONNX file of float32 operators of opset 7 to 25, with one input and one output: Conv, Gemm, MatMul,
            BatchNormalization, LRN (of an odd size), Relu, Clip, MaxPool, AveragePool, GlobalAveragePool,
            GlobalMaxPool, ReduceMean (of height and width), Pad (with a constant), Dropout, Flatten, Reshape, Squeeze,
            Unsqueeze, Transpose, Concat, Split, Slice (of channels), Add, Sub, Mul, Div, Sum, Softmax, LogSoftmax,
            Identity, Cast, and what computes of constants and shapes. Weights may be in other files of its folder.

    Returns:
        The network, in evaluation mode; it takes any number of images whatever number the file was made for.

    Raises:
        WeightsError: the file cannot be read, or does something that is not supported; the message names the node.
        FileNotFoundError: there is no such file.
        ImportError: the package onnx is not installed (it comes with ``fastcnn[models]``).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"from_onnx(): there is no file {path}")
    graph = read_graph(path, "from_onnx")
    try:
        return build(graph.output, graph.name)
    except GraphError as error:
        raise WeightsError(f"from_onnx(): {path} is not supported:", [str(error)]) from error


def to_onnx(model: nn.Module, path: str | os.PathLike[str], *, input_size: int | None = None) -> float:
    """Write a network to an ONNX file of plain nodes: Conv, Relu, LRN, MaxPool, Gemm and the like, opset 17.

    The nodes are those of the forward in evaluation mode, also of a model from :func:`fastcnn.optimize`. LRN in groups
    is split, normalized and joined. Before the file is written, onnxruntime runs it beside the model on random images.

    Args:
        model: in float32; what :func:`from_onnx` builds, and others that call the same functions.
        path: of the file, which is replaced if it exists, by the whole new one or not at all.
        input_size: height and width of the images; None: ``model.input_size``, or any if the model has none.

    Returns:
        ||a - b|| / ||b|| of the outputs of the model and of the file, at most 1e-4.

    Raises:
        ValueError: the model does not take such images, does something that such a file cannot express, or is not
            in float32; the message names the layer.
        RuntimeError: onnxruntime computes something else; nothing is written.
        ImportError: onnx or onnxruntime is not installed.
    """
    size = input_size if input_size is not None else getattr(model, "input_size", None)
    others = {t.dtype for t in model.state_dict().values() if t.is_floating_point()} - {torch.float32}
    if others:
        raise ValueError(f"to_onnx(): the model must be in float32, but has tensors in {', '.join(map(str, others))}")
    try:
        traced = _traced(model, (size, size) if isinstance(size, int) else None)
        file = onnx_model(traced.output, type(model).__name__, __version__).SerializeToString()
        runtime = Runtime(file)
    except GraphError as error:
        raise ValueError(f"to_onnx(): {error}") from None
    except ImportError as error:
        raise ImportError(f"to_onnx(): {error}") from None
    channels = next(node.shape[0] for node in nodes_of(traced.output) if node.kind == "Image" and node.shape)
    x = _random(2, channels or 3, *traced.size)
    device = next((t.device for t in model.state_dict().values()), torch.device("cpu"))
    with evaluating(model), torch.no_grad():
        differs = difference(runtime(x), model(x.to(device)).cpu())
    if not differs <= 1e-4:
        raise RuntimeError(f"to_onnx(): onnxruntime's output differs from the model's by {differs:.1e}, not written")
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_bytes(file)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return differs


def _traced(model: nn.Module, size: tuple[int, int] | None) -> Traced:
    """The graph of a model, for images of as many channels as one of its convolutions takes, 3 if that is one."""
    given = [layer.in_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    first, *others = sorted({*given} or {3}, key=lambda channels: (channels != 3, given.index(channels)))
    try:
        return trace(model, first, size)
    except GraphError:
        for channels in others:
            with contextlib.suppress(GraphError):
                return trace(model, channels, size)
        raise
