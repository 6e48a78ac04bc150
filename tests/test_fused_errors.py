"""Malformed calls of dot_add_norm and dot_swiglu."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fused import EPSILON, functions, made

import jax_w4a16
from jax_w4a16 import dot_add_norm, dot_swiglu

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
