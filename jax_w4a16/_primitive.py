"""The primitives that stand for the kernels, and the rules by which JAX transforms them.

    w4a16_dot         x [..., K], qweight, scales, zeros?, bias? -> [..., N]
    w4a16_dequantize  qweight, scales, zeros?                    -> [K, N]
    w4a16_quantize    w [K, N]                                   -> qweight, scales, zeros?
    w4a16_pack        codes [K, N]                               -> qweight

and w4a16_ragged_dot, in _ragged.py, and w4a16_fused_dot, in _fused.py.

An optional operand that is absent has no place among the operands; `has_zeros` and `has_bias` tell. The first
two primitives are linear in x and in scales, so their derivatives are themselves and their transposes.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jax_w4a16 import _config, _ffi, _layout, _reference, _sharding

_F32 = jnp.dtype("float32")
_PRODUCTS = ("w4a16_dot", "w4a16_ragged_dot")


# Binding ---------------------------------------------------------------------------------------------------


def dot(
    x,
    qweight,
    scales,
    zeros=None,
    bias=None,
    *,
    group_size: int,
    alpha: float = 1.0,
    out_dtype=None,
    batch_invariant: bool = False,
    implementation: str = "auto",
    config: str | None = None,
):
    """Binds w4a16_dot. Arguments have been checked; group_size is at least K where it is per column."""
    params = {
        "has_zeros": zeros is not None,
        "has_bias": bias is not None,
        "group_size": group_size,
        "alpha": alpha,
        "out_dtype": jnp.dtype(x.dtype if out_dtype is None else out_dtype),
        "batch_invariant": batch_invariant,
        "implementation": implementation,
        "config": config,
    }
    operands = {"x": x, "qweight": qweight, "scales": scales, "zeros": zeros, "bias": bias}
    return _bind(dot_p, _sharding.Weight(x.shape[-1], scales.shape[1], group_size), operands, params)


def dequantize(qweight, scales, zeros=None, *, k: int, group_size: int, dtype, implementation: str = "auto"):
    """Binds w4a16_dequantize."""
    params = {
        "has_zeros": zeros is not None,
        "k": k,
        "group_size": group_size,
        "dtype": jnp.dtype(dtype),
        "implementation": implementation,
    }
    operands = {"qweight": qweight, "scales": scales, "zeros": zeros}
    return _bind(dequantize_p, _sharding.Weight(k, scales.shape[1], group_size), operands, params)


def quantize(w, *, group_size: int, symmetric: bool, scale_dtype, implementation: str = "auto"):
    """Binds w4a16_quantize: (qweight, scales), then zeros unless symmetric."""
    return quantize_p.bind(
        w,
        group_size=group_size,
        symmetric=symmetric,
        scale_dtype=jnp.dtype(scale_dtype),
        implementation=implementation,
    )


def pack(codes, *, implementation: str = "auto"):
    """Binds w4a16_pack."""
    return pack_p.bind(codes, implementation=implementation)


def _bind(primitive: Primitive, weight: _sharding.Weight, operands: dict, params: dict):
    operands = {name: operand for name, operand in operands.items() if operand is not None}
    split = _sharding.explicit(weight, operands, functools.partial(_local, primitive, params))
    if split is not None:
        return split
    return primitive.bind(*_sharding.vary_alike(operands.values()), **params)


def _local(primitive: Primitive, params: dict, *operands, reduce_over: tuple[str, ...]):
    """One device's part of a call, summed in float32 over the axes that split K."""
    if primitive is dequantize_p:
        k = operands[0].shape[0] * _layout.BLOCK_K
        params = dict(params, k=min(k, params["k"]))
    if not reduce_over:
        return primitive.bind(*_sharding.vary_alike(operands), **params)
    *_, bias = _split(operands, 3, params["has_zeros"], params["has_bias"])
    if bias is not None:
        operands = operands[:-1]
    partial = dict(params, has_bias=False, out_dtype=_F32)
    out = lax.psum(primitive.bind(*_sharding.vary_alike(operands), **partial), reduce_over)
    return (out if bias is None else out + bias.astype(_F32)).astype(params["out_dtype"])


