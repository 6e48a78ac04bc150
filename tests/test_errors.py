"""Malformed Python calls: one wrong thing in a good call; the message names operand, expected and got."""

import dataclasses
import importlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_w4a16
from jax_w4a16 import _ffi

CASE = oracle.Case(3, 256, 48, 64, zeros="integer", bias=True)
OPS = oracle.operands(CASE)
GOOD = {"x": OPS.x, "qw": OPS.qweight, "scales": OPS.scales, "zeros": OPS.zeros, "bias": OPS.bias}
BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32


def zeros(shape, dtype=BF16):
    return np.zeros(shape, dtype)


def quantized(**changes):
    qw = jax_w4a16.QuantizedWeight(OPS.qweight, OPS.scales, OPS.zeros, group_size=64, k=256)
    return dataclasses.replace(qw, **changes)


def dot(**changes):
    """A call of dot with some arguments changed; then the good call must still be right."""
    return lambda: jax_w4a16.dot(**{**GOOD, **changes})


def dot_quantized(**changes):
    return lambda: jax_w4a16.dot(OPS.x, quantized(**changes))


DOT = [
    # x
    (dot(x=None), TypeError, "x: expected an array, got NoneType"),
    (dot(x=[[1.0]]), TypeError, "x: expected an array, got list"),
    (dot(x=1.0), TypeError, "x: expected an array, got float"),
    (dot(x=zeros((3, 256), np.int8)), TypeError, "x: expected float16, bfloat16 or float32, got int8"),
    (dot(x=zeros((3, 256), np.float64)), TypeError, "x: expected float16, bfloat16 or float32, got float64"),
    (dot(x=zeros((3, 256), np.complex64)), TypeError, "x: expected .* got complex64"),
    (dot(x=zeros((3, 256), jnp.float8_e4m3fn)), TypeError, "x: expected .* got float8_e4m3fn"),
    (dot(x=zeros(())), ValueError, r"x: expected shape \[..., K\], got \(\)"),
    (dot(x=zeros((3, 255))), ValueError, "K = 255"),
    (dot(x=zeros((3, 128))), ValueError, r"qweight: expected shape \(2, 3, 128\)"),
    (dot(x=zeros((3, 128)), group_size=32), ValueError, r"qweight: expected shape \(2, 3, 128\)"),
    (dot(x=zeros((3, 0))), ValueError, "K = 0"),
    (dot(x=zeros((256, 3))), ValueError, "K = 3"),
    (dot(x=zeros((3, 256), F16)), TypeError, "scales: expected x's type float16, got bfloat16"),
    # qw
    (dot(qw=None), TypeError, "qw: expected an array, got NoneType"),
    (dot(qw="weights"), TypeError, "qw: expected an array, got str"),
    (dot(qw=OPS.qweight.astype(np.int32)), TypeError, "qweight: expected uint32, got int32"),
    (dot(qw=OPS.qweight.view(np.uint8)), TypeError, "qweight: expected uint32, got uint8"),
    (dot(qw=OPS.codes), TypeError, "qweight: expected uint32, got uint8"),
    (dot(qw=OPS.qweight[0]), ValueError, r"qweight: expected 3 dimensions, got shape \(3, 128\)"),
    (
        dot(qw=OPS.qweight[:3]),
        ValueError,
        r"qweight: expected shape \(4, 3, 128\) for a weight .* got \(3, 3, 128\)",
    ),
    (dot(qw=OPS.qweight[:, :2]), ValueError, r"qweight: expected shape \(4, 3, 128\) .* got \(4, 2, 128\)"),
    (
        dot(qw=OPS.qweight[:, :, :64]),
        ValueError,
        r"qweight: expected shape \(4, 3, 128\) .* got \(4, 3, 64\)",
    ),
    (dot(qw=OPS.qweight.transpose(1, 0, 2)), ValueError, r"qweight: expected shape \(4, 3, 128\)"),
    (dot(qw=OPS.qweight[None]), ValueError, "qweight: expected 3 dimensions"),
    # scales
    (dot(scales=None), TypeError, "scales: expected an array, because qw is a packed array, got None"),
    (dot(scales=0.5), TypeError, "scales: expected an array, got float"),
    (dot(scales=OPS.scales[0]), ValueError, r"scales: expected 2 dimensions, got shape \(48,\)"),
    (
        dot(scales=OPS.scales.T),
        ValueError,
        "group_size: must be given, because K = 256 and scales with 48 groups",
    ),
    (
        dot(scales=zeros((3, 48))),
        ValueError,
        "group_size: must be given, because K = 256 and scales with 3 groups",
    ),
    (dot(scales=zeros((0, 48))), ValueError, "group_size: must be given"),
    (dot(scales=zeros((16, 48))), ValueError, "do not imply a multiple of 32"),
    (
        dot(scales=OPS.scales.astype(np.int8)),
        TypeError,
        "scales: expected float16, bfloat16 or float32, got int8",
    ),
    (
        dot(scales=zeros((4, 48), F32), zeros=None),
        TypeError,
        "scales: expected x's type bfloat16, got float32",
    ),
    (
        dot(scales=zeros((4, 48), F16), zeros=None),
        TypeError,
        "scales: expected x's type bfloat16, got float16",
    ),
    (dot(scales=zeros((4, 49)), zeros=None), ValueError, r"qweight: expected shape \(4, 4, 128\)"),
    # zeros
    (dot(zeros=8), TypeError, "zeros: expected an array, got int"),
    (dot(zeros=zeros((4, 47))), ValueError, r"zeros: expected shape \(4, 48\) like scales, got \(4, 47\)"),
    (dot(zeros=zeros((4, 1))), ValueError, r"zeros: expected shape \(4, 48\)"),
    (dot(zeros=zeros((2, 48))), ValueError, r"zeros: expected shape \(4, 48\)"),
    (dot(zeros=zeros((4, 48), np.uint8)), TypeError, "zeros: expected bfloat16 like scales, got uint8"),
    (dot(zeros=zeros((4, 48), F32)), TypeError, "zeros: expected bfloat16 like scales, got float32"),
    # group_size
    (dot(group_size=0), ValueError, "group_size: expected a multiple of 32, at least K = 256, or -1, got 0"),
    (dot(group_size=-2), ValueError, "group_size: expected .* got -2"),
    (dot(group_size=48), ValueError, "group_size: expected a multiple of 32, .* got 48"),
    (dot(group_size=16), ValueError, "group_size: expected a multiple of 32"),
    (dot(group_size=64.0), TypeError, "group_size: expected an integer, got float"),
    (dot(group_size="64"), TypeError, "group_size: expected an integer, got str"),
    (dot(group_size=True), TypeError, "group_size: expected an integer, got bool"),
    (dot(group_size=128), ValueError, "scales: expected 2 groups for K = 256 and group_size 128, got shape"),
    (dot(group_size=-1), ValueError, "scales: expected 1 groups for K = 256"),
    (dot(group_size=32), ValueError, "scales: expected 8 groups"),
    # bias
    (dot(bias=0.0), TypeError, "bias: expected an array, got float"),
    (dot(bias=zeros((47,))), ValueError, r"bias: expected shape \(48,\) for N = 48, got \(47,\)"),
    (dot(bias=zeros((1, 48))), ValueError, r"bias: expected shape \(48,\)"),
    (dot(bias=zeros((3, 48))), ValueError, r"bias: expected shape \(48,\)"),
    (dot(bias=zeros(48, F32)), TypeError, "bias: expected x's type bfloat16, got float32"),
    (dot(bias=zeros(48, np.int32)), TypeError, "bias: expected x's type bfloat16, got int32"),
    # alpha
    (dot(alpha=None), TypeError, "alpha: expected a number, got NoneType"),
    (dot(alpha="1"), TypeError, "alpha: expected a number, got str"),
    (dot(alpha=1j), TypeError, "alpha: expected a number, got complex"),
    (dot(alpha=True), TypeError, "alpha: expected a number, got bool"),
    (dot(alpha=float("nan")), ValueError, "alpha: expected a number that is finite in float32, got nan"),
    (dot(alpha=1e39), ValueError, "alpha: expected a number that is finite in float32"),
    (dot(alpha=zeros((3,))), TypeError, "alpha: expected a number, got ndarray"),
    (
        lambda: jax.jit(lambda a: dot(alpha=a)())(1.0),
        TypeError,
        "alpha: expected a number, got a traced value",
    ),
    # preferred_element_type
    (
        dot(preferred_element_type=F16),
        TypeError,
        "preferred_element_type: expected x's type bfloat16 or float32",
    ),
    (dot(preferred_element_type=np.float64), TypeError, "preferred_element_type: expected"),
    (dot(preferred_element_type=np.int8), TypeError, "preferred_element_type: expected"),
    (
        dot(preferred_element_type="half float"),
        TypeError,
        "preferred_element_type: expected .* got 'half float'",
    ),
    # implementation
    (dot(implementation="gpu"), ValueError, "implementation: expected one of .* got 'gpu'"),
    (dot(implementation=None), ValueError, "implementation: expected one of .* got None"),
    (dot(implementation=["cpu"]), ValueError, "implementation: expected one of"),
    # a QuantizedWeight
    (
        lambda: jax_w4a16.dot(OPS.x, quantized(), OPS.scales),
        TypeError,
        "scales: expected None, because qw is a",
    ),
    (
        lambda: jax_w4a16.dot(OPS.x, quantized(), zeros=OPS.zeros),
        TypeError,
        "zeros: expected None, because qw is a",
    ),
    (
        lambda: jax_w4a16.dot(OPS.x, quantized(), group_size=64),
        TypeError,
        "group_size: expected None, .* got 64",
    ),
    (
        lambda: jax_w4a16.dot(OPS.x[:, :192], quantized()),
        ValueError,
        r"x: expected shape \[..., K = 256\], got",
    ),
    (dot_quantized(scales=None), TypeError, "scales: expected an array, got NoneType"),
    (dot_quantized(qweight=None), TypeError, "qweight: expected an array, got NoneType"),
    (dot_quantized(group_size=128), ValueError, "scales: expected 2 groups"),
    (dot_quantized(k=200), ValueError, r"x: expected shape \[..., K = 200\], got \(3, 256\)"),
    (dot_quantized(zeros=OPS.zeros[:1]), ValueError, "zeros: expected shape"),
    (dot_quantized(qweight=OPS.qweight[None]), ValueError, "qweight: expected 3 dimensions"),
    (dot_quantized(qweight=OPS.qweight[0]), ValueError, "qweight: expected 3 dimensions"),
]

