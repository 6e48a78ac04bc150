"""Checkpoints: `load` reads 4-bit checkpoints of several formats, `save` writes our own (see own.py)."""

from jax_w4a16.checkpoint._load import load
from jax_w4a16.checkpoint._save import save

__all__ = ["load", "save"]
