"""The sizes of a Llama decoder, by name or from a Hugging Face config.json."""

import dataclasses
import json
import math
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a model and how its linear layers are stored."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    epsilon: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: tuple[float, float, float, float] | None = None  # factor, low, high, original length
    tied: bool = False  # the head is the embedding
    packed: bool = False  # W4A16 linear layers
    packed_head: bool = False
    group_size: int = 128
    symmetric: bool = True
    dtype: str = "bfloat16"
    products: str = "fused"  # `dot_add_norm` and `dot_swiglu` of packed layers, or "plain": `dot` alone
    attention: str = "xla"  # or "cudnn", for a prompt
    decode_attention: str = "xla"  # or "kernel": one, where it serves (GPUs alone)
    row_sum: str = "xla"  # over devices, or "kernel": with the norm after it (GPUs of one process alone)

    @classmethod
    def from_file(cls, path: Path) -> "Config":
        """From a Hugging Face config.json; raises ValueError where this decoder lacks what it asks for."""
        given = json.loads(path.read_text())
        scaling = given.get("rope_parameters") or given.get("rope_scaling") or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        unknown = [name for name in ("attention_bias", "mlp_bias", "sliding_window") if given.get(name)]
        known = given.get("model_type") in ("llama", "mistral") and kind in ("default", "llama3")
        if unknown or not known:
            raise ValueError(
                f"{path}: expected a Llama without biases and windows, with default or llama3 rotary "
                f"embeddings, got model_type {given.get('model_type')!r}, {kind!r} embeddings, {unknown}"
            )
        stretch = None
        if kind == "llama3":
            stretch = (
                float(scaling["factor"]),
                float(scaling["low_freq_factor"]),
                float(scaling["high_freq_factor"]),
                float(scaling["original_max_position_embeddings"]),
            )
        heads = given["num_attention_heads"]
        return cls(
            hidden=given["hidden_size"],
            mlp=given["intermediate_size"],
            layers=given["num_hidden_layers"],
            heads=heads,
            kv_heads=given.get("num_key_value_heads") or heads,
            head_dim=given.get("head_dim") or given["hidden_size"] // heads,
            vocab=given["vocab_size"],
            epsilon=given.get("rms_norm_eps", 1e-6),
            rope_theta=float(scaling.get("rope_theta") or given.get("rope_theta") or 10_000.0),
            rope_scaling=stretch,
            tied=given.get("tie_word_embeddings", False),
        )

    def check_ways(self, ways: int) -> None:
        """Raises ValueError unless the model splits over so many devices."""
        rows = math.lcm(64, self.group_size if self.packed else 1) * ways
        for name, size, unit in (
            ("KV heads", self.kv_heads, ways),
            ("vocabulary", self.vocab, 16 * ways),
            ("attention features", self.heads * self.head_dim, rows),
            ("MLP features", self.mlp, rows),
        ):
            if ways > 1 and size % unit:
                raise ValueError(f"{name}: expected a multiple of {unit} for {ways} devices, got {size}")


SIZES = {
    "tiny": Config(256, 512, 2, 8, 2, 32, 512, rope_theta=10_000.0, group_size=32),
    "1b": Config(2048, 8192, 16, 32, 8, 64, 128_256, tied=True),
    "8b": Config(4096, 14_336, 32, 32, 8, 128, 128_256),
    "70b": Config(8192, 28_672, 80, 64, 8, 128, 128_256),
}
