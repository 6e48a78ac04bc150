"""Checkpoints: our own schema, placement on devices, memory, orbax, and act-order weights."""

import dataclasses
import gc
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import devices_of
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jax_w4a16
from jax_w4a16 import checkpoint
from jax_w4a16.checkpoint import _files, _write

K, N = 512, 128


def quantized(k=K, n=N, group_size=64, symmetric=False, dtype=jnp.bfloat16, seed=0):
    w = jnp.asarray(np.random.default_rng(seed).standard_normal((k, n)), dtype)
    return jax_w4a16.quantize(w, group_size=group_size, symmetric=symmetric)


def permuted(qw, seed=0):
    order = np.random.default_rng(seed).permutation(qw.in_features).astype(np.int32)
    return dataclasses.replace(qw, permutation=jnp.asarray(order))


def scaled(qw, seed=0):
    scale = np.random.default_rng(seed).uniform(0.5, 2, qw.in_features)
    return dataclasses.replace(qw, input_scale=jnp.asarray(scale, jnp.float32))


def params():
    """One of everything that can be saved."""
    stack = jax.tree.map(lambda *a: jnp.stack(a), *(quantized(seed=seed) for seed in range(3)))
    return {
        "symmetric": quantized(symmetric=True),
        "zeros": quantized(),
        "ragged": quantized(200, 40),
        "per_column": quantized(group_size=-1, dtype=jnp.float16),
        "ordered": permuted(quantized()),
        "scaled": scaled(quantized()),
        "scaled_ordered": scaled(permuted(quantized())),
        "stack": stack,
        "odd": quantized(1, 1),
        "norm.weight": jnp.arange(5, dtype=jnp.bfloat16),
        "scalar": jnp.float32(3),
        "empty": jnp.zeros((0, 4)),
        "f8": jnp.arange(6).reshape(2, 3).astype(jnp.float8_e4m3fn),
        "mask": jnp.array([True, False]),
        "looks.qweight": jnp.arange(4, dtype=jnp.int32),
    }


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert jax.tree.structure(got[name]) == jax.tree.structure(want[name])
        for a, b in zip(jax.tree.leaves(got[name]), jax.tree.leaves(want[name]), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name


@pytest.mark.parametrize("target", ["file.safetensors", "folder"])
def test_round_trip(target, tmp_path):
    want = params()
    checkpoint.save(tmp_path / target, want)
    assert_same(checkpoint.load(tmp_path / target), want)
    assert not list(tmp_path.rglob("*.tmp"))


def test_several_files(tmp_path):
    want = params()
    checkpoint.save(tmp_path, want, max_file_bytes=40_000)
    index = json.loads((tmp_path / _files.INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) >= 5
    assert files == sorted(f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1))
    sizes = {tensor: file.stat().st_size for file in tmp_path.glob("*.safetensors") for tensor in [file.name]}
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in jax.tree.leaves(want))
    assert sorted(sizes.values())[0] < 60_000
    assert_same(checkpoint.load(tmp_path), want)
    with pytest.raises(FileExistsError, match=r"expected no .safetensors files in it"):
        checkpoint.save(tmp_path, want)


def test_arrays_named_like_absent_fields(tmp_path):
    """They come back as arrays, and the layer as it was."""
    qw = quantized(symmetric=True)
    want = {
        "a": qw,
        "a.zeros": jnp.full_like(qw.scales, 3),
        "a.input_scale": jnp.ones(1),
        "a.permutation": qw,
    }
    for target in ("file.safetensors", "folder"):
        checkpoint.save(tmp_path / target, want, max_file_bytes=20_000)
        assert_same(checkpoint.load(tmp_path / target), want)


def test_sizes_of_numpy(tmp_path):
    want = dataclasses.replace(quantized(), k=np.int64(K), group_size=np.int64(64))
    checkpoint.save(tmp_path / "x.safetensors", {"a": want})
    assert_same(checkpoint.load(tmp_path / "x.safetensors"), {"a": quantized()})


