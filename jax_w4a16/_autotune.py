"""Times every configuration that can serve, on the card at hand, and stores the winners (`_tuned.py`).

The stand-alone program does the timing: it checks each result against a double-precision reference, and reads
the weight cold, over copies that exceed the L2 cache, from a CUDA graph. A configuration with a wrong result
never wins.
"""

import json
import math
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jax_w4a16 import _config, _ffi, _tuned
from jax_w4a16._progress import Progress

M = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
LLAMA_3_8B = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
_REPEATS = 15


def shapes_of_model(file: Path) -> list[tuple[int, int]]:
    """(N, K) of a decoder's linear layers, each once; q, k, v and gate, up both joined and alone.

    `file` is a Hugging Face config.json with hidden_size, intermediate_size, num_attention_heads, and, where
    they differ from the defaults, num_key_value_heads and head_dim.

    Raises:
      ValueError: it is no such file; the message names what is missing.
    """
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    content = content if isinstance(content, dict) else {}
    text = content.get("text_config")
    content = text if isinstance(text, dict) else content

    def size(name: str, default: int | None = None) -> int:
        value = default if content.get(name) is None else content[name]
        if not isinstance(value, int) or value <= 0:
            raise ValueError(f"{file}: {name}: expected a positive integer, got {value!r}")
        return value

    hidden, inner, heads = (
        size(name) for name in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    head_dim = size("head_dim", hidden // heads)
    q, kv = heads * head_dim, size("num_key_value_heads", heads) * head_dim
    layers = [(q + 2 * kv, hidden), (q, hidden), (kv, hidden), (hidden, q)]
    layers += [(2 * inner, hidden), (inner, hidden), (hidden, inner)]
    return list(dict.fromkeys(layers))


def best(rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The choice among the program's rows for one problem: the fastest that was right; None if none was."""
    rows = list(rows)
    right = [row for row in rows if row["right"] and row["us"] > 0]
    if not right:
        return None
    winner = min(right, key=lambda row: row["us"])
    heuristic = next(row for row in rows if row["selected"])
    return {
        "m": winner["M"],
        "n": winner["N"],
        "k": winner["K"],
        "group_size": winner["group_size"],
        "x_dtype": winner["dtype"],
        "out_dtype": winner["dtype"],
        "has_zeros": winner["zeros"],
        "config": winner["kernel"],
        "us": winner["us"],
        "heuristic": heuristic["kernel"],
        "heuristic_us": heuristic["us"],
    }


def _rows(command: Sequence[str]) -> Iterable[dict[str, Any]]:
    """The program's rows, as it prints them."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            yield json.loads(line)
        if process.wait() not in (0, 1):
            raise RuntimeError(f"{' '.join(command)}: {process.stderr.read().strip()}")


def measure(
    n: int, k: int, m: Sequence[int], *, dtype: str, group_size: int, zeros: bool, progress: Progress
) -> list[dict[str, Any]]:
    """The choice for each M of one weight shape. Results that were wrong are reported on standard error."""
    command = [_ffi.build_info()["program"], ",".join(map(str, m)), str(n), str(k)]
    command += ["--dtype", dtype, "--group-size", str(group_size), "--repeats", str(_REPEATS)]
    command += ["--zeros"] * zeros + ["--config", "all", "--json"]
    by_m: dict[int, list[dict[str, Any]]] = {}
    for row in _rows(command):
        if row["M"] not in by_m:
            progress.step(f"N={n} K={k} M={row['M']}")
        by_m.setdefault(row["M"], []).append(row)
        if not row["right"]:
            progress.clear()
            print(f"WRONG RESULT, not used: {row}", file=sys.stderr)
    return [choice for rows in by_m.values() if (choice := best(rows)) is not None]


def main(
    shapes: Sequence[tuple[int, int]],
    m: Sequence[int],
    *,
    dtypes: Sequence[str],
    group_size: int,
    zeros: bool,
    output: Path | None = None,
) -> int:
    """Tunes, stores after every shape, and prints what was gained; the exit status."""
    gpu = _config.local_gpu()
    if gpu is None:
        print("error: there is no CUDA device to tune for", file=sys.stderr)
        return 1
    file = output or _tuned.path(gpu.kind)
    print(f"{'N':>6} {'K':>6} {'M':>5} {'dtype':>9} {'us':>9} {'heuristic':>9}  config")
    gains, missing = [], 0
    with Progress(len(shapes) * len(m) * len(dtypes)) as progress:
        for dtype in dtypes:
            for n, k in shapes:
                options = {"dtype": dtype, "group_size": group_size, "zeros": zeros, "progress": progress}
                choices = measure(n, k, m, **options)
                missing += len(m) - len(choices)
                _tuned.save(file, gpu.kind, choices)
                progress.clear()
                for c in choices:
                    gains.append(math.log(c["heuristic_us"] / c["us"]))
                    times = f"{c['us']:9.2f} {c['heuristic_us']:9.2f}"
                    print(f"{n:6} {k:6} {c['m']:5} {dtype:>9} {times}  {c['config']}")
    if gains:
        print(f"heuristic over tuned, geometric mean: {math.exp(sum(gains) / len(gains)):.3f}")
    print(f"stored in {file}")
    return 1 if missing else 0
