"""Who runs a case: fastcnn by each of its backends, PyTorch as it is, PyTorch compiled."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .. import functional as FF
from .cases import LRN, POOL, Case
from .inputs import convolution_args, make_parameters

Op = Callable[..., Tensor]  # of the input and, where there are any, the parameters
Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Provider:
    """Someone who has the operators.

    Args:
        name: as shown and as given to ``--providers``.
        op: case -> the operator as a function.
        backend: the backend to force, for fastcnn.
    """

    name: str
    op: Callable[[Case], Op]
    backend: str | None = None

    def takes_part(self, case: Case) -> bool:
        """Only the C++ kernels can write into memory that is given to them."""
        return case.memory == "fresh" or self.backend == "cpu"


def _torch_lrn(x: Tensor) -> Tensor:
    return F.local_response_norm(x, LRN.size, LRN.alpha, LRN.beta, LRN.k)


def _torch_tail(x: Tensor) -> Tensor:
    return F.max_pool2d(_torch_lrn(F.relu(x)), *POOL.op_args())


def torch_op(case: Case) -> Op:
    """The operator in torch's own functions."""
    conv = convolution_args(case)
    ops: dict[str, Op] = {
        "lrn": _torch_lrn,
        "max_pool2d": lambda x: F.max_pool2d(x, *POOL.op_args()),
        "conv2d_relu": lambda x, weight, bias: F.relu(F.conv2d(x, weight, bias, *conv)),
        "relu_lrn_max_pool2d": _torch_tail,
    }
    return ops[case.op]


def _fastcnn_op(case: Case) -> Op:
    conv = convolution_args(case)
    ops: dict[str, Op] = {
        "lrn": lambda x: FF.local_response_norm(x, LRN.size, LRN.alpha, LRN.beta, LRN.k),
        "max_pool2d": lambda x: FF.max_pool2d(x, *POOL.op_args()),
        "conv2d_relu": lambda x, weight, bias: FF.conv2d_relu(x, weight, bias, *conv),
        "relu_lrn_max_pool2d": lambda x: FF.relu_lrn_max_pool2d(x, lrn=LRN, pool=POOL),
    }
    return ops[case.op]


def _compiled(case: Case) -> Op:
    return torch.compile(torch_op(case), dynamic=False, fullgraph=True)


def _compiled_for_gpu(case: Case) -> Op:
    """The tail with all of inductor's tuning. A convolution's is left to cuDNN: it would take half a minute each."""
    mode = "max-autotune-no-cudagraphs" if case.op == "relu_lrn_max_pool2d" else None
    return torch.compile(torch_op(case), dynamic=False, fullgraph=True, mode=mode)


def all_providers(device: str = "cpu") -> dict[str, Provider]:
    """Those that can run on this device, by name: fastcnn's backends, the fastest first, then PyTorch.

    On a GPU there also is "fastcnn", which leaves the choice of the backend to each operator.
    """
    here = [name for name in reversed(backends.NAMES) if not backends.why_not(name, torch.device(device))]
    ours = [Provider(f"fastcnn.{backend}", _fastcnn_op, backend) for backend in here]
    if device != "cpu":
        ours.insert(0, Provider("fastcnn", _fastcnn_op))
    compiled = _compiled if device == "cpu" else _compiled_for_gpu
    torchs = [Provider("torch.eager", torch_op), Provider("torch.compile", compiled)]
    return {provider.name: provider for provider in (*ours, *torchs)}


def build(provider: Provider, case: Case, x: Tensor, dy: Tensor) -> Call:
    """A function without arguments that runs the case once and returns what is checked: output, gradients or both."""
    with backends.use(provider.backend):
        run = _build_mapped(case, x, dy) if case.memory == "mapped" else build_call(provider.op(case), case, x, dy)

    def call() -> tuple[Tensor, ...]:
        with backends.use(provider.backend):
            return run()

    return call


def build_call(op: Op, case: Case, x: Tensor, dy: Tensor) -> Call:
    """As :func:`build`, of an operator."""
    parameters = make_parameters(case, x)
    if case.mode == "forward":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (op(x, *parameters),)

        return forward

    leaves = [x.detach().requires_grad_(), *(p.requires_grad_() for p in parameters)]
    if case.mode == "backward":
        # inductor would otherwise reuse saved tensors as scratch memory, and refuse to run the same graph twice
        with torch._functorch.config.patch(donated_buffer=False):
            output = op(*leaves)
        return lambda: torch.autograd.grad(output, leaves, dy, retain_graph=True)

    def forward_backward() -> tuple[Tensor, ...]:
        y = op(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    return forward_backward


def _build_mapped(case: Case, x: Tensor, dy: Tensor) -> Call:
    library = torch.ops.fastcnn_cpu
    channels_last = case.format == "channels_last"
    lrn = (LRN.size, LRN.alpha, LRN.beta, LRN.k, LRN.groups)
    if case.mode == "backward":
        dx = torch.zeros_like(x)

        def backward() -> tuple[Tensor, ...]:
            library.lrn_backward(dy, x, dx, channels_last, *lrn)
            return (dx,)

        return backward

    y = torch.zeros_like(dy)

    def forward() -> tuple[Tensor, ...]:
        if case.op == "lrn":
            library.lrn(x, y, channels_last, *lrn)
        else:
            library.relu_lrn_max_pool2d(x, None, y, None, channels_last, True, *lrn, *POOL.op_args())
        return (y,)

    return forward
