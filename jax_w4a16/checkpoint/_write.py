"""Writes safetensors files, tensor by tensor, so that no more than one is in memory."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from jax_w4a16.checkpoint import own
from jax_w4a16.checkpoint._files import INDEX
from jax_w4a16.checkpoint._header import NAMES


@dataclasses.dataclass(frozen=True)
class Item:
    """A tensor to be written: `read` makes it."""

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.dtype.itemsize * math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Entry:
    """What stays together in a file: the tensors of a layer, by name, with its sizes; or one other tensor."""

    name: str
    items: Mapping[str, Item]
    sizes: Mapping[str, int] | None = None


def write(path: Path, entries: Iterable[Entry], max_file_bytes: int, step: Callable[[str], None]) -> None:
    """Writes a file, where `path` ends in .safetensors, or a folder of one or several with an index.

    Args:
      path: what to write. A file is replaced in one step.
      entries: what to write into it.
      max_file_bytes: begin another file of a folder rather than exceed this.
      step: is told the name of each entry before it is written.

    Raises:
      FileExistsError: the folder holds a checkpoint already.
      ValueError: two tensors have one name, or cannot be stored.
    """
    entries = list(entries)
    items: dict[str, Item] = {}
    for entry in entries:
        for name, item in entry.items.items():
            if name in items or name == "__metadata__":
                raise ValueError(f"{path}: {name}: expected one tensor of that name, got two")
            if item.dtype not in NAMES:
                raise ValueError(f"{path}: {name}: expected a type that safetensors has, got {item.dtype}")
            items[name] = item
    if path.suffix == ".safetensors":
        _write_file(path, entries, step)
        return
    path.mkdir(parents=True, exist_ok=True)
    if (path / INDEX).exists() or any(path.glob("*.safetensors")):
        raise FileExistsError(f"{path}: expected no .safetensors files in it, got some")
    files = _split(entries, max_file_bytes)
    if len(files) == 1:
        _write_file(path / "model.safetensors", entries, step)
        return
    weight_map = {}
    for number, part in enumerate(files, 1):
        file = path / f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_file(file, part, step)
        weight_map |= {name: file.name for entry in part for name in entry.items}
    total = sum(item.nbytes for item in items.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _split(entries: list[Entry], max_file_bytes: int) -> list[list[Entry]]:
    files: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        size = sum(item.nbytes for item in entry.items.values())
        if files[-1] and filled + size > max_file_bytes:
            files.append([])
            filled = 0
        files[-1].append(entry)
        filled += size
    return files


def _write_file(path: Path, entries: list[Entry], step: Callable[[str], None]) -> None:
    # Tensors begin at multiples of their item's size, as safetensors' own writer has it, unless the sizes of
    # several layers are no multiples of 8 bytes.
    entries = sorted(entries, key=lambda entry: sum(item.nbytes for item in entry.items.values()) % 8 != 0)
    order = [
        (name, item, entry)
        for entry in entries
        for name, item in sorted(entry.items.items(), key=lambda pair: -pair[1].dtype.itemsize)
    ]
    layers = {entry.name: dict(entry.sizes) for entry in entries if entry.sizes is not None}
    header: dict[str, object] = {"__metadata__": own.metadata(layers)}
    end = 0
    for name, item, _ in order:
        offsets = [end, end + item.nbytes]
        header[name] = {"dtype": NAMES[item.dtype], "shape": list(item.shape), "data_offsets": offsets}
        end += item.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    begun = None
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, item, entry in order:
                if entry is not begun:
                    begun = entry
                    step(entry.name)
                array = np.asarray(item.read(), order="C")
                if (array.dtype, array.shape) != (item.dtype, item.shape):
                    got = f"{array.dtype} {array.shape}"
                    raise ValueError(f"{path}: {name}: expected {item.dtype} {item.shape}, got {got}")
                file.write(array.reshape(-1).view(np.uint8).data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