def _split(operands: Sequence, first: int, has_zeros: bool, has_bias: bool = False) -> tuple:
    """The first operands, then zeros and bias, each None where absent."""
    rest = list(operands[first:])
    zeros = rest.pop(0) if has_zeros else None
    bias = rest.pop(0) if has_bias else None
    return (*operands[:first], zeros, bias)


# Types -----------------------------------------------------------------------------------------------------


def _dot_type(x, qweight, scales, *_, out_dtype, **__):
    spec = (*x.sharding.spec[:-1], scales.sharding.spec[-1])
    return _sharding.typed_like(x, (*x.shape[:-1], scales.shape[1]), out_dtype, spec)


def _dequantize_type(qweight, scales, *_, k, dtype, **__):
    spec = (qweight.sharding.spec[0], scales.sharding.spec[1])
    return _sharding.typed_like(scales, (k, scales.shape[1]), dtype, spec)


def _quantize_type(w, *, group_size, symmetric, scale_dtype, **_):
    k, n = w.shape
    scales = _sharding.typed_like(w, (_layout.num_groups(k, group_size), n), scale_dtype, (None, None))
    qweight = _sharding.typed_like(w, _layout.packed_shape(k, n), jnp.uint32, (None, None, None))
    return (qweight, scales) if symmetric else (qweight, scales, scales)


def _pack_type(codes, **_):
    shape = _layout.packed_shape(*codes.shape)
    return _sharding.typed_like(codes, shape, jnp.uint32, (None, None, None))


# Lowering --------------------------------------------------------------------------------------------------


def custom_call(ctx, target: str, operands, *, workspace_bytes: int = 0, **attributes):
    """An FFI call of `target`; a workspace is one more result."""
    avals_out = list(ctx.avals_out)
    if workspace_bytes:
        avals_out.append(core.ShapedArray((workspace_bytes,), jnp.uint8))
    results = jax.ffi.ffi_lowering(target)(ctx.replace(avals_out=avals_out), *operands, **attributes)
    return results[: len(ctx.avals_out)]


def _dot_kernel(
    ctx,
    platform: str,
    operands,
    *,
    group_size,
    alpha,
    out_dtype,
    has_zeros,
    has_bias,
    batch_invariant,
    config,
    **_,
):
    x, n = ctx.avals_in[0], ctx.avals_out[0].shape[-1]
    workspace_bytes = 0
    gpu = _config.local_gpu() if platform == "cuda" and not for_export(ctx) else None
    if gpu is None or not all(isinstance(size, int) for size in x.shape):
        config = config or "auto"
    else:
        m = math.prod(x.shape[:-1])
        dtypes = x.dtype.name, out_dtype.name
        options = has_zeros, has_bias, batch_invariant
        problem = _config.Problem(m, n, x.shape[-1], group_size, *dtypes, *options)
        chosen, workspace_bytes = _config.choose(problem, gpu, config)
        if config is None and _config.is_better_dense(problem, chosen):
            optional = {"has_zeros": has_zeros, "has_bias": has_bias}
            run = functools.partial(
                _dot_dense, group_size=group_size, alpha=alpha, out_dtype=out_dtype, **optional
            )
            return mlir.lower_fun(run, multiple_results=False)(ctx, *operands)
        config = chosen
    return custom_call(
        ctx,
        "w4a16_dot",
        operands,
        workspace_bytes=workspace_bytes,
        group_size=np.int64(group_size),
        alpha=np.float32(alpha),
        has_zeros=has_zeros,
        has_bias=has_bias,
        batch_invariant=batch_invariant,
        config=config,
    )


def _dot_dense(*operands, group_size, alpha, out_dtype, has_zeros, has_bias):
    """XLA's product with the weight, dequantised to x's type in memory."""
    x, qweight, scales, zeros, bias = _split(operands, 3, has_zeros, has_bias)
    w = dequantize(qweight, scales, zeros, k=x.shape[-1], group_size=group_size, dtype=x.dtype)
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    out = alpha * lax.dot_general(x, w, contract, preferred_element_type=_F32)
    return (out if bias is None else out + bias.astype(_F32)).astype(out_dtype)


def _dequantize_kernel(ctx, platform: str, operands, *, group_size, has_zeros, **_):
    return custom_call(
        ctx, "w4a16_dequantize", operands, group_size=np.int64(group_size), has_zeros=has_zeros
    )