W = np.ones((64, 16), np.float32)
CODES = np.ones((64, 16), np.uint8)
PACKED = oracle.pack(CODES)
SCALES = np.ones((2, 16), F16)

OTHERS = [
    # quantize
    (lambda: jax_w4a16.quantize(None), TypeError, "w: expected an array, got NoneType"),
    (
        lambda: jax_w4a16.quantize(W.astype(np.int8)),
        TypeError,
        "w: expected float16, bfloat16 or float32, got int8",
    ),
    (lambda: jax_w4a16.quantize(W.astype(np.float64)), TypeError, "w: expected .* got float64"),
    (lambda: jax_w4a16.quantize(W[0]), ValueError, r"w: expected 2 dimensions, got shape \(16,\)"),
    (lambda: jax_w4a16.quantize(W[None]), ValueError, "w: expected 2 dimensions"),
    (lambda: jax_w4a16.quantize(W, group_size=0), ValueError, "group_size: expected a multiple of 32"),
    (
        lambda: jax_w4a16.quantize(W, group_size=None),
        TypeError,
        "group_size: expected an integer, got NoneType",
    ),
    (lambda: jax_w4a16.quantize(W, group_size=33), ValueError, "group_size: expected a multiple of 32"),
    (lambda: jax_w4a16.quantize(W, symmetric=1), TypeError, "symmetric: expected a bool, got int"),
    (lambda: jax_w4a16.quantize(W, scale_dtype=np.int8), TypeError, "scale_dtype: expected float16"),
    (lambda: jax_w4a16.quantize(W, scale_dtype="wide"), TypeError, "scale_dtype: expected .* got 'wide'"),
    # dequantize
    (lambda: jax_w4a16.dequantize(CODES, SCALES), TypeError, "qweight: expected uint32, got uint8"),
    (lambda: jax_w4a16.dequantize(PACKED, SCALES[0]), ValueError, "scales: expected 2 dimensions"),
    (lambda: jax_w4a16.dequantize(PACKED, SCALES, SCALES[:1]), ValueError, "zeros: expected shape"),
    (lambda: jax_w4a16.dequantize(PACKED, SCALES, None, np.int8), TypeError, "dtype: expected float16"),
    (lambda: jax_w4a16.dequantize(PACKED, SCALES, in_features=65), ValueError, "K = 65"),
    (
        lambda: jax_w4a16.dequantize(PACKED, SCALES, in_features=-1),
        ValueError,
        "in_features: expected at least 0",
    ),
    (
        lambda: jax_w4a16.dequantize(PACKED, SCALES, in_features=6.4),
        TypeError,
        "in_features: expected an integer",
    ),
    (lambda: jax_w4a16.dequantize(PACKED, SCALES, group_size=64), ValueError, "scales: expected 1 groups"),
    (lambda: jax_w4a16.dequantize(np.uint32(1), SCALES), ValueError, "qweight: expected"),
    # pack and unpack
    (lambda: jax_w4a16.pack([[1]]), TypeError, "codes: expected an array, got list"),
    (lambda: jax_w4a16.pack(CODES.astype(np.int32)), TypeError, "codes: expected uint8, got int32"),
    (lambda: jax_w4a16.pack(CODES[0]), ValueError, "codes: expected 2 dimensions"),
    (lambda: jax_w4a16.unpack(CODES, (64, 16)), TypeError, "qweight: expected uint32, got uint8"),
    (lambda: jax_w4a16.unpack(PACKED, (65, 16)), ValueError, r"qweight: expected shape \(2, 1, 128\)"),
    (lambda: jax_w4a16.unpack(PACKED, (64,)), TypeError, r"shape: expected \(K, N\), got \(64,\)"),
    (lambda: jax_w4a16.unpack(PACKED, 64), TypeError, r"shape: expected \(K, N\), got 64"),
    (lambda: jax_w4a16.unpack(PACKED, (64.0, 16)), TypeError, "shape: expected an integer, got float"),
    (lambda: jax_w4a16.unpack(PACKED, (-1, 16)), ValueError, "shape: expected sizes of at least 0"),
]


