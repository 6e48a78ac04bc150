"""Searches for better 4-bit weights than rounding to nearest gives: clipped ranges, scaled inputs.

None   round to nearest (`_primitive.quantize`)
"mse"  each group's range is clipped where that lowers its squared error
"awq"  the inputs' channels are scaled, then ranges are clipped; needs inputs
"fit"  scales and fractional zero points by weighted least squares (`_fit.fit`); needs inputs
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_w4a16 import _fit, _primitive, _reference, _sharding
from jax_w4a16._types import QuantizedWeight

SEARCHES = (None, "mse", "awq", "fit")
NEED_INPUTS = ("awq", "fit")

_CLIPS = np.linspace(1.0, 0.5, 11, dtype=np.float32)
_ALPHAS = np.arange(20, dtype=np.float32) / 20
_LEAST_MAGNITUDE = 1e-4  # of an input channel, so that a dead one has a finite scale


def check(search, symmetric) -> None:
    """Raises TypeError or ValueError unless these are a search and whether it shall be symmetric."""
    if not isinstance(symmetric, bool | np.bool_):
        raise TypeError(f"symmetric: expected a bool, got {type(symmetric).__name__}")
    if search not in SEARCHES:
        raise ValueError(f"search: expected one of {SEARCHES}, got {search!r}")
    if search == "fit" and symmetric:
        raise ValueError("symmetric: expected False for search='fit', which fits zero points, got True")


def quantize(w, inputs, *, search, group_size: int, symmetric: bool, scale_dtype) -> QuantizedWeight:
    """Quantises w [K, N] by one of `SEARCHES`. Arguments are checked; group_size is K where per column."""
    rule = {"group_size": group_size, "symmetric": symmetric, "scale_dtype": scale_dtype}
    if 0 in w.shape:
        search = None
    if search == "fit":
        power = (inputs.astype(jnp.float32) ** 2).mean(0)
        return _fit.fit(w, power, group_size=group_size, scale_dtype=scale_dtype)
    input_scale = None
    if search == "mse":
        qweight, scales, *zeros = clip_ranges(w, **rule)
    elif search == "awq":
        qweight, scales, *zeros, input_scale = scale_inputs(w, inputs, **rule)
    else:
        qweight, scales, *zeros = _primitive.quantize(w, **rule)
    stored = -1 if group_size >= w.shape[0] else group_size
    return QuantizedWeight(qweight, scales, *zeros, input_scale=input_scale, group_size=stored, k=w.shape[0])


def clip_ranges(w, power=None, *, group_size: int, symmetric: bool, scale_dtype) -> tuple:
    """Rounds to nearest within the share of each group's full range that gives the least squared error.

    Args:
      w: weight [K, N].
      power: what each row's squared error counts, [K]; None: all the same.
      group_size: as in `quantize`.
      symmetric: as in `quantize`.
      scale_dtype: as in `quantize`.

    Returns:
      qweight, scales and, unless symmetric, zeros. No group's error is greater than with its full range; a
      group that holds a NaN keeps its full range.
    """
    grouped = _reference.in_groups(w, group_size)
    counts = 1.0 if power is None else _reference.in_groups(power[:, None], group_size)
    rounded = lambda clip: _reference.round_groups(
        grouped, symmetric=symmetric, scale_dtype=scale_dtype, clip=clip
    )

    def attempt(best, share):
        clip = jnp.full_like(best[1], share)
        error = (counts * (_values(*rounded(clip)) - grouped) ** 2).sum(1)
        better = error < best[0]
        return (jnp.where(better, error, best[0]), jnp.where(better, clip, best[1])), None

    full = lax.full_like(grouped[:, 0], 1)
    start = _sharding.vary_alike([full * jnp.inf, full, grouped, *([] if power is None else [power])])[:2]
    (_, clip), _ = lax.scan(attempt, tuple(start), _CLIPS)
    codes, scales, zeros = rounded(clip)
    qweight = _primitive.pack(_rows(codes, w).astype(jnp.uint8))
    return (qweight, scales) if zeros is None else (qweight, scales, zeros)


def scale_inputs(w, inputs, *, group_size: int, symmetric: bool, scale_dtype) -> tuple:
    """Activation-aware scaling (AWQ, arXiv:2306.00978): important input channels get finer steps.

    The rows of w are multiplied by s = magnitude^alpha before they are rounded, and the inputs by 1/s when
    the layer runs; magnitude is the mean of |input| by channel. Of a grid of alphas from 0 (no scaling) to
    0.95, the one is taken with which the outputs for `inputs` change least. Ranges are then clipped, a row's
    errors counting by the power of its scaled input. A NaN in w or the inputs leaves them unscaled.

    Where the inputs come from a norm that nothing else reads, its scale (and bias) can be multiplied by 1/s
    instead, and the weight's `input_scale` dropped: then it costs nothing.

    Args:
      w: weight [K, N].
      inputs: [T, K], a sample of what the layer will meet.
      group_size: as in `quantize`.
      symmetric: as in `quantize`.
      scale_dtype: as in `quantize`.

    Returns:
      qweight, scales, zeros unless symmetric, and 1/s [K] in `scale_dtype`.
    """
    w, inputs = w.astype(jnp.float32), inputs.astype(jnp.float32)
    magnitude = jnp.maximum(jnp.abs(inputs).mean(0), _LEAST_MAGNITUDE)

    def inverse(alpha):
        s = magnitude**alpha
        # 1/s is what is stored; rounded first, so that w is scaled by exactly its inverse.
        return (jnp.sqrt(s.max() * s.min()) / s).astype(scale_dtype)

    def attempt(best, alpha):
        undo = lax.optimization_barrier(inverse(alpha)).astype(jnp.float32)[:, None]
        grouped = _reference.in_groups(w / undo, group_size)
        values = _values(*_reference.round_groups(grouped, symmetric=symmetric, scale_dtype=scale_dtype))
        error = undo * _rows(values, w) - w
        loss = (jnp.dot(inputs, error, precision=lax.Precision.HIGH) ** 2).sum()
        better = loss < best[0]
        return (jnp.where(better, loss, best[0]), jnp.where(better, alpha, best[1])), None

    (_, alpha), _ = lax.scan(attempt, (jnp.float32(jnp.inf), jnp.float32(0)), _ALPHAS)
    input_scale = lax.optimization_barrier(inverse(alpha))
    undo = input_scale.astype(jnp.float32)
    rule = {"group_size": group_size, "symmetric": symmetric, "scale_dtype": scale_dtype}
    return (*clip_ranges(w / undo[:, None], ((inputs * undo) ** 2).mean(0), **rule), input_scale)


def _rows(grouped, w):
    """[groups, rows, N] -> [K, N], like w: the inverse of `_reference.in_groups`."""
    return grouped.reshape(-1, w.shape[1])[: w.shape[0]]


def _values(codes, scales, zeros):
    """What codes by groups stand for, float32."""
    zero = 8.0 if zeros is None else zeros[:, None].astype(jnp.float32)
    return (codes - zero) * scales[:, None].astype(jnp.float32)
