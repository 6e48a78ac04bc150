"""A Llama decoder in Flax NNX: bfloat16 or W4A16 linear layers, a KV cache, tensor parallelism.

Decoding is one program for many tokens: a loop with a fixed number of steps over unrolled layers, so that XLA
captures the whole step as a CUDA graph, and the cache is updated in place. A step of a packed layer on one
GPU is five kernels: qkv's product; attention; o's product, the residual sum and the norm; gate_up's product
and SwiGLU; down's product, the residual sum and the next layer's norm.

Tensor parallelism runs the model inside `shard_map`, on one device's part of each weight: heads, the MLP's
features and the vocabulary are split over the axis "model". Each of the sums over devices (of o, down and
the embedding) is one float32 all-reduce, or one kernel that has the norm in it (llama_sum.py). So that a
contiguous part holds whole heads, fused columns are ordered

    qkv      [KV head, (query heads of its group, key, value), head_dim]
    gate_up  [block, (gate, up), MLP_BLOCK]  as `dot_swiglu` wants them
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import llama_attention, llama_sum
from benchmarks.llama_config import Config
from jax_w4a16 import dot_add_norm, dot_swiglu
from jax_w4a16.nnx import W4A16Linear

AXIS = "model"
MLP_BLOCK = 8
_F32 = jnp.float32

# Of each layer, keys and values [batch x KV heads, position, head_dim]. In this form a product takes them as
# they are; else XLA fuses a reshape with their update and copies the cache in every step.
Cache = list[tuple[jax.Array, jax.Array]]


def rotary(config: Config, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [position, head_dim / 2], float32."""
    frequency = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    if config.rope_scaling:  # long waves are stretched by `factor`, short ones kept
        factor, low, high, length = config.rope_scaling
        kept = np.clip((length * frequency / (2 * np.pi) - low) / (high - low), 0, 1)
        frequency = frequency * (kept + (1 - kept) / factor)
    angle = positions[:, None].astype(_F32) * jnp.asarray(frequency, _F32)
    return jnp.cos(angle), jnp.sin(angle)


class Norm(nnx.Module):
    """x / rms(x) * scale, in two factors: x * scale, and `factor` of sums of squares, for after a product.

    So the sums of squares, the residual sum before them and x * scale are one kernel; the factor, which
    depends on all of a row, is part of a later one, and so is the sum of a row's several sums: one here, one
    for each 16 columns of `dot_add_norm`. The mean is left to that too: XLA ends one kernel in a sum and in
    x * scale, but not in what follows from the sum.
    """

    def __init__(self, config: Config):
        self.epsilon = config.epsilon
        self.scale = nnx.Param(jnp.ones(config.hidden, config.dtype))

    def __call__(self, x):
        """x [..., hidden] -> the same, and the sum of squares, float32 [..., 1]."""
        wide = x.astype(_F32)
        squares = jnp.sum(wide * wide, axis=-1, keepdims=True)
        return (wide * self.scale[...].astype(_F32)).astype(x.dtype), squares

    def factor(self, squares):
        """1 / rms(x) [..., 1] of squares [..., S], which add up to the sum of x's."""
        return lax.rsqrt(squares.sum(-1, keepdims=True) / self.scale.shape[0] + self.epsilon)


