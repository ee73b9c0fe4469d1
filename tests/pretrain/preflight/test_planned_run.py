"""What the checks of a run ask of its data, its checkpoints and the disk: alone, or as one rank of several."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from common.errors import UserError
from pretrain.data.patience import Patience
from pretrain.data.sources import Sources
from pretrain.preflight.checklist import Blocked, Checklist, Outcome
from pretrain.preflight.run import PlannedRun, preflight
from tests.pretrain.runs import small_config


@pytest.mark.parametrize("thorough", [True, False])
@pytest.mark.parametrize("alone", [True, False])
def test_a_rank_of_several_looks_up_no_single_file(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: bool, thorough: bool
) -> None:
    """A thousand ranks that did would ask the disk a thousand times. Whether all are whole is for a dry run to read."""
    find, check, committed = Mock(wraps=Sources.find), Mock(), Mock(return_value=None)
    initial = Mock(return_value=SimpleNamespace(path="others"))
    monkeypatch.setattr(Sources, "find", find)
    monkeypatch.setattr(Sources, "check", check)
    monkeypatch.setattr("pretrain.resume.newest_committed", committed)
    monkeypatch.setattr("pretrain.checkpoint.initial.initial_checkpoint", initial)
    monkeypatch.setattr("pretrain.preflight.run.misfits", lambda: ["another torch"])
    config, patience = small_config(prepared, "data.verify=full", "train.init_from=others"), Patience(7.0)
    run, checks = PlannedRun(config, 2, tmp_path, "cpu", alone=alone, patience=patience), Checklist()
    run.check(checks, thorough=thorough)
    assert find.call_args.kwargs == {"follow_links": alone, "patience": patience}
    assert committed.call_args.kwargs == {"check_sizes": alone, "patience": patience}
    assert initial.call_args.kwargs == {"world_size": int(alone), "run_dir": tmp_path, "patience": patience}
    assert [call.args for call in check.call_args_list] == [("full" if thorough else "size",)] * alone
    (shards,) = [outcome for outcome in checks.outcomes if outcome.name == "shards"]
    assert (shards.said == "left to all ranks together") is not alone
    assert ("another torch" in checks.warnings) is alone


@pytest.mark.parametrize(
    "broken, resume, words",
    [
        ({"initial weights"}, "auto", "no checkpoint is named"),
        ({"resume"}, "auto", "no checkpoint is named"),
        (set(), "auto", "there can be no run folder"),
        (set(), "never", "there can be no run folder"),
    ],
)
def test_without_a_folder_no_checkpoint_is_looked_for(
    prepared: Path, broken: set[str], resume: str, words: str
) -> None:
    """What is wrong with the folder is said already."""
    run, checks = PlannedRun(small_config(prepared), 1, None, "cpu", broken=frozenset(broken)), Checklist()
    run.config = run.config.replaced("checkpoint", resume=resume)
    checks.do("checkpoint", lambda found: run._start(found, thorough=False))
    assert checks.outcomes[0].blocked_by == words and not checks.problems


def test_the_text_of_every_data_set_is_checked(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(source: Any, config: Any) -> None:
        raise UserError(f"{source} is short")

    run, found = PlannedRun(small_config(prepared), 1, None, "cpu"), Outcome("text")
    run.sources = Mock(sources=["one", "another"])
    monkeypatch.setattr("pretrain.data.sources.check_text", check)
    assert run._text(found) == "" and list(map(str, found.problems)) == ["one is short", "another is short"]


@pytest.mark.parametrize("sequences", [0, 8])
def test_a_held_out_split_is_named_where_one_is_read(prepared: Path, sequences: int) -> None:
    run = PlannedRun(small_config(prepared, f"evaluate.sequences={sequences}"), 1, None, "cpu")
    run.sources = Sources.load(run.config)
    assert run._text(Outcome("text")).endswith(", and a validation split" if sequences else " tokens to train on")


@pytest.mark.parametrize("thorough", [True, False])
def test_files_of_tasks_are_read_by_a_dry_run_and_only_looked_for_by_a_start(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, thorough: bool
) -> None:
    """The ranks of a start read them once they have met."""
    read, look = Mock(return_value=SimpleNamespace(prepared=[])), Mock()
    monkeypatch.setattr("pretrain.evaluation.training.RunTasks.open", read)
    monkeypatch.setattr("pretrain.evaluation.training.check_places", look)
    run = PlannedRun(small_config(prepared, 'evaluate.tasks={"lambada": "l"}'), 1, None, "cpu")
    run.sources = Sources.load(run.config)
    run._evaluation(Outcome("evaluation"), thorough=thorough)
    assert (read.called, look.called) == (thorough, not thorough)


def test_a_record_must_hold_every_step_that_is_still_to_be_trained(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record: Any = Mock()
    monkeypatch.setattr("pretrain.routing.tape.open_record", record)
    monkeypatch.setattr("pretrain.resumed_stages.stages_of", lambda *_: ["the stage"])
    run = PlannedRun(small_config(prepared, "train.steps=9", "train.replay_routing=r"), 1, None, "cpu")
    run.sources, run.has_checkpoint = Mock(), True
    run.newest = Mock(progress=SimpleNamespace(step=5))
    assert run._routing(Outcome("routing record")) == "r holds the steps 6 to 9"
    record.return_value.check_steps.assert_called_once_with(range(6, 10))
    run.broken = frozenset({"routing record"})
    with pytest.raises(Blocked):
        run._routing(Outcome("routing record"))


def test_a_start_ends_at_the_first_fault_and_hashes_nothing(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[PlannedRun, Checklist, bool]] = []

    def check(run: PlannedRun, checks: Checklist, *, thorough: bool) -> None:
        made.append((run, checks, thorough))
        run.sources, run.data_size = Mock(), 2

    monkeypatch.setattr(PlannedRun, "check", check)
    monkeypatch.setattr("pretrain.gpus.device_type", lambda wanted: f"device of {wanted}")
    config, patience = small_config(prepared, "train.device=cpu"), Patience(7.0)
    _, data_size, newest = preflight(config, 4, tmp_path, alone=False, patience=patience)
    ((run, checks, thorough),) = made
    assert (run.world_size, run.run_dir, run.device) == (4, tmp_path, "device of cpu")
    assert (run.alone, run.patience, thorough, data_size, newest) == (False, patience, False, 2, None)
    with pytest.raises(UserError):
        checks.do("layout", Mock(side_effect=UserError("train.steps: is wrong")))


def test_settings_and_shapes_are_compared_with_those_of_the_checkpoint(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its data with those of now, or, where these could not be opened, with themselves."""
    newest = Mock(state={"manifest_digest": "old", "branch_start": None}, weights_source=None, path="step-5")
    newest.progress.step = 5
    compared: dict[str, Mock] = {name: Mock() for name in ("changed_settings", "check_tokenizer")}
    shapes, valid = Mock(), Mock(return_value=(None, ["step-6 is damaged"]))
    for name, stand_in in compared.items():
        monkeypatch.setattr(f"pretrain.resume.{name}", stand_in)
    monkeypatch.setattr("pretrain.checkpoint.shapes.check_shapes", shapes)
    monkeypatch.setattr("pretrain.resume.newest_committed", Mock(return_value=newest))
    monkeypatch.setattr("pretrain.resume.newest_valid", valid)
    run = PlannedRun(small_config(prepared), 1, tmp_path, "cpu")
    for sources, digest in ((Mock(digest="new"), "new"), (None, "old")):
        run.sources, found = sources, Outcome("checkpoint")
        assert run._start(found, thorough=False).startswith("continues from step-5, step 5: every file has its size")
        compared["changed_settings"].assert_called_with(run.config, newest, digest)
        shapes.assert_called_with(newest, run.config.model, "checkpoint.resume")
        assert not found.warnings and not valid.called
    compared["check_tokenizer"].assert_called_once()
    assert run._start(found, thorough=True).startswith("continues from step-5, step 5: every file has its sha256")
    assert found.warnings == ["a checkpoint would be passed over: step-6 is damaged"] == list(run.passed_over)
    older = Mock(state={"manifest_digest": "older"}, weights_source=None, path="step-4")
    older.progress.step = 4
    valid.return_value = (older, ["step-5 is damaged"])
    assert run._start(found, thorough=True).startswith("continues from step-4, step 4: every file has its sha256")
    assert run.newest is older, "from which epochs are counted, and the steps of a record"
    compared["changed_settings"].assert_called_with(run.config, older, "older")
    shapes.assert_called_with(older, run.config.model, "checkpoint.resume")


def test_room_is_looked_for_where_the_run_saves(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its folder holds already needs no more room."""
    space = Mock(saved=1, kept=1, size=5, wanted=10, free=20)
    space.warning.return_value = ""
    asked = Mock(return_value=space)
    monkeypatch.setattr("pretrain.report.disk_space.checkpoint_space", asked)
    for run_dir, folder in ((tmp_path / "run", tmp_path / "run"), (None, tmp_path)):
        run = PlannedRun(small_config(prepared), 1, run_dir, "cpu", folder=tmp_path)
        for space.saved, words in ((1, ""), (2, "with one being written ")):
            said = f"the run keeps 1 checkpoint of 5 bytes; {words}10 bytes more, 20 are free"
            assert run._disk(Outcome("disk")) == said
        asked.assert_called_with(run.config, folder)
