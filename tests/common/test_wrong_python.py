"""A command that is started with the wrong Python says so in one line, whatever it is that fails first."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from common import wrong_python
from common.wrong_python import ROOT, why_it_failed
from tests.launch.test_entry_points import ENTRY_POINTS, start


@pytest.mark.parametrize(
    "command", [["-m", "data_prep", "run"], ["launch/pretrain.py", "--dry-run"], ["launch/evaluate.py", "a"]]
)
def test_without_the_environment_the_line_says_how_to_get_it(command: list[str]) -> None:
    """-S: a Python without packages, as the system's own is."""
    done = start("-S", *command, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert f" is not installed for {sys.executable}; `" in done.stderr


def test_a_python_that_is_too_old_is_said_whatever_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    assert f"Python 3.11 to 3.14 is needed, and {sys.executable} is " in (why_it_failed(TypeError("|"), None) or "")


@pytest.mark.parametrize("path", ["common/interruption.py", "common/wrong_python.py", *ENTRY_POINTS])
def test_an_old_python_can_read_what_says_so(path: str) -> None:
    tree = ast.parse((ROOT / path).read_text(), feature_version=(3, 8))
    annotated = any(isinstance(node, ast.FunctionDef) for node in ast.walk(tree))
    future = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    assert future or not annotated, "annotations are evaluated, which an old Python cannot"


def raised(code: str, file: Path) -> str | None:
    try:
        exec(compile(code, str(file), "exec"), {})
    except Exception as error:
        return why_it_failed(error, error.__traceback__)
    raise AssertionError(code)


def test_other_errors_keep_their_traceback(tmp_path: Path) -> None:
    ours = ROOT / "model" / "layers.py"
    assert "no_such is not installed" in (raised("import no_such.part", ours) or "")
    assert raised("import no_such", tmp_path / "library.py") is None, "what a library misses"
    assert raised("import no_such", ROOT / ".venv" / "lib" / "library.py") is None
    assert raised("import {}.no_such".format("model"), ours) is None, "a file of ours"
    assert raised("import json.no_such", ours) is None, "the package is there"
    assert raised("1 / 0", ours) is None


def test_the_fix_is_the_one_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrong_python, "ROOT", tmp_path)
    assert "`make install`" in wrong_python._fix()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    assert wrong_python._fix() == f"`source '{tmp_path}/.venv/bin/activate'` first"
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert "`make -B install`" in wrong_python._fix()
