"""qwix: its int4 `QArray`s to `QuantizedWeight`s and back, value for value."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_w4a16 import _checks
from jax_w4a16._layout import SYMMETRIC_ZERO
from jax_w4a16._quantize import pack, unpack
from jax_w4a16._types import QuantizedWeight

try:
    from qwix import QArray
except ImportError as error:
    raise ImportError("jax_w4a16.qwix needs qwix: pip install qwix") from error


def from_qarray(array: QArray) -> QuantizedWeight:
    """The same weight, packed: it dequantises to the same values, to the bit.

    Args:
      array: int4 codes [K, N], or a stack [L, K, N] of them; scales (and zero points) for tiles of K that
        are a multiple of 32 or all of K, and any tiles of N.

    Raises:
      TypeError, ValueError: the array is not as described.
    """
    if not isinstance(array, QArray):
        raise TypeError(f"array: expected a qwix.QArray, got {type(array).__name__}")
    _checks.dtype("array.qvalue", array.qvalue, jnp.int4)
    if array.qvalue.ndim not in (2, 3):
        raise ValueError(f"array.qvalue: expected shape [K, N] or [L, K, N], got {array.qvalue.shape}")
    _checks.floating("array.scale", array.scale)
    *lead, k, n = array.qvalue.shape
    groups = array.scale.shape[-2]
    size = k // groups
    if size * groups != k or (groups > 1 and size % 32):
        raise ValueError(
            f"array.scale: expected tiles of K = {k} that are a multiple of 32 or all of it, "
            f"got shape {array.scale.shape}"
        )
    codes = (array.qvalue.astype(jnp.int8) + SYMMETRIC_ZERO).astype(jnp.uint8)
    zeros = None
    if array.zero_point is not None:
        _checks.shape("array.zero_point", array.zero_point, array.scale.shape, " like scale")
        zeros = array.zero_point.astype(array.scale.dtype) + SYMMETRIC_ZERO
    spread = lambda a: jnp.broadcast_to(jnp.repeat(a, n // a.shape[-1], -1), (*lead, groups, n))
    return QuantizedWeight(
        (jax.vmap(pack) if lead else pack)(codes),
        spread(array.scale),
        None if zeros is None else spread(zeros),
        group_size=-1 if groups == 1 else size,
        k=k,
    )


def to_qarray(weight: QuantizedWeight) -> QArray:
    """The same weight as a `QArray`, [K, N] or [L, K, N], with a tile of K for each group; not under `jit`.

    Raises:
      TypeError: it is no QuantizedWeight.
      ValueError: a QArray cannot hold the weight, because K is no multiple of its group size, its zero points
        are not integers 0..15, or its inputs are changed first (`input_scale`).
    """
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"weight: expected a QuantizedWeight, got {type(weight).__name__}")
    if own := set(weight.arrays) - {"qweight", "scales", "zeros"}:
        raise ValueError(f"weight: expected no change of the inputs, got {sorted(own)}")
    k, n = weight.shape
    groups = weight.scales.shape[-2]
    if groups > 1 and k != groups * weight.group_size:
        raise ValueError(
            f"weight: expected K to be a multiple of its group size {weight.group_size}, got {k}"
        )
    zero_point = None
    if weight.zeros is not None:
        zeros = np.asarray(weight.zeros, np.float32)
        if not np.isin(zeros, np.arange(16)).all():
            raise ValueError("weight: expected zero points that are integers 0..15, got others")
        zero_point = jnp.asarray(zeros - SYMMETRIC_ZERO, jnp.int4)
    codes = lambda qweight: unpack(qweight, (k, n)).astype(jnp.int8) - SYMMETRIC_ZERO
    qvalue = (jax.vmap(codes) if weight.qweight.ndim == 4 else codes)(weight.qweight)
    return QArray(qvalue.astype(jnp.int4), weight.scales, zero_point, jnp.int4)
