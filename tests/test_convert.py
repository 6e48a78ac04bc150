"""The commands `convert` and `inspect`."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoint import assert_same
from test_checkpoint_formats import GOLDEN

import jax_w4a16
from jax_w4a16 import checkpoint, cli
from jax_w4a16.checkpoint import _load

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model.v3",
    "vocab.txt",
    "vocab.bpe",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "spiece.model",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)


def float_model(folder):
    """A folder with float weights [N, K], as Hugging Face has them."""
    from safetensors.numpy import save_file

    folder.mkdir()
    rng = np.random.default_rng(0)
    make = lambda *shape, dtype=np.float16: rng.standard_normal(shape).astype(dtype)
    tensors = {
        "model.embed_tokens.weight": make(64, 128),
        "model.layers.0.q_proj.weight": make(96, 128),
        "model.layers.0.down.weight": make(128, 96, dtype=np.float32),
        "model.layers.0.down.bias": make(128),
        "model.norm.weight": make(128),
        "lm_head.weight": make(64, 128),
    }
    save_file(tensors, folder / "model.safetensors")
    config = {"hidden_size": 128, "quantization_config": {}}
    (folder / "config.json").write_text(json.dumps(config))
    for name in COPIED:
        (folder / name).write_text("{}")
    return tensors


def test_convert_quantises(tmp_path, capsys):
    tensors = float_model(tmp_path / "in")
    argv = ["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--quantize", "--group-size", "32"]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    got = checkpoint.load(tmp_path / "out")
    down, q = got.pop("model.layers.0.down"), got.pop("model.layers.0.q_proj")
    assert set(got) == set(tensors) - {"model.layers.0.down.weight", "model.layers.0.q_proj.weight"}
    want = jax_w4a16.quantize(jnp.asarray(tensors["model.layers.0.q_proj.weight"].T), group_size=32)
    jax.tree.map(np.testing.assert_array_equal, q, want)
    assert down.dtype == jnp.bfloat16
    rows = {line[:24].strip(): line[24:].split() for line in out.splitlines()}
    assert rows["layers quantised"] == ["2", f"{96 * 128 * 6:,}", f"{q.nbytes + down.nbytes:,}"]
    assert rows["all"][0] == "6"
    after = sum(a.nbytes for a in jax.tree.leaves(checkpoint.load(tmp_path / "out")))
    assert rows["all"][1:] == [f"{sum(a.nbytes for a in tensors.values()):,}", f"{after:,}"]
    error = float(re.search(r"worst error: (\S+) of the largest weight, in model.layers.0", out).group(1))
    assert 0.01 < error < 0.08
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"hidden_size": 128}
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {*COPIED, "config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ([], set()),
        (["--quantize", "--include", "q_proj"], {"model.layers.0.q_proj"}),
        (["--quantize", "--exclude", "layers"], {"model.embed_tokens", "lm_head"}),
        (["--quantize", "--group-size", "-1"], {"model.layers.0.q_proj", "model.layers.0.down"}),
    ],
)
def test_convert_options(options, layers, tmp_path):
    float_model(tmp_path / "in")
    target = tmp_path / "out.safetensors"
    assert cli.main(["convert", str(tmp_path / "in"), str(target), *options]) == 0
    assert set(_load.find(_load.open_checkpoint(target))[0]) == layers


def test_convert_leaves_what_quantize_model_does(tmp_path):
    names = ["wte", "h.0.ln_1", "h.0.mlp.gate", "h.0.mlp.experts.3.gate_proj", "h.0.mlp.shared.up", "score"]
    tensors = {f"{name}.weight": np.ones((64, 64), np.float32) for name in names}
    checkpoint.save(tmp_path / "in.safetensors", tensors)
    assert cli.main(["convert", str(tmp_path / "in.safetensors"), str(tmp_path / "out"), "--quantize"]) == 0
    layers = _load.find(_load.open_checkpoint(tmp_path / "out"))[0]
    assert set(layers) == {"h.0.mlp.experts.3.gate_proj", "h.0.mlp.shared.up"}


def test_convert_repacks_and_inspect(tmp_path, capsys):
    for case in ("ct_act_order", "awq_gemm", "hqq"):
        source, target = GOLDEN / f"{case}.safetensors", tmp_path / f"{case}.safetensors"
        assert cli.main(["convert", str(source), str(target)]) == 0
        assert_same(checkpoint.load(target), checkpoint.load(source))
        capsys.readouterr()
        assert cli.main(["inspect", str(source)]) == 0
        assert "a.proj  " in capsys.readouterr().out
        assert cli.main(["inspect", str(target)]) == 0
        out = capsys.readouterr().out
        assert "jax_w4a16, groups of 32, zero points" in out
        assert ("act-order" in out) == (case == "ct_act_order")
        assert re.search(r"^1 4-bit layers, \d other tensors, [\d,]+ bytes$", out, re.M)


def test_commands_report_errors(tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path / "nothing")]) == 1
    assert "error: " in capsys.readouterr().err
    float_model(tmp_path / "in")
    argv = ["convert", str(tmp_path / "in"), str(tmp_path / "in"), "--quantize"]
    assert cli.main(argv) == 1
    assert "expected no .safetensors files in it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--quantize", "--include", "("])
    assert "expected a regular expression" in capsys.readouterr().err


def test_convert_follows_no_links(tmp_path):
    """A link in the target is replaced; what it points to, be it the source's own file, is left alone."""
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    shutil.copy(GOLDEN / "gptq_v2.safetensors", source / "model.safetensors")
    config = {"hidden_size": 96, "quantization_config": json.loads((GOLDEN / "gptq_v2.json").read_text())}
    (source / "config.json").write_text(json.dumps({**config, "text_config": config}))
    for name in ("quantize_config.json", "model.safetensors.index.json.bak", "tokenizer.json", "run.sh"):
        (source / name).write_text('{"bits": 4}')
    (tmp_path / "other").write_text("other")
    target.mkdir()
    (target / "config.json").symlink_to("../in/config.json")
    (target / "tokenizer.json").symlink_to("../other")
    want = checkpoint.load(source)
    assert cli.main(["convert", str(source), str(target)]) == 0
    assert json.loads((source / "config.json").read_text()) == {**config, "text_config": config}
    assert (tmp_path / "other").read_text() == "other"
    bare = {"hidden_size": 96}
    assert json.loads((target / "config.json").read_text()) == {**bare, "text_config": bare}
    assert {file.name for file in target.iterdir()} == {"model.safetensors", "config.json", "tokenizer.json"}
    assert not any(file.is_symlink() for file in target.iterdir())
    assert_same(checkpoint.load(source), want)
    assert_same(checkpoint.load(target), want)


