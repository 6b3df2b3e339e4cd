"""What every operator promises whatever its kernels do: strides, memory, autograd, transforms, compilers, bad input.

Imported by the ``test_promises.py`` of the folders that keep these promises; see ``places.py``.
"""

import copy
import itertools
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from operators import asked
from places import over
from promises import (
    DTYPES,
    FORMATS,
    NARROW,
    assert_bitwise,
    assert_same_answer,
    embedded,
    expected_strides,
    gradients,
    ident,
    in_format,
    leaf,
    randn,
    recorded_calls,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

import fastcnn

ORDERS = [(0, 1, 3, 2), (3, 2, 1, 0), (1, 0, 2, 3), (0, 2, 3, 1), (2, 0, 3, 1)]
STEPS = [(1, 1, 1, 1), (1, 2, 1, 1), (1, 1, 1, 2), (2, 1, 3, 1)]


def lying(tensors, order=None, steps=None, offset=0):
    """The tensors with other strides: those of 4 dimensions in this order, with steps between the others' elements."""

    def lie(t):
        return embedded(t, order, steps, offset) if t.dim() == 4 else embedded(t, steps=[2] * t.dim(), offset=offset)

    return [t if t is None else lie(t) for t in tensors]


# -- memory formats ---------------------------------------------------------------------------------------------------


@over()
@pytest.mark.parametrize("order", ORDERS, ids=ident)
@pytest.mark.parametrize("steps", STEPS, ids=ident)
def test_any_strides(place, case, order, steps):
    for offset in (1,) if place.is_slow else (0, 1):
        case.op.agree(place, case, lying(case.tensors(), order, steps, offset))


@over("single")
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 1, 0)], ids=ident)
def test_any_strides_of_a_single_image(place, case, order):
    x, *others = case.tensors()
    case.op.agree(place, case, [embedded(x, order), *others])


@over("misaligned", dtypes=DTYPES)
@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)], ids=ident)
def test_misaligned_memory(place, case, dtype, order, offset):
    tensors = case.tensors(dtype)
    lying = [t if t is None else embedded(t, order if t.dim() == 4 else None, offset=offset) for t in tensors]
    case.op.agree(place, case, lying)


@over()
@pytest.mark.parametrize("dim", range(4))
def test_expanded_input(place, case, dim):
    x, *others = case.tensors()
    bias = [t if t is None or t.dim() > 1 else t[:1].expand(t.shape) for t in others]
    case.op.agree(place, case, [x.narrow(dim, 0, 1).expand(x.shape), *bias])


@over("parts", dtypes=[torch.float32, torch.bfloat16], formats=FORMATS)
def test_gradient_in_any_memory_format(place, case, dtype, format):
    tensors = case.tensors(dtype, format)
    dy = case.op.draw_gradient(case(*tensors))
    first = place.run(case, tensors, dy.contiguous())
    others = [
        in_format(dy, torch.channels_last),
        embedded(dy, (3, 0, 2, 1)),
        embedded(dy, steps=(1, 1, 1, 2)),
        embedded(dy, offset=1),
    ]
    for other in others:
        results = place.run(case, tensors, other)
        case.op.assert_same(place, results.gradients, first.gradients)
        assert results.gradients[0].stride() == expected_strides(tensors[0], tensors[0].shape)
        case.op.agree(place, case, tensors, other)
    case.op.agree(place, case, tensors, dy[0, 0, 0, 0].expand(dy.shape))  # as sum().backward() makes it


def everything(case, tensors):
    """What the ops of forward and backward give out."""
    kept = case.op.forward(case, tensors)
    return [*kept, *(case.op.backward(case, tensors, kept, kept[0]) if case.op.differentiable else ())]


