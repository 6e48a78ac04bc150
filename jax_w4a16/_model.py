"""quantize_model: every weight of a model that a rule names, one after the other."""

import functools
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_w4a16 import _checks, _progress, _rules, _search
from jax_w4a16._quantize import quantize
from jax_w4a16._rules import DEFAULT_RULES, Rule, Rules
from jax_w4a16._types import QuantizedWeight


class Found(NamedTuple):
    """A float weight [K, N] or a stack [L, K, N].

    `scale_dtype` is the type of its scales unless told otherwise. `by_name`: it may be no weight of a linear
    layer, so that only a rule whose pattern is not empty takes it.
    """

    array: Any
    scale_dtype: Any = None
    by_name: bool = False


class Form(NamedTuple):
    """What one kind of model tells of itself.

    `weights` are its float weights by path; `replace` makes the model with 4-bit ones by path in their place.
    """

    weights: dict[str, Found]
    replace: Callable[[dict[str, QuantizedWeight]], Any]


def quantize_model(
    model,
    rules: Rules | Rule = DEFAULT_RULES,
    *,
    inputs: Mapping[str, Any] | None = None,
    scale_dtype=None,
    donate: bool = False,
    progress: bool = True,
):
    """The model with 4-bit weights, as the rules say: a copy, which shares every array that stays.

    One weight, or one member of a stack, is on its way at a time; a search takes a few float32 arrays of its
    size.

    Args:
      model: what becomes of it depends on its kind. Paths are joined by "/".
        An `nnx.Module`: each `nnx.Linear` in it becomes a `W4A16Linear`, at the path of the layer, such as
          "layers/0/mlp/up". Subclasses of `nnx.Linear` and other layers stay.
        Variables of a linen module, a mapping with "params": each `nn.Dense`'s `kernel` moves to the
          collection "quantized", where a `W4A16Dense` of the same name and group size finds it; the path is
          the layer's. Returns the variables. They do not tell what made them: a kernel of two dimensions is
          taken for an `nn.Dense`'s. One of three may be a stack, as `nn.scan` makes, but also that of an
          `nn.Conv`, an `nn.DenseGeneral` or an attention's: only a rule with a pattern takes it, neither "",
          the last of the default rules, nor a Rule alone.
        Any other pytree: each leaf of two dimensions [K, N], or a stack [L, K, N] of them, in floating point
          becomes a `QuantizedWeight`, at the path of the leaf. One that the rules take must be float16,
          bfloat16 or float32: convert float64, NumPy's default, or skip it.
      rules: patterns (regular expressions, found anywhere in the path) to Rules, in order; the first match
        wins, and a weight that none matches stays. A Rule alone is for every weight. Default: all in groups
        of 128, but biases, scales, embeddings, norms, heads and routers stay, known by whole names in the
        path: `bias`, `scale`, `embed_tokens`, `wte`, `input_layernorm`, `ln_f`, `lm_head`, `head`, `score`,
        `router`, `gate` (not `gate_proj`) and more, which the README lists.
      inputs: for searches that need it: a sample of each weight's inputs by path, [T, K], or [L, T, K] for a
        stack. `nnx.record_inputs` and `linen.record_inputs` make it.
      scale_dtype: type of scales and zero points, and of a layer's bias. Default: the weight's (for a layer,
        also of its computation), or bfloat16 where that is float32.
      donate: float weights that are jax Arrays are deleted as soon as they are packed, so that both forms of
        the model never fill the memory together; `model` is then of no use. One held at two paths is kept.
      progress: whether to draw a progress bar, on standard error where that is a terminal.

    Raises:
      TypeError, ValueError: an argument is not as described; the message names the path.
    """
    compiled = _rules.check(rules)
    if inputs is not None and not isinstance(inputs, Mapping):
        raise TypeError(f"inputs: expected a mapping of paths to samples, got {type(inputs).__name__}")
    form = _form(model)
    chosen = {
        path: _rules.first_match(compiled, path, by_name=found.by_name)
        for path, found in form.weights.items()
    }
    chosen = {path: rule for path, rule in chosen.items() if rule is not None}
    if not chosen:
        named = sorted(path for path, found in form.weights.items() if found.by_name)
        raise ValueError(
            f"rules: expected one that matches a weight, got none; paths of weights: {sorted(form.weights)}"
            + (f"; only a pattern that is not empty takes {named}" if named else "")
        )
    for path in chosen:  # before the first is packed, and perhaps deleted
        _checks.floating(path, form.weights[path].array)
    uses = Counter(id(found.array) for found in form.weights.values())
    packed = {}
    with _progress.Progress(len(chosen)) as bar:
        for path, rule in chosen.items():
            found = form.weights[path]
            sample = None if inputs is None else inputs.get(path)
            packed[path] = _pack(path, found, rule, sample, scale_dtype)
            if donate and isinstance(found.array, jax.Array) and uses[id(found.array)] == 1:
                found.array.delete()
            if progress:
                bar.step(path)
    return form.replace(packed)


