"""Fine-tuning around packed layers: the loss falls, packed codes keep their bits, optimisers see floats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="flax is not installed")
pytest.importorskip("optax", reason="optax is not installed")
import optax
from flax import linen as nn
from flax import nnx

from jax_w4a16 import Rule, quantize_model
from jax_w4a16.linen import W4A16Dense
from jax_w4a16.nnx import QuantizedVariable, W4A16Linear

WIDTH, HIDDEN, RANK, STEPS = 64, 128, 4, 60


class Mlp(nnx.Module):
    def __init__(self, rngs):
        options = {"dtype": jnp.bfloat16, "rngs": rngs}
        self.up = nnx.Linear(WIDTH, HIDDEN, **options)
        self.down = nnx.Linear(HIDDEN, WIDTH, **options)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(x)))


def task():
    """Inputs, and what another model makes of them."""
    x = jax.random.normal(jax.random.key(0), (128, WIDTH), jnp.bfloat16)
    return x, Mlp(nnx.Rngs(7))(x).astype(jnp.float32)


def loss_of(out, wanted):
    return jnp.square(out.astype(jnp.float32) - wanted).mean()


def is_float(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def copies(tree):
    return [np.array(a) for a in jax.tree.leaves(tree)]


@pytest.fixture
def model():
    return quantize_model(Mlp(nnx.Rngs(0)), Rule(group_size=32, symmetric=False), progress=False)


def test_nnx_lora(model):
    def adapt(path, node):
        if not isinstance(node, W4A16Linear):
            return node
        sizes = node.in_features, RANK, node.out_features
        return nnx.LoRA(*sizes, base_module=node, dtype=jnp.bfloat16, rngs=nnx.Rngs(len(path[0])))

    x, wanted = task()
    before = model(x)
    model = nnx.recursive_map(adapt, model)
    np.testing.assert_array_equal(model(x), before)

    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)
    adapters = 2 * 2  # a and b of two layers
    moments = [a for a in jax.tree.leaves(nnx.state(optimizer)) if a.ndim]
    assert len(moments) == 2 * adapters
    assert all(map(is_float, moments))
    packed, biases = copies(nnx.state(model, QuantizedVariable)), copies(model.up.base_module.bias[...])
    assert {a.dtype for a in packed} == {np.dtype("uint32"), jnp.dtype("bfloat16")}

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: loss_of(model(x), wanted)
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(STEPS)]
    assert losses[-1] < 0.5 * losses[0], losses
    for got, want in (
        (nnx.state(model, QuantizedVariable), packed),
        (model.up.base_module.bias[...], biases),
    ):
        for a, b in zip(jax.tree.leaves(got), want, strict=True):
            np.testing.assert_array_equal(np.asarray(a), b)


def test_nnx_optimisers_of_params_see_floats(model):
    x, wanted = task()
    grads = nnx.grad(lambda model: loss_of(model(x), wanted))(model)
    assert {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(grads)} == {"up/bias", "down/bias"}
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    assert all(is_float(a) for a in jax.tree.leaves(nnx.state(optimizer)) if a.ndim)
    packed, first = copies(nnx.state(model, QuantizedVariable)), loss_of(model(x), wanted)
    for _ in range(10):
        optimizer.update(model, nnx.grad(lambda model: loss_of(model(x), wanted))(model))
    assert loss_of(model(x), wanted) < first
    for a, b in zip(jax.tree.leaves(nnx.state(model, QuantizedVariable)), packed, strict=True):
        np.testing.assert_array_equal(np.asarray(a), b)


class Adapted(nn.Module):
    """A packed layer and its adapter."""

    features: int

    @nn.compact
    def __call__(self, x):
        narrow = nn.Dense(RANK, use_bias=False, dtype=x.dtype, name="lora_a")(x)
        wide = {"use_bias": False, "dtype": x.dtype, "kernel_init": nn.initializers.zeros_init()}
        return W4A16Dense(self.features, group_size=32, name="base")(x) + nn.Dense(
            self.features, name="lora_b", **wide
        )(narrow)


class LinenMlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + Adapted(WIDTH, name="down")(nn.gelu(Adapted(HIDDEN, name="up")(x)))


def test_linen_lora():
    x, wanted = task()
    variables = LinenMlp().init(jax.random.key(0), x)
    params, quantized = variables["params"], variables["quantized"]
    label = lambda path, _: "train" if "lora" in jax.tree_util.keystr(path) else "freeze"
    labels = jax.tree_util.tree_map_with_path(label, params)
    optimizer = optax.partition({"train": optax.adam(1e-2), "freeze": optax.set_to_zero()}, labels)
    state = optimizer.init(params)
    assert all(is_float(a) for a in jax.tree.leaves(state) if a.ndim)
    packed, biases = copies(quantized), copies(params["up"]["base"])

    @jax.jit
    def step(params, state):
        apply = lambda params: LinenMlp().apply({"params": params, "quantized": quantized}, x)
        value, grads = jax.value_and_grad(lambda params: loss_of(apply(params), wanted))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(STEPS):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0], losses
    for got, want in ((quantized, packed), (params["up"]["base"], biases)):
        for a, b in zip(jax.tree.leaves(got), want, strict=True):
            np.testing.assert_array_equal(np.asarray(a), b)
