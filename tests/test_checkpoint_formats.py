"""Readers against the producers' own dequantisers, on files of the producers' own packages (golden/)."""

import contextlib
import json
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from formats import FORMS, NAME, large
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_w4a16
from jax_w4a16 import checkpoint
from jax_w4a16.checkpoint import _files, _layer, _load

GOLDEN = Path(__file__).parent / "golden"
K, GROUP = 96, 32

# what each case must come out as: format, type, zeros stored, permuted
CASES = {
    "ct_symmetric": ("compressed-tensors", "bfloat16", False, False),
    "ct_asymmetric": ("compressed-tensors", "bfloat16", True, False),
    "ct_channel": ("compressed-tensors", "bfloat16", False, False),
    "ct_act_order": ("compressed-tensors", "float16", True, True),
    "awq_gemm": ("AWQ gemm", "float16", True, False),
    "awq_gemv": ("AWQ gemv", "float16", True, False),
    "gptq_v1": ("GPTQ", "float16", True, False),
    "gptq_v1_symmetric": ("GPTQ", "float16", False, False),
    "gptq_v2": ("GPTQ", "float16", True, False),
    "gptq_desc_act": ("GPTQ", "float16", True, True),
    "gptq_v1_label_v2_zeros": ("GPTQ", "float16", False, False),
    "hqq": ("HQQ", "float16", True, False),
    "torchao_exact": ("torchao", "bfloat16", True, False),
    "torchao_symmetric": ("torchao", "bfloat16", False, False),
}


def folder_of(case: str, tmp_path: Path, **changes) -> Path:
    """A checkpoint folder of a case, with entries of its quantization_config changed or, if None, dropped."""
    folder = tmp_path / case
    folder.mkdir()
    shutil.copy(GOLDEN / f"{case}.safetensors", folder / "model.safetensors")
    config = GOLDEN / f"{case}.json"
    if config.exists():
        quantization = json.loads(config.read_text()) | changes
        quantization = {name: value for name, value in quantization.items() if value is not None}
        if quantization:
            (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return folder


def expected_of(case: str) -> np.ndarray:
    values = np.load(GOLDEN / f"{case}.expected.npy")
    return values.view(ml_dtypes.bfloat16) if values.dtype == np.int16 else values


def warns(case: str):
    if case != "gptq_v1_label_v2_zeros":
        return contextlib.nullcontext()
    return pytest.warns(UserWarning, match="labelled gptq, but the symmetric zero points of 1 layers .a.proj")


@pytest.mark.parametrize("case", CASES)
def test_equals_the_producers_dequantiser(case, tmp_path):
    """Bit for bit, through the packed layout and its CPU kernel."""
    form, dtype, zeros, permuted = CASES[case]
    with warns(case):
        folder = folder_of(case, tmp_path)
        layers, _ = _load.find(_load.open_checkpoint(folder))
    assert layers[NAME].format == form
    with warns(case):
        params = checkpoint.load(folder)
    qw = params.pop(NAME).validate()
    assert (qw.dtype, qw.zeros is not None, qw.permutation is not None) == (dtype, zeros, permuted)
    assert qw.group_size == (-1 if case == "ct_channel" else GROUP)
    want = expected_of(case)
    np.testing.assert_array_equal(np.asarray(qw.dequantize(want.dtype)), want)
    if f"{NAME}.bias" in params:
        np.testing.assert_array_equal(params.pop(f"{NAME}.bias"), np.arange(want.shape[1]))
    assert not params


@pytest.mark.parametrize("case", CASES)
def test_dot_applies_the_order(case, tmp_path):
    """One-hot rows of x give the rows of the weight, in the checkpoint's order."""
    with warns(case):
        qw = checkpoint.load(folder_of(case, tmp_path))[NAME]
    out = jax.jit(jax_w4a16.dot)(jnp.eye(K, dtype=qw.dtype), qw)
    np.testing.assert_array_equal(np.asarray(out), np.asarray(qw.dequantize()))


def test_torchao_zero_points_are_fractions(tmp_path):
    """Exact to float32's rounding in float32; to a 32nd of a scale where stored in bfloat16."""
    folder, want = folder_of("torchao", tmp_path), expected_of("torchao")
    scales = np.repeat(np.asarray(checkpoint.load(folder)[NAME].scales, np.float32), GROUP, 0)
    for dtype, bound in ((None, 2**-5), (jnp.float32, 2**-19)):
        got = np.asarray(checkpoint.load(folder, dtype=dtype)[NAME].dequantize(jnp.float32))
        assert (np.abs(got - want) <= bound * scales).all(), np.max(np.abs(got - want) / scales)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype(case, dtype, tmp_path):
    with warns(case):
        folder = folder_of(case, tmp_path)
        whole = checkpoint.load(folder)
    with warns(case):
        params = checkpoint.load(folder, dtype=dtype)
    assert {a.dtype for a in jax.tree.leaves(params)} <= {jnp.dtype(d) for d in (dtype, "uint32", "int32")}
    np.testing.assert_array_equal(params[NAME].scales, whole[NAME].scales.astype(dtype))
    np.testing.assert_array_equal(params[NAME].qweight, whole[NAME].qweight)


@pytest.mark.parametrize("case", ["ct_asymmetric", "awq_gemm", "awq_gemv", "hqq", "torchao_symmetric"])
def test_without_a_configuration(case, tmp_path):
    """The tensors alone tell."""
    want = checkpoint.load(folder_of(case, tmp_path))[NAME]
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(GOLDEN / f"{case}.safetensors", alone / "x.safetensors")
    got = checkpoint.load(alone / "x.safetensors")[NAME]
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
    ("case", "changes", "zero"),
    [
        ("gptq_v1_label_v2_zeros", {"checkpoint_format": "gptq_v2"}, 8),
        ("gptq_v1_label_v2_zeros", {"sym": False}, 9),  # asymmetric by its own word: the label counts
        ("gptq_v1_symmetric", {"sym": None}, 8),
        ("gptq_v1_symmetric", {"sym": False, "checkpoint_format": "gptq_v2"}, 7),
    ],
)
def test_which_zero_point(case, changes, zero, tmp_path):
    qw = checkpoint.load(folder_of(case, tmp_path, **changes))[NAME]
    assert {8} if qw.zeros is None else set(np.unique(qw.zeros)) == {zero}
    assert (qw.zeros is None) == (zero == 8)


