"""Calls split over eight CPU devices: values, and collectives counted in the compiled HLO."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import devices_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_w4a16
from jax_w4a16 import QuantizedWeight, _sharding

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
M, WIDTH, HIDDEN = 16, 512, 1024
MODES = pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])


def mesh_of(shape, mode, platform="cpu"):
    devices = np.array(devices_of(platform, int(np.prod(shape)))).reshape(shape)
    return jax.sharding.Mesh(devices, ("data", "model"), axis_types=(mode, mode))


def weight(k, n, group_size=64, symmetric=False, seed=0):
    w = np.random.default_rng(seed).standard_normal((k, n)) / np.sqrt(k)
    return jax_w4a16.quantize(jnp.asarray(w, jnp.bfloat16), group_size=group_size, symmetric=symmetric)


def split(qw, k=None, n=None, k_scales="same"):
    """The PartitionSpecs of a weight that is split over mesh axes k and n."""
    scales = P(k if k_scales == "same" else k_scales, n)
    return dataclasses.replace(
        qw, qweight=P(k, n, None), scales=scales, zeros=None if qw.zeros is None else scales
    )


def put(mesh, arrays, specs):
    return jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), arrays, specs)


def compiled(f, *args):
    """The result, how many collectives of each kind the compiled program has, and the types they move."""
    hlo = jax.jit(f).lower(*args).compile().as_text()
    found = re.findall(rf" = (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", hlo)
    assert "_promoted" not in hlo  # XLA's mark on a 16-bit sum that only a CPU makes in float32
    return jax.jit(f)(*args), collections.Counter(op for _, op in found), [kind for kind, _ in found]


def check(got, want, tolerance=1e-2):
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


@functools.cache
def activations(shape=(M, WIDTH)):
    return jnp.asarray(np.random.default_rng(9).standard_normal(shape), jnp.bfloat16)


@functools.cache
def mlp_weights(symmetric=False):
    up, down = weight(WIDTH, HIDDEN, symmetric=symmetric), weight(HIDDEN, WIDTH, symmetric=symmetric, seed=1)
    bias = jnp.asarray(np.random.default_rng(2).standard_normal(WIDTH), jnp.bfloat16)
    return up, down, bias


def mlp(x, up, down, bias):
    """Column split, then row split."""
    return jax_w4a16.dot(jax.nn.relu(jax_w4a16.dot(x, up)), down, bias=bias)


@MODES
@pytest.mark.parametrize("shape", [(1, 8), (2, 4), (4, 2), (1, 2), (1, 4)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("platform", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_mlp_has_one_float32_all_reduce(mode, shape, symmetric, platform):
    mesh = mesh_of(shape, mode, platform)
    up, down, bias = mlp_weights(symmetric)
    with jax.default_device(jax.devices("cpu")[0]):
        want = mlp(activations(), up, down, bias)
    with jax.set_mesh(mesh):
        args = put(
            mesh,
            (activations(), up, down, bias),
            (P("data", None), split(up, n="model"), split(down, k="model"), P(None)),
        )
        got, count, kinds = compiled(mlp, *args)
    assert count == {"all-reduce": 1}
    assert [kind.split("[")[0] for kind in kinds] == ["f32"]
    check(got, want)
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, P("data" if shape[0] > 1 else None, None)), 2)


@MODES
def test_codes_reach_each_kernel_as_they_are(mode):
    up, down, bias = mlp_weights()
    mesh = mesh_of((2, 4), mode)
    with jax.set_mesh(mesh):
        specs = (P("data", None), split(up, n="model"), split(down, k="model"), P(None))
        hlo = jax.jit(mlp).lower(*put(mesh, (activations(), up, down, bias), specs)).compile().as_text()
    assert set(re.findall(r" = u32\[\S+ ([\w-]+)\(", hlo)) == {"parameter"}
    assert hlo.count('custom_call_target="w4a16_dot"') == 2


@MODES
def test_batch_split_has_no_collective(mode):
    up, down, bias = mlp_weights()
    mesh = mesh_of((8, 1), mode)
    with jax.set_mesh(mesh):
        args = put(mesh, (activations(), up, down, bias), (P("data", None), split(up), split(down), P(None)))
        got, count, _ = compiled(mlp, *args)
    assert not count
    check(got, mlp(activations(), up, down, bias))
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, P("data", None)), 2)


@MODES
def test_column_split_has_no_collective(mode):
    up, *_ = mlp_weights()
    bias = jnp.asarray(np.random.default_rng(3).standard_normal(HIDDEN), jnp.bfloat16)
    call = lambda x, w, b: jax_w4a16.dot(x, w, bias=b, alpha=0.5)
    mesh = mesh_of((2, 4), mode)
    with jax.set_mesh(mesh):
        args = put(mesh, (activations(), up, bias), (P("data", None), split(up, n="model"), P("model")))
        got, count, _ = compiled(call, *args)
    assert not count
    check(got, call(activations(), up, bias))
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, P("data", "model")), 2)


@MODES
def test_two_axes_on_one_dimension_and_both_on_one_weight(mode):
    up, down, bias = mlp_weights()
    mesh = mesh_of((2, 4), mode)
    both = ("data", "model")
    with jax.set_mesh(mesh):
        args = put(
            mesh,
            (activations(), up, down, bias),
            (P(None, None), split(up, n=both), split(down, k=both), P(None)),
        )
        got, count, _ = compiled(mlp, *args)
        assert count == {"all-reduce": 1}
        check(got, mlp(activations(), up, down, bias))
        x, w = put(mesh, (activations(), up), (P(None, "data"), split(up, k="data", n="model")))
        got, count, _ = compiled(jax_w4a16.dot, x, w)
    assert count == {"all-reduce": 1}
    check(got, jax_w4a16.dot(activations(), up))


@MODES
def test_three_dimensional_activations(mode):
    up, *_ = mlp_weights()
    x = activations((4, 6, WIDTH))
    mesh = mesh_of((2, 4), mode)
    with jax.set_mesh(mesh):
        args = put(mesh, (x, up), (P("data", None, None), split(up, n="model")))
        got, count, _ = compiled(jax_w4a16.dot, *args)
    assert not count
    check(got, jax_w4a16.dot(x, up))


@MODES
@pytest.mark.usefixtures("fresh_warnings")
@pytest.mark.parametrize(
    ("k", "n", "group_size", "specs", "message"),
    [
        (512, 64, 256, {"k": "model", "k_scales": None}, "K = 512 is not split 4 ways"),  # cuts a group
        (512, 64, -1, {"k": "model", "k_scales": None}, "K = 512 is not split 4 ways"),  # one group
        (128 + 64, 64, 96, {"k": None, "k_scales": "data"}, "K = 192 is not split 2 ways"),  # cuts a block
        (256, 200, 64, {"n": "model"}, "N = 200 is not split 4 ways"),  # cuts a block of columns
    ],
)
def test_what_cannot_be_split_is_gathered_and_said_once(mode, k, n, group_size, specs, message):
    qw = weight(k, n, group_size)
    x = activations((M, k))
    want = jax_w4a16.dot(x, qw)
    mesh = mesh_of((2, 4), mode)
    placement = split(qw, **specs)
    if n % 64:  # 13 blocks of columns: only the scales can be split
        placement = dataclasses.replace(placement, qweight=P(None, None, None))
    with jax.set_mesh(mesh):
        args = put(mesh, (x, qw), (P(None, None), placement))
        with pytest.warns(UserWarning, match=message):
            got, _, _ = compiled(jax_w4a16.dot, *args)
        jax.jit(lambda x, qw: jax_w4a16.dot(x, qw) * 2)(*args)  # a second warning would be an error
    check(got, want)


def gradients(x, up, down, bias):
    def loss(x, up_scales, down_scales, zeros, bias):
        up_, down_ = (
            dataclasses.replace(up, scales=up_scales),
            dataclasses.replace(down, scales=down_scales, zeros=zeros),
        )
        return (mlp(x, up_, down_, bias).astype(jnp.float32) ** 2).sum()

    return jax.grad(loss, range(5))(x, up.scales, down.scales, down.zeros, bias)


@MODES
@pytest.mark.parametrize("shape", [(2, 4), (1, 8), (8, 1)])
def test_gradients_are_those_of_one_device(mode, shape):
    up, down, bias = mlp_weights()
    want = jax.jit(gradients)(activations(), up, down, bias)
    mesh = mesh_of(shape, mode)
    with jax.set_mesh(mesh):
        specs = (P("data", None), split(up, n="model"), split(down, k="model"), P(None))
        got = jax.jit(gradients)(*put(mesh, (activations(), up, down, bias), specs))
    for g, w in zip(got, want, strict=True):
        check(g, w, 2e-2)


@MODES
def test_gradient_of_scales_of_a_row_split_moves_no_weight(mode, fresh_warnings):
    mesh, qw = mesh_of((1, 4), mode), weight(256, 64)
    with jax.set_mesh(mesh):
        x, qw = put(mesh, (activations((M, 256)), qw), (P(None, "model"), split(qw, "model")))
        f = jax.grad(lambda s: jax_w4a16.dot(x, qw.qweight, s, qw.zeros).astype(jnp.float32).sum())
        got, collectives, _ = compiled(f, qw.scales)
    assert not collectives["all-gather"]
    x, qw = jax.device_get((x, qw))
    check(
        got,
        jax.grad(lambda s: jax_w4a16.dot(x, qw.qweight, s, qw.zeros).astype(jnp.float32).sum())(qw.scales),
    )


def test_vmap_over_an_explicit_axis(fresh_warnings):
    """The axis that vmap takes no longer splits the call, and a warning says so; the others do."""
    mesh, qw, x = mesh_of((2, 4), AxisType.Explicit), weight(WIDTH, HIDDEN), activations((8, 4, WIDTH))
    want = jax_w4a16.dot(x, qw)
    with jax.set_mesh(mesh):
        x, qw = put(mesh, (x, qw), (P("data"), split(qw, None, "model")))
        with pytest.warns(UserWarning, match=r"\['data'\] automatic, those axes split nothing"):
            got = jax.vmap(jax_w4a16.dot, (0, None))(x, qw)
    assert jax.typeof(got).sharding.spec == P("data", None, "model")
    np.testing.assert_array_equal(got, want)


@MODES
def test_permutation_of_activations_that_are_split(mode):
    qw, x = weight(WIDTH, HIDDEN), activations()
    order = jnp.asarray(np.random.default_rng(0).permutation(WIDTH), jnp.int32)
    qw = dataclasses.replace(qw, permutation=order)
    want, mesh = jax_w4a16.dot(x, qw), mesh_of((1, 4), mode)
    with jax.set_mesh(mesh):
        specs = dataclasses.replace(split(qw, None, "model"), permutation=P())
        x, qw = put(mesh, (x, qw), (P(None, "model"), specs))
        got = jax.jit(jax_w4a16.dot)(x, qw)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("search", ["mse", "fit"])
@MODES
def test_searches_of_a_split_weight(mode, search):
    w = jnp.asarray(np.random.default_rng(0).standard_normal((256, 64)), jnp.bfloat16)
    options = {"group_size": 64, "symmetric": False, "search": search}
    if search == "fit":
        options["inputs"] = activations((32, 256))
    want, mesh = jax_w4a16.quantize(w, **options), mesh_of((1, 4), mode)
    quantize = lambda w: jax_w4a16.quantize(w, **options)
    with jax.set_mesh(mesh):
        if mode == AxisType.Auto:
            quantize = jax.shard_map(
                quantize, in_specs=P(None, "model"), out_specs=split(want, None, "model")
            )
        got = quantize(put(mesh, w, P(None, "model")))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


@MODES
def test_gradient_of_x_moves_no_weight(mode):
    """Backward through the column split sums over it, once, in float32; the row split needs nothing more."""
    up, down, bias = mlp_weights()
    loss = lambda x, *w: mlp(x, *w).astype(jnp.float32).sum()
    mesh = mesh_of((2, 4), mode)
    with jax.set_mesh(mesh):
        specs = (P("data", None), split(up, n="model"), split(down, k="model"), P(None))
        args = put(mesh, (activations(), up, down, bias), specs)
        got, count, kinds = compiled(jax.grad(loss), *args)
    assert count == {"all-reduce": 1}
    assert all(kind.startswith("f32[") for kind in kinds)
    check(got, jax.grad(loss)(activations(), up, down, bias), 2e-2)


@MODES
def test_scan_over_split_layers(mode):
    layers = [(weight(WIDTH, HIDDEN, seed=i), weight(HIDDEN, WIDTH, seed=i + 9)) for i in range(3)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    run = lambda x, stack: jax.lax.scan(
        lambda x, w: (jax_w4a16.dot(jax.nn.relu(jax_w4a16.dot(x, w[0])), w[1]), None), x, stack
    )[0]
    want = jax.jit(run)(activations(), stack)
    mesh = mesh_of((2, 4), mode)
    up, down = stack
    specs = (split(up, n="model"), split(down, k="model"))
    lead = jax.tree.map(lambda spec: P(None, *spec), specs, is_leaf=lambda s: isinstance(s, P))
    with jax.set_mesh(mesh):
        args = put(mesh, (activations(), stack), (P("data", None), lead))
        got, count, _ = compiled(run, *args)
    assert count == {"all-reduce": 1}
    check(got, want, 2e-2)


@MODES
def test_vmap_of_split_weights(mode):
    up, *_ = mlp_weights()
    xs = activations((3, M, WIDTH))
    call = jax.vmap(jax_w4a16.dot, (0, None))
    mesh = mesh_of((2, 4), mode)
    with jax.set_mesh(mesh):
        args = put(mesh, (xs, up), (P(None, "data", None), split(up, n="model")))
        got, count, _ = compiled(call, *args)
    assert not count
    check(got, call(xs, up))


@MODES
def test_dequantize_of_a_split_weight(mode):
    up, down, _ = mlp_weights()
    mesh = mesh_of((2, 4), mode)
    with jax.set_mesh(mesh):
        for qw, spec in ((up, split(up, n="model")), (down, split(down, k="model", n="data"))):
            (placed,) = put(mesh, (qw,), (spec,))
            got, count, _ = compiled(lambda qw: qw.dequantize(), placed)
            assert not count
            np.testing.assert_array_equal(got, qw.dequantize())


@MODES
def test_eager_calls(mode):
    up, down, bias = mlp_weights()
    mesh = mesh_of((2, 4), mode)
    with jax.set_mesh(mesh):
        args = put(
            mesh,
            (activations(), up, down, bias),
            (P("data", None), split(up, n="model"), split(down, k="model"), P(None)),
        )
        check(mlp(*args), mlp(activations(), up, down, bias))


def test_explicit_types_show_the_split():
    up, down, bias = mlp_weights()
    mesh = mesh_of((2, 4), AxisType.Explicit)
    with jax.set_mesh(mesh):
        args = put(
            mesh,
            (activations(), up, down, bias),
            (P("data", None), split(up, n="model"), split(down, k="model"), P(None)),
        )
        seen = []

        def f(x, up, down, bias):
            hidden = jax_w4a16.dot(x, up)
            seen.append(jax.typeof(hidden).sharding.spec)
            out = jax_w4a16.dot(hidden, down, bias=bias)
            seen.append(jax.typeof(out).sharding.spec)
            return out

        jax.jit(f)(*args)
    assert seen == [P("data", "model"), P("data", None)]


@MODES
def test_mesh_of_the_arguments_alone(mode):
    """No mesh in the context: the arrays' own shardings are enough."""
    up, down, bias = mlp_weights()
    mesh = mesh_of((2, 4), mode)
    specs = (P("data", None), split(up, n="model"), split(down, k="model"), P(None))
    with jax.set_mesh(mesh):
        args = put(mesh, (activations(), up, down, bias), specs)
    got, count, _ = compiled(mlp, *args)
    assert count == {"all-reduce": 1}
    check(got, mlp(activations(), up, down, bias))


