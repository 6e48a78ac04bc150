"""Fused layers: weights that meet the same inputs, side by side along N in one product."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jax_w4a16 import _checks, _layout
from jax_w4a16._types import QuantizedWeight


def fuse(*weights: QuantizedWeight) -> QuantizedWeight:
    """Weights [K, N0], [K, N1], ... -> one of [K, N0 + N1 + ...], such as query, key and value.

    One product with it does the work of several, and reads x once. `split` takes its result apart. Members of
    stacks are fused member by member.

    Args:
      *weights: of one K, group size and type, all or none with zeros. Each N but the last is a multiple of
        16, the width of a packed block. None has an `input_scale`: for a search that gives one, fuse the
        float weights first, so that one scale is found for all.

    Raises:
      TypeError, ValueError: the weights are not as described; the message says which.
    """
    if not weights:
        raise ValueError("weights: expected at least one, got none")
    for i, weight in enumerate(weights):
        if not isinstance(weight, QuantizedWeight):
            raise TypeError(f"weights[{i}]: expected a QuantizedWeight, got {type(weight).__name__}")
        expected, got = _alike(weights[0]), _alike(weight)
        for name in expected:
            if got[name] != expected[name]:
                raise ValueError(
                    f"weights[{i}]: expected {name} {expected[name]} as of weights[0], got {got[name]}"
                )
        if own := set(weight.arrays) - {"qweight", "scales", "zeros"}:
            raise ValueError(
                f"weights[{i}]: expected no change of the inputs, got {sorted(own)}; fuse the float "
                "weights before they are quantised"
            )
        if i + 1 < len(weights) and weight.out_features % _layout.BLOCK_N:
            raise ValueError(
                f"weights[{i}]: expected N to be a multiple of {_layout.BLOCK_N}, because another weight "
                f"follows, got {weight.out_features}"
            )
    join = lambda axis: lambda *arrays: jnp.concatenate(arrays, axis)
    return QuantizedWeight(
        join(-2)(*(w.qweight for w in weights)),
        join(-1)(*(w.scales for w in weights)),
        None if weights[0].zeros is None else join(-1)(*(w.zeros for w in weights)),
        group_size=weights[0].group_size,
        k=weights[0].k,
    )


def split(out: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """The result [..., sum(sizes)] of a fused product -> one [..., size] for each weight.

    Raises:
      TypeError, ValueError: the sizes are not whole numbers from 0 that add up to the last dimension.
    """
    if not _checks.array("out", out).shape:
        raise ValueError("out: expected at least 1 dimension, got none")
    sizes = [_checks.integer(f"sizes[{i}]", size) for i, size in enumerate(sizes)]
    if min(sizes, default=0) < 0 or sum(sizes) != out.shape[-1]:
        raise ValueError(
            f"sizes: expected numbers from 0 with a sum of {out.shape[-1]}, out's last dimension, got {sizes}"
        )
    ends = list(itertools.accumulate(sizes))
    return [out[..., end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _alike(weight: QuantizedWeight) -> dict:
    """What weights that are fused have in common."""
    return {
        "K": weight.k,
        "group_size": -1 if weight.group_size >= weight.k else weight.group_size,
        "dtype": weight.dtype.name,
        "zeros": "none" if weight.zeros is None else "some",
        "leading dimensions": tuple(weight.scales.shape[:-2]),
    }
