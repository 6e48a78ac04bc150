"""Cases of dot_add_norm and dot_swiglu: operands, what they should give in NumPy, and calls of both."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle

from jax_w4a16 import QuantizedWeight, _fused, dot_add_norm, dot_swiglu

EPSILON = 0.25  # beside means of squares of about 1: what leaves it out is found


# Operands and what is to be computed with them -------------------------------------------------------------


@dataclasses.dataclass
class Call:
    """A case's operands, in NumPy: sums x @ w of about 1, and all that is beside them."""

    case: oracle.Case
    ops: oracle.Operands
    residual: np.ndarray
    norm_scale: np.ndarray
    squares: np.ndarray | None  # of dot_swiglu
    exact: tuple | None = None  # what product() gives, where it is known

    @classmethod
    def make(cls, case, sums=3):
        ops = oracle.operands(case)
        rng = np.random.default_rng([case.seed, 7])
        spread = np.sqrt((ops.weight(case.group) ** 2).sum() / max(case.n, 1)) or 1.0
        ops.x = (ops.x.astype(np.float64) / spread).astype(ops.x.dtype)
        residual = rng.standard_normal((case.m, case.n)).astype(ops.x.dtype)
        norm_scale = rng.uniform(0.5, 1.5, case.n).astype(ops.x.dtype)
        squares = None
        if sums:  # rows of means from 1/4 to 4
            squares = rng.uniform(0.5, 1.5, (case.m, sums)) * case.k / sums
            squares = (squares * np.exp2(rng.uniform(-2, 2, (case.m, 1)))).astype(np.float32)
        return cls(case, ops, residual, norm_scale, squares)

    @property
    def weight(self) -> QuantizedWeight:
        ops = self.ops
        arrays = [None if a is None else jnp.asarray(a) for a in (ops.qweight, ops.scales, ops.zeros)]
        return QuantizedWeight(*arrays, group_size=self.case.group_size, k=self.case.k)

    def rows(self, m):
        """The first m rows of few, whose product is not computed again."""
        self.exact = self.product()
        case, ops = dataclasses.replace(self.case, m=m), dataclasses.replace(self.ops, x=self.ops.x[:m])
        parts = self.residual[:m], self.norm_scale, self.squares[:m], tuple(a[:m] for a in self.exact)
        return Call(case, ops, *parts)

    def product(self):
        """x @ w in float64, and what a kernel's x @ w may be away from it.

        Each weight may be rounded to 16 bits: that is four times what the sum of such errors is expected to
        be. A right sum is never so far off; one of other columns, rows or groups is, a hundred times.
        """
        if self.exact is not None:
            return self.exact
        x, w = self.ops.x.astype(np.float64), self.ops.weight(self.case.group)
        rounding = oracle.half_ulp(oracle.dtype_of(self.case.dtype))
        y = x @ w
        error = 4 * rounding * np.sqrt(x**2 @ w**2) + 2.0**-22 * (np.abs(x) @ np.abs(w)) + 2.0**-24
        if self.case.m > _fused.MOST_FUSED_ROWS:
            error += 1.01 * rounding * np.abs(y)
        return y, error

    def add_norm(self, **options):
        operands = map(jnp.asarray, (self.residual, self.norm_scale))
        return dot_add_norm(jnp.asarray(self.ops.x), self.weight, *operands, **options)

    def swiglu(self, **options):
        squares = None if self.squares is None else jnp.asarray(self.squares)
        return dot_swiglu(jnp.asarray(self.ops.x), self.weight, squares, epsilon=EPSILON, **options)

    def check_add_norm(self, got):
        case, dtype = self.case, oracle.dtype_of(self.case.dtype)
        out, scaled, squares = map(np.asarray, got)
        assert [(a.shape, a.dtype) for a in (out, scaled, squares)] == [
            ((case.m, case.n), dtype),
            ((case.m, case.n), dtype),
            ((case.m, -(-case.n // 16)), np.float32),
        ]
        y, error = self.product()
        want = self.residual.astype(np.float64) + y
        allowed = error + 1.01 * oracle.half_ulp(dtype) * (np.abs(want) + error) + 2.0**-24
        assert (np.abs(out.astype(np.float64) - want) <= allowed).all(), case
        # Of out as it was rounded, both others are exact, but for rounding and float32 sums.
        wide = out.astype(np.float32)
        np.testing.assert_array_equal(scaled, (wide * self.norm_scale.astype(np.float32)).astype(dtype))
        padded = np.pad(wide.astype(np.float64), [(0, 0), (0, -case.n % 16)])
        sums = (padded.reshape(case.m, -1, 16) ** 2).sum(-1)
        np.testing.assert_allclose(squares, sums, rtol=2e-6)

    def check_swiglu(self, got):
        case, dtype, got = self.case, oracle.dtype_of(self.case.dtype), np.asarray(got)
        assert (got.shape, got.dtype) == ((case.m, case.n // 2), dtype)
        y, error = self.product()
        if self.squares is not None:
            sums = self.squares.astype(np.float64).sum(-1, keepdims=True)
            factor = 1 / np.sqrt(sums / case.k + EPSILON)
            y, error = y * factor, error * factor + 4e-6 * np.abs(y * factor)
        halves = lambda a: np.moveaxis(a.reshape(case.m, -1, 2, 8), 2, 0).reshape(2, case.m, -1)
        (gate, up), (gate_error, up_error) = halves(y), halves(error)
        silu = gate / (1 + np.exp(-gate))
        want = silu * up
        # silu's slope is at most 1.1.
        allowed = 1.1 * gate_error * (np.abs(up) + up_error) + np.abs(silu) * up_error
        allowed += (
            1.01 * oracle.half_ulp(dtype) * (np.abs(want) + allowed) + 2.0**-22 * np.abs(want) + 2.0**-24
        )
        assert (np.abs(got.astype(np.float64) - want) <= allowed).all(), case


def dtypes_for(implementation):
    return ("float16", "bfloat16") if implementation == "cuda" else ("float16", "bfloat16", "float32")


def made(m=5, k=256, n=48, group_size=64, dtype="bfloat16", zeros="none", sums=3, seed=0):
    return Call.make(oracle.Case(m, k, n, group_size, dtype, dtype, zeros, seed=seed), sums)


def functions(call, **options):
    """Both products, and their operands: x, weight, what each row has beside it, and norm_scale."""
    x, weight = jnp.asarray(call.ops.x), call.weight
    beside = jnp.asarray(call.residual), jnp.asarray(call.norm_scale)
    found = [(functools.partial(dot_add_norm, **options), (x, weight, *beside))]
    if call.case.n % 16 == 0:
        squares = () if call.squares is None else (jnp.asarray(call.squares),)
        found.append((functools.partial(dot_swiglu, epsilon=EPSILON, **options), (x, weight, *squares)))
    return found


def texts(call, platform="cuda", **options):
    return [
        jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()
        for f, args in functions(call, **options)
    ]
