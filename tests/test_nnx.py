import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="flax is not installed")
from flax import nnx

import jax_w4a16
from jax_w4a16.nnx import QuantizedVariable, W4A16Linear

K, N = 200, 48


def layer(seed=0, **options):
    options = {"group_size": 64, "bias_init": nnx.initializers.normal(1.0)} | options
    return W4A16Linear(options.pop("k", K), options.pop("n", N), rngs=nnx.Rngs(seed), **options)


def inputs(*lead, dtype=jnp.bfloat16, seed=1, k=K):
    return jax.random.normal(jax.random.key(seed), (*lead, k), dtype)


def bits(a):
    return np.asarray(a).view(f"u{a.dtype.itemsize}")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_call_is_dot(symmetric, use_bias, dtype):
    model = layer(symmetric=symmetric, use_bias=use_bias, param_dtype=dtype)
    x = inputs(2, 3, dtype=dtype)
    bias = model.bias[...] if use_bias else None
    want = jax_w4a16.dot(x, model.weight, bias=bias)
    assert want.shape == (2, 3, N)
    for got in (model(x), nnx.jit(lambda m, x: m(x))(model, x)):
        np.testing.assert_array_equal(bits(got), bits(want))


def test_new_layer_holds_the_quantised_draw():
    model = layer(symmetric=False, param_dtype=jnp.float16)
    kernel = nnx.Linear(K, N, rngs=nnx.Rngs(0)).kernel[...]
    want = jax_w4a16.quantize(kernel, group_size=64, symmetric=False, scale_dtype=jnp.float16)
    for got, expected in zip(jax.tree.leaves(model.weight), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert model.weight.shape == (K, N)


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "stored", "out"),
    [
        (None, jnp.float32, jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float32, jnp.float16, jnp.float16),
        (None, jnp.float16, jnp.float16, jnp.float32),
    ],
)
def test_from_linear(dtype, param_dtype, stored, out):
    linear = nnx.Linear(
        K, N, dtype=dtype, param_dtype=param_dtype, bias_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(3)
    )
    model = W4A16Linear.from_linear(linear, group_size=32, symmetric=False)
    assert (model.scales.dtype, model.zeros.dtype, model.bias.dtype) == (stored, stored, stored)
    x = inputs(64, dtype=jnp.float32)
    got, want = model(x), linear(x)
    assert got.dtype == out
    error = np.linalg.norm(np.asarray(got - want, np.float64)) / np.linalg.norm(np.asarray(want, np.float64))
    assert 0.01 < error < 0.1


def test_from_linear_without_bias_and_of_another_layer():
    linear = nnx.Linear(K, N, use_bias=False, rngs=nnx.Rngs(0))
    assert W4A16Linear.from_linear(linear).bias is None
    with pytest.raises(TypeError, match=r"linear: expected an nnx\.Linear, got Embed"):
        W4A16Linear.from_linear(nnx.Embed(4, 4, rngs=nnx.Rngs(0)))


def test_kernel_init_may_make_a_packed_weight():
    weight = jax_w4a16.quantize(jnp.ones((64, 32)), group_size=32, symmetric=False)
    made = W4A16Linear(64, 32, kernel_init=lambda *_: weight, rngs=nnx.Rngs(0))
    assert (made.symmetric, made.group_size) == (False, 32)
    with pytest.raises(
        ValueError, match=r"kernel_init: expected a weight of shape \(128, 32\), got \(64, 32\)"
    ):
        W4A16Linear(128, 32, kernel_init=lambda *_: weight, rngs=nnx.Rngs(0))


def test_inputs_are_converted_to_the_computation_type():
    model = layer(dtype=jnp.float16, preferred_element_type=jnp.float32)
    x = inputs(5, dtype=jnp.float32)
    got = model(x)
    assert got.dtype == jnp.float32
    half = lambda a: a.astype(jnp.float16)
    weight = jax_w4a16.QuantizedWeight(model.qweight[...], half(model.scales[...]), group_size=64, k=K)
    want = jax_w4a16.dot(half(x), weight, bias=half(model.bias[...]), preferred_element_type=jnp.float32)
    np.testing.assert_array_equal(got, want)