class Layer(nnx.Module):
    """Attention and MLP, each after a norm; `ways` is the number of devices that share it."""

    def __init__(self, config: Config, ways: int, rngs: nnx.Rngs):
        self.config, self.ways = config, ways
        c = config
        self.fused = c.packed and c.products == "fused"
        self.norm_attention, self.norm_mlp = Norm(c), Norm(c)
        make = functools.partial(_linear, c, c.packed, rngs=rngs)
        features = c.heads * c.head_dim // ways
        summed = None if ways == 1 else _F32
        self.qkv = make(c.hidden, (c.heads + 2 * c.kv_heads) * c.head_dim // ways)
        self.o = make(features, c.hidden, preferred_element_type=summed)
        self.gate_up = make(c.hidden, 2 * c.mlp // ways)
        self.down = make(c.mlp // ways, c.hidden, preferred_element_type=summed)

    def __call__(self, x, keys, values, position, rotation, after):
        """x and its norm for this layer -> the same after it, and the cache with the tokens' keys and values.

        x is [batch, tokens, hidden]; `after` is the norm that follows this layer.
        """
        x, (scaled, squares) = x
        qkv = self.qkv(scaled)
        c = self.config
        kernel = c.decode_attention == "kernel" and llama_attention.serves(c.head_dim, c.dtype)
        if kernel and x.shape[1] == 1:
            out, keys, values = self._attend_one(qkv, squares, keys, values, position, rotation)
        else:
            qkv = qkv * self.norm_attention.factor(squares)
            out, keys, values = self._attend(qkv, keys, values, position, rotation)
        x, normed = self._add_product(x, out, self.o, self.norm_mlp)
        return self._add_product(x, self._swiglu(*normed), self.down, after), keys, values

    def _add_product(self, x, features, linear, norm: Norm):
        """x plus a product, summed over devices, and its norm."""
        if not self.fused or self.ways > 1:
            return _add(self.config, self.ways, x, linear(features), norm)
        x, *normed = dot_add_norm(features, linear.weight, x, norm.scale[...])
        return x, tuple(normed)

    def _swiglu(self, scaled, squares):
        """silu(gate) * up, from a norm's two results."""
        if self.fused:
            return dot_swiglu(scaled, self.gate_up.weight, squares, epsilon=self.config.epsilon)
        gate_up = self.gate_up(scaled) * self.norm_mlp.factor(squares)
        gate_up = gate_up.reshape(*scaled.shape[:-1], -1, 2, MLP_BLOCK)
        out = jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]
        return out.reshape(*scaled.shape[:-1], -1).astype(scaled.dtype)

    def _attend_one(self, qkv, squares, keys, values, position, rotation):
        c = self.config
        heads = qkv.reshape(keys.shape[0], -1, c.head_dim)
        cos, sin = rotation
        out, keys, values = llama_attention.attend(
            heads,
            squares[:, 0],
            cos,
            sin,
            keys,
            values,
            position,
            hidden=c.hidden,
            epsilon=c.epsilon,
        )
        return out.reshape(*qkv.shape[:2], -1), keys, values

    def _attend(self, qkv, keys, values, position, rotation):
        c = self.config
        batch, tokens, group = *qkv.shape[:2], c.heads // c.kv_heads
        qkv = qkv.reshape(batch, tokens, c.kv_heads // self.ways, group + 2, c.head_dim)
        rotation = [lax.dynamic_slice_in_dim(a, position, tokens) for a in rotation]
        query = _rotate(qkv[..., :group, :], *rotation).astype(c.dtype)
        key = _rotate(qkv[..., group, :], *rotation).astype(c.dtype)
        value = qkv[..., -1, :].astype(c.dtype)
        by_head = lambda a: a.swapaxes(1, 2).reshape(-1, tokens, c.head_dim)
        keys = lax.dynamic_update_slice(keys, by_head(key), (0, position, 0))
        values = lax.dynamic_update_slice(values, by_head(value), (0, position, 0))
        if tokens > 1:  # a prompt, with nothing before it
            query = query.reshape(batch, tokens, -1, c.head_dim)
            out = jax.nn.dot_product_attention(
                query, key, value, is_causal=True, implementation="cudnn" if c.attention == "cudnn" else "xla"
            )
        else:
            query = query.reshape(-1, group, c.head_dim)
            scores = jnp.einsum("hgd,htd->hgt", query, keys, preferred_element_type=_F32)
            seen = jnp.arange(keys.shape[1]) <= position
            scores = jnp.where(seen, scores / math.sqrt(c.head_dim), -jnp.inf)
            weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
            out = jnp.einsum("hgt,htd->hgd", weights, values)
        return out.reshape(batch, tokens, -1), keys, values


def _linear(
    config: Config, packed: bool, k: int, n: int, *, rngs: nnx.Rngs, preferred_element_type=None
) -> Any:
    """An nnx.Linear or a W4A16Linear."""
    shared = {"use_bias": False, "dtype": config.dtype, "param_dtype": config.dtype, "rngs": rngs}
    shared["preferred_element_type"] = preferred_element_type
    if not packed:
        return nnx.Linear(k, n, **shared)
    return W4A16Linear(k, n, group_size=config.group_size, symmetric=config.symmetric, **shared)


def _add(config: Config, ways: int, x, part, norm: Norm):
    """x plus what the devices' parts sum to, and its norm."""
    rows = math.prod(x.shape[:-1])
    if config.row_sum == "kernel" and llama_sum.serves(rows, x.shape[-1], x.dtype):
        x, *normed = llama_sum.add_and_norm(x, part, norm.scale[...])
        return x, tuple(normed)
    x = x + (part if ways == 1 else lax.psum(part, AXIS).astype(config.dtype))
    return x, norm(x)


def _rotate(x, cos, sin):
    """Rotates the pairs (i, i + head_dim / 2) of x [batch, token, ..., head_dim], float32."""
    over_heads = lambda a: a.reshape(a.shape[0], *(1,) * (x.ndim - 3), 1, a.shape[1])
    halves = x.reshape(*x.shape[:-1], 2, -1)
    turned = halves[..., ::-1, :] * jnp.asarray([[-1], [1]], _F32)
    return (halves * over_heads(cos) + turned * over_heads(sin)).reshape(x.shape)


def _largest(logits) -> tuple[jax.Array, jax.Array]:
    """The largest along the last axis and the first place that has it, in one pass, not two."""
    places = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)

    def larger(a, b):
        first = (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] < b[1])) | jnp.isnan(a[0])
        return jnp.where(first, a[0], b[0]), jnp.where(first, a[1], b[1])

    none = jnp.float32(-jnp.inf), jnp.int32(np.iinfo(np.int32).max)
    best, place = lax.reduce((logits, places), none, larger, (logits.ndim - 1,))
    return best, place


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(graph, state, *args):
    """One layer, and the norm after it, as a function: traced and lowered once for all alike."""
    layer, after = nnx.merge(graph, state)
    return layer(*args, after)


