"""Safetensors files: what they hold, checked before anything is read, and slices of it.

A file is 8 bytes of header size, a JSON header {name: {dtype, shape, data_offsets}}, and the tensors end to
end. Every message names the file, the tensor, what was expected and what was got. Nothing is executed, and
nothing larger than the file is allocated.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import ml_dtypes
import numpy as np

INDEX = "model.safetensors.index.json"
MOST_HEADER_BYTES = 100_000_000  # the limit of safetensors itself
MOST_JSON_BYTES = 100_000_000
_BYTES_OPEN = 64 << 20  # a mapping is given up after so many bytes, so that its pages do not add up

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class File:
    """One safetensors file, opened when it is read."""

    def __init__(self, path: Path):
        self.path = path
        self.metadata, self.entries = _header(path)
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
        size = dtype.itemsize * math.prod(extent)
        if size > _BYTES_OPEN and extent[0] > 1:
            out = np.empty(extent, dtype)
            step = max(extent[0] * _BYTES_OPEN // size, 1)
            for first in range(index[0].start, index[0].stop, step):
                last = min(first + step, index[0].stop)
                out[first - index[0].start : last - index[0].start] = self.read(
                    name, (slice(first, last), *index[1:])
                )
            return out
        if dtype in (DTYPES["F8_E4M3"], DTYPES["F8_E5M2"]):  # unknown to safetensors' NumPy side
            return np.array(np.memmap(self.path, dtype, "r", offset, shape)[index])
        try:
            if self._handle is None:
                self._handle, self._bytes = safe_open(self.path, framework="numpy"), 0
            self._bytes += size
            part = self._handle.get_slice(name)[index] if index else self._handle.get_tensor(name)
        except SafetensorError as error:  # the file has changed since it was checked
            raise ValueError(f"{self.path}: {name}: {error}") from error
        if self._bytes >= _BYTES_OPEN // 2:
            self._handle = None
        return part


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
    """A file or a folder of them: its tensors by name, and the configuration that lies beside."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    config: Mapping[str, Any]

    def files(self) -> Iterator[File]:
        """Each file once."""
        yield from {id(tensor.file): tensor.file for tensor in self.tensors.values()}.values()


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a .safetensors file, or a folder with one, several, or an index of them.

    Raises:
      FileNotFoundError: there is nothing, or the index names a file that is not there.
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
    return Checkpoint(path, tensors, metadata, _config(path if path.is_dir() else path.parent))


def _tensor(file: File, name: str) -> Tensor:
    dtype, shape, _ = file.entries[name]
    return Tensor(file, name, dtype, shape)


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size.

    Raises:
      ValueError: it is anything else.
    """
    try:
        size = path.stat().st_size
        if size > MOST_JSON_BYTES:
            raise ValueError(f"expected at most {MOST_JSON_BYTES} bytes, got {size}")
        return _object(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON object: {error}") from error


def _object(text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            raise ValueError("a name occurs twice")
        return result

    value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    if not isinstance(value, dict):
        raise ValueError(f"got {type(value).__name__}")
    return value


def _config(folder: Path) -> dict[str, Any]:
    """What the checkpoint says of its quantisation: a hint, for the tensors decide."""
    for name in ("config.json", "quantize_config.json", "quant_config.json"):
        if (folder / name).is_file():
            config = read_json(folder / name)
            if name == "config.json":
                config = config.get("quantization_config") or config.get("compression_config")
            if isinstance(config, dict) and config:
                return config
    return {}


def _header(path: Path) -> tuple[dict[str, str], dict[str, tuple[np.dtype, tuple[int, ...], int]]]:
    """Metadata, and for each tensor its type, shape and offset in the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a safetensors file, got none")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        most = min(size - 8, MOST_HEADER_BYTES)
        if length > most:
            raise ValueError(f"{path}: header: expected at most {most} bytes, got {length} (truncated?)")
        try:
            header = _object(file.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: header: expected a JSON object: {error}") from error
    metadata = header.pop("__metadata__", {})
    texts = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if not texts:
        raise ValueError(f"{path}: __metadata__: expected texts by name, got {str(metadata)[:80]}")
    entries = {name: _entry(path, name, entry) for name, entry in header.items()}
    end = 0
    for name, (_, _, first, last) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if first != end:
            kind = "an overlap" if first < end else "a hole"
            raise ValueError(f"{path}: {name}: expected data from byte {end}, got {first}: {kind}")
        end = last
    if end != size - 8 - length:
        raise ValueError(
            f"{path}: expected {end} bytes of tensors, as the header says, got {size - 8 - length}: "
            f"{'truncated' if end > size - 8 - length else 'something follows them'}"
        )
    return metadata, {
        name: (dtype, shape, 8 + length + first) for name, (dtype, shape, first, _) in entries.items()
    }


def _entry(path: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    def refuse(field: str, expected: str) -> ValueError:
        got = entry.get(field) if isinstance(entry, dict) else entry
        return ValueError(f"{path}: {name}: {field}: expected {expected}, got {str(got)[:80]}")

    def sizes(value: Any) -> bool:
        return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refuse("entry", "dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise refuse("dtype", f"one of {', '.join(DTYPES)}")
    if not sizes(entry["shape"]) or len(entry["shape"]) > 16:
        raise refuse("shape", "at most 16 sizes of at least 0")
    if not sizes(entry["data_offsets"]) or len(entry["data_offsets"]) != 2:
        raise refuse("data_offsets", "two sizes")
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    if 0 in shape and max(shape) >= 2**31:
        raise refuse("shape", "sizes below 2^31 where one is 0")
    first, last = entry["data_offsets"]
    wanted = dtype.itemsize * math.prod(shape)
    if last - first != wanted:
        raise refuse("data_offsets", f"{wanted} bytes for {entry['dtype']} {list(shape)}")
    return dtype, shape, first, last
