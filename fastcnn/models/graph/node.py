"""The nodes of a graph, be it of a file or of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from ..errors import GraphError

Pair = tuple[int, int]  # height and width
Shape = tuple[int | None, ...]  # of one sample, without the batch; None for what is not known


@dataclass(frozen=True)
class Window:
    """Of a convolution or a pool; ``begin`` is the padding on the left and at the top, ``end`` that opposite."""

    kernel: Pair
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    begin: Pair = (0, 0)
    end: Pair = (0, 0)
    ceil_mode: bool = False

    def check(self) -> None:
        lengths = self.kernel + self.stride + self.dilation
        if min(lengths) < 1 or max(lengths) >= 1 << 31 or min(self.begin + self.end) < 0:
            raise GraphError(f"its window is invalid: {self}")
        for kernel, dilation, *padding in zip(self.kernel, self.dilation, self.begin, self.end, strict=True):
            if max(padding) >= (kernel - 1) * dilation + 1 and max(padding) > 0:
                raise GraphError(f"its padding is as large as its window: {self}")

    def map_size(self, size: Shape) -> Shape:
        """Height and width of the output, by torch's rule, which is also that of ONNX."""
        return tuple(None if length is None else self._length(i, length) for i, length in enumerate(size))

    def _length(self, axis: int, size: int) -> int:
        begin, stride = self.begin[axis], self.stride[axis]
        span = size + begin + self.end[axis] - self.dilation[axis] * (self.kernel[axis] - 1) - 1
        steps = -(-span // stride) if self.ceil_mode else span // stride
        length = steps + (not self.ceil_mode or steps * stride < size + begin)  # none starts in the padding at the end
        if length < 1 or span < 0:
            raise GraphError(f"its window does not fit into a map of {size} pixels: {self}")
        return length


@dataclass(eq=False)
class Node:
    """One operation.

    Args:
        kind: ONNX's name of it; "Image" is the input.
        name: of the node in the file, or of the module in the model.
        inputs: the nodes whose outputs it takes.
        settings: what else it depends on.
        tensors: weights and other constants, by their names in torch.
        shape: of its output; None if not even its length is known.
        module: of a model, the innermost module that calls it.
        keys: what the file calls its tensors, or those of them in the model's ``state_dict``.
        merged: the ``Pad`` that became part of this window.
    """

    kind: str
    name: str
    inputs: tuple[Node, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    shape: Shape | None = None
    module: nn.Module | None = None
    keys: dict[str, str] = field(default_factory=dict)
    merged: Node | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.name}".rstrip()

    @property
    def window(self) -> Window:
        return self.settings["window"]


def image(shape: Shape | None) -> Node:
    """The input."""
    return Node("Image", "", shape=shape)


def nodes_of(output: Node) -> list[Node]:
    """All that the output depends on, each after its inputs."""
    ordered: dict[Node, None] = {}
    stack = [(output, False)]
    while stack:
        node, is_done = stack.pop()
        if is_done:
            ordered[node] = None
        elif node not in ordered:
            stack.append((node, True))
            stack += [(before, False) for before in reversed(node.inputs)]
    return list(ordered)


def evenly_padded(node: Node) -> Iterator[Window]:
    """The window of a file's node, if it pads both sides alike, and others that compute the same at the map's size."""
    window, before = node.window, node.inputs[0].shape
    if window.begin == window.end:
        yield window
    if before is None or node.shape is None or None in before or node.settings.get("count_include_pad"):
        return
    for ceil_mode in (False,) if node.kind == "Conv" else (False, True):
        other = replace(window, end=window.begin, ceil_mode=ceil_mode)
        try:
            is_same = other != window and other.map_size(before[1:]) == node.shape[1:]
        except GraphError:
            continue
        if is_same:
            yield other


def pair(value: int | Sequence[int]) -> Pair:
    """One int or two as a pair of ints."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))
