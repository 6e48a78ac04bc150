"""The residual sum after a row split and the norm that follows it, as one CUDA kernel on several GPUs.

XLA makes an all-reduce and another kernel of these. At batch 1 an all-reduce of 32 KB costs 9 to 15
microseconds, of which the way over NVLink and back is two.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import compile_cuda

_COLUMNS, _CAPACITY = 256, 16 * 8192  # of a CTA and of all, as in llama_sum.cu
_TARGET = "llama_add_norm"


@functools.cache
def connect(devices: Sequence[Any]) -> None:
    """Compiles the kernel, registers it, and gives each of a process's GPUs access to the others.

    Raises:
      RuntimeError: they cannot access one another, or there is no nvcc.
      subprocess.CalledProcessError: the compiler failed.
    """
    native = compile_cuda.load("llama_sum")
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(native.LlamaAddNorm), platform="CUDA")
    native.LlamaConnect.restype = ctypes.c_char_p
    ordinals = [device.local_hardware_id for device in devices]
    error = native.LlamaConnect((ctypes.c_int * len(ordinals))(*ordinals), len(ordinals))
    if error:
        raise RuntimeError(f"GPUs {ordinals}: {error.decode()}")


def serves(rows: int, hidden: int, dtype) -> bool:
    """Whether `add_and_norm` takes x [rows, hidden]."""
    whole = hidden > 0 and hidden % _COLUMNS == 0
    return whole and rows * hidden <= _CAPACITY and jnp.dtype(dtype) == jnp.bfloat16


def add_and_norm(x, part, scale):
    """Inside shard_map, on one device's `part` of a sum over all devices.

    Args:
      x: bfloat16 [..., hidden], the same on all devices.
      part: float32, likewise but this device's own.
      scale: bfloat16 [hidden].

    Returns:
      y = x plus the sum of the parts, rounded once; y * scale; and float32 [..., hidden / 256], sums of y's
      squares over 256 columns each.
    """
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    squares = jax.ShapeDtypeStruct((*x.shape[:-1], x.shape[-1] // _COLUMNS), jnp.float32)
    return jax.ffi.ffi_call(_TARGET, (like, like, squares))(part, x, scale)
