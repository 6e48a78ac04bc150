"""The oracles over every implementation: where codes land, exact sums, error against float64, relations."""

import concurrent.futures
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
import shapes
from conftest import device_of

import jax_w4a16

GPU_DTYPES = ("float16", "bfloat16")


def dtypes_for(implementation):
    return GPU_DTYPES if implementation == "cuda" else shapes.DTYPES


def run(case, ops, implementation, **changes):
    arrays = {
        "x": ops.x,
        "qw": ops.qweight,
        "scales": ops.scales,
        "zeros": ops.zeros,
        "bias": ops.bias,
        **changes,
    }
    arrays = {name: None if a is None else jnp.asarray(a) for name, a in arrays.items()}
    out = jax_w4a16.dot(
        **arrays,
        group_size=case.group_size,
        alpha=case.alpha,
        preferred_element_type=case.out_dtype,
        implementation=implementation,
    )
    return np.asarray(out)


# 1. One-hot sweep ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", shapes.GROUP_SIZES)
@pytest.mark.parametrize("zeros", ["none", "integer"])
def test_one_hot_rows_give_the_dequantised_weight(implementation, group_size, zeros):
    """Scales are powers of two, so a weight is exact in 16 bits, whether or not a kernel rounds it so."""
    for dtype in dtypes_for(implementation):
        case = oracle.Case(300, 300, 72, group_size, dtype, dtype, zeros, seed=1)
        ops = oracle.exact_grid(case)
        ops.x = np.eye(300).astype(ops.x.dtype)
        want = ops.weight(case.group).astype(oracle.dtype_of(dtype))
        for m in (100,) if implementation == "reference" else (1, 8, 100, 300):
            rows = np.random.default_rng(m).permutation(300)[:m]
            got = run(case, ops, implementation, x=ops.x[rows])
            np.testing.assert_array_equal(got, want[rows], err_msg=f"{case} rows {m}")


@pytest.mark.parametrize("smallest", [None, 2.0**-14, 200.0])  # of the scales, up to twice that
def test_one_hot_with_any_scale_rounds_once(implementation, smallest):
    for dtype, zeros in itertools.product(dtypes_for(implementation), ("none", "integer", "fractional")):
        case = oracle.Case(64, 64, 48, 32, dtype, dtype, zeros, seed=2)
        ops = oracle.operands(case)
        if smallest is not None:
            spread = np.random.default_rng(2).uniform(1, 2, ops.scales.shape)
            ops.scales = (smallest * spread).astype(ops.scales.dtype)
        ops.x = np.eye(64).astype(ops.x.dtype)
        want = ops.weight(case.group).astype(np.float32)
        got = run(case, ops, implementation)
        # One sum of zeros and one product: only how (code - zero) * scale is rounded is left to the kernel.
        ulp = 2 * oracle.half_ulp(oracle.dtype_of(dtype)) * np.abs(want) + 2.0**-24
        if zeros == "fractional":  # sums of code * scale and zero * scale may be taken apart
            ulp += 16 * 2.0**-23 * np.abs(np.repeat(ops.scales.astype(np.float32), 32, 0))
        assert (np.abs(got.astype(np.float32) - want) <= ulp).all(), case


# 2. Exact grid ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", shapes.EDGES)
@pytest.mark.parametrize("zeros", ["none", "integer"])
def test_exact_grid_is_bit_exact(kernel, shape, zeros):
    check_exact_grid(kernel, shape, zeros)


@pytest.mark.parametrize("zeros", ["none", "integer"])
def test_exact_grid_on_the_reference(zeros):
    check_exact_grid("reference", shapes.EDGES[1], zeros)


def check_exact_grid(implementation, shape, zeros):
    m, k, n = shape
    for dtype, group_size in itertools.product(dtypes_for(implementation), shapes.GROUP_SIZES):
        case = oracle.Case(m, k, n, group_size, dtype, "float32", zeros, bias=True, alpha=0.5, seed=3)
        ops = oracle.exact_grid(case)
        got = run(case, ops, implementation)
        np.testing.assert_array_equal(got, oracle.product(case, ops).astype(np.float32), err_msg=str(case))


