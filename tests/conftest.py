from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING

import promises
import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings
from promises import DRAWN, backends_here, running_on

import fastcnn
from fastcnn.models import convnet

if TYPE_CHECKING:
    from operators import Case
    from places import Place

pytest.register_assert_rewrite(
    "places", "operators", "operator_promises", "kernel_promises", "narrow", "models.onnx_graphs"
)

settings.register_profile(
    "fastcnn",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("deep", settings.get_profile("fastcnn"), derandomize=False, max_examples=2000)
settings.load_profile("fastcnn")


def pytest_configure() -> None:
    if "cpu" not in fastcnn.backends.available() and os.environ.get("FASTCNN_TEST_PURE_PYTHON") != "1":
        raise pytest.UsageError(
            f"{fastcnn.backends.status()['cpu']}. FASTCNN_TEST_PURE_PYTHON=1 tests the pure Python package without it"
        )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Those of the promises that operators share: see ``places.py``."""
    promise = getattr(metafunc.function, "promise", None)
    if promise is not None:
        promise.parametrize(metafunc, metafunc.module.HERE)


def freeze() -> None:
    """The garbage collector skips what is alive by now: the thousands of tests, and what TorchDynamo caches."""
    gc.collect()
    gc.freeze()


pytest_collection_finish = freeze


@pytest.fixture(autouse=True, scope="module")
def frozen() -> Iterator[None]:
    yield
    freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Where a promise is kept; in use."""
    with request.param.in_use():
        yield request.param


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    """A promise's case, for the dtype and memory format of the test."""
    given = request.node.callspec.params
    return request.param.op.in_form(request.param, given.get("dtype"), given.get("format"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    DRAWN.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure is told together with the inputs that the test drew."""
    report = yield
    if report.failed and DRAWN:
        report.sections.append(("Drawn", "\n".join(DRAWN)))
    return report


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Every test runs in torch's deterministic mode, which fills each new tensor with NaN: unwritten outputs show."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=backends_here())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that runs here on CPU tensors, the C++ kernels once for each CPU capability."""
    with running_on(request.param):
        yield request.param


@pytest.fixture(params=backends_here()[1:] or backends_here())
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """The C++ kernels at each CPU capability, plain PyTorch only where they are not built: for long lists of sizes."""
    with running_on(request.param):
        yield request.param


@pytest.fixture(params=dict.fromkeys(name.partition("-")[0] for name in backends_here()))
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend once, the C++ kernels at their best capability: for what does not depend on the kernels."""
    with running_on(request.param):
        yield request.param


@pytest.fixture
def best_backend() -> Iterator[str]:
    """What runs on CPU tensors by default, and no warning where that is plain PyTorch."""
    name = backends_here()[-1].partition("-")[0]
    with running_on(name):
        yield name


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of torch's threads, and puts it back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What fastcnn logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fastcnn").addHandler(handler)
    yield lines
    logging.getLogger("fastcnn").removeHandler(handler)


@pytest.fixture
def datasets_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The package datasets caches what it reads for this test alone."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def huge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., torch.Tensor]]:
    """``promises.huge``, in one process at a time."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "huge.lock"):
        yield promises.huge


@pytest.fixture
def small_classifiers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden layers of 64 instead of 4096: most of a network's weights, and most of the time of a test of the rest."""
    build = convnet.build_classifier
    monkeypatch.setattr(
        convnet,
        "build_classifier",
        lambda features, classes, dropout, hidden, **names: build(features, classes, dropout, (64, 64), **names),
    )
