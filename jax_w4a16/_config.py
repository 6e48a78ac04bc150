"""Which compiled kernel serves a call: one asked for, else a tuned one, else the heuristic's.

The choice depends on static facts alone, so that every process of a program makes the same one.
"""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax

from jax_w4a16._ffi import native

TUNED_FOLDER = Path(__file__).parent / "configs"


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static part of a call, as the native library names it."""

    m: int
    n: int
    k: int
    group_size: int
    x_dtype: str
    out_dtype: str
    has_zeros: bool
    has_bias: bool


@dataclasses.dataclass(frozen=True)
class Device:
    """What the choice depends on: a kind of GPU."""

    kind: str
    compute_capability: int
    num_sms: int


def local_gpu() -> Device | None:
    """The first local CUDA device; None where there is none."""
    try:
        device = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return None
    major, minor = device.compute_capability.split(".")
    return Device(device.device_kind, 10 * int(major) + int(minor), device.core_count)


@functools.cache
def _tuned_table(kind: str) -> dict[str, str]:
    path = TUNED_FOLDER / (re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_") + ".json")
    return json.loads(path.read_text()) if path.exists() else {}


def tuned_key(problem: Problem) -> str:
    """The key of a problem in configs/<device kind>.json, whose values are names of configurations."""
    return " ".join(f"{name}={value}" for name, value in dataclasses.asdict(problem).items())


def choose(problem: Problem, device: Device, explicit: str | None = None) -> tuple[str, int]:
    """Name and workspace, in bytes, of the configuration that serves `problem` on `device`.

    Raises ValueError with the library's reason where `explicit`, or else any, cannot.
    """
    facts = {**dataclasses.asdict(problem), "compute_capability": device.compute_capability}
    facts["num_sms"] = device.num_sms
    name = explicit or _tuned_table(device.kind).get(tuned_key(problem))
    if name is None:
        return native.select(**facts)
    refusal = native.can_implement(name, **facts)
    if refusal is not None:
        raise ValueError(f"config {name!r}: {refusal}")
    return name, native.workspace_bytes(name, **facts)
