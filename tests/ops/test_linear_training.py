"""The fully connected layer of training, around its products: fastcnn/ops/linear.py."""

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from promises import assert_bitwise, embedded, gradients, integers, leaf, randn
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastcnn
from fastcnn.models.layers import Linear
from fastcnn.ops import linear as _linear
from fastcnn.ops.linear import linear

pytestmark = pytest.mark.skipif(fastcnn.backends.cpu_capability() in ("", "baseline"), reason="torch's is faster")
SUBSETS = [wanted for n in (1, 2, 3) for wanted in itertools.combinations(range(3), n)]


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_linear, "_WEIGHTS", 1)


def arguments(vectors: int = 7, inputs: int = 48, outputs: int = 13) -> list[Tensor]:
    """Of integers, so that every sum is exact."""
    return [integers(*shape, seed=i) for i, shape in enumerate([(vectors, inputs), (outputs, inputs), (outputs,)])]


def is_ours(y: Tensor) -> bool:
    return y.grad_fn is not None and y.grad_fn.name() == "LinearBackward"


def assert_as_torch(tensors: Sequence[Tensor | None], dy: Tensor | None = None, *, ours: bool = True) -> None:
    """Output, and the gradients that these ask for, to the bit."""
    y, expected = linear(*tensors), F.linear(*tensors)
    assert is_ours(y) == ours
    assert_bitwise(y, expected)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    dy = integers(*y.shape, seed=3) if dy is None else dy
    for found, theirs in zip(gradients(y, wanted, dy), gradients(expected, wanted, dy), strict=True):
        assert_bitwise(found, theirs)


# -- the same as torch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", SUBSETS, ids=str)
@pytest.mark.parametrize("vectors", [1, 7])
def test_any_subset_of_gradients(kernel, vectors, wanted):
    tensors = [leaf(t) if i in wanted else t for i, t in enumerate(arguments(vectors))]
    ours = kernel != "cpu-baseline"
    assert_as_torch(tensors, ours=ours)
    if wanted != (2,):
        assert_as_torch([*tensors[:2], None], ours=ours)


@pytest.mark.parametrize("layout", ["transposed", "spaced", "expanded"])
@pytest.mark.parametrize("which", ["input", "bias", "gradient"])
def test_any_strides(which, layout):
    tensors = [*arguments(), integers(7, 13, seed=3)]
    i = ["input", "weight", "bias", "gradient"].index(which)
    t = tensors[i]
    if layout == "transposed":
        tensors[i] = embedded(t, range(t.dim())[::-1])
    elif layout == "spaced":
        tensors[i] = embedded(t, steps=[2] * t.dim(), offset=1)
    else:
        tensors[i] = t[:1].expand(t.shape)
    *leaves, dy = (*map(leaf, tensors[:3]), tensors[3])
    assert_as_torch(leaves, dy)


def test_of_a_sum():
    """Whose gradient is one element, expanded."""
    ours, theirs = ([leaf(t.clone()) for t in arguments()] for _ in range(2))
    linear(*ours).sum().backward()
    F.linear(*theirs).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert_bitwise(a.grad, b.grad)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", range(4), ids=["input", "weight", "bias", "gradient"])
def test_what_is_not_finite_stays_where_torch_has_it(where, value):
    tensors = [*arguments(), integers(7, 13, seed=3)]
    tensors[where].view(-1)[5] = value
    assert_as_torch([*map(leaf, tensors[:3])], tensors[3])


class Subclass(Tensor):
    pass


LEFT = {
    "many vectors": lambda x, w, b: (randn(257, 48), w, b),
    "no vectors": lambda x, w, b: (x[:0], w, b),
    "inputs not in sixteens": lambda x, w, b: (x[:, :40], w[:, :40].contiguous(), b),
    "one vector of one dimension": lambda x, w, b: (x[0], w, b),
    "three dimensions": lambda x, w, b: (x[None], w, b),
    "a weight of one dimension": lambda x, w, b: (x, w[0], None),
    "a transposed weight": lambda x, w, b: (x, w.T.contiguous().T, b),
    "one bias for all": lambda x, w, b: (x, w, b[:1]),
    "float64": lambda *tensors: tuple(t.double() for t in tensors),
    "bfloat16": lambda *tensors: tuple(t.bfloat16() for t in tensors),
    "a sparse weight": lambda x, w, b: (x, w.to_sparse_csr(), b),
    "a sparse input": lambda x, w, b: (x.to_sparse(), w, b),
    "a subclass": lambda x, w, b: (x.as_subclass(Subclass), w, b),
    "meta": lambda *tensors: tuple(t.to("meta") for t in tensors),
}


