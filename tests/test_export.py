"""jax.export: round trip, symbolic M, both platforms from one machine."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_w4a16

CASE = oracle.Case(6, 200, 40, 64, zeros="integer", bias=True, seed=1)


def call(x, qweight, scales, zeros, bias):
    return jax_w4a16.dot(x, qweight, scales, zeros, group_size=64, bias=bias)


def arrays():
    ops = oracle.operands(CASE)
    return ops, tuple(jnp.asarray(a) for a in (ops.x, ops.qweight, ops.scales, ops.zeros, ops.bias))


def round_trip(f, *args, **options):
    exported = export.export(jax.jit(f), disabled_checks=jax_w4a16.DISABLE_JAX_EXPORT_CHECKS, **options)(
        *args
    )
    return exported, export.deserialize(exported.serialize())


def test_round_trip():
    ops, args = arrays()
    _, loaded = round_trip(call, *args)
    oracle.check_close(CASE, ops, np.asarray(loaded.call(*args)))


def test_refused_without_the_constant():
    _, args = arrays()
    with pytest.raises(ValueError, match="w4a16_dot"):
        export.export(jax.jit(call))(*args)


def test_symbolic_rows():
    _, args = arrays()
    (m,) = export.symbolic_shape("m")
    x = jax.ShapeDtypeStruct((m, CASE.k), jnp.bfloat16)
    exported, loaded = round_trip(call, x, *args[1:])
    assert 'config = "auto"' in exported.mlir_module()
    for rows in (1, 5, 130):
        case = dataclasses.replace(CASE, m=rows)
        ops = oracle.operands(case)
        got = loaded.call(*(jnp.asarray(a) for a in (ops.x, ops.qweight, ops.scales, ops.zeros, ops.bias)))
        oracle.check_close(case, ops, np.asarray(got))


def test_symbolic_batch_and_sequence():
    ops, args = arrays()
    b, t = export.symbolic_shape("b, t")
    x = jax.ShapeDtypeStruct((b, t, CASE.k), jnp.bfloat16)
    _, loaded = round_trip(call, x, *args[1:])
    got = loaded.call(args[0].reshape(2, 3, CASE.k), *args[1:])
    oracle.check_close(CASE, ops, np.asarray(got).reshape(6, -1))


def test_both_platforms_from_one_machine():
    """CUDA code is exported where neither a GPU nor CUDA kernels are: the kernel is chosen where it runs."""
    ops, args = arrays()
    exported, loaded = round_trip(call, *args, platforms=("cpu", "cuda"))
    assert exported.platforms == ("cpu", "cuda")
    module = exported.mlir_module()
    assert module.count("@w4a16_dot(") >= 1
    assert module.count('config = "auto"') == module.count("@w4a16_dot(")
    oracle.check_close(CASE, ops, np.asarray(loaded.call(*args)))


def test_quantize_pack_and_dequantize_are_exported_too():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((100, 20)), jnp.bfloat16)

    def f(w, codes):
        qw = jax_w4a16.quantize(w, group_size=32, symmetric=False)
        return qw.dequantize(), jax_w4a16.pack(codes)

    codes = jnp.ones((100, 20), jnp.uint8)
    _, loaded = round_trip(f, w, codes)
    for got, want in zip(loaded.call(w, codes), f(w, codes), strict=True):
        np.testing.assert_array_equal(got, want)


def test_gradient_of_an_exported_call():
    _, args = arrays()
    f = lambda x, s: call(x, args[1], s, *args[3:]).astype(jnp.float32)
    exported = export.export(jax.jit(f), disabled_checks=jax_w4a16.DISABLE_JAX_EXPORT_CHECKS)(
        args[0], args[2]
    )
    loaded = export.deserialize(exported.serialize(vjp_order=1))
    got = jax.grad(lambda x, s: loaded.call(x, s).sum(), (0, 1))(args[0], args[2])
    want = jax.grad(lambda x, s: f(x, s).sum(), (0, 1))(args[0], args[2])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("fresh_warnings")
def test_export_for_several_devices_gathers_and_says_so():
    ops, args = arrays()
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices("cpu")[:2])
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P("data"))
        shardings = (rows, *(NamedSharding(mesh, P()),) * 4)
        options = {"disabled_checks": jax_w4a16.DISABLE_JAX_EXPORT_CHECKS}
        with pytest.warns(UserWarning, match="exported for several devices splits nothing"):
            exported = export.export(jax.jit(call, in_shardings=shardings), **options)(*args)
        loaded = export.deserialize(exported.serialize())
        got = jax.jit(loaded.call)(*jax.device_put(args, shardings))
    oracle.check_close(CASE, ops, np.asarray(got))
