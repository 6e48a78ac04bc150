"""Which compiled kernel serves a call: one asked for, else a tuned one, else the heuristic's.

The choice depends on static facts alone, so that every process of a program makes the same one.
"""

import dataclasses
from typing import Any

import jax

from jax_w4a16 import _tuned
from jax_w4a16._ffi import native

# Where decode alone serves. On an H200 as if it had no other kernel, decode takes as long as dequantising
# once and XLA's product at 125 to 180 rows (28672x4096, 4096x14336, 4096x4096), 1.3 to 1.8 times as long at
# 256, 2.3 times at 2,048; GPUs whose memory is slower beside their tensor cores get there later. Small
# weights take a few microseconds either way.
MOST_DECODED_ROWS, LEAST_DENSE_WEIGHT = 256, 1 << 20


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
    batch_invariant: bool = False
    epilogue: str = "none"  # or add_norm, swiglu: what follows the product in the same kernel


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


class NoKernelError(ValueError):
    """No compiled kernel serves a problem on a device."""


def choose(problem: Problem, device: Device, explicit: str | None = None) -> tuple[str, int]:
    """Name and workspace, in bytes, of the configuration that serves `problem` on `device`.

    A tuned one that this build lacks, or that cannot serve, is passed over.

    Raises:
      ValueError: `explicit` is unknown or cannot serve; the message says why.
      NoKernelError: nothing can serve.
    """
    facts: dict[str, Any] = dataclasses.asdict(problem)
    facts |= {"compute_capability": device.compute_capability, "num_sms": device.num_sms}
    if explicit is not None:
        refusal = native.can_implement(explicit, **facts)
        if refusal is not None:
            raise ValueError(f"config {explicit!r} cannot serve: {refusal}")
        return explicit, native.workspace_bytes(explicit, **facts)
    tuned = _tuned.lookup(device.kind, problem)
    if (
        tuned is not None
        and tuned in native.build_info()["configs"]
        and native.can_implement(tuned, **facts) is None
    ):
        return tuned, native.workspace_bytes(tuned, **facts)
    try:
        return native.select(**facts)
    except ValueError as error:
        raise NoKernelError(str(error)) from error


def is_better_dense(problem: Problem, config: str) -> bool:
    """Whether to dequantise the weight once, for XLA's product, rather than have `config` serve.

    Decode dequantises for every 16 rows. What is to be batch-invariant must be the kernel's.
    """
    many = problem.m > MOST_DECODED_ROWS and problem.n * problem.k >= LEAST_DENSE_WEIGHT
    return many and config.startswith("decode_") and not problem.batch_invariant


def choose_ragged(problem: Problem, experts: int, device: Device, explicit: str | None = None) -> str:
    """Name of the configuration that serves a ragged product of `experts` experts on `device`.

    Raises as `choose` does.
    """
    facts: dict[str, Any] = dataclasses.asdict(problem) | {"experts": experts}
    facts |= {"compute_capability": device.compute_capability, "num_sms": device.num_sms}
    if explicit is not None:
        refusal = native.ragged_can_implement(explicit, **facts)
        if refusal is not None:
            raise ValueError(f"config {explicit!r} cannot serve: {refusal}")
        return explicit
    try:
        return native.ragged_select(**facts)
    except ValueError as error:
        raise NoKernelError(str(error)) from error