@pytest.mark.parametrize("change", LEFT.values(), ids=LEFT)
def test_what_is_left_to_torch(change):
    x, weight, bias = change(*(t / 3 for t in arguments()))
    x, weight, bias = leaf(x), leaf(weight), leaf(bias)
    y, expected = linear(x, weight, bias), F.linear(x, weight, bias)
    assert not is_ours(y)
    assert (type(y), y.shape, y.dtype, y.device) == (type(expected), expected.shape, expected.dtype, expected.device)
    if not y.is_meta:
        assert_bitwise(y, expected)


def test_small_weights_and_other_backends_are_left_to_torch(monkeypatch):
    tensors = [leaf(t) for t in arguments()]
    with fastcnn.backends.use("reference"):
        assert_as_torch(tensors, ours=False)
    monkeypatch.undo()
    assert_as_torch(tensors, ours=False)
    large = [leaf(t) for t in arguments(2, 1024, 512)]
    assert_as_torch(large)
    assert_as_torch([large[0], leaf(large[1].detach()[1:]), leaf(large[2].detach()[1:])], ours=False)


@pytest.mark.parametrize("shapes", [((7, 32), (13, 48), (13,)), ((7, 48), (13, 48), (12,))], ids=str)
def test_wrong_sizes_raise_as_torch(shapes):
    tensors = [torch.zeros(shape) for shape in shapes]
    with pytest.raises(RuntimeError) as theirs:
        F.linear(*tensors)
    with pytest.raises(RuntimeError) as ours:
        linear(*tensors)
    assert str(ours.value) == str(theirs.value)


# -- autograd ---------------------------------------------------------------------------------------------------------


def saved(run: Callable[..., Tensor], tensors: Sequence[Tensor]) -> set[int]:
    """The addresses of the tensors that autograd keeps."""
    addresses: set[int] = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: addresses.add(t.data_ptr()) or t, lambda t: t):
        run(*tensors)
    return addresses


@pytest.mark.parametrize("wanted", [(), *SUBSETS], ids=str)
def test_what_is_kept_is_what_torch_keeps(wanted):
    tensors = [leaf(t) if i in wanted else t for i, t in enumerate(arguments())]
    assert saved(linear, tensors) == saved(F.linear, tensors)
    with torch.no_grad():
        assert not saved(linear, [leaf(t) for t in tensors])


@pytest.mark.parametrize("changed", [0, 1], ids=["input", "weight"])
@pytest.mark.parametrize("wanted", SUBSETS, ids=str)
def test_change_in_place_before_backward(wanted, changed):
    """An error where the gradients would be wrong, and only there."""

    reads = 1 - changed in wanted  # the input for the weight's gradient, the weight for the input's
    for function in (linear, F.linear):
        tensors = [leaf(t) if i in wanted else t for i, t in enumerate(arguments())]
        y = function(*tensors)
        with torch.no_grad():
            tensors[changed].mul_(2)
        error = pytest.raises(RuntimeError, match="modified by an inplace operation") if reads else nullcontext()
        with error:
            y.sum().backward()


def test_other_strides_of_the_weight_before_backward():
    x, weight, bias = map(leaf, arguments())
    y = linear(x, weight, bias)
    weight.data = embedded(2 * weight.detach(), (1, 0))
    dy = integers(*y.shape, seed=3)
    assert_bitwise(torch.autograd.grad(y, x, dy)[0], dy @ weight)


def test_a_sparse_gradient():
    places = integers(7, 1, low=0, high=13).long()
    results = []
    for function in (linear, F.linear):
        x, weight, bias = arguments()
        x, weight = leaf(x), leaf(weight)  # torch has no such gradient of the bias
        y = function(x, weight, bias)
        results.append(torch.autograd.grad(torch.gather(y, 1, places, sparse_grad=True).sum(), (x, weight)))
    for ours, theirs in zip(*results, strict=True):
        assert_bitwise(ours, theirs)


