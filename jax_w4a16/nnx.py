"""Flax NNX: `W4A16Linear`, a linear layer with packed 4-bit weights."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_w4a16._dot import dot
from jax_w4a16._quantize import quantize
from jax_w4a16._types import QuantizedWeight

try:
    from flax import nnx
except ImportError as error:
    raise ImportError("jax_w4a16.nnx needs flax: pip install jax_w4a16[flax]") from error

_KERNEL_INIT = nnx.initializers.lecun_normal()
_BIAS_INIT = nnx.initializers.zeros_init()


class QuantizedVariable(nnx.Variable):
    """Packed codes, scales or zero points: part of a layer's state, but no `nnx.Param`.

    Optimisers and `nnx.grad` therefore leave them alone; packed codes have no gradient.
    """


class W4A16Linear(nnx.Module):
    """A linear transformation of the last dimension, with 4-bit weights: y = x @ w + bias.

    Its state is `qweight`, `scales` and, unless symmetric, `zeros` (each a `QuantizedVariable`), shaped as in
    `jax_w4a16.QuantizedWeight`, and `bias` (an `nnx.Param`). They are set at construction from a kernel drawn
    like `nnx.Linear`'s and quantised; `from_linear` takes the kernel of a float layer. `permutation`, None,
    may be set to another `QuantizedVariable` together with the weight of an act-order checkpoint.

    Args:
      in_features: K.
      out_features: N.
      use_bias: whether to add a bias.
      dtype: type of the computation, to which the inputs, scales, zeros and bias are converted: float16,
        bfloat16 or (where no GPU kernel is needed) float32. Default: that of the inputs.
      param_dtype: type in which scales, zeros and bias are stored.
      group_size: weights along K that share a scale: a multiple of 32, or -1 for one group per column.
      symmetric: whether all zero points are 8, and not stored.
      kernel_init: draws the float kernel [K, N] that is quantised.
      bias_init: draws the bias [N].
      preferred_element_type: type of the output: that of the computation (default) or float32.
      rngs: random keys; `rngs.params()` is used as in `nnx.Linear`.

    Raises:
      TypeError, ValueError: as `jax_w4a16.quantize`, and when called as `jax_w4a16.dot`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.bfloat16,
        group_size: int = 128,
        symmetric: bool = True,
        kernel_init: Callable[..., jax.Array] = _KERNEL_INIT,
        bias_init: Callable[..., jax.Array] = _BIAS_INIT,
        preferred_element_type: Any = None,
        rngs: nnx.Rngs,
    ):
        kernel = kernel_init(rngs.params(), (in_features, out_features), jnp.float32)
        weight = quantize(kernel, group_size=group_size, symmetric=symmetric, scale_dtype=param_dtype)
        self.qweight = QuantizedVariable(weight.qweight)
        self.scales = QuantizedVariable(weight.scales)
        self.zeros = None if weight.zeros is None else QuantizedVariable(weight.zeros)
        self.permutation = getattr(nnx, "data", lambda value: value)(None)  # a Variable may come
        self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype)) if use_bias else None
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.group_size = weight.group_size
        self.symmetric = symmetric
        self.preferred_element_type = preferred_element_type

    @classmethod
    def from_linear(
        cls,
        linear: nnx.Linear,
        *,
        group_size: int = 128,
        symmetric: bool = True,
        dtype: Any = None,
        param_dtype: Any = None,
    ) -> "W4A16Linear":
        """Quantises a float layer, to nearest.

        Args:
          linear: the layer; it is left as it is.
          group_size: as in the constructor.
          symmetric: as in the constructor.
          dtype: type of the computation. Default: the layer's.
          param_dtype: type of scales, zeros and bias. Default: the first of the layer's `dtype` and
            `param_dtype` that has 16 bits, else bfloat16.

        Raises:
          TypeError: `linear` is not an `nnx.Linear`.
        """
        if not isinstance(linear, nnx.Linear):
            raise TypeError(f"linear: expected an nnx.Linear, got {type(linear).__name__}")
        if param_dtype is None:
            own = [jnp.dtype(d) for d in (linear.dtype, linear.param_dtype) if d is not None]
            param_dtype = next((d for d in own if d.itemsize == 2), jnp.bfloat16)
        kernel = linear.kernel[...]
        bias = None if linear.bias is None else linear.bias[...]
        return cls(
            linear.in_features,
            linear.out_features,
            use_bias=bias is not None,
            dtype=linear.dtype if dtype is None else dtype,
            param_dtype=param_dtype,
            group_size=group_size,
            symmetric=symmetric,
            kernel_init=lambda *_: kernel,
            bias_init=lambda key, shape, dtype: jnp.asarray(bias, dtype),
            preferred_element_type=linear.preferred_element_type,
            rngs=nnx.Rngs(0),
        )

    @property
    def weight(self) -> QuantizedWeight:
        """The weight, of logical shape [K, N]."""
        optional = (None if a is None else a[...] for a in (self.zeros, self.permutation))
        return QuantizedWeight(
            self.qweight[...], self.scales[...], *optional, group_size=self.group_size, k=self.in_features
        )

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """inputs [..., K] -> [..., N], of the type of the computation or `preferred_element_type`."""
        dtype = inputs.dtype if self.dtype is None else self.dtype
        convert = lambda a: None if a is None else a.astype(dtype)
        weight = self.weight
        return dot(
            inputs.astype(dtype),
            dataclasses.replace(weight, scales=convert(weight.scales), zeros=convert(weight.zeros)),
            bias=None if self.bias is None else convert(self.bias[...]),
            preferred_element_type=self.preferred_element_type,
        )
