"""The commands `convert`, to our own checkpoint schema, and `inspect`."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_w4a16 import _checks, _layout, _progress, _rules
from jax_w4a16._quantize import quantize
from jax_w4a16.checkpoint import _files, _header, _layer, _load, _save
from jax_w4a16.checkpoint._write import Entry, Item, replacing, write

_QUANTIZABLE = ("F16", "BF16", "F32")
# Of a folder's other files: configurations, tokenizers and chat templates, but none about its tensors.
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "tokenizer*", "vocab*")
_LEFT = ("*.index.json", "quantize_config.json", "quant_config.json", "*.safetensors")


class Quantized:
    """A float weight of a checkpoint, quantised when its parts are read, and what that cost."""

    def __init__(self, tensor: _files.Tensor, group_size: int):
        self.tensor, self.error = tensor, math.nan
        n, k = tensor.shape
        self.k, self.n, self.size = k, n, _checks.group_size(group_size, k)
        self._parts: dict[str, np.ndarray] = {}

    def items(self, name: str) -> dict[str, Item]:
        """The tensors that are written for it."""
        dtype = self.tensor.dtype if self.tensor.dtype.itemsize == 2 else _header.DTYPES["BF16"]
        scales = Item(dtype, (_layout.num_groups(self.k, self.size), self.n), self._reader("scales"))
        qweight = Item(np.dtype(np.uint32), _layout.packed_shape(self.k, self.n), self._reader("qweight"))
        return {f"{name}.qweight": qweight, f"{name}.scales": scales}

    def _reader(self, field: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            if not self._parts:
                self._quantize()
            return self._parts.pop(field)

        return read

    def _quantize(self) -> None:
        w = jax.device_put(self.tensor.read().T)
        qw = quantize(w, group_size=-1 if self.size >= self.k else self.size)
        largest = abs(w).max(initial=0)
        error = abs(qw.dequantize("float32") - w.astype("float32")).max(initial=0)
        self.error = float(error) / float(largest) if largest else float(error)
        self._parts = {"qweight": np.asarray(qw.qweight), "scales": np.asarray(qw.scales)}


def convert(
    source: Path, target: Path, *, quantize: bool, group_size: int, include: str | None, exclude: str | None
) -> int:
    """Writes a checkpoint of any format that `load` reads in our own schema; prints a table.

    Args:
      source: as `load`'s path.
      target: as `save`'s path; a link is replaced, not followed. A folder also gets the source folder's
        configurations and tokenizer.
      quantize: also quantise float weights [N, K] named `*.weight`, to nearest.
      group_size: for those.
      include: only those whose name matches this regular expression.
      exclude: not those whose name matches this; default: what `quantize_model` leaves as it is by default.

    Returns:
      The exit status, 0. Errors are raised, as `load` and `save` do.
    """
    checkpoint = _load.open_checkpoint(source)
    layers, others = _load.find(checkpoint)
    wanted = re.compile(include or "").search
    unwanted = re.compile(exclude if exclude is not None else _rules.DEFAULT_SKIP).search

    entries = [_save.entry_of_layer(name, layer) for name, layer in layers.items()]
    quantized: dict[str, Quantized] = {}
    for name, tensor in others.items():
        module = name.removesuffix(".weight")
        if quantize and _is_weight(name, tensor) and wanted(name) and not unwanted(name):
            made = quantized[module] = Quantized(tensor, group_size)
            sizes = {"k": made.k, "group_size": -1 if made.size >= made.k else made.size}
            entries.append(Entry(module, made.items(module), sizes))
        else:
            entries.append(Entry(name, {name: Item(tensor.dtype, tensor.shape, tensor.read)}))
    with _progress.Progress(len(entries)) as bar:

        def step(name: str) -> None:
            checkpoint.close()
            bar.step(name)

        write(target, entries, _save.MAX_FILE_BYTES, step)
    if checkpoint.path.is_dir() and target.is_dir():
        _copy_the_rest(checkpoint.path, target)

    before, after = _bytes(checkpoint, layers, quantized, entries)
    kinds = {
        "4-bit layers, repacked": list(layers),
        "layers quantised": list(quantized),
        "other tensors": [name for name in after if name not in layers and name not in quantized],
        "all": list(after),
    }
    print(f"{'':24}{'number':>8}{'bytes before':>18}{'bytes after':>18}")
    for kind, names in kinds.items():
        old, new = (sum(sizes[name] for name in names) for sizes in (before, after))
        print(f"{kind:24}{len(names):>8}{old:>18,}{new:>18,}")
    if quantized:
        error = lambda name: (math.isnan(quantized[name].error), quantized[name].error)
        name = max(quantized, key=error)
        print(f"worst error: {quantized[name].error:.4f} of the largest weight, in {name}")
    return 0


def _is_weight(name: str, tensor: _files.Tensor) -> bool:
    matrix = len(tensor.shape) == 2 and min(tensor.shape) > 0
    return name.endswith(".weight") and matrix and _header.NAMES[tensor.dtype] in _QUANTIZABLE


def _bytes(checkpoint, layers, quantized, entries) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes before and after, by the names of entries."""
    before = {name: _size(tensor) for name, tensor in checkpoint.tensors.items()}
    before |= {name: layer.stored_bytes for name, layer in layers.items()}
    before |= {name: _size(made.tensor) for name, made in quantized.items()}
    return before, {entry.name: sum(item.nbytes for item in entry.items.values()) for entry in entries}