@over("strides")
def test_output_strides_are_channels_last_only_for_channels_last(place, case):
    """Of everything that the ops give out, also where they are only traced."""
    plain, *others = case.tensors()
    steps = [2 if d == 1 else 1 for d in range(plain.dim())]
    inputs = plain, in_format(plain, torch.channels_last), embedded(plain, [*range(plain.dim())][::-1])
    for x, format in itertools.product((*inputs, embedded(plain, steps=steps)), FORMATS):
        tensors = [x, *(t if t is None else in_format(t, format) for t in others)]
        found = everything(case, tensors)
        assert found[0].stride() == case.op.output_strides(case, x, found[0].shape)
        with FakeTensorMode() as mode:
            fake = everything(case, [t if t is None else mode.from_tensor(t) for t in tensors])
        if case.op.differentiable:
            assert found[len(found) - len(tensors)].stride() == expected_strides(x, x.shape)
        assert [(t.shape, t.dtype, t.stride()) for t in found] == [(t.shape, t.dtype, t.stride()) for t in fake]


@over("parts", "best", formats=FORMATS)
def test_meta_tensors_have_shape_and_strides(place, case, format):
    tensors = case.tensors(format=format)
    y, expected = case(*(t if t is None else t.to("meta") for t in tensors)), case(*tensors)
    assert y.device.type == "meta"
    assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), expected.dtype)


@pytest.mark.skipif(sys.platform != "linux", reason="needs mmap with guard pages")
@pytest.mark.skipif("cpu" not in fastcnn.backends.available(), reason="C++ kernels are not built")
@over("usual", "best")
def test_no_kernel_reads_or_writes_out_of_bounds(place, case):
    """Every tensor lies against a page that must not be touched, in a process of its own."""
    script = Path(__file__).parent / "guard_pages.py"
    run = subprocess.run([sys.executable, script, case.op.name], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-500:] + run.stderr[-2000:]


# -- empty ------------------------------------------------------------------------------------------------------------


@over("empty", formats=FORMATS)
def test_empty_batch_and_empty_maps(place, case, format):
    tensors = case.tensors(format=format)
    if not case.op.differentiable:
        case.op.check(place, case, tensors)
        return
    results = place.run(case, tensors)
    # torch pools and convolves no empty maps, and neither do we
    empty_maps = 0 in tensors[0].shape[1:]
    expected = tensors[0] if empty_maps else case.counterpart(*(t if t is None else t.to("meta") for t in tensors))
    assert results.y.shape == expected.shape
    assert results.y.stride() == expected_strides(tensors[0], results.y.shape)
    assert results.gradients[0].shape == tensors[0].shape
    for gradient, t in zip(results.gradients[1:], tensors[1:], strict=True):
        if gradient is not None:
            assert_bitwise(gradient, torch.zeros_like(t))
    assert any(g is not None for g in results.gradients[1:]) != (case.frozen or all(t is None for t in tensors[1:]))


# -- deterministic ----------------------------------------------------------------------------------------------------


@over("bits", "kernels", formats=FORMATS)
def test_same_bits_in_every_run_and_for_every_number_of_threads(place, case, format, threads):
    tensors = case.tensors(format=format)
    threads(2)
    first = place.run(case, tensors)
    for count in (2, 1, 3) if case.op.ignores_threads(place) else (2, 2):
        threads(count)
        for again, before in zip(place.run(case, tensors, first.dy).bits, first.bits, strict=True):
            assert_bitwise(again, before)


@over()
def test_many_python_threads_at_once(place, case):
    drawn = [case.tensors(seed=seed) for seed in range(8)] * 4
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda tensors: place.run(case, tensors), drawn))
    for results, tensors in zip(together, drawn, strict=True):
        case.op.assert_same(place, results.bits, place.run(case, tensors).bits)


# -- little memory ----------------------------------------------------------------------------------------------------


def kept_storages(run):
    """What ``run`` gives, and by their addresses the sizes of the storages that autograd keeps."""
    storages = {}

    def pack(t):
        if t.numel():
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        return run(), storages


@over("kept", dtypes=DTYPES, formats=FORMATS)
def test_backward_keeps_little(place, case, dtype, format):
    """Tensors of the call, no copies of them, and of its own no byte more than the record says."""
    tensors = case.leaves(case.tensors(dtype, format))
    y, storages = kept_storages(lambda: case(*tensors))
    theirs, own = case.op.keeps(case, tensors, y)
    addresses = {t.untyped_storage().data_ptr() for t in theirs}
    assert addresses <= storages.keys()
    assert sum(size for address, size in storages.items() if address not in addresses) == own


