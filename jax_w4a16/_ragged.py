"""The primitive w4a16_ragged_dot: x [M, K], group_sizes, qweight, scales, zeros? -> [M, N].

It is linear in x and in scales, like w4a16_dot, and reads group_sizes on the device alone.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import ad, mlir
from jax.sharding import PartitionSpec as P

from jax_w4a16 import _config, _primitive, _reference, _sharding

_F32 = jnp.dtype("float32")


def ragged_dot(
    x,
    group_sizes,
    qweight,
    scales,
    zeros=None,
    *,
    group_size: int,
    out_dtype=None,
    implementation: str = "auto",
    config: str | None = None,
):
    """Binds w4a16_ragged_dot. Arguments have been checked; group_size is at least K if per column."""
    operands = [x, group_sizes, qweight, scales] + ([] if zeros is None else [zeros])

    def bind(*operands):
        return ragged_dot_p.bind(
            *_sharding.vary_alike(operands),
            has_zeros=zeros is not None,
            group_size=group_size,
            out_dtype=jnp.dtype(x.dtype if out_dtype is None else out_dtype),
            implementation=implementation,
            config=config,
        )

    axes = _sharding.explicit_axes()
    if not axes:
        return bind(*operands)
    if any(entry is not None for operand in operands for entry in jax.typeof(operand).sharding.spec):
        _warn_whole()
    whole = jax.shard_map(bind, in_specs=P(), out_specs=P(), axis_names=axes)
    return whole(*(jax.sharding.reshard(operand, P()) for operand in operands))


def _warn_whole() -> None:
    _sharding.warn_once(
        "w4a16_ragged_dot: every device computes all of it; split calls over devices in shard_map"
    )


def _type(x, group_sizes, qweight, scales, *_, out_dtype, **__):
    return _sharding.typed_like(x, (x.shape[0], scales.shape[-1]), out_dtype, (None, None))


def _kernel(ctx, platform: str, operands, *, group_size, out_dtype, has_zeros, config, **_):
    context = ctx.module_context.axis_context
    if isinstance(context, mlir.ShardingContext) and context.num_devices > 1:
        _warn_whole()
    (m, k), n, experts = ctx.avals_in[0].shape, ctx.avals_out[0].shape[1], ctx.avals_in[1].shape[0]
    gpu = _config.local_gpu() if platform == "cuda" and not _primitive.for_export(ctx) else None
    if gpu is None or not isinstance(m, int):
        config = config or "auto"
    else:
        dtypes = ctx.avals_in[0].dtype.name, out_dtype.name
        problem = _config.Problem(m, n, k, group_size, *dtypes, has_zeros, False)
        config = _config.choose_ragged(problem, experts, gpu, config)
    return _primitive.custom_call(
        ctx,
        "w4a16_ragged_dot",
        operands,
        group_size=np.int64(group_size),
        has_zeros=has_zeros,
        config=config,
    )


def _run_reference(x, group_sizes, qweight, scales, *zeros, group_size, out_dtype, **_):
    zeros = zeros[0] if zeros else None
    operands = x, group_sizes, qweight, scales, zeros
    return [_reference.ragged_dot(*operands, group_size=group_size, out_dtype=out_dtype)]


# Differentiation -------------------------------------------------------------------------------------------


def _jvp(primals, tangents, *, has_zeros, **params):
    x, group_sizes, qweight, scales, *zeros = primals
    dx, _, _, dscales, *dzeros = tangents
    run = functools.partial(ragged_dot, **params)
    out = run(x, group_sizes, qweight, scales, *zeros)
    terms = []
    if type(dx) is not ad.Zero:
        terms.append(run(dx, group_sizes, qweight, scales, *zeros))
    if type(dscales) is not ad.Zero:
        terms.append(run(x, group_sizes, qweight, dscales, *zeros))
    if has_zeros and type(dzeros[0]) is not ad.Zero:
        change = -scales.astype(_F32) * dzeros[0].astype(_F32)
        sums = _primitive.group_sums(x, params["group_size"])
        sizes = _reference.believed_sizes(group_sizes, x.shape[0])
        term = lax.ragged_dot(sums, change, sizes, precision=lax.Precision.HIGHEST)
        terms.append(term.astype(out.dtype))
    return out, _primitive.sum_terms(terms, out)


def _transpose(ct, x, group_sizes, qweight, scales, *zeros, group_size, implementation, **_):
    results: list = [None] * (4 + len(zeros))
    if type(ct) is ad.Zero:
        return results
    shared = {"group_size": group_size, "implementation": implementation}
    if ad.is_undefined_primal(x):
        m, k = x.aval.shape
        run = functools.partial(_primitive.dequantize, k=k, dtype=ct.dtype, **shared)
        w = lax.map(lambda some: run(*some), (qweight, scales, *zeros))
        sizes = _reference.believed_sizes(group_sizes, m)
        dx = lax.ragged_dot(ct, w.transpose(0, 2, 1), sizes, preferred_element_type=_F32)
        results[0] = dx.astype(x.aval.dtype)
    else:
        ends = jnp.cumsum(_reference.believed_sizes(group_sizes, x.shape[0]))
        rows = jnp.arange(x.shape[0])[:, None]

        def of_expert(some):
            begin, end, qweight, *zeros = some
            own = lambda a: jnp.where((rows >= begin) & (rows < end), a, 0)
            zeros = zeros[0] if zeros else None
            sums = _primitive.scales_cotangent(own(ct), own(x), qweight, zeros, **shared)
            return sums.astype(scales.aval.dtype)

        begins = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
        results[3] = lax.map(of_expert, (begins, ends, qweight, *zeros))
    return results


ragged_dot_p = _primitive.define("w4a16_ragged_dot", _type, _kernel, _run_reference)
ad.primitive_jvps[ragged_dot_p] = _jvp
ad.primitive_transposes[ragged_dot_p] = _transpose
_sharding.needs_devices(ragged_dot_p)
