"""Flax Linen: dense layers with packed 4-bit weights: `W4A16Dense`, and `W4A16FusedDense`, several in one."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_w4a16 import _fuse
from jax_w4a16._dot import dot
from jax_w4a16._quantize import quantize
from jax_w4a16._record import Recorder
from jax_w4a16._types import QuantizedWeight

try:
    from flax import linen as nn
except ImportError as error:
    raise ImportError("jax_w4a16.linen needs flax: pip install jax_w4a16[flax]") from error

COLLECTION = "quantized"
"""The collection of variables that holds packed weights and their scales."""


class W4A16Dense(nn.Module):
    """A linear transformation of the last dimension, with 4-bit weights: y = x @ w + bias.

    Its variables are `params/bias` [N] and `quantized/kernel`, a dict of `qweight`, `scales` and, where the
    weight has them, `zeros`, `permutation` and `input_scale`, shaped as in `jax_w4a16.QuantizedWeight`.
    `init` draws a kernel like `nn.Dense` and quantises it; `quantize_dense` converts the parameters of a
    trained `nn.Dense`.

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
            stored.get("input_scale"),
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
    return quantize(kernel, group_size=group_size, symmetric=symmetric, scale_dtype=dtype).arrays


class W4A16FusedDense(nn.Module):
    """Several dense layers of the same inputs, such as query, key and value, or gate and up, in one product.

    Calling it gives one output for each layer. Its variables are those of `fused`, a `W4A16Dense` with the
    outputs of all side by side; `fuse_dense` makes them from those of the layers.

    Attributes:
      features: N of each layer.
      options: of the `W4A16Dense`.
    """

    features: Sequence[int]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @nn.compact
    def __call__(self, inputs: jax.Array) -> list[jax.Array]:
        """inputs [..., K] -> [..., N] of each layer, in order."""
        fused = W4A16Dense(sum(self.features), name="fused", **self.options)
        return _fuse.split(fused(inputs), tuple(self.features))


def fuse_dense(*layers: Mapping[str, Any], in_features: int, group_size: int = 128) -> dict[str, dict]:
    """The variables of a `W4A16FusedDense` from those of its layers, each a `W4A16Dense`.

    Args:
      *layers: `{"quantized": {"kernel": {...}}, "params": {"bias": [N]}}`, all with or all without a bias.
      in_features: K of the layers.
      group_size: of the layers.

    Raises:
      KeyError: a layer has no packed weight.
      ValueError: the layers do not agree, as `jax_w4a16.fuse` wants.
    """
    weight = _fuse.fuse(
        *(QuantizedWeight(**v[COLLECTION]["kernel"], group_size=group_size, k=in_features) for v in layers)
    )
    variables: dict[str, dict] = {COLLECTION: {"fused": {"kernel": weight.arrays}}}
    biases = [layer["params"]["bias"] for layer in layers if "bias" in layer.get("params", {})]
    if biases and len(biases) != len(layers):
        raise ValueError(
            f"layers: expected all with a bias or none, got {len(biases)} of {len(layers)} with one"
        )
    if biases:
        variables["params"] = {"fused": {"bias": jnp.concatenate(biases, -1)}}
    return variables


def record_inputs(
    module: nn.Module, variables: Mapping, batches: Sequence, *, call: Callable | None = None, rows: int = 512
) -> dict[str, np.ndarray]:
    """Runs a module on batches, and keeps a sample of what each of its `nn.Dense` layers meets.

    Args:
      module: a float module.
      variables: its variables.
      batches: what the module is called with, one after the other.
      call: `call(module, variables, batch)` runs the module; default: `module.apply(variables, batch)`.
      rows: how many inputs of each layer to keep, evenly spaced.

    Returns:
      The `inputs` of `jax_w4a16.quantize_model`, [T, K] by path, in the host's memory.

    Raises:
      ValueError: there are no batches or rows, or a layer was called inside a jit, scan or vmap of the
        module's own.
    """
    recorder = Recorder(rows=rows, calls=len(batches))

    def watch(run, args, kwargs, context):
        if type(context.module) is nn.Dense and context.method_name == "__call__":
            recorder.note("/".join(context.module.path), args[0])
        return run(*args, **kwargs)

    with nn.intercept_methods(watch):
        for batch in batches:
            if call is None:
                module.apply(variables, batch)
            else:
                call(module, variables, batch)
    return recorder.samples()
