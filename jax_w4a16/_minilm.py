"""The MiniLM sentence encoder in plain JAX, its linear layers float or 4-bit.

A sentence's embedding is the mean of BERT's last hidden states over its tokens, scaled to length 1.
Every function is pure; the parameters are a dict of arrays in which a linear layer is
``{"weight": [K, N] array or QuantizedWeight, "bias": [N]}``. The weights of all layers are stacked
along a leading axis and scanned over.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_w4a16._dot import dot
from jax_w4a16._model import quantize_model
from jax_w4a16._rules import Rule
from jax_w4a16._types import QuantizedWeight

Params = dict[str, Any]

MAX_TOKENS = 256  # all-MiniLM-L6-v2 was trained on no longer sentences

_LINEARS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_out": "attention.output.dense",
    "ffn_in": "intermediate.dense",
    "ffn_out": "output.dense",
}
_NORMS = {"attention_norm": "attention.output.LayerNorm", "ffn_norm": "output.LayerNorm"}


@dataclasses.dataclass(frozen=True)
class Config:
    """What the encoder's shapes do not tell."""

    num_layers: int
    num_heads: int
    norm_eps: float


def read_config(path: pathlib.Path) -> Config:
    """Reads a Hugging Face ``config.json``.

    Raises:
      ValueError: if it describes another architecture than BERT with the exact GELU.
    """
    raw = json.loads(path.read_text())
    wanted = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    for key, value in wanted.items():
        if raw.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {raw[key]!r}, the encoder needs {value!r}")
    return Config(raw["num_hidden_layers"], raw["num_attention_heads"], raw["layer_norm_eps"])


def from_tensors(tensors: Mapping[str, Any], config: Config) -> Params:
    """Parameters from a checkpoint's tensors, by their Hugging Face names, in their own dtype.

    A linear layer is a float ``<name>.weight`` [N, K] or a QuantizedWeight ``<name>``, whose bias takes the
    type of its scales.

    Raises:
      KeyError: if a tensor is missing.
    """

    def linear(name: str) -> Params:
        bias = tensors[name + ".bias"]
        if isinstance(packed := tensors.get(name), QuantizedWeight):
            return {"weight": packed, "bias": bias.astype(packed.scales.dtype)}
        return {"weight": tensors[name + ".weight"].T, "bias": bias}

    def norm(name: str) -> Params:
        return {"scale": tensors[name + ".weight"], "bias": tensors[name + ".bias"]}

    def layer(i: int) -> Params:
        prefix = f"encoder.layer.{i}."
        return {key: linear(prefix + name) for key, name in _LINEARS.items()} | {
            key: norm(prefix + name) for key, name in _NORMS.items()
        }

    embeddings = {
        key: jnp.asarray(tensors[f"embeddings.{key}_embeddings.weight"])
        for key in ("word", "position", "token_type")
    }
    return embeddings | {
        "norm": jax.tree.map(jnp.asarray, norm("embeddings.LayerNorm")),
        "layers": jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *(layer(i) for i in range(config.num_layers))
        ),
    }


def quantize_linears(params: Params, rule: Rule, *, dtype: Any, inputs: Params | None = None) -> Params:
    """The same parameters with 4-bit weights in every linear layer, by the rule, and its bias in `dtype`.

    Embedding tables and norms stay as they are. `inputs` (from `linear_inputs`) is for searches that need it.
    """
    weights = {name: params["layers"][name]["weight"] for name in _LINEARS}
    packed = quantize_model(weights, rule, inputs=inputs, scale_dtype=dtype, progress=False)
    layer = lambda name: {"weight": packed[name], "bias": params["layers"][name]["bias"].astype(dtype)}
    return params | {"layers": params["layers"] | {name: layer(name) for name in _LINEARS}}


def linear_bytes(params: Params) -> int:
    """Bytes that the weights of the linear layers take (biases not counted)."""
    return sum(params["layers"][key]["weight"].nbytes for key in _LINEARS)


def _linear(x: jax.Array, p: Params) -> jax.Array:
    if isinstance(p["weight"], QuantizedWeight):
        return dot(x, p["weight"], bias=p["bias"])
    return jnp.dot(x, p["weight"], precision="highest") + p["bias"]


def _norm(x: jax.Array, p: Params, eps: float) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + eps)
    return (y * p["scale"] + p["bias"]).astype(x.dtype)


def _layer(x: jax.Array, mask: jax.Array, p: Params, config: Config) -> tuple[jax.Array, Params]:
    """One transformer layer: the next hidden states, and each linear layer's input."""
    inputs = {}

    def linear(name: str, x: jax.Array) -> jax.Array:
        inputs[name] = x
        return _linear(x, p[name])

    heads = (*x.shape[:-1], config.num_heads, x.shape[-1] // config.num_heads)
    query, key, value = (linear(name, x).reshape(heads) for name in ("query", "key", "value"))
    scores = jnp.einsum(
        "bqhd,bkhd->bhqk", query, key, precision="highest", preferred_element_type=jnp.float32
    )
    scores = jnp.where(mask[:, None, None, :], scores / heads[-1] ** 0.5, -jnp.inf)
    attention = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", attention, value, precision="highest").reshape(x.shape)
    x = _norm(x + linear("attention_out", mixed), p["attention_norm"], config.norm_eps)
    inner = jax.nn.gelu(linear("ffn_in", x), approximate=False)
    return _norm(x + linear("ffn_out", inner), p["ffn_norm"], config.norm_eps), inputs


def _embed(params: Params, ids: jax.Array, config: Config) -> jax.Array:
    x = params["word"][ids] + params["position"][: ids.shape[1]] + params["token_type"][0]
    x = _norm(x, params["norm"], config.norm_eps)
    return x.astype(params["layers"]["query"]["bias"].dtype)


def encode(params: Params, ids: jax.Array, mask: jax.Array, *, config: Config) -> jax.Array:
    """Embeds a batch of token sequences.

    The hidden states have the type of the linear layers' biases; norms, softmax and pooling are computed in
    float32.

    Args:
      params: from `from_tensors` or `quantize_linears`.
      ids: int32 [B, T], padded at will.
      mask: bool [B, T], True at real tokens; at least one in each row.
      config: the static part.

    Returns:
      float32 [B, hidden], rows of length 1.
    """
    layer = lambda x, p: (_layer(x, mask, p, config)[0], None)
    x, _ = jax.lax.scan(layer, _embed(params, ids, config), params["layers"])
    return pool(x, mask)


def pool(x: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean of x [B, T, H] over the tokens of mask [B, T], scaled to length 1: float32 [B, H]."""
    keep = mask[..., None]
    mean = jnp.where(keep, x, 0).sum(1, dtype=jnp.float32) / keep.sum(1)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def linear_inputs(params: Params, ids: jax.Array, mask: jax.Array, *, config: Config) -> Params:
    """What each linear layer meets for the tokens of a batch: [layers, tokens, K] by the layer's name.

    Arguments as for `encode`. Padding is left out.
    """
    layer = lambda x, p: _layer(x, mask, p, config)
    inputs = jax.lax.scan(layer, _embed(params, ids, config), params["layers"])[1]
    return {name: a[:, np.asarray(mask)] for name, a in inputs.items()}
