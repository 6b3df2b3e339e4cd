"""Give a model the settings of a file, and undo it."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...nn import ReLULRNMaxPool2d
from ...params import LRNParams, PoolParams
from ..layers import ConvReLULRNMaxPool2d
from .compare import Difference
from .node import Node, Window, evenly_padded

_FUSED = (ConvReLULRNMaxPool2d, ReLULRNMaxPool2d)


class Changes:
    """Attributes of modules that were set; :meth:`undo` sets them back.

    Attributes:
        lines: what was changed, for people.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._before: list[tuple[nn.Module, str, Any]] = []

    def set(self, module: nn.Module, **attributes: Any) -> None:
        for name, value in attributes.items():
            self._before.append((module, name, getattr(module, name)))
            setattr(module, name, value)

    def undo(self) -> None:
        while self._before:
            module, name, value = self._before.pop()
            setattr(module, name, value)

    def adapt(self, difference: Difference) -> bool:
        """Give the model the file's setting; whether that can be."""
        own, theirs = difference.own, difference.theirs
        setters = {"epsilon": self._epsilon, "lrn": self._lrn, "window": self._window, "count_include_pad": self._count}
        setter = setters.get(difference.setting)
        if setter is None or own.module is None or not setter(own.module, own, theirs):
            return False
        for name, after, before in difference.parts():
            self.lines.append(f"{own}: {name} {before} became {after}, as in {theirs} of the file")
        return True

    def _epsilon(self, module: nn.Module, own: Node, theirs: Node) -> bool:
        if not isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            return False
        self.set(module, eps=theirs.settings["epsilon"])
        return True

    def _lrn(self, module: nn.Module, own: Node, theirs: Node) -> bool:
        after = theirs.settings["lrn"]
        if isinstance(module, _FUSED):
            self.set(module, lrn=after)
        elif isinstance(module, nn.LocalResponseNorm) and (after.groups == 1 or hasattr(module, "groups")):
            fields = {name: getattr(after, name) for name in LRNParams.__dataclass_fields__ if hasattr(module, name)}
            self.set(module, **fields)
        else:
            return False
        return True

    def _count(self, module: nn.Module, own: Node, theirs: Node) -> bool:
        if not isinstance(module, nn.AvgPool2d):
            return False
        self.set(module, count_include_pad=theirs.settings["count_include_pad"])
        return True

    def _window(self, module: nn.Module, own: Node, theirs: Node) -> bool:
        pad = own.merged.module if own.merged is not None else None
        for window in evenly_padded(theirs) if pad is None else [theirs.window]:
            if own.kind == "Conv" and isinstance(module, nn.Conv2d):
                if window.ceil_mode or window.kernel != own.window.kernel:
                    continue
                padding = window.begin
                if isinstance(pad, nn.ZeroPad2d):
                    (top, left), (bottom, right) = window.begin, window.end
                    padding = min(top, bottom), min(left, right)
                    self.set(
                        pad, padding=(left - padding[1], right - padding[1], top - padding[0], bottom - padding[0])
                    )
                elif pad is not None:
                    continue
                self.set(module, stride=window.stride, dilation=window.dilation, padding=padding)
            elif pad is not None or not self._pool(module, own, window):
                continue
            return True
        return False

    def _pool(self, module: nn.Module, own: Node, window: Window) -> bool:
        parts = {"kernel_size": window.kernel, "stride": window.stride, "padding": window.begin}
        if own.kind == "MaxPool" and isinstance(module, _FUSED):
            try:
                pool = PoolParams(**parts, dilation=window.dilation, ceil_mode=window.ceil_mode)
            except RuntimeError:  # a window that torch has not
                return False
            self.set(module, pool=pool)
        elif own.kind == "MaxPool" and isinstance(module, nn.MaxPool2d):
            self.set(module, **parts, dilation=window.dilation, ceil_mode=window.ceil_mode)
        elif own.kind == "AveragePool" and isinstance(module, nn.AvgPool2d):
            self.set(module, **parts, ceil_mode=window.ceil_mode)
        else:
            return False
        return True