def test_zero_points_of_zero_in_version_1(tmp_path):
    """GPTQModel borrows from neighbours, others do not; and say so."""
    folder = folder_of("gptq_v1", tmp_path)
    qw = checkpoint.load(folder)[NAME]
    assert 0 in np.asarray(qw.zeros)
    (folder / "config.json").unlink()
    with pytest.warns(UserWarning, match="zero points of 0 in version 1"):
        plain = checkpoint.load(folder)[NAME]
    assert (np.asarray(plain.zeros) != np.asarray(qw.zeros)).any()


def test_unpacked_zero_points(tmp_path):
    """Some compressed-tensors files hold int8 zero points."""
    folder = folder_of("ct_asymmetric", tmp_path)
    want = checkpoint.load(folder)[NAME]
    tensors = _tensors(folder)
    n = want.out_features
    tensors[f"{NAME}.weight_zero_point"] = (np.asarray(want.zeros).T.astype(np.float32) - 8).astype(np.int8)
    assert tensors[f"{NAME}.weight_zero_point"].shape == (n, K // GROUP)
    _rewrite(folder, tensors)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load(folder)[NAME], want)


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: t.read() for name, t in _load.open_checkpoint(folder).tensors.items()}


def _rewrite(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(a) for name, a in tensors.items()}, folder / "model.safetensors")


def test_pack_is_the_layout():
    rng = np.random.default_rng(0)
    for k, n in ((1, 1), (64, 16), (96, 40), (200, 33), (0, 16), (64, 0)):
        codes = rng.integers(0, 16, (k, n), np.uint8)
        np.testing.assert_array_equal(_layer.pack(codes), jax_w4a16.pack(jnp.asarray(codes)))


# Larger layers of each format, for slices that the small files cannot have.


