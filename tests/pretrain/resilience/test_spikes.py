"""Loss spikes: what counts as one, and what a rollback leaves out."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pretrain.loop
from common.errors import UserError
from pretrain.checkpoint import Checkpoint, list_checkpoints
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.data.sources import Sources
from pretrain.data.stages import first_stage
from pretrain.preflight.run import preflight
from pretrain.report.run_folder import RunFolder
from pretrain.resilience import rollback as going_back
from pretrain.resilience.rollback import Rollback, read_rollbacks, record, with_skips
from pretrain.resilience.signals import ProcessState, Stop
from pretrain.resilience.spikes import SpikeDetector
from pretrain.trainer import Trainer
from tests.harness import run_ranks
from tests.pretrain.resilience.faults import before_steps, outcome, spike_in_steps, spike_on_position, train_with
from tests.pretrain.runs import assert_bit_identical, events, light_config, metrics, train_runs


def test_a_spike_stands_out_from_the_median() -> None:
    noise = np.random.default_rng(0)
    detector = SpikeDetector(10.0, 64)
    losses = 3.0 + 0.05 * noise.standard_normal(500)
    assert not any(detector.see(float(loss)) for loss in losses)
    assert "standard deviations above" in (detector.see(4.0) or "")
    assert detector.see(3.1) is None
    falling = SpikeDetector(10.0, 64)
    assert not any(falling.see(float(loss)) for loss in 7.0 * np.exp(-np.arange(500) / 100))


def test_a_spike_is_so_many_robust_deviations_above_the_median_of_a_quarter_of_the_window_or_more() -> None:
    """Median 3, and half of the losses at least 0.1 from it: of a normal distribution with deviation 0.14826."""
    earlier = [2.9, 3.1, 2.8, 3.2] * 4
    for loss, is_spike in ((3.0 + 1.48, False), (3.0 + 10 * 0.15 * 1.4826 + 0.001, True), (0.01, False), (-9.0, False)):
        assert bool(SpikeDetector(10.0, 64, earlier).see(loss)) is is_spike, loss
    assert SpikeDetector(10.0, 64, earlier).see(3.0 + 10 * 0.15 * 1.4826 - 0.001) is None
    assert SpikeDetector(10.0, 68, earlier).see(99.0) is None, "16 of 68 are less than a quarter"


def test_nothing_stands_out_from_too_few_or_from_nothing() -> None:
    detector = SpikeDetector(10.0, 64)
    assert not any(detector.see(loss) for loss in [3.0] * 15 + [30.0])
    off = SpikeDetector(0.0, 64, [3.0] * 64)
    assert off.see(1e9) is None
    constant = SpikeDetector(10.0, 64, [3.0] * 64)
    assert constant.see(3.2) is None  # below 10 x 1% of the median
    assert constant.see(3.4)


STAGE = first_stage(["a", "b"], ["0a", "0b"], [1, 2])


def test_ranges_ahead_of_a_checkpoint_are_added_and_those_behind_are_its_own() -> None:
    rollbacks = [Rollback("a", 9, 8, (56, 72)), Rollback("b", 5, 5), Rollback("c", 20, 19, (160, 176))]
    assert with_skips(Progress(3, 24), STAGE, "", rollbacks) == Progress(3, 24, ((56, 72), (160, 176)))
    resumed = Progress(12, 96, ((56, 72),))  # next position: 112
    assert with_skips(resumed, STAGE, "", rollbacks) == Progress(12, 96, ((56, 72), (160, 176)))
    # A checkpoint of before the first rollback, saved by another course of the run: it did read 56 to 71.
    assert with_skips(Progress(12, 96), STAGE, "", rollbacks[:1]) == Progress(12, 96)
    # One from between the steps that are undone, the oldest that was kept: it did read 56 to 63.
    assert with_skips(Progress(8, 64), STAGE, "", rollbacks[:1]) == Progress(8, 64, ((64, 72),))


def test_a_range_counts_for_the_stage_alone_that_it_was_left_out_of() -> None:
    """The same sources with the same weights are other windows where they went on from other places. A rollback from
    before the stage was kept counts by the digest of the data, one from before that for any."""
    elsewhere, later = (STAGE.followed_by(first, STAGE.mixed) for first in (8, 16))
    rollbacks = [
        Rollback("a", 9, 8, (56, 72), stage=STAGE),
        Rollback("b", 15, 14, (104, 112), stage=elsewhere),
        Rollback("c", 20, 19, (160, 176)),
        Rollback("d", 24, 23, (184, 192), manifest_digest="0d"),
    ]
    for stage, digest, skipped in (
        (STAGE, "", ((56, 72), (160, 176))),
        (elsewhere, "", ((104, 112), (160, 176))),
        (later, "", ((160, 176),)),
        (later, "0d", ((160, 176), (184, 192))),
    ):
        assert with_skips(Progress(3, 24), stage, digest, rollbacks) == Progress(3, 24, skipped)


def test_a_stage_that_begins_at_a_checkpoint_leaves_out_nothing_of_the_one_before() -> None:
    saved = Progress(6, 48, ((16, 24), (64, 72)))
    assert with_skips(saved, STAGE, "", []) == saved
    assert with_skips(saved, STAGE.followed_by(saved.position, STAGE.mixed), "", []) == Progress(6, 48, ((16, 24),))


def test_a_rollback_goes_to_before_its_steps_else_as_far_back_as_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the older checkpoints turn out to be damaged: one within the steps is better than no start at all."""
    monkeypatch.setattr(going_back, "_step", lambda path: int(path.name))
    newest_first = [Path(str(step)) for step in (12, 9, 8, 6, 3)]
    wanted = Rollback("a", at_step=9, first_step=5)
    assert [path.name for path in going_back.serving(newest_first, wanted)] == ["3", "6", "8"]
    assert [path.name for path in going_back.serving(newest_first[:4], wanted)] == ["6", "8"]
    replicas = Rollback("b", at_step=9, first_step=9)
    assert [path.name for path in going_back.serving(newest_first, replicas)] == ["8", "6", "3"]
    assert going_back.serving([], wanted) == []
    with pytest.raises(UserError, match=r"checkpoint\.keep_last: the run must go back to before step 9 \(a\)"):
        going_back.serving(newest_first[:2], wanted)


