"""An error at any one operation on the run folder, on any rank: the run goes on, or all ranks end with one sentence."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import PassingError, UserError
from common.folders import check_folder
from common.json_config import read_tree
from pretrain.checkpoint import list_checkpoints
from pretrain.checkpoint.folder import newest_of
from pretrain.checkpoint.initial import initial_place
from pretrain.config.schema import Config
from pretrain.data.sources import Sources
from pretrain.loop import train
from pretrain.parallel.agreement import PeerFailed, _seen_file
from pretrain.report.board import Board
from pretrain.report.weights_and_biases import Mark
from pretrain.resilience.rollback import Rollback, read_rollbacks, record
from pretrain.routing.record import Record, begin_record, write_step
from tests.harness import run_ranks
from tests.pretrain.runs import light_config, train_runs

OPERATIONS = ("stat", "open", "listdir", "scandir", "replace", "rename", "unlink", "mkdir", "rmdir", "utime", "statvfs")
KEYS = (
    "train.steps=4",
    "train.record_routing=true",
    "checkpoint.every_steps=1",
    "checkpoint.keep_last=1",
    "checkpoint.keep_best=1",
    "evaluate.every_steps=2",
    "evaluate.sequences=8",
    "monitor.tensorboard=true",
    "monitor.details_every_steps=2",
    "resilience.replica_check_every_steps=2",
)


PLACES: dict[str, Callable[[Path], object]] = {
    "reading the configuration": lambda folder: read_tree(folder / "config.json"),
    "looking at the run folder": lambda folder: check_folder(folder, "--run-dir"),
    "listing the checkpoints": list_checkpoints,
    "looking for the newest checkpoint": lambda folder: newest_of([folder / "step-00000001"]),
    "looking for initial weights": lambda folder: initial_place(str(folder)),
    "looking whether all ranks see the folder": _seen_file,
    "reading the rollbacks": lambda folder: read_rollbacks(folder, None),
    "writing a rollback": lambda folder: record(folder, Rollback("a spike", at_step=2, first_step=1)),
    "opening the board": lambda folder: Board(folder / "tensorboard", first_step=0),
    "opening the mark of W&B": lambda folder: Mark(folder / "wandb"),
    "beginning a record of choices": lambda folder: begin_record(folder / "routing", {}, 0),
    "writing choices": lambda folder: write_step(folder, 1, 0, {}),
    "reading a record of choices": Record,
    "looking for the steps of a record": lambda folder: recorded(folder).check_steps(range(1, 2)),
    "reading recorded choices": lambda folder: recorded(folder).load(1, [], []),
}


def recorded(folder: Path) -> Record:
    """Whose own file was read."""
    record = object.__new__(Record)
    record.folder = folder
    return record


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number, kind", [(errno.ESTALE, PassingError), (errno.EACCES, UserError)])
def test_an_error_that_may_pass_refuses_no_run(
    place: str, number: int, kind: type[UserError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its exit code would keep a job from being started again; an error that stays must have that very code."""
    (tmp_path / "record.json").touch()

    def refused(path: Path, *args: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number), os.fspath(path))

    for name in ("mkdir", "touch", "iterdir", "read_text", "stat", "glob"):
        monkeypatch.setattr(Path, name, refused)
    monkeypatch.setattr(os, "stat", refused)
    monkeypatch.setattr("pretrain.resilience.rollback.write_json", refused)
    with pytest.raises(UserError, match=rf"{os.strerror(number)}|no permission") as found:
        PLACES[place](tmp_path)
    assert isinstance(found.value, PassingError) == (kind is PassingError)


def fail_once(folder: Path, at: int) -> list[int]:
    """From now on in this process operation number `at` below `folder` is an error, and no other. Returns the number of
    operations so far, in a list."""
    count = [0]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            path = args[0] if args else ""
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(str(folder)):
                count[0] += 1
                if count[0] == at:
                    raise OSError(errno.EIO, "Input/output error", os.fspath(path))
            return function(*args, **options)

        return call

    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
    io.open = builtins.open = counted(io.open)
    return count


def end_of(rank: int, config: Config, run_dir: Path, faulty: int, at: int) -> tuple[str, int]:
    """How training ends if rank `faulty` meets an error at operation `at`, and how many operations this rank has made.
    The process ends with the test."""
    count = fail_once(run_dir, at if rank == faulty else 0)
    try:
        end = train(config, Sources.load(config), run_dir, torch.device("cpu")).name
    except UserError:
        end = "says why"
    except PeerFailed:
        end = "was told"
    except Exception as error:
        end = repr(error)
    return end, count[0]


@pytest.mark.slow  # test_agreement.py and report/test_line_log.py have the errors that this has found
@pytest.mark.parametrize("is_resumed", [False, True])
def test_all_ranks_end_alike(prepared: Path, tmp_path: Path, is_resumed: bool) -> None:
    """At every seventh operation, which in a run is now this one and now that."""
    config = light_config(prepared, *KEYS, ranks=2)
    (tmp_path / "before").mkdir()
    if is_resumed:
        run_ranks(train_runs, 2, [(config.replaced("train", stop_after_steps=2), tmp_path / "before")])
        with (tmp_path / "before" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "loss": 3.0}\n')  # of a start that was killed
    run = Path(shutil.copytree(tmp_path / "before", tmp_path / "none"))
    counts = [count for _, count in run_ranks(end_of, 2, config, run, 0, 0)]
    for faulty, last in enumerate(counts):
        for at in range(1, last + 1, 7):
            run = Path(shutil.copytree(tmp_path / "before", tmp_path / f"{faulty} {at}"))
            ends = sorted(end for end, _ in run_ranks(end_of, 2, config, run, faulty, at))
            assert ends in (["FINISHED", "FINISHED"], ["says why", "was told"]), (faulty, at, ends)
            shutil.rmtree(run)
