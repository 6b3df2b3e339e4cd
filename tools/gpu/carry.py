"""What can be compiled before a GPU's clock runs, in a folder that is taken to it: ``make gpu-carry``.

These are the libraries, Triton's kernels with their launchers, and the calibration, for the Python and the versions
that run this. ``make gpu`` takes from the folder what fits, and compiles the rest.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".gpu"
TRITON = FOLDER / "triton.tar.xz"
CALIBRATION = FOLDER / "calibration.so"
_LIBRARIES = FOLDER / "libraries"
_MANIFEST = FOLDER / "libraries.json"
_COMPILED = ROOT / "build" / "gpu"  # Triton's cache: the next time only what is new is compiled
_KERNELS = ROOT / "fastcnn" / "kernels"  # where an installation has them
_LIMIT = 60 * 2**20  # bytes of the folder


def _fingerprint() -> dict[str, str]:
    """Of what the libraries are built from and for: they run where it is the same, whatever the Python."""
    digest = hashlib.sha256()
    for file in sorted([*(ROOT / "csrc").rglob("*"), ROOT / "setup.py"]):
        if file.is_file():
            digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return {"sources": digest.hexdigest(), "platform": sysconfig.get_platform()}


def _pip_install(**environment: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "-e", str(ROOT)]
    subprocess.run(command, env={**os.environ, **environment}, check=True)


def _loads() -> bool:
    """Whether the libraries do, and in a CUDA build of torch the one for GPUs."""
    check = "import torch, fastcnn._C, fastcnn.kernels; torch.version.cuda and __import__('fastcnn._C_cuda')"
    return subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


def install() -> None:
    """Install fastcnn for this Python, with the libraries of the folder if they fit, or build them."""
    if _MANIFEST.exists() and json.loads(_MANIFEST.read_text()) == _fingerprint():
        for library in _LIBRARIES.iterdir():
            shutil.copy(library, ROOT / "fastcnn" / library.name)
        try:
            _pip_install(FASTCNN_BUILD_CPP="0", FASTCNN_BUILD_CUDA="0")
        except subprocess.CalledProcessError as error:
            print(f"{error}: the checkout is used as it is", file=sys.stderr)
            if not _KERNELS.exists():
                _KERNELS.symlink_to("../kernels")
        if _loads():
            return
        print(f"the libraries of {FOLDER} do not load here: they are built anew", file=sys.stderr)
    _pip_install(FASTCNN_BUILD_CPP="1")


def _size() -> int:
    return sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file())


def make(arch: str) -> None:
    """Fill the folder for ``sm_<arch>``; what is most important first, so that it may be interrupted."""
    _LIBRARIES.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def tell(what: str) -> None:
        print(f"{time.monotonic() - started:5.0f} s  {_size() / 2**20:5.1f} MiB  {what}", flush=True)

    _MANIFEST.unlink(missing_ok=True)
    _pip_install(FASTCNN_BUILD_CPP="1", FASTCNN_BUILD_CUDA="1", FASTCNN_CUDA_ARCHS=arch)
    for library in (ROOT / "fastcnn").glob("_C*.so"):
        subprocess.run(["strip", "--strip-debug", "-o", _LIBRARIES / library.name, library], check=True)
    _MANIFEST.write_text(json.dumps(_fingerprint()))
    tell("libraries")
    from . import cache, calibration  # with torch, which installing does without

    calibration.build(arch, CALIBRATION)
    tell("calibration")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(_COMPILED), "FASTCNN_GPU_ARCH": arch}
    tests = ["pytest", "-q", "--tb=short", "-p", "tools.gpu.stand_in", "-p", "no:cacheprovider"]
    tests += ["-n", str(os.cpu_count())]
    stages = {
        "smoke": [*tests, "tests/gpu/test_smoke.py"],
        "kernels": ["tools.gpu.precompile", "kernels"],
        "networks": ["tools.gpu.precompile", "networks"],
        "tests": [*tests, "tests/gpu"],
        "tuning": ["tools.gpu.precompile", "tuning"],
    }
    for what, command in stages.items():
        ended = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment).returncode
        cache.pack(_COMPILED, TRITON)
        tell(f"{what}{f' (exit status {ended})' if ended else ''}: {len(cache.kernels(_COMPILED))} Triton kernels")
    if (size := _size()) > _LIMIT:
        raise SystemExit(f"{FOLDER} has {size >> 20} MiB, and {_LIMIT >> 20} can be taken along")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.carry", description=__doc__)
    parser.add_argument("what", choices=("install", "make"))
    parser.add_argument("--arch", default="90", help="compute capability of the GPU, 90 for an H100")
    options = parser.parse_args()
    install() if options.what == "install" else make(options.arch)
