"""Times w4a16_dot beside its limit and its rivals, and writes results/h200.json.

    python -m benchmarks.bench_dot [--shapes 4096x4096,...] [--m 1,16,...] [--dtype fp16,bf16]
        [--columns us,floor_us,...] [--time-budget SECONDS] [--resume] [--smoke] [--dry-run]

Graph columns run in one child process (torch, or the program `w4a16` where there is no torch), then
jit columns in another (JAX), so that neither measures the other. Results are saved as they come;
what the time budget leaves out stays null, is counted at the end, and `--resume` fills it in.
Exit status 0: everything asked for was measured; 1: something failed or was left out.
"""

import argparse
import datetime
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import report, shapes, store, timing
from benchmarks.progress import Progress
from benchmarks.store import Store


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with shapes, tokens and dtypes parsed."""
    parser = argparse.ArgumentParser("benchmarks.bench_dot", description=(__doc__ or "").split("\n", 1)[0])
    add_cells(parser)
    parser.add_argument("--columns", type=lambda text: tuple(text.split(",")), default=store.COLUMNS)
    parser.add_argument("--output", type=Path, help="default: results/h200.json")
    parser.add_argument("--time-budget", type=float, default=360.0, help="seconds for all of it")
    parser.add_argument("--resume", action="store_true", help="measure only what is missing")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--library", help="path of libw4a16.so; default: the installed package's")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if unknown := set(options.columns) - set(store.COLUMNS):
        parser.error(f"--columns: unknown {sorted(unknown)}; expected some of {store.COLUMNS}")
    if options.zeros:
        options.columns = tuple(_columns(options, store.GRAPH_COLUMNS))
    if options.output is None:
        options.output = store.RESULTS / ("smoke.json" if options.smoke else "h200.json")
    return options


def add_cells(parser: argparse.ArgumentParser) -> None:
    """The options that say which cells to measure."""
    parser.add_argument("--shapes", type=shapes.parse_shapes, help="NxK,NxK")
    parser.add_argument("--m", type=shapes.parse_tokens, help="numbers of tokens")
    parser.add_argument("--dtype", type=shapes.parse_dtypes, default=shapes.DTYPES)
    parser.add_argument("--group-size", type=int, default=shapes.GROUP_SIZE)
    parser.add_argument("--zeros", action="store_true", help="with zero points (graph columns)")
    parser.add_argument("--smoke", action="store_true", help="two small shapes: does it run?")


def cells(options: argparse.Namespace) -> list[shapes.Cell]:
    """The cells that the options ask for."""
    return shapes.cells(
        options.shapes or (shapes.SMOKE_SHAPES if options.smoke else shapes.SHAPES),
        options.m or (shapes.SMOKE_TOKENS if options.smoke else shapes.TOKENS),
        options.dtype,
        options.group_size,
        options.zeros,
    )


def _columns(options: argparse.Namespace, of: tuple[str, ...]) -> list[str]:
    return [column for column in of if column in options.columns]


def _out_of_time(options: argparse.Namespace) -> Callable[[], bool]:
    return lambda: time.time() > options.deadline


def _facts() -> dict[str, object]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)
        version = driver.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        version = None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "driver": version,
        "python": sys.version.split()[0],
        "protocol": timing.PROTOCOL,
    }


def _measure_graph(results: Store, options: argparse.Namespace) -> None:
    from benchmarks import graph, native

    library = native.Library(options.library or native.find_library())
    results.describe(graph.device_facts(library))
    columns = _columns(options, store.GRAPH_COLUMNS)
    graph.measure(results, library, cells(options), columns, _out_of_time(options))


def _measure_native(results: Store, options: argparse.Namespace) -> None:
    """The kernel's own column by the stand-alone program, where there is no torch."""
    import jax_w4a16

    program = jax_w4a16.build_info()["program"]
    todo = [cell for cell in cells(options) if results.missing(cell, "us")]
    progress = Progress(len(todo), "native")
    for cell in todo if "us" in options.columns else []:
        if _out_of_time(options)():
            break
        command = [program, str(cell.m), str(cell.n), str(cell.k), "--json"]
        command += ["--group-size", str(cell.group_size), "--dtype", cell.dtype]
        command += ["--zeros"] if cell.zeros else []
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            results.fail(cell, "us", done.stderr.strip() or done.stdout.strip())
        else:
            answer = json.loads(done.stdout)
            results.describe({"device": answer["device"]})
            results.update(cell, us=answer["us"], kernel=answer["kernel"])
        progress.step(f"{cell.n}x{cell.k} {cell.dtype} M={cell.m}")


