"""What a row split's sum over several GPUs costs a layer at batch 1, by form and by XLA's options.

    python -m benchmarks.bench_row_sum [--ways 2] [--hidden 8192] [--output results/row_sum.json]

A step scales a row by a device's own vector, sums that over the devices, adds another row, and norms: what
stands between two of a decoder's linear layers. Steps are unrolled in a loop, as in `llama.decode`. A figure
is microseconds a step over the same without a sum; every result is checked first.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import jit, llama, llama_sum, store

STEPS, LOOPS = 16, 32
SAMPLES = 7
_EPSILON = 1e-5

_GRAPHS = "xla_gpu_enable_command_buffer"
_USUAL = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,CONDITIONAL,DYNAMIC_SLICE_FUSION"
_SHORT = {"xla_gpu_graph_min_graph_size": 1}
_INSIDE = _SHORT | {_GRAPHS: f"{_USUAL},COLLECTIVES"}
_NCCL = {"xla_gpu_experimental_use_collective_kernels": ""}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "short graphs": _SHORT,
    "synchronous": {"xla_gpu_disable_async_collectives": "ALLCOLLECTIVES"},
    "sums in graphs": _INSIDE,
    "NCCL": _NCCL,
    "NCCL in graphs": _INSIDE | _NCCL,
    "NCCL in graphs, symmetric": _INSIDE
    | _NCCL
    | {"xla_gpu_experimental_enable_nccl_symmetric_buffers": True},
}


def _other(part):
    return lax.ppermute(part, llama.AXIS, [(0, 1), (1, 0)])


# float32 part of this device -> the sum of all devices' parts.
SUMS: dict[str, Callable[[Any], Any]] = {
    "none": lambda part: part,
    "psum": lambda part: lax.psum(part, llama.AXIS),
    "ppermute": lambda part: part + _other(part),
    "all_gather": lambda part: lax.all_gather(part, llama.AXIS).sum(0),
}


def _step(form: str, x, y, normed, vector, scale):
    part = normed[0].astype(jnp.float32) * lax.rsqrt(normed[1] + _EPSILON) * vector
    if form == "kernel":
        y, *normed = llama_sum.add_and_norm(x, part, scale)
        return x, y, tuple(normed)
    part = SUMS[form](lax.optimization_barrier(part))
    y = (x.astype(jnp.float32) + part).astype(x.dtype)
    wide = y.astype(jnp.float32)
    return (
        x,
        y,
        ((wide * scale.astype(jnp.float32)).astype(x.dtype), jnp.mean(wide * wide, -1, keepdims=True)),
    )


def _run(form: str, x, vector, scale):
    def loop(_, carry):
        for _ in range(STEPS):
            carry = _step(form, *carry, vector, scale)
        return carry

    carry = x, x, (x, jnp.ones((1, 1)))
    return lax.fori_loop(0, LOOPS, loop, carry)[1][None]


def expected(x: np.ndarray, vectors: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The result in float64."""
    y, normed, square = x, x, 1.0
    for _ in range(STEPS * LOOPS):
        y = x + (normed / np.sqrt(square + _EPSILON) * vectors).sum(0)
        normed, square = y * scale, np.mean(y * y)
    return y


def measure(ways: int, hidden: int) -> list[dict[str, Any]]:
    """A row for each form and setting."""
    mesh = llama.make_mesh(ways)
    assert mesh is not None
    random = np.random.default_rng(0)
    host = [
        random.standard_normal((1, hidden)),
        random.uniform(0, 1 / ways, (ways, hidden)),
        random.uniform(0.5, 1, hidden),
    ]
    kinds, splits = (jnp.bfloat16, jnp.float32, jnp.bfloat16), (P(), P(llama.AXIS), P())
    args = [
        jax.device_put(jnp.asarray(a, kind), NamedSharding(mesh, split))
        for a, kind, split in zip(host, kinds, splits, strict=True)
    ]
    want = expected(*(np.asarray(a, np.float64) for a in args))
    forms = [form for form in SUMS if form != "ppermute" or ways == 2]
    if jax.default_backend() == "gpu" and llama_sum.find_nvcc():
        llama_sum.connect(tuple(mesh.devices))
        forms.append("kernel")

    def build(key):
        form, setting = key
        run = functools.partial(_run, form)
        mapped = jax.shard_map(run, mesh=mesh, in_specs=splits, out_specs=P(llama.AXIS), check_vma=False)
        return jax.jit(mapped).lower(*args).compile(compiler_options=SETTINGS[setting])

    keys = [(form, setting) for setting in SETTINGS for form in forms]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = dict(zip(keys, pool.map(build, keys), strict=True))
    rows = []
    for (form, setting), program in programs.items():
        for _ in range(2):
            result = np.asarray(program(*args), np.float64)
        wrong = np.linalg.norm(result - want) > 0.02 * np.linalg.norm(want) * np.sqrt(ways)
        if form != "none" and (wrong or (result != result[0]).any()):
            raise RuntimeError(f"{form}, {setting}: wrong sums")
        samples = []
        for _ in range(SAMPLES):
            begin = time.perf_counter()
            program(*args).block_until_ready()
            samples.append(time.perf_counter() - begin)
        us = statistics.median(samples) * 1e6 / (STEPS * LOOPS)
        rows.append({"form": form, "setting": setting, "step_us": us})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """A line for each setting."""
    us = {(row["setting"], row["form"]): row["step_us"] for row in rows}
    forms = list(dict.fromkeys(row["form"] for row in rows))
    print(f"{'us a step; sums over none':28}" + "".join(f"{form:>12}" for form in forms))
    for setting in dict.fromkeys(row["setting"] for row in rows):
        base = us[setting, "none"]
        cells = (us[setting, form] - (0 if form == "none" else base) for form in forms)
        print(f"{setting:28}" + "".join(f"{cell:12.2f}" for cell in cells))


def main(argv: list[str] | None = None) -> int:
    """Prints the table and saves it."""
    parser = argparse.ArgumentParser(
        "benchmarks.bench_row_sum", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--ways", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--output", type=Path, default=store.RESULTS / "row_sum.json")
    options = parser.parse_args(argv)
    rows = measure(options.ways, options.hidden)
    show(rows)
    header = jit.device_facts() | {"ways": options.ways, "hidden": options.hidden, "options": SETTINGS}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
