"""Find the stages in a graph of calls of torch's functions, as TorchDynamo makes it, and let each run as one call.

Why the answer stays the same: the calls of a stage follow each other, so nothing runs in between. What one of them
returns is new memory that only the next one uses, so nobody can tell that it is never written. And where the output of
a stage is used by anything but the next stage, it has the strides that torch would have given it.
"""

import itertools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..memory_format import as_new, strides_of
from ..ops.linear import is_large, linear
from ..params import FLOATING_DTYPES, LRNParams, PoolParams, TailParams
from .report import Entry
from .stage import LinearStage, NormStage, Stage

# What may follow each other in a stage; any part may be missing.
_MAPS = ("conv", "norm", "sum", "relu", "lrn", "pool")
_VECTORS = ("linear", "relu", "dropout", "factor")
_FOR_INFERENCE = {"sum", "linear", "dropout", "factor"}


@dataclass(eq=False)
class Call:
    """What may become a part of a stage: one call, or several in a row that compute one thing.

    Args:
        nodes: of the graph; the last one returns what they compute.
        input: the node of the map or the vectors that they take.
        parts: the parts of a stage that they are, and the arguments of each.
    """

    nodes: list[fx.Node]
    input: fx.Node
    parts: dict[str, Any]

    @property
    def output(self) -> fx.Node:
        return self.nodes[-1]


# -- one call ---------------------------------------------------------------------------------------------------------


def _conv(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):  # type: ignore[no-untyped-def]
    return input, {"conv": (weight, bias, (stride, padding, dilation, groups))}


def _norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):  # type: ignore[no-untyped-def]
    return input, {"norm": (weight, bias, running_mean, running_var, training, momentum, eps)}


def _relu(input, inplace=False):  # type: ignore[no-untyped-def]
    return input, {"relu": inplace}


def _relu_(input):  # type: ignore[no-untyped-def]
    return input, {"relu": True}


def _lrn(input, size, alpha=1e-4, beta=0.75, k=1.0):  # type: ignore[no-untyped-def]
    return input, {"lrn": LRNParams(size, alpha, beta, k)}


def _pool(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):  # type: ignore[no-untyped-def]
    return input, {} if return_indices else {"pool": PoolParams(kernel_size, stride, padding, dilation, ceil_mode)}


def _linear(input, weight, bias=None):  # type: ignore[no-untyped-def]
    return input, {"linear": (weight, bias)}


def _dropout(input, p=0.5, training=True, inplace=False):  # type: ignore[no-untyped-def]
    return input, {} if training else {"dropout": None}


def _product(a, b):  # type: ignore[no-untyped-def]
    input, factor = (b, a) if isinstance(a, float) else (a, b)
    return input, {"factor": factor} if isinstance(factor, float) else {}


def _sum(a, b, *, alpha=1):  # type: ignore[no-untyped-def]
    is_sum = isinstance(a, fx.Node) and isinstance(b, fx.Node) and alpha == 1
    return a, {"sum": b} if is_sum else {}


def _our_conv(input, weight, bias, *conv_and_mask):  # type: ignore[no-untyped-def]
    return input, {"conv": (weight, bias, conv_and_mask[:-1]), "relu": False}


def _our_lrn(input, *lrn):  # type: ignore[no-untyped-def]
    return input, {"lrn": LRNParams.from_op(*lrn)}


def _our_pool(input, *pool_and_argmax):  # type: ignore[no-untyped-def]
    return input, {"pool": PoolParams.from_op(*pool_and_argmax[:-1])}


def _our_tail(input, bias, *tail_and_argmax):  # type: ignore[no-untyped-def]
    tail = TailParams.from_op(*tail_and_argmax[:-1])
    parts = {"bias": bias, "relu": False if tail.relu else None, "lrn": tail.lrn, "pool": tail.pool}
    return input, {name: value for name, value in parts.items() if value is not None}


