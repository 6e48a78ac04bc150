"""Fits 4-bit weights to what they multiply: scales and zero points by weighted least squares."""

import jax
import jax.numpy as jnp
from jax import lax

from jax_w4a16 import _layout, _primitive, _reference
from jax_w4a16._types import QuantizedWeight

_FIRST_RANGES = (1.0, 0.8)  # of a group's full range; the rest is clipped
_STEPS = 5


def fit(w: jax.Array, input_power: jax.Array, *, group_size: int, scale_dtype) -> QuantizedWeight:
    """Quantises a weight so that its product with inputs of known mean squares changes least.

    Each group minimises sum_k input_power[k] * (w[k] - (code[k] - zero) * scale)^2, by turns over the codes
    and over (scale, zero), from several clipped ranges, and keeps the best seen. Zero points are fractional.
    Against `quantize` this takes a few inputs and about ten times the work; at run time the result is any
    asymmetric weight.

    Args:
      w: weight [K, N], floating.
      input_power: mean square of each input of the layer, [K], not negative.
      group_size: codes of K that share a scale: a multiple of 32, or -1 for one group per column.
      scale_dtype: type of scales and zeros.

    Returns:
      A QuantizedWeight with zeros.
    """
    k, n = w.shape
    size = k if group_size == -1 else min(group_size, k)
    groups = _layout.num_groups(k, size)
    rows = groups * size - k
    values = jnp.pad(w.astype(jnp.float32), ((0, rows), (0, 0))).reshape(groups, size, n)
    power = jnp.pad(input_power.astype(jnp.float32), (0, rows)).reshape(groups, size, 1)
    share = power / jnp.maximum(power.sum(1, keepdims=True), jnp.finfo(jnp.float32).tiny)

    storage = jnp.finfo(scale_dtype)
    stored = lambda a: lax.reduce_precision(a, storage.nexp, storage.nmant)
    mean = lambda a: (share * a).sum(1, keepdims=True)

    low = jnp.minimum(values.min(1, keepdims=True), 0)
    high = jnp.maximum(values.max(1, keepdims=True), 0)
    values_mean = mean(values)

    def step(_, state):
        scale, zero, best = state
        codes = jnp.clip(jnp.rint(values / scale + zero), 0, 15)
        error = mean((values - (codes - zero) * scale) ** 2)
        better = error < best[0]
        seen = (error, codes.astype(jnp.uint8), scale, zero)
        best = tuple(jnp.where(better, new, old) for new, old in zip(seen, best, strict=True))

        codes_mean = mean(codes)
        spread = mean((codes - codes_mean) ** 2)
        slope = mean((codes - codes_mean) * (values - values_mean)) / jnp.where(spread > 0, spread, 1)
        scale = jnp.where((spread > 0) & (slope > float(storage.tiny)), stored(slope), scale)
        return scale, stored(codes_mean - values_mean / scale), best

    def from_range(best, part):
        scale = stored(jnp.maximum(part * (high - low) / 15, float(storage.tiny)))
        zero = stored(jnp.clip(-part * low / scale, 0, 15))
        return lax.fori_loop(0, _STEPS, step, (scale, zero, best))[2], None

    # To nearest comes first, so that nothing is worse.
    codes, scale, zero = _reference.round_groups(values, symmetric=False, scale_dtype=scale_dtype)
    scale, zero = scale[:, None].astype(jnp.float32), jnp.float32(zero)[:, None]
    nearest = (mean((values - (codes - zero) * scale) ** 2), codes.astype(jnp.uint8), scale, zero)
    best, _ = lax.scan(from_range, nearest, jnp.array(_FIRST_RANGES, jnp.float32))
    _, codes, scale, zero = best
    return QuantizedWeight(
        _primitive.pack(codes.reshape(-1, n)[:k]),
        scale[:, 0].astype(scale_dtype),
        zero[:, 0].astype(scale_dtype),
        group_size=-1 if size >= k else size,
        k=k,
    )
