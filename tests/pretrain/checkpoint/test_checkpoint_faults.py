"""Disks that fill up, files that rot, and SIGKILL at any moment of a save: one message, and a whole checkpoint."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import pretrain.checkpoint.folder
import pretrain.checkpoint.storage
import pretrain.data.patience
from common.errors import PassingError, UserError
from common.hashing import sha256_file
from pretrain.checkpoint import Checkpoint, list_checkpoints, step_of
from pretrain.checkpoint.folder import DamagedCheckpoint, UnreadCheckpoint
from pretrain.checkpoint.loading import whole_parameters
from pretrain.checkpoint.planners import AgreedPlan
from pretrain.checkpoint.saver import Saver
from pretrain.checkpoint.storage import Writer
from pretrain.config.schema import Config
from pretrain.data.patience import Patience
from pretrain.parallel.agreement import PeerFailed
from pretrain.resume import newest_valid
from tests.harness import RankFailed, run_ranks
from tests.pretrain.family import EXPERT_DROPOUT
from tests.pretrain.resilience.faults import outcome
from tests.pretrain.runs import assert_bit_identical, curve, events, light_config, train_runs


def train_to_the_message(rank: int, config: Config, run_dir: Path) -> str:
    """The message with which training ends on rank 0, empty if it succeeds."""
    try:
        train_runs(rank, [(config, run_dir)])
    except UserError as error:
        return str(error)
    except PeerFailed:
        return "of another rank"
    return ""


@pytest.mark.parametrize("asynchronous", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_a_full_disk(prepared: Path, tmp_path: Path, small_disk: Callable[[int], Path], asynchronous: str) -> None:
    """Room for one checkpoint: the second fails and training goes on; after the third it stops. With more room the run
    continues from the first."""
    keys = ("train.steps=6", "evaluate.sequences=0", "checkpoint.every_steps=2", *EXPERT_DROPOUT)
    config = light_config(prepared, *keys, f"checkpoint.asynchronous={asynchronous}", ranks=2)
    run_ranks(train_runs, 2, [(config, tmp_path / "unbroken")])
    one = sum(f.stat().st_size for f in list_checkpoints(tmp_path / "unbroken" / "checkpoints")[-1].iterdir())
    run_dir, disk = tmp_path / "run", small_disk(one * 17 // 10)
    run_dir.mkdir()
    (run_dir / "checkpoints").symlink_to(disk)
    message, other = run_ranks(train_to_the_message, 2, config, run_dir)
    assert other == "of another rank"
    assert re.search(r"rank \d could not save .*No space left on device after [\d,]+ of [\d,]+ bytes; ", message), (
        message
    )
    for words in ("step-00000006.partial", "bytes are free there", "newest checkpoint is", "step-00000002"):
        assert words in message, message
    assert [(e["event"], e["step"]) for e in events(run_dir) if e["event"].startswith("checkpoint")] == [
        ("checkpoint", 2),
        ("checkpoint_failed", 4),
        ("checkpoint_failed", 6),
    ]
    assert [path.name for path in disk.iterdir()] == ["step-00000002"]
    small_disk(one * 6)
    run_ranks(train_runs, 2, [(config, run_dir)])
    assert_bit_identical(run_dir, tmp_path / "unbroken")


def test_a_disk_that_is_cleared_in_time(prepared: Path, tmp_path: Path) -> None:
    """One failed save costs nothing but itself."""
    keys = ("train.steps=6", "evaluate.sequences=0", "checkpoint.every_steps=2")
    config = light_config(prepared, *keys, ranks=2)
    run_ranks(train_with_one_full_disk, 2, config, tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000002", "step-00000006"]
    failed = events(tmp_path, "checkpoint_failed")
    assert [e["step"] for e in failed] == [4] and "rank 1 could not save" in failed[0]["reason"]
    assert events(tmp_path, "finished")


def train_with_one_full_disk(rank: int, config: Config, run_dir: Path) -> None:
    write = pretrain.checkpoint.storage._write_all

    def refuse_once(file: Any, block: Any) -> int:
        if rank == 1 and "step-00000004" in str(file.name):
            raise OSError(28, "No space left on device")
        return write(file, block)

    pretrain.checkpoint.storage._write_all = refuse_once
    train_runs(rank, [(config, run_dir)])


def ends_with_a_faulty_disk(rank: int, runs: list[tuple[Config, Path, int]]) -> list[str]:
    """How runs end in which so many writes of rank 1, of the last step's checkpoint, meet an error that may pass."""
    write, ends = pretrain.checkpoint.storage._write_all, list[str]()
    for config, run_dir, most in runs:
        left = [most]

        def refuse(file: Any, block: Any, last: str = f"step-{config.train.steps:08d}", left: Any = left) -> int:
            if rank == 1 and last in str(file.name) and left[0]:
                left[0] -= 1
                raise OSError(errno.EIO, "Input/output error")
            return write(file, block)

        pretrain.checkpoint.storage._write_all = refuse
        try:
            train_runs(rank, [(config, run_dir)])
            ends.append("finished")
        except UserError as error:
            ends.append(f"{type(error).__name__}: {error}")
        except PeerFailed as error:
            ends.append(f"told of a {error.kind.__name__}")
    return ends


