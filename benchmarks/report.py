"""Tables and plots from a results file, and the README's part that shows them.

python -m benchmarks.report [results/h200.json] [--readme README.md] [--no-plots]
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import store
from benchmarks.shapes import limit_us, weight_bytes

Row = Mapping[str, Any]

BEGIN = "<!-- results -->"
END = "<!-- /results -->"
SPEEDUP_PLOT = "speedup.svg"
LIMIT_PLOT = "limit.svg"
RIVALS = "h200_rivals.json"
LARGE_M = 512  # from here on the measure is dense_us / us


def target(m: int) -> float:
    """The figure to reach at M: an upper bound of us/limit, or from M = 512 a lower bound of dense/us."""
    bounds = {8: 1.20, 16: 1.25, 32: 1.40, 64: 1.50, 128: 1.30, 256: 1.15}
    return next((bound for most, bound in bounds.items() if m <= most), 1.0)


def worst_target(m: int) -> float | None:
    """The same for the worst shape; None where there is none."""
    return 1.35 if m <= 8 else 0.97 if m >= LARGE_M else None


class Rivals:
    """What the fastest other library took on such a card, in the same protocol: results/h200_rivals.json.

    Cells are compared by ratio to the read floor or, from M = 128, to dense cuBLAS, each as measured beside
    it, so that two cards can be compared.
    """

    def __init__(self, path: Path):
        self.rows: dict[tuple, Row] = {}
        if path.exists():
            rows = json.loads(path.read_text())["rows"]
            self.rows = {(row["N"], row["K"], row["M"]): row for row in rows}

    def limit_ratio(self, row: Row) -> float | None:
        """best_us / limit in the rivals' own run, which was in float16."""
        rival = self.rows.get((row["N"], row["K"], row["M"]))
        if rival is None or row["dtype"] != "float16":
            return None
        return rival["best_us"] / limit_us(rival["floor_us"], row["M"], row["N"], row["K"])

    def lead(self, row: Row) -> float | None:
        """How many times as fast as the best rival; None where either was not measured."""
        rival = self.rows.get((row["N"], row["K"], row["M"]))
        by = "floor_us" if row["M"] <= 64 else "dense_us"
        ours = ratio("us", by)(row)
        return None if rival is None or ours is None else rival["best_us"] / rival[by] / ours


