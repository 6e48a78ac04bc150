"""The self-test: every kernel that this machine can run, against oracles written in NumPy.

one-hot  x = rows of the identity gives exactly the weight in the result's type
grid     small integers times powers of two: every sum is exact, in any order
dense    normal numbers, against float64: at most twice as wrong as a weight dequantised in x's type
pack, dequantize, quantize    bit for bit
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import inspect
import itertools
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_w4a16 import _config, _ffi, _primitive, _ragged
from jax_w4a16._progress import Progress

MOST_FAILURES_SHOWN = 10
EXPERTS = 3

# (M, N, K, group size): aligned, ragged and degenerate; -1 is per column.
PROBLEMS = (
    (1, 256, 512, 128),
    (4, 128, 256, 32),
    (16, 384, 512, 64),
    (64, 256, 512, 128),
    (128, 128, 1024, 256),
    (200, 512, 384, -1),
    (257, 264, 520, 128),
    (1, 17, 65, 32),
    (3, 40, 72, 64),
    (7, 1, 1, 32),
    (33, 100, 200, -1),
    (65, 136, 328, 128),
    (130, 96, 136, 64),
    (0, 64, 128, 32),
    (2, 24, 0, 32),
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One implementation of the multiplication, and a device to run it on."""

    name: str
    implementation: str
    config: str | None
    device: Any  # a jax.Device
    ragged: bool = False  # rows are split over EXPERTS experts, which have the same weight


@dataclasses.dataclass(frozen=True)
class Case:
    """The static part of a call. Its name says all of it, and seeds its operands."""

    m: int
    n: int
    k: int
    group_size: int
    dtype: str
    out_dtype: str
    has_zeros: bool
    has_bias: bool

    @property
    def name(self) -> str:
        """One word, as `--case` takes it."""
        options = "_zeros" * self.has_zeros + "_bias" * self.has_bias
        return f"m{self.m}_n{self.n}_k{self.k}_g{self.group_size}_{self.dtype}_to_{self.out_dtype}{options}"

    @property
    def group(self) -> int:
        """Rows that share a scale, as the kernels take it: at least K where it is per column."""
        return max(self.k, 1) if self.group_size == -1 else self.group_size

    def problem(self) -> _config.Problem:
        """The same, as the native library takes it."""
        options = (self.dtype, self.out_dtype, self.has_zeros, self.has_bias)
        return _config.Problem(self.m, self.n, self.k, self.group, *options)

    def rng(self, purpose: str) -> np.random.Generator:
        """Random numbers that depend on the case and `purpose` alone."""
        return np.random.default_rng(zlib.crc32(f"{self.name} {purpose}".encode()))


def kernels() -> list[Kernel]:
    """All kernels of this build for which there is a device."""
    found = []
    if cpus := _devices("cpu"):
        found.append(Kernel(f"cpu {_ffi.native.build_info()['cpu_instruction_set']}", "cpu", None, cpus[0]))
    if _ffi.has_cuda() and (gpus := _devices("cuda")):
        found.append(Kernel("cuda auto", "cuda", None, gpus[0]))
        for c in _ffi.native.configs():
            found.append(Kernel(c["name"], "cuda", c["name"], gpus[0], c["ragged"]))
    return found


def refusal(kernel: Kernel, problem: _config.Problem) -> str | None:
    """Why the kernel cannot serve the problem, or None."""
    if kernel.implementation == "cpu":
        return None
    gpu = _config.local_gpu()
    assert gpu is not None
    if problem.x_dtype == "float32":
        return "the CUDA kernels take x of float16 or bfloat16"
    try:
        if kernel.ragged:
            _config.choose_ragged(problem, EXPERTS, gpu, kernel.config)
        else:
            _config.choose(problem, gpu, kernel.config)
    except ValueError as error:
        return str(error)
    return None


def cases() -> list[Case]:
    """Every problem in each type, to that type and to float32, with and without zero points and bias."""
    found = []
    for i, sizes in enumerate(PROBLEMS):
        for j, dtype in enumerate(("float16", "bfloat16", "float32")):
            for out_dtype in dict.fromkeys((dtype, "float32")):
                for has_zeros in (False, True):
                    has_bias = (i + j + has_zeros) % 2 == 1
                    found.append(Case(*sizes, dtype, out_dtype, has_zeros, has_bias))
    return found


def _devices(platform: str) -> list:
    try:
        return jax.local_devices(backend=platform)
    except RuntimeError:
        return []


