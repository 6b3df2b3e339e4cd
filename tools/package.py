"""Tries what `make wheel` has built: ``python -m tools.package dist``.

The wheel and the source distribution are each installed in a new virtual environment, with nothing but what they ask
for, and used from an empty folder: an operator in C++ against plain PyTorch, and the command, which has an extra.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_CHECK = """
import sys
from importlib.metadata import version
from pathlib import Path

import torch

import fastcnn
from fastcnn import LRNParams, PoolParams, functional

assert "typer" not in sys.modules and "rich" not in sys.modules
package = Path(fastcnn.__file__).parent
assert package.is_relative_to(sys.prefix), package
assert (package / "py.typed").exists() and (package / "kernels" / "lrn.py").exists()
assert version("fastcnn") == fastcnn.__version__
results = {}
for backend in ("cpu", "reference"):
    torch.manual_seed(0)
    x = torch.randn(2, 96, 27, 27, requires_grad=True)
    with fastcnn.backends.use(backend):
        y = functional.relu_lrn_max_pool2d(x, torch.ones(96), lrn=LRNParams(5), pool=PoolParams(3, 2))
        y.square().sum().backward()
    results[backend] = y, x.grad
torch.testing.assert_close(results["cpu"], results["reference"])
library = Path(fastcnn.backends._C.__file__).name
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}: {library}, {fastcnn.backends.cpu_capability()}")
"""


def _try(python: str, torch: str, archive: Path, *needs: str) -> None:
    """Install the archive for this Python, with what it ``needs`` to be built, and use it."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": "", "FASTCNN_BUILD_CPP": "1", "FASTCNN_BUILD_CUDA": "0"}
        subprocess.run([python, "-m", "venv", f"{folder}/venv"], check=True)
        there = f"{folder}/venv/bin/python"
        pip = [there, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, torch, *needs], check=True)
        subprocess.run([*pip, "--no-build-isolation", torch, str(archive)], env=environment, check=True)
        print(f"{archive.name}: ", end="", flush=True)
        quiet = ["-W", "ignore:Failed to initialize NumPy"]  # torch asks for none, but misses it
        subprocess.run([there, *quiet, "-"], input=_CHECK, text=True, cwd=folder, env=environment, check=True)
        command = subprocess.run([f"{folder}/venv/bin/fastcnn"], cwd=folder, capture_output=True, text=True)
        assert command.returncode == 1, command
        assert "fastcnn[cli]" in command.stderr, command


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.package", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the archives are")
    parser.add_argument("--torch", default="torch", help="what pip installs of torch")
    parser.add_argument("--python", action="append", default=[], help="another Python to try the wheel with")
    options = parser.parse_args()
    (wheel,), (sdist,) = (sorted(options.folder.glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    assert "-cp310-abi3-" in wheel.name, wheel.name  # one for Python 3.10 and all later ones
    for python in (sys.executable, *options.python):
        _try(python, options.torch, wheel)
    _try(sys.executable, options.torch, sdist, "setuptools>=77", "wheel", "ninja")


if __name__ == "__main__":
    main()
