"""The Llama decoder of the benchmarks: against the reference, its cache, checkpoints, tensor parallelism."""

import collections
import dataclasses
import functools
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import device_of, devices_of, needs_nvcc
from flax import nnx
from jax.sharding import PartitionSpec as P

import jax_w4a16
from jax_w4a16 import QuantizedWeight
from jax_w4a16 import nnx as layers

# At the end: the installed package must be found before the repository's folder of that name.
sys.path.append(str(Path(__file__).resolve().parents[1]))

pytest.importorskip("flax")

from benchmarks import bench_llama, llama, llama_sum, llama_weights
from benchmarks.llama_config import SIZES, Config

PROMPT, STEPS = 12, 200
LENGTH = PROMPT + STEPS
PRODUCTS = jax_w4a16.dot, jax_w4a16.dot_add_norm, jax_w4a16.dot_swiglu
# In float32 nothing but the order of sums differs between implementations.
CONFIG = dataclasses.replace(SIZES["tiny"], layers=3, packed=True, packed_head=True, dtype="float32")
# Splits eight ways: by KV heads, by blocks of columns, and by blocks of 64 rows.
WIDE = dataclasses.replace(CONFIG, layers=2, heads=16, kv_heads=8, head_dim=64, mlp=1024)


@functools.cache
def state_of(config, ways=1):
    return llama_weights.random_state(config, llama.make_mesh(ways))


def prompt_of(config, batch=1, length=PROMPT):
    return jax.random.randint(jax.random.key(5), (batch, length), 0, config.vocab, "int32")


def generate(config, state, ways=1, batch=1, steps=STEPS):
    """Greedy tokens [batch, 1 + steps] after the prompt, and their logits."""
    mesh = llama.make_mesh(ways)
    cache = llama.empty_cache(config, batch, PROMPT + steps, mesh)
    token, logit, cache = llama.program(config, llama.prefill, mesh)(state, cache, prompt_of(config, batch))
    decode = llama.program(config, functools.partial(llama.decode, steps=steps), mesh)
    tokens, logits, _ = decode(state, cache, token, PROMPT)
    join = lambda first, rest: np.concatenate([np.asarray(first)[:, None], np.asarray(rest)], axis=1)
    return join(token, tokens), join(logit, logits)


def all_logits(config, state, tokens, head=llama.Llama.logits):
    """Logits [batch, n, vocab] of whole sequences, by one pass without a cache."""
    cache = llama.empty_cache(config, *tokens.shape)
    read = lambda model, cache, tokens: head(model, model(tokens, cache, 0)[0])
    return np.asarray(llama.program(config, read)(state, cache, jnp.asarray(tokens)))


def last_states(config, state):
    """What the prompt's tokens give the head."""
    return all_logits(config, state, prompt_of(config), lambda model, normed: normed[0])


def decoded_logits(config, state, tokens):
    """Logits [n, vocab] from a prompt's last token on, step by step as `decode` has them, of one sequence."""

    def read(model, cache, tokens):
        normed, cache = model(tokens[:, :PROMPT], cache, 0)

        def step(cache, position):
            token = jax.lax.dynamic_slice_in_dim(tokens, position, 1, axis=1)
            normed, cache = model(token, cache, position)
            return cache, model.logits(normed)[0, 0]

        cache, logits = jax.lax.scan(step, cache, jnp.arange(PROMPT, tokens.shape[1]))
        return jnp.concatenate([model.logits(normed)[0, -1:], logits]), cache

    cache = llama.empty_cache(config, *tokens.shape)
    return np.asarray(llama.program(config, read)(state, cache, jnp.asarray(tokens))[0])


def linked_gpus(ways):
    """A mesh of GPUs whose row sums are the kernel's."""
    devices_of("cuda", ways)
    needs_nvcc()
    mesh = llama.make_mesh(ways)
    llama_sum.connect(tuple(mesh.devices))
    return mesh


def use(monkeypatch, dot, dot_add_norm, dot_swiglu):
    """Gives the decoder other products."""
    monkeypatch.setattr(layers, "dot", dot)
    monkeypatch.setattr(llama, "dot_add_norm", dot_add_norm)
    monkeypatch.setattr(llama, "dot_swiglu", dot_swiglu)
    # JAX keeps traces by function, and those of the present one are of other products.
    run_layer = llama._run_layer.__wrapped__
    monkeypatch.setattr(llama, "_run_layer", jax.jit(lambda *args: run_layer(*args), static_argnums=0))


