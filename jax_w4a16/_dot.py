"""The public products, dot and ragged_dot: they check their arguments and bind a primitive."""

import functools

import jax
import jax.numpy as jnp

from jax_w4a16 import _checks, _ffi, _primitive, _ragged, _sharding
from jax_w4a16._types import QuantizedWeight

IMPLEMENTATIONS = ("auto", "cuda", "cpu", "reference")
MOST_EXPERTS = 2**16  # of the native library (problem.cc)


def dot(
    x,
    qw,
    scales=None,
    zeros=None,
    *,
    group_size: int | None = None,
    bias=None,
    alpha: float = 1.0,
    preferred_element_type=None,
    batch_invariant: bool = False,
    implementation: str = "auto",
) -> jax.Array:
    """alpha * x @ w + bias for a weight w [K, N] of packed 4-bit codes.

    w[k, n] = (code[k, n] - zeros[k/g, n]) * scales[k/g, n]. Sums are float32; alpha and bias are applied in
    float32, before the one rounding to the result's type. Differentiable in x, scales, zeros and bias; the
    gradient with respect to x takes the weight in the result's type: in float16, what is beyond 65504 is inf.

    Args:
      x: activations [..., K], float16, bfloat16 or (CPU and reference only) float32. Hopper's kernels need
        bfloat16 ones below 2^63.
      qw: a QuantizedWeight, or packed codes, uint32 [ceil(K/64), ceil(N/16), 128].
      scales: [ceil(K/g), N] of x's type, where qw is an array. 16-bit scales also serve a float32 x; so do
        zeros and bias. Hopper's kernels need bfloat16 scales below 2^35, and float16 ones below 1024.
      zeros: like scales, in units of codes; None means 8.
      group_size: g, where qw is an array; default: what K and the number of groups imply, which must then
        divide K. -1: one group per column.
      bias: [N] of x's type, or None.
      alpha: a number. Kernels for few tokens need one below 2^58 in bfloat16, 2^103 in float16.
      preferred_element_type: type of the result: x's (default) or float32.
      batch_invariant: sums run along K in one order whatever M is, so that a row's result is the same, to the
        bit, alone and in any batch. Costs time on a GPU at small M; CPU kernels always do so. A kernel's
        promise: the reference makes none.
      implementation: "cuda" or "cpu", the kernels; "reference", plain JAX; "auto", the kernel of the
        platform, or the reference, with a warning, where there is none that can serve.

    Returns:
      [..., N].

    Raises:
      TypeError, ValueError: an argument is not as described, or the implementation asked for cannot serve;
        the message names the operand, what was expected and what was got.
    """
    x, qweight, scales, zeros, permutation, size = operands(x, qw, scales, zeros, group_size)
    if bias is not None:
        n = scales.shape[1]
        _checks.shape("bias", _checks.array("bias", bias), (n,), f" for N = {n}")
        bias = _like_x("bias", bias, x.dtype)
    out_dtype = _result_dtype(x, preferred_element_type)
    check_implementation(implementation)
    if not isinstance(batch_invariant, bool):
        raise TypeError(f"batch_invariant: expected True or False, got {batch_invariant!r}")
    params = (size, _checks.real("alpha", alpha), out_dtype, batch_invariant, implementation)
    return _dot(x, qweight, scales, zeros, bias, permutation, params)


@functools.partial(jax.jit, static_argnums=6, inline=True)
def _dot(x, qweight, scales, zeros, bias, permutation, params):
    if permutation is not None:
        x = _sharding.whole_along(x, -1)[..., permutation]
    group_size, alpha, out_dtype, batch_invariant, implementation = params
    return _primitive.dot(
        x,
        qweight,
        scales,
        zeros,
        bias,
        group_size=group_size,
        alpha=alpha,
        out_dtype=out_dtype,
        batch_invariant=batch_invariant,
        implementation=implementation,
    )


