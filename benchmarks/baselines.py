"""The rivals: the same product by cuBLAS, by torch's tinygemm, and by XLA on its own.

The torch functions serve the graph columns, the JAX functions the columns under jit; each side
imports only its own framework.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

TINYGEMM_TILES = 8  # k16 tiles that tinygemm's packed layout keeps together


def torch_dense(x: Any, w: Any, out: Any) -> None:
    """cuBLAS: x [M, K] times w [N, K], as torch.nn.Linear stores it, into out [M, N]."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.mm(x, w.t(), out=out)


def tinygemm_pack(codes: Any, scales: Any, zeros: Any) -> tuple[Any, Any]:
    """codes uint8 [K, N], scales and zeros [G, N] bfloat16 -> tinygemm's weight and its scales.

    tinygemm computes (code - 8) * scale + offset.
    """
    import torch  # pyright: ignore[reportMissingImports]

    rows = codes.t()
    nibbles = (rows[:, 0::2] << 4 | rows[:, 1::2]).contiguous()
    weight = torch.ops.aten._convert_weight_to_int4pack(nibbles, TINYGEMM_TILES)
    offset = torch.zeros_like(scales) if zeros is None else (8 - zeros) * scales
    return weight, torch.stack([scales, offset], dim=-1).contiguous()


def tinygemm(x: Any, packed: tuple[Any, Any], group_size: int) -> Any:
    """x bfloat16 [M, K] and what tinygemm_pack returned -> [M, N]."""
    import torch  # pyright: ignore[reportMissingImports]

    weight, scales_and_offsets = packed
    return torch.ops.aten._weight_int4pack_mm(x, weight, group_size, scales_and_offsets)


def jax_dense(x: "jax.Array", w: "jax.Array") -> "jax.Array":
    """x [M, K] times w [K, N] of x's type."""
    import jax.numpy as jnp

    return jnp.dot(x, w)


def jax_dequantize_dot(x: "jax.Array", codes: "jax.Array", scales: "jax.Array") -> "jax.Array":
    """What JAX offers without this library: int4 weights [K, N] (-8..7) widened, scaled per group
    and multiplied, for XLA to fuse as it can."""
    import jax.numpy as jnp

    k, n = codes.shape
    groups = scales.shape[0]
    w = codes.astype(x.dtype).reshape(groups, k // groups, n) * scales[:, None, :]
    return jnp.dot(x, w.reshape(k, n))
