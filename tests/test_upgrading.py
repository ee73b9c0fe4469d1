"""docs/upgrading.md lists exactly the places that rely on what libraries keep for themselves, with fast tests."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("model", "pretrain", "common", "launch", "data_prep")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PAGE = (ROOT / "docs" / "upgrading.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ([\w-]+) \| (\S+\.py) \| (.+) \| (.+) \| (.+) \|$", PAGE, re.MULTILINE)
"""Name, file, what is relied on, why, tests."""
SHORT = dict(re.findall(r"^- `(\w+)`: `(\S+)`", PAGE, re.MULTILINE))
"""Words of the last column that stand for a test."""
LIBRARIES = ("torch", "deepspeed", "megatron", "triton", "webdataset")
OTHERS = {
    *("_asdict", "_fields", "_replace", "_exit", "_value2member_map_", "_max_workers"),  # Python's
    *("_subparsers", "_option_string_actions", "_MutuallyExclusiveGroup", "_SubParsersAction", "_ActionsContainer"),
    *("_attn_implementation", "_added_tokens_decoder"),  # of transformers, where an export is read
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@functools.cache
def own_names() -> frozenset[str]:
    """All private names that product code defines."""
    found: set[str] = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                found.add(node.attr)
    return frozenset(filter(is_private, found))


def private_names(source: str) -> Iterator[str]:
    """What a file reads, sets or imports of others that begins with _."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if node.attr not in own_names() | OTHERS:
                yield node.attr
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = [getattr(node, "module", None) or ""] if isinstance(node, ast.ImportFrom) else []
            for dotted in [*module, *(alias.name for alias in node.names)]:
                of_library = (module or [dotted])[0].split(".")[0] in LIBRARIES
                yield from (part for part in dotted.split(".") if of_library and is_private(part))


def problem_of(test: str) -> str | None:
    """Why `FILE` or `FILE::NAME` is no fast test."""
    file, _, name = test.partition("::")
    if not file.startswith("tests/") or not (ROOT / file).is_file():
        return f"{test}: no such file"
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    found = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == name]
    if not found:
        return f"{test}: no such test"
    of_file = [node for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"]
    marks = [*found[0].decorator_list, *(node.value for node in of_file)]
    if any(re.match(r"pytest\.mark\.(slow|slurm)\b", ast.unparse(mark)) for mark in marks):
        return f"{test}: slow"
    return None


def test_the_page_equals_the_code() -> None:
    marked = [
        (name, path.relative_to(ROOT).as_posix())
        for path in FILES
        for name in re.findall(r"#.*RELIES-ON ([\w-]+)", path.read_text(encoding="utf-8"))
    ]
    assert set(marked) == {row[:2] for row in ROWS}
    assert len({row[:2] for row in ROWS}) == len(ROWS) > 40


def test_each_private_name_of_a_library_is_in_the_row_of_its_file() -> None:
    missing = {}
    for path in FILES:
        name = path.relative_to(ROOT).as_posix()
        listed = set(re.findall(r"\w+", " ".join(row[2] for row in ROWS if row[1] == name)))
        missing[name] = sorted(set(private_names(path.read_text(encoding="utf-8"))) - listed)
    assert not {name: names for name, names in missing.items() if names}, "RELIES-ON, and docs/upgrading.md"


@pytest.mark.parametrize(
    "source, found",
    [
        ("optimizer._gone(1)", ["_gone"]),
        ("self._engine._gone = 1", ["_gone"]),
        ("self._gone()", ["_gone"]),
        ("from torch._gone.there import x", ["_gone"]),
        ("from deepspeed.there import _gone", ["_gone"]),
        ("import triton._gone", ["_gone"]),
        ("import _thread; x.__dict__; row._replace(a=1); from os import _exit", []),
    ],
)
def test_a_private_name_is_found(source: str, found: list[str]) -> None:
    assert [name for name in private_names(source) if name != "_engine"] == found


def test_tests_of_a_row_are_fast_ones() -> None:
    problems = []
    for name, file, _, _, tests in ROWS:
        found = [SHORT.get(test, test) for test in re.findall(r"`([^`]+)`", tests)]
        problems += [f"{name} in {file}: {problem_of(test)}" for test in found if problem_of(test)]
        problems += [] if found else [f"{name} in {file}: no test"]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "test, problem",
    [
        ("tests/gone.py::test_x", "no such file"),
        ("tests/test_upgrading.py", "no such test"),
        ("tests/test_upgrading.py::test_gone", "no such test"),
        (
            "tests/pretrain/planning/test_rehearsal.py::test_a_rehearsed_step_calls_the_collectives_of_a_real_one",
            "slow",
        ),
        ("tests/model/kernels/triton/test_versions.py::test_kernels_compile", "slow"),
        ("tests/test_upgrading.py::test_the_page_equals_the_code", None),
    ],
)
def test_a_test_that_is_gone_or_slow_is_found(test: str, problem: str | None) -> None:
    assert problem_of(test) == (problem and f"{test}: {problem}")


def test_product_code_has_none_of_the_tools_of_tests() -> None:
    """What replaces something for a while is common/replaced.py, whose error names the page."""
    found = {
        path.relative_to(ROOT).as_posix()
        for path in FILES
        if re.search(r"^\s*(from|import) (unittest|pytest|mock)\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert not found