def test_a_checkpoint_that_cannot_be_read_now_is_one_to_go_back_to(tmp_path: Path) -> None:
    """An older one, or none at all, would be taken for it; whoever opens it waits for the file system."""
    paths = [tmp_path / name for name in ("step-00000008", "step-00000004", "copy")]
    for path in paths:
        path.mkdir()
    assert going_back.serving(paths, Rollback("a", at_step=9, first_step=5)) == [paths[1], paths[0]]


def test_rollbacks_are_kept_by_branch_and_a_torn_file_is_refused(tmp_path: Path) -> None:
    assert read_rollbacks(tmp_path, None) == []
    one, two = Rollback("a", 9, 8, (56, 72), stage=STAGE), Rollback("b", 5, 5, None, "/elsewhere/step-00000004")
    record(tmp_path, one)
    record(tmp_path, two)
    assert read_rollbacks(tmp_path, None) == [one]
    assert read_rollbacks(tmp_path, two.branch_start) == [two]
    (tmp_path / "rollbacks.json").write_text("[{")
    with pytest.raises(UserError, match=r"rollbacks\.json cannot be read"):
        read_rollbacks(tmp_path, None)


SPIKY = (
    "train.steps=16",
    "evaluate.sequences=0",
    "checkpoint.every_steps=3",
    "checkpoint.keep_last=9",
    "resilience.spike_window_steps=8",
    "resilience.spike_threshold=5",
    "resilience.spike_action=rollback",
    "resilience.spike_skip_steps=2",
)


