"""`make install` for real, in a path with a space and brackets, and the first commands after it.

Slow, and large: pip takes torch from where this machine's pip looks first, with plain PyPI 3 GB to download once and
6 GB on the disk, for one Python after the other. With PyPI on two busy cores one Python took 5 minutes, the demo 9.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_installation import PYTHONS

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    """A copy of what git tracks here, as it is in the working tree, below a folder that a shell would split. Removed at
    the end: pytest keeps the folders of three sessions, which with five installations each would be 90 GB."""
    tree = tmp_path / "a dir [work]" / "switchall"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    yield tree
    shutil.rmtree(tree)


def run(tree: Path, *line: str) -> str:
    """Output of a command in `tree`, which must end well; without the variables of the test session."""
    clean = {k: v for k, v in os.environ.items() if k not in ("DS_ACCELERATOR", "PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(line, cwd=tree, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(line)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("version", PYTHONS)
def test_a_clean_checkout_installs_and_its_first_commands_run(version: str, tree: Path) -> None:
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "--version"], capture_output=True, check=False).returncode:
        pytest.skip(f"NOT TESTED: there is no python{version} here")
    run(tree, "make", "install", f"PYTHON={python}")
    assert f"Python {version}" in " ".join(run(tree, "make", "doctor").split())
    run(tree, "make", "data")
    said = run(tree, ".venv/bin/python", "launch/pretrain.py", "--config", "configs/switchall_tiny.json", "--dry-run")
    assert "parameters: 3,786,816 total" in said


def test_the_demo_trains_to_its_end(tree: Path) -> None:
    """Two ranks by DeepSpeed's launcher, whose console script cannot start in such a path."""
    said = run(tree, "make", "demo")
    written = re.findall(r"(?m)^--- \d of 3\n(The first|In the|It is).+", said)
    assert written == ["The first", "In the", "It is"]
    assert (tree / "runs" / "demo" / "curves" / "comparison.html").stat().st_size > 10_000
    outcome = json.loads((tree / "runs" / "demo" / "outcome.json").read_text())
    assert (outcome["exit_code"], outcome["step"]) == (0, 200)
