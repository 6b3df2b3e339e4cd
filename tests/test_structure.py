"""Imports have one direction and no circles, and CONTRIBUTING's lists of an operator's files are true."""

import ast
import graphlib
import importlib
import re
from pathlib import Path

import pytest

from fastcnn import functional
from fastcnn.ops.register import IMPLEMENTATIONS

ROOT = Path(__file__).parent.parent
OPERATORS = [name for name in IMPLEMENTATIONS if not name.endswith("_backward")]
BACKENDS = {path.parent.name for path in (ROOT / "fastcnn/ops").glob("*/__init__.py")}


def modules():
    """Name -> file of every module of the package."""
    files = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / "fastcnn").rglob("*.py"))
    parts = (
        path.parent.parts if path.name == "__init__" else path.parts for path in files if "kernels" not in path.parts
    )
    return {".".join(p): next(f for f in (path_of(p), path_of((*p, "__init__"))) if f.exists()) for p in parts}


def path_of(parts):
    return ROOT.joinpath(*parts).with_suffix(".py")


def imports(name, file, known):
    """What a module imports of the package when it is itself imported: modules, names taken from them, names here."""
    package = (name if file.name == "__init__.py" else name.rpartition(".")[0]).split(".")
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                module, here = f"{base}.{alias.name}", alias.asname or alias.name
                yield (module, None, here) if module in known else (base, alias.name, here)


@pytest.fixture(scope="module")
def imported():
    known = modules()
    return {name: list(imports(name, file, known)) for name, file in known.items()}


def test_there_are_no_import_circles(imported):
    graph = {name: {module for module, _, _ in found} - {name} for name, found in imported.items()}
    assert len(graph) > 50
    assert graph["fastcnn.ops.lrn"] > {"fastcnn.ops.cpu.lrn", "fastcnn.ops.register"}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_imports_point_downwards(imported):
    """Parameters, then implementations, then the registered operators, then what is built of them."""
    foundation = {
        "fastcnn.params",
        "fastcnn.memory_format",
        "fastcnn.backends",
        "fastcnn.reference",
        "fastcnn._version",
    }
    for name, found in imported.items():
        used = {module for module, _, _ in found}
        if name in foundation:
            assert used <= foundation, name
        elif name.startswith("fastcnn.ops"):
            assert all(module in foundation or module.startswith("fastcnn.ops") for module in used), name
        if name.split(".")[2:3] and name.split(".")[2] in BACKENDS:
            above = {f"fastcnn.ops.{op}" for op in OPERATORS} | {"fastcnn.ops.register"}
            assert not used & above, name


def test_operators_take_no_private_names_from_each_other(imported):
    private = re.compile(r"\b(\w+)\._[^_\W]")
    for name, found in imported.items():
        if not name.startswith("fastcnn.ops"):
            continue
        assert not [taken for _, taken, _ in found if taken and taken.startswith("_") and taken != "__version__"], name
        neighbours = {here for _, taken, here in found if taken is None}
        assert not neighbours.intersection(private.findall(modules()[name].read_text())), name


@pytest.mark.parametrize("op", OPERATORS)
def test_a_backend_is_implemented_in_the_file_of_its_name(op):
    door = importlib.import_module(f"fastcnn.ops.{op}")
    assert set(door.BACKENDS) == set(IMPLEMENTATIONS[op])
    for backend, module in door.BACKENDS.items():
        assert module.__name__ == f"fastcnn.ops.{'aten' if backend == 'reference' else backend}.{op}"
        assert IMPLEMENTATIONS[op][backend] is module.forward


# -- CONTRIBUTING -----------------------------------------------------------------------------------------------------


def checklist(*, cuda):
    """The paths in CONTRIBUTING's tables on adding an operator: first column, new files, with CUDA, files to edit."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index("## Adding an operator") :]
    section = section[: section.index("\n## ", 1)]
    section = section if cuda else section.partition("With CUDA C++ also:")[0]
    return re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)


def steps():
    return [(op, path) for op in OPERATORS for path in checklist(cuda="cuda" in IMPLEMENTATIONS[op])]


def test_an_operator_is_as_many_files_as_the_checklist_says():
    said = re.search(r"They are (\d+) files, with CUDA C\+\+ (\d+);", (ROOT / "CONTRIBUTING.md").read_text())
    assert [int(count) for count in said.groups()] == [len(checklist(cuda=cuda)) for cuda in (False, True)] == [14, 18]


@pytest.mark.parametrize(("op", "path"), steps())
def test_every_path_of_the_checklist_exists_for_every_operator(op, path):
    file = ROOT / path.replace("<op>", op)
    assert file.exists()
    if "<op>" in path:
        return
    public = next(name for name in functional.__all__ if getattr(functional, name).__module__ == f"fastcnn.ops.{op}")
    sources = file.rglob("*.py") if file.is_dir() else [file]
    assert any(re.search(rf"\b({op}|{public})\b", source.read_text()) for source in sources)


@pytest.mark.parametrize("op", OPERATORS)
def test_the_checklist_is_complete(op):
    """Whatever is named after an operator is on it."""
    named = [path for path in ROOT.rglob(f"*{op}*") if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")]
    exact = re.compile(rf"(test_)?{op}(_op)?\.\w+$")
    folders = ("fastcnn", "csrc", "kernels", "tests/ops")
    paths = {path.replace("<op>", op) for path in [*checklist(cuda=True), "tests/ops/test_<op>.py"]}
    for path in named:
        relative = path.relative_to(ROOT).as_posix()
        if relative.startswith(folders) and exact.fullmatch(path.name) and "fastcnn/kernels" not in relative:
            assert relative in paths | {other.replace("<op>", op) for other in OPTIONAL.get(op, set())}


CUDA = "csrc/cuda/fast/<op>.cuh", "csrc/cuda/general/<op>.cuh"
# What some operators have beside the list: glue that CPU and CUDA share, parts of kernels that others use, cuDNN, and
# what draws random choices.
OPTIONAL = {
    "augment": {"csrc/augment_op.h", "fastcnn/data/augment.py"},
    "batch_norm_relu_max_pool2d": {"csrc/batch_norm_relu_max_pool2d_op.h", "csrc/cuda/general/<op>.cuh"},
    "lrn": {"csrc/lrn_op.h", "csrc/cpu/lrn.h", *CUDA},
    "max_pool2d": {"csrc/max_pool2d_op.h", "csrc/cpu/max_pool2d.h", "csrc/cpu/max_pool2d_backward.h", *CUDA},
    "conv2d_relu": {"fastcnn/ops/cudnn/conv2d_relu.py"},
    "relu_lrn_max_pool2d": {"csrc/relu_lrn_max_pool2d_op.h", *CUDA},
}


def test_a_profiler_can_tell_triton_kernels_apart():
    """Each that is launched has a name of its own, which says what it does."""
    launchers = (ROOT / "fastcnn/ops/triton").glob("*.py")
    launched = {name for file in launchers for name in re.findall(r"\w+_kernel\b", file.read_text())}
    defined = [
        node.name
        for file in (ROOT / "kernels").glob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    ]
    assert len(defined) > 10
    assert sorted(defined) == sorted(launched)
