"""Times jax_w4a16.dot on the CPU against XLA's dense float32 dot, cold weights, both in one run.

python -m benchmarks.bench_cpu [--m 1,16] [--size 4096]
"""

import argparse
import os
import statistics
import sys
import time
from functools import partial

from benchmarks import shapes

TARGETS = {1: 4.0, 16: 1.5}  # times faster than XLA's dense float32 dot
DTYPES = ("float32", "bfloat16", "float16")
COLD_BYTES = 256 * 2**20  # copies of a weight together are larger than any cache
SAMPLES = 25


def _alternate(calls: dict, copies: dict) -> dict[str, float]:
    """Median microseconds of each call; samples alternate, each on the next copy of its weight."""
    import jax

    samples: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(SAMPLES + 2):
        for name, call in calls.items():
            weight = copies[name][i % len(copies[name])]
            begin = time.perf_counter()
            jax.block_until_ready(call(*weight))
            if i >= 2:
                samples[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) * 1e6 for name, times in samples.items()}


def main(argv: list[str] | None = None) -> int:
    """Prints the table; exit status 1 if a figure is missed or a result is wrong."""
    parser = argparse.ArgumentParser("benchmarks.bench_cpu", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--m", type=shapes.parse_tokens, default=(1, 16))
    parser.add_argument("--size", type=int, default=4096)
    options = parser.parse_args(argv)
    os.environ["JAX_PLATFORMS"] = "cpu"

    import jax
    import jax.numpy as jnp
    import numpy as np

    import jax_w4a16

    size, group_size = options.size, shapes.GROUP_SIZE
    random = np.random.default_rng(0)
    w = jnp.asarray(random.standard_normal((size, size), dtype=np.float32) / np.sqrt(size))
    quantized = jax_w4a16.quantize(w, group_size=group_size, scale_dtype=jnp.float32)
    dense = jax_w4a16.dequantize(quantized.qweight, quantized.scales, dtype=jnp.float32)
    build = jax_w4a16.build_info()
    print(f"{os.cpu_count()} processors, kernels for {build['cpu_instruction_set']}, jax {jax.__version__}")

    def copies(*weight):
        count = max(2, -(-COLD_BYTES // sum(part.nbytes for part in weight)))
        return [weight] + [tuple(jnp.copy(part) for part in weight) for _ in range(count - 1)]

    good = True
    for m in options.m:
        x = jnp.asarray(random.standard_normal((m, size), dtype=np.float32))
        expected = np.asarray(jnp.dot(x, dense))
        calls = {"dense": jax.jit(partial(jnp.dot, x))}
        weights = {"dense": copies(dense)}
        for dtype in DTYPES:
            calls[dtype] = jax.jit(partial(jax_w4a16.dot, x.astype(dtype), group_size=group_size))
            weights[dtype] = copies(quantized.qweight, quantized.scales.astype(dtype))
            got = np.asarray(calls[dtype](*weights[dtype][0])).astype(np.float32)
            error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
            if not error <= 2e-2:
                print(f"FAILED: M={m} {dtype}: relative error {error:.2e}")
                good = False
        us = _alternate(calls, weights)
        print(f"M={m} {size}x{size}: XLA dense float32 {us['dense']:.0f} us")
        for dtype in DTYPES:
            ratio = us["dense"] / us[dtype]
            verdict = ""
            if m in TARGETS:
                good = good and ratio >= TARGETS[m]
                verdict = f", to reach {TARGETS[m]}: {'met' if ratio >= TARGETS[m] else 'MISSED'}"
            print(f"  x {dtype:>8}: {us[dtype]:8.0f} us, {ratio:5.2f} times faster{verdict}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
