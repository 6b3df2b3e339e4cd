"""Which backend runs, and what is said about those that cannot."""

import functools
import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from promises import assert_bitwise, randn

import fastcnn
import fastcnn.functional as FF
from fastcnn import backends

needs_cpu = pytest.mark.skipif("cpu" not in backends.available(), reason="C++ kernels are not built")


def python(code, **environment):
    """Run ``code`` in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def kernels_run_by(call):
    with torch.autograd.profiler.profile(use_cpu=True) as profile:
        call()
    return [event.name for event in profile.function_events if event.name.startswith("fastcnn_cpu::")]


def which(op="lrn", tensor=None):
    return backends.choose(op, ("reference", "cpu"), torch.zeros(1) if tensor is None else tensor)


def test_reference_is_always_available():
    assert backends.available()[0] == "reference"
    assert set(backends.status()) == set(backends.NAMES)
    assert all(backends.status()[name] for name in backends.NAMES if name not in backends.available())


@needs_cpu
def test_cpu_tensors_run_the_cpp_kernels_by_default():
    assert which() == "cpu"
    x = randn(1, 3, 2, 2)
    assert kernels_run_by(lambda: FF.local_response_norm(x, 3)) == ["fastcnn_cpu::lrn"]
    assert kernels_run_by(lambda: FF.relu_lrn_max_pool2d(x)) == ["fastcnn_cpu::relu_lrn_max_pool2d"]


def test_forced_reference_runs_no_kernel():
    with backends.use("reference"):
        assert not kernels_run_by(lambda: FF.local_response_norm(randn(1, 3, 2, 2), 3))


@needs_cpu
def test_use_nests_and_ends_with_its_block():
    with backends.use("reference"):
        assert which() == "reference"
        with backends.use("cpu"):
            assert which() == "cpu"
            with backends.use(None):
                assert which() == "cpu"
        assert which() == "reference"
        with pytest.raises(KeyError), backends.use("cpu"):
            raise KeyError
        assert which() == "reference"
    assert which() == "cpu"


@needs_cpu
def test_use_without_a_block_lasts():
    backends.use("reference")
    try:
        assert which() == "reference"
    finally:
        backends.use(None)
    assert which() == "cpu"


def test_unknown_backend_raises_and_changes_nothing():
    with backends.use("reference"):
        with pytest.raises(ValueError, match=r"unknown backend 'bogus'; allowed are reference, cpu, triton, cuda"):
            backends.use("bogus")
        assert which() == "reference"


@pytest.mark.parametrize("name", [name for name in backends.NAMES if name not in backends.available()])
def test_backend_that_cannot_run_raises_and_says_why(name):
    with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run here: .*Available are reference"):
        backends.use(name)


@needs_cpu
def test_forced_backend_that_cannot_run_on_the_device_raises():
    with backends.use("cpu"), pytest.raises(RuntimeError, match="'cpu' cannot run on meta tensors; reference can"):
        which(tensor=torch.zeros(1, device="meta"))


def test_backend_from_the_environment():
    run = python("import fastcnn.backends as b, torch; print(b.choose('lrn', ('reference', 'cpu'), torch.zeros(1)))",
                 FASTCNN_BACKEND="reference")  # fmt: skip
    assert run.stdout.strip() == "reference", run.stderr


@pytest.mark.parametrize(
    ("name", "error"),
    [("bogus", "ValueError: unknown backend 'bogus'; allowed are reference"), ("cuda", "RuntimeError: backend 'cuda'")],
)
def test_bad_backend_in_the_environment_raises_on_import(name, error):
    if name in backends.available():
        pytest.skip(f"{name} can run here")
    run = python("import fastcnn", FASTCNN_BACKEND=name)
    assert run.returncode != 0
    assert error in run.stderr


def test_without_the_cpp_library_it_says_so_once_and_runs_in_plain_pytorch(monkeypatch):
    monkeypatch.setattr(backends, "_C", None)
    monkeypatch.setattr(backends, "_why_no_cpu", "there is no compiler")
    monkeypatch.setattr(backends, "_warned", set())
    x = randn(1, 3, 4, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = FF.local_response_norm(x, 3), FF.local_response_norm(x, 3)
        FF.relu_lrn_max_pool2d(x)
    assert [str(w.message) for w in caught] == ["fastcnn runs in plain PyTorch: there is no compiler"]
    assert issubclass(caught[0].category, UserWarning)
    assert "cpu" not in backends.available()
    assert_bitwise(first, fastcnn.reference.local_response_norm(x, 3))
    assert_bitwise(second, first)
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run here: there is no compiler"):
        backends.use("cpu")


def test_without_the_cpp_library_the_package_imports_and_computes():
    """As after FASTCNN_BUILD_CPP=0: there is no fastcnn._C to import."""
    run = python(
        "import sys; sys.modules['fastcnn._C'] = None\n"
        "import torch, fastcnn, fastcnn.functional as FF\n"
        "x = torch.randn(1, 3, 4, 4, requires_grad=True)\n"
        "FF.relu_lrn_max_pool2d(x, lrn=fastcnn.LRNParams(3), pool=fastcnn.PoolParams(2)).sum().backward()\n"
        "print(fastcnn.backends.available(), x.grad.shape)"
    )
    assert run.stdout.strip() == "('reference',) torch.Size([1, 3, 4, 4])", run.stderr
    assert run.stderr.count("fastcnn runs in plain PyTorch") == 1


# -- CPU capabilities -------------------------------------------------------------------------------------------------


@needs_cpu
def test_best_cpu_capability_is_the_default():
    library = backends._C
    assert "baseline" in library.cpu_capabilities()
    if os.environ.get("FASTCNN_CPU_CAPABILITY"):
        pytest.skip("FASTCNN_CPU_CAPABILITY is set")
    assert library.cpu_capability() == library.cpu_capabilities()[-1]


@needs_cpu
def test_each_cpu_capability_can_be_chosen_and_runs_its_own_kernels():
    library, x = backends._C, randn(2, 17, 5, 7)
    best = library.cpu_capability()
    try:
        for name in library.cpu_capabilities():
            library.set_cpu_capability(name)
            assert library.cpu_capability() == name
            torch.testing.assert_close(FF.local_response_norm(x, 5), fastcnn.reference.local_response_norm(x, 5))
    finally:
        library.set_cpu_capability(best)


@needs_cpu
def test_unknown_cpu_capability_raises():
    with pytest.raises(ValueError, match=r"CPU capability 'bogus' is not available; allowed here are baseline"):
        backends._C.set_cpu_capability("bogus")


@needs_cpu
def test_cpu_capability_from_the_environment():
    code = "from fastcnn import backends; print(backends._C.cpu_capability())"
    assert python(code, FASTCNN_CPU_CAPABILITY="baseline").stdout.strip() == "baseline"
    run = python(code, FASTCNN_CPU_CAPABILITY="bogus")
    assert run.returncode > 0  # an exception, not an abort
    assert "CPU capability 'bogus' is not available" in run.stderr


# -- CUDA -------------------------------------------------------------------------------------------------------------


class CudaTensor(torch.Tensor):
    """Says that it is on a GPU, which is all that the choice of a backend looks at."""

    device = torch.device("cuda", 0)


@pytest.fixture
def cuda_library(monkeypatch):
    """As if torch had CUDA and the library were loaded, built for sm_80 and sm_90: an H100 and a driver for 13.1."""
    library = SimpleNamespace(
        driver_version=lambda: 13010,
        runtime_version=lambda: 13000,
        build_info=lambda: {"architectures": "sm_80, sm_90"},
    )
    monkeypatch.setattr(backends, "_C_cuda", library)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    caches = (backends._why_no_cuda, backends._why_no_triton)
    for cache in caches:
        cache.cache_clear()
    yield library
    for cache in caches:
        cache.cache_clear()


def test_the_faster_language_of_a_tensor_of_about_this_size_runs(cuda_library, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    rows = [
        ["lrn", "float32", False, 2**22, "triton", "measured"],
        ["lrn", "float32", False, 2**26, "cuda", "predicted"],
        ["lrn", "float32", True, 2**22, "cuda", "predicted"],
    ]
    (tmp_path / "faster.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(backends, "_FASTER", tmp_path / "faster.json")
    for cached in ("_sizes", "_faster"):
        monkeypatch.setattr(backends, cached, functools.cache(getattr(backends, cached).__wrapped__))
    triton = "cuda" if backends.INTERPRETING else "triton"

    def chosen(op, images, **options):
        x = torch.empty(images, 16, 256, 256, **options).as_subclass(CudaTensor)
        return backends.choose(op, ("reference", "cpu", "triton", "cuda"), x)

    assert [chosen("lrn", images) for images in (1, 2, 4, 8, 64)] == [triton, triton, triton, triton, "cuda"]
    assert chosen("lrn", 4, memory_format=torch.channels_last) == "cuda"
    assert chosen("lrn", 4, dtype=torch.float64) == "cuda"  # of which nothing is known
    assert chosen("max_pool2d", 4) == "cuda"
    assert chosen("conv2d_relu", 4) == triton  # and cuDNN
    small = torch.empty(2**20 - 1).as_subclass(CudaTensor)  # where the host's time counts
    assert backends.choose("lrn", ("triton", "cuda"), small) == "cuda"


@pytest.mark.parametrize("op", ["lrn", "lrn_backward", "max_pool2d", "max_pool2d_backward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("channels_last", [False, True])
def test_something_is_known_of_every_operator(op, dtype, channels_last):
    rows = json.loads(backends._FASTER.read_text())["rows"]
    assert [op, str(dtype).removeprefix("torch."), channels_last] in [row[:3] for row in rows]


def test_driver_that_is_too_old_is_named(cuda_library):
    cuda_library.driver_version = lambda: 12080
    why = backends.why_not("cuda", torch.device("cuda", 0))
    assert why.startswith("the NVIDIA driver is made for CUDA 12.8, and the library needs one for 13.0 or later")


def test_gpu_that_the_library_was_not_built_for_is_named(cuda_library, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    why = backends.why_not("cuda", torch.device("cuda", 0))
    assert why == (
        "H100 has compute capability 7.5, and the library was built for sm_80, sm_90; "
        "FASTCNN_CUDA_ARCHS=75 builds it for that"
    )


@pytest.mark.parametrize(
    ("capability", "runs"), [((8, 0), True), ((8, 9), True), ((7, 5), False), ((9, 0), True), ((12, 0), True)]
)
def test_machine_code_runs_on_its_major_version_and_the_last_is_there_for_all_later_ones(capability, runs):
    assert backends._runs_on("sm_80, sm_90", capability) == runs
    assert not backends._runs_on("sm_86", (8, 0))
