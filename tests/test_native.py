"""The native library on its own: the C interface through ctypes, and the stand-alone program."""

from __future__ import annotations

import ctypes as c
import json
import subprocess
import threading

import jax
import numpy as np
import pytest
from conftest import device_of

from jax_w4a16 import _w4a16

F16, BF16, F32 = 0, 1, 2
OK, INVALID, UNSUPPORTED = 0, 1, 2
ADD_NORM, SWIGLU = 1, 2


class Status(c.Structure):
    _fields_ = [("code", c.c_int), ("message", c.c_char * 508)]


class Problem(c.Structure):
    _fields_ = [
        ("m", c.c_int64),
        ("n", c.c_int64),
        ("k", c.c_int64),
        ("group_size", c.c_int64),
        ("x_dtype", c.c_int),
        ("out_dtype", c.c_int),
        ("has_zeros", c.c_int32),
        ("has_bias", c.c_int32),
        ("batch_invariant", c.c_int32),
        ("epilogue", c.c_int),
    ]


class Operands(c.Structure):
    _fields_ = [
        *((name, c.c_void_p) for name in ("x", "qweight", "scales", "zeros", "bias", "out", "workspace")),
        ("workspace_bytes", c.c_int64),
        ("alpha", c.c_float),
        *((name, c.c_void_p) for name in ("residual", "norm_scale", "scaled", "squares")),
        ("num_squares", c.c_int64),
        ("epsilon", c.c_float),
    ]


class Device(c.Structure):
    _fields_ = [("compute_capability", c.c_int32), ("num_sms", c.c_int32)]


@pytest.fixture(scope="module")
def library():
    lib = c.CDLL(_w4a16.build_info()["library"])
    for name in (
        "select",
        "can_implement",
        "workspace_bytes",
        "run_cpu",
        "pack_cpu",
        "dequantize_cpu",
        "quantize_cpu",
        "run_cuda",
        "ragged_select",
        "ragged_run_cpu",
    ):
        getattr(lib, f"w4a16_{name}").restype = Status
    lib.w4a16_version.restype = c.c_char_p
    lib.w4a16_config_name.restype = c.c_char_p
    return lib


M, N, K, G = 2, 32, 128, 64


