"""The one function that makes nodes."""

from __future__ import annotations

from typing import Any

from ..errors import GraphError
from .node import Node
from .normal import NORMAL
from .shapes import SHAPES


def make(kind: str, *inputs: Node, name: str = "", **parts: Any) -> Node:
    """A node in normal form, with the shape of its output.

    Args:
        kind, inputs, name: as of :class:`Node`.
        parts: ``tensors``, ``module`` and ``keys`` as of it; whatever else is a setting.

    Raises:
        GraphError: the inputs do not fit.
    """
    own = {part: parts.pop(part) for part in ("tensors", "module", "keys") if part in parts}
    node = Node(kind, name, inputs, parts, **own)
    try:
        node.shape = SHAPES[kind](node)
        return NORMAL[kind](node) if kind in NORMAL else node
    except GraphError as error:
        raise GraphError(f"{node}: {error}") from None
