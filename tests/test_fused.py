"""dot_add_norm, dot_swiglu, interleave: values against NumPy, who serves, transformations, bad calls."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import device_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_w4a16
from jax_w4a16 import QuantizedWeight, _config, _ffi, _fused, dot_add_norm, dot_swiglu, interleave

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


# Values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 8, 16, 17, 40])
@pytest.mark.parametrize("zeros", ["none", "integer", "fractional"])
def test_values(kernel, m, zeros):
    check_values(kernel, m, zeros, (32, 128, -1))


@pytest.mark.parametrize("m", [16, 17])
@pytest.mark.parametrize("zeros", ["none", "fractional"])
def test_values_of_the_reference(m, zeros):
    check_values("reference", m, zeros, (64,))


def check_values(implementation, m, zeros, group_sizes):
    for dtype, group_size in itertools.product(dtypes_for(implementation), group_sizes):
        call = made(m, 256, 96, group_size, dtype, zeros, sums=1 + m % 5)
        call.check_add_norm(call.add_norm(implementation=implementation))
        call.check_swiglu(call.swiglu(implementation=implementation))
        call.squares = None
        call.check_swiglu(call.swiglu(implementation=implementation))


@pytest.mark.parametrize(("m", "k", "n"), [(3, 100, 32), (5, 64, 40), (16, 129, 7), (2, 8, 16), (20, 63, 24)])
def test_sizes_that_fill_no_block(implementation, m, k, n):
    for dtype in dtypes_for(implementation):
        call = made(m, k, n, 32, dtype, "integer")
        call.check_add_norm(call.add_norm(implementation=implementation))
        if n % 16 == 0:
            call.check_swiglu(call.swiglu(implementation=implementation))


def test_the_checks_find_what_is_wrong():
    """Of every result, one number that is wrong by little: two roundings, or one part in 10^5."""
    call = made()
    out, scaled, squares = map(np.array, call.add_norm())
    for i, (array, change) in enumerate([(out, 1.05), (scaled, 1.01), (squares, 1.00001)]):
        wrong = [a.copy() for a in (out, scaled, squares)]
        place = np.unravel_index(np.abs(array.astype(np.float32)).argmax(), array.shape)
        wrong[i][place] *= change
        with pytest.raises(AssertionError):
            call.check_add_norm(wrong)
    result = np.array(call.swiglu())
    result[np.unravel_index(np.abs(result.astype(np.float32)).argmax(), result.shape)] *= 1.05
    with pytest.raises(AssertionError):
        call.check_swiglu(result)
    for part in ("residual", "norm_scale"):
        changed = dataclasses.replace(call, **{part: np.roll(getattr(call, part), 1, -1)})
        with pytest.raises(AssertionError):
            call.check_add_norm(changed.add_norm())
    for squares in (None, call.squares[::-1], call.squares * 1.1):
        with pytest.raises(AssertionError):
            call.check_swiglu(dataclasses.replace(call, squares=squares).swiglu())


@pytest.mark.parametrize(("m", "k", "n"), [(0, 64, 32), (3, 0, 32), (3, 64, 0)])
def test_empty(implementation, m, k, n):
    call = made(m, k, n, -1)
    out, scaled, squares = call.add_norm(implementation=implementation)
    assert (out.shape, scaled.shape, squares.shape) == ((m, n), (m, n), (m, n // 16))
    got = call.swiglu(implementation=implementation)
    assert got.shape == (m, n // 2)
    if k == 0:
        np.testing.assert_array_equal(out, call.residual)
        np.testing.assert_array_equal(np.asarray(got, np.float32), 0)


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (1, 4, 6)])
def test_leading_dimensions(implementation, lead):
    call = made(int(np.prod(lead)))
    rows = lambda a: jnp.asarray(a).reshape(*lead, a.shape[-1])
    x, weight, options = rows(call.ops.x), call.weight, {"implementation": implementation}
    got = dot_add_norm(x, weight, rows(call.residual), jnp.asarray(call.norm_scale), **options)
    assert [a.shape for a in got] == [(*lead, 48), (*lead, 48), (*lead, 3)]
    call.check_add_norm([a.reshape(-1, a.shape[-1]) for a in got])
    got = dot_swiglu(x, weight, rows(call.squares), epsilon=EPSILON, **options)
    assert got.shape == (*lead, 24)
    call.check_swiglu(got.reshape(-1, 24))


@pytest.mark.parametrize("m", [4, 20])
def test_permutation_and_input_scale_change_x_first(m):
    call = made(m)
    rng = np.random.default_rng(3)
    order = rng.permutation(256).astype(np.int32)
    scale = np.exp2(rng.integers(-1, 2, 256)).astype(call.ops.x.dtype)  # exact
    changed = dataclasses.replace(call.weight, permutation=order, input_scale=scale)
    x = jnp.asarray(call.ops.x)
    call.ops.x = (call.ops.x * scale)[:, order]
    got = dot_add_norm(x, changed, jnp.asarray(call.residual), jnp.asarray(call.norm_scale))
    call.check_add_norm(got)
    call.check_swiglu(dot_swiglu(x, changed, jnp.asarray(call.squares), epsilon=EPSILON))


def test_numpy_operands_and_16_bit_scales_beside_float32():
    call = made(dtype="float32")
    ops, weight = call.ops, jax.tree.map(np.asarray, call.weight)
    ops.scales = ops.scales.astype(np.float16)
    weight = dataclasses.replace(weight, scales=ops.scales)
    call.check_add_norm(dot_add_norm(ops.x, weight, call.residual, call.norm_scale))
    call.check_swiglu(dot_swiglu(ops.x, weight, call.squares, epsilon=EPSILON))


def test_default_epsilon():
    call = made()
    tiny = dataclasses.replace(call, squares=call.squares * 1e-5)
    x, squares = jnp.asarray(call.ops.x), jnp.asarray(tiny.squares)
    got = dot_swiglu(x, call.weight, squares)
    np.testing.assert_array_equal(got, dot_swiglu(x, call.weight, squares, epsilon=1e-5))
    assert (got != dot_swiglu(x, call.weight, squares, epsilon=1e-6)).any()


@pytest.mark.parametrize("m", [2, 20])
def test_rms_norm_linear_swiglu_is_the_plain_model(implementation, m):
    """A layer after attention, up to the next norm: o, sum, norm, gate and up, SwiGLU, down, sum, norm."""
    hidden, width, epsilon = 128, 96, 1e-2
    rng = np.random.default_rng(m)
    dtype = jnp.bfloat16
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    quantize = lambda k, n: jax_w4a16.quantize(draw(k, n) / np.sqrt(k).astype(dtype), group_size=32)
    o, gate, up, down = (
        quantize(*shape) for shape in ((hidden, hidden), (hidden, width), (hidden, width), (width, hidden))
    )
    x, attended = draw(m, hidden), draw(m, hidden)
    norms = jnp.asarray(rng.uniform(0.5, 1.5, (2, hidden)), dtype)
    options = {"implementation": implementation}

    @jax.jit
    def fused(x, attended):
        x, scaled, squares = dot_add_norm(attended, o, x, norms[0], **options)
        features = dot_swiglu(scaled, interleave(gate, up), squares, epsilon=epsilon, **options)
        x, scaled, squares = dot_add_norm(features, down, x, norms[1], **options)
        return x, scaled * jax.lax.rsqrt(squares.sum(-1, keepdims=True) / hidden + epsilon)

    wide = lambda a: np.asarray(a, np.float64)
    times = lambda a, weight: a @ wide(weight.dequantize(jnp.float32))
    norm = lambda a, scale: a / np.sqrt((a**2).mean(-1, keepdims=True) + epsilon) * wide(scale)
    plain = wide(x) + times(wide(attended), o)
    normed = norm(plain, norms[0])
    gated = times(normed, gate)
    plain = plain + times(gated / (1 + np.exp(-gated)) * times(normed, up), down)
    for got, want in zip(fused(x, attended), (plain, norm(plain, norms[1])), strict=True):
        assert np.abs(wide(got) - want).max() <= 0.02 * np.abs(want).max()


# interleave ------------------------------------------------------------------------------------------------


def pair(*lead, k=200, width=48, group_size=64, zeros="integer"):
    """Gate and up, and their arrays in plain order."""
    cases = [oracle.Case(1, k, width, group_size, zeros=zeros, seed=i) for i in range(2 * int(np.prod(lead)))]
    all_ops = [oracle.operands(case) for case in cases]
    stack = lambda ops, name: np.stack([getattr(o, name) for o in ops]).reshape(
        *lead, *getattr(ops[0], name).shape
    )
    weights, plain = [], []
    for ops in (all_ops[::2], all_ops[1::2]):
        names = ["qweight", "scales"] + ["zeros"] * (zeros != "none")
        weights.append(QuantizedWeight(*(stack(ops, name) for name in names), group_size=group_size, k=k))
        plain.append({name: stack(ops, name) for name in ("codes", *names[1:])})
    return weights, plain


def mixed(gate, up):
    """8 columns of gate, 8 of up, and so on: column by column."""
    columns = []
    for i in range(0, gate.shape[-1], 8):
        columns += [gate[..., i : i + 8], up[..., i : i + 8]]
    return np.concatenate(columns, -1)


@pytest.mark.parametrize("lead", [(), (3,), (2, 2)])
@pytest.mark.parametrize("zeros", ["none", "fractional"])
@pytest.mark.parametrize("group_size", [64, -1])
def test_interleave_is_that_of_the_codes(lead, zeros, group_size):
    (gate, up), plain = pair(*lead, zeros=zeros, group_size=group_size)
    for weight in (interleave(gate, up), jax.jit(interleave)(gate, up)):
        weight.validate()
        assert (weight.shape, weight.group_size, weight.zeros is None) == (
            (200, 96),
            group_size,
            zeros == "none",
        )
        codes = weight.qweight.reshape(-1, *weight.qweight.shape[-3:])
        codes = np.stack([jax_w4a16.unpack(c, weight.shape) for c in codes]).reshape(*lead, *weight.shape)
        np.testing.assert_array_equal(codes, mixed(*(p["codes"] for p in plain)))
        for name in plain[0].keys() - {"codes"}:
            np.testing.assert_array_equal(getattr(weight, name), mixed(*(p[name] for p in plain)))


def test_interleave_of_packed_codes_is_that_of_the_oracle():
    (gate, up), plain = pair(k=128)
    want = oracle.pack(mixed(*(p["codes"] for p in plain)))
    np.testing.assert_array_equal(interleave(gate, up).qweight, want)


def test_swiglu_of_interleaved_weights_is_that_of_two_products(implementation):
    (gate, up), _ = pair(k=256)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 256)) / 16, jnp.bfloat16)
    got = dot_swiglu(x, interleave(gate, up), implementation=implementation)
    options = {"preferred_element_type": jnp.float32, "implementation": implementation}
    gate, up = (jax_w4a16.dot(x, weight, **options) for weight in (gate, up))
    want = np.asarray(jax.nn.silu(gate) * up)
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=2.0**-6 * np.abs(want).max())


def test_interleave_refuses():
    (gate, up), _ = pair()
    narrow, odd = pair(width=32)[0][1], pair(width=24)[0]
    scaled = dataclasses.replace(up, input_scale=np.ones(200, np.float32))
    for parts, error, match in (
        ((gate, up.qweight), TypeError, "up: expected a QuantizedWeight, got ndarray"),
        ((gate.scales, up), TypeError, "gate: expected a QuantizedWeight, got ndarray"),
        (odd, ValueError, "gate: expected N to be a multiple of 16, got 24"),
        ((gate, narrow), ValueError, "up: expected N 48 as of gate, got 32"),
        ((gate, pair(group_size=32)[0][1]), ValueError, "up: expected group_size 64 as of gate, got 32"),
        ((gate, pair(zeros="none")[0][1]), ValueError, "up: expected zeros some as of gate, got none"),
        ((gate, pair(k=201)[0][1]), ValueError, "up: expected K 200 as of gate, got 201"),
        ((gate, pair(2)[0][1]), ValueError, r"up: expected leading dimensions \(\) as of gate, got \(2,\)"),
        (
            (gate, dataclasses.replace(up, scales=up.scales.astype(np.float16), zeros=up.zeros)),
            ValueError,
            "up: expected dtype bfloat16 as of gate, got float16",
        ),
        ((gate, scaled), ValueError, r"up: expected no change of the inputs, got \['input_scale'\]"),
    ):
        with pytest.raises(error, match=match):
            interleave(*parts)


# Which kernel serves ---------------------------------------------------------------------------------------


@pytest.fixture
def cuda_build(monkeypatch):
    """This build and machine have CUDA kernels, as far as lowering asks; a GPU is another thing."""
    monkeypatch.setattr(_ffi, "has_cuda", lambda: True)
    monkeypatch.setattr(_config, "local_gpu", lambda: None)


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


@pytest.mark.usefixtures("cuda_build")
@pytest.mark.parametrize("options", [{}, {"implementation": "cuda"}])
def test_the_kernel_serves_few_rows(options):
    for m, zeros in itertools.product((1, 16), ("none", "integer")):
        add_norm, swiglu = texts(made(m, zeros=zeros), **options)
        for text, epilogue, results in ((add_norm, "add_norm", 3), (swiglu, "swiglu", 1)):
            (line,) = [line for line in text.splitlines() if "custom_call" in line]
            assert "@w4a16_fused_dot(" in line
            assert f'epilogue = "{epilogue}"' in line
            assert 'config = "auto"' in line
            assert "group_size = 64 : i64" in line
            assert f"has_zeros = {str(zeros != 'none').lower()}" in line
            assert f"has_squares = {str(epilogue == 'swiglu').lower()}" in line
            assert line.split("->")[-1].count("tensor<") == results
        assert "epsilon = 2.500000e-01 : f32" in swiglu
        assert "has_squares = false" in texts(dataclasses.replace(made(m), squares=None), **options)[1]


@pytest.mark.usefixtures("cuda_build")
@pytest.mark.parametrize(
    "sizes",
    [{"m": 17}, {"m": 0}, {"n": 40}, {"n": 0}, {"k": 100}, {"k": 0, "group_size": -1}, {"group_size": 32}],
    ids=str,
)
def test_dot_serves_other_sizes(sizes):
    for text in texts(made(**sizes)):
        assert "@w4a16_dot(" in text
        assert "@w4a16_fused_dot(" not in text
        # Only few rows are not rounded before they are added or multiplied.
        few = "xf32>" in next(line for line in text.splitlines() if "@w4a16_dot(" in line)
        assert few == (sizes.get("m") != 17)


@pytest.mark.usefixtures("cuda_build", "fresh_warnings")
def test_dot_serves_other_platforms_types_and_implementations(monkeypatch):
    assert all("@w4a16_dot(" in text for text in texts(made(), "cpu"))
    for text in texts(made(), "cuda", implementation="reference"):
        assert "custom_call @w4a16" not in text
    with pytest.warns(UserWarning, match="no kernel for the platform tpu"):
        assert not any("@w4a16_" in text for text in texts(made(), "tpu"))
    with pytest.warns(UserWarning, match="take x of float16 or bfloat16, got float32"):
        assert not any("@w4a16_" in text for text in texts(made(dtype="float32")))
    with pytest.raises(ValueError, match="'cpu' cannot serve: the program is for cuda"):
        texts(made(), implementation="cpu")
    with pytest.raises(ValueError, match="'cuda' cannot serve: the program is for cpu"):
        texts(made(), "cpu", implementation="cuda")
    monkeypatch.setattr(_ffi, "has_cuda", lambda: False)
    with pytest.warns(UserWarning, match="this build has no CUDA kernels"):
        assert not any("@w4a16_" in text for text in texts(made()))


H200 = _config.Device("NVIDIA H200", 90, 132)


@pytest.mark.usefixtures("cuda_build")
@pytest.mark.parametrize("zeros", ["none", "integer"])
def test_the_configuration_is_chosen_for_the_gpu(monkeypatch, zeros):
    asked, choose = [], _config.choose

    def record(problem, device, explicit):
        asked.append((problem, device, explicit))
        return choose(problem, device, explicit)

    monkeypatch.setattr(_config, "local_gpu", lambda: H200)
    monkeypatch.setattr(_config, "choose", record)
    for text, epilogue in zip(texts(made(zeros=zeros)), ("add_norm", "swiglu"), strict=True):
        problem = _config.Problem(
            5, 48, 256, 64, "bfloat16", "bfloat16", zeros != "none", False, epilogue=epilogue
        )
        assert asked.pop(0) == (problem, H200, None)
        name, workspace = choose(problem, H200)
        assert workspace == 0
        assert name.startswith("decode_")
        assert f'config = "{name}"' in text
        assert "xui8>" not in text


@pytest.mark.usefixtures("cuda_build")
def test_a_tuned_configuration_is_that_of_the_plain_product(monkeypatch, tmp_path):
    from jax_w4a16 import _tuned

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plain = _config.Problem(5, 48, 256, 64, "bfloat16", "bfloat16", False, False)
    problem = dataclasses.replace(plain, epilogue="swiglu")
    first, _ = _config.choose(problem, H200)
    facts = {**vars(problem), "compute_capability": 90, "num_sms": 132}
    able, unable = [], []
    for name in _ffi.build_info()["configs"]:
        refused = _ffi.native.can_implement(name, **facts) is not None
        (unable if refused else able).append(name)
    other = next(name for name in able if name != first)
    for tuned, chosen in ((other, other), (next(n for n in unable if n.startswith("wgmma_")), first)):
        _tuned.save(_tuned.path(H200.kind), H200.kind, [{**vars(plain), "config": tuned}])
        assert _config.choose(problem, H200)[0] == chosen


@pytest.mark.usefixtures("cuda_build")
def test_dot_serves_where_no_kernel_of_this_gpu_can(monkeypatch):
    def refuse(problem, device, explicit):
        if problem.epilogue != "none":
            raise _config.NoKernelError("none")
        return "some_config", 0

    monkeypatch.setattr(_config, "local_gpu", lambda: H200)
    monkeypatch.setattr(_config, "choose", refuse)
    for text in texts(made()):
        assert "@w4a16_dot(" in text
        assert "@w4a16_fused_dot(" not in text


@pytest.mark.parametrize("here", [None, H200], ids=["no GPU", "GPU"])
def test_export(monkeypatch, here):
    """For CUDA, whether or not there is a GPU; with an unknown number of rows, `dot`."""
    monkeypatch.setattr(_config, "local_gpu", lambda: here)
    options = {"platforms": ("cpu", "cuda"), "disabled_checks": jax_w4a16.DISABLE_JAX_EXPORT_CHECKS}
    (m,) = jax.export.symbolic_shape("m")
    for product, (x, weight, beside, *rest) in functions(made()):
        f = jax.jit(lambda x, beside: product(x, weight, beside, *rest))  # noqa: B023
        exported = jax.export.export(f, **options)(x, beside)
        module = exported.mlir_module()
        assert module.count("@w4a16_fused_dot(") == module.count("@w4a16_dot(") == 1
        assert module.count('config = "auto"') == 2
        loaded = jax.export.deserialize(exported.serialize())
        want = jax.tree.leaves(f(x, beside))
        for a, expected in zip(jax.tree.leaves(loaded.call(x, beside)), want, strict=True):
            np.testing.assert_array_equal(a, expected)
        rows = lambda a: jax.ShapeDtypeStruct((m, *a.shape[1:]), a.dtype)
        exported = jax.export.export(f, **options)(rows(x), rows(beside))
        module = exported.mlir_module()
        assert "@w4a16_fused_dot(" not in module
        assert module.count("@w4a16_dot(") == 2
        for a, expected in zip(jax.tree.leaves(exported.call(x, beside)), want, strict=True):
            a, expected = np.asarray(a, np.float32), np.asarray(expected, np.float32)
            np.testing.assert_allclose(a, expected, atol=0.02 * np.abs(expected).max())


def test_primitive_shows_in_the_jaxpr():
    for f, args in functions(made()):
        assert str(jax.make_jaxpr(f)(*args)).count("w4a16_fused_dot[") == 1


# On a GPU --------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu():
    device = device_of("cuda")
    with jax.default_device(device):
        yield device


def run_compiled(f, args):
    """A result, of a program in which one fused kernel and no other product is."""
    run = jax.jit(f).lower(*args).compile()
    text = run.as_text()
    assert text.count('custom_call_target="w4a16_fused_dot"') == 1
    assert 'custom_call_target="w4a16_dot"' not in text
    assert "__cublas" not in text
    return run(*args)


def check_on_gpu(call):
    add_norm, swiglu = functions(call, implementation="cuda")
    call.check_add_norm(run_compiled(*add_norm))
    call.check_swiglu(run_compiled(*swiglu))
    if call.squares is not None:
        call.squares = None
        _, (swiglu, args) = functions(call, implementation="cuda")
        call.check_swiglu(run_compiled(swiglu, args))


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("m", [1, 2, 5, 8, 16])
@pytest.mark.parametrize("zeros", ["none", "fractional"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gpu_groups_and_sizes(m, zeros, dtype):
    sizes = [(48, 256), (256, 512), (16, 8), (80, 1000)]
    for (n, k), group_size in itertools.product(sizes, (64, 128, -1)):
        check_on_gpu(made(m, k, n, group_size, dtype, zeros, sums=1 + k // 16))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("n", "k"), [(4096, 256), (4096, 4096), (28672, 4096), (4096, 14336)])
@pytest.mark.parametrize(
    ("dtype", "group_size", "zeros"), [("float16", 64, "integer"), ("bfloat16", 128, "none")]
)
def test_gpu_layers_of_llama(n, k, dtype, group_size, zeros):
    most = made(16, k, n, group_size, dtype, zeros, sums=k // 16)
    for m in (1, 2, 5, 8, 16):
        check_on_gpu(most.rows(m))


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("m", [1, 8, 16])
def test_gpu_every_configuration(m):
    """Each that can serve gives right numbers, and there is more than one."""
    device = _config.local_gpu()
    assert device is not None
    for k, n in ((1000, 272), (4096, 1024)):
        call = made(m, k, n, 128, zeros="integer")
        for epilogue in ("add_norm", "swiglu"):
            problem = _config.Problem(m, n, k, 128, "bfloat16", "bfloat16", True, False, epilogue=epilogue)
            facts = {**vars(problem), **{f: getattr(device, f) for f in ("compute_capability", "num_sms")}}
            served = 0
            for name in _ffi.build_info()["configs"]:
                if name.startswith("ragged_") or _ffi.native.can_implement(name, **facts) is not None:
                    continue
                weight, options = call.weight, {"group_size": 128, "epilogue": epilogue, "config": name}
                more = (call.residual, call.norm_scale) if epilogue == "add_norm" else (call.squares,)
                got = jax.jit(functools.partial(_fused.fused_dot, epsilon=EPSILON, **options))(
                    jnp.asarray(call.ops.x),
                    weight.qweight,
                    weight.scales,
                    weight.zeros,
                    more=tuple(map(jnp.asarray, more)),
                )
                call.check_add_norm(got) if epilogue == "add_norm" else call.check_swiglu(got[0])
                served += 1
            assert served > 1


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("m", "n", "k"), [(1, 4096, 4096), (16, 256, 4096), (5, 48, 1000)])
def test_gpu_same_call_same_bits(m, n, k):
    for f, args in functions(made(m, k, n, 128, zeros="integer")):
        first = run_compiled(f, args)
        again = jax.jit(f)
        for _ in range(20):
            jax.tree.map(np.testing.assert_array_equal, again(*args), first)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_gpu_nan_stays_in_its_row():
    call = made(4)
    x, residual = call.ops.x.copy(), call.residual.copy()
    x[1, 100], residual[2, 20] = np.nan, np.nan
    (add_norm, (_, weight, _, norm_scale)), (swiglu, (_, *others)) = functions(call, implementation="cuda")
    got = add_norm(jnp.asarray(x), weight, jnp.asarray(residual), norm_scale)
    for a, width in zip(got, (1, 1, 16), strict=True):
        found = np.isnan(np.asarray(a, np.float32))
        want = np.zeros_like(found)
        want[1] = True
        want[2, 20 // width] = True
        np.testing.assert_array_equal(found, want)
    found = np.isnan(np.asarray(swiglu(jnp.asarray(x), *others), np.float32))
    np.testing.assert_array_equal(found, np.arange(4)[:, None] == 1 + np.zeros(24, int))


# Transformations -------------------------------------------------------------------------------------------


def written_out(call):
    """Both products in plain float32 JAX, as functions of a dict of all their differentiable operands."""
    case, codes = call.case, jnp.asarray(call.ops.codes, jnp.float32)
    rows = lambda a: jnp.repeat(a, case.group, axis=0)[: case.k]

    def product(v):
        zero = rows(v["zeros"]) if "zeros" in v else 8.0
        return jnp.matmul(v["x"], (codes - zero) * rows(v["scales"]), precision="highest")

    def add_norm(v):
        out = v["residual"] + product(v)
        return out, out * v["norm_scale"], (out.reshape(case.m, -1, 16) ** 2).sum(-1)

    def swiglu(v):
        y = product(v) / jnp.sqrt(v["squares"].sum(-1, keepdims=True) / case.k + EPSILON)
        y = y.reshape(case.m, -1, 2, 8)
        gate, up = y[:, :, 0].reshape(case.m, -1), y[:, :, 1].reshape(case.m, -1)
        return (gate / (1 + jnp.exp(-gate)) * up,)

    return {"add_norm": add_norm, "swiglu": swiglu}


def as_functions(call, implementation="auto"):
    """Both products as functions of such a dict."""
    weight, options = call.weight, {"implementation": implementation}
    of = lambda v: dataclasses.replace(weight, scales=v["scales"], zeros=v.get("zeros"))
    return {
        "add_norm": lambda v: dot_add_norm(v["x"], of(v), v["residual"], v["norm_scale"], **options),
        "swiglu": lambda v: (dot_swiglu(v["x"], of(v), v["squares"], epsilon=EPSILON, **options),),
    }


def values_of(call, epilogue):
    names = ["residual", "norm_scale"] if epilogue == "add_norm" else ["squares"]
    values = {"x": call.ops.x, "scales": call.ops.scales} | {name: getattr(call, name) for name in names}
    values |= {} if call.ops.zeros is None else {"zeros": call.ops.zeros}
    return {name: jnp.asarray(value) for name, value in values.items()}


def loss_of(f):
    """A number that depends on every result, each number of which it weighs in another way."""

    def loss(v):
        outs = f(v)
        weigh = lambda i, a: (a.astype(jnp.float32) * jnp.sin(jnp.arange(a.size) + i).reshape(a.shape)).sum()
        return sum(weigh(i, a) for i, a in enumerate(outs))

    return loss


def assert_close(got, want, tolerance):
    for name, w in want.items():
        assert (got[name].shape, got[name].dtype) == (w.shape, w.dtype)
        g, w = np.asarray(got[name], np.float64), np.asarray(w, np.float64)
        assert np.abs(w).max() > 0
        assert np.abs(g - w).max() <= tolerance * np.abs(w).max(), name


EPILOGUES = pytest.mark.parametrize("epilogue", ["add_norm", "swiglu"])


@EPILOGUES
@pytest.mark.parametrize(("m", "zeros"), [(5, "none"), (5, "fractional"), (20, "fractional")])
def test_gradients(epilogue, m, zeros):
    call = made(m, 200, 48, dtype="float32", zeros=zeros)
    values, plain = values_of(call, epilogue), written_out(call)[epilogue]
    want = jax.jit(jax.grad(loss_of(plain)))(values)
    for implementation in ("cpu", "reference") if m == 5 else ("cpu",):
        f = as_functions(call, implementation)[epilogue]
        assert_close(jax.jit(jax.grad(loss_of(f)))(values), want, 1e-4)


@EPILOGUES
def test_one_gradient_at_a_time(epilogue):
    call = made(3, 64, 32, 32, "float32", "fractional")
    values, loss = values_of(call, epilogue), loss_of(as_functions(call)[epilogue])
    want = jax.jit(jax.grad(loss_of(written_out(call)[epilogue])))(values)
    for name, value in values.items():
        got = jax.jit(jax.grad(lambda v, name=name: loss({**values, name: v})))(value)
        assert_close({name: got}, {name: want[name]}, 1e-4)


@EPILOGUES
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradients_in_16_bits(implementation, epilogue, dtype):
    call = made(6, 256, 48, dtype=dtype, zeros="fractional")
    values = values_of(call, epilogue)
    got = jax.jit(jax.grad(loss_of(as_functions(call, implementation)[epilogue])))(values)
    wide = {name: value.astype(jnp.float32) for name, value in values.items()}
    want = jax.grad(loss_of(written_out(call)[epilogue]))(wide)
    want = {name: value.astype(values[name].dtype) for name, value in want.items()}
    assert_close(got, want, 5e-3 if dtype == "float16" else 4e-2)


@EPILOGUES
def test_jvp_and_second_derivatives(epilogue):
    call = made(3, 64, 32, 32, "float32", "fractional")
    values = values_of(call, epilogue)
    f, plain = as_functions(call)[epilogue], written_out(call)[epilogue]
    rng = np.random.default_rng(0)
    tangents = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), values)
    for got, want in zip(
        *(
            jax.tree.leaves(jax.jit(functools.partial(jax.jvp, g))((values,), (tangents,)))
            for g in (f, plain)
        ),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-5 * np.abs(want).max())
    norm = lambda g: lambda v: sum((a**2).sum() for a in jax.grad(loss_of(g))(v).values())
    assert_close(jax.jit(jax.grad(norm(f)))(values), jax.jit(jax.grad(norm(plain)))(values), 1e-3)


@EPILOGUES
def test_codes_get_float0(epilogue):
    call = made()
    more = (call.residual, call.norm_scale) if epilogue == "add_norm" else (call.squares,)
    product = {"add_norm": dot_add_norm, "swiglu": dot_swiglu}[epilogue]

    def loss(x, qweight):
        outs = product(x, dataclasses.replace(call.weight, qweight=qweight), *more)
        return jax.tree.leaves(outs)[0].astype(jnp.float32).sum()

    qweight = call.weight.qweight
    grads = jax.grad(loss, (0, 1), allow_int=True)(jnp.asarray(call.ops.x), qweight)
    assert grads[1].dtype == jax.dtypes.float0
    assert grads[1].shape == qweight.shape
    (grad,) = jax.grad(loss, (1,), allow_int=True)(jnp.asarray(call.ops.x), qweight)
    assert grad.dtype == jax.dtypes.float0
    still = np.zeros(qweight.shape, jax.dtypes.float0)
    x = jnp.asarray(call.ops.x)
    got = jax.jvp(loss, (x, qweight), (jnp.ones_like(x), still))
    np.testing.assert_array_equal(got, jax.jvp(lambda x: loss(x, qweight), (x,), (jnp.ones_like(x),)))


@EPILOGUES
@pytest.mark.parametrize("mapped", ["both", "x", "beside"])
def test_vmap_of_rows_is_one_call(implementation, epilogue, mapped):
    calls = [made(4, seed=i) for i in range(3)]
    weight, norm_scale = calls[0].weight, jnp.asarray(calls[0].norm_scale)
    name = "residual" if epilogue == "add_norm" else "squares"
    x = np.stack([c.ops.x for c in calls])
    beside = np.stack([getattr(c, name) for c in calls])
    x, beside = (
        jnp.asarray(x if mapped != "beside" else x[0]),
        jnp.asarray(beside if mapped != "x" else beside[0]),
    )
    options = {"implementation": implementation}
    f = {
        "add_norm": lambda x, residual: dot_add_norm(x, weight, residual, norm_scale, **options),
        "swiglu": lambda x, squares: (dot_swiglu(x, weight, squares, epsilon=EPSILON, **options),),
    }[epilogue]
    want = f(*(jnp.broadcast_to(a, (3, *a.shape[-2:])) for a in (x, beside)))
    lead = lambda a, axis: axis if a.ndim == 3 else None
    for axis in range(2):
        run = jax.vmap(f, (lead(x, axis), lead(beside, axis)), out_axes=axis)
        args = [jnp.moveaxis(a, 0, axis) if a.ndim == 3 else a for a in (x, beside)]
        text = str(jax.make_jaxpr(run)(*args))
        assert text.count("w4a16_fused_dot[") == 1
        assert "scan[" not in text
        for got, expected in zip(run(*args), want, strict=True):
            np.testing.assert_array_equal(got, np.moveaxis(expected, 0, axis))


@pytest.mark.parametrize("m", [1, 4])
def test_vmap_of_single_rows(m):
    """x [K] and what is beside it; and of a product without squares."""
    call = made(m)
    (add_norm, args), (swiglu, swiglu_args) = functions(call)
    got = jax.vmap(add_norm, (0, None, 0, None))(*args)
    jax.tree.map(np.testing.assert_array_equal, got, add_norm(*args))
    for count in (3, 2):
        args = swiglu_args[:count]
        got = jax.vmap(swiglu, (0, None, 0)[:count])(*args)
        np.testing.assert_array_equal(got, swiglu(*args))


@pytest.mark.parametrize(
    ("epilogue", "names"),
    [
        ("add_norm", ["scales"]),
        ("add_norm", ["zeros", "residual"]),
        ("add_norm", ["norm_scale"]),
        ("add_norm", ["norm_scale", "residual", "scales", "x", "zeros"]),
        ("swiglu", ["scales"]),
        ("swiglu", ["zeros", "squares"]),
        ("swiglu", ["scales", "squares", "x", "zeros"]),
    ],
)
def test_vmap_of_weights(epilogue, names):
    calls = [made(4, zeros="integer", seed=i) for i in range(3)]
    f = as_functions(calls[0])[epilogue]
    first, *_ = each = [values_of(call, epilogue) for call in calls]
    want = [f(first | {name: values[name] for name in names}) for values in each]
    stack = first | {name: jnp.stack([values[name] for values in each]) for name in names}
    axes = {name: 0 if name in names else None for name in stack}
    got = jax.vmap(f, (axes,))(stack)
    for a, *some in zip(got, *want, strict=True):
        np.testing.assert_array_equal(a, np.stack(some))
    changed = got[1] if names == ["norm_scale"] else got[0]
    assert (changed[0] != changed[1]).any()


def test_vmap_of_a_stack_of_weights():
    calls = [made(4, seed=i) for i in range(3)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *(c.weight for c in calls))
    x, squares = jnp.asarray(calls[0].ops.x), jnp.asarray(calls[0].squares)
    got = jax.vmap(dot_swiglu, (None, 0, None))(x, stack, squares)
    want = jnp.stack([dot_swiglu(x, c.weight, squares) for c in calls])
    np.testing.assert_array_equal(got, want)


@EPILOGUES
def test_vmap_of_grad_and_grad_of_vmap(epilogue):
    calls = [made(4, 64, 32, 32, "float32", seed=i) for i in range(3)]
    loss = loss_of(as_functions(calls[0])[epilogue])
    each = [values_of(call, epilogue) for call in calls]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *each)
    grad = jax.jit(jax.grad(loss))
    want = jax.tree.map(lambda *a: jnp.stack(a), *map(grad, each))
    assert_close(jax.jit(jax.vmap(jax.grad(loss)))(stack), want, 1e-5)
    assert_close(jax.jit(jax.grad(lambda v: jax.vmap(loss)(v).sum()))(stack), want, 1e-5)


def test_remat_and_scan():
    """Layers in a scan, rematerialised: values and gradients of them unrolled."""
    hidden, layers = 64, 3
    rng = np.random.default_rng(0)
    quantize = lambda k, n: jax_w4a16.quantize(
        jnp.asarray(rng.standard_normal((k, n)) / 8, jnp.float32), group_size=32, scale_dtype=jnp.float32
    )
    members = [
        (interleave(quantize(hidden, 48), quantize(hidden, 48)), quantize(48, hidden)) for _ in range(layers)
    ]
    norms = jnp.asarray(rng.uniform(0.5, 1.5, hidden), jnp.float32)

    def layer(carry, weights):
        x, scaled, squares = carry
        return dot_add_norm(dot_swiglu(scaled, weights[0], squares), weights[1], x, norms)

    def begin(x):
        return x, x * norms, (x**2).sum(-1, keepdims=True) * jnp.ones(4) / 4

    def scanned(x, stack):
        step = jax.checkpoint(lambda carry, weights: (layer(carry, weights), None))
        return jax.lax.scan(step, begin(x), stack)[0][1].sum()

    def unrolled(x):
        carry = begin(x)
        for weights in members:
            carry = layer(carry, weights)
        return carry[1].sum()

    x = jnp.asarray(rng.standard_normal((2, hidden)), jnp.float32)
    stack = jax.tree.map(lambda *a: jnp.stack(a), *members)
    value, grad = jax.jit(jax.value_and_grad(scanned))(x, stack)
    want, want_grad = jax.jit(jax.value_and_grad(unrolled))(x)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(grad, want_grad, rtol=1e-3, atol=1e-5)


# Several devices -------------------------------------------------------------------------------------------


def mesh(kind=AxisType.Auto, size=2):
    return jax.make_mesh((size,), ("d",), axis_types=(kind,), devices=jax.devices("cpu")[:size])


COLUMNS = QuantizedWeight(P(None, "d", None), P(None, "d"), P(None, "d"), group_size=64, k=256)


def test_shard_map_over_columns_and_rows():
    call = made(4, n=64, zeros="integer")
    x, weight, squares = jnp.asarray(call.ops.x), call.weight, jnp.asarray(call.squares)
    swiglu = functools.partial(dot_swiglu, epsilon=EPSILON)
    columns = jax.shard_map(swiglu, mesh=mesh(), in_specs=(P(), COLUMNS, P()), out_specs=P(None, "d"))
    call.check_swiglu(jax.jit(columns)(x, weight, squares))
    rows = jax.shard_map(swiglu, mesh=mesh(), in_specs=(P("d"), P(), P("d")), out_specs=P("d"))
    call.check_swiglu(jax.jit(rows)(x, weight, squares))
    residual, norm_scale = jnp.asarray(call.residual), jnp.asarray(call.norm_scale)
    rows = jax.shard_map(
        dot_add_norm, mesh=mesh(), in_specs=(P("d"), P(), P("d"), P()), out_specs=(P("d"),) * 3
    )
    call.check_add_norm(jax.jit(rows)(x, weight, residual, norm_scale))
    columns = jax.shard_map(
        dot_add_norm,
        mesh=mesh(),
        in_specs=(P(), COLUMNS, P(None, "d"), P("d")),
        out_specs=(P(None, "d"),) * 3,
    )
    call.check_add_norm(jax.jit(columns)(x, weight, residual, norm_scale))


@pytest.mark.usefixtures("cuda_build")
def test_the_kernel_serves_each_part_in_shard_map():
    call = made(4, n=64)
    weight = dataclasses.replace(COLUMNS, zeros=None)
    run = jax.shard_map(dot_swiglu, mesh=mesh(), in_specs=(P(), weight, P()), out_specs=P(None, "d"))
    args = jnp.asarray(call.ops.x), call.weight, jnp.asarray(call.squares)
    text = jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    (line,) = [line for line in text.splitlines() if "custom_call @w4a16" in line]
    assert "@w4a16_fused_dot(" in line
    assert "-> tensor<4x16xbf16>" in line


@pytest.mark.usefixtures("cuda_build", "fresh_warnings")
def test_dot_serves_where_the_compiler_splits():
    """Outside shard_map, and inside one that leaves an axis automatic."""
    call = made(4, n=64)
    args = jnp.asarray(call.ops.x), call.weight, jnp.asarray(call.squares)
    on_mesh = NamedSharding(mesh(), P())
    text = (
        jax.jit(dot_swiglu, in_shardings=on_mesh, out_shardings=on_mesh)
        .trace(*args)
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    assert "@w4a16_fused_dot(" not in text
    devices = jax.make_mesh((2, 2), ("d", "other"), axis_types=(AxisType.Auto,) * 2)
    weight = dataclasses.replace(COLUMNS, zeros=None)
    run = jax.shard_map(
        dot_swiglu, mesh=devices, in_specs=(P(), weight, P()), out_specs=P(None, "d"), axis_names={"d"}
    )
    with pytest.warns(UserWarning, match=r"\['other'\] automatic"):
        text = jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "@w4a16_fused_dot(" not in text
    assert "@w4a16_dot(" in text


def test_check_vma_refuses_parts_as_the_whole():
    call = made(4, n=64)
    weight = dataclasses.replace(COLUMNS, zeros=None)
    run = jax.shard_map(dot_swiglu, mesh=mesh(), in_specs=(P(), weight, P()), out_specs=P())
    with pytest.raises(ValueError, match="out_specs"):
        run(jnp.asarray(call.ops.x), call.weight, jnp.asarray(call.squares))


@EPILOGUES
@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_in_shard_map(epilogue, check_vma):
    """Split by columns; what is not split gets the sum of the devices' gradients."""
    call = made(4, 64, 64, 32, "float32", "fractional")
    values = values_of(call, epilogue)
    f = as_functions(call)[epilogue]
    weight = call.weight
    spec = {name: P(None, "d") for name in ("scales", "zeros", "residual")}
    spec = {name: spec.get(name, P("d") if name == "norm_scale" else P()) for name in values}

    def local(values, qweight):
        of = dataclasses.replace(weight, qweight=qweight, scales=values["scales"], zeros=values["zeros"])
        if epilogue == "add_norm":
            return dot_add_norm(values["x"], of, values["residual"], values["norm_scale"])
        return (dot_swiglu(values["x"], of, values["squares"], epsilon=EPSILON),)

    split = jax.shard_map(
        local,
        mesh=mesh(),
        in_specs=(spec, P(None, "d", None)),
        out_specs=(P(None, "d"),) * (3 if epilogue == "add_norm" else 1),
        check_vma=check_vma,
    )
    got = jax.jit(jax.grad(loss_of(lambda v: split(v, weight.qweight))))(values)
    assert_close(got, jax.grad(loss_of(f))(values), 1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("placed", ["columns", "rows", "whole"])
@pytest.mark.parametrize("m", [4, 20])
def test_split_by_the_compiler(kind, placed, m):
    call = made(m, n=64, zeros="integer")
    devices = mesh(kind)
    put = lambda a, *spec: jax.device_put(jnp.asarray(a), NamedSharding(devices, P(*spec)))
    columns, rows = ("d" if placed == name else None for name in ("columns", "rows"))
    weight = QuantizedWeight(
        put(call.ops.qweight, None, columns, None),
        put(call.ops.scales, None, columns),
        put(call.ops.zeros, None, columns),
        group_size=64,
        k=256,
    )
    with jax.set_mesh(devices):
        x, squares = put(call.ops.x, rows, None), put(call.squares, rows, None)
        got = jax.jit(functools.partial(dot_swiglu, epsilon=EPSILON))(x, weight, squares)
        assert len(got.sharding.device_set) == 2
        residual, norm_scale = put(call.residual, rows, columns), put(call.norm_scale, columns)
        three = jax.jit(dot_add_norm)(x, weight, residual, norm_scale)
        if kind == AxisType.Explicit:
            assert jax.typeof(got).sharding.spec == P(rows, columns)
            assert all(jax.typeof(a).sharding.spec == P(rows, columns) for a in three)
    call.check_swiglu(jax.device_get(got))
    call.check_add_norm(jax.device_get(three))


@pytest.mark.usefixtures("fresh_warnings")
def test_explicit_axes_that_cut_a_block():
    """A residual whose parts are no whole blocks; squares are then of whole rows."""
    call, devices = made(4), mesh(AxisType.Explicit)
    put = lambda a, *spec: jax.device_put(jnp.asarray(a), NamedSharding(devices, P(*spec)))
    with jax.set_mesh(devices):
        weight = jax.tree.map(put, call.weight)
        got = dot_add_norm(put(call.ops.x), weight, put(call.residual, None, "d"), put(call.norm_scale))
        assert jax.typeof(got[0]).sharding.spec == P(None, "d")
    call.check_add_norm(jax.device_get(got))


def test_vmap_over_an_explicit_axis():
    calls = [made(4, seed=i) for i in range(2)]
    x, squares = (np.stack(a) for a in zip(*((c.ops.x, c.squares) for c in calls), strict=True))
    devices, weight = mesh(AxisType.Explicit), calls[0].weight
    want = jax.vmap(dot_swiglu, (0, None, 0))(x, weight, squares)
    with jax.set_mesh(devices):
        put = lambda a, *spec: jax.device_put(jnp.asarray(a), NamedSharding(devices, P(*spec)))
        weight = jax.tree.map(put, weight)
        got = jax.vmap(dot_swiglu, (0, None, 0))(put(x, "d"), weight, put(squares, "d"))
        assert jax.typeof(got).sharding.spec == P("d", None, None)
    np.testing.assert_array_equal(got, want)


# Malformed calls -------------------------------------------------------------------------------------------

BF16 = jnp.bfloat16


def zeros(shape, dtype=BF16):
    return np.zeros(shape, dtype)


def weight(**changes):
    return {"qw": dataclasses.replace(made().weight, **changes)}


BOTH = [
    ({"x": [1.0]}, TypeError, "x: expected an array, got list"),
    ({"x": zeros((5, 256), np.int8)}, TypeError, "x: expected float16, bfloat16 or float32, got int8"),
    ({"x": zeros(())}, ValueError, r"x: expected shape \[\.\.\., K\], got \(\)"),
    ({"x": zeros((5, 100))}, ValueError, r"x: expected shape \[\.\.\., K = 256\], got \(5, 100\)"),
    ({"x": zeros((5, 256), np.float16)}, TypeError, "scales: expected x's type float16, got bfloat16"),
    ({"qw": zeros((4, 3, 128), np.uint32)}, TypeError, "qw: expected a QuantizedWeight, got ndarray"),
    (weight(qweight=zeros((4, 3, 128), np.int32)), TypeError, "qweight: expected uint32, got int32"),
    (weight(qweight=zeros((4, 4, 128), np.uint32)), ValueError, r"qweight: expected shape \(4, 3, 128\)"),
    (weight(qweight=zeros((1, 4, 3, 128), np.uint32)), ValueError, "qweight: expected 3 dimensions"),
    (weight(scales=zeros((3, 48))), ValueError, "scales: expected 4 groups"),
    (weight(zeros=zeros((4, 32))), ValueError, r"zeros: expected shape \(4, 48\) like scales"),
    (weight(group_size=33), ValueError, "group_size: expected a multiple of 32"),
    (weight(permutation=zeros(255, np.int32)), ValueError, r"permutation: expected shape \(256,\)"),
    (weight(permutation=zeros(256, np.int64)), TypeError, "permutation: expected int32, got int64"),
    (weight(input_scale=zeros(255)), ValueError, r"input_scale: expected shape \(256,\) for K = 256"),
    ({"implementation": "tpu"}, ValueError, "implementation: expected one of"),
    ({"implementation": None}, ValueError, "implementation: expected one of"),
]
ADD_NORM = [
    ({"residual": None}, TypeError, "residual: expected an array, got NoneType"),
    (
        {"residual": zeros((5, 32))},
        ValueError,
        r"residual: expected shape \(5, 48\) for x of shape \(5, 256\) and N = 48, got \(5, 32\)",
    ),
    ({"residual": zeros((4, 48))}, ValueError, r"residual: expected shape \(5, 48\)"),
    ({"residual": zeros(48)}, ValueError, r"residual: expected shape \(5, 48\)"),
    ({"residual": zeros((5, 48), np.float32)}, TypeError, "residual: expected bfloat16 like x, got float32"),
    ({"norm_scale": 1.0}, TypeError, "norm_scale: expected an array, got float"),
    ({"norm_scale": zeros((5, 48))}, ValueError, r"norm_scale: expected shape \(48,\).* got \(5, 48\)"),
    ({"norm_scale": zeros(48, np.float32)}, TypeError, "norm_scale: expected bfloat16 like x, got float32"),
]
SWIGLU = [
    (
        {"qw": made(n=40).weight},
        ValueError,
        "qw: expected N to be a multiple of 16, as of interleave, got 40",
    ),
    ({"squares": 1.0}, TypeError, "squares: expected an array, got float"),
    ({"squares": zeros((5, 3))}, TypeError, "squares: expected float32, got bfloat16"),
    (
        {"squares": zeros((4, 3), np.float32)},
        ValueError,
        r"squares: expected the leading dimensions of x, \(5,\), and one more, not empty, got shape \(4, 3\)",
    ),
    ({"squares": zeros(5, np.float32)}, ValueError, r"squares: expected .* got shape \(5,\)"),
    ({"squares": zeros((5, 0), np.float32)}, ValueError, r"squares: expected .* got shape \(5, 0\)"),
    ({"squares": zeros((1, 5, 3), np.float32)}, ValueError, "squares: expected the leading dimensions"),
    ({"epsilon": -1e-6}, ValueError, "epsilon: expected a number from 0, got -1e-06"),
    ({"epsilon": np.nan}, ValueError, "epsilon: expected a number that is finite"),
    ({"epsilon": "1e-5"}, TypeError, "epsilon: expected a number, got str"),
]


def check_malformed(product, good, changes, kind, message, check):
    with pytest.raises(kind, match=message):
        product(**{**good, **changes})
    check(product(**good))


@pytest.mark.parametrize(("changes", "kind", "message"), BOTH + ADD_NORM)
def test_malformed_dot_add_norm(changes, kind, message):
    call = made()
    good = {"x": call.ops.x, "qw": call.weight, "residual": call.residual, "norm_scale": call.norm_scale}
    check_malformed(dot_add_norm, good, changes, kind, message, call.check_add_norm)


@pytest.mark.parametrize(("changes", "kind", "message"), BOTH + SWIGLU)
def test_malformed_dot_swiglu(changes, kind, message):
    call = made()
    good = {"x": call.ops.x, "qw": call.weight, "squares": call.squares, "epsilon": EPSILON}
    check_malformed(dot_swiglu, good, changes, kind, message, call.check_swiglu)


def test_epsilon_is_known_at_trace_time():
    call = made()
    run = jax.jit(lambda epsilon: dot_swiglu(call.ops.x, call.weight, call.squares, epsilon=epsilon))
    with pytest.raises(TypeError, match="epsilon: expected a number, got a traced value"):
        run(1e-5)


def test_implementation_that_this_build_lacks():
    if jax_w4a16.build_info()["cuda"]:
        pytest.skip("this build has CUDA kernels")
    for f, args in functions(made(), implementation="cuda"):
        with pytest.raises(ValueError, match=re.escape("implementation: expected one that this build has")):
            f(*args)
