"""Malformed checkpoints: the message names the file, the tensor, what was expected and what was got."""

import json

import ml_dtypes
import numpy as np
import pytest
from formats import large

from jax_w4a16 import checkpoint
from jax_w4a16.checkpoint import _files


def write(path, entries, data, *, length=None):
    """A safetensors file from a header and bytes, however wrong."""
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    size = len(header) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + header + data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = [
    (b"", b"", 9, "header: expected at most 0 bytes, got 9 .truncated"),
    (b"{}", b"", 2**63, "header: expected at most 2 bytes, got 9223372036854775808"),
    (b"[]", b"", None, "header: expected a JSON object: got list"),
    (b"{", b"", None, "header: expected a JSON object"),
    (b"\xff\xfe", b"", None, "header: expected a JSON object"),
    (b"[" * 100_000, b"", None, "header: expected a JSON object"),
    (b'{"a": 1, "a": 2}', b"", None, "a name occurs twice"),
    ({"__metadata__": {"a": 1}}, b"", None, "__metadata__: expected texts by name"),
    ({"a": 3}, b"", None, "a: entry: expected dtype, shape and data_offsets, got 3"),
    ({"a": {"dtype": "F32"}}, b"", None, "a: entry: expected dtype, shape and data_offsets"),
    ({"a": entry("F31")}, bytes(8), None, "a: dtype: expected one of BOOL, .* got F31"),
    ({"a": entry([])}, bytes(8), None, "a: dtype: expected one of"),
    ({"a": entry(shape=(-2,))}, bytes(8), None, "a: shape: expected at most 16 sizes of at least 0, got"),
    ({"a": entry(shape=(2.0,))}, bytes(8), None, "a: shape: expected"),
    ({"a": entry(shape=(True,))}, bytes(8), None, "a: shape: expected"),
    ({"a": entry(shape=(1,) * 17)}, bytes(8), None, "a: shape: expected at most 16"),
    ({"a": entry(shape=(2**62, 2**62, 4))}, bytes(8), None, r"a: data_offsets: expected \d+ bytes for F32"),
    (
        {"a": entry(shape=(2**62, 8))},
        bytes(8),
        None,
        r"a: data_offsets: expected 147573952589676412928 bytes",
    ),
    (
        {"a": entry(shape=(2**31, 0), offsets=(0, 0))},
        b"",
        None,
        "a: shape: expected sizes below 2.31 where one",
    ),
    ({"a": entry(offsets=(8, 0))}, bytes(8), None, r"a: data_offsets: expected 8 bytes .* got \[8, 0\]"),
    ({"a": entry(offsets=(0,))}, bytes(8), None, "a: data_offsets: expected two sizes"),
    ({"a": entry(), "b": entry()}, bytes(8), None, "b: expected data from byte 8, got 0: an overlap"),
    ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), None, "from byte 8, got 4: an overlap"),
    ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20), None, "from byte 8, got 12: a hole"),
    ({"a": entry()}, bytes(7), None, "expected 8 bytes of tensors, as the header says, got 7: truncated"),
    ({"a": entry()}, bytes(9), None, "got 9: something follows them"),
    ({"a": entry(offsets=(2**63, 2**63 + 8))}, bytes(8), None, "a: data_offsets: expected two sizes"),
]


@pytest.mark.parametrize(("entries", "data", "length", "message"), HEADERS)
def test_header(entries, data, length, message, tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, entries, data, length=length)
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("data", [b"", b"1234567"])
def test_short_file(data, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"x.safetensors: header: expected"):
        checkpoint.load(tmp_path)


