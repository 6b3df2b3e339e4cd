"""The operators that are measured: a record for each, their shapes in AlexNet and VGG-16, and the usual cases.

Their modes: "backward" is the gradient of a retained graph, without the forward.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from math import prod, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional as FF
from .. import reference
from ..params import ConvParams, LRNParams, PoolParams
from . import augmentations
from .cases import DTYPES, FORMATS, Case, Shape

DType = torch.dtype
MODES = ("forward", "backward", "forward+backward")
LRN = LRNParams(size=5, alpha=1e-4, beta=0.75, k=2.0)
POOL = PoolParams(kernel_size=3, stride=2)
STAGES: dict[str, Shape] = {"stage1": (32, 96, 55, 55), "stage2": (32, 256, 27, 27)}
SHAPES: dict[str, Shape] = {**STAGES, "conv2": (32, 96, 27, 27)}  # what the tails, and conv2, get


@dataclass(frozen=True)
class Convolution:
    """A layer's: channels, height and width of its input, output channels, window, and the rest."""

    channels: int
    size: int
    outputs: int
    window: int
    stride: int = 1
    padding: int = 0
    groups: int = 1

    @property
    def params(self) -> ConvParams:
        return ConvParams([self.stride] * 2, [self.padding] * 2, [1, 1], self.groups)

    @property
    def weight_shape(self) -> Shape:
        return (self.outputs, self.channels // self.groups, self.window, self.window)


CONVOLUTIONS = {
    "AlexNet conv1": Convolution(3, 227, 96, 11, stride=4),
    "AlexNet conv2": Convolution(96, 27, 256, 5, padding=2, groups=2),
    "AlexNet conv3": Convolution(256, 13, 384, 3, padding=1),
    "AlexNet conv4": Convolution(384, 13, 384, 3, padding=1, groups=2),
    "AlexNet conv5": Convolution(384, 13, 256, 3, padding=1, groups=2),
    "VGG-16 conv1_1": Convolution(3, 224, 64, 3, padding=1),
    "VGG-16 conv1_2": Convolution(64, 224, 64, 3, padding=1),
    "VGG-16 conv2_1": Convolution(64, 112, 128, 3, padding=1),
    "VGG-16 conv2_2": Convolution(128, 112, 128, 3, padding=1),
    "VGG-16 conv3_1": Convolution(128, 56, 256, 3, padding=1),
    "VGG-16 conv3_2": Convolution(256, 56, 256, 3, padding=1),
    "VGG-16 conv4_1": Convolution(256, 28, 512, 3, padding=1),
    "VGG-16 conv4_2": Convolution(512, 28, 512, 3, padding=1),
    "VGG-16 conv5": Convolution(512, 14, 512, 3, padding=1),
}


def convolution(case: Case) -> Convolution:
    """The case's layer, of as many channels as its input has; an odd number of them has but one group."""
    layer = replace(CONVOLUTIONS[case.layer or "AlexNet conv2"], channels=case.shape[1])
    return replace(layer, groups=1) if case.shape[1] % 2 else layer


@dataclass(frozen=True)
class Peer:
    """Someone else's function, called as torch's; in float32.

    Args:
        only_the_first: whether its output is right for the first of a batch alone, and its time a lower bound.
        allowed: its error, if it rounds more than others.
    """

    function: Callable[..., Tensor]
    only_the_first: bool = False
    allowed: float | None = None


@dataclass(frozen=True)
class Operator:
    """What the benchmark knows of an operator.

    Args:
        name: of the operator.
        ours, torch, reference: fastcnn's function, torch's, and the definition, called alike: with the input, weights
            where it has any, and ``arguments``.
        arguments: of a case and a dtype of the result, what follows the tensors.
        output_shape: of a case.
        backward: the elements that a backward must read and write, from those of the input, the output and the weight.
        argmax: whether forward leaves a byte per output to backward.
        weight_shape: of a case; None of an operator without weight and bias.
        decided: (case, input) -> where the gradient of the output may be other than zero: where it is in no doubt to
            which input it belongs. None: everywhere.
        into: by mode, the C++ kernel that writes into memory that it is given: (x, dy, output, channels_last).
        shapes: the usual ones, of which without ``--full`` the first is run.
        usual: dtypes and modes that are run unless others are asked for.
        mapped: modes that are usual in mapped memory too.
        modes: that it has.
        of_the_batch: whether an image's output depends on the others.
        takes_pictures: whether its input is pictures in bytes, of shape (N, H, W, C).
        moved: (case, element size) -> the bytes that it must read and write, where these are not the elements of input
            and output.
        compilable: what torch.compile gets in the place of ``torch``.
        peers: others who do what it does, by name; "torch.eager" only where it rounds more.
    """

    name: str
    ours: Callable[..., Tensor]
    torch: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    backward: Callable[[int, int, int], int]
    arguments: Callable[[Case, DType], tuple[Any, ...]] = lambda case, dtype: ()
    output_shape: Callable[[Case], Shape] = lambda case: case.shape
    argmax: bool = False
    weight_shape: Callable[[Case], Shape] | None = None
    decided: Callable[[Case, Tensor], Tensor] | None = None
    into: Mapping[str, Callable[[Tensor, Tensor, Tensor, bool], None]] = field(default_factory=dict)
    shapes: Collection[Shape] = tuple(STAGES.values())
    usual: Collection[tuple[str, str]] = (("fp32", "forward"), ("fp32", "forward+backward"))
    mapped: Collection[str] = ()
    modes: Collection[str] = MODES
    of_the_batch: bool = False
    takes_pictures: bool = False
    moved: Callable[[Case, int], int] | None = None
    compilable: Callable[..., Tensor] | None = None
    peers: Mapping[str, Peer] = field(default_factory=dict)

    @property
    def registered(self) -> str:
        """Name of its op."""
        return "augment" if self.takes_pictures else self.name

    def parameters(self, case: Case, x: Tensor) -> tuple[Tensor, ...]:
        """Weight and bias, if it has them: of the case's precision and format, and of the dtype of ``x``."""
        if self.weight_shape is None:
            return ()
        weight = he_weight(self.weight_shape(case)).to(DTYPES[case.dtype], memory_format=FORMATS[case.format])
        return weight.to(x), torch.ones(len(weight)).to(x)

    def flop(self, case: Case) -> int | None:
        """Multiplications and additions, if it has weights."""
        if self.weight_shape is None:
            return None
        forward = 2 * prod(self.output_shape(case)) * prod(self.weight_shape(case)[1:])
        return {"forward": 1, "backward": 2, "forward+backward": 3}[case.mode] * forward

    def bytes_moved(self, case: Case, element_size: int) -> int:
        """What the operator must read and write at the least: each input and output once, and a 1-byte argmax.

        The same for every provider: the GB/s of one that writes intermediates counts only the bytes that were needed.
        """
        if self.moved is not None:
            return self.moved(case, element_size)
        x, y = prod(case.shape), prod(self.output_shape(case))
        weight = 0 if self.weight_shape is None else prod(self.weight_shape(case))
        argmax = y * self.argmax
        forward, backward = (x + y + weight) * element_size, self.backward(x, y, weight) * element_size + argmax
        return {"forward": forward, "backward": backward, "forward+backward": forward + argmax + backward}[case.mode]


def he_weight(shape: Shape) -> Tensor:
    """Always the same numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)) * sqrt(2 / prod(shape[1:]))


_LRN = (LRN.size, LRN.alpha, LRN.beta, LRN.k)
_KERNELS = torch.ops.fastcnn_cpu


def _pooled(case: Case) -> Shape:
    return (*case.shape[:2], *POOL.output_size(*case.shape[2:]))


def _torch_tail(x: Tensor) -> Tensor:
    return F.max_pool2d(F.local_response_norm(F.relu(x), *_LRN), *POOL.op_args())


def _one_maximum(case: Case, x: Tensor) -> Tensor:
    """Whether the maximum of each pooling window stands out by more than the rounding of ``x``'s dtype."""
    z = reference.relu_lrn_max_pool2d(x.double(), lrn=LRN)
    (kh, kw), (sh, sw), *_ = POOL.op_args()
    largest = z.unfold(2, kh, sh).unfold(3, kw, sw).flatten(-2).topk(2).values
    return largest[..., 0] - largest[..., 1] > 8 * torch.finfo(x.dtype).eps * largest[..., 0]


def _torch_norm(x: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.batch_norm(x, None, None, training=True)), *POOL.op_args())


