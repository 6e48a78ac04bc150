"""Which configuration a call is lowered with: asked for, else tuned, else the heuristic's. Needs no GPU."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jax_w4a16 import _config, _ffi, _primitive, _tuned

H200 = _config.Device("NVIDIA H200", 90, 132)
PROBLEM = _config.Problem(4, 256, 512, 128, "bfloat16", "bfloat16", False, False)
FACTS = {**vars(PROBLEM), "compute_capability": 90, "num_sms": 132}


def able(problem=PROBLEM):
    facts = {**vars(problem), "compute_capability": 90, "num_sms": 132}
    return [name for name in _ffi.build_info()["configs"] if _ffi.native.can_implement(name, **facts) is None]


def test_heuristic():
    assert _config.choose(PROBLEM, H200) == _ffi.native.select(**FACTS)


def test_explicit_comes_first():
    for name in able():
        assert _config.choose(PROBLEM, H200, name) == (name, _ffi.native.workspace_bytes(name, **FACTS))
    with pytest.raises(ValueError, match="no_such_config"):
        _config.choose(PROBLEM, H200, "no_such_config")


def test_explicit_that_cannot_serve():
    old = _config.Device("an older GPU", 80, 108)
    refused = [
        name
        for name in _ffi.build_info()["configs"]
        if _ffi.native.can_implement(name, **{**FACTS, "compute_capability": 80}) is not None
    ]
    assert refused
    for name in refused:
        with pytest.raises(ValueError, match=f"config '{name}' cannot serve: "):
            _config.choose(PROBLEM, old, name)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache folder; the path in it of the choices for H200."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return _tuned.path(H200.kind)


def choice(config, problem=PROBLEM):
    return {**vars(problem), "config": config, "us": 1.0}


def test_tuned_comes_before_the_heuristic(cache):
    heuristic, _ = _config.choose(PROBLEM, H200)
    tuned = next(name for name in able() if name != heuristic)
    other = dataclasses.replace(PROBLEM, m=5)
    _tuned.save(cache, H200.kind, [choice(tuned), choice("gone_from_this_build", other)])
    assert _config.choose(PROBLEM, H200)[0] == tuned
    assert _config.choose(dataclasses.replace(PROBLEM, has_bias=True), H200)[0] == tuned
    assert _config.choose(other, H200) == _ffi.native.select(**{**FACTS, "m": 5})
    assert _config.choose(PROBLEM, H200, heuristic)[0] == heuristic
    _tuned.save(cache, H200.kind, [choice(heuristic), choice(tuned, dataclasses.replace(PROBLEM, m=6))])
    assert _config.choose(PROBLEM, H200)[0] == heuristic
    assert len(_tuned.load(cache, H200.kind)) == 3


def test_without_a_home_nothing_was_tuned(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(_tuned.Path, "home", homeless)
    assert _config.choose(PROBLEM, H200) == _ffi.native.select(**FACTS)


GOOD = {"schema": 1, "device": H200.kind, "build": _tuned.build(), "choices": []}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "Expecting"),
        ("[]", "expected an object, got list"),
        (json.dumps(GOOD | {"schema": 0}), "schema: expected 1, got 0"),
        (json.dumps(GOOD | {"device": "another"}), "device: expected 'NVIDIA H200', got 'another'"),
        (json.dumps(GOOD | {"build": "0.0.1-ab"}), "build: expected "),
        (json.dumps(GOOD | {"choices": None}), "choices: expected a list"),
        (json.dumps(GOOD | {"choices": [{"config": "a"}]}), "choices: expected a list"),
        (json.dumps(GOOD | {"choices": [choice("a") | {"m": []}]}), "choices: expected a list"),
    ],
)
def test_a_bad_file_is_ignored_with_one_warning(cache, text, why):
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    with pytest.warns(UserWarning, match=re.escape(why)):
        assert _config.choose(PROBLEM, H200) == _ffi.native.select(**FACTS)
    assert _config.choose(PROBLEM, H200) == _ffi.native.select(**FACTS)  # warnings are errors
    _tuned.save(cache, H200.kind, [choice(able()[-1])])
    assert _config.choose(PROBLEM, H200)[0] == able()[-1]


def lowered(monkeypatch, device=H200, m=4, k=512, n=256, **params):
    """The text of a call lowered for CUDA as if this build and machine had it."""
    monkeypatch.setattr(_ffi, "has_cuda", lambda: True)
    monkeypatch.setattr(_config, "local_gpu", lambda: device)
    ops = oracle.operands(oracle.Case(m, k, n, 128))
    call = lambda x, q, s: _primitive.dot(x, q, s, group_size=128, **params)
    traced = jax.jit(call).trace(ops.x, ops.qweight, ops.scales)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_lowering_names_the_choice_and_brings_its_workspace(monkeypatch):
    for name in able():
        workspace = _ffi.native.workspace_bytes(name, **FACTS)
        text = lowered(monkeypatch, config=name)
        assert f'config = "{name}"' in text
        assert (f"tensor<{workspace}xui8>" in text) == (workspace > 0)
    assert f'config = "{_config.choose(PROBLEM, H200)[0]}"' in lowered(monkeypatch)


def test_workspace_is_an_extra_result(monkeypatch):
    monkeypatch.setattr(_config, "choose", lambda problem, device, explicit: ("some_config", 4096))
    text = lowered(monkeypatch)
    assert "tensor<4096xui8>" in text
    assert 'config = "some_config"' in text


def test_no_gpu_at_lowering_leaves_the_choice_to_the_handler(monkeypatch):
    text = lowered(monkeypatch, device=None)
    assert 'config = "auto"' in text
    assert "xui8>" not in text


@pytest.mark.usefixtures("fresh_warnings")
def test_a_gpu_that_no_kernel_serves(monkeypatch):
    ancient = _config.Device("an ancient GPU", 60, 20)
    with pytest.raises(_config.NoKernelError):
        _config.choose(PROBLEM, ancient)
    with pytest.warns(UserWarning, match="w4a16_dot: runs on the plain JAX reference: "):
        assert "@w4a16_dot" not in lowered(monkeypatch, device=ancient)
    with pytest.raises(_config.NoKernelError):
        lowered(monkeypatch, device=ancient, implementation="cuda")
    with pytest.raises(ValueError, match="cannot serve"):
        lowered(monkeypatch, device=ancient, config=able()[0])


AMPERE = _config.Device("another GPU", 80, 108)


@pytest.mark.parametrize(
    ("device", "m", "params", "dense"),
    [
        (AMPERE, 256, {}, False),
        (AMPERE, 257, {}, True),
        (AMPERE, 4096, {"n": 512}, False),
        (AMPERE, 4096, {"batch_invariant": True}, False),
        (AMPERE, 4096, {"config": "decode_32x16_b2_w4_s2_k1"}, False),
        (H200, 4096, {}, False),
        (None, 4096, {}, False),
    ],
)
def test_many_rows_where_decode_alone_serves(monkeypatch, device, m, params, dense):
    """The weight is dequantised once; a kernel asked for by name, or an invariant one, still serves."""
    text = lowered(monkeypatch, device, m, **({"k": 1024, "n": 1024} | params))
    assert ("@w4a16_dequantize(" in text and "dot_general" in text) == dense
    assert ("@w4a16_dot(" in text) != dense


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        oracle.Case(300, 1024, 1040, 64, "float16", "float32", "fractional", True, alpha=0.5),
        oracle.Case(300, 1024, 1040, 64),
    ],
)
def test_product_of_many_rows_on_another_gpu(monkeypatch, case):
    """Against the oracle, on this GPU as if it were that one."""
    from conftest import device_of

    monkeypatch.setattr(_config, "local_gpu", lambda: AMPERE)
    ops = oracle.operands(case)
    params = {"group_size": case.group_size, "alpha": case.alpha, "out_dtype": case.out_dtype}
    with jax.default_device(device_of("cuda")):
        run = jax.jit(lambda *operands: _primitive.dot(*operands, **params))
        args = (ops.x, ops.qweight, ops.scales, ops.zeros, ops.bias)
        text = run.lower(*args).as_text()
        assert "@w4a16_dequantize(" in text
        assert "@w4a16_dot(" not in text
        oracle.check_close(case, ops, np.asarray(run(*args)))


def test_local_gpu_is_none_or_a_device():
    device = _config.local_gpu()
    try:
        gpus = jax.devices("cuda")
    except RuntimeError:
        gpus = []
    assert (device is None) == (not gpus)
    if device is not None:
        assert device.compute_capability >= 60
        assert device.num_sms > 0


@pytest.mark.gpu
def test_every_config_against_the_oracle():
    """Every configuration of `dot`, over sizes of every remainder class that it accepts."""
    from conftest import device_of

    names = [config["name"] for config in _ffi.native.configs() if not config["ragged"]]
    served = set()
    with jax.default_device(device_of("cuda")):
        device = _config.local_gpu()
        assert device is not None
        for case in oracle.fuzz(60, seed=5, dtypes=("float16", "bfloat16")):
            ops = oracle.operands(case)
            problem = _config.Problem(
                case.m,
                case.n,
                case.k,
                case.group,
                case.dtype,
                case.out_dtype,
                case.zeros != "none",
                case.bias,
            )
            facts = {
                **vars(problem),
                "compute_capability": device.compute_capability,
                "num_sms": device.num_sms,
            }
            for name in names:
                if _ffi.native.can_implement(name, **facts) is not None:
                    continue
                arrays = (ops.x, ops.qweight, ops.scales, ops.zeros, ops.bias)
                got = _primitive.dot(
                    *(None if a is None else jnp.asarray(a) for a in arrays),
                    group_size=case.group,
                    alpha=case.alpha,
                    out_dtype=case.out_dtype,
                    implementation="cuda",
                    config=name,
                )
                try:
                    oracle.check_close(case, ops, jax.device_get(got))
                except AssertionError as error:
                    raise AssertionError(f"{name}: {error}") from error
                served.add(name)
    assert served == set(names)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "n"),
    [
        (40, 17000),
        (130, 9000),
        (130, 26000),
        (200, 26000),
        (256, 6000),
        (256, 23000),
        (256, 29000),
        (700, 11000),
    ],
)
def test_the_last_waves_of_the_persistent_kernel(m, n):
    """Whole tiles, parts of them of every kind, and both, where there are 132 SMs (gemm_persistent.h)."""
    from conftest import device_of

    names = [name for name in _ffi.build_info()["configs"] if name.startswith("persistent")]
    case = oracle.Case(m, 192, n, 64, seed=m + n)
    ops = oracle.operands(case)
    with jax.default_device(device_of("cuda")):
        arrays = [jnp.asarray(a) for a in (ops.x, ops.qweight, ops.scales)]
        for name in names:
            got = _primitive.dot(*arrays, group_size=64, implementation="cuda", config=name)
            oracle.check_close(case, ops, jax.device_get(got))


@pytest.mark.gpu
def test_tokens_that_end_within_a_tile():
    """The last tile begins earlier then: its tokens are those of whole tiles, to the bit."""
    from conftest import device_of

    names = [name for name in _ffi.build_info()["configs"] if name.startswith(("wgmma", "persistent"))]
    random = np.random.default_rng(0)
    n, k = 960, 1024
    with jax.default_device(device_of("cuda")):
        qweight = jnp.asarray(random.integers(0, 2**32, (k // 64, n // 16, 128), np.uint32))
        scales = jnp.asarray(random.uniform(0.5, 1.5, (k // 128, n)), jnp.bfloat16)
        for name in names:
            tile_m = int(re.findall(r"_\d+x(\d+)_", name)[0])
            x = jnp.asarray(random.normal(size=(3 * tile_m, k)), jnp.bfloat16)
            dot = lambda x, name=name: _primitive.dot(
                x, qweight, scales, group_size=128, implementation="cuda", config=name
            )
            whole = np.asarray(dot(x))
            assert np.isfinite(whole.astype(np.float32)).all()
            m = 2 * tile_m + 5
            np.testing.assert_array_equal(np.asarray(dot(x[:m])), whole[:m], err_msg=f"{name}, M = {m}")
