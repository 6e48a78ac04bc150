"""Finds the quantised layers of a checkpoint, and places them on devices slice by slice."""

import dataclasses
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from jax_w4a16 import _checks, _layout, _progress, _sharding
from jax_w4a16._types import QuantizedWeight
from jax_w4a16.checkpoint import _files, _header, _layer, awq, compressed_tensors, gptq, hqq, own, torchao

FOREIGN = (compressed_tensors, awq, gptq, hqq, torchao)

Shardings = Sharding | Callable[[str, tuple[int, ...]], Sharding | None] | None


def load(
    path, *, sharding: Shardings = None, dtype=None, progress: bool = True
) -> dict[str, QuantizedWeight | jax.Array]:
    """Loads a checkpoint, with its 4-bit layers in the packed layout.

    The format of each layer is found by its tensors: compressed-tensors (pack-quantized), AWQ (gemm and
    gemv), GPTQ (v1 and v2, with desc_act), HQQ (axis=1), torchao (Int4Tensor, plain), or what `save` wrote.
    Codes, scales and zero points come out exactly as stored; but for torchao's zero points, see torchao.py.
    What is no 4-bit layer comes as an array; a warning names quantised modules of other than 4 bits.

    Args:
      path: a .safetensors file, or a folder with one, several, or an index of them, and perhaps config.json.
      sharding: None, which is the default device; a jax Sharding; or a function of a layer's name and
        (K, N), or another tensor's name and shape, that returns one of those. A layer's PartitionSpec is over
        (K, N). Each device's part is read and packed alone, and nothing is gathered.
      dtype: type of scales, zeros, input_scale and other floating tensors, float16, bfloat16 or float32;
        default: as stored.
      progress: whether a terminal shows a bar.

    Returns:
      A QuantizedWeight by module path (`model.layers.0.self_attn.q_proj`) for each quantised layer, and an
      array by its name for each other tensor. 64-bit types become 32-bit ones unless JAX has them enabled.

    Raises:
      FileNotFoundError: there is no such file, or none in the folder, or one of several is missing.
      ValueError: the checkpoint is malformed (the message names file, tensor, expected and got), a value does
        not fit its new type, or a tensor cannot be split so.
      TypeError: an argument is not as described.
      ImportError: safetensors is not installed.
    """
    if dtype is not None:
        dtype = _checks.float_dtype("dtype", dtype)
    if not (sharding is None or isinstance(sharding, Sharding) or callable(sharding)):
        raise TypeError(f"sharding: expected a Sharding, a function or None, got {type(sharding).__name__}")
    checkpoint = open_checkpoint(path)
    layers, others = find(checkpoint, dtype)

    plans: dict[str, tuple[Any, dict[str, Sharding | None]]] = {}
    for name, layer in layers.items():
        plans[name] = layer, _split_layer(name, layer, _wanted(sharding, name, layer.shape))
    for name, tensor in others.items():
        plans[name] = tensor, {"": _split_other(name, tensor, _wanted(sharding, name, tensor.shape))}

    result = {}
    with _progress.Progress(len(plans) if progress else 0) as bar:
        for name, (source, splits) in plans.items():
            if progress:
                bar.step(name)
            if isinstance(source, _layer.Layer):
                arrays = {
                    field: _place(source.shapes[field], splits[field], read)
                    for field, read in source.fields.items()
                }
                result[name] = QuantizedWeight(**arrays, group_size=source.group_size, k=source.k)
            else:
                result[name] = _place(source.shape, splits[""], _reader(source, dtype))
            checkpoint.close()
    return result


def open_checkpoint(path) -> _files.Checkpoint:
    """As `_files.open_checkpoint`, with a clear error where safetensors is not installed."""
    try:
        import safetensors  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "jax_w4a16.checkpoint needs safetensors: pip install jax_w4a16[checkpoint]"
        ) from error
    return _files.open_checkpoint(Path(path))


def find(
    checkpoint: _files.Checkpoint, dtype: np.dtype | None = None
) -> tuple[dict[str, _layer.Layer], dict[str, _files.Tensor]]:
    """The quantised layers of a checkpoint, and its other tensors.

    Raises:
      ValueError: a layer is malformed.
    """
    layers = own.layers(checkpoint, dtype)
    unread: dict[str, list[str]] = {}
    foreign = {name: t for name, t in checkpoint.tensors.items() if not own.is_own(t.file)}
    for module in FOREIGN:
        found = module.layers(dataclasses.replace(checkpoint, tensors=foreign), dtype)
        for name, layer in found.items():
            if isinstance(layer, _layer.Other):
                unread.setdefault(layer.kind, []).append(name)
                continue
            if name in layers:
                raise ValueError(f"{checkpoint.path}: {name}: expected one format, got tensors of two")
            layers[name] = layer
    claimed = {tensor.name for layer in layers.values() for tensor in layer.tensors}
    others = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in claimed}
    for name in layers.keys() & others.keys():
        raise ValueError(f"{checkpoint.path}: {name}: expected a tensor or a layer of that name, got both")
    if unread:
        text = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in unread.items())
        warnings.warn(
            f"{checkpoint.path}: modules that are not of 4 bits are loaded as they are: {text}", stacklevel=3
        )
    elif checkpoint.config and not layers:
        method = checkpoint.config.get("quant_method", "an unknown method")
        warnings.warn(
            f"{checkpoint.path}: quantised with {method}, of which no 4-bit layer was found; its tensors are "
            "loaded as they are",
            stacklevel=3,
        )
    return layers, others


