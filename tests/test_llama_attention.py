"""The CUDA kernel of a decoding step's attention, against NumPy, and where the decoder takes it."""

import dataclasses
import functools
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import devices_of, needs_nvcc

# At the end: the installed package must be found before the repository's folder of that name.
sys.path.append(str(Path(__file__).resolve().parents[1]))

pytest.importorskip("flax")

from benchmarks import llama, llama_attention, llama_weights
from benchmarks.llama_config import Config

PACKED = {"packed": True, "packed_head": True, "group_size": 32}
CONFIG = Config(512, 1024, 2, 16, 8, 64, 512, rope_theta=10_000.0, decode_attention="kernel", **PACKED)


def attention(qkv, squares, cos, sin, keys, values, position, *, hidden, epsilon):
    """What `llama_attention.attend` returns, in float32 but for what it rounds; the new rows of the cache."""
    rounded = lambda a: np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32)
    factor = 1 / np.sqrt(squares.sum(-1) / hidden + epsilon)
    scaled = np.float32(qkv) * np.repeat(factor, len(qkv) // len(squares))[:, None, None]
    a, b = np.split(scaled[:, :-1], 2, axis=-1)
    cos, sin = cos[position], sin[position]
    turned = rounded(np.concatenate([a * cos - b * sin, b * cos + a * sin], -1))
    query, key, value = turned[:, :-1], turned[:, -1], rounded(scaled[:, -1])
    join = lambda cache, new: np.concatenate([np.float32(cache[:, :position]), new[:, None]], axis=1)
    scores = np.einsum("phd,ptd->pht", query, join(keys, key)) / math.sqrt(qkv.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = np.einsum("pht,ptd->phd", weights / weights.sum(-1, keepdims=True), join(values, value))
    return out, key, value


def attending_gpus(ways):
    """GPUs that `llama_attention.attend` runs on."""
    devices = devices_of("cuda", ways)
    needs_nvcc()
    if not llama_attention.runs_on(devices[0]):
        pytest.skip("needs compute capability 9.0")
    llama_attention.prepare()
    return devices


class TestAttention:
    @pytest.mark.gpu
    @pytest.mark.parametrize(
        ("batch", "kv_heads", "heads", "dim", "length", "position", "sums"),
        [
            (1, 1, 1, 64, 1, 0, 1),
            (1, 8, 8, 128, 5, 4, 512),
            (2, 3, 4, 64, 64, 63, 5),
            (1, 4, 8, 128, 256, 0, 32),
            (1, 4, 8, 128, 256, 201, 512),
            (1, 8, 4, 128, 256, 255, 256),
            (3, 8, 4, 128, 200, 15, 32),
            (16, 8, 4, 128, 256, 177, 256),
            (1, 2, 16, 128, 200, 199, 700),
            (2, 1, 11, 64, 1000, 801, 3),
            (5, 8, 8, 128, 1000, 999, 32),
            (40, 8, 2, 64, 1000, 500, 1),
            (1, 8, 4, 128, 5000, 4999, 1),
        ],
    )
    def test_equals_the_plain_one(self, batch, kv_heads, heads, dim, length, position, sums):
        device = attending_gpus(1)[0]
        random = np.random.default_rng(position)
        array = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.bfloat16)
        unused = np.arange(length)[:, None] >= position  # which may hold anything
        cache = lambda: jnp.where(unused, jnp.nan, array(batch * kv_heads, length, dim))
        angle = np.linspace(0, 1, dim // 2) * np.arange(length)[:, None]
        squares = random.uniform(0, 20, (batch, sums)).astype(np.float32)
        rotation = np.cos(angle, dtype=np.float32), np.sin(angle, dtype=np.float32)
        args = array(batch * kv_heads, heads + 2, dim), squares, *rotation, cache(), cache()
        norm = {"hidden": 10 * sums, "epsilon": 1e-5}
        attend = jax.jit(functools.partial(llama_attention.attend, **norm))
        with jax.default_device(device):
            out, keys, values = (np.asarray(a) for a in attend(*args, jnp.int32(position)))
        want, key, value = attention(*(np.asarray(a) for a in args), position, **norm)
        error = np.linalg.norm(np.float32(out) - want, axis=-1)
        assert (error < 0.01 * np.linalg.norm(want, axis=-1)).all()
        for got, row, before in ((keys, key, args[-2]), (values, value, args[-1])):
            np.testing.assert_allclose(np.float32(got[:, position]), row, rtol=2**-7, atol=1e-6)
            others = np.arange(length) != position
            bits = lambda a: np.asarray(a)[:, others].view(np.uint16)  # noqa: B023
            np.testing.assert_array_equal(bits(got), bits(before))

    @pytest.mark.gpu
    @pytest.mark.parametrize("ways", [1, 2])
    def test_logits_with_the_kernel_are_those_without(self, ways):
        attending_gpus(ways)
        logits = {}
        for kind in ("xla", "kernel"):
            config = dataclasses.replace(CONFIG, decode_attention=kind)
            mesh = llama.make_mesh(ways)
            args = llama_weights.random_state(config, mesh), llama.empty_cache(config, 2, 20, mesh)
            args += (jnp.zeros(2, jnp.int32), 0)
            decode = functools.partial(llama.decode, steps=20)
            lowered = llama.program(config, decode, mesh).lower(*args)
            assert ("llama_attention" in lowered.as_text()) == (kind == "kernel")
            _, found, cache = lowered.compile()(*args)
            logits[kind] = np.asarray(found)[:, 0]  # of the step before which no choices differ
            assert all(np.asarray(keys, np.float32)[:, -1].any() for keys, _ in cache)
        np.testing.assert_allclose(logits["kernel"], logits["xla"], rtol=0.03)

    @pytest.mark.parametrize(
        ("changes", "ways", "serves"),
        [({}, 1, True), ({}, 2, True), ({"dtype": "float32"}, 1, False), ({"head_dim": 32}, 1, False)],
    )
    def test_what_a_step_has(self, changes, ways, serves):
        config, mesh = dataclasses.replace(CONFIG, **changes), llama.make_mesh(ways)
        decode = llama.program(config, functools.partial(llama.decode, steps=1), mesh)
        cache = jax.eval_shape(lambda: llama.empty_cache(config, 1, 64))
        traced = decode.trace(llama.abstract(config)[1], cache, jax.ShapeDtypeStruct((1,), jnp.int32), 0)
        assert ("llama_attention" in str(traced.jaxpr)) == serves
