"""The zoo: networks as users bring them, to see whether optimize() makes any of them slower than PyTorch has it.

Its modes: "inference" is a forward without gradients, "training" forward, loss and backward, without an update. The
networks are of torch's layers and in NCHW. Their dropout has p=0.
"""

import gc
import importlib.util
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import __version__, backends, models
from ..optimize import optimize
from .cases import ANY_FORMAT, Case
from .environment import sources_digest
from .measure import Budget, measure
from .network_workload import NetworkWorkload
from .providers import NetworkProvider, optimized_for_inference
from .rows import EAGER, Row
from .workload import Mismatch, Yardstick, reason

ZOO_MODES = ("inference", "training")
BATCHES, SIZES = (1, 4, 16), (224, 64, 32)
OWN_SIZE = 224  # stands for that of a network which has another
TORCHVISION = ("alexnet", "vgg16", "vgg16_bn", "squeezenet1_0", "googlenet", "resnet18")
_SAMPLED = 8  # of so many cases ``quick`` takes one


@dataclass(frozen=True)
class ZooNetwork:
    """A network.

    Args:
        make: height and width of the images -> the network.
        size: what it takes in place of OWN_SIZE.
    """

    make: Callable[[int], nn.Module]
    size: int = OWN_SIZE


@dataclass(frozen=True)
class ZooCase:
    """A network in a mode, with its images, on a number of threads."""

    case: Case
    threads: int

    def __str__(self) -> str:
        batch, _, size, _ = self.case.shape
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.case.op} {self.case.mode}, {size} px, batch {batch}, {threads}"


@dataclass
class ZooResult:
    """Rows of a case, the versions that they are of, and the command that measured them."""

    case: ZooCase
    rows: list[Row]
    command: str = ""
    torch: str = torch.__version__
    fastcnn: str = __version__
    sources: str | None = field(default_factory=sources_digest)

    def ratio(self, provider: str = "fastcnn") -> float | None:
        """How many times faster a provider is than the faster of PyTorch's two memory formats; None without a time."""
        ms = {row.provider: row.median_ms for row in self.rows if row.median_ms is not None}
        eager = [ms[name] for name in EAGER if name in ms]
        return min(eager) / ms[provider] if eager and provider in ms else None

    @property
    def lost(self) -> bool:
        """Whether PyTorch runs the case and fastcnn does not, or not right."""
        timed = {row.provider for row in self.rows if row.median_ms is not None}
        return bool(timed & set(EAGER)) and "fastcnn" not in timed


def torchvision_networks() -> dict[str, ZooNetwork]:
    """Those of torchvision; ImportError where it is not installed."""
    from torchvision import models as theirs

    def make(name: str, size: int) -> nn.Module:
        options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
        network = theirs.get_model(name, weights=None, **options)
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        return network

    return {name: ZooNetwork(partial(make, name)) for name in TORCHVISION}


def inception() -> ZooNetwork:
    """Ours, with LRN."""
    return ZooNetwork(lambda size: models.create_model("inception_v1", plain=True, init="kaiming", input_size=size))


def networks_of(file: Path) -> dict[str, ZooNetwork]:
    """Those of a Python file: ``NETWORKS = {name: (factory, size)}``, where the factory takes no arguments."""
    name = f"fastcnn_zoo_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where TorchDynamo looks for it
    spec.loader.exec_module(module)

    def make(factory: Callable[[], nn.Module], size: int) -> nn.Module:
        return factory()

    return {name: ZooNetwork(partial(make, factory), size) for name, (factory, size) in module.NETWORKS.items()}


def select_zoo(
    networks: dict[str, ZooNetwork],
    *,
    threads: Collection[int],
    modes: Collection[str] = (),
    batches: Collection[int] = (),
    sizes: Collection[int] = (),
    quick: bool = False,
) -> list[ZooCase]:
    """The grid; with ``quick`` a sample of it, always the same, with each network in each mode."""
    selected: list[ZooCase] = []
    for group, (name, mode) in enumerate(product(networks, modes or ZOO_MODES)):
        sides = dict.fromkeys(networks[name].size if size == OWN_SIZE else size for size in sizes or SIZES)
        cases = [
            ZooCase(Case(name, (batch, 3, side, side), "fp32", ANY_FORMAT, mode), count)
            for side, batch, count in product(sides, batches or BATCHES, threads)
        ]
        selected += cases[group % min(_SAMPLED, len(cases)) :: _SAMPLED] if quick else cases
    return selected


def zoo_providers(mode: str, compile: bool) -> list[NetworkProvider]:
    """Who takes part, with ``compile`` also torch.compile, for inference with freezing."""
    plain = partial(optimize, inplace=True)
    every = [NetworkProvider("fastcnn", optimize=optimized_for_inference if mode == "inference" else plain)]
    if mode == "inference":
        every.append(NetworkProvider("fastcnn plain", optimize=plain))
    every += [NetworkProvider(EAGER[0]), NetworkProvider(EAGER[1], channels_last=True)]
    if compile:
        every.append(NetworkProvider("torch.compile", channels_last=True, compile=True))
    return every


class ZooWorkload(NetworkWorkload):
    """A network without dropout, and with batch norms that have statistics and parameters.

    As batch norms are made they do nothing, and could be left out unseen.
    """

    measures_memory = False

    def __init__(self, case: Case, network: ZooNetwork) -> None:
        self.network = network
        super().__init__(case)

    def make(self) -> tuple[nn.Module, nn.Module]:
        made = self.network.make(self.case.shape[-1]).eval()
        for layer in made.modules():
            if isinstance(layer, nn.Dropout | nn.Dropout2d):
                layer.p = 0.0
            if isinstance(layer, nn.BatchNorm2d):
                for tensor in _present(layer.running_mean, layer.bias):
                    nn.init.normal_(tensor)
                for tensor in _present(layer.running_var, layer.weight):
                    nn.init.uniform_(tensor, 0.5, 1.5)
        return made, made

    def classes(self) -> int:
        with torch.no_grad():
            return self.plain(self.x[:1]).shape[1]

    def count_flop(self) -> int | None:
        return None

    def yardsticks(self) -> dict[str, Yardstick]:
        return {}


def measure_zoo(
    case: ZooCase, network: ZooNetwork, providers: Iterable[NetworkProvider], budget: Budget, command: str = ""
) -> ZooResult:
    """A row for each provider: checked, and if right then timed. Where the network itself fails, so do they all."""
    providers = list(providers)
    with _alone(case.threads):
        try:
            rows = measure([case.case], partial(ZooWorkload, network=network), providers, budget, why=_why)
        except Exception as error:
            rows = [Row(**asdict(case.case), provider=one.name, failure=_why(error)) for one in providers]
        return ZooResult(case, rows, command)


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


@contextmanager
def _alone(threads: int) -> Iterator[None]:
    """Run a case on this many threads, after which nothing of it is left in memory."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.compiler.reset()
        gc.collect()
        backends.release_memory()


def _why(error: Exception) -> str:
    return f"{'wrong' if isinstance(error, Mismatch) else 'cannot run'}: {reason(error)}"
