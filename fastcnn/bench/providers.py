"""Who takes part: fastcnn, PyTorch as it is and compiled, and for networks other runtimes where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from .. import backends
from ..optimize import optimize
from . import peers
from .cases import Case
from .network_workload import Forward
from .operator_workload import Function, OperatorWorkload
from .operators import OPERATORS, PEERS


def _torch(workload: OperatorWorkload, dtype: torch.dtype) -> Function:
    return workload.function(workload.operator.torch, dtype)


def _ours(workload: OperatorWorkload, dtype: torch.dtype) -> Function:
    return workload.function(workload.operator.ours, dtype)


def _compiled(workload: OperatorWorkload, dtype: torch.dtype, mode: str | None = None) -> Function:
    compilable = workload.operator.compilable  # all but its checks of values, which break the graph
    function = workload.function(compilable or workload.operator.torch, dtype)
    return torch.compile(function, dynamic=False, fullgraph=compilable is None, mode=mode)


def _compiled_for_gpu(workload: OperatorWorkload, dtype: torch.dtype) -> Function:
    """The tail with all of inductor's tuning. A convolution's is left to cuDNN: it would take half a minute each."""
    mode = "max-autotune-no-cudagraphs" if workload.case.op == "relu_lrn_max_pool2d" else None
    return _compiled(workload, dtype, mode)


def _peer(name: str, workload: OperatorWorkload, dtype: torch.dtype) -> Function:
    return workload.function(workload.operator.peers[name].function, dtype)


@dataclass(frozen=True)
class OperatorProvider:
    """Someone who has the operators.

    Args:
        name: as shown and as given to ``--providers``.
        function: of a workload and a dtype of results, the function of the input and the parameters.
        backend: the backend to force, for fastcnn.
    """

    name: str
    function: Callable[[OperatorWorkload, torch.dtype], Function]
    backend: str | None = None

    def takes_part(self, case: Case) -> bool:
        """Only the C++ kernels can write into memory that is given to them; peers have one dtype and format."""
        if self.name in PEERS:
            return self.name in OPERATORS[case.op].peers and (case.dtype, case.format) == ("fp32", "channels_last")
        return case.memory == "fresh" or self.backend == "cpu"


def operator_providers(device: str = "cpu") -> dict[str, OperatorProvider]:
    """Those that can run on this device, by name: fastcnn's backends, the fastest first, PyTorch, then on CPU others.

    On a GPU there also is "fastcnn", which leaves the choice of the backend to each operator.
    """
    here = [name for name in reversed(backends.NAMES) if not backends.why_not(name, torch.device(device))]
    ours = [OperatorProvider(f"fastcnn.{backend}", _ours, backend) for backend in here]
    if device != "cpu":
        ours.insert(0, OperatorProvider("fastcnn", _ours))
    compiled = _compiled if device == "cpu" else _compiled_for_gpu
    torchs = [OperatorProvider("torch.eager", _torch), OperatorProvider("torch.compile", compiled)]
    peers = [OperatorProvider(name, partial(_peer, name)) for name in PEERS] if device == "cpu" else []
    return {provider.name: provider for provider in (*ours, *torchs, *peers)}


@dataclass(frozen=True)
class NetworkProvider:
    """Someone who runs networks.

    Args:
        name: as shown and as given to ``--providers``.
        fused: from the layers of fastcnn, not torch's.
        optimize: what makes another network of it first, for "inference" and "training", see :mod:`fastcnn.bench.zoo`.
        channels_last: weights and images in this format, otherwise NCHW.
        compile: through torch.compile, for inference with freezing.
        graphs: torch.compile captures CUDA graphs; on GPUs only.
        export: another runtime: (network, images, dtype) -> its forward.
    """

    name: str
    fused: bool = False
    optimize: Callable[[nn.Module], nn.Module] | None = None
    channels_last: bool = False
    compile: bool = False
    graphs: bool = False
    export: Callable[[nn.Module, Tensor, torch.dtype], Forward] | None = None

    def takes_part(self, case: Case) -> bool:
        """The other runtimes only infer."""
        return self.export is None or case.mode == "inference"

    def optimized(self, network: nn.Module) -> nn.Module:
        return network if self.optimize is None else self.optimize(network)

    def compiled(self, network: nn.Module) -> Forward:
        if not self.compile:
            return network
        return torch.compile(network, dynamic=False, mode="reduce-overhead" if self.graphs else None)


def optimized_for_inference(network: nn.Module) -> nn.Module:
    """By fastcnn, the network itself."""
    return optimize(network, inference=True, inplace=True)


def network_providers(device: str = "cpu") -> dict[str, NetworkProvider]:
    """By name: fastcnn, then PyTorch, then, on CPU, the others, installed or not."""
    every = [
        NetworkProvider("fastcnn", fused=True, optimize=optimized_for_inference, channels_last=True),
        NetworkProvider("fastcnn NCHW", fused=True),
        NetworkProvider("torch.eager"),
        NetworkProvider("torch.eager channels_last", channels_last=True),
        NetworkProvider("torch.compile", channels_last=True, compile=True),
    ]
    if device == "cpu":
        # in training it fails the check: with torch 2.13 AlexNet's convolutions get zero gradients at batch 32
        every.append(NetworkProvider("torch.compile NCHW", compile=True))
        every.append(NetworkProvider("onnxruntime", export=peers.onnxruntime))
        every.append(NetworkProvider("openvino", export=peers.openvino))
    else:
        torchs = NetworkProvider("torch.compile, CUDA graphs", channels_last=True, compile=True, graphs=True)
        every = [replace(torchs, name="fastcnn, CUDA graphs", fused=True), *every, torchs]
    return {provider.name: provider for provider in every}
