"""What is measured: the linear layers of Llama-3 8B and 70B, over numbers of tokens.

N is a layer's output features, K its input features; query, key and value, and gate and up, are
fused along N as inference engines run them.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Shape(NamedTuple):
    """A weight of K x N and the layers that have it."""

    n: int
    k: int
    layer: str = ""

    def __str__(self) -> str:
        return f"{self.n}x{self.k}"


class Cell(NamedTuple):
    """One measured problem: [M, K] times [K, N]."""

    n: int
    k: int
    m: int
    dtype: str
    group_size: int = 128
    zeros: bool = False


SHAPES = (
    Shape(6144, 4096, "8B qkv"),
    Shape(4096, 4096, "8B o"),
    Shape(28672, 4096, "8B gate+up"),
    Shape(4096, 14336, "8B down"),
    Shape(10240, 8192, "70B qkv"),
    Shape(8192, 8192, "70B o"),
    Shape(57344, 8192, "70B gate+up"),
    Shape(8192, 28672, "70B down"),
)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
DTYPES = ("float16", "bfloat16")
GROUP_SIZE = 128

SMOKE_SHAPES = (Shape(1024, 512, "smoke"), Shape(512, 1024, "smoke"))
SMOKE_TOKENS = (1, 16, 256)

PEAK_FLOPS = 790e12  # fp16 and bf16 on random data, measured on an H200
L2_BYTES = 60 * 2**20

_DTYPE_NAMES = {
    "fp16": "float16",
    "f16": "float16",
    "float16": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
}


def compute_us(m: int, n: int, k: int) -> float:
    """Time of 2MNK operations at the card's measured peak."""
    return 2 * m * n * k / PEAK_FLOPS * 1e6


def limit_us(floor_us: float, m: int, n: int, k: int) -> float:
    """The least time a kernel can take: reading the packed weight, or the arithmetic."""
    return max(floor_us, compute_us(m, n, k))


def weight_bytes(n: int, k: int, group_size: int, zeros: bool) -> int:
    """Bytes of the packed weight with its 16-bit scales and zeros."""
    groups = math.ceil(k / group_size)
    return math.ceil(k / 64) * math.ceil(n / 16) * 512 + groups * n * 2 * (2 if zeros else 1)


def cells(
    shapes: Iterable[Shape],
    tokens: Sequence[int],
    dtypes: Sequence[str],
    group_size: int = GROUP_SIZE,
    zeros: bool = False,
) -> list[Cell]:
    """Every combination, shape by shape, so that a shape's weights are built once; types of an M together."""
    return [Cell(s.n, s.k, m, dtype, group_size, zeros) for s in shapes for m in tokens for dtype in dtypes]


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """`4096x14336,8192x8192` (N x K); raises ValueError."""
    known = {(s.n, s.k): s for s in SHAPES + SMOKE_SHAPES}
    shapes = []
    for item in text.split(","):
        n, separator, k = item.partition("x")
        if not (separator and n.isdigit() and k.isdigit()):
            raise ValueError(f"expected shapes as NxK,NxK; got {item!r}")
        shapes.append(known.get((int(n), int(k)), Shape(int(n), int(k))))
    return tuple(shapes)


def parse_tokens(text: str) -> tuple[int, ...]:
    """`1,16,256`; raises ValueError."""
    return tuple(int(item) for item in text.split(","))


def parse_dtypes(text: str) -> tuple[str, ...]:
    """`fp16,bf16` or full names; raises ValueError."""
    unknown = [item for item in text.split(",") if item not in _DTYPE_NAMES]
    if unknown:
        raise ValueError(f"expected float16 or bfloat16; got {unknown[0]!r}")
    return tuple(_DTYPE_NAMES[item] for item in text.split(","))
