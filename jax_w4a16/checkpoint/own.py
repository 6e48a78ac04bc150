"""Our own safetensors schema: the packed layout as it is, so that nothing is converted on the way.

    <name>.qweight      uint32 [..., ceil(K/64), ceil(N/16), 128]
    <name>.scales       float16, bfloat16 or float32 [..., ceil(K/g), N]
    <name>.zeros        like scales; absent where all are 8
    <name>.permutation  int32 [..., K]; absent unless the rows are in another order than the weight's
    <name>.input_scale  float16, bfloat16 or float32 [..., K]; absent unless inputs are to be multiplied

The fields are those of `jax_w4a16.QuantizedWeight`; leading dimensions are those of a stack. What is no
weight is stored under its own name. The metadata of each file say

    format  "jax_w4a16"
    schema  "1"
    layers  a JSON object: {<name>: {"k": K, "group_size": g, -1 for one group per column,
            "fields": those of the above that are there, as ["qweight", "scales"]}, ...}

with the layers whose tensors that file holds. Another tensor may be named like a field that is not there;
where `fields` is left out, all tensors of such names are fields. Several files have an index like Hugging
Face's.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_w4a16 import _layout
from jax_w4a16.checkpoint import _layer
from jax_w4a16.checkpoint._files import Checkpoint, File, Tensor
from jax_w4a16.checkpoint._header import NAMES

NAME = "jax_w4a16"
SCHEMA = "1"
FIELDS = ("qweight", "scales", "zeros", "permutation", "input_scale")
_FLOATS = ("F16", "BF16", "F32")


def is_own(file: File) -> bool:
    """Whether a file is of this schema."""
    return file.metadata.get("format") == NAME


def metadata(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The metadata of a file that holds these layers: `k`, `group_size` and `fields` by name."""
    return {"format": NAME, "schema": SCHEMA, "layers": json.dumps(layers)}


def layers(checkpoint: Checkpoint, dtype: np.dtype | None) -> dict[str, _layer.Layer]:
    """The layers of this format, by name.

    Raises:
      ValueError: a tensor is missing, or not as described above.
    """
    result = {}
    for file in filter(is_own, checkpoint.files):
        if file.metadata.get("schema") != SCHEMA:
            got = file.metadata.get("schema")
            raise ValueError(f"{file.path}: schema: expected {SCHEMA!r}, got {got!r}")
        for name, sizes in _listed(file).items():
            listed = sizes.get("fields")
            tensors = {
                field: checkpoint.tensors[f"{name}.{field}"]
                for field in FIELDS
                if f"{name}.{field}" in checkpoint.tensors and (listed is None or field in listed)
            }
            for field in listed or FIELDS[:2]:
                if field not in tensors:
                    raise ValueError(f"{file.path}: {name}.{field}: expected it, as layers says, got none")
            result[name] = _layer_of(tensors, sizes["k"], sizes["group_size"], dtype)
    return result


def _listed(file: File) -> dict[str, Any]:
    text = file.metadata.get("layers", "")
    try:
        listed = json.loads(text)
        good = all(
            set(sizes) - {"fields"} == {"k", "group_size"}
            and all(type(sizes[name]) is int for name in ("k", "group_size"))
            and set(FIELDS[:2]) <= set(sizes.get("fields", FIELDS)) <= set(FIELDS)
            for sizes in listed.values()
        )
    except (ValueError, RecursionError, AttributeError, TypeError):
        good = False
    if not good:
        raise ValueError(
            f"{file.path}: layers: expected k and group_size by name (and fields), got {text[:80]!r}"
        )
    return listed


def _layer_of(tensors: dict[str, Tensor], k: int, group_size: int, dtype: np.dtype | None) -> _layer.Layer:
    qweight, scales = tensors["qweight"], tensors["scales"]
    if k < 0 or not (
        group_size == -1 or group_size >= max(k, 1) or (group_size > 0 and group_size % 32 == 0)
    ):
        raise qweight.error(
            "k of at least 0 and groups of a multiple of 32", {"k": k, "group_size": group_size}
        )
    if len(scales.shape) < 2:
        raise scales.error("shape [..., G, N]", list(scales.shape))
    *lead, _, n = scales.shape
    size = max(k, 1) if group_size == -1 else group_size
    qweight.require(
        ("U32",), (*lead, *_layout.packed_shape(k, n)), f" for K = {k} and scales {list(scales.shape)}"
    )
    scales.require(_FLOATS, (*lead, _layout.num_groups(k, size), n), f" for K = {k} and groups of {size}")
    if "zeros" in tensors:
        tensors["zeros"].require((NAMES[scales.dtype],), scales.shape, " like scales")
    if "permutation" in tensors:
        rows = tensors["permutation"].require(("I32",), (*lead, k)).read()
        if (np.sort(rows, axis=-1) != np.arange(k)).any():
            raise tensors["permutation"].error(f"each of 0..{k - 1} once", "another order")
    if "input_scale" in tensors:
        tensors["input_scale"].require(_FLOATS, (*lead, k), f" for K = {k}")
    types = {field: dtype if dtype and NAMES[t.dtype] in _FLOATS else t.dtype for field, t in tensors.items()}

    def reader(field: str):
        tensor = tensors[field]
        return lambda index: _layer.cast(tensor, field, tensor[index], types[field])

    fields = {field: reader(field) for field in tensors}
    shapes = {field: tensor.shape for field, tensor in tensors.items()}
    return _layer.Layer(NAME, k, n, group_size, tuple(tensors.values()), fields, shapes, types)
