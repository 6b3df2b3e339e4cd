"""Inference on CPU from weights that do not change: packed once, convolution and tail sharing one small buffer."""

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..memory_format import dense, output_format
from ..params import ConvParams, LRNParams, PoolParams, TailParams, opmath, pooled_size
from ._packed import Frozen, unchanged
from .cpu import winograd as _winograd
from .cpu.memory import kept
from .cpu.onednn import magnitude as _magnitude
from .cpu.onednn import pack as _pack
from .cpu.onednn import runs as _onednn_runs

# A larger block is mapped anew each time it is allocated, by the GNU C library for one; smaller ones are used again.
_REUSED_BYTES = 32 << 20
_HALVES = PoolParams(2).op_args()
_LARGE = 1e38  # far enough below the largest float32 that no sum on the way overflows
_FEW = 4  # vectors, for which reading the weights is all that takes time
_LINEAR_BATCH = 32  # that weights are packed for, and good for any
_KINDS = 64  # of input, for which it is remembered how a layer runs


_seen = threading.local()  # .largest: bytes of an image's largest map since it was set to 0


def in_parts(run: Callable[[Tensor], Any], largest: dict[Any, int], input: Any) -> Any:
    """``run(input)``, a few images at a time where the maps in between would be too large to be used again.

    ``largest`` keeps, for each kind of input, the bytes of an image's largest map, found when it is first met.
    """
    x = input
    if type(x) is not Tensor or x.dim() != 4 or x.device.type != "cpu" or len(x) < 2 or torch.compiler.is_compiling():
        return run(x)
    if torch._C._are_functorch_transforms_active() or (torch.is_grad_enabled() and x.requires_grad):
        return run(x)
    kind = x.shape[1:], x.dtype
    if kind not in largest:
        _seen.largest = 0
        y = run(x)
        largest[kind] = _seen.largest if isinstance(y, Tensor) else 0
        if _images_at_a_time(len(x), largest[kind]) == len(x):
            return y  # else anew, so that the first time gives the same bits as the next
    step = _images_at_a_time(len(x), largest[kind])
    return run(x) if step == len(x) else torch.cat([run(part) for part in x.split(step)])


def _images_at_a_time(images: int, bytes_of_one: int) -> int:
    return images if images * bytes_of_one <= _REUSED_BYTES else max(1, _REUSED_BYTES // 2 // bytes_of_one)


def runs(op: str, x: Tensor) -> bool:
    """Whether the functions of this file may run an operator: on a real tensor of the CPU that asks for no gradient."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if type(x) is not Tensor or not x.is_cpu or (x.requires_grad and torch.is_grad_enabled()):
        return False
    return backends.choose(op, ("reference", "cpu"), x) == "cpu"


def runs_packed(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether they may with this weight, and beside it these parameters."""
    if not runs("conv2d_relu", x) or not weight.is_cpu or x.dtype != weight.dtype or not _onednn_runs(x):
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (weight, *others)):
        return False
    return not weight.is_inference()  # made under torch.inference_mode: whether it changes cannot be seen


