"""ONNX files to load: small ones of given nodes, and the published graphs with random weights."""

from pathlib import Path

import numpy
import onnx
import torch
from torch import Tensor, nn

import fastcnn
from fastcnn.models.graph.onnxruntime import Runtime, difference

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"
PUBLISHED = sorted(path.stem.removeprefix("light_") for path in LIGHT.glob("*.onnx"))


def node(kind: str, inputs: str, output: str, **attributes):
    return onnx.helper.make_node(kind, inputs.split(), output.split(), f"the_{output.split()[0]}", **attributes)


def save_graph(path, nodes, tensors, *, shape=(1, 3, 8, 8), opset=13, producer=""):
    """A graph from "image" to the output of the last node."""
    constants = [onnx.numpy_helper.from_array(t.detach().numpy(), name) for name, t in tensors.items()]
    image = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, shape)
    output = onnx.helper.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph(nodes, "small", [image], [output], constants)
    opsets = [onnx.helper.make_opsetid("", opset)]
    onnx.save(onnx.helper.make_model(graph, producer_name=producer, opset_imports=opsets, ir_version=8), path)
    return path


def by_onnxruntime(path, x: Tensor) -> Tensor:
    """What onnxruntime computes of images, as many at a time as the file takes."""
    runtime = Runtime(path)
    given = runtime.shape[0] if runtime.shape else None
    batch = given if isinstance(given, int) else len(x)
    return torch.cat([runtime(part) for part in x.split(batch)])


def assert_same_as_onnxruntime(model: nn.Module, path, x: Tensor, allowed: float = 1e-5) -> None:
    with torch.no_grad():
        found, expected = model.eval()(x), by_onnxruntime(path, x)
    if found.dim() == 2 and expected.shape[2:] == (1, 1):  # logits of a global pool
        expected = expected.flatten(1)
    assert difference(found, expected) <= allowed


def set_at_random(model: nn.Module, seed: int = 0) -> nn.Module:
    """Values in every tensor that tell each from every other."""
    generator = torch.Generator().manual_seed(seed)
    for name, t in model.state_dict().items():
        if t.is_floating_point():
            std = (2 / t[0].numel()) ** 0.5 if t.dim() > 1 else 0.3
            t.copy_(std * torch.randn(t.shape, generator=generator))
        if name.endswith("running_var"):
            t.abs_().add_(0.5)
    return model


def randomized(name: str, path, *, input_size: int | None = None, softmax: bool = False) -> Path:
    """A published graph of the onnx package, its constants replaced by values from He's initialization.

    With another ``input_size`` than published, fc6 gets as many columns as the map that is left has values. Without a
    softmax at the end the logits can be compared.
    """
    file = onnx.load(LIGHT / f"light_{name}.onnx")
    graph, generator = file.graph, numpy.random.default_rng(0)
    values = generator.standard_normal(1_000_003, dtype=numpy.float32)  # a prime: no two layers repeat it alike
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    shapes = {n.output[0]: tuple(arrays[n.input[0]]) for n in graph.node if n.op_type == "ConstantOfShape"}
    shapes |= {name: a.shape for name, a in arrays.items() if a.dtype == numpy.float32}
    nodes = [n for n in graph.node if n.op_type != "ConstantOfShape" and (softmax or n.op_type != "Softmax")]
    used = {name for node in nodes for name in node.input}
    variances = {n.input[4] for n in nodes if n.op_type == "BatchNormalization"}
    constants = {name: a for name, a in arrays.items() if name in used and name not in shapes}
    (image,) = (i for i in graph.input if i.name not in {*arrays, *shapes})
    if input_size is not None:
        for dimension in image.type.tensor_type.shape.dim[2:]:
            dimension.dim_value = input_size
        columns = _columns(nodes, shapes, image)
        (fc6,) = (n for n in shapes if n.endswith("fc6_w_0"))
        shapes[fc6] = (shapes[fc6][0], columns)
        constants["OC2_DUMMY_1"] = numpy.array([1, columns])
    for i, (tensor, shape) in enumerate(shapes.items()):
        if tensor in used:
            std = 0.1 if len(shape) == 1 else (2 / numpy.prod(shape[1:])) ** 0.5
            drawn = numpy.resize(numpy.roll(values, 7919 * i), shape) * numpy.float32(std)
            constants[tensor] = abs(drawn) + 1 if tensor in variances else drawn
    output = onnx.helper.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.FLOAT, None)
    tensors = [onnx.numpy_helper.from_array(numpy.ascontiguousarray(a), name) for name, a in constants.items()]
    made = onnx.helper.make_graph(nodes, graph.name, [image], [output], tensors)
    opset = [onnx.helper.make_opsetid("", 9)]
    onnx.save(onnx.helper.make_model(made, producer_name=file.producer_name, opset_imports=opset, ir_version=4), path)
    return Path(path)


def _columns(nodes, shapes, image) -> int:
    """How many values are left of the image where the graph flattens it."""
    front = nodes[: next(i for i, n in enumerate(nodes) if n.op_type == "Reshape")]
    info = onnx.helper.make_tensor_value_info
    given = [info(name, onnx.TensorProto.FLOAT, [int(n) for n in shape]) for name, shape in shapes.items()]
    output = info(front[-1].output[0], onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph(front, "front", [image, *given], [output])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 9)])
    inferred = onnx.shape_inference.infer_shapes(model).graph.output[0].type.tensor_type.shape
    return int(numpy.prod([d.dim_value for d in inferred.dim[1:]]))


def unset(name: str, **options) -> nn.Module:
    """A network of the zoo with whatever was in memory, for a file to fill."""
    with torch.device("meta"):
        model = fastcnn.models.create_model(name, **options)
    return model.to_empty(device="cpu").eval()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}