def test_other_readers_read_it(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    checkpoint.save(tmp_path / "x.safetensors", {"a": quantized(), "b": jnp.ones(3)})
    with safetensors.safe_open(tmp_path / "x.safetensors", "numpy") as file:
        assert set(file.keys()) == {"a.qweight", "a.scales", "a.zeros", "b"}
        fields = ["qweight", "scales", "zeros"]
        assert json.loads(file.metadata()["layers"]) == {"a": {"k": K, "group_size": 64, "fields": fields}}
        np.testing.assert_array_equal(file.get_tensor("a.qweight"), quantized().qweight)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([1], TypeError, "params: expected a dict, got list"),
        ({1: jnp.ones(3)}, TypeError, "expected names that are texts, got 1"),
        ({"a": [1.0]}, TypeError, "a: expected a QuantizedWeight or an array of a common type, got list"),
        ({"a": np.array(["x"])}, TypeError, "a: expected"),
        ({"a": jnp.ones(3, jnp.int4)}, TypeError, "a: expected .* got int4"),
        ({"a": dataclasses.replace(quantized(), k=10)}, ValueError, "a: "),
        (
            {"a": quantized(), "a.scales": jnp.ones(3)},
            ValueError,
            "a.scales: expected one tensor of that name",
        ),
    ],
)
def test_save_refuses(params, error, message, tmp_path):
    with pytest.raises(error, match=message):
        checkpoint.save(tmp_path / "x.safetensors", params)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, {"a": jnp.ones(3)})
    before = path.read_bytes()

    monkeypatch.setattr(np, "asarray", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no luck")))
    with pytest.raises(RuntimeError, match="no luck"):
        checkpoint.save(path, {"b": np.ones(3)})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_of_several_files_leaves_none(tmp_path, monkeypatch):
    """So it can be tried again, and nothing takes a part for the whole."""
    want = {name: quantized(seed=seed) for seed, name in enumerate("abcd")}
    write_file, written = _write._write_file, []

    def interrupted(*arguments):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(arguments)
        write_file(*arguments)

    monkeypatch.setattr(_write, "_write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, want, max_file_bytes=1)
    monkeypatch.undo()
    assert len(written) == 2
    assert not list(tmp_path.iterdir())
    checkpoint.save(tmp_path, want, max_file_bytes=1)
    assert_same(checkpoint.load(tmp_path), want)


def test_where_a_save_cannot_go(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no: expected a folder, got none$"):
        checkpoint.save(tmp_path / "no" / "x.safetensors", {})
    with pytest.raises(IsADirectoryError, match=r"folder\.safetensors: expected a file, got a folder$"):
        checkpoint.save(tmp_path / "folder.safetensors", {})


def test_a_save_replaces_a_link(tmp_path):
    (tmp_path / "other").write_text("other")
    path = tmp_path / "x.safetensors"
    path.symlink_to(tmp_path / "other")
    checkpoint.save(path, {"a": jnp.ones(3)})
    assert not path.is_symlink()
    assert (tmp_path / "other").read_text() == "other"


# Placement ----------------------------------------------------------------------------------------------


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def test_sharding_by_a_function(mesh, tmp_path):
    want = params()
    checkpoint.save(tmp_path, want)
    seen = {}

    def sharding(name, shape):
        seen[name] = shape
        if name in ("zeros", "symmetric", "scaled"):
            return NamedSharding(mesh, P("data", "model"))
        if name == "stack":
            return NamedSharding(mesh, P(None, None, "model"))
        if name == "norm.weight":
            return NamedSharding(mesh, P())
        return None

    got = checkpoint.load(tmp_path, sharding=sharding, progress=False)
    assert_same(got, want)
    assert seen["zeros"] == (K, N)
    assert seen["stack"] == (3, K, N)
    assert seen["norm.weight"] == (5,)
    split = NamedSharding(mesh, P("data", "model", None))
    assert got["zeros"].qweight.sharding.is_equivalent_to(split, 3)
    assert got["stack"].scales.sharding.spec == P(None, None, "model")
    assert got["scaled"].input_scale.sharding.spec == P("data")
    assert len(got["norm.weight"].sharding.device_set) == 8
    x = np.random.default_rng(0).standard_normal((3, K)).astype(ml_dtypes.bfloat16)
    hlo = jax.jit(jax_w4a16.dot).lower(x, got["zeros"]).compile().as_text()
    assert "all-gather" not in hlo


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [P(None, "model"), P("model")], ids=["columns", "rows"])
def test_two_gpus_read_and_hold_a_half_each(spec, tmp_path, monkeypatch):
    mesh = jax.sharding.Mesh(np.array(devices_of("cuda", 2)), ("model",))
    with jax.default_device(jax.devices("cpu")[0]):
        want = quantized(4096, 8192, group_size=128)
        x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 4096)), jnp.bfloat16)
        expected = np.asarray(jax_w4a16.dot(x, want), np.float32)
    checkpoint.save(tmp_path, {"w": want})
    gc.collect()  # what other tests left would count
    parts, before = [], [device.memory_stats()["bytes_in_use"] for device in mesh.devices]

    def read(tensor, index, original=_files.Tensor.__getitem__):
        parts.append(original(tensor, index))
        return parts[-1]

    monkeypatch.setattr(_files.Tensor, "__getitem__", read)
    got = jax.block_until_ready(checkpoint.load(tmp_path, sharding=NamedSharding(mesh, spec))["w"])
    half = sum(a.nbytes for a in jax.tree.leaves(want)) // 2
    held = [d.memory_stats()["bytes_in_use"] - b for d, b in zip(mesh.devices, before, strict=True)]
    assert [part.nbytes for part in parts] == [a.nbytes // 2 for a in jax.tree.leaves(want) for _ in range(2)]
    assert all(half <= size <= 1.01 * half for size in held)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        assert {shard.data.nbytes for shard in a.addressable_shards} == {b.nbytes // 2}
    dot = jax.jit(jax_w4a16.dot).lower(jax.device_put(x, NamedSharding(mesh, P())), got).compile()
    assert "all-gather" not in dot.as_text()
    y = np.asarray(dot(jax.device_put(x, NamedSharding(mesh, P())), got), np.float32)
    assert np.abs(y - expected).max() <= 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["replicated", "single"])
def test_one_sharding_for_all(kind, mesh, tmp_path):
    want = params()
    checkpoint.save(tmp_path, want)
    device = jax.devices()[3]
    sharding = NamedSharding(mesh, P()) if kind == "replicated" else SingleDeviceSharding(device)
    got = checkpoint.load(tmp_path, sharding=sharding)
    assert_same(got, want)
    wanted = set(jax.devices()) if kind == "replicated" else {device}
    assert all(a.sharding.device_set == wanted for a in jax.tree.leaves(got))


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        (
            "ragged",
            P(None, "model"),
            r"ragged: expected N = 40 to split into whole blocks of 16 columns, got 4",
        ),
        (
            "ragged",
            P("data"),
            "ragged: expected K = 200 to split into whole blocks of 64 rows and whole groups",
        ),
        ("per_column", P("data"), "per_column: expected K = 512 .* whole groups of 512, got 2 parts"),
        ("ordered", P("data"), "ordered: expected no split along K, got 2 ways: .* activation order"),
        ("zeros", P(None, None, "data"), "zeros: expected a spec over 2 dimensions"),
        ("stack", P("data"), r"\.safetensors: stack: expected a stack of \[3\] that splits into equal parts"),
        ("norm.weight", P("data"), r"norm.weight: expected a sharding for shape \[5\]"),
        ("scalar", P("data"), r"scalar: expected a sharding for shape \[\]"),
    ],
)
def test_refused_splits(name, spec, message, mesh, tmp_path):
    checkpoint.save(tmp_path, params())
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path, sharding=lambda at, _: NamedSharding(mesh, spec) if at == name else None)


