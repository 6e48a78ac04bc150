"""The C interface of libw4a16 (ffi/w4a16.h) through ctypes."""

import ctypes
from ctypes import POINTER, Structure, c_char, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p

DTYPES = {"float16": 0, "bfloat16": 1, "float32": 2}
EPILOGUES = {None: 0, "add_norm": 1, "swiglu": 2}


class Status(Structure):
    """w4a16_status."""

    _fields_ = [("code", c_int), ("message", c_char * 508)]


class Problem(Structure):
    """w4a16_problem."""

    _fields_ = [
        ("m", c_int64),
        ("n", c_int64),
        ("k", c_int64),
        ("group_size", c_int64),
        ("x_dtype", c_int),
        ("out_dtype", c_int),
        ("has_zeros", c_int32),
        ("has_bias", c_int32),
        ("batch_invariant", c_int32),
        ("epilogue", c_int),
    ]


class Operands(Structure):
    """w4a16_operands."""

    _fields_ = [
        ("x", c_void_p),
        ("qweight", c_void_p),
        ("scales", c_void_p),
        ("zeros", c_void_p),
        ("bias", c_void_p),
        ("out", c_void_p),
        ("workspace", c_void_p),
        ("workspace_bytes", c_int64),
        ("alpha", c_float),
        ("residual", c_void_p),
        ("norm_scale", c_void_p),
        ("scaled", c_void_p),
        ("squares", c_void_p),
        ("num_squares", c_int64),
        ("epsilon", c_float),
    ]


class Device(Structure):
    """w4a16_device."""

    _fields_ = [("compute_capability", c_int32), ("num_sms", c_int32)]


class NativeError(RuntimeError):
    """A call that the library refused, with its message."""


_STATUS_FUNCTIONS = {
    "w4a16_current_device": [POINTER(Device)],
    "w4a16_select": [POINTER(Problem), POINTER(Device), c_int64, POINTER(c_char_p)],
    "w4a16_can_implement": [POINTER(Problem), POINTER(Device), c_char_p],
    "w4a16_workspace_bytes": [POINTER(Problem), POINTER(Device), c_char_p, POINTER(c_int64)],
    "w4a16_run_cuda": [POINTER(Problem), POINTER(Operands), c_char_p, c_void_p],
    "w4a16_ragged_select": [POINTER(Problem), c_int64, POINTER(Device), POINTER(c_char_p)],
    "w4a16_ragged_can_implement": [POINTER(Problem), c_int64, POINTER(Device), c_char_p],
    "w4a16_ragged_run_cuda": [
        POINTER(Problem), c_int64, POINTER(Operands), c_void_p, c_char_p, c_void_p,
    ],
    "w4a16_pack_cuda": [c_void_p, c_int64, c_int64, c_void_p, c_void_p],
    "w4a16_dequantize_cuda": [
        c_void_p, c_void_p, c_void_p, c_int, c_int64, c_int64, c_int64, c_int, c_void_p, c_void_p,
    ],
    "w4a16_quantize_cuda": [
        c_void_p, c_int, c_int64, c_int64, c_int64, c_int, c_void_p, c_void_p, c_void_p, c_void_p,
    ],
    "w4a16_read_floor_cuda": [c_void_p, c_int64, c_void_p, c_void_p],
}  # fmt: skip


def find_library() -> str:
    """Path of the shared library that the installed jax_w4a16 ships; raises ImportError."""
    import jax_w4a16

    return jax_w4a16.build_info()["library"]


