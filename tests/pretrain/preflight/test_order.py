"""What is wrong is said before the checks that follow: nobody waits half a minute for the name of an unknown key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from pretrain.cli.plan import main as plan_main
from pretrain.cli.train import main as train_main
from pretrain.config.loading import to_json
from pretrain.preflight.whole import Examination
from tests.pretrain.runs import small_config

Heard = dict[str, list[str]]
PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "plan.py check": lambda arguments: plan_main(["check", "c.json", *arguments]),
    "a dry run": lambda arguments: train_main(["--config", "c.json", "--dry-run", *arguments]),
}


@pytest.fixture(params=PROGRAMS)
def program(
    request: pytest.FixtureRequest, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[str]], int]:
    """Checks a run without mistakes, but for those of its arguments."""
    monkeypatch.chdir(tmp_path)
    tree = to_json(small_config(prepared, "train.device=cpu", "batch.micro_sequences=2"))
    (tmp_path / "c.json").write_text(json.dumps(tree))
    return PROGRAMS[request.param]


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Heard:
    """The errors that were said before the run was checked, before a step was rehearsed, and, by `end`, later."""
    heard: Heard = {}
    check_run = Examination.check_run

    def said() -> list[str]:
        return [line.partition(": ")[2].partition(":")[0] for line in capsys.readouterr().err.splitlines()]

    def checked(self: Examination, **options: Any) -> None:
        heard["settings"] = said()
        check_run(self, **options)

    def rehearsed(*arguments: Any, **options: Any) -> None:
        heard.setdefault("run", said())
        raise NotImplementedError("aten::new")

    monkeypatch.setattr(Examination, "check_run", checked)
    monkeypatch.setattr("pretrain.planning.rehearsal.rehearse", Mock(side_effect=rehearsed))
    return heard


def test_all_that_is_wrong_with_the_settings_is_said_at_once_and_no_step_is_rehearsed(
    program: Callable[[list[str]], int], heard: Heard, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ("train.stepz=1", "model.d_modell=8", "batch.global_sequences=9", "data.manifest=gone")
    assert program([part for key in keys for part in ("--set", key)]) == 2
    assert heard == {"settings": ["model.d_modell", "train.stepz", "batch.global_sequences"]}
    printed = capsys.readouterr()
    assert printed.err.startswith("error: data.manifest: there is no") and printed.err.count("\n") == 1
    assert "memory              not checked: configuration has a fault" in printed.out


@pytest.mark.parametrize("key", ["optimizer.groups.routers.learning_rate_ratio=0.5", "parallel.data=2"])
def test_no_step_is_rehearsed_of_a_run_that_cannot_be_built(
    program: Callable[[list[str]], int], heard: Heard, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    swapped = ("--set", "model.attention.type=dense", "--set", "model.feedforward.type=dense")
    assert program([*swapped, "--set", key]) == 2
    assert "run" not in heard
    assert len(heard["settings"]) + capsys.readouterr().err.count("error: ") == 1


def test_what_is_wrong_with_the_data_is_said_before_a_step_is_rehearsed(
    program: Callable[[list[str]], int], heard: Heard, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program(["--set", "data.manifest=gone"]) == 2
    assert heard == {"settings": [], "run": ["data.manifest"]}
    assert capsys.readouterr().err == "", "and once"


def test_a_dry_run_prints_no_configuration_that_it_has_refused(
    program: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    for key, is_printed in (("train.stepz=1", False), ("train.steps=1", True)):
        program(["--no-step", "--set", key])
        printed = capsys.readouterr().out
        is_dry_run = program is PROGRAMS["a dry run"]
        assert ('"d_model": ' in printed) == ("parameters: " in printed) == (is_printed and is_dry_run)