def normalized(
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    variance: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of the convolution that these and a batch norm make together; None where one is not finite."""
    made = unchanged(weight).made
    of = [None if t is None else unchanged(t) for t in (bias, scale, shift, mean, variance)]
    known = made.get("normalized")
    if known is None or known[0] != eps or any(a is not b for a, b in zip(known[1], of, strict=True)):
        with torch.inference_mode(False), torch.no_grad():
            factor = (variance.double() + eps).rsqrt() * (1 if scale is None else scale)
            offset = ((0 if bias is None else bias) - mean.double()) * factor + (0 if shift is None else shift)
            both = (weight * factor.view(-1, 1, 1, 1)).to(weight.dtype), offset.to(weight.dtype)
            finite = all(bool(t.isfinite().all()) for t in both)
        known = made["normalized"] = eps, of, both if finite else (None, None)
    return known[2]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False, factor: float = 1.0) -> Tensor:
    """``factor * relu(linear(x, weight, bias))`` of a batch of vectors, or without ReLU."""
    bias = None if bias is None else bias.contiguous()
    if 0 < len(x) <= _FEW and weight.is_contiguous():
        y = torch.empty((len(x), len(weight)), dtype=x.dtype)
        torch.ops.fastcnn_cpu.linear(x.contiguous(), weight, bias, y, relu, factor)
        return y
    reorder = torch.ops.mkldnn._reorder_linear_weight
    packed = unchanged(weight).get("linear", lambda: reorder(weight.detach(), _LINEAR_BATCH))
    y = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    y = torch.relu_(y) if relu else y
    return y if factor == 1 else y.mul_(factor)


def conv_stage(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Sequence[Any],
    relu: bool,
    lrn: Sequence[Any] | None,
    pool: Sequence[Any] | None,
) -> Tensor:
    """Convolution -> ReLU? -> LRN? -> max-pool?, in channels_last.

    ``conv`` are stride, padding, dilation and groups, as of :func:`torch.nn.functional.conv2d`; ``lrn`` and ``pool``
    the arguments of :class:`LRNParams` and :class:`PoolParams`.
    """
    x, bias = x.contiguous(memory_format=torch.channels_last), None if bias is None else bias.contiguous()
    frozen = unchanged(weight)
    of_bias = None if bias is None else (bias.shape, bias.dtype)
    kind = x.shape, of_bias, torch.get_num_threads(), relu, *map(_hashable, (conv, lrn, pool))
    stages = frozen.get("stages", dict)
    stage = stages.get(kind)
    if stage is None:
        if len(stages) == _KINDS:
            stages.clear()
        tail = relu, None if lrn is None else LRNParams(*lrn), None if pool is None else PoolParams(*pool)
        stage = stages[kind] = _Stage(x, weight, bias, conv, *tail)
    _seen.largest = max(getattr(_seen, "largest", 0), stage.image_bytes)
    return stage(x, weight, bias, frozen)


def _hashable(arguments: Sequence[Any] | None) -> tuple[Any, ...] | None:
    return None if arguments is None else tuple([tuple(a) if type(a) is list else a for a in arguments])


class _Stage:
    """A stage, and all that is known of it before an input of that shape comes."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        conv: Sequence[Any],
        relu: bool,
        lrn: LRNParams | None,
        pool: PoolParams | None,
    ) -> None:
        params, _ = ConvParams.of(x, weight, bias, *conv)
        self.conv, self.relu = params.op_args(), relu
        n, c, *size = self.shape = params.output_shape(x.shape, weight.shape)
        self.image_bytes = c * size[0] * size[1] * x.element_size()
        self.by_winograd = _winograd.runs(x, weight, *self.conv)
        self.has_tail = lrn is not None or pool is not None
        self.halves = pool is not None and pool.op_args() == _HALVES
        self.in_one = self.by_winograd and lrn is None and (pool is None or self.halves)
        self.tail = TailParams(relu, lrn, pool).op_args()
        self.out_shape = [n, c, *(size if pool is None else pooled_size(size, *pool.op_args()))]
        # A dilated window may hold nothing, and give -inf.
        self.keeps_bound = lrn is None and (pool is None or pool.op_args()[3] == [1, 1])
        self.products = weight[0].numel()  # that make an output
        self.small_input = x.numel() <= 2 * n * c * size[0] * size[1]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, frozen: Frozen) -> Tensor:
        """Of an input in channels_last."""
        if self.in_one:
            y = kept(torch.empty(self.out_shape, dtype=x.dtype, memory_format=torch.channels_last))
            found = self._winograd(x, weight, bias, y, frozen, relu=self.relu, pool=self.halves)
            if found is not None:
                return _bounded(y, found)
        bound = _bound(x)  # of absolute values; what comes out of this layer is bounded by it too
        if self.has_tail:
            y = self._with_tail(x, weight, bias, frozen)
            if bound is None or not self.keeps_bound:
                return y
            return _bounded(y, self._outgoing(bound, weight, bias, frozen))
        if not self.relu:
            return self._convolve(x, weight, bias, frozen, "none")
        # oneDNN's ReLU makes 0 of NaN: it may run where NaN is ruled out, if need be by a read of a short input. After
        # a long one the read of the output spares the next layers theirs.
        outgoing = _LARGE if bound is None else self._outgoing(bound, weight, bias, frozen)
        if not outgoing < _LARGE and self.small_input:
            outgoing = self._outgoing(_magnitude(x), weight, bias, frozen)
        if not outgoing < _LARGE:
            y = torch.relu_(self._convolve(x, weight, bias, frozen, "none"))
            return y if self.small_input else _bounded(y, _magnitude(y))
        return _bounded(self._convolve(x, weight, bias, frozen, "relu"), outgoing)

    def _outgoing(self, of_input: float, weight: Tensor, bias: Tensor | None, frozen: Frozen) -> float:
        """How large the convolution's outputs can be at most."""
        of_weight = frozen.get("magnitude", lambda: _magnitude(weight))
        of_bias = 0.0 if bias is None else unchanged(bias).get("magnitude", lambda: _magnitude(bias))
        return of_input * of_weight * self.products + of_bias

    def _winograd(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, frozen: Frozen, **then: Any
    ) -> float | None:
        _, padding, _, groups = self.conv
        return _winograd.convolve(x, weight, bias, y, padding, groups, cache=frozen, **then)

    def _convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, frozen: Frozen, activation: str = "none"
    ) -> Tensor:
        if self.by_winograd and bias is None:
            z = torch.empty((len(x), *self.shape[1:]), dtype=x.dtype, memory_format=torch.channels_last)
            if self._winograd(x, weight, None, z, frozen) is not None:
                return z
        stride, padding, dilation, groups = self.conv
        packed = frozen.get("forward", lambda: _pack(weight, x, *self.conv))
        return torch.ops.mkldnn._convolution_pointwise(
            x, packed, bias, padding, stride, dilation, groups, activation, [], ""
        ).contiguous(memory_format=torch.channels_last)

    def _with_tail(self, x: Tensor, weight: Tensor, bias: Tensor | None, frozen: Frozen) -> Tensor:
        """A few images at a time, so that the convolution's output stays in memory that is used again."""
        y = kept(torch.empty(self.out_shape, dtype=x.dtype, memory_format=torch.channels_last))
        wide_bias = None if bias is None else bias.to(opmath(x.dtype))
        images = len(x)
        step = _images_at_a_time(images, self.image_bytes)
        for i in range(0, images, max(step, 1)):
            part, out = (x, y) if step == images else (x[i : i + step], y[i : i + step])
            z = self._convolve(part, weight, None, frozen)
            torch.ops.fastcnn_cpu.relu_lrn_max_pool2d(z, wide_bias, out, None, True, *self.tail)
        return y