def test_reshape_that_splits_a_part_of_an_axis():
    """Rows [16] over eight devices, seen as [2, 8]: no PartitionSpec says how, but the values are right."""
    up, *_ = mlp_weights()
    call = lambda x, w: jax_w4a16.dot(x.reshape(2, 8, WIDTH), w).reshape(M, HIDDEN)
    mesh = mesh_of((8, 1), AxisType.Auto)
    with jax.set_mesh(mesh):
        args = put(mesh, (activations(), up), (P("data", None), split(up)))
        check(jax.jit(call)(*args), call(activations(), up))


# Inside shard_map ------------------------------------------------------------------------------------------


def manual_mlp(mesh, up, down):
    def local(x, up, down, bias):
        partial = jax_w4a16.dot(jax.nn.relu(jax_w4a16.dot(x, up)), down, preferred_element_type=jnp.float32)
        return (jax.lax.psum(partial, "model") + bias.astype(jnp.float32)).astype(x.dtype)

    in_specs = (P("data", None), split(up, n="model"), split(down, k="model"), P(None))
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=P("data", None))


@MODES
def test_inside_shard_map(mode):
    up, down, bias = mlp_weights()
    mesh = mesh_of((2, 4), mode)
    with jax.set_mesh(mesh):
        f = manual_mlp(mesh, up, down)
        in_specs = (P("data", None), split(up, n="model"), split(down, k="model"), P(None))
        args = put(mesh, (activations(), up, down, bias), in_specs)
        got, count, kinds = compiled(f, *args)
    assert count == {"all-reduce": 1}
    assert kinds[0].startswith("f32[")
    check(got, mlp(activations(), up, down, bias))