def use_reference(monkeypatch):
    use(monkeypatch, *(functools.partial(product, implementation="reference") for product in PRODUCTS))


def use_float16(monkeypatch, implementation):
    """Products that take x and the residual in float16, and return what they would have without."""
    half = lambda a: a.astype(jnp.float16)
    packed = lambda weight: dataclasses.replace(weight, scales=half(weight.scales))

    def dot(x, weight, *, bias=None, preferred_element_type=None):
        out = x.dtype if preferred_element_type is None else preferred_element_type
        options = {"preferred_element_type": out, "implementation": implementation}
        return jax_w4a16.dot(half(x), packed(weight), bias=bias, **options)

    def dot_add_norm(x, weight, residual, scale):
        args = half(x), packed(weight), half(residual), half(scale)
        out, scaled, squares = jax_w4a16.dot_add_norm(*args, implementation=implementation)
        return out.astype(x.dtype), scaled.astype(x.dtype), squares

    def dot_swiglu(x, weight, squares, *, epsilon):
        options = {"epsilon": epsilon, "implementation": implementation}
        return jax_w4a16.dot_swiglu(half(x), packed(weight), squares, **options).astype(x.dtype)

    use(monkeypatch, dot, dot_add_norm, dot_swiglu)


class TestGeneration:
    @pytest.mark.slow
    def test_kernels_and_reference_choose_the_same_200_tokens(self, monkeypatch):
        tokens, logits = generate(CONFIG, state_of(CONFIG))
        kernel = last_states(CONFIG, state_of(CONFIG))
        use_reference(monkeypatch)
        expected, expected_logits = generate(CONFIG, state_of(CONFIG))
        reference = last_states(CONFIG, state_of(CONFIG))
        assert tokens.shape == (1, STEPS + 1)
        np.testing.assert_array_equal(tokens, expected)
        np.testing.assert_allclose(logits, expected_logits, rtol=1e-4)
        assert (kernel != reference).any()  # they are two implementations
        # The choices are no accident: the second best is further away than the two ever differ.
        sequence = np.concatenate([prompt_of(CONFIG), tokens[:, :-1]], axis=1)
        best = np.sort(all_logits(CONFIG, state_of(CONFIG), sequence)[0, PROMPT - 1 :], axis=-1)
        assert (best[:, -1] - best[:, -2]).min() > 10 * np.abs(logits - expected_logits).max()
        assert len(np.unique(tokens)) > 30

    @pytest.mark.gpu
    def test_gpu_kernels_and_reference_choose_the_same_200_tokens(self, monkeypatch):
        """Products take x and residual in float16; all else stays in float32, where the two hardly differ.

        That they do at all is one of those rounded to another float16: by up to 0.004 of a logit. In most
        random states less than twice that lies between the two best tokens of some step; in this one 0.013.
        """
        config = dataclasses.replace(CONFIG, group_size=64)  # which fused kernels serve
        results, states = {}, {}
        state = functools.partial(llama_weights.random_state, config, seed=153)
        with jax.default_device(device_of("cuda")), jax.default_matmul_precision("highest"):
            for implementation in ("cuda", "reference"):
                use_float16(monkeypatch, implementation)
                results[implementation] = generate(config, state())
                states[implementation] = last_states(config, state())
            (tokens, logits), (expected, expected_logits) = results["cuda"], results["reference"]
            sequence = np.concatenate([prompt_of(config), expected[:, :-1]], axis=1)
            best = np.sort(decoded_logits(config, state(), sequence), axis=-1)
        assert tokens.shape == (1, STEPS + 1)
        np.testing.assert_array_equal(tokens, expected)
        np.testing.assert_allclose(logits, expected_logits, rtol=2e-3)
        assert (states["cuda"] != states["reference"]).any()  # they are two implementations
        # The choices are no accident.
        assert (best[:, -1] - best[:, -2]).min() > 2 * np.abs(logits - expected_logits).max()
        assert len(np.unique(tokens)) > 30

    @pytest.mark.parametrize("packed", [True, False], ids=["w4a16", "float"])
    def test_cache_equals_recomputation(self, packed):
        config = dataclasses.replace(CONFIG, packed=packed, packed_head=packed)
        tokens, logits = generate(config, state_of(config), batch=2, steps=40)
        sequence = np.concatenate([prompt_of(config, 2), tokens[:, :-1]], axis=1)
        again = all_logits(config, state_of(config), sequence)[:, PROMPT - 1 :]
        np.testing.assert_allclose(again.max(-1), logits, rtol=1e-4)
        np.testing.assert_array_equal(again.argmax(-1), tokens)

    def test_sequences_of_a_batch_do_not_meet(self):
        both, _ = generate(CONFIG, state_of(CONFIG), batch=2, steps=20)
        prompt = prompt_of(CONFIG, 2)[1:]
        cache = llama.empty_cache(CONFIG, 1, PROMPT + 20)
        token, _, cache = llama.program(CONFIG, llama.prefill)(state_of(CONFIG), cache, prompt)
        decode = llama.program(CONFIG, functools.partial(llama.decode, steps=20))
        tokens, *_ = decode(state_of(CONFIG), cache, token, PROMPT)
        np.testing.assert_array_equal(both[1], [*np.asarray(token), *np.asarray(tokens)[0]])

    @pytest.mark.parametrize("products", ["fused", "plain"])
    def test_bfloat16_is_close_to_float32(self, products):
        config = dataclasses.replace(CONFIG, dtype="bfloat16", products=products)
        half = jax.tree.map(lambda a: a.astype("bfloat16") if a.dtype == jnp.float32 else a, state_of(CONFIG))
        sequence = np.asarray(prompt_of(CONFIG, 2, 40))
        got = all_logits(config, half, sequence)
        want = all_logits(CONFIG, jax.tree.map(_widen, half), sequence)
        assert got.dtype == np.float32
        assert np.linalg.norm(got - want) < 0.03 * np.linalg.norm(want)

    def test_decoding_updates_the_cache_in_place(self):
        decode = llama.program(CONFIG, functools.partial(llama.decode, steps=4))
        cache = llama.empty_cache(CONFIG, 3, 64)
        text = decode.lower(state_of(CONFIG), cache, jnp.zeros(3, jnp.int32), 0).compile().as_text()
        shape = f"f32[{3 * CONFIG.kv_heads},64,{CONFIG.head_dim}]"
        assert shape in text
        assert not [line for line in text.splitlines() if f"= {shape}" in line and " copy(" in line]


