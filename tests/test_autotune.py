"""The tuner: which shapes it takes from a model, which row it stores, and, on a GPU, a whole run."""

import json

import pytest
from conftest import device_of

from jax_w4a16 import _autotune, _config, _tuned, cli


def write(path, **content):
    path.write_text(json.dumps(content))
    return path


def test_shapes_of_llama(tmp_path):
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    file = write(tmp_path / "config.json", **sizes, num_key_value_heads=8)
    shapes = _autotune.shapes_of_model(file)
    assert set(_autotune.LLAMA_3_8B) <= set(shapes)
    assert {(1024, 4096), (14336, 4096)} <= set(shapes)
    assert len(shapes) == len(set(shapes)) == 6


def test_shapes_with_a_head_dim_and_a_nested_config(tmp_path):
    sizes = {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "head_dim": 128}
    shapes = _autotune.shapes_of_model(write(tmp_path / "config.json", text_config=sizes))
    assert {(4096, 2560), (2560, 4096)} <= set(shapes)
    plain = write(tmp_path / "config.json", **sizes, text_config=None, num_key_value_heads=None)
    assert _autotune.shapes_of_model(plain) == shapes


def test_a_head_dim_that_is_no_number(tmp_path):
    sizes = {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "head_dim": "128"}
    with pytest.raises(ValueError, match="head_dim: expected a positive integer, got '128'"):
        _autotune.shapes_of_model(write(tmp_path / "config.json", **sizes))


@pytest.mark.parametrize("text", ["", "[]", '{"hidden_size": 64}', '{"hidden_size": "64"}'])
def test_a_config_without_the_sizes(tmp_path, text):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: "):
        _autotune.shapes_of_model(file)


def row(kernel, us, *, right=True, selected=False):
    return {
        **{"M": 4, "N": 512, "K": 256, "group_size": 128, "dtype": "float16", "zeros": False, "bias": False},
        **{"kernel": kernel, "us": us, "right": right, "selected": selected},
    }


def test_a_wrong_result_never_wins():
    rows = [row("a", 3.0, selected=True), row("b", 1.0, right=False), row("c", 2.0)]
    choice = _autotune.best(rows)
    assert choice is not None
    assert (choice["config"], choice["heuristic"], choice["heuristic_us"]) == ("c", "a", 3.0)
    assert _autotune.best([row("a", 1.0, right=False, selected=True)]) is None


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(_config, "local_gpu", lambda: None)
    assert cli.main(["tune"]) == 1
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_tune(monkeypatch, tmp_path, capsys):
    device_of("cuda")  # or skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cli.main(["tune", "--shapes", "512x1024", "--m", "1,64", "--dtype", "float16"]) == 0
    gpu = _config.local_gpu()
    assert gpu is not None
    choices = _tuned.load(_tuned.path(gpu.kind), gpu.kind)
    assert [choice["m"] for choice in choices] == [1, 64]
    assert "heuristic over tuned" in capsys.readouterr().out
    for choice in choices:
        assert 0 < choice["us"] <= choice["heuristic_us"]
        problem = _config.Problem(choice["m"], 512, 1024, 128, "float16", "float16", False, False)
        assert _config.choose(problem, gpu)[0] == choice["config"]
