"""dot_add_norm and dot_swiglu: products whose neighbours in a transformer are part of a kernel, for decoding.

The primitive w4a16_fused_dot, by its epilogue:

    add_norm  x [..., K], qweight, scales, zeros?, residual [..., N], norm_scale [N] -> out, scaled, squares
    swiglu    x [..., K], qweight, scales, zeros?, squares? [..., S]                 -> [..., N/2]

Where no kernel serves it is w4a16_dot and plain JAX, which are also what is differentiated.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jax_w4a16 import _checks, _config, _dot, _ffi, _layout, _primitive, _sharding
from jax_w4a16._types import QuantizedWeight

MOST_FUSED_ROWS = 16  # the rows of one tile of the decode kernels
HALF = _layout.BLOCK_N // 2
SUMS = 4  # of squares, that the kernel reads at a time

_F32 = jnp.dtype("float32")


def dot_add_norm(
    x, qw: QuantizedWeight, residual, norm_scale, *, implementation: str = "auto"
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """residual + x @ w, and what an RMSNorm of it needs, in one product.

    RMSNorm's factor is one number a row, so it may come after the next product: with out, scaled and squares
    as returned,

        RMSNorm(out) * norm_scale = scaled * rsqrt(squares.sum(-1, keepdims=True) / N + epsilon)

    and `dot_swiglu` takes scaled and squares as they are. Differentiable in x, residual, norm_scale, and the
    weight's scales and zeros.

    On a GPU one kernel serves up to 16 rows, where N is a multiple of 16, K of 8, and the group size of 64.
    Elsewhere `dot` and plain JAX do, as they do on several devices outside `shard_map`; from 17 rows on they
    round x @ w to x's type before it is added. Inside `shard_map`, K must be whole: parts of it are to be
    summed over devices before anything is added, which takes `dot`.

    Args:
      x: activations [..., K], float16, bfloat16 or (CPU and reference only) float32.
      qw: a weight [K, N]; permutation and input_scale are applied to x.
      residual: [..., N] of x's type.
      norm_scale: [N] of x's type.
      implementation: as in `dot`.

    Returns:
      out: [..., N] of x's type, residual + x @ w, summed in float32 and rounded once.
      scaled: [..., N] of x's type, out * norm_scale.
      squares: float32 [..., ceil(N/16)], sums of out^2 over 16 columns each.

    Raises:
      TypeError, ValueError: an argument is not as described, or the implementation asked for cannot serve;
        the message names the operand, what was expected and what was got.
    """
    weight, permutation, size = _operands(x, qw)
    x, *_ = weight
    n = qw.out_features
    for name, value, shape in (
        ("residual", residual, (*x.shape[:-1], n)),
        ("norm_scale", norm_scale, (n,)),
    ):
        _checks.shape(name, _checks.array(name, value), shape, f" for x of shape {x.shape} and N = {n}")
        _checks.dtype(name, value, x.dtype, " like x")
    _dot.check_implementation(implementation)
    out, scaled, squares = _run(
        weight, permutation, (residual, norm_scale), (size, "add_norm", 0.0, implementation)
    )
    return out, scaled, squares


def dot_swiglu(
    x, qw: QuantizedWeight, squares=None, *, epsilon: float = 1e-5, implementation: str = "auto"
) -> jax.Array:
    """silu(x @ gate) * (x @ up), for a weight made of gate and up by `interleave`.

    With squares, x is what an RMSNorm gives but for its factor, one number a row, by which both products are
    multiplied: rsqrt(squares.sum(-1) / K + epsilon). Differentiable in x, squares, and the weight's scales
    and zeros.

    Kernels serve as for `dot_add_norm`; where they do not, both products are rounded to x's type first from
    17 rows on. Inside `shard_map`, K must be whole, and each device has whole blocks of 16 columns.

    Args:
      x: activations [..., K], float16, bfloat16 or (CPU and reference only) float32.
      qw: a weight [K, N]: of each 16 columns the first 8 are gate's, the others up's. Its permutation and
        input_scale are applied to x.
      squares: None, or float32 [..., S], S > 0, whose sum along S is that of the squares of K numbers, as
        `dot_add_norm` returns it.
      epsilon: a number from 0.
      implementation: as in `dot`.

    Returns:
      [..., N/2] of x's type, computed in float32 and rounded once.

    Raises:
      TypeError, ValueError: as `dot_add_norm`.
    """
    weight, permutation, size = _operands(x, qw)
    x, *_ = weight
    n = qw.out_features
    if n % _layout.BLOCK_N:
        raise ValueError(f"qw: expected N to be a multiple of {_layout.BLOCK_N}, as of interleave, got {n}")
    if squares is not None:
        _checks.dtype("squares", _checks.array("squares", squares), _F32)
        lead = tuple(x.shape[:-1])
        if tuple(squares.shape[:-1]) != lead or not squares.shape or squares.shape[-1] == 0:
            raise ValueError(
                f"squares: expected the leading dimensions of x, {lead}, and one more, not empty, "
                f"got shape {tuple(squares.shape)}"
            )
    if _checks.real("epsilon", epsilon) < 0:
        raise ValueError(f"epsilon: expected a number from 0, got {epsilon!r}")
    _dot.check_implementation(implementation)
    more = () if squares is None else (squares,)
    params = (size, "swiglu", _checks.real("epsilon", epsilon), implementation)
    return _run(weight, permutation, more, params)[0]


def _operands(x, qw) -> tuple[list, jax.Array | None, int]:
    """x, qweight, scales and, where there are any, zeros; then permutation and group size."""
    if not isinstance(qw, QuantizedWeight):
        raise TypeError(f"qw: expected a QuantizedWeight, got {type(qw).__name__}")
    x, qweight, scales, zeros, permutation, size = _dot.operands(x, qw)
    return [x, qweight, scales] + ([] if zeros is None else [zeros]), permutation, size


@functools.partial(jax.jit, static_argnums=3, inline=True)
def _run(weight, permutation, more, params):
    x, *weight = weight
    if permutation is not None:
        x = _sharding.whole_along(x, -1)[..., permutation]
    group_size, epilogue, epsilon, implementation = params
    return fused_dot(
        x,
        *weight,
        more=more,
        group_size=group_size,
        epilogue=epilogue,
        epsilon=epsilon,
        implementation=implementation,
    )


# The primitive ---------------------------------------------------------------------------------------------


def fused_dot(
    x,
    qweight,
    scales,
    zeros=None,
    *,
    more: tuple,
    group_size: int,
    epilogue: str,
    epsilon: float = 0.0,
    implementation: str = "auto",
    config: str | None = None,
):
    """Binds w4a16_fused_dot; `more` are the epilogue's operands. Arguments have been checked."""
    operands = [x, qweight, scales] + ([] if zeros is None else [zeros]) + list(more)
    params = {
        "has_zeros": zeros is not None,
        "group_size": group_size,
        "epilogue": epilogue,
        "epsilon": epsilon,
        "implementation": implementation,
        "config": config,
    }
    if _sharding.explicit_axes():
        return _compose(*operands, **params)
    if epilogue == "swiglu" and more and more[0].shape[-1] % SUMS:
        operands[-1] = jnp.pad(more[0], [(0, 0)] * (more[0].ndim - 1) + [(0, -more[0].shape[-1] % SUMS)])
    return fused_dot_p.bind(*_sharding.vary_alike(operands), **params)