class TestProducts:
    """Fused and plain products in float32: only the order of sums may differ, by a few roundings of 6e-8."""

    CONFIG = dataclasses.replace(CONFIG, kv_heads=4, epsilon=0.1)

    def state(self, ways=1):
        """With norms' scales other than 1."""
        return llama_weights.checkpoint_state(self.CONFIG, tensors_of(self.CONFIG)[0], llama.make_mesh(ways))

    def test_logits_of_a_prompt(self):
        state, tokens = self.state(), prompt_of(self.CONFIG, 2, 40)
        want = all_logits(dataclasses.replace(self.CONFIG, products="plain"), state, tokens)
        got = all_logits(self.CONFIG, state, tokens)
        np.testing.assert_allclose(got, want, rtol=0, atol=3e-6 * np.abs(want).max())

    @pytest.mark.parametrize("ways", [1, 2])
    def test_logits_of_decoding(self, ways):
        config, state = self.CONFIG, self.state(ways)
        plain = dataclasses.replace(config, products="plain")
        expected, expected_logits = generate(plain, state, ways, batch=2, steps=10)
        tokens, logits = generate(config, state, ways, batch=2, steps=10)
        np.testing.assert_array_equal(tokens, expected)
        np.testing.assert_allclose(logits, expected_logits, rtol=3e-6)

    @pytest.mark.parametrize(
        ("changes", "ways", "expected"),
        [
            ({}, 1, {"dot": 4, "dot_add_norm": 6, "dot_swiglu": 3}),
            ({}, 2, {"dot": 10, "dot_swiglu": 3}),
            ({"products": "plain"}, 1, {"dot": 13}),
            ({"packed": False}, 1, {"dot": 1}),
        ],
    )
    def test_which_a_step_has(self, changes, ways, expected, monkeypatch):
        """Of three layers and the head, which is packed in each case."""
        found = collections.Counter()

        def count(product):
            def call(*args, **options):
                found[product.__name__] += 1
                return product(*args, **options)

            return call

        use(monkeypatch, *map(count, PRODUCTS))
        monkeypatch.setattr(llama, "_run_layer", llama._run_layer.__wrapped__)  # traced for each layer
        config, mesh = dataclasses.replace(self.CONFIG, **changes), llama.make_mesh(ways)
        decode = llama.program(config, functools.partial(llama.decode, steps=1), mesh)
        cache = jax.eval_shape(lambda: llama.empty_cache(config, 1, 64))
        decode.trace(llama.abstract(config)[1], cache, jax.ShapeDtypeStruct((1,), jnp.int32), 0)
        assert found == expected


