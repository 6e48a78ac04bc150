"""A decoding step's attention as one Pallas kernel: norm's factor, rotary embedding, cache update, softmax.

XLA makes six kernels of these, of one to three microseconds each, which at batch 1 is a fifth of a W4A16
layer's time. A program computes one KV head of one sequence: its query heads against the new position, whose
key and value it writes into the cache, then against the cached ones, block by block with a running softmax.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

_F32 = jnp.float32
_BLOCK = 64  # cached positions at a time
_LEAST_ROWS = 16  # of a product's operand: fewer query heads are repeated


def attend(qkv, squares, cos, sin, keys, values, position, *, hidden: int, epsilon: float, interpret=False):
    """One new position of each sequence.

    Args:
      qkv: [batch x KV heads, query heads of a KV head + 2, head_dim]: query heads, key, value, not rotated.
      squares: float32 [batch, S], sums of squares: a sequence's `qkv` is multiplied by
        1 / sqrt(sum(squares) / hidden + epsilon).
      cos: float32 [length, head_dim / 2], of every position.
      sin: likewise.
      keys: [batch x KV heads, length, head_dim], of which positions before `position` are read.
      values: likewise.
      position: int32, less than length.
      hidden: how many numbers the norm is of.
      epsilon: of the norm.
      interpret: runs the kernel in JAX operations, on any device.

    Returns:
      The heads' outputs [batch x KV heads, query heads of a KV head, head_dim], and keys and values with the
      new position, in the buffers of the old.
    """
    programs, rows, dim = qkv.shape
    sizes = {"kv_heads": programs // squares.shape[0], "heads": rows - 2, "dim": dim}
    kernel = functools.partial(_kernel, **sizes, hidden=hidden, epsilon=epsilon)
    like = lambda shape: jax.ShapeDtypeStruct(shape, keys.dtype, **_varying(keys))
    return pl.pallas_call(
        kernel,
        out_shape=(like((programs, rows - 2, dim)), like(keys.shape), like(values.shape)),
        grid=(programs,),
        input_output_aliases={5: 1, 6: 2},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="llama_decode_attention",
    )(jnp.reshape(position, 1), qkv, squares, cos, sin, keys, values)


def _varying(array) -> dict:
    """What a type inside shard_map says of the axes that it varies over."""
    kind = getattr(jax.typeof(array), "mat", None)
    return {} if kind is None else {"manual_axis_type": kind}


def _dot(a, b):
    return jnp.dot(a, b, preferred_element_type=_F32)


def _kernel(
    position, qkv, squares, cos, sin, _, __, out, keys, values, *, kv_heads, heads, dim, hidden, epsilon
):
    program, new = pl.program_id(0), position[0]
    half, dtype = dim // 2, keys.dtype
    halves = pl.ds(0, half), pl.ds(half, half)
    sums = jnp.arange(pl.next_power_of_2(squares.shape[1]))
    sums = plgpu.load(squares.at[program // kv_heads, sums], mask=sums < squares.shape[1], other=0)
    factor = lax.rsqrt(sums.sum() / hidden + epsilon)
    scaled = lambda row, part: qkv[program, row, part].astype(_F32) * factor
    cosine, sine = cos[new, :], sin[new, :]

    def rotated(row):
        a, b = (scaled(row, part) for part in halves)
        return (a * cosine - b * sine).astype(dtype), (b * cosine + a * sine).astype(dtype)

    row = jnp.minimum(jnp.arange(max(heads, _LEAST_ROWS)), heads - 1)
    queries, key = rotated(row), rotated(heads)
    value = scaled(heads + 1, slice(None)).astype(dtype)
    for part, of_key in zip(halves, key, strict=True):
        keys[program, new, part] = of_key
    values[program, new, :] = value

    def scores(of_keys):
        """Of `queries`, as the sum over both halves."""
        products = (_dot(q, k.T) for q, k in zip(queries, of_keys, strict=True))
        return sum(products) / math.sqrt(dim)

    def block(i, carry):
        top, total, summed = carry
        at = pl.ds(i * _BLOCK, _BLOCK)
        cached = i * _BLOCK + jnp.arange(_BLOCK) < new
        load = lambda ref, part: plgpu.load(ref.at[program, at, part], mask=cached[:, None], other=0)
        s = jnp.where(cached, scores([load(keys, part) for part in halves]), -jnp.inf)
        higher = jnp.maximum(top, s.max(1))
        p, keep = jnp.exp(s - higher[:, None]), jnp.exp(top - higher)
        summed = summed * keep[:, None] + _dot(p.astype(dtype), load(values, slice(None)))
        return higher, total * keep + p.sum(1), summed

    # The new position first: so there is always a score, and what was just written need not be read.
    own = sum(
        (q.astype(_F32) * k.astype(_F32)).sum(1) for q, k in zip(queries, key, strict=True)
    ) / math.sqrt(dim)
    begin = own, jnp.ones_like(own), jnp.broadcast_to(value.astype(_F32), (row.shape[0], dim))
    _, total, summed = lax.fori_loop(0, pl.cdiv(new, _BLOCK), block, begin)
    out[program, row, :] = (summed / total[:, None]).astype(dtype)
