"""Snippets of docs/kernels.md run, and what it names exists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "kernels.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet(number: int) -> None:
    exec(compile(SNIPPETS[number], f"docs/kernels.md, snippet {number}", "exec"), {})


def test_what_is_named_exists() -> None:
    modules = set(re.findall(r"python -m ([\w.]+)", TEXT))
    assert {"benchmarks.compiled", "benchmarks.gpu", "model.kernels.cuda.build", "pytest"} <= modules
    assert all(importlib.util.find_spec(name) is not None for name in modules)
    paths = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(paths) >= 5
    assert all((ROOT / "docs" / path).exists() for path in paths), paths
    assert all((ROOT / path).exists() for path in re.findall(r"pytest (\S+)", TEXT))
