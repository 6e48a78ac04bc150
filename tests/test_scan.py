"""lax.scan over stacked weights: values, gradients, and how a layer's weight reaches the kernel."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import device_of

import jax_w4a16

LAYERS, WIDTH = 4, 256
WEIGHT = f"u32[{WIDTH // 64},{WIDTH // 16},128]"


def layers(symmetric=True):
    rng = np.random.default_rng(0)
    made = [
        jax_w4a16.quantize(
            jnp.asarray(rng.standard_normal((WIDTH, WIDTH)) / 16, jnp.bfloat16),
            group_size=64,
            symmetric=symmetric,
        )
        for _ in range(LAYERS)
    ]
    return made, jax.tree.map(lambda *a: jnp.stack(a), *made)


def scanned(x, stack):
    return jax.lax.scan(lambda x, w: (jnp.tanh(jax_w4a16.dot(x, w)), None), x, stack)[0]


def unrolled(x, layers):
    for w in layers:
        x = jnp.tanh(jax_w4a16.dot(x, w))
    return x


X = np.random.default_rng(1).standard_normal((2, WIDTH))


@pytest.mark.parametrize("symmetric", [True, False])
def test_scan_is_the_loop(symmetric):
    made, stack = layers(symmetric)
    x = jnp.asarray(X, jnp.bfloat16)
    np.testing.assert_array_equal(jax.jit(scanned)(x, stack), jax.jit(unrolled)(x, made))


def test_gradient_of_scan():
    made, stack = layers(symmetric=False)
    x = jnp.asarray(X, jnp.bfloat16)
    loss = lambda f: lambda x, w: f(x, w).astype(jnp.float32).sum()
    got = jax.jit(jax.grad(loss(scanned), (0, 1), allow_int=True))(x, stack)
    want = jax.jit(jax.grad(loss(unrolled), (0, 1), allow_int=True))(x, made)
    np.testing.assert_allclose(
        np.asarray(got[0], np.float32), np.asarray(want[0], np.float32), rtol=0.05, atol=1e-3
    )
    for i in range(LAYERS):
        for name in ("scales", "zeros"):
            a, b = (np.asarray(getattr(w, name), np.float32) for w in (got[1], want[1][i]))
            a = a[i]
            np.testing.assert_allclose(a, b, rtol=0.05, atol=0.02 * np.abs(b).max())


def instructions(hlo: str) -> list[tuple[str, str, str]]:
    """(type without layout, operation, whole line) of every instruction."""
    found = re.findall(r"^.*? = (\w+\[[\d,]*\])\S* ([\w-]+)\(.*$", hlo, re.MULTILINE)
    lines = [line for line in hlo.splitlines() if re.search(r" = \w+\[[\d,]*\]\S* [\w-]+\(", line)]
    return [(kind, op, line) for (kind, op), line in zip(found, lines, strict=True)]


def test_listed_weights_reach_the_kernel_as_they_are():
    made, _ = layers()
    hlo = jax.jit(unrolled).lower(jnp.asarray(X, jnp.bfloat16), made).compile().as_text()
    codes = {op for kind, op, _ in instructions(hlo) if kind.startswith("u32")}
    assert codes == {"parameter"}
    assert hlo.count('custom_call_target="w4a16_dot"') == LAYERS


def test_scanned_weights_are_sliced_and_nothing_else():
    """On a CPU XLA copies the layer's slice, packed, once; nothing else is done to codes or stack."""
    _, stack = layers()
    hlo = jax.jit(scanned).lower(jnp.asarray(X, jnp.bfloat16), stack).compile().as_text()
    codes = [(kind, op) for kind, op, _ in instructions(hlo) if kind.startswith("u32")]
    assert {op for _, op in codes} <= {"parameter", "get-tuple-element", "dynamic-slice", "bitcast", "fusion"}
    assert [op for kind, op in codes if kind == WEIGHT].count("fusion") == 1
    stacked = f"u32[{LAYERS},{WEIGHT[4:]}"
    assert {op for kind, op in codes if kind == stacked} == {"parameter", "get-tuple-element"}


@pytest.mark.gpu
def test_scanned_weights_are_not_copied_on_a_gpu():
    """There XLA hands the kernel an address inside the stack: only views make a layer's codes."""
    with jax.default_device(device_of("cuda")):
        _, stack = layers()
        hlo = jax.jit(scanned).lower(jnp.asarray(X, jnp.bfloat16), stack).compile().as_text()
        made = [line for kind, op, line in instructions(hlo) if kind == WEIGHT and op in ("fusion", "copy")]
        assert not made, made
        x = jnp.asarray(X, jnp.bfloat16)
        np.testing.assert_array_equal(jax.jit(scanned)(x, stack), jax.jit(unrolled)(x, layers()[0]))
