"""Triton kernels compiled for a GPU that is not here, into Triton's cache, complete enough to be taken to it."""

import functools
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from triton.backends.nvidia import driver as nvidia
from triton.runtime import build, driver
from triton.runtime.jit import JITFunction

from tools.machine_code.compiled import _NoGPU


@contextmanager
def compiling_into_cache(arch: int) -> Iterator[None]:
    """Every launch compiles its kernel for ``sm_<arch>``, and with it the function that launches it, and runs nothing.

    That function is written in C by Triton up to 3.7, one for each signature of a kernel.
    """
    run, done = JITFunction.run, set()

    def compile(function: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = run(function, *args, grid=grid, warmup=True, **options)
        if compiled.hash not in done:
            done.add(compiled.hash)
            if launchers_are_compiled():
                nvidia.CudaLauncher(compiled.src, compiled.metadata)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", _NoGPU(arch)))
        stack.enter_context(mock.patch.object(JITFunction, "run", compile))
        # They are linked to the driver's library, whose name is all that counts here.
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.object(nvidia, "library_dirs", return_value=[folder]))
        stack.enter_context(mock.patch.object(build, "_load_module_from_path"))
        stack.enter_context(mock.patch.object(build, "_build", functools.partial(_linked, build._build)))
        nameless = ["cc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", f"{folder}/libcuda.so.1", "-xc", "/dev/null"]
        subprocess.run(nameless, check=True)
        if launchers_are_compiled():
            nvidia.CudaUtils()
        yield


def _linked(build: Callable[..., str], *args: Any) -> str:
    """Also where the linker by default leaves out libraries of which nothing is used."""
    *rest, flags = args
    return build(*rest, [*flags, "-Wl,--no-as-needed", "-l:libcuda.so.1"])


def launchers_are_compiled() -> bool:
    return hasattr(nvidia, "make_launcher")