def geomean(values: Iterable[float]) -> float | None:
    """Geometric mean, or None of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def ratio(column: str, by: str) -> Callable[[Row], float | None]:
    """row[column] / row[by], or None where one was not measured; `limit` counts as a column."""

    def value(row: Row, name: str) -> float | None:
        if name != "limit":
            return row[name]
        floor = row["floor_us"]
        return None if floor is None else limit_us(floor, row["M"], row["N"], row["K"])

    def compute(row: Row) -> float | None:
        above, below = value(row, column), value(row, by)
        return None if above is None or below is None else above / below

    return compute


def values(rows: Iterable[Row], measure: Callable[[Row], float | None]) -> list[float]:
    """The measure of the rows that have it."""
    return [value for row in rows if (value := measure(row)) is not None]


def ideal_speedup(row: Row) -> float | None:
    """Over dense, of kernels that both reach the limit: the ratio of bytes, then 1."""
    if row["floor_us"] is None:
        return None
    packed = weight_bytes(row["N"], row["K"], row["group_size"], row["zeros"])
    dense_floor_us = row["floor_us"] * 2 * row["N"] * row["K"] / packed
    shape = (row["M"], row["N"], row["K"])
    return limit_us(dense_floor_us, *shape) / limit_us(row["floor_us"], *shape)


def _tokens(rows: Sequence[Row]) -> list[int]:
    return sorted({row["M"] for row in rows})


def _dtypes(rows: Sequence[Row]) -> list[str]:
    return sorted({row["dtype"] for row in rows}, reverse=True)


def _text(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _mean_of_all(rows: Sequence[Row], measure: Callable[[Row], float | None]) -> str:
    """The geometric mean; empty where a row was not measured: fewer shapes would mean something else."""
    found = values(rows, measure)
    return _text(geomean(found)) if len(found) == len(rows) else ""


def _within(m: int, value: float | None, bound: float | None) -> bool:
    if bound is None:
        return True
    return value is not None and (value <= bound if m < LARGE_M else value >= bound)


def print_summary(header: Mapping[str, Any], rows: Sequence[Row], rivals: Rivals) -> None:
    """Geometric means over the shapes against the figures to reach."""
    facts = ("device", "library", "jax", "torch", "driver", "date")
    print("  ".join(f"{name} {header[name]}" for name in facts if header.get(name)))
    titles = ("us/limit", "worst", "to reach", "", "dense/us", "least", "rival/limit", "ahead in", "tiny/us",
              "jit/us", "jit_dense/jit", "jit_xla/jit")  # fmt: skip
    for dtype in _dtypes(rows):
        mine = [row for row in rows if row["dtype"] == dtype]
        print(f"\n{dtype}: geometric means over {len({(r['N'], r['K']) for r in mine})} shapes")
        print(f"{'M':>6} " + " ".join(f"{title:>13}" for title in titles))
        for m in _tokens(mine):
            at = [row for row in mine if row["M"] == m]
            limits = values(at, ratio("us", "limit"))
            speedups = values(at, ratio("dense_us", "us"))
            judged = geomean(limits if m < LARGE_M else speedups)
            bound = target(m)
            worst = max(limits, default=None) if m < LARGE_M else min(speedups, default=None)
            met = _within(m, judged, bound) and _within(m, worst, worst_target(m))
            leads = values(at, rivals.lead)
            ahead = sum(lead >= 1 for lead in leads)
            fields = [
                _text(geomean(limits)),
                _text(max(limits, default=None)),
                ("<= " if m < LARGE_M else "dense >= ") + _text(bound),
                "" if judged is None else "met" if met else "MISSED",
                _text(geomean(speedups)),
                _text(min(speedups, default=None)),
                _text(geomean(values(at, rivals.limit_ratio))),
                f"{ahead} of {len(leads)}" if leads else "",
                _mean_of_all(at, ratio("tinygemm_us", "us")),
                _mean_of_all(at, ratio("jit_us", "us")),
                _mean_of_all(at, ratio("jit_dense_us", "jit_us")),
                _mean_of_all(at, ratio("jit_xla_us", "jit_us")),
            ]
            print(f"{m:6d} " + " ".join(f"{field:>13}" for field in fields))
        behind = [
            f"{row['N']}x{row['K']} M={row['M']} {lead:.2f}"
            for row in mine
            if (lead := rivals.lead(row)) is not None and lead < 1
        ]
        print(f"behind the best rival in {len(behind)} of {len(values(mine, rivals.lead))} cells: ", end="")
        print(", ".join(behind) or "-")


def markdown(header: Mapping[str, Any], rows: Sequence[Row], rivals: Rivals, plots: str) -> str:
    """The README's part: the table and the plots, which lie in the folder `plots`."""
    columns = (
        ("time / limit", ratio("us", "limit")),
        ("the best rival's", rivals.limit_ratio),
        ("faster than dense cuBLAS", ratio("dense_us", "us")),
        ("than tinygemm", ratio("tinygemm_us", "us")),
        ("under jit: than `jnp.dot`", ratio("jit_dense_us", "jit_us")),
        ("than XLA's int4", ratio("jit_xla_us", "jit_us")),
    )
    dtypes = _dtypes(rows)
    titles = [f"{title}, {dtype}" for title, _ in columns for dtype in dtypes]
    table = []
    for m in _tokens(rows):
        cells = [
            _mean_of_all([r for r in rows if r["M"] == m and r["dtype"] == dtype], measure)
            for _, measure in columns
            for dtype in dtypes
        ]
        table.append([str(m), *cells])
    kept = [0] + [i for i in range(1, len(titles) + 1) if any(line[i] for line in table)]
    lines = [
        "| " + " | ".join(["M", *titles][i] for i in kept) + " |",
        "|" + "---:|" * len(kept),
        *("| " + " | ".join(line[i] or "-" for i in kept) + " |" for line in table),
    ]
    shapes = len({(row["N"], row["K"]) for row in rows})
    versions = ", ".join(
        f"{title} {header[name]}"
        for name, title in (("library", "version"), ("jax", "jax"), ("torch", "torch"), ("driver", "driver"))
        if header.get(name)
    )
    groups = ", ".join(str(g) for g in sorted({row["group_size"] for row in rows}))
    return "\n".join(
        [
            f"{header.get('device')}, {versions}, {str(header.get('date'))[:10]}; group size {groups}; "
            f"geometric means over {shapes} weight shapes of Llama-3 8B and 70B; weights cold. Limit: the "
            "larger of reading the packed weight once and 2MNK operations at 790 TFLOP/s.",
            "",
            *lines,
            "",
            f"![Speed-up over dense cuBLAS]({plots}/{SPEEDUP_PLOT})",
            f"![Share of the limit]({plots}/{LIMIT_PLOT})",
        ]
    )


