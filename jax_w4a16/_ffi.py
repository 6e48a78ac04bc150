"""Loads the compiled module, checks it against the running jaxlib, registers its FFI targets."""

import importlib
import re
from importlib import metadata
from pathlib import Path

import jax
from jax import export

TARGETS = (
    "w4a16_dot",
    "w4a16_fused_dot",
    "w4a16_ragged_dot",
    "w4a16_pack",
    "w4a16_dequantize",
    "w4a16_quantize",
)

DISABLE_JAX_EXPORT_CHECKS = [export.DisabledSafetyCheck.custom_call(target) for target in TARGETS]
"""`jax.export` knows no custom calls but its own: pass this as its `disabled_checks`."""


def runtime_ffi_minor() -> int | None:
    """XLA FFI minor version of the installed jaxlib; None where it ships no headers."""
    header = Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h"
    try:
        match = re.search(r"define\s+XLA_FFI_API_MINOR\s+(\d+)", header.read_text())
    except OSError:
        return None
    return int(match.group(1)) if match else None


def _load():
    try:
        return importlib.import_module("jax_w4a16._w4a16")
    except ImportError as error:
        raise ImportError(
            f"jax_w4a16: the compiled module jax_w4a16._w4a16 did not load ({error}); "
            "install the package with pip, which builds it"
        ) from error


def check_runtime(built: int, running: int | None) -> None:
    """Raises ImportError where the runtime is older than the headers the handlers were built with.

    Registered all the same, such handlers would stop every JAX backend from starting.
    """
    if running is not None and running < built:
        jaxlib = f"jaxlib {metadata.version('jaxlib')}"
        raise ImportError(
            f"jax_w4a16 was built for XLA FFI 0.{built}, but {jaxlib} has 0.{running}; "
            "install a newer jax, or build jax_w4a16 against this jaxlib"
        )


def _register() -> None:
    # XLA takes the same handler under the same name again, as when this module is reloaded.
    for platform, targets in native.registrations().items():
        for target, handler in targets.items():
            jax.ffi.register_ffi_target(target, handler, platform=platform)


native = _load()
check_runtime(native.ffi_minor, runtime_ffi_minor())
_register()

__version__: str = native.build_info()["version"]


def build_info() -> dict:
    """What this build holds: version, FFI minor, CUDA architectures, CPU instruction set, configurations."""
    return native.build_info()


def has_cuda() -> bool:
    """Whether CUDA kernels were compiled in."""
    return native.build_info()["cuda"]
