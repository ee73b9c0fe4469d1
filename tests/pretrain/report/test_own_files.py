"""A run removes and replaces only what a run made, whatever lies in its folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import temporary_path
from common.paths import REPOSITORY
from pretrain.checkpoint import Retention, list_checkpoints
from pretrain.checkpoint.folder import remove_partials
from pretrain.report import run_paths
from pretrain.report.exit_codes import ExitCode
from pretrain.report.run_folder import RunFolder

OWN = ("rank-00000.safetensors", "tensors.json", "state.json", "commit.json")


def put(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"mine: {name}")
    return folder


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_retention_leaves_what_holds_more_than_a_checkpoint(tmp_path: Path) -> None:
    for step in range(1, 7):
        put(tmp_path / f"step-{step:08d}", *OWN)
    put(tmp_path / "step-00000002", "notes.txt")
    put(tmp_path / "step-00000003", "rank-00000/rank-00000.safetensors")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "step-00000004").rename(tmp_path / "elsewhere" / "kept")
    (tmp_path / "step-00000004").symlink_to(tmp_path / "elsewhere" / "kept")
    Retention(keep_last=1).apply(tmp_path)
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path)] == [2, 3, 4, 6]
    assert names(tmp_path / "elsewhere" / "kept") == set(OWN)
    assert (tmp_path / "step-00000002" / "notes.txt").read_text() == "mine: notes.txt"


def test_only_remains_of_saves_are_removed(tmp_path: Path) -> None:
    put(tmp_path / "step-00000001.partial", OWN[0], "state.json.partial")
    (tmp_path / "step-00000002.partial").mkdir()
    put(tmp_path / "step-by-step.partial", "a.iso")
    put(tmp_path / "step-00000003.partial", OWN[0], "a.iso")
    remove_partials(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step-by-step.partial", "step-00000003.partial"}
    assert names(tmp_path / "step-00000003.partial") == {OWN[0], "a.iso"}


def test_opening_a_run_folder_removes_no_foreign_file(tmp_path: Path) -> None:
    left = ("outcome.json", "config.json.partial", "metrics.jsonl.partial", ".clock-0a1b", "ranks/rank-00000.phase")
    foreign = ("download.iso.partial", "notes.txt", "ranks/mine.txt", "a.json.partial")
    # What write_json leaves where a process is killed in it.
    left += tuple(temporary_path(Path(name)).name for name in ("outcome.json", "verified.json", "rollbacks.json"))
    put(tmp_path, *left, *foreign)
    folder = RunFolder(tmp_path, writes=True)
    assert folder.lock is not None
    folder.lock.release()
    assert names(tmp_path) >= set(foreign) and not names(tmp_path) & set(left)


def test_every_report_of_a_hang_is_kept_and_the_owner_of_a_dead_lock_is_said(tmp_path: Path) -> None:
    owner = {"host": "node7", "boot": "b", "namespace": "n", "pid": 1, "start": 1, "token": "t"}
    for _ in range(2):  # two hangs of one second
        put(tmp_path, "hang/rank-00000.txt")
        (tmp_path / "lock-1.json").write_text(json.dumps(owner))
        for name in ("hang", "lock-1.json"):
            os.utime(tmp_path / name, (1e9, 1e9))
        RunFolder(tmp_path, writes=True).end(ExitCode.FINISHED, "finished")
    assert len(list(tmp_path.glob("hang-*/rank-00000.txt"))) == 2
    rows = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    said = [row["owner"] for row in rows if row["event"] == "lock_taken_over"]
    assert said == ["process 1 on node7"] * 2


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "outcome.json"])
def test_a_folder_of_something_else_is_refused_by_the_file_that_a_run_would_replace(tmp_path: Path, name: str) -> None:
    config = put(tmp_path, "small.json") / "small.json"
    project = put(tmp_path / "project", name)
    with pytest.raises(UserError, match=rf"^--run-dir: .*/project holds {name}, which a run would replace, and no run"):
        run_paths.run_folder(config, project)
    assert names(project) == {name}
    put(project, "events.jsonl")
    assert run_paths.run_folder(config, project) == project
    assert run_paths.run_folder(config, put(tmp_path / "empty", "slurm/job.log")) == tmp_path / "empty"


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_clean_removes_what_make_made_and_no_folder_of_that_name(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    made = {".venv/.installed", "data/sample/manifest.json", "runs/demo/events.jsonl"}
    put(tmp_path, ".venv/lib.py", "data/sample/a.tar", "runs/demo/metrics.jsonl", "data/c4/a.tar", "runs/other/a")
    before = names(tmp_path)
    for _ in range(2):
        subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
        assert names(tmp_path) == before
        put(tmp_path, *made)
        subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
        before = {"Makefile", "data/c4/a.tar", "runs/other/a"}
        assert names(tmp_path) == before
