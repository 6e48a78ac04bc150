"""QuantizedWeight as a pytree, and its invariants."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import PartitionSpec as P

import jax_w4a16


def example(k=200, n=40, group_size=64, symmetric=False, seed=0):
    w = np.random.default_rng(seed).standard_normal((k, n))
    return jax_w4a16.quantize(jnp.asarray(w, jnp.bfloat16), group_size=group_size, symmetric=symmetric)


def test_properties():
    qw = example()
    assert (qw.shape, qw.in_features, qw.out_features) == ((200, 40), 200, 40)
    assert qw.dtype == jnp.bfloat16
    assert qw.nbytes == 4 * 3 * 512 + 2 * 4 * 40 * 2
    assert example(symmetric=True).nbytes == 4 * 3 * 512 + 4 * 40 * 2
    assert qw.dequantize().dtype == jnp.bfloat16
    assert qw.dequantize(jnp.float32).dtype == jnp.float32
    with pytest.raises(dataclasses.FrozenInstanceError):
        qw.scales = None


def test_leaves_and_statics():
    qw = example()
    assert len(jax.tree.leaves(qw)) == 3
    assert len(jax.tree.leaves(example(symmetric=True))) == 2
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(qw)[0]]
    assert paths == [".qweight", ".scales", ".zeros"]
    same = jax.tree.map(lambda a: a, qw)
    assert (same.group_size, same.k) == (64, 200)
    assert jax.tree.structure(qw) != jax.tree.structure(example(group_size=32))


def test_survives_leaves_that_are_not_arrays():
    qw = example()
    assert jax.tree.map(lambda _: P(), qw).scales == P()
    shapes = jax.eval_shape(lambda w: jax_w4a16.quantize(w, group_size=64), jnp.ones((200, 40), jnp.bfloat16))
    assert shapes.qweight.shape == (4, 3, 128)
    assert shapes.shape == (200, 40)
    out = jax.eval_shape(jax_w4a16.dot, jax.ShapeDtypeStruct((3, 200), jnp.bfloat16), shapes)
    assert (out.shape, out.dtype) == ((3, 40), jnp.bfloat16)
    moved = jax.device_put({"layer": qw}, {"layer": jax.devices("cpu")[1]})
    assert moved["layer"].qweight.devices() == {jax.devices("cpu")[1]}
    none = jax.tree.unflatten(jax.tree.structure(qw), [None] * 3)
    assert none.group_size == 64


def test_stack_has_the_shape_of_a_member():
    members = [example(seed=seed) for seed in range(3)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *members)
    assert stack.qweight.shape == (3, 4, 3, 128)
    assert stack.shape == (200, 40)
    assert stack.validate() is stack
    w = jax.vmap(lambda qw: qw.dequantize())(stack)
    np.testing.assert_array_equal(w[1], members[1].dequantize())


def test_in_features_of_a_shard():
    qw = example(256, 32)
    shard = dataclasses.replace(qw, qweight=qw.qweight[:2], scales=qw.scales[:2], zeros=qw.zeros[:2])
    assert shard.shape == (128, 32)
    shard.validate()
    x = jnp.ones((1, 128), jnp.bfloat16)
    np.testing.assert_array_equal(
        jax_w4a16.dot(x, shard), jax_w4a16.dot(x, qw.qweight[:2], qw.scales[:2], qw.zeros[:2], group_size=64)
    )


def test_through_jit_and_grad():
    qw = example()
    doubled = jax.jit(lambda qw: dataclasses.replace(qw, scales=qw.scales * 2))(qw)
    np.testing.assert_array_equal(doubled.dequantize(), qw.dequantize() * 2)
    grads = jax.grad(lambda qw: qw.dequantize(jnp.float32).sum(), allow_int=True)(qw)
    assert grads.qweight.dtype == jax.dtypes.float0
    codes = np.asarray(jax_w4a16.unpack(qw.qweight, qw.shape), np.float64)
    ops = oracle.dequantize(codes, np.ones(qw.scales.shape), qw.zeros, 64)
    want = np.add.reduceat(ops, [0, 64, 128, 192], axis=0)
    np.testing.assert_allclose(np.asarray(grads.scales, np.float64), want, rtol=1e-2, atol=0.5)


ARRAYS = {"qweight": ((4, 3, 128), "uint32"), "scales": ((4, 40), "bfloat16"), "zeros": ((4, 40), "bfloat16")}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"qweight": ((4, 3, 128), "int32")}, TypeError, "qweight: expected uint32, got int32"),
        ({"qweight": ((4, 2, 128), "uint32")}, ValueError, r"qweight: expected shape \(4, 3, 128\)"),
        ({"qweight": ((12, 128), "uint32")}, ValueError, "qweight: expected"),
        ({"scales": ((3, 40), "bfloat16")}, ValueError, "scales: expected 4 groups"),
        ({"scales": ((4, 40), "int8")}, TypeError, "scales: expected float16, bfloat16 or float32"),
        ({"scales": ((40,), "bfloat16")}, ValueError, "scales: expected 2 dimensions"),
        ({"zeros": ((4, 39), "bfloat16")}, ValueError, r"zeros: expected shape \(4, 40\) like scales"),
        ({"zeros": ((4, 40), "float16")}, TypeError, "zeros: expected bfloat16 like scales"),
        ({"zeros": ((2, 4, 40), "bfloat16")}, ValueError, "zeros: expected"),
        ({"group_size": 48}, ValueError, "group_size: expected a multiple of 32"),
        ({"group_size": 64.0}, TypeError, "QuantizedWeight.group_size: expected an integer, got float"),
        ({"k": -1}, ValueError, "QuantizedWeight.k: expected at least 0, got -1"),
        ({"k": 100}, ValueError, "expected"),
        ({"scales": None}, TypeError, "scales: expected an array, got NoneType"),
    ],
)
def test_validate(changes, error, message):
    fields = {**ARRAYS, "group_size": 64, "k": 200, **changes}
    make = lambda v: jnp.zeros(v[0], v[1]) if isinstance(v, tuple) else v
    qw = jax_w4a16.QuantizedWeight(**{name: make(value) for name, value in fields.items()})
    with pytest.raises(error, match=message):
        qw.validate()
    example().validate()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"permutation": jnp.array([2, 0, 1], jnp.int32)},
            ValueError,
            r"permutation: expected shape \(200,\)",
        ),
        ({"permutation": jnp.arange(200.0)}, TypeError, "permutation: expected int32"),
        ({"input_scale": jnp.ones(1)}, ValueError, r"input_scale: expected shape \(200,\)"),
        ({"input_scale": jnp.ones(200, jnp.int32)}, TypeError, "input_scale: expected float16, bfloat16"),
    ],
)
def test_products_refuse_a_malformed_change_of_the_inputs(changes, error, message):
    bad = dataclasses.replace(example(), **changes)
    with pytest.raises(error, match=message):
        bad.dequantize()
    with pytest.raises(error, match=message):
        jax_w4a16.dot(jnp.ones((2, 200), bad.dtype), bad)


def test_equal_is_the_same():
    qw = example()
    assert qw == qw
    assert qw != copy.deepcopy(qw)
    assert {qw: 1}[qw] == 1
