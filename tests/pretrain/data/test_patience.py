"""Files of the data that cannot be read for a while: the run waits for them, and goes on as if nothing had been."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import pretrain.data.patience
import pretrain.together
from common.errors import PASSING, DataError, PassingError, UnreadableError
from data_prep.shards import cache as shard_cache
from data_prep.shards.format import Manifest
from model.parallel.context import ParallelContext
from pretrain.config.watching import ResilienceConfig
from pretrain.data.patience import Patience, patient_seconds
from pretrain.data.progress import Progress
from pretrain.data.sources import Sources
from pretrain.data.training_data import open_training_data
from pretrain.report.exit_codes import ExitCode, code_of
from tests.pretrain.data.faulty_files import Faults
from tests.pretrain.runs import small_config


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain.data.patience, "FIRST_PAUSE_SECONDS", 0.001)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EAGAIN])
@pytest.mark.parametrize(
    ("call", "suffix"),
    [
        ("Path.stat", "train-00001.tar"),
        ("Path.open", "train-00001.tar"),
        ("Path.stat", "train-00001.idx.safetensors"),
        ("Path.read_bytes", "train-00001.idx.safetensors"),
    ],
)
def test_a_read_that_fails_twice_gives_what_it_gives_without_a_fault(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, quick: None, number: int, call: str, suffix: str
) -> None:
    config = small_config(prepared)
    plain = Sources.load(config)
    windows = np.arange(plain.reader("train", config).num_windows)
    expected = plain.reader("train", config).read(windows)
    patience = Patience(60.0, rank=3)
    reader = Sources.load(config, patience=patience).reader("train", config)
    faults = Faults(suffix, number, 2)
    with monkeypatch.context() as patch:
        faults.install(patch, call)
        found = reader.read(windows)
    assert faults.met == 2
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    (wait,) = patience.taken_waits()
    # Path.resolve, which looks whether a link leads out, takes no notice of a fault: it meets one before Python 3.13.
    unnoticed = Faults(suffix, number, 2)
    with monkeypatch.context() as patch:
        unnoticed.install(patch, call)
        (prepared / suffix).resolve()
    assert (wait["rank"], wait["attempts"]) == (3, 2 - unnoticed.met) and wait["file"].endswith(suffix)
    assert wait["reason"] == f"{os.strerror(number)} (errno {number}, {errno.errorcode[number]})"
    assert patience.taken_waits() == []


@pytest.mark.parametrize(
    ("call", "suffix"),
    [
        ("Path.stat", ""),
        ("Path.read_bytes", "manifest.json"),
        ("Path.stat", "train-00000.tar"),
        ("os.open", "train-00000.tar"),
        ("Path.read_bytes", "train-00000.idx.safetensors"),
        ("Path.open", "tokenizer.model"),
        ("Path.open", "train-00000.tar"),
    ],
)
def test_a_start_waits_for_every_kind_of_file(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, quick: None, call: str, suffix: str
) -> None:
    faults = Faults(suffix or prepared.name, errno.ESTALE, 2)
    with monkeypatch.context() as patch:
        faults.install(patch, call)
        Sources.load(small_config(prepared), patience=Patience(60.0)).check("full")
    assert faults.met == 2


def test_a_folder_that_does_not_answer_is_not_called_missing(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        Faults(prepared.name, errno.EIO, 10**6).install(patch, "Path.stat")
        with pytest.raises(UnreadableError, match=rf"^{prepared} cannot be read: .*\(errno 5, EIO\)$"):
            Sources.load(small_config(prepared))


def test_a_segment_after_a_rollback_waits_again(prepared: Path, quick: None) -> None:
    """The one before has ended all waiting, or its reading thread would keep the process."""
    config = small_config(prepared)
    sources, left = Sources.load(config, patience=Patience(60.0)), [OSError(errno.EIO, "")]

    def read() -> str:
        if left:
            raise left.pop()
        return "read"

    sources.patience.end()
    open_training_data(config, sources, ParallelContext(), torch.device("cpu"), Progress(0, 0)).prefetcher.close()
    assert sources.patience(read) == "read"


class Clock:
    """Stands still but in a pause."""

    def __init__(self, patience: Patience, patch: pytest.MonkeyPatch) -> None:
        self.now = 50.0
        patch.setattr(pretrain.data.patience, "time", SimpleNamespace(monotonic=lambda: self.now))
        patch.setattr(patience, "_ended", SimpleNamespace(wait=self.pause))

    def pause(self, seconds: float) -> bool:
        self.now += seconds
        return False


def test_pauses_grow_to_a_limit_and_none_is_longer_than_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    patience = Patience(100.0)
    clock, attempts = Clock(patience, monkeypatch), []

    def never() -> None:
        attempts.append(clock.now - 50.0)
        raise OSError(errno.EIO, "")

    with pytest.raises(PassingError, match=r"tried 10 times in 92 s\."):
        patience(never)
    assert attempts == [0.0, 0.5, 1.5, 3.5, 7.5, 15.5, 31.5, 51.5, 71.5, 91.5]


def test_faults_soon_after_another_share_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else many files with short faults would keep the other ranks waiting for ever."""
    patience = Patience(10.0)
    clock, begun = Clock(patience, monkeypatch), []

    def until(end: float) -> None:
        begun.append(clock.now)
        if clock.now < end:
            raise TimeoutError("no answer")  # without a number

    patience(lambda: until(57.0))
    assert clock.now == 57.5
    with pytest.raises(PassingError):
        patience(lambda: until(1000.0))
    assert begun[-1] < 60.0, "ten seconds after the first fault"
    clock.now = 61.0
    patience(lambda: until(68.0))
    assert [wait["attempts"] for wait in patience.taken_waits()] == [4, 3, 4]


