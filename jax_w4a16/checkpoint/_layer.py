"""A quantised layer of a checkpoint, not read yet: what it is, and parts of it in the packed layout."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jax_w4a16 import _layout
from jax_w4a16.checkpoint._files import Tensor
from jax_w4a16.checkpoint._header import NAMES

_CODES_AT_ONCE = 4 << 20

Part = Callable[[slice, slice], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One weight [K, N], or a stack of them in our own format, as a lazy QuantizedWeight.

    Attributes:
      format: name of the format that it is stored in.
      k: K.
      n: N.
      group_size: g, or -1 for one group per column.
      tensors: what it is stored in.
      fields: how to read a part of each field of the QuantizedWeight that is there, from slices of its
        dimensions.
      shapes: shape of each field.
      dtypes: type of each field.
    """

    format: str
    k: int
    n: int
    group_size: int
    tensors: tuple[Tensor, ...]
    fields: dict[str, Callable[[tuple[slice, ...]], np.ndarray]]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        """(K, N), after the dimensions of a stack."""
        return (*self.shapes["qweight"][:-3], self.k, self.n)

    @property
    def stored_bytes(self) -> int:
        """Bytes that it takes in the checkpoint."""
        return sum(tensor.dtype.itemsize * math.prod(tensor.shape) for tensor in self.tensors)

    def read(self, field: str) -> np.ndarray:
        """All of a field."""
        return self.fields[field]((slice(None),) * len(self.shapes[field]))


@dataclasses.dataclass(frozen=True)
class Other:
    """A quantised module whose weight is not of 4 bits: its tensors are loaded as they are.

    Attributes:
      kind: what it is instead, as `8 bits`.
    """

    kind: str


def make(
    format_: str,
    k: int,
    n: int,
    group_size: int,
    dtype: np.dtype,
    tensors: dict[str, Tensor],
    *,
    codes: Part,
    scales: Part,
    zeros: Part | None,
    permutation: np.ndarray | None = None,
    rows_first: bool = False,
) -> Layer:
    """A layer of a foreign format.

    Args:
      format_: name of the format.
      k: K.
      n: N.
      group_size: g, or K where there is one group per column.
      dtype: type of scales and zeros.
      tensors: what it is stored in.
      codes: reads rows and columns of the codes, uint8, 0..15, rows in the order of the checkpoint.
      scales: reads rows (groups) and columns of the scales.
      zeros: the same for zero points in units of codes; None where all are 8.
      permutation: int32 [K]: row j of the layer is row permutation[j] of the checkpoint; or None.
      rows_first: whether rows of the weight lie end to end in the file, rather than columns.
    """
    size = max(k, 1) if group_size >= k else group_size

    def packed(index: tuple[slice, ...]) -> np.ndarray:
        blocks_k, blocks_n, words = _layout.packed_shape(k, n)
        k0, k1, _ = index[0].indices(blocks_k)
        n0, n1, _ = index[1].indices(blocks_n)
        out = np.empty((k1 - k0, n1 - n0, words), np.uint32)
        if permutation is None and rows_first:
            steps = _steps(k0, k1, n1 - n0), [(n0, n1)]
        else:
            steps = [(k0, k1)], _steps(n0, n1, k1 - k0)
        for (ka, kb), (na, nb) in itertools.product(*steps):
            rows = slice(ka * _layout.BLOCK_K, min(kb * _layout.BLOCK_K, k))
            columns = slice(na * _layout.BLOCK_N, min(nb * _layout.BLOCK_N, n))
            if permutation is None:
                part = codes(rows, columns)
            else:
                part = codes(slice(0, k), columns)[permutation[rows]]
            out[ka - k0 : kb - k0, na - n0 : nb - n0] = pack(part)
        return out[..., index[2]]

    per_group = (_layout.num_groups(k, size), n)

    def floats(name: str, part: Part) -> Callable[[tuple[slice, ...]], np.ndarray]:
        def read(index: tuple[slice, ...]) -> np.ndarray:
            rows, columns = (
                slice(*s.indices(extent)[:2]) for s, extent in zip(index, per_group, strict=True)
            )
            return cast(tensors["scales"], name, part(rows, columns), dtype)

        return read

    fields: dict[str, Any] = {"qweight": packed, "scales": floats("scales", scales)}
    shapes: dict[str, tuple[int, ...]] = {"qweight": _layout.packed_shape(k, n), "scales": per_group}
    dtypes = {"qweight": np.dtype(np.uint32), "scales": dtype}
    if zeros is not None:
        fields["zeros"], shapes["zeros"], dtypes["zeros"] = floats("zeros", zeros), per_group, dtype
    if permutation is not None:
        fields["permutation"] = lambda index: permutation[index]
        shapes["permutation"], dtypes["permutation"] = (k,), np.dtype(np.int32)
    stored = -1 if size >= k else size
    stored_in = tuple(dict.fromkeys(tensors.values()))
    return Layer(format_, k, n, stored, stored_in, fields, shapes, dtypes)


