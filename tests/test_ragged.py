"""ragged_dot: values against jax.lax.ragged_dot and float64, lying sizes, transformations, bad calls."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_w4a16
from jax_w4a16 import QuantizedWeight

# Rows of each expert of 9 rows: some, none, all, more, negative ones.
SIZES = [
    [3, 0, 5, 1],
    [2, 0, 3, 0],
    [0, 0, 0, 0],
    [9, 0, 0, 0],
    [0, 0, 0, 9],
    [5, 7, 1, 2],
    [2**31 - 1, 2**31 - 1, 1, 1],
    [-3, 4, -(2**31), 2],
]
BIG = 2**31 - 1


def believed(sizes, m):
    """What the kernels make of sizes: the first row of every expert, and the end of the last."""
    ends = np.minimum(np.cumsum(np.maximum(np.asarray(sizes, np.int64), 0)), m)
    return np.concatenate([[0], ends]).astype(int)


@dataclasses.dataclass
class Experts:
    """Weights of several experts, in NumPy; `case.m` is M."""

    case: oracle.Case
    x: np.ndarray
    qweight: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    weight: np.ndarray  # float64 [E, K, N]

    @classmethod
    def make(cls, case, experts=4):
        ops = [oracle.operands(dataclasses.replace(case, seed=case.seed + i)) for i in range(experts)]
        stack = lambda name: np.stack([getattr(o, name) for o in ops])
        zeros = None if case.zeros == "none" else stack("zeros")
        weight = np.stack([o.weight(case.group) for o in ops])
        return cls(case, ops[0].x, stack("qweight"), stack("scales"), zeros, weight)

    def run(self, sizes, implementation, **changes):
        arguments = {
            "x": self.x,
            "qw": self.qweight,
            "scales": self.scales,
            "zeros": self.zeros,
            "group_sizes": jnp.asarray(sizes, jnp.int32),
            **changes,
        }
        arguments = {k: None if v is None else jnp.asarray(v) for k, v in arguments.items()}
        return jax_w4a16.ragged_dot(
            **arguments,
            group_size=self.case.group_size,
            preferred_element_type=self.case.out_dtype,
            implementation=implementation,
        )

    def exact(self, sizes):
        ends = believed(sizes, self.case.m)
        out = np.zeros((self.case.m, self.case.n))
        for i, w in enumerate(self.weight):
            rows = slice(ends[i], ends[i + 1])
            out[rows] = self.x[rows].astype(np.float64) @ w
        return out

    def check(self, sizes, got):
        """Rows of experts as oracle.check_close, expert by expert; the others exactly zero."""
        ends = believed(sizes, self.case.m)
        for i in range(len(self.weight)):
            rows = slice(ends[i], ends[i + 1])
            if ends[i] == ends[i + 1]:
                continue
            case = dataclasses.replace(self.case, m=int(ends[i + 1] - ends[i]), seed=self.case.seed + i)
            ops = oracle.operands(dataclasses.replace(self.case, seed=self.case.seed + i))
            ops.x = self.x[rows]
            oracle.check_close(case, ops, got[rows])
        np.testing.assert_array_equal(np.asarray(got[ends[-1] :], np.float32), 0)


def dtypes_for(implementation):
    return ("bfloat16", "float16") if implementation == "cuda" else ("bfloat16", "float16", "float32")


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(implementation, sizes):
    experts = Experts.make(oracle.Case(9, 256, 48, 64, zeros="integer"))
    experts.check(sizes, np.asarray(experts.run(sizes, implementation)))


@pytest.mark.parametrize("sizes", SIZES[:6], ids=str)
def test_is_lax_ragged_dot_of_the_dequantised_weight(implementation, sizes):
    experts = Experts.make(oracle.Case(9, 256, 48, 64))
    w = jnp.asarray(experts.weight, jnp.bfloat16)
    sizes = jnp.asarray(sizes, jnp.int32)
    want = jax.lax.ragged_dot(jnp.asarray(experts.x), w, sizes, preferred_element_type=jnp.float32)
    got = np.asarray(experts.run(sizes, implementation), np.float32)
    np.testing.assert_allclose(got, np.asarray(want), atol=0.02 * np.abs(experts.exact(sizes)).max())


@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("zeros", ["none", "integer", "fractional"])
def test_types_groups_and_zeros(implementation, group_size, zeros):
    for dtype in dtypes_for(implementation):
        for out_dtype in {dtype, "float32"}:
            case = oracle.Case(40, 320, 80, group_size, dtype, out_dtype, zeros, seed=3)
            experts = Experts.make(case)
            got = experts.run([17, 0, 20, 2], implementation)
            assert got.dtype == out_dtype
            experts.check([17, 0, 20, 2], np.asarray(got))


@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 64, 16), (7, 100, 24), (33, 50, 7), (130, 129, 33), (300, 192, 40)]
)
def test_sizes_that_fill_no_tile(implementation, m, k, n):
    experts = Experts.make(oracle.Case(m, k, n, 32, zeros="integer", seed=5), experts=5)
    sizes = np.random.default_rng(m).multinomial(m - m // 9, [0.4, 0.1, 0.0, 0.3, 0.2])
    experts.check(sizes, np.asarray(experts.run(sizes, implementation)))


@pytest.mark.parametrize(("experts", "m"), [(1, 5), (3, 200), (60, 240), (128, 64), (200, 1000)])
def test_many_experts(kernel, experts, m):
    """Exactly representable sums: bit for bit, whatever the kernel."""
    random = np.random.default_rng(experts)
    codes = random.integers(0, 16, (experts, 128, 64), dtype=np.uint8)
    qweight = np.stack([oracle.pack(c) for c in codes])
    scales = np.full((experts, 2, 64), 0.5, oracle.dtype_of("bfloat16"))
    x = random.integers(-2, 3, (m, 128)).astype(scales.dtype)
    sizes = random.multinomial(m - m // 10, random.dirichlet(np.ones(experts))).astype(np.int32)
    got = jax_w4a16.ragged_dot(
        jnp.asarray(x),
        qweight,
        scales,
        group_sizes=sizes,
        preferred_element_type="float32",
        implementation=kernel,
    )
    ends = believed(sizes, m)
    want = np.zeros((m, 64), np.float32)
    for i in range(experts):
        rows = slice(ends[i], ends[i + 1])
        want[rows] = x[rows].astype(np.float32) @ ((codes[i].astype(np.float32) - 8) / 2)
    np.testing.assert_array_equal(np.asarray(got), want)


@pytest.mark.parametrize(
    ("m", "k", "n", "experts"), [(0, 64, 16, 2), (3, 0, 16, 2), (3, 64, 0, 2), (3, 64, 16, 0)]
)
def test_empty(implementation, m, k, n, experts):
    blocks = -(-k // 64), -(-n // 16), 128
    out = jax_w4a16.ragged_dot(
        jnp.ones((m, k), jnp.bfloat16),
        jnp.zeros((experts, *blocks), jnp.uint32),
        jnp.ones((experts, min(k, 1), n), jnp.bfloat16),
        group_sizes=jnp.ones(experts, jnp.int32),
        implementation=implementation,
    )
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.zeros((m, n)))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [5, 64, 500])
def test_lying_sizes_write_nothing_outside(m):
    """Whatever the sizes: every row is written, rows of none are zero, the result is right, run after run."""
    from conftest import device_of

    random = np.random.default_rng(m)
    with jax.default_device(device_of("cuda")):
        experts = Experts.make(oracle.Case(m, 512, 64, 128), experts=6)
        run = jax.jit(lambda x, sizes: experts.run(sizes, "cuda", x=x))
        for _ in range(20):
            sizes = random.choice([-BIG - 1, -1, 0, 1, m // 3, m, BIG], 6).astype(np.int32)
            experts.check(sizes, np.asarray(run(experts.x, sizes)))


def test_nan_stays_in_its_row_and_expert(kernel):
    experts = Experts.make(oracle.Case(9, 256, 48, 64))
    x, scales = experts.x.copy(), experts.scales.copy()
    x[4, 100] = np.nan
    scales[0, 2, 7] = np.nan
    got = np.isnan(np.asarray(experts.run([3, 0, 5, 1], kernel, x=x, scales=scales), np.float32))
    want = np.zeros((9, 48), bool)
    want[4] = True
    want[:3, 7] = True
    np.testing.assert_array_equal(got, want)


def test_stacked_quantized_weight(implementation):
    experts = Experts.make(oracle.Case(9, 256, 48, 64, zeros="integer"))
    qw = QuantizedWeight(experts.qweight, experts.scales, experts.zeros, group_size=64, k=256)
    out = jax_w4a16.ragged_dot(
        experts.x, qw, group_sizes=np.int32([3, 0, 5, 1]), implementation=implementation
    )
    np.testing.assert_array_equal(out, experts.run([3, 0, 5, 1], implementation))


def test_jaxpr_and_export():
    experts = Experts.make(oracle.Case(9, 256, 48, 64))
    f = lambda x, sizes: experts.run(sizes, "auto", x=x)
    sizes = np.int32([3, 0, 5, 1])
    assert "w4a16_ragged_dot" in str(jax.make_jaxpr(f)(experts.x, sizes))
    m = jax.export.symbolic_shape("m")[0]
    exported = jax.export.export(
        jax.jit(f), platforms=("cpu", "cuda"), disabled_checks=jax_w4a16.DISABLE_JAX_EXPORT_CHECKS
    )(jax.ShapeDtypeStruct((m, 256), jnp.bfloat16), jax.ShapeDtypeStruct((4,), jnp.int32))
    exported = jax.export.deserialize(exported.serialize())
    assert exported.mlir_module().count("w4a16_ragged_dot") >= 2
    got = jax.jit(exported.call)(experts.x, sizes)
    np.testing.assert_array_equal(got, f(experts.x, sizes))


# Transformations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", ["none", "fractional"])
def test_gradients(zeros):
    case = oracle.Case(9, 256, 48, 64, "float32", "float32", zeros)
    experts = Experts.make(case)
    sizes = np.int32([3, 0, 4, 1])
    names = ["x", "scales"] + ["zeros"] * (zeros != "none")
    values = [jnp.asarray(getattr(experts, name)) for name in names]
    weights = np.random.default_rng(0).standard_normal((9, 48)).astype(np.float32)

    def loss(implementation, *values):
        out = experts.run(sizes, implementation, **dict(zip(names, values, strict=True)))
        return (out * weights).sum()

    def of(implementation):
        return jax.grad(lambda *v: loss(implementation, *v), argnums=tuple(range(len(values))))(*values)

    # The reference's own jvp and transpose are the primitive's: differentiate plain JAX instead.
    def plain(*values):
        v = dict(zip(names, values, strict=True))
        zero = jnp.repeat(v["zeros"], 64, axis=1) if "zeros" in v else 8.0
        codes = np.stack([oracle.operands(dataclasses.replace(case, seed=i)).codes for i in range(4)])
        w = (codes.astype(np.float32) - zero) * jnp.repeat(v["scales"], 64, axis=1)
        out = jax.lax.ragged_dot(v["x"], w, jnp.asarray(sizes), precision="highest")
        return (out * weights).sum()

    want = jax.grad(plain, argnums=tuple(range(len(values))))(*values)
    for implementation in ("cpu", "reference"):
        for g, w in zip(of(implementation), want, strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4 * np.abs(w).max())
    tangents = [jnp.ones_like(v) for v in values]
    _, got = jax.jvp(lambda *v: loss("cpu", *v), tuple(values), tuple(tangents))
    _, expected = jax.jvp(plain, tuple(values), tuple(tangents))
    np.testing.assert_allclose(got, expected, rtol=1e-3)


def test_vmap_remat_and_scan():
    experts = Experts.make(oracle.Case(9, 256, 48, 64))
    sizes = np.int32([[3, 0, 5, 1], [1, 1, 1, 1]])
    xs = np.stack([experts.x, experts.x[::-1]])
    f = lambda x, s: experts.run(s, "cpu", x=x)
    want = np.stack([f(x, s) for x, s in zip(xs, sizes, strict=True)])
    np.testing.assert_array_equal(jax.vmap(f)(xs, sizes), want)
    np.testing.assert_array_equal(jax.lax.map(lambda a: jax.checkpoint(f)(*a), (xs, sizes)), want)


# Several devices -------------------------------------------------------------------------------------------


def mesh(kind=AxisType.Auto, size=4):
    return jax.make_mesh((size,), ("d",), axis_types=(kind,), devices=jax.devices("cpu")[:size])


def test_shard_map_over_columns():
    experts = Experts.make(oracle.Case(9, 256, 128, 64, zeros="integer"))
    sizes = np.int32([3, 0, 5, 1])

    def local(x, sizes, qweight, scales, zeros):
        return experts.run(sizes, "cpu", x=x, qw=qweight, scales=scales, zeros=zeros)

    columns = P(None, None, "d")
    run = jax.shard_map(
        local,
        mesh=mesh(),
        in_specs=(P(), P(), P(None, None, "d", None), columns, columns),
        out_specs=P(None, "d"),
    )
    got = jax.jit(run)(experts.x, sizes, experts.qweight, experts.scales, experts.zeros)
    np.testing.assert_array_equal(got, experts.run(sizes, "cpu"))


def test_shard_map_over_experts():
    """Every device has two experts of eight and the rows of all: the others' rows come out as zero."""
    experts = Experts.make(oracle.Case(20, 256, 48, 64), experts=8)
    sizes = np.int32([3, 0, 5, 1, 2, 4, 0, 3])

    def local(x, sizes, qweight, scales):
        first = jax.lax.axis_index("d") * 2
        before = jnp.where(jnp.arange(8) < first, sizes, 0).sum()
        own = jax.lax.dynamic_slice(sizes, (first,), (2,))
        rows = jnp.roll(x, -before, axis=0)
        out = experts.run(own, "cpu", x=rows, qw=qweight, scales=scales)
        return jax.lax.psum(jnp.roll(out, before, axis=0), "d")

    run = jax.shard_map(local, mesh=mesh(), in_specs=(P(), P(), P("d"), P("d")), out_specs=P())
    loss = lambda x: (run(x, sizes, experts.qweight, experts.scales).astype(jnp.float32) ** 2).sum()
    got = jax.jit(run)(experts.x, sizes, experts.qweight, experts.scales)
    np.testing.assert_array_equal(got, experts.run(sizes, "cpu"))
    whole = lambda x: (experts.run(sizes, "cpu", x=x).astype(jnp.float32) ** 2).sum()
    want = np.asarray(jax.grad(whole)(jnp.asarray(experts.x)), np.float32)
    got = np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(experts.x)), np.float32)
    np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max())


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("split", ["columns", "experts"])
def test_gradient_of_scales_in_shard_map(split, check_vma):
    experts = Experts.make(oracle.Case(20, 256, 64, 64, zeros="integer"), experts=8)
    spec, sizes = {
        "columns": (P(None, None, "d"), np.tile(np.int32([3, 0, 5, 1, 2, 4, 0, 3]), 4)),
        "experts": (P("d"), np.int32([3, 5, 20, 0, 8, 1, 2, 2])),  # each device's of all rows
    }[split]
    run = lambda x, sizes, qw, scales, zeros: experts.run(
        sizes, "cpu", x=x, qw=qw, scales=scales, zeros=zeros
    )
    total = lambda *operands: (run(*operands).astype(jnp.float32) ** 2).sum()
    operands = experts.x, sizes, experts.qweight, experts.scales, experts.zeros

    def whole(scales):
        if split == "columns":
            return total(experts.x, sizes[:8], experts.qweight, scales, experts.zeros)
        parts = [slice(2 * i, 2 * i + 2) for i in range(4)]
        return sum(total(experts.x, sizes[p], experts.qweight[p], scales[p], experts.zeros[p]) for p in parts)

    parts = jax.shard_map(
        lambda *operands: jax.lax.psum(total(*operands), "d"),
        mesh=mesh(),
        in_specs=(P(), P("d"), spec, spec, spec),
        out_specs=P(),
        check_vma=check_vma,
    )
    got = jax.grad(lambda scales: parts(*operands[:3], scales, operands[4]))(jnp.asarray(experts.scales))
    want = np.asarray(jax.grad(whole)(jnp.asarray(experts.scales)), np.float32)
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=0.01 * np.abs(want).max())


