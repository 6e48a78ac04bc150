"""Malformed FFI calls: the handlers check everything again, since a module may be hand-written.

Every case is one wrong thing in an otherwise good call. It must raise with a message that names the operand,
and the good call right after it must give the right result.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import device_of

import jax_w4a16  # noqa: F401  registers the targets

K, N, M, G = 256, 48, 3, 128
I64 = np.int64


@dataclasses.dataclass(frozen=True)
class Call:
    """An FFI call: operands, results and attributes by name."""

    target: str
    operands: dict[str, Any]
    results: dict[str, jax.ShapeDtypeStruct]
    attributes: dict[str, Any]

    def run(self):
        operands = {k: v for k, v in self.operands.items() if v is not None}
        results = tuple(v for v in self.results.values() if v is not None)

        def call(*args):
            return jax.ffi.ffi_call(self.target, results)(*args, **self.attributes)

        return jax.block_until_ready(jax.jit(call)(*operands.values()))

    def replace(self, part: str, **changes) -> Call:
        return dataclasses.replace(self, **{part: {**getattr(self, part), **changes}})


def array(shape, dtype=jnp.bfloat16, value=1):
    return np.full(shape, value, dtype)


def struct(shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


QWEIGHT = (K // 64, N // 16, 128)

DOT = Call(
    "w4a16_dot",
    {
        "x": array((M, K)),
        "qweight": array(QWEIGHT, jnp.uint32, 0x99999999),
        "scales": array((K // G, N)),
        "zeros": array((K // G, N), value=7),
        "bias": array((N,), value=8),
    },
    {"out": struct((M, N))},
    {
        "group_size": I64(G),
        "alpha": np.float32(1),
        "has_zeros": True,
        "has_bias": True,
        "batch_invariant": False,
        "config": "auto",
    },
)
RAGGED = Call(
    "w4a16_ragged_dot",
    {
        "x": array((M, K)),
        "group_sizes": array((2,), jnp.int32, 1),
        "qweight": array((2, *QWEIGHT), jnp.uint32, 0x99999999),
        "scales": array((2, K // G, N)),
        "zeros": array((2, K // G, N), value=7),
    },
    {"out": struct((M, N))},
    {"group_size": I64(G), "has_zeros": True, "config": "auto"},
)
ADD_NORM = Call(
    "w4a16_fused_dot",
    {
        **{k: DOT.operands[k] for k in ("x", "qweight", "scales", "zeros")},
        "residual": array((M, N), value=8),
        "norm_scale": array((N,), value=2),
    },
    {"out": struct((M, N)), "scaled": struct((M, N)), "squares": struct((M, N // 16), jnp.float32)},
    {
        "group_size": I64(G),
        "epsilon": np.float32(0),
        "has_zeros": True,
        "has_squares": False,
        "epilogue": "add_norm",
        "config": "auto",
    },
)
SWIGLU = Call(
    "w4a16_fused_dot",
    {
        **{k: DOT.operands[k] for k in ("x", "qweight", "scales", "zeros")},
        "squares": array((M, 8), jnp.float32, K / 8 * 2**10),
    },
    {"out": struct((M, N // 2))},
    ADD_NORM.attributes | {"has_squares": True, "epilogue": "swiglu"},
)
PACK = Call(
    "w4a16_pack", {"codes": array((K, N), jnp.uint8, 9)}, {"qweight": struct(QWEIGHT, jnp.uint32)}, {}
)
DEQUANTIZE = Call(
    "w4a16_dequantize",
    {k: DOT.operands[k] for k in ("qweight", "scales", "zeros")},
    {"out": struct((K, N))},
    {"group_size": I64(G), "has_zeros": True},
)
QUANTIZE = Call(
    "w4a16_quantize",
    {"w": array((K, N))},
    {
        "qweight": struct(QWEIGHT, jnp.uint32),
        "scales": struct((K // G, N)),
        "zeros": struct((K // G, N)),
    },
    {"group_size": I64(G), "symmetric": False},
)


def check_good(call: Call) -> None:
    """The good call's first result, against the value it must have."""
    out = np.asarray(call.run()[0])
    if call.target == "w4a16_dot":
        np.testing.assert_array_equal(out.astype(np.float32), K * (9 - 7) + 8)
    elif call.target == "w4a16_fused_dot" and "squares" in call.operands:
        y = K * (9 - 7) / 2**5
        np.testing.assert_array_equal(out.astype(np.float32), y * y)
    elif call.target == "w4a16_fused_dot":
        np.testing.assert_array_equal(out.astype(np.float32), K * (9 - 7) + 8)
    elif call.target == "w4a16_ragged_dot":
        np.testing.assert_array_equal(out[:2].astype(np.float32), K * (9 - 7))
        np.testing.assert_array_equal(out[2:].astype(np.float32), 0)
    elif call.target == "w4a16_dequantize":
        np.testing.assert_array_equal(out.astype(np.float32), 2)
    elif call.target == "w4a16_pack":
        np.testing.assert_array_equal(out, 0x99999999)
    else:
        np.testing.assert_array_equal(out, 0xFFFFFFFF)


