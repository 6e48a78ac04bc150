"""What `quantize_model` knows of the variables of linen modules."""

from collections.abc import Mapping

import jax.numpy as jnp

from jax_w4a16._model import Form, Found, is_weight
from jax_w4a16._types import QuantizedWeight
from jax_w4a16.linen import COLLECTION


def form(variables: Mapping) -> Form:
    """The kernels of `nn.Dense` layers, by the path of the layer; those of stacks only by name.

    Without a bias, a stack [L, K, N] looks like the kernel of an `nn.Conv` or an `nn.DenseGeneral`.
    """
    layers = dict(_dense_layers(variables["params"], ()))

    def replace(packed):
        quantized = _merged(variables.get(COLLECTION, {}), {})
        for path, weight in packed.items():
            quantized = _merged(quantized, _nested((*layers[path][0], "kernel"), weight.arrays))
        own = {layers[path][0]: weight for path, weight in packed.items()}
        params = _without_kernels(variables["params"], own, ())
        return dict(variables) | {"params": params, COLLECTION: quantized}

    found = {path: Found(kernel, by_name=kernel.ndim > 2) for path, (_, kernel) in layers.items()}
    return Form(found, replace)


def _dense_layers(tree, path: tuple[str, ...]):
    """(joined path, (path, kernel)) of each subtree that can be the parameters of an `nn.Dense`."""
    if not isinstance(tree, Mapping):
        return
    if "kernel" in tree and not set(tree) - {"kernel", "bias"} and is_weight(tree["kernel"]):
        kernel = tree["kernel"]
        if "bias" not in tree or tree["bias"].shape == (*kernel.shape[:-2], kernel.shape[-1]):
            yield "/".join(path), (path, kernel)
    else:
        for name, child in tree.items():
            yield from _dense_layers(child, (*path, name))


def _without_kernels(tree, packed: Mapping[tuple, QuantizedWeight], path: tuple[str, ...]):
    """The parameters without the kernels that were packed; biases get the type of the scales."""
    if path in packed:
        return {"bias": jnp.asarray(tree["bias"], packed[path].dtype)} if "bias" in tree else {}
    if not isinstance(tree, Mapping):
        return tree
    children = {name: _without_kernels(child, packed, (*path, name)) for name, child in tree.items()}
    return {
        name: child
        for name, child in children.items()
        if not isinstance(child, Mapping) or child or not tree[name]
    }


def _nested(path: tuple[str, ...], value) -> dict:
    for name in reversed(path):
        value = {name: value}
    return value


def _merged(a, b):
    """Nested dicts a and b in one; b's leaves win."""
    if not isinstance(a, Mapping) or not isinstance(b, Mapping):
        return b
    return dict(a) | {name: _merged(a[name], child) if name in a else child for name, child in b.items()}