# Operands --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Weight:
    """A random weight in float64: codes [K, N] and, for its groups, scales, zeros and a bias."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    bias: np.ndarray | None

    @functools.cached_property
    def packed(self) -> np.ndarray:
        """The codes as the kernels take them."""
        return _pack(self.codes)

    def dense(self, case: Case, dtype: Any = np.float64) -> np.ndarray:
        """(code - zero) * scale, each operation in `dtype`: [K, N]."""
        rows = lambda a: np.repeat(a.astype(dtype), case.group, axis=0)[: case.k]
        zero = dtype(8) if self.zeros is None else rows(self.zeros)
        return (self.codes.astype(dtype) - zero) * rows(self.scales)

    def dense_in_type(self, case: Case) -> np.ndarray:
        """The same with each operation rounded to the case's type, as float64."""
        rows = lambda a: np.repeat(a, case.group, axis=0)[: case.k]
        distance = self.codes - (8 if self.zeros is None else rows(self.zeros))
        return _round(_round(distance, case.dtype) * rows(self.scales), case.dtype)


def _round(a: np.ndarray, dtype: str) -> np.ndarray:
    return a.astype(jnp.dtype(dtype)).astype(np.float64)


@functools.lru_cache(maxsize=8)
def _weight(case: Case, oracle: str) -> _Weight:
    rng = case.rng("weight " + oracle)
    codes = rng.integers(0, 16, (case.k, case.n))
    groups = -(-case.k // case.group), case.n
    scales = rng.choice((-1, 1), groups) * np.exp2(rng.integers(-3, 1, groups))
    # None of a group's scales are small, or all, or some: kernels tell these apart.
    small = rng.random(groups) < rng.choice([0.0, 0.5, 1.0], (groups[0], 1))
    scales = np.where(small, scales / 64, scales)
    zeros = rng.integers(0, 16, groups).astype(np.float64)
    bias = rng.integers(-8, 9, case.n).astype(np.float64)
    if oracle == "one-hot":
        bias[:] = 0
    if oracle != "grid":
        scales = _round(scales * rng.uniform(0.5, 1.0, groups), case.dtype)
    if oracle == "dense":
        zeros = _round(zeros + rng.uniform(-0.5, 0.5, groups), case.dtype)
        bias = _round(rng.standard_normal(case.n), case.dtype)
    return _Weight(codes, scales, zeros if case.has_zeros else None, bias if case.has_bias else None)


def _pack(codes: np.ndarray) -> np.ndarray:
    """Codes [K, N] in the packed layout of ffi/layout.h."""
    k, n = codes.shape
    padded = np.pad(codes, ((0, -k % 64), (0, -n % 16))).astype(np.uint32)
    blocks = padded.reshape(-(-k // 64), 64, -(-n // 16), 16)
    word = np.arange(128)
    lane, step = word // 4, word % 4
    words = np.zeros((blocks.shape[0], blocks.shape[2], 128), np.uint32)
    for nibble in range(8):
        r, hi, lo = nibble % 2, nibble // 2 % 2, nibble // 4
        row, column = 16 * step + 2 * (lane % 4) + lo + 8 * hi, lane // 4 + 8 * r
        words |= blocks[:, row, :, column].transpose(1, 2, 0) << np.uint32(4 * nibble)
    return words


def _quantize(w: np.ndarray, case: Case) -> list[np.ndarray]:
    """The rule of ffi/quantize.h: packed codes, scales and, if the case has them, zeros."""
    f32 = np.float32
    scales: list[np.ndarray] = []
    zeros: list[np.ndarray] = []
    codes: list[np.ndarray] = [np.zeros((0, case.n), f32)]
    for begin in range(0, case.k, case.group):
        rows = w[begin : begin + case.group].astype(f32)
        low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
        span = (high - low) * (f32(1) / f32(15))
        if not case.has_zeros:
            span = np.maximum(high, -low) * (f32(1) / f32(7.5))
        scale = _round(span, case.dtype).astype(f32)
        divisor = np.where(scale == 0, f32(1), scale)
        zero = np.clip(np.rint(-low / divisor), 0, 15) if case.has_zeros else np.full_like(scale, 8)
        codes.append(np.clip(np.rint(rows / divisor) + zero, 0, 15))
        scales.append(scale)
        zeros.append(zero)
    empty = [np.zeros((0, case.n), f32)]
    results = [_pack(np.concatenate(codes)), np.stack(scales) if scales else empty[0]]
    return results + ([np.stack(zeros) if zeros else empty[0]] if case.has_zeros else [])


# Oracles ---------------------------------------------------------------------------------------------------

ALPHA = 0.5

Dot = Callable[[np.ndarray, _Weight], np.ndarray]


def _one_hot(case: Case, dot: Dot) -> str | None:
    weight = _weight(case, "one-hot")
    want = _round(ALPHA * weight.dense(case), case.out_dtype)
    order = case.rng("rows").permutation(case.k)
    for begin in range(0, min(case.k, 16 * case.m), max(case.m, 1)):
        rows = order[begin : begin + case.m]
        x = np.zeros((case.m, case.k))
        x[np.arange(len(rows)), rows] = 1
        if error := _difference(dot(x, weight)[: len(rows)], want[rows]):
            return f"rows {rows[0]}.. of the weight: {error}"
    return None


@functools.lru_cache(maxsize=4)
def _grid_expected(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """x and the result."""
    weight = _weight(case, "grid")
    x = case.rng("x").integers(-2, 3, (case.m, case.k)).astype(np.float64)
    want = ALPHA * (x @ weight.dense(case))
    return x, _round(want if weight.bias is None else want + weight.bias, case.out_dtype)


def _grid(case: Case, dot: Dot) -> str | None:
    x, want = _grid_expected(case)
    return _difference(dot(x, _weight(case, "grid")), want)


@functools.lru_cache(maxsize=4)
def _dense_expected(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, the result, and how far off an element may be."""
    weight = _weight(case, "dense")
    w = ALPHA * weight.dense(case)
    x = _round(case.rng("x").standard_normal((case.m, case.k)), case.dtype)
    want = x @ w if weight.bias is None else x @ w + weight.bias
    # What a weight in x's type costs: as it happens, or, where few terms are lucky, as is to be expected.
    half_ulp = lambda dtype: float(jnp.finfo(dtype).eps) / 2
    happens = np.abs(x @ (ALPHA * weight.dense_in_type(case) - w))
    expected = half_ulp(case.dtype) * np.sqrt(x**2 @ w**2)
    allowed = 2 * np.maximum(happens, expected) + 2.0**-22 * (np.abs(x) @ np.abs(w))
    return x, want, allowed + 1.01 * half_ulp(case.out_dtype) * np.abs(want) + 2.0**-24


def _dense(case: Case, dot: Dot) -> str | None:
    x, want, allowed = _dense_expected(case)
    got = dot(x, _weight(case, "dense"))
    if got.shape != want.shape:
        return f"shape {got.shape}, expected {want.shape}"
    if not want.size:
        return None
    error = np.abs(got - want)
    rows, allowed_rows = np.linalg.norm(error, axis=1), np.linalg.norm(allowed, axis=1)
    row = int(np.argmax(rows / allowed_rows))
    if not rows[row] <= allowed_rows[row]:  # a NaN too must fail
        return f"row {row}: error {rows[row]:.3g}, allowed {allowed_rows[row]:.3g}"
    if not error.max() <= allowed.max():
        return f"largest error {error.max():.3g}, allowed {allowed.max():.3g}"
    return None


def _difference(got: np.ndarray, want: np.ndarray) -> str | None:
    if got.shape != want.shape:
        return f"shape {got.shape}, expected {want.shape}"
    wrong = np.argwhere(got != want)
    if not len(wrong):
        return None
    at = tuple(int(i) for i in wrong[0])
    return f"{len(wrong)} of {got.size} wrong, first at {at}: {got[at]:.9g}, expected {want[at]:.9g}"


# Kernels under test ----------------------------------------------------------------------------------------

_STATIC = (
    "implementation",
    "group_size",
    "config",
    "alpha",
    "out_dtype",
    "k",
    "dtype",
    "symmetric",
    "scale_dtype",
)


@functools.cache
def _jitted(function: Callable) -> Callable:
    names = set(inspect.signature(function).parameters) & set(_STATIC)
    return jax.jit(function, static_argnames=tuple(names))


def _run(kernel: Kernel, function: Callable, *operands: np.ndarray | None, **static: Any) -> Any:
    """Calls a primitive on the kernel's device; its results in NumPy, floats as float64."""
    operands = jax.device_put(operands, kernel.device)
    results = _jitted(function)(*operands, implementation=kernel.implementation, **static)
    numbers = lambda a: np.asarray(a).astype(np.float64)
    return jax.tree.map(numbers, results)


def _typed(a: np.ndarray | None, dtype: str) -> np.ndarray | None:
    return None if a is None else a.astype(jnp.dtype(dtype))


def _checks(kernel: Kernel, case: Case) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """Each check's name, and the check: it returns what is wrong, or None."""

    def dot(x: np.ndarray, weight: _Weight) -> np.ndarray:
        typed = functools.partial(_typed, dtype=case.dtype)
        if kernel.ragged:
            stack = lambda a: None if a is None else np.stack([a] * EXPERTS)
            sizes = np.array([case.m // 3, 0, case.m - case.m // 3], np.int32)
            operands = (stack(a) for a in (weight.packed, typed(weight.scales), typed(weight.zeros)))
            static = {"group_size": case.group, "out_dtype": case.out_dtype, "config": kernel.config}
            return _run(kernel, _ragged.ragged_dot, typed(ALPHA * x), sizes, *operands, **static)
        return _run(
            kernel,
            _primitive.dot,
            typed(x),
            weight.packed,
            typed(weight.scales),
            typed(weight.zeros),
            typed(weight.bias),
            group_size=case.group,
            alpha=ALPHA,
            out_dtype=case.out_dtype,
            config=kernel.config,
        )

    if case.out_dtype == case.dtype:  # to float32, a kernel may yet round the weight to x's type
        yield "one-hot", lambda: _one_hot(case, dot)
    yield "grid", lambda: _grid(case, dot)
    yield "dense", lambda: _dense(case, dot)
    if kernel.config is not None:
        return

    weight = _weight(case, "dense")

    def pack() -> str | None:
        got = _run(kernel, _primitive.pack, weight.codes.astype(np.uint8))
        return _difference(got, weight.packed.astype(np.float64))

    def dequantize() -> str | None:
        scales, zeros = _typed(weight.scales, case.dtype), _typed(weight.zeros, case.dtype)
        got = _run(
            kernel,
            _primitive.dequantize,
            weight.packed,
            scales,
            zeros,
            k=case.k,
            group_size=case.group,
            dtype=case.out_dtype,
        )
        return _difference(got, _round(weight.dense(case, np.float32), case.out_dtype))

    def quantize() -> str | None:
        w = _typed(case.rng("w").standard_normal((case.k, case.n)), case.out_dtype)
        assert w is not None
        got = _run(
            kernel,
            _primitive.quantize,
            w,
            group_size=case.group,
            symmetric=not case.has_zeros,
            scale_dtype=case.dtype,
        )
        names = ("codes", "scales", "zeros")
        for name, a, b in zip(names, got, _quantize(w, case), strict=False):
            if error := _difference(a, b.astype(np.float64)):
                return f"{name}: {error}"
        return None

    yield "pack", pack
    yield "dequantize", dequantize
    yield "quantize", quantize


# The run ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Count:
    problems: int = 0
    checks: int = 0
    refused: int = 0
    failed: int = 0


@contextlib.contextmanager
def _workers() -> Iterator[concurrent.futures.Executor]:
    """Threads that leave undone, at an interrupt, what they have not begun."""
    pool = concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _errors(pair: tuple[Case, Kernel]) -> list[tuple[str, str | None]] | None:
    """Of every check its name and what is wrong, if anything; None where the kernel refuses the case."""
    case, kernel = pair
    if refusal(kernel, case.problem()) is not None:
        return None
    errors = []
    for name, check in _checks(kernel, case):
        try:
            errors.append((name, check()))
        except jax.errors.JaxRuntimeError as raised:
            errors.append((name, str(raised).splitlines()[0]))
    return errors


def main(kernel: str = "", case: str = "") -> int:
    """Runs the self-test of the kernels and cases whose names contain `kernel` and `case`; prints its result.

    Returns:
      0 if every check passed; 1 if one failed, or if there was none to run.
    """
    some_kernels = [one for one in kernels() if kernel in one.name]
    some_cases = [one for one in cases() if case in one.name]
    counts = {one.name: _Count() for one in some_kernels}
    failures = 0
    # Nearly all of the time goes into compiling a program for each kernel and case: several abreast.
    with Progress(len(some_kernels) * len(some_cases)) as progress, _workers() as workers:
        pairs = list(itertools.product(some_cases, some_kernels))
        for (one_case, one), errors in zip(pairs, workers.map(_errors, pairs), strict=True):
            progress.step(f"{one.name} {one_case.name}")
            count = counts[one.name]
            if errors is None:
                count.refused += 1
                continue
            count.problems += 1
            for check, error in errors:
                count.checks += 1
                if error is None:
                    continue
                count.failed += 1
                failures += 1
                if failures <= MOST_FAILURES_SHOWN:
                    progress.clear()
                    print(f"FAILED {check}: {error}")
                    print(f"  python -m jax_w4a16 verify --kernel '{one.name}' --case {one_case.name}")

    width = max([len(name) for name in counts] + [6])
    print(f"{'kernel':{width}} {'problems':>9} {'refused':>8} {'checks':>7} {'failed':>7}")
    for name, count in counts.items():
        print(
            f"{name:{width}} {count.problems:9} {count.refused:8} {count.checks:7} {count.failed:7}"
            + (" FAILED" if count.failed else "")
        )
    checks = sum(count.checks for count in counts.values())
    if not checks:
        print("FAILED: nothing to check")
    elif failures:
        print(f"FAILED: {failures} of {checks} checks")
    else:
        print(f"OK: {checks} checks")
    return 0 if checks and not failures else 1
