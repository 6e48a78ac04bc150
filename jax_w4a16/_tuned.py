"""The file of tuned choices: for one kind of GPU and one build, which configuration serves which problem.

    {"schema": 1, "device": "NVIDIA H200", "build": "0.1.0-3f9c…", "choices": [
      {"m": 1, "n": 4096, "k": 4096, "group_size": 128, "x_dtype": "bfloat16", "out_dtype": "bfloat16",
       "has_zeros": false, "config": "…", "us": 5.1, "heuristic": "…", "heuristic_us": 5.3}]}

It lies in the user's cache folder. A choice serves its problem with a bias too, which costs nothing. A file
that cannot be read, or was written for another GPU or build, is ignored with one warning. In a program of
several processes, give every host the same file.
"""

import functools
import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_w4a16._ffi import native

if TYPE_CHECKING:
    from jax_w4a16._config import Problem

SCHEMA = 1


def build() -> str:
    """Names this build: its version and a hash of its list of configurations."""
    info = native.build_info()
    digest = hashlib.sha256("\n".join(info["configs"]).encode()).hexdigest()
    return f"{info['version']}-{digest[:12]}"


def path(device_kind: str) -> Path:
    """Where the choices for a kind of GPU lie: $XDG_CACHE_HOME or ~/.cache, in jax_w4a16/."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kind = re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_")
    return cache / "jax_w4a16" / f"{kind}-{build()}.json"


def lookup(device_kind: str, problem: "Problem") -> str | None:
    """The configuration that was tuned for exactly this problem, or None."""
    try:
        file = path(device_kind)
    except RuntimeError:  # there is no home folder, so nothing was tuned
        return None
    return _table(file, device_kind).get(_key(vars(problem)))


def load(file: Path, device_kind: str) -> list[dict[str, Any]]:
    """The choices in a file; none where there is no such file.

    Raises:
      ValueError: it is damaged, or for another schema, GPU or build.
    """
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ValueError(str(error)) from error
    expected = {"schema": SCHEMA, "device": device_kind, "build": build()}
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, got {type(content).__name__}")
    for name, value in expected.items():
        if content.get(name) != value:
            raise ValueError(f"{name}: expected {value!r}, got {content.get(name)!r}")
    choices = content.get("choices")
    if not isinstance(choices, list) or not all(_is_choice(choice) for choice in choices):
        raise ValueError("choices: expected a list of problems, each with its config")
    return choices


def save(file: Path, device_kind: str, choices: list[dict[str, Any]]) -> None:
    """Adds choices to a file, replacing those of the same problems and a file that load() refuses."""
    try:
        kept = load(file, device_kind)
    except ValueError:
        kept = []
    merged = {_key(choice): choice for choice in [*kept, *choices]}
    lines = ",\n".join("  " + json.dumps(choice) for choice in merged.values())
    header = json.dumps({"schema": SCHEMA, "device": device_kind, "build": build()})
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(f'{header[:-1]}, "choices": [\n{lines}\n]}}\n')
    temporary.replace(file)  # in one step: another process may be reading
    _table.cache_clear()


_FIELDS = ("m", "n", "k", "group_size", "x_dtype", "out_dtype", "has_zeros")


def _key(choice: Mapping[str, Any]) -> tuple:
    return tuple(choice[name] for name in _FIELDS)


def _is_choice(choice: Any) -> bool:
    names = ("config", *_FIELDS)
    return isinstance(choice, dict) and all(isinstance(choice.get(name), int | str) for name in names)


@functools.cache
def _table(file: Path, device_kind: str) -> dict[tuple, str]:
    """Read once in a process, so that all of its traces agree."""
    try:
        return {_key(choice): choice["config"] for choice in load(file, device_kind)}
    except ValueError as error:
        warnings.warn(f"jax_w4a16: ignores the tuned choices in {file}: {error}", stacklevel=2)
        return {}
