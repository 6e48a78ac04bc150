"""A decoding step's attention as one CUDA kernel: norm's factor, rotary embedding, cache update, softmax.

XLA makes six kernels of these, of one to three microseconds each, which at batch 1 is a fifth of a W4A16
layer's time.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import compile_cuda

_TARGET = "llama_attention"


@functools.cache
def prepare() -> None:
    """Compiles the kernel and registers it; raises what `compile_cuda.load` does."""
    native = compile_cuda.load("llama_attention")
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(native.LlamaAttention), platform="CUDA")


def runs_on(device: Any) -> bool:
    """Whether a device has what the kernel is made of: clusters of CTAs."""
    return device.platform == "gpu" and float(device.compute_capability) >= 9


def serves(head_dim: int, dtype) -> bool:
    """Whether `attend` takes heads of this size and type."""
    return head_dim in (64, 128) and jnp.dtype(dtype) == jnp.bfloat16


def attend(qkv, squares, cos, sin, keys, values, position, *, hidden: int, epsilon: float):
    """One new position of each sequence; after `prepare`.

    Args:
      qkv: bfloat16 [batch x KV heads, query heads of a KV head + 2, head_dim]: query heads, key, value, not
        rotated.
      squares: float32 [batch, S], sums of squares: a sequence's `qkv` is multiplied by
        1 / sqrt(sum(squares) / hidden + epsilon).
      cos: float32 [length, head_dim / 2], of every position.
      sin: likewise.
      keys: bfloat16 [batch x KV heads, length, head_dim], of which positions before `position` matter.
      values: likewise.
      position: int32, less than length.
      hidden: how many numbers the norm is of.
      epsilon: of the norm.

    Returns:
      The heads' outputs [batch x KV heads, query heads of a KV head, head_dim], and keys and values with the
      new position, in the buffers of the old.
    """
    programs, rows, dim = qkv.shape
    cache = jax.typeof(keys)  # which inside shard_map says too over which axes it varies
    call = jax.ffi.ffi_call(
        _TARGET,
        (cache.update(shape=(programs, rows - 2, dim)), cache, cache),
        input_output_aliases={5: 1, 6: 2},
    )
    norm = {"hidden": np.float32(hidden), "epsilon": np.float32(epsilon)}
    return call(jnp.asarray(position, jnp.int32), qkv, squares, cos, sin, keys, values, **norm)
