"""4-bit-weight, 16-bit-activation matrix multiplication for JAX."""

from jax_w4a16._dot import dot, ragged_dot
from jax_w4a16._ffi import DISABLE_JAX_EXPORT_CHECKS, __version__, build_info
from jax_w4a16._fuse import fuse, interleave, split
from jax_w4a16._fused import dot_add_norm, dot_swiglu
from jax_w4a16._model import quantize_model
from jax_w4a16._quantize import dequantize, pack, quantize, unpack
from jax_w4a16._rules import DEFAULT_RULES, Rule
from jax_w4a16._types import QuantizedWeight

__all__ = [
    "DEFAULT_RULES",
    "DISABLE_JAX_EXPORT_CHECKS",
    "QuantizedWeight",
    "Rule",
    "__version__",
    "build_info",
    "dequantize",
    "dot",
    "dot_add_norm",
    "dot_swiglu",
    "fuse",
    "interleave",
    "pack",
    "quantize",
    "quantize_model",
    "ragged_dot",
    "split",
    "unpack",
]
