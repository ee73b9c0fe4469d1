"""Names in strings, which mypy does not see, are there: in programs for `python -c`, in what a patch replaces, behind
`python -m`. A slow test would miss one only when it runs, weeks after the name has moved.

Nothing is imported: a name is there if the file of its module binds it.
"""

from __future__ import annotations

import ast
import functools
import itertools
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import pytest

from tests.test_references import FILES, ROOT

PACKAGES = ("benchmarks", "common", "data_prep", "launch", "model", "pretrain", "tests")
OURS = rf"(?:{'|'.join(PACKAGES)})"
PROGRAM = re.compile(rf"(?m)(?:^|;)\s*(?:from {OURS}[\w.]* import \w|import (?:[\w.]+, )*{OURS}\b)")
"""A string with such a line is read as a program."""
FIELD = re.compile(r"\{\w+(?:![rsa])?\}")
"""Of str.format. A field of either kind is read as the name `field`."""
AS_MODULE = re.compile(rf"python3? -m ({OURS}(?:\.\w+)*)")
PATCHES = ("setattr", "delattr", "patch", "import_module", "find_spec")
"""Functions whose first argument may be a dotted name."""
LOOKED_AT = (ast.Call, ast.Constant, ast.JoinedStr, ast.List, ast.Tuple, ast.Set)


@functools.cache
def file_of(module: str) -> Path | None:
    place = ROOT / module.replace(".", "/")
    candidates = (place / "__init__.py", place.with_suffix(".py"))
    return next((path for path in candidates if path.is_file()), None)


def is_module(module: str) -> bool:
    return file_of(module) is not None or (ROOT / module.replace(".", "/")).is_dir()


@functools.cache
def bound(module: str) -> dict[str, ast.AST]:
    """What a module's statements outside functions and classes bind, by name."""
    path = file_of(module)
    return {} if path is None else names_of(ast.parse(path.read_text(encoding="utf-8")).body)


def names_of(statements: list[ast.stmt]) -> dict[str, ast.AST]:
    found: dict[str, ast.AST] = {}
    rest: list[ast.AST] = list(statements)
    while rest:
        node = rest.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.partition(".")[0]: node for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found[node.id] = node
        elif not isinstance(node, ast.Lambda):
            rest += ast.iter_child_nodes(node)
    return found


def source_of(name: str, statement: ast.Import | ast.ImportFrom) -> str:
    """The dotted name that an import gives `name`."""
    if isinstance(statement, ast.ImportFrom):
        original = next(alias.name for alias in statement.names if (alias.asname or alias.name) == name)
        return f"{statement.module}.{original}"
    return next((alias.name for alias in statement.names if alias.asname == name), name)


def is_there(dotted: str) -> bool:
    """Whether a name of ours can be reached; of what belongs to others, and of values, nothing is asked."""
    parts = dotted.split(".")
    if parts[0] not in PACKAGES:
        return True
    size = max((n for n in range(1, len(parts) + 1) if is_module(".".join(parts[:n]))), default=0)
    if size in (0, len(parts)):
        return size > 0
    module, name, further = ".".join(parts[:size]), parts[size], parts[size + 1 :]
    node = bound(module).get(name)
    if isinstance(node, ast.Import | ast.ImportFrom):
        return is_there(".".join([source_of(name, node), *further]))
    if isinstance(node, ast.ClassDef) and further and not node.bases:
        return further[0] in names_of(node.body) or bool(re.search(rf"self\.{further[0]}\b", ast.unparse(node)))
    return node is not None or "__getattr__" in bound(module)