def _rows(x):
    """M; no int where a dimension is symbolic."""
    return math.prod(x.shape[:-1])


def _types(x, qweight, scales, *_, epilogue, **__):
    n = scales.shape[1]
    spec = (*x.sharding.spec[:-1], None)
    columns = lambda size, dtype: _sharding.typed_like(x, (*x.shape[:-1], size), dtype, spec)
    if epilogue == "swiglu":
        return [columns(n // 2, x.dtype)]
    out = columns(n, x.dtype)
    return [out, out, columns(_layout.ceil_div(n, _layout.BLOCK_N), _F32)]


# In plain JAX ----------------------------------------------------------------------------------------------


def _compose(x, qweight, scales, *more, has_zeros, group_size, epilogue, epsilon, implementation, config):
    """The same as w4a16_dot and plain JAX.

    The fastest kernels for many rows have no float32 result, so only few rows ask for one.
    """
    zeros, *more = more if has_zeros else (None, *more)
    rows = _rows(x)
    few = isinstance(rows, int) and rows <= MOST_FUSED_ROWS
    y = _primitive.dot(
        x,
        qweight,
        scales,
        zeros,
        group_size=group_size,
        out_dtype=_F32 if few else x.dtype,
        implementation=implementation,
        config=config,
    )
    if epilogue == "swiglu":
        return [_swiglu(y.astype(_F32), *more, k=x.shape[-1], epsilon=epsilon).astype(x.dtype)]
    return _add_norm(y.astype(_F32), *more)


def _add_norm(y, residual, norm_scale):
    # Without the barrier XLA may take the numbers before they were rounded.
    out = lax.optimization_barrier((residual.astype(_F32) + y).astype(residual.dtype))
    rounded = out.astype(_F32)
    scaled = (rounded * norm_scale.astype(_F32)).astype(out.dtype)
    return [out, scaled, _in_blocks(jnp.square(rounded)).sum(-1)]


def _swiglu(y, squares=None, *, k, epsilon):
    if squares is not None:
        y *= lax.rsqrt(squares.sum(-1, keepdims=True) / max(k, 1) + epsilon)
    blocks = _in_blocks(y)
    out = jax.nn.silu(blocks[..., :HALF]) * blocks[..., HALF:]
    return out.reshape(*y.shape[:-1], y.shape[-1] // 2)


def _in_blocks(values):
    """[..., N] -> [..., ceil(N/16), 16], padded with zeros."""
    sharding, n = jax.typeof(values).sharding, values.shape[-1]
    if sharding.spec[-1] is not None and sharding.shard_shape(values.shape)[-1] % _layout.BLOCK_N:
        values = _sharding.whole_along(values, -1)
    blocks = _layout.ceil_div(n, _layout.BLOCK_N)
    padding = [(0, 0)] * (values.ndim - 1) + [(0, blocks * _layout.BLOCK_N - n)]
    return jnp.pad(values, padding).reshape(*values.shape[:-1], blocks, _layout.BLOCK_N)


# Lowering --------------------------------------------------------------------------------------------------


def _lower(ctx, *operands, **params):
    return mlir.lower_fun(functools.partial(_compose, **params))(ctx, *operands)


def _lower_cuda(ctx, *operands, **params):
    if _kernel_serves(ctx, params["implementation"], params["group_size"]):
        try:
            return _kernel(ctx, operands, **params)
        except _config.NoKernelError:
            pass
    return _lower(ctx, *operands, **params)


def _kernel_serves(ctx, implementation: str, group_size: int) -> bool:
    x, _, scales, *_ = ctx.avals_in
    k, n, rows = x.shape[-1], scales.shape[1], _rows(x)
    return (
        implementation in ("auto", "cuda")
        and (_ffi.has_cuda() or _primitive.for_export(ctx))
        and _is_one_device(ctx.module_context.axis_context)
        and x.dtype != _F32
        and all(isinstance(size, int) for size in (rows, n, k))
        and 0 < rows <= MOST_FUSED_ROWS
        and n > 0
        and n % _layout.BLOCK_N == 0
        and k > 0
        and k % 8 == 0
        and (group_size % _layout.BLOCK_K == 0 or group_size >= k)
    )


def _is_one_device(context) -> bool:
    """Whether the compiler splits nothing: there is one device, or all axes of the mesh are Manual."""
    if isinstance(context, mlir.ShardingContext):
        return context.num_devices == 1
    if isinstance(context, mlir.SPMDAxisContext):
        return all(size == 1 or axis in context.manual_axes for axis, size in context.mesh.shape.items())
    return True


def _kernel(ctx, operands, *, has_zeros, group_size, epilogue, epsilon, config, **_):
    x, _, scales, *more = ctx.avals_in
    gpu = None if _primitive.for_export(ctx) else _config.local_gpu()
    if gpu is None:
        config = config or "auto"
    else:
        problem = _config.Problem(
            _rows(x),
            scales.shape[1],
            x.shape[-1],
            group_size,
            x.dtype.name,
            x.dtype.name,
            has_zeros,
            has_bias=False,
            epilogue=epilogue,
        )
        config, _ = _config.choose(problem, gpu, config)
    return _primitive.custom_call(
        ctx,
        "w4a16_fused_dot",
        operands,
        group_size=np.int64(group_size),
        epsilon=np.float32(epsilon),
        has_zeros=has_zeros,
        has_squares=epilogue == "swiglu" and len(more) > has_zeros,
        epilogue=epilogue,
        config=config,
    )


# Transformations -------------------------------------------------------------------------------------------


def _jvp(primals, tangents, **params):
    moving = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

    def run(*values):
        changes = dict(zip(moving, values, strict=True))
        return _compose(*(changes.get(i, primal) for i, primal in enumerate(primals)), **params)

    return jax.jvp(run, [primals[i] for i in moving], [tangents[i] for i in moving])


def _batch(operands, dims, **params):
    """One call where only operands of each row are mapped, whose leading dimensions are rows anyway."""
    of_rows = (0, 3 + params["has_zeros"])  # x, and residual or squares
    if any(dim is not None and i not in of_rows for i, dim in enumerate(dims)):
        outs = jax.vmap(functools.partial(_compose, **params), in_axes=tuple(dims))(*operands)
        return outs, [0] * len(outs)
    size = next(a.shape[dim] for a, dim in zip(operands, dims, strict=True) if dim is not None)
    lead = lambda a, dim: jnp.broadcast_to(a, (size, *a.shape)) if dim is None else jnp.moveaxis(a, dim, 0)
    mapped = enumerate(zip(operands, dims, strict=True))
    outs = fused_dot_p.bind(*(lead(a, dim) if i in of_rows else a for i, (a, dim) in mapped), **params)
    return outs, [0] * len(outs)


fused_dot_p = Primitive("w4a16_fused_dot")
fused_dot_p.multiple_results = True
fused_dot_p.def_impl(functools.partial(xla.apply_primitive, fused_dot_p))
fused_dot_p.def_abstract_eval(_types)
mlir.register_lowering(fused_dot_p, _lower)
mlir.register_lowering(fused_dot_p, _lower_cuda, platform="cuda")
ad.primitive_jvps[fused_dot_p] = _jvp
batching.primitive_batchers[fused_dot_p] = _batch
_sharding.needs_devices(fused_dot_p)