def test_an_error_that_may_pass_ends_no_run_at_its_last_save_and_one_that_stays_does_not_refuse_it(
    prepared: Path, tmp_path: Path
) -> None:
    """Refused (code 2) the job would end, with hours of steps that nobody computes again."""
    keys = ("train.steps=3", "evaluate.sequences=0", "checkpoint.every_steps=2")
    behind = light_config(prepared, *keys, ranks=2)
    at_once = light_config(prepared, *keys, "checkpoint.asynchronous=false", ranks=2)
    cases = [(behind, "behind", 1), (at_once, "at once", 1), (behind, "stays", 99), (at_once, "stays at once", 99)]
    runs = [(config, tmp_path / name, most) for config, name, most in cases]
    first, second = run_ranks(ends_with_a_faulty_disk, 2, runs)
    assert first[:2] == second[:2] == ["finished"] * 2 and second[2:] == ["told of a PassingError"] * 2
    for name in ("behind", "at once"):
        assert [e["step"] for e in events(tmp_path / name, "checkpoint_failed")] == [3]
        assert [step_of(path) for path in list_checkpoints(tmp_path / name / "checkpoints")] == [2, 3]
        assert outcome(tmp_path / name)["exit_code"] == 0
    for name, said in (("stays", first[2]), ("stays at once", first[3])):
        assert "PassingError: checkpoint.every_steps: rank 1 could not save" in said and "Input/output error" in said
        assert said.endswith("The last whole checkpoint is that of step 2: the same command goes on from it")
        assert outcome(tmp_path / name)["exit_code"] == 7


def test_an_error_that_stays_goes_before_one_that_may_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever rank meets it: the job would be started again and again for a full disk."""
    full, passing = OSError(errno.ENOSPC, "No space left on device"), PassingError("shard: Input/output error")
    saver = object.__new__(Saver)
    saver._group = None
    for failures, kind, rank in (
        ({0: (passing, None), 1: (full, None)}, UserError, 1),
        ({0: (passing, None), 1: (OSError(errno.EIO, "Input/output error"), None)}, PassingError, 0),
    ):

        def failing(*args: Any, failures: Any = failures, **options: Any) -> None:
            raise dcp.CheckpointException("save", failures)

        monkeypatch.setattr(dcp, "save", failing)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
        said = saver._write({}, Writer(tmp_path / "step-00000001", {}), AgreedPlan())
        assert type(said) is kind and f"rank {rank} could not save" in str(said)


def truncate(folder: Path) -> None:
    file = folder / "rank-00001.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(folder: Path, name: str = "rank-00000.safetensors", place: int = -100) -> None:
    content = bytearray((folder / name).read_bytes())
    content[place] ^= 4
    (folder / name).write_bytes(content)


def make_unreadable(folder: Path) -> None:
    """What permissions do to a user; root reads all the same, so a folder takes the place of the file."""
    if os.geteuid():
        folder.chmod(0)
    else:
        (folder / "state.json").unlink()
        (folder / "state.json").mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated file": (truncate, r"rank-00001\.safetensors is \d+ bytes, not \d+ bytes"),
    "flipped bit": (flip_a_bit, r"rank-00000\.safetensors does not match its sha256"),
    "flipped bit in the index": (
        lambda folder: flip_a_bit(folder, "tensors.json"),
        r"tensors\.json does not match its sha256",
    ),
    "flipped bit in the state": (
        lambda folder: flip_a_bit(folder, "state.json", 30),
        r"state\.json (does not match commit\.json|or commit\.json cannot be read)",
    ),
    "missing file": (
        lambda folder: (folder / "rank-00000.safetensors").unlink(),
        r"rank-00000\.safetensors is missing",
    ),
    "missing marker": (lambda folder: (folder / "commit.json").unlink(), r"commit\.json cannot be read \(No such file"),
    "unreadable folder": (make_unreadable, r"state\.json cannot be read \((Is a directory|Permission denied)\)"),
}


def open_after_damage(rank: int, folder: Path) -> dict[str, tuple[str | None, list[str]]]:
    """What resuming would choose, of copies of a run's checkpoints whose newest is damaged in each way."""
    found = {}
    for name in DAMAGES:
        paths = list_checkpoints(folder / name)[::-1]
        checkpoint, reasons = newest_valid(paths, rank=rank, world_size=2)
        found[name] = (checkpoint.path.name if checkpoint else None, reasons)
    return found


