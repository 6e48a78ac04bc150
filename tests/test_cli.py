import functools
import subprocess
import sys

import jax
import numpy as np
import pytest

import jax_w4a16
from jax_w4a16 import _config, _progress, _verify, cli


def test_help_names_every_command():
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-m", "jax_w4a16", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not ran.stderr
    for command in ("convert", "demo", "info", "inspect", "tune", "verify"):
        assert f"\n    {command} " in ran.stdout


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["verify", "--nonsense"],
        ["info", "more"],
        ["tune", "--m", "0"],
        ["tune", "--shapes", "4096"],
        ["tune", "--shapes", "4096xK"],
        ["tune", "--shapes", "16x64", "--model-config", "config.json"],
    ],
)
def test_wrong_arguments(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: python -m jax_w4a16" in capsys.readouterr().err


def test_info(capsys):
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    facts = dict(line.split(maxsplit=1) for line in lines[: lines.index("")] if not line.startswith("C"))
    assert facts["jax_w4a16"].startswith(jax_w4a16.__version__)
    assert facts["jax"] == jax.__version__
    assert any(line.split() == ["cpu", jax_w4a16.build_info()["cpu_instruction_set"], "ok"] for line in lines)


def test_demo_without_a_model(tmp_path, capsys):
    assert cli.main(["demo", "--model", str(tmp_path)]) == 1
    assert "error: " in capsys.readouterr().err


def test_verify(capsys):
    assert cli.main(["verify", "--kernel", "cpu", "--case", "m3_n40_k72"]) == 0
    out = capsys.readouterr().out
    # float16 and bfloat16, each to itself (6 checks) and to float32 (5), float32 (6); with and without zeros
    assert "OK: 56 checks" in out


def test_verify_with_nothing_to_do(capsys):
    assert cli.main(["verify", "--kernel", "no such kernel"]) == 1
    assert "nothing to check" in capsys.readouterr().out


def spoiled(function, spoil):
    @functools.wraps(function)
    def run(*args, **kwargs):
        return spoil(function(*args, **kwargs))

    return run


@pytest.mark.parametrize(
    ("target", "spoil", "check"),
    [
        ("dot", lambda out: out.at[0, 0].add(0.25), "one-hot"),
        ("dot", lambda out: out.at[-1, -1].set(np.nan), "grid"),
        ("dot", lambda out: out * 1.02, "dense"),
        ("dot", lambda out: out[:, ::-1], "grid"),
        ("pack", lambda words: words ^ 1, "pack"),
        ("dequantize", lambda w: w.at[0, 0].add(1), "dequantize"),
        ("quantize", lambda parts: (parts[0] ^ 1, *parts[1:]), "quantize"),
        ("quantize", lambda parts: (parts[0], parts[1] * 1.01, *parts[2:]), "quantize"),
    ],
)
def test_verify_finds_a_wrong_kernel(target, spoil, check, monkeypatch, capsys):
    monkeypatch.setattr(_verify._primitive, target, spoiled(getattr(_verify._primitive, target), spoil))
    name = "m3_n40_k72_g64_float16_to_float16_zeros"
    assert cli.main(["verify", "--kernel", "cpu", "--case", name]) == 1
    out = capsys.readouterr().out
    assert f"FAILED {check}: " in out
    assert "python -m jax_w4a16 verify --kernel 'cpu" in out
    assert f"--case {name}" in out


def test_verify_goes_on_after_a_refused_launch(monkeypatch, capsys):
    def broken(case, dot):
        raise jax.errors.JaxRuntimeError("INTERNAL: no such luck\nmore")

    monkeypatch.setattr(_verify, "_grid", broken)
    assert cli.main(["verify", "--kernel", "cpu", "--case", "m64_n256_k512_g128_bfloat16_to_float32"]) == 1
    out = capsys.readouterr().out
    assert "FAILED grid: INTERNAL: no such luck\n" in out
    assert "FAILED: 2 of 10 checks" in out


def test_verify_shows_the_first_failures_alone(monkeypatch, capsys):
    monkeypatch.setattr(_verify, "_grid", lambda case, dot: "wrong")
    monkeypatch.setattr(_verify, "MOST_FAILURES_SHOWN", 1)
    assert cli.main(["verify", "--kernel", "cpu", "--case", "m7_n1_k1_g32_float16_to_float16"]) == 1
    out = capsys.readouterr().out
    assert out.count("FAILED grid: wrong") == 1
    assert "FAILED: 2 of 12 checks" in out


def test_cases_have_unique_names_and_cover_the_options():
    cases = _verify.cases()
    assert len({case.name for case in cases}) == len(cases)
    for dtype in ("float16", "bfloat16", "float32"):
        for zeros in (False, True):
            for bias in (False, True):
                assert any(
                    (case.dtype, case.has_zeros, case.has_bias) == (dtype, zeros, bias) for case in cases
                )


def test_every_config_serves_some_case(monkeypatch):
    """The cases reach every compiled kernel: asked of the chooser for an H200, without one."""
    monkeypatch.setattr(_config, "local_gpu", lambda: _config.Device("NVIDIA H200", 90, 132))
    for config in _verify._ffi.native.configs():
        kernel = _verify.Kernel(config["name"], "cuda", config["name"], None, config["ragged"])
        refusals = [_verify.refusal(kernel, case.problem()) for case in _verify.cases()]
        assert refusals.count(None) >= 10, (config["name"], set(refusals))


def test_progress_is_silent_off_a_terminal(capsys, monkeypatch):
    with _progress.Progress(2) as progress:
        progress.step("one")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(_progress.sys.stderr, "isatty", lambda: True)
    with _progress.Progress(2) as progress:
        progress.step("one")
    assert "1/2 0 s  one" in capsys.readouterr().err
