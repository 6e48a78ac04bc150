import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="flax is not installed")
from flax import errors, serialization
from flax import linen as nn

import jax_w4a16
from jax_w4a16.linen import W4A16Dense, quantize_dense

K, N = 200, 48


def dense(**options):
    return W4A16Dense(N, **({"group_size": 64, "bias_init": nn.initializers.normal(1.0)} | options))


def inputs(*lead, dtype=jnp.bfloat16, k=K):
    return jax.random.normal(jax.random.key(1), (*lead, k), dtype)


def bits(a):
    return np.asarray(a).view(f"u{a.dtype.itemsize}")


def weight_of(variables, group_size=64):
    return jax_w4a16.QuantizedWeight(**variables["quantized"]["kernel"], group_size=group_size, k=K)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_apply_is_dot(symmetric, use_bias, dtype):
    module = dense(symmetric=symmetric, use_bias=use_bias, param_dtype=dtype)
    x = inputs(2, 3, dtype=dtype)
    variables = module.init(jax.random.key(0), x)
    names = {"qweight", "scales"} if symmetric else {"qweight", "scales", "zeros"}
    assert set(variables["quantized"]["kernel"]) == names
    bias = variables["params"]["bias"] if use_bias else None
    assert ("params" in variables) == use_bias
    want = jax_w4a16.dot(x, weight_of(variables), bias=bias)
    for got in (module.apply(variables, x), jax.jit(module.apply)(variables, x)):
        np.testing.assert_array_equal(bits(got), bits(want))


def test_new_layer_holds_the_quantised_draw():
    x, key = inputs(1), jax.random.key(7)
    float_params = nn.Dense(N).init(key, x)["params"]
    got = dense().init(key, x)["quantized"]["kernel"]
    want = jax_w4a16.quantize(float_params["kernel"], group_size=64)
    np.testing.assert_array_equal(got["qweight"], want.qweight)
    np.testing.assert_array_equal(bits(got["scales"]), bits(want.scales))


@pytest.mark.parametrize("use_bias", [True, False])
def test_quantize_dense(use_bias):
    x = inputs(64, dtype=jnp.float32)
    float_module = nn.Dense(N, use_bias=use_bias, bias_init=nn.initializers.normal(1.0))
    params = float_module.init(jax.random.key(0), x)["params"]
    variables = quantize_dense(params, group_size=32, symmetric=False, param_dtype=jnp.float16)
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype("uint32"), jnp.dtype("float16")}
    module = W4A16Dense(N, use_bias=use_bias, group_size=32, symmetric=False, dtype=jnp.float16)
    fresh = module.init(jax.random.key(1), x)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(variables) == shapes(fresh)
    got, want = module.apply(variables, x), float_module.apply({"params": params}, x)
    assert got.dtype == jnp.float16
    error = np.linalg.norm(np.asarray(got - want, np.float64)) / np.linalg.norm(np.asarray(want, np.float64))
    assert 0.01 < error < 0.1


def test_quantize_dense_refuses_other_parameters():
    with pytest.raises(ValueError, match=r"params: expected 'kernel' and perhaps 'bias', got \['scale'\]"):
        quantize_dense({"scale": jnp.ones(3)})
    with pytest.raises(ValueError, match="w: expected 2 dimensions"):
        quantize_dense({"kernel": jnp.ones((3, 4, 5))})


def test_grad_of_params_alone():
    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            return dense()(nn.relu(nn.Dense(K, dtype=jnp.bfloat16)(x)))

    x = inputs(6)
    variables = Mlp().init(jax.random.key(0), x)
    loss = lambda params: (Mlp().apply(variables | {"params": params}, x).astype(jnp.float32) ** 2).mean()
    value, grads = jax.jit(jax.value_and_grad(loss))(variables["params"])
    assert set(grads) == {"Dense_0", "W4A16Dense_0"}
    stepped = jax.tree.map(lambda p, g: p - 0.05 * g, variables["params"], grads)
    assert loss(stepped) < value


def test_scan_over_layers():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return W4A16Dense(128, group_size=32, symmetric=False)(x), None

    stack = nn.scan(
        Block, variable_axes={"params": 0, "quantized": 0}, split_rngs={"params": True}, length=3
    )()
    x = inputs(5, k=128)
    variables = stack.init(jax.random.key(0), x, None)
    assert variables["quantized"]["W4A16Dense_0"]["kernel"]["qweight"].shape == (3, 2, 8, 128)
    got, want = stack.apply(variables, x, None)[0], x
    for i in range(3):
        want = Block().apply(jax.tree.map(lambda a, i=i: a[i], variables), want, None)[0]
    np.testing.assert_array_equal(bits(got), bits(want))


def test_variables_can_be_stored_as_bytes():
    x = inputs(2)
    variables = dense().init(jax.random.key(0), x)
    restored = serialization.from_bytes(
        jax.tree.map(jnp.zeros_like, variables), serialization.to_bytes(variables)
    )
    np.testing.assert_array_equal(bits(dense().apply(restored, x)), bits(dense().apply(variables, x)))


def test_errors():
    x = inputs(2)
    variables = dense().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=f"expected {N + 1} columns"):
        W4A16Dense(N + 1, group_size=64, use_bias=False).apply(variables, x)
    with pytest.raises(ValueError, match=r"x: expected shape"):
        dense().apply(variables, inputs(2, k=K + 100))
    with pytest.raises(errors.ScopeCollectionNotFound, match="quantized"):
        dense().apply({"params": variables["params"]}, x)
    with pytest.raises(ValueError, match="group_size"):
        dense(group_size=48).init(jax.random.key(0), x)
