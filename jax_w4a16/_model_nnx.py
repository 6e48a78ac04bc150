"""What `quantize_model` knows of `nnx.Module`s."""

from flax import nnx

from jax_w4a16._model import Form, Found, is_weight
from jax_w4a16.nnx import W4A16Linear, scale_dtype


def form(model: nnx.Module) -> Form:
    """The kernels of the model's `nnx.Linear` layers, by the path of the layer."""
    layers = {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if type(module) is nnx.Linear and is_weight(module.kernel[...])
    }

    def replace(packed):
        def swap(path, node):
            path = "/".join(map(str, path))
            if type(node) is not nnx.Linear or path not in packed:
                return node
            return W4A16Linear.from_quantized(
                packed[path],
                None if node.bias is None else node.bias[...],
                dtype=node.dtype,
                preferred_element_type=node.preferred_element_type,
            )

        return nnx.recursive_map(swap, nnx.clone(model))

    return Form({path: Found(m.kernel[...], scale_dtype(m)) for path, m in layers.items()}, replace)
