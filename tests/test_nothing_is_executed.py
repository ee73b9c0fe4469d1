"""What is read is data: no file that a user names, or that another program wrote, is unpickled, run or unpacked.

Tests of the readers (imports/test_import_weights.py, data_prep/test_tables_and_tars.py) try files that would do
something when they are opened; this one sees to it that no other place opens any in such a way.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from common.paths import REPOSITORY

PACKAGES = ("common", "data_prep", "launch", "model", "pretrain")
MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
WORDS = re.compile(
    rf"\b({'|'.join(MODULES)}|load|PackageImporter|eval|exec|system|popen|extractall|shell)\b|allow_pickle"
)
"""In no other file anything is found, and parsing takes a second."""
ALLOWED = {"pretrain/imports/reading.py: pickle.UnpicklingError"}
"""The error by which torch refuses what is no tensor."""


def name_of(node: ast.AST) -> str:
    """The dotted name that an expression spells, or nothing."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def is_true(call: ast.Call, keyword: str) -> bool:
    value = next((k.value for k in call.keywords if k.arg == keyword), None)
    return isinstance(value, ast.Constant) and value.value is True


def executed(tree: ast.AST) -> Iterator[str]:
    """What a module does that may execute what it reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in MODULES:
            yield f"from {node.module} import"
        elif isinstance(node, ast.Attribute) and name_of(node.value) in MODULES:
            yield name_of(node)
        elif isinstance(node, ast.Call):
            name = name_of(node.func)
            if name.endswith(("torch.load", "torch.package.PackageImporter")) and not is_true(node, "weights_only"):
                yield f"{name} without weights_only=True"
            if name in ("eval", "exec", "os.system", "os.popen") or name.endswith(".extractall"):
                yield name
            for given in node.keywords:
                is_false = isinstance(given.value, ast.Constant) and given.value.value is False
                if given.arg in ("allow_pickle", "shell") and not is_false:
                    yield f"{name} with {given.arg}"


def test_no_file_is_unpickled_run_or_unpacked() -> None:
    files = [path for package in PACKAGES for path in sorted((REPOSITORY / package).rglob("*.py"))]
    assert len(files) > 200
    found = {
        f"{path.relative_to(REPOSITORY).as_posix()}: {what}"
        for path in files
        if WORDS.search(text := path.read_text(encoding="utf-8"))
        for what in executed(ast.parse(text))
    }
    assert found == ALLOWED


@pytest.mark.parametrize(
    "program, said",
    [
        ("import pickle\npickle.load(file)", ["pickle.load"]),
        ("from pickle import load", ["from pickle import"]),
        ("torch.load(path)", ["torch.load without weights_only=True"]),
        ("torch.load(path, weights_only=flag)", ["torch.load without weights_only=True"]),
        ("torch.load(path, weights_only=True, mmap=True)", []),
        ("np.load(path, allow_pickle=True)", ["np.load with allow_pickle"]),
        ("subprocess.run(line, shell=True)", ["subprocess.run with shell"]),
        ("model.eval()\ntar.extractall(folder)", ["tar.extractall"]),
        ("eval(text)", ["eval"]),
    ],
)
def test_the_test_above_sees_it(program: str, said: list[str]) -> None:
    assert list(executed(ast.parse(program))) == said
