"""Saves weights and arrays in our own schema, which own.py describes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_w4a16 import _checks
from jax_w4a16._types import QuantizedWeight
from jax_w4a16.checkpoint import _layer
from jax_w4a16.checkpoint._header import NAMES
from jax_w4a16.checkpoint._write import Entry, Item, write

MAX_FILE_BYTES = 5_000_000_000


def save(
    path, params: Mapping[str, QuantizedWeight | jax.Array], *, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Writes weights and arrays to safetensors, in the schema of `jax_w4a16.checkpoint.own`.

    `load` reads them back bit for bit.

    Args:
      path: a file that ends in .safetensors, which is replaced if it exists, as is a link; or a folder, where
        several files with an index are written if one would exceed max_file_bytes.
      params: QuantizedWeights (stacks too) and arrays by name, as `load` returns them. All of an array must
        be on devices of this process.
      max_file_bytes: of one file of a folder, unless a single layer is larger.

    Raises:
      TypeError: params is not as described.
      ValueError: a weight's invariants do not hold, two tensors would have one name, or max_file_bytes is
        less than 1.
      FileExistsError: the folder holds .safetensors files already, or is a file.
      IsADirectoryError: the file is a folder.
      FileNotFoundError: the file's folder does not exist.
    """
    if not isinstance(params, Mapping):
        raise TypeError(f"params: expected a dict, got {type(params).__name__}")
    if _checks.integer("max_file_bytes", max_file_bytes) < 1:
        raise ValueError(f"max_file_bytes: expected at least 1, got {max_file_bytes}")
    write(Path(path), [_entry(name, value) for name, value in params.items()], max_file_bytes, lambda _: None)


def _entry(name: Any, value: Any) -> Entry:
    if not isinstance(name, str):
        raise TypeError(f"params: expected names that are texts, got {name!r}")
    if not isinstance(value, QuantizedWeight):
        if not isinstance(value, jax.Array | np.ndarray) or value.dtype not in NAMES:
            got = getattr(value, "dtype", type(value).__name__)
            raise TypeError(f"{name}: expected a QuantizedWeight or an array of a common type, got {got}")
        return Entry(name, {name: _item(value)})
    try:
        value.validate()
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
    items = {f"{name}.{field}": _item(a) for field, a in value.arrays.items()}
    return Entry(name, items, {"k": int(value.in_features), "group_size": int(value.group_size)})


def _item(array: Any) -> Item:
    return Item(np.dtype(array.dtype), tuple(array.shape), lambda: np.asarray(array))


def entry_of_layer(name: str, layer: _layer.Layer) -> Entry:
    """A layer of another checkpoint, read as it is written."""
    read: Callable[[str], Callable[[], np.ndarray]] = lambda field: lambda: layer.read(field)
    items = {
        f"{name}.{field}": Item(layer.dtypes[field], layer.shapes[field], read(field))
        for field in layer.fields
    }
    return Entry(name, items, {"k": layer.k, "group_size": layer.group_size})
