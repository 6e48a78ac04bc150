"""GPTQ, v1 and v2: the formats of AutoGPTQ and GPTQModel.

    qweight  int32 [ceil(K/8), N]  8 consecutive k a word, low nibble first
    qzeros   int32 [G, ceil(N/8)]  8 consecutive n a word; v1 stores zero - 1, v2 the zero
    scales   float [G, N]
    g_idx    int32 [K]             the group of each k; unsorted with desc_act

Which version it is says `checkpoint_format` in the configuration, and v1 where nothing does. Where all stored
zeros are 7 or all are 8, and the configuration does not deny that it is symmetric, they tell better: the zero
is 8. Files exist that are labelled v1 and store v2's 8; a warning says so.

A v1 zero of 0 is stored as 15. GPTQModel subtracts 1 from every nibble as one word, with borrows; others each
alone. Its own files are therefore read with carries.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jax_w4a16.checkpoint import _layer
from jax_w4a16.checkpoint._files import Checkpoint, Tensor

NAME = "GPTQ"
_FLOATS = ("F16", "BF16", "F32")
_LABELS = {"gptq": False, "gptq_v2": True}


def layers(checkpoint: Checkpoint, dtype: np.dtype | None) -> dict[str, _layer.Layer | _layer.Other]:
    """The layers of this format, by module path.

    Raises:
      ValueError: a tensor is missing, or not as described above.
    """
    result: dict[str, _layer.Layer | _layer.Other] = {}
    mislabelled = []
    for module, tensors in members(checkpoint.tensors):
        if is_gptq(tensors, checkpoint.config):
            bits = _bits(tensors)
            if bits != 4:
                result[module] = _layer.Other(f"{bits} bits")
                continue
            require_4_bits(checkpoint)
            result[module], surprise = _layer_of(tensors, checkpoint, dtype)
            mislabelled += [module] * surprise
    if mislabelled:
        label = checkpoint.config.get("checkpoint_format", "gptq")
        warnings.warn(
            f"{checkpoint.path}: labelled {label}, but the symmetric zero points of {len(mislabelled)} "
            f"layers ({mislabelled[0]}, ...) are the other version's; read as 8",
            stacklevel=4,
        )
    return result


def members(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The modules of GPTQ and of AWQ, whose tensors have the same names, and those by last name."""
    return _layer.members(tensors, "qweight", ("I32",), ("qzeros", "scales"), ("g_idx",))


def is_gptq(tensors: dict[str, Tensor], config: Any) -> bool:
    """Whether these tensors, with AWQ's names, are GPTQ's.

    The shapes tell; where they fit both or neither, a g_idx, which AWQ has not, or the configuration does.
    """
    shapes = [tensors[name].shape for name in ("qweight", "qzeros", "scales")]
    fits_gptq = fits_awq = False
    if all(len(shape) == 2 for shape in shapes):
        (_, columns), (_, words), (_, n) = shapes
        gemv = len({shape[0] for shape in shapes}) == 1
        fits_gptq, fits_awq = columns == n, gemv or 8 * columns == n or columns == words
    if fits_gptq != fits_awq:
        return fits_gptq
    method = config.get("quant_method")
    return "g_idx" in tensors or method == "gptq" or (method != "awq" and not fits_awq)


