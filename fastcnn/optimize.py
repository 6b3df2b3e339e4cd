"""Drop-in replacement over a whole model: its layers stay where they are, its forwards call them fused.

A module whose own ``forward`` torch.fx can trace gets a subclass of its class with another ``forward``, in which runs
of calls such as convolution -> ReLU -> max-pool are one call each. Each module is traced by itself, the modules in it
being calls: one that cannot be traced keeps its forward, and nothing else is lost.
"""

import copy
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import fx, nn

from . import nn as layers
from ._stage import (
    PARTS,
    Function,
    has_hooks,
    infer_fused_layer,
    infer_linear,
    infer_pool,
    infer_stage,
    part_of,
    run_stage,
    why_not,
)
from .models.layers import ConvReLULRNMaxPool2d, PaperDropout
from .ops._inference import cat, in_parts
from .params import FLOATING_DTYPES


@dataclass(frozen=True)
class Entry:
    """One place in the model: what was called there, and what is now, or why it was left alone."""

    where: str
    what: str
    now: str = ""
    why_not: str = ""


@dataclass
class Report:
    """What :func:`optimize` replaced, and what it left alone and why. Its ``str()`` is a table."""

    entries: list[Entry] = field(default_factory=list)

    @property
    def replaced(self) -> list[Entry]:
        """The places where something else runs now."""
        return [entry for entry in self.entries if entry.now]

    @property
    def left(self) -> list[Entry]:
        """The places where nothing changed."""
        return [entry for entry in self.entries if not entry.now]

    def __str__(self) -> str:
        table = Table("where", "what", "runs as", "left alone because", box=None)
        for entry in self.entries:
            table.add_row(entry.where, entry.what, entry.now, entry.why_not)
        console = Console(width=160, color_system=None)
        with console.capture() as capture:
            console.print(f"{len(self.replaced)} replaced, {len(self.left)} left alone", table, sep="\n", markup=False)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