@pytest.mark.parametrize(("call", "error", "message"), DOT + OTHERS)
def test_malformed_call(call, error, message):
    with pytest.raises(error, match=message):
        call()
    oracle.check_close(CASE, OPS, np.asarray(dot()()))


def test_enough_malformed_calls():
    assert len(DOT + OTHERS) >= 100


def test_malformed_under_jit_and_vmap():
    with pytest.raises(ValueError, match="qweight: expected shape"):
        jax.jit(lambda x: jax_w4a16.dot(x, OPS.qweight[:3], OPS.scales))(OPS.x)
    with pytest.raises(ValueError, match=r"x: expected shape \[..., K\]"):
        jax.vmap(lambda x: jax_w4a16.dot(x, OPS.qweight, OPS.scales))(OPS.x[0])


def test_cuda_without_cuda_kernels(monkeypatch):
    monkeypatch.setattr(_ffi, "has_cuda", lambda: False)
    with pytest.raises(ValueError, match="'cuda'; it has no CUDA kernels"):
        dot(implementation="cuda")()


# Import ----------------------------------------------------------------------------------------------------


def test_runtime_minor_is_that_of_the_installed_headers():
    assert _ffi.runtime_ffi_minor() >= _ffi.native.ffi_minor


def test_runtime_without_headers_is_let_through(monkeypatch, tmp_path):
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    assert _ffi.runtime_ffi_minor() is None
    _ffi.check_runtime(99, None)


