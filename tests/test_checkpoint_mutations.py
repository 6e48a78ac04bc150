"""Seeded mutations of small checkpoints of every format: each loads, or raises one clear error."""

import json
import resource
import shutil
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from test_checkpoint_formats import CASES, GOLDEN, expected_of

import jax_w4a16
from jax_w4a16 import checkpoint
from jax_w4a16.checkpoint import _files, _header

COUNT = 1200
KINDS = ("truncate", "extend", "flip", "header byte", "field", "drop", "rename", "index", "config")
DTYPES = (*_header.DTYPES, "F4", "", None, 3)
SIZES = (0, 1, -1, 2, 7, 31, 2**31, 2**62, 2**63, 10**30, 1.5, "8", None, True)
FIELDS = (["qweight", "scales"], ["qweight", "scales", "input_scale"], ["scales"], "qweight", [[]], 3, None)


def base(case: str, folder: Path) -> None:
    """A folder of one file, with an index and a configuration."""
    if case == "own":
        w = jax.numpy.asarray(expected_of("hqq"))
        qw = jax_w4a16.quantize(w, group_size=32, symmetric=False)
        checkpoint.save(folder / "model.safetensors", {"a.proj": qw, "norm": w[0]})
    else:
        shutil.copy(GOLDEN / f"{case}.safetensors", folder / "model.safetensors")
        if (GOLDEN / f"{case}.json").exists():
            quantization = json.loads((GOLDEN / f"{case}.json").read_text())
            (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    names = [name for name in parts(folder / "model.safetensors")[0] if name != "__metadata__"]
    (folder / _files.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))


def parts(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(path: Path, header, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def mutate(kind: str, folder: Path, rng: np.random.Generator) -> str:
    """Changes one thing in a folder; says what."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    pick = lambda values: values[rng.integers(len(values))]
    if kind == "truncate":
        end = int(rng.integers(len(data)))
        path.write_bytes(data[:end])
        return f"to {end} bytes"
    if kind == "extend":
        path.write_bytes(bytes(data) + rng.bytes(int(rng.integers(1, 100))))
        return "with noise"
    if kind in ("flip", "header byte"):
        end = len(data) if kind == "flip" else 8 + int.from_bytes(data[:8], "little")
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(end)] = rng.integers(256)
        path.write_bytes(data)
        return "some bytes"
    header, tensors = parts(path)
    names = [name for name in header if name != "__metadata__"]
    name = pick(names)
    if kind == "field":
        field = pick(("dtype", "shape", "data_offsets", "whole", "metadata"))
        if field == "dtype":
            header[name]["dtype"] = pick(DTYPES)
        elif field == "whole":
            header[name] = pick((None, [], {}, header[pick(names)]))
        elif field == "metadata":
            text = header.setdefault("__metadata__", {"layers": "{}"})
            key = pick(list(text))
            noise = json.dumps(
                {"a.proj": {"k": pick(SIZES), "group_size": pick(SIZES), "fields": pick(FIELDS)}}
            )
            text[key] = pick(("", "[]", "{}", "[" * 20000, noise, text[key][::-1]))
        else:
            values = header[name][field] or [0]
            at = rng.integers(len(values))
            values[at] = pick((*SIZES, values[at] * 2, values[at] // 2, values[at] + 8, values[::-1]))
            header[name][field] = pick((values, values, values[1:], values * 2))
        rewrite(path, header, tensors)
        return f"{field} of {name}"
    if kind in ("drop", "rename"):
        contents = {}
        for other in names:
            first, last = header[other]["data_offsets"]
            contents[other] = header[other], tensors[first:last]
        if kind == "drop":
            del contents[name]
        else:
            other = pick(names)
            contents[name], contents[other] = contents[other], contents[name]
        out, end, renewed = b"", 0, {k: v for k, v in header.items() if k == "__metadata__"}
        for other, (entry, part) in contents.items():
            renewed[other] = {**entry, "data_offsets": [end, end + len(part)]}
            out, end = out + part, end + len(part)
        rewrite(path, renewed, out)
        if kind == "drop" and rng.integers(2):
            (folder / _files.INDEX).unlink()
        return name
    if kind == "index":
        index = json.loads((folder / _files.INDEX).read_text())
        target = pick(("../x.safetensors", "/etc/passwd", "", ".", None, 3, "y.safetensors", [], "\0"))
        index["weight_map"][pick((name, "new"))] = target
        index = pick((index, index, index, [], {}, {"weight_map": 3}))
        (folder / _files.INDEX).write_text(json.dumps(index)[: pick((None, None, None, 20))])
        return str(target)
    config = folder / "config.json"
    content = json.loads(config.read_text()) if config.exists() else {"quantization_config": {}}
    key = pick((*content["quantization_config"], "group_size", "bits", "checkpoint_format", "meta", "sym"))
    value = pick((*SIZES, [], {}, "gptq", "gptq_v2", 32, 64, 128, -1, {"group_0": 3}, {"a": {"weights": 1}}))
    content["quantization_config"][key] = value
    config.write_text(json.dumps(content))
    return f"{key} = {value!r}"


@pytest.mark.filterwarnings("ignore:.*zero points:UserWarning")
@pytest.mark.filterwarnings("ignore:.*no 4-bit layer was found:UserWarning")
@pytest.mark.filterwarnings("ignore:.*modules that are not of 4 bits:UserWarning")
def test_mutations(tmp_path, capsys):
    """No crash, nothing but the documented errors, each of which names a file, and bounded memory."""
    forms = (*CASES, "own")
    for case in forms:
        (tmp_path / case).mkdir()
        base(case, tmp_path / case)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint.load(tmp_path / case)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = {"loaded": 0, "refused": 0}
    for seed in range(COUNT):
        rng = np.random.default_rng(seed)
        case, kind = forms[seed % len(forms)], KINDS[rng.integers(len(KINDS))]
        folder = tmp_path / "mutant"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / case, folder)
        what = mutate(kind, folder, rng)
        repro = f"seed {seed}: {case}: {kind}: {what}"
        try:
            for value in checkpoint.load(folder, progress=False).values():
                if isinstance(value, jax_w4a16.QuantizedWeight):
                    value.validate()
            counts["loaded"] += 1
        except (ValueError, FileNotFoundError) as error:
            if str(folder) not in str(error):
                pytest.fail(f"{repro}: {error}")
            counts["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"{repro}: {type(error).__name__}: {error}") from error
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    with capsys.disabled():
        print(f" {COUNT} mutations: {counts}, {grown:.0f} MiB more memory ", end="")
    assert min(counts.values()) >= COUNT // 10
    assert grown < 200