class Llama(nnx.Module):
    """The decoder, or one device's part of it."""

    def __init__(self, config: Config, ways: int = 1, *, rngs: nnx.Rngs):
        c = self.config = config
        self.ways = ways
        kinds = {"dtype": c.dtype, "param_dtype": c.dtype, "rngs": rngs}
        self.embed = nnx.Embed(c.vocab // ways, c.hidden, **kinds)
        layers = [Layer(c, ways, rngs) for _ in range(c.layers)]
        self.layers = nnx.List(layers) if hasattr(nnx, "List") else layers  # from flax 0.12 on
        self.norm = Norm(c)
        head = functools.partial(_linear, c, c.packed_head, rngs=rngs, preferred_element_type=_F32)
        self.head = None if c.tied else head(c.hidden, c.vocab // ways)

    def __call__(self, tokens, cache: Cache, position, rotation=None) -> tuple[Any, Cache]:
        """tokens [batch, n] at positions `position`... -> normed hidden states, and the cache with them.

        Several tokens must be a whole prompt, at position 0. A caller in a loop has `rotation` from before.
        """
        if rotation is None:
            rotation = self.rotation(cache)
        x = self._embed(tokens, self.layers[0].norm_attention)
        filled = []
        norms = [*(layer.norm_attention for layer in self.layers[1:]), self.norm]
        for layer, norm, (keys, values) in zip(self.layers, norms, cache, strict=True):
            x, keys, values = _run_layer(*nnx.split((layer, norm)), x, keys, values, position, rotation)
            filled.append((keys, values))
        return x[1], filled

    def rotation(self, cache: Cache):
        """`rotary` for the positions of a cache."""
        return rotary(self.config, jnp.arange(cache[0][0].shape[1]))

    def _embed(self, tokens, norm):
        """The tokens' rows of the embedding [batch, n, hidden], and their norm."""
        if self.ways == 1:
            x = self.embed(tokens)
            return x, norm(x)
        rows = self.config.vocab // self.ways
        local = tokens - lax.axis_index(AXIS) * rows
        mine = (local >= 0) & (local < rows)
        found = self.embed(jnp.where(mine, local, 0))
        part = jnp.where(mine[..., None], found, 0).astype(_F32)
        return _add(self.config, self.ways, jnp.zeros(part.shape, found.dtype), part, norm)

    def logits(self, normed) -> jax.Array:
        """Normed states [..., hidden] -> float32 logits [..., vocab], or this device's part of them."""
        x, squares = normed
        factor = self.norm.factor(squares)
        if self.head is not None:
            return self.head(x) * factor
        embedding = self.embed.embedding[...]
        return jnp.einsum("...k,nk->...n", x, embedding, preferred_element_type=_F32) * factor

    def pick(self, normed) -> tuple[jax.Array, jax.Array]:
        """The likeliest token [batch] after the last of the states [batch, n, hidden], and its logit."""
        logits = self.logits([a[:, -1] for a in normed])
        best, token = _largest(logits)
        if self.ways == 1:
            return token, best
        # Each device's own [best, token] in its place, in one sum; a token is a whole number below 2^24.
        device = lax.axis_index(AXIS)
        own = jnp.stack([best, (token + device * logits.shape[-1]).astype(_F32)])
        place = (jnp.arange(self.ways) == device)[:, None, None]
        best, token = lax.psum(jnp.where(place, own, 0), AXIS).swapaxes(0, 1)
        first = best.argmax(0, keepdims=True)
        return jnp.take_along_axis(token, first, 0)[0].astype(jnp.int32), best.max(0)


def prefill(model: Llama, cache: Cache, tokens) -> tuple[jax.Array, jax.Array, Cache]:
    """A prompt [batch, n] -> the first token after it [batch], its logit, and the cache."""
    hidden, cache = model(tokens, cache, 0)
    return *model.pick(hidden), cache


def decode(model: Llama, cache: Cache, token, position, *, steps: int) -> tuple[jax.Array, jax.Array, Cache]:
    """From `token` [batch] at `position`: the next tokens [batch, steps], their logits, and the cache."""

    rotation = model.rotation(cache)

    def step(i, carry):
        token, cache, tokens, logits = carry
        hidden, cache = model(token[:, None], cache, position + i, rotation)
        token, logit = model.pick(hidden)
        return token, cache, tokens.at[i].set(token), logits.at[i].set(logit)

    tokens = jnp.zeros((steps, token.shape[0]), jnp.int32)
    _, cache, tokens, logits = lax.fori_loop(0, steps, step, (token, cache, tokens, tokens.astype(_F32)))
    return tokens.T, logits.T, cache


def make_mesh(ways: int) -> Mesh | None:
    """The first `ways` devices; None for one."""
    if len(jax.devices()) < ways:
        raise ValueError(f"mesh: expected at most {len(jax.devices())} devices, got {ways}")
    return None if ways == 1 else Mesh(np.array(jax.devices()[:ways]), (AXIS,))


def specs(config: Config) -> Any:
    """How the model's state is split: a PartitionSpec for each array."""

    def spec(path, leaf) -> P:
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        axes: tuple[str | None, ...] = (None,) * len(leaf.shape)
        if {"qkv", "gate_up", "head"} & set(names):
            axes = (None, AXIS, None)[: len(leaf.shape)]
        elif {"o", "down", "embed"} & set(names):
            axes = (AXIS, None, None)[: len(leaf.shape)]
        return P(*axes)

    return jax.tree_util.tree_map_with_path(spec, abstract(config)[1])


def abstract(config: Config, ways: int = 1) -> tuple[nnx.GraphDef, Any]:
    """The model's structure, and its state with shapes in place of arrays; nothing is computed."""
    return nnx.split(nnx.eval_shape(lambda: Llama(config, ways, rngs=nnx.Rngs(0))))


def empty_cache(config: Config, batch: int, length: int, mesh: Mesh | None = None) -> Cache:
    """Zeros for `length` positions."""
    shape = (batch * config.kv_heads, length, config.head_dim)
    place = None if mesh is None else NamedSharding(mesh, P(AXIS))
    zeros = lambda: jnp.zeros(shape, config.dtype, device=place)
    return [(zeros(), zeros()) for _ in range(config.layers)]


def program(config: Config, run: Callable, mesh: Mesh | None = None) -> Any:
    """`run(model, cache, ...)` jitted as a function of (state, cache, ...); the cache is donated."""
    ways = 1 if mesh is None else mesh.size
    config.check_ways(ways)
    graph, _ = abstract(config, ways)

    def call(state, cache, *args):
        return run(nnx.merge(graph, state), cache, *args)

    if mesh is None:
        return jax.jit(call, donate_argnums=1)
    split = P(AXIS)

    def mapped(state, cache, *args):
        in_specs = (specs(config), split, *(P() for _ in args))
        return jax.shard_map(call, mesh=mesh, in_specs=in_specs, out_specs=(P(), P(), split))(
            state, cache, *args
        )

    return jax.jit(mapped, donate_argnums=1)
