"""torchao `Int4Tensor` (plain packing), as torchao's safetensors support writes it.

    _weight_qdata       int8  [N, K/2]  two consecutive k a byte, low nibble first, each signed
    _weight_scale       float [G, N]
    _weight_zero_point  float [G, N]    in units of the weight: w = value * scale + zero_point

The file's metadata may describe `<module>.weight`; another type than Int4Tensor is not read.

In units of codes the zero is 8 - zero_point / scale, a fraction, which is rounded to the type of the result:
an error of at most 2^-5 of a scale in bfloat16 and 2^-8 in float16 while it lies in 0..16, and of float32's
rounding with dtype=float32. Where that is a whole number, as where zero_point is 0, nothing is lost.
"""

import json
import re

import numpy as np

from jax_w4a16.checkpoint import _layer
from jax_w4a16.checkpoint._files import Checkpoint, Tensor

NAME = "torchao"
_FLOATS = ("F16", "BF16", "F32")
_QDATA = re.compile(r"(?P<module>.*\.)?_(?P<parameter>[^.]+)_qdata")


def layers(checkpoint: Checkpoint, dtype: np.dtype | None) -> dict[str, _layer.Layer | _layer.Other]:
    """The layers of this format, by module path.

    Raises:
      ValueError: a tensor is missing, or not as described above.
    """
    result: dict[str, _layer.Layer | _layer.Other] = {}
    for name, qdata in checkpoint.tensors.items():
        match = _QDATA.fullmatch(name)
        if match is None:
            continue
        module, parameter = match["module"] or "", match["parameter"]
        key = module.removesuffix(".") if parameter == "weight" else module + parameter
        kind = _kind(qdata, f"{module}{parameter}", checkpoint)
        if kind != "Int4Tensor":
            result[key] = _layer.Other(f"{kind[:80]} of torchao")
            continue
        stem = name.removesuffix("qdata")
        others = {other: stem + other for other in ("scale", "zero_point")}
        if not _layer.is_layer(qdata, ("I8", "U8"), list(others.values()), checkpoint.tensors):
            continue
        tensors = {"qdata": qdata} | {other: checkpoint.tensors[at] for other, at in others.items()}
        if stem + "act_pre_scale" in checkpoint.tensors:
            raise qdata.error("no act_pre_scale", f"{stem}act_pre_scale, which is not supported")
        result[key] = _layer_of(tensors, dtype)
    return result


def _kind(qdata: Tensor, name: str, checkpoint: Checkpoint) -> str:
    """torchao's type of a tensor, as the metadata say, where they do."""
    text = checkpoint.metadata.get(name)
    if text is None:
        return "Int4Tensor"
    try:
        return str(json.loads(text)["_type"])
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise qdata.error(f"metadata of {name} with a _type", text[:80]) from error


def _layer_of(tensors: dict[str, Tensor], dtype: np.dtype | None) -> _layer.Layer:
    qdata = tensors["qdata"].require(("I8", "U8"), (None, None))
    if 0 in qdata.shape:
        raise qdata.error("a tensor that is not empty", list(qdata.shape))
    n, k = qdata.shape[0], 2 * qdata.shape[1]
    scale = tensors["scale"].require(_FLOATS, (None, n))
    groups = scale.shape[0]
    zero = tensors["zero_point"].require(_FLOATS, (groups, n))
    size = _layer.group_size_of(scale, k, groups, None)

    def codes(rows: slice, columns: slice) -> np.ndarray:
        first, last = rows.start // 2, -(-rows.stop // 2)
        octets = qdata[columns, slice(first, last)].view(np.uint8)
        part = np.stack([octets & 15, octets >> 4], axis=-1).reshape(len(octets), -1) ^ 8
        return part[:, rows.start - 2 * first : rows.stop - 2 * first].T

    def zeros(rows: slice, columns: slice) -> np.ndarray:
        step, shift = scale[rows, columns].astype(np.float32), zero[rows, columns].astype(np.float32)
        if ((step == 0) & (shift != 0)).any():
            raise scale.error(
                "no scale of 0 beside a zero_point", "one, which no zero in units of codes gives"
            )
        return 8 - shift / np.where(step == 0, np.float32(1), step)

    return _layer.make(
        NAME,
        k,
        n,
        size,
        dtype or scale.dtype,
        tensors | {"scales": scale},
        codes=codes,
        scales=lambda rows, columns: scale[rows, columns],
        zeros=None if not zero.read().any() else zeros,
    )