def test_gradients_inside_and_through_shard_map():
    up, down, bias = mlp_weights()
    mesh = mesh_of((2, 4), AxisType.Auto)
    want = gradients(activations(), up, down, bias)
    f = manual_mlp(mesh, up, down)

    def loss(x, up_scales, down_scales, zeros, bias):
        ws = (
            dataclasses.replace(up, scales=up_scales),
            dataclasses.replace(down, scales=down_scales, zeros=zeros),
        )
        return (f(x, *ws, bias).astype(jnp.float32) ** 2).sum()

    got = jax.jit(jax.grad(loss, range(5)))(activations(), up.scales, down.scales, down.zeros, bias)
    for g, w in zip(got, want, strict=True):
        check(g, w, 2e-2)


def test_check_vma_refuses_a_forgotten_sum():
    """The result of a row split varies over its axis, so a program that forgets the psum does not pass."""
    _, down, _ = mlp_weights()
    mesh = mesh_of((2, 4), AxisType.Auto)
    wrong = jax.shard_map(
        jax_w4a16.dot,
        mesh=mesh,
        in_specs=(P("data", "model"), split(down, k="model")),
        out_specs=P("data", None),
    )
    with pytest.raises(ValueError, match="model"):
        wrong(activations((M, HIDDEN)), down)


