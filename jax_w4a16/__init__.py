"""4-bit-weight, 16-bit-activation matrix multiplication for JAX."""

from jax_w4a16._dot import dot
from jax_w4a16._ffi import DISABLE_JAX_EXPORT_CHECKS, __version__, build_info
from jax_w4a16._quantize import dequantize, pack, quantize, unpack
from jax_w4a16._types import QuantizedWeight

__all__ = [
    "DISABLE_JAX_EXPORT_CHECKS",
    "QuantizedWeight",
    "__version__",
    "build_info",
    "dequantize",
    "dot",
    "pack",
    "quantize",
    "unpack",
]