def _quantize_kernel(ctx, platform: str, operands, *, group_size, symmetric, **_):
    return custom_call(ctx, "w4a16_quantize", operands, group_size=np.int64(group_size), symmetric=symmetric)


def _pack_kernel(ctx, platform: str, operands, **_):
    return custom_call(ctx, "w4a16_pack", operands)


def _dot_reference(*operands, group_size, alpha, out_dtype, has_zeros, has_bias, **_):
    operands = _split(operands, 3, has_zeros, has_bias)
    return [_reference.dot(*operands, group_size=group_size, alpha=alpha, out_dtype=out_dtype)]


def _dequantize_reference(*operands, k, group_size, dtype, has_zeros, **_):
    qweight, scales, zeros, _ = _split(operands, 2, has_zeros)
    return [_reference.dequantize(qweight, scales, zeros, k=k, group_size=group_size, dtype=dtype)]


def _quantize_reference(w, *, group_size, symmetric, scale_dtype, **_):
    results = _reference.quantize(w, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    return results[:2] if symmetric else results


def _pack_reference(codes, **_):
    return [_layout.pack(codes)]


def for_export(ctx) -> bool:
    """Whether the program is lowered for another process."""
    return ctx.module_context.lowering_parameters.for_export


def _refusal(ctx, platform: str | None) -> str | None:
    """Why no kernel can serve on this platform, or None. An exported program meets another build."""
    if platform is None:
        return (
            f"there is no kernel for the platform {'/'.join(ctx.platforms or ctx.module_context.platforms)}"
        )
    if platform == "cuda" and not _ffi.has_cuda() and not for_export(ctx):
        return "this build has no CUDA kernels"
    if platform == "cuda" and ctx.primitive.name in _PRODUCTS and ctx.avals_in[0].dtype == _F32:
        return "the CUDA kernels take x of float16 or bfloat16, got float32"
    return None


def _split_over_devices(ctx, primitive: Primitive, params: dict):
    if primitive not in (dot_p, dequantize_p):
        return None
    names = ["qweight", "scales"] + ["zeros"] * params["has_zeros"]
    if primitive is dot_p:
        names = ["x", *names] + ["bias"] * params["has_bias"]
    operands = dict(zip(names, ctx.avals_in, strict=True))
    k = operands["x"].shape[-1] if primitive is dot_p else params["k"]
    weight = _sharding.Weight(k, operands["scales"].shape[1], params["group_size"])
    return _sharding.partitioned(ctx, weight, names, functools.partial(_local, primitive, params))


def _register_lowering(primitive: Primitive, kernel, reference) -> None:
    def rule(platform: str | None, ctx, *operands, implementation: str, **params: Any):
        def run_reference(because=None):
            if because is not None:
                _sharding.warn_once(f"{primitive.name}: runs on the plain JAX reference: {because}")
            return mlir.lower_fun(functools.partial(reference, **params))(ctx, *operands)

        refusal = _refusal(ctx, platform)
        if implementation == "reference":
            return run_reference()
        if implementation == "auto" and refusal is not None:
            return run_reference(because=refusal)
        if implementation not in ("auto", platform):
            refusal = f"the program is for {platform or refusal}"
        if refusal is not None:
            raise ValueError(f"{primitive.name}: implementation {implementation!r} cannot serve: {refusal}")
        split = _split_over_devices(ctx, primitive, dict(params, implementation=implementation))
        if split is not None:
            return mlir.lower_fun(split, multiple_results=False)(ctx, *operands)
        try:
            return kernel(ctx, platform, operands, **params)
        except _config.NoKernelError as error:
            if implementation != "auto":
                raise
            return run_reference(because=error)

    for platform in ("cpu", "cuda", None):
        mlir.register_lowering(primitive, functools.partial(rule, platform), platform=platform)


# Differentiation -------------------------------------------------------------------------------------------


def group_sums(x, group_size: int):
    """float32 sums of x [..., K] over each group of K: [..., ceil(K/g)]."""
    k = x.shape[-1]
    groups = _layout.num_groups(k, group_size)
    padding = [(0, 0)] * (x.ndim - 1) + [(0, groups * min(group_size, k) - k)]
    x = jnp.pad(x.astype(_F32), padding)
    return x.reshape(*x.shape[:-1], groups, min(group_size, k)).sum(-1)


def _dot_jvp(primals, tangents, *, has_zeros, has_bias, **params):
    x, qweight, scales, zeros, bias = _split(primals, 3, has_zeros, has_bias)
    dx, _, dscales, dzeros, dbias = _split(tangents, 3, has_zeros, has_bias)
    names = ("group_size", "alpha", "batch_invariant", "implementation", "config")
    shared = {name: params[name] for name in names}
    out = dot(x, qweight, scales, zeros, bias, out_dtype=params["out_dtype"], **shared)
    terms = []
    if type(dx) is not ad.Zero:
        terms.append(dot(dx, qweight, scales, zeros, out_dtype=params["out_dtype"], **shared))
    if type(dscales) is not ad.Zero:
        terms.append(dot(x, qweight, dscales, zeros, out_dtype=params["out_dtype"], **shared))
    if has_zeros and type(dzeros) is not ad.Zero:
        change = -params["alpha"] * scales.astype(_F32) * dzeros.astype(_F32)
        sums = group_sums(x, params["group_size"])
        terms.append(jnp.matmul(sums, change, precision=lax.Precision.HIGHEST).astype(out.dtype))
    if has_bias and type(dbias) is not ad.Zero:
        terms.append(jnp.broadcast_to(dbias.astype(out.dtype), out.shape))
    return out, sum_terms(terms, out)


def sum_terms(terms: list, out):
    """The sum of tangents of `out`."""
    if not terms:
        return ad.Zero(jax.typeof(out).to_tangent_aval())
    return functools.reduce(ad.add_jaxvals, terms)


def scales_cotangent(ct, x, qweight, zeros, *, group_size, implementation):
    """x^T ct summed over each group's codes - zeros: float32 [ceil(K/g), N], for ct [M, N] and x [M, K]."""
    x = x.astype(ct.dtype)
    sums = group_sums(_codes_times(x, qweight, ct, implementation).T, _layout.ceil_div(group_size, 32)).T
    if zeros is not None:
        group_ct = jnp.matmul(group_sums(x, group_size).T, ct.astype(_F32), precision=lax.Precision.HIGHEST)
        sums -= (zeros.astype(_F32) - _layout.SYMMETRIC_ZERO) * group_ct
    return sums


def _codes_times(x, qweight, ct, implementation):
    """float32 sums over 32 rows each of (code - 8)[k, n] * (x^T ct)[k, n]: [ceil(K/32), N].

    x^T ct is made for a few blocks of K at a time, so that it is never of the size of the weight.
    """
    k, n = x.shape[1], ct.shape[1]
    blocks = 8

    def some_blocks(some_x, some_qweight):
        rows = some_x.shape[1]
        group_size = max(min(rows, _layout.BLOCK_K), 1)  # of whole blocks, so that K may be split
        codes = dequantize(
            some_qweight,
            jnp.ones((_layout.num_groups(rows, group_size), n), some_x.dtype),
            k=rows,
            group_size=group_size,
            dtype=some_x.dtype,
            implementation=implementation,
        )
        product = lax.dot_general(some_x, ct, (((0,), (0,)), ((), ())), preferred_element_type=_F32)
        return group_sums((codes.astype(_F32) * product).T, 32).T

    rows = blocks * _layout.BLOCK_K
    whole = k // rows

    def chunk(i):
        some_x = lax.dynamic_slice_in_dim(x, i * rows, rows, axis=1)
        return some_blocks(some_x, lax.dynamic_slice_in_dim(qweight, i * blocks, blocks, axis=0))

    sums = []
    if whole:
        sums.append(lax.map(chunk, jnp.arange(whole)).reshape(whole * rows // 32, n))
    if k % rows:
        sums.append(some_blocks(x[:, whole * rows :], qweight[whole * blocks :]))
    return jnp.concatenate(sums) if sums else jnp.zeros((0, n), _F32)


def _dot_transpose(ct, x, qweight, scales, *rest, has_zeros, has_bias, group_size, alpha, **params):
    if has_bias:
        raise NotImplementedError("w4a16_dot with a bias is not linear; transpose it without")
    zeros = rest[0] if has_zeros else None
    results: list[Any] = [None] * (3 + len(rest))
    if type(ct) is ad.Zero:
        return results
    implementation = params["implementation"]
    if ad.is_undefined_primal(x):
        k = x.aval.shape[-1]
        w = dequantize(
            qweight, scales, zeros, k=k, group_size=group_size, dtype=ct.dtype, implementation=implementation
        )
        contract = (((ct.ndim - 1,), (1,)), ((), ()))
        dx = alpha * lax.dot_general(ct, w, contract, preferred_element_type=_F32)
        results[0] = dx.astype(x.aval.dtype)
    else:
        rows = math.prod(x.shape[:-1])
        x, ct = x.reshape(rows, x.shape[-1]), ct.reshape(rows, ct.shape[-1])
        shared = {"group_size": group_size, "implementation": implementation}
        results[2] = (alpha * scales_cotangent(ct, x, qweight, zeros, **shared)).astype(scales.aval.dtype)
    return results


def _dequantize_jvp(primals, tangents, *, has_zeros, k, group_size, dtype, implementation):
    qweight, scales, zeros, _ = _split(primals, 2, has_zeros)
    _, dscales, dzeros, _ = _split(tangents, 2, has_zeros)
    run = functools.partial(
        dequantize, k=k, group_size=group_size, dtype=dtype, implementation=implementation
    )
    out = run(qweight, scales, zeros)
    terms = []
    if type(dscales) is not ad.Zero:
        terms.append(run(qweight, dscales, zeros))
    if has_zeros and type(dzeros) is not ad.Zero:
        change = (-scales.astype(_F32) * dzeros.astype(_F32)).astype(dtype)
        terms.append(_reference.per_row(change, k, group_size))
    return out, sum_terms(terms, out)


def _dequantize_transpose(ct, qweight, scales, *rest, has_zeros, k, group_size, dtype, implementation):
    results: list[Any] = [None] * (2 + len(rest))
    if type(ct) is not ad.Zero:
        ones = jnp.ones(scales.aval.shape, scales.aval.dtype)
        codes = dequantize(
            qweight, ones, *rest, k=k, group_size=group_size, dtype=dtype, implementation=implementation
        )
        sums = group_sums((codes.astype(_F32) * ct.astype(_F32)).T, group_size).T
        results[1] = sums.astype(scales.aval.dtype)
    return results


# Batching --------------------------------------------------------------------------------------------------


def _batch(primitive: Primitive, operands, dims, **params):
    """One call for a mapped x, whose leading dimensions are rows anyway; else a loop over what is mapped."""
    if primitive is dot_p and all(dim is None for dim in dims[1:]):
        x, *rest = operands
        return primitive.bind(jnp.moveaxis(x, dims[0], 0), *rest, **params), 0
    mapped = {
        i: jnp.moveaxis(operand, dim, 0)
        for i, (operand, dim) in enumerate(zip(operands, dims, strict=True))
        if dim is not None
    }
    one = lambda some: primitive.bind(*(some.get(i, operand) for i, operand in enumerate(operands)), **params)
    out = lax.map(one, mapped)
    return out, [0] * len(out) if primitive.multiple_results else 0


# The primitives --------------------------------------------------------------------------------------------


def define(name: str, types, kernel, reference, *, multiple_results: bool = False) -> Primitive:
    """A primitive with its types and lowerings; vmap loops over what is mapped."""
    primitive = Primitive(name)
    primitive.multiple_results = multiple_results
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
    primitive.def_abstract_eval(types)
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
    _register_lowering(primitive, kernel, reference)
    return primitive


dot_p = define("w4a16_dot", _dot_type, _dot_kernel, _dot_reference)
dequantize_p = define("w4a16_dequantize", _dequantize_type, _dequantize_kernel, _dequantize_reference)
quantize_p = define(
    "w4a16_quantize", _quantize_type, _quantize_kernel, _quantize_reference, multiple_results=True
)
pack_p = define("w4a16_pack", _pack_type, _pack_kernel, _pack_reference)

ad.primitive_jvps[dot_p] = _dot_jvp
ad.primitive_jvps[dequantize_p] = _dequantize_jvp
ad.primitive_transposes[dot_p] = _dot_transpose
ad.primitive_transposes[dequantize_p] = _dequantize_transpose
_sharding.needs_devices(dot_p)
_sharding.needs_devices(dequantize_p)
