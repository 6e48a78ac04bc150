"""Writers of each foreign format, from its definition (jax_w4a16/checkpoint/ has them)."""

import numpy as np

FORMS = ("ct", "awq_gemm", "awq_gemv", "gptq", "hqq", "torchao")
# config.json's quantization_config of each, as far as a reader needs it.
CONFIGS = {
    "ct": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "awq_gemm": {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True},
    "awq_gemv": {"quant_method": "awq", "bits": 4, "version": "gemv", "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq", "sym": False},
    "hqq": None,
    "torchao": None,
}
NAME = "a.proj"


def words(codes: np.ndarray, axis: int, order=range(8)) -> np.ndarray:
    """Nibbles along an axis to int32, nibble i from index order[i]."""
    codes = np.moveaxis(codes.astype(np.uint32), axis, -1)
    codes = codes.reshape(*codes.shape[:-1], -1, 8)[..., list(order)]
    packed = (codes << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1, dtype=np.uint32)
    return np.ascontiguousarray(np.moveaxis(packed, -1, axis)).view(np.int32)


def write(
    form: str, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, g: int
) -> dict[str, np.ndarray]:
    """A layer's tensors, by the last part of their names.

    codes uint8 [K, N], scales float [G, N], zeros uint8 [G, N], 1..15; torchao's are all 8.
    """
    k, n = codes.shape
    if form == "ct":
        return {
            "weight_packed": words(codes.T, 1),
            "weight_scale": scales.T,
            "weight_zero_point": words(zeros.T, 0),
            "weight_shape": np.array([n, k]),
        }
    if form == "awq_gemm":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return {"qweight": words(codes, 1, order), "qzeros": words(zeros, 1, order), "scales": scales}
    if form == "awq_gemv":
        multiple = 8 * {32: 4, 64: 2}.get(g, 1)
        pad = -(k // g) % multiple
        padded = [np.pad(a.T, ((0, 0), (0, pad))) for a in (zeros, scales)]
        return {"qweight": words(codes.T, 1), "qzeros": words(padded[0], 1), "scales": padded[1]}
    if form == "gptq":
        return {"qweight": words(codes, 0), "qzeros": words(zeros - 1, 1), "scales": scales}
    if form == "hqq":
        rows = codes.T.reshape(-1, g)
        half = len(rows) // 2
        return {
            "W_q": rows[:half] << 4 | rows[half:],
            "scale": scales.T.reshape(-1, 1),
            "zero": zeros.T.astype(np.float16).reshape(-1, 1),
            "shape": np.array([n, k]),
        }
    assert form == "torchao"
    assert (zeros == 8).all()
    values = codes.T ^ 8
    return {
        "_weight_qdata": (values[:, ::2] | values[:, 1::2] << 4).view(np.int8),
        "_weight_scale": scales,
        "_weight_zero_point": np.zeros_like(scales),
    }


def large(form: str, k=512, n=128, g=64, seed=0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Tensors of a layer with random values in a format, and its weight in float32."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (k, n), np.uint8)
    zeros = rng.integers(1, 16, (k // g, n), np.uint8)
    if form == "torchao":
        zeros = np.full_like(zeros, 8)
    scales = rng.uniform(0.01, 0.02, (k // g, n)).astype(np.float16)
    spread = lambda a: np.repeat(a.astype(np.float32), g, 0)
    weight = (codes - spread(zeros)) * spread(scales)
    return {f"{NAME}.{name}": a for name, a in write(form, codes, scales, zeros, g).items()}, weight
