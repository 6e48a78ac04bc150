"""Deep models of stacked layers: the program does not grow with depth, and no weight is copied."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jax_w4a16

WIDTH, M, DEPTHS = 128, 6, (8, 32, 64)


@functools.cache
def stack(depth):
    w = np.random.default_rng(0).standard_normal((depth, WIDTH, WIDTH)) / 8
    rule = jax_w4a16.Rule(group_size=32, symmetric=False)
    return jax_w4a16.quantize_model({"w": jnp.asarray(w, jnp.bfloat16)}, rule)["w"]


def inputs(*lead):
    return jnp.asarray(np.random.default_rng(1).standard_normal((*lead, WIDTH)), jnp.bfloat16)


def layer(x, w):
    return jnp.tanh(jax_w4a16.dot(x, w))


def plain(x, layers):
    return lax.scan(lambda x, w: (layer(x, w), None), x, layers)[0]


def remat(x, layers):
    return lax.scan(jax.checkpoint(lambda x, w: (layer(x, w), None)), x, layers)[0]


def gradient(forward):
    return jax.grad(lambda x, layers: forward(x, layers).astype(jnp.float32).sum())


def nnx_model(depth, rematerialised):
    nnx = pytest.importorskip("flax.nnx", reason="flax is not installed")
    from jax_w4a16.nnx import W4A16Linear

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return W4A16Linear(WIDTH, WIDTH, group_size=32, symmetric=False, rngs=rngs)

    definition, state = nnx.split(make(nnx.Rngs(0)))
    call = lambda one, x: jnp.tanh(one(x))
    step = nnx.scan(nnx.remat(call) if rematerialised else call, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    fresh = lambda state: nnx.merge(definition, jax.tree.map(lambda a: a, state))
    return lambda x, state: step(fresh(state), x), state


def linen_model(depth, rematerialised):
    nn = pytest.importorskip("flax.linen", reason="flax is not installed")
    from jax_w4a16.linen import W4A16Dense

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(W4A16Dense(WIDTH, group_size=32, symmetric=False)(x)), None

    made = {"variable_axes": {"params": 0, "quantized": 0}, "split_rngs": {"params": True}}
    module = nn.scan(nn.remat(Layer) if rematerialised else Layer, length=depth, **made)()
    variables = module.init(jax.random.key(0), inputs(M), None)
    return lambda x, variables: module.apply(variables, x, None)[0], variables


def model(kind, depth):
    """(function of x and the layers, the layers)."""
    form, _, what = kind.partition(" ")
    rematerialised = what.startswith("remat")
    if form == "jax":
        forward, layers = remat if rematerialised else plain, stack(depth)
    else:
        forward, layers = {"nnx": nnx_model, "linen": linen_model}[form](depth, rematerialised)
    return gradient(forward) if what.endswith("gradient") else forward, layers


KINDS = [
    f"{form} {what}" for form in ("jax", "nnx", "linen") for what in ("forward", "gradient", "remat gradient")
]


def operations(hlo: str) -> list[str]:
    return re.findall(r" = (?:\w+\[[\d,]*\]\S*|\(.*?\)) ([\w-]+)\(", hlo)


@pytest.mark.parametrize("kind", KINDS)
def test_the_program_does_not_grow_with_depth(kind):
    lowered, compiled = [], []
    for depth in DEPTHS:
        function, layers = model(kind, depth)
        program = jax.jit(function).lower(inputs(M), layers)
        lowered.append(len(program.as_text().splitlines()))
        compiled.append(sorted(operations(program.compile().as_text())))
    assert len(set(lowered)) == 1, lowered
    assert compiled[0] == compiled[1] == compiled[2], [len(each) for each in compiled]
    assert compiled[0].count("while") == (2 if "gradient" in kind else 1)


def made_of_stacks(compiled) -> set[str]:
    """The operations whose results are as large as all layers' codes, scales or zeros, 32 layers deep."""
    shapes = rf"u32\[32,{WIDTH // 64},{WIDTH // 16},128\]|bf16\[32,{WIDTH // 32},{WIDTH}\]"
    return set(re.findall(rf" = (?:{shapes})\S* ([\w-]+)\(", compiled.as_text()))


@pytest.mark.parametrize("kind", KINDS)
def test_no_stack_is_copied(kind):
    function, layers = model(kind, 32)
    compiled = jax.jit(function).lower(inputs(M), layers).compile()
    assert made_of_stacks(compiled) == {"parameter", "get-tuple-element"}
    if jax.__version_info__ >= (0, 11):  # before that, XLA widens the scales of all layers at once on a CPU
        assert compiled.memory_analysis().temp_size_in_bytes < stack(32).qweight.nbytes / 2


def test_a_copied_stack_would_show():
    backwards = lambda x, layers: plain(x, jax.tree.map(lambda a: a[::-1], layers))
    compiled = jax.jit(backwards).lower(inputs(M), stack(32)).compile()
    assert made_of_stacks(compiled) - {"parameter", "get-tuple-element"}
    assert compiled.memory_analysis().temp_size_in_bytes > stack(32).qweight.nbytes


def test_pipeline_of_stages():
    """32 layers over 8 stages: packed weights stay where they are, activations move to the next stage."""
    stages, depth, batches = 8, 32, 5
    mesh = jax.make_mesh((stages,), ("stage",), axis_types=(jax.sharding.AxisType.Auto,))

    def run(layers, xs):
        stage = lax.axis_index("stage")
        first, last = stage == 0, stage == stages - 1

        def tick(carry, t):
            arrived, outs = carry
            x = jnp.where(first, xs[jnp.minimum(t, batches - 1)], arrived)
            x = plain(x, layers)
            done = jnp.where(last & (t >= stages - 1), x, 0)
            outs = outs.at[jnp.maximum(t - stages + 1, 0)].add(done)
            return (lax.ppermute(x, "stage", [(i, i + 1) for i in range(stages - 1)]), outs), None

        varying = lambda a: a + 0 * stage.astype(a.dtype)
        start = varying(jnp.zeros_like(xs[0])), varying(jnp.zeros_like(xs))
        (_, outs), _ = lax.scan(tick, start, jnp.arange(batches + stages - 1))
        return lax.psum(outs, "stage")

    pipeline = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(P("stage"), P()), out_specs=P()))
    xs = inputs(batches, M)
    hlo = pipeline.lower(stack(depth), xs).compile().as_text()
    found = {op for op in operations(hlo) if re.match(r"all-|collective-|reduce-scatter", op)}
    assert found == {"all-reduce", "collective-permute"}
    assert not re.search(r" = u32\[\S* (?:all-|collective-|copy\()", hlo)
    assert f"u32[{depth // stages},{WIDTH // 64}," in hlo
    want = jax.vmap(lambda x: plain(x, stack(depth)))(xs)
    np.testing.assert_array_equal(pipeline(stack(depth), xs), want)
