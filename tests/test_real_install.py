"""Slow: a clean copy in a folder with a space and brackets is installed and trains, as a newcomer starts it.

Plain PyPI gives the CUDA build of torch there (3 GB to download); no GPU is needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.test_installation import environment

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The files that git knows, in a folder of their own."""
    folder = tmp_path / "a dir [work]" / "switchall"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def make(folder: Path, target: str, environment: dict[str, str]) -> str:
    left_out = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "TRITON_INTERPRET", "MAKEFLAGS")
    environment = {name: value for name, value in environment.items() if name not in left_out}
    done = subprocess.run(["make", target], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout


@pytest.mark.parametrize("source", ["as pip is set up here", "plain PyPI"])
def test_install_doctor_and_demo(copy: Path, source: str) -> None:
    settings = {**os.environ}
    if source == "plain PyPI":
        settings = {**environment(), "PIP_CONFIG_FILE": os.devnull}
    make(copy, "install", settings)
    assert "Everything that training needs is here." in make(copy, "doctor", settings)
    make(copy, "demo", settings)
    outcome = json.loads((copy / "runs" / "demo" / "outcome.json").read_text())
    assert (outcome["exit_code"], outcome["step"]) == (0, 300)