_OURS: dict[Any, Callable[..., tuple[Any, dict[str, Any]]]] = {
    torch.ops.fastcnn.conv2d_relu.default: _our_conv,
    torch.ops.fastcnn.lrn.default: _our_lrn,
    torch.ops.fastcnn.max_pool2d.default: _our_pool,
    torch.ops.fastcnn.relu_lrn_max_pool2d.default: _our_tail,
}
_FUNCTIONS: dict[Any, Callable[..., tuple[Any, dict[str, Any]]]] = {
    torch.conv2d: _conv,
    F.batch_norm: _norm,
    **dict.fromkeys((torch.relu, F.relu, "relu"), _relu),
    **dict.fromkeys((torch.relu_, "relu_"), _relu_),
    F.local_response_norm: _lrn,
    **dict.fromkeys((torch.max_pool2d, F.max_pool2d), _pool),
    F.linear: _linear,
    F.dropout: _dropout,
    **dict.fromkeys((operator.mul, torch.mul, "mul"), _product),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), _sum),
    **_OURS,
}
_ARITHMETIC = {node for node, read in _FUNCTIONS.items() if read in (_product, _sum)}
# Functions of maps, whatever their memory format, that return new memory. Fake tensors do not tell which do: they have
# copies where eval-mode dropout returns its input.
_PURE = {
    *(torch.cat, torch.concat, torch.relu, "relu", torch.sigmoid, "sigmoid", torch.tanh, "tanh", F.gelu),
    *(torch.add, operator.add, "add", torch.mul, operator.mul, "mul", torch.sub, operator.sub, "sub"),
    *(torch.div, operator.truediv, "div", torch.pow, operator.pow, "pow", torch.square, "square", torch.sqrt, "sqrt"),
    *(torch.abs, "abs", operator.neg, torch.exp, "exp", torch.clamp, "clamp"),
    *(F.batch_norm, F.avg_pool2d, F.adaptive_avg_pool2d, F.max_pool2d, torch.max_pool2d),
}
# The same of maps and of numbers, but they also return other shapes, whose strides are those of the map.
_REDUCING = {torch.sum, "sum", torch.mean, "mean", F.mse_loss, F.l1_loss}
# The same, but they may return their input, be it written or not.
_IN_PLACE = {
    *(F.relu, torch.relu_, "relu_", F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.silu, F.hardswish, F.hardsigmoid),
    *(operator.iadd, "add_", operator.imul, "mul_"),
}
_NEW = {*_PURE, *_REDUCING, torch.conv2d, F.linear, linear, F.local_response_norm}


def _read(nodes: Sequence[fx.Node]) -> Call | str:
    """What begins with the first of these nodes and may be part of a stage; or why it may not, if there is a reason."""
    node = nodes[0]
    grouped = _read_grouped_lrn(nodes[: len(_GROUPED_LRN)])
    if grouped is not None:
        return grouped
    if node.op not in ("call_function", "call_method") or node.target not in _FUNCTIONS:
        return ""
    try:
        input, parts = _FUNCTIONS[node.target](*node.args, **node.kwargs)
    except (TypeError, ValueError, RuntimeError):  # as for a size that is a node of the graph
        return "its arguments are computed"
    numbers = parts.get("conv", ())[2:], parts.get("norm", ())[4:]
    if any(isinstance(n, fx.Node) for n in pytree.tree_leaves(numbers)):
        return "its arguments are computed"
    if not isinstance(input, fx.Node) or not parts:
        return "it returns indices" if "return_indices" in node.kwargs else ""
    called = [node]
    if node.target in _OURS and not isinstance(value_of(node), Tensor):  # a pair, of which only the first may be used
        if len(node.users) != 1 or nodes[1].target is not operator.getitem or nodes[1].args != (node, 0):
            return ""
        called.append(nodes[1])
    tensors = [n for n in pytree.tree_leaves([*parts.values()]) if isinstance(n, fx.Node)]
    if any(is_traceable_wrapper_subclass(value_of(n)) for n in tensors):
        return "it has a parameter that is no plain tensor"
    reason = _why_not(value_of(called[-1]), 2 if "linear" in parts else None)
    return reason or Call(called, input, parts)


