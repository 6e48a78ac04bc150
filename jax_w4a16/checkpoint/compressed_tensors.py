"""compressed-tensors `pack-quantized`: the format of llm-compressor.

weight_packed      int32 [N, ceil(K/8)]  8 consecutive k a word, low nibble first; code = value + 8
weight_scale       float [N, G]
weight_shape       int   [2]             N, K
weight_zero_point  int32 [ceil(N/8), G]  asymmetric: 8 consecutive n a word; or int8 [N, G], value = code - 8
weight_g_idx       int32 [K]             act-order: the group of each k; -1 throughout means none
"""

from typing import Any

import numpy as np

from jax_w4a16.checkpoint import _layer
from jax_w4a16.checkpoint._files import Checkpoint, Tensor

NAME = "compressed-tensors"
_FLOATS = ("F16", "BF16", "F32")


def layers(checkpoint: Checkpoint, dtype: np.dtype | None) -> dict[str, _layer.Layer | _layer.Other]:
    """The layers of this format, by module path.

    Raises:
      ValueError: a tensor is missing, or not as described above.
    """
    required, optional = ("weight_scale", "weight_shape"), ("weight_zero_point", "weight_g_idx")
    hint = _group_size_hint(checkpoint.config)
    found = _layer.members(checkpoint.tensors, "weight_packed", ("I32",), required, optional)
    return {module: _layer_of(tensors, hint, dtype) for module, tensors in found}


def _layer_of(tensors: dict[str, Tensor], hint: Any, dtype: np.dtype | None) -> _layer.Layer | _layer.Other:
    packed = tensors["weight_packed"].require(("I32",), (None, None))
    sizes = tensors["weight_shape"].require(("I64", "I32"), (2,)).read().tolist()
    n, k = sizes
    if packed.shape != (n, -(-k // 8)):
        for bits in (8, 2, 3, 5, 6) if k > 0 else ():
            if packed.shape == (n, -(-k // (32 // bits))):
                return _layer.Other(f"{bits} bits")
        raise packed.error(f"shape [N, ceil(K/8)] for weight_shape {sizes}", list(packed.shape))
    scale = tensors["weight_scale"].require(_FLOATS, (n, None))
    groups = scale.shape[1]
    size = _layer.group_size_of(scale, k, groups, hint)
    return _layer.make(
        NAME,
        k,
        n,
        size,
        dtype or scale.dtype,
        tensors | {"scales": scale},
        codes=lambda rows, columns: _layer.part_of_words(packed, columns, rows).T,
        scales=lambda rows, columns: scale[columns, rows].T,
        zeros=_zeros(tensors.get("weight_zero_point"), n, groups),
        permutation=_layer.order_of_rows(tensors.get("weight_g_idx"), k, size),
    )


def _zeros(zero: Tensor | None, n: int, groups: int) -> _layer.Part | None:
    if zero is None:
        return None
    if zero.dtype == np.int8:
        zero.require(("I8",), (n, groups))
        return lambda rows, columns: (zero[columns, rows].T.astype(np.int16) + 8).astype(np.float32)
    zero.require(("I32", "I8"), (-(-n // 8), groups))

    def read(rows: slice, columns: slice) -> np.ndarray:
        first, last = columns.start // 8, -(-columns.stop // 8)
        part = _layer.nibbles(zero[slice(first, last), rows].T)
        return part[:, columns.start - 8 * first : columns.stop - 8 * first]

    return read


def _group_size_hint(config: Any) -> Any:
    """The group size that all groups of the configuration agree on, or None."""
    groups = config.get("config_groups")
    sizes = set()
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        size = weights.get("group_size") if isinstance(weights, dict) else None
        sizes.add(size if isinstance(size, int) else None)
    return sizes.pop() if len(sizes) == 1 else None