def max_pool2d(x: Tensor, pool: Sequence[Any]) -> Tensor:
    """:func:`fastcnn.functional.max_pool2d` of a batch of maps; ``pool`` are the arguments of :class:`PoolParams`."""
    args, shape, whole = _pooled(x.shape, _hashable(pool))
    format = output_format(x)
    y = kept(torch.empty(shape, dtype=x.dtype, memory_format=format))
    channels_last = format == torch.channels_last
    torch.ops.fastcnn_cpu.max_pool2d(dense(x, format), y, None, channels_last, *args)
    bound = _bound(x) if whole else None
    return y if bound is None else _bounded(y, bound)


@lru_cache
def _pooled(shape: torch.Size, pool: tuple[Any, ...]) -> tuple[Any, list[int], bool]:
    params = PoolParams(*pool)
    args = params.op_args()
    # A dilated window may hold nothing, and give -inf.
    return args, [*shape[:2], *params.output_size(*shape[2:])], args[3] == [1, 1]


def cat(*args: Any, **kwargs: Any) -> Tensor:
    """:func:`torch.cat`, of whose output is known what is known of its inputs."""
    y = torch.cat(*args, **kwargs)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return y
    bounds = [_bound(x) for x in (args[0] if args else kwargs["tensors"])]
    return _bounded(y, max(bound if bound is not None else _LARGE for bound in bounds))


def _bounded(y: Tensor, bound: float) -> Tensor:
    """``y``, which remembers that none of its values is larger, nor NaN, until it is written."""
    if bound < _LARGE and not y.is_inference():
        y._fastcnn_bound = bound, y._version  # type: ignore[attr-defined]
    return y


def _bound(x: Tensor) -> float | None:
    bound, version = getattr(x, "_fastcnn_bound", (None, None))
    return bound if bound is not None and x._version == version else None