@over()
def test_nothing_is_kept_and_nothing_computed_for_it_without_gradient(place, case):
    tensors = case.tensors()
    runs = [
        (tensors, torch.enable_grad()),
        (case.leaves(tensors), torch.no_grad()),
        (tensors, torch.inference_mode()),
    ]
    for args, mode in runs:
        with mode, recorded_calls() as calls:
            y, storages = kept_storages(lambda args=args: case(*args))
        assert not y.requires_grad
        assert not storages
        ((name, outputs),) = calls
        assert name == f"fastcnn.{case.op.name}.default"
        assert sum(t.numel() > 0 for t in tree_leaves(outputs)[1:]) == case.op.also_returns(case)


@over()
def test_a_call_is_one_op(place, case):
    name, backward = case.op.name, case.op.differentiable
    with recorded_calls() as calls:
        y = case(*case.leaves(case.tensors()))
        if backward:
            y.sum().backward()
    expected = [f"fastcnn.{name}.default", f"fastcnn.{name}_backward.default"]
    assert [called for called, _ in calls] == expected[: 1 + backward]


@over()
def test_any_subset_of_gradients(place, case):
    count = len(case.shapes)
    for wanted in itertools.chain.from_iterable(itertools.combinations(range(count), n) for n in range(1, count + 1)):
        tensors = case.tensors()
        ours, theirs = ([leaf(t) if i in wanted else t for i, t in enumerate(tensors)] for _ in range(2))
        y, expected = case(*ours), case.counterpart(*theirs)
        dy = case.op.draw_gradient(y)
        found = gradients(y, asked(ours), dy)
        torch.testing.assert_close(found, gradients(expected, asked(theirs), dy), rtol=1e-4, atol=1e-4)


# -- composes ---------------------------------------------------------------------------------------------------------


@over("opcheck", "each", formats=FORMATS)
def test_opcheck(place, case, format):
    assert_passes_opcheck(case, torch.float32, format)


@over("dtypes", "best", dtypes=[torch.float64, *NARROW], formats=FORMATS)
def test_opcheck_of_other_dtypes(place, case, dtype, format):
    assert_passes_opcheck(case, dtype, format)


def assert_passes_opcheck(case, dtype, format):
    """All of it in float32, else only what depends on the dtype; backward's own gradient in float64, as it is exact."""
    op, tensors = case.op, case.tensors(dtype, format)
    options = {"rtol": 1e-2, "atol": 1e-2} if dtype in NARROW else {}
    if dtype != torch.float32:
        options["test_utils"] = ("test_schema", "test_faketensor")
    torch.library.opcheck(op.op, op.forward_args(case, case.leaves(tensors)), **options)
    if not op.differentiable:
        return
    kept = op.forward(case, tensors)
    dy = randn(*kept[0].shape, dtype=dtype, seed=1)
    torch.library.opcheck(op.backward_op, op.backward_args(case, tensors, kept, dy), **options)
    if dtype == torch.float64:
        leaves = case.leaves(tensors)
        torch.library.opcheck(op.backward_op, op.backward_args(case, leaves, kept, leaf(dy)))


@over("gradcheck", "each")
def test_gradcheck_and_gradgradcheck(place, case):
    tensors = case.leaves(case.apart())
    if case.op.exact is False:
        assert case(*tensors).ne(0).double().mean() not in (0, 1)
    varied = [t for t in tensors if t is not None and t.requires_grad]

    def run(*varied):
        given = iter(varied)
        return case(*(t if t is None or not t.requires_grad else next(given) for t in tensors))

    batched = tensors[0].numel() > 0
    torch.autograd.gradcheck(run, varied, check_batched_grad=batched)
    if run(*varied).grad_fn.name() != "CopyBackwards":
        torch.autograd.gradgradcheck(run, varied, check_batched_grad=batched)


