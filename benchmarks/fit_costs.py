"""Fits the costs in ffi/configs.inc to a sweep, and writes them there for ffi/heuristics.cc.

    python -m benchmarks.fit_costs [--sweep results/h200_sweep.json ...] [--refine SEED [--lines decode,x16_]]
        [--write]

A configuration's time is modelled as start + max(load, fill) * steps * step + waves * tile; heuristics.cc
says what these are. For ragged products, whose sweep is results/h200_moe.json, waves are the tiles that so
many rows make on average, over the SMs. Each configuration is fitted alone, over all rows of whatever type,
by least squares of the relative error with costs of at least 0. --refine starts from the costs that are there
instead, and moves them at random for as long as the choice gets better. Prints how far the choice by the new
costs is from the best of each cell.
"""

import argparse
import dataclasses
import itertools
import json
import math
import random
import re
from pathlib import Path

import numpy as np

from benchmarks import store
from benchmarks.report import geomean

CONFIGS = Path(__file__).parent.parent / "ffi" / "configs.inc"
SMS = 132
BLOCK_K = 64
TAIL_TOKENS = (104, 128, 192)
LEAST_US, LEAST_LOOP = 2.2, 0.85
# A line of configs.inc: what makes its name, its costs, which alone have decimal points, and what may follow.
LINE = r"(W4A16_\w+\([^.\n]*), ([\d.]+), ([\d.]+), ([\d.]+), (\d+\.\d+)((?:, \d+)?\))"


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


POWER = 2  # of best / us, which weighs a measurement
# A configuration is fitted where it is near the best, or where it is nearest.
NEAR, FEW, NEAREST = 1.5, 8, 12
REFINE_ROUNDS, REFINE_TRIES, REFINE_LEAST, REFINE_NEAR = 30, 6, 1e-5, 1.2
REFINED = "wgmma,persistent,cutlass"
FILLS = (0.65, 0.8, 1, 1.15, 1.5, 2, 2.4)  # persistent kernels: 0, for their waves may be fractions


def terms(config: dict, fill: float, n: int, k: int, m: int, experts: int = 0) -> np.ndarray:
    """What start, step and tile are multiplied by, in groups of 128: the twin of heuristics.cc."""
    if experts:
        tiles = expected_tiles(m, experts, config["tile_m"]) * ceil_div(n, config["tile_n"]) / SMS
        return np.array([1, tiles * ceil_div(k, BLOCK_K), tiles])
    tiles_n = ceil_div(ceil_div(n, config["tile_n"]), config["cluster_n"]) * config["cluster_n"]
    tiles_m = ceil_div(ceil_div(m, config["tile_m"]), config["cluster_m"]) * config["cluster_m"]
    tiles = tiles_n * tiles_m
    steps = ceil_div(ceil_div(k, BLOCK_K), config["split_k"])
    sms = SMS * 10 // 11 if config["family"] == "decode" and config["split_k"] == 4 else SMS
    if "StreamK" in config["name"] and tiles % SMS and steps > 8:
        share = max(0.5, tiles / SMS)
        return np.array([1, share * steps, share + 1])
    if config["family"] == "persistent":
        waves = persistent_waves(config, n, m)
    else:
        waves = ceil_div(tiles * config["split_k"], sms)
        if waves > config["resident"]:
            waves = ceil_div(waves, config["resident"]) * config["resident"]
    ctas = tiles * config["split_k"]
    load = ctas / sms if config["family"] == "decode" and ctas < sms else waves
    return np.array([1, max(load, fill) * steps, waves])


def expected_tiles(m: int, experts: int, tile_m: int) -> float:
    """Tiles of tile_m rows that m rows of random experts make: the twin of ExpectedTiles in heuristics.cc."""
    mean = m / experts
    spread = math.sqrt(2 * mean)
    certain = max(0, math.floor((mean - 4 * spread) / tile_m))
    tiles = certain or 1 - math.exp(-mean)
    rows = max(certain, 1) * tile_m
    while rows < mean + 4 * spread:
        tiles += 0.5 * math.erfc((rows + 0.5 - mean) / spread)
        rows += tile_m
    return tiles * experts