def test_damage_is_named_and_the_checkpoint_before_serves(prepared: Path, tmp_path: Path) -> None:
    keys = ("train.steps=6", "evaluate.sequences=0", "checkpoint.every_steps=2")
    config = light_config(prepared, *keys, ranks=2)
    run_ranks(train_runs, 2, [(config, tmp_path / "run")])
    expected = curve(tmp_path / "run")
    for name, (damage, _) in DAMAGES.items():
        shutil.copytree(tmp_path / "run" / "checkpoints", tmp_path / name)
        damage(tmp_path / name / "step-00000006")
    for rank in run_ranks(open_after_damage, 2, tmp_path):
        for name, (_, words) in DAMAGES.items():
            newest, reasons = rank[name]
            assert newest == "step-00000004" and len(reasons) == 1
            assert re.search(words, reasons[0]), (name, reasons[0])
            assert "step-00000006" in reasons[0]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.copytree(tmp_path / "truncated file", tmp_path / "run" / "checkpoints")
    run_ranks(train_runs, 2, [(config, tmp_path / "run")])
    assert curve(tmp_path / "run") == expected


@pytest.mark.parametrize("failures, newest", [(2, "step-00000004"), (99, "step-00000002")])
def test_a_server_that_fails_over_damages_no_checkpoint(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int, newest: str
) -> None:
    """Another one would be taken for it, and the newer set aside with all of its steps. A disk that stays so is
    damaged."""
    keys = ("train.steps=4", "evaluate.sequences=0", "checkpoint.every_steps=2")
    run_ranks(train_runs, 1, [(light_config(prepared, *keys), tmp_path)])
    left = dict.fromkeys(("sha256_file", "read_bytes"), failures)

    def failing(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *arguments: Any) -> Any:
            if path.parent.name == "step-00000004" and left[name]:
                left[name] -= 1
                raise OSError(errno.EIO, "Input/output error", str(path))
            return function(path, *arguments)

        return call

    monkeypatch.setattr(pretrain.data.patience, "FIRST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(pretrain.checkpoint.folder, "sha256_file", failing("sha256_file", sha256_file))
    monkeypatch.setattr(Path, "read_bytes", failing("read_bytes", Path.read_bytes))
    paths = list_checkpoints(tmp_path / "checkpoints")[::-1]
    patience = Patience(60.0)
    if failures > 2:
        patience.end()
    found, reasons = newest_valid(paths, rank=0, world_size=1, gather=lambda own: [own], patience=patience)
    assert found is not None and found.path.name == newest
    assert all("state.json cannot be read: Input/output error" in reason for reason in reasons)
    assert len(reasons) == (newest == "step-00000002") and (failures > 2 or not any(left.values()))


def test_a_file_system_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not again for each of many checkpoints: that would pass for a hang."""
    read: list[Path] = []

    def refused(path: Path) -> bytes:
        read.append(path)
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(pretrain.data.patience, "FIRST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(pretrain.data.patience, "LONGEST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(Path, "read_bytes", refused)
    paths = [tmp_path / f"step-{step:08d}" for step in (6, 4, 2)]
    for path in paths:
        path.mkdir()
    with pytest.raises(PassingError, match=r"no checkpoint is whole .*state\.json cannot be read"):
        newest_valid(paths, rank=0, world_size=1, gather=lambda own: [own], patience=Patience(1e-3))
    assert [path.parent for path in read[-2:]] == paths[1:] and {path.parent for path in read[:-2]} == {paths[0]}


def test_files_that_cannot_be_read_now_are_not_called_damaged(prepared: Path, tmp_path: Path) -> None:
    """Neither while their sizes or sums are looked at, nor when they are loaded."""
    run_ranks(train_runs, 1, [(light_config(prepared, "train.steps=1", "evaluate.sequences=0"), tmp_path)])
    checkpoint = Checkpoint.open(list_checkpoints(tmp_path / "checkpoints")[0])
    for number, kind in ((errno.ESTALE, UnreadCheckpoint), (errno.EACCES, DamagedCheckpoint)):

        def refused(path: Any, *args: Any, number: int = number, **options: Any) -> Any:
            raise OSError(number, os.strerror(number), os.fspath(path))

        def sizes() -> None:
            Checkpoint.open(checkpoint.path)

        def loaded() -> None:
            whole_parameters(checkpoint, "master")(next(iter(checkpoint.state["parameters"])))

        for place, call in (
            ("pathlib.Path.stat", sizes),
            ("pretrain.checkpoint.folder.sha256_file", checkpoint.check_files),
            ("pathlib.Path.read_text", loaded),
            ("safetensors.safe_open", loaded),
        ):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(place, refused)
                with pytest.raises(DamagedCheckpoint) as found:
                    call()
            assert type(found.value) is kind, (place, number)


def test_what_one_rank_alone_refuses_all_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its node does not see the folder yet. The others, whose files are whole, ask it what it has found."""
    asked: list[Any] = []

    def from_all(own: Any) -> list[Any]:
        asked.append(own)
        return [None, own or UserError("there is no checkpoint folder")]

    for opened in (Checkpoint.open, lambda path, **share: SimpleNamespace(damaged_file=lambda **share: None)):
        monkeypatch.setattr(Checkpoint, "open", opened)
        with pytest.raises(UserError, match="there is no checkpoint folder"):
            newest_valid([tmp_path / "step-00000003"], rank=1, world_size=2, gather=from_all)
    assert [type(own) for own in asked] == [UserError, type(None)]


def test_a_refusal_goes_before_damage_and_damage_before_what_may_be_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what several ranks say of one checkpoint: damage passes it over, and only what may pass asks for another
    start."""
    monkeypatch.setattr(Checkpoint, "open", lambda path, **share: SimpleNamespace(damaged_file=lambda **share: None))
    unread, damaged, refusal = UnreadCheckpoint("server"), DamagedCheckpoint("a bit"), UserError("another format")

    def found(*said: UserError) -> tuple[type, str]:
        with pytest.raises(UserError) as error:
            newest_valid([tmp_path], rank=0, world_size=3, gather=lambda own: [own, *said])
        return type(error.value), str(error.value)

    assert found(unread, damaged, refusal) == found(refusal, damaged, unread) == (UserError, "another format")
    for kind, text in (found(unread, damaged), found(damaged, unread)):
        assert kind is UserError and "no checkpoint is whole (a bit)" in text
    kind, text = found(unread)
    assert kind is PassingError and "no checkpoint is whole (server)" in text


def kill_after(count: int) -> None:
    """This process kills itself before its `count`-th operation on files of a checkpoint."""
    left = [count]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            # rmtree names what it removes relative to a folder's descriptor.
            if "dir_fd" in options or "checkpoints" in f"{getattr(args[0], 'name', args[0])}":
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    storage = pretrain.checkpoint.storage
    storage._write_all = counted(storage._write_all)
    storage.write_json = counted(storage.write_json)
    storage.sync_directory = counted(storage.sync_directory)
    for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))


def train_and_die(rank: int, config: Config, run_dir: Path, victim: int, count: int) -> None:
    if rank == victim:
        kill_after(count)
    train_runs(rank, [(config, run_dir)])


def dies(config: Config, run_dir: Path, victim: int, count: int) -> bool:
    """Whether the run lived long enough for the victim to die."""
    try:
        run_ranks(train_and_die, 2, config, run_dir, victim, count)
    except RankFailed as failure:
        message = str(failure)
    else:
        return False
    said = ("exit code -9", "died without a word", "Connection", "another rank is gone")  # the last: by a broken pipe
    assert any(words in message for words in said), message
    return True


def check_kills(prepared: Path, tmp_path: Path, steps: int, kills: list[tuple[int, int]]) -> int:
    """Starts a run again and again; each time a rank dies before its n-th operation. Returns how many died."""
    keys = (f"train.steps={steps}", "evaluate.sequences=0", "checkpoint.every_steps=1", "checkpoint.keep_last=2")
    config = light_config(prepared, *keys, *EXPERT_DROPOUT, ranks=2)
    run_ranks(train_runs, 2, [(config, tmp_path / "unbroken")])
    run_dir, died, newest = tmp_path / "killed", 0, 0
    for victim, count in kills:
        died += dies(config, run_dir, victim, count)
        paths = list_checkpoints(run_dir / "checkpoints")
        for path in paths:  # what has the name of a checkpoint is one
            assert Checkpoint.open(path).damaged_file() is None
        found = step_of(paths[-1]) if paths else 0
        assert found >= newest, "a checkpoint was lost"
        newest = found
    run_ranks(train_runs, 2, [(config, run_dir)])
    assert_bit_identical(run_dir, tmp_path / "unbroken")
    assert not list((run_dir / "checkpoints").glob("*.partial"))
    return died


def test_killed_during_some_saves(prepared: Path, tmp_path: Path) -> None:
    assert check_kills(prepared, tmp_path, 6, [(0, 5), (1, 150)]) == 2


@pytest.mark.slow
def test_killed_before_every_kind_of_operation(prepared: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    kills = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    kills += [(draw.randint(0, 1), draw.randint(0, 400)) for _ in range(20)]
    assert check_kills(prepared, tmp_path, 180, kills) == len(kills)  # about 110 steps: of 38 operations each
