"""Builds the C++ and the CUDA library with ninja.

csrc/*.cpp and csrc/cpu/*_op.cpp are compiled once, the other csrc/cpu/*.cpp, which are kernels, once per capability;
csrc/cuda is the CUDA library.

FASTCNN_BUILD_CPP=0 builds none, 1 fails without a compiler; unset, a missing compiler is reported and left at that.
CXX names the compiler (default c++).

FASTCNN_BUILD_CUDA=0 leaves the CUDA library out, 1 fails without nvcc; unset, it is built where there is an nvcc. No
GPU and no CUDA build of torch are needed. FASTCNN_CUDA_ARCHS lists the architectures, as in "80 90"; the default is
what nvcc has of ARCHITECTURES. CUDACXX names the compiler (default nvcc).
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
CAPABILITIES = {"baseline": []}
if X86:
    CAPABILITIES["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    CAPABILITIES["avx512"] = [
        *CAPABILITIES["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"),
    ]
CSRC = ROOT / "csrc"
ARCHITECTURES = ("75", "80", "90", "100", "120")
TORCH_TARGET = "0x020b000000000000"  # the stable ABI of torch 2.11
PYTHON_TARGET = "0x030a0000"  # the stable ABI of Python 3.10
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))  # a Python that has no stable ABI


def find_compiler():
    """The C++ compiler, or None where FASTCNN_BUILD_CPP or its absence says not to build."""
    wanted = os.environ.get("FASTCNN_BUILD_CPP", "")
    if wanted == "0":
        return None
    compiler = os.environ.get("CXX") or "c++"
    found = shutil.which(compiler.split()[0])
    if found:
        return compiler
    message = f"fastcnn: no C++ compiler ({compiler!r} not found)"
    if wanted == "1":
        sys.exit(f"{message}, and FASTCNN_BUILD_CPP=1 asks for the C++ library")
    print(f"{message}: building without the C++ library; operators will run in plain PyTorch", file=sys.stderr)
    return None


def find_nvcc(compiler):
    """nvcc, or None where FASTCNN_BUILD_CUDA, or the absence of it or of a C++ compiler, says not to build."""
    wanted = os.environ.get("FASTCNN_BUILD_CUDA", "")
    if wanted == "0":
        return None
    names = [os.environ.get("CUDACXX") or "nvcc", f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found and compiler:
        return found
    if wanted == "1":
        sys.exit("fastcnn: no nvcc or no C++ compiler, and FASTCNN_BUILD_CUDA=1 asks for the CUDA library")
    return None


def find_architectures(nvcc):
    """Those of FASTCNN_CUDA_ARCHS, or of ARCHITECTURES that this nvcc compiles for."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    offered = listed.replace("compute_", "").split()
    asked = os.environ.get("FASTCNN_CUDA_ARCHS", "").replace(",", " ").replace(";", " ").split()
    unknown = [arch for arch in asked if arch not in offered]
    if unknown:
        sys.exit(f"fastcnn: FASTCNN_CUDA_ARCHS: {nvcc} does not compile for {unknown}; it offers {' '.join(offered)}")
    return asked or [arch for arch in ARCHITECTURES if arch in offered]


COMPILER = find_compiler()
NVCC = find_nvcc(COMPILER)
CUDA_ARCHS = find_architectures(NVCC) if NVCC else []


class BuildWithNinja(build_ext):
    def build_extension(self, ext):
        import ninja

        build = Path(self.build_temp).absolute() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(build / "build.ninja", "w") as file:
            writer = Writer(ninja.ninja_syntax.Writer(file, width=120))
            if ext.name.endswith("_cuda"):
                writer.cuda_library(target)
            else:
                writer.cpp_library(target)
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", build], check=True)