def persistent_waves(config: dict, n: int, m: int) -> float:
    """Waves, in whole tiles: the twin of SchedulePersistent in gemm_persistent.h."""
    clusters = SMS // config["cluster_n"]
    tiles_m = ceil_div(m, config["tile_m"])
    all_columns = ceil_div(ceil_div(n, config["tile_n"]), config["cluster_n"])
    full, rest = divmod(all_columns * tiles_m, clusters)
    if rest == 0:
        return full
    columns = full * clusters // tiles_m
    row_blocks = config["tile_n"] // 64
    parts = []  # of the last waves: how many, and their time
    if (config["tile_n"], config["tile_m"]) == (128, 256):
        for tokens in TAIL_TOKENS:
            if tokens % (8 * config["cluster_n"]) == 0:
                parts.append(((all_columns - columns) * ceil_div(m, tokens), 0.12 + 0.88 / 256 * tokens))
    fewest = 2 if row_blocks == 4 else 3 if row_blocks == 5 else row_blocks
    for rows in range(fewest, row_blocks if config["cluster_n"] == 1 else 0):
        parts.append((ceil_div(ceil_div(n, 64) - columns * row_blocks, rows) * tiles_m, rows / row_blocks))
    idle = full * clusters - columns * tiles_m
    return min([full + 1.0] + [full + ceil_div(count - idle, clusters) * time for count, time in parts])


