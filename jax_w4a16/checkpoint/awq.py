"""AWQ, gemm and gemv: the formats of AutoAWQ (4 bits, float16 scales, stored zero points).

    gemm  qweight int32 [K, N/8]  8 n a word, nibble i is column ORDER[i]
          qzeros  int32 [G, N/8]  the same
          scales  float [G, N]
    gemv  qweight int32 [N, K/8]  8 consecutive k a word
          qzeros  int32 [N, P]    8 consecutive groups a word, P words for G groups: padded
          scales  float [N, 8 P]

Which of the two a layer is follows from its shapes. gemv's padding hides the number of groups: where the
configuration does not say the group size, the scales do, which are 0 in padding alone.
"""

from typing import Any

import numpy as np

from jax_w4a16.checkpoint import _layer, gptq
from jax_w4a16.checkpoint._files import Checkpoint, Tensor

NAME = "AWQ"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FLOATS = ("F16", "BF16", "F32")


def layers(checkpoint: Checkpoint, dtype: np.dtype | None) -> dict[str, _layer.Layer | _layer.Other]:
    """The layers of this format, by module path.

    Raises:
      ValueError: a tensor is missing, or not as described above.
    """
    result = {}
    for module, tensors in gptq.members(checkpoint.tensors):
        if not gptq.is_gptq(tensors, checkpoint.config):
            gptq.require_4_bits(checkpoint)
            hint = checkpoint.config.get("group_size", checkpoint.config.get("q_group_size"))
            read = _gemv if is_gemv(tensors) else _gemm
            result[module] = read(tensors, hint, dtype)
    return result


def is_gemv(tensors: dict[str, Tensor]) -> bool:
    """Whether all three tensors have N rows."""
    return len({tensors[name].shape[:1] for name in ("qweight", "qzeros", "scales")}) == 1


def _gemm(tensors: dict[str, Tensor], hint: Any, dtype: np.dtype | None) -> _layer.Layer:
    qweight = tensors["qweight"].require(("I32",), (None, None))
    k, n = qweight.shape[0], 8 * qweight.shape[1]
    scales = tensors["scales"].require(_FLOATS, (None, n))
    groups = scales.shape[0]
    qzeros = tensors["qzeros"].require(("I32",), (groups, n // 8))
    size = _layer.group_size_of(scales, k, groups, hint)
    symmetric = (_layer.nibbles(qzeros.read()) == 8).all()
    return _layer.make(
        f"{NAME} gemm",
        k,
        n,
        size,
        dtype or scales.dtype,
        tensors,
        codes=lambda rows, columns: _layer.part_of_words(qweight, rows, columns, ORDER),
        scales=lambda rows, columns: scales[rows, columns],
        rows_first=True,
        zeros=None if symmetric else lambda rows, columns: _layer.part_of_words(qzeros, rows, columns, ORDER),
    )


def _gemv(tensors: dict[str, Tensor], hint: Any, dtype: np.dtype | None) -> _layer.Layer:
    qweight = tensors["qweight"].require(("I32",), (None, None))
    n, k = qweight.shape[0], 8 * qweight.shape[1]
    qzeros = tensors["qzeros"].require(("I32",), (n, None))
    scales = tensors["scales"].require(_FLOATS, (n, 8 * qzeros.shape[1]))
    size = k if hint == -1 else hint
    if type(size) is not int or size <= 0 or _words(k, size) != qzeros.shape[1]:
        size = _size_of_scales(scales, k, qzeros.shape[1])
    if k % size or (size % 32 and size != k):
        raise qweight.error("a group size of a multiple of 32 that divides K", f"K = {k}, groups of {size}")
    groups = slice(0, k // size)
    symmetric = (_layer.part_of_words(qzeros, slice(0, n), groups) == 8).all()
    return _layer.make(
        f"{NAME} gemv",
        k,
        n,
        size,
        dtype or scales.dtype,
        tensors,
        codes=lambda rows, columns: _layer.part_of_words(qweight, columns, rows).T,
        scales=lambda rows, columns: scales[columns, rows].T,
        zeros=None if symmetric else lambda rows, columns: _layer.part_of_words(qzeros, columns, rows).T,
    )


def _size_of_scales(scales: Tensor, k: int, words: int) -> int:
    """The group size that K and the columns of scales imply that are not padding."""
    used = (scales.read() != 0).any(axis=0)
    groups = int(used.sum())
    if groups == 0 or not used[:groups].all() or k % groups or _words(k, k // groups) != words:
        got = f"{groups} of {len(used)} that are not 0"
        raise scales.error(
            f"columns of scales for one group size that divides K = {k}, or its group_size", got
        )
    return k // groups


def _words(k: int, size: int) -> int:
    """Words of zero points in a row: a multiple of 4 for groups of 32, of 2 for groups of 64."""
    words, multiple = -(-(k // size) // 8), {32: 4, 64: 2}.get(size, 1)
    return -(-words // multiple) * multiple
