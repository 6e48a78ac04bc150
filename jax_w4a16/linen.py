"""Flax Linen: `W4A16Dense`, a dense layer with packed 4-bit weights."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_w4a16._dot import dot
from jax_w4a16._quantize import quantize
from jax_w4a16._types import QuantizedWeight

try:
    from flax import linen as nn
except ImportError as error:
    raise ImportError("jax_w4a16.linen needs flax: pip install jax_w4a16[flax]") from error

COLLECTION = "quantized"
"""The collection of variables that holds packed weights and their scales."""


class W4A16Dense(nn.Module):
    """A linear transformation of the last dimension, with 4-bit weights: y = x @ w + bias.

    Its variables are `params/bias` [N] and `quantized/kernel`, a dict of `qweight`, `scales` and, unless
    symmetric, `zeros`, shaped as in `jax_w4a16.QuantizedWeight`; a `permutation` beside them is applied too.
    `init` draws a kernel like `nn.Dense` and
    quantises it; `quantize_dense` converts the parameters of a trained `nn.Dense`.

    Attributes:
      features: N.
      use_bias: whether to add a bias.
      dtype: type of the computation, to which the inputs, scales, zeros and bias are converted: float16,
        bfloat16 or (where no GPU kernel is needed) float32. Default: that of the inputs.
      param_dtype: type in which `init` stores scales, zeros and bias.
      group_size: weights along K that share a scale: a multiple of 32, or -1 for one group per column.
      symmetric: whether `init` leaves all zero points at 8, and stores none.
      kernel_init: draws the float kernel [K, N] that is quantised.
      bias_init: draws the bias [N].
      preferred_element_type: type of the output: that of the computation (default) or float32.
    """

    features: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.bfloat16
    group_size: int = 128
    symmetric: bool = True
    kernel_init: Callable[..., jax.Array] = nn.initializers.lecun_normal()
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros_init()
    preferred_element_type: Any = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """inputs [..., K] -> [..., N], of the type of the computation or `preferred_element_type`.

        Raises:
          ValueError: the stored weight does not have `features` columns.
          TypeError, ValueError: as `jax_w4a16.dot`.
        """
        in_features = inputs.shape[-1]

        def draw() -> dict[str, jax.Array]:
            kernel = self.kernel_init(self.make_rng("params"), (in_features, self.features), jnp.float32)
            return _quantized(kernel, self.group_size, self.symmetric, self.param_dtype)

        stored = self.variable(COLLECTION, "kernel", draw).value
        if stored["scales"].shape[-1] != self.features:
            raise ValueError(
                f"{COLLECTION}/kernel: expected {self.features} columns, the layer's features, "
                f"got scales of shape {stored['scales'].shape}"
            )
        bias = (
            self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        )

        dtype = inputs.dtype if self.dtype is None else self.dtype
        convert = lambda a: None if a is None else a.astype(dtype)
        weight = QuantizedWeight(
            stored["qweight"],
            convert(stored["scales"]),
            convert(stored.get("zeros")),
            stored.get("permutation"),
            group_size=self.group_size,
            k=in_features,
        )
        return dot(
            inputs.astype(dtype),
            weight,
            bias=convert(bias),
            preferred_element_type=self.preferred_element_type,
        )


def quantize_dense(
    params: Mapping[str, jax.Array],
    *,
    group_size: int = 128,
    symmetric: bool = True,
    param_dtype: Any = None,
) -> dict[str, dict]:
    """The variables of a `W4A16Dense` from the parameters of an `nn.Dense`.

    Args:
      params: `kernel` [K, N] and, if the layer has one, `bias` [N].
      group_size: as the layer's.
      symmetric: whether all zero points are 8, and not stored.
      param_dtype: type of scales, zeros and bias. Default: the kernel's, or bfloat16 where that is float32.

    Returns:
      `{"quantized": {"kernel": {...}}, "params": {"bias": [N]}}`, without `params` where there is no bias.

    Raises:
      ValueError: `params` holds anything but a kernel and a bias.
      TypeError, ValueError: as `jax_w4a16.quantize`.
    """
    if "kernel" not in params or set(params) - {"kernel", "bias"}:
        raise ValueError(f"params: expected 'kernel' and perhaps 'bias', got {sorted(params)}")
    kernel = _quantized(params["kernel"], group_size, symmetric, param_dtype)
    variables: dict[str, dict] = {COLLECTION: {"kernel": kernel}}
    if "bias" in params:
        variables["params"] = {"bias": jnp.asarray(params["bias"], kernel["scales"].dtype)}
    return variables


def _quantized(kernel, group_size: int, symmetric: bool, dtype: Any) -> dict[str, jax.Array]:
    weight = quantize(kernel, group_size=group_size, symmetric=symmetric, scale_dtype=dtype)
    arrays = {"qweight": weight.qweight, "scales": weight.scales, "zeros": weight.zeros}
    return {name: a for name, a in arrays.items() if a is not None}
