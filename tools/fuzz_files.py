"""Small ONNX files like those of the era's networks and exporters, and ways to break them."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import onnx
from onnx import ModelProto, helper, numpy_helper

FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64


class Graph:
    """Builds a file node by node, with weights from He's initialization."""

    def __init__(self, shape: Sequence[int | str], opset: int, seed: int) -> None:
        self.shape, self.opset, self.random = shape, opset, numpy.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.last = "image"

    def weight(self, *shape: int) -> str:
        std = 0.1 if len(shape) == 1 else (2 / numpy.prod(shape[1:])) ** 0.5
        return self.constant(self.random.standard_normal(shape, "float32") * numpy.float32(std))

    def constant(self, value: Any) -> str:
        name = f"w{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(numpy.asarray(value), name))
        return name

    def add(self, kind: str, *inputs: str, after: str | None = None, outputs: int = 1, **attributes: Any) -> str:
        """Add a node that takes the last output, or ``after``, and these; its (first) output is the last then."""
        names = [f"v{len(self.nodes)}_{i}" if i else f"v{len(self.nodes)}" for i in range(outputs)]
        first = [self.last if after is None else after] if kind not in ("Concat", "Constant", "Sum") else []
        self.nodes.append(helper.make_node(kind, [*first, *inputs], names, f"{kind}{len(self.nodes)}", **attributes))
        self.last = names[0]
        return self.last

    def conv(
        self, before: int, after: int, kernel: int, *, groups: int = 1, bias: bool = True, **attributes: Any
    ) -> str:
        tensors = [self.weight(after, before // groups, kernel, kernel), *([self.weight(after)] if bias else [])]
        return self.add("Conv", *tensors, kernel_shape=[kernel] * 2, group=groups, **attributes)

    def norm(self, channels: int, **attributes: Any) -> str:
        tensors = [self.constant(self.random.uniform(0.5, 1.5, channels).astype("float32")), self.weight(channels)]
        tensors += [self.weight(channels), self.constant(self.random.uniform(0.5, 1.5, channels).astype("float32"))]
        return self.add("BatchNormalization", *tensors, **attributes)

    def model(self) -> ModelProto:
        image = helper.make_tensor_value_info("image", FLOAT, self.shape)
        output = helper.make_tensor_value_info(self.last, FLOAT, None)
        graph = helper.make_graph(self.nodes, "graph", [image], [output], self.constants)
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="fastcnn")


def alexnet() -> ModelProto:
    """With LRN, groups, pools whose padding emulates rounding up, and dropout, as Caffe2 wrote it."""
    g = Graph([1, 3, 35, 35], 9, 0)
    g.conv(3, 8, 5, strides=[2, 2])
    g.add("Relu")
    g.add("LRN", size=5, alpha=1e-2, beta=0.75, bias=1.0)
    g.add("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1])
    g.conv(8, 12, 3, groups=2, pads=[1, 1, 1, 1])
    g.add("Relu")
    g.add("MaxPool", kernel_shape=[3, 3], strides=[2, 2])
    g.add("Reshape", g.constant(numpy.array([1, 108])))
    g.add("Gemm", g.weight(16, 108), g.weight(16), transB=1)
    g.add("Relu")
    g.add("Dropout", outputs=2, ratio=0.5)
    g.add("Gemm", g.weight(10, 16), g.weight(10), transB=1)
    g.add("Softmax")
    return g.model()


def inception() -> ModelProto:
    """With branches, batch norm and its scale as nodes of their own, and pools of every kind."""
    g = Graph([1, 3, 20, 20], 12, 1)
    g.conv(3, 8, 3, strides=[2, 2], pads=[1, 1, 1, 1], bias=False)
    g.norm(8, epsilon=1e-3)
    g.add("Mul", g.constant(g.random.uniform(0.5, 1.5, (8, 1, 1)).astype("float32")))
    g.add("Add", g.constant(g.random.standard_normal((8, 1, 1), "float32")))
    stem = g.add("Relu")
    ends = []
    for after, kernel in ((4, 1), (6, 3), (4, 5)):
        g.last = stem
        g.conv(8, after, kernel, pads=[kernel // 2] * 4)
        ends.append(g.add("Relu"))
    ends.append(g.add("MaxPool", after=stem, kernel_shape=[3, 3], pads=[1, 1, 1, 1]))
    ends.append(g.add("AveragePool", after=stem, kernel_shape=[3, 3], pads=[1, 1, 1, 1]))
    g.add("Concat", *ends, axis=1)
    g.add("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
    g.add("GlobalAveragePool")
    g.add("Flatten")
    g.add("Gemm", g.weight(30, 7), g.weight(7), alpha=0.5)
    return g.model()


def vgg() -> ModelProto:
    """Of any number of images, flattened by computing with shapes, as torch exports it."""
    g = Graph(["batch", 3, 16, 16], 13, 2)
    for before, after in ((3, 6), (6, 8)):
        g.conv(before, after, 3, pads=[1, 1, 1, 1])
        g.add("Relu")
        g.add("MaxPool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=0)
    last = g.last
    g.add("Shape")
    g.add("Gather", g.constant(numpy.array(0)), axis=0)
    g.add("Unsqueeze", g.constant(numpy.array([0])))
    batch, rest = g.last, g.constant(numpy.array([-1]))
    shape = g.add("Concat", batch, rest, axis=0)
    g.add("Reshape", shape, after=last)
    g.add("MatMul", g.weight(128, 12))
    g.add("Add", g.weight(12))
    g.add("Clip", g.constant(numpy.float32(0)), g.constant(numpy.float32(6)))
    g.add("Dropout", g.constant(numpy.float32(0.5)), g.constant(numpy.array(False)))
    g.add("Gemm", g.weight(5, 12), g.weight(5), transB=1)
    g.add("LogSoftmax", axis=-1)
    return g.model()


def squeezenet() -> ModelProto:
    """Without fully connected layers, for images of any size."""
    g = Graph(["batch", 3, "height", "width"], 17, 3)
    g.add("Sub", g.constant(numpy.array([0.4, 0.5, 0.6], "float32").reshape(1, 3, 1, 1)))
    g.add("Mul", g.constant(numpy.float32(4)))
    g.conv(3, 8, 3, strides=[2, 2])
    g.add("Relu")
    g.add("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
    g.conv(8, 4, 1)
    squeezed = g.add("Relu")
    g.conv(4, 6, 1)
    one = g.add("Relu")
    g.last = squeezed
    g.conv(4, 6, 3, pads=[1, 1, 1, 1])
    three = g.add("Relu")
    both = g.add("Concat", one, three, axis=1)
    g.add("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)
    g.add("Add", both)
    g.conv(12, 5, 1)
    g.add("GlobalAveragePool")
    g.add("Squeeze", g.constant(numpy.array([2, 3])))
    return g.model()


def tensorflow() -> ModelProto:
    """Images with their channels last, ``auto_pad``, ``Pad``, a mean over the map, and split LRN."""
    g = Graph([2, 18, 18, 3], 11, 4)
    g.add("Transpose", perm=[0, 3, 1, 2])
    g.conv(3, 8, 3, strides=[2, 2], auto_pad=b"SAME_UPPER")
    g.add("Relu")
    g.add("Pad", g.constant(numpy.array([0, 0, 0, 0, 0, 0, 1, 1])), g.constant(numpy.float32(0)), mode=b"constant")
    g.conv(8, 8, 3)
    g.add("Split", outputs=2, axis=1)
    halves = [f"v{len(g.nodes) - 1}", f"v{len(g.nodes) - 1}_1"]
    norms = [g.add("LRN", after=half, size=3, alpha=0.1, bias=2.0) for half in halves]
    g.add("Concat", *norms, axis=1)
    g.add("MaxPool", kernel_shape=[2, 2], strides=[2, 2], auto_pad=b"SAME_UPPER")
    g.add("ReduceMean", axes=[2, 3], keepdims=0)
    g.add("MatMul", g.weight(8, 6))
    g.add("Softmax", axis=1)
    return g.model()


FILES: dict[str, Callable[[], ModelProto]] = {f.__name__: f for f in (alexnet, inception, vgg, squeezenet, tensorflow)}

# -- ways to break them ------------------------------------------------------------------------------------------------


def bytes_flipped(model: ModelProto, rng: random.Random) -> bytes:
    data = bytearray(model.SerializeToString())
    # half of them outside of the weights, which are most of the file
    end = len(data) if rng.random() < 0.5 else data.index(b"w0")
    for _ in range(rng.choice([1, 1, 2, 4])):
        data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(data)


def bytes_cut_or_moved(model: ModelProto, rng: random.Random) -> bytes:
    data = model.SerializeToString()
    start = rng.randrange(len(data))
    length = rng.randrange(1, 200)
    if rng.random() < 0.5:
        return data[:start] + data[start + length :]
    to = rng.randrange(len(data))
    return data[:to] + data[start : start + length] + data[to:]


def nodes_swapped(model: ModelProto, rng: random.Random) -> bytes:
    """Two nodes take each other's place in the data flow, or only in the list."""
    a, b = rng.sample(list(model.graph.node), 2)
    if rng.random() < 0.8 and a.input and b.input:
        if rng.random() < 0.5:  # kinds, constants and attributes
            a.op_type, b.op_type = b.op_type, a.op_type
            for part in ("attribute", "input"):
                ours, theirs = list(getattr(a, part))[part == "input" :], list(getattr(b, part))[part == "input" :]
                for node, values in ((a, theirs), (b, ours)):
                    del getattr(node, part)[part == "input" :]
                    getattr(node, part).extend(values)
        else:
            a.input[0], b.input[0] = b.input[0], a.input[0]
    else:
        copy = type(a)()
        copy.CopyFrom(a)
        a.CopyFrom(b)
        b.CopyFrom(copy)
    return model.SerializeToString()


def input_changed(model: ModelProto, rng: random.Random) -> bytes:
    node = rng.choice([node for node in model.graph.node if node.input])
    names = (
        [name for n in model.graph.node for name in n.output]
        + [t.name for t in model.graph.initializer]
        + ["image", ""]
    )
    node.input[rng.randrange(len(node.input))] = rng.choice(names)
    return model.SerializeToString()


def node_dropped(model: ModelProto, rng: random.Random) -> bytes:
    """What took its output takes its first input."""
    node = rng.choice([node for node in model.graph.node if node.input])
    for other in model.graph.node:
        for i, name in enumerate(other.input):
            if name == node.output[0]:
                other.input[i] = node.input[0]
    if model.graph.output[0].name == node.output[0]:
        model.graph.output[0].name = node.input[0]
    model.graph.node.remove(node)
    return model.SerializeToString()


_INTS = (-(2**31), -2, -1, 0, 1, 2, 3, 4, 5, 7, 16, 1000, 2**31, 2**40)
_FLOATS = (-1.0, 0.0, 1e-8, 1e-3, 0.5, 0.75, 1.0, 2.0, 1e10, float("nan"), float("inf"))


def attribute_changed(model: ModelProto, rng: random.Random) -> bytes:
    node = rng.choice([node for node in model.graph.node if node.attribute])
    attribute = rng.choice(node.attribute)
    if attribute.ints and rng.random() < 0.8:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(_INTS)
    elif attribute.ints:
        attribute.ints.append(rng.choice(_INTS))
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = rng.choice(_FLOATS)
    elif attribute.type == onnx.AttributeProto.INT:
        attribute.i = rng.choice(_INTS)
    elif attribute.type == onnx.AttributeProto.STRING:
        attribute.s = rng.choice([b"VALID", b"SAME_LOWER", b"SAME_UPPER", b"NOTSET", b"reflect", b"edge", b"?"])
    return model.SerializeToString()


_ADDED = {
    "ceil_mode": (0, 1),
    "auto_pad": ("VALID", "SAME_UPPER", "SAME_LOWER"),
    "pads": ([0, 0, 1, 1], [1, 1, 0, 0], [2, 2, 2, 2], [0, 1]),
    "dilations": ([2, 2], [1, 2]),
    "strides": ([2, 2], [1, 3], [0, 1]),
    "group": (2, 3, 4),
    "epsilon": (1e-3, 0.1),
    "axis": (-1, 0, 1, 2, 3),
    "count_include_pad": (0, 1),
    "storage_order": (1,),
    "training_mode": (1,),
    "transA": (1,),
    "transB": (0, 1),
    "alpha": (0.5,),
    "beta": (0.0, 2.0),
    "bias": (0.5,),
    "size": (4, 7),
    "keepdims": (0, 1),
    "allowzero": (1,),
    "momentum": (0.5,),
    "nonsense": (1,),
}


def attribute_added(model: ModelProto, rng: random.Random) -> bytes:
    node = rng.choice(model.graph.node)
    schema = onnx.defs.get_schema(node.op_type, model.opset_import[0].version)
    names = sorted(set(_ADDED) & (set(schema.attributes) | {"nonsense"}))
    name = rng.choice(names)
    for i, attribute in reversed(list(enumerate(node.attribute))):
        if attribute.name == name:
            del node.attribute[i]
    node.attribute.append(helper.make_attribute(name, rng.choice(_ADDED[name])))
    return model.SerializeToString()


def constant_changed(model: ModelProto, rng: random.Random) -> bytes:
    tensor = rng.choice(model.graph.initializer)
    array = numpy_helper.to_array(tensor).copy()
    how = rng.randrange(5)
    if array.dtype == bool:
        array = ~array
    elif array.dtype == numpy.int64:
        array.flat[rng.randrange(array.size)] = rng.choice(_INTS)
    elif how == 0:
        array = array.reshape(array.shape[::-1])
    elif how == 1:
        array = array[..., :-1] if array.ndim else array
    elif how == 2:
        array = array.astype(rng.choice(["float16", "float64", "int64", "bool"]))
    elif how == 3:
        array = array[None]
    else:
        array = rng.choice(
            [array * 0, array * numpy.float32(1e3), 1 - array, array[::-1] if array.ndim else array]
        ).copy()
    tensor.CopyFrom(numpy_helper.from_array(numpy.ascontiguousarray(array), tensor.name))
    return model.SerializeToString()


def header_changed(model: ModelProto, rng: random.Random) -> bytes:
    """The opset, the type or the shape of the image, or the number of inputs and outputs."""
    how = rng.randrange(6)
    image = model.graph.input[0].type.tensor_type
    if how == 0:
        model.opset_import[0].version = rng.choice([1, 6, 7, 9, 10, 11, 12, 13, 17, 18, 20, 21, 22, 99])
    elif how == 1:
        image.elem_type = rng.choice([FLOAT, INT64, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE])
    elif how == 2:
        image.shape.dim[rng.randrange(4)].dim_value = rng.choice([-1, 0, 1, 2, 3, 8, 17, 33, 2**20, 2**40])
    elif how == 3:
        image.shape.dim.pop()
    elif how == 4:
        node = rng.choice(model.graph.node)
        model.graph.output[0].name = node.output[0]
    else:
        model.graph.input.append(helper.make_tensor_value_info("other", FLOAT, [1]))
    return model.SerializeToString()


MUTATIONS: dict[str, Callable[[ModelProto, random.Random], bytes]] = {
    f.__name__: f
    for f in (
        bytes_flipped,
        bytes_cut_or_moved,
        nodes_swapped,
        input_changed,
        node_dropped,
        attribute_changed,
        attribute_added,
        constant_changed,
        header_changed,
    )
}


def mutated(seed: int) -> tuple[str, str, bytes]:
    """The name of a file, that of what goes wrong with it, and the bytes of it then; the same for the same seed."""
    rng = random.Random(seed)
    name, how = rng.choice(list(FILES)), rng.choice(list(MUTATIONS))
    model = FILES[name]()
    if how in ("bytes_flipped", "bytes_cut_or_moved") or rng.random() < 0.7:
        return name, how, MUTATIONS[how](model, rng)
    data = MUTATIONS[how](model, rng)  # and once more
    again = rng.choice(list(MUTATIONS))
    try:
        return name, f"{how}, {again}", MUTATIONS[again](onnx.load_from_string(data), rng)
    except Exception:  # there may be nothing left to change
        return name, how, data