class Library:
    """libw4a16. Pointers and streams are plain integers; a refusal raises NativeError."""

    def __init__(self, path: str):
        self.path = path
        self._lib = ctypes.CDLL(path)
        for name, argtypes in _STATUS_FUNCTIONS.items():
            function = getattr(self._lib, name)
            function.argtypes = argtypes
            function.restype = Status
        self._lib.w4a16_version.restype = c_char_p
        self._lib.w4a16_has_cuda.restype = c_int
        self._lib.w4a16_config_count.restype = c_int
        self._lib.w4a16_config_name.argtypes = [c_int]
        self._lib.w4a16_config_name.restype = c_char_p

    def _call(self, name: str, *args) -> None:
        status = getattr(self._lib, name)(*args)
        if status.code != 0:
            raise NativeError(f"{name}: {status.message.decode(errors='replace')}")

    @property
    def version(self) -> str:
        """The library's version."""
        return self._lib.w4a16_version().decode()

    @property
    def has_cuda(self) -> bool:
        """Whether it was built with CUDA kernels."""
        return bool(self._lib.w4a16_has_cuda())

    def config_names(self, *, ragged: bool = False) -> list[str]:
        """All compiled configurations of products, or of ragged ones."""
        count = self._lib.w4a16_config_count()
        names = [self._lib.w4a16_config_name(i).decode() for i in range(count)]
        return [name for name in names if name.startswith("ragged_") == ragged]

    def current_device(self) -> Device:
        """The current CUDA device."""
        device = Device()
        self._call("w4a16_current_device", device)
        return device

    def select(self, problem: Problem, device: Device, workspace_limit: int = -1) -> str:
        """The configuration that the library would choose."""
        config = c_char_p()
        self._call("w4a16_select", problem, device, workspace_limit, config)
        assert config.value is not None
        return config.value.decode()

    def refusal(self, problem: Problem, device: Device, config: str) -> str | None:
        """Why `config` cannot serve `problem`, or None if it can."""
        try:
            self._call("w4a16_can_implement", problem, device, config.encode())
        except NativeError as error:
            return str(error)
        return None

    def workspace_bytes(self, problem: Problem, device: Device, config: str) -> int:
        """Workspace that `config` needs."""
        size = c_int64()
        self._call("w4a16_workspace_bytes", problem, device, config.encode(), size)
        return size.value

    def run_cuda(self, problem: Problem, operands: Operands, config: bytes, stream: int) -> None:
        """w4a16_run_cuda."""
        self._call("w4a16_run_cuda", problem, operands, config, stream)

    def ragged_select(self, problem: Problem, experts: int, device: Device) -> str:
        """The configuration that the library would choose for a ragged product."""
        config = c_char_p()
        self._call("w4a16_ragged_select", problem, experts, device, config)
        assert config.value is not None
        return config.value.decode()

    def ragged_refusal(self, problem: Problem, experts: int, device: Device, config: str) -> str | None:
        """Why `config` cannot serve a ragged product, or None if it can."""
        try:
            self._call("w4a16_ragged_can_implement", problem, experts, device, config.encode())
        except NativeError as error:
            return str(error)
        return None

    def ragged_run_cuda(
        self,
        problem: Problem,
        experts: int,
        operands: Operands,
        group_sizes: int,
        config: bytes,
        stream: int,
    ) -> None:
        """w4a16_ragged_run_cuda."""
        self._call("w4a16_ragged_run_cuda", problem, experts, operands, group_sizes, config, stream)

    def pack_cuda(self, codes: int, k: int, n: int, qweight: int, stream: int) -> None:
        """w4a16_pack_cuda."""
        self._call("w4a16_pack_cuda", codes, k, n, qweight, stream)

    def dequantize_cuda(
        self,
        qweight: int,
        scales: int,
        zeros: int | None,
        scale_dtype: str,
        k: int,
        n: int,
        group_size: int,
        out_dtype: str,
        out: int,
        stream: int,
    ) -> None:
        """w4a16_dequantize_cuda."""
        self._call(
            "w4a16_dequantize_cuda", qweight, scales, zeros, DTYPES[scale_dtype], k, n, group_size,
            DTYPES[out_dtype], out, stream,
        )  # fmt: skip

    def quantize_cuda(
        self,
        w: int,
        w_dtype: str,
        k: int,
        n: int,
        group_size: int,
        scale_dtype: str,
        qweight: int,
        scales: int,
        zeros: int | None,
        stream: int,
    ) -> None:
        """w4a16_quantize_cuda."""
        self._call(
            "w4a16_quantize_cuda", w, DTYPES[w_dtype], k, n, group_size, DTYPES[scale_dtype],
            qweight, scales, zeros, stream,
        )  # fmt: skip

    def read_floor_cuda(self, data: int, size: int, sink: int, stream: int) -> None:
        """w4a16_read_floor_cuda."""
        self._call("w4a16_read_floor_cuda", data, size, sink, stream)
