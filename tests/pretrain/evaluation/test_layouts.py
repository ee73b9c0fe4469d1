"""Tasks while a run trains: the same numbers in every layout, and once for each step that is due, whatever stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.schema import Config
from tests.harness import run_ranks
from tests.pretrain.evaluation import published
from tests.pretrain.runs import events, metrics, small_config, train_runs

SIZES = (
    "model.sequence_length=64",
    "model.feedforward.num_experts=6",
    "evaluate.sequences=0",
    "resilience.replica_check_every_steps=0",
    "evaluate.tasks_limit=2",
)
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "tensor and sequence": (2, ("parallel.tensor=2", "parallel.sequence=true")),
    "pipeline": (2, ("parallel.pipeline=2",)),
    "expert": (2, ("parallel.expert=2",)),
    "zero 3": (2, ("parallel.zero=3",)),
    "all": (4, ("parallel.tensor=2", "parallel.pipeline=2", "model.tied_embedding=true")),
    "micro 1, recomputed": (2, ("batch.micro_sequences=1", "train.recompute=full", "parallel.zero=2")),
}


def config_of(prepared: Path, folder: Path, *overrides: str) -> Config:
    tasks = {"lambada": str(folder), "blimp": str(folder / "blimp")}
    return small_config(prepared, *SIZES, f"evaluate.tasks={json.dumps(tasks)}", *overrides)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    published.lambada(folder)
    published.blimp(folder)
    return folder


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in event.items() if k != "time"} for event in events(run, "evaluation")]


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]], label: str) -> None:
    assert len(found) == len(expected) > 0, label
    for one, other in zip(found, expected, strict=True):
        assert one["task"] == other["task"], label
        numbers = {key: value for key, value in one.items() if not isinstance(value, str)}
        assert numbers == pytest.approx({key: other[key] for key in numbers}, rel=1e-4), label


@pytest.mark.slow  # that tasks are computed once a step: test_tasks.py
def test_a_run_that_goes_on_evaluates_what_a_stop_prevented(files: Path, prepared: Path, tmp_path: Path) -> None:
    every = ("evaluate.tasks_every_steps=2", "train.steps=3", "checkpoint.every_steps=2")
    whole = config_of(prepared, files, *every)
    without = config_of(prepared, files, *every, "train.stop_after_steps=2", "evaluate.tasks={}")
    run_ranks(train_runs, 1, [(whole, tmp_path / "whole"), (without, tmp_path / "parts"), (whole, tmp_path / "parts")])
    expected = evaluations(tmp_path / "whole")
    assert [e["step"] for e in expected] == [2, 2, 3, 3]
    assert_same(evaluations(tmp_path / "parts"), expected, "goes on")
    run_ranks(train_runs, 1, [(whole, tmp_path / "parts")])
    assert len(evaluations(tmp_path / "parts")) == 4, "a finished run evaluates nothing again"
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("parts", "whole")]
    assert losses[0] == losses[1]


@pytest.mark.slow  # test_tasks.py has ZeRO 3 and a pipeline
@pytest.mark.parametrize("position", ["rope", "xl"])
def test_every_layout(files: Path, prepared: Path, tmp_path: Path, position: str) -> None:
    steps = ("train.steps=1", f"model.position.type={position}")
    alone = {
        tied: config_of(prepared, files, *steps, f"model.tied_embedding={str(tied).lower()}") for tied in (False, True)
    }
    run_ranks(train_runs, 1, [(config, tmp_path / f"one {tied}") for tied, config in alone.items()])
    for label, (ranks, layout) in LAYOUTS.items():
        run_ranks(train_runs, ranks, [(config_of(prepared, files, *steps, *layout), tmp_path / label)])
        tied = "model.tied_embedding=true" in layout
        assert_same(evaluations(tmp_path / label), evaluations(tmp_path / f"one {tied}"), label)
