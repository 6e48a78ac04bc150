"""QuantizedWeight: a packed weight with its scales, as one pytree."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core

from jax_w4a16 import _checks, _layout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight [K, N] of 4-bit codes: w[k, n] = (code[k, n] - zeros[k/g, n]) * scales[k/g, n].

    Invariants (`validate` checks them; they hold for each member of a stack, whose arrays share leading
    dimensions for `lax.scan` or `vmap`):

    - `qweight` is uint32 [ceil(K/64), ceil(N/16), 128], packed by `pack`; padding may hold any code.
    - `scales` is [ceil(K/g), N], float16, bfloat16 or float32; N is not padded.
    - `zeros` is None, which means 8 everywhere, or of the shape and type of `scales`, in units of codes.
    - `permutation` is None, or int32 [K], each of 0..K-1 once: row j of the arrays above is row
      permutation[j] of the weight (act-order checkpoints). `dot` and `dequantize` apply it; such a weight
      cannot be split along K.
    - `input_scale` is None, or floating [K]: the inputs are multiplied by it, so that the weight is
      input_scale[k] * w[k, n].
    - `group_size` g is a multiple of 32, or -1 or at least K: one group per column.
    - `k` is K, and 1 + (K-1)//64 blocks of rows are there, or fewer in a shard of the weight.

    Nothing is checked on construction, because transformations put specs, tracers and placeholders in
    place of the arrays. Weights are equal if they are the same object.
    """

    qweight: Any
    scales: Any
    zeros: Any = None
    permutation: Any = None
    input_scale: Any = None
    group_size: int = dataclasses.field(default=128, metadata={"static": True}, kw_only=True)
    k: int = dataclasses.field(default=0, metadata={"static": True}, kw_only=True)

    @property
    def in_features(self) -> int:
        """K; inside `shard_map`, this shard's (rows are split by whole blocks of 64 only)."""
        return min(self.k, self.qweight.shape[-3] * _layout.BLOCK_K)

    @property
    def out_features(self) -> int:
        """N."""
        return self.scales.shape[-1]

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        return self.in_features, self.out_features

    @property
    def dtype(self):
        """Type of the scales, and of `dequantize` unless told otherwise."""
        return self.scales.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(a.size * a.dtype.itemsize for a in self.arrays.values())

    @property
    def arrays(self) -> dict[str, Any]:
        """The arrays that are there, by the names of their fields."""
        names = (f.name for f in dataclasses.fields(self) if not f.metadata.get("static"))
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def dequantize(self, dtype=None) -> jax.Array:
        """The weight [K, N] in `dtype` (float16, bfloat16 or float32; default: the scales')."""
        from jax_w4a16 import _quantize

        dtype = self.dtype if dtype is None else dtype
        w = _quantize.dequantize(
            self.qweight,
            self.scales,
            self.zeros,
            dtype if self.input_scale is None else jnp.float32,
            group_size=self.group_size,
            in_features=self.in_features,
        )
        _checks.permutation(self.permutation, self.in_features)
        if self.permutation is not None:
            w = w[jnp.argsort(self.permutation)]
        if self.input_scale is None:
            return w
        _checks.input_scale(self.input_scale, self.in_features)
        scaled = w * self.input_scale.astype(jnp.float32)[:, None]
        return scaled.astype(_checks.float_dtype("dtype", dtype))

    def validate(self) -> "QuantizedWeight":
        """Raises TypeError or ValueError, naming the field, unless the invariants hold; returns self."""
        for name in ("group_size", "k"):
            _checks.integer(f"QuantizedWeight.{name}", getattr(self, name))
        if self.k < 0:
            raise ValueError(f"QuantizedWeight.k: expected at least 0, got {self.k}")
        lead = _checks.array("qweight", self.qweight).shape[:-3]
        if len(self.qweight.shape) < 3:
            raise ValueError(
                f"qweight: expected at least 3 dimensions, got shape {tuple(self.qweight.shape)}"
            )
        one = lambda a: a if a is None else jax.ShapeDtypeStruct(a.shape[len(lead) :], a.dtype)
        for name in ("scales", "zeros", "permutation"):
            value = getattr(self, name)
            if value is None and name != "scales":
                continue
            shape = tuple(_checks.array(name, value).shape)
            if shape[: len(lead)] != lead:
                raise ValueError(
                    f"{name}: expected the leading dimensions of qweight, {lead}, got shape {shape}"
                )
        _checks.weight(
            one(self.qweight), one(self.scales), one(self.zeros), self.in_features, self.group_size
        )
        if self.input_scale is not None:
            _checks.floating("input_scale", _checks.array("input_scale", self.input_scale))
            _checks.shape("input_scale", self.input_scale, (*lead, self.in_features), " for K")
        _checks.permutation(one(self.permutation), self.in_features)
        known = isinstance(self.permutation, np.ndarray | jax.Array)
        known = known and not isinstance(self.permutation, core.Tracer)
        if known and getattr(self.permutation, "is_fully_addressable", True):
            rows = np.sort(self.permutation, axis=-1)
            if (rows != np.arange(self.in_features)).any():
                raise ValueError(f"permutation: expected each of 0..{self.in_features - 1} once")
        return self
