"""Who runs a network: fastcnn, PyTorch as it is and compiled, and other runtimes where they are installed."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch._inductor.config as inductor
import torch.nn.functional as F
from torch import Tensor, nn

from ..optimize import optimize
from . import peers
from .cases import DTYPES, Case
from .networks import Laps
from .providers import Call

Forward = Callable[[Tensor], Tensor]
CHECKED = 2  # images


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
        # from NCHW weights it fails the check: with torch 2.13 AlexNet's convolutions get zero gradients at batch 32
        NetworkProvider("torch.compile", channels_last=True, compile=True),
    ]
    if device == "cpu":
        every.append(NetworkProvider("onnxruntime", export=peers.onnxruntime))
        every.append(NetworkProvider("openvino", export=peers.openvino))
    else:
        torchs = NetworkProvider("torch.compile, CUDA graphs", channels_last=True, compile=True, graphs=True)
        every = [replace(torchs, name="fastcnn, CUDA graphs", fused=True), *every, torchs]
    return {provider.name: provider for provider in every}


@dataclass(frozen=True)
class Entry:
    """A provider, ready to run a case.

    Args:
        check: run once; what is compared with the plain network in float64, see ``network_verify``.
        call: run once as it is timed.
        forward: the forward whose memory for backward is counted; None in inference.
        network: the parameters and their format; None where another runtime has its own.
        laps: of the calls, in training on CPU.
    """

    check: Call
    call: Call
    forward: Call | None
    network: nn.Module | None
    laps: Laps | None = None


def prepare(provider: NetworkProvider, case: Case, network: nn.Module, x: Tensor, labels: Tensor) -> Entry:
    """Of a network of the provider's own layers, in evaluation mode and in fp32, and of images in fp32."""
    dtype = DTYPES[case.dtype]
    if provider.export is not None:
        run = provider.export(network, x, dtype)
        return Entry(lambda: (run(x),), lambda: (run(x),), None, None)
    format = torch.channels_last if provider.channels_last else torch.contiguous_format
    network = network.to(dtype).to(memory_format=format)  # type: ignore[call-overload]
    x = x.to(dtype=dtype).contiguous(memory_format=format)
    if case.mode == "inference":
        infer = _inference(provider, network, x)
        return Entry(infer, infer, None, network)
    if case.mode == "training":
        return _gradients_alone(_compiled(provider, _optimized(provider, network)), network, x, labels)
    run = _compiled(provider, network)
    if case.mode == "input gradient":
        return _input_gradient(run, network, x)
    return _training(run, network, x, labels)


def _optimized(provider: NetworkProvider, network: nn.Module) -> nn.Module:
    return network if provider.optimize is None else provider.optimize(network)


def _compiled(provider: NetworkProvider, network: nn.Module) -> Forward:
    if not provider.compile:
        return network
    return torch.compile(network, dynamic=False, mode="reduce-overhead" if provider.graphs else None)


def _inference(provider: NetworkProvider, network: nn.Module, x: Tensor) -> Call:
    run = _compiled(provider, _optimized(provider, network))

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (run(x),)

    if provider.compile:
        with inductor.patch(freezing=True):
            call()
    return call


def _input_gradient(run: Forward, network: nn.Module, x: Tensor) -> Entry:
    leaf = x.detach().requires_grad_()

    def call() -> tuple[Tensor, ...]:
        losses = run(leaf)
        return losses.detach(), *torch.autograd.grad(losses.sum(), leaf)

    return Entry(call, call, lambda: (run(leaf),), network)


def _training(run: Forward, network: nn.Module, x: Tensor, labels: Tensor) -> Entry:
    """The check has a loss of the first images alone, and no dropout; a step has both, and a learning rate of zero.

    So every step does all of its work, on the network that was checked.
    """
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)
    laps = Laps()

    def forward() -> tuple[Tensor, ...]:
        return (F.cross_entropy(run(x), labels),)

    def check() -> tuple[Tensor, ...]:
        network.eval()
        optimizer.zero_grad()
        loss = checked_loss(run(x), labels)
        loss.backward()
        outputs = loss.detach(), *gradients(network)
        optimizer.zero_grad()
        network.train()
        return outputs

    def step() -> tuple[Tensor, ...]:
        start = time.perf_counter()
        optimizer.zero_grad()
        (loss,) = forward()
        between = time.perf_counter()
        loss.backward()
        update = time.perf_counter()
        optimizer.step()
        laps.forward.append(between - start)
        laps.backward.append(update - between)
        laps.update.append(time.perf_counter() - update)
        return (loss.detach(),)

    # a GPU is still at work when the host reads its clock
    return Entry(check, step, forward, network, None if x.is_cuda else laps)


def _gradients_alone(run: Forward, network: nn.Module, x: Tensor, labels: Tensor) -> Entry:
    """Forward, loss and backward of a network without dropout, always in training mode.

    The check has a loss of the first images alone, and batch norms, which would see the others, in evaluation mode.
    """
    network.train()
    norms = [layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]

    def gradients_of(loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        network.zero_grad()
        value = loss(run(x), labels)
        value.backward()
        return value.detach(), *gradients(network)

    def check() -> tuple[Tensor, ...]:
        for norm in norms:
            norm.eval()
        outputs = gradients_of(checked_loss)
        for norm in norms:
            norm.train()
        return outputs

    return Entry(check, lambda: gradients_of(F.cross_entropy), None, network)


def checked_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Of the first images alone, though all of them run."""
    return F.cross_entropy(logits[:CHECKED], labels[:CHECKED])


def gradients(network: nn.Module) -> list[Tensor]:
    """Of every parameter."""
    return [p.grad for p in network.parameters() if p.grad is not None]