def optimize(
    model: nn.Module, *, inference: bool = False, dtype: torch.dtype | None = None, inplace: bool = False
) -> nn.Module:
    """The same model with fused layers: same outputs, gradients, ``state_dict`` keys and train/eval behaviour.

    Convolution -> ReLU [-> LRN] [-> max-pool], [ReLU ->] LRN [-> max-pool], ReLU -> max-pool, and single LRN and
    max-pool layers, be they modules or calls of functions, run as the operators of :mod:`fastcnn.functional`. A stage
    runs unfused while one of its layers has a hook, so that every hook sees what it would have seen, and where fastcnn
    has no kernel for a tensor.

    Args:
        model: any module. The result may be compiled, exported, copied, pickled and wrapped for several processes.
        inference: also make it one for inference: in evaluation mode, its weights frozen and channels_last; on CPU
            convolutions and linear layers compute from packed copies of them, made when they first run and again where
            a weight changed (but not where it was written through ``.data``, which cannot be seen). The batch norm
            behind a convolution goes into its packed weights, and dropout is left out. Maps are then channels_last
            between the layers and in the output.
        dtype: of the weights, and to which the input of the first of these layers is cast, with ``inference``; None:
            as they are. bfloat16 needs no more than a CPU or GPU that has it.
        inplace: change ``model`` itself, otherwise a deep copy.

    Returns:
        The model, its modules in their places; those with another forward are of a subclass of their class. Its
        attribute ``fastcnn_report`` is a :class:`Report`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: ``dtype`` without ``inference``, or one that is not floating point.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize(): argument 'model' must be Module, not {type(model).__name__}")
    for name, value in (("inference", inference), ("inplace", inplace)):
        if not isinstance(value, bool):
            raise TypeError(f"optimize(): argument '{name}' must be bool, not {type(value).__name__}")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"optimize(): argument 'dtype' must be torch.dtype or None, not {type(dtype).__name__}")
    if dtype is not None and not (inference and dtype in FLOATING_DTYPES):
        raise ValueError(
            f"optimize(): dtype={dtype} needs inference=True and must be one of {', '.join(map(str, FLOATING_DTYPES))}"
        )
    if not inplace:
        model = copy.deepcopy(model)
    if inference:
        model.eval().requires_grad_(False).to(dtype=dtype)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    report = Report()
    modules = dict(model.named_modules())
    for name, module in modules.items():
        report.entries += _rewrite(module, name, inference)
    told = {where for entry in report.entries for where in entry.where.split(" + ")}
    for name, module in modules.items():
        entry = _replace_layer(module, name)
        if entry is not None and name not in told:
            report.entries.append(entry)
    model.fastcnn_report = report  # type: ignore[assignment]
    return model


# -- single layers ----------------------------------------------------------------------------------------------------


def _replace_layer(module: nn.Module, name: str) -> Entry | None:
    """Let a layer of torch run as ours, be it called from wherever; None for what is neither LRN nor max-pool."""
    part = part_of(module)
    if isinstance(module, nn.CrossMapLRN2d):
        return Entry(name, "CrossMapLRN2d", why_not="it computes something else than LocalResponseNorm")
    if part in (None, "norm", "relu"):
        return None
    what = type(module).__name__
    if part == "conv":
        reason = "" if type(module).__module__.startswith("fastcnn.") else "no ReLU is called on its output alone"
        return Entry(name, what, why_not=why_not(module, part) or reason) if reason else None
    if type(module) in (nn.LocalResponseNorm, nn.MaxPool2d):
        if isinstance(module, nn.LocalResponseNorm):
            module.__class__ = layers.LocalResponseNorm
            module.groups = 1  # type: ignore[assignment]
        else:
            module.__class__ = layers.MaxPool2d
        return Entry(name, what, now={"lrn": "local_response_norm", "pool": "max_pool2d"}[part])
    return None if type(module).__module__.startswith("fastcnn.") else Entry(name, what, why_not=why_not(module, part))


# -- forwards ---------------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """The forwards of a module in evaluation and in training, and what they took for granted."""

    original: type[nn.Module]
    forwards: tuple[Callable[..., Any], Callable[..., Any]]
    inference: bool
    by_image: bool  # every call treats each image by itself
    children: tuple[str, ...]
    settings: dict[str, Any]

    def holds(self, module: nn.Module) -> bool:
        return tuple(module._modules) == self.children and all(
            getattr(module, name, None) == value for name, value in self.settings.items()
        )


def _settings(module: nn.Module) -> dict[str, Any]:
    """Attributes that a forward may branch on."""
    simple = (bool, int, float, str, type(None))
    hidden = {"training", "call_super_init", *(name for name in vars(module) if name.startswith("_"))}
    return {n: v for n, v in vars(module).items() if type(v) in simple and n not in hidden}


def _rewrite(module: nn.Module, name: str, inference: bool) -> list[Entry]:
    """Give the module a forward with fused calls, where its own can be traced and has any."""
    plan = vars(type(module)).get("_fastcnn_plan")
    if plan is not None:
        module.__class__ = plan.original
    cls = type(module)
    if not _has_own_forward(module):
        return []
    graphs = []
    for training in (False,) if inference else (False, True):
        graph, reason = _trace(module, training)
        if graph is None:
            return [Entry(name or type(module).__name__, f"forward of {cls.__name__}", why_not=reason)]
        graphs.append((graph, _fuse(graph, module, name, inference)))
    entries = list(dict.fromkeys(entry for _, of_mode in graphs for entry in of_mode))
    if any(entry.now for entry in entries) or any(node.target in (infer_pool, cat) for node in graphs[0][0].nodes):
        forwards = (*(_compiled(graph, cls) for graph, _ in graphs), cls.forward)[:2]
        by_image = inference and isinstance(module, nn.Sequential) and _is_by_image(graphs[0][0], module)
        _change_class(module, _Plan(cls, forwards, inference, by_image, tuple(module._modules), _settings(module)))  # type: ignore[arg-type]
    return entries


def _has_own_forward(module: nn.Module) -> bool:
    cls = type(module)
    package = cls.__module__.split(".")[0]
    if isinstance(module, torch.jit.ScriptModule | torch.jit.TopLevelTracedModule) or "forward" in vars(module):
        return False
    if package == "fastcnn":  # its networks, not its layers
        return bool(module._modules)
    return isinstance(module, nn.Sequential) or (package != "torch" and part_of(module) is None)


def _change_class(module: nn.Module, plan: _Plan) -> None:
    cls = plan.original
    largest: dict[Any, int] = {}

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if plan.holds(self):
            if plan.by_image and not self.training and not any(map(has_hooks, self.children())):
                return in_parts(functools.partial(plan.forwards[0], self), largest, *args, **kwargs)
            return plan.forwards[int(self.training)](self, *args, **kwargs)  # Dynamo of torch 2.11 takes no bool
        return cls.forward(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        # a class made here cannot be found by its name: saved is the original one, traced again when loaded
        return (_blank, (cls, plan.inference), *object.__reduce_ex__(self, protocol)[2:])

    members = {"forward": forward, "__reduce_ex__": reduce, "__module__": cls.__module__, "_fastcnn_plan": plan}
    module.__class__ = type(cls.__name__, (cls,), members)


def _blank(cls: type[nn.Module], inference: bool) -> nn.Module:
    """An instance of ``cls`` without a state, which is rewritten when it gets one."""

    def set_state(self: nn.Module, state: dict[str, Any]) -> None:
        self.__class__ = cls
        self.__setstate__(state)
        _rewrite(self, "", inference)

    loading = type(cls.__name__, (cls,), {"__setstate__": set_state})
    return loading.__new__(loading)  # type: ignore[call-overload]


class _Tracer(fx.Tracer):
    """Sees one forward only: every module that it calls is a call."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _trace(module: nn.Module, training: bool) -> tuple[fx.Graph | None, str]:
    """The graph of a module's forward in one of its modes, or why there is none."""
    modes = {m: m.training for m in module.modules()}
    attributes = {name: value for name, value in vars(module).items() if name != "training"}
    drawn = random.getstate(), torch.get_rng_state()
    try:
        for m in modes:
            m.training = training
        graph = _Tracer().trace(module)
        kept = {name: value for name, value in vars(module).items() if name != "training"}
        if kept.keys() != attributes.keys() or any(kept[name] is not attributes[name] for name in kept):
            return None, "its forward keeps something in the module, or makes a tensor"
        if random.getstate() != drawn[0] or not torch.equal(torch.get_rng_state(), drawn[1]):
            return None, "its forward draws random numbers"
        return graph, ""
    except Exception as error:
        return None, f"torch.fx cannot trace it: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    finally:
        vars(module).clear()
        vars(module).update(attributes)
        for m, mode in modes.items():
            m.training = mode
        random.setstate(drawn[0])
        torch.set_rng_state(drawn[1])