# 3. Against float64 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", range(10))
def test_fuzz(kernel, batch):
    """200 seeded cases; a failure's message holds the case, which `oracle.operands` turns into its arrays."""
    for case in oracle.fuzz(20, seed=100 + batch, dtypes=dtypes_for(kernel)):
        ops = oracle.operands(case)
        oracle.check_close(case, ops, run(case, ops, kernel))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("batch", range(20))
def test_long_fuzz(batch):
    """2,000 more cases on the GPU, larger in M and K."""
    from conftest import device_of

    with jax.default_device(device_of("cuda")):
        for case in oracle.fuzz(100, seed=1000 + batch, dtypes=GPU_DTYPES):
            case = dataclasses.replace(case, m=case.m * (1 + batch % 4), k=case.k * (1 + batch % 3))
            ops = oracle.operands(case)
            oracle.check_close(case, ops, run(case, ops, "cuda"))


def test_reference_against_float64():
    for case in oracle.fuzz(12, seed=7, max_size=256):
        ops = oracle.operands(case)
        oracle.check_close(case, ops, run(case, ops, "reference"))


def test_the_check_itself_can_fail():
    """The tolerance rejects a dropped last row of K, the next group's scales, and zeros off by one."""
    case = oracle.Case(8, 256, 64, 64, zeros="integer", seed=11)
    ops = oracle.operands(case)
    good = oracle.product(case, ops).astype(ml_dtypes.bfloat16)
    oracle.check_close(case, ops, good)
    short = dataclasses.replace(ops, x=np.where(np.arange(256) < 255, ops.x, 0).astype(ops.x.dtype))
    rolled = dataclasses.replace(ops, scales=np.roll(ops.scales, 1, axis=0))
    shifted = dataclasses.replace(ops, zeros=(ops.zeros - 1).astype(ops.zeros.dtype))
    for wrong in (short, rolled, shifted):
        with pytest.raises(AssertionError, match="Case"):
            oracle.check_close(case, ops, oracle.product(case, wrong).astype(ml_dtypes.bfloat16))


# 4. Relations ----------------------------------------------------------------------------------------------


def test_rows_are_independent_and_scale_exactly(implementation):
    for dtype in dtypes_for(implementation):
        case = oracle.Case(40, 192, 56, 64, dtype, dtype, "fractional", seed=4)
        ops = oracle.operands(case)
        out = run(case, ops, implementation)
        order = np.random.default_rng(0).permutation(40)
        np.testing.assert_array_equal(run(case, ops, implementation, x=ops.x[order]), out[order])
        np.testing.assert_array_equal(run(case, ops, implementation, x=ops.x * 2), out * 2)
        zeroed = ops.x.copy()
        zeroed[7] = 0
        got = run(case, ops, implementation, x=zeroed)
        assert (got[7] == 0).all()
        np.testing.assert_array_equal(np.delete(got, 7, 0), np.delete(out, 7, 0))


@pytest.mark.parametrize("exponent", [-60, 60])
@pytest.mark.parametrize("m", [1, 8, 16])
def test_x_far_from_one(implementation, m, exponent):
    """In bfloat16 a power of two goes through a product: what a kernel makes of x has room for it."""
    for zeros, n in itertools.product(("none", "fractional"), (16, 128)):
        case = oracle.Case(m, 512, n, 128, "bfloat16", "float32", zeros, seed=12)
        ops = oracle.operands(case)
        x = ops.x.astype(np.float32) * 2.0**exponent
        got = run(case, ops, implementation, x=x.astype(ops.x.dtype)) / 2.0**exponent
        want = run(case, ops, implementation)
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max(), err_msg=str(case))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("m", [3, 100])
def test_nan_and_inf_stay_in_their_row_or_column(implementation, m, value):
    case = oracle.Case(m, 200, 40, 64, seed=5)
    ops = oracle.operands(case)
    clean = run(case, ops, implementation)
    x = ops.x.copy()
    x[1, 77] = value
    got = run(case, ops, implementation, x=x)
    assert not np.isfinite(got[1].astype(np.float32)).any()
    np.testing.assert_array_equal(np.delete(got, 1, 0), np.delete(clean, 1, 0))
    scales = ops.scales.copy()
    scales[2, 9] = value
    got = run(case, ops, implementation, scales=scales)
    assert not np.isfinite(got[:, 9].astype(np.float32)).any()
    np.testing.assert_array_equal(np.delete(got, 9, 1), np.delete(clean, 9, 1))