def test_quantize_inside_shard_map():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((256, 512)), jnp.bfloat16)
    mesh = mesh_of((2, 4), AxisType.Auto)
    quantize = functools.partial(jax_w4a16.quantize, group_size=64)
    whole = quantize(w)
    spec = dataclasses.replace(split(whole, k="data", n="model"), k=128)
    parts = jax.shard_map(quantize, mesh=mesh, in_specs=P("data", "model"), out_specs=spec)(w)
    assert parts.k == 128  # static, so a shard's own
    np.testing.assert_array_equal(parts.qweight, whole.qweight)
    np.testing.assert_array_equal(parts.scales, whole.scales)


@pytest.mark.usefixtures("fresh_warnings")
def test_partly_manual_shard_map_says_what_it_does_not_split():
    up, *_ = mlp_weights()
    mesh = mesh_of((2, 4), AxisType.Auto)
    with jax.set_mesh(mesh):
        f = jax.shard_map(
            jax_w4a16.dot,
            in_specs=(P("data", None), split(up)),
            out_specs=P("data", None),
            axis_names={"data"},
        )
        args = put(mesh, (activations(), up), (P("data", None), split(up, n="model")))
        with pytest.warns(UserWarning, match="leaves .*model.* automatic"):
            got = jax.jit(f)(*args)
    check(got, jax_w4a16.dot(activations(), up))


# The plan --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "n", "group_size", "units_k", "units_n"),
    [
        (512, 256, 64, 8, 16),
        (512, 256, 32, 8, 16),
        (512, 256, 256, 2, 16),
        (512, 256, 512, 1, 16),
        (192, 256, 96, 1, 16),
        (384, 256, 96, 2, 16),
        (200, 100, 64, 1, 1),
        (0, 0, 1, 1, 1),
    ],
)
def test_units(k, n, group_size, units_k, units_n):
    sizes = _sharding.Weight(k, n, group_size)
    assert (sizes.units_k, sizes.units_n) == (units_k, units_n)


def test_result_is_a_quantized_weight_after_device_put_with_a_prefix():
    up, *_ = mlp_weights()
    mesh = mesh_of((2, 4), AxisType.Auto)
    placed = jax.device_put(up, NamedSharding(mesh, P()))
    assert isinstance(placed, QuantizedWeight)
    assert placed.qweight.sharding.is_fully_replicated