def test_convert_keeps_arrays_named_like_fields(tmp_path, capsys):
    """A static `input_scale` of a compressed-tensors layer, or of a float one, is no field of ours."""
    from safetensors.numpy import load_file, save_file

    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    extra = {"a.proj.input_scale": np.full(1, 2, np.float32)}
    save_file(load_file(GOLDEN / "ct_symmetric.safetensors") | extra, source)
    assert cli.main(["convert", str(source), str(target)]) == 0
    assert_same(checkpoint.load(target), checkpoint.load(source))
    weight = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    save_file({"a.weight": weight, "a.input_scale": np.ones(1, np.float32)}, source)
    assert cli.main(["convert", str(source), str(target), "--quantize"]) == 0
    got = checkpoint.load(target)
    assert set(got) == {"a", "a.input_scale"}
    assert got["a"].input_scale is None
    capsys.readouterr()
    save_file({"a.weight": weight, "a": np.ones(1, np.float32)}, source)
    before = target.read_bytes()
    assert cli.main(["convert", str(source), str(target), "--quantize"]) == 1
    assert (
        "out.safetensors: a: expected a tensor or a layer of that name, got both" in capsys.readouterr().err
    )
    assert target.read_bytes() == before


def test_the_worst_error_may_be_no_number(tmp_path, capsys):
    from safetensors.numpy import save_file

    weights = np.random.default_rng(0).standard_normal((3, 16, 64)).astype(np.float32)
    weights[1, 0, 0] = np.nan
    save_file({f"{i}.weight": w for i, w in enumerate(weights)}, tmp_path / "in.safetensors")
    argv = ["convert", str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors"), "--quantize"]
    assert cli.main(argv) == 0
    assert "worst error: nan of the largest weight, in 1" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--group-size=64", "--include=a", "--exclude=a", "--exclude="])
def test_options_of_quantize_need_it(option, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["convert", str(tmp_path), str(tmp_path / "out"), option])
    assert error.value.code == 2
    assert f"{option.partition('=')[0]} needs --quantize" in capsys.readouterr().err
