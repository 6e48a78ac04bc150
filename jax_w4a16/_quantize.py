"""Values to codes and back: quantize, dequantize, pack, unpack."""

import functools

import jax
import jax.numpy as jnp

from jax_w4a16 import _checks, _layout, _primitive, _search
from jax_w4a16._types import QuantizedWeight


def quantize(
    w,
    *,
    group_size: int = 128,
    symmetric: bool = True,
    scale_dtype=None,
    search: str | None = None,
    inputs=None,
) -> QuantizedWeight:
    """Rounds a weight to 4-bit codes, group by group.

    Args:
      w: weight [K, N], float16, bfloat16 or float32. The work is done where w is; under `jit` too.
      group_size: codes of K that share a scale: a multiple of 32, or -1 for one group per column.
      symmetric: zero points are 8 and not stored; otherwise each group has its own, an integer 0..15.
      scale_dtype: type of scales and zeros, which is the type of activations the weight will meet;
        default: w's, or bfloat16 where w is float32.
      search: how codes and scales are found. None: to nearest. "mse": each group's range is clipped where
        that lowers its squared error. "awq": activation-aware scaling (arXiv:2306.00978), then clipping; the
        result has an `input_scale`. "fit": weighted least squares, which makes zero points fractional and is
        never symmetric. The last two need `inputs`.
      inputs: a sample of the inputs that the weight will meet, [T, K], where the search needs it.

    Returns:
      A QuantizedWeight. A group that holds a NaN gets a NaN scale, so that it shows (except with "fit").

    Raises:
      TypeError, ValueError: an argument is not as described.
    """
    _checks.floating("w", _checks.array("w", w))
    _checks.rank("w", w, 2)
    _search.check(search, symmetric)
    if scale_dtype is None:
        scale_dtype = jnp.bfloat16 if w.dtype == jnp.float32 else w.dtype
    scale_dtype = _checks.float_dtype("scale_dtype", scale_dtype)
    k = w.shape[0]
    if search in _search.NEED_INPUTS:
        if inputs is None:
            raise TypeError(f"inputs: expected an array [T, K = {k}] for search={search!r}, got None")
        _checks.floating("inputs", _checks.array("inputs", inputs))
        if len(inputs.shape) != 2 or inputs.shape[1] != k or not inputs.shape[0]:
            raise ValueError(f"inputs: expected shape [T, K = {k}], T > 0, got {tuple(inputs.shape)}")
    elif inputs is not None:
        raise TypeError(f"inputs: expected None for search={search!r}, got an array")
    return _quantize(w, inputs, search, _checks.group_size(group_size, k), bool(symmetric), scale_dtype)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _quantize(w, inputs, search, group_size, symmetric, scale_dtype):
    rule = {"group_size": group_size, "symmetric": symmetric, "scale_dtype": scale_dtype}
    return _search.quantize(w, inputs, search=search, **rule)


def dequantize(qweight, scales, zeros=None, dtype=None, *, group_size: int | None = None, in_features=None):
    """The weight [K, N] as (code - zero) * scale, computed in float32 and rounded once.

    Args:
      qweight: packed codes, uint32 [ceil(K/64), ceil(N/16), 128].
      scales: [ceil(K/g), N], float16, bfloat16 or float32.
      zeros: like scales, in units of codes; None means 8.
      dtype: of the result, float16, bfloat16 or float32; default: the scales'.
      group_size: g; default: what K and the number of groups imply. -1: one group per column.
      in_features: K; default: 64 for each block of rows.

    Raises:
      TypeError, ValueError: an argument is not as described.
    """
    _checks.packed(qweight)
    if in_features is None:
        in_features = qweight.shape[0] * _layout.BLOCK_K
    k = _checks.integer("in_features", in_features)
    if k < 0:
        raise ValueError(f"in_features: expected at least 0, got {k}")
    size = _checks.weight(qweight, scales, zeros, k, group_size)
    dtype = _checks.float_dtype("dtype", scales.dtype if dtype is None else dtype)
    return _dequantize(qweight, scales, zeros, k, size, dtype)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _dequantize(qweight, scales, zeros, k, group_size, dtype):
    return _primitive.dequantize(qweight, scales, zeros, k=k, group_size=group_size, dtype=dtype)


def pack(codes) -> jax.Array:
    """uint8 codes [K, N], 0..15 -> packed weight, uint32 [ceil(K/64), ceil(N/16), 128].

    Only the low four bits of a code count. Padding holds code 0.

    Raises:
      TypeError, ValueError: codes is not a two-dimensional uint8 array.
    """
    _checks.dtype("codes", _checks.array("codes", codes), jnp.uint8)
    _checks.rank("codes", codes, 2)
    return _pack(codes)


_pack = jax.jit(lambda codes: _primitive.pack(codes))


def unpack(qweight, shape) -> jax.Array:
    """The inverse of `pack`: packed weight -> uint8 codes of the given shape (K, N).

    Raises:
      TypeError, ValueError: qweight is not uint32, or not of the packed shape of a weight (K, N).
    """
    _checks.dtype("qweight", _checks.array("qweight", qweight), jnp.uint32)
    if not isinstance(shape, tuple | list) or len(shape) != 2:
        raise TypeError(f"shape: expected (K, N), got {shape!r}")
    k, n = (_checks.integer("shape", size) for size in shape)
    if min(k, n) < 0:
        raise ValueError(f"shape: expected sizes of at least 0, got {(k, n)}")
    _checks.shape("qweight", qweight, _layout.packed_shape(k, n), f" for a weight [K = {k}, N = {n}]")
    return _unpack(qweight, k, n)


_unpack = jax.jit(_layout.unpack, static_argnums=(1, 2))