def _bits(tensors: dict[str, Tensor]) -> int:
    """How many bits a code has, by the shapes: 4 unless all of them say otherwise."""
    qweight, qzeros, scales = (tensors[name].shape for name in ("qweight", "qzeros", "scales"))
    if len(qweight) == len(qzeros) == len(scales) == 2 and qzeros[1] != -(-scales[1] // 8):
        k = math.prod(tensors["g_idx"].shape) if "g_idx" in tensors else None
        for bits in (2, 3, 8):
            of_k = k is None or 32 * qweight[0] == bits * k
            if 32 * qzeros[1] == bits * scales[1] and of_k and qweight[1] == scales[1]:
                return bits
    return 4


def require_4_bits(checkpoint: Checkpoint) -> None:
    """Refuses a configuration of other than 4 bits, whose tensors may look alike."""
    name = "bits" if "bits" in checkpoint.config else "w_bit"
    bits = checkpoint.config.get(name, 4)
    if bits != 4:
        raise ValueError(f"{checkpoint.said_by[name]}: bits: expected 4, got {bits!r}")


def _layer_of(
    tensors: dict[str, Tensor], checkpoint: Checkpoint, dtype: np.dtype | None
) -> tuple[_layer.Layer, bool]:
    """The layer, and whether its zero points are of another version than the label says."""
    qweight = tensors["qweight"].require(("I32",), (None, None))
    n = qweight.shape[1]
    g_idx = tensors.get("g_idx")
    k = 8 * qweight.shape[0] if g_idx is None else g_idx.require(("I32",), (None,)).shape[0]
    if qweight.shape[0] != -(-k // 8):
        raise qweight.error(f"{-(-k // 8)} rows for K = {k}", list(qweight.shape))
    scales = tensors["scales"].require(_FLOATS, (None, n))
    groups = scales.shape[0]
    qzeros = tensors["qzeros"].require(("I32",), (groups, -(-n // 8)))
    hint = checkpoint.config.get("group_size")
    size = _layer.group_size_of(scales, k, groups, hint)
    zeros, surprise = _zeros(qzeros, n, checkpoint)
    layer = _layer.make(
        NAME,
        k,
        n,
        size,
        dtype or scales.dtype,
        tensors,
        codes=lambda rows, columns: _codes(qweight, rows, columns),
        scales=lambda rows, columns: scales[rows, columns],
        rows_first=True,
        zeros=zeros,
        permutation=_layer.order_of_rows(g_idx, k, size),
    )
    return layer, surprise


def _codes(qweight: Tensor, rows: slice, columns: slice) -> np.ndarray:
    first, last = rows.start // 8, -(-rows.stop // 8)
    words = qweight[slice(first, last), columns].view(np.uint32)
    part = np.empty((len(words), 8, words.shape[1]), np.uint8)
    for i in range(8):
        part[:, i] = words >> 4 * i & 15
    return part.reshape(-1, words.shape[1])[rows.start - 8 * first : rows.stop - 8 * first]


def _zeros(qzeros: Tensor, n: int, checkpoint: Checkpoint) -> tuple[_layer.Part | None, bool]:
    """How to read zero points, None where all are 8; and whether they deny the label."""
    config = checkpoint.config
    label = config.get("checkpoint_format", "gptq")
    if not isinstance(label, str) or label not in _LABELS:
        path = checkpoint.said_by["checkpoint_format"]
        raise ValueError(f"{path}: checkpoint_format: expected {list(_LABELS)}, got {label!r}")
    v2 = _LABELS[label]
    stored = _layer.nibbles(qzeros.read())[:, :n]
    if stored.size and config.get("sym") is not False:
        for value, version in ((7, False), (8, True)):
            if (stored == value).all():
                return None, version != v2
    if v2:
        return lambda rows, columns: _layer.part_of_words(qzeros, rows, columns), False
    meta = config.get("meta")
    carries = "gptqmodel" in str(meta.get("quantizer") if isinstance(meta, dict) else "").lower()
    if not carries and (stored == 15).any():
        warnings.warn(
            f"{qzeros.file.path}: {qzeros.name}: zero points of 0 in version 1, around which old writers "
            "stored wrong ones; read as they are",
            stacklevel=6,
        )
    one_each = np.uint32(0x11111111)

    def read(rows: slice, columns: slice) -> np.ndarray:
        first, last = columns.start // 8, -(-columns.stop // 8)
        words = qzeros[rows, slice(first, last)].view(np.uint32)
        part = _layer.nibbles(words + one_each) if carries else _layer.nibbles(words) + 1 & 15
        return part[:, columns.start - 8 * first : columns.stop - 8 * first]

    return read, False
