"""The header of a safetensors file, checked before anything else is read.

A file is 8 bytes of header size, a JSON header {name: {dtype, shape, data_offsets}}, and the tensors end to
end. Nothing is executed, and nothing larger than the file is allocated.
"""

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

MOST_HEADER_BYTES = 100_000_000  # the limit of safetensors itself
MOST_JSON_BYTES = 100_000_000

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
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_header(path: Path) -> tuple[dict[str, str], dict[str, tuple[np.dtype, tuple[int, ...], int]]]:
    """Metadata, and for each tensor its type, shape and offset in the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a safetensors file, got none")
    size = path.stat().st_size
    if size < 8:
        raise ValueError(f"{path}: header: expected at least 8 bytes, got {size}")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        most = min(size - 8, MOST_HEADER_BYTES)
        if length > most:
            raise ValueError(f"{path}: header: expected at most {most} bytes, got {length} (truncated?)")
        try:
            header = _object(file.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: header: expected a JSON object: {error}") from error
    metadata = header.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
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