def test_arguments(tmp_path):
    checkpoint.save(tmp_path, {"a": quantized(), "w": jnp.full(3, 1e9), "i": jnp.arange(3)})
    with pytest.raises(TypeError, match="sharding: expected a Sharding, a function or None, got str"):
        checkpoint.load(tmp_path, sharding="model")
    with pytest.raises(TypeError, match=r"sharding\('a'\): expected a Sharding or None, got tuple"):
        checkpoint.load(tmp_path, sharding=lambda *_: ())
    with pytest.raises(TypeError, match="dtype: expected float16, bfloat16 or float32"):
        checkpoint.load(tmp_path, dtype="int8")
    with pytest.raises(ValueError, match="w: expected values within the range of float16, got 1000000000"):
        checkpoint.load(tmp_path, dtype="float16")
    got = checkpoint.load(tmp_path, dtype="bfloat16")
    assert (got["w"].dtype, got["i"].dtype) == (jnp.bfloat16, jnp.int32)


def test_dtype_of_a_scaled_layer(tmp_path):
    want = scaled(quantized())
    checkpoint.save(tmp_path / "x.safetensors", {"a": want})
    got = checkpoint.load(tmp_path / "x.safetensors", dtype="float16")["a"]
    assert {got.scales.dtype, got.zeros.dtype, got.input_scale.dtype} == {jnp.dtype("float16")}
    np.testing.assert_array_equal(got.input_scale, want.input_scale.astype(jnp.float16))