@pytest.mark.parametrize(
    "memory, thorough",
    [
        (False, False),
        pytest.param(False, True, marks=pytest.mark.slow),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
    ids=["quick", "thorough", "memory"],
)
def test_a_spike_is_rolled_back_its_data_left_out_and_the_course_is_repeatable(
    prepared: Path, tmp_path: Path, memory: bool, thorough: bool
) -> None:
    """Position 60 (step 8 of 8 sequences) is bad: steps 7 and 8 go, from the checkpoint of step 6."""
    keys = (*SPIKY, 'model.position={"type": "xl", "memory_chunks": 1}') if memory else SPIKY
    config = light_config(prepared, *keys, ranks=2)
    run_dir = tmp_path / "spiked"
    assert run_ranks(train_with, 2, config, run_dir, spike_on_position, 60) == ["FINISHED"] * 2
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(1, 17))
    assert max(row["loss"] for row in rows) < 20
    (rollback,) = events(run_dir, "rollback")
    assert (rollback["at_step"], rollback["first_step"], rollback["skipped"]) == (8, 7, [48, 64])
    superseded = [event["metrics"]["step"] for event in events(run_dir, "superseded_metrics")]
    assert superseded == [7, 8]
    last = Checkpoint.open(list_checkpoints(run_dir / "checkpoints")[-1])
    assert last.progress == Progress(16, 128, ((48, 64),), stages=(Sources.load(config).stage(),))
    assert rows[-1]["tokens"] == 128 * 16

    # The same course without a spike, by a run that knows from its first step on what to leave out.
    record_only = tmp_path / "told"
    record_only.mkdir()
    record(record_only, Rollback("told", 8, 7, (48, 64)))
    run_ranks(train_runs, 2, [(config, record_only)])
    assert_bit_identical(run_dir, record_only)
    if not thorough:
        return
    # And stopped in between, after the gap and before it.
    for stop_after in (4, 9):
        stopped = tmp_path / f"stopped-{stop_after}"
        stopped.mkdir()
        record(stopped, Rollback("told", 8, 7, (48, 64)))
        first = light_config(prepared, *keys, f"train.stop_after_steps={stop_after}", ranks=2)
        run_ranks(train_runs, 2, [(first, stopped), (config, stopped)])
        assert_bit_identical(stopped, record_only)
    # In another layout: the same data, the same losses to rounding.
    other = tmp_path / "other"
    other.mkdir()
    record(other, Rollback("told", 8, 7, (48, 64)))
    run_ranks(train_runs, 1, [(light_config(prepared, *keys, "parallel.zero=0"), other)])
    for ours, theirs in zip(metrics(other), metrics(record_only), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), ours["step"]


_models: list[weakref.ref] = []


def spike_in_steps_of_one_model(trainer: Trainer, steps: tuple[int, ...]) -> None:
    """`spike_in_steps`; and of the models before a rollback none is left, or two would have to fit into memory."""
    assert not any(model() for model in _models), "the model from before the rollback is still referenced"
    _models.append(weakref.ref(trainer.engine.module))
    spike_in_steps(trainer, steps)


def test_rollbacks_are_bounded_counted_over_restarts_and_begin_at_the_start_if_they_must(
    prepared: Path, tmp_path: Path
) -> None:
    """Step 5 spikes whatever it reads; no checkpoint is so old."""
    config = light_config(prepared, *SPIKY, "checkpoint.every_steps=100", "resilience.max_rollbacks=2")
    (ending,) = run_ranks(train_with, 1, config, tmp_path, spike_in_steps_of_one_model, (5,))
    assert ending.startswith("DIVERGED: loss spike") and "2 rollbacks" in ending
    assert "Nothing was saved: begin again with a lower learning rate" in ending and "checkpoint is" not in ending
    assert [row["skipped"] for row in json.loads((tmp_path / "rollbacks.json").read_text())] == [[24, 40], [40, 56]]
    assert [event["step"] for event in events(tmp_path, "started")] == [0, 0, 0]
    assert outcome(tmp_path)["exit_code"] == 3
    (again,) = run_ranks(train_with, 1, config, tmp_path, spike_in_steps, (5,))
    assert "2 rollbacks" in again
    assert len(events(tmp_path, "rollback")) == 2


def spike_and_stop(trainer: Trainer, position: int, stop: Stop) -> None:
    """`spike_on_position`, and a signal in the first step 8."""
    spike_on_position(trainer, position)
    before_steps(trainer, lambda step: stop._ask("SIGUSR1") if step == 8 else None)


def stopped_then_started(rank: int, config: Config, run_dir: Path) -> tuple[str, dict[str, Any], int, str]:
    """How two starts ended, the first of them by a signal in the step that spikes; what it left about that, and the
    step from which the checks before the second say that it continues."""
    stop = Stop()
    stop.state = ProcessState.TRAINING
    first = train_with(rank, config, run_dir, spike_and_stop, 60, stop, stop=stop)
    (row,) = json.loads((run_dir / "rollbacks.json").read_text())
    _, _, checkpoint = preflight(config, 1, run_dir)
    assert checkpoint is not None
    return first, row, checkpoint.progress.step, train_with(rank, config, run_dir, spike_on_position, 60)