def _measure_jit(results: Store, options: argparse.Namespace) -> None:
    from benchmarks import jit

    results.describe(jit.device_facts())
    columns = _columns(options, store.JIT_COLUMNS)
    jit.measure(results, cells(options), columns, _out_of_time(options))


PHASES = {"graph": _measure_graph, "native": _measure_native, "jit": _measure_jit}


def _run_phase(options: argparse.Namespace) -> None:
    results = Store(options.output, resume=True)
    begin = time.monotonic()
    try:
        PHASES[options.phase](results, options)
    finally:
        seconds = results.header.setdefault("seconds", {})
        seconds[options.phase] = round(seconds.get(options.phase, 0) + time.monotonic() - begin, 1)
        results.save()


def run_phase(phase: str, argv: list[str], output: Path, deadline: float) -> int:
    """Runs one phase in a process of its own; its exit status."""
    # The two frameworks must not share the card's memory unasked.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-m", "benchmarks.bench_dot", *argv]
    command += ["--phase", phase, "--deadline", str(deadline), "--output", str(output.resolve())]
    return subprocess.run(command, env=environment, cwd=Path(__file__).parents[1]).returncode


def _plan(options: argparse.Namespace) -> None:
    todo = cells(options)
    print(f"{len(todo)} cells; columns {', '.join(options.columns)}; output {options.output}")
    print(f"{'shape':>12} {'M':>5} {'dtype':>9} {'copies':>7} {'calls':>6} {'chain':>6} {'at least us':>12}")
    for cell in todo:
        size = shapes.weight_bytes(cell.n, cell.k, cell.group_size, cell.zeros)
        us = max(size / 4.5e6, shapes.compute_us(cell.m, cell.n, cell.k)) + 2
        copies = timing.plan_copies(size)
        print(
            f"{cell.n}x{cell.k}".rjust(12),
            f"{cell.m:5d} {cell.dtype:>9} {copies:7d} {timing.plan_calls(us, copies):6d} "
            f"{timing.plan_chain(us + 3):6d} {us:12.1f}",
        )


def _summary(options: argparse.Namespace, statuses: dict[str, int]) -> int:
    results = Store(options.output, resume=True)
    report.print_summary(results.header, results.rows(), report.Rivals(store.RESULTS / report.RIVALS))
    left = {
        column: sum(results.missing(cell, column) for cell in cells(options)) for column in options.columns
    }
    left = {column: count for column, count in left.items() if count}
    for column, count in left.items():
        print(f"NOT MEASURED: {column} in {count} cells; --resume fills it in")
    failures = results.header.get("failures", [])
    for failure in failures[:20]:
        print(f"FAILED: {failure['column']} {failure['cell']}: {failure['why']}")
    if len(failures) > 20:
        print(f"... and {len(failures) - 20} more failures, in {options.output}")
    for phase, status in statuses.items():
        if status != 0:
            print(f"FAILED: the {phase} phase ended with status {status}")
    return 1 if left or failures or any(statuses.values()) else 0


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options = arguments(argv)
    if options.phase:
        _run_phase(options)
        return 0
    if options.dry_run:
        _plan(options)
        return 0
    deadline = time.time() + options.time_budget
    results = Store(options.output, resume=options.resume)
    results.describe(_facts())
    results.header["failures"] = []
    results.save()
    statuses = {}
    if _columns(options, store.GRAPH_COLUMNS):
        phase = "graph" if importlib.util.find_spec("torch") else "native"
        statuses[phase] = run_phase(phase, argv, options.output, deadline)
    if _columns(options, store.JIT_COLUMNS):
        statuses["jit"] = run_phase("jit", argv, options.output, deadline)
    return _summary(options, statuses)


if __name__ == "__main__":
    sys.exit(main())
