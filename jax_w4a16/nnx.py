"""Flax NNX: linear layers with packed 4-bit weights: `W4A16Linear`; `W4A16FusedLinear`, several in one."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
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

    Its state is `qweight`, `scales` and, where the weight has them, `zeros`, `permutation` and `input_scale`
    (each a `QuantizedVariable`), shaped as in `jax_w4a16.QuantizedWeight`, and `bias` (an `nnx.Param`). They
    are set at construction from a kernel drawn like `nnx.Linear`'s and quantised; `from_linear` takes the
    kernel of a float layer, `from_quantized` a weight.

    Args:
      in_features: K.
      out_features: N.
      use_bias: whether to add a bias.
      dtype: type of the computation, to which the inputs, scales, zeros and bias are converted: float16,
        bfloat16 or (where no GPU kernel is needed) float32. Default: that of the inputs.
      param_dtype: type in which scales, zeros and bias are stored.
      group_size: weights along K that share a scale: a multiple of 32, or -1 for one group per column.
      symmetric: whether all zero points are 8, and not stored.
      kernel_init: draws the float kernel [K, N] that is quantised, or makes a `QuantizedWeight`.
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
        kernel_init: Callable[..., jax.Array | QuantizedWeight] = _KERNEL_INIT,
        bias_init: Callable[..., jax.Array] = _BIAS_INIT,
        preferred_element_type: Any = None,
        rngs: nnx.Rngs,
    ):
        weight = kernel_init(rngs.params(), (in_features, out_features), jnp.float32)
        if isinstance(weight, QuantizedWeight):
            if weight.shape != (in_features, out_features):
                expected = (in_features, out_features)
                raise ValueError(f"kernel_init: expected a weight of shape {expected}, got {weight.shape}")
        else:
            weight = quantize(weight, group_size=group_size, symmetric=symmetric, scale_dtype=param_dtype)
        self.qweight = QuantizedVariable(weight.qweight)
        self.scales = QuantizedVariable(weight.scales)
        self.zeros = None if weight.zeros is None else QuantizedVariable(weight.zeros)
        optional = lambda a: getattr(nnx, "data", lambda value: value)(
            None if a is None else QuantizedVariable(a)  # None: a Variable may come
        )
        self.permutation = optional(weight.permutation)
        self.input_scale = optional(weight.input_scale)
        self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype)) if use_bias else None
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.group_size = weight.group_size
        self.symmetric = weight.zeros is None
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
        search: str | None = None,
        inputs: Any = None,
    ) -> "W4A16Linear":
        """Quantises a float layer.

        Args:
          linear: the layer; it is left as it is.
          group_size: as in the constructor.
          symmetric: as in the constructor.
          dtype: type of the computation. Default: the layer's.
          param_dtype: type of scales, zeros and bias. Default: the first of the layer's `dtype` and
            `param_dtype` that has 16 bits, else bfloat16.
          search: as in `jax_w4a16.quantize`.
          inputs: as in `jax_w4a16.quantize`.

        Raises:
          TypeError: `linear` is not an `nnx.Linear`.
        """
        if not isinstance(linear, nnx.Linear):
            raise TypeError(f"linear: expected an nnx.Linear, got {type(linear).__name__}")
        weight = quantize(
            linear.kernel[...],
            group_size=group_size,
            symmetric=symmetric,
            scale_dtype=scale_dtype(linear) if param_dtype is None else param_dtype,
            search=search,
            inputs=inputs,
        )
        return cls.from_quantized(
            weight,
            None if linear.bias is None else linear.bias[...],
            dtype=linear.dtype if dtype is None else dtype,
            preferred_element_type=linear.preferred_element_type,
        )

    @classmethod
    def from_quantized(
        cls,
        weight: QuantizedWeight,
        bias: Any = None,
        *,
        dtype: Any = None,
        preferred_element_type: Any = None,
    ) -> "W4A16Linear":
        """A layer of a weight that is packed already, or of a stack of them; its bias gets the scales' type.

        Args:
          weight: the weight [K, N].
          bias: [N], or None for a layer without.
          dtype: as in the constructor.
          preferred_element_type: as in the constructor.
        """
        return cls(
            weight.in_features,
            weight.out_features,
            use_bias=bias is not None,
            dtype=dtype,
            param_dtype=weight.dtype,
            group_size=weight.group_size,
            symmetric=weight.zeros is None,
            kernel_init=lambda *_: weight,
            bias_init=lambda key, shape, dtype: jnp.asarray(bias, dtype),
            preferred_element_type=preferred_element_type,
            rngs=nnx.Rngs(0),
        )

    @property
    def weight(self) -> QuantizedWeight:
        """The weight, of logical shape [K, N]."""
        optional = (None if a is None else a[...] for a in (self.zeros, self.permutation, self.input_scale))
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


class W4A16FusedLinear(nnx.Module):
    """Several linear layers of the same inputs, such as query, key and value, or gate and up, in one product.

    Calling it gives one output for each layer. Its state is that of `linear`, a `W4A16Linear` with the
    outputs of all side by side.

    Args:
      layers: `W4A16Linear`s that agree as `jax_w4a16.fuse` wants, and in the types of the computation and of
        the output; all with or all without a bias.

    Raises:
      ValueError: the layers do not agree.
    """

    def __init__(self, layers: Sequence[W4A16Linear]):
        for name in ("dtype", "preferred_element_type"):
            own = [getattr(layer, name) for layer in layers]
            kinds = [None if dtype is None else jnp.dtype(dtype).name for dtype in own]
            for i, kind in enumerate(kinds):
                if kind != kinds[0]:
                    raise ValueError(f"layers[{i}]: expected {name} {kinds[0]} as of layers[0], got {kind}")
        weight = _fuse.fuse(*(layer.weight for layer in layers))
        biases = [layer.bias[...] for layer in layers if layer.bias is not None]
        if biases and len(biases) != len(layers):
            raise ValueError(
                f"layers: expected all with a bias or none, got {len(biases)} of {len(layers)} with one"
            )
        self.linear = W4A16Linear.from_quantized(
            weight,
            jnp.concatenate(biases, -1) if biases else None,
            dtype=layers[0].dtype,
            preferred_element_type=layers[0].preferred_element_type,
        )
        self.sizes = tuple(layer.out_features for layer in layers)

    def __call__(self, inputs: jax.Array) -> list[jax.Array]:
        """inputs [..., K] -> [..., N] of each layer, in order."""
        return _fuse.split(self.linear(inputs), self.sizes)


def scale_dtype(linear: nnx.Linear) -> Any:
    """The first of the layer's `dtype` and `param_dtype` that has 16 bits, else bfloat16."""
    own = [jnp.dtype(d) for d in (linear.dtype, linear.param_dtype) if d is not None]
    return next((d for d in own if d.itemsize == 2), jnp.dtype(jnp.bfloat16))


