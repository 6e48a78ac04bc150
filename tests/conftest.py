"""Eight CPU devices for the sharding tests, and the implementations that the oracles run over."""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

# Python processes that tests start import the installed package, not the folder they are started in.
os.environ["PYTHONSAFEPATH"] = "1"

import jax
import pytest

import jax_w4a16
from jax_w4a16 import _config, _ffi, _sharding

IMPLEMENTATIONS = ("cpu", "reference", pytest.param("cuda", marks=pytest.mark.gpu))


def device_of(implementation: str) -> jax.Device:
    """The device that an implementation runs on; skips the test where there is none."""
    if implementation != "cuda":
        return jax.devices("cpu")[0]
    if not jax_w4a16.build_info()["cuda"]:
        pytest.skip("this build has no CUDA kernels")
    try:
        return jax.devices("cuda")[0]
    except RuntimeError as error:
        pytest.skip(f"no CUDA device: {error}")


def devices_of(implementation: str, count: int) -> list[jax.Device]:
    """The first `count` devices that an implementation runs on; skips the test where there are fewer."""
    found = jax.devices(device_of(implementation).platform)
    if len(found) < count:
        pytest.skip(f"needs {count} {implementation} devices, found {len(found)}")
    return found[:count]


def needs_nvcc() -> None:
    """Skips the test where the benchmarks' own kernels cannot be compiled."""
    from benchmarks import compile_cuda

    if compile_cuda.find_nvcc() is None:
        pytest.skip("needs nvcc, found none")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    """Each implementation, with its device as the default one."""
    with jax.default_device(device_of(request.param)):
        yield request.param


@pytest.fixture(params=[p for p in IMPLEMENTATIONS if p != "reference"])
def kernel(request):
    """Each implementation that is a kernel."""
    with jax.default_device(device_of(request.param)):
        yield request.param


@pytest.fixture
def fresh_warnings(monkeypatch):
    """Warnings that are given once can be given again."""
    monkeypatch.setattr(_sharding, "_warned", set())


@pytest.fixture
def cuda_build(monkeypatch):
    """This build and machine have CUDA kernels, as far as lowering asks; a GPU is another thing."""
    monkeypatch.setattr(_ffi, "has_cuda", lambda: True)
    monkeypatch.setattr(_config, "local_gpu", lambda: None)