def _compiled(graph: fx.Graph, cls: type[nn.Module]) -> Callable[..., Any]:
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, f"<{cls.__name__}.forward, fused by fastcnn>", "exec"), namespace)
    return namespace["forward"]


# -- the calls of a forward -------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """A node that may be part of a stage."""

    node: fx.Node
    part: str
    input: Any
    function: Function | None  # None: of a layer
    what: str
    why_not: str = ""


def _conv(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):  # type: ignore[no-untyped-def]
    return input, Function("conv", (weight, bias, stride, padding, dilation, groups))


def _relu(input, inplace=False):  # type: ignore[no-untyped-def]
    return input, Function("relu", (), inplace)


def _lrn(input, size, alpha=1e-4, beta=0.75, k=1.0):  # type: ignore[no-untyped-def]
    return input, Function("lrn", (size, alpha, beta, k))


def _pool(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):  # type: ignore[no-untyped-def]
    return None if return_indices else (input, Function("pool", (kernel_size, stride, padding, dilation, ceil_mode)))


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.conv2d, F.conv2d), _conv),
    **dict.fromkeys((torch.relu, F.relu, "relu"), _relu),
    **dict.fromkeys((torch.relu_, F.relu_, "relu_"), functools.partial(_relu, inplace=True)),
    F.local_response_norm: _lrn,
    **dict.fromkeys((torch.max_pool2d, F.max_pool2d), _pool),
}


