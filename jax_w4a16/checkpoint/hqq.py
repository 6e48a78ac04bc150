"""HQQ with axis=1: `HQQLinear.state_dict()`, as hqq and transformers write it.

    W_q    uint8 [N G / 2, g]  row r holds row r of the codes [N G, g] in its high nibbles, row r + N G / 2 in
                               its low ones; row n G + j of the codes is group j of column n
    scale  float [N G, 1]      already inverted
    zero   float [N G, 1]      in units of codes, fractional
    shape  int   [2]           N, K

A byte holds codes of columns n and n + N/2, and the groups of a column lie end to end: a split along N reads
what it needs and as much again, and one along K reads whole columns.

The rest of the state (nbits, axis, group_size, packing, ...) is checked where it matters. Where scale and
zero have two types, both come out in float32.

The weight is (code - zero) * scale, in float32 and rounded once. HQQ's own dequantiser also rounds the
difference to its compute_dtype, so that where `zero` is a fraction its values may differ.
"""

import math

import numpy as np

from jax_w4a16.checkpoint import _layer
from jax_w4a16.checkpoint._files import Checkpoint, Tensor
from jax_w4a16.checkpoint._header import DTYPES

NAME = "HQQ"
_FLOATS = ("F16", "BF16", "F32")
_SCALARS = ("U8", "BOOL", "I32", "I64", "F32")
_EXPECTED = {"nbits": 4, "axis": 1, "channel_wise": 1, "view_as_float": 0, "quant_scale": 0, "quant_zero": 0}
_STATE = (
    *_EXPECTED,
    "packing",
    "group_size",
    "unpack_view_dtype",
    "compute_dtype",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "optimize",
    "round_zero",
)


def layers(checkpoint: Checkpoint, dtype: np.dtype | None) -> dict[str, _layer.Layer | _layer.Other]:
    """The layers of this format, by module path.

    Raises:
      ValueError: a tensor is missing, or not as described above.
    """
    found = _layer.members(checkpoint.tensors, "W_q", ("U8",), ("scale", "zero", "shape"), _STATE)
    return {module: _layer_of(tensors, dtype) for module, tensors in found}


def _layer_of(tensors: dict[str, Tensor], dtype: np.dtype | None) -> _layer.Layer | _layer.Other:
    bits = _bits(tensors)
    if bits != 4:
        return _layer.Other(f"{bits} bits")
    for name, value in _EXPECTED.items():
        if name in tensors:
            tensor = tensors[name].require(_SCALARS, ())
            if tensor.read() != value:
                raise tensor.error(str(value), tensor.read())
    if "packing" in tensors:
        packing = tensors["packing"].require(("U8",), (len("4bit_u8"),))
        if packing.read().tobytes() != b"4bit_u8":
            raise packing.error("4bit_u8", packing.read().tobytes())
    n, k = sizes = tensors["shape"].require(("I64", "I32"), (2,)).read().tolist()
    codes = tensors["W_q"].require(("U8",), (None, None))
    half, size = codes.shape
    if size == 0 or min(sizes) < 0 or 2 * half * size != n * k or k % size or (size % 32 and size != k):
        raise codes.error(
            f"shape [N G / 2, g] for a weight [N, K] = {sizes} and g a multiple of 32 that divides K",
            list(codes.shape),
        )
    groups = k // size
    scale = tensors["scale"].require(_FLOATS, (n * groups, 1))
    zero = tensors["zero"].require(_FLOATS, (n * groups, 1))

    def per_group(tensor: Tensor, rows: slice, columns: slice) -> np.ndarray:
        part = tensor[slice(columns.start * groups, columns.stop * groups), slice(0, 1)]
        return part.reshape(-1, groups)[:, rows].T

    def read(rows: slice, columns: slice) -> np.ndarray:
        first, last = columns.start * groups, columns.stop * groups
        high = codes[slice(min(first, half), min(last, half)), slice(0, size)] >> 4
        low = codes[slice(max(first - half, 0), max(last - half, 0)), slice(0, size)] & 15
        return np.concatenate([high, low]).reshape(-1, k)[:, rows].T

    symmetric = (zero.read() == 8).all()
    if dtype is None:  # one type for both, in which neither is rounded
        dtype = scale.dtype if symmetric or zero.dtype == scale.dtype else DTYPES["F32"]
    return _layer.make(
        NAME,
        k,
        n,
        size,
        dtype,
        tensors | {"scales": scale},
        codes=read,
        scales=lambda rows, columns: per_group(scale, rows, columns),
        zeros=None if symmetric else lambda rows, columns: per_group(zero, rows, columns),
    )


def _bits(tensors: dict[str, Tensor]) -> int:
    """How many bits a code has: as the state says, or 8 where the shapes do."""
    if "nbits" in tensors:
        return tensors["nbits"].require(_SCALARS, ()).read().item()
    codes, scale = tensors["W_q"].shape, tensors["scale"].shape
    sizes = tensors["shape"].require(("I64", "I32"), (2,)).read().tolist()
    whole = math.prod(codes) == math.prod(sizes) and len(codes) == 2 and scale == (codes[0], 1)
    return 8 if whole else 4
