"""The README's programs on quantising and fine-tuning a model run as they stand there."""

import contextlib
import io
import pathlib
import re

import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_programs_run():
    for module in ("flax", "optax"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    text = README.read_text()
    sections = text[text.index("## Quantise a model") : text.index("## What is supported")]
    programs = re.findall(r"```python\n(.*?)```", sections, re.DOTALL)
    assert len(programs) == 4
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec("".join(programs), names)
    first, last = map(float, printed.getvalue().split(" -> "))
    assert last < first
    assert names["y"].shape == (64, 256)
    assert [a.shape for a in names["z"]] == [(1, 256), (1, 256), (1, 16)]
