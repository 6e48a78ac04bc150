"""Rules of `quantize_model`: which weights become 4-bit ones, and how."""

import dataclasses
import re
from collections.abc import Mapping

from jax_w4a16 import _checks, _search


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the weights whose path matches are quantised.

    Attributes:
      group_size: codes of K that share a scale: a multiple of 32, or -1 for one group per column.
      symmetric: zero points are 8 and not stored; otherwise each group has its own.
      skip: the weights stay as they are.
      search: None (round to nearest), "mse", "awq" or "fit"; see `jax_w4a16.quantize`.

    Raises:
      TypeError, ValueError: on construction, where an attribute is not as described.
    """

    group_size: int = 128
    symmetric: bool = True
    skip: bool = False
    search: str | None = None

    def __post_init__(self):
        size = _checks.integer("group_size", self.group_size)
        if size != -1 and (size <= 0 or size % 32):
            raise ValueError(f"group_size: expected a multiple of 32, or -1, got {size}")
        if not isinstance(self.skip, bool):
            raise TypeError(f"skip: expected a bool, got {type(self.skip).__name__}")
        _search.check(self.search, self.symmetric)


Rules = Mapping[str, Rule]

# Each is a whole name in a path, what lies between "/" or ".": "layer_norm" is a norm, "normal_proj" is none.
_FLOATS = (
    r"([^/.]*_)?(bias|biases)(_[^/.]*)?|([^/.]*_)?scales?",
    r"[^/.]*embe?d[^/.]*|wte|wpe",
    r"[^/.]*norm(s|alization)?(?![a-z])[^/.]*|ln(\d+|_[^/.]*)?",
    r"([^/.]*_)?(head|classifier)|score|logits[^/.]*",
    r"([^/.]*_)?router(_[^/.]*)?|((shared_)?expert_)?gate",
)
# Deeper in a path these name ordinary layers: BERT's output, a mixture's shared expert.
_FLOATS_AT_THE_TOP = "output|shared"

DEFAULT_SKIP = rf"(?i)(^|[/.])({'|'.join(_FLOATS)})($|[/.])|^({_FLOATS_AT_THE_TOP})($|[/.])"
"""The pattern of what `DEFAULT_RULES` leave as it is."""

DEFAULT_RULES: Rules = {DEFAULT_SKIP: Rule(skip=True), "": Rule()}
"""Groups of 128, symmetric, to nearest; but a weight stays where its path has one of these names.

A name is all that lies between two of "/" and ".", in any case; "..." is anything, or nothing:

- biases and scales: `bias`, `biases`, `..._bias`, `bias_...`, `scale`, `scales`, `..._scale`
- embeddings: `...embed...`, `...embd...`, `wte`, `wpe`; first in the path, `shared`
- norms: `...norm...`, `...norms...` and `...normalization...` with no letter next; `ln`, `ln1`, `ln_...`
- heads: `head`, `..._head`, `classifier`, `..._classifier`, `score`, `logits...`; first in the path, `output`
- routers: `router`, `..._router`, `router_...`, `gate`, `expert_gate`, `shared_expert_gate`

So `normal_proj`, `upscale`, `gate_proj` and `heads` are none of these. A gated MLP's `gate` cannot be told
from a router: where it is to become 4-bit, a rule of your own says so.
"""


def check(rules) -> dict[re.Pattern, Rule]:
    """The rules with their patterns compiled, in order; a Rule alone applies to every path."""
    if isinstance(rules, Rule):
        rules = {"": rules}
    if not isinstance(rules, Mapping):
        raise TypeError(
            f"rules: expected a Rule, or a mapping of patterns to Rules, got {type(rules).__name__}"
        )
    compiled = {}
    for pattern, rule in rules.items():
        if not isinstance(rule, Rule):
            raise TypeError(f"rules[{pattern!r}]: expected a Rule, got {type(rule).__name__}")
        try:
            compiled[re.compile(pattern)] = rule
        except (re.error, TypeError) as error:
            raise ValueError(
                f"rules[{pattern!r}]: expected a regular expression, got one with: {error}"
            ) from error
    return compiled


def first_match(rules: Mapping[re.Pattern, Rule], path: str, *, by_name: bool = False) -> Rule | None:
    """The rule of the first pattern found anywhere in the path, None where it is skipped or there is none.

    `by_name`: the empty pattern, which is for every path, does not count.
    """
    counts = {pattern: rule for pattern, rule in rules.items() if pattern.pattern or not by_name}
    rule = next((rule for pattern, rule in counts.items() if pattern.search(path)), None)
    return None if rule is None or rule.skip else rule