def test_a_cotangent_that_is_not_finite_stays_with_its_expert():
    experts = Experts.make(oracle.Case(9, 256, 48, 64, zeros="integer"))
    run = lambda scales: experts.run([2, 3, 0, 1], "cpu", scales=scales)
    out, pull = jax.vjp(run, jnp.asarray(experts.scales))
    (want,) = pull(jnp.ones_like(out))
    for row, spoilt in ((8, None), (3, 1)):  # of no expert; of the second
        (got,) = pull(jnp.ones_like(out).at[row].set(jnp.inf))
        for expert in range(4):
            if expert == spoilt:
                assert not np.isfinite(np.asarray(got[expert], np.float32)).all()
            else:
                np.testing.assert_array_equal(got[expert], want[expert])


def test_everything_under_explicit_axes():
    experts, sizes = Experts.make(oracle.Case(9, 256, 64, 64, zeros="fractional")), [3, 0, 5, 1]
    operands = {"x": experts.x, "scales": experts.scales, "zeros": experts.zeros}
    operands = {name: jnp.asarray(value) for name, value in operands.items()}
    run = lambda implementation, operands: experts.run(sizes, implementation, **operands)
    loss = lambda operands: (run("cpu", operands).astype(jnp.float32) ** 2).sum()
    want, reference = jax.grad(loss)(operands), run("reference", operands)
    devices = mesh(AxisType.Explicit)
    with jax.set_mesh(devices):
        operands = jax.device_put(operands, NamedSharding(devices, P()))
        got = jax.grad(loss)(operands)
        np.testing.assert_array_equal(run("reference", operands), reference)
    for name, value in want.items():
        value = np.asarray(value, np.float32)
        np.testing.assert_allclose(
            np.asarray(got[name], np.float32), value, atol=0.01 * np.abs(value).max(), err_msg=name
        )


