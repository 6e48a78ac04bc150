"""Times every compiled configuration on every cell: what the heuristics are written from.

    python -m benchmarks.sweep_configs [--shapes ...] [--m ...] [--dtype ...] [--configs decode,wgmma]
        [--time-budget SECONDS] [--resume]

Needs torch. Writes results/h200_sweep.json: a row a cell, {N, K, M, dtype, group_size, zeros,
floor_us, selected, best, us: {config: time}, slow_us: {config: rough time}, failed: {config: why}}.
A configuration whose rough time is far from the best is not timed precisely: it is in slow_us.
"""

import argparse
import collections
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import bench_dot, native, shapes, store, timing
from benchmarks.progress import Progress
from benchmarks.report import geomean
from benchmarks.shapes import Cell

# A rough time includes a launch, so it tells little below this many microseconds.
LAUNCH_US = 15.0
FAR = 2.0


def hopeless(rough_us: float, best_rough_us: float) -> bool:
    """Whether a configuration is too slow, by its rough time, to be worth a precise one."""
    return rough_us > FAR * best_rough_us + LAUNCH_US


def _sweep_cell(layer: Any, cell: Cell, device: native.Device, configs: list[str]) -> dict:
    import torch  # pyright: ignore[reportMissingImports]

    from benchmarks import graph

    problem = layer.problem(cell.m)
    x = layer.activations(cell.m)
    out = torch.empty((cell.m, cell.n), dtype=layer.torch_dtype, device=graph.DEVICE)
    check = graph.Check(layer, x)
    rough_us, calls, failed = {}, {}, {}
    for config in configs:
        if layer.library.refusal(problem, device, config) is not None:
            continue
        try:
            calls[config] = graph.checked_kernel(layer, x, out, check, config, device)
        except (graph.WrongResult, native.NativeError) as error:
            failed[config] = str(error)
            continue
        rough_us[config] = timing.eager_us(calls[config], 1, calls=2)
        if not hopeless(rough_us[config], 2 * min(rough_us.values())):
            rough_us[config] = timing.eager_us(calls[config], len(layer.packed))
    del check
    best_rough_us = min(rough_us.values(), default=math.inf)
    slow_us = {
        config: round(rough, 1) for config, rough in rough_us.items() if hopeless(rough, best_rough_us)
    }
    graphs = {
        config: timing.Graph(calls[config], len(layer.packed)) for config in rough_us if config not in slow_us
    }
    timed = timing.time_graphs(graphs) if graphs else {}
    us = {config: round(each, 3) for config, each in timed.items()}
    return {
        "selected": layer.library.select(problem, device),
        "best": min(us, key=us.__getitem__, default=None),
        "us": dict(sorted(us.items(), key=lambda item: item[1])),
        "slow_us": slow_us,
        "failed": failed,
    }


def loss(row: dict) -> float | None:
    """Time of the selected configuration over the best's; a rough time where that is all there is."""
    chosen = row["us"].get(row["selected"], row["slow_us"].get(row["selected"]))
    return None if chosen is None or row["best"] is None else chosen / row["us"][row["best"]]


def print_summary(rows: list[dict]) -> None:
    """What the selection loses, and which configuration wins how often, by M."""
    for dtype in sorted({row["dtype"] for row in rows}):
        print(f"\n{dtype}\n{'M':>6} {'loss':>6} {'worst':>6} {'best/limit':>10}  best configurations")
        mine = [row for row in rows if row["dtype"] == dtype]
        for m in sorted({row["M"] for row in mine}):
            at = [row for row in mine if row["M"] == m and row["best"] is not None]
            losses = [value for row in at if (value := loss(row)) is not None]
            limits = [
                row["us"][row["best"]] / shapes.limit_us(row["floor_us"], m, row["N"], row["K"]) for row in at
            ]
            winners = collections.Counter(row["best"] for row in at).most_common(4)
            print(
                f"{m:6d} {geomean(losses) or math.nan:6.3f} {max(losses, default=math.nan):6.3f} "
                f"{geomean(limits) or math.nan:10.3f}  "
                + ", ".join(f"{name} ({count})" for name, count in winners)
            )
    losses = [value for row in rows if (value := loss(row)) is not None]
    print(f"\nselection over best: geometric mean {geomean(losses) or math.nan:.3f}")
    for row in rows:
        for config, why in row["failed"].items():
            print(f"FAILED: {config} {row['N']}x{row['K']} M={row['M']} {row['dtype']}: {why}")


def _save(path: Path, header: dict, rows: dict[Cell, dict]) -> None:
    lines = ",\n".join("  " + json.dumps(row) for row in rows.values())
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f'{{\n "header": {json.dumps(header)},\n "rows": [\n{lines}\n ]\n}}\n')
    os.replace(temporary, path)


def main(argv: list[str] | None = None) -> int:
    """Runs the sweep; its exit status: 1 if a result was wrong or cells are left."""
    parser = argparse.ArgumentParser(
        "benchmarks.sweep_configs", description=(__doc__ or "").split("\n", 1)[0]
    )
    bench_dot.add_cells(parser)
    parser.add_argument("--configs", default="", help="only names that contain one of these, by commas")
    parser.add_argument("--time-budget", type=float, default=540.0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--library", help="path of libw4a16.so; default: the installed package's")
    parser.add_argument("--output", type=Path, default=store.RESULTS / "h200_sweep.json")
    options = parser.parse_args(argv)
    begin = time.monotonic()

    from benchmarks import graph

    library = native.Library(options.library or native.find_library())
    parts = options.configs.split(",")
    configs = [name for name in library.config_names() if any(part in name for part in parts)]
    header = graph.device_facts(library) | {"configs": configs, "protocol": timing.PROTOCOL}
    rows: dict[Cell, dict] = {}
    if options.resume and options.output.exists():
        for row in json.loads(options.output.read_text())["rows"]:
            key = (row["N"], row["K"], row["M"], row["dtype"], row["group_size"], row["zeros"])
            rows[Cell(*key)] = row
    options.output.parent.mkdir(parents=True, exist_ok=True)

    device = library.current_device()
    graph.warm_up()
    todo = [cell for cell in bench_dot.cells(options) if cell not in rows]
    progress = Progress(len(todo), "sweep")
    left = len(todo)
    for layer, cell in graph.layers(library, todo):
        if time.monotonic() - begin > options.time_budget:
            break
        rows[cell] = {
            "N": cell.n,
            "K": cell.k,
            "M": cell.m,
            "dtype": cell.dtype,
            "group_size": cell.group_size,
            "zeros": cell.zeros,
            "floor_us": round(timing.time_graphs({"floor": layer.floor()})["floor"], 3),
            **_sweep_cell(layer, cell, device, configs),
        }
        left -= 1
        _save(options.output, header, rows)
        progress.step(f"{cell.n}x{cell.k} {cell.dtype} M={cell.m}: {rows[cell]['best']}")
    print_summary(list(rows.values()))
    if left:
        print(f"NOT MEASURED: {left} cells; --resume fills them in")
    return 1 if left or any(row["failed"] for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
