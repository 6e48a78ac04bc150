"""The results file: a header and one row a cell, saved whole after every few columns."""

import json
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.shapes import Cell

GRAPH_COLUMNS = ("us", "floor_us", "dense_us", "tinygemm_us")
JIT_COLUMNS = ("jit_us", "jit_dense_us", "jit_xla_us")
COLUMNS = GRAPH_COLUMNS + JIT_COLUMNS
TINYGEMM_MAX_M = 256

RESULTS = Path(__file__).parent / "results"
_SAVE_EVERY_S = 5.0


def applicable(column: str, cell: Cell) -> bool:
    """Whether a column exists for a cell: tinygemm takes bfloat16 only, and is no rival for large M."""
    return column != "tinygemm_us" or (cell.dtype == "bfloat16" and cell.m <= TINYGEMM_MAX_M)


class Store:
    """Rows by cell. A row is {device, N, K, M, dtype, group_size, zeros, kernel, <columns>}; a column
    that was not measured is null."""

    def __init__(self, path: Path, *, resume: bool):
        self.path = path
        self.header: dict[str, Any] = {}
        self._rows: dict[Cell, dict[str, Any]] = {}
        self._saved = 0.0
        if resume and path.exists():
            content = json.loads(path.read_text())
            self.header = content["header"]
            for row in content["rows"]:
                cell = Cell(row["N"], row["K"], row["M"], row["dtype"], row["group_size"], row["zeros"])
                self._rows[cell] = row

    def describe(self, facts: dict[str, Any]) -> None:
        """Adds to the header. Raises ValueError where a resumed file came from something else."""
        for name, value in facts.items():
            known = self.header.get(name)
            if known is not None and known != value and name not in ("date", "xla_flags"):
                raise ValueError(
                    f"{self.path} was measured with {name} {known!r}, this run has {value!r}: "
                    "measure again without --resume"
                )
            self.header[name] = value

    def missing(self, cell: Cell, column: str) -> bool:
        """Whether a column that exists for a cell has no figure yet."""
        return applicable(column, cell) and self._rows.get(cell, {}).get(column) is None

    def update(self, cell: Cell, **values: Any) -> None:
        """Sets columns of a cell's row."""
        row = self._rows.setdefault(
            cell,
            {
                "device": self.header.get("device"),
                "N": cell.n,
                "K": cell.k,
                "M": cell.m,
                "dtype": cell.dtype,
                "group_size": cell.group_size,
                "zeros": cell.zeros,
                "kernel": None,
                **dict.fromkeys(COLUMNS),
            },
        )
        for name, value in values.items():
            row[name] = round(value, 3) if isinstance(value, float) else value
        if time.monotonic() - self._saved > _SAVE_EVERY_S:
            self.save()

    def fail(self, cell: Cell, column: str, why: str) -> None:
        """Records why a column of a cell has no figure."""
        failures = self.header.setdefault("failures", [])
        failures.append({"cell": list(cell), "column": column, "why": why})

    def rows(self) -> list[dict[str, Any]]:
        """All rows, in the order they were first set."""
        return list(self._rows.values())

    def save(self) -> None:
        """Writes the file whole, so that a reader never sees half of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join("  " + json.dumps(row) for row in self._rows.values())
        header = json.dumps(self.header, indent=2).replace("\n", "\n ")
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(f'{{\n "header": {header},\n "rows": [\n{lines}\n ]\n}}\n')
        os.replace(temporary, self.path)
        self._saved = time.monotonic()