def ragged_dot(
    x,
    qw,
    scales=None,
    zeros=None,
    *,
    group_sizes,
    group_size: int | None = None,
    preferred_element_type=None,
    implementation: str = "auto",
) -> jax.Array:
    """Each row of x times the weight of its expert: `jax.lax.ragged_dot` with packed weights.

    The rows of x are sorted by expert: the first group_sizes[0] are the first expert's, and so on. Rows
    beyond the sum of group_sizes give zeros; a negative size counts as 0. Only the weights of experts that
    have rows are read. Otherwise as `dot`, but for these:

    - The gradient with respect to x dequantises all experts' weights, that with respect to scales makes one
      product for each expert.
    - Calls are split over devices by the caller, in `shard_map`: each device has some columns of every
      weight, or whole experts and their rows. Under Auto and Explicit axes every device computes all of it,
      with a warning.

    Args:
      x: activations [M, K], float16, bfloat16 or (CPU and reference only) float32.
      qw: a QuantizedWeight stacked along one leading dimension, the experts E (at most 65,536), without
        permutation and input_scale; or packed codes, uint32 [E, ceil(K/64), ceil(N/16), 128].
      scales: [E, ceil(K/g), N] of x's type, where qw is an array.
      zeros: like scales, in units of codes; None means 8.
      group_sizes: rows of each expert, int32 [E]; need not be known when the program is compiled.
      group_size: g, where qw is an array, as in `dot`.
      preferred_element_type: type of the result: x's (default) or float32.
      implementation: as in `dot`.

    Returns:
      [M, N].

    Raises:
      TypeError, ValueError: as `dot`.
    """
    qweight, scales, zeros, group_size = _arrays(qw, scales, zeros, group_size)
    _checks.floating("x", _checks.array("x", x))
    _checks.rank("x", x, 2)
    k = x.shape[1]
    if isinstance(qw, QuantizedWeight):
        for name in ("permutation", "input_scale"):
            if getattr(qw, name) is not None:
                raise ValueError(f"qw: expected a weight without {name}, got one with it")
        if k != qw.in_features:
            raise ValueError(f"x: expected shape [M, K = {qw.in_features}], got {tuple(x.shape)}")
    _checks.dtype("qweight", qweight, jnp.uint32)
    _checks.rank("qweight", qweight, 4)
    experts = qweight.shape[0]
    if experts > MOST_EXPERTS:
        raise ValueError(
            f"qweight: expected at most {MOST_EXPERTS} experts, got shape {tuple(qweight.shape)}"
        )
    for name, value in (("scales", scales), ("zeros", zeros)):
        if value is not None:
            _checks.rank(name, _checks.array(name, value), 3)
            if value.shape[0] != experts:
                raise ValueError(
                    f"{name}: expected the {experts} experts of qweight, got shape {tuple(value.shape)}"
                )
    one = lambda a: a if a is None else jax.ShapeDtypeStruct(a.shape[1:], a.dtype)
    size = _checks.weight(one(qweight), one(scales), one(zeros), k, group_size)
    _checks.dtype("group_sizes", _checks.array("group_sizes", group_sizes), jnp.int32)
    _checks.shape("group_sizes", group_sizes, (experts,), f" for {experts} experts")
    scales, zeros = _like_x("scales", scales, x.dtype), _like_x("zeros", zeros, x.dtype)
    out_dtype = _result_dtype(x, preferred_element_type)
    check_implementation(implementation)
    return _ragged_dot(x, group_sizes, qweight, scales, zeros, (size, out_dtype, implementation))


@functools.partial(jax.jit, static_argnums=5, inline=True)
def _ragged_dot(x, group_sizes, qweight, scales, zeros, params):
    group_size, out_dtype, implementation = params
    return _ragged.ragged_dot(
        x,
        group_sizes,
        qweight,
        scales,
        zeros,
        group_size=group_size,
        out_dtype=out_dtype,
        implementation=implementation,
    )


def operands(x, qw, scales=None, zeros=None, group_size=None) -> tuple:
    """x with the weight's input_scale, qweight, scales, zeros, permutation and group size, all checked."""
    qweight, scales, zeros, group_size = _arrays(qw, scales, zeros, group_size)
    _checks.floating("x", _checks.array("x", x))
    if len(x.shape) < 1:
        raise ValueError(f"x: expected shape [..., K], got {tuple(x.shape)}")
    k = x.shape[-1]
    _checks.packed(qweight)
    if isinstance(qw, QuantizedWeight) and k != qw.in_features:
        raise ValueError(f"x: expected shape [..., K = {qw.in_features}], got {tuple(x.shape)}")
    if isinstance(qw, QuantizedWeight) and qw.input_scale is not None:
        _checks.input_scale(qw.input_scale, k)
        x = x * qw.input_scale.astype(x.dtype)
    size = _checks.weight(qweight, scales, zeros, k, group_size)
    permutation = qw.permutation if isinstance(qw, QuantizedWeight) else None
    _checks.permutation(permutation, k)
    scales, zeros = _like_x("scales", scales, x.dtype), _like_x("zeros", zeros, x.dtype)
    return x, qweight, scales, zeros, permutation, size


def _arrays(qw, scales, zeros, group_size) -> tuple:
    """Packed codes, scales, zeros and group size: a QuantizedWeight's, or beside an array."""
    if isinstance(qw, QuantizedWeight):
        for name, value in (("scales", scales), ("zeros", zeros), ("group_size", group_size)):
            if value is not None:
                raise TypeError(f"{name}: expected None, because qw is a QuantizedWeight, got {_text(value)}")
        return qw.qweight, qw.scales, qw.zeros, qw.group_size
    qweight = _checks.array("qw", qw)
    if scales is None:
        raise TypeError("scales: expected an array, because qw is a packed array, got None")
    return qweight, scales, zeros, group_size


def _result_dtype(x, preferred_element_type):
    out_dtype = x.dtype if preferred_element_type is None else preferred_element_type
    out_dtype = _checks.float_dtype("preferred_element_type", out_dtype)
    if out_dtype not in (x.dtype, jnp.float32):
        raise TypeError(
            f"preferred_element_type: expected x's type {x.dtype} or float32, got {out_dtype.name}"
        )
    return out_dtype


def check_implementation(implementation) -> None:
    """It is one of IMPLEMENTATIONS, and CUDA's kernels are there where they are asked for."""
    if not isinstance(implementation, str) or implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected one of {IMPLEMENTATIONS}, got {implementation!r}")
    if implementation == "cuda" and not _ffi.has_cuda():
        raise ValueError(
            "implementation: expected one that this build has, got 'cuda'; it has no CUDA kernels"
        )


def _text(value) -> str:
    return f"an array of shape {tuple(value.shape)}" if hasattr(value, "shape") else repr(value)


def _like_x(name: str, value, dtype):
    """`value` in x's type: the same, or 16 bits beside a float32 x, which loses nothing."""
    if value is None or value.dtype == dtype:
        return value
    if dtype == jnp.float32 and value.dtype in _checks.FLOATS:
        return jax.lax.convert_element_type(value, dtype)
    raise TypeError(f"{name}: expected x's type {dtype}, got {value.dtype}; convert it with astype")
