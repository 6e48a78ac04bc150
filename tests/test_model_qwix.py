"""qwix's QArray in and out: the same values, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("qwix", reason="qwix is not installed")
import qwix

import jax_w4a16
from jax_w4a16.qwix import from_qarray, to_qarray

K, N = 192, 40


def example(*lead, dtype=jnp.bfloat16, tile=64, method="absmax", **options):
    w = jax.random.normal(jax.random.key(0), (*lead, K, N), dtype)
    axes = {"channelwise_axes": [*range(len(lead)), len(lead) + 1], "tiled_axes": {len(lead): tile}}
    if tile is None:
        del axes["tiled_axes"]
    return qwix.quantize(w, jnp.int4, calibration_method=method, **(axes | options))


def equal(a, b):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize("tile", [32, 64, None])
@pytest.mark.parametrize("method", ["absmax", "minmax"])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_values_survive(tile, method, dtype):
    array = example(dtype=dtype, tile=tile, method=method)
    weight = from_qarray(array).validate()
    assert (weight.shape, weight.group_size) == ((K, N), -1 if tile is None else tile)
    assert (weight.zeros is None) == (method == "absmax")
    equal(weight.dequantize(), qwix.dequantize(array))
    back = to_qarray(weight)
    equal(qwix.dequantize(back), qwix.dequantize(array))
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(array), strict=True):
        np.testing.assert_array_equal(got.astype(jnp.float32), want.astype(jnp.float32))
    assert jax.tree.structure(back) == jax.tree.structure(array)


def test_product_is_that_of_the_dequantised_array():
    array = example()
    x = jnp.eye(K, dtype=jnp.bfloat16)
    equal(jax_w4a16.dot(x, from_qarray(array)), qwix.dequantize(array))


def test_stack():
    array = example(3, method="minmax")
    weight = from_qarray(array).validate()
    assert weight.qweight.shape == (3, 3, 3, 128)
    for i in range(3):
        member = jax.tree.map(lambda a, i=i: a[i], weight)
        equal(member.dequantize(), qwix.dequantize(array)[i])
    equal(qwix.dequantize(to_qarray(weight)), qwix.dequantize(array))


def test_tiles_of_n_and_one_scale_for_all():
    for axes in ({"tiled_axes": {0: 32, 1: 8}}, {"tiled_axes": {}}):
        array = example(channelwise_axes=(), **axes)
        assert array.scale.shape[1] in (1, 5)
        equal(from_qarray(array).dequantize(), qwix.dequantize(array))


def test_refused():
    with pytest.raises(TypeError, match=r"array: expected a qwix.QArray, got ndarray"):
        from_qarray(np.ones(3))
    with pytest.raises(ValueError, match=r"array.scale: expected tiles of K = 192 .* got shape \(12, 40\)"):
        from_qarray(example(tile=16))
    with pytest.raises(TypeError, match=r"array.qvalue: expected int4, got int8"):
        from_qarray(qwix.quantize(jnp.ones((K, N)), jnp.int8, channelwise_axes=[1]))
    w = jnp.asarray(np.random.default_rng(0).standard_normal((K, N)), jnp.float32)
    with pytest.raises(ValueError, match="multiple of its group size 128, got 192"):
        to_qarray(jax_w4a16.quantize(w, group_size=128))
    inputs = jnp.ones((4, K)).at[:, 0].set(9.0)
    with pytest.raises(ValueError, match="zero points that are integers"):
        to_qarray(jax_w4a16.quantize(w, group_size=64, symmetric=False, search="fit", inputs=inputs))
    with pytest.raises(ValueError, match=r"no change of the inputs, got \['input_scale'\]"):
        to_qarray(jax_w4a16.quantize(w, group_size=64, search="awq", inputs=inputs))
