"""The CUDA kernels of this folder, compiled by nvcc when a process first needs them."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax


def find_nvcc() -> str | None:
    """The compiler's path."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@functools.cache
def load(name: str) -> ctypes.CDLL:
    """`name`.cu as a library, for the GPUs of this machine.

    Raises:
      RuntimeError: there is no nvcc.
      subprocess.CalledProcessError: the compiler failed.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError(f"nvcc is needed to compile {name}.cu; found none")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / f"{name}.so"
        command = [nvcc, "-O3", "-std=c++17", "-arch=native", "-cudart=static", "-shared", "-Xcompiler=-fPIC"]
        source = Path(__file__).with_name(f"{name}.cu")
        command += ["-isystem", jax.ffi.include_dir(), "-o", str(library), str(source)]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library))
