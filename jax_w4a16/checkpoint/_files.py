"""The files of a checkpoint: its tensors by name, all checked before anything is read, and slices of them.

Every message names the file, the tensor, what was expected and what was got.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from jax_w4a16.checkpoint._header import NAMES, read_header, read_json

INDEX = "model.safetensors.index.json"
QUANTIZATION = ("quantization_config", "compression_config")  # entries of config.json
_ONE_OF_SEVERAL = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")
_BYTES_OPEN = 32 << 20  # a mapping is given up before it spans more, so that its pages do not add up


class File:
    """One safetensors file, opened when it is read."""

    def __init__(self, path: Path):
        self.path = path
        self.metadata, self.entries = read_header(path)
        self._handle: Any = None
        self._bytes = 0

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A copy of a part of a tensor."""
        from safetensors import SafetensorError, safe_open

        dtype, shape, offset = self.entries[name]
        index = tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, shape, strict=True))
        extent = tuple(max(s.stop - s.start, 0) for s in index)
        if 0 in extent:
            return np.empty(extent, dtype)
        row = dtype.itemsize * math.prod(shape[1:])
        span = row * extent[0] if extent else row  # what the part spans, though it may be narrower
        if span > _BYTES_OPEN and extent[0] > 1:
            out = np.empty(extent, dtype)
            step = max(_BYTES_OPEN // row, 1)
            for first in range(index[0].start, index[0].stop, step):
                last = min(first + step, index[0].stop)
                out[first - index[0].start : last - index[0].start] = self.read(
                    name, (slice(first, last), *index[1:])
                )
            return out
        if NAMES[dtype].startswith("F8"):  # unknown to safetensors' NumPy side
            return np.array(np.memmap(self.path, dtype, "r", offset, shape)[index])
        try:
            if self._handle is None:
                self._handle, self._bytes = safe_open(self.path, framework="numpy"), 0
            self._bytes += span
            part = self._handle.get_slice(name)[index] if index else self._handle.get_tensor(name)
        except SafetensorError as error:  # the file has changed since it was checked
            raise ValueError(f"{self.path}: {name}: {error}") from error
        if self._bytes >= _BYTES_OPEN // 2:
            self.close()
        return part

    def close(self) -> None:
        """Gives up the mapping; the next read makes another."""
        self._handle = None


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint, not read yet."""

    file: File
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return self.file.read(self.name, index)

    def read(self) -> np.ndarray:
        """All of it."""
        return self[(slice(None),) * len(self.shape)]

    def error(self, expected: str, got: Any) -> ValueError:
        """The error of a tensor that is not as expected."""
        return ValueError(f"{self.file.path}: {self.name}: expected {expected}, got {got}")

    def require(self, dtypes: tuple[str, ...], shape: tuple[int | None, ...], why: str = "") -> "Tensor":
        """Checks the type, by its safetensors name, and the shape, where None stands for any size."""
        if NAMES[self.dtype] not in dtypes:
            raise self.error(f"type {' or '.join(dtypes)}{why}", NAMES[self.dtype])
        fits = len(shape) == len(self.shape)
        if not fits or any(want not in (None, got) for want, got in zip(shape, self.shape, strict=True)):
            text = ", ".join("any" if size is None else str(size) for size in shape)
            raise self.error(f"shape [{text}]{why}", list(self.shape))
        return self


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A file or a folder of them: its tensors by name, and the configuration that lies beside.

    Attributes:
      path: the file or folder.
      files: its safetensors files.
      tensors: their tensors by name.
      metadata: their metadata.
      config: what the files beside say of its quantisation.
      said_by: which of those files says each entry of `config`.
    """

    path: Path
    files: tuple[File, ...]
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    config: Mapping[str, Any]
    said_by: Mapping[str, Path]

    def close(self) -> None:
        """Closes all files, whose pages would else count as this process's; they can still be read."""
        for file in self.files:
            file.close()


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a .safetensors file, or a folder with one, several, or an index of them.

    Raises:
      FileNotFoundError: there is nothing, or a file is not there that the index or the others' names imply.
      ValueError: a file, the index or a configuration is malformed.
    """
    path = Path(path)
    if not path.is_dir():
        files = [File(path)]
        tensors = {name: _tensor(files[0], name) for name in files[0].entries}
    elif (path / INDEX).is_file():
        files, tensors = _indexed(path)
    else:
        files = [File(file) for file in sorted(path.glob("*.safetensors"))]
        if not files:
            raise FileNotFoundError(f"{path}: expected a .safetensors file or {INDEX}, got neither")
        _require_all(path, {file.path.name for file in files})
        tensors = {}
        for file in files:
            for name in file.entries:
                if name in tensors:
                    other = tensors[name].file.path.name
                    raise ValueError(f"{file.path}: {name}: expected it in one file, got it in {other} too")
                tensors[name] = _tensor(file, name)
    metadata: dict[str, str] = {}
    for file in files:
        metadata |= file.metadata
    config, said_by = _config(path if path.is_dir() else path.parent)
    return Checkpoint(path, tuple(files), tensors, metadata, config, said_by)


def _tensor(file: File, name: str) -> Tensor:
    dtype, shape, _ = file.entries[name]
    return Tensor(file, name, dtype, shape)


def _require_all(folder: Path, names: set[str]) -> None:
    """Refuses files named `model-00001-of-00004.safetensors` and so on of which one is missing."""
    for name in sorted(names):
        match = _ONE_OF_SEVERAL.fullmatch(name)
        if match is None:
            continue
        for number in range(1, int(match["count"]) + 1):
            other = f"{match['stem']}-{number:05d}-of-{match['count']}.safetensors"
            if other not in names:
                raise FileNotFoundError(f"{folder / other}: expected it beside {name}, got none")


def _indexed(folder: Path) -> tuple[list[File], dict[str, Tensor]]:
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: expected a weight_map, got {type(weight_map).__name__}")
    files: dict[str, File] = {}
    tensors = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _stays_inside(file):
            raise ValueError(f"{index}: {name}: expected a file inside the folder, got {file!r}")
        if file not in files:
            files[file] = File(folder / file)
        if name not in files[file].entries:
            raise ValueError(f"{index}: {name}: expected it in {file}, got a file without it")
        tensors[name] = _tensor(files[file], name)
    return list(files.values()), tensors


def _stays_inside(file: str) -> bool:
    pure, windows = PurePosixPath(file), PureWindowsPath(file)
    outside = pure.is_absolute() or windows.drive or windows.root or ".." in windows.parts
    return pure.suffix == ".safetensors" and not outside and "\0" not in file


def _config(folder: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """What the checkpoint says of its quantisation, a hint, for the tensors decide; and which file says it.

    Where several files say something, the first that does counts.
    """
    config: dict[str, Any] = {}
    said_by: dict[str, Path] = {}
    for name in ("config.json", "quantize_config.json", "quant_config.json"):
        if (folder / name).is_file():
            content = read_json(folder / name)
            said = _quantization(content) if name == "config.json" else content
            new = {key: value for key, value in said.items() if key not in config and value is not None}
            config |= new
            said_by |= dict.fromkeys(new, folder / name)
    return config, said_by


def _quantization(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that is about quantisation; some have it with the text model's."""
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    said = [part[name] for part in parts for name in QUANTIZATION if name in part]
    return next((content for content in said if isinstance(content, dict) and content), {})