def test_check_vma_refuses_a_forgotten_sum():
    experts = Experts.make(oracle.Case(9, 256, 48, 64))
    local = lambda qweight, scales: experts.run([3, 0, 5, 1], "cpu", qw=qweight, scales=scales)
    with pytest.raises(ValueError, match="out_specs"):
        jax.shard_map(local, mesh=mesh(size=1), in_specs=(P("d"), P("d")), out_specs=P())(
            experts.qweight, experts.scales
        )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_elsewhere_every_device_computes_all(kind, fresh_warnings):
    experts = Experts.make(oracle.Case(9, 256, 128, 64))
    sizes = np.int32([3, 0, 5, 1])
    devices = mesh(kind)
    put = lambda a, *spec: jax.device_put(a, NamedSharding(devices, P(*spec)))
    run = jax.jit(lambda q, s: experts.run(sizes, "cpu", qw=q, scales=s))
    with jax.set_mesh(devices):
        qweight, scales = put(experts.qweight, None, None, "d"), put(experts.scales, None, None, "d")
        with pytest.warns(UserWarning, match="every device computes all"):
            got = run(qweight, scales)
    np.testing.assert_array_equal(got, experts.run(sizes, "cpu"))


# Malformed calls -------------------------------------------------------------------------------------------

CASE = oracle.Case(9, 256, 48, 64, zeros="integer")
BF16 = jnp.bfloat16


