"""Measurements of jax_w4a16: `python -m benchmarks.bench_dot` and its siblings."""

import sys
from pathlib import Path

# `python -m` puts the repository first on the path, whose jax_w4a16 has no compiled module: the
# installed package is the one to measure.
_root = Path(__file__).resolve().parents[1]
_repository = [entry for entry in sys.path if Path(entry).resolve() == _root]
sys.path[:] = [entry for entry in sys.path if entry not in _repository] + _repository
