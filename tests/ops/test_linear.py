"""The fully connected layer: of inference csrc/cpu/linear.cpp, and fastcnn/optimize/inference.py around it; of training
the products of csrc/cpu/linear_training.cpp.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from promises import DTYPES, assert_bitwise, embedded, ident, integers, randn
from torch import Tensor

import fastcnn
from fastcnn.optimize.stage import LinearStage

pytestmark = pytest.mark.skipif("cpu" not in fastcnn.backends.available(), reason="needs the C++ library")


def run(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False, factor: float = 1.0) -> Tensor:
    y = torch.full((len(x), len(weight)), torch.nan, dtype=x.dtype)
    torch.ops.fastcnn_cpu.linear(x, weight, bias, y, relu, factor)
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("vectors", [1, 2, 3, 4])
@pytest.mark.parametrize("outputs", [1, 3, 4, 9])
def test_every_size(kernel, outputs, vectors, dtype):
    for inputs in (0, 1, 7, 16, 33, 100):
        x, weight = integers(vectors, inputs, dtype=dtype), integers(outputs, inputs, dtype=dtype, seed=1)
        bias = integers(outputs, dtype=dtype, seed=2)
        exact = x.double() @ weight.double().T
        assert_bitwise(run(x, weight, None) + 0, exact.to(dtype) + 0)
        assert_bitwise(run(x, weight, bias, factor=0.5) + 0, ((exact + bias) / 2).to(dtype) + 0)
        assert_bitwise(run(x, weight, bias, relu=True), (exact + bias).relu().to(dtype) + 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=ident)
def test_error_is_at_most_twice_that_of_torch(kernel, dtype):
    x, weight, bias = (t.to(dtype) for t in (randn(3, 4096), randn(257, 4096, seed=1), randn(257, seed=2)))
    exact = F.linear(*(t.double() for t in (x, weight, bias)))
    if dtype == torch.float64:
        return torch.testing.assert_close(run(x, weight, bias), exact, rtol=1e-12, atol=1e-11)
    error, of_torch = ((y.double() - exact).norm() for y in (run(x, weight, bias), F.linear(x, weight, bias)))
    assert error <= 2 * of_torch
    return None


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_nan_and_infinity_as_torch(kernel, dtype):
    x, weight = integers(2, 40, dtype=dtype), integers(6, 40, dtype=dtype, seed=1)
    x[1, 39], weight[2, 3], weight[4, 5] = float("nan"), float("inf"), -float("inf")
    assert_bitwise(run(x, weight, None, relu=True), F.linear(x.double(), weight.double()).relu().to(dtype) + 0)


@pytest.mark.parametrize("vectors", [0, 1, 4, 5, 40])
@pytest.mark.parametrize("layout", ["dense", "transposed", "spaced"])
def test_any_batch_and_any_strides(vectors, layout):
    x, weight, bias = randn(vectors, 20), randn(30, 20, seed=1), randn(30, seed=2)
    exact = 0.25 * F.linear(x.double(), weight.double(), bias.double()).relu()
    if layout == "transposed":
        x, weight = x.T.contiguous().T, weight.T.contiguous().T
    if layout == "spaced":
        x, weight, bias = (embedded(t, steps=[1] * (t.dim() - 1) + [3]) for t in (x, weight, bias))
    stage = LinearStage(relu=True, factor=0.25)
    y = (stage.planned(x, weight, bias) or stage)(x, weight, bias)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", ["weight", "bias", "out", "vectors", "dtype"])
def test_sizes_are_checked(wrong):
    """The op can be called by itself, and must not read or write out of bounds."""
    x, weight = torch.zeros(5 if wrong == "vectors" else 2, 8), torch.zeros(6, 8 - (wrong == "weight"))
    out, bias = torch.zeros(2, 6 - (wrong == "out")), torch.zeros(6 - (wrong == "bias"))
    if wrong == "dtype":
        weight = weight.bfloat16()
    with pytest.raises(RuntimeError, match="must"):
        torch.ops.fastcnn_cpu.linear(x, weight, bias, out, False, 1.0)


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages of memory")
def test_nothing_is_read_or_written_out_of_bounds():
    script = Path(__file__).parents[1] / "guard_pages.py"
    done = subprocess.run([sys.executable, str(script), "linear"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[-2000:]


# -- in training ------------------------------------------------------------------------------------------------------

TRAINING = torch.ops.fastcnn_cpu
# inputs, outputs: around what the kernels sum up at once, and one more than that
SIZES = [(16, 1), (48, 7), (1024 + 16, 13), (4096, 30), (80, 129)]


def products(x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor) -> list[Tensor]:
    """The output, and the gradients of input and weight."""
    shapes = dy.shape, x.shape, weight.shape
    y, dx, dw = (torch.full(shape, torch.nan) for shape in shapes)
    TRAINING.linear_forward(x, weight, bias, y)
    TRAINING.linear_input_gradient(dy, weight, dx)
    TRAINING.linear_weight_gradient(dy, x, dw)
    return [y, dx, dw]


def of_torch(x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor) -> list[Tensor]:
    return [F.linear(x, weight, bias), dy @ weight, dy.T @ x]


def drawn(draw: Callable[..., Tensor], vectors: int, inputs: int, outputs: int) -> list[Tensor]:
    shapes = (vectors, inputs), (outputs, inputs), (outputs,), (vectors, outputs)
    return [draw(*shape, seed=i) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("vectors", [1, 2, 5, 6, 7, 32, 64, 65, 129, 256])
@pytest.mark.parametrize("size", SIZES, ids=ident)
def test_every_size_in_training(kernel, size, vectors):
    x, weight, bias, dy = drawn(integers, vectors, *size)
    for b in (bias, None):
        exact = of_torch(x.double(), weight.double(), None if b is None else b.double(), dy.double())
        for found, expected in zip(products(x, weight, b, dy), exact, strict=True):
            assert_bitwise(found, expected.float())


@pytest.mark.parametrize("vectors", [2, 7, 65, 256])
@pytest.mark.parametrize("size", [(1024 + 16, 13), (4096, 30), (80, 1025)], ids=ident)
def test_error_in_training_is_at_most_twice_that_of_torch(kernel, size, vectors):
    tensors = drawn(randn, vectors, *size)
    exact = of_torch(*(t.double() for t in tensors))
    for found, theirs, expected in zip(products(*tensors), of_torch(*tensors), exact, strict=True):
        assert (found - expected).norm() <= 2 * (theirs - expected).norm()


def test_the_same_bits_in_training_whatever_the_threads(kernel, threads):
    tensors = drawn(randn, 65, 1024 + 16, 530)
    threads(1)
    expected = products(*tensors)
    for number in (2, 3, 7):
        threads(number)
        for found, before in zip(products(*tensors), expected, strict=True):
            assert_bitwise(found, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 1, 2, 3], ids=["input", "weight", "bias", "gradient"])
def test_what_is_not_finite_in_training_as_in_torch(kernel, where, value):
    tensors = drawn(integers, 7, 48, 9)
    for element in (0, -1):
        tensors[where].view(-1)[element] = value
    for found, expected in zip(products(*tensors), of_torch(*(t.double() for t in tensors)), strict=True):
        assert_bitwise(found, expected.float())


GOOD = {"x": (3, 32), "weight": (5, 32), "bias": (5,), "dy": (3, 5), "y": (3, 5), "dx": (3, 32), "dw": (5, 32)}
OPS = {
    "linear_forward": ("x", "weight", "bias", "y"),
    "linear_input_gradient": ("dy", "weight", "dx"),
    "linear_weight_gradient": ("dy", "x", "dw"),
}


WRONG = [
    *({name: (*shape[:-1], shape[-1] - 1)} for name, shape in GOOD.items()),
    *({name: torch.float64} for name in GOOD),
    {"x": (3, 24), "weight": (5, 24), "dx": (3, 24), "dw": (5, 24)},
    {"x": (3, 0), "weight": (5, 0), "dx": (3, 0), "dw": (5, 0)},
    {"x": (0, 32), "dy": (0, 5), "y": (0, 5), "dx": (0, 32)},
    {"weight": (0, 32), "bias": (0,), "dy": (3, 0), "y": (3, 0), "dw": (0, 32)},
    {"x": (3, 32, 0), "weight": (5, 32, 0)},
]


def call(op: str, changed: dict[str, tuple[int, ...] | torch.dtype]) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in GOOD.items()}
    for name, change in changed.items():
        tensors[name] = torch.zeros(change) if isinstance(change, tuple) else tensors[name].to(change)
    getattr(TRAINING, op)(*(tensors[name] for name in OPS[op]))


@pytest.mark.parametrize(
    ("op", "changed"), [(op, c) for op, names in OPS.items() for c in WRONG if not c.keys().isdisjoint(names)], ids=str
)
def test_sizes_are_checked_in_training(op, changed):
    call(op, {})
    with pytest.raises(RuntimeError, match="must"):
        call(op, changed)