@pytest.mark.parametrize("field", ["scales", "input_scale"])
def test_scales_that_vanish(field, tmp_path):
    qw = scaled(quantized(dtype=jnp.float32))
    qw = dataclasses.replace(qw, **{field: getattr(qw, field).at[..., 5].set(1e-9)})
    checkpoint.save(tmp_path / "x.safetensors", {"a": qw})
    with pytest.raises(
        ValueError, match=rf"a\.{field}: expected {field} within the range of float16, got .*e-"
    ):
        checkpoint.load(tmp_path / "x.safetensors", dtype="float16")
    zero = dataclasses.replace(qw, **{field: getattr(qw, field).at[..., 5].set(0)})
    checkpoint.save(tmp_path / "x.safetensors", {"a": zero})
    assert (getattr(checkpoint.load(tmp_path / "x.safetensors", dtype="float16")["a"], field) == 0).any()


def test_64_bits(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "x.safetensors"
    save_file({"i": np.array([2**31 - 1]), "f": np.array([0.1])}, path)
    got = checkpoint.load(path)
    assert (got["i"].dtype, got["f"].dtype) == (jnp.int32, jnp.float32)
    save_file({"i": np.array([2**31])}, path)
    with pytest.raises(ValueError, match=r"x.safetensors: i: expected values within the range of int32"):
        checkpoint.load(path)


MEMORY = """
import os, sys, threading, time
import jax
import numpy as np
from jax_w4a16 import checkpoint
path, split = sys.argv[1], sys.argv[2] == "split"
devices = np.array(jax.devices()[:4]).reshape(4)
mesh = jax.sharding.Mesh(devices, ("n",))
where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "n")) if split else None
jax.block_until_ready(jax.device_put(np.ones(8), devices[0]))
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
base = peak = resident()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
params = checkpoint.load(path, sharding=where)
done = True
thread.join()
# On a CPU the devices' memory is the host's.
print(peak - base - sum(a.nbytes for a in jax.tree.leaves(params)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("split", ["whole", "split"])
@pytest.mark.parametrize("form", ["ct", "gptq", "desc_act", "awq_gemm", "plain"])
def test_memory_of_the_host(form, split, tmp_path):
    """While several hundred MB are loaded: below the largest tensor + 200 MB beside what is on devices.

    Where a CPU device takes over a layer without a copy, what was on its way is not among the rest: so for
    layers the bound is 200 MB.
    """
    k, n, layers = 8192, 16384, 4
    words = np.random.default_rng(0).integers(-(2**31), 2**31, k * n // 8, np.int64).astype(np.int32)
    zeros = np.full(k // 128 * n // 8, 0x65656565, np.int32)
    scales = np.full((k // 128, n), 0.01, np.float16)
    tensors = {}
    for i in range(layers):
        if form == "plain":
            layer = {"w": np.tile(words.reshape(-1, n), (4, 1))} if i == 0 else {}
        elif form == "ct":
            layer = {"weight_packed": words.reshape(n, -1), "weight_scale": scales.reshape(n, -1)}
            layer |= {"weight_shape": np.array([n, k])}
        else:
            shape = (k, -1) if form == "awq_gemm" else (-1, n)
            layer = {"qweight": words.reshape(shape), "qzeros": zeros.reshape(k // 128, -1), "scales": scales}
            if form == "desc_act":
                layer["g_idx"] = np.random.default_rng(i).permutation(k).astype(np.int32) // 128
        tensors |= {f"{i}.{name}": a for name, a in layer.items()}
    from safetensors.numpy import save_file

    save_file(tensors, tmp_path / "model.safetensors")
    largest = max(a.nbytes for a in tensors.values())
    del tensors, words, layer
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), split], capture_output=True, text=True, check=True
    )
    used = int(ran.stdout)
    print(f"{form}, {split}: {used / 1e6:.0f} MB beside the arrays; largest tensor {largest / 1e6:.0f} MB")
    assert used < 200e6 + (largest if form == "plain" else 0)


# Orbax ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_orbax(mesh, tmp_path):
    """Orbax saves a dict of weights, and restores each part to its device."""
    ocp = pytest.importorskip("orbax.checkpoint")
    want = {"up": quantized(), "down": permuted(quantized(symmetric=True)), "norm": jnp.ones(8)}

    def place(path, a):
        split = {
            "qweight": P("data", "model", None),
            "scales": P("data", "model"),
            "zeros": P("data", "model"),
        }
        name = getattr(path[-1], "name", "")
        spec = split.get(name, P()) if path[0].key == "up" else P()
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))

    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "x", want)
        saver.wait_until_finished()
        got = saver.restore(tmp_path / "x", jax.tree_util.tree_map_with_path(place, want))
    assert_same(got, want)
    assert isinstance(got["up"], jax_w4a16.QuantizedWeight)
    assert got["up"].qweight.sharding.spec == P("data", "model", None)
    np.testing.assert_array_equal(got["down"].dequantize(), want["down"].dequantize())


# Act-order weights ----------------------------------------------------------------------------------------


def test_permutation():
    plain = quantized()
    qw = permuted(plain)
    assert qw.validate() is qw
    assert qw.nbytes == plain.nbytes + 4 * K
    w = np.asarray(qw.dequantize())
    np.testing.assert_array_equal(w[np.asarray(qw.permutation)], plain.dequantize())
    eye = jnp.eye(K, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(jax_w4a16.dot(eye, qw), w)
    np.testing.assert_array_equal(jax.jit(lambda qw: qw.dequantize())(qw), w)


def test_permutation_through_transformations():
    stack = jax.tree.map(
        lambda *a: jnp.stack(a), *(permuted(quantized(128, 128, seed=s), s) for s in range(3))
    )
    assert stack.validate().shape == (128, 128)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 128)) / 16, jnp.bfloat16)

    def step(x, qw):
        return jax_w4a16.dot(x, qw), None

    want = x
    for i in range(3):
        want = jax_w4a16.dot(want, jax.tree.map(lambda a, i=i: a[i], stack))
    np.testing.assert_array_equal(jax.lax.scan(step, x, stack)[0], want)
    one = jax.tree.map(lambda a: a[0], stack)
    g = jax.grad(lambda x: jax_w4a16.dot(x, one, preferred_element_type=jnp.float32).sum())(x)
    dense = jax.grad(lambda x: (x.astype(jnp.float32) @ one.dequantize(jnp.float32)).sum())(x)
    np.testing.assert_allclose(np.asarray(g, np.float32), np.asarray(dense, np.float32), rtol=0.02, atol=0.05)
    both = jax.vmap(jax_w4a16.dot, in_axes=(None, 0))(x, stack)
    np.testing.assert_array_equal(both[0], jax_w4a16.dot(x, one))


@pytest.mark.parametrize(
    ("permutation", "error", "message"),
    [
        (np.zeros(K, np.int32), ValueError, "permutation: expected each of 0..511 once"),
        (np.arange(1, K + 1, dtype=np.int32), ValueError, "permutation: expected each of 0..511 once"),
        (np.arange(K, dtype=np.int16), TypeError, "permutation: expected int32, got int16"),
        (np.arange(K - 1, dtype=np.int32), ValueError, r"permutation: expected shape \(512,\) for K = 512"),
        (3, TypeError, "permutation: expected an array, got int"),
    ],
)
def test_malformed_permutation(permutation, error, message):
    qw = dataclasses.replace(quantized(), permutation=permutation)
    with pytest.raises(error, match=message):
        qw.validate()
    if "each of" not in message:
        with pytest.raises(error, match=message):
            jax_w4a16.dot(jnp.ones((1, K), jnp.bfloat16), qw)


def test_permutation_in_flax_layers():
    nnx = pytest.importorskip("flax.nnx")
    from jax_w4a16 import linen
    from jax_w4a16 import nnx as layers

    qw = permuted(quantized(group_size=128, symmetric=True))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, K)), jnp.bfloat16)
    want = jax_w4a16.dot(x, qw)
    layer = layers.W4A16Linear(K, N, use_bias=False, rngs=nnx.Rngs(0))
    layer.qweight[...] = qw.qweight
    layer.scales[...] = qw.scales
    layer.permutation = layers.QuantizedVariable(qw.permutation)
    np.testing.assert_array_equal(nnx.jit(lambda layer, x: layer(x))(layer, x), want)

    kernel = {"qweight": qw.qweight, "scales": qw.scales, "permutation": qw.permutation}
    dense = linen.W4A16Dense(N, use_bias=False)
    np.testing.assert_array_equal(dense.apply({linen.COLLECTION: {"kernel": kernel}}, x), want)


def test_import_needs_no_safetensors(tmp_path):
    text = (
        "import sys; sys.modules['safetensors'] = None\n"
        "import jax_w4a16.checkpoint as c\n"
        "try: c.load('x.safetensors')\n"
        "except ImportError as error: print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert "pip install jax_w4a16[checkpoint]" in ran.stdout
