"""dot_add_norm and dot_swiglu: derivatives, vmap, and several devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fused import EPSILON, functions, made
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_w4a16
from jax_w4a16 import QuantizedWeight, dot_add_norm, dot_swiglu, interleave

# Transformations -------------------------------------------------------------------------------------------


def written_out(call):
    """Both products in plain float32 JAX, as functions of a dict of all their differentiable operands."""
    case, codes = call.case, jnp.asarray(call.ops.codes, jnp.float32)
    rows = lambda a: jnp.repeat(a, case.group, axis=0)[: case.k]

    def product(v):
        zero = rows(v["zeros"]) if "zeros" in v else 8.0
        return jnp.matmul(v["x"], (codes - zero) * rows(v["scales"]), precision="highest")

    def add_norm(v):
        out = v["residual"] + product(v)
        return out, out * v["norm_scale"], (out.reshape(case.m, -1, 16) ** 2).sum(-1)

    def swiglu(v):
        y = product(v) / jnp.sqrt(v["squares"].sum(-1, keepdims=True) / case.k + EPSILON)
        y = y.reshape(case.m, -1, 2, 8)
        gate, up = y[:, :, 0].reshape(case.m, -1), y[:, :, 1].reshape(case.m, -1)
        return (gate / (1 + jnp.exp(-gate)) * up,)

    return {"add_norm": add_norm, "swiglu": swiglu}


def as_functions(call, implementation="auto"):
    """Both products as functions of such a dict."""
    weight, options = call.weight, {"implementation": implementation}
    of = lambda v: dataclasses.replace(weight, scales=v["scales"], zeros=v.get("zeros"))
    return {
        "add_norm": lambda v: dot_add_norm(v["x"], of(v), v["residual"], v["norm_scale"], **options),
        "swiglu": lambda v: (dot_swiglu(v["x"], of(v), v["squares"], epsilon=EPSILON, **options),),
    }


def values_of(call, epilogue):
    names = ["residual", "norm_scale"] if epilogue == "add_norm" else ["squares"]
    values = {"x": call.ops.x, "scales": call.ops.scales} | {name: getattr(call, name) for name in names}
    values |= {} if call.ops.zeros is None else {"zeros": call.ops.zeros}
    return {name: jnp.asarray(value) for name, value in values.items()}


def loss_of(f):
    """A number that depends on every result, each number of which it weighs in another way."""

    def loss(v):
        outs = f(v)
        weigh = lambda i, a: (a.astype(jnp.float32) * jnp.sin(jnp.arange(a.size) + i).reshape(a.shape)).sum()
        return sum(weigh(i, a) for i, a in enumerate(outs))

    return loss


def assert_close(got, want, tolerance):
    for name, w in want.items():
        assert (got[name].shape, got[name].dtype) == (w.shape, w.dtype)
        g, w = np.asarray(got[name], np.float64), np.asarray(w, np.float64)
        assert np.abs(w).max() > 0
        assert np.abs(g - w).max() <= tolerance * np.abs(w).max(), name


EPILOGUES = pytest.mark.parametrize("epilogue", ["add_norm", "swiglu"])


@EPILOGUES
@pytest.mark.parametrize(("m", "zeros"), [(5, "none"), (5, "fractional"), (20, "fractional")])
def test_gradients(epilogue, m, zeros):
    call = made(m, 200, 48, dtype="float32", zeros=zeros)
    values, plain = values_of(call, epilogue), written_out(call)[epilogue]
    want = jax.jit(jax.grad(loss_of(plain)))(values)
    for implementation in ("cpu", "reference") if m == 5 else ("cpu",):
        f = as_functions(call, implementation)[epilogue]
        assert_close(jax.jit(jax.grad(loss_of(f)))(values), want, 1e-4)


@EPILOGUES
def test_one_gradient_at_a_time(epilogue):
    call = made(3, 64, 32, 32, "float32", "fractional")
    values, loss = values_of(call, epilogue), loss_of(as_functions(call)[epilogue])
    want = jax.jit(jax.grad(loss_of(written_out(call)[epilogue])))(values)
    for name, value in values.items():
        got = jax.jit(jax.grad(lambda v, name=name: loss({**values, name: v})))(value)
        assert_close({name: got}, {name: want[name]}, 1e-4)


@EPILOGUES
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradients_in_16_bits(implementation, epilogue, dtype):
    call = made(6, 256, 48, dtype=dtype, zeros="fractional")
    values = values_of(call, epilogue)
    got = jax.jit(jax.grad(loss_of(as_functions(call, implementation)[epilogue])))(values)
    wide = {name: value.astype(jnp.float32) for name, value in values.items()}
    want = jax.grad(loss_of(written_out(call)[epilogue]))(wide)
    want = {name: value.astype(values[name].dtype) for name, value in want.items()}
    assert_close(got, want, 5e-3 if dtype == "float16" else 4e-2)


@EPILOGUES
def test_jvp_and_second_derivatives(epilogue):
    call = made(3, 64, 32, 32, "float32", "fractional")
    values = values_of(call, epilogue)
    f, plain = as_functions(call)[epilogue], written_out(call)[epilogue]
    rng = np.random.default_rng(0)
    tangents = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), values)
    for got, want in zip(
        *(
            jax.tree.leaves(jax.jit(functools.partial(jax.jvp, g))((values,), (tangents,)))
            for g in (f, plain)
        ),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-5 * np.abs(want).max())
    norm = lambda g: lambda v: sum((a**2).sum() for a in jax.grad(loss_of(g))(v).values())
    assert_close(jax.jit(jax.grad(norm(f)))(values), jax.jit(jax.grad(norm(plain)))(values), 1e-3)


@EPILOGUES
def test_codes_get_float0(epilogue):
    call = made()
    more = (call.residual, call.norm_scale) if epilogue == "add_norm" else (call.squares,)
    product = {"add_norm": dot_add_norm, "swiglu": dot_swiglu}[epilogue]

    def loss(x, qweight):
        outs = product(x, dataclasses.replace(call.weight, qweight=qweight), *more)
        return jax.tree.leaves(outs)[0].astype(jnp.float32).sum()

    qweight = call.weight.qweight
    grads = jax.grad(loss, (0, 1), allow_int=True)(jnp.asarray(call.ops.x), qweight)
    assert grads[1].dtype == jax.dtypes.float0
    assert grads[1].shape == qweight.shape
    (grad,) = jax.grad(loss, (1,), allow_int=True)(jnp.asarray(call.ops.x), qweight)
    assert grad.dtype == jax.dtypes.float0
    still = np.zeros(qweight.shape, jax.dtypes.float0)
    x = jnp.asarray(call.ops.x)
    got = jax.jvp(loss, (x, qweight), (jnp.ones_like(x), still))
    np.testing.assert_array_equal(got, jax.jvp(lambda x: loss(x, qweight), (x,), (jnp.ones_like(x),)))


@EPILOGUES
@pytest.mark.parametrize("mapped", ["both", "x", "beside"])
def test_vmap_of_rows_is_one_call(implementation, epilogue, mapped):
    calls = [made(4, seed=i) for i in range(3)]
    weight, norm_scale = calls[0].weight, jnp.asarray(calls[0].norm_scale)
    name = "residual" if epilogue == "add_norm" else "squares"
    x = np.stack([c.ops.x for c in calls])
    beside = np.stack([getattr(c, name) for c in calls])
    x, beside = (
        jnp.asarray(x if mapped != "beside" else x[0]),
        jnp.asarray(beside if mapped != "x" else beside[0]),
    )
    options = {"implementation": implementation}
    f = {
        "add_norm": lambda x, residual: dot_add_norm(x, weight, residual, norm_scale, **options),
        "swiglu": lambda x, squares: (dot_swiglu(x, weight, squares, epsilon=EPSILON, **options),),
    }[epilogue]
    want = f(*(jnp.broadcast_to(a, (3, *a.shape[-2:])) for a in (x, beside)))
    lead = lambda a, axis: axis if a.ndim == 3 else None
    for axis in range(2):
        run = jax.vmap(f, (lead(x, axis), lead(beside, axis)), out_axes=axis)
        args = [jnp.moveaxis(a, 0, axis) if a.ndim == 3 else a for a in (x, beside)]
        text = str(jax.make_jaxpr(run)(*args))
        assert text.count("w4a16_fused_dot[") == 1
        assert "scan[" not in text
        for got, expected in zip(run(*args), want, strict=True):
            np.testing.assert_array_equal(got, np.moveaxis(expected, 0, axis))


@pytest.mark.parametrize("m", [1, 4])
def test_vmap_of_single_rows(m):
    """x [K] and what is beside it; and of a product without squares."""
    call = made(m)
    (add_norm, args), (swiglu, swiglu_args) = functions(call)
    got = jax.vmap(add_norm, (0, None, 0, None))(*args)
    jax.tree.map(np.testing.assert_array_equal, got, add_norm(*args))
    for count in (3, 2):
        args = swiglu_args[:count]
        got = jax.vmap(swiglu, (0, None, 0)[:count])(*args)
        np.testing.assert_array_equal(got, swiglu(*args))


@pytest.mark.parametrize(
    ("epilogue", "names"),
    [
        ("add_norm", ["scales"]),
        ("add_norm", ["zeros", "residual"]),
        ("add_norm", ["norm_scale"]),
        ("add_norm", ["norm_scale", "residual", "scales", "x", "zeros"]),
        ("swiglu", ["scales"]),
        ("swiglu", ["zeros", "squares"]),
        ("swiglu", ["scales", "squares", "x", "zeros"]),
    ],
)
def test_vmap_of_weights(epilogue, names):
    calls = [made(4, zeros="integer", seed=i) for i in range(3)]
    f = as_functions(calls[0])[epilogue]
    first, *_ = each = [values_of(call, epilogue) for call in calls]
    want = [f(first | {name: values[name] for name in names}) for values in each]
    stack = first | {name: jnp.stack([values[name] for values in each]) for name in names}
    axes = {name: 0 if name in names else None for name in stack}
    got = jax.vmap(f, (axes,))(stack)
    for a, *some in zip(got, *want, strict=True):
        np.testing.assert_array_equal(a, np.stack(some))
    changed = got[1] if names == ["norm_scale"] else got[0]
    assert (changed[0] != changed[1]).any()


def test_vmap_of_a_stack_of_weights():
    calls = [made(4, seed=i) for i in range(3)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *(c.weight for c in calls))
    x, squares = jnp.asarray(calls[0].ops.x), jnp.asarray(calls[0].squares)
    got = jax.vmap(dot_swiglu, (None, 0, None))(x, stack, squares)
    want = jnp.stack([dot_swiglu(x, c.weight, squares) for c in calls])
    np.testing.assert_array_equal(got, want)


@EPILOGUES
def test_vmap_of_grad_and_grad_of_vmap(epilogue):
    calls = [made(4, 64, 32, 32, "float32", seed=i) for i in range(3)]
    loss = loss_of(as_functions(calls[0])[epilogue])
    each = [values_of(call, epilogue) for call in calls]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *each)
    grad = jax.jit(jax.grad(loss))
    want = jax.tree.map(lambda *a: jnp.stack(a), *map(grad, each))
    assert_close(jax.jit(jax.vmap(jax.grad(loss)))(stack), want, 1e-5)
    assert_close(jax.jit(jax.grad(lambda v: jax.vmap(loss)(v).sum()))(stack), want, 1e-5)


def test_remat_and_scan():
    """Layers in a scan, rematerialised: values and gradients of them unrolled."""
    hidden, layers = 64, 3
    rng = np.random.default_rng(0)
    quantize = lambda k, n: jax_w4a16.quantize(
        jnp.asarray(rng.standard_normal((k, n)) / 8, jnp.float32), group_size=32, scale_dtype=jnp.float32
    )
    members = [
        (interleave(quantize(hidden, 48), quantize(hidden, 48)), quantize(48, hidden)) for _ in range(layers)
    ]
    norms = jnp.asarray(rng.uniform(0.5, 1.5, hidden), jnp.float32)

    def layer(carry, weights):
        x, scaled, squares = carry
        return dot_add_norm(dot_swiglu(scaled, weights[0], squares), weights[1], x, norms)

    def begin(x):
        return x, x * norms, (x**2).sum(-1, keepdims=True) * jnp.ones(4) / 4

    def scanned(x, stack):
        step = jax.checkpoint(lambda carry, weights: (layer(carry, weights), None))
        return jax.lax.scan(step, begin(x), stack)[0][1].sum()

    def unrolled(x):
        carry = begin(x)
        for weights in members:
            carry = layer(carry, weights)
        return carry[1].sum()

    x = jnp.asarray(rng.standard_normal((2, hidden)), jnp.float32)
    stack = jax.tree.map(lambda *a: jnp.stack(a), *members)
    value, grad = jax.jit(jax.value_and_grad(scanned))(x, stack)
    want, want_grad = jax.jit(jax.value_and_grad(unrolled))(x)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(grad, want_grad, rtol=1e-3, atol=1e-5)


# Several devices -------------------------------------------------------------------------------------------


def mesh(kind=AxisType.Auto, size=2):
    return jax.make_mesh((size,), ("d",), axis_types=(kind,), devices=jax.devices("cpu")[:size])


COLUMNS = QuantizedWeight(P(None, "d", None), P(None, "d"), P(None, "d"), group_size=64, k=256)


def test_shard_map_over_columns_and_rows():
    call = made(4, n=64, zeros="integer")
    x, weight, squares = jnp.asarray(call.ops.x), call.weight, jnp.asarray(call.squares)
    swiglu = functools.partial(dot_swiglu, epsilon=EPSILON)
    columns = jax.shard_map(swiglu, mesh=mesh(), in_specs=(P(), COLUMNS, P()), out_specs=P(None, "d"))
    call.check_swiglu(jax.jit(columns)(x, weight, squares))
    rows = jax.shard_map(swiglu, mesh=mesh(), in_specs=(P("d"), P(), P("d")), out_specs=P("d"))
    call.check_swiglu(jax.jit(rows)(x, weight, squares))
    residual, norm_scale = jnp.asarray(call.residual), jnp.asarray(call.norm_scale)
    rows = jax.shard_map(
        dot_add_norm, mesh=mesh(), in_specs=(P("d"), P(), P("d"), P()), out_specs=(P("d"),) * 3
    )
    call.check_add_norm(jax.jit(rows)(x, weight, residual, norm_scale))
    columns = jax.shard_map(
        dot_add_norm,
        mesh=mesh(),
        in_specs=(P(), COLUMNS, P(None, "d"), P("d")),
        out_specs=(P(None, "d"),) * 3,
    )
    call.check_add_norm(jax.jit(columns)(x, weight, residual, norm_scale))


@pytest.mark.usefixtures("cuda_build")
def test_the_kernel_serves_each_part_in_shard_map():
    call = made(4, n=64)
    weight = dataclasses.replace(COLUMNS, zeros=None)
    run = jax.shard_map(dot_swiglu, mesh=mesh(), in_specs=(P(), weight, P()), out_specs=P(None, "d"))
    args = jnp.asarray(call.ops.x), call.weight, jnp.asarray(call.squares)
    text = jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    (line,) = [line for line in text.splitlines() if "custom_call @w4a16" in line]
    assert "@w4a16_fused_dot(" in line
    assert "-> tensor<4x16xbf16>" in line


@pytest.mark.usefixtures("cuda_build", "fresh_warnings")
def test_dot_serves_where_the_compiler_splits():
    """Outside shard_map, and inside one that leaves an axis automatic."""
    call = made(4, n=64)
    args = jnp.asarray(call.ops.x), call.weight, jnp.asarray(call.squares)
    on_mesh = NamedSharding(mesh(), P())
    text = (
        jax.jit(dot_swiglu, in_shardings=on_mesh, out_shardings=on_mesh)
        .trace(*args)
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    assert "@w4a16_fused_dot(" not in text
    devices = jax.make_mesh((2, 2), ("d", "other"), axis_types=(AxisType.Auto,) * 2)
    weight = dataclasses.replace(COLUMNS, zeros=None)
    run = jax.shard_map(
        dot_swiglu, mesh=devices, in_specs=(P(), weight, P()), out_specs=P(None, "d"), axis_names={"d"}
    )
    with pytest.warns(UserWarning, match=r"\['other'\] automatic"):
        text = jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "@w4a16_fused_dot(" not in text
    assert "@w4a16_dot(" in text


def test_check_vma_refuses_parts_as_the_whole():
    call = made(4, n=64)
    weight = dataclasses.replace(COLUMNS, zeros=None)
    run = jax.shard_map(dot_swiglu, mesh=mesh(), in_specs=(P(), weight, P()), out_specs=P())
    with pytest.raises(ValueError, match="out_specs"):
        run(jnp.asarray(call.ops.x), call.weight, jnp.asarray(call.squares))


@EPILOGUES
@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_in_shard_map(epilogue, check_vma):
    """Split by columns; what is not split gets the sum of the devices' gradients."""
    call = made(4, 64, 64, 32, "float32", "fractional")
    values = values_of(call, epilogue)
    f = as_functions(call)[epilogue]
    weight = call.weight
    spec = {name: P(None, "d") for name in ("scales", "zeros", "residual")}
    spec = {name: spec.get(name, P("d") if name == "norm_scale" else P()) for name in values}

    def local(values, qweight):
        of = dataclasses.replace(weight, qweight=qweight, scales=values["scales"], zeros=values["zeros"])
        if epilogue == "add_norm":
            return dot_add_norm(values["x"], of, values["residual"], values["norm_scale"])
        return (dot_swiglu(values["x"], of, values["squares"], epsilon=EPSILON),)

    split = jax.shard_map(
        local,
        mesh=mesh(),
        in_specs=(spec, P(None, "d", None)),
        out_specs=(P(None, "d"),) * (3 if epilogue == "add_norm" else 1),
        check_vma=check_vma,
    )
    got = jax.jit(jax.grad(loss_of(lambda v: split(v, weight.qweight))))(values)
    assert_close(got, jax.grad(loss_of(f))(values), 1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("placed", ["columns", "rows", "whole"])
@pytest.mark.parametrize("m", [4, 20])
def test_split_by_the_compiler(kind, placed, m):
    call = made(m, n=64, zeros="integer")
    devices = mesh(kind)
    put = lambda a, *spec: jax.device_put(jnp.asarray(a), NamedSharding(devices, P(*spec)))
    columns, rows = ("d" if placed == name else None for name in ("columns", "rows"))
    weight = QuantizedWeight(
        put(call.ops.qweight, None, columns, None),
        put(call.ops.scales, None, columns),
        put(call.ops.zeros, None, columns),
        group_size=64,
        k=256,
    )
    with jax.set_mesh(devices):
        x, squares = put(call.ops.x, rows, None), put(call.squares, rows, None)
        got = jax.jit(functools.partial(dot_swiglu, epsilon=EPSILON))(x, weight, squares)
        assert len(got.sharding.device_set) == 2
        residual, norm_scale = put(call.residual, rows, columns), put(call.norm_scale, columns)
        three = jax.jit(dot_add_norm)(x, weight, residual, norm_scale)
        if kind == AxisType.Explicit:
            assert jax.typeof(got).sharding.spec == P(rows, columns)
            assert all(jax.typeof(a).sharding.spec == P(rows, columns) for a in three)
    call.check_swiglu(jax.device_get(got))
    call.check_add_norm(jax.device_get(three))


@pytest.mark.usefixtures("fresh_warnings")
def test_explicit_axes_that_cut_a_block():
    """A residual whose parts are no whole blocks; squares are then of whole rows."""
    call, devices = made(4), mesh(AxisType.Explicit)
    put = lambda a, *spec: jax.device_put(jnp.asarray(a), NamedSharding(devices, P(*spec)))
    with jax.set_mesh(devices):
        weight = jax.tree.map(put, call.weight)
        got = dot_add_norm(put(call.ops.x), weight, put(call.residual, None, "d"), put(call.norm_scale))
        assert jax.typeof(got[0]).sharding.spec == P(None, "d")
    call.check_add_norm(jax.device_get(got))


def test_vmap_over_an_explicit_axis():
    calls = [made(4, seed=i) for i in range(2)]
    x, squares = (np.stack(a) for a in zip(*((c.ops.x, c.squares) for c in calls), strict=True))
    devices, weight = mesh(AxisType.Explicit), calls[0].weight
    want = jax.vmap(dot_swiglu, (0, None, 0))(x, weight, squares)
    with jax.set_mesh(devices):
        put = lambda a, *spec: jax.device_put(jnp.asarray(a), NamedSharding(devices, P(*spec)))
        weight = jax.tree.map(put, weight)
        got = jax.vmap(dot_swiglu, (0, None, 0))(put(x, "d"), weight, put(squares, "d"))
        assert jax.typeof(got).sharding.spec == P("d", None, None)
    np.testing.assert_array_equal(got, want)
