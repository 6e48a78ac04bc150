"""The searches of `quantize`: what each improves, and what it leaves alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_w4a16
from jax_w4a16 import _layout
from jax_w4a16._fit import fit

K, N, T = 200, 24, 64


def weight(k=K, seed=0, dtype=jnp.float32):
    # Heavy tails, so that clipping pays.
    return jnp.asarray(np.random.default_rng(seed).standard_t(4, (k, N)), dtype)


def inputs(k=K, seed=1):
    """Channels of very different size, correlated."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((T, 16)) @ rng.standard_normal((16, k)) / 4 + rng.standard_normal((T, k))
    return jnp.asarray(mixed * rng.lognormal(0, 1.5, k), jnp.float32)


def group_errors(qw, w, group_size):
    k = w.shape[0]
    size = k if group_size == -1 else group_size
    error = np.square(np.asarray(qw.dequantize(jnp.float32) - w, np.float64))
    error = np.pad(error, ((0, _layout.num_groups(k, size) * size - k), (0, 0)))
    return error.reshape(-1, size, N).sum(1)


def output_error(qw, w, x):
    got = jax_w4a16.dot(x, qw, implementation="reference")
    return float(np.square(np.asarray(got - x @ w, np.float64)).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_mse_is_no_worse_in_any_group_and_better_in_many(symmetric, group_size, dtype):
    w = weight()
    options = {"group_size": group_size, "symmetric": symmetric, "scale_dtype": dtype}
    nearest = group_errors(jax_w4a16.quantize(w, **options), w, group_size)
    searched = jax_w4a16.quantize(w, search="mse", **options).validate()
    found = group_errors(searched, w, group_size)
    assert (searched.zeros is None) == symmetric
    # The search sums in float32.
    assert (found <= nearest * (1 + 1e-5)).all()
    assert (found < 0.99 * nearest).mean() > 0.25


def test_mse_of_a_group_that_needs_no_clipping_is_nearest():
    codes = np.random.default_rng(0).integers(0, 16, (64, N))
    codes[:2] = [[0], [15]]
    w = jnp.asarray((codes - 8) * 0.25, jnp.float32)
    options = {"group_size": 64, "symmetric": False, "scale_dtype": jnp.float32}
    got, want = jax_w4a16.quantize(w, search="mse", **options), jax_w4a16.quantize(w, **options)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(got.dequantize(), w)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_awq_keeps_the_outputs(symmetric, group_size, dtype):
    w = weight()
    options = {"group_size": group_size, "symmetric": symmetric, "scale_dtype": dtype}
    scaled = jax_w4a16.quantize(w, search="awq", inputs=inputs(), **options).validate()
    assert (scaled.input_scale.shape, scaled.input_scale.dtype) == ((K,), dtype)
    others = inputs(seed=1) * jnp.asarray(np.random.default_rng(5).choice([-1, 1], (T, 1)))
    for search in (None, "mse"):
        rival = jax_w4a16.quantize(w, search=search, **options)
        for x in (inputs(), others):
            assert output_error(scaled, w, x) < 0.7 * output_error(rival, w, x)


def test_awq_of_equal_channels_is_clipping():
    """Where no channel is larger than another, s is 1 whatever alpha is."""
    x = jnp.asarray(np.random.default_rng(0).choice([-1.0, 1.0], (T, K)), jnp.float32)
    got = jax_w4a16.quantize(weight(), search="awq", inputs=x)
    np.testing.assert_array_equal(got.input_scale.astype(jnp.float32), 1)
    want = jax_w4a16.quantize(weight(), search="mse")
    np.testing.assert_array_equal(got.qweight, want.qweight)
    np.testing.assert_array_equal(got.scales, want.scales)


def test_awq_with_a_dead_channel_and_a_nan():
    x = inputs().at[:, 3].set(0)
    w = weight().at[5, 7].set(jnp.nan)
    got = np.array(jax_w4a16.quantize(w, group_size=32, search="awq", inputs=x).dequantize(jnp.float32))
    assert np.isnan(got[:32, 7]).all()
    got[:32, 7] = 0
    assert np.isfinite(got).all()


def test_input_scale_can_move_into_the_norm_before():
    w, x = weight(), inputs()
    scaled = jax_w4a16.quantize(w, search="awq", inputs=x, group_size=32, scale_dtype=jnp.float32)
    norm = jnp.linspace(0.5, 2, K)
    want = jax_w4a16.dot(x * norm, scaled)
    plain = dataclasses.replace(scaled, input_scale=None)
    got = jax_w4a16.dot(x * (norm * scaled.input_scale), plain)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def test_fit_is_no_worse_than_to_nearest():
    """By its own measure, whatever the column; on a grid to nearest is exact."""
    for seed in range(40):
        w, x = weight(k=64, seed=seed)[:, :1], inputs(k=64, seed=seed + 100)
        options = {"group_size": -1, "symmetric": False, "scale_dtype": jnp.float32}
        power = np.mean(np.square(x, dtype=np.float64), axis=0)[:, None]
        errors = [
            float((power * np.square(np.asarray(qw.dequantize(), np.float64) - w)).sum())
            for qw in (
                jax_w4a16.quantize(w, search="fit", inputs=x, **options),
                jax_w4a16.quantize(w, **options),
            )
        ]
        assert errors[0] <= errors[1] * (1 + 1e-5), seed


def test_fit_is_the_fit_of_the_mean_squares():
    w, x = weight(), inputs()
    got = jax_w4a16.quantize(w, group_size=64, symmetric=False, search="fit", inputs=x)
    want = jax.jit(lambda w, p: fit(w, p, group_size=64, scale_dtype=jnp.bfloat16))(w, (x**2).mean(0))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("search", ["mse", "awq", "fit"])
def test_shapes_without_codes(search):
    x = None if search == "mse" else jnp.ones((2, 0))
    got = jax_w4a16.quantize(jnp.ones((0, 8)), symmetric=False, search=search, inputs=x).validate()
    assert got.shape == (0, 8)


def test_input_scale_in_dot_and_dequantize():
    scaled = jax_w4a16.quantize(weight(), search="awq", inputs=inputs(), scale_dtype=jnp.float16)
    eye = jnp.eye(K, dtype=jnp.float32)
    np.testing.assert_allclose(
        jax_w4a16.dot(eye, scaled), scaled.dequantize(jnp.float32), rtol=1e-6, atol=1e-7
    )
    grads = jax.grad(lambda q: jax_w4a16.dot(eye, q).sum(), allow_int=True)(scaled)
    want = scaled.dequantize(jnp.float32).sum(1) / scaled.input_scale
    np.testing.assert_allclose(grads.input_scale.astype(jnp.float32), want, rtol=1e-2, atol=1e-2)
    assert scaled.nbytes == sum(a.nbytes for a in jax.tree.leaves(scaled))


def test_refused():
    w, x = weight(), inputs()
    for options, error, match in (
        (
            {"search": "best"},
            ValueError,
            r"search: expected one of \(None, 'mse', 'awq', 'fit'\), got 'best'",
        ),
        ({"search": "fit", "inputs": x}, ValueError, "symmetric: expected False for search='fit'"),
        (
            {"search": "awq"},
            TypeError,
            r"inputs: expected an array \[T, K = 200\] for search='awq', got None",
        ),
        ({"search": "awq", "inputs": x[0]}, ValueError, r"inputs: expected shape \[T, K = 200\]"),
        ({"search": "awq", "inputs": x[:0]}, ValueError, r"T > 0, got \(0, 200\)"),
        ({"search": "awq", "inputs": x.astype(int)}, TypeError, "inputs: expected float16"),
        ({"inputs": x}, TypeError, "inputs: expected None for search=None, got an array"),
    ):
        with pytest.raises(error, match=match):
            jax_w4a16.quantize(w, **options)
    good = jax_w4a16.quantize(w, search="awq", inputs=x)
    bad = dataclasses.replace(good, input_scale=jnp.ones(K - 1))
    with pytest.raises(ValueError, match=r"input_scale: expected shape \(200,\) for K"):
        bad.validate()
    with pytest.raises(ValueError, match=r"input_scale: expected shape \(200,\) for K"):
        jax_w4a16.dot(jnp.ones((1, K)), bad)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize(("split", "reduces"), [("batch", 0), ("columns", 0), ("rows", 1)])
def test_input_scale_of_a_sharded_weight(kind, split, reduces):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    put = lambda a, *spec: jax.device_put(
        a, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    )
    x = inputs(k=512).astype(jnp.bfloat16)
    w = jnp.asarray(np.random.default_rng(0).standard_normal((512, 64)), jnp.bfloat16)
    one = jax_w4a16.quantize(w, group_size=64, search="awq", inputs=x)
    specs = {  # of x; codes and scales; input_scale
        "batch": (("d",), (), ()),
        "columns": ((), (None, "d"), ()),
        "rows": ((None, "d"), ("d",), ("d",)),
    }[split]
    with jax.set_mesh(mesh):
        weight = dataclasses.replace(
            one,
            qweight=put(one.qweight, *specs[1]),
            scales=put(one.scales, *specs[1]),
            input_scale=put(one.input_scale, *specs[2]),
        )
        operands = put(x, *specs[0]), weight
        hlo = jax.jit(jax_w4a16.dot).lower(*operands).compile().as_text()
        got = jax.jit(jax_w4a16.dot)(*operands)
    assert hlo.count(" all-reduce(") == reduces
    assert not any(op in hlo for op in (" all-gather(", " all-to-all(", " collective-permute("))
    want = np.asarray(jax_w4a16.dot(x, one), np.float32)
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=0.02, atol=0.01 * np.abs(want).max())
