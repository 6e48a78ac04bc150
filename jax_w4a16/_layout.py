"""The packed layout in plain JAX: the twin, bit for bit, of ffi/layout.h (which draws it)."""

import jax
import jax.numpy as jnp

BLOCK_N = 16
BLOCK_K = 64
BLOCK_WORDS = 128
SYMMETRIC_ZERO = 8


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def packed_shape(k: int, n: int) -> tuple[int, int, int]:
    """Shape of the packed array of a weight [k, n]."""
    return ceil_div(k, BLOCK_K), ceil_div(n, BLOCK_N), BLOCK_WORDS


def num_groups(k: int, group_size: int) -> int:
    """Rows of the scales of a weight with k rows."""
    return min(1, k) if group_size >= k else ceil_div(k, group_size)


# A block's axes. k = 16 step + 8 hi + 2 pair + lo, n = 8 r + row; the word of a code is
# 16 row + 4 pair + step, its nibble 4 lo + 2 hi + r.


def pack(codes: jax.Array) -> jax.Array:
    """uint8 [K, N] -> uint32 [ceil(K/64), ceil(N/16), 128]; only the low four bits count."""
    k, n = codes.shape
    blocks_k, blocks_n, words = packed_shape(k, n)
    padding = ((0, blocks_k * BLOCK_K - k), (0, blocks_n * BLOCK_N - n))
    nibbles = jnp.pad(codes.astype(jnp.uint32) & 15, padding)
    nibbles = nibbles.reshape(blocks_k, 4, 2, 4, 2, blocks_n, 2, 8)  # step hi pair lo . r row
    nibbles = nibbles.transpose(0, 5, 7, 3, 1, 4, 2, 6).reshape(blocks_k, blocks_n, words, 8)
    shifts = jnp.arange(0, 32, 4, dtype=jnp.uint32)
    return jnp.sum(nibbles << shifts, axis=-1, dtype=jnp.uint32)


def unpack(qweight: jax.Array, k: int, n: int) -> jax.Array:
    """uint32 [ceil(k/64), ceil(n/16), 128] -> uint8 [k, n]."""
    blocks_k, blocks_n, _ = qweight.shape
    shifts = jnp.arange(0, 32, 4, dtype=jnp.uint32)
    nibbles = ((qweight[..., None] >> shifts) & 15).astype(jnp.uint8)
    nibbles = nibbles.reshape(blocks_k, blocks_n, 8, 4, 4, 2, 2, 2)  # row pair step lo hi r
    nibbles = nibbles.transpose(0, 4, 6, 3, 5, 1, 7, 2)
    return nibbles.reshape(blocks_k * BLOCK_K, blocks_n * BLOCK_N)[:k, :n]
