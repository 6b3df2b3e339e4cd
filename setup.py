"""Builds the C++ library with ninja: each CPU kernel once per capability, everything else once.

FASTCNN_BUILD_CPP=0 builds none, 1 fails without a compiler; unset, a missing compiler is reported and left at that.
CXX names the compiler (default c++).
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
KERNELS = ("lrn", "conv2d_relu", "relu_lrn_max_pool2d")
TORCH_TARGET = "0x020b000000000000"  # the stable ABI of torch 2.11


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


class BuildWithNinja(build_ext):
    def build_extension(self, ext):
        import ninja
        import pybind11
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        build = Path(self.build_temp).absolute()
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler = find_compiler()
        version = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True, check=True)

        common = ["-std=c++20", "-O3", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
        # GCC 12 takes its own _mm512_undefined_ps for a mistake.
        common += ["-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
        library_flags = [*(f"-isystem {path}" for path in include_paths()), f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
        # Apart, because torch has a pybind11 of its own that refuses the stable ABI.
        module_flags = [
            *(f"-isystem {path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])),
            _define("FASTCNN_COMPILER", version.stdout.splitlines()[0]),
            _define("FASTCNN_TORCH_VERSION", torch.__version__),
            _define("FASTCNN_CAPABILITIES", ", ".join(CAPABILITIES)),
        ]
        # Errors of math functions are not looked at and nothing traps; results are those of IEEE all the same.
        kernel_flags = ["-fno-math-errno", "-fno-trapping-math"]

        with open(build / "build.ninja", "w") as file:
            n = ninja.ninja_syntax.Writer(file, width=120)
            compile_command = f"{compiler} -MMD -MF $out.d $flags -c $in -o $out"
            n.rule("cxx", compile_command, "compile $out", depfile="$out.d", deps="gcc")
            n.rule("link", f"{compiler} -shared $in -o $out $flags", "link $out")
            objects = []

            def compile(source, flags, suffix=""):
                objects.append(f"{Path(source).stem}{suffix}.o")
                n.build(objects[-1], "cxx", str(ROOT / "csrc" / source), variables={"flags": " ".join(flags)})

            for kernel in KERNELS:
                for capability, flags in CAPABILITIES.items():
                    define = f"-DFASTCNN_CAPABILITY={capability}"
                    compile(f"cpu/{kernel}.cpp", [*common, *kernel_flags, *flags, define], f".{capability}")
            compile("cpu/capability.cpp", [*common, *(["-DFASTCNN_X86"] if X86 else [])])
            compile("library.cpp", [*common, *library_flags])
            compile("module.cpp", [*common, *module_flags])
            undefined = ["-undefined dynamic_lookup"] if sys.platform == "darwin" else []
            link = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", *undefined]
            n.build(str(target), "link", objects, variables={"flags": " ".join(link)})
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", build], check=True)


def _define(name, value):
    """A -D of a C string, through ninja's and the shell's quoting."""
    return f"""'-D{name}="{value}"'""".replace("$", "$$")


setup(
    ext_modules=[Extension("fastcnn._C", sources=[])] if find_compiler() else [],
    cmdclass={"build_ext": BuildWithNinja},
)