def test_a_rollback_that_a_stop_came_between_is_made_by_the_next_start(prepared: Path, tmp_path: Path) -> None:
    """Steps 5 to 8 are to be undone, and there is a checkpoint of step 6: it must not be taken. The same is left where
    the run is killed between the decision and the first step of the course that it leads to."""
    config = light_config(prepared, *SPIKY, "train.steps=10", "resilience.spike_skip_steps=4")
    ((first, row, step, second),) = run_ranks(stopped_then_started, 1, config, tmp_path / "run")
    assert (first, step, second) == ("STOPPED", 3, "FINISHED")
    assert row["skipped"] == [32, 64]
    assert [event["step"] for event in events(tmp_path / "run", "started")] == [0, 3]
    (made,) = json.loads((tmp_path / "run/rollbacks.json").read_text())
    assert row["is_pending"] and "is_pending" not in made

    told = tmp_path / "told"
    told.mkdir()
    record(told, Rollback("told", 8, 5, (32, 64)))
    run_ranks(train_runs, 1, [(config, told)])
    assert_bit_identical(tmp_path / "run", told)


class Killed(BaseException):
    """In the place of a kill: nothing that comes later is done."""


def killed_then_started(rank: int, config: Config, run_dir: Path, before: str) -> list[str]:
    """How the starts ended, the first of which is killed in its rollback, before what `before` says."""
    write_json, event = going_back.write_json, RunFolder.event

    def kill(*args: Any, **values: Any) -> None:
        raise Killed

    def say(self: RunFolder, kind: str, **values: Any) -> None:
        (kill if kind == before else event)(self, kind, **values)

    def found(*args: Any, **options: Any) -> Any:
        return kill() if len(events(run_dir, "rollback")) else find_start(*args, **options)

    find_start = pretrain.loop.find_start
    going_back.write_json = kill if before == "the file" else write_json
    RunFolder.event = say
    pretrain.loop.find_start = found if before == "the next course" else find_start
    try:
        first = train_with(rank, config, run_dir, spike_on_position, 60)
    except Killed:
        first = "killed"
    going_back.write_json, RunFolder.event = write_json, event
    pretrain.loop.find_start = find_start
    return [first, train_with(rank, config, run_dir, spike_on_position, 60)]


@pytest.mark.parametrize("before", ["the file", "rollback", "the next course"])
def test_a_rollback_during_which_the_run_is_killed_is_said_once(prepared: Path, tmp_path: Path, before: str) -> None:
    """Killed before rollbacks.json is written, between it and the event, or after both."""
    config = light_config(prepared, *SPIKY, "train.steps=9")
    assert run_ranks(killed_then_started, 1, config, tmp_path, before) == [["killed", "FINISHED"]]
    (said,) = events(tmp_path, "rollback")
    (made,) = json.loads((tmp_path / "rollbacks.json").read_text())
    assert {key: value for key, value in said.items() if key not in ("event", "time")} == made
    assert (made["at_step"], made["skipped"]) == (8, [48, 64])
    assert [row["step"] for row in metrics(tmp_path)] == list(range(1, 10))


def test_a_rollback_into_the_steps_to_be_undone_leaves_out_the_rest_of_their_data(
    prepared: Path, tmp_path: Path
) -> None:
    """Step 8 spikes and four steps are to be undone, but the only checkpoint is that of step 6. Without the data of
    steps 7 and 8 the run goes on; with them it would spike again until it has no rollback left."""
    config = light_config(
        prepared, *SPIKY, "train.steps=10", "checkpoint.every_steps=6", "resilience.spike_skip_steps=4"
    )
    assert run_ranks(train_with, 1, config, tmp_path, spike_on_position, 60) == ["FINISHED"]
    assert len(events(tmp_path, "rollback")) == 1
    last = Checkpoint.open(list_checkpoints(tmp_path / "checkpoints")[-1])
    assert last.progress.skipped_ranges == ((48, 64),)


def test_a_warning_changes_nothing(prepared: Path, tmp_path: Path) -> None:
    config = light_config(prepared, *SPIKY, "train.steps=6", "resilience.spike_action=warn", ranks=2)
    assert run_ranks(train_with, 2, config, tmp_path, spike_in_steps, (5,)) == ["FINISHED"] * 2
    (event,) = events(tmp_path, "loss_spike")
    assert event["step"] == 5
    assert metrics(tmp_path)[4]["loss"] > 50
    assert not events(tmp_path, "rollback") and not (tmp_path / "rollbacks.json").exists()
