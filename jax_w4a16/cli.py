"""The command line: python -m jax_w4a16 {convert,demo,info,inspect,tune,verify}."""

import argparse
import platform
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import jax

from jax_w4a16 import _autotune, _config, _convert, _ffi, _verify, demo


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _info() -> int:
    build = _ffi.build_info()
    architectures = ", ".join(build["cuda_architectures"]) if build["cuda"] else "none"
    runtime = _ffi.runtime_ffi_minor()
    rows = {
        "jax_w4a16": f"{build['version']}, XLA FFI 0.{build['ffi_minor']}",
        "CUDA kernels": architectures,
        "CPU kernels": build["cpu_instruction_set"],
        "library": build["library"],
        "program": build["program"],
        "python": f"{platform.python_version()} on {platform.platform()}",
        "jax": jax.__version__,
        "jaxlib": _installed("jaxlib") + ("" if runtime is None else f", XLA FFI 0.{runtime}"),
        "flax": _installed("flax"),
        "tokenizers": _installed("tokenizers"),
        "safetensors": _installed("safetensors"),
    }
    for name, value in rows.items():
        print(f"{name:14}{value}")
    print("\ndevices")
    for device in jax.devices():
        print(f"  {device}  {device.device_kind}")

    print("\nkernels")
    kernels = _verify.kernels()
    width = max(len(kernel.name) for kernel in kernels)
    for kernel in kernels:
        print(f"  {kernel.name:{width}}  {_serves(kernel)}")
    if not any(kernel.implementation == "cuda" for kernel in kernels):
        why = "there is no CUDA device" if build["cuda"] else "this build has none"
        print(f"  no CUDA kernel: {why}")
    return 0


def _serves(kernel: _verify.Kernel) -> str:
    """Whether a kernel can run here at all; else why not, for a problem that suits every kernel."""
    reasons = []
    for m in (1, 64, 4096):
        problem = _config.Problem(m, 4096, 4096, 128, "bfloat16", "bfloat16", False, False)
        reasons.append(_verify.refusal(kernel, problem))
    return "ok" if None in reasons else f"cannot run: {reasons[-1]}"


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in text.split(","))
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected positive numbers, got {text!r}")
    return sizes


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"expected a regular expression, got {text!r}: {error}") from error
    return text


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    shapes = [_sizes(shape.replace("x", ",")) for shape in text.split(",")]
    if any(len(shape) != 2 for shape in shapes):
        raise argparse.ArgumentTypeError(f"expected NxK, joined by commas, got {text!r}")
    return tuple((n, k) for n, k in shapes)


def _tune(arguments: argparse.Namespace) -> int:
    shapes = arguments.shapes
    if arguments.model_config is not None:
        shapes = _autotune.shapes_of_model(arguments.model_config)
    return _autotune.main(
        shapes,
        arguments.m,
        dtypes=("float16", "bfloat16") if arguments.dtype == "both" else (arguments.dtype,),
        group_size=arguments.group_size,
        zeros=arguments.zeros,
        output=arguments.output,
    )


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jax_w4a16",
        description="4-bit-weight, 16-bit-activation matrix multiplication for JAX.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    text = "write a 4-bit checkpoint of another format, or a float one, in our own"
    command = commands.add_parser("convert", help=text, description=_sentence(text))
    command.add_argument("source", type=Path, metavar="IN", help="a .safetensors file, or a folder of them")
    text = "a .safetensors file, which is replaced, as is a link, or a folder"
    command.add_argument("target", type=Path, metavar="OUT", help=text)
    command.add_argument("--quantize", action="store_true", help="quantise float weights, to nearest")
    command.add_argument("--group-size", type=int, help="for --quantize; -1: per column (default: 128)")
    command.add_argument(
        "--include", type=_regex, metavar="REGEX", help="quantise only weights whose name matches"
    )
    command.add_argument(
        "--exclude",
        type=_regex,
        metavar="REGEX",
        help="but those that match (default: embeddings, norms, heads and routers, as `quantize_model`)",
    )

    text = "embed sentences with MiniLM in 4 bits, and compare with float32"
    command = commands.add_parser("demo", help=text, description=_sentence(text))
    command.add_argument(
        "--model",
        metavar="FOLDER",
        help=f"holds {', '.join(demo.FILES)} (default: the installed package {demo.PACKAGE}'s)",
    )

    command.add_argument(
        "--checkpoint",
        metavar="FOLDER",
        help="holds the model in 4 bits, in any format that `convert` reads (default: quantise it here)",
    )

    text = "show versions, devices, and the kernels that this machine can run"
    commands.add_parser("info", help=text, description=_sentence(text))

    text = "show what a checkpoint holds"
    command = commands.add_parser("inspect", help=text, description=_sentence(text))
    command.add_argument("path", type=Path, metavar="PATH", help="a .safetensors file, or a folder of them")

    text = "time every configuration on this GPU, and store the fastest for later runs"
    command = commands.add_parser("tune", help=text, description=_sentence(text))
    source = command.add_mutually_exclusive_group()
    source.add_argument(
        "--shapes",
        type=_shapes,
        default=_autotune.LLAMA_3_8B,
        metavar="NxK,...",
        help="default: Llama 3 8B's",
    )
    source.add_argument("--model-config", type=Path, metavar="FILE", help="a Hugging Face config.json")
    command.add_argument("--m", type=_sizes, default=_autotune.M, metavar="M,...", help="numbers of tokens")
    command.add_argument("--dtype", choices=("float16", "bfloat16", "both"), default="bfloat16")
    command.add_argument("--group-size", type=int, default=128, help="-1: per column (default: 128)")
    command.add_argument("--zeros", action="store_true", help="weights with zero points")
    command.add_argument(
        "--output", type=Path, metavar="FILE", help="default: the user's cache, where it is looked up"
    )

    text = "test every kernel that this machine can run against NumPy"
    command = commands.add_parser("verify", help=text, description=_sentence(text))
    command.add_argument("--kernel", metavar="TEXT", default="", help="only kernels whose name contains this")
    command.add_argument("--case", metavar="TEXT", default="", help="only cases whose name contains this")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
      The exit status: 0 for success, 1 where a check failed or something needed is missing. Wrong arguments
      raise SystemExit, with status 2.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command == "convert" and not arguments.quantize:
        for option in ("group_size", "include", "exclude"):
            if getattr(arguments, option) is not None:
                parser.error(f"--{option.replace('_', '-')} needs --quantize")
    try:
        if arguments.command == "info":
            return _info()
        if arguments.command == "verify":
            return _verify.main(arguments.kernel, arguments.case)
        if arguments.command == "convert":
            return _convert.convert(
                arguments.source,
                arguments.target,
                quantize=arguments.quantize,
                group_size=128 if arguments.group_size is None else arguments.group_size,
                include=arguments.include,
                exclude=arguments.exclude,
            )
        if arguments.command == "inspect":
            return _convert.inspect(arguments.path)
        if arguments.command == "tune":
            return _tune(arguments)
        return demo.main(arguments.model, arguments.checkpoint)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