def replace_part(text: str, part: str) -> str:
    """`text` with what stands between the markers replaced; raises ValueError without them."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"expected the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{part}\n{END}{after}"


def _lines(rows: Sequence[Row], measure: Callable[[Row], float | None]) -> dict[str, tuple[list, list]]:
    """Points of each shape and, under "", of their geometric mean."""
    keys = {f"{row['N']}x{row['K']}": (row["N"], row["K"]) for row in rows}
    lines: dict[str, tuple[list, list]] = {}
    for name, key in keys.items():
        mine = sorted((row for row in rows if (row["N"], row["K"]) == key), key=lambda row: row["M"])
        points = [(row["M"], value) for row in mine if (value := measure(row)) is not None]
        lines[name] = ([m for m, _ in points], [value for _, value in points])
    means = [(m, geomean(values((row for row in rows if row["M"] == m), measure))) for m in _tokens(rows)]
    means = [(m, mean) for m, mean in means if mean is not None]
    lines[""] = ([m for m, _ in means], [mean for _, mean in means])
    return lines


def draw(header: Mapping[str, Any], rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes both plots into `folder`; a panel for each dtype, a thin line for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "w4a16"

    def share(row: Row) -> float | None:
        inverse = ratio("limit", "us")(row)
        return None if inverse is None else 100 * inverse

    plots = (
        (SPEEDUP_PLOT, "speed-up over dense cuBLAS", ratio("dense_us", "us"), ideal_speedup),
        (LIMIT_PLOT, "share of the limit, %", share, lambda row: 100.0),
    )
    dtypes, paths = _dtypes(rows), []
    for name, title, measure, ideal in plots:
        figure, panels = pyplot.subplots(
            1, len(dtypes), figsize=(5.2 * len(dtypes), 3.8), sharey=True, squeeze=False
        )
        for panel, dtype in zip(panels[0], dtypes, strict=True):
            mine = [row for row in rows if row["dtype"] == dtype]
            for shape, (xs, ys) in _lines(mine, measure).items():
                if shape:
                    panel.plot(xs, ys, linewidth=0.8, alpha=0.7, label=shape)
                else:
                    panel.plot(xs, ys, linewidth=2.6, color="black", label="geometric mean")
            panel.plot(*_lines(mine, ideal)[""], "--", color="grey", label="ideal")
            panel.set_xscale("log", base=2)
            panel.set_xticks(_tokens(rows), [str(m) for m in _tokens(rows)], rotation=45, fontsize=8)
            panel.set_xlabel("M, tokens")
            panel.set_title(dtype, fontsize=10)
            panel.grid(linewidth=0.3)
            panel.set_ylim(bottom=0)
        panels[0][0].set_ylabel(title)
        panels[0][-1].legend(
            fontsize=7, title="N x K", title_fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5)
        )
        figure.suptitle(f"{header.get('device')}, {title}", fontsize=11)
        figure.tight_layout()
        path = folder / name
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
        paths.append(path)
    return paths


def main(argv: list[str] | None = None) -> int:
    """Prints the summary, draws the plots, rewrites the README's part."""
    parser = argparse.ArgumentParser("benchmarks.report", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("results", nargs="?", type=Path, default=store.RESULTS / "h200.json")
    parser.add_argument("--readme", type=Path, help="default: the repository's")
    parser.add_argument("--no-plots", action="store_true")
    options = parser.parse_args(argv)
    root = Path(__file__).resolve().parents[1]
    readme = options.readme or root / "README.md"
    content = json.loads(options.results.read_text())
    header, rows = content["header"], content["rows"]
    folder = options.results.resolve().parent
    rivals = Rivals(folder / RIVALS)
    print_summary(header, rows, rivals)
    if not options.no_plots:
        for path in draw(header, rows, folder):
            print(f"wrote {path}")
    try:
        plots = folder.relative_to(readme.resolve().parent).as_posix()
        readme.write_text(replace_part(readme.read_text(), markdown(header, rows, rivals, plots)))
    except (OSError, ValueError) as error:
        print(f"{readme} is unchanged: {error}", file=sys.stderr)
        return 1
    print(f"wrote {readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
