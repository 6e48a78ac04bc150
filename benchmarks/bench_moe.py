"""Times ragged_dot on the experts' weights of Mixtral and Qwen-MoE, and writes results/h200_moe.json.

    python -m benchmarks.bench_moe [--models mixtral,...] [--tokens 8,...] [--dtype bf16] [--jax] [--sweep]

Tokens go to random experts, top k, with a fixed seed. Columns are CUDA graphs over rotating cold copies
(timing.py). The floor is a bare read of as many bytes as the experts that have rows hold, the limit the
larger of that and 2 rows N K operations at 790 TFLOP/s. The rivals multiply dense weights:
torch._grouped_mm and, with --jax, jax.lax.ragged_dot under jit, in a process of its own. --sweep times every
compiled configuration. Rows of models that are not measured stay in the file.
Exit status 0: every result was right.
"""

import argparse
import datetime
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import shapes, timing

RESULTS = Path(__file__).parent / "results" / "h200_moe.json"
LARGE_TOKENS = 4096
TOKENS = (8, 16, 32, 64, LARGE_TOKENS)
HOPELESS = 1.6  # times the best one's time, a configuration is not timed in a sweep
BAR = 1.3  # most time over the limit, up to 64 tokens


class Layer(NamedTuple):
    """The experts' weights [E, K, N] of a layer, of which a token takes `top` experts."""

    model: str
    layer: str
    experts: int
    top: int
    n: int
    k: int


LAYERS = (
    Layer("mixtral", "gate+up", 8, 2, 28672, 4096),
    Layer("mixtral", "down", 8, 2, 4096, 14336),
    Layer("qwen3-30b-a3b", "gate+up", 128, 8, 1536, 2048),
    Layer("qwen3-30b-a3b", "down", 128, 8, 2048, 768),
    Layer("qwen1.5-moe", "gate+up", 60, 4, 2816, 2048),
    Layer("qwen1.5-moe", "down", 60, 4, 2048, 1408),
)


def group_sizes(layer: Layer, tokens: int) -> np.ndarray:
    """Rows of each expert, int32 [E]: every token takes `top` different experts at random."""
    random = np.random.default_rng(tokens)
    chosen = np.argsort(random.random((tokens, layer.experts)), axis=1)[:, : layer.top]
    return np.bincount(chosen.ravel(), minlength=layer.experts).astype(np.int32)


def active_bytes(layer: Layer, sizes: np.ndarray, group_size: int) -> int:
    """Packed bytes of the experts that have rows."""
    return int((sizes > 0).sum()) * shapes.weight_bytes(layer.n, layer.k, group_size, False)


def arithmetic_us(layer: Layer, tokens: int) -> float:
    """Time of the multiplications alone."""
    return shapes.compute_us(tokens * layer.top, layer.n, layer.k)


# The graph columns: torch and the C interface -------------------------------------------------------------


class Weights:
    """Random packed experts, copies of them for a cold rotation, and the dense weight [E, K, N]."""

    def __init__(self, library: Any, layer: Layer, dtype: str, group_size: int, least_active: int):
        import torch  # pyright: ignore[reportMissingImports]

        from benchmarks import graph

        self.library, self.layer, self.dtype, self.group_size = library, layer, dtype, group_size
        self.torch_dtype = getattr(torch, dtype)
        e, k, n = layer.experts, layer.k, layer.n
        groups = math.ceil(k / group_size)
        random = torch.Generator("cuda").manual_seed(0)
        words = math.ceil(k / 64) * math.ceil(n / 16) * 128
        spread = torch.rand((e, groups, n), device="cuda", generator=random) + 0.5
        self.scales = (spread / (4.6 * math.sqrt(k))).to(self.torch_dtype)
        packed = torch.empty((e, words), dtype=torch.int32, device="cuda")
        self.dense = torch.empty((e, k, n), dtype=self.torch_dtype, device="cuda")
        for i in range(e):
            codes = torch.randint(0, 16, (k, n), dtype=torch.uint8, device="cuda", generator=random)
            library.pack_cuda(codes.data_ptr(), k, n, packed[i].data_ptr(), graph.stream())
            group = torch.arange(k, device="cuda") // group_size
            self.dense[i] = ((codes.float() - 8) * self.scales[i].float()[group]).to(self.torch_dtype)
        more = timing.plan_copies(least_active) - 1
        self.copies = [(packed, self.scales)]
        self.copies += [(packed.clone(), self.scales.clone()) for _ in range(more)]

    def problem(self, rows: int) -> Any:
        """The static part of a call."""
        from benchmarks import native

        code = native.DTYPES[self.dtype]
        return native.Problem(rows, self.layer.n, self.layer.k, self.group_size, code, code, 0, 0)

    def kernel(self, x: Any, sizes: Any, out: Any, config: str) -> Any:
        """Call i runs `config` on packed copy i."""
        from benchmarks import graph, native

        problem, name = self.problem(x.shape[0]), config.encode()
        operands = [
            native.Operands(
                x=x.data_ptr(), qweight=q.data_ptr(), scales=s.data_ptr(), out=out.data_ptr(), alpha=1.0
            )
            for q, s in self.copies
        ]

        def call(i: int, _keep: Any = (x, sizes, out)) -> None:
            self.library.ragged_run_cuda(
                problem, self.layer.experts, operands[i], sizes.data_ptr(), name, graph.stream()
            )

        return call


