"""Plain JAX for every kernel: what runs where no kernel can, and what the kernels are compared with."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from jax_w4a16 import _layout

_SYMMETRIC_STEP = 1.0 / 7.5
_ASYMMETRIC_STEP = 1.0 / 15.0


def per_row(values: jax.Array, k: int, group_size: int) -> jax.Array:
    """[ceil(k/g), N] -> [k, N]: each group's row once for every row of the weight."""
    if group_size >= k:
        return jnp.broadcast_to(values[: min(1, k)], (k, values.shape[1]))
    return jnp.repeat(values, group_size, axis=0)[:k]


def dequantize(qweight, scales, zeros, *, k, group_size, dtype):
    """(code - zero) * scale in float32, rounded once to dtype: [k, N]."""
    codes = _layout.unpack(qweight, k, scales.shape[1]).astype(jnp.float32)
    zero = _layout.SYMMETRIC_ZERO if zeros is None else per_row(zeros.astype(jnp.float32), k, group_size)
    return ((codes - zero) * per_row(scales.astype(jnp.float32), k, group_size)).astype(dtype)


def dot(x, qweight, scales, zeros, bias, *, group_size, alpha, out_dtype):
    """alpha * x @ dequantize(...) + bias, accumulated in float32: [..., N]."""
    w = dequantize(qweight, scales, zeros, k=x.shape[-1], group_size=group_size, dtype=jnp.float32)
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    out = alpha * lax.dot_general(x.astype(jnp.float32), w, contract, precision=lax.Precision.HIGHEST)
    if bias is not None:
        out += bias.astype(jnp.float32)
    return out.astype(out_dtype)


def ragged_dot(x, group_sizes, qweight, scales, zeros, *, group_size, out_dtype):
    """x [M, K] times each row's expert's weight, accumulated in float32: [M, N]."""
    one = lambda some: dequantize(*some, k=x.shape[1], group_size=group_size, dtype=jnp.float32)
    w = jax.vmap(one)((qweight, scales, zeros))
    sizes = believed_sizes(group_sizes, x.shape[0])
    out = lax.ragged_dot(x.astype(jnp.float32), w, sizes, precision=lax.Precision.HIGHEST)
    return out.astype(out_dtype)


def believed_sizes(group_sizes: jax.Array, m: int) -> jax.Array:
    """Sizes as the kernels take them: none negative, none beyond the m rows."""
    ends = jnp.minimum(jnp.cumsum(jnp.clip(group_sizes, 0, m)), m)
    return jnp.diff(ends, prepend=0)


def _rounded(x: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """x in dtype, and that again in float32."""
    stored = x.astype(dtype)
    # Without the barrier XLA may drop the pair of conversions, and with it the rounding.
    return stored, lax.optimization_barrier(stored).astype(jnp.float32)


def _clamp_code(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(x), 0.0, jnp.clip(x, 0.0, 15.0))


def quantize(w, *, group_size, symmetric, scale_dtype):
    """The rule of ffi/quantize.h: w [K, N] -> packed codes, scales, zeros (None where symmetric)."""
    grouped = in_groups(w, group_size)
    codes, scales, zeros = round_groups(grouped, symmetric=symmetric, scale_dtype=scale_dtype)
    k, n = w.shape
    return _layout.pack(codes.reshape(math.prod(codes.shape[:2]), n)[:k].astype(jnp.uint8)), scales, zeros


def in_groups(w: jax.Array, group_size: int) -> jax.Array:
    """w [K, N] -> float32 [ceil(K/g), min(g, K), N], padded with zeros."""
    k, n = w.shape
    groups = _layout.num_groups(k, group_size)
    rows = min(group_size, k)
    # Zeros change neither max|w| nor the range, which holds 0 anyway.
    return jnp.pad(w.astype(jnp.float32), ((0, groups * rows - k), (0, 0))).reshape(groups, rows, n)


def round_groups(grouped, *, symmetric, scale_dtype, clip=None):
    """Codes (float32, like grouped [groups, rows, N]), scales and zeros (None where symmetric), [groups, N].

    `clip` [groups, N] multiplies each group's range.
    """
    # XLA's CPU reductions may drop a NaN.
    spoilt = jnp.isnan(grouped).any(1)
    ranged = lambda extreme: jnp.where(spoilt, jnp.nan, extreme if clip is None else extreme * clip)
    if symmetric:
        highest = ranged(jnp.max(jnp.abs(grouped), axis=1, initial=0.0))
        scales, scale = _rounded(highest * _SYMMETRIC_STEP, scale_dtype)
        zeros, zero = None, jnp.full_like(scale, _layout.SYMMETRIC_ZERO)
    else:
        low = ranged(jnp.min(grouped, axis=1, initial=0.0))
        high = ranged(jnp.max(grouped, axis=1, initial=0.0))
        scales, scale = _rounded((high - low) * _ASYMMETRIC_STEP, scale_dtype)
        zero = jnp.where(scale == 0, 0.0, _clamp_code(jnp.rint(-low / scale)))
        zeros = zero.astype(scale_dtype)
    # XLA would multiply by the reciprocal of a scale that it sees broadcast, which rounds differently.
    scale = lax.optimization_barrier(jnp.broadcast_to(scale[:, None], grouped.shape))
    zero = zero[:, None]
    codes = jnp.where(scale == 0, zero, _clamp_code(jnp.rint(grouped / scale) + zero))
    return codes, scales, zeros