class _Watched(nnx.Linear):
    """A layer that tells `note` what it is called with."""

    note: Callable[[jax.Array], None]

    def __call__(self, inputs, *args, **kwargs):
        self.note(inputs)
        return super().__call__(inputs, *args, **kwargs)


def _watch(layer: Any, note: Callable[[jax.Array], None]) -> None:
    """Changes the layer's class alone, so that the model finds all else of it where it was."""
    layer.__class__, layer.note = _Watched, note


def record_inputs(
    model: nnx.Module, batches: Sequence, *, call: Callable | None = None, rows: int = 512
) -> dict[str, np.ndarray]:
    """Runs a copy of the model on batches, and keeps a sample of what each of its `nnx.Linear` layers meets.

    Args:
      model: a float model; it is left as it is, and so is its state.
      batches: what the model is called with, one after the other.
      call: `call(model, batch)` runs the model; default: `model(batch)`.
      rows: how many inputs of each layer to keep, evenly spaced.

    Returns:
      The `inputs` of `jax_w4a16.quantize_model`, [T, K] by path, in the host's memory.

    Raises:
      ValueError: there are no batches or rows, or a layer was called inside a jit, scan or vmap of the
        model's own.
    """
    recorder, watched = Recorder(rows=rows, calls=len(batches)), nnx.clone(model)
    for path, layer in list(nnx.iter_modules(watched)):
        if type(layer) is nnx.Linear:
            _watch(layer, functools.partial(recorder.note, "/".join(map(str, path))))
    for batch in batches:
        if call is None:
            watched(batch)
        else:
            call(watched, batch)
    return recorder.samples()
