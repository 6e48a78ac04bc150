"""Times pack, dequantise and quantise of one large weight against the device's copy bandwidth.

    python -m benchmarks.bench_prepare [--shape 8192x28672] [--dtype bf16]

Needs torch. Each result is compared with torch's first. Bytes are those read and written once.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from benchmarks import native, shapes, store, timing

TARGET = 0.6  # of the copy bandwidth
COPY_BYTES = 2**30


class Weight:
    """One weight of random values, its codes, and the three operations on it as calls."""

    def __init__(self, library: native.Library, shape: shapes.Shape, dtype: str, zeros: bool):
        import torch  # pyright: ignore[reportMissingImports]

        from benchmarks import graph

        self.torch, self.library, self.dtype = torch, library, dtype
        self.n, self.k, self.group_size = shape.n, shape.k, shapes.GROUP_SIZE
        self.stream = graph.stream
        device, kind = graph.DEVICE, getattr(torch, dtype)
        groups = math.ceil(self.k / self.group_size)
        self.values = torch.randn((self.k, self.n), device=device).to(kind)
        self.codes = torch.randint(0, 16, (self.k, self.n), dtype=torch.uint8, device=device)
        size = math.ceil(self.k / 64) * math.ceil(self.n / 16) * 128
        self.qweight = torch.zeros(size, dtype=torch.int32, device=device)
        self.scales = torch.full((groups, self.n), math.nan, dtype=kind, device=device)
        self.zeros = torch.full_like(self.scales, math.nan) if zeros else None
        self.restored = torch.full_like(self.values, math.nan)

    def bytes(self, operation: str) -> int:
        """What an operation must read and write."""
        values = self.values.numel() * self.values.element_size()
        scales = self.scales.numel() * self.scales.element_size() * (2 if self.zeros is not None else 1)
        packed = self.qweight.numel() * 4
        return packed + (self.codes.numel() if operation == "pack" else values + scales)

    def _zeros(self) -> int | None:
        return None if self.zeros is None else self.zeros.data_ptr()

    def pack(self, i: int = 0) -> None:
        """codes -> qweight."""
        self.library.pack_cuda(self.codes.data_ptr(), self.k, self.n, self.qweight.data_ptr(), self.stream())

    def quantize(self, i: int = 0) -> None:
        """values -> qweight, scales and zeros."""
        self.library.quantize_cuda(
            self.values.data_ptr(), self.dtype, self.k, self.n, self.group_size, self.dtype,
            self.qweight.data_ptr(), self.scales.data_ptr(), self._zeros(), self.stream(),
        )  # fmt: skip

    def dequantize(self, i: int = 0) -> None:
        """qweight, scales and zeros -> restored."""
        self.library.dequantize_cuda(
            self.qweight.data_ptr(), self.scales.data_ptr(), self._zeros(), self.dtype, self.k,
            self.n, self.group_size, self.dtype, self.restored.data_ptr(), self.stream(),
        )  # fmt: skip

    def _spread(self, per_group: Any) -> Any:
        group = self.torch.arange(self.k, device=per_group.device) // self.group_size
        return per_group.float()[group]

    def wrong(self) -> str | None:
        """Runs everything once; what is wrong, or None."""
        self.quantize()
        self.dequantize()
        scale = self._spread(self.scales)
        # Half a step, and what the scale's own rounding and the last rounding move.
        if not bool(((self.restored - self.values).abs() <= 0.56 * scale).all()):
            return "quantise, then dequantise: a weight moved by more than half a step"
        self.pack()
        self.dequantize()
        zero = 8 if self.zeros is None else self._spread(self.zeros)
        if not self.torch.equal(self.restored, ((self.codes.float() - zero) * scale).to(self.values.dtype)):
            return "pack, then dequantise: not the codes' values"
        return None


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy on the device: a kernel's or memcpy's, the faster."""
    import torch  # pyright: ignore[reportMissingImports]

    from benchmarks import graph

    source = torch.randn(COPY_BYTES // 4, device=graph.DEVICE)
    target = torch.empty_like(source)
    kernel = timing.Graph(lambda i: torch.mul(source, 1.0, out=target), 1)
    us = timing.time_graphs({"kernel": kernel})["kernel"]
    us = min(us, timing.eager_us(lambda i: target.copy_(source), 1, calls=10))
    return 2 * COPY_BYTES / us * 1e6


def main(argv: list[str] | None = None) -> int:
    """Prints the table; exit status 1 if a result is wrong or a figure is missed."""
    parser = argparse.ArgumentParser(
        "benchmarks.bench_prepare", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--shape", type=shapes.parse_shapes, default=(shapes.Shape(8192, 28672),))
    parser.add_argument("--dtype", type=shapes.parse_dtypes, default=shapes.DTYPES)
    parser.add_argument("--library", help="path of libw4a16.so; default: the installed package's")
    parser.add_argument("--output", type=Path, default=store.RESULTS / "h200_prepare.json")
    options = parser.parse_args(argv)

    from benchmarks import graph

    library = native.Library(options.library or native.find_library())
    graph.warm_up()
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e12:.2f} TB/s")
    rows, met = [], True
    for shape in options.shape:
        for dtype in options.dtype:
            for zeros in (False, True):
                weight = Weight(library, shape, dtype, zeros)
                if why := weight.wrong():
                    print(f"FAILED: {shape} {dtype} zeros={zeros}: {why}")
                    met = False
                    continue
                for operation in ("pack", "dequantize", "quantize"):
                    one = timing.Graph(getattr(weight, operation), 1)
                    us = timing.time_graphs({operation: one})[operation]
                    share = weight.bytes(operation) / us * 1e6 / bandwidth
                    met = met and share >= TARGET
                    rows.append(
                        {"operation": operation, "N": shape.n, "K": shape.k, "dtype": dtype,
                         "zeros": zeros, "us": round(us, 2), "share_of_copy": round(share, 3)}
                    )  # fmt: skip
                    print(
                        f"{operation:>10} {shape} {dtype:>8} zeros={zeros!s:5} {us:9.1f} us  "
                        f"{share:6.1%} of copy bandwidth, to reach {TARGET:.0%}: "
                        f"{'met' if share >= TARGET else 'MISSED'}"
                    )
    header = graph.device_facts(library) | {"copy_bytes_per_s": round(bandwidth)}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
