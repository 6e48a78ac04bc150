"""How the kernels are split over devices.

A weight is split along N by whole blocks of 16 columns, and along K by whole blocks of 64 rows and whole
groups; then every device runs the kernel on its own part, and a split along K ends in one float32 all-reduce.
What cannot be split so is gathered, with a warning.

Axes of a mesh that are Auto: Shardy propagates shardings by a rule, and `partitioned` runs the parts.
Axes that are Explicit: the operands' types say how they are split; `explicit` runs the parts in shard_map.
Axes that are Manual: the caller has split the operands already.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax._src import core, dispatch
from jax._src.sharding_impls import parse_flatten_op_sharding
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_w4a16 import _layout

Axes = tuple[str, ...]


def warn_once(message: str) -> None:
    """A warning that a process gives once."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=2)


_warned: set[str] = set()


# Types -----------------------------------------------------------------------------------------------------


def _varying(value) -> frozenset:
    aval = jax.typeof(value)
    return aval.mat.varying if hasattr(aval, "mat") else aval.vma


def vary_alike(operands: Iterable) -> list:
    """Operands of one kernel inside shard_map, all made to vary over the axes over which any of them does.

    XLA sees nothing of it; the transpose sums a cotangent over the axes that its operand did not vary over,
    and does so in float32.
    """
    operands = list(operands)
    axes = frozenset().union(*map(_varying, operands))
    return [_vary(operand, tuple(sorted(axes - _varying(operand)))) for operand in operands]


def _vary(operand, axes: Axes):
    if not axes:
        return operand
    if not jnp.issubdtype(operand.dtype, jnp.floating):
        return lax.pcast(operand, axes, to="varying")
    return lax.pcast(operand.astype(jnp.float32), axes, to="varying").astype(operand.dtype)


def typed_like(aval, shape, dtype, spec):
    """The type of a result: `aval`'s, in the same mesh and as varying, but for shape, dtype and spec."""
    sharding = NamedSharding(aval.sharding.mesh, P(*spec))
    return aval.update(shape=tuple(shape), dtype=jnp.dtype(dtype), weak_type=False, sharding=sharding)