def _read(node: fx.Node, module: nn.Module) -> _Call | None:
    """The call of a node, if it may be part of a stage."""
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        part = part_of(layer)
        if part is None or len(node.args) != 1 or node.kwargs:
            return None
        return _Call(node, part, node.args[0], None, type(layer).__name__, why_not(layer, part))
    if node.op not in ("call_function", "call_method") or node.target not in _FUNCTIONS:
        return None
    bound = _FUNCTIONS[node.target](*node.args, **node.kwargs)
    if bound is None:
        return None
    input, function = bound
    computed = any(isinstance(a, fx.Node) for a in function.arguments[2 if function.part == "conv" else 0 :])
    name = {"conv": "conv2d", "relu": "relu", "lrn": "local_response_norm", "pool": "max_pool2d"}[function.part]
    return _Call(node, function.part, input, function, name, "its arguments are computed" if computed else "")


def _fuse(graph: fx.Graph, module: nn.Module, name: str, inference: bool) -> list[Entry]:
    """Make one call of each stage of the graph."""
    entries = _freeze(graph, module, name) if inference else []
    found = (_read(node, module) for node in graph.nodes)
    calls = {call.node: call for call in found if call is not None and (inference or call.part != "norm")}
    stages = []
    taken: set[fx.Node] = set()
    for call in calls.values():
        if call.node in taken:
            continue
        stage = _stage(call, calls, module, inference)
        if not stage:
            if call.function is not None and call.part != "relu":
                reason = call.why_not or "no ReLU is called on its output alone"
                entries.append(Entry(_where(call, name), call.what, why_not=reason))
            continue
        taken.update(call.node for call in stage)
        stages.append(stage)
        parts = [call.part for call in stage if call.part != "norm"]  # which goes into the weights
        now = "conv2d + relu_lrn_max_pool2d" if parts[0] == "conv" else "relu_lrn_max_pool2d"
        if parts in (["conv"], ["conv", "relu"]):
            now = "conv2d_relu" if len(parts) == 2 else "conv2d"
        if inference and parts[0] == "conv" and call.function is None:
            now += ", packed"
        where, what = " + ".join(_where(c, name) for c in stage), " -> ".join(c.what for c in stage)
        entries.append(Entry(where, what, now))
    for stage in stages:
        _replace(graph, stage, module, inference)
    for node in list(graph.nodes) if inference else ():
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if type(layer) is layers.MaxPool2d and len(node.args) == 1 and not node.kwargs:
            with graph.inserting_before(node):
                new = graph.call_function(infer_pool, (node.args[0], graph.get_attr(str(node.target))))
            node.replace_all_uses_with(new)
            graph.erase_node(node)
        elif node.target in (torch.cat, torch.concat):
            node.target = cat
    graph.lint()
    return entries


def _stage(first: _Call, calls: dict[fx.Node, _Call], module: nn.Module, inference: bool) -> list[_Call]:
    """The calls that can run as one, starting with this; none if that gains nothing."""
    stage = [first]
    while len(users := list(stage[-1].node.users)) == 1 and (following := calls.get(users[0])) is not None:
        if following.input is not stage[-1].node or PARTS.index(following.part) <= PARTS.index(stage[-1].part):
            break
        stage.append(following)
    stop = next((i for i, call in enumerate(stage) if call.why_not), len(stage))
    stage = stage[:stop]
    parts = [call.part for call in stage]
    if parts[:1] == ["norm"]:
        return []
    packs = parts[:1] == ["conv"] and inference and first.function is None
    before = 2 if packs and parts[1:2] == ["norm"] else 1  # parts that a ReLU must follow
    if parts[:1] == ["conv"] and parts[before : before + 1] != ["relu"]:
        return stage[:before] if packs else []
    if parts[:1] == ["relu"] and not _may_skip_writing(first, module):
        return []
    if len(parts) == 1:  # a layer runs as ours anyway
        return stage if parts[0] in ("lrn", "pool") and first.function is not None else []
    return stage