def layer_and_inputs(case):
    """A layer of the case, and the tensors that it is called with, as leaves."""
    tensors = case.tensors()[: case.op.layer_inputs]
    return case.layer(), [leaf(t) for t in tensors] if case.op.differentiable else tensors


def assert_same_outputs_and_gradients(place, case, outputs, expected, ours, theirs):
    """With respect to the tensors ``ours`` and ``theirs``, if there are gradients."""
    (y, *others), (z, *expected_others) = tree_leaves(outputs), tree_leaves(expected)
    dy = randn(*z.shape, seed=2)
    case.op.assert_same(place, [y.detach(), *others], [z.detach(), *expected_others])
    assert y.stride() == z.stride()
    if not case.op.differentiable:
        return
    case.op.assert_same(place, gradients(y, asked(ours), dy), gradients(z, asked(theirs), dy))


@over("compile", "best")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_without_graph_break(place, case, dynamic):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = case.layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=counter)
    compilations = []
    for batch, width in [(2, 5), (3, 7), (4, 9)]:
        _, inputs = layer_and_inputs(case.op.varied(case, batch, width))
        outputs, expected, tensors = compiled(*inputs), layer(*inputs), [*inputs, *layer.parameters()]
        assert_same_outputs_and_gradients(place, case, outputs, expected, tensors, tensors)
        with torch.no_grad():
            case.op.assert_same(place, tree_leaves(compiled(*inputs)), tree_leaves(layer(*inputs)))
        compilations.append(counter.frame_count)
    if dynamic:
        assert compilations[0] == compilations[-1]  # other sizes run what was compiled for the first


@pytest.mark.slow
@over("usual", "best")
def test_compile_with_inductor(place, case):
    torch._dynamo.reset()

    def stage(x, *others):
        return case(x * 2, *others) + 1

    tensors = case.leaves(case.tensors(format=torch.channels_last))
    y, expected = torch.compile(stage, fullgraph=True)(*tensors), stage(*tensors)
    dy = randn(*y.shape, seed=2)
    torch.testing.assert_close(y, expected)
    if not case.op.differentiable:
        return
    torch.testing.assert_close(gradients(y, asked(tensors), dy), gradients(expected, asked(tensors), dy))


@over("export", "best")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export_with_gradients(place, case, strict, grad):
    """Also where none, or others, were asked for when the program was exported: what is kept then is not enough."""
    layer, inputs = layer_and_inputs(case)
    batch = ({0: torch.export.Dim("batch", min=1, max=64)}, *[None] * (len(inputs) - 1))
    example = tuple(t.requires_grad_(grad) for t in inputs)
    exported = torch.export.export(layer, example, dynamic_shapes=batch, strict=strict).module()
    for module in (layer, exported):
        module.requires_grad_()
    for n in (2, 3):
        tensors = [leaf(t) for t in case.tensors(seed=n)[1 : case.op.layer_inputs]]
        tensors = [leaf(case.op.draw(replaced(case, n), torch.float32, case.format, n)[0]), *tensors]
        theirs = dict(layer.named_parameters())
        ours = dict(exported.named_parameters())
        assert_same_outputs_and_gradients(
            place,
            case,
            exported(*tensors),
            layer(*tensors),
            [*tensors, *(ours[name] for name in theirs)],
            [*tensors, *theirs.values()],
        )


def replaced(case, batch):
    """The case with another number of images."""
    (_, *image), *others = case.shapes
    return replace(case, shapes=((batch, *image), *others))


