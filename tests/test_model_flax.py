"""quantize_model and recorded inputs for nnx modules and linen variables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="flax is not installed")
from flax import linen as nn
from flax import nnx

import jax_w4a16
import jax_w4a16.linen
import jax_w4a16.nnx
from jax_w4a16 import Rule, quantize_model
from jax_w4a16.linen import W4A16Dense
from jax_w4a16.nnx import QuantizedVariable, W4A16Linear

K, N = 96, 32
RULES = {"down": Rule(group_size=32, symmetric=False), "": Rule(group_size=32)}


def relative(got, want):
    got, want = (np.asarray(a, np.float64) for a in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def bits(a):
    return np.asarray(a).view(f"u{a.dtype.itemsize}")


class Block(nnx.Module):
    def __init__(self, rngs):
        options = {"dtype": jnp.bfloat16, "rngs": rngs}
        self.up = nnx.Linear(K, N, **options)
        self.down = nnx.Linear(N, K, use_bias=False, **options)
        self.norm = nnx.BatchNorm(K, rngs=rngs)

    def __call__(self, x):
        return self.norm(x + self.down(nnx.relu(self.up(x))))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.tied = self.blocks[0]
        self.out = nnx.LinearGeneral(K, 3, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.out(self.tied(x))


def batch(seed=0, k=K):
    return jax.random.normal(jax.random.key(seed), (8, k), jnp.bfloat16)


def test_nnx_linear_layers_become_packed_in_a_copy():
    model = Model(nnx.Rngs(0))
    got = quantize_model(model, RULES)
    assert type(model.blocks[0].up) is nnx.Linear, "the model is left as it is"
    assert isinstance(got.blocks[1].down, W4A16Linear)
    assert type(got.out) is nnx.LinearGeneral
    assert got.tied is got.blocks[0]
    up, down = got.blocks[0].up, got.blocks[0].down
    assert (up.symmetric, down.symmetric, up.group_size, up.dtype) == (True, False, 32, jnp.bfloat16)
    assert (down.bias, up.bias.dtype) == (None, jnp.bfloat16)
    want = W4A16Linear.from_linear(model.blocks[0].up, group_size=32)
    np.testing.assert_array_equal(up.qweight[...], want.qweight[...])
    assert relative(got(batch()), model(batch())) < 0.3
    assert type(got.blocks[0].norm.mean) is type(model.blocks[0].norm.mean)
    assert got.blocks[0].norm.mean is not model.blocks[0].norm.mean
    assert not nnx.state(model, QuantizedVariable)


def test_nnx_root_and_stack():
    alone = quantize_model(nnx.Linear(K, N, rngs=nnx.Rngs(0)), Rule(group_size=32))
    assert isinstance(alone, W4A16Linear)

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return nnx.Linear(K, K, dtype=jnp.bfloat16, bias_init=nnx.initializers.normal(), rngs=rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(layer, x):
        return layer(x)

    floats = stack(nnx.Rngs(0))
    layers = quantize_model(floats, Rule(group_size=32))
    assert (layers.qweight.shape, layers.bias.shape) == ((3, 2, 6, 128), (3, K))
    got, want = forward(layers, batch()), batch()
    for i in range(3):
        kernel, bias = floats.kernel[...][i], layers.bias[...][i]
        weight = jax_w4a16.quantize(kernel, group_size=32, scale_dtype=jnp.bfloat16)
        want = jax_w4a16.dot(want, weight, bias=bias)
    np.testing.assert_array_equal(bits(got), bits(want))


@pytest.mark.parametrize("search", ["awq", "fit"])
def test_nnx_search_with_recorded_inputs(search):
    model, batches = Model(nnx.Rngs(0)), [batch(1), batch(2)]
    mean = np.asarray(model.blocks[0].norm.mean[...])
    inputs = jax_w4a16.nnx.record_inputs(model, batches, rows=10)
    np.testing.assert_array_equal(model.blocks[0].norm.mean[...], mean)
    paths = {f"blocks/{i}/{name}" for i in range(2) for name in ("up", "down")}
    assert set(inputs) == paths
    assert {a.shape[1] for path, a in inputs.items() if path.endswith("up")} == {K}
    assert all(0 < len(a) <= 10 for a in inputs.values())
    got = quantize_model(model, Rule(32, symmetric=False, search=search), inputs=inputs)
    layer = got.blocks[0].up
    assert (layer.input_scale is not None) == (search == "awq")
    assert relative(got(batch()), model(batch())) < 0.3
    want = jax_w4a16.dot(batch(), layer.weight, bias=layer.bias[...])
    np.testing.assert_array_equal(bits(layer(batch())), bits(want))


def test_inputs_are_what_the_layers_meet():
    layer = nnx.Linear(K, N, rngs=nnx.Rngs(0))
    got = jax_w4a16.nnx.record_inputs(layer, [batch(1), batch(2)], rows=64)
    np.testing.assert_array_equal(got[""], np.concatenate([batch(1), batch(2)]))
    few = jax_w4a16.nnx.record_inputs(layer, [batch(1)], call=lambda m, x: m(2 * x), rows=2)
    np.testing.assert_array_equal(few[""], 2 * batch(1)[::4])
    with pytest.raises(ValueError, match="down: expected an array, got a traced value"):
        jax_w4a16.nnx.record_inputs(
            Block(nnx.Rngs(0)), [batch()], call=lambda m, x: nnx.jit(lambda m, x: m.down(x[:, :N]))(m, x)
        )
    with pytest.raises(ValueError, match="at least one row and one batch, got rows=512 and 0 batches"):
        jax_w4a16.nnx.record_inputs(layer, [])


def test_a_model_may_look_at_its_layers_while_inputs_are_recorded():
    class Looks(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(K, N, rngs=rngs)

        def __call__(self, x):
            assert isinstance(self.layer, nnx.Linear)
            y = self.layer(x.astype(self.layer.kernel[...].dtype))
            self.layer.calls = getattr(self.layer, "calls", 0) + 1
            return y.reshape(-1, self.layer.out_features)

    model = Looks(nnx.Rngs(0))
    got = jax_w4a16.nnx.record_inputs(model, [batch(1), batch(2)])
    np.testing.assert_array_equal(got["layer"], np.concatenate([batch(1), batch(2)]))
    assert type(model.layer) is nnx.Linear, "the model is left as it is"
    assert not hasattr(model.layer, "calls")


def test_nnx_donated():
    model = Model(nnx.Rngs(0))
    want = quantize_model(model, RULES)(batch())
    got = quantize_model(model, RULES, donate=True)
    assert model.blocks[0].up.kernel[...].is_deleted()
    assert not model.out.kernel[...].is_deleted()
    np.testing.assert_array_equal(got(batch()), want)


class Dense(nn.Module):
    """Two layers, float or packed by one flag, so that paths agree."""

    packed: bool = False
    group_size: int = 32

    def layer(self, features, name, **options):
        if not self.packed:
            return nn.Dense(features, dtype=jnp.bfloat16, name=name, **options)
        options |= {"dtype": jnp.bfloat16, "group_size": self.group_size}
        return W4A16Dense(features, name=name, **options)

    @nn.compact
    def __call__(self, x):
        x = nn.relu(self.layer(N, "up")(x))
        return nn.LayerNorm()(self.layer(K, "down", use_bias=False)(x))


def test_linen_kernels_move_to_their_collection():
    variables = Dense().init(jax.random.key(0), batch())
    got = quantize_model(variables, RULES)
    assert set(variables) == {"params"}
    assert set(got) == {"params", "quantized"}
    assert set(got["params"]) == {"up", "LayerNorm_0"}
    assert set(got["params"]["up"]) == {"bias"}
    assert set(got["quantized"]["up"]["kernel"]) == {"qweight", "scales"}
    assert set(got["quantized"]["down"]["kernel"]) == {"qweight", "scales", "zeros"}
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    fresh = Dense(packed=True).init(jax.random.key(0), batch())
    assert shapes(got["params"]) == shapes(fresh["params"])
    want = Dense().apply(variables, batch())
    assert relative(Dense(packed=True).apply(got, batch()), want) < 0.3
    twice = quantize_model(
        {"params": {"other": variables["params"]["up"]}} | {"quantized": got["quantized"], "batch_stats": 1},
        RULES,
    )
    assert set(twice["quantized"]) == {"up", "down", "other"}
    assert twice["batch_stats"] == 1


@pytest.mark.parametrize("search", ["awq", "fit"])
def test_linen_search_with_recorded_inputs(search):
    variables = Dense().init(jax.random.key(0), batch())
    inputs = jax_w4a16.linen.record_inputs(Dense(), variables, [batch(1), batch(2)])
    assert {path: a.shape for path, a in inputs.items()} == {"up": (16, K), "down": (16, N)}
    np.testing.assert_array_equal(inputs["up"], np.concatenate([batch(1), batch(2)]))
    got = quantize_model(variables, Rule(32, symmetric=False, search=search), inputs=inputs)
    assert ("input_scale" in got["quantized"]["up"]["kernel"]) == (search == "awq")
    packed = Dense(packed=True)
    assert relative(packed.apply(got, batch()), Dense().apply(variables, batch())) < 0.3
    with pytest.raises(ValueError, match="up: expected an array, got a traced value"):
        jax_w4a16.linen.record_inputs(
            Dense(), variables, [batch()], call=lambda m, v, x: jax.jit(m.apply)(v, x)
        )


def test_linen_stack_and_layers_that_are_none():
    class Scanned(nn.Module):
        packed: bool = False

        @nn.compact
        def __call__(self, x):
            made = {"variable_axes": {"params": 0, "quantized": 0}, "split_rngs": {"params": True}}
            step = lambda module, x, _: (module(x), None)
            options = {"dtype": jnp.bfloat16, "name": "layer"}
            layer = W4A16Dense(K, group_size=32, **options) if self.packed else nn.Dense(K, **options)
            return nn.scan(step, length=3, **made)(layer, x, None)[0]

    variables = Scanned().init(jax.random.key(0), batch())
    assert variables["params"]["layer"]["kernel"].shape == (3, K, K)
    got = quantize_model(variables, {"layer": Rule(group_size=32)}, scale_dtype=jnp.bfloat16)
    out = Scanned(packed=True).apply(got, batch())
    assert relative(out, Scanned().apply(variables, batch())) < 0.3
    for rules in (jax_w4a16.DEFAULT_RULES, Rule(), {"other": Rule(), "": Rule()}):
        with pytest.raises(
            ValueError, match=r"got none; .*; only a pattern that is not empty takes \['layer'\]"
        ):
            quantize_model(variables, rules)
    heads = {"params": {"heads": {"kernel": jnp.ones((K, 2, 8)), "bias": jnp.ones((2, 8))}}}
    with pytest.raises(
        ValueError, match=r"rules: expected one that matches a weight, .* paths of weights: \[\]"
    ):
        quantize_model(heads)


def test_linen_kernels_that_are_no_stacks_stay():
    """Kernels of three dimensions without a bias could be stacks, of three, two or 32 layers."""

    class Model(nn.Module):
        packed: bool = False

        @nn.compact
        def __call__(self, x):
            x = nn.Conv(K, (3,), use_bias=False, name="conv")(x)
            x = nn.MultiHeadDotProductAttention(2, use_bias=False, name="attention")(x)
            x = nn.DenseGeneral((K, N), name="general")(x)[..., 0]
            options = {"dtype": jnp.bfloat16, "name": "layer"}
            return W4A16Dense(K, **options)(x) if self.packed else nn.Dense(K, **options)(x)

    x = batch().reshape(2, 4, K)
    variables = Model().init(jax.random.key(0), x)
    for rules in (jax_w4a16.DEFAULT_RULES, Rule(), {"norm": Rule(skip=True), "": Rule()}):
        got = quantize_model(variables, rules, scale_dtype=jnp.bfloat16)
        assert set(got["quantized"]) == {"layer"}
        assert relative(Model(packed=True).apply(got, x), Model().apply(variables, x)) < 0.3


def test_linen_group_size_is_the_modules():
    got = quantize_model(Dense().init(jax.random.key(0), batch()), RULES)
    with pytest.raises(ValueError, match="scales: expected 1 groups for K = 96 and group_size 96, got"):
        Dense(packed=True, group_size=-1).apply(got, batch())
