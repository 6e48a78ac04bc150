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

DEFAULT_RULES: Rules = {
    r"(?i)bias|norm|scale|embed|lm_head|router": Rule(skip=True),
    "": Rule(),
}
"""All but embeddings, norms, the head and routers: groups of 128, symmetric, to nearest."""


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


def first_match(rules: Mapping[re.Pattern, Rule], path: str) -> Rule | None:
    """The rule of the first pattern found anywhere in the path, None where it is skipped or there is none."""
    rule = next((rule for pattern, rule in rules.items() if pattern.search(path)), None)
    return None if rule is None or rule.skip else rule