def fit_linear(a: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Costs of at least 0 whose products with the rows of `a` are nearest to 1, and the squared error."""
    best, best_error = np.zeros(3), math.inf
    for used in itertools.chain.from_iterable(itertools.combinations(range(3), r) for r in (1, 2, 3)):
        part, *_ = np.linalg.lstsq(weights[:, None] * a[:, used], weights, rcond=None)
        costs = np.zeros(3)
        costs[list(used)] = part
        error = float(((weights * (a @ costs - 1)) ** 2).sum())
        if (costs >= 0).all() and error < best_error:
            best, best_error = costs, error
    return best, best_error


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a line of configs.inc says of its time, start and tile in us, step in us too."""

    start: float
    step: float
    tile: float
    fill: float

    def predict(self, config: dict, n: int, k: int, m: int, experts: int = 0) -> float:
        """Microseconds."""
        once, steps, waves = terms(config, self.fill, n, k, m, experts)
        loop = steps * self.step
        us = once * self.start + loop + waves * self.tile
        evenly = experts or "StreamK" in config["name"]
        return float(us if evenly else max(us, LEAST_US + LEAST_LOOP * loop))


def load(path: Path) -> list[dict]:
    """A sweep's rows, those of ragged products named like the others."""
    rows = json.loads(path.read_text())["rows"]
    return [
        row
        if "sweep_us" not in row
        else {
            "N": row["n"],
            "K": row["k"],
            "M": row["rows"],
            "experts": row["experts"],
            "us": row["sweep_us"],
            "slow_us": {},
            "best": min(row["sweep_us"], key=row["sweep_us"].get),
        }
        for row in rows
    ]


def cell(row: dict) -> tuple[int, int, int, int]:
    """N, K, M and experts, 0 for none, of a sweep's row."""
    return row["N"], row["K"], row["M"], row.get("experts", 0)


def fit(config: dict, rows: list[tuple[tuple[int, int, int, int], float, float]]) -> Costs:
    """The costs that fit rows of (cell, us, best us) best; near the best they matter most."""
    rows = sorted(rows, key=lambda row: row[1] / row[2])
    near = [row for row in rows if row[1] <= NEAR * row[2]]
    rows = near if len(near) >= FEW else rows[:NEAREST]
    weights = np.array([(best / us) ** POWER for *_, us, best in rows])
    fits = []
    for fill in (1,) if config["ragged"] else (0,) if config["family"] == "persistent" else FILLS:
        a = np.array([terms(config, fill, *at) / us for at, us, _ in rows])
        costs, error = fit_linear(a, weights)
        start, step, tile = map(float, costs)
        fits.append((error, Costs(start, step, tile, fill)))
    return min(fits, key=lambda pair: pair[0])[1]


def choose(costs: dict[str, Costs], configs: dict[str, dict], row: dict) -> str:
    """The configuration with the least predicted time among those that were timed."""
    timed = [name for name in (*row["us"], *row["slow_us"]) if name in costs]
    return min(timed, key=lambda name: costs[name].predict(configs[name], *cell(row)))


def read(configs: dict[str, dict], path: Path = CONFIGS) -> dict[str, Costs]:
    """The costs in configs.inc."""
    lines = re.findall(rf"^{LINE}$", path.read_text(), re.M)
    return {
        name: Costs(float(start), float(step) / 1e3, float(tile), float(fill))
        for name, (_, start, step, tile, fill, _) in zip(configs, lines, strict=True)
    }


class Choices:
    """What each cell's choice takes by costs that may be moved, one configuration's at a time."""

    def __init__(self, costs: dict[str, Costs], configs: dict[str, dict], rows: list[dict]):
        self.names = [name for name in costs if any(name in row["us"] for row in rows)]
        self.rows, self.configs = rows, configs
        times = [[(row["slow_us"] | row["us"]).get(name, math.inf) for name in self.names] for row in rows]
        self.loss = np.array(times) / np.min(times, axis=1, keepdims=True)
        self.near = self.loss < REFINE_NEAR
        self.us = np.array(times)
        self.predicted = np.stack([self.predict(name, costs[name]) for name in self.names], axis=1)

    def predict(self, name: str, costs: Costs) -> np.ndarray:
        """Microseconds for each row; infinite where it was not timed."""
        us = [costs.predict(self.configs[name], *cell(row)) for row in self.rows]
        return np.where(np.isfinite(self.us[:, self.names.index(name)]), us, np.inf)

    def badness(self) -> float:
        """Mean log of the loss, more for losses beyond 3%, and a little for wrong predictions."""
        chosen = self.predicted.argmin(axis=1)
        loss = np.log(self.loss[np.arange(len(self.rows)), chosen])
        error = np.abs(np.log(self.predicted[self.near] / self.us[self.near]))
        return float(
            loss.mean() + 0.3 * np.maximum(loss - 0.03, 0).mean() + 0.02 * np.minimum(error, 0.3).mean()
        )


def refine(
    costs: dict[str, Costs],
    configs: dict[str, dict],
    rows: list[dict],
    seed: int,
    lines: str = REFINED,
) -> dict[str, Costs]:
    """Costs near the given ones by which the choice is better; those of names with none of `lines` stay."""
    generator = random.Random(seed)
    choices, costs = Choices(costs, configs, rows), dict(costs)
    best = choices.badness()
    for _ in range(REFINE_ROUNDS):
        before = best
        for name in generator.sample(choices.names, len(choices.names)):
            if not any(part in name for part in lines.split(",")):
                continue
            column = choices.names.index(name)
            for _ in range(REFINE_TRIES):
                c = costs[name]
                moved = Costs(
                    max(0.0, round(c.start + generator.gauss(0, 0.2), 2)),
                    round(c.step * math.exp(generator.gauss(0, 0.03)), 4),
                    max(0.0, round(c.tile + generator.gauss(0, 0.2), 2)),
                    c.fill,
                )
                kept = choices.predicted[:, column].copy()
                choices.predicted[:, column] = choices.predict(name, moved)
                badness = choices.badness()
                if badness < best:
                    best, costs[name] = badness, moved
                else:
                    choices.predicted[:, column] = kept
        if before - best < REFINE_LEAST:
            break
    return costs


def write(costs: dict[str, Costs], configs: dict[str, dict], path: Path = CONFIGS) -> None:
    """Replaces the costs at the end of each line of configs.inc."""
    names = iter(configs)

    def line(match: re.Match) -> str:
        name = next(names)
        if name not in costs:
            return match[0]
        c = costs[name]
        fill = f"{c.fill:.2f}".removesuffix("0")
        return f"{match[1]}, {c.start:.2f}, {c.step * 1e3:.1f}, {c.tile:.2f}, {fill}{match[6]}"

    path.write_text(re.sub(rf"^{LINE}$", line, path.read_text(), flags=re.M))


def fit_all(configs: dict[str, dict], sweep: list[dict]) -> dict[str, Costs]:
    """Each configuration's fit, printed; none where there are too few measurements."""
    costs = {}
    for name, config in configs.items():
        rows = [
            (cell(row), us, row["us"][row["best"]])
            for row in sweep
            if (us := row["us"].get(name) or row["slow_us"].get(name))
        ]
        if len(rows) < 4:
            print(f"{name}: {len(rows)} measurements, left as it is")
            continue
        c = costs[name] = fit(config, rows)
        errors = [abs(c.predict(config, *at) / us - 1) for at, us, _ in rows]
        print(
            f"{name:48s} start {c.start:6.2f} us  step {c.step * 1e3:6.1f} ns  tile {c.tile:5.2f} us  "
            f"fill {c.fill:4.1f}  error {np.mean(errors):5.1%} over {len(rows)}"
        )
    return costs


def main(argv: list[str] | None = None) -> int:
    """Fits, prints, and with --write rewrites configs.inc."""
    parser = argparse.ArgumentParser("benchmarks.fit_costs", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--sweep", type=Path, nargs="+", default=[store.RESULTS / "h200_sweep.json"])
    parser.add_argument("--refine", type=int, metavar="SEED", help="start from the costs that are there")
    parser.add_argument("--lines", default=REFINED, help="to refine: names that contain one of these")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(argv)

    from jax_w4a16._ffi import native

    configs = {config["name"]: config for config in native.configs()}
    sweep = [row for path in options.sweep for row in load(path)]
    if options.refine is None:
        costs = fit_all(configs, sweep)
    else:
        costs = refine(read(configs), configs, sweep, options.refine, options.lines)
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
