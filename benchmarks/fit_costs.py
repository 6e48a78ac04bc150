"""Fits the costs in ffi/configs.inc to a sweep and writes them there: what ffi/heuristics.cc predicts times from.

    python -m benchmarks.fit_costs [--sweep results/h200_sweep.json] [--write]

A configuration's time is modelled as start + waves * (steps * step + tile); heuristics.cc has the terms. Each
configuration is fitted alone, by least squares of the relative error with costs of at least 0. Prints how far the
choice by the fitted costs is from the best of each cell.
"""

import argparse
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np

from benchmarks import store
from benchmarks.report import geomean

CONFIGS = Path(__file__).parent.parent / "ffi" / "configs.inc"
SMS = 132
BLOCK_K = 64


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def terms(config: dict, n: int, k: int, m: int) -> np.ndarray:
    """What start, step and tile are multiplied by: the twin of Terms in heuristics.cc."""
    tiles_n = ceil_div(ceil_div(n, config["tile_n"]), config["cluster_n"]) * config["cluster_n"]
    tiles_m = ceil_div(ceil_div(m, config["tile_m"]), config["cluster_m"]) * config["cluster_m"]
    tiles = tiles_n * tiles_m
    steps = ceil_div(ceil_div(k, BLOCK_K), config["split_k"])
    if "StreamK" in config["name"] and tiles % SMS and steps > 8:
        return np.array([1, tiles / SMS * steps, tiles / SMS + 1])
    waves = ceil_div(tiles * config["split_k"], SMS)
    return np.array([1, waves * steps, waves])


def fit(rows: list[tuple[np.ndarray, float]]) -> np.ndarray:
    """Costs of at least 0 that minimise the squared relative error."""
    a = np.array([t / us for t, us in rows])
    best, best_error = np.zeros(3), math.inf
    for used in itertools.chain.from_iterable(itertools.combinations(range(3), r) for r in (1, 2, 3)):
        part, *_ = np.linalg.lstsq(a[:, used], np.ones(len(rows)), rcond=None)
        costs = np.zeros(3)
        costs[list(used)] = part
        error = float(((a @ costs - 1) ** 2).sum())
        if (costs >= 0).all() and error < best_error:
            best, best_error = costs, error
    return best


def choose(costs: dict[str, np.ndarray], configs: dict[str, dict], row: dict) -> str:
    """The configuration with the least predicted time among those that were timed."""
    timed = {**row["us"], **row["slow_us"]}
    predicted = {
        name: float(terms(configs[name], row["N"], row["K"], row["M"]) @ costs[name])
        for name in timed
        if name in costs
    }
    return min(predicted, key=predicted.__getitem__)


def write(costs: dict[str, np.ndarray], configs: dict[str, dict], path: Path = CONFIGS) -> None:
    """Replaces the last three arguments of each line of configs.inc."""
    names = iter(configs)

    def line(match: re.Match) -> str:
        name = next(names)
        if name not in costs:
            return match[0]
        start, step, tile = costs[name]
        return f"{match[1]}, {start * 1:.2f}, {step * 1e3:.1f}, {tile:.2f})"

    pattern = r"^(W4A16_\w+\([^)]*?), [\d.]+, [\d.]+, [\d.]+\)$"
    path.write_text(re.sub(pattern, line, path.read_text(), flags=re.M))


def main(argv: list[str] | None = None) -> int:
    """Fits, prints, and with --write rewrites configs.inc."""
    parser = argparse.ArgumentParser("benchmarks.fit_costs", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--sweep", type=Path, default=store.RESULTS / "h200_sweep.json")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(argv)

    from jax_w4a16 import _w4a16

    configs = {config["name"]: config for config in _w4a16.configs()}
    sweep = json.loads(options.sweep.read_text())["rows"]
    costs = {}
    for name, config in configs.items():
        rows = [
            (terms(config, row["N"], row["K"], row["M"]), row["us"][name])
            for row in sweep
            if name in row["us"]
        ]
        if len(rows) < 3:
            print(f"{name}: {len(rows)} measurements, left as it is")
            continue
        costs[name] = fit(rows)
        errors = [abs(float(t @ costs[name]) / us - 1) for t, us in rows]
        start, step, tile = costs[name]
        print(
            f"{name:48s} start {start:6.2f} us  step {step * 1e3:7.1f} ns  tile {tile:5.2f} us  "
            f"error {np.mean(errors):.1%} over {len(rows)}"
        )
    losses: dict[int, list[float]] = {}
    for row in sweep:
        if row["best"] is None:
            continue
        name = choose(costs, configs, row)
        took = row["us"].get(name, row["slow_us"].get(name))
        losses.setdefault(row["M"], []).append(took / row["us"][row["best"]])
    for m, values in sorted(losses.items()):
        print(f"M = {m:5d}: choice over best {geomean(values):.3f}, worst {max(values):.3f}")
    print(f"all: {geomean([v for values in losses.values() for v in values]):.3f}")
    if options.write:
        write(costs, configs)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
