"""Writes safetensors files, tensor by tensor, so that no more than one is in memory."""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
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


@contextlib.contextmanager
def replacing(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Other names to write files under, which take their places when all are written, or go if that fails.

    A link is replaced; what it points to is left alone.

    Raises:
      FileNotFoundError: a file's folder does not exist.
      IsADirectoryError: a path is a folder.
    """
    for path in paths:
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path.parent}: expected a folder, got none")
        if path.is_dir():
            raise IsADirectoryError(f"{path}: expected a file, got a folder")
    temporary = tuple(path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in paths)
    try:
        for name in temporary:
            name.unlink(missing_ok=True)
        yield temporary
        for name, path in zip(temporary, paths, strict=True):
            name.replace(path)
    finally:
        for name in temporary:
            name.unlink(missing_ok=True)


def write(path: Path, entries: Iterable[Entry], max_file_bytes: int, step: Callable[[str], None]) -> None:
    """Writes a file, where `path` ends in .safetensors, or a folder of one or several with an index.

    Args:
      path: what to write. A file, or a link, is replaced in one step; of a folder's files none is in its
        place before all are written.
      entries: what to write into it.
      max_file_bytes: begin another file of a folder rather than exceed this.
      step: is told the name of each entry before it is written.

    Raises:
      FileExistsError: the folder holds a checkpoint already.
      ValueError: two tensors have one name, or cannot be stored.
    """
    entries = list(entries)
    items: dict[str, Item] = {}
    taken: set[str] = set()
    for entry in entries:
        if entry.name in taken:
            raise ValueError(f"{path}: {entry.name}: expected a tensor or a layer of that name, got both")
        taken.add(entry.name)
        for name, item in entry.items.items():
            if name in items or name == "__metadata__":
                raise ValueError(f"{path}: {name}: expected one tensor of that name, got two")
            if item.dtype not in NAMES:
                raise ValueError(f"{path}: {name}: expected a type that safetensors has, got {item.dtype}")
            items[name] = item
    if path.suffix == ".safetensors":
        with replacing(path) as (temporary,):
            _write_file(temporary, path, entries, step)
        return
    path.mkdir(parents=True, exist_ok=True)
    if (path / INDEX).exists() or any(path.glob("*.safetensors")):
        raise FileExistsError(f"{path}: expected no .safetensors files in it, got some")
    parts = _split(entries, max_file_bytes)
    count = len(parts)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    index = [path / INDEX] if count > 1 else []
    with replacing(*(path / name for name in names), *index) as temporary:
        weight_map = {}
        for file, part, written in zip(names, parts, temporary, strict=False):  # the index comes last
            _write_file(written, path / file, part, step)
            weight_map |= {name: file for entry in part for name in entry.items}
        if index:
            total = sum(item.nbytes for item in items.values())
            content = {"metadata": {"total_size": total}, "weight_map": weight_map}
            temporary[-1].write_text(json.dumps(content, indent=1) + "\n")


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


def _write_file(temporary: Path, path: Path, entries: list[Entry], step: Callable[[str], None]) -> None:
    """Writes `temporary`, which is to become `path`."""
    # Tensors begin at multiples of their item's size, as safetensors' own writer has it, unless the sizes of
    # several layers are no multiples of 8 bytes.
    entries = sorted(entries, key=lambda entry: sum(item.nbytes for item in entry.items.values()) % 8 != 0)
    order = [
        (name, item, entry)
        for entry in entries
        for name, item in sorted(entry.items.items(), key=lambda pair: -pair[1].dtype.itemsize)
    ]
    layers = {
        entry.name: {**entry.sizes, "fields": [name.removeprefix(f"{entry.name}.") for name in entry.items]}
        for entry in entries
        if entry.sizes is not None
    }
    header: dict[str, object] = {"__metadata__": own.metadata(layers)}
    end = 0
    for name, item, _ in order:
        offsets = [end, end + item.nbytes]
        header[name] = {"dtype": NAMES[item.dtype], "shape": list(item.shape), "data_offsets": offsets}
        end += item.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begun = None
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