def test_only_the_bias_is_a_param():
    model = layer(symmetric=False)
    params, quantized, rest = nnx.split(model, nnx.Param, QuantizedVariable, ...)[1:]
    assert set(params) == {"bias"}
    assert set(quantized) == {"qweight", "scales", "zeros"}
    assert not jax.tree.leaves(rest)
    assert all(jnp.issubdtype(a.dtype, jnp.floating) for a in jax.tree.leaves(params))


def test_split_and_merge():
    model = layer()
    x = inputs(4)
    definition, state = nnx.split(model)
    got = jax.jit(lambda state, x: nnx.merge(definition, state)(x))(state, x)
    np.testing.assert_array_equal(bits(got), bits(model(x)))


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(K, K, dtype=jnp.bfloat16, rngs=rngs)
        self.second = layer()

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def test_grad_trains_the_float_parameters():
    model, x = Mlp(nnx.Rngs(0)), inputs(6)
    loss = lambda m: (m(x).astype(jnp.float32) ** 2).mean()
    value, grads = nnx.jit(nnx.value_and_grad(loss))(model)
    assert {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(grads)} == {
        "first/kernel",
        "first/bias",
        "second/bias",
    }
    before = bits(model.second.qweight[...]).copy()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    params = jax.tree.map(lambda p, g: p - 0.05 * g.astype(p.dtype), params, grads)
    stepped = nnx.merge(graph, params, rest)
    assert loss(stepped) < value
    np.testing.assert_array_equal(bits(stepped.second.qweight[...]), before)


def test_grad_through_the_layer_is_that_of_the_dequantised_weight():
    model, x = layer(use_bias=False), inputs(6)
    got = jax.grad(lambda x: model(x).astype(jnp.float32).sum())(x)
    want = model.weight.dequantize(jnp.float32).sum(1)
    np.testing.assert_allclose(got.astype(jnp.float32), jnp.broadcast_to(want, (6, K)), rtol=0.02, atol=0.02)


def test_scales_can_be_trained_when_asked_for():
    model, x = layer(), inputs(6)
    wrt = nnx.All(QuantizedVariable, nnx.PathContains("scales"))
    grads = nnx.grad(lambda m: m(x).astype(jnp.float32).sum(), argnums=nnx.DiffState(0, wrt))(model)
    assert set(grads) == {"scales"}
    assert float(jnp.abs(grads["scales"][...].astype(jnp.float32)).max()) > 0


def test_stack_by_vmap_runs_in_scan():
    count, size = 3, 128

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return W4A16Linear(size, size, group_size=32, symmetric=False, rngs=rngs)

    layers = stack(nnx.Rngs(0))
    assert layers.qweight.shape == (count, 2, 8, 128)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(one, x):
        return one(x)

    x = inputs(5, k=size)
    got, want = forward(layers, x), x
    definition, state = nnx.split(layers)
    for i in range(count):
        want = nnx.merge(definition, jax.tree.map(lambda a, i=i: a[i], state))(want)
    np.testing.assert_array_equal(bits(got), bits(want))
    each = nnx.vmap(lambda one, x: one(x), in_axes=(0, None))(layers, x)
    assert each.shape == (count, 5, size)
    np.testing.assert_array_equal(
        bits(each[0]), bits(nnx.merge(definition, jax.tree.map(lambda a: a[0], state))(x))
    )


def test_shapes_without_memory():
    model = nnx.eval_shape(lambda: layer(k=1 << 20, n=1 << 20))
    assert model.qweight.shape == (1 << 14, 1 << 16, 128)


def test_errors():
    with pytest.raises(ValueError, match="group_size"):
        layer(group_size=48)
    with pytest.raises(ValueError, match=f"K = {K}"):
        layer()(inputs(2, k=K + 1))
    with pytest.raises(TypeError, match="symmetric"):
        layer(symmetric=1.5)


@pytest.mark.parametrize("module", ["nnx", "linen"])
def test_flax_is_optional(module):
    code = (
        "import sys; sys.modules['flax'] = None\n"
        "import jax_w4a16\n"
        f"try:\n    import jax_w4a16.{module}\n"
        "except ImportError as error:\n    print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install jax_w4a16[flax]" in ran.stdout