class Call:
    """A good call of w4a16_run_cpu: x of ones, codes 9, scales 1, so that every output is K."""

    def __init__(self):
        self.problem = Problem(M, N, K, G, F16, F16, 0, 0)
        # numpy aligns large arrays only; the library wants 16 bytes.
        self.arrays = {
            "x": aligned(np.ones((M, K), np.float16)),
            "qweight": aligned(np.full((K // 64, N // 16, 128), 0x99999999, np.uint32)),
            "scales": aligned(np.ones((K // G, N), np.float16)),
            "out": aligned(np.zeros((M, N), np.float16)),
        }
        self.operands = Operands(alpha=1.0, **{k: v.ctypes.data for k, v in self.arrays.items()})

    def run(self, library):
        return library.w4a16_run_cpu(c.byref(self.problem), c.byref(self.operands), None)


def aligned(values):
    raw = np.empty(values.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    out = raw[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    out[...] = values
    return out


def test_good_call(library):
    call = Call()
    status = call.run(library)
    assert (status.code, status.message) == (OK, b"")
    np.testing.assert_array_equal(call.arrays["out"], K)


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("problem", "m", -1, "M = -1"),
        ("problem", "n", -1, "N = -1"),
        ("problem", "k", -1, "K = -1"),
        ("problem", "m", 2**62, "M = "),
        ("problem", "n", 2**62, "N = "),
        ("problem", "k", 2**62, "K = "),
        ("problem", "group_size", 0, "group_size = 0"),
        ("problem", "group_size", -64, "group_size = -64"),
        ("problem", "group_size", 33, "group_size = 33"),
        ("problem", "group_size", 16, "group_size = 16"),
        ("problem", "x_dtype", 3, "x_dtype = 3"),
        ("problem", "x_dtype", -1, "x_dtype = -1"),
        ("problem", "out_dtype", BF16, "out_dtype = 1"),
        ("problem", "out_dtype", 7, "out_dtype = 7"),
        ("problem", "has_zeros", 1, "zeros"),
        ("problem", "has_bias", 1, "bias"),
        ("operands", "x", None, "x: expected a pointer"),
        ("operands", "qweight", None, "qweight: expected a pointer"),
        ("operands", "scales", None, "scales: expected a pointer"),
        ("operands", "out", None, "out: expected a pointer"),
        ("operands", "x", 2, "x: expected an address aligned"),
        ("operands", "qweight", 4, "qweight: expected an address aligned"),
        ("operands", "scales", 2, "scales: expected an address aligned"),
        ("operands", "out", 8, "out: expected an address aligned"),
        ("operands", "workspace_bytes", -1, "workspace_bytes"),
        ("operands", "workspace_bytes", 64, "workspace: expected a pointer"),
    ],
)
def test_malformed_call(library, part, field, value, message):
    call = Call()
    target = getattr(call, part)
    if part == "operands" and field != "workspace_bytes" and value is not None:
        value += getattr(target, field)  # an offset that breaks the alignment
    setattr(target, field, value)
    status = call.run(library)
    assert status.code == INVALID
    assert message in status.message.decode()
    np.testing.assert_array_equal(call.arrays["out"], 0)
    test_good_call(library)


def test_operand_that_the_problem_does_not_have(library):
    for field in ("zeros", "bias"):
        call = Call()
        setattr(call.operands, field, call.operands.scales)
        status = call.run(library)
        assert status.code == INVALID
        assert f"{field}: expected null" in status.message.decode()


class FusedCall(Call):
    """A call with an epilogue, all of whose operands are there."""

    def __init__(self, epilogue):
        super().__init__()
        self.problem.epilogue = epilogue
        names = ["squares"] + ["residual", "norm_scale", "scaled"] * (epilogue == ADD_NORM)
        self.arrays |= {name: aligned(np.zeros((M, N), np.float32)) for name in names}
        for name in names:
            setattr(self.operands, name, self.arrays[name].ctypes.data)
        self.operands.num_squares = N // 16 if epilogue == ADD_NORM else 4


@pytest.mark.parametrize("epilogue", [ADD_NORM, SWIGLU])
def test_epilogues_are_for_gpus(library, epilogue):
    call = FusedCall(epilogue)
    status = call.run(library)
    assert (status.code, status.message) == (UNSUPPORTED, b"epilogue: the CPU kernels have none")
    np.testing.assert_array_equal(call.arrays["out"], 0)


@pytest.mark.parametrize(
    ("epilogue", "part", "field", "value", "message"),
    [
        (ADD_NORM, "problem", "epilogue", 3, "epilogue = 3: unknown"),
        (ADD_NORM, "problem", "epilogue", -1, "epilogue = -1: unknown"),
        (ADD_NORM, "problem", "has_bias", 1, "has_bias"),
        (ADD_NORM, "problem", "out_dtype", F32, "out_dtype"),
        (SWIGLU, "problem", "n", 24, "N = 24: expected a multiple of 16"),
        (ADD_NORM, "operands", "residual", None, "residual: expected a pointer"),
        (ADD_NORM, "operands", "norm_scale", None, "norm_scale: expected a pointer"),
        (ADD_NORM, "operands", "scaled", None, "scaled: expected a pointer"),
        (ADD_NORM, "operands", "squares", None, "squares: expected a pointer"),
        (ADD_NORM, "operands", "residual", 8, "residual: expected an address aligned"),
        (ADD_NORM, "operands", "num_squares", 1, "num_squares = 1: expected N / 16"),
        (SWIGLU, "operands", "num_squares", -1, "num_squares = -1"),
        (SWIGLU, "operands", "num_squares", 6, "num_squares = 6: expected a multiple of 4"),
        (SWIGLU, "operands", "num_squares", 2**62, "num_squares = "),
        (SWIGLU, "operands", "squares", 4, "squares: expected an address aligned"),
        (SWIGLU, "operands", "residual", 16, "expected null, because the epilogue has none"),
        (0, "operands", "squares", 16, "squares: expected null"),
    ],
)
def test_malformed_epilogue(library, epilogue, part, field, value, message):
    call = FusedCall(epilogue or SWIGLU)
    call.problem.epilogue = epilogue
    target = getattr(call, part)
    if part == "operands" and field != "num_squares" and value is not None:
        value += call.operands.out
    setattr(target, field, value)
    status = call.run(library)
    assert status.code == INVALID
    assert message in status.message.decode()
    np.testing.assert_array_equal(call.arrays["out"], 0)


@pytest.mark.parametrize("epilogue", [ADD_NORM, SWIGLU])
def test_decode_alone_has_epilogues(library, epilogue):
    """Whatever M is, and on no GPU before compute capability 8.0."""
    problem, config = Problem(1, 4096, 4096, 128, F16, F16, 0, 0, 0, epilogue), c.c_char_p()
    select = lambda device: library.w4a16_select(
        c.byref(problem), c.byref(device), c.c_int64(-1), c.byref(config)
    )
    for m in (1, 16, 300):
        problem.m = m
        assert select(Device(90, 132)).code == OK
        assert config.value is not None
        assert config.value.startswith(b"decode_")
    assert select(Device(75, 40)).code == UNSUPPORTED


def test_null_structs(library):
    call = Call()
    assert library.w4a16_run_cpu(None, c.byref(call.operands), None).code == INVALID
    assert library.w4a16_run_cpu(c.byref(call.problem), None, None).code == INVALID


def test_operands_of_huge_products_are_checked(library):
    """M * ceil(K/64) * ceil(N/16) is 2^64."""
    call = Call()
    call.problem.m = call.problem.n = 2**30
    call.problem.k = 2**14
    call.operands.qweight = None
    status = call.run(library)
    assert status.code == INVALID
    assert "qweight: expected a pointer" in status.message.decode()


@pytest.mark.parametrize("missing", ["codes", "w", "out", "qweight", "scales"])
def test_weights_without_an_array(library, missing):
    call = Call()
    data = {name: array.ctypes.data for name, array in call.arrays.items()}
    data |= {"codes": data["x"], "w": data["x"], missing: None}
    names = {
        "codes": ["pack"],
        "w": ["quantize"],
        "out": ["dequantize"],
        "scales": ["quantize", "dequantize"],
    }
    k, n, g = (c.c_int64(size) for size in (K, N, G))
    qweight, scales, codes, w, out = (
        c.c_void_p(data[name]) for name in ("qweight", "scales", "codes", "w", "out")
    )
    calls = {
        "pack": lambda: library.w4a16_pack_cpu(codes, k, n, qweight, None),
        "quantize": lambda: library.w4a16_quantize_cpu(w, F16, k, n, g, F16, qweight, scales, None, None),
        "dequantize": lambda: library.w4a16_dequantize_cpu(
            qweight, scales, None, F16, k, n, g, F16, out, None
        ),
    }
    for name in names.get(missing, list(calls)):
        status = calls[name]()
        assert status.code == INVALID
        assert status.message.decode() == f"{missing}: expected a pointer, got null"


def test_empty_weights_need_no_arrays(library):
    for k, n in ((64, 0), (0, 16)):
        k, n, g = c.c_int64(k), c.c_int64(n), c.c_int64(64)
        assert library.w4a16_pack_cpu(None, k, n, None, None).code == OK
        assert library.w4a16_dequantize_cpu(None, None, None, F16, k, n, g, F16, None, None).code == OK
        assert library.w4a16_quantize_cpu(None, F16, k, n, g, F16, None, None, None, None).code == OK


def test_unknown_types_of_weights(library):
    k, n, g = c.c_int64(K), c.c_int64(N), c.c_int64(G)
    status = library.w4a16_quantize_cpu(None, 7, k, n, g, F16, None, None, None, None)
    assert (status.code, status.message) == (INVALID, b"w: unknown type 7")
    status = library.w4a16_quantize_cpu(None, F16, k, n, g, -1, None, None, None, None)
    assert (status.code, status.message) == (INVALID, b"scales: unknown type -1")


Task = c.CFUNCTYPE(None, c.c_void_p, c.c_int64)
ParallelFor = c.CFUNCTYPE(None, c.c_void_p, c.c_int64, Task, c.c_void_p)


class Executor(c.Structure):
    _fields_ = [("context", c.c_void_p), ("num_threads", c.c_int), ("parallel_for", ParallelFor)]


@pytest.mark.parametrize("num_threads", [1, 0, -5, 2**29, 2**30, 2**31 - 1])
def test_executor_with_any_number_of_threads(library, num_threads):
    @ParallelFor
    def in_turn(_, tasks, task, arg):
        for i in range(tasks):
            task(arg, i)

    call, executor = Call(), Executor(None, num_threads, in_turn)
    status = library.w4a16_run_cpu(c.byref(call.problem), c.byref(call.operands), c.byref(executor))
    assert status.code == OK, status.message
    np.testing.assert_array_equal(call.arrays["out"], K)


def test_executor_without_parallel_for(library):
    call, executor = Call(), Executor(None, 2, ParallelFor())
    status = library.w4a16_run_cpu(c.byref(call.problem), c.byref(call.operands), c.byref(executor))
    assert (status.code, status.message) == (INVALID, b"executor: expected a parallel_for, got null")


def test_select_through_c(library):
    problem, device, config = Problem(1, 4096, 4096, 128, F16, F16, 0, 0), Device(90, 132), c.c_char_p()
    status = library.w4a16_select(c.byref(problem), c.byref(device), c.c_int64(-1), c.byref(config))
    assert status.code == OK
    assert config.value is not None
    assert config.value.decode() in _w4a16.build_info()["configs"]
    device = Device(70, 80)
    status = library.w4a16_select(c.byref(problem), c.byref(device), c.c_int64(-1), c.byref(config))
    assert status.code == UNSUPPORTED
    assert b"compute capability" in status.message


@pytest.mark.parametrize(
    ("experts", "sizes", "change", "message"),
    [
        (-1, "good", {}, "experts = -1"),
        (2**62, "good", {}, "experts = "),
        (1, None, {}, "group_sizes: expected a pointer"),
        (1, "odd", {}, "group_sizes: expected an address aligned"),
        (1, "good", {"has_bias": 1}, "has_bias"),
        (1, "good", {"batch_invariant": 1}, "batch_invariant"),
        (1, "good", {"epilogue": SWIGLU}, "epilogue: a ragged product has none"),
        (1, "good", {"group_size": 33}, "group_size = 33"),
        (2**16, "good", {"n": 2**30, "k": 2**30}, "experts = 65536"),
    ],
)
def test_malformed_ragged_call(library, experts, sizes, change, message):
    call, good = Call(), aligned(np.array([1], np.int32))
    run = lambda experts, pointer: library.w4a16_ragged_run_cpu(
        c.byref(call.problem), c.c_int64(experts), c.byref(call.operands), c.c_void_p(pointer), None
    )
    for field, value in change.items():
        setattr(call.problem, field, value)
    pointer = None if sizes is None else good.ctypes.data + 4 * (sizes == "odd")
    status = run(experts, pointer)
    assert status.code == INVALID
    assert message in status.message.decode()
    np.testing.assert_array_equal(call.arrays["out"], 0)
    call = Call()
    assert run(1, good.ctypes.data).code == OK
    np.testing.assert_array_equal(call.arrays["out"], [[K] * N, [0] * N])


def test_ragged_select_through_c(library):
    problem, config = Problem(64, 2048, 768, 128, F16, F16, 0, 0), c.c_char_p()
    for device, code in ((Device(90, 132), OK), (Device(80, 108), OK), (Device(70, 80), UNSUPPORTED)):
        arguments = (c.byref(problem), c.c_int64(128), c.byref(device), c.byref(config))
        assert library.w4a16_ragged_select(*arguments).code == code
    assert config.value is not None
    assert config.value.decode() in _w4a16.build_info()["configs"]


def test_config_names(library):
    assert library.w4a16_config_name(-1) is None
    assert library.w4a16_config_name(library.w4a16_config_count()) is None
    assert library.w4a16_config_name(0).decode() == _w4a16.build_info()["configs"][0]


def test_version(library):
    assert library.w4a16_version().decode() == _w4a16.build_info()["version"]


def test_cuda_call_without_cuda(library):
    if library.w4a16_has_cuda():
        pytest.skip("this build has CUDA kernels")
    call = Call()
    status = library.w4a16_run_cuda(c.byref(call.problem), c.byref(call.operands), None, None)
    assert status.code == UNSUPPORTED
    assert b"no CUDA" in status.message


def program(*args):
    command = [_w4a16.build_info()["program"], *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def test_program_on_cpu():
    done = program(3, 200, 300, "--group-size", 64, "--zeros", "--bias", "--config", "cpu", "--repeats", 2)
    assert done.returncode == 0, done.stderr
    assert "cpu_" in done.stdout
    assert "check       ok" in done.stdout
    assert "TFLOP/s" in done.stdout


def test_program_sweep_and_json():
    done = program(4, 64, 128, "--config", "cpu", "--repeats", 1, "--sweep", "--json", "--dtype", "bfloat16")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["M"] for r in rows] == [1, 2, 4]
    assert all(r["right"] and r["dtype"] == "bfloat16" for r in rows)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "expected M N K"),
        ((1, 2), "expected M N K"),
        (("a", 2, 3), "expected a number"),
        ((1, -2, 3), "unknown argument -2"),
        ((1, 2, 3, "--dtype", "int8"), "--dtype"),
        ((1, 2, 3, "--nonsense"), "unknown argument"),
        ((1, 2, 3, "--config"), "expected a value"),
        ((1, 64, 64, "--group-size", 48), "group_size = 48"),
        ((1, 64, 64, "--group-size", -7), "--group-size: expected a number from -1"),
        ((1, 64, "9" * 20), "K: expected a number from 0"),
        ((2**63 - 1, 16, 64, "--sweep"), "M: expected a number from 1"),
        ((0, 16, 64, "--sweep"), "M: expected a number from 1"),
        ((1, 64, 64, "--repeats", 2**32 + 1), "--repeats: expected a number"),
        ((1, 64, 64, "--repeats", -3), "--repeats: expected a number"),
        ((1, 10**9, 10**9), "alloc"),
    ],
)
def test_program_refuses(args, message):
    done = program(*args)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 4096, 4096), (17, 576, 2112), (300, 1408, 1000), (64, 100, 333)])