def test_older_runtime_is_refused_before_anything_is_registered(monkeypatch, tmp_path):
    header = tmp_path / "xla/ffi/api/c_api.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR 1\n")
    registered = []
    with monkeypatch.context() as patch:
        patch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
        patch.setattr(jax.ffi, "register_ffi_target", lambda *a, **k: registered.append(a))
        with pytest.raises(
            ImportError, match=r"built for XLA FFI 0\.\d+, but jaxlib .* has 0\.1; install a newer jax"
        ):
            importlib.reload(_ffi)
    assert not registered


def test_reloading_registers_again_without_harm():
    importlib.reload(_ffi)
    oracle.check_close(CASE, OPS, np.asarray(dot()()))


def python(code):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )


def test_missing_compiled_module_is_one_clear_error():
    result = python("import sys; sys.modules['jax_w4a16._w4a16'] = None; import jax_w4a16")
    assert result.returncode == 1
    assert "ImportError: jax_w4a16: the compiled module jax_w4a16._w4a16 did not load" in result.stderr
    assert "install the package with pip" in result.stderr


def test_import_starts_no_backend_and_warns_of_nothing():
    result = python(
        "import jax_w4a16; from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    )
    assert result.returncode == 0, result.stderr


def test_build_info():
    info = jax_w4a16.build_info()
    assert jax_w4a16.__version__ == info["version"]
    assert info["ffi_minor"] == _ffi.native.ffi_minor
    assert isinstance(info["cuda"], bool)
    assert isinstance(info["configs"], list)
    registrations = {platform.lower(): set(found) for platform, found in _ffi.native.registrations().items()}
    targets = set(_ffi.TARGETS)
    assert registrations["cpu"] == targets - {"w4a16_fused_dot"}
    assert registrations.get("cuda", targets) == targets
    assert len(jax_w4a16.DISABLE_JAX_EXPORT_CHECKS) == len(targets)