def test_padding_codes_do_not_matter(implementation):
    case = oracle.Case(5, 100, 20, 32, seed=6)
    ops = oracle.operands(case)
    np.testing.assert_array_equal(
        run(case, ops, implementation), run(case, ops, implementation, qw=oracle.pack(ops.codes))
    )


def test_same_call_same_bits(kernel):
    case = oracle.Case(33, 1000, 136, 128, zeros="fractional", bias=True, seed=8)
    ops = oracle.operands(case)
    first = run(case, ops, kernel)
    for _ in range(20):
        np.testing.assert_array_equal(run(case, ops, kernel), first)


# The call itself -------------------------------------------------------------------------------------------


def test_threads_share_kernels(kernel):
    """Programs of several sizes that run at once, from threads of one process, with the same kernels."""
    device = device_of(kernel)
    cases = [oracle.Case(m, 256, 512, 64, "float16", "float16", "integer", seed=m) for m in range(1, 17)]

    def call(case):
        with jax.default_device(device):  # a thread's own setting
            ops = oracle.operands(case)
            arrays = [jnp.asarray(a) for a in (ops.x, ops.qweight, ops.scales, ops.zeros)]
            dot = jax.jit(functools.partial(jax_w4a16.dot, group_size=64, implementation=kernel))
            first, *later = [np.asarray(dot(*arrays)) for _ in range(50)]
            oracle.check_close(case, ops, first)
            assert all(np.array_equal(first, out) for out in later)

    with concurrent.futures.ThreadPoolExecutor(len(cases)) as threads:
        list(threads.map(call, cases))


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (1, 0, 4)])
def test_leading_dimensions(implementation, lead):
    case = oracle.Case(int(np.prod(lead)), 128, 40, 64, bias=True, seed=9)
    ops = oracle.operands(case)
    got = run(case, ops, implementation, x=ops.x.reshape(*lead, 128))
    assert got.shape == (*lead, 40)
    oracle.check_close(case, ops, got.reshape(-1, 40))


def test_empty_sizes(implementation):
    for m, k, n in itertools.product((0, 3), (0, 64), (0, 16)):
        case = oracle.Case(m, k, n, -1, bias=True, seed=10)
        ops = oracle.operands(case)
        oracle.check_close(case, ops, run(case, ops, implementation))


def test_quantized_weight_and_arrays_are_the_same_call(implementation):
    w = jnp.asarray(np.random.default_rng(0).standard_normal((256, 32)), jnp.bfloat16)
    x = jnp.ones((3, 256), jnp.bfloat16)
    qw = jax_w4a16.quantize(w, group_size=64, symmetric=False)
    whole = jax_w4a16.dot(x, qw, implementation=implementation)
    parts = jax_w4a16.dot(x, qw.qweight, qw.scales, qw.zeros, implementation=implementation)
    np.testing.assert_array_equal(whole, parts)
    np.testing.assert_allclose(
        np.asarray(whole, np.float32), np.asarray(x @ qw.dequantize(), np.float32), rtol=2e-2, atol=0.2
    )


def test_sixteen_bit_scales_serve_float32_activations():
    case = oracle.Case(4, 128, 32, 64, "bfloat16", "float32", "integer", bias=True, seed=12)
    ops = oracle.operands(case)
    ops.x = ops.x.astype(np.float32)
    got = run(case, ops, "cpu")
    want = oracle.product(case, ops)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_per_column_group_is_inferred():
    case = oracle.Case(4, 100, 32, -1, "bfloat16", "bfloat16", seed=13)
    ops = oracle.operands(case)
    got = jax_w4a16.dot(*map(jnp.asarray, (ops.x, ops.qweight, ops.scales)))
    oracle.check_close(case, ops, np.asarray(got))