def test_program_on_gpu(shape, dtype):
    for flags in ((), ("--zeros", "--bias", "--group-size", 32), ("--group-size", -1)):
        done = program(*shape, "--dtype", dtype, "--repeats", 3, *flags)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "check       ok" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["decode", "wgmma", "persistent", "cutlass"])
def test_first_cuda_call_of_a_thread(library, family):
    """A thread that has made no CUDA call has no context, and no tensor map can be encoded without."""
    device = device_of("cuda")
    m, n, k = 64, 512, 256
    arrays = {
        "x": np.ones((m, k), np.float16),
        "qweight": np.full((k // 64, n // 16, 128), 0x99999999, np.uint32),
        "scales": np.ones((k // 128, n), np.float16),
        "out": np.zeros((m, n), np.float16),
        "workspace": np.zeros(1 << 24, np.uint8),
    }
    arrays = jax.block_until_ready(jax.device_put(arrays, device))
    pointers = {name: array.unsafe_buffer_pointer() for name, array in arrays.items()}
    problem = Problem(m, n, k, 128, F16, F16, 0, 0)
    operands = Operands(alpha=1.0, workspace_bytes=1 << 24, **pointers)
    results = []

    def call(name):
        status = library.w4a16_run_cuda(c.byref(problem), c.byref(operands), name.encode(), None)
        results.append((status.code, status.message, c.CDLL("libcuda.so.1").cuCtxSynchronize()))

    facts = {"compute_capability": 90, "num_sms": 132, "batch_invariant": False}
    facts |= {"m": m, "n": n, "k": k, "group_size": 128, "has_zeros": False, "has_bias": False}
    facts |= {"x_dtype": "float16", "out_dtype": "float16"}
    for config in _w4a16.configs():
        if config["family"] == family and _w4a16.can_implement(config["name"], **facts) is None:
            thread = threading.Thread(target=call, args=(config["name"],))
            thread.start()
            thread.join()
            break
    assert results == [(OK, b"", 0)]
    np.testing.assert_array_equal(np.asarray(arrays["out"]), k)
