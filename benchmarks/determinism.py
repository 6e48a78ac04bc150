"""Runs every configuration many times beside copies that load the memory: results must be equal to the bit.

    python -m benchmarks.determinism [--runs 1000] [--configs TEXT,...] [--group-size 128]

Needs torch. Every second run has a copy on another stream beside it, which takes longer than most runs.
"""

import argparse
import itertools
import sys

from benchmarks import native, shapes
from benchmarks.progress import Progress

# (N, K, tokens): several tiles and waves; tails of N, K and M; one with float zeros.
PROBLEMS = (
    (4096, 4096, (1, 16, 100, 512), False),
    (1408, 2112, (7, 33, 257), True),
)
LOAD_BYTES = 1 << 28


def main(argv: list[str] | None = None) -> int:
    """Prints a line for each configuration; exit status 1 if a bit changed."""
    parser = argparse.ArgumentParser("benchmarks.determinism", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--configs", default="", help="only names that contain one of these, by commas")
    parser.add_argument("--group-size", type=int, default=shapes.GROUP_SIZE)
    parser.add_argument("--library", help="path of libw4a16.so; default: the installed package's")
    options = parser.parse_args(argv)

    import torch  # pyright: ignore[reportMissingImports]

    from benchmarks import graph

    library = native.Library(options.library or native.find_library())
    device = library.current_device()
    parts = options.configs.split(",")
    names = [name for name in library.config_names() if any(part in name for part in parts)]
    load = torch.empty(LOAD_BYTES, dtype=torch.uint8, device=graph.DEVICE)
    other = torch.cuda.Stream()
    progress = Progress(len(names) * len(PROBLEMS) * 2, "determinism")
    changed: dict[str, int] = dict.fromkeys(names, 0)
    runs: dict[str, int] = dict.fromkeys(names, 0)
    for n, k, tokens, zeros in PROBLEMS:
        for dtype in ("float16", "bfloat16"):
            layer = graph.Layer(library, n, k, dtype, options.group_size, zeros)
            for name in names:
                able = []
                for m, epilogue in itertools.product(tokens, native.EPILOGUES):
                    problem = layer.problem(m)
                    problem.epilogue = native.EPILOGUES[epilogue]
                    if library.refusal(problem, device, name) is None:
                        able.append((m, epilogue))
                for m, epilogue in able:
                    x = layer.activations(m)
                    columns = n // 2 if epilogue == "swiglu" else n
                    out = torch.empty((m, columns), dtype=layer.torch_dtype, device=graph.DEVICE)
                    call = layer.kernel(x, out, name, device, epilogue=epilogue)
                    call(0)
                    first = out.clone()
                    differ = torch.zeros((), dtype=torch.int64, device=graph.DEVICE)
                    # Both types, all numbers of tokens and all epilogues of a problem share out its runs.
                    count = -(-options.runs // (2 * len(able)))
                    for i in range(count):
                        if i % 2:
                            with torch.cuda.stream(other):
                                load[LOAD_BYTES // 2 :].copy_(load[: LOAD_BYTES // 2])
                        out.fill_(float("nan"))
                        call(i % len(layer.packed))
                        differ += (out.view(torch.int16) != first.view(torch.int16)).any()
                    changed[name] += int(differ.item())
                    runs[name] += count
                progress.step(f"{name} {n}x{k} {dtype}")
    for name in names:
        print(f"{name:50s} {runs[name]:6d} runs, {changed[name]} differ from the first")
    print(f"{sum(runs.values())} runs of {len(names)} configurations, {sum(changed.values())} differ")
    return 1 if any(changed.values()) or not all(runs.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
