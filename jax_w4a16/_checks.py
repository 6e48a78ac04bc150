"""Checks of arguments. Every message names the operand, what was expected and what was got."""

import math
import numbers
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import core

from jax_w4a16 import _layout

FLOATS = (jnp.dtype("float16"), jnp.dtype("bfloat16"), jnp.dtype("float32"))


def array(name: str, value: Any) -> Any:
    """An array-like with shape and dtype; a list or a scalar is refused."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return value
    raise TypeError(f"{name}: expected an array, got {type(value).__name__}")


def rank(name: str, value: Any, expected: int) -> None:
    """`value` has `expected` dimensions."""
    if len(value.shape) != expected:
        raise ValueError(f"{name}: expected {expected} dimensions, got shape {tuple(value.shape)}")


def shape(name: str, value: Any, expected: tuple, why: str = "") -> None:
    """`value` is of shape `expected`."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {tuple(expected)}{why}, got {tuple(value.shape)}")


def dtype(name: str, value: Any, expected: Any, why: str = "") -> None:
    """`value` is of type `expected`."""
    if value.dtype != expected:
        raise TypeError(f"{name}: expected {jnp.dtype(expected).name}{why}, got {value.dtype}")


def floating(name: str, value: Any) -> None:
    """`value` is of one of the three types that the library computes with."""
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float16, bfloat16 or float32, got {value.dtype}")


def float_dtype(name: str, value: Any) -> np.dtype:
    """`value` as a dtype, one of the three that the library computes with."""
    try:
        if jnp.dtype(value) in FLOATS:
            return jnp.dtype(value)
    except TypeError:
        pass
    raise TypeError(f"{name}: expected float16, bfloat16 or float32, got {value!r}")


def integer(name: str, value: Any) -> int:
    """A Python or NumPy integer; a bool or a traced value is refused."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")


def real(name: str, value: Any) -> float:
    """A finite number that is known now (it becomes part of the program), rounded to float32."""
    if isinstance(value, core.Tracer):
        raise TypeError(f"{name}: expected a number, got a traced value; multiply the result by it instead")
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        with np.errstate(over="ignore"):
            result = float(np.float32(value))
    except OverflowError:  # an integer beyond float64
        result = math.inf
    if not np.isfinite(result):
        raise ValueError(f"{name}: expected a number that is finite in float32, got {value!r}")
    return result


def group_size(value: Any, k: int) -> int:
    """A group size as given by a user, with -1 (one group per column) replaced by K."""
    value = integer("group_size", value)
    if value == -1 or value >= max(k, 1):
        return max(k, 1)
    if value <= 0 or value % 32:
        raise ValueError(f"group_size: expected a multiple of 32, at least K = {k}, or -1, got {value}")
    return value


def infer_group_size(k: int, groups: int) -> int:
    """The group size that K and the number of groups imply."""
    if groups == min(1, k):
        return max(k, 1)
    if groups == 0 or k % groups or (k // groups) % 32:
        raise ValueError(
            f"group_size: must be given, because K = {k} and scales with {groups} groups do not imply a "
            "multiple of 32"
        )
    return k // groups


def packed(qweight: Any) -> None:
    """Type and rank of packed codes."""
    dtype("qweight", array("qweight", qweight), jnp.uint32)
    rank("qweight", qweight, 3)


def permutation(value: Any, k: int) -> None:
    """Type and shape of the order of a weight's rows, or None."""
    if value is not None:
        dtype("permutation", array("permutation", value), jnp.int32)
        shape("permutation", value, (k,), f" for K = {k}")


def input_scale(value: Any, k: int) -> None:
    """Type and shape of a weight's input_scale."""
    floating("input_scale", array("input_scale", value))
    shape("input_scale", value, (k,), f" for K = {k}")


def weight(qweight: Any, scales: Any, zeros: Any, k: int, size: Any) -> int:
    """Checks the arrays of one weight with k rows; returns its group size, K where it is per column."""
    packed(qweight)
    rank("scales", array("scales", scales), 2)
    floating("scales", scales)
    groups, n = scales.shape
    size = infer_group_size(k, groups) if size is None else group_size(size, k)
    if groups != _layout.num_groups(k, size):
        raise ValueError(
            f"scales: expected {_layout.num_groups(k, size)} groups for K = {k} and group_size {size}, "
            f"got shape {tuple(scales.shape)}"
        )
    shape("qweight", qweight, _layout.packed_shape(k, n), f" for a weight [K = {k}, N = {n}]")
    if zeros is not None:
        shape("zeros", array("zeros", zeros), scales.shape, " like scales")
        dtype("zeros", zeros, scales.dtype, " like scales")
    return size
