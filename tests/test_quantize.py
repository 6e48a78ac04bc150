"""quantize and dequantize: the kernels against the plain JAX twin and against the rule, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import shapes

import jax_w4a16
from jax_w4a16 import _primitive, _reference

SHAPES = [(64, 16), (200, 40), (1, 1), (33, 17), (256, 64), (0, 8), (8, 0), (1000, 24)]


def weight(shape, dtype, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) * 3).astype(oracle.dtype_of(dtype))


def rule(w, group, symmetric, scale_dtype):
    """ffi/quantize.h, one group at a time, in float32."""
    k, n = w.shape
    codes, scales, zeros = np.zeros((k, n), np.uint8), [], []
    for start in range(0, k, group):
        rows = w[start : start + group].astype(np.float32)
        if symmetric:
            scale = np.abs(rows).max(0) * np.float32(1 / 7.5)
        else:
            low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
            scale = (high - low) * np.float32(1 / 15)
        scale = scale.astype(scale_dtype)
        scales.append(scale)
        scale = scale.astype(np.float32)
        divisor = np.where(scale == 0, np.float32(1), scale)
        zero = np.full(n, 8, np.float32)
        if not symmetric:
            zero = np.where(scale == 0, 0, np.clip(np.rint(-low / divisor), 0, 15)).astype(np.float32)
            zeros.append(zero.astype(scale_dtype))
        code = np.clip(np.rint(rows / divisor) + zero, 0, 15)
        codes[start : start + group] = np.where(scale == 0, zero, code)
    stack = lambda rows: np.stack(rows) if rows else np.zeros((0, n), scale_dtype)
    return codes, stack(scales), None if symmetric else stack(zeros)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("dtype", "scale_dtype"),
    [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "bfloat16"), ("float32", "float32")],
)
def test_quantize_follows_the_rule(implementation, dtype, scale_dtype, symmetric):
    for shape, group_size in zip(SHAPES, [32, 64, -1, 32, 128, 64, 32, 96], strict=True):
        w = weight(shape, dtype)
        group = max(shape[0], 1) if group_size == -1 else group_size
        got = _primitive.quantize(
            jnp.asarray(w),
            group_size=group,
            symmetric=symmetric,
            scale_dtype=scale_dtype,
            implementation=implementation,
        )
        codes, scales, zeros = rule(w, group, symmetric, oracle.dtype_of(scale_dtype))
        np.testing.assert_array_equal(jax_w4a16.unpack(got[0], shape), codes, err_msg=f"{shape} {group_size}")
        np.testing.assert_array_equal(got[1], scales, err_msg=f"{shape} {group_size}")
        if zeros is not None:
            np.testing.assert_array_equal(got[2], zeros, err_msg=f"{shape} {group_size}")


def special_weight():
    """Columns: zero, too small for float16, NaN, infinite, all positive, all negative, one value, huge."""
    w = weight((64, 8), "float32", 3)
    w[:, 0] = 0
    w[:, 1] *= 1e-9
    w[5, 2] = np.nan
    w[7, 3] = np.inf
    w[:, 4] = np.abs(w[:, 4]) + 1
    w[:, 5] = -np.abs(w[:, 5]) - 1
    w[:, 6] = 0.37
    w[:, 7] *= 1e30
    return w


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_quantize_of_special_values_is_the_twin_bit_for_bit(kernel, symmetric, scale_dtype):
    w = jnp.asarray(special_weight())
    params = {"group_size": 32, "symmetric": symmetric, "scale_dtype": jnp.dtype(scale_dtype)}
    got = _primitive.quantize(w, **params, implementation=kernel)
    with jax.default_device(jax.devices("cpu")[0]):  # XLA's division on a GPU is not rounded correctly
        want = jax.jit(lambda w: _reference.quantize(w, **params))(special_weight())
    for a, b in zip(got, want, strict=False):
        bits = np.uint32 if a.dtype.itemsize == 4 else np.uint16
        a, b = np.asarray(a), np.asarray(b)
        nan = np.isnan(a.astype(np.float32)) & np.isnan(b.astype(np.float32))
        np.testing.assert_array_equal(np.where(nan, 0, a.view(bits)), np.where(nan, 0, b.view(bits)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_special_values_show_where_they_are(symmetric):
    qw = jax_w4a16.quantize(
        jnp.asarray(special_weight()), group_size=32, symmetric=symmetric, scale_dtype="float32"
    )
    w = np.asarray(qw.dequantize())
    assert (w[:, 0] == 0).all()
    assert np.isnan(w[:32, 2]).all()
    assert np.isfinite(w[32:, 2]).all()
    assert np.isfinite(w[:, 4:]).all()


@pytest.mark.parametrize("group_size", shapes.GROUP_SIZES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantize_errs_by_at_most_half_a_step(group_size, symmetric):
    w = weight((512, 48), "float32", 5)
    qw = jax_w4a16.quantize(jnp.asarray(w), group_size=group_size, symmetric=symmetric, scale_dtype="float32")
    step = np.asarray(_reference.per_row(qw.scales, 512, 512 if group_size == -1 else group_size))
    error = np.abs(np.asarray(qw.dequantize()) - w)
    # The positive extreme of a symmetric group lies half a step beyond code 15.
    assert (error <= 0.501 * step).all()


def test_quantize_fields_and_defaults():
    w = jnp.asarray(weight((200, 40), "float32"))
    qw = jax_w4a16.quantize(w)
    assert (qw.shape, qw.group_size, qw.dtype, qw.zeros) == ((200, 40), 128, jnp.bfloat16, None)
    assert jax_w4a16.quantize(w.astype(jnp.float16)).dtype == jnp.float16
    per_column = jax_w4a16.quantize(w, group_size=-1, symmetric=False)
    assert (per_column.group_size, per_column.scales.shape, per_column.zeros.shape) == (-1, (1, 40), (1, 40))
    assert jax_w4a16.quantize(w, group_size=256).scales.shape == (1, 40)
    in_jit = jax.jit(lambda w: jax_w4a16.quantize(w, group_size=64))(w)
    assert in_jit.group_size == 64
    assert in_jit.validate() is in_jit
    np.testing.assert_array_equal(in_jit.qweight, jax_w4a16.quantize(w, group_size=64).qweight)


@pytest.mark.parametrize("group_size", shapes.GROUP_SIZES)
@pytest.mark.parametrize("zeros", ["none", "integer", "fractional"])
@pytest.mark.parametrize("dtype", shapes.DTYPES)
def test_dequantize_is_exact(implementation, group_size, zeros, dtype):
    case = oracle.Case(0, 300, 37, group_size, dtype, zeros=zeros, seed=7)
    ops = oracle.operands(case)
    for out in shapes.DTYPES:
        got = _primitive.dequantize(
            *(None if a is None else jnp.asarray(a) for a in (ops.qweight, ops.scales, ops.zeros)),
            k=300,
            group_size=case.group,
            dtype=out,
            implementation=implementation,
        )
        # code - zero is exact, so float32 rounds the product once, and so does `out`.
        want = ops.weight(case.group).astype(np.float32).astype(oracle.dtype_of(out))
        np.testing.assert_array_equal(got, want)


def test_dequantize_defaults():
    case = oracle.Case(0, 128, 32, 64, "float16", zeros="integer")
    ops = oracle.operands(case)
    got = jax_w4a16.dequantize(ops.qweight, ops.scales, ops.zeros)
    np.testing.assert_array_equal(got, ops.weight(64).astype(np.float32).astype(np.float16))
    cut = jax_w4a16.dequantize(
        ops.qweight, ops.scales, ops.zeros, jnp.float32, group_size=64, in_features=100
    )
    np.testing.assert_array_equal(cut, ops.weight(64)[:100].astype(np.float32))