class Writer:
    """Writes the ninja file of one library."""

    def __init__(self, n):
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        self.n = n
        self.objects = []
        self.common = ["-std=c++20", "-O3", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
        # GCC 12 takes its own _mm512_undefined_ps for a mistake; Clang misses kernels that other files define.
        self.common += ["-Wno-maybe-uninitialized", "-Wno-undefined-var-template", "-Wno-unknown-warning-option"]
        self.library_flags = [
            *(f"-isystem {path}" for path in include_paths()),
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        ]
        self.module_flags = [
            f"-isystem {sysconfig.get_paths()['include']}",
            "-Wno-missing-field-initializers",
            *([] if FREE_THREADED else [f"-DPy_LIMITED_API={PYTHON_TARGET}"]),
            _define("FASTCNN_TORCH_VERSION", torch.__version__),
        ]
        undefined = ["-undefined dynamic_lookup"] if sys.platform == "darwin" else []
        self.link_flags = [*(f"-L{path}" for path in library_paths()), *undefined]
        command = f"{COMPILER} -MMD -MF $out.d $flags -c $in -o $out"
        n.rule("cxx", command, "compile $out", depfile="$out.d", deps="gcc")

    def compile(self, sources, flags, suffix="", rule="cxx"):
        for source in sorted(sources):
            self.objects.append(f"{source.stem}{suffix}.o")
            self.n.build(self.objects[-1], rule, str(source), variables={"flags": " ".join(flags)})

    def link(self, target, flags, linker=None):
        self.n.rule("link", f"{linker or COMPILER} -shared $in -o $out $flags", "link $out")
        self.n.build(str(target), "link", self.objects, variables={"flags": " ".join([*self.link_flags, *flags])})

    def cpp_library(self, target):
        # Errors of math functions are not looked at and nothing traps; results are those of IEEE all the same.
        kernel_flags = [*self.common, "-fno-math-errno", "-fno-trapping-math"]
        ops = set((CSRC / "cpu").glob("*_op.cpp"))
        kernels = set((CSRC / "cpu").glob("*.cpp")) - ops
        for capability, flags in CAPABILITIES.items():
            self.compile(kernels, [*kernel_flags, *flags, f"-DFASTCNN_CAPABILITY={capability}"], f".{capability}")
        self.compile(ops, [*self.common, *self.library_flags])
        defines = [
            _define("FASTCNN_COMPILER", _version(COMPILER, 0)),
            _define("FASTCNN_CAPABILITIES", ", ".join(CAPABILITIES)),
        ]
        self.compile(CSRC.glob("*.cpp"), [*self.common, *self.module_flags, *defines])
        self.link(target, ["-ltorch_cpu"])

    def cuda_library(self, target):
        code = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHS]
        code.append(f"-gencode arch=compute_{CUDA_ARCHS[-1]},code=compute_{CUDA_ARCHS[-1]}")
        flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler -fPIC,-fvisibility=hidden,-Wall", *code]
        nvcc_command = f"{NVCC} -ccbin {COMPILER.split()[0]}"
        command = f"{nvcc_command} -MD -MF $out.d $flags -c $in -o $out"
        self.n.rule("nvcc", command, "compile $out", depfile="$out.d", deps="gcc")
        self.compile((CSRC / "cuda").glob("*.cu"), flags, rule="nvcc")
        self.compile((CSRC / "cuda").glob("*_op.cpp"), [*self.common, *self.library_flags, "-DUSE_CUDA"])
        defines = [
            _define("FASTCNN_COMPILER", _version(NVCC, -2)),
            _define("FASTCNN_ARCHITECTURES", ", ".join(f"sm_{arch}" for arch in CUDA_ARCHS)),
        ]
        self.compile([CSRC / "cuda" / "module.cpp"], [*self.common, *self.module_flags, *defines])
        # Beside a CPU build of torch there is no libtorch_cuda to link to: the umbrella stands for it, and brings it in
        # where there is one.
        self.link(target, ["-cudart static -Xlinker --no-as-needed -ltorch"], nvcc_command)


def _version(compiler, line):
    """A line of what the compiler says of its version."""
    command = [*compiler.split(), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[line]


def _define(name, value):
    """A -D of a C string, through ninja's and the shell's quoting."""
    return f"""'-D{name}="{value}"'""".replace("$", "$$")


LIBRARIES = [*(["fastcnn._C"] if COMPILER else []), *(["fastcnn._C_cuda"] if NVCC else [])]

setup(
    ext_modules=[Extension(name, sources=[], py_limited_api=not FREE_THREADED) for name in LIBRARIES],
    cmdclass={"build_ext": BuildWithNinja},
    # One wheel for this version of Python and all later ones; without libraries, for any platform too.
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIBRARIES and not FREE_THREADED else {},
)
