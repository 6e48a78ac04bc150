"""Makes the checkpoints of this folder with the packages of those who write such files. A development tool.

Each case is one layer [K = 96, N = 16] (AWQ: 32) in groups of 32: <case>.safetensors as its producer writes
it, <case>.json (its quantization_config) where it has one, and <case>.expected.npy, the weight [K, N] that
the producer's own dequantiser gives.

    python make.py FOLDER

needs torch (CPU), safetensors, transformers, numpy, torchao 0.18.0 and compressed-tensors 0.20.0 installed,
and in FOLDER the unpacked sources of autoawq 0.2.9, gptqmodel 7.7.0, hqq 0.2.8.post1 and compressed_tensors
0.9.4 (the last with activation order). Those import much that packing on a CPU does not need: what is not
installed is replaced by a mock. torchao packs with a CUDA package, whose order (low nibble = even k) is here.
"""

import importlib
import importlib.machinery
import json
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
K, N, GROUP = 96, 16, 32
GROUPS = K // GROUP
ABSENT = (
    *("PIL", "datasets", "pyarrow", "accelerate", "dill", "requests", "tokenicer", "device_smi", "defuser"),
    *("threadpoolctl", "logbar", "pcre", "google", "termcolor", "torchvision", "random_word"),
)


class Absent(importlib.machinery.PathFinder):
    """Finds the packages that are not installed: mocks."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            return importlib.machinery.ModuleSpec(name, cls, is_package=True)
        return None

    @staticmethod
    def create_module(spec):
        module = mock.MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
        return module

    @staticmethod
    def exec_module(module):
        pass


def bare(folder: Path, *packages: str) -> None:
    """Packages whose __init__ is not run."""
    for package in packages:
        module = types.ModuleType(package)
        module.__path__ = [str(folder / package.replace(".", "/"))]
        module.DEBUG_ON, module.DEVICE_THREAD_POOL = False, mock.MagicMock()
        sys.modules[package] = module


def store(case: str, tensors, expected, config=None, metadata=None) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, HERE / f"{case}.safetensors", metadata=metadata)
    (HERE / f"{case}.safetensors").chmod(0o644)
    if config is not None:
        (HERE / f"{case}.json").write_text(json.dumps(config) + "\n")
    expected = expected.detach()
    if expected.dtype == torch.bfloat16:
        expected = expected.view(torch.int16)
    np.save(HERE / f"{case}.expected.npy", expected.contiguous().numpy())
    print(case)


def parts(dtype=torch.float16, low=0, n=N):
    """Codes [K, N], zeros [G, N] and scales [G, N], and the weight they make in float32."""
    codes = torch.randint(0, 16, (K, n))
    zeros = torch.randint(low, 16, (GROUPS, n))
    zeros[0, ::5] = low
    scales = ((torch.rand(GROUPS, n) + 0.5) * 0.01).to(dtype)
    spread = lambda a: a.repeat_interleave(GROUP, 0)
    return codes, zeros, scales, (codes - spread(zeros)).float() * spread(scales).float()


def linear(weight):
    """A torch layer [K, N], with a bias."""
    layer = torch.nn.Linear(*weight.shape)
    layer.weight.data = weight.T.contiguous()
    layer.bias.data = torch.arange(weight.shape[1], dtype=torch.float32)
    return layer


def compressed_tensors_cases() -> None:
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor as Compressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    for case, symmetric, strategy in (
        ("symmetric", True, "group"),
        ("asymmetric", False, "group"),
        ("channel", True, "channel"),
    ):
        arguments = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": strategy}
        if strategy == "group":
            arguments["group_size"] = GROUP
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
        _, zeros, scales, weight = parts(torch.bfloat16)
        groups = GROUPS if strategy == "group" else 1
        state = {"weight": weight.T.contiguous().bfloat16(), "weight_scale": scales[:groups].T.contiguous()}
        zero = torch.zeros(N, groups) if symmetric else zeros.T - 8
        state["weight_zero_point"] = zero.to(torch.int8)
        packed = Compressor.compress(state, scheme)
        expected = Compressor.decompress(packed, scheme)["weight"].T
        config = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": arguments}},
        }
        store(f"ct_{case}", {f"a.proj.{k}": v for k, v in packed.items()}, expected, config)


def compressed_tensors_act_order(folder: Path) -> None:
    for name in [name for name in sys.modules if name.startswith("compressed_tensors")]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    from compressed_tensors.compressors import PackedQuantizationCompressor as Compressor
    from compressed_tensors.compressors.quantized_compressors.pack_quantized import unpack_from_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    args = QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=GROUP, actorder="group")
    _, zeros, scales, weight = parts()
    g_idx = (torch.randperm(K) // GROUP).to(torch.int32)
    weight = weight[torch.argsort(torch.argsort(g_idx, stable=True))].half()
    compressor = Compressor()
    zero = (zeros.T - 8).to(torch.int8).contiguous()
    state = {
        "weight": weight.T.contiguous(),
        "scale": scales.T.contiguous(),
        "zero_point": zero,
        "g_idx": g_idx,
    }
    packed = compressor.compress_weight(**state, quantization_args=args)
    packed |= {"weight_scale": scales.T.contiguous(), "weight_g_idx": g_idx}
    codes = unpack_from_int32(
        packed["weight_packed"], 4, torch.Size((N, K))
    )  # its decompressor: symmetric only
    expected = dequantize(codes, scales.T.contiguous(), zero, args=args, g_idx=g_idx).T
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    store("ct_act_order", {f"a.proj.{k}": v for k, v in packed.items()}, expected, config)


def awq_cases(folder: Path) -> None:
    bare(folder, "awq", "awq.modules", "awq.modules.linear", "awq.utils")
    sys.path.insert(0, str(folder))
    gemm = importlib.import_module("awq.modules.linear.gemm")
    gemv = importlib.import_module("awq.modules.linear.gemv")
    packing = importlib.import_module("awq.utils.packing_utils")
    gemm.get_best_device = lambda: "cpu"
    _, zeros, scales, weight = parts(n=32)  # the packer drops what is left of 32 columns
    layer = linear(weight)
    made = gemm.WQLinear_GEMM.from_linear(layer, 4, GROUP, False, scales, zeros)
    expected = packing.dequantize_gemm(made.qweight, made.qzeros, made.scales, 4, GROUP)
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    store("awq_gemm", {f"a.proj.{k}": v for k, v in made.state_dict().items()}, expected, config)
    made = gemv.WQLinear_GEMV.from_linear(layer, 4, GROUP, False, scales.T.contiguous(), zeros.T.contiguous())
    config |= {"version": "gemv"}  # its dequantiser is a CUDA kernel; the same layer's through gemm stands
    store("awq_gemv", {f"a.proj.{k}": v for k, v in made.state_dict().items()}, expected, config)


def gptq_cases(folder: Path) -> None:
    bare(folder, "gptqmodel", "gptqmodel.models", "gptqmodel.nn_modules")
    sys.path.insert(0, str(folder))
    module = importlib.import_module("gptqmodel.nn_modules.qlinear.torch")
    convert = importlib.import_module("gptqmodel.utils.model").convert_gptq_v2_to_v1_format_module

    def make(
        case: str, *, sym=False, desc_act=False, v1=False, label=None, quantizer="gptqmodel:7.7.0", low=0
    ):
        _, zeros, scales, weight = parts(low=low)
        if sym:
            zeros = torch.full_like(zeros, 8)
            weight = weight.clamp(
                -8 * scales.repeat_interleave(GROUP, 0), 7 * scales.repeat_interleave(GROUP, 0)
            )
        g_idx = torch.arange(K) // GROUP
        if desc_act:
            g_idx = torch.randperm(K) // GROUP
            weight = weight[torch.argsort(torch.argsort(g_idx, stable=True))]
        made = module.TorchLinear(
            bits=4, group_size=GROUP, sym=sym, desc_act=desc_act, in_features=K, out_features=N, bias=True,
            pack_dtype=torch.int32, adapter=None, register_buffers=True,
        )  # fmt: skip
        made.pack_original(linear(weight), scales.T.contiguous(), zeros.T.contiguous(), g_idx.to(torch.int32))
        made.post_init()
        expected = made.dequantize_weight().half()
        if v1:
            convert(made, types.SimpleNamespace(bits=4, pack_dtype=torch.int32))
        label = label or ("gptq" if v1 else "gptq_v2")
        config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": desc_act, "sym": sym}
        config |= {"checkpoint_format": label, "meta": {"quantizer": [quantizer]}}
        names = ("qweight", "qzeros", "scales", "g_idx", "bias")
        store(case, {f"a.proj.{k}": getattr(made, k) for k in names}, expected, config)

    make("gptq_v2")
    make("gptq_v1", v1=True)
    make("gptq_v1_symmetric", v1=True, sym=True)
    make("gptq_desc_act", v1=True, desc_act=True, low=1, quantizer="auto_gptq:0.7.1")
    make("gptq_v1_label_v2_zeros", sym=True, label="gptq")


def hqq_cases(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    quantize = importlib.import_module("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=GROUP, axis=1)
    config["weight_quant_params"]["optimize"] = False
    made = quantize.HQQLinear(linear(torch.randn(K, N)), config, compute_dtype=torch.float16, device="cpu")
    meta = {
        k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in made.meta.items()
    }
    expected = quantize.Quantizer.dequantize(made.W_q.data, meta | {"compute_dtype": torch.float32}).T
    store("hqq", {f"a.proj.{k}": v for k, v in made.state_dict().items()}, expected)


def torchao_cases() -> None:
    from torchao.prototype.gptq.api import _int4_row_dequantize_zp as dequantize
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Int4Tensor

    scales = torch.exp2(torch.randint(-8, -5, (GROUPS, N)).float()).bfloat16()
    fractional = ((torch.rand(GROUPS, N) + 0.5) * 0.01).bfloat16()
    for case, scale, zero in (
        ("torchao", fractional, (torch.randn(GROUPS, N) * 0.01).bfloat16()),
        ("torchao_exact", scales, (scales.float() * torch.randint(-7, 8, (GROUPS, N))).bfloat16()),
        ("torchao_symmetric", fractional, torch.zeros(GROUPS, N).bfloat16()),
    ):
        values = torch.randint(-8, 8, (N, K)).to(torch.int8)
        qdata = (values[:, ::2] & 15) | (values[:, 1::2] << 4)
        tensor = Int4Tensor(qdata, scale, zero, [1, GROUP], torch.Size((N, K)))
        tensors, metadata = flatten_tensor_state_dict({"a.proj.weight": tensor})
        expected = dequantize(values.float(), scale.float(), zero.float(), GROUP).T
        store(case, tensors, expected.float(), metadata=metadata)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    sys.meta_path.append(Absent)
    compressed_tensors_cases()
    hqq_cases(next(folder.glob("hqq-*")))
    awq_cases(next(folder.glob("autoawq-*")))
    torchao_cases()
    gptq_cases(next(folder.glob("gptqmodel-*")))
    compressed_tensors_act_order(next(folder.glob("compressed_tensors-*")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