def dot_cases():
    q, s, z, b = (DOT.operands[k] for k in ("qweight", "scales", "zeros", "bias"))
    operand = {
        "x_rank_0": ("out", {"x": array(())}),
        "x_k_short": ("qweight", {"x": array((M, K - 64))}),
        "x_k_long": ("qweight", {"x": array((M, K + 64))}),
        "x_rows": ("out", {"x": array((M + 1, K))}),
        "x_rank_3": ("out", {"x": array((1, M, K))}),
        "x_int": ("x", {"x": array((M, K), jnp.int16)}),
        "x_float16": ("scales", {"x": array((M, K), jnp.float16)}),
        "x_bool": ("x", {"x": array((M, K), jnp.bool_)}),
        "x_complex": ("x", {"x": array((M, K), jnp.complex64)}),
        "x_float8": ("x", {"x": array((M, K), jnp.float8_e4m3fn)}),
        "qweight_rank_1": ("qweight", {"qweight": q.reshape(-1)}),
        "qweight_rank_2": ("qweight", {"qweight": q.reshape(q.shape[0], -1)}),
        "qweight_rank_4": ("qweight", {"qweight": q[None]}),
        "qweight_k_short": ("qweight", {"qweight": q[1:]}),
        "qweight_k_long": ("qweight", {"qweight": np.concatenate([q, q])}),
        "qweight_n_short": ("qweight", {"qweight": q[:, 1:]}),
        "qweight_n_long": ("qweight", {"qweight": np.concatenate([q, q], 1)}),
        "qweight_words": ("qweight", {"qweight": q[..., :64]}),
        "qweight_transposed": ("qweight", {"qweight": q.transpose(1, 0, 2)}),
        "qweight_int32": ("qweight", {"qweight": q.astype(jnp.int32)}),
        "qweight_uint8": ("qweight", {"qweight": q.astype(jnp.uint8)}),
        "qweight_float": ("qweight", {"qweight": q.astype(jnp.float32)}),
        "scales_rank_1": ("scales", {"scales": s[0]}),
        "scales_rank_3": ("scales", {"scales": s[None]}),
        "scales_few_groups": ("scales", {"scales": s[:1]}),
        "scales_many_groups": ("scales", {"scales": np.concatenate([s, s])}),
        "scales_n_short": ("scales", {"scales": s[:, :-1]}),
        "scales_n_long": ("scales", {"scales": array((K // G, N + 1))}),
        "scales_transposed": ("scales", {"scales": s.T}),
        "scales_float32": ("scales", {"scales": s.astype(jnp.float32)}),
        "scales_int": ("scales", {"scales": s.astype(jnp.int32)}),
        "zeros_rank_1": ("zeros", {"zeros": z[0]}),
        "zeros_few_groups": ("zeros", {"zeros": z[:1]}),
        "zeros_n_short": ("zeros", {"zeros": z[:, :-1]}),
        "zeros_float32": ("zeros", {"zeros": z.astype(jnp.float32)}),
        "zeros_uint8": ("zeros", {"zeros": z.astype(jnp.uint8)}),
        "bias_rank_2": ("bias", {"bias": b[None]}),
        "bias_rank_0": ("bias", {"bias": b[0]}),
        "bias_short": ("bias", {"bias": b[:-1]}),
        "bias_long": ("bias", {"bias": array((N + 1,))}),
        "bias_float32": ("bias", {"bias": b.astype(jnp.float32)}),
        "bias_missing": ("bias", {"bias": None}),
        "zeros_and_bias_missing": ("zeros", {"zeros": None, "bias": None}),
        "one_operand_too_many": ("operands", {"more": array((1,))}),
    }
    for name, (match, change) in operand.items():
        yield name, match, DOT.replace("operands", **change)
    result = {
        "out_rank_1": ("out", {"out": struct((M * N,))}),
        "out_rank_3": ("out", {"out": struct((1, M, N))}),
        "out_rows": ("out", {"out": struct((M + 1, N))}),
        "out_columns": ("qweight", {"out": struct((M, N + 16))}),
        "out_columns_in_block": ("scales", {"out": struct((M, N - 1))}),
        "out_float16": ("out", {"out": struct((M, N), jnp.float16)}),
        "out_int32": ("out", {"out": struct((M, N), jnp.int32)}),
        "two_workspaces": ("results", {"a": struct((8,), jnp.uint8), "b": struct((8,), jnp.uint8)}),
    }
    for name, (match, change) in result.items():
        yield name, match, DOT.replace("results", **change)
    attribute = {
        "group_size_0": ("group_size", {"group_size": I64(0)}),
        "group_size_negative": ("group_size", {"group_size": I64(-128)}),
        "group_size_min": ("group_size", {"group_size": np.iinfo(I64).min}),
        "group_size_max": ("scales", {"group_size": np.iinfo(I64).max}),
        "group_size_other": ("scales", {"group_size": I64(64)}),
        "group_size_int32": ("expected S64", {"group_size": np.int32(G)}),
        "group_size_float": ("expected S64", {"group_size": np.float32(G)}),
        "alpha_int64": ("expected F32", {"alpha": I64(1)}),
        "has_zeros_off": ("operands|bias", {"has_zeros": False}),
        "has_bias_off": ("operands", {"has_bias": False}),
        "has_zeros_number": ("expected PRED", {"has_zeros": I64(1)}),
        "config_number": ("config|attribute", {"config": I64(0)}),
    }
    for name, (match, change) in attribute.items():
        yield name, match, DOT.replace("attributes", **change)
    # 48 is no multiple of 32, though the shapes agree with it.
    odd = DOT.replace("attributes", group_size=I64(48)).replace(
        "operands", scales=array((6, N)), zeros=array((6, N), value=7)
    )
    yield "group_size_48", "group_size", odd


def ragged_cases():
    q, s, z = (RAGGED.operands[k] for k in ("qweight", "scales", "zeros"))
    operand = {
        "x_rank_1": ("x", {"x": array((K,))}),
        "x_rank_3": ("x", {"x": array((1, M, K))}),
        "x_int": ("x", {"x": array((M, K), jnp.int16)}),
        "x_float16": ("scales", {"x": array((M, K), jnp.float16)}),
        "x_rows": ("out", {"x": array((M + 1, K))}),
        "x_k_long": ("qweight", {"x": array((M, K + 64))}),
        "sizes_rank_0": ("group_sizes", {"group_sizes": array((), jnp.int32)}),
        "sizes_rank_2": ("group_sizes", {"group_sizes": array((2, 1), jnp.int32)}),
        "sizes_uint32": ("group_sizes", {"group_sizes": array((2,), jnp.uint32)}),
        "sizes_float": ("group_sizes", {"group_sizes": array((2,), jnp.float32)}),
        "sizes_short": ("qweight", {"group_sizes": array((1,), jnp.int32)}),
        "sizes_long": ("qweight", {"group_sizes": array((3,), jnp.int32)}),
        "qweight_rank_3": ("qweight", {"qweight": q[0]}),
        "qweight_experts": ("qweight", {"qweight": q[:1]}),
        "qweight_n_long": ("qweight", {"qweight": np.concatenate([q, q], 2)}),
        "qweight_int32": ("qweight", {"qweight": q.astype(jnp.int32)}),
        "scales_rank_2": ("scales", {"scales": s[0]}),
        "scales_experts": ("scales", {"scales": s[:1]}),
        "scales_groups": ("scales", {"scales": s[:, :1]}),
        "scales_float32": ("scales", {"scales": s.astype(jnp.float32)}),
        "zeros_experts": ("zeros", {"zeros": z[:1]}),
        "zeros_uint8": ("zeros", {"zeros": z.astype(jnp.uint8)}),
        "zeros_missing": ("zeros", {"zeros": None}),
        "one_operand_too_many": ("operands", {"more": array((1,))}),
    }
    for name, (match, change) in operand.items():
        yield f"ragged_{name}", match, RAGGED.replace("operands", **change)
    result = {
        "out_rank_1": ("out", {"out": struct((M * N,))}),
        "out_rank_3": ("out", {"out": struct((1, M, N))}),
        "out_rows": ("out", {"out": struct((M + 1, N))}),
        "out_columns": ("qweight", {"out": struct((M, N + 16))}),
        "out_float16": ("out", {"out": struct((M, N), jnp.float16)}),
    }
    for name, (match, change) in result.items():
        yield f"ragged_{name}", match, RAGGED.replace("results", **change)
    yield "ragged_group_size", "group_size", RAGGED.replace("attributes", group_size=I64(-1))
    yield "ragged_groups", "scales", RAGGED.replace("attributes", group_size=I64(64))
    yield "ragged_has_zeros", "operands", RAGGED.replace("attributes", has_zeros=False)


def fused_cases():
    operand = {
        "x_rank_0": ("out", {"x": array(())}),
        "x_rows": ("out", {"x": array((M + 1, K))}),
        "x_int": ("x", {"x": array((M, K), jnp.int16)}),
        "x_float16": ("out", {"x": array((M, K), jnp.float16)}),
        "scales_few_groups": ("scales", {"scales": ADD_NORM.operands["scales"][:1]}),
        "zeros_missing": ("operand", {"zeros": None}),
        "one_operand_too_many": ("operands", {"more": array((1,))}),
        "residual_rows": ("residual", {"residual": array((M + 1, N))}),
        "residual_rank": ("residual", {"residual": array((N,))}),
        "residual_float32": ("residual", {"residual": array((M, N), jnp.float32)}),
        "norm_scale_long": ("norm_scale", {"norm_scale": array((N + 16,))}),
        "norm_scale_float16": ("norm_scale", {"norm_scale": array((N,), jnp.float16)}),
    }
    for name, (match, change) in operand.items():
        yield f"add_norm_{name}", match, ADD_NORM.replace("operands", **change)
    result = {
        "out_columns": ("qweight", {"out": struct((M, N + 16))}),
        "out_float32": ("out", {"out": struct((M, N), jnp.float32)}),
        "scaled_float32": ("scaled", {"scaled": struct((M, N), jnp.float32)}),
        "scaled_rows": ("scaled", {"scaled": struct((M + 1, N))}),
        "squares_blocks": ("squares", {"squares": struct((M, N // 16 + 1), jnp.float32)}),
        "squares_bfloat16": ("squares", {"squares": struct((M, N // 16))}),
        "squares_missing": ("results", {"squares": None}),
    }
    for name, (match, change) in result.items():
        yield f"add_norm_{name}", match, ADD_NORM.replace("results", **change)
    operand = {
        "squares_rows": ("squares", {"squares": array((M + 1, 8), jnp.float32)}),
        "squares_odd": ("num_squares", {"squares": array((M, 6), jnp.float32)}),
        "squares_rank_0": ("squares", {"squares": array((), jnp.float32)}),
        "squares_bfloat16": ("squares", {"squares": array((M, 8))}),
        "squares_missing": ("squares", {"squares": None}),
    }
    for name, (match, change) in operand.items():
        yield f"swiglu_{name}", match, SWIGLU.replace("operands", **change)
    yield "swiglu_out_whole", "qweight", SWIGLU.replace("results", out=struct((M, N)))
    yield "swiglu_results", "results", SWIGLU.replace("results", more=struct((M, N)))
    attribute = {
        "group_size": ("group_size", {"group_size": I64(0)}),
        "epilogue": ("epilogue", {"epilogue": "softmax"}),
        "has_squares": ("operands", {"has_squares": False}),
    }
    for name, (match, change) in attribute.items():
        yield f"swiglu_{name}", match, SWIGLU.replace("attributes", **change)


def other_cases():
    q, s, z = (DOT.operands[k] for k in ("qweight", "scales", "zeros"))
    yield "pack_rank", "codes", PACK.replace("operands", codes=array((K, N, 1), jnp.uint8))
    yield "pack_int32", "codes", PACK.replace("operands", codes=array((K, N), jnp.int32))
    yield "pack_k", "qweight", PACK.replace("operands", codes=array((K + 64, N), jnp.uint8))
    yield "pack_n", "qweight", PACK.replace("operands", codes=array((K, N + 16), jnp.uint8))
    yield "pack_result", "qweight", PACK.replace("results", qweight=struct(QWEIGHT, jnp.int32))
    yield "dequantize_rank", "out", DEQUANTIZE.replace("results", out=struct((K, N, 1)))
    yield "dequantize_k", "qweight", DEQUANTIZE.replace("results", out=struct((K + 64, N)))
    yield "dequantize_n", "qweight", DEQUANTIZE.replace("results", out=struct((K, N + 16)))
    yield "dequantize_int", "out", DEQUANTIZE.replace("results", out=struct((K, N), jnp.int8))
    yield "dequantize_scales", "scales", DEQUANTIZE.replace("operands", scales=s[:1])
    yield "dequantize_zeros", "zeros", DEQUANTIZE.replace("operands", zeros=z.astype(jnp.float32))
    yield "dequantize_no_zeros", "zeros", DEQUANTIZE.replace("operands", zeros=None)
    yield "dequantize_words", "qweight", DEQUANTIZE.replace("operands", qweight=q[..., 1:])
    yield "dequantize_group", "group_size", DEQUANTIZE.replace("attributes", group_size=I64(-1))
    yield "quantize_rank", "w", QUANTIZE.replace("operands", w=array((K,)))
    yield "quantize_int", "w", QUANTIZE.replace("operands", w=array((K, N), jnp.int32))
    yield "quantize_k", "qweight", QUANTIZE.replace("operands", w=array((K + 64, N)))
    yield "quantize_scales", "scales", QUANTIZE.replace("results", scales=struct((1, N)))
    yield "quantize_zeros", "zeros", QUANTIZE.replace("results", zeros=struct((1, N)))
    yield "quantize_no_zeros", "results", QUANTIZE.replace("results", zeros=None)
    yield "quantize_symmetric", "results", QUANTIZE.replace("attributes", symmetric=True)
    yield "quantize_group", "group_size", QUANTIZE.replace("attributes", group_size=I64(0))


CASES = [*dot_cases(), *ragged_cases(), *other_cases()]
GOOD = {call.target: call for call in (DOT, RAGGED, PACK, DEQUANTIZE, QUANTIZE)}


FUSED_CASES = list(fused_cases())


def test_enough_cases():
    assert len(CASES) >= 60
    assert len({name for name, _, _ in CASES}) == len(CASES)


@pytest.mark.parametrize("call", GOOD.values(), ids=GOOD.keys())
def test_good_call(call, kernel):
    check_good(call)


@pytest.mark.parametrize(("match", "call"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_malformed_call(match, call, kernel):
    with pytest.raises(Exception, match=match) as error:
        call.run()
    assert "INVALID_ARGUMENT" in str(error.value)
    check_good(GOOD[call.target])


@pytest.mark.gpu
@pytest.mark.parametrize(("match", "call"), [c[1:] for c in FUSED_CASES], ids=[c[0] for c in FUSED_CASES])
def test_malformed_fused_call(match, call):
    """There is no handler but the GPU's."""
    with jax.default_device(device_of("cuda")):
        with pytest.raises(Exception, match=match) as error:
            call.run()
        assert "INVALID_ARGUMENT" in str(error.value)
        check_good(ADD_NORM)
        check_good(SWIGLU)


@pytest.mark.parametrize("good", [DOT, RAGGED], ids=["dot", "ragged"])
def test_unknown_config(kernel, good):
    call = good.replace("attributes", config="no_such_kernel")
    if kernel == "cpu":
        check_good(call)  # the CPU has one kernel and takes no configuration
    else:
        with pytest.raises(Exception, match="no_such_kernel"):
            call.run()
    check_good(good)