# What may be split -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Weight:
    """The sizes that decide how a weight [k, n] may be split."""

    k: int
    n: int
    group_size: int

    @property
    def num_groups(self) -> int:
        """Rows of the scales."""
        return _layout.num_groups(self.k, self.group_size)

    @property
    def units_k(self) -> int:
        """K may be split into a divisor of this number: whole blocks, whole groups, no padding."""
        whole = self.k % _layout.BLOCK_K == 0 and self.k % self.group_size == 0
        return math.gcd(self.k // _layout.BLOCK_K, self.num_groups) if whole and self.k else 1

    @property
    def units_n(self) -> int:
        """N may be split into a divisor of this number: whole blocks, no padding."""
        return 1 if self.n % _layout.BLOCK_N else max(self.n // _layout.BLOCK_N, 1)


def _spec(*dims: Axes) -> P:
    return P(*(axes or None for axes in dims))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Mesh axes over which a call is split: along K, along N, and along each leading dimension of x."""

    k: Axes
    n: Axes
    lead: tuple[Axes, ...]

    def operand(self, name: str) -> P:
        """How an operand is split."""
        return {
            "x": _spec(*self.lead, self.k),
            "qweight": _spec(self.k, self.n, ()),
            "scales": _spec(self.k, self.n),
            "zeros": _spec(self.k, self.n),
            "bias": _spec(self.n),
        }[name]

    def result(self, names: Sequence[str]) -> P:
        """How the result is split: a product where x is an operand, else the weight itself."""
        return _spec(*self.lead, self.n) if "x" in names else _spec(self.k, self.n)


def make_plan(weight: Weight, mesh, specs: dict[str, P]) -> Plan:
    """How to split a call whose operands (and "result", if known) come with these specs of full rank."""
    ways = lambda axes: math.prod(mesh.shape[axis] for axis in axes)

    def axes(name: str, dim: int) -> Axes:
        entry = specs[name][dim] if name in specs else None
        entry = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        return tuple(axis for axis in entry if mesh.shape[axis] > 1)

    k = axes("qweight", 0) or axes("scales", 0) or axes("x", -1)
    if weight.units_k % ways(k):
        warn_once(
            f"w4a16: K = {weight.k} is not split {ways(k)} ways: each part would need whole groups of "
            f"{weight.group_size} and whole blocks of {_layout.BLOCK_K}; every device computes all of K"
        )
        k = ()
    n = axes("qweight", 1) or axes("scales", 1) or axes("result", -1)
    n = tuple(axis for axis in n if axis not in k)
    if weight.units_n % ways(n):
        warn_once(
            f"w4a16: N = {weight.n} is not split {ways(n)} ways: each part would need whole blocks of "
            f"{_layout.BLOCK_N} columns; every device computes all of N"
        )
        n = ()
    dims = range(len(specs["x"]) - 1) if "x" in specs else ()
    lead = tuple(tuple(axis for axis in axes("x", i) if axis not in k + n) for i in dims)
    return Plan(k, n, lead)


def needs_devices(primitive) -> None:
    """Has JAX tell the lowering of `primitive` the devices, which custom_partitioning asks for."""
    dispatch.prim_requires_devices_during_lowering.add(primitive)


# Auto axes -------------------------------------------------------------------------------------------------


def _shardy_rule(weight: Weight, names: Sequence[str], ndim: int) -> tuple[str, dict]:
    """The rule by which Shardy propagates: k and n are factors that all operands share.

    Each dimension is a shared factor times what a unit of it holds: K = k units of 64 codes or more. Where
    there is but one unit the dimensions have factors of their own, so nothing is propagated between them.
    """
    sizes = {}

    def factors(shared: str, units: int, own: str, size: int) -> str:
        if units == 1:
            return own
        if size == units:
            return shared
        sizes[own] = size // units
        sizes[shared] = units
        return f"({shared} {own})"

    k, n = weight.units_k, weight.units_n
    lead = " ".join(f"b{i}" for i in range(ndim - 1))
    blocks_k, blocks_n, _ = _layout.packed_shape(weight.k, weight.n)
    columns = factors("n", n, "n_columns", weight.n)
    scales = f"{factors('k', k, 'k_groups', weight.num_groups)} {columns}"
    operands = {
        "x": f"{lead} {factors('k', k, 'k_rows', weight.k)}",
        "qweight": f"{factors('k', k, 'k_blocks', blocks_k)} {factors('n', n, 'n_blocks', blocks_n)} word",
        "scales": scales,
        "zeros": scales,
        "bias": columns,
    }
    result = f"{lead} {columns}" if "x" in names else f"{factors('k', k, 'k_rows', weight.k)} {columns}"
    text = f"{', '.join(operands[name] for name in names)} -> {result}"
    alone = {token for part in text.replace("->", ",").split(",") for token in _bare(part)}
    rule = {name: size for name, size in sizes.items() if name not in alone}
    if "x" in names and k > 1:
        rule["reduction_factors"] = ("k",)
    return text, rule


def _bare(dims: str) -> list[str]:
    """Factors that are a dimension by themselves."""
    return re.sub(r"\([^)]*\)", "", dims).split()


def _decode(array, mesh) -> P:
    """The PartitionSpec, of full rank, of XLA's sharding of an array; replicated where none expresses it.

    Shardy may split a dimension over a part of a mesh axis, which a PartitionSpec cannot say.
    """
    ndim = len(array.shape)
    try:
        (spec,) = parse_flatten_op_sharding(array.sharding._to_xla_hlo_sharding(ndim), mesh)
    except (AssertionError, ValueError, StopIteration):
        spec = P()
    return P(*spec, *(None,) * (ndim - len(spec)))


def partitioned(ctx, weight: Weight, names: Sequence[str], local: Callable) -> Callable | None:
    """A function of the operands that lets Shardy split them; None where this program has nothing to split.

    `local(*operands, reduce_over)` computes one device's part and sums it over those axes.
    """
    context = ctx.module_context.axis_context
    if isinstance(context, mlir.SPMDAxisContext):
        rest = [
            axis for axis, size in context.mesh.shape.items() if axis not in context.manual_axes and size > 1
        ]
        if rest:
            warn_once(f"w4a16: inside a shard_map that leaves {rest} automatic, those axes split nothing")
        return None
    if not isinstance(context, mlir.ShardingContext) or context.num_devices == 1:
        return None
    if ctx.module_context.lowering_parameters.for_export:
        warn_once("w4a16: a program exported for several devices splits nothing: its operands are gathered")
        return None

    whole = custom_partitioning(lambda *operands: local(*operands, reduce_over=()))

    def partition(mesh, arguments, result):
        arrays = dict(zip((*names, "result"), (*arguments, result), strict=True))
        plan = make_plan(weight, mesh, {name: _decode(a, mesh) for name, a in arrays.items()})

        def part(*operands):
            # A mesh with Explicit axes would refuse the psum, whose axes are those of this function alone.
            with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
                return local(*operands, reduce_over=plan.k if "x" in names else ())

        in_shardings = tuple(NamedSharding(mesh, plan.operand(name)) for name in names)
        return mesh, part, NamedSharding(mesh, plan.result(names)), in_shardings

    def rule(mesh, operand_types, result_types):
        return _shardy_rule(weight, names, operand_types[0].rank)

    whole.def_partition(partition=partition, sharding_rule=rule, decode_shardings=False)
    return whole


# Explicit axes ---------------------------------------------------------------------------------------------


def explicit_axes() -> set[str]:
    """The Explicit axes of the mesh at hand, but for those that a vmap has taken."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = {a for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    return axes - set(core.get_axis_env().explicit_mesh_axis_names)


def whole_along(x: jax.Array, axis: int) -> jax.Array:
    """x, not split along `axis` as far as axes are Explicit."""
    spec = [*jax.typeof(x).sharding.spec]
    if spec[axis] is None:
        return x
    spec[axis] = None
    return jax.sharding.reshard(x, P(*spec))


def explicit(weight: Weight, operands: dict[str, jax.Array], local: Callable) -> jax.Array | None:
    """The call inside a shard_map over the Explicit axes of the operands' mesh; None where there are none."""
    axes = explicit_axes()
    if not axes:
        return None
    names, mesh = tuple(operands), jax.sharding.get_abstract_mesh()
    plan = make_plan(weight, mesh, {name: jax.typeof(a).sharding.spec for name, a in operands.items()})
    in_specs = tuple(plan.operand(name) for name in names)
    run = jax.shard_map(
        lambda *parts: local(*parts, reduce_over=plan.k if "x" in names else ()),
        in_specs=in_specs,
        out_specs=plan.result(names),
        axis_names=axes,
    )
    return run(*(jax.sharding.reshard(a, spec) for a, spec in zip(operands.values(), in_specs, strict=True)))
