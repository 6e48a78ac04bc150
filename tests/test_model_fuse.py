"""Fused layers: one product, the same bits as several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_w4a16
from jax_w4a16 import fuse, quantize, split

K = 200
SIZES = (64, 16, 40)


def weights(*lead, sizes=SIZES, **options):
    options = {"group_size": 64, "symmetric": False} | options
    rng = np.random.default_rng(0)
    draw = lambda n: jnp.asarray(rng.standard_normal((*lead, K, n)), jnp.bfloat16)
    rule = lambda w: quantize(w, **options)
    return [(jax.vmap(rule) if lead else rule)(draw(n)) for n in sizes]


def inputs(*lead, seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((*lead, K)), jnp.bfloat16)


def bits(a):
    return np.asarray(a).view(f"u{a.dtype.itemsize}")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("m", [1, 33])
def test_outputs_are_those_of_the_parts(symmetric, m):
    parts, x = weights(symmetric=symmetric), inputs(2, m)
    fused = fuse(*parts).validate()
    assert fused.shape == (K, sum(SIZES))
    np.testing.assert_array_equal(
        fused.dequantize(), jnp.concatenate([w.dequantize() for w in parts], axis=1)
    )
    outs = split(jax_w4a16.dot(x, fused), SIZES)
    assert [out.shape for out in outs] == [(2, m, n) for n in SIZES]
    for out, weight in zip(outs, parts, strict=True):
        np.testing.assert_array_equal(bits(out), bits(jax_w4a16.dot(x, weight)))


def test_members_of_stacks_are_fused():
    fused = fuse(*weights(3)).validate()
    for i in range(3):
        member = lambda tree, i=i: jax.tree.map(lambda a: a[i], tree)
        want = fuse(*(member(w) for w in weights(3)))
        for got, expected in zip(jax.tree.leaves(member(fused)), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(got, expected)


def test_one_kernel_serves_and_nothing_is_done_to_its_codes():
    call = jax.jit(lambda x, w: split(jax_w4a16.dot(x, w), SIZES))
    hlo = call.lower(inputs(4), fuse(*weights())).compile().as_text()
    assert hlo.count('custom_call_target="w4a16_dot"') == 1
    assert not [line for line in hlo.splitlines() if " = u32[" in line and "parameter(" not in line]


def test_refused():
    a, b, c = weights()
    scaled = quantize(jnp.ones((K, 16), jnp.bfloat16), group_size=64, search="awq", inputs=inputs(4))
    other = quantize(jnp.ones((K + 1, 16), jnp.bfloat16), group_size=64, symmetric=False)
    for parts, error, match in (
        ((), ValueError, "weights: expected at least one, got none"),
        ((a, a.qweight), TypeError, r"weights\[1\]: expected a QuantizedWeight, got ArrayImpl"),
        ((a, c, b), ValueError, r"weights\[1\]: expected N to be a multiple of 16, .* got 40"),
        (
            (a, *weights(group_size=32)),
            ValueError,
            r"weights\[1\]: expected group_size 64 as of weights\[0\], got 32",
        ),
        ((a, *weights(symmetric=True)), ValueError, r"weights\[1\]: expected zeros some as of .*, got none"),
        (
            (a, *weights(scale_dtype=jnp.float16)),
            ValueError,
            r"weights\[1\]: expected dtype bfloat16 .* float16",
        ),
        ((a, other), ValueError, r"weights\[1\]: expected K 200 as of weights\[0\], got 201"),
        ((a, *weights(2)), ValueError, r"weights\[1\]: expected leading dimensions \(\) .* \(2,\)"),
        ((scaled,), ValueError, r"weights\[0\]: expected no change of the inputs, got \['input_scale'\]"),
    ):
        with pytest.raises(error, match=match):
            fuse(*parts)
    with pytest.raises(ValueError, match=r"sizes: expected .*sum of 24, out's last dimension, got .8, 8."):
        split(jnp.ones((2, 24)), (8, 8))


@pytest.mark.parametrize("use_bias", [True, False])
def test_nnx(use_bias):
    nnx = pytest.importorskip("flax.nnx", reason="flax is not installed")
    from jax_w4a16.nnx import QuantizedVariable, W4A16FusedLinear, W4A16Linear

    options = {"use_bias": use_bias, "bias_init": nnx.initializers.normal(1.0), "group_size": 64}
    layers = [W4A16Linear(K, n, rngs=nnx.Rngs(n), **options) for n in SIZES]
    fused = W4A16FusedLinear(layers)
    assert set(nnx.state(fused, QuantizedVariable)["linear"]) == {"qweight", "scales"}
    x = inputs(5)
    for got, layer in zip(nnx.jit(lambda m, x: m(x))(fused, x), layers, strict=True):
        np.testing.assert_array_equal(bits(got), bits(layer(x)))
    if use_bias:
        without = W4A16Linear(K, 16, use_bias=False, group_size=64, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="layers: expected all with a bias or none, got 1 of 2 with one"):
            W4A16FusedLinear([layers[0], without])


def test_nnx_layers_of_several_types_are_refused():
    nnx = pytest.importorskip("flax.nnx", reason="flax is not installed")
    from jax_w4a16.nnx import W4A16FusedLinear, W4A16Linear

    make = lambda **options: W4A16Linear(K, 16, group_size=64, rngs=nnx.Rngs(0), **options)
    half, brain, own = make(dtype=jnp.float16), make(dtype="bfloat16"), make()
    for layers, match in (
        ((half, half, brain), r"layers\[2\]: expected dtype float16 as of layers\[0\], got bfloat16"),
        ((own, brain), r"layers\[1\]: expected dtype None as of layers\[0\], got bfloat16"),
        (
            (half, make(dtype=jnp.float16, preferred_element_type=jnp.float32)),
            r"layers\[1\]: expected preferred_element_type None as of layers\[0\], got float32",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            W4A16FusedLinear(layers)
    assert W4A16FusedLinear([brain, make(dtype=jnp.bfloat16)]).linear.dtype == "bfloat16"


@pytest.mark.parametrize("use_bias", [True, False])
def test_linen(use_bias):
    nn = pytest.importorskip("flax.linen", reason="flax is not installed")
    from jax_w4a16.linen import W4A16Dense, W4A16FusedDense, fuse_dense

    options = {"use_bias": use_bias, "bias_init": nn.initializers.normal(1.0), "group_size": 64}
    layers, x = [W4A16Dense(n, **options) for n in SIZES], inputs(5)
    variables = [layer.init(jax.random.key(i), x) for i, layer in enumerate(layers)]
    fused = W4A16FusedDense(SIZES, options)
    made = fuse_dense(*variables, in_features=K, group_size=64)
    fresh = fused.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, fresh)
    outs = jax.jit(fused.apply)(made, x)
    for got, layer, own in zip(outs, layers, variables, strict=True):
        np.testing.assert_array_equal(bits(got), bits(layer.apply(own, x)))
    if use_bias:
        bare = {"quantized": variables[1]["quantized"]}
        with pytest.raises(ValueError, match="layers: expected all with a bias or none, got 1 of 2 with one"):
            fuse_dense(variables[0], bare, in_features=K, group_size=64)
