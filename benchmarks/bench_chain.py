"""What a call costs under jit at M = 1: a chain of layers, called and in loops, over the kernel's own time.

    python -m benchmarks.bench_chain [--layers 32] [--size 4096] [--dtype fp16,bf16]

The kernel's own time is that of bench_dot's graph column, measured first in a process of its own. The ways
to run the layers are then timed in one process for each of FLAGS.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import bench_dot, shapes, store, timing

LOOP_STEPS = 50
TARGETS_US = {"chain": 2.0, "fori_loop": 0.6}
# Settings of XLA_FLAGS; the figures to reach are for the first.
FLAGS = (
    "",
    "--xla_gpu_graph_min_graph_size=1",
    "--xla_gpu_enable_command_buffer=+WHILE --xla_gpu_graph_min_graph_size=1",
)
WARM_S = 0.5
FED_BACK = "chain, fed back"
_GRAPH_BUDGET_S = 120.0
_TOLERANCE = 0.1  # of a chain of layers, each of which rounds to 16 bits
_GROWTH = 0.96  # keeps the activations' size level over many layers


def graph_us(size: int, dtype: str) -> float | None:
    """Time of one call in a CUDA graph, or None without a GPU."""
    phase = "graph" if importlib.util.find_spec("torch") else "native"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "one.json"
        argv = ["--shapes", f"{size}x{size}", "--m", "1", "--dtype", dtype, "--columns", "us"]
        if bench_dot.run_phase(phase, argv, output, time.time() + _GRAPH_BUDGET_S) != 0:
            return None
        content = json.loads(output.read_text())
    if content["header"]["device"].startswith("CPU"):
        return None
    return content["rows"][0]["us"] if content["rows"] else None


class Layers:
    """Square weights, all distinct, one after the other."""

    def __init__(self, count: int, size: int, dtype: str):
        import jax.numpy as jnp
        import numpy as np

        import jax_w4a16

        random = np.random.default_rng(0)
        self.dtype, self.host, self.weights = dtype, [], []
        for _ in range(count):
            # Codes are symmetric about 8, or their mean would make the activations grow.
            codes = random.integers(1, 16, (size, size), dtype=np.uint8)
            spread = random.uniform(0.5, 1.5, (size // shapes.GROUP_SIZE, size))
            scales = jnp.asarray(spread / (4.32 * np.sqrt(size)), dtype)
            self.host.append((codes, np.asarray(scales).astype(np.float32)))
            self.weights.append((jax_w4a16.pack(jnp.asarray(codes)), scales))

    @staticmethod
    def layer(x: Any, weight: Any) -> Any:
        """One product."""
        import jax_w4a16

        return jax_w4a16.dot(x, *weight, group_size=shapes.GROUP_SIZE, alpha=_GROWTH)

    def chain(self, x: Any, weights: Any) -> Any:
        """All layers, unrolled."""
        for weight in weights:
            x = self.layer(x, weight)
        return x

    def loop(self, x: Any, weights: Any) -> Any:
        """The chain LOOP_STEPS times."""
        import jax

        return jax.lax.fori_loop(0, LOOP_STEPS, lambda _, x: self.chain(x, weights), x)

    def while_loop(self, x: Any, weights: Any) -> Any:
        """The chain until a condition on its output holds, which is after LOOP_STEPS times."""
        import jax
        import jax.numpy as jnp

        def unfinished(state):
            step, x = state
            return (step < LOOP_STEPS) & jnp.isfinite(x[0, 0])

        return jax.lax.while_loop(
            unfinished, lambda state: (state[0] + 1, self.chain(state[1], weights)), (0, x)
        )[1]

    def scan(self, unroll: int, x: Any, stacked: Any) -> Any:
        """All layers over stacked weights."""
        import jax

        def body(x, weight):
            return self.layer(x, weight), None

        return jax.lax.scan(body, x, stacked, unroll=unroll)[0]

    def wrong(self, x: Any, out: Any) -> str | None:
        """Compares a chain's output with float32 on the host."""
        import numpy as np

        expected = np.asarray(x).astype(np.float32)
        for codes, scales in self.host:
            w = (codes.astype(np.float32) - 8) * np.repeat(scales, shapes.GROUP_SIZE, axis=0)
            expected = _GROWTH * (expected @ w)
        got = np.asarray(out).astype(np.float32)
        error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
        return None if error <= _TOLERANCE else f"relative error {error:.2e}"


