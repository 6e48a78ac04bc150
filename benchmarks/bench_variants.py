"""What the variants of a product cost over symmetric float16 weights in groups of 128.

    python -m benchmarks.bench_variants [--shapes ...] [--m ...]

Needs torch; the protocol is bench_dot's graph column. A second table has sizes that are no multiples of
the tiles, beside the next multiples of 256, a third numbers of tokens beside the next power of two. Writes
results/h200_variants.json.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import native, shapes, store, timing
from benchmarks.progress import Progress
from benchmarks.report import geomean

# Name: (dtype, group size or -1, zeros, what else), and the most it may cost (None: no bound).
VARIANTS = {
    "float16, group 128": (("float16", 128, False, None), None),
    "bfloat16": (("bfloat16", 128, False, None), 1.05),
    "zeros": (("float16", 128, True, None), 1.05),
    "bfloat16, zeros": (("bfloat16", 128, True, None), 1.05),
    "group 32": (("float16", 32, False, None), 1.12),
    "group 64": (("float16", 64, False, None), 1.05),
    "group 256": (("float16", 256, False, None), 1.05),
    "per column": (("float16", -1, False, None), 1.05),
    "bias": (("float16", 128, False, "bias"), 1.02),
    "batch invariant": (("float16", 128, False, "batch invariant"), None),
    "dot_add_norm": (("float16", 128, False, "add_norm"), None),
    "dot_swiglu": (("float16", 128, False, "swiglu"), None),
}
MOST_FUSED_ROWS = 16  # of an epilogue's kernels
SHAPES = "4096x4096,28672x4096,8192x8192"
TOKENS = "1,16,64,256,2048"
ODD_SHAPES = (
    (576, 2112),
    (1408, 2112),
    (2112, 1408),
    (11008, 4096),
    (4096, 11008),
    (18944, 3584),
    (3584, 18944),
)
ODD_BOUND = 1.15
ODD_MULTIPLE = 256
ODD_TOKENS = (3, 11, 20, 40, 72, 100, 150, 200, 300, 520, 1100)
ODD_TOKENS_BOUND = 1.05


def _graph(library: Any, n: int, k: int, m: int, variant: tuple) -> Any:
    """A graph of checked calls, or None where nothing serves."""
    import torch  # pyright: ignore[reportMissingImports]

    from benchmarks import graph

    dtype, group_size, zeros, more = variant
    epilogue = more if more in native.EPILOGUES else None
    if epilogue is not None and m > MOST_FUSED_ROWS:
        return None
    layer = graph.Layer(library, n, k, dtype, k if group_size < 0 else group_size, zeros)
    problem = layer.problem(m)
    problem.has_bias, problem.batch_invariant = int(more == "bias"), int(more == "batch invariant")
    problem.epilogue = native.EPILOGUES[epilogue]
    device = library.current_device()
    config = library.select(problem, device)
    x = layer.activations(m)
    out = torch.empty((m, n), dtype=layer.torch_dtype, device=graph.DEVICE)
    if epilogue is not None:
        return timing.Graph(_fused(layer, x, out, config, device, epilogue), len(layer.packed))
    check = graph.Check(layer, x)
    call = graph.checked_kernel(layer, x, out, check, config, device)
    if more == "bias":  # of zeros, so that the same check serves
        vector = torch.zeros(n, dtype=layer.torch_dtype, device=graph.DEVICE)
        call = layer.kernel(x, out, config, device, bias=vector)
        out.fill_(float("nan"))
        call(0)
        check(out)
    return timing.Graph(call, len(layer.packed))


def _fused(layer: Any, x: Any, out: Any, config: str, device: Any, epilogue: str) -> Any:
    """The call of a kernel with an epilogue, once its output has been found right."""
    import torch  # pyright: ignore[reportMissingImports]

    m, expected = x.shape[0], layer.reference(x)
    if epilogue == "swiglu":
        gate, up = expected.reshape(m, -1, 2, 8).unbind(2)
        expected = (torch.nn.functional.silu(gate) * up).reshape(m, -1)
        out = torch.empty_like(expected, dtype=out.dtype)
    call = layer.kernel(x, out, config, device, epilogue=epilogue)
    out.fill_(float("nan"))
    call(0)
    error = (torch.linalg.vector_norm(out.float() - expected) / torch.linalg.vector_norm(expected)).item()
    if not error < 2e-3:
        raise RuntimeError(f"{epilogue}, {config}: relative error {error:.2e}")
    return call


def main(argv: list[str] | None = None) -> int:
    """Prints both tables; exit status 1 if a bound was passed."""
    parser = argparse.ArgumentParser(
        "benchmarks.bench_variants", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--shapes", type=shapes.parse_shapes, default=shapes.parse_shapes(SHAPES))
    parser.add_argument("--m", type=shapes.parse_tokens, default=shapes.parse_tokens(TOKENS))
    parser.add_argument("--library", help="path of libw4a16.so; default: the installed package's")
    parser.add_argument("--output", type=Path, default=store.RESULTS / "h200_variants.json")
    options = parser.parse_args(argv)

    from benchmarks import graph

    library = native.Library(options.library or native.find_library())
    graph.warm_up()
    rows: list[dict] = []
    met = True
    base_name, (base, _) = next(iter(VARIANTS.items()))
    cells = (len(options.shapes) + len(ODD_SHAPES)) * len(options.m) + len(options.shapes) * len(ODD_TOKENS)
    progress = Progress(cells, "variants")
    for shape in options.shapes:
        for m in options.m:
            graphs = {
                name: _graph(library, shape.n, shape.k, m, variant) for name, (variant, _) in VARIANTS.items()
            }
            graphs = {name: one for name, one in graphs.items() if one is not None}
            for name, us in timing.time_graphs(graphs).items():
                rows.append({"N": shape.n, "K": shape.k, "M": m, "variant": name, "us": round(us, 3)})
            progress.step(f"{shape} M={m}")
    us_of = {(row["N"], row["K"], row["M"], row["variant"]): row["us"] for row in rows}
    print(f"time over that of {base_name}, geometric mean over {len(options.shapes)} shapes (worst)")
    print(f"{'':>20}" + "".join(f"{'M=' + str(m):>15}" for m in options.m))
    for name, (_, bound) in VARIANTS.items():
        text = ""
        for m in options.m:
            if (options.shapes[0].n, options.shapes[0].k, m, name) not in us_of:
                text += f"{'-':>15}"
                continue
            ratios = [us_of[s.n, s.k, m, name] / us_of[s.n, s.k, m, base_name] for s in options.shapes]
            mean = geomean(ratios) or 0.0
            missed = bound is not None and mean > bound
            met = met and not missed
            text += f"{mean:8.3f} ({max(ratios):.2f}){'!' if missed else ' '}"
        print(f"{name:>20}{text}" + ("" if bound is None else f"  at most {bound}"))

    def over(odd: tuple[int, int, int], padded: tuple[int, int, int], bound: float) -> str:
        """Times (N, K, M) beside a larger one; the ratio's text."""
        nonlocal met
        graphs = {"odd": _graph(library, *odd, base), "padded": _graph(library, *padded, base)}
        us = timing.time_graphs(graphs)
        n, k, m = odd
        rows.append({"N": n, "K": k, "M": m, "variant": "odd", "us": us["odd"], "padded_us": us["padded"]})
        progress.step(f"{n}x{k} M={m}")
        missed = us["odd"] > bound * us["padded"]
        met = met and not missed
        return f"{us['odd'] / us['padded']:9.3f}{'!' if missed else ' '}"

    print(f"\nsizes that are no multiples of {ODD_MULTIPLE}: time over that of the next multiples")
    print(f"{'':>30}" + "".join(f"{'M=' + str(m):>9} " for m in options.m) + f" at most {ODD_BOUND}")
    for n, k in ODD_SHAPES:
        padded_n, padded_k = (-(-size // ODD_MULTIPLE) * ODD_MULTIPLE for size in (n, k))
        text = "".join(over((n, k, m), (padded_n, padded_k, m), ODD_BOUND) for m in options.m)
        print(f"{f'{n}x{k} against {padded_n}x{padded_k}':>30}{text}")

    print("\ntokens: time over that of the next power of two")
    print(f"{'':>30}" + "".join(f"{'M=' + str(m):>9} " for m in ODD_TOKENS) + f" at most {ODD_TOKENS_BOUND}")
    for n, k in ((shape.n, shape.k) for shape in options.shapes):
        padded_m = [1 << (m - 1).bit_length() for m in ODD_TOKENS]
        text = "".join(
            over((n, k, m), (n, k, p), ODD_TOKENS_BOUND) for m, p in zip(ODD_TOKENS, padded_m, strict=True)
        )
        print(f"{f'{n}x{k}':>30}{text}")
    header = graph.device_facts(library) | {"protocol": timing.PROTOCOL}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