def _widen(array):
    return array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array


class TestTensorParallel:
    @pytest.mark.slow
    @pytest.mark.parametrize("ways", [2, 8])
    @pytest.mark.parametrize("packed", [True, False], ids=["w4a16", "float"])
    def test_tokens_are_those_of_one_device(self, ways, packed):
        config = dataclasses.replace(WIDE, packed=packed, packed_head=packed)
        expected, expected_logits = generate(config, state_of(config), batch=2, steps=50)
        tokens, logits = generate(config, state_of(config, ways), ways, batch=2, steps=50)
        np.testing.assert_allclose(logits, expected_logits, rtol=1e-4)
        np.testing.assert_array_equal(tokens, expected)

    def test_collectives_of_a_step(self):
        ways = 4
        mesh = llama.make_mesh(ways)
        decode = llama.program(WIDE, functools.partial(llama.decode, steps=4), mesh)
        cache = llama.empty_cache(WIDE, 2, 64, mesh)
        token = jnp.zeros(2, jnp.int32)
        text = decode.lower(state_of(WIDE, ways), cache, token, 0).compile().as_text()
        names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
        found = re.findall(rf" = (\w+)\S* ({names})(?:-start)?\(", text)
        # Of each layer o and down; the embedding; the best logits and the tokens that have them.
        assert collections.Counter(found) == {("f32", "all-reduce"): 2 * WIDE.layers + 2}

    @pytest.mark.gpu
    @pytest.mark.parametrize("shape", [(1, 512), (1, 8192), (3, 1, 4096), (16, 8192)])
    def test_the_kernel_adds_the_parts_and_norms(self, shape):
        mesh = linked_gpus(2)
        random = np.random.default_rng(0)
        scale = jnp.asarray(random.uniform(0.5, 1.5, shape[-1]), jnp.bfloat16)
        parts = random.standard_normal((2, *shape), np.float32)
        calls = 50

        def run(x, parts, scale):
            def step(_, x):
                y, scaled, squares = llama_sum.add_and_norm(x[0], parts[0], scale)
                return y, scaled, squares

            x = x, jnp.zeros_like(x), jnp.zeros((*x.shape[:-1], x.shape[-1] // 256))
            return jax.tree.map(lambda a: a[None], jax.lax.fori_loop(0, calls, step, x))

        split = P(llama.AXIS)
        shard = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
        program = jax.jit(shard(run, in_specs=(P(), split, P()), out_specs=split))
        y, scaled, squares = program(jnp.zeros(shape, jnp.bfloat16), parts, scale)
        want = jnp.zeros(shape, jnp.bfloat16)
        for _ in range(calls):
            want = (want.astype(jnp.float32) + parts.sum(0)).astype(jnp.bfloat16)
        wide = np.asarray(want, np.float32)
        for device in range(2):
            np.testing.assert_array_equal(y[device], want)
            product = want.astype(jnp.float32) * scale
            np.testing.assert_array_equal(scaled[device], product.astype(jnp.bfloat16))
            of_blocks = (wide.reshape(*shape[:-1], -1, 256) ** 2).sum(-1)
            np.testing.assert_allclose(squares[device], of_blocks, rtol=1e-5)
        np.testing.assert_array_equal(squares[0], squares[1])

    @pytest.mark.gpu
    def test_logits_with_the_kernel_are_those_of_one_gpu(self):
        linked_gpus(2)
        config = dataclasses.replace(WIDE, hidden=512, dtype="bfloat16")
        logits = {}
        for ways, row_sum in ((1, "xla"), (2, "xla"), (2, "kernel")):
            some, mesh = dataclasses.replace(config, row_sum=row_sum), llama.make_mesh(ways)
            args = llama_weights.random_state(some, mesh), llama.empty_cache(some, 2, 20, mesh)
            args += (jnp.zeros(2, jnp.int32), 0)
            decode = llama.program(some, functools.partial(llama.decode, steps=20), mesh).lower(*args)
            assert ("llama_add_norm" in decode.as_text()) == (row_sum == "kernel")
            _, found, _ = decode.compile()(*args)
            logits[ways, row_sum] = np.asarray(found)[:, 0]  # of the step before which no choices differ
        for got in logits.values():
            np.testing.assert_allclose(got, logits[1, "xla"], rtol=0.03)

    def test_weights_and_cache_are_split(self):
        mesh = llama.make_mesh(8)
        arrays = jax.tree_util.tree_flatten_with_path(state_of(WIDE, 8))[0]
        whole = [a for path, a in arrays if a.sharding.shard_shape(a.shape) == a.shape]
        assert all(a.ndim == 1 for a in whole)  # norms
        keys, values = llama.empty_cache(WIDE, 2, 16, mesh)[0]
        assert {a.sharding.shard_shape(a.shape)[0] for a in (keys, values)} == {2}

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"kv_heads": 4}, "KV heads: expected a multiple of 8"),
            ({"vocab": 520}, "vocabulary: expected a multiple of 128"),
            ({"mlp": 1024 + 128}, "MLP features: expected a multiple of 512"),
            ({"group_size": 256}, "attention features: expected a multiple of 2048"),
        ],
    )
    def test_what_does_not_split_is_refused(self, changes, message):
        with pytest.raises(ValueError, match=message):
            llama.program(dataclasses.replace(WIDE, **changes), llama.prefill, llama.make_mesh(8))