def _wanted(sharding: Shardings, name: str, shape: tuple[int, ...]) -> Sharding | None:
    if sharding is None or isinstance(sharding, Sharding):
        return sharding
    wanted = sharding(name, shape)
    if wanted is not None and not isinstance(wanted, Sharding):
        raise TypeError(f"sharding({name!r}): expected a Sharding or None, got {type(wanted).__name__}")
    return wanted


def _split_layer(name: str, layer: _layer.Layer, sharding: Sharding | None) -> dict[str, Sharding | None]:
    """The sharding of each field of a layer from one over (K, N).

    Raises:
      ValueError: it cuts a block, a group, or the rows of an act-order layer.
    """
    if not isinstance(sharding, NamedSharding):
        if sharding is not None and not sharding.is_fully_replicated:
            raise ValueError(f"{name}: expected a NamedSharding over (K, N), got {sharding}")
        return dict.fromkeys(layer.fields, sharding)
    rank = len(layer.shape)
    if len(sharding.spec) > rank:
        raise ValueError(f"{name}: expected a spec over {rank} dimensions, got {sharding.spec}")
    *lead, k, n = (*sharding.spec, *(None,) * (rank - len(sharding.spec)))
    size = layer.k if layer.group_size == -1 else layer.group_size
    units = _sharding.Weight(layer.k, layer.n, max(size, 1))
    ways_k, ways_n = _ways(sharding, k), _ways(sharding, n)
    for size_of_lead, axes in zip(layer.shape, lead, strict=False):
        if size_of_lead % _ways(sharding, axes):
            raise ValueError(
                f"{layer.tensors[0].file.path}: {name}: expected a stack of {list(layer.shape[:-2])} that "
                f"splits into equal parts, got {sharding.spec} over {dict(sharding.mesh.shape)}"
            )
    if ways_k > 1 and "permutation" in layer.fields:
        raise ValueError(
            f"{name}: expected no split along K, got {ways_k} ways: its rows are in activation order, so "
            "each part would need values of x from all devices; split it along N or replicate it"
        )
    if units.units_k % ways_k:
        raise ValueError(
            f"{name}: expected K = {layer.k} to split into whole blocks of {_layout.BLOCK_K} rows and whole "
            f"groups of {size}, got {ways_k} parts"
        )
    if units.units_n % ways_n:
        raise ValueError(
            f"{name}: expected N = {layer.n} to split into whole blocks of {_layout.BLOCK_N} columns, got "
            f"{ways_n} parts"
        )
    specs = {"qweight": P(*lead, k, n, None), "scales": P(*lead, k, n), "zeros": P(*lead, k, n)}
    specs |= {"permutation": P(*lead, None), "input_scale": P(*lead, k)}
    named = lambda spec: NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
    return {field: named(specs[field]) for field in layer.fields}


def _ways(sharding: NamedSharding, axes: Any) -> int:
    axes = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
    return math.prod(sharding.mesh.shape[axis] for axis in axes)


def _split_other(name: str, tensor: _files.Tensor, sharding: Sharding | None) -> Sharding | None:
    if sharding is not None:
        try:
            sharding.shard_shape(tensor.shape)
        except (IndexError, ValueError) as error:
            raise ValueError(
                f"{name}: expected a sharding for shape {list(tensor.shape)}, got {sharding}: {error}"
            ) from error
    return sharding


def _reader(tensor: _files.Tensor, dtype: np.dtype | None) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """Reads a tensor that is no weight, in the type that it is to have."""
    floating = _header.NAMES[tensor.dtype] in ("F16", "BF16", "F32", "F64")
    if dtype is None or not floating:
        dtype = np.dtype(jax.dtypes.canonicalize_dtype(tensor.dtype))
    return lambda index: _layer.cast(tensor, "values", tensor[index], dtype)


def _place(
    shape: tuple[int, ...], sharding: Sharding | None, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """An array whose parts are read one at a time, each once, and put on the devices that hold them."""
    if sharding is None:
        return jax.block_until_ready(jax.device_put(read((slice(None),) * len(shape))))
    holders: dict[tuple, list] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        index = index or ()
        key = tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
        holders.setdefault(key, []).append(device)
    arrays = {}
    for key, devices in holders.items():
        part = read(tuple(slice(*ends) for ends in key))
        for device in devices:
            where = jax.sharding.SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
            arrays[device] = jax.device_put(part, where)
        jax.block_until_ready([arrays[device] for device in devices])
    ordered = [arrays[device] for device in sharding.addressable_devices_indices_map(shape)]
    return jax.make_array_from_single_device_arrays(shape, sharding, ordered)
