"""jvp, transpose, vmap, remat: values against plain JAX, and what a gradient materialises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.extend import core

import jax_w4a16
from jax_w4a16 import _primitive, _reference

CASES = [
    oracle.Case(5, 200, 40, 64, "float32", "float32", "fractional", True, 0.5),
    oracle.Case(3, 1100, 24, 96, "float32", "float32", "none", False, 1.0),
    oracle.Case(4, 50, 7, -1, "float32", "float32", "integer", True, -2.0),
    oracle.Case(6, 256, 32, 32, "float32", "float32", "integer", False, 1.0),
    oracle.Case(6, 640, 32, 128, "float32", "float32", "none", True, 1.0),
]
SIXTEEN = [
    oracle.Case(5, 192, 48, 64, dtype, out, "fractional", True, 0.5)
    for dtype, out in [("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "float32")]
]


def functions(case, implementation):
    """dot as a function of its differentiable operands, the same in plain float32 JAX, and those operands."""
    ops = oracle.operands(case)
    codes, k, group = jnp.asarray(ops.codes, jnp.float32), case.k, case.group
    names = [name for name in ("x", "scales", "zeros", "bias") if getattr(ops, name) is not None]

    def dot(*values):
        return jax_w4a16.dot(
            qw=ops.qweight,
            **dict(zip(names, values, strict=True)),
            group_size=case.group_size,
            alpha=case.alpha,
            preferred_element_type=case.out_dtype,
            implementation=implementation,
        )

    def plain(*values):
        v = {name: value.astype(jnp.float32) for name, value in zip(names, values, strict=True)}
        zero = _reference.per_row(v["zeros"], k, group) if "zeros" in v else 8.0
        w = (codes - zero) * _reference.per_row(v["scales"], k, group)
        out = case.alpha * jnp.matmul(v["x"], w, precision="highest") + v.get("bias", 0.0)
        return out.astype(case.out_dtype)

    return dot, plain, tuple(jnp.asarray(getattr(ops, name)) for name in names)


def assert_close(got, want, tolerance):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert np.abs(g - w).max(initial=0) <= tolerance * max(np.abs(w).max(initial=0), 1e-3)


def tolerance(case):
    return {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}[case.dtype]


def cases_for(implementation):
    return SIXTEEN if implementation == "cuda" else CASES + SIXTEEN


def test_gradients(implementation):
    for case in cases_for(implementation):
        dot, plain, values = functions(case, implementation)
        ct = jnp.asarray(np.random.default_rng(0).standard_normal((case.m, case.n)), case.out_dtype)
        pull = lambda f, v, ct=ct: jax.vjp(f, *v)[1](ct)
        got = jax.jit(functools.partial(pull, dot))(values)
        want = jax.jit(functools.partial(pull, plain))(values)
        assert_close(got, want, tolerance(case))


def test_jvp(implementation):
    for case in cases_for(implementation):
        dot, plain, values = functions(case, implementation)
        rng = np.random.default_rng(1)
        tangents = tuple(jnp.asarray(rng.standard_normal(v.shape), v.dtype) for v in values)
        got = jax.jit(functools.partial(jax.jvp, dot))(values, tangents)
        want = jax.jit(functools.partial(jax.jvp, plain))(values, tangents)
        assert_close(got, want, 2 * tolerance(case))


def test_one_tangent_at_a_time():
    case = CASES[0]
    dot, plain, values = functions(case, "cpu")
    for i in range(len(values)):
        one = lambda f, v, i=i: f(*values[:i], v, *values[i + 1 :])
        got = jax.grad(lambda v, one=one: (one(dot, v) ** 2).sum())(values[i])
        want = jax.grad(lambda v, one=one: (one(plain, v) ** 2).sum())(values[i])
        assert_close(got, want, 1e-4)


def test_second_derivatives():
    """Gradients of gradients go through the derivatives of w4a16_dequantize."""
    case = oracle.Case(3, 100, 8, 32, "float32", "float32", "fractional", True, 0.5)
    dot, plain, values = functions(case, "cpu")
    loss = lambda f: (
        lambda *v: sum((g**2).sum() for g in jax.grad(lambda *v: (f(*v) ** 2).sum(), range(4))(*v))
    )
    got = jax.grad(loss(dot), range(4))(*values)
    want = jax.grad(loss(plain), range(4))(*values)
    assert_close(got, want, 1e-3)


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize(("m", "k", "n"), [(3, 64, 0), (3, 0, 16), (0, 64, 16)])
def test_gradients_of_empty_operands(m, k, n, implementation):
    qw = jax_w4a16.quantize(jnp.ones((k, n)), group_size=-1, symmetric=False, scale_dtype=jnp.float32)

    def loss(x, scales, zeros):
        return jax_w4a16.dot(x, qw.qweight, scales, zeros, group_size=-1, implementation=implementation).sum()

    got = jax.grad(loss, (0, 1, 2))(jnp.ones((m, k)), qw.scales, qw.zeros)
    for value, shape in zip(got, [(m, k), qw.scales.shape, qw.zeros.shape], strict=True):
        np.testing.assert_array_equal(value, np.zeros(shape))


def test_codes_get_float0():
    case = oracle.Case(2, 64, 16, 32)
    ops = oracle.operands(case)
    loss = lambda x, q, s: jax_w4a16.dot(x, q, s).astype(jnp.float32).sum()
    grads = jax.grad(loss, (0, 1, 2), allow_int=True)(*map(jnp.asarray, (ops.x, ops.qweight, ops.scales)))
    assert grads[1].dtype == jax.dtypes.float0
    assert grads[1].shape == ops.qweight.shape


JAXPRS = (core.Jaxpr, core.ClosedJaxpr)


def largest_intermediate(jaxpr) -> int:
    """Elements of the largest array that any equation, however nested, produces."""
    largest = 0
    for eqn in jaxpr.eqns:
        largest = max([largest, *(v.aval.size for v in eqn.outvars)])
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: isinstance(p, JAXPRS)):
            if isinstance(inner, JAXPRS):
                largest = max(largest, largest_intermediate(getattr(inner, "jaxpr", inner)))
    return largest


def test_no_gradient_materialises_more_than_one_weight():
    case = oracle.Case(16, 2048, 512, 128, "bfloat16", "bfloat16", "integer", True)
    dot, _, values = functions(case, "cpu")
    loss = lambda *v: dot(*v).astype(jnp.float32).sum()
    whole, weights = case.k * case.n, 0
    for i in range(4):
        jaxpr = jax.make_jaxpr(jax.grad(loss, i))(*values).jaxpr
        size = largest_intermediate(jaxpr)
        assert size <= whole
        # Only x's gradient makes a weight at all; the others stay below half of it.
        assert (size == whole) == (i == 0), (i, size)
        weights += size == whole
    assert weights == 1
    jaxpr = str(jax.make_jaxpr(jax.grad(loss, 0))(*values))
    assert jaxpr.count("w4a16_dequantize[") == 1
    assert "dot_general[" in jaxpr


def test_largest_intermediate_sees_into_nested_programs():
    jaxpr = jax.make_jaxpr(lambda x: jax.lax.map(jax.jit(lambda r: jnp.outer(r, r).sum()), x))(
        jnp.ones((3, 50))
    )
    assert largest_intermediate(jaxpr.jaxpr) == 2500


def test_vmap_of_x_is_one_call(implementation):
    case = oracle.Case(12, 128, 40, 64, seed=1)
    ops = oracle.operands(case)
    x = jnp.asarray(ops.x).reshape(3, 4, 128)
    args = (jnp.asarray(ops.qweight), jnp.asarray(ops.scales))
    f = functools.partial(jax_w4a16.dot, implementation=implementation)
    want = f(x, *args)
    for axis in range(2):
        mapped = jax.vmap(f, in_axes=(axis, None, None), out_axes=axis)
        np.testing.assert_array_equal(mapped(x, *args), want)
        assert str(jax.make_jaxpr(mapped)(x, *args)).count("w4a16_dot[") == 1
        assert "scan[" not in str(jax.make_jaxpr(mapped)(x, *args))
    rows = jax.vmap(jax.vmap(f, (0, None, None)), (0, None, None))(x, *args)
    np.testing.assert_array_equal(rows, want)


def weights(count, zeros=False):
    made = [
        oracle.operands(oracle.Case(1, 128, 40, 64, zeros="integer" if zeros else "none", seed=i))
        for i in range(count)
    ]
    return [
        jnp.asarray(np.stack([getattr(o, n) for o in made]))
        for n in ("qweight", "scales") + ("zeros",) * zeros
    ]


def test_vmap_of_weights_loops_without_broadcasting():
    qweight, scales, zeros = weights(3, zeros=True)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 128)), jnp.bfloat16)
    f = lambda x, q, s, z: jax_w4a16.dot(x, q, s, z)
    got = jax.vmap(f, (None, 0, 0, 0))(x, qweight, scales, zeros)
    want = jnp.stack([f(x, *w) for w in zip(qweight, scales, zeros, strict=True)])
    np.testing.assert_array_equal(got, want)
    # Scales mapped, codes not: the codes are not repeated.
    mapped = jax.vmap(lambda x, q, s: jax_w4a16.dot(x, q, s), (0, None, 0))
    xs = jnp.stack([x, x, x])
    got = mapped(xs, qweight[0], scales)
    np.testing.assert_array_equal(got[2], jax_w4a16.dot(x, qweight[0], scales[2]))
    assert f"u32[3,{','.join(map(str, qweight.shape[1:]))}]" not in str(
        jax.make_jaxpr(mapped)(xs, qweight[0], scales)
    )


def test_vmap_of_codes_alone():
    qweight, scales = weights(3)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 128)), jnp.bfloat16)
    want = jnp.stack([jax_w4a16.dot(x[i], qweight[i], scales[0]) for i in range(3)])
    got = jax.vmap(jax_w4a16.dot, (0, 0, None))(x, qweight, scales[0])
    np.testing.assert_array_equal(got, want)
    got = jax.vmap(jax_w4a16.dot, (None, 0, None))(x[0], qweight, scales[0])
    np.testing.assert_array_equal(got[0], want[0])


def test_vmap_of_bias_and_of_last_axis():
    qweight, scales = weights(3)
    x = jnp.ones((4, 128), jnp.bfloat16)
    bias = jnp.asarray(np.random.default_rng(0).standard_normal((40, 3)), jnp.bfloat16)
    f = lambda x, s, b: jax_w4a16.dot(x, qweight[0], s, bias=b)
    got = jax.vmap(f, (None, 2, 1), 2)(x, jnp.moveaxis(scales, 0, 2), bias)
    for i in range(3):
        np.testing.assert_array_equal(got[:, :, i], f(x, scales[i], bias[:, i]))


def test_vmap_of_grad_and_grad_of_vmap():
    qweight, scales = weights(3)
    xs = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 128)), jnp.bfloat16)
    loss = lambda x, q, s: (jax_w4a16.dot(x, q, s).astype(jnp.float32) ** 2).sum()
    each = [jax.grad(loss, (0, 2))(x, q, s) for x, q, s in zip(xs, qweight, scales, strict=True)]
    want = jax.tree.map(lambda *a: jnp.stack(a), *each)
    got = jax.vmap(jax.grad(loss, (0, 2)))(xs, qweight, scales)
    assert_close(got, want, 1e-2)
    total = lambda xs, q, s: jax.vmap(loss)(xs, q, s).sum()
    assert_close(jax.grad(total, (0, 2))(xs, qweight, scales), want, 1e-2)
    per_row = jax.vmap(jax.grad(loss), (0, None, None))(xs[0], qweight[0], scales[0])
    assert_close(per_row, jax.grad(loss)(xs[0], qweight[0], scales[0]), 1e-2)


@pytest.mark.parametrize("symmetric", [True, False])
def test_vmap_of_quantize_and_dequantize(symmetric):
    w = jnp.asarray(np.random.default_rng(0).standard_normal((3, 100, 20)), jnp.bfloat16)
    quantize = functools.partial(jax_w4a16.quantize, group_size=32, symmetric=symmetric)
    stack = jax.vmap(quantize)(w)
    one = quantize(w[1])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b), stack.qweight, one.qweight)
    np.testing.assert_array_equal(stack.scales[1], one.scales)
    np.testing.assert_array_equal(jax.vmap(lambda q: q.dequantize())(stack)[1], one.dequantize())


def test_remat():
    case = oracle.Case(4, 128, 128, 64, "float32", "float32")
    ops = oracle.operands(case)
    q, s = jnp.asarray(ops.qweight), jnp.asarray(ops.scales)
    layer = lambda x: jnp.tanh(jax_w4a16.dot(x, q, s))
    loss = lambda layer: lambda x: layer(layer(x)).sum()
    x = jnp.asarray(ops.x)
    want = jax.grad(loss(layer))(x)
    for policy in (None, jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.nothing_saveable):
        again = jax.checkpoint(layer, policy=policy)
        np.testing.assert_allclose(jax.jit(jax.grad(loss(again)))(x), want, rtol=1e-4, atol=1e-4)
    jaxpr = str(jax.make_jaxpr(jax.grad(loss(jax.checkpoint(layer))))(x))
    assert jaxpr.count("w4a16_dot[") > str(jax.make_jaxpr(jax.grad(loss(layer)))(x)).count("w4a16_dot[")


def test_linear_transpose_refuses_a_bias():
    ops = oracle.operands(oracle.Case(2, 64, 16, 32, bias=True))
    call = lambda x: _primitive.dot(
        x, *map(jnp.asarray, (ops.qweight, ops.scales)), None, ops.bias, group_size=32
    )
    with pytest.raises(NotImplementedError, match="bias is not linear"):
        jax.linear_transpose(call, jnp.asarray(ops.x))(jnp.ones((2, 16), jnp.bfloat16))