@pytest.mark.parametrize("spec", [P(), P("k"), P(None, "n"), P("k", "n"), P(None, ("k", "n"))], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_each_device_reads_its_part(form, spec, tmp_path, monkeypatch):
    """Whatever the split, parts are bit-equal to those of the whole, and nothing is read twice.

    But for HQQ, whose bytes hold codes of two distant columns and whose rows cannot be sliced.
    """
    tensors, weight = large(form)
    _rewrite(tmp_path, tensors)
    mesh = jax.make_mesh((2, 4), ("k", "n"))
    whole = checkpoint.load(tmp_path)[NAME]
    np.testing.assert_array_equal(np.asarray(whole.dequantize(jnp.float32)), weight)

    asked = []
    read = _files.File.read

    def counted(self, name, index):
        part = read(self, name, index)
        asked.append((name, part.nbytes))
        return part

    monkeypatch.setattr(_files.File, "read", counted)
    split = checkpoint.load(tmp_path, sharding=NamedSharding(mesh, spec) if spec != P() else None)[NAME]
    big = max(tensors, key=lambda name: tensors[name].nbytes)
    times = sum(size for name, size in asked if name == big) / tensors[big].nbytes
    assert times == 1 if form != "hqq" else times <= 4
    jax.tree.map(np.testing.assert_array_equal, split, whole)
    k, n = (*spec, None, None)[:2]
    if spec != P():
        assert split.qweight.sharding.is_equivalent_to(NamedSharding(mesh, P(k, n, None)), 3)
        assert split.scales.sharding.is_equivalent_to(NamedSharding(mesh, P(k, n)), 2)


@pytest.mark.parametrize("form", ["ct", "gptq"])
def test_act_order(form, tmp_path):
    """An order of rows is kept; a split along N works, one along K is refused with the reason."""
    k, g = 512, 64
    g_idx = np.random.default_rng(1).permutation(k).astype(np.int32) // g
    tensors, _ = large(form)
    name = "weight_g_idx" if form == "ct" else "g_idx"
    _rewrite(tmp_path, tensors)
    plain = checkpoint.load(tmp_path)[NAME]
    _rewrite(tmp_path, tensors | {f"{NAME}.{name}": g_idx})
    qw = checkpoint.load(tmp_path)[NAME].validate()
    codes = np.asarray(jax_w4a16.unpack(plain.qweight, plain.shape), np.float32)
    want = (codes - np.asarray(plain.zeros, np.float32)[g_idx]) * np.asarray(plain.scales, np.float32)[g_idx]
    np.testing.assert_array_equal(np.asarray(qw.dequantize(jnp.float32)), want)

    mesh = jax.make_mesh((2, 4), ("k", "n"))
    split = checkpoint.load(tmp_path, sharding=NamedSharding(mesh, P(None, "n")))[NAME]
    jax.tree.map(np.testing.assert_array_equal, split, qw)
    assert split.permutation.sharding.is_fully_replicated
    x = np.random.default_rng(2).standard_normal((3, k)).astype(np.float16)
    want = np.asarray(jax_w4a16.dot(x, qw))
    np.testing.assert_array_equal(np.asarray(jax.jit(jax_w4a16.dot)(x, split)), want)
    with pytest.raises(
        ValueError, match=r"a.proj: expected no split along K, got 2 ways: .* activation order"
    ):
        checkpoint.load(tmp_path, sharding=NamedSharding(mesh, P("k")))
    g_idx[0] = (g_idx[0] + 1) % (k // g)
    _rewrite(tmp_path, tensors | {f"{NAME}.{name}": g_idx})
    with pytest.raises(
        ValueError, match=rf"{name}: expected 64 rows in each of 8 groups, got 6[35] in group"
    ):
        checkpoint.load(tmp_path)


def test_unquantised_configuration_is_named(tmp_path):
    _rewrite(tmp_path, {"a.weight": np.zeros((4, 4), np.float32)})
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    with pytest.warns(UserWarning, match="quantised with fp8, of which no 4-bit layer was found"):
        assert set(checkpoint.load(tmp_path)) == {"a.weight"}


# What the configuration and the shapes say


def _layer_in(form: str, folder: Path, config=None, **sizes) -> np.ndarray:
    """Writes a layer in a format, with a configuration or none; its weight."""
    tensors, weight = large(form, **sizes)
    _rewrite(folder, tensors)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return weight


def _assert_loads(folder: Path, weight: np.ndarray) -> jax_w4a16.QuantizedWeight:
    qw = checkpoint.load(folder)[NAME]
    np.testing.assert_array_equal(np.asarray(qw.dequantize(jnp.float32)), weight)
    return qw


V2 = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2", "sym": False}


@pytest.mark.parametrize(
    ("config", "beside"),
    [
        ({"quantization_config": {**V2, "checkpoint_format": None}}, V2),
        ({"quantization_config": {"quant_method": "gptq"}}, V2),
        ({"text_config": {"quantization_config": V2}}, None),
        ({"quantization_config": {}, "text_config": {"quantization_config": V2}}, None),
        ({"quantization_config": V2}, {"checkpoint_format": "gptq"}),
    ],
)
def test_where_the_configuration_is(config, beside, tmp_path):
    """Of several files the first that says something counts; and a text model's is the model's."""
    weight = _layer_in("gptq", tmp_path, config)
    if beside is not None:
        (tmp_path / "quantize_config.json").write_text(json.dumps(beside))
    got = np.asarray(checkpoint.load(tmp_path)[NAME].dequantize(jnp.float32))
    one_less = np.asarray(checkpoint.load(tmp_path)[NAME].scales, np.float32).repeat(64, 0)
    np.testing.assert_allclose(got, weight + one_less, rtol=0, atol=1e-6)  # v1's zeros, read as v2's


@pytest.mark.parametrize(
    ("k", "g"),
    [(512, 512), (512, 256), (512, 128), (1024, 128), (2048, 32), (2048, 64), (256, 256), (40, 40), (8, 8)],
)
def test_gemv_without_a_configuration(k, g, tmp_path):
    """The padding of the scales tells the group size, where the shapes fit several."""
    weight = _layer_in("awq_gemv", tmp_path, k=k, n=48, g=g)
    assert _assert_loads(tmp_path, weight).group_size == (-1 if g == k else g)


@pytest.mark.parametrize("group_size", [40, -1])
def test_gemv_per_channel(group_size, tmp_path):
    config = {"quant_method": "awq", "bits": 4, "group_size": group_size}
    weight = _layer_in("awq_gemv", tmp_path, {"quantization_config": config}, k=40, n=48, g=40)
    assert _assert_loads(tmp_path, weight).group_size == -1


@pytest.mark.parametrize("columns", [slice(2, 3), slice(4, 8), slice(0, 8)])
def test_gemv_whose_padding_does_not_tell(columns, tmp_path):
    tensors, _ = large("awq_gemv", k=512, g=128)
    scales = tensors[f"{NAME}.scales"]
    scales[:, columns] = 1 if columns.start == 4 else 0
    _rewrite(tmp_path, tensors)
    message = (
        r"a.proj.scales: expected columns of scales for one group size .* K = 512, or its group_size, got"
    )
    if columns.start == 4:  # eight groups of 64, whose scales would be padded to 16 columns
        message += " 8 of 8 that are not 0"
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path)


def test_one_word_of_gptq(tmp_path):
    """K = 8 has the shapes of AWQ's gemv too: the configuration or a g_idx tells."""
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "sym": False}}
    weight = _layer_in("gptq", tmp_path, config, k=8, n=16, g=8)
    _assert_loads(tmp_path, weight)
    (tmp_path / "config.json").unlink()
    tensors, weight = large("gptq", k=8, n=16, g=8)
    _rewrite(tmp_path, tensors | {f"{NAME}.g_idx": np.zeros(8, np.int32)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zero points of 0
        _assert_loads(tmp_path, weight)


@pytest.mark.parametrize("types", [("float16", "float32"), ("float32", "float16"), ("float16", "bfloat16")])
def test_hqq_with_two_types(types, tmp_path):
    """Neither scales nor zeros are rounded."""
    tensors, _ = large("hqq")
    rng = np.random.default_rng(0)
    for name, dtype in zip(("scale", "zero"), types, strict=True):
        shape = tensors[f"{NAME}.{name}"].shape
        tensors[f"{NAME}.{name}"] = rng.uniform(1, 14, shape).astype(dtype)
    _rewrite(tmp_path, tensors)
    qw = checkpoint.load(tmp_path)[NAME].validate()
    for field, name in ((qw.scales, "scale"), (qw.zeros, "zero")):
        want = tensors[f"{NAME}.{name}"].astype(np.float32).reshape(128, 8).T
        np.testing.assert_array_equal(np.asarray(field, np.float32), want)
    _rewrite(tmp_path, tensors | {f"{NAME}.zero": np.full((1024, 1), 8, types[1])})
    assert checkpoint.load(tmp_path)[NAME].dtype == types[0]


# What is no 4-bit layer


def _eight_bits(form: str) -> dict[str, np.ndarray]:
    """The tensors of a layer [128, 64] of 8 bits, as far as they tell it from one of 4."""
    scales = np.ones((2, 64), np.float16)
    if form == "ct":
        packed = np.zeros((64, 32), np.int32)
        return {"weight_packed": packed, "weight_scale": scales.T, "weight_shape": np.array([64, 128])}
    if form == "gptq":
        g_idx = np.arange(128, dtype=np.int32) // 64
        words = {"qweight": np.zeros((32, 64), np.int32), "qzeros": np.zeros((2, 16), np.int32)}
        return words | {"scales": scales, "g_idx": g_idx}
    if form == "torchao":
        return {"_weight_qdata": np.zeros((64, 128), np.int8), "_weight_scale": scales.T[:, :1]}
    assert form.startswith("hqq")
    each = {name: np.ones((128, 1), np.float16) for name in ("scale", "zero")}
    state = {"W_q": np.zeros((128, 64), np.uint8), "shape": np.array([64, 128])} | each
    return state | ({"nbits": np.array(8)} if form == "hqq" else {})


@pytest.mark.parametrize("form", ["ct", "gptq", "hqq", "hqq_shapes", "torchao"])
def test_layers_of_8_bits_are_arrays(form, tmp_path):
    """Beside a layer of 4 bits, which loads; one warning names them."""
    from safetensors.numpy import save_file

    good = form.partition("_")[0]
    tensors, weight = large(good)
    odd = {f"b.{i}.{name}": np.array(a, order="C") for i in range(2) for name, a in _eight_bits(form).items()}
    metadata = {f"b.{i}.weight": json.dumps({"_type": "Int8Tensor"}) for i in range(2)}
    arrays = {name: np.array(a, order="C") for name, a in tensors.items()} | odd
    save_file(arrays, tmp_path / "x.safetensors", metadata=metadata if form == "torchao" else None)
    kind = "Int8Tensor of torchao" if form == "torchao" else "8 bits"
    with pytest.warns(
        UserWarning, match=rf"not of 4 bits are loaded as they are: {kind}: b.\d, b.\d$"
    ) as seen:
        got = checkpoint.load(tmp_path)
    assert len(seen) == 1
    np.testing.assert_array_equal(np.asarray(got.pop(NAME).dequantize(jnp.float32)), weight)
    assert got.keys() == odd.keys()
    for name, a in odd.items():
        np.testing.assert_array_equal(got[name], a)


@pytest.mark.parametrize(
    "tensors",
    [
        {"attn.W_q": np.ones((8, 8), np.float32), "attn.scale": np.ones(3, np.float32)},
        {"W_q": np.ones((8, 8), np.uint8)},
        {"l.qweight": np.ones((8, 8), np.int8), "l.weight_scales": np.ones(8, np.float16)},
        {"l.qweight": np.ones((8, 8), np.int32)},
        {"l.weight_packed": np.ones((8, 8), np.uint8), "l.weight_scale": np.ones((8, 2), np.float32)},
        {"l._x_qdata": np.ones(3, np.float32)},
    ],
    ids=lambda tensors: next(iter(tensors)),
)
def test_names_by_chance(tensors, tmp_path):
    """A tensor that is named like a format's codes, without what else the format has, is an array."""
    _rewrite(tmp_path, tensors)
    got = checkpoint.load(tmp_path)
    assert got.keys() == tensors.keys()
    for name, a in tensors.items():
        np.testing.assert_array_equal(got[name], a)