def _read_grouped_lrn(nodes: Sequence[fx.Node]) -> Call | None:
    """LRN within groups, in the nine calls of :class:`fastcnn.models.layers.GroupedLocalResponseNorm`."""
    if [getattr(node.target, "__name__", node.target) for node in nodes] != _GROUPED_LRN:
        return None
    square, cut, pad, mean, joined, alpha, k, beta, quotient = nodes
    args: list[Any] = [node.args for node in nodes]
    x, groups, size = args[0][0], args[1][2][0], args[3][1][0]
    numbers = {"alpha": args[5][1], "k": args[6][1], "beta": args[7][1]}
    expected = [(x, x), (square, 1, (groups, -1)), (cut, (0, 0, 0, 0, size // 2, (size - 1) // 2), "constant", None)]
    expected += [(pad, (size, 1, 1)), (mean, 1, 2), *zip((joined, alpha, k), numbers.values(), strict=True), (x, beta)]
    if args != expected or mean.kwargs != {"stride": 1} or any(len(node.users) > 1 for node in nodes[:-1]):
        return None
    if _why_not(value_of(quotient), None):
        return None
    return Call(list(nodes), x, {"lrn": LRNParams(size, **numbers, groups=groups)})


_GROUPED_LRN = ["mul", "unflatten", "pad", "avg_pool3d", "flatten", "mul", "add", "pow", "truediv"]


def value_of(node: fx.Node) -> Any:
    """What TorchDynamo knows of what a node returns: a fake tensor."""
    return node.meta.get("example_value")


def _why_not(y: Any, dims: int | None) -> str:
    """Why nothing of ours computes a tensor like this one; empty if something does."""
    if not isinstance(y, Tensor) or is_traceable_wrapper_subclass(y) or y.layout != torch.strided:
        return "it is no plain tensor"
    if y.dtype not in FLOATING_DTYPES:
        return f"it is of dtype {y.dtype}"
    return "" if y.dim() == dims or (dims is None and y.dim() in (2, 4)) else f"it has {y.dim()} dimensions"


def _format(y: Tensor) -> torch.memory_format | None:
    """The memory format of a fake map, whose sizes may be symbols; None if it has neither."""
    if y.dim() != 4:
        return None
    formats = (torch.contiguous_format, torch.channels_last)
    for format in formats:
        expected = strides_of(y.shape, format)
        if all(statically_known_true(stride == other) for stride, other in zip(y.stride(), expected, strict=True)):
            return format
    if any(isinstance(n, torch.SymInt) for n in (*y.shape, *y.stride())):
        return None
    return next((format for format in formats if y.is_contiguous(memory_format=format)), None)


# -- stages -----------------------------------------------------------------------------------------------------------


def fuse(graph: fx.Graph, names: Mapping[str, str], *, inference: bool = False) -> list[Entry]:
    """Make one call of each stage of the graph.

    Args:
        graph: as TorchDynamo gives it to a backend; changed in place.
        names: path -> class of the layers that have no layers in them, for the report.
        inference: see :func:`fastcnn.optimize`.

    Returns:
        What was found.
    """
    labels = _labels(graph, names)
    for node in reversed(graph.nodes):
        if node.target is getattr and not node.users:  # of F.pad in deterministic mode
            graph.erase_node(node)
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    for node in [node for node in nodes if _only_counts(node)]:  # the calls of a batch norm, between its input and it
        nodes[0].prepend(node)
        nodes.remove(node)
    entries = []
    while nodes:
        if not inference and _is_large_linear(nodes[0]):
            nodes[0].target = linear
            entries.append(Entry(*labels[nodes[0]], "linear"))
        first = _read(nodes)
        stage, reason = ([], first) if isinstance(first, str) else _stage(first, nodes, inference)
        if reason and nodes[0].target not in (*_OURS, F.linear, *_ARITHMETIC):
            entries.append(Entry(*labels[nodes[0]], why_not=reason))
        if stage and not reason:
            where = dict(labels[node] for call in stage for node in call.nodes if node.target is not operator.getitem)
            entries.append(Entry(" + ".join(where), " -> ".join(where.values()), _now(stage, inference)))
        if stage:
            _replace(graph, stage, inference)
        del nodes[: sum(len(call.nodes) for call in stage) or 1]
    _restore_formats(graph)
    graph.lint()
    return entries


def _is_large_linear(node: fx.Node) -> bool:
    if node.target is not F.linear or _why_not(value_of(node), 2):
        return False
    weight = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
    return isinstance(weight, fx.Node) and isinstance(value_of(weight), Tensor) and is_large(value_of(weight))


def _only_counts(node: fx.Node) -> bool:
    """Whether a call adds to a number that nothing else in the graph reads."""
    if node.target not in ("add_", operator.iadd) or node.users or not isinstance(node.args[1], int):
        return False
    counter = node.args[0]
    assert isinstance(counter, fx.Node)
    value = value_of(counter)
    is_number = isinstance(value, Tensor) and value.dim() == 0 and value.dtype == torch.int64
    others = (user for user in counter.users if user.target not in ("add_", operator.iadd) or user.users)
    return is_number and counter.op in ("placeholder", "get_attr") and not any(others)


def _stage(first: Call, nodes: Sequence[fx.Node], inference: bool) -> tuple[list[Call], str]:
    """The calls that can run as one, starting with this; none if that gains nothing, or may not be, and why."""
    reason = ""
    stage, parts, taken = [], [], 0  # type: tuple[list[Call], list[str], int]
    call: Call | str = first
    while not isinstance(call, str) and _follows(call, stage, parts, inference):
        stage.append(call)
        parts += [part for part in call.parts if part != "bias"]
        taken += len(call.nodes)
        call = _read(nodes[taken:]) if taken < len(nodes) else ""
        if not isinstance(call, str) and call.parts.get("sum") is stage[-1].output:
            call = Call(call.nodes, call.parts["sum"], {"sum": call.input})
    if not stage:
        return [], ""
    if parts[0] == "conv" and "relu" not in parts and (inference or "norm" not in parts):
        stage = [call for call in stage if not {"lrn", "pool"}.intersection(call.parts)]
        reason = "" if inference else "no ReLU is called on its output alone"  # but it may choose the memory format
    # The input is not written in place, and it is saved for backward, where torch's ReLU saves its own output.
    is_kept = first.parts.get("relu") or value_of(stage[-1].output).requires_grad
    if parts[0] == "relu" and is_kept and not _is_read_once(first):
        return [], ""
    if parts == ["relu"] or (len(stage) == 1 and first.nodes[0].target in _OURS and not inference):
        return [], ""
    last = value_of(stage[-1].output)
    if last.dim() == 4 and _format(last) is None:
        return [], "its output has the strides of no memory format"
    return stage, reason


def _follows(call: Call, stage: Sequence[Call], parts: Sequence[str], inference: bool) -> bool:
    """Whether a call may be the next one of a stage with these parts."""
    new = [part for part in call.parts if part != "bias"]
    if not inference and _FOR_INFERENCE.intersection(new):
        return False
    if inference and "norm" in new and _is_of_the_batch(call.parts["norm"]):
        return False
    if "bias" in call.parts and (list(parts) != ["conv"] or stage[0].parts["conv"][1] is not None):
        return False
    if "conv" not in new and "linear" not in new and value_of(call.output).dtype != value_of(call.input).dtype:
        return False  # as under autocast
    if not stage:
        first = ("conv", "relu", "lrn", "pool", "linear", *(() if inference else ("norm",)))
        return new[0] in first and (new[0] == "linear" or value_of(call.output).dim() == 4)
    if "sum" in new and not _may_add(call):
        return False
    if "sum" in parts and new[0] != "relu":
        return False
    order = _VECTORS if parts[0] == "linear" else _MAPS
    is_next = order.index(new[0]) > order.index(parts[-1]) if set(new) <= set(order) else False
    is_norm_of_relu = not inference and new[0] == "norm" and parts[-1] == "relu"
    if set(new).intersection(parts) or not (is_next or is_norm_of_relu):
        return False
    return call.input is stage[-1].output and set(call.input.users) <= set(call.nodes)


def _is_of_the_batch(norm: tuple[Any, ...]) -> bool:
    """Whether a batch norm has no statistics but those of the batch, or moves them."""
    _, _, mean, variance, training, *_ = norm
    return training or mean is None or variance is None


def _may_add(call: Call) -> bool:
    """Whether the sum of a stage's output and another map may be a part of the stage."""
    addend = call.parts["sum"]
    a, b = value_of(call.input), value_of(addend)
    if not isinstance(b, Tensor) or call.input is addend or a.dim() != 4 or a.dtype != b.dtype or a.shape != b.shape:
        return False
    is_written = call.nodes[0].args[0] is addend and call.nodes[0].target in (operator.iadd, "add_")
    return not is_written or _is_read_once(Call(call.nodes, addend, {}))


def _is_read_once(call: Call) -> bool:
    """Whether the input of a call is new memory that nothing else reads."""
    source = call.input
    return (isinstance(source.target, Stage) or source.target in _NEW) and set(source.users) <= set(call.nodes)


def _replace(graph: fx.Graph, stage: Sequence[Call], inference: bool) -> None:
    parts = {name: value for call in stage for name, value in call.parts.items()}
    parameters: tuple[Any, ...] = ()
    others: dict[str, Any] = {}
    run: Stage | LinearStage
    if "linear" in parts:
        parameters = parts["linear"]
        run = LinearStage("relu" in parts, parts.get("factor", 1.0))
    else:
        conv = eps = None
        if "conv" in parts:
            weight, bias, conv = parts["conv"]
            parameters = weight, parts.get("bias", bias)
        if "norm" in parts:
            others["norm"], eps = parts["norm"][:4], parts["norm"][6]
        if "sum" in parts:
            others["addend"] = parts["sum"]
        tail = parts.get("lrn"), parts.get("pool")
        if "norm" in parts and not inference:
            names = [*parts]
            relu_first = "relu" in parts and names.index("relu") < names.index("norm")
            run = NormStage(conv, parts["norm"][4:], "relu" in parts, relu_first, *tail)
        else:
            run = Stage(conv, eps, "relu" in parts, *tail, inference=inference)
    last = stage[-1].output
    with graph.inserting_before(last):
        node = graph.call_function(run, (stage[0].input, *parameters), others)
    node.meta = dict(last.meta)
    last.replace_all_uses_with(node)
    for erased in reversed([node for call in stage for node in call.nodes]):
        graph.erase_node(erased)


def _restore_formats(graph: fx.Graph) -> None:
    """Let maps have any memory format between stages, and torch's wherever something else sees them."""
    loose: set[fx.Node] = set()
    for node in list(graph.nodes):
        if not isinstance(node.target, Stage) and not loose.intersection(node.all_input_nodes):
            continue
        if value_of(node).dim() == 0:
            continue
        if all(_takes_any_format(user, node) for user in node.users):
            loose.add(node)
            continue
        with graph.inserting_after(node):
            dense = graph.call_function(as_new, (node, _format(value_of(node))))
        dense.meta = dict(node.meta)
        node.replace_all_uses_with(dense, delete_user_cb=lambda user, dense=dense: user is not dense)


def _takes_any_format(user: fx.Node, node: fx.Node) -> bool:
    """Whether one call may get what another returns in any memory format, and nobody else is the wiser."""
    if isinstance(user.target, Stage):
        return node not in pytree.tree_leaves((user.args[1:], user.kwargs.get("norm")))
    if not isinstance(value_of(user), Tensor):
        return False
    if user.target in _REDUCING and value_of(user).dim() == 0:
        return True
    if _format(value_of(user)) is None:
        return False
    if user.target is F.dropout and not _dropout(*user.args, **user.kwargs)[1]:
        return False  # it draws one number after the other, in the order of memory
    is_read = len(node.users) == 1 or user.args[0] is not node  # at most
    return user.target in (_PURE | _REDUCING) or (user.target in (*_IN_PLACE, F.dropout) and is_read)


# -- the report -------------------------------------------------------------------------------------------------------


def _now(stage: Sequence[Call], inference: bool) -> str:
    parts = [part for call in stage for part in call.parts if part not in ("dropout", "bias")]
    if "norm" in parts and not inference:
        tail = [] if "lrn" not in parts else ["relu_lrn_max_pool2d" if "pool" in parts else "local_response_norm"]
        return " + ".join(["conv2d"] * ("conv" in parts) + ["batch_norm_relu_max_pool2d", *tail])
    parts = [part for part in parts if part != "norm"]
    if parts[0] == "linear":
        return "linear, packed"
    if parts[0] == "conv":  # by conv2d_relu or torch's operators, whichever is faster for the sizes of a call
        has_tail = {"lrn", "pool"}.intersection(parts)
        now = "conv2d + relu_lrn_max_pool2d" if has_tail else " + ".join(("conv2d", *parts[1:]))
        return f"{now}, packed" if inference else now
    return {"lrn": "local_response_norm", "pool": "max_pool2d"}.get("".join(parts), "relu_lrn_max_pool2d")


def _labels(graph: fx.Graph, names: Mapping[str, str]) -> dict[fx.Node, tuple[str, str]]:
    """Where each call is in the model, and what is called: a layer, or a function in the forward of a module."""
    labels, used = {}, set(names)
    for node in graph.nodes:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        source = stack[-1][0] if stack else ""
        while (plain := re.sub(r"getattr\(([^()]*), '(\w*)'\)", r"\1.\2", source)) != source:  # 0 of a GraphModule
            source = plain
        path = source.partition(".")[2]
        what = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        where = path
        if path in names:
            what = names[path]
        else:
            base = f"{path}.{what}" if path else what
            where = next(label for i in itertools.count() if (label := f"{base}_{i}" if i else base) not in used)
            used.add(where)
        labels[node] = where, what
    return labels