def test_empty_file(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x.safetensors: header: expected at least 8 bytes, got 0"):
        checkpoint.load(tmp_path)


def test_no_metadata(tmp_path):
    write(tmp_path / "x.safetensors", {"__metadata__": None, "a": entry()}, bytes(8))
    assert set(checkpoint.load(tmp_path)) == {"a"}


def test_scales_of_microscaling_formats(tmp_path):
    """Exponents alone (F8_E8M0), beside a tensor that safetensors itself reads."""
    entries = {"a": entry("F8_E8M0", offsets=(0, 2)), "b": entry(offsets=(2, 10))}
    write(tmp_path / "x.safetensors", entries, bytes([127, 128]) + bytes(8))
    got = checkpoint.load(tmp_path)
    assert got["a"].dtype == ml_dtypes.float8_e8m0fnu
    np.testing.assert_array_equal(np.asarray(got["a"]).astype(np.float32), [1, 2])
    checkpoint.save(tmp_path / "out", got)
    assert checkpoint.load(tmp_path / "out")["a"].dtype == got["a"].dtype


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing: expected a safetensors file, got none"):
        checkpoint.load(tmp_path / "nothing")
    with pytest.raises(
        FileNotFoundError, match=r"expected a .safetensors file or model.safetensors.index.json"
    ):
        checkpoint.load(tmp_path)


def two_files(folder):
    for name in "ab":
        write(folder / f"{name}.safetensors", {name: entry()}, bytes(8))


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([], ValueError, "expected a JSON object: got list"),
        ({}, ValueError, "expected a weight_map, got NoneType"),
        ({"weight_map": []}, ValueError, "expected a weight_map, got list"),
        ({"weight_map": {"a": 3}}, ValueError, "a: expected a file inside the folder, got 3"),
        (
            {"weight_map": {"a": "c.safetensors"}},
            FileNotFoundError,
            "c.safetensors: expected a safetensors file",
        ),
        (
            {"weight_map": {"a": "b.safetensors"}},
            ValueError,
            "a: expected it in b.safetensors, got a file without",
        ),
        ({"weight_map": {"a": "config.json"}}, ValueError, "a: expected a file inside the folder"),
        *(
            ({"weight_map": {"a": path}}, ValueError, "a: expected a file inside the folder, got ")
            for path in (
                "../a.safetensors",
                "x/../../a.safetensors",
                "/etc/a.safetensors",
                "\\\\host\\a.safetensors",
                "C:\\a.safetensors",
                "C:a.safetensors",
                "..\\a.safetensors",
                "a\0.safetensors",
            )
        ),
    ],
)
def test_index(index, error, message, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    two_files(folder)
    two_files(tmp_path)
    (folder / _files.INDEX).write_text(json.dumps(index))
    with pytest.raises(error, match=message) as raised:
        checkpoint.load(folder)
    assert str(folder) in str(raised.value)


def test_index_decides(tmp_path):
    two_files(tmp_path)
    assert set(checkpoint.load(tmp_path)) == {"a", "b"}
    (tmp_path / _files.INDEX).write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
    assert set(checkpoint.load(tmp_path)) == {"a"}
    (tmp_path / _files.INDEX).unlink()
    write(tmp_path / "c.safetensors", {"a": entry()}, bytes(8))
    with pytest.raises(
        ValueError, match=r"c.safetensors: a: expected it in one file, got it in a.safetensors too"
    ):
        checkpoint.load(tmp_path)


def test_one_of_several_files_is_missing(tmp_path):
    for number in (1, 2, 4):
        write(tmp_path / f"model-{number:05d}-of-00004.safetensors", {f"t{number}": entry()}, bytes(8))
    message = (
        r"model-00003-of-00004.safetensors: expected it beside model-00001-of-00004.safetensors, got none"
    )
    with pytest.raises(FileNotFoundError, match=message):
        checkpoint.load(tmp_path)
    write(tmp_path / "model-00003-of-00004.safetensors", {"t3": entry()}, bytes(8))
    assert set(checkpoint.load(tmp_path)) == {"t1", "t2", "t3", "t4"}


def test_configuration(tmp_path):
    two_files(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: expected a JSON object"):
        checkpoint.load(tmp_path)


def change(name, value):
    return lambda tensors: tensors | {f"a.proj.{name}": value(tensors[f"a.proj.{name}"])}


def drop(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != f"a.proj.{name}"}


LAYERS = [
    ("ct", drop("weight_scale"), "a.proj.weight_scale: expected it beside a.proj.weight_packed, got none"),
    ("ct", drop("weight_shape"), "a.proj.weight_shape: expected it beside"),
    ("ct", change("weight_packed", lambda a: a.view(np.uint32)), "weight_packed: expected type I32, got U32"),
    ("ct", change("weight_packed", lambda a: a[:-1]), r"weight_packed: expected shape \[N, ceil\(K/8\)\]"),
    ("ct", change("weight_shape", lambda a: a[::-1]), "weight_packed: expected shape"),
    ("ct", change("weight_shape", lambda a: -a), "weight_packed: expected shape"),
    ("ct", change("weight_shape", lambda a: a * 2**40), "weight_packed: expected shape"),
    ("ct", change("weight_shape", lambda a: a[:1]), r"weight_shape: expected shape \[2\], got \[1\]"),
    (
        "ct",
        change("weight_scale", lambda a: a[:, :7]),
        "weight_scale: expected a number of groups that divides",
    ),
    (
        "ct",
        change("weight_scale", lambda a: np.repeat(a, 4, 1)),
        "expected groups of a multiple of 32, got groups",
    ),
    ("ct", change("weight_scale", lambda a: a[:, :0]), "weight_scale: expected a tensor that is not empty"),
    (
        "torchao",
        change("_weight_qdata", lambda a: a[:0]),
        "_weight_qdata: expected a tensor that is not empty",
    ),
    ("awq_gemv", lambda t: {name: a[:, :0] for name, a in t.items()}, "expected a tensor that is not empty"),
    ("ct", change("weight_scale", lambda a: a.astype(int)), "weight_scale: expected type F16 or BF16 or F32"),
    (
        "ct",
        change("weight_zero_point", lambda a: a[:-1]),
        r"zero_point: expected shape \[16, 8\], got \[15, 8\]",
    ),
    ("gptq", drop("qzeros"), "a.proj.qzeros: expected it beside a.proj.qweight, got none"),
    ("gptq", change("qzeros", lambda a: a[:-1]), r"a.proj.qzeros: expected shape \[8, 16\], got \[7, 16\]"),
    ("gptq", change("scales", lambda a: a[:5]), r"a.proj.qzeros: expected shape \[5, 16\], got \[8, 16\]"),
    (
        "gptq",
        lambda t: change("scales", lambda a: a[:5])(change("qzeros", lambda a: a[:5])(t)),
        "a.proj.scales: expected a number of groups that divides K = 512, got",
    ),
    ("gptq", change("qweight", lambda a: a.astype(np.int64)), "a.proj.qweight: expected type I32, got I64"),
    (
        "awq_gemm",
        change("qweight", lambda a: a[:100]),
        "a.proj.scales: expected a number of groups that divides",
    ),
    ("awq_gemm", change("scales", lambda a: a[:, :-8]), "a.proj."),
    ("awq_gemv", change("qzeros", lambda a: a[:, :1]), "a.proj.scales: expected shape"),
    ("hqq", drop("zero"), "a.proj.zero: expected it beside a.proj.W_q, got none"),
    ("hqq", change("shape", lambda a: a * 2), r"a.proj.W_q: expected shape \[N G / 2, g\] for a weight"),
    ("hqq", change("W_q", lambda a: a.reshape(-1, 16)), r"a.proj.W_q: expected shape"),
    (
        "torchao",
        drop("_weight_scale"),
        "a.proj._weight_scale: expected it beside a.proj._weight_qdata, got none",
    ),
    ("torchao", change("_weight_qdata", lambda a: a[:-1]), r"_weight_scale: expected shape \[any, 127\]"),
    (
        "torchao",
        change("_weight_zero_point", lambda a: a[:-1]),
        r"_weight_zero_point: expected shape \[8, 128\]",
    ),
]


@pytest.mark.parametrize(("form", "spoil", "message"), LAYERS)
def test_layer(form, spoil, message, tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "x.safetensors"
    tensors, _ = large(form)
    good = {name: np.ascontiguousarray(a) for name, a in tensors.items()}
    save_file(good, path)
    checkpoint.load(path)
    save_file({name: np.ascontiguousarray(a) for name, a in spoil(good).items()}, path)
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("form", "config", "message"),
    [
        ("gptq", {"bits": 8}, "bits: expected 4, got 8"),
        ("awq_gemm", {"w_bit": 3}, "bits: expected 4, got 3"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format: expected .* got 'marlin'"),
    ],
)
def test_configuration_of_a_layer(form, config, message, tmp_path):
    from safetensors.numpy import save_file

    save_file({k: np.ascontiguousarray(a) for k, a in large(form)[0].items()}, tmp_path / "x.safetensors")
    (tmp_path / "quantize_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"quantize_config\.json: {message}"):
        checkpoint.load(tmp_path)


def own(**changes):
    layers = json.dumps({"a": {"k": 512, "group_size": 64}})
    return {"format": "jax_w4a16", "schema": "1", "layers": layers} | changes


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (own(schema="2"), "schema: expected '1', got '2'"),
        (own(layers=""), "layers: expected k and group_size by name"),
        (own(layers="[1]"), "layers: expected k and group_size by name"),
        (own(layers='{"a": {"k": 512}}'), "layers: expected k and group_size by name"),
        (own(layers='{"a": {"k": 512.0, "group_size": 64}}'), "layers: expected k and group_size by name"),
        (
            own(layers='{"b": {"k": 512, "group_size": 64}}'),
            "b.qweight: expected it, as layers says, got none",
        ),
        (
            own(layers='{"a": {"k": 513, "group_size": 64}}'),
            r"a.qweight: expected shape \[9, 8, 128\] for K = 513",
        ),
        (
            own(layers='{"a": {"k": 512, "group_size": 32}}'),
            r"a.scales: expected shape \[16, 128\] for K = 512",
        ),
        (
            own(layers='{"a": {"k": 512, "group_size": 48}}'),
            "a.qweight: expected k of at least 0 and groups of a",
        ),
        (own(layers='{"a": {"k": -1, "group_size": 64}}'), "a.qweight: expected k of at least 0"),
        *(
            (own(layers=json.dumps({"a": {"k": 512, "group_size": 64, "fields": fields}})), message)
            for fields, message in (
                (["qweight", "scales", "zeros"], "a.zeros: expected it, as layers says, got none"),
                (["qweight"], "layers: expected k and group_size by name .and fields., got"),
                (["qweight", "scales", "codes"], "layers: expected k and group_size by name"),
                ("qweight", "layers: expected k and group_size by name"),
                (None, "layers: expected k and group_size by name"),
                ([[]], "layers: expected k and group_size by name"),
            )
        ),
    ],
)
def test_own_schema(metadata, message, tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "x.safetensors"
    tensors = {"a.qweight": np.zeros((8, 8, 128), np.uint32), "a.scales": np.ones((8, 128), np.float16)}
    save_file(tensors, path, metadata=own())
    checkpoint.load(path)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.load(path)
    assert str(path) in str(error.value)
