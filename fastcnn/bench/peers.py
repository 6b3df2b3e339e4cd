"""Other runtimes, none of which fastcnn needs: they run the network of torch's layers, exported to ONNX.

``pip install fastcnn[peers]`` brings them.
"""

import contextlib
import copy
import io
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .workload import NotInstalled


def onnxruntime(network: nn.Module, x: Tensor, dtype: torch.dtype) -> Any:
    """The forward of the network in onnxruntime; fp32 only."""
    if dtype != torch.float32:
        raise NotImplementedError("its CPU provider computes in fp32 only")
    with _installed("onnxruntime"), tempfile.TemporaryDirectory() as folder:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        model = _exported(network, x, Path(folder))
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def openvino(network: nn.Module, x: Tensor, dtype: torch.dtype) -> Any:
    """The forward of the network in OpenVINO, computing in ``dtype`` from and to fp32."""
    with _installed("openvino"), tempfile.TemporaryDirectory() as folder:
        import openvino

        config = {
            "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = openvino.Core().compile_model(_exported(network, x, Path(folder)), "CPU", config)
    requests = threading.local()  # a request is busy while it runs

    def run(x: Tensor) -> Tensor:
        if not hasattr(requests, "mine"):
            requests.mine = compiled.create_infer_request()
        return torch.from_numpy(requests.mine.infer(x.numpy(), share_inputs=True)[0])

    return run


class _Norm(nn.Module):
    """LRN as one node of ONNX, which the exporter would write as a dozen; its groups go into the batch."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.groups = getattr(norm, "groups", 1)
        self.attributes = {
            "size": norm.size,
            "alpha": float(norm.alpha),
            "beta": float(norm.beta),
            "bias": float(norm.k),
        }

    def forward(self, input: Tensor) -> Tensor:
        n, c, h, w = input.shape
        x = input.reshape(n * self.groups, c // self.groups, h, w)
        y = torch.onnx.ops.symbolic("LRN", (x,), self.attributes, dtype=x.dtype, shape=x.shape, version=18)
        return y.reshape(n, c, h, w)


def _with_norms(network: nn.Module) -> nn.Module:
    network = copy.deepcopy(network)
    for name, layer in list(network.named_modules()):
        # of an even size ONNX's window lies on the other side
        if isinstance(layer, nn.LocalResponseNorm) and layer.size % 2:
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, _Norm(layer))
    return network


def _exported(network: nn.Module, x: Tensor, folder: Path) -> str:
    network = _with_norms(network)
    with contextlib.redirect_stdout(io.StringIO()):  # the exporter reports its progress
        torch.onnx.export(network, (x,), str(folder / "network.onnx"), dynamo=True, verbose=False)
    return str(folder / "network.onnx")


@contextlib.contextmanager
def _installed(runtime: str) -> Any:
    try:
        yield
    except ImportError as error:
        raise NotInstalled(f"not installed: pip install fastcnn[peers] brings {runtime} ({error.name})") from None
