"""The commands `convert` and `inspect`."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoint import assert_same
from test_checkpoint_formats import GOLDEN

import jax_w4a16
from jax_w4a16 import checkpoint, cli
from jax_w4a16.checkpoint import _load


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
    (folder / "tokenizer.json").write_text("{}")
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
    assert (tmp_path / "out" / "tokenizer.json").exists()


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
