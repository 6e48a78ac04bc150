"""The independent oracle: NumPy in float64, own packer, seeded cases. No code of the package runs here."""

import dataclasses
import random

import ml_dtypes
import numpy as np
import shapes

BLOCK_K, BLOCK_N, BLOCK_WORDS = 64, 16, 128


def dtype_of(name: str) -> np.dtype:
    """float16, bfloat16 or float32 as a NumPy type."""
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def half_ulp(dtype: np.dtype) -> float:
    """Largest relative error of rounding to `dtype`."""
    return float(ml_dtypes.finfo(dtype).eps) / 2


def pack(codes: np.ndarray, padding: np.random.Generator | None = None) -> np.ndarray:
    """Codes [K, N] in packed order, read off the picture: one assignment per nibble of a word."""
    k, n = codes.shape
    blocks_k, blocks_n = -(-k // BLOCK_K), -(-n // BLOCK_N)
    padded = np.zeros((blocks_k * BLOCK_K, blocks_n * BLOCK_N), np.uint32)
    if padding is not None:
        padded[:] = padding.integers(0, 16, padded.shape)
    padded[:k, :n] = codes
    blocks = padded.reshape(blocks_k, BLOCK_K, blocks_n, BLOCK_N)
    qweight = np.zeros((blocks_k, blocks_n, BLOCK_WORDS), np.uint32)
    for word in range(BLOCK_WORDS):
        lane, step = divmod(word, 4)
        for nibble in range(8):
            r, hi, lo = nibble & 1, nibble >> 1 & 1, nibble >> 2
            row, column = 16 * step + 2 * (lane % 4) + lo + 8 * hi, lane // 4 + 8 * r
            qweight[:, :, word] |= blocks[:, row, :, column] << np.uint32(4 * nibble)
    return qweight


@dataclasses.dataclass(frozen=True)
class Case:
    """The static part of a call and the seed of its operands; its repr reproduces it."""

    m: int
    k: int
    n: int
    group_size: int = 128
    dtype: str = "bfloat16"
    out_dtype: str = "bfloat16"
    zeros: str = "none"  # none, integer or fractional
    bias: bool = False
    alpha: float = 1.0
    seed: int = 0

    @property
    def group(self) -> int:
        """Rows that share a scale."""
        return max(self.k, 1) if self.group_size == -1 or self.group_size >= self.k else self.group_size

    @property
    def num_groups(self) -> int:
        """Rows of the scales."""
        return -(-self.k // self.group)


@dataclasses.dataclass
class Operands:
    """A case's arrays, in NumPy."""

    x: np.ndarray
    codes: np.ndarray
    qweight: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    bias: np.ndarray | None

    def weight(self, group: int) -> np.ndarray:
        """The weight [K, N] in float64."""
        return dequantize(self.codes, self.scales, self.zeros, group)


def dequantize(codes, scales, zeros, group: int) -> np.ndarray:
    """(code - zero) * scale in float64: [K, N]."""
    k = codes.shape[0]
    per_row = lambda a: np.repeat(np.asarray(a, np.float64), group, axis=0)[:k]
    zero = 8.0 if zeros is None else per_row(zeros)
    return (codes.astype(np.float64) - zero) * per_row(scales)


def small_scales(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Which scales [groups, N] are to be small: none of a group, all, or some: kernels tell these apart."""
    return rng.random(shape) < rng.choice([0.0, 0.5, 1.0], (shape[0], 1))


def operands(case: Case) -> Operands:
    """Standard normal x and bias, scales of 1/8 or 1/128, roughly, random codes in the padding too."""
    rng = np.random.default_rng([case.seed, case.m, case.k, case.n])
    dtype = dtype_of(case.dtype)
    codes = rng.integers(0, 16, (case.k, case.n), dtype=np.uint8)
    shape = (case.num_groups, case.n)
    scales = rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape) / 8
    scales = np.where(small_scales(rng, shape), scales / 16, scales).astype(dtype)
    zeros = None
    if case.zeros != "none":
        zeros = rng.integers(0, 16, shape) + (
            rng.integers(0, 16, shape) / 16 if case.zeros == "fractional" else 0
        )
        zeros = zeros.astype(dtype)
    bias = rng.standard_normal(case.n).astype(dtype) if case.bias else None
    x = rng.standard_normal((case.m, case.k)).astype(dtype)
    return Operands(x, codes, pack(codes, rng), scales, zeros, bias)


def product(case: Case, ops: Operands) -> np.ndarray:
    """The exact result, in float64."""
    out = case.alpha * (ops.x.astype(np.float64) @ ops.weight(case.group))
    return out if ops.bias is None else out + ops.bias.astype(np.float64)


def check_close(case: Case, ops: Operands, got: np.ndarray) -> None:
    """`got` is at most twice as wrong as rounding the weight to 16 bits and summing in float32 would be.

    Checked for the largest error of all and for each row's norm. Where few products make a sum, that rounding
    may be lucky; it then counts as what it is expected to be.
    """
    want = product(case, ops)
    assert got.shape == want.shape, f"{case}: shape {got.shape}"
    assert got.dtype == dtype_of(case.out_dtype), f"{case}: dtype {got.dtype}"
    if not want.size:
        return
    x, w = ops.x.astype(np.float64), ops.weight(case.group)
    weight_dtype = dtype_of(case.dtype)
    rounded = case.alpha * (x @ w.astype(weight_dtype).astype(np.float64))
    exact = case.alpha * (x @ w)
    expected = abs(case.alpha) * half_ulp(weight_dtype) * np.sqrt(x**2 @ w**2)
    float32_sums = 2.0**-22 * abs(case.alpha) * (np.abs(x) @ np.abs(w))
    allowed = 2 * np.maximum(np.abs(rounded - exact), expected) + float32_sums
    allowed += 1.01 * half_ulp(dtype_of(case.out_dtype)) * np.abs(want) + 2.0**-24
    error = np.abs(got.astype(np.float64) - want)
    assert error.max() <= allowed.max(), f"{case}: error {error.max():.3g}, allowed {allowed.max():.3g}"
    rows, allowed_rows = np.linalg.norm(error, axis=1), np.linalg.norm(allowed, axis=1)
    worst = int(np.argmax(rows / allowed_rows))
    assert (rows <= allowed_rows).all(), f"{case}: row {worst}: {rows[worst]:.3g} > {allowed_rows[worst]:.3g}"


def exact_grid(case: Case) -> Operands:
    """Operands whose partial sums are integers below 2^24 times one power of two: any order, same bits.

    x is -2..2 and scales are powers of two, so that a sum of up to 1024 products is also exact in float32,
    whether the scale is applied to the weight or to the sum.
    """
    rng = np.random.default_rng([case.seed, case.m, case.k, case.n, 1])
    ops = operands(case)
    dtype = dtype_of(case.dtype)
    ops.x = rng.integers(-2, 3, ops.x.shape).astype(dtype)
    shape = ops.scales.shape
    exponents = np.where(small_scales(rng, shape), rng.integers(-8, -5, shape), rng.integers(-3, 2, shape))
    ops.scales = np.exp2(exponents).astype(dtype)
    if ops.zeros is not None:
        ops.zeros = rng.integers(0, 16, ops.zeros.shape).astype(dtype)
    if ops.bias is not None:
        ops.bias = rng.integers(-8, 9, ops.bias.shape).astype(dtype)
    return ops


def fuzz(count: int, seed: int, dtypes=shapes.DTYPES, max_size: int = 1024) -> list[Case]:
    """Cases with independent sizes; one in five is aligned, the others cross an edge or are degenerate."""
    rng = random.Random(seed)
    cases = []
    for i in range(count):
        aligned = rng.random() < 0.2
        pick = lambda edges, whole, aligned=aligned: rng.choice(
            [size for size in (whole if aligned else edges) if size <= max_size]
        )
        dtype = rng.choice(dtypes)
        cases.append(
            Case(
                m=pick(shapes.M, shapes.ALIGNED_M),
                k=pick(shapes.K, shapes.ALIGNED_K),
                n=pick(shapes.N, shapes.ALIGNED_N),
                group_size=rng.choice(shapes.GROUP_SIZES),
                dtype=dtype,
                out_dtype=rng.choice((dtype, "float32")),
                zeros=rng.choice(("none", "integer", "fractional")),
                bias=rng.random() < 0.5,
                alpha=rng.choice((1.0, 0.5, -1.75)),
                seed=1000 * seed + i,
            )
        )
    return cases