def _may_skip_writing(relu: _Call, module: nn.Module) -> bool:
    """Whether nobody can tell that a ReLU no longer overwrites its input: that is new, and nothing else uses it."""
    layer = None if relu.function else module.get_submodule(str(relu.node.target))
    if not (relu.function.inplace if relu.function else getattr(layer, "inplace", False)):
        return True
    source = relu.input
    if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
        return False
    new = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear, nn.LocalResponseNorm, nn.MaxPool2d)
    return isinstance(module.get_submodule(str(source.target)), new)


def _is_by_image(graph: fx.Graph, module: nn.Module) -> bool:
    alone = (nn.ReLU, nn.MaxPool2d, nn.LocalResponseNorm, nn.BatchNorm2d)

    def is_alone(node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(module.get_submodule(str(node.target)), alone)
        return node.op in ("placeholder", "get_attr", "output") or node.target in (
            infer_stage,
            infer_fused_layer,
            infer_pool,
            run_stage,
        )

    return all(map(is_alone, graph.nodes))


_PACKED: dict[type, Callable[..., Any]] = {
    nn.Linear: infer_linear,
    layers.ConvReLU2d: infer_fused_layer,
    ConvReLULRNMaxPool2d: infer_fused_layer,
}


def _freeze(graph: fx.Graph, module: nn.Module, name: str) -> list[Entry]:
    """For inference: leave dropout out, and let linear layers compute from packed weights."""
    entries = []
    for node in list(graph.nodes):
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if layer is None or len(node.args) != 1 or node.kwargs:
            continue
        where = f"{name}.{node.target}" if name else str(node.target)
        if type(layer) in (nn.Dropout, nn.Dropout2d, nn.Identity):
            node.replace_all_uses_with(node.args[0])
            entries.append(Entry(where, type(layer).__name__, now="nothing"))
            graph.erase_node(node)
        elif type(layer) in _PACKED:
            rest = _after_linear(node, module) if type(layer) is nn.Linear else []
            with graph.inserting_before(node):
                parts: dict[str, Any] = {
                    call.part: call.function or graph.get_attr(str(call.node.target)) for call in rest
                }
                inputs = node.args[0], graph.get_attr(str(node.target))
                new = graph.call_function(_PACKED[type(layer)], inputs, parts)
            nodes = [node, *(call.node for call in rest)]
            nodes[-1].replace_all_uses_with(new)
            for fused in reversed(nodes):
                graph.erase_node(fused)
            where = " + ".join([where, *(_where(call, name) for call in rest)])
            what = " -> ".join([type(layer).__name__, *(call.what for call in rest)])
            entries.append(Entry(where, what, now="linear, packed" if rest else "the same, packed"))
    return entries


def _after_linear(node: fx.Node, module: nn.Module) -> list[_Call]:
    """The ReLU that a linear layer's output goes to and nowhere else, and then the paper's dropout, as far as there."""
    calls: list[_Call] = []
    while len(users := list(node.users)) == 1:
        node = users[0]
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if type(layer) is PaperDropout and len(node.args) == 1 and not node.kwargs:
            return [*calls, _Call(node, "dropout", node.args[0], None, "PaperDropout")]
        call = _read(node, module)
        if calls or call is None or call.part != "relu" or call.why_not:
            break
        calls.append(call)
    return calls


def _replace(graph: fx.Graph, stage: list[_Call], module: nn.Module, inference: bool) -> None:
    first = _read(stage[0].node, module)  # its input may have been replaced meanwhile
    assert first is not None
    with graph.inserting_before(stage[-1].node):
        parts: dict[str, Any] = {
            call.part: call.function or graph.get_attr(str(call.node.target)) for call in (first, *stage[1:])
        }
        packed = inference and first.part == "conv" and first.function is None
        node = graph.call_function(infer_stage if packed else run_stage, (first.input,), parts)
    stage[-1].node.replace_all_uses_with(node)
    for call in reversed(stage):
        graph.erase_node(call.node)


def _where(call: _Call, name: str) -> str:
    path = str(call.node.target) if call.function is None else call.node.name
    return f"{name}.{path}" if name else path
