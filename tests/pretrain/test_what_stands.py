"""What a run that ends says of its checkpoints: which one it goes on from, or that there is none."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pretrain.checkpoint.folder
import pretrain.data.patience
from common.errors import PassingError, UserError
from pretrain.data.patience import Patience
from pretrain.data.sources import Sources
from pretrain.loop import report_end
from pretrain.report.exit_codes import MEANING
from pretrain.report.run_folder import RunFolder
from pretrain.resume import candidates, check_tokenizer, newest_committed, newest_valid, what_stands
from pretrain.segment import SegmentEnd
from tests.pretrain.runs import small_config
from tests.pretrain.saved import rewrite_state

ANEW = "Nothing was saved: the same command begins anew"
STEP_4 = "The last whole checkpoint is that of step 4: the same command{} goes on from it"


def save(path: Path, *, branch: str | None = None) -> Path:
    """The two files of a checkpoint that say that it is whole."""
    path.mkdir(parents=True)
    (path / "state.json").write_text("{}")
    step = int(path.name.removeprefix("step-"))
    state = {"format_version": 2, "files": {}, "branch_start": branch}
    state["progress"] = {"step": step, "consumed_sequences": 0}

    def change(tree: dict[str, Any]) -> None:
        tree.update(state)

    rewrite_state(path, change)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def said(prepared: Path, run: Path, resume: str = "auto", *, is_diverged: bool = False) -> str:
    return what_stands(small_config(prepared, f"checkpoint.resume={resume}"), run, is_diverged=is_diverged)


def test_the_step_of_the_newest_whole_one_is_named_or_that_there_is_none(prepared: Path, run: Path) -> None:
    assert said(prepared, run) == said(prepared, run, "never") == ANEW
    save(run / "checkpoints" / "step-00000002")
    save(run / "checkpoints" / "step-00000004")
    (save(run / "checkpoints" / "step-00000006") / "commit.json").unlink()
    assert said(prepared, run) == STEP_4.format("")
    assert said(prepared, run, "never") == STEP_4.format(" with checkpoint.resume=auto")


def test_a_start_that_is_gone_may_be_the_one_that_is_named_and_one_that_is_there_is_another(
    prepared: Path, run: Path, tmp_path: Path
) -> None:
    """A run whose folder was renamed looks like a branch of another; what it saved must not be set aside."""
    start, other = (save(tmp_path / name / "checkpoints" / "step-00000003") for name in ("trunk", "other"))
    own = save(run / "checkpoints" / "step-00000005", branch=str(other))
    config = small_config(prepared, f"checkpoint.resume={start}")
    assert candidates(config, run) == [start], "a branch that begins elsewhere takes the folder"
    shutil.rmtree(other)
    with pytest.raises(UserError, match=f"{own} is of a branch that began at {other}, which is not there any more"):
        candidates(config, run)


def test_a_checkpoint_from_before_tokenizers_were_recorded_fits_any(prepared: Path, tmp_path: Path) -> None:
    sources = Sources.load(small_config(prepared))
    for sha256, fits in ((None, True), (sources.tokenizer.sha256, True), ("0" * 64, False)):
        state = {} if sha256 is None else {"tokenizer_sha256": sha256}
        checkpoint: Any = SimpleNamespace(state=state, path=tmp_path)
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="made with another tokenizer"):
            check_tokenizer(checkpoint, sources)


def test_a_branch_that_saved_nothing_goes_on_from_its_start_and_not_from_what_lies_in_its_folder(
    prepared: Path, run: Path, tmp_path: Path
) -> None:
    start = save(tmp_path / "trunk" / "checkpoints" / "step-00000003")
    save(run / "checkpoints" / "step-00000002")
    expected = f"Nothing was saved after {start}: the same command goes on from it"
    assert said(prepared, run, str(start)) == expected
    save(run / "checkpoints" / "step-00000004", branch=str(start))
    assert said(prepared, run, str(start)) == STEP_4.format("")


def test_a_run_that_diverged_is_told_what_to_change(prepared: Path, run: Path) -> None:
    lower = "a lower learning rate (--set optimizer.learning_rate=...)"
    assert said(prepared, run, is_diverged=True) == f"Nothing was saved: begin again with {lower}"
    save(run / "checkpoints" / "step-00000004")
    told = said(prepared, run, "never", is_diverged=True)
    assert told.startswith(f"The last whole checkpoint is that of step 4: resume from it with {lower}, --set")
    assert "and checkpoint.resume=auto" in told and "and checkpoint" not in said(prepared, run, is_diverged=True)


def test_checkpoints_that_are_damaged_or_cannot_be_read_change_nothing_of_how_a_run_ends(
    prepared: Path, run: Path
) -> None:
    (save(run / "checkpoints" / "step-00000004") / "state.json").write_text("")
    assert said(prepared, run).startswith("The same command would be refused: no checkpoint is whole (")


@pytest.mark.parametrize("number, kind", [(errno.ESTALE, PassingError), (errno.EACCES, UserError)])
@pytest.mark.parametrize("what", ["read_bytes", "stat", "sha256_file"])
def test_the_only_checkpoint_that_cannot_be_read_now_refuses_no_start(
    run: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[UserError], what: str
) -> None:
    """Before the ranks meet, and when they hash it: that exit code would end a job that is started again."""
    path, file = save(run / "checkpoints" / "step-00000004"), "state.json" if what == "read_bytes" else "rank-00000"
    (path / "rank-00000.safetensors").touch()
    rewrite_state(path, lambda tree: tree.update(files={"rank-00000.safetensors": {"bytes": 0, "sha256": ""}}))
    read = getattr(pretrain.checkpoint.folder if what == "sha256_file" else Path, what)

    def refused(place: Path, *args: Any, **options: Any) -> Any:
        if place.name.startswith(file):
            raise OSError(number, os.strerror(number), str(place))
        return read(place, *args, **options)

    monkeypatch.setattr(pretrain.checkpoint.folder if what == "sha256_file" else Path, what, refused)
    every = partial(newest_valid, rank=0, world_size=1, gather=lambda own: [None, own])
    for newest in (every,) if what == "sha256_file" else (every, newest_committed):
        with pytest.raises(UserError, match=rf"no checkpoint is whole .*{file}\S* cannot be read") as found:
            newest([path])
        assert type(found.value) is kind


def test_a_branch_that_cannot_be_read_now_does_not_begin_anew(
    prepared: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own checkpoints would be set aside, with all of its steps."""
    start = save(tmp_path / "trunk" / "checkpoints" / "step-00000003")
    own = [save(run / "checkpoints" / f"step-{step:08d}", branch=str(start)) for step in (4, 6)]
    config, read_bytes, left = (
        small_config(prepared, f"checkpoint.resume={start}"),
        Path.read_bytes,
        dict.fromkeys(own, 1),
    )

    def failing(path: Path) -> bytes:
        if left.get(path.parent, 0):
            left[path.parent] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return read_bytes(path)

    monkeypatch.setattr(pretrain.data.patience, "FIRST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(Path, "read_bytes", failing)
    assert candidates(config, run, patience=Patience(60.0)) == [*own[::-1], start]
    left = dict.fromkeys(own, 2)
    with pytest.raises(PassingError, match=r"state\.json cannot be read"):
        candidates(config, run)
    assert what_stands(config, run).startswith("Its checkpoints cannot be read now (")
    assert candidates(config, run) == [*own[::-1], start]


def test_no_meaning_of_an_exit_code_speaks_of_a_checkpoint_that_may_not_be_there() -> None:
    assert not [meaning for meaning in MEANING.values() if "last checkpoint" in meaning]


@pytest.mark.parametrize(
    "end, told",
    [
        (SegmentEnd(0, stopped="SIGTERM", has_begun=False), "SIGTERM during start-up, nothing trained; the same"),
        (SegmentEnd(0, stopped="SIGTERM"), "SIGTERM during start-up, nothing trained; the same"),
        # Resumed, and stopped before its first step: the checkpoint may be another run's.
        (SegmentEnd(5, stopped="SIGTERM", has_begun=False), "during start-up, nothing trained after step 5; the same"),
        (SegmentEnd(5, stopped="SIGTERM"), "SIGTERM at step 5 of 9, checkpoint saved; the same"),
    ],
)
def test_a_stop_says_that_a_checkpoint_was_saved_only_where_one_was(
    prepared: Path, run: Path, capsys: pytest.CaptureFixture[str], end: SegmentEnd, told: str
) -> None:
    report_end(RunFolder(run, writes=False), small_config(prepared, "train.steps=9"), end)
    assert told in capsys.readouterr().out
