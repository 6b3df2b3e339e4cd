"""The build: with and without compilers, and what a wheel holds."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")


def setup_py(*args, **env):
    command = [sys.executable, "setup.py", "-q", *args]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)


def test_missing_compiler_is_reported_and_left_at_that(tmp_path):
    result = setup_py("build_ext", "--build-lib", str(tmp_path), CXX="no-such-compiler", FASTCNN_BUILD_CPP="")
    assert result.returncode == 0
    assert "no C++ compiler ('no-such-compiler' not found)" in result.stderr
    assert "plain PyTorch" in result.stderr
    assert not list(tmp_path.rglob("_C*"))


def test_missing_compiler_fails_where_the_library_is_asked_for(tmp_path):
    result = setup_py("build_ext", "--build-lib", str(tmp_path), CXX="no-such-compiler", FASTCNN_BUILD_CPP="1")
    assert result.returncode != 0
    assert "FASTCNN_BUILD_CPP=1" in result.stderr


def test_missing_nvcc_fails_where_the_cuda_library_is_asked_for(tmp_path):
    missing = {"CUDACXX": "no-such-nvcc", "CUDA_HOME": "/nowhere"}
    result = setup_py("build_ext", "--build-lib", str(tmp_path), FASTCNN_BUILD_CUDA="1", **missing)
    assert result.returncode != 0
    assert "FASTCNN_BUILD_CUDA=1" in result.stderr


@needs_nvcc
def test_unknown_cuda_architecture_fails_and_says_what_there_is(tmp_path):
    archs = {"FASTCNN_BUILD_CUDA": "1", "FASTCNN_CUDA_ARCHS": "90 5"}
    result = setup_py("build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "temp"), **archs)
    assert result.returncode != 0
    assert "does not compile for ['5']; it offers 75 80" in result.stderr


@needs_nvcc
def test_cuda_library_needs_neither_a_gpu_nor_a_cuda_build_of_torch(tmp_path):
    """It loads and registers its ops beside a CPU build, given the one symbol of torch's CUDA half that it uses."""
    library = ROOT / "fastcnn" / "_C_cuda.abi3.so"
    (tmp_path / "half.c").write_text("int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }")
    subprocess.run(["cc", "-shared", "-fPIC", tmp_path / "half.c", "-o", tmp_path / "half.so"], check=True)
    code = f"""
import ctypes, importlib.util, torch
if torch.version.cuda is None:
    ctypes.CDLL({str(tmp_path / "half.so")!r}, ctypes.RTLD_GLOBAL)
spec = importlib.util.spec_from_file_location("fastcnn._C_cuda", {str(library)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for op in ("lrn", "max_pool2d", "relu_lrn_max_pool2d"):
    for name in (op, f"{{op}}_backward"):
        assert "Tensor(a!) out" in str(getattr(torch.ops.fastcnn_cuda, name).default._schema)
assert "Tensor(a!) out" in str(torch.ops.fastcnn_cuda.conv2d_relu.default._schema)
assert module.runtime_version() >= 12000
assert "sm_" in module.build_info()["architectures"]
if not module.driver_version():
    try:
        module.kernel_attributes()
    except RuntimeError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    if not torch.cuda.is_available():
        assert "cudaError" in result.stdout


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("objdump"), reason="x86-64 and objdump")
def test_only_the_kernels_of_a_capability_have_its_instructions():
    """A function that all compilations share may be linked from any, and must run on every machine."""
    library = ROOT / "fastcnn" / "_C.abi3.so"
    command = ["objdump", "-d", "--no-show-raw-insn", library]
    found, function = {}, ""
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if line.endswith(">:"):
            function = line
        elif register := re.search(r"%[yz]mm", line):
            found.setdefault(register[0], set()).add(function)
    assert set(found) == {"%ymm", "%zmm"}
    assert not [f for f in found["%ymm"] if "7fastcnn4avx2" not in f and "7fastcnn6avx512" not in f]
    assert not [f for f in found["%zmm"] if "7fastcnn6avx512" not in f]


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory):
    """Built apart from what earlier builds left in build/, which setuptools would put into it."""
    target = tmp_path_factory.mktemp("wheel")
    commands = ["egg_info", "--egg-base", target, "build", "--build-base", target / "build"]
    commands += ["bdist_wheel", "--bdist-dir", target / "unpacked", "--dist-dir", target]
    result = setup_py(*map(str, commands), FASTCNN_BUILD_CPP="0")
    assert result.returncode == 0, result.stderr
    return next(target.glob("*.whl"))


def test_wheel_holds_every_package_under_fastcnn(pure_wheel):
    names = zipfile.ZipFile(pure_wheel).namelist()
    sources = [p.relative_to(ROOT).as_posix() for p in (ROOT / "fastcnn").rglob("*.py")]
    sources += [f"fastcnn/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "kernels").rglob("*.py")]
    assert set(sources) <= set(names)
    assert not [n for n in names if n.startswith("kernels/")]
    assert [n for n in names if n.startswith("fastcnn/data/photographs/") and n.endswith(".jpg")]
    assert {"fastcnn/faster.json", "fastcnn/py.typed"} <= set(names)


def test_source_distribution_holds_what_a_build_needs(tmp_path):
    result = setup_py("egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = [ROOT / "csrc", ROOT / "kernels", ROOT / "fastcnn"]
    sources = [p for folder in folders for p in folder.rglob("*") if p.is_file() and p.suffix not in (".so", ".pyc")]
    assert {p.relative_to(ROOT).as_posix() for p in sources} <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names
    assert not [name for name in names if name.endswith(".so")]


def test_without_cpp_the_package_works_and_says_so_once(pure_wheel, tmp_path):
    zipfile.ZipFile(pure_wheel).extractall(tmp_path)
    code = """
import warnings, torch, fastcnn, fastcnn.functional as FF
assert "cpu" not in fastcnn.backends.available()
x = torch.randn(2, 8, 9, 9, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        y = FF.relu_lrn_max_pool2d(x, lrn=fastcnn.LRNParams(5), pool=fastcnn.PoolParams(3, 2))
        y.sum().backward()
    FF.conv2d_relu(x, torch.randn(4, 8, 3, 3))
assert [w.category for w in caught] == [UserWarning], caught
assert "plain PyTorch" in str(caught[0].message)
try:
    fastcnn.backends.use("cpu")
except RuntimeError as error:
    assert "not built" in str(error)
else:
    raise AssertionError
print(fastcnn.__file__)
"""
    # the wheel's files, and nothing of an editable install of the source tree
    isolate = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
"""
    command = [sys.executable, "-c", isolate + code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert str(tmp_path) in result.stdout