def _one_maximum_of_norm(case: Case, x: Tensor) -> Tensor:
    """Whether the maximum of each window is above zero, and above the others, by more than the rounding."""
    z = reference.batch_norm_relu_max_pool2d(x.double(), None, None, training=True)
    (kh, kw), (sh, sw), *_ = POOL.op_args()
    largest = z.unfold(2, kh, sh).unfold(3, kw, sw).flatten(-2).topk(2).values
    return largest[..., 0] - largest[..., 1] > 8 * torch.finfo(x.dtype).eps * (1 + largest[..., 0])


def _norm_bytes(case: Case, element_size: int) -> int:
    """In two passes each: x twice, and in backward the gradient and the argmax twice."""
    x, y = prod(case.shape), prod(_pooled(case))
    forward, backward = (2 * x + y) * element_size, (3 * x + 2 * y) * element_size + 2 * y
    return {"forward": forward, "backward": backward, "forward+backward": forward + y + backward}[case.mode]


def _convolved(case: Case) -> Shape:
    conv = convolution(case)
    height, width = ((size + 2 * conv.padding - conv.window) // conv.stride + 1 for size in case.shape[2:])
    return (case.shape[0], conv.outputs, height, width)


def _torch_convolution(x: Tensor, weight: Tensor, bias: Tensor, *arguments: Any) -> Tensor:
    return F.relu(F.conv2d(x, weight, bias, *arguments))


def _sign_of_a_sum(case: Case, x: Tensor) -> Tensor:
    x = x.float()
    weight, bias = OPERATORS[case.op].parameters(case, x)
    z = F.conv2d(x, weight, bias, *convolution(case).params.op_args())
    return z.abs() > 1e-4 * z.std()


def _augment(name: str, allowed: float | None) -> Operator:
    """``allowed``: the error of those who round pixels to bytes, if they do."""
    return Operator(
        name,
        augmentations.ours,
        augmentations.in_torch,
        augmentations.in_plain_torch,
        lambda x, y, weight: 0,
        arguments=augmentations.arguments,
        output_shape=augmentations.output_shape,
        shapes=((128, 3, 256, 256),),
        usual=(("fp32", "forward"), ("bf16", "forward")),
        modes=("forward",),
        takes_pictures=True,
        moved=augmentations.bytes_moved,
        compilable=augmentations.in_plain_torch,
        peers={
            "torch.eager": Peer(augmentations.in_torch, allowed=allowed),
            "Pillow and numpy": Peer(augmentations.by_pillow, allowed=allowed),
            "torchvision v2": Peer(augmentations.by_torchvision, allowed=allowed),
            "torchvision v2, one crop for all": Peer(augmentations.by_torchvision_at_once, True, allowed),
        },
    )


OPERATORS = {
    operator.name: operator
    for operator in (
        Operator(
            "lrn",
            FF.local_response_norm,
            F.local_response_norm,
            reference.local_response_norm,
            lambda x, y, weight: 2 * x + y,
            arguments=lambda case, dtype: _LRN,
            into={
                "forward": lambda x, dy, y, last: _KERNELS.lrn(x, y, last, *LRN.op_args()),
                "backward": lambda x, dy, dx, last: _KERNELS.lrn_backward(dy, x, dx, last, *LRN.op_args()),
            },
            usual=(("fp32", "forward"), ("fp32", "backward")),
            mapped=("forward", "backward"),
        ),
        Operator(
            "max_pool2d",
            FF.max_pool2d,
            F.max_pool2d,
            reference.max_pool2d,
            lambda x, y, weight: x + y,
            arguments=lambda case, dtype: POOL.op_args(),
            output_shape=_pooled,
            argmax=True,
            into={"forward": lambda x, dy, y, last: _KERNELS.max_pool2d(x, y, None, last, *POOL.op_args())},
            mapped=("forward",),
        ),
        Operator(
            "conv2d_relu",
            FF.conv2d_relu,
            _torch_convolution,
            reference.conv2d_relu,
            lambda x, y, weight: 2 * (x + y + weight),  # its output stands for the ReLU's mask
            arguments=lambda case, dtype: convolution(case).params.op_args(),
            output_shape=_convolved,
            weight_shape=lambda case: convolution(case).weight_shape,
            decided=_sign_of_a_sum,
            shapes=(SHAPES["conv2"],),
        ),
        Operator(
            "relu_lrn_max_pool2d",
            partial(FF.relu_lrn_max_pool2d, lrn=LRN, pool=POOL),
            _torch_tail,
            partial(reference.relu_lrn_max_pool2d, lrn=LRN, pool=POOL),
            lambda x, y, weight: 2 * x + y,
            output_shape=_pooled,
            argmax=True,
            decided=_one_maximum,
            into={
                "forward": lambda x, dy, y, last: _KERNELS.relu_lrn_max_pool2d(
                    x, None, y, None, last, True, *LRN.op_args(), *POOL.op_args()
                )
            },
            usual=(("fp32", "forward"), ("fp32", "forward+backward"), ("bf16", "forward")),
            mapped=("forward",),
        ),
        Operator(
            "batch_norm_relu_max_pool2d",
            lambda x: FF.batch_norm_relu_max_pool2d(x, None, None, training=True, pool=POOL),
            _torch_norm,
            lambda x: reference.batch_norm_relu_max_pool2d(x, None, None, training=True, pool=POOL),
            lambda x, y, weight: 3 * x + 2 * y,
            output_shape=_pooled,
            argmax=True,
            decided=_one_maximum_of_norm,
            of_the_batch=True,
            moved=_norm_bytes,
        ),
        _augment("augment", None),
        _augment("augment_resized", 0.01),
    )
}
# Who takes part beside fastcnn and PyTorch.
PEERS = tuple(name for name in OPERATORS["augment"].peers if not name.startswith("torch."))


def select(
    *,
    ops: Collection[str] = (),
    shapes: Collection[Shape] = (),
    dtypes: Collection[str] = (),
    formats: Collection[str] = (),
    modes: Collection[str] = (),
    batch: int | None = None,
    layers: Collection[str] = (),
    full: bool = False,
) -> list[Case]:
    """The cases to run: those asked for where something is, otherwise the usual ones, with ``full`` all there are.

    Usual are the shape of stage 1 (conv2's for the convolution) and both formats, which follow one another; what else
    is in the operator's record. ``batch`` takes the place of every N. With ``layers``, keys of CONVOLUTIONS, the
    cases are the convolutions of these layers instead, of 32 images.
    """
    cases = []
    for op, mode, dtype in product(ops or OPERATORS, modes or MODES, dtypes or ("fp32", "bf16")):
        operator = OPERATORS[op]
        if mode not in operator.modes:
            continue
        usual_mode = any(mode == usual for _, usual in operator.usual)
        usual_dtype = dtype == "fp32" or (dtype, mode) in operator.usual
        if not (full or ((modes or usual_mode) and (dtypes or usual_dtype))):
            continue
        inputs: list[tuple[str | None, Shape]] = [
            (None, s) for s in shapes or list(operator.shapes)[: None if full else 1]
        ]
        if layers:
            found = [(name, CONVOLUTIONS[name]) for name in layers if op == "conv2d_relu"]
            inputs = [(name, (32, layer.channels, layer.size, layer.size)) for name, layer in found]
        for name, (n, c, h, w) in inputs:
            if operator.takes_pictures and c != 3:
                continue
            memories = ["fresh"]
            if mode in (operator.into if full else operator.mapped):
                memories.append("mapped")
            for memory, format in product(memories, formats or FORMATS):
                cases.append(Case(op, (batch or n, c, h, w), dtype, format, mode, memory, name))
    return cases
