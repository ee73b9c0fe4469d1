"""What launch/status.py says is to be done next."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pretrain.report.exit_codes import NONE_IS_WHOLE
from pretrain.views.next_step import next_text, resume_text
from pretrain.views.reading import RunView, State
from pretrain.views.status import state_text
from tests.pretrain.views.status_case import shown, write


def test_the_next_command_can_be_copied_whatever_the_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "my run", steps=40, exit_code=0, reason="finished")
    assert f"python launch/generate.py '{folder}' --interactive" in shown(folder)


@pytest.mark.parametrize(
    "resume, begun, resumed, checkpoints, told",
    [
        ("auto", 0, None, (8,), "it continues from step-00000008"),
        ("never", 0, None, (8,), "with checkpoint.resume=auto it continues from step-00000008"),
        ("never", 0, None, (), "it begins anew: nothing was saved"),
        # Of a branch: what is older than its start is another branch's.
        ("/t/step-00000008", 8, "/t/step-00000008", (8,), "it continues from /t/step-00000008, for nothing was"),
        ("/t/step-00000008", 8, "/t/step-00000008", (8, 16), "it continues from step-00000016"),
        ("/t/step-00000008", 16, "/run/checkpoints/step-00000016", (16,), "it continues from /run/checkpoints/step-"),
        ("/t/step-00000008", None, None, (), "it continues from /t/step-00000008, for nothing was saved since"),
    ],
)
def test_where_the_command_of_a_run_goes_on_follows_its_configuration(
    tmp_path: Path, resume: str, begun: int | None, resumed: str | None, checkpoints: tuple[int, ...], told: str
) -> None:
    view = RunView(tmp_path, config={"checkpoint": {"resume": resume}})
    view.checkpoints = [f"step-{step:08d}" for step in checkpoints]
    view.events = [] if begun is None else [{"event": "started", "step": begun}]
    view.events += [] if resumed is None else [{"event": "resumed", "path": resumed}]
    assert resume_text(view).startswith(told)


@pytest.mark.parametrize(
    "code, waits", [(85, True), (86, True), (5, True), (1, True), (None, True), (2, False), (3, False)]
)
def test_a_run_whose_job_requeues_itself_is_not_to_be_started_beside_it(
    tmp_path: Path, code: int | None, waits: bool
) -> None:
    outcome: dict[str, Any] = {} if code is None else {"exit_code": code, "reason": "x"}
    folder = write(tmp_path / "run", **outcome)
    assert "squeue" not in next_text(RunView.open(folder))
    (folder / "slurm").mkdir()
    told = next_text(RunView.open(folder))
    assert ("start the same command again, unless its SLURM job is back in the queue (squeue); it" in told) == waits


@pytest.mark.parametrize("code", [3, 4, 7])
def test_of_a_run_that_saved_nothing_nothing_stands_and_no_change_needs_leave(tmp_path: Path, code: int) -> None:
    folder = write(tmp_path / "run", exit_code=code, reason="x")
    told = next_text(RunView.open(folder))
    assert "what was saved stands" in told and ("(with checkpoint.allow_changes)" in told) == (code == 3)
    shutil.rmtree(folder / "checkpoints")
    told = next_text(RunView.open(folder))
    assert "stands" not in told and "allow_changes" not in told and told.endswith("begins anew: nothing was saved")


def test_no_checkpoint_is_named_to_go_on_from_where_a_start_found_none_whole(tmp_path: Path) -> None:
    """Only a start hashes them; what it said of them is all that a view knows."""
    folder = write(tmp_path / "run", exit_code=2, reason=f"{NONE_IS_WHOLE} (step-00000008: ...); move them away")
    told = next_text(RunView.open(folder))
    assert "Change that, then start it again; what lies in checkpoints/ cannot be gone on from" in told
    assert "continues" not in told


def test_a_failure_that_a_full_disk_left_in_the_events_alone_is_the_outcome(tmp_path: Path) -> None:
    failed = {"event": "failed", "time": 3.0, "exit_code": 2, "reason": "No space left on device"}
    begun = {"event": "started", "time": 4.0, "step": 0}
    view = RunView.open(write(tmp_path / "run", events=[failed]))
    assert view.state is State.FAILED and state_text(view, 5.0) == "failed: No space left on device, 2 s ago"
    assert "Change that, then start it again" in next_text(view)
    assert RunView.open(write(tmp_path / "again", events=[failed, begun])).state is State.DEAD  # killed, later