def hugging_face_attention(config, w, x):
    """One attention layer as Hugging Face has it, with unfused weights [K, N], in float64."""
    n, d, group = x.shape[0], config.head_dim, config.heads // config.kv_heads
    inverse = config.rope_theta ** -(np.arange(0, d, 2) / d)
    angle = np.arange(n)[:, None] * np.concatenate([inverse, inverse])
    turn = lambda a: np.concatenate([-a[..., d // 2 :], a[..., : d // 2]], -1)
    rope = lambda a: a * np.cos(angle)[:, None] + turn(a) * np.sin(angle)[:, None]
    split = lambda a: a.reshape(n, -1, d)
    q, k, v = rope(split(x @ w["q"])), rope(split(x @ w["k"])), split(x @ w["v"])
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(d)
    scores = np.where(np.tril(np.ones((n, n))), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v).reshape(n, -1) @ w["o"]


def tensors_of(config, packed=True, symmetric=True):
    """A checkpoint's tensors, as `jax_w4a16.checkpoint.load` returns them, and their values [K, N]."""
    random = np.random.default_rng(3)
    queries, pairs = config.heads * config.head_dim, config.kv_heads * config.head_dim
    tensors, values = {}, {}

    def linear(name, k, n):
        w = jnp.asarray(random.normal(size=(k, n)) / np.sqrt(k), jnp.float32)
        if packed:
            options = {"group_size": config.group_size, "symmetric": symmetric}
            tensors[name] = jax_w4a16.quantize(w, scale_dtype="float32", **options)
            w = tensors[name].dequantize("float32")
        else:
            tensors[f"{name}.weight"] = w.T
        values[name] = np.asarray(w, np.float64)

    def plain(name, *shape):
        tensors[name] = jnp.asarray(random.normal(size=shape), jnp.float32)
        values[name] = np.asarray(tensors[name], np.float64)

    for i in range(config.layers):
        at = f"model.layers.{i}"
        for name, n in (("q", queries), ("k", pairs), ("v", pairs)):
            linear(f"{at}.self_attn.{name}_proj", config.hidden, n)
        linear(f"{at}.self_attn.o_proj", queries, config.hidden)
        for name in ("gate", "up"):
            linear(f"{at}.mlp.{name}_proj", config.hidden, config.mlp)
        linear(f"{at}.mlp.down_proj", config.mlp, config.hidden)
        plain(f"{at}.input_layernorm.weight", config.hidden)
        plain(f"{at}.post_attention_layernorm.weight", config.hidden)
    plain("model.norm.weight", config.hidden)
    plain("model.embed_tokens.weight", config.vocab, config.hidden)
    if not config.tied:
        plain("lm_head.weight", config.vocab, config.hidden)
    return tensors, values


def hugging_face(config, values, tokens):
    """Logits [n, vocab] of one sequence in float64, from a checkpoint's values."""
    x = values["model.embed_tokens.weight"][tokens]
    norm = lambda x, name: (
        x / np.sqrt((x**2).mean(-1, keepdims=True) + config.epsilon) * values[f"{name}.weight"]
    )
    for i in range(config.layers):
        at = f"model.layers.{i}"
        w = {name: values[f"{at}.self_attn.{name}_proj"] for name in "qkvo"}
        x = x + hugging_face_attention(config, w, norm(x, f"{at}.input_layernorm"))
        y = norm(x, f"{at}.post_attention_layernorm")
        gate, up = (y @ values[f"{at}.mlp.{name}_proj"] for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ values[f"{at}.mlp.down_proj"]
    head = values["model.embed_tokens.weight" if config.tied else "lm_head.weight"]
    return norm(x, "model.norm") @ head.T


class TestCheckpoint:
    BASE = dataclasses.replace(CONFIG, layers=2, packed_head=False)

    @pytest.mark.parametrize(
        ("packed", "symmetric", "tied", "products"),
        [
            (True, True, False, "fused"),
            (True, False, True, "fused"),
            (True, False, True, "plain"),
            (False, True, False, "plain"),
        ],
    )
    def test_logits_are_those_of_a_plain_decoder(self, packed, symmetric, tied, products):
        config = dataclasses.replace(self.BASE, packed=packed, tied=tied, products=products)
        tensors, values = tensors_of(config, packed, symmetric)
        config = llama_weights.checkpoint_config(config, tensors)
        assert (config.symmetric, config.tied, config.packed_head) == (symmetric, tied, False)
        state = llama_weights.checkpoint_state(config, tensors)
        tokens = np.asarray(prompt_of(config))
        want = hugging_face(config, values, tokens[0])
        np.testing.assert_allclose(all_logits(config, state, tokens)[0], want, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("packed", [True, False], ids=["w4a16", "float"])
    def test_columns_of_gate_and_up_take_turns(self, packed, tmp_path):
        """Eight of gate, eight of up, and so on, with the scales and zeros that they had in the folder."""
        checkpoint = pytest.importorskip("jax_w4a16.checkpoint")
        tensors, values = tensors_of(self.BASE, symmetric=False)
        checkpoint.save(tmp_path, tensors)
        tensors = llama_weights.load_tensors(tmp_path)
        config = dataclasses.replace(self.BASE, packed=packed)
        config = llama_weights.checkpoint_config(config, tensors)
        state = llama_weights.checkpoint_state(config, tensors)
        for i, layer in enumerate(nnx.merge(llama.abstract(config)[0], state).layers):
            got = layer.gate_up.weight.dequantize() if packed else layer.gate_up.kernel[...]
            gate, up = (values[f"model.layers.{i}.mlp.{name}_proj"] for name in ("gate", "up"))
            assert got.shape == (config.hidden, 2 * config.mlp)
            for column in range(0, config.mlp, 8):
                here = got[:, 2 * column : 2 * column + 16]
                np.testing.assert_array_equal(here[:, :8], gate[:, column : column + 8])
                np.testing.assert_array_equal(here[:, 8:], up[:, column : column + 8])

    def test_codes_stay_packed_and_split(self):
        tensors, _ = tensors_of(WIDE)
        config = llama_weights.checkpoint_config(WIDE, tensors)
        config = dataclasses.replace(config, group_size=32)
        one = generate(config, llama_weights.checkpoint_state(config, tensors), steps=20)
        state = llama_weights.checkpoint_state(config, tensors, llama.make_mesh(4))
        four = generate(config, state, 4, steps=20)
        np.testing.assert_array_equal(one[0], four[0])
        assert {a.dtype for a in jax.tree.leaves(state)} == {jnp.dtype("uint32"), jnp.dtype("float32")}

    def test_the_other_form_is_made_where_asked_for(self):
        packed, values = tensors_of(self.BASE)
        floats = dataclasses.replace(self.BASE, packed=False)
        state = llama_weights.checkpoint_state(llama_weights.checkpoint_config(floats, packed), packed)
        tokens = np.asarray(prompt_of(floats))
        want = hugging_face(floats, values, tokens[0])
        np.testing.assert_allclose(all_logits(floats, state, tokens)[0], want, rtol=1e-3, atol=1e-3)
        plain = {
            (f"{name}.weight" if isinstance(w, QuantizedWeight) else name): (
                w.dequantize().T if isinstance(w, QuantizedWeight) else w
            )
            for name, w in packed.items()
        }
        state = llama_weights.checkpoint_state(self.BASE, plain)
        assert jnp.dtype("uint32") in {a.dtype for a in jax.tree.leaves(state)}

    def test_a_change_of_the_inputs_is_made_or_refused(self):
        """Dequantised weights hold it; of packed ones, which are fused, each part has its own."""
        floats = dataclasses.replace(self.BASE, packed=False)
        random = np.random.default_rng(0)
        name = "model.layers.1.mlp.up_proj"
        k = self.BASE.hidden
        for field, value in (
            ("input_scale", jnp.asarray(random.lognormal(size=k), jnp.float32)),
            ("permutation", jnp.asarray(random.permutation(k), jnp.int32)),
        ):
            tensors, values = tensors_of(self.BASE)
            tensors[name] = dataclasses.replace(tensors[name], **{field: value})
            values[name] = np.asarray(tensors[name].dequantize("float32"), np.float64)
            state = llama_weights.checkpoint_state(floats, tensors)
            tokens = np.asarray(prompt_of(floats))
            want = hugging_face(floats, values, tokens[0])
            np.testing.assert_allclose(all_logits(floats, state, tokens)[0], want, rtol=1e-3, atol=1e-3)
            with pytest.raises(ValueError, match=rf"{name}: expected .* no change .*, got \['{field}'\]"):
                llama_weights.checkpoint_state(self.BASE, tensors)

    def test_what_does_not_fit_is_named(self):
        tensors, _ = tensors_of(self.BASE)
        tensors["model.norm.weight"] = jnp.zeros(3)
        with pytest.raises(ValueError, match=r"norm\.scale: expected shape \(256,\), got \(3,\)"):
            llama_weights.checkpoint_state(self.BASE, tensors)
        del tensors["model.norm.weight"]
        with pytest.raises(KeyError, match=r"model\.norm\.weight"):
            llama_weights.checkpoint_state(self.BASE, tensors)
        tensors["model.layers.0.self_attn.q_proj"] = jax_w4a16.quantize(jnp.ones((256, 256)), group_size=64)
        with pytest.raises(ValueError, match="one group size"):
            llama_weights.checkpoint_config(self.BASE, tensors)


LLAMA_3_1 = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


class TestConfig:
    def file(self, folder, **changes):
        path = folder / "config.json"
        path.write_text(json.dumps(LLAMA_3_1 | changes))
        return path

    def test_sizes_are_those_of_the_models(self, tmp_path):
        config = Config.from_file(self.file(tmp_path, rope_scaling=None))
        assert config == SIZES["8b"]
        # Parameters, in thousands of millions, as published.
        for name, billions in (("1b", 1.24), ("8b", 8.03), ("70b", 70.55)):
            leaves = jax.tree.leaves(llama.abstract(SIZES[name])[1])
            assert sum(leaf.size for leaf in leaves) == pytest.approx(billions * 1e9, rel=5e-3)

    def test_rotary_scaling(self, tmp_path):
        config = Config.from_file(self.file(tmp_path))
        assert config.rope_scaling == (8.0, 1.0, 4.0, 8192.0)
        plain = dataclasses.replace(config, rope_scaling=None)
        angles = [np.arctan2(*reversed(llama.rotary(c, jnp.ones(1)))) for c in (config, plain)]
        scaled, original = (np.asarray(a[0], np.float64) for a in angles)
        np.testing.assert_allclose(scaled[:29], original[:29], rtol=1e-5)  # waves below 2,048 tokens
        np.testing.assert_allclose(scaled[35:], original[35:] / 8, rtol=1e-5)  # waves above 8,192

    @pytest.mark.parametrize(
        "changes",
        [
            {"model_type": "gpt2"},
            {"attention_bias": True},
            {"sliding_window": 4096},
            {"rope_scaling": {"type": "yarn", "factor": 2.0}},
        ],
    )
    def test_other_architectures_are_refused(self, tmp_path, changes):
        with pytest.raises(ValueError, match="expected a Llama"):
            Config.from_file(self.file(tmp_path, **changes))


def row(weights="w4a16", mesh=1, kind="decode", batch=1, rate=100.0):
    return {
        "weights": weights,
        "mesh": mesh,
        "kind": kind,
        "batch": batch,
        "tokens": 2048,
        "tokens_per_s": rate,
        "step_ms": 1.0,
        "first_token_ms": 20.0,
        "read_gb_per_s": 3000.0,
        "weight_bytes": 5e9,
        "cache_bytes": 1e9,
        "temporary_bytes": None,
        "peak_bytes_device0": None,
    }


class TestBench:
    def test_ratios_and_bars(self):
        rows = [row("bf16", rate=40.0), row(), row("bf16", kind="prefill"), row(kind="prefill", rate=90.0)]
        found = {r["what"]: (r["ratio"], r["bar"]) for r in bench_llama.ratios(rows, "8b")}
        assert found["decode, batch 1, mesh 1: w4a16 over bf16"] == (2.5, 2.8)
        assert found["prefill, batch 1, mesh 1: w4a16 over bf16"] == (0.9, 0.95)
        found = bench_llama.ratios([row(), row(mesh=2, rate=170.0)], "70b")
        assert [(r["ratio"], r["bar"]) for r in found] == [(1.7, 1.6)]
        assert [r["bar"] for r in bench_llama.ratios(rows, "tiny")] == [None, None]

    def test_wrong_tokens_are_noticed(self):
        config = SIZES["tiny"]
        bench_llama.check((np.array([0, 511]), np.ones(2)), config)
        for tokens, logits in (([512], [1.0]), ([-1], [1.0]), ([3], [np.nan]), ([3], [np.inf])):
            with pytest.raises(RuntimeError, match="wrong tokens"):
                bench_llama.check((np.array(tokens), np.array(logits)), config)

    @pytest.mark.parametrize("ways", [1, 2])
    def test_run_measures_what_it_says(self, ways, capsys):
        argv = ["--size", "tiny", "--prefill", "16", "--context", "8", "--steps", "4", "--batch", "1,2"]
        result = bench_llama.run_one(bench_llama.arguments(argv), "w4a16", ways)
        prefill, one, two = result["rows"]
        assert (prefill["kind"], one["kind"], one["batch"], two["batch"]) == ("prefill", "decode", 1, 2)
        config = dataclasses.replace(SIZES["tiny"], packed=True, packed_head=True)
        assert one["weight_bytes"] == sum(
            a.size * a.dtype.itemsize for a in jax.tree.leaves(llama.abstract(config)[1])
        )
        assert one["cache_bytes"] == 2 * config.layers * config.kv_heads * 12 * config.head_dim * 2
        assert two["cache_bytes"] == 2 * one["cache_bytes"]
        assert one["repeatable"]
        assert "jax" in result["header"]
        capsys.readouterr()

    def test_plot_and_table(self, tmp_path, capsys):
        header = {"device": "a card", "size": "8b", "jax": "1", "products": "fused", "attention": "xla"}
        rows = [row(weights, kind=kind) for weights in ("bf16", "w4a16") for kind in ("prefill", "decode")]
        bench_llama.show(header, rows, bench_llama.ratios(rows, "8b"))
        assert "1.00x, to reach 2.8: MISSED" in capsys.readouterr().out
        pytest.importorskip("matplotlib")
        bench_llama.draw(header, rows, tmp_path / "plot.svg")
        assert "a card" in (tmp_path / "plot.svg").read_text()

    def test_command_line(self, capsys):
        options = bench_llama.arguments(["--size", "70b", "--mesh", "1,2", "--weights", "w4a16"])
        assert (options.config, options.mesh, options.weights) == (SIZES["70b"], (1, 2), ("w4a16",))
        assert options.products == "fused"
        for argv in (
            ["--size", "9b"],
            ["--weights", "int3"],
            ["--batch", "0"],
            ["--steps", "100"],
            ["--prefill", "1"],
            ["--products", "some"],
        ):
            with pytest.raises(SystemExit):
                bench_llama.arguments(argv)
        capsys.readouterr()