def test_gradients_of_gradients():
    def twice(run: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        tensors = [leaf(t) for t in arguments()]
        y = run(*tensors)
        first = torch.autograd.grad(y, tensors, integers(*y.shape, seed=3), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors[:2])

    for ours, theirs in zip(twice(linear), twice(F.linear), strict=True):
        assert_bitwise(ours, theirs)


@pytest.mark.parametrize("way", ["is_grads_batched", "jacobian", "vmap"])
def test_batches_of_gradients(way):
    def run(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        x, weight, bias = map(leaf, arguments())
        if way == "jacobian":
            return torch.autograd.functional.jacobian(function, (x, weight, bias), vectorize=True)
        y = function(x, weight, bias)
        dys = integers(3, *y.shape, seed=3)
        if way == "is_grads_batched":
            return torch.autograd.grad(y, (x, weight, bias), dys, is_grads_batched=True)
        return torch.vmap(lambda dy: torch.autograd.grad(y, (x, weight, bias), dy, retain_graph=True))(dys)

    for ours, theirs in zip(run(linear), run(F.linear), strict=True):
        assert_bitwise(ours, theirs)


@pytest.mark.parametrize("way", ["checkpoint", "checkpoint, reentrant", "saved on CPU", "retained", "anomalies"])
def test_ways_of_autograd(way):
    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        tensors = [leaf(t) for t in arguments()]
        if way.startswith("checkpoint"):
            y = checkpoint(function, *tensors, use_reentrant="reentrant" in way)
        elif way == "saved on CPU":
            with torch.autograd.graph.save_on_cpu():
                y = function(*tensors)
        else:
            y = function(*tensors)
        with torch.autograd.set_detect_anomaly(way == "anomalies"):
            y.backward(integers(*y.shape, seed=3), retain_graph=way == "retained")
            if way == "retained":
                y.backward(integers(*y.shape, seed=4))
        return [t.grad for t in tensors]

    for ours, theirs in zip(run(linear), run(F.linear), strict=True):
        assert_bitwise(ours, theirs)


# -- what must see torch's operators ----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["vmap", "grad", "jvp", "vjp", "jacfwd", "hessian", "forward-mode"])
def test_transforms(way):
    x, weight, bias = arguments()

    def run(function: Callable[..., Tensor]) -> Tensor | tuple[Tensor, ...]:
        def of_x(x: Tensor) -> Tensor:
            return function(x, weight, bias)

        if way == "vmap":
            return torch.vmap(of_x)(integers(3, 7, 48))
        if way == "grad":
            return torch.func.grad(lambda x, w, b: function(x, w, b).square().sum(), argnums=(0, 1, 2))(x, weight, bias)
        if way == "jvp":
            return torch.func.jvp(of_x, (x,), (x,))
        if way == "vjp":
            return torch.func.vjp(function, x, weight, bias)[1](integers(7, 13))
        if way == "jacfwd":
            return torch.func.jacfwd(of_x)(x)
        if way == "hessian":
            return torch.func.hessian(lambda x: of_x(x).square().sum())(x)
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(of_x(forward_ad.make_dual(x, x))).tangent

    torch.testing.assert_close(run(linear), run(F.linear), rtol=0, atol=0)


def test_autocast():
    tensors = [leaf(t) for t in arguments()]
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(*tensors)
        assert y.dtype == torch.bfloat16
        assert_as_torch(tensors, integers(7, 13).bfloat16(), ours=False)


def test_traces_consist_of_operators_of_torch():
    layer, x, buffer = Linear(48, 13), randn(7, 48), io.BytesIO()
    traced = torch.jit.trace(layer, x)
    assert "fastcnn::" not in str(traced.inlined_graph)
    assert "aten::linear" in str(traced.inlined_graph)
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.jit.load(buffer)(x), layer(x))
    symbolic = torch.fx.symbolic_trace(layer)
    assert linear in [node.target for node in symbolic.graph.nodes]
    assert is_ours(pickle.loads(pickle.dumps(symbolic))(x))


def test_compile_without_graph_break():
    torch._dynamo.reset()
    tensors = [leaf(t) for t in arguments()]
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    y, expected, dy = compiled(*tensors), linear(*tensors), integers(7, 13, seed=3)
    assert_bitwise(y, expected)
    for found, theirs in zip(gradients(y, tensors, dy), gradients(expected, tensors, dy), strict=True):
        assert_bitwise(found, theirs)


def test_fake_tensors():
    with FakeTensorMode() as mode:
        fake = [leaf(mode.from_tensor(t)) for t in arguments()]
        y = linear(*fake)
        y.sum().backward()
    assert (y.shape, y.dtype) == ((7, 13), torch.float32)
    assert [t.grad.shape for t in fake] == [t.shape for t in fake]


@pytest.mark.parametrize("around", ["both", "backward"])
def test_flops_are_those_of_torch(around):
    counted = []
    for function in (linear, F.linear):
        tensors = [leaf(t) for t in arguments()]
        y = function(*tensors)
        with FlopCounterMode(display=False) as mode:
            y = function(*tensors) if around == "both" else y
            y.sum().backward()
        counted.append(mode.get_total_flops())
    assert counted[0] == counted[1] > 0


# -- the layer --------------------------------------------------------------------------------------------------------


def test_the_layer_is_that_of_torch():
    layer, theirs = Linear(48, 13), nn.Linear(48, 13)
    theirs.load_state_dict(layer.state_dict())
    assert isinstance(layer, nn.Linear)
    assert repr(layer) == repr(theirs)
    assert list(layer.state_dict()) == ["weight", "bias"]
    x = integers(7, 48)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        y = copied(x)
        assert is_ours(y)
        torch.testing.assert_close(y, theirs(x))
        y.sum().backward()
        assert_bitwise(copied.weight.grad, x.sum(0).expand(13, 48))
    assert layer.weight.grad is None


def test_hooks():
    seen = []
    layer = Linear(48, 13)
    layer.register_forward_hook(lambda _, __, y: seen.append(("forward", is_ours(y))))
    layer.register_full_backward_hook(lambda _, dx, dy: seen.append(("backward", dx[0].shape, dy[0].shape)))
    layer.weight.register_hook(lambda dw: seen.append(("weight", dw.shape)) or 2 * dw)
    layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append(("accumulated", p.grad.shape)))
    x = leaf(integers(7, 48))
    layer(x).sum().backward()
    assert sorted(seen) == [
        ("accumulated", (13, 48)),
        ("backward", (7, 48), (7, 13)),
        ("forward", True),
        ("weight", (13, 48)),
    ]
    assert_bitwise(layer.weight.grad, 2 * x.detach().sum(0).expand(13, 48))


