"""Slow: the Triton tests again with every Triton that a supported torch brings, and with the newest one.

Each is installed from PyPI into a folder of its own, which goes before the installed one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compiled
from benchmarks.compiled_records import read_records

ROOT = Path(__file__).resolve().parents[4]
FOLDER = Path(__file__).parent
NEWEST = "3.9.0"
"""Of what pyproject.toml allows."""
pytestmark = pytest.mark.slow


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m` with the Triton in `folder`."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=inherited | {"PYTHONPATH": str(folder)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module", params=["3.6.0", "3.7.1", NEWEST])
def triton(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A version, and the folder that holds it."""
    folder = tmp_path_factory.mktemp("triton")
    target = ("--target", str(folder), "--python", sys.executable)
    done = run(folder, "uv", "pip", "install", "--quiet", "--no-deps", *target, f"triton=={request.param}")
    assert done.returncode == 0, done.stderr
    found = subprocess.run(
        [sys.executable, "-c", "import triton; print(triton.__version__)"],
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == request.param
    return request.param, folder


def test_kernels_are_right_when_interpreted(triton: tuple[str, Path]) -> None:
    """Every op with every gradient against fp64, bounds and races: all fast tests beside this file."""
    ignored = [f"--ignore={FOLDER / name}" for name in ("test_compiled.py", Path(__file__).name)]
    done = run(
        triton[1], "pytest", str(FOLDER), *ignored, "-m", "not slow", "-p", "no:cacheprovider", TRITON_INTERPRET="1"
    )
    assert done.returncode == 0, done.stdout[-5000:]


def test_kernels_compile(triton: tuple[str, Path]) -> None:
    """The newest gives what is recorded of every shipped configuration; of the others a sample compiles and passes,
    but for what docs/kernels.md names. (test_compiled.py has the representative ones of the installed Triton.)"""
    version, folder = triton
    assert next(iter(read_records(compiled.RECORDS))) == NEWEST
    again = "all" if version == NEWEST else "sample"
    done = run(folder, "benchmarks.compiled", "--check", "--recompile", again, "--markdown")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]
    failed = {(row[0], row[1]) for row in rows if len(row) > 2 and row[-1]}
    known = {("switchhead_value forward E4 1024x112 bf16", "100")}  # which a sample need not have
    assert failed <= (set() if version == NEWEST else known), done.stdout + done.stderr
    assert done.returncode == (1 if failed else 0), done.stderr
