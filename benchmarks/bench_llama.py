"""A Llama decoder, W4A16 against bfloat16: tokens a second, time to the first token, bytes on the GPU.

    python -m benchmarks.bench_llama [--size 8b] [--weights bf16,w4a16] [--batch 1,16] [--prefill 2048]
        [--context 128] [--steps 128] [--mesh 1,2] [--products fused|plain] [--checkpoint FOLDER]
        [--output results/llama.json]

Decoding: `--steps` tokens for each sequence of the batch in one program, after `--context` others that the
same program made.
Prefill: one prompt of `--prefill` tokens, from its tokens on the device to the first new token on the host.
W4A16 products: fused, `dot_add_norm` (on one GPU) and `dot_swiglu`, which have in them the residual sum, the
norm and SwiGLU; or plain, `dot`, which leaves these to XLA.
Each (weights, mesh) runs in a process of its own, whose memory is then free again.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import store
from benchmarks.llama_config import SIZES, Config

Row = Mapping[str, Any]

WEIGHTS = ("bf16", "w4a16")
# What W4A16 over bf16 is to reach at the size 8b on one GPU, by row.
BARS = {("decode", 1): 2.8, ("decode", 16): 2.3, ("prefill", 1): 0.95}
MESH_BAR = 1.6  # of two GPUs over one, 70b, decoding at batch 1
SAMPLES = 3
_WARM_RUNS = 2  # the first few executions record command buffers


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def check(result: tuple[Any, Any], config: Config) -> None:
    """Raises RuntimeError unless tokens are of the vocabulary and their logits finite."""
    import numpy as np

    tokens, logits = (np.asarray(array) for array in result)
    if not np.isfinite(logits).all() or tokens.min() < 0 or tokens.max() >= config.vocab:
        raise RuntimeError(f"wrong tokens: {tokens.ravel()[:8]}..., logits {logits.ravel()[:8]}...")


def seconds(run: Callable[[], Any]) -> float:
    """Median wall time of `run`, which waits for its result, after runs that do not count."""
    samples = []
    for _ in range(_WARM_RUNS + SAMPLES):
        begin = time.perf_counter()
        run()
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples[_WARM_RUNS:])


class Bench:
    """A model on the devices, and its measurements."""

    def __init__(self, options: argparse.Namespace, weights: str, ways: int):
        import jax

        from benchmarks import compile_cuda, llama, llama_attention, llama_sum, llama_weights

        self.options, self.llama = options, llama
        packed = weights == "w4a16"
        config = dataclasses.replace(
            options.config,
            packed=packed,
            packed_head=packed and not options.float_head and not options.config.tied,
            products=options.products,
            attention=options.attention,
        )
        self.mesh = llama.make_mesh(ways)
        gpu, nvcc = jax.default_backend() == "gpu", compile_cuda.find_nvcc()
        if gpu and options.decode_attention == "kernel":
            if nvcc and llama_attention.runs_on(jax.devices()[0]):
                llama_attention.prepare()
                config = dataclasses.replace(config, decode_attention="kernel")
            else:
                say("no nvcc, or no clusters: a step's attention is XLA's kernels")
        if gpu and self.mesh is not None and options.row_sum == "kernel":
            if nvcc:
                llama_sum.connect(tuple(self.mesh.devices))
                config = dataclasses.replace(config, row_sum="kernel")
            else:
                say("no nvcc: row sums are XLA's all-reduces")
        if options.checkpoint:
            tensors = llama_weights.load_tensors(options.checkpoint)
            config = llama_weights.checkpoint_config(config, tensors)
            config.check_ways(ways)
            self.state = llama_weights.checkpoint_state(config, tensors, self.mesh)
        else:
            config.check_ways(ways)
            self.state = llama_weights.random_state(config, self.mesh)
        self.config = config
        sizes = {name: leaf.nbytes for name, leaf in _named(self.state)}
        self.weight_bytes = sum(sizes.values())
        # A decoding step reads all weights but the rows of the embedding that it does not look up.
        self.read_bytes = self.weight_bytes - (0 if config.tied else sizes["embed.embedding"])
        self.facts = {"weights": weights, "mesh": ways, "weight_bytes": self.weight_bytes}
        if config.packed:
            names = ("group_size", "packed_head", "products")
            self.facts |= {name: getattr(config, name) for name in names}
        if self.mesh is not None:
            self.facts["row_sum"] = config.row_sum
        self.device = jax.devices()[0]

    def tokens(self, batch: int, length: int) -> Any:
        """A prompt."""
        import jax

        return jax.random.randint(jax.random.key(length), (batch, length), 0, self.config.vocab, "int32")

    def compile(self) -> dict[tuple, Any]:
        """All programs, side by side: (kind, batch, tokens, positions in the cache) -> program."""
        import jax
        import jax.numpy as jnp

        options, llama = self.options, self.llama
        wanted = [("prefill", 1, options.prefill, options.prefill)] if options.prefill else []
        wanted += [("decode", batch, 1, options.context + options.steps) for batch in options.batch]

        def build(key):
            kind, batch, tokens, length = key
            run = llama.prefill
            if kind == "decode":
                run = functools.partial(llama.decode, steps=options.steps)
            shape = lambda *size: jax.ShapeDtypeStruct(size, jnp.int32)
            args = (shape(batch, tokens),) if kind == "prefill" else (shape(batch), shape())
            cache = jax.eval_shape(lambda: llama.empty_cache(self.config, batch, length))
            if self.mesh is not None:
                place = llama.empty_cache(self.config, 1, 1, self.mesh)[0][0].sharding
                like = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)
                cache = jax.tree.map(like, cache)
            begin = time.perf_counter()
            built = llama.program(self.config, run, self.mesh).lower(self.state, cache, *args).compile()
            say(f"compiled {kind}, batch {batch}, in {time.perf_counter() - begin:.0f} s")
            return built

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return dict(zip(wanted, pool.map(build, wanted), strict=True))

    def measure(self) -> list[dict[str, Any]]:
        """A row for the prefill and for each batch; raises RuntimeError on wrong tokens."""
        rows = [
            self._prefill(program) if kind == "prefill" else self._decode(batch, length, program)
            for (kind, batch, _, length), program in self.compile().items()
        ]
        stats = self.device.memory_stats() or {}
        peak = stats.get("peak_bytes_in_use")
        return [self.facts | row | {"peak_bytes_device0": peak} for row in rows]

    def _prefill(self, program: Any) -> dict[str, Any]:
        import jax

        prompt = self.tokens(1, self.options.prefill)
        caches = [self.llama.empty_cache(self.config, 1, self.options.prefill, self.mesh)]

        def run():
            token, logit, cache = program(self.state, caches.pop(), prompt)
            caches.append(cache)
            return jax.device_get((token, logit))

        check(run(), self.config)
        took = seconds(run)
        say(f"prefill of {self.options.prefill}: {took * 1e3:.1f} ms")
        return {
            "kind": "prefill",
            "batch": 1,
            "tokens": self.options.prefill,
            "first_token_ms": took * 1e3,
            "tokens_per_s": self.options.prefill / took,
            "cache_bytes": _bytes(caches),
            "temporary_bytes": _temporary(program),
        }

    def _decode(self, batch: int, length: int, program: Any) -> dict[str, Any]:
        import jax
        import numpy as np

        context, steps = self.options.context, self.options.steps
        cache = self.llama.empty_cache(self.config, batch, length, self.mesh)
        token = self.tokens(batch, 1)[:, 0]
        for position in range(0, context, steps):
            tokens, logits, cache = program(self.state, cache, token, np.int32(position))
            check((tokens, logits), self.config)
            token = tokens[:, -1]
        caches, results = [cache], []

        def run():
            tokens, logits, cache = program(self.state, caches.pop(), token, np.int32(context))
            caches.append(cache)
            results.append(jax.device_get((tokens, logits)))

        run()
        check(results[0], self.config)
        took = seconds(run)
        for result in results:
            check(result, self.config)
        step = took / steps
        rate = batch / step
        cache_bytes = _bytes(caches)
        read = self.read_bytes + cache_bytes
        say(f"decode, batch {batch}: {step * 1e3:.3f} ms a step, {rate:.1f} tokens/s")
        return {
            "kind": "decode",
            "batch": batch,
            "context": context,
            "steps": steps,
            "step_ms": step * 1e3,
            "tokens_per_s": rate,
            "read_gb_per_s": read / step / 1e9,
            "cache_bytes": cache_bytes,
            "temporary_bytes": _temporary(program),
            "distinct_tokens": len(np.unique(results[0][0])),
            "repeatable": all((tokens == results[0][0]).all() for tokens, _ in results),
        }


def _named(state: Any) -> list[tuple[str, Any]]:
    import jax

    keys = lambda path: (getattr(key, "key", getattr(key, "name", "")) for key in path)
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return [(".".join(str(k) for k in keys(path) if k != "value"), leaf) for path, leaf in leaves]


def _bytes(tree: Any) -> int:
    import jax

    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _temporary(program: Any) -> int | None:
    analysis = program.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


def run_one(options: argparse.Namespace, weights: str, ways: int) -> dict[str, Any]:
    """Header and rows of one (weights, mesh), in this process."""
    from benchmarks import jit

    begin = time.perf_counter()
    bench = Bench(options, weights, ways)
    say(f"{weights} weights: {bench.weight_bytes / 1e9:.2f} GB, {time.perf_counter() - begin:.0f} s")
    rows = bench.measure()
    return {"header": jit.device_facts(), "rows": rows, "seconds": time.perf_counter() - begin}


def ratios(rows: Sequence[Row], size: str) -> list[dict[str, Any]]:
    """W4A16 over bf16 where a mesh has both, and each mesh over one GPU, with the bars to reach."""
    by = {(r["weights"], r["mesh"], r["kind"], r["batch"]): r["tokens_per_s"] for r in rows}
    found = []
    for (weights, mesh, kind, batch), rate in by.items():
        if weights == "w4a16" and (base := by.get(("bf16", mesh, kind, batch))):
            bar = BARS.get((kind, batch)) if (size, mesh) == ("8b", 1) else None
            what = f"{kind}, batch {batch}, mesh {mesh}: w4a16 over bf16"
            found.append({"what": what, "ratio": rate / base, "bar": bar})
        if mesh > 1 and (base := by.get((weights, 1, kind, batch))):
            named = (size, weights, mesh, kind, batch) == ("70b", "w4a16", 2, "decode", 1)
            what = f"{kind}, batch {batch}, {weights}: mesh {mesh} over 1"
            found.append({"what": what, "ratio": rate / base, "bar": MESH_BAR if named else None})
    return found


def show(header: Row, rows: Sequence[Row], found: Sequence[Row]) -> None:
    """The table, then the ratios beside their bars."""
    gb = lambda value: "-" if value is None else f"{value / 1e9:.2f}"
    print(
        f"{header['device']}, {header['size']}, jax {header['jax']}, products {header['products']}, "
        f"attention {header['attention']}"
    )
    print(
        f"{'weights':>8} {'mesh':>4} {'':>7} {'batch':>5} {'tokens/s':>10} {'ms':>9} {'GB/s read':>10} "
        f"{'weights GB':>10} {'cache GB':>8} {'temp GB':>8} {'peak GB':>8}"
    )
    for row in rows:
        ms = row["step_ms"] if row["kind"] == "decode" else row["first_token_ms"]
        read = f"{row['read_gb_per_s']:.0f}" if row["kind"] == "decode" else "-"
        print(
            f"{row['weights']:>8} {row['mesh']:4d} {row['kind']:>7} {row['batch']:5d} "
            f"{row['tokens_per_s']:10.1f} {ms:9.3f} {read:>10} {gb(row['weight_bytes']):>10} "
            f"{gb(row['cache_bytes']):>8} {gb(row['temporary_bytes']):>8} {gb(row['peak_bytes_device0']):>8}"
        )
        if row.get("repeatable") is False:
            print("         its runs did not all give the same tokens")
    for ratio in found:
        verdict = ""
        if ratio["bar"] is not None:
            verdict = f", to reach {ratio['bar']}: {'met' if ratio['ratio'] >= ratio['bar'] else 'MISSED'}"
        print(f"{ratio['what']}: {ratio['ratio']:.2f}x{verdict}")


def draw(header: Row, rows: Sequence[Row], path: Path) -> None:
    """Three panels of bars: decoding, time to the first token, memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "w4a16"
    runs = list(dict.fromkeys((row["weights"], row["mesh"]) for row in rows))
    names = [weights if mesh == 1 else f"{weights}\n{mesh} devices" for weights, mesh in runs]
    decode = [row for row in rows if row["kind"] == "decode"]
    prefill = [row for row in rows if row["kind"] == "prefill"]
    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.6))
    batches = sorted({row["batch"] for row in decode})
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        mine = {row["batch"]: row["tokens_per_s"] for row in decode if (row["weights"], row["mesh"]) == run}
        heights = [rate / batch for batch, rate in mine.items()]
        at = [batches.index(batch) + (i - (len(runs) - 1) / 2) * 0.8 / len(runs) for batch in mine]
        bars = panels[0].bar(at, heights, 0.8 / len(runs), label=name.replace("\n", ", "))
        panels[0].bar_label(bars, [f"{rate:.0f}" for rate in mine.values()], fontsize=7)
    panels[0].set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    panels[0].set_title("decoding, tokens/s of a sequence (above: of the batch)", fontsize=9)
    panels[0].legend(fontsize=8)
    times = {(row["weights"], row["mesh"]): row["first_token_ms"] for row in prefill}
    panels[1].bar_label(panels[1].bar(names, [times.get(run, 0) for run in runs]), fmt="%.1f", fontsize=7)
    lengths = ", ".join(sorted({str(row["tokens"]) for row in prefill}))
    panels[1].set_title(f"time to the first token after {lengths or 'no'} tokens, ms", fontsize=10)
    largest = lambda run, name: max(r[name] / 1e9 for r in rows if (r["weights"], r["mesh"]) == run)
    weights = [largest(run, "weight_bytes") for run in runs]
    caches = [largest(run, "cache_bytes") for run in runs]
    panels[2].bar_label(panels[2].bar(names, weights, label="weights"), fmt="%.1f", fontsize=7)
    panels[2].bar(names, caches, bottom=weights, label="largest cache")
    panels[2].set_title("GB, all devices together", fontsize=10)
    panels[2].legend(fontsize=8)
    for panel in panels:
        panel.margins(y=0.3)  # room for the legend
    figure.suptitle(f"{header['device']}, Llama {header['size']}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(item) for item in text.split(","))
    if min(numbers) < 1:
        raise ValueError(f"expected numbers from 1; got {text!r}")
    return numbers


def _weights(text: str) -> tuple[str, ...]:
    if set(text.split(",")) - set(WEIGHTS):
        raise ValueError(f"expected some of {WEIGHTS}; got {text!r}")
    return tuple(text.split(","))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line; `config` and `size_name` follow from it."""
    parser = argparse.ArgumentParser("benchmarks.bench_llama", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--size", default="8b", help=f"{', '.join(SIZES)}, or a Hugging Face config.json")
    parser.add_argument("--weights", type=_weights, default=WEIGHTS)
    parser.add_argument("--batch", type=_numbers, default=(1, 16))
    parser.add_argument("--prefill", type=int, default=2048, help="tokens of the prompt timed; 0: none")
    parser.add_argument("--steps", type=int, default=128, help="tokens decoded, of each sequence")
    parser.add_argument("--context", type=int, default=128, help="tokens before them, a multiple of --steps")
    parser.add_argument("--mesh", type=_numbers, default=(1,), help="numbers of devices to split over")
    parser.add_argument("--checkpoint", type=Path, help="a folder with config.json; default: random weights")
    parser.add_argument("--float-head", action="store_true", help="keep the last layer's weight in bfloat16")
    parser.add_argument(
        "--products", choices=("fused", "plain"), default="fused", help="of packed layers, the last excepted"
    )
    parser.add_argument("--attention", choices=("xla", "cudnn"), default="xla", help="of the prefill")
    parser.add_argument(
        "--decode-attention", choices=("xla", "kernel"), default="kernel", help="of a decoding step"
    )
    parser.add_argument("--row-sum", choices=("xla", "kernel"), default="kernel", help="over several GPUs")
    parser.add_argument("--output", type=Path, default=store.RESULTS / "llama.json")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # in this process
    options = parser.parse_args(argv)
    if options.steps < 1 or options.context < 0 or options.context % options.steps:
        parser.error("--context: expected a multiple of --steps, which is at least 1")
    if options.prefill < 0 or options.prefill == 1:
        parser.error("--prefill: expected 0 or at least 2")
    path = options.checkpoint / "config.json" if options.checkpoint else Path(options.size)
    try:
        named = not options.checkpoint and options.size in SIZES
        options.config = SIZES[options.size] if named else Config.from_file(path)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{path}: {error}")
    options.size_name = options.size if named else str(path.resolve().parent.name)
    return options


def _child(options: argparse.Namespace, argv: list[str], weights: str, ways: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "one.json"
        command = [sys.executable, "-m", "benchmarks.bench_llama", *argv, "--one", "--output", str(output)]
        command += ["--weights", weights, "--mesh", str(ways)]
        if options.checkpoint:  # a child runs in the repository's folder
            command += ["--checkpoint", str(options.checkpoint.resolve())]
        elif options.size not in SIZES:
            command += ["--size", str(Path(options.size).resolve())]
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ
        say(f"{options.size_name}, {weights}, mesh {ways}")
        subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], check=True)
        return json.loads(output.read_text())


def main(argv: list[str] | None = None) -> int:
    """Prints the table; exit status 1 if a figure is missed, 2 if a run failed."""
    argv = sys.argv[1:] if argv is None else argv
    options = arguments(argv)
    if options.one:
        options.output.write_text(json.dumps(run_one(options, options.weights[0], options.mesh[0])))
        return 0
    header: dict[str, Any] = {}
    rows, failed = [], False
    for ways in options.mesh:
        for weights in options.weights:
            try:
                one = _child(options, argv, weights, ways)
            except subprocess.CalledProcessError as error:
                say(f"{weights}, mesh {ways}: exit status {error.returncode}")
                failed = True
                continue
            header |= one["header"]
            rows += one["rows"]
            say(f"{weights}, mesh {ways}: {one['seconds']:.0f} s in all")
    if not rows:
        return 2
    header |= {"date": time.strftime("%Y-%m-%dT%H:%M:%S"), "size": options.size_name}
    sizes = ("hidden", "mlp", "layers", "heads", "kv_heads", "head_dim", "vocab")
    header |= {"products": options.products, "attention": options.attention}
    header |= {name: getattr(options.config, name) for name in sizes}
    header["protocol"] = (
        f"median of {SAMPLES} runs after {_WARM_RUNS + 1}; decode: {options.steps} tokens in one program "
        f"after {options.context} others; prefill: from tokens on the device to the first token on the "
        "host"
    )
    found = ratios(rows, options.size_name)
    show(header, rows, found)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    content = {"header": header, "rows": rows, "ratios": found}
    options.output.write_text(json.dumps(content, indent=1) + "\n")
    try:
        draw(header, rows, options.output.with_suffix(".svg"))
    except ImportError:
        say("no plot: matplotlib is not installed")
    missed = any(ratio["bar"] is not None and ratio["ratio"] < ratio["bar"] for ratio in found)
    return 2 if failed else int(missed)


if __name__ == "__main__":
    sys.exit(main())