# -- memory of the weight's gradient ----------------------------------------------------------------------------------


@pytest.fixture
def allocated() -> Iterator[list[int]]:
    """The addresses that the allocator gave out. It is not used in the deterministic mode, in which tests run."""
    torch.use_deterministic_algorithms(False)
    fastcnn.backends.release_memory()
    addresses: list[int] = []
    kept = _linear.kept

    def recorded(empty: Tensor, *, lasting: bool) -> Tensor:
        assert lasting  # until the parameters are updated
        t = kept(empty, lasting=lasting)
        assert t is not empty
        addresses.append(t.data_ptr())
        return t

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_linear, "kept", recorded)
        yield addresses
    torch.use_deterministic_algorithms(True)


def test_the_gradient_of_a_parameter_is_no_copy_and_its_memory_is_used_again(allocated):
    layer, x = Linear(1024, 512), integers(7, 1024)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(3):
        layer(x).sum().backward()
        assert layer.weight.grad.data_ptr() == allocated[-1]
        assert_bitwise(layer.weight.grad, x.sum(0).expand(512, 1024))
        optimizer.step()
        optimizer.zero_grad()
    assert len(allocated) == 3
    assert len({*allocated}) == 1


def test_a_gradient_that_is_there_is_added_to_in_place(allocated):
    layer, x = Linear(1024, 512), integers(7, 1024)
    layer(x).sum().backward()
    there = layer.weight.grad.data_ptr()
    (layer(x) + layer(2 * x)).sum().backward()  # of one parameter that is used twice
    assert layer.weight.grad.data_ptr() == there
    assert there not in allocated[1:]
    assert_bitwise(layer.weight.grad, 4 * x.sum(0).expand(512, 1024))