def _steps(first: int, last: int, across: int) -> list[tuple[int, int]]:
    """Ranges of blocks first..last, each with a bounded number of codes in `across` blocks beside it."""
    step = max(_CODES_AT_ONCE // max(across * _layout.BLOCK_K * _layout.BLOCK_N, 1), 1)
    return [(at, min(at + step, last)) for at in range(first, last, step)]


def cast(tensor: Tensor, what: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`values`, which come from a tensor, in another type.

    Raises:
      ValueError: a finite one would become infinite, a scale 0, or an integer another.
    """
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore", under="ignore"):
        result = values.astype(dtype)
    lost = result != values if dtype.kind in "iu" else np.isfinite(values) & ~np.isfinite(result)
    if what in ("scales", "input_scale"):
        lost |= (values != 0) & (result == 0)
    if lost.any():
        raise tensor.error(f"{what} within the range of {dtype.name}", values[lost].flat[0])
    return result


def pack(codes: np.ndarray) -> np.ndarray:
    """`jax_w4a16.pack` in NumPy, which needs no device: uint8 [K, N], 0..15 -> uint32 [., ., 128].

    A byte of a block holds the codes of columns 8 apart; see _layout.py for the order of the bytes.
    """
    k, n = codes.shape
    blocks_k, blocks_n, words = _layout.packed_shape(k, n)
    padding = (blocks_k * _layout.BLOCK_K - k, blocks_n * _layout.BLOCK_N - n)
    if any(padding):
        codes = np.pad(codes, ((0, padding[0]), (0, padding[1])))
    pairs = codes.reshape(blocks_k * _layout.BLOCK_K, blocks_n, 2, 8)
    pairs = pairs[:, :, 0] | pairs[:, :, 1] << 4
    pairs = pairs.reshape(blocks_k, 4, 2, 4, 2, blocks_n, 8)  # step hi pair lo . row
    pairs = np.ascontiguousarray(pairs.transpose(0, 5, 6, 3, 1, 4, 2))
    return pairs.reshape(blocks_k, blocks_n, 4 * words).view("<u4")


def nibbles(words: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """int32 [rows, words] -> uint8 [rows, 8 words]: nibble i of a word goes to column order[i]."""
    octets = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)
    out = np.empty((*words.shape, 8), np.uint8)
    for i in range(8):
        out[..., order[i]] = octets[..., i // 2] >> 4 * (i % 2) & 15
    return out.reshape(words.shape[0], -1)


def part_of_words(tensor: Tensor, rows: slice, columns: slice, order: tuple[int, ...] = tuple(range(8))):
    """Rows and columns of the nibbles of an int32 tensor [rows, words]: uint8, only those words read."""
    first, last = columns.start // 8, -(-columns.stop // 8)
    part = nibbles(tensor[rows, slice(first, last)], order)
    return part[:, columns.start - 8 * first : columns.stop - 8 * first]


def members(
    tensors: Mapping[str, Tensor],
    leaf: str,
    dtypes: tuple[str, ...],
    required: tuple[str, ...],
    optional: tuple[str, ...] = (),
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """For each module with a tensor named `leaf`: the module's path and its tensors, by last name.

    See `is_layer` for what is no such module.

    Raises:
      ValueError: one of `required` is missing, or a tensor is empty.
    """
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        at = lambda other, prefix=prefix: f"{prefix}.{other}" if prefix else other
        if last != leaf or not is_layer(tensor, dtypes, [at(other) for other in required], tensors):
            continue
        found = {other: tensors[at(other)] for other in (leaf, *required, *optional) if at(other) in tensors}
        for tensor in found.values():
            if 0 in tensor.shape:
                raise tensor.error("a tensor that is not empty", list(tensor.shape))
        yield prefix, found


def is_layer(
    tensor: Tensor, dtypes: tuple[str, ...], required: list[str], tensors: Mapping[str, Tensor]
) -> bool:
    """Whether a tensor that is named like a format's codes belongs to a layer of that format.

    A tensor that has none of the others that the format requires, or not all of them and another type than
    codes have, bears the name by chance.

    Raises:
      ValueError: it has the type and some of the others, and one is missing.
    """
    missing = [name for name in required if name not in tensors]
    if not missing:
        return True
    if len(missing) == len(required) or NAMES[tensor.dtype] not in dtypes:
        return False
    raise ValueError(f"{tensor.file.path}: {missing[0]}: expected it beside {tensor.name}, got none")


def group_size_of(scales: Tensor, k: int, groups: int, hint: Any) -> int:
    """The group size that K and the number of groups imply, the hint of the configuration where it fits.

    Raises:
      ValueError: none does, or it is no multiple of 32.
    """
    if groups == min(1, k):
        return max(k, 1)
    if type(hint) is not int or hint <= 0 or -(-k // hint) != groups:
        if groups == 0 or k % groups:
            raise scales.error(f"a number of groups that divides K = {k}", list(scales.shape))
        hint = k // groups
    if hint % 32:
        raise scales.error("groups of a multiple of 32", f"groups of {hint} for K = {k}")
    return hint


def order_of_rows(g_idx: Tensor | None, k: int, size: int) -> np.ndarray | None:
    """The permutation that sorts the rows of an act-order checkpoint by group; None where they are sorted.

    Args:
      g_idx: int32 [K], the group of each row; None, or -1 throughout, where the rows are in order.
      k: K.
      size: group size.

    Raises:
      ValueError: a group has not exactly its rows.
    """
    if g_idx is None:
        return None
    groups = g_idx.require(("I32",), (k,)).read()
    want = np.arange(k) // size
    if (groups == -1).all() or (groups == want).all():
        return None
    order = np.argsort(groups, kind="stable").astype(np.int32)
    if (groups[order] != want).any():
        group = groups[order][np.argmax(groups[order] != want)]
        count = int((groups == group).sum())
        raise g_idx.error(f"{size} rows in each of {-(-k // size)} groups", f"{count} in group {group}")
    return order
