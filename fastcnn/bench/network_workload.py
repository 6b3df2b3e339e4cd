"""A network's calls, and what they are compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
import torch._inductor.config as inductor
import torch.nn.functional as F
from torch import Tensor, nn

from .cases import DTYPES, Case
from .inputs import images
from .networks import NETWORKS, count_flop
from .workload import Call, Entry, Mismatch, Phases, Yardstick, matmul, worst

if TYPE_CHECKING:
    from .providers import NetworkProvider

Forward = Callable[[Tensor], Tensor]

MATMUL = 2048  # height and width of the matrices whose product stands for the machine's rate, four times that on GPUs
CHECKED_IMAGES = 2
LOGITS = {"fp32": 1e-5, "bf16": 5e-2}  # difference relative to the logits minus their mean
LOSS = {"fp32": 1e-5, "bf16": 1e-2}
# Where rounding decides which of two values is the maximum, or on which side of zero one lies, the gradient goes
# another way; one such place among the 9216 of AlexNet's last map moves it by about 1/100. In bf16 they were seen to
# add up to a fifth in AlexNet's first layer.
GRADIENT = {"fp32": 5e-2, "bf16": 0.4}


class NetworkWorkload:
    """A network in one case, on photographs; ``plain`` has torch's layers, ``fused`` fastcnn's."""

    measures_memory = True

    def __init__(self, case: Case, device: str = "cpu") -> None:
        self.case, self.device = case, device
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.plain, self.fused = self.make()
            self.plain, self.fused = self.plain.to(device), self.fused.to(device)
            self.x = images(case.shape[0], case.shape[2]).to(device)
            self.labels = torch.randint(self.classes(), case.shape[:1]).to(device)
        self.flop = self.count_flop()
        self.expected = self._expected()  # here, or the first provider's memory would have it

    def make(self) -> tuple[nn.Module, nn.Module]:
        """Both networks, in evaluation mode and with the same weights."""
        make = NETWORKS[self.case.op].make
        plain, fused = (make(self.case.shape[-1], plain).eval() for plain in (True, False))
        fused.load_state_dict(plain.state_dict())
        return plain, fused

    def classes(self) -> int:
        return 1000

    def count_flop(self) -> int | None:
        return count_flop(self.case, self.plain)

    def bytes_moved(self, dtype: str) -> int | None:
        return None

    def yardsticks(self) -> dict[str, Yardstick]:
        size = MATMUL if self.device == "cpu" else 4 * MATMUL
        return {"matmul": matmul(size, DTYPES[self.case.dtype], self.device)}

    # -- calls --------------------------------------------------------------------------------------------------------

    def prepare(self, provider: NetworkProvider, dtype: str) -> Entry:
        network = deepcopy(self.fused if provider.fused else self.plain)
        if provider.export is not None:
            run, x = provider.export(network, self.x, DTYPES[dtype]), self.x
            return Entry(lambda: (run(x),), lambda: (run(x),))
        format = torch.channels_last if provider.channels_last else torch.contiguous_format
        network = network.to(DTYPES[dtype]).to(memory_format=format)  # type: ignore[call-overload]
        x = self.x.to(dtype=DTYPES[dtype]).contiguous(memory_format=format)
        if self.case.mode == "inference":
            infer = _inference(provider, network, x)
            return Entry(infer, infer)
        if self.case.mode == "input gradient":
            return _input_gradient(provider.compiled(network), network, x)
        step = {"training step": _training_step, "training": _gradients_alone}[self.case.mode]
        if self.case.mode == "training":
            network = provider.optimized(network)
        return step(provider.compiled(network), network, x, self.labels)

    # -- check --------------------------------------------------------------------------------------------------------

    def _expected(self) -> tuple[Tensor, ...]:
        """In float64, of the first images: logits; loss and gradients of parameters; or losses and their gradient."""
        network, x = deepcopy(self.plain).double(), self.x[:CHECKED_IMAGES].double()
        if self.case.mode == "inference":
            with torch.no_grad():
                return (network(x),)
        if self.case.mode == "input gradient":
            losses = network(x.requires_grad_())
            return losses.detach(), *torch.autograd.grad(losses.sum(), x)
        loss = _checked_loss(network(x), self.labels)
        loss.backward()
        return loss.detach(), *_gradients(network)

    def check(self, outputs: Sequence[Tensor], dtype: str, allowed: float | None = None) -> tuple[float, float]:
        """In 16 bits the five likeliest classes are not compared, as near ones may change places."""
        first, truth = outputs[0], self.expected[0]
        if self.case.mode == "inference":
            logits = first[:CHECKED_IMAGES]
            error = _difference(logits, truth, truth - truth.mean(1, keepdim=True))
            closest = worst([("logits: ", error, allowed or LOGITS[dtype])])
            best = (values.topk(min(5, truth.shape[1])).indices for values in (logits, truth))
            if dtype == "fp32" and not torch.equal(*best):
                raise Mismatch("the five likeliest classes differ")
            return closest
        if self.case.mode == "input gradient":
            outputs = [output[:CHECKED_IMAGES] for output in outputs]
        compared = [("loss: ", _difference(outputs[0], truth, truth), allowed or LOSS[dtype])]
        for gradient, truth in zip(outputs[1:], self.expected[1:], strict=True):
            compared.append(("gradient: ", _difference(gradient, truth, truth), allowed or GRADIENT[dtype]))
        return worst(compared)


def _inference(provider: NetworkProvider, network: nn.Module, x: Tensor) -> Call:
    run = provider.compiled(provider.optimized(network))

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

    return Entry(call, call, lambda: (run(leaf),), network.parameters())


def _training_step(run: Forward, network: nn.Module, x: Tensor, labels: Tensor) -> Entry:
    """The check has a loss of the first images alone, and no dropout; a step has both, and a learning rate of zero.

    So every step does all of its work, on the network that was checked.
    """
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4, fused=True)
    phases = Phases()

    def forward() -> tuple[Tensor, ...]:
        return (F.cross_entropy(run(x), labels),)

    def check() -> tuple[Tensor, ...]:
        network.eval()
        optimizer.zero_grad()
        loss = _checked_loss(run(x), labels)
        loss.backward()
        outputs = loss.detach(), *_gradients(network)
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
        phases.forward.append(between - start)
        phases.backward.append(update - between)
        phases.update.append(time.perf_counter() - update)
        return (loss.detach(),)

    # a GPU is still at work when the host reads its clock
    return Entry(check, step, forward, list(network.parameters()), None if x.is_cuda else phases)


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
        return value.detach(), *_gradients(network)

    def check() -> tuple[Tensor, ...]:
        for norm in norms:
            norm.eval()
        outputs = gradients_of(_checked_loss)
        for norm in norms:
            norm.train()
        return outputs

    return Entry(check, lambda: gradients_of(F.cross_entropy))


def _checked_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Of the first images alone, though all of them run."""
    return F.cross_entropy(logits[:CHECKED_IMAGES], labels[:CHECKED_IMAGES])


def _gradients(network: nn.Module) -> list[Tensor]:
    return [p.grad for p in network.parameters() if p.grad is not None]


def _difference(output: Tensor, truth: Tensor, scale: Tensor) -> float:
    if output.shape != truth.shape:
        raise Mismatch(f"shape {tuple(output.shape)} instead of {tuple(truth.shape)}")
    return float((output.double() - truth).norm() / scale.norm())