def zeros(shape, dtype=BF16):
    return np.zeros(shape, dtype)


def stack(**changes):
    e = Experts.make(CASE)
    qw = QuantizedWeight(e.qweight, e.scales, e.zeros, group_size=64, k=256)
    return {"qw": dataclasses.replace(qw, **changes), "scales": None, "zeros": None, "group_size": None}


MALFORMED = [
    ({"x": [1.0]}, TypeError, "x: expected an array, got list"),
    ({"x": zeros((9, 256), np.int8)}, TypeError, "x: expected float16, bfloat16 or float32, got int8"),
    ({"x": zeros(256)}, ValueError, r"x: expected 2 dimensions, got shape \(256,\)"),
    ({"x": zeros((1, 9, 256))}, ValueError, "x: expected 2 dimensions"),
    ({"x": zeros((9, 100))}, ValueError, "K = 100"),
    ({"x": zeros((9, 256), np.float16)}, TypeError, "scales: expected x's type float16, got bfloat16"),
    ({"qw": None}, TypeError, "qw: expected an array, got NoneType"),
    ({"qw": zeros((4, 3, 128), np.uint32)}, ValueError, "qweight: expected 4 dimensions"),
    ({"qw": zeros((4, 4, 3, 128), np.int32)}, TypeError, "qweight: expected uint32, got int32"),
    ({"qw": zeros((4, 4, 4, 128), np.uint32)}, ValueError, r"qweight: expected shape \(4, 3, 128\)"),
    (
        {"qw": np.broadcast_to(np.uint32(0), (65537, 4, 3, 128))},
        ValueError,
        "qweight: expected at most 65536",
    ),
    ({"qw": zeros((5, 4, 3, 128), np.uint32)}, ValueError, "scales: expected the 5 experts of qweight"),
    ({"scales": None}, TypeError, "scales: expected an array"),
    ({"scales": zeros((4, 48))}, ValueError, "scales: expected 3 dimensions"),
    ({"scales": zeros((3, 4, 48))}, ValueError, "scales: expected the 4 experts of qweight"),
    ({"scales": zeros((4, 3, 48))}, ValueError, "scales: expected 4 groups"),
    ({"zeros": zeros((3, 4, 48))}, ValueError, "zeros: expected the 4 experts of qweight"),
    ({"zeros": zeros((4, 4, 32))}, ValueError, r"zeros: expected shape \(4, 48\)"),
    ({"group_sizes": [3, 0, 5, 1]}, TypeError, "group_sizes: expected an array, got list"),
    ({"group_sizes": zeros(4, np.int64)}, TypeError, "group_sizes: expected int32, got int64"),
    ({"group_sizes": zeros(4, np.float32)}, TypeError, "group_sizes: expected int32, got float32"),
    ({"group_sizes": zeros(5, np.int32)}, ValueError, r"group_sizes: expected shape \(4,\) for 4 experts"),
    ({"group_sizes": zeros((4, 1), np.int32)}, ValueError, r"group_sizes: expected shape \(4,\)"),
    ({"group_size": 33}, ValueError, "group_size: expected a multiple of 32"),
    ({"group_size": "all"}, TypeError, "group_size: expected an integer"),
    ({"preferred_element_type": np.float16}, TypeError, "preferred_element_type: expected x's type"),
    ({"implementation": "tpu"}, ValueError, "implementation: expected one of"),
    (stack(permutation=zeros((4, 256), np.int32)), ValueError, "qw: expected a weight without permutation"),
    (stack(input_scale=zeros((4, 256))), ValueError, "qw: expected a weight without input_scale"),
    (stack(k=128), ValueError, r"x: expected shape \[M, K = 128\]"),
    ({**stack(), "group_size": 64}, TypeError, "group_size: expected None, because qw is a QuantizedWeight"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), MALFORMED, ids=[case[2][:60] for case in MALFORMED])
def test_malformed_calls(changes, kind, message):
    e = Experts.make(CASE)
    good = {
        "x": e.x,
        "qw": e.qweight,
        "scales": e.scales,
        "zeros": e.zeros,
        "group_sizes": np.int32([3, 0, 5, 1]),
        "group_size": 64,
    }
    with pytest.raises(kind, match=message):
        jax_w4a16.ragged_dot(**{**good, **changes})
    e.check([3, 0, 5, 1], np.asarray(jax_w4a16.ragged_dot(**good)))
