"""Packages of other versions than the code is written for are named, by a check and by a start."""

from __future__ import annotations

from pathlib import Path

import pytest

from common import requirements
from pretrain.cli.plan import main
from tests.launch.slurm.test_submit import submit

DEEPSPEED = "deepspeed 0.19.9 is installed, and deepspeed==0.19.8 is what this code is written for; `make -B install`"


@pytest.fixture
def other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"deepspeed": "0.19.9", "torch": "2.13.0+cu130", "megatron-core": None}
    monkeypatch.setattr(requirements, "installed", versions.get)


def test_this_environment_has_what_is_asked_for() -> None:
    assert requirements.misfits() == []


def test_each_version_that_does_not_fit_is_named(other_versions: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds fit, and what is not there is told by its import."""
    [warning] = requirements.misfits()
    assert warning == f"{DEEPSPEED}, or python -m pip install 'deepspeed==0.19.8'"
    monkeypatch.setattr(requirements, "installed", {"torch": "2.11.0a0+nv26.1", "numpy": "1.26"}.get)
    assert [warning.split()[0] for warning in requirements.misfits()] == ["torch", "numpy"]


def test_a_check_and_a_submission_say_so(
    other_versions: None, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--run-dir", str(tmp_path / "run"), "--set", f"data.manifest={prepared}", "--set", "model.vocab_size=400"]
    assert main(["check", "configs/switchall_tiny.json", "--no-step", *run]) == 0
    said = capsys.readouterr().out
    assert "  warning packages " in said and f"warning: {DEEPSPEED}" in said
    assert submit(prepared, tmp_path / "run", "--dry-run") == 0
    assert f"warning: {DEEPSPEED}" in capsys.readouterr().err