def text_of(node: ast.AST) -> str | None:
    """A string, or an f-string with `field` for each of its fields."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "field" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def of_program(text: str) -> Iterator[str]:
    """Every dotted name that a program imports or reaches from what it imported."""
    tree = ast.parse(FIELD.sub("field", textwrap.dedent(text)))
    given: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.asname or alias.name.partition(".")[0] for alias in node.names]
            given |= {name: source_of(name, node) for name in names}
            yield from (alias.name for alias in node.names if isinstance(node, ast.Import))
    yield from given.values()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.fullmatch(r"\w+(\.\w+)+", chain := ast.unparse(node)):
            root, _, rest = chain.partition(".")
            if root in given:
                yield f"{given[root]}.{rest}"


def names_in_strings(nodes: list[ast.AST]) -> Iterator[str]:
    """Every dotted name in the programs of a file and in the calls of PATCHES."""
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        text = None if id(node) in parts else text_of(node)
        if text is not None and PROGRAM.search(text):
            yield from of_program(text)
        if is_patch(node):
            name = text_of(node.args[0]) if node.args else None
            if name is not None and "." in name and isinstance(node.args[0], ast.Constant):
                yield name


def is_patch(node: ast.AST) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in PATCHES


def put_where_nothing_is(nodes: list[ast.AST]) -> Iterator[str]:
    """Patches that are made whether what they replace is there or not."""
    for node in filter(is_patch, nodes):
        if {ast.unparse(word) for word in node.keywords} & {"raising=False", "create=True"}:
            yield ast.unparse(node)


def started(nodes: list[ast.AST]) -> Iterator[str]:
    """Modules of ours that stand behind "-m" in a list of words."""
    for node in nodes:
        words = node.args if isinstance(node, ast.Call) else getattr(node, "elts", [])
        for option, word in itertools.pairwise(map(text_of, words)):
            if option == "-m" and word is not None and word.partition(".")[0] in PACKAGES:
                yield word


def can_be_run(module: str) -> bool:
    """Whether `python -m` finds it: a package needs a __main__."""
    return is_module(f"{module}.__main__") if (ROOT / module.replace(".", "/")).is_dir() else is_module(module)


def missing(source: str) -> list[str]:
    nodes: list[ast.AST] = [node for node in ast.walk(ast.parse(source)) if isinstance(node, LOOKED_AT)]
    modules = {*started(nodes), *AS_MODULE.findall(source)}
    return sorted(
        {name for name in names_in_strings(nodes) if not is_there(name)}
        | set(put_where_nothing_is(nodes))
        | {f"-m {module}" for module in modules if not can_be_run(module)}
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_names_in_strings_are_there(package: str) -> None:
    files = [name for name in FILES if name.startswith(f"{package}/") and name.endswith(".py")]
    assert files
    found = {name: missing((ROOT / name).read_text(encoding="utf-8")) for name in files}
    assert not {name: names for name, names in found.items() if names}


def test_modules_that_other_files_start_are_there() -> None:
    files = [name for name in FILES if name == "Makefile" or name.endswith((".sbatch", ".md", ".json", ".toml"))]
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in files}
    started = {module for text in texts.values() for module in AS_MODULE.findall(text)}
    assert started >= {"data_prep", "benchmarks.gpu"}
    assert sorted(module for module in started if not can_be_run(module)) == []


@pytest.mark.parametrize(
    "source, found",
    [
        ("monkeypatch.setattr('common.files.gone', 1)", "common.files.gone"),
        ("mock.patch('pretrain.trainer.Gone.launch')", "pretrain.trainer.Gone"),
        (
            "monkeypatch.setattr(files, 'gone', 1, raising=False)",
            "monkeypatch.setattr(files, 'gone', 1, raising=False)",
        ),
        ("mock.patch('pretrain.trainer.Trainer.gone')", "pretrain.trainer.Trainer.gone"),
        ("importlib.import_module('common.gone')", "common.gone"),
        ("RUN = 'import sys; from common.files import gone'", "common.files.gone"),
        ("RUN = f'import common.files\\ncommon.files.gone({1})'", "common.files.gone"),
        ("RUN = 'from common import files as f\\nf.gone = open({path!r})'", "common.files.gone"),
        ("RUN = 'import common.files, data_prep.gone'", "data_prep.gone"),
        ("run([sys.executable, '-m', 'benchmarks.gone'])", "-m benchmarks.gone"),
        ("run('-m', 'common')", "-m common"),
        ("# again: python{} -m data_prep.gone run".format(""), "-m data_prep.gone"),
    ],
)
def test_a_name_that_has_moved_is_found(source: str, found: str) -> None:
    assert [name.removesuffix(".launch") for name in missing(source)] == [found]


@pytest.mark.parametrize(
    "source",
    [
        "monkeypatch.setattr('pretrain.trainer.Trainer.launch', f)",
        "monkeypatch.setattr('data_prep.work.folder.os.replace', f)",
        "RUN = 'from common import files\\nfrom pretrain.trainer import Trainer as T\\nT.launch, files.write_json'",
        "RUN = f'import torch, common.paths\\ntorch.gone(common.paths.REPOSITORY.gone, {x.y})'",
        "run([sys.executable, '-m', 'data_prep', '-m', 'not slow', '-m', 'pip'])",
    ],
)
def test_a_name_that_is_there_is_no_fault(source: str) -> None:
    assert missing(source) == []
