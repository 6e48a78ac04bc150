"""The columns under jit: the same products as a JAX program runs them.

A program is a chain of calls over rotating weight copies. An element of each output is written into
the next call's x, so that no call can be dropped, merged or run beside another; this costs one small
kernel a call, in every column alike.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_w4a16
from benchmarks import baselines, timing
from benchmarks.progress import Progress
from benchmarks.shapes import Cell, compute_us, weight_bytes
from benchmarks.store import Store

_BANDWIDTH = 4.8e12  # bytes a second, nominal: no honest figure is faster
_SAMPLE_ROWS = 8
_SAMPLE_COLUMNS = 64
_TOLERANCE = {"float16": 2e-3, "bfloat16": 1e-2}  # relative, rounding of weight and output


def chain(dot: Callable[..., jax.Array], calls: int) -> Callable:
    """(x, weights) -> (the last call's x, the last output)."""

    def run(x, weights):
        out = None
        for i in range(calls):
            if out is not None:
                # The barrier keeps XLA from computing only the element that is used.
                x, out = jax.lax.optimization_barrier((x, out))
                x = jax.lax.dynamic_update_slice(x, out[:1, :1].astype(x.dtype), (0, 0))
            out = dot(x, *weights[i % len(weights)])
        return x, out

    return run


def _dot(group_size: int, x: jax.Array, qweight: jax.Array, scales: jax.Array, *zeros: jax.Array):
    return jax_w4a16.dot(x, qweight, scales, *zeros, group_size=group_size)


class Weights:
    """Codes and scales of one shape on the host, and their device forms, a list of copies each."""

    def __init__(self, n: int, k: int, group_size: int):
        random = np.random.default_rng(0)
        self.n, self.k, self.group_size = n, k, group_size
        self.codes = random.integers(0, 16, (k, n), dtype=np.uint8)
        spread = random.uniform(0.5, 1.5, (-(-k // group_size), n)) / (4.6 * np.sqrt(k))
        self.scales = spread.astype(np.float32)

    def column(self, column: str, dtype: str) -> tuple[Callable[..., jax.Array], list[tuple]]:
        """The product and the weight copies of a jit column."""
        scales = jnp.asarray(self.scales, dtype)
        if column == "jit_us":
            weight = (jax_w4a16.pack(jnp.asarray(self.codes)), scales)
            size = weight_bytes(self.n, self.k, self.group_size, False)
            dot = partial(_dot, self.group_size)
        elif column == "jit_dense_us":
            dequantize = jax.jit(partial(_dequantize, self.group_size))
            weight = (dequantize(jnp.asarray(self.codes), scales),)
            size = self.n * self.k * 2
            dot = baselines.jax_dense
        else:
            signed = jax.jit(lambda codes: (codes.astype(jnp.int8) - 8).astype(jnp.int4))
            weight = (signed(jnp.asarray(self.codes)), scales)
            size = weight_bytes(self.n, self.k, self.group_size, False)
            dot = baselines.jax_dequantize_dot
        more = timing.plan_copies(size) - 1
        return dot, [weight] + [tuple(jnp.copy(part) for part in weight) for _ in range(more)]

    def check(self, x: Any, out: Any, dtype: str) -> str | None:
        """Compares sampled rows and columns with float32 on the host; what is wrong, or None."""
        random = np.random.default_rng(1)
        m = x.shape[0]
        rows = np.unique(np.append(random.integers(0, m, _SAMPLE_ROWS - 2), [0, m - 1]))
        columns = np.unique(random.integers(0, self.n, _SAMPLE_COLUMNS))
        scales = np.asarray(jnp.asarray(self.scales, dtype)).astype(np.float32)[:, columns]
        groups = np.arange(self.k) // self.group_size
        w = (self.codes[:, columns].astype(np.float32) - 8) * scales[groups]
        expected = np.asarray(x)[rows].astype(np.float32) @ w
        got = np.asarray(out)[rows][:, columns].astype(np.float32)
        error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
        return None if error <= _TOLERANCE[dtype] else f"relative error {error:.2e}"


def _dequantize(group_size: int, codes: jax.Array, scales: jax.Array) -> jax.Array:
    k, n = codes.shape
    w = codes.astype(scales.dtype) - 8
    return (w.reshape(-1, min(group_size, k), n) * scales[:, None, :]).reshape(k, n)


def device_facts() -> dict[str, Any]:
    """What a results file says about the machine."""
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "library": jax_w4a16.build_info()["version"],
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _expected_us(column: str, cell: Cell) -> float:
    bytes_per_code = 2 if column == "jit_dense_us" else 0.52
    read_us = cell.n * cell.k * bytes_per_code / _BANDWIDTH * 1e6
    return max(read_us, compute_us(cell.m, cell.n, cell.k))


def _measure_group(
    store: Store, weights: Weights, column: str, group: list[Cell], progress: Progress
) -> None:
    """Compiles the programs of one column and dtype side by side, then times them one by one."""
    dtype = group[0].dtype
    dot, copies = weights.column(column, dtype)
    key = jax.random.key(0)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), copies)

    def build(cell: Cell):
        calls = timing.plan_chain(_expected_us(column, cell) + 3)
        make_x = jax.jit(partial(jax.random.normal, shape=(cell.m, cell.k), dtype=jnp.dtype(dtype)))
        make_x = make_x.lower(key).compile()
        x = jax.ShapeDtypeStruct((cell.m, cell.k), dtype)
        program = jax.jit(chain(dot, calls), donate_argnums=0)
        return calls, make_x, program.lower(x, shapes).compile()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(build, cell) for cell in group]
        for future in futures:
            future.exception()

    for cell, future in zip(group, futures, strict=True):
        progress.step(f"{column} {cell.n}x{cell.k} {dtype} M={cell.m}")
        error = future.exception()
        if error is not None:
            store.fail(cell, column, str(error).splitlines()[0])
            continue
        calls, make_x, program = future.result()
        x = make_x(key)
        seconds, x, out = timing.time_steps(lambda x, program=program: program(x, copies), x)
        us = seconds / calls * 1e6
        why = weights.check(x, out, dtype)
        if why is None and jax.default_backend() == "gpu" and us < 0.9 * _expected_us(column, cell):
            why = f"{us:.1f} us is faster than the memory: the compiler dropped calls"
        if why is None:
            store.update(cell, **{column: us})
        else:
            store.fail(cell, column, why)


def measure(store: Store, todo: list[Cell], columns: list[str], out_of_time: Callable) -> None:
    """Fills the jit columns of `todo`, shape by shape: what a run that ends early leaves out are shapes."""
    work: dict[tuple, list[Cell]] = {}
    for cell in todo:
        for column in columns:
            if store.missing(cell, column):
                key = (column, cell.n, cell.k, cell.group_size, cell.dtype)
                work.setdefault(key, []).append(cell)
    progress = Progress(sum(len(group) for group in work.values()), "jit")
    weights = None
    for (column, n, k, group_size, _), group in work.items():
        if out_of_time():
            break
        if weights is None or (weights.n, weights.k, weights.group_size) != (n, k, group_size):
            weights = Weights(n, k, group_size)
        _measure_group(store, weights, column, group, progress)
    store.save()