def _form(model) -> Form:
    flax_nnx = sys.modules.get("flax.nnx")
    if flax_nnx is not None and isinstance(model, flax_nnx.Module):
        from jax_w4a16 import _model_nnx

        return _model_nnx.form(model)
    if isinstance(model, Mapping) and "params" in model:
        from jax_w4a16 import _model_linen

        return _model_linen.form(model)
    return _pytree(model)


def _pytree(tree) -> Form:
    packed_already = lambda node: isinstance(node, QuantizedWeight)
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=packed_already)
    named = [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]
    if twice := sorted(path for path, count in Counter(path for path, _ in named).items() if count > 1):
        raise ValueError(f"model: expected paths that differ when written with '/', got two of {twice}")

    def replace(packed):
        return jax.tree.unflatten(structure, [packed.get(path, leaf) for path, leaf in named])

    return Form({path: Found(leaf) for path, leaf in named if is_weight(leaf)}, replace)


def is_weight(value) -> bool:
    """A floating-point array [K, N] or [L, K, N]."""
    if isinstance(value, QuantizedWeight) or not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return False
    return len(value.shape) in (2, 3) and jnp.issubdtype(value.dtype, jnp.floating)


def _pack(path: str, found: Found, rule: Rule, sample: Any, scale_dtype: Any) -> QuantizedWeight:
    w, needed = found.array, rule.search in _search.NEED_INPUTS
    dtype = found.scale_dtype if scale_dtype is None else scale_dtype
    try:
        if needed and sample is None:
            raise ValueError(f"expected a sample of its inputs, inputs[{path!r}], for search={rule.search!r}")
        operands = (w, sample) if needed else (w,)
        if needed:
            _checks.array("inputs", sample)
        if len(w.shape) == 2:
            packed = _one(operands, rule, dtype)
        elif needed and (len(sample.shape) != 3 or sample.shape[0] != w.shape[0]):
            raise ValueError(
                f"inputs: expected shape [L = {w.shape[0]}, T, K = {w.shape[1]}] for a stack, "
                f"got {tuple(sample.shape)}"
            )
        else:
            packed = _stack(operands, rule, dtype)
        # Without this, the next weights would be on their way before this one is done.
        return jax.block_until_ready(packed)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{path}: {error}") from error


def _one(operands, rule: Rule, scale_dtype) -> QuantizedWeight:
    w, *inputs = operands
    return quantize(
        w,
        group_size=rule.group_size,
        symmetric=rule.symmetric,
        scale_dtype=scale_dtype,
        search=rule.search,
        inputs=inputs[0] if inputs else None,
    )


def _stack(operands, rule: Rule, scale_dtype) -> QuantizedWeight:
    if isinstance(operands[0], jax.Array) or not len(operands[0]):
        return _stack_on_device(operands, rule, scale_dtype)
    each = (_one(member, rule, scale_dtype) for member in zip(*operands, strict=True))
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *map(jax.block_until_ready, each))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _stack_on_device(operands, rule: Rule, scale_dtype) -> QuantizedWeight:
    return lax.map(lambda member: _one(member, rule, scale_dtype), operands)