def test_what_has_ended_may_begin_again(quick: None) -> None:
    patience, left = Patience(60.0), [2]

    def faulty() -> int:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.EIO, "")
        return 5

    patience.end()
    with pytest.raises(PassingError, match="tried 1 times"):
        patience(faulty)
    patience.begin()
    assert patience(faulty) == 5 and left == [-1]


def test_a_missing_file_is_waited_for_only_after_it_was_seen(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    def file_missing_twice(patience: Patience) -> int:
        config, faults = small_config(prepared), Faults("train-00000.tar", errno.ENOENT, 2)
        reader = Sources.load(config, patience=patience).reader("train", config)
        with monkeypatch.context() as patch:
            faults.install(patch, "Path.stat")
            reader.read(np.array([0]))
        return faults.met

    started, training = Patience(60.0), Patience(60.0)
    training.files_were_seen = True
    with pytest.raises(DataError, match=r"^missing file .*train-00000\.tar; prepare the data again") as caught:
        file_missing_twice(started)
    assert code_of(caught.type) is ExitCode.REFUSED and not started.taken_waits()
    assert file_missing_twice(training) == 2


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENAMETOOLONG, errno.EFBIG])
def test_an_error_that_cannot_pass_is_raised_at_once(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    config, patience, faults = small_config(prepared), Patience(60.0), Faults("train-00000.tar", number, 2)
    patience.files_were_seen = True
    reader = Sources.load(config, patience=patience).reader("train", config)
    with monkeypatch.context() as patch:
        faults.install(patch, "Path.open")
        with pytest.raises(DataError, match=r"train-00000\.tar cannot be read: ") as caught:
            reader.read(np.array([0]))
    assert faults.met == 1 and code_of(caught.type) is ExitCode.REFUSED


def test_damaged_content_is_refused_at_once(prepared: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    shard = copy / Manifest.load(copy).split("train")[0].file
    config, patience = small_config(copy), Patience(60.0)
    patience.files_were_seen = True
    content = shard.read_bytes()
    for wrong, said in ((content[:-1], "expected bytes"), (content[:700] + b"\xff\xff" + content[702:], "sha256")):
        shard.write_bytes(wrong)
        with pytest.raises(DataError, match=said) as caught:
            Sources.load(config, patience=patience).reader("train", config).read(np.arange(3))
        assert code_of(caught.type) is ExitCode.REFUSED and not patience.taken_waits()


def test_a_fault_that_stays_ends_the_wait_with_file_and_errno_and_is_said_once(
    capsys: pytest.CaptureFixture[str], quick: None
) -> None:
    calls: list[int] = []

    def read() -> None:
        calls.append(1)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "/data/train-00007.tar")

    with pytest.raises(
        PassingError, match=r"^/data/train-00007\.tar cannot be read: .*\(errno 116, ESTALE\);"
    ) as caught:
        Patience(0.2, rank=5)(read)
    assert code_of(caught.type) is ExitCode.CUT_OFF and f"rank 5 tried {len(calls)} times" in str(caught.value)
    assert 3 <= len(calls) <= 12  # pauses of 1 ms that double: 255 ms are eight of them
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("warning: rank 5: /data/train-00007.tar cannot be read: ")


def test_what_nobody_needs_any_more_is_not_waited_for() -> None:
    patience, failed = Patience(600.0), threading.Event()

    def read() -> None:
        failed.set()
        raise OSError(errno.EIO, "Input/output error", "/data/a")

    def reading() -> None:
        with pytest.raises(PassingError):
            patience(read)

    thread = threading.Thread(target=reading, daemon=True)
    thread.start()
    assert failed.wait(60.0)
    patience.end()
    thread.join(60.0)
    assert not thread.is_alive()


@pytest.mark.parametrize("limit", [1.0, 60.0, 540.0, 604800.0])
def test_two_waits_in_a_row_end_before_a_rank_counts_as_hung(limit: float) -> None:
    seconds = patient_seconds(ResilienceConfig(hang_timeout_seconds=limit))
    assert 0.0 < 2 * seconds < limit and seconds <= 180.0 == patient_seconds(ResilienceConfig(hang_timeout_seconds=0.0))


def test_the_errors_that_pass_are_those_of_networks_and_file_systems() -> None:
    named = {"EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EINTR", "ENOTCONN", "EREMOTEIO", "ECONNRESET"}
    assert {getattr(errno, name) for name in named} <= PASSING
    assert not PASSING & {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOSPC, errno.EMFILE}


def test_a_server_that_answers_later_is_waited_for(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    monkeypatch.setattr(shard_cache.time, "sleep", lambda seconds: None)
    keys = ("data.cache_bytes=1000000000", f"data.cache_dir={tmp_path / 'cache'}")
    config, patience = small_config(prepared, f"data.manifest=file://{prepared}", *keys), Patience(60.0)
    expected = Sources.load(small_config(prepared)).reader("train", small_config(prepared)).read(np.arange(5))
    reader = Sources.load(config, patience=patience).reader("train", config)
    opened, left = shard_cache.RemoteFile.open, [2 * len(shard_cache.PAUSES_SECONDS)]

    def refusing(file: Any, mode: str) -> Any:
        if file.url.endswith(".tar") and left[0]:
            left[0] -= 1
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        return opened(file, mode)

    monkeypatch.setattr(shard_cache.RemoteFile, "open", refusing)
    found = reader.read(np.arange(5))
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    (wait,) = patience.taken_waits()
    assert wait["attempts"] == 2 and "ConnectionResetError" in wait["reason"]
