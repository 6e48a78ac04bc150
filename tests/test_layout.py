"""pack and unpack against the picture in ffi/layout.h, as read by the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jax_w4a16
from jax_w4a16 import _layout, _primitive

SHAPES = [(64, 16), (1, 1), (63, 15), (65, 17), (128, 32), (200, 40), (0, 16), (64, 0), (500, 100), (1, 300)]


def codes_of(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 16, shape, dtype=np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
def test_pack_is_the_picture(implementation, shape):
    codes = codes_of(shape)
    got = _primitive.pack(jnp.asarray(codes), implementation=implementation)
    np.testing.assert_array_equal(got, oracle.pack(codes))


@pytest.mark.parametrize("shape", SHAPES)
def test_unpack_inverts_pack_whatever_the_padding(shape):
    codes = codes_of(shape, 1)
    qweight = oracle.pack(codes, np.random.default_rng(2))
    np.testing.assert_array_equal(jax_w4a16.unpack(qweight, shape), codes)
    np.testing.assert_array_equal(jax_w4a16.unpack(jax_w4a16.pack(codes), shape), codes)


def test_every_nibble_has_its_own_place(kernel):
    """One code at a time: the place of each of a block's 1024 codes, against the formula."""
    for k in range(64):
        codes = np.zeros((16, 64, 16), np.uint8)
        codes[np.arange(16), k, np.arange(16)] = 15
        packed = np.stack([_primitive.pack(jnp.asarray(c), implementation=kernel) for c in codes])
        for n in range(16):
            word = 4 * (4 * (n % 8) + (k % 8) // 2) + k // 16
            nibble = n // 8 + 2 * ((k // 8) % 2) + 4 * (k % 2)
            want = np.zeros((1, 1, 128), np.uint32)
            want[0, 0, word] = np.uint32(15) << np.uint32(4 * nibble)
            np.testing.assert_array_equal(packed[n], want)


def test_pack_ignores_high_bits(implementation):
    codes = codes_of((70, 20))
    high = codes | np.uint8(0xA0)
    got = _primitive.pack(jnp.asarray(high), implementation=implementation)
    np.testing.assert_array_equal(got, oracle.pack(codes))


def test_pack_in_jit_and_vmap(kernel):
    codes = np.stack([codes_of((70, 20), seed) for seed in range(3)])
    got = jax.jit(jax.vmap(lambda c: _primitive.pack(c, implementation=kernel)))(codes)
    np.testing.assert_array_equal(got, np.stack([oracle.pack(c) for c in codes]))


def test_packed_shape():
    assert _layout.packed_shape(65, 16) == (2, 1, 128)
    assert _layout.packed_shape(0, 1) == (0, 1, 128)
    assert _layout.num_groups(0, 1) == 0
    assert _layout.num_groups(65, 32) == 3
    assert _layout.num_groups(65, 100) == 1