def _reference(weights: Weights, x: Any, sizes: np.ndarray) -> tuple[Any, float]:
    """float32 [M, N] of the dense weight, and the largest error of a row of the same in x's type."""
    import torch  # pyright: ignore[reportMissingImports]

    parts, worst, row = [], 0.0, 0
    for i, size in enumerate(sizes.tolist()):
        if size == 0:
            continue
        some = x[row : row + size]
        exact = torch.mm(some.float(), weights.dense[i].float())
        difference = torch.mm(some, weights.dense[i]).float() - exact
        row_error = torch.linalg.vector_norm(difference, dim=1) / torch.linalg.vector_norm(exact, dim=1)
        worst = max(worst, row_error.max().item())
        parts.append(exact)
        row += size
    return torch.cat(parts), worst


def _error(out: Any, exact: Any) -> float:
    import torch  # pyright: ignore[reportMissingImports]

    difference = torch.linalg.vector_norm(out.float() - exact, dim=1)
    return (difference / torch.linalg.vector_norm(exact, dim=1)).max().item()


def measure(weights: Weights, tokens: int, sweep: bool, failures: list[str]) -> dict[str, Any]:
    """One row of the results."""
    import torch  # pyright: ignore[reportMissingImports]

    from benchmarks import graph

    layer, library = weights.layer, weights.library
    device = library.current_device()
    sizes = group_sizes(layer, tokens)
    rows = int(sizes.sum())
    random = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn((rows, layer.k), device="cuda", generator=random).to(weights.torch_dtype)
    device_sizes = torch.tensor(sizes, device="cuda")
    exact, worst = _reference(weights, x, sizes)
    problem = weights.problem(rows)
    chosen = library.ragged_select(problem, layer.experts, device)
    configs = [chosen]
    if sweep:
        configs = [
            name
            for name in library.config_names(ragged=True)
            if library.ragged_refusal(problem, layer.experts, device, name) is None
        ]
    out = torch.empty((rows, layer.n), dtype=weights.torch_dtype, device="cuda")
    calls: dict[str, Any] = {}
    for config in configs:
        call = weights.kernel(x, device_sizes, out, config)
        out.fill_(math.nan)
        call(0)
        error = _error(out, exact)
        if error <= max(2 * worst, 1e-3):
            calls[config] = call
        else:
            failures.append(f"{layer.model} {layer.layer} {tokens} tokens {config}: error {error:.2e}")
    rough = {config: timing.eager_us(call, len(weights.copies)) for config, call in calls.items()}
    graphs = {
        config: timing.Graph(call, len(weights.copies))
        for config, call in calls.items()
        if config == chosen or rough[config] < HOPELESS * min(rough.values()) + 5
    }
    limit_bytes = active_bytes(layer, sizes, weights.group_size) // 16 * 16
    sink = torch.zeros(64, dtype=torch.uint8, device="cuda")

    def floor(i: int) -> None:
        library.read_floor_cuda(weights.copies[i][0].data_ptr(), read_bytes, sink.data_ptr(), graph.stream())

    # The scales are not part of the array that is read: where all experts have rows the read stops at
    # its end, and its time is scaled up.
    read_bytes = min(limit_bytes, weights.copies[0][0].numel() * 4)
    graphs["floor_us"] = timing.Graph(floor, len(weights.copies))
    if hasattr(torch, "_grouped_mm") and weights.dtype == "bfloat16":
        offsets = torch.cumsum(device_sizes, 0, dtype=torch.int32)
        dense = [weights.dense] * 2

        def grouped(i: int) -> Any:
            return torch._grouped_mm(x, dense[i % 2], offs=offsets)

        try:
            if _error(grouped(0), exact) <= max(2 * worst, 1e-3):
                graphs["grouped_mm_us"] = timing.Graph(grouped, 2)
        except RuntimeError as error:
            print(f"torch._grouped_mm: {str(error).splitlines()[0]}", file=sys.stderr)
    times = timing.time_graphs(graphs)
    floor_us = times.pop("floor_us") * limit_bytes / read_bytes
    grouped_us = times.pop("grouped_mm_us", None)
    limit_us = max(floor_us, arithmetic_us(layer, tokens))
    row = {
        **layer._asdict(),
        "tokens": tokens,
        "rows": rows,
        "active": int((sizes > 0).sum()),
        "most_rows": int(sizes.max()),
        "dtype": weights.dtype,
        "kernel": chosen,
        "us": times.get(chosen),
        "floor_us": floor_us,
        "limit_us": limit_us,
        "grouped_mm_us": grouped_us,
        "jax_ragged_dot_us": None,
    }
    if sweep:
        row["sweep_us"] = times
    return row


