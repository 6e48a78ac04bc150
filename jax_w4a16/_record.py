"""Samples of the inputs that layers meet, for the searches that need them."""

import numpy as np
from jax import core

from jax_w4a16 import _layout


class Recorder:
    """Keeps, on the host, at most `rows` inputs of each layer, evenly spaced over calls of the model."""

    def __init__(self, *, rows: int, calls: int):
        if rows < 1 or calls < 1:
            raise ValueError(f"expected at least one row and one batch, got rows={rows} and {calls} batches")
        self._rows, self._each = rows, _layout.ceil_div(rows, calls)
        self._kept: dict[str, list[np.ndarray]] = {}

    def note(self, path: str, x) -> None:
        """Takes x [..., K], the input of the layer at this path."""
        if isinstance(x, core.Tracer):
            raise ValueError(
                f"{path}: expected an array, got a traced value; inputs are recorded outside of jit, scan "
                "and vmap, also inside the model"
            )
        rows = x.reshape(-1, x.shape[-1])
        self._kept.setdefault(path, []).append(np.asarray(_spaced(rows, self._each)))

    def samples(self) -> dict[str, np.ndarray]:
        """The inputs by path, [T, K]."""
        return {path: _spaced(np.concatenate(kept), self._rows) for path, kept in self._kept.items()}


def _spaced(rows, limit: int):
    """At most `limit` of the rows, evenly spaced."""
    return rows[:: _layout.ceil_div(max(len(rows), 1), limit)]
