"""dot_add_norm, dot_swiglu, interleave: values against NumPy, and which kernel serves."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import device_of
from fused import EPSILON, dtypes_for, functions, made, texts

import jax_w4a16
from jax_w4a16 import QuantizedWeight, _config, _ffi, _fused, dot_add_norm, dot_swiglu, interleave

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