def _call(program: Any, weights: Any, feed_back: bool, x: Any) -> tuple[Any, Any]:
    out = program(x, weights)
    return (out if feed_back else x), out


def measure(count: int, size: int, dtype: str) -> dict[str, float]:
    """Microseconds a layer of each way to run the layers; raises RuntimeError on a wrong result.

    "chain" takes the same x, many calls in flight: its buffers move from call to call, and XLA updates every
    node of the CUDA graph. "chain, fed back" takes its own output, as decoding does: they alternate.
    """
    import jax
    import jax.numpy as jnp

    layers = Layers(count, size, dtype)
    x = jax.random.normal(jax.random.key(0), (1, size), jnp.dtype(dtype))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers.weights)
    ways = {
        "chain": (layers.chain, layers.weights, 1),
        FED_BACK: (layers.chain, layers.weights, 1),
        "scan": (partial(layers.scan, 1), stacked, 1),
        "scan, unroll 8": (partial(layers.scan, 8), stacked, 1),
        "fori_loop": (layers.loop, layers.weights, LOOP_STEPS),
        "while_loop": (layers.while_loop, layers.weights, LOOP_STEPS),
    }
    times = {}
    for name, (run, weights, steps) in ways.items():
        program = jax.jit(run)
        if steps == 1 and (why := layers.wrong(x, program(x, weights))):
            raise RuntimeError(f"{name}, {dtype}: {why}")

        step = partial(_call, program, weights, name == FED_BACK)
        seconds, *_ = timing.time_steps(step, x, WARM_S)
        times[name] = seconds / (count * steps) * 1e6
    return times


def run_ways(flags: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """`measure` for each dtype, in a process with XLA's flags."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "ways.json"
        command = [sys.executable, "-m", "benchmarks.bench_chain", "--ways", "--output", str(output)]
        command += ["--layers", str(options.layers), "--size", str(options.size)]
        command += ["--dtype", ",".join(options.dtype)]
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        environment["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), flags]).strip()
        subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], check=True)
        return json.loads(output.read_text())


def _save(path: Path, header: dict[str, Any], rows: list[dict]) -> None:
    path.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Prints the table; exit status 1 if a figure is missed."""
    parser = argparse.ArgumentParser("benchmarks.bench_chain", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--dtype", type=shapes.parse_dtypes, default=shapes.DTYPES)
    parser.add_argument("--flags", nargs="*", default=FLAGS, help="settings of XLA_FLAGS")
    parser.add_argument("--ways", action="store_true", help=argparse.SUPPRESS)  # in this process
    parser.add_argument("--output", type=Path, default=store.RESULTS / "h200_chain.json")
    options = parser.parse_args(argv)
    if options.ways:
        times = {dtype: measure(options.layers, options.size, dtype) for dtype in options.dtype}
        options.output.write_text(json.dumps(times))
        return 0
    own_us = {dtype: graph_us(options.size, dtype) for dtype in options.dtype}
    rows, met = [], True
    header: dict[str, Any] = {"layers": options.layers, "size": options.size, "M": 1}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for flags in options.flags:
        print(f"XLA_FLAGS={flags!r}")
        for dtype, ways in run_ways(flags, options).items():
            own = own_us[dtype]
            print(f"  {dtype}: the kernel alone {'not measured' if own is None else f'{own:.2f} us'}")
            for way, us in ways.items():
                over = None if own is None else us - own
                bound = None if flags else TARGETS_US.get(way)
                verdict = ""
                if over is not None and bound is not None:
                    met = met and over <= bound
                    verdict = f", to reach {bound}: {'met' if over <= bound else 'MISSED'}"
                extra = "" if over is None else f", {over:.2f} us over the kernel{verdict}"
                print(f"    {way:>16}: {us:8.2f} us a layer{extra}")
                rows.append(
                    {"flags": flags, "dtype": dtype, "way": way, "us": round(us, 3), "kernel_us": own}
                )
        _save(options.output, header, rows)
    from benchmarks import jit  # not before: it takes the GPU, which the processes above have had

    _save(options.output, jit.device_facts() | header, rows)
    return 0 if met and None not in own_us.values() else 1


if __name__ == "__main__":
    sys.exit(main())