@over("usual", "each", dtypes=DTYPES)
def test_autocast_keeps_the_dtype_of_the_input(place, case, dtype):
    tensors = case.leaves(case.tensors(dtype))
    expected = case(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        y = case(*tensors)
        inside = gradients(y, asked(tensors), y.detach()) if case.op.differentiable else []
    assert y.dtype == dtype
    assert_bitwise(y.detach(), expected.detach())
    if not case.op.differentiable:
        return
    case.op.assert_same(place, inside, gradients(expected, asked(tensors), expected.detach()))


def batched(case, in_dims):
    """Arguments of a vmapped call, and those of the three calls that it stands for."""
    single = [case.tensors(seed=10 * i) for i in range(3)]
    single = [[f if d is None else t for f, t, d in zip(single[0], s, in_dims, strict=True)] for s in single]
    args = [
        column[0] if d is None else torch.stack(column, d)
        for column, d in zip(zip(*single, strict=True), in_dims, strict=True)
    ]
    return args, single


@over("vmap", "each")
@pytest.mark.parametrize("out_dim", [0, 2])
def test_vmap(place, case, out_dim):
    for in_dims in case.op.mapped(case):
        args, single = batched(case, in_dims)
        y = torch.func.vmap(case, in_dims, out_dim)(*args)
        expected = torch.stack([case(*tensors) for tensors in single], out_dim)
        torch.testing.assert_close(y, expected, msg=lambda text, in_dims=in_dims: f"{in_dims=}: {text}")


@over("vmap", "each")
@pytest.mark.parametrize("dy_dim", [None, 0, -1], ids=str)
def test_vmap_of_backward(place, case, dy_dim):
    """Of every choice of the tensors whose gradients are asked for."""
    count = len(case.shapes)
    choices = [c for n in range(1, count + 1) for c in itertools.combinations(range(count), n)]
    for in_dims, wanted in itertools.product([(None,) * count, *case.op.mapped(case)], choices):
        if dy_dim is None and not any(d is not None for d in in_dims):
            continue
        args, single = batched(case, in_dims)
        dys = [case.op.draw_gradient(case(*single[0])) * (1 + i) for i in range(3)]
        dy = dys[0] if dy_dim is None else torch.stack(dys, dy_dim)

        def vjp(dy, *tensors, wanted=wanted):
            def run(*varied):
                given = dict(zip(wanted, varied, strict=True))
                return case(*(given.get(i, t) for i, t in enumerate(tensors)))

            return torch.func.vjp(run, *(tensors[i] for i in wanted))[1](dy)

        together = torch.func.vmap(vjp, (dy_dim, *in_dims))(dy, *args)
        one_by_one = [vjp(dys[0] if dy_dim is None else d, *tensors) for d, tensors in zip(dys, single, strict=True)]
        for ours, expected in zip(together, zip(*one_by_one, strict=True), strict=True):
            torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-5, atol=1e-5)


@over("transforms", "each")
def test_func_transforms_nest(place, case):
    x, *others = case.apart()
    many = torch.stack([x, *(case.apart()[0].roll(i, -1) for i in (1, 2))])
    tensors, func = [x, *others], torch.func
    every = tuple(range(len(tensors)))

    def of(run):
        def loss(*tensors):
            return (run(*tensors) ** 3).sum()

        def twice(*tensors):
            return sum(g.pow(2).sum() for g in func.grad(loss, every)(*tensors))

        return [
            *func.grad(loss, every)(*tensors),
            func.vmap(func.grad(loss), (0, *[None] * len(others)))(many, *others),
            *func.grad(twice, every)(*tensors),
            func.vmap(func.grad(twice), (0, *[None] * len(others)))(many, *others),
            func.vmap(func.vmap(lambda x: run(x[None], *others)))(many),
            *func.jacrev(run, every)(*tensors),
        ]

    torch.testing.assert_close(of(case), of(case.counterpart))


@over("parts", "each")
def test_double_backward_is_that_of_torch(place, case):
    tensors = case.apart()

    def twice(run):
        inputs = case.leaves(tensors)
        y = run(*inputs)
        dy = leaf(randn(*y.shape, dtype=torch.float64, seed=1))
        varied = [t for t in inputs if t is not None and t.requires_grad]
        firsts = torch.autograd.grad(y, varied, dy, create_graph=True)
        cotangents = [randn(*t.shape, dtype=torch.float64, seed=2 + i) for i, t in enumerate(varied)]
        return torch.autograd.grad(firsts, (*varied, dy), cotangents, allow_unused=True, materialize_grads=True)

    for ours, theirs in zip(twice(case), twice(case.counterpart), strict=True):
        assert_same_answer(ours, theirs, backward=True)


