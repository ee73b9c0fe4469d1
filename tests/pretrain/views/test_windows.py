"""Validations before and after a resume that changed what they read: their losses are not mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.loading import config_tree
from pretrain.config.validated import reads_streams
from pretrain.views.comparison import differing_facts
from pretrain.views.comparison_text import text
from pretrain.views.reading import RunView
from pretrain.views.status import summary
from tests.pretrain.views.compared import runs_of
from tests.pretrain.views.compared import write as write_run
from tests.pretrain.views.status_case import CONFIG, shown, write

Event = dict[str, Any]


def validation(step: int, loss: float) -> Event:
    return {"event": "validation", "time": 3.0, "step": step, "split": "validation", "loss": loss}


def start(step: int, *changes: tuple[str, Any, Any], digest: str = "d" * 64) -> list[Event]:
    """A start that goes on after `step`, with these (key, then, now)."""
    changed = [{"event": "changed_setting", "key": key, "then": then, "now": now} for key, then, now in changes]
    return [{"event": "started", "time": 4.0, "step": step, "ranks": 2, "data_digest": digest}, *changed]


def run(folder: Path, *events: Event | list[Event], config: dict[str, Any] | None = None) -> Path:
    flat = [one for event in events for one in (event if isinstance(event, list) else [event])]
    path = write(folder, events=flat)
    (path / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    return path


FEWER = ("evaluate.sequences", 256, 16)
MORE = ("evaluate.sequences", 16, 256)


@pytest.mark.parametrize(
    "events, now, best",
    [
        ([validation(4, 3.0), start(4, FEWER), validation(8, 3.75), validation(10, 3.5)], 16, (10, 3.5)),
        ([validation(4, 3.0), start(4, FEWER), validation(8, 2.0), start(8, MORE), validation(10, 3.5)], 256, (4, 3.0)),
        ([validation(4, 3.0), start(4), validation(8, 3.5)], 256, (4, 3.0)),
        # The second start goes on from before the first one's checkpoints, so it changes nothing.
        ([validation(4, 3.0), start(4, FEWER), validation(8, 2.0), start(4), validation(8, 3.5)], 256, (4, 3.0)),
        ([validation(4, 3.0), start(4, FEWER)], 16, (4, 3.0)),
        # A start that changed them computes the validation of its own step again.
        (
            [validation(2, 3.0), validation(4, 3.25), start(4, FEWER), validation(4, 3.75), validation(8, 4.0)],
            16,
            (4, 3.75),
        ),
    ],
)
def test_the_best_is_of_the_windows_of_the_newest(
    tmp_path: Path, events: list[Event | list[Event]], now: int, best: tuple[int, float]
) -> None:
    folder = run(tmp_path / "run", *events, config={"evaluate": {"sequences": now}})
    view = RunView.open(folder)
    assert view.best_validation() == best and summary(view)["best_validation"] == best
    newest = view.validations()[-1][0]
    assert (f", best {best[1]:.4f} after step {best[0]}" in shown(folder)) == (best[0] != newest)


def test_other_data_are_other_windows_but_other_weights_of_a_mixture_are_not(tmp_path: Path) -> None:
    def best(key: str, *changes: tuple[str, Any, Any]) -> tuple[int, float] | None:
        change = (f"data.{key} (digest)", "c" * 12, "d" * 12)
        folder = run(
            tmp_path / str(len(list(tmp_path.iterdir()))),
            validation(4, 3.0),
            start(4, *changes, change),
            validation(8, 3.5),
        )
        return RunView.open(folder).best_validation()

    light, heavy, other = (
        [{"manifest": "a", "weight": 1.0}, {"manifest": name, "weight": weight}]
        for name, weight in (("b", 1.0), ("b", 3.0), ("c", 1.0))
    )
    assert best("manifest") == (8, 3.5)
    assert best("sources", ("data.sources", light, other)) == (8, 3.5)
    assert best("sources", ("data.sources", light, heavy)) == (4, 3.0)


@pytest.mark.parametrize(
    "memory, placement, has_effect", [(0, "spread", False), (0, "start", True), (1, "spread", True)]
)
def test_streams_count_where_they_have_an_effect(tmp_path: Path, memory: int, placement: str, has_effect: bool) -> None:
    def config(streams: int) -> dict[str, Any]:
        evaluate = {"streams": streams, "placement": placement}
        return {"evaluate": evaluate, "model": {"position": {"memory_chunks": memory}}}

    events: list[Event | list[Event]] = [validation(4, 3.0), start(4, ("evaluate.streams", 64, 8)), validation(8, 3.5)]
    resumed = RunView.open(run(tmp_path / "resumed", *events, config=config(8)))
    assert resumed.best_validation() == ((8, 3.5) if has_effect else (4, 3.0))
    runs = runs_of(*(write_run(tmp_path / str(n), [{"step": 1, "loss": 5.0}], config(n)) for n in (8, 64)))
    assert [key for key, _ in differing_facts(runs)] == ["evaluate.streams"] * has_effect


@pytest.mark.parametrize(
    "position, placement, reads_on",
    [
        (None, "spread", False),  # of another program, or of a version that had no memory
        ({"memory_chunks": 0}, "spread", False),
        ({"memory_chunks": 1}, "spread", True),
        ({"memory_chunks": 1}, "start", False),
    ],
)
def test_what_reads_on_from_window_to_window(position: dict[str, int] | None, placement: str, reads_on: bool) -> None:
    config = {"model": {} if position is None else {"position": position}, "evaluate": {"placement": placement}}
    assert reads_streams(config) is reads_on


def test_a_comparison_says_after_which_step_a_resume_changed_the_windows(tmp_path: Path) -> None:
    events: list[Event | list[Event]] = [
        validation(4, 3.0),
        start(4, FEWER, ("train.seed", 1, 2)),
        validation(8, 3.5),
        start(8),
        validation(9, 3.25),
    ]
    one = run(tmp_path / "one", *events, config={"evaluate": {"sequences": 16}})
    other = run(tmp_path / "other", validation(4, 3.0), config={"evaluate": {"sequences": 16}})
    said = text(runs_of(one, other), 0.0)
    note = (
        "note: one: evaluate.sequences changed: validation losses from step 8 on are of other windows of the text than"
    )
    assert said.count(" changed: ") == 1 and note in said
    assert text(runs_of(one), 0.0).startswith(note)


def test_a_branch_has_no_validations_before_it_whose_windows_could_differ(tmp_path: Path) -> None:
    branch = {"event": "branch", "time": 3.5, "step": 6}
    folder = run(tmp_path / "run", validation(4, 3.0), branch, start(6, FEWER), validation(8, 3.75))
    view = RunView.open(folder)
    assert list(view.reads()) == [step for step, _ in view.validations()] == [8]
    assert " changed: " not in text(runs_of(folder), 0.0)


def test_a_description_that_was_made_of_the_settings_is_no_difference_beside_them(tmp_path: Path) -> None:
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps({"description": "a tiny model", "train": {"seed": 1}}))
    trees = [config_tree(file, overrides) for overrides in ((), ["train.seed=2"], ["train.seed=3", "description=mine"])]
    runs = runs_of(*(write_run(tmp_path / str(n), [{"step": 1, "loss": 5.0}], tree) for n, tree in enumerate(trees)))
    assert [key for key, _ in differing_facts(runs[:2])] == ["train.seed"]
    assert [key for key, _ in differing_facts(runs[::2])] == ["description", "train.seed"]


def test_accuracies_of_other_examples_are_said_to_be(tmp_path: Path) -> None:
    def evaluated(name: str, limit: int) -> Path:
        path = write_run(tmp_path / name, [{"step": 1, "loss": 5.0}], {"evaluate": {"tasks_limit": limit}})
        line = {"event": "evaluation", "task": "lambada", "step": 1, "accuracy": 0.5}
        (path / "events.jsonl").write_text(json.dumps(line) + "\n")
        return path

    said = text(runs_of(evaluated("one", 0), evaluated("other", 50)), 0.0)
    assert "note: evaluate.tasks_limit differ: accuracies of tasks are of other examples" in said
