"""Weights for `llama.Llama`: random ones made in packed form, or those of a checkpoint folder.

Each array is made where it will be, one after the other: no float form of a packed model ever exists.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

import jax_w4a16
from benchmarks import llama
from benchmarks.llama_config import Config
from benchmarks.progress import Progress
from jax_w4a16 import QuantizedWeight

_CODE_SPREAD = 4.18  # standard deviation of the random codes


def _fill(config: Config, mesh: Mesh | None, make: Callable[[tuple[str, ...], Any, Any], jax.Array]) -> Any:
    """The model's state, each array of it from `make(names, shape and dtype, sharding)`."""
    _, state = llama.abstract(config)
    split = jax.tree.leaves(llama.specs(config))
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    progress = Progress(len(leaves), "weights")
    arrays = []
    for (path, leaf), spec in zip(leaves, split, strict=True):
        keys = (getattr(key, "key", getattr(key, "name", None)) for key in path)
        names = tuple(str(key) for key in keys if key not in (None, "value"))
        place = None if mesh is None else NamedSharding(mesh, spec)
        arrays.append(make(names, leaf, place))
        progress.step(".".join(names))
    return jax.block_until_ready(jax.tree.unflatten(tree, arrays))


def random_state(config: Config, mesh: Mesh | None = None, seed: int = 0) -> Any:
    """Weights that keep activations level: of variance 1 / K, symmetric about zero."""
    keys = iter(jax.random.split(jax.random.key(seed), 16 * config.layers + 16))

    def make(names, leaf, place):
        name = "norm" if any("norm" in part for part in names) else names[-1]
        return _random(name, leaf.shape, leaf.dtype, config.group_size, place)(next(keys))

    return _fill(config, mesh, make)


@functools.cache
def _random(name: str, shape: tuple[int, ...], dtype: Any, group_size: int, place: Any) -> Any:
    """A jitted function of a key."""

    def draw(key):
        if name == "qweight":
            words = jax.random.bits(key, shape, jnp.uint32)
            some = words | words >> 1 | words >> 2 | words >> 3
            return words | (~some & jnp.uint32(0x11111111)) << 3  # code 0 becomes 8: the rest is symmetric
        if name == "scales":
            size = _CODE_SPREAD * np.sqrt(shape[0] * group_size)
            return jax.random.uniform(key, shape, dtype, 0.5, 1.5) / jnp.asarray(size, dtype)
        if name in ("norm", "zeros"):
            return jnp.full(shape, 1 if name == "norm" else 8, dtype)
        size = 1 if name == "embedding" else np.sqrt(shape[0])
        return jax.random.normal(key, shape, dtype) / jnp.asarray(size, dtype)

    return jax.jit(draw, out_shardings=place)


# Checkpoints -----------------------------------------------------------------------------------------------

Tensors = Mapping[str, Any]  # "model.layers.0.self_attn.q_proj" -> QuantizedWeight, "....weight" -> array

_PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
    "norm_attention": ("input_layernorm",),
    "norm_mlp": ("post_attention_layernorm",),
}


def load_tensors(folder: Path) -> dict[str, Any]:
    """The tensors of a checkpoint folder, in the host's memory; packed codes are never unpacked."""
    from jax_w4a16 import checkpoint  # pyright: ignore[reportAttributeAccessIssue]

    return checkpoint.load(folder, sharding=SingleDeviceSharding(jax.devices("cpu")[0]))


def checkpoint_config(config: Config, tensors: Tensors) -> Config:
    """`config` with what the tensors themselves tell: tied embeddings, groups, zeros, a packed head."""
    head = tensors.get("lm_head")
    tied = config.tied or (head is None and "lm_head.weight" not in tensors)
    config = dataclasses.replace(config, tied=tied, packed_head=config.packed and head is not None)
    packed = [weight for weight in tensors.values() if isinstance(weight, QuantizedWeight)]
    if not (config.packed and packed):
        return config
    kinds = {(weight.group_size, weight.zeros is None) for weight in packed}
    if len(kinds) > 1:
        raise ValueError(f"expected one group size, with or without zeros, for all layers; got {kinds}")
    ((group_size, symmetric),) = kinds
    return dataclasses.replace(config, group_size=group_size, symmetric=symmetric)