def _copy_the_rest(source: Path, target: Path) -> None:
    """Configuration and tokenizer; without the quantisation that the tensors no longer have."""
    names = {file.name for pattern in _COPIED for file in source.glob(pattern) if file.is_file()}
    for name in sorted(names - {file.name for pattern in _LEFT for file in source.glob(pattern)}):
        content = (source / name).read_bytes()
        if name == "config.json":
            content = _unquantized(_header.read_json(source / name))
        with replacing(target / name) as (temporary,):
            temporary.write_bytes(content)


def _unquantized(config: dict[str, Any]) -> bytes:
    """The text of a config.json without what it says of quantisation."""
    bare = lambda part: {key: part[key] for key in part if key not in _files.QUANTIZATION}
    config = bare(config)
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = bare(config["text_config"])
    return (json.dumps(config, indent=2) + "\n").encode()


def inspect(path: Path) -> int:
    """Prints what a checkpoint holds.

    Returns:
      The exit status, 0. Errors are raised, as `load` does.
    """
    checkpoint = _load.open_checkpoint(path)
    layers, others = _load.find(checkpoint)
    lines = [(name, *_describe(layer)) for name, layer in layers.items()]
    lines += [
        (name, list(tensor.shape), _header.NAMES[tensor.dtype], _size(tensor), "")
        for name, tensor in others.items()
    ]
    width = max([len(line[0]) for line in lines], default=0)
    for name, shape, dtype, size, text in lines:
        print(f"{name:{width}}  {shape!s:16} {dtype:9}{size:>16,}  {text}".rstrip())
    total = sum(map(_size, checkpoint.tensors.values()))
    print(f"{len(layers)} 4-bit layers, {len(others)} other tensors, {total:,} bytes")
    return 0


def _describe(layer: _layer.Layer) -> tuple[list[int], str, int, str]:
    groups = "per column" if layer.group_size == -1 else f"groups of {layer.group_size}"
    zeros = "zero points" if "zeros" in layer.fields else "symmetric"
    order = ", act-order" if "permutation" in layer.fields else ""
    text = f"{layer.format}, {groups}, {zeros}{order}"
    return list(layer.shape), layer.dtypes["scales"].name, layer.stored_bytes, text


def _size(tensor: _files.Tensor) -> int:
    return tensor.dtype.itemsize * math.prod(tensor.shape)
