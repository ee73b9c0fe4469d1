"""Which room may import which: a file lives in the room of what it knows, and knowledge goes one way.

A room is a folder of a package, or a file beside the folders. A room imports from itself and from what stands before it
here; imports inside functions and under TYPE_CHECKING count too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "common": [],
    "model": [
        "layer_section",
        "config",
        "openmp",
        "cache",
        "dropout",
        "distributions",
        "memory",
        "parameter_spec",
        "parallel",
        "linear",
        "kernels",
        "documents",
        "routing",
        "choices",
        "routing_table",
        "balance",
        "recompute",
        "attention",
        "feedforward",
        "layers",
        "parameters",
        "initialization",
        "language_model",
        "decoding",
        "costs",
        "counted_costs",
    ],
    "data_prep": ["raw", "shards", "work", "config", "stages", "run", "report", "cli", "__main__"],
    "pretrain": [
        "config",
        "phases",
        "ranks",
        "gpus",
        "device",
        "late_reading",
        "data",
        "parallel",
        "engine",
        "planning",
        "checkpoint",
        "imports",
        "saved_model",
        "routing",
        "report",
        "views",
        "analysis",
        "generation",
        "resilience",
        "evaluation",
        "export",
        "api",
        "trainer",
        "saving",
        "together",
        "evaluate",
        "resumed_stages",
        "resume",
        "preflight",
        "segment",
        "segment_start",
        "loop",
        "cli",
        "smoke",
    ],
    "launch": [],
}
"""Package -> its rooms, the lowest first; [] where they may import each other."""
MAY_IMPORT = {
    "common": {"common"},
    "model": {"common", "model"},
    "data_prep": {"common", "data_prep"},
    "pretrain": {"common", "model", "data_prep", "pretrain"},
    "launch": {"common", "model", "data_prep", "pretrain", "launch"},
}
"""Package -> packages of the repository that it may import: neither tests nor benchmarks."""
SHARED = "data_prep.shards"
"""All that training imports of data preparation."""


def modules() -> dict[str, Path]:
    """Name -> file of every module of the product."""
    files = [path.relative_to(ROOT) for package in ROOMS for path in (ROOT / package).rglob("*.py")]
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): ROOT / path for path in files}


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """Modules of the repository that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else str(node.module)


def room(module: str) -> str:
    return [*module.split("."), ""][1]


@pytest.mark.parametrize("package", ROOMS)
def test_a_room_imports_only_rooms_before_it(package: str) -> None:
    order, found = ROOMS[package], []
    for module, path in MODULES.items():
        if module.split(".")[0] != package:
            continue
        for target in imports(path):
            other = target.split(".")[0]
            if other in (*ROOMS, "tests", "benchmarks") and other not in MAY_IMPORT[package]:
                found.append(f"{module} imports {target}")
            if package == "pretrain" and other == "data_prep" and not target.startswith(SHARED):
                found.append(f"{module} imports {target}, and of data_prep training knows {SHARED} alone")
            if other == package and order and room(module):
                assert {room(module), room(target)} <= {*order, ""}, f"{module} or {target}: give its room a place here"
                if room(target) and order.index(room(target)) > order.index(room(module)):
                    found.append(f"{module} imports {target}, a later room")
    assert not found, "\n".join(found)


def test_no_module_imports_itself_in_a_circle() -> None:
    """Nor by imports inside functions: those are for what is slow to import, not for circles."""
    graph = {name: set(imports(path)) - {name} for name, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


@pytest.mark.parametrize("package", [package for package, rooms in ROOMS.items() if rooms])
def test_folders_of_tests_are_rooms(package: str) -> None:
    """A file beside them tests several rooms, or a module that is none."""
    folders = {path.parent.relative_to(ROOT / "tests" / package) for path in (ROOT / "tests" / package).rglob("*.py")}
    assert {folder.parts[0] for folder in folders if folder.parts} <= set(ROOMS[package])