def checkpoint_state(config: Config, tensors: Tensors, mesh: Mesh | None = None) -> Any:
    """The state of a model with `checkpoint_config`: codes stay packed, fused columns get their order.

    Raises KeyError where a tensor is missing, ValueError where one has another shape, or where one that stays
    packed has a `permutation` or an `input_scale`.
    """
    made: dict[tuple[str, ...], dict[str, Any]] = {}

    def make(names, leaf, place):
        *module, field = names
        module = tuple(module)
        if module not in made:
            made.clear()  # the arrays of one module follow one another
            made[module] = _module(config, tensors, module)
        array = made[module][field].astype(leaf.dtype)
        if array.shape != leaf.shape:
            raise ValueError(f"{'.'.join(names)}: expected shape {leaf.shape}, got {array.shape}")
        return jax.device_put(array, place or jax.devices()[0])

    return _fill(config, mesh, make)


def _module(config: Config, tensors: Tensors, module: tuple[str, ...]) -> dict[str, Any]:
    """The fields of one module of the model, in the order of columns that it has."""
    if module == ("embed",):
        return {"embedding": tensors["model.embed_tokens.weight"]}
    if module == ("norm",):
        return {"scale": tensors["model.norm.weight"]}
    if module == ("head",):
        return _fields(_weight(config, tensors, "lm_head", config.packed_head))
    _, index, name = module
    found = [f"model.layers.{index}.{part}" for part in _PARTS[name]]
    if name.startswith("norm"):
        return {"scale": tensors[f"{found[0]}.weight"]}
    parts = [_weight(config, tensors, part, config.packed) for part in found]
    if name == "gate_up" and config.packed:
        return _fields(jax_w4a16.interleave(*parts))
    blocks = {"qkv": config.kv_heads, "gate_up": config.mlp // llama.MLP_BLOCK}.get(name, 1)
    parts = [_fields(part) for part in parts]
    return {field: _fuse([part[field] for part in parts], blocks) for field in parts[0]}


def _weight(config: Config, tensors: Tensors, name: str, packed: bool) -> Any:
    """One linear layer's weight, quantised or dequantised where the checkpoint has the other form.

    A packed weight that wants its inputs changed is refused: query, key and value, or gate and up, become one
    layer, with one input, and each may want another change.
    """
    weight: Any = tensors.get(name)
    if weight is None:
        weight = jnp.asarray(tensors[f"{name}.weight"]).T  # [out, in] -> [K, N]
        if packed:
            options = {"group_size": config.group_size, "symmetric": config.symmetric}
            weight = jax_w4a16.quantize(weight, scale_dtype=config.dtype, **options)
    elif not packed:
        weight = weight.dequantize(config.dtype)
    elif own := sorted(set(weight.arrays) - {"qweight", "scales", "zeros"}):
        raise ValueError(f"{name}: expected a packed weight with no change of the inputs, got {own}")
    return weight


def _fields(weight: Any) -> dict[str, Any]:
    """A linear layer's arrays, by name."""
    return weight.arrays if isinstance(weight, QuantizedWeight) else {"kernel": weight}


def _fuse(arrays: list[jax.Array], blocks: int) -> jax.Array:
    """Concatenates along N, block by block: one of the first array, one of the second, ..."""
    if len(arrays) == 1:
        return arrays[0]
    axis = 1  # of a kernel and of scales in columns, of packed codes in 16 of them
    split = [array.reshape(array.shape[0], blocks, -1, *array.shape[2:]) for array in arrays]
    fused = jnp.concatenate(split, axis + 1)
    return fused.reshape(fused.shape[0], -1, *fused.shape[3:])
