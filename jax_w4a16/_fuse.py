"""Fused layers: weights that meet the same inputs, side by side or column by column in one product."""

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
    _check_alike({f"weights[{i}]": weight for i, weight in enumerate(weights)})
    for i, weight in enumerate(weights[:-1]):
        if weight.out_features % _layout.BLOCK_N:
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


def interleave(gate: QuantizedWeight, up: QuantizedWeight) -> QuantizedWeight:
    """Gate and up [K, F] -> one weight [K, 2F] for `dot_swiglu`, of 8 columns of gate, 8 of up, and so on.

    Columns 16i to 16i + 7 are gate's 8i to 8i + 7, and the 8 after them those of up. The codes stay packed.
    Members of stacks are interleaved member by member.

    Args:
      gate: the weight whose product silu is applied to. Its F is a multiple of 16.
      up: a weight like it: as `fuse` wants them, and of the same F.

    Raises:
      TypeError, ValueError: the weights are not as described; the message says which.
    """
    _check_alike({"gate": gate, "up": up})
    width = gate.out_features
    if width % _layout.BLOCK_N:
        raise ValueError(f"gate: expected N to be a multiple of {_layout.BLOCK_N}, got {width}")
    if up.out_features != width:
        raise ValueError(f"up: expected N {width} as of gate, got {up.out_features}")
    return QuantizedWeight(
        _interleave_codes(gate.qweight, up.qweight),
        _interleave_columns(gate.scales, up.scales),
        None if gate.zeros is None else _interleave_columns(gate.zeros, up.zeros),
        group_size=gate.group_size,
        k=gate.k,
    )


def _interleave_codes(gate, up):
    # Even nibbles are a block's columns 0 to 7, odd ones 8 to 15.
    low, high = jnp.uint32(0x0F0F0F0F), jnp.uint32(0xF0F0F0F0)
    first = (gate & low) | ((up & low) << 4)
    second = ((gate >> 4) & low) | (up & high)
    blocks = jnp.stack([first, second], -2)
    return blocks.reshape(*gate.shape[:-2], 2 * gate.shape[-2], gate.shape[-1])


def _interleave_columns(gate, up):
    half = _layout.BLOCK_N // 2
    parts = [a.reshape(*a.shape[:-1], a.shape[-1] // half, half) for a in (gate, up)]
    return jnp.stack(parts, -2).reshape(*gate.shape[:-1], 2 * gate.shape[-1])


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


def _check_alike(weights: dict[str, QuantizedWeight]) -> None:
    """Weights, by their names in messages, have all in common that one product needs."""
    (first_name, first), *_ = weights.items()
    for name, weight in weights.items():
        if not isinstance(weight, QuantizedWeight):
            raise TypeError(f"{name}: expected a QuantizedWeight, got {type(weight).__name__}")
        expected, got = _alike(first), _alike(weight)
        for fact in expected:
            if got[fact] != expected[fact]:
                raise ValueError(
                    f"{name}: expected {fact} {expected[fact]} as of {first_name}, got {got[fact]}"
                )
        if own := set(weight.arrays) - {"qweight", "scales", "zeros"}:
            raise ValueError(
                f"{name}: expected no change of the inputs, got {sorted(own)}; fuse the float "
                "weights before they are quantised"
            )


def _alike(weight: QuantizedWeight) -> dict:
    """What weights that are fused have in common."""
    return {
        "K": weight.k,
        "group_size": -1 if weight.group_size >= weight.k else weight.group_size,
        "dtype": weight.dtype.name,
        "zeros": "none" if weight.zeros is None else "some",
        "leading dimensions": tuple(weight.scales.shape[:-2]),
    }