def test_numpy_operands():
    case = oracle.Case(4, 128, 32, 64, seed=14)
    ops = oracle.operands(case)
    oracle.check_close(case, ops, np.asarray(jax_w4a16.dot(ops.x, ops.qweight, ops.scales)))


# Which implementation runs ---------------------------------------------------------------------------------


def lowered(implementation, platform, dtype=jnp.bfloat16):
    case = oracle.Case(2, 64, 16, 32, jnp.dtype(dtype).name)
    ops = oracle.operands(case)
    f = jax.jit(lambda *a: jax_w4a16.dot(*a, implementation=implementation))
    return f.trace(ops.x, ops.qweight, ops.scales).lower(lowering_platforms=(platform,)).as_text()


def test_auto_is_the_kernel_on_cpu():
    assert "@w4a16_dot" in lowered("auto", "cpu")
    assert "@w4a16_dot" in lowered("auto", "cpu", jnp.float32)
    assert "@w4a16_dot" not in lowered("reference", "cpu")


@pytest.mark.usefixtures("fresh_warnings")
def test_auto_falls_back_and_says_so_once():
    with pytest.warns(UserWarning, match="no kernel for the platform tpu"):
        assert "@w4a16_dot" not in lowered("auto", "tpu")
    lowered("auto", "tpu")  # a second warning would be an error


@pytest.mark.usefixtures("fresh_warnings")
def test_auto_on_cuda_without_a_kernel(monkeypatch):
    monkeypatch.setattr(jax_w4a16._ffi, "has_cuda", lambda: False)
    with pytest.warns(UserWarning, match="this build has no CUDA kernels"):
        assert "@w4a16_dot" not in lowered("auto", "cuda")
    monkeypatch.setattr(jax_w4a16._ffi, "has_cuda", lambda: True)
    with pytest.warns(UserWarning, match="CUDA kernels take x of float16 or bfloat16, got float32"):
        assert "@w4a16_dot" not in lowered("auto", "cuda", jnp.float32)
    assert "@w4a16_dot" in lowered("auto", "cuda")
    assert "@w4a16_dot" in lowered("cuda", "cuda")
    with pytest.raises(ValueError, match="'cuda' cannot serve: the CUDA kernels take x of float16"):
        lowered("cuda", "cuda", jnp.float32)


def test_explicit_implementation_on_another_platform(monkeypatch):
    monkeypatch.setattr(jax_w4a16._ffi, "has_cuda", lambda: True)
    with pytest.raises(ValueError, match="'cuda' cannot serve: the program is for cpu"):
        lowered("cuda", "cpu")
    with pytest.raises(ValueError, match="'cpu' cannot serve: the program is for cuda"):
        lowered("cpu", "cuda")
    with pytest.raises(ValueError, match=r"'cpu' cannot serve: .*tpu"):
        lowered("cpu", "tpu")


def test_primitive_shows_in_the_jaxpr():
    ops = oracle.operands(oracle.Case(2, 64, 16, 32))
    assert "w4a16_dot[" in str(jax.make_jaxpr(jax_w4a16.dot)(ops.x, ops.qweight, ops.scales))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("k", "n", "zeros"), [(512, 384, "none"), (1000, 136, "integer"), (300, 90, "fractional")]
)
def test_batch_invariant(kernel, k, n, zeros, dtype):
    """A row alone, and among others at any place, is the same to the bit."""
    most = 300
    ops = oracle.operands(oracle.Case(most, k, n, 128, dtype, dtype, zeros))
    weight = [None if a is None else jnp.asarray(a) for a in (ops.qweight, ops.scales, ops.zeros)]
    options = {"group_size": 128, "implementation": kernel, "batch_invariant": True}
    whole = np.asarray(jax_w4a16.dot(jnp.asarray(ops.x), *weight, **options))
    for m in (1, 3, 8, 16, 33, 64, 128, 200):
        begin = (most - m) // 2
        part = np.asarray(jax_w4a16.dot(jnp.asarray(ops.x[begin : begin + m]), *weight, **options))
        assert (part == whole[begin : begin + m]).all(), m