@over("usual", "each")
def test_checkpointing_and_retained_graphs(place, case):
    tensors = case.leaves(case.tensors())
    varied = [t for t in tensors if t is not None and t.requires_grad]
    y = case(*tensors)
    dy = randn(*y.shape, seed=2)
    first = torch.autograd.grad(y, varied, dy, retain_graph=True)
    again = torch.utils.checkpoint.checkpoint(case, *tensors, use_reentrant=False)
    for second in (torch.autograd.grad(y, varied, dy), torch.autograd.grad(again, varied, dy)):
        for a, b in zip(second, first, strict=True):
            assert_bitwise(a, b)


@over("usual", "each")
def test_change_in_place_before_backward(place, case):
    """Of a tensor that backward needs, it is an error; of any other, no matter: even where torch's would refuse."""
    for changed in range(len(case.shapes)):
        outer = case.leaves(case.tensors())
        inner = [t * 1 if t.requires_grad else t.clone() for t in outer]
        y = case(*inner)
        dy = torch.ones_like(y)
        expected = gradients(case.counterpart(*outer), asked(outer), dy)
        with torch.no_grad():
            inner[changed].mul_(2)
        kept, _ = case.op.keeps(case, inner, y)
        if any(t is inner[changed] for t in kept):
            with pytest.raises(RuntimeError, match="inplace"):
                gradients(y, asked(outer), dy)
        else:
            torch.testing.assert_close(gradients(y, asked(outer), dy), expected, rtol=1e-4, atol=1e-4)


# -- the layer --------------------------------------------------------------------------------------------------------


@over("layer", "each")
def test_layer_survives_pickling_and_deepcopy(place, case):
    layer, inputs = layer_and_inputs(case)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_bitwise(twin(*inputs), layer(*inputs))
        assert repr(twin) == repr(layer)


# -- bad input --------------------------------------------------------------------------------------------------------


def refused(case, error, match, *tensors):
    """By exactly this type of exception."""
    with pytest.raises(error, match=match) as ours:
        case(*tensors)
    assert ours.type is error


@over("one", "each")
def test_wrong_rank_raises_as_torch(place, case):
    _, *others = case.tensors()
    error, match = case.op.rank_error
    for shape in case.op.wrong_ranks:
        with pytest.raises(error):
            case.counterpart(torch.zeros(shape), *others)
        refused(case, error, match.format(len(shape)), torch.zeros(shape), *others)


@over("one", "each")
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.complex64, torch.float8_e4m3fn, torch.int64, torch.uint8], ids=ident
)
def test_other_dtypes_raise(place, case, dtype):
    """As torch's counterpart does, if it lacks them too."""
    dtype = torch.float32 if dtype in case.op.input_dtypes else dtype
    x, *others = case.tensors()
    tensors = [torch.ones(x.shape).to(dtype), *others]
    if case.op.differentiable:
        tensors = [t if t is None else torch.ones(t.shape).to(dtype) for t in case.tensors()]
    if dtype in case.op.torch_runs:
        assert_bitwise(case(*tensors), case.counterpart(*tensors))
        return
    if dtype not in case.op.only_torch_has:
        with pytest.raises(NotImplementedError):
            case.counterpart(*tensors)
    refused(case, NotImplementedError, f"input of dtype {dtype}; allowed are float16|not implemented for", *tensors)


@over("one", "each")
def test_sparse_input_raises(place, case):
    x, *others = case.tensors()
    refused(case, NotImplementedError, r"layout torch\.strided, got torch\.sparse_coo", x.to_sparse(), *others)


@over("one", "each")
@pytest.mark.parametrize("value", [[1.0], None, 3.0], ids=ident)
def test_input_that_is_no_tensor_raises_as_torch(place, case, value):
    _, *others = case.tensors()
    with pytest.raises((TypeError, AttributeError)):  # torch's LRN does not look what it gets
        case.counterpart(value, *others)
    refused(case, TypeError, rf"argument 'input' must be Tensor, not {type(value).__name__}", value, *others)