# The rival under jit ---------------------------------------------------------------------------------------


def measure_jax(layer: Layer, tokens: int, dtype: str) -> float:
    """Microseconds of jax.lax.ragged_dot with a dense weight; its operands are larger than the L2."""
    import jax
    import jax.numpy as jnp

    sizes = jnp.asarray(group_sizes(layer, tokens))
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (tokens * layer.top, layer.k), jnp.dtype(dtype))
    w = jax.random.normal(keys[1], (layer.experts, layer.k, layer.n), jnp.dtype(dtype))

    @jax.jit
    def step(x: Any, w: Any, sizes: Any) -> tuple[Any, Any]:
        out = jax.lax.ragged_dot(x, w, sizes)
        x, out = jax.lax.optimization_barrier((x, out))
        return jax.lax.dynamic_update_slice(x, out[:1, :1].astype(x.dtype), (0, 0)), out[:1]

    seconds, _, _ = timing.time_steps(lambda x: step(x, w, sizes), x)
    return seconds * 1e6


# The program -----------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """The results beside their bars."""
    lines = [
        "| model | layer | tokens | experts with rows | us | limit | time / limit | bar | than `grouped_mm` "
        "| than `jax.lax.ragged_dot` |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        us = row["us"] or math.nan
        times = [row["grouped_mm_us"], row["jax_ragged_dot_us"]]
        faster = [f"{time / us:.2f}" if time else "-" for time in times]
        bar = f"at most {BAR}" if row["tokens"] < LARGE_TOKENS else "ragged_dot at least 1"
        cells = [row["model"], row["layer"], row["tokens"], f"{row['active']} of {row['experts']}"]
        cells += [f"{us:.1f}", f"{row['limit_us']:.1f}", f"{us / row['limit_us']:.2f}", bar, *faster]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _wanted(options: argparse.Namespace) -> list[Layer]:
    return [layer for layer in LAYERS if options.models is None or layer.model in options.models]


def _measure_graphs(options: argparse.Namespace, failures: list[str]) -> tuple[dict[str, Any], list[dict]]:
    import torch  # pyright: ignore[reportMissingImports]

    from benchmarks import graph, native

    library = native.Library(options.library or native.find_library())
    graph.warm_up()
    rows = []
    for layer in _wanted(options):
        least = min(active_bytes(layer, group_sizes(layer, t), options.group_size) for t in options.tokens)
        weights = Weights(library, layer, options.dtype, options.group_size, least)
        for tokens in options.tokens:
            row = measure(weights, tokens, options.sweep, failures)
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
        del weights
        torch.cuda.empty_cache()
    return graph.device_facts(library), rows


def _measure_jax(options: argparse.Namespace) -> None:
    for layer in _wanted(options):
        for tokens in options.tokens:
            us = measure_jax(layer, tokens, options.dtype)
            print(json.dumps([layer.model, layer.layer, tokens, us]), flush=True)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("benchmarks.bench_moe", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--models", type=lambda text: text.split(","))
    parser.add_argument("--tokens", type=shapes.parse_tokens, default=TOKENS)
    parser.add_argument("--dtype", type=lambda text: shapes.parse_dtypes(text)[0], default="bfloat16")
    parser.add_argument("--group-size", type=int, default=shapes.GROUP_SIZE)
    parser.add_argument("--jax", action="store_true", help="also jax.lax.ragged_dot, dense")
    parser.add_argument("--sweep", action="store_true", help="every compiled configuration")
    parser.add_argument("--library", help="path of libw4a16.so; default: the installed package's")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--phase", choices=("jax",), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options = arguments(argv)
    if options.phase == "jax":
        _measure_jax(options)
        return 0
    rivals = {}
    if options.jax:
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        command = [sys.executable, "-m", "benchmarks.bench_moe", *argv, "--phase", "jax"]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        for line in done.stdout.splitlines():
            model, layer, tokens, us = json.loads(line)
            rivals[model, layer, tokens] = us
    failures: list[str] = []
    facts, rows = _measure_graphs(options, failures)
    for row in rows:
        row["jax_ragged_dot_us"] = rivals.get((row["model"], row["layer"], row["tokens"]))
        for name, value in row.items():
            row[name] = round(value, 3) if isinstance(value, float) else value
    if options.output.exists():
        measured = {layer.model for layer in _wanted(options)}
        known = json.loads(options.output.read_text())["rows"]
        rows = [row for row in known if row["model"] not in measured] + rows
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    header = {**facts, "date": date, "group_size": options.group_size, "protocol": timing.PROTOCOL}
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    options.output.write_text(f'{{\n "header": {json.dumps(header)},\n "rows": [\n{lines}\n ]\n}}\n')
    print(table(rows))
    for failure in failures:
        print(f"FAILED: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
