"""One writer per run folder: the living are refused by name, the dead taken over, of two takers one gets it."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

import common.run_lock as locks
from common.errors import UserError
from common.paths import REPOSITORY
from common.run_lock import FolderLock, LockLost

_context = multiprocessing.get_context("forkserver")


def test_a_living_owner_is_refused_by_name_and_nothing_is_left_after_release(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    with pytest.raises(
        UserError, match=rf"--run-dir: .* in use by process {os.getpid()} on .*, last sign of life \d{{1,2}} s"
    ):
        FolderLock(tmp_path)
    lock.beat()
    lock.release()
    lock.beat()  # a last beat of the watchdog is no alarm
    assert not list(tmp_path.iterdir())
    FolderLock(tmp_path).release()


def _hold(folder: str, ready: object) -> None:
    FolderLock(Path(folder))
    ready.set()  # type: ignore[attr-defined]
    time.sleep(600)


def test_a_killed_owner_is_taken_over_at_once(tmp_path: Path) -> None:
    ready = _context.Event()
    owner = _context.Process(target=_hold, args=(str(tmp_path), ready))
    owner.start()
    assert ready.wait(600)
    with pytest.raises(UserError, match=f"process {owner.pid} "):
        FolderLock(tmp_path)
    os.kill(owner.pid or 0, signal.SIGSTOP)
    with pytest.raises(UserError, match=f"process {owner.pid} "):  # stopped is not dead
        FolderLock(tmp_path)
    os.kill(owner.pid or 0, signal.SIGKILL)
    owner.join()
    lock = FolderLock(tmp_path)
    assert lock.taken_over and f"process {owner.pid} " in lock.taken_over[0]
    assert [p.name for p in tmp_path.iterdir()] == ["lock-2.json"]


def test_the_lock_in_a_copy_of_a_folder_in_use_is_none_and_by_another_name_it_is_one(tmp_path: Path) -> None:
    """`cp -r` of a run that goes on: the branch starts, and the run keeps its folder. A link is the same folder."""
    original, copy, link = tmp_path / "original", tmp_path / "copy", tmp_path / "link"
    original.mkdir()
    link.symlink_to(original)
    owner = FolderLock(original)
    shutil.copytree(original, copy)
    assert locks.last_sign_of_life(copy) is None
    branch = FolderLock(copy)
    assert branch.taken_over == []
    assert [p.name for p in copy.iterdir()] == ["lock-2.json"]
    for name in (original, link):
        assert (sign := locks.last_sign_of_life(name)) is not None and sign.is_alive
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} "):
            FolderLock(name)
    owner.beat()
    branch.beat()
    owner.release()
    branch.release()


def test_a_folder_in_use_that_was_moved_stays_in_use(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    FolderLock(tmp_path / "before")
    moved = (tmp_path / "before").rename(tmp_path / "after")
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} "):
        FolderLock(moved)
    (tmp_path / "before").mkdir()  # by a new run, whose lock has the same name
    FolderLock(tmp_path / "before")
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} "):
        FolderLock(moved)


def test_no_lock_stays_where_the_folder_cannot_be_listed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would keep another node out for a minute."""
    monkeypatch.setattr(locks, "_locks", Mock(side_effect=[[], OSError(errno.EIO, "no answer")]))
    with pytest.raises(OSError, match="no answer"):
        FolderLock(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_lock_that_goes_while_a_reader_who_may_not_write_looks_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FolderLock(tmp_path)

    def gone(path: Path) -> float:
        path.unlink()
        raise PermissionError(path)

    monkeypatch.setattr(locks, "_age", gone)
    assert locks.last_sign_of_life(tmp_path) is None


def _written_elsewhere(folder: Path, age: float, **changes: object) -> Path:
    """The lock of a process of another machine."""
    owner = {"host": "node7", "boot": "b", "namespace": "n", "pid": 1, "start": 1, "token": "t", **changes}
    path = folder / "lock-3.json"
    path.write_text(json.dumps(owner))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_an_owner_on_another_machine_lives_by_its_signs_of_life(tmp_path: Path) -> None:
    _written_elsewhere(tmp_path, age=locks.DEAD_SECONDS - 5)
    with pytest.raises(UserError, match=r"process 1 on node7, last sign of life 5\d s ago"):
        FolderLock(tmp_path)
    _written_elsewhere(tmp_path, age=locks.DEAD_SECONDS + 5)
    assert FolderLock(tmp_path).taken_over == ["process 1 on node7"]


_HOLD = """
import os, sys, time
from pathlib import Path
from common.run_lock import FolderLock
FolderLock(Path(sys.argv[1]))
print(os.getpid(), flush=True)
time.sleep(60)
"""


def _unshared(*options: str) -> list[str]:
    """A command whose process numbers are those of a container of its own."""
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", *options]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], check=False).returncode != 0:
        pytest.skip("needs unshare, and leave to make namespaces")
    return command


@pytest.mark.parametrize("options", [("--mount-proc",), ()], ids=["its own /proc", "the host's /proc"])
def test_an_owner_in_another_container_lives_by_its_signs_of_life(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Of the same host: its number is that of another process here, and so in a third container. With the host's /proc
    its number 1 would be init's for ever, also for one that starts in the same namespace."""
    command = [*_unshared(*options), sys.executable, "-c", _HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as owner:
        try:
            assert owner.stdout is not None and owner.stdout.readline() == "1\n"
            with pytest.raises(UserError, match=r"in use by process 1 on .*or container is gone, wait 60 s"):
                FolderLock(tmp_path)
            third = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False, timeout=60)
            assert "in use by process 1 on" in third.stderr
        finally:
            owner.kill()
    before = time.time() - locks.DEAD_SECONDS - 5
    os.utime(tmp_path / "lock-1.json", (before, before))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as heir:
        assert heir.stdout is not None and heir.stdout.readline() == "1\n"
        heir.kill()
    assert [path.name for path in tmp_path.iterdir()] == ["lock-2.json"]


def test_an_owner_whose_end_nobody_has_heard_of_is_dead(tmp_path: Path) -> None:
    """It keeps its number and its start until its parent asks for it: as of a launcher that stands still."""
    owner = os.posix_spawn("/bin/sleep", ["sleep", "60"], {})
    try:
        _written_elsewhere(tmp_path, 0, **locks.process_identity(owner))
        with pytest.raises(UserError, match=f"in use by process {owner} "):
            FolderLock(tmp_path)
        os.kill(owner, signal.SIGKILL)
        os.waitid(os.P_PID, owner, os.WEXITED | os.WNOWAIT)
        assert locks.stat_fields(owner)[0] == b"Z" and FolderLock(tmp_path).taken_over
    finally:
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)


def test_a_number_used_again_by_another_process_is_not_the_owner(tmp_path: Path) -> None:
    me = locks.process_identity(os.getpid())
    _written_elsewhere(tmp_path, 0, **{**me, "start": me["start"] - 1})
    assert FolderLock(tmp_path).taken_over


def test_a_torn_lock_is_being_written_or_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "lock-1.json"
    path.write_text('{"host": "no')
    with pytest.raises(UserError, match="just starting"):
        FolderLock(tmp_path)
    os.utime(path, (time.time() - 100, time.time() - 100))
    FolderLock(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["lock-2.json"]


def test_an_owner_that_was_taken_over_notices(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    (tmp_path / "lock-1.json").unlink()
    with pytest.raises(LockLost, match=r"the lock of this run folder, lock-1\.json, was removed"):
        lock.beat()
    (tmp_path / "lock-2.json").write_text(json.dumps({**lock._me, "pid": 1, "token": "b", "host": "other"}))
    with pytest.raises(LockLost, match=r"another process has taken over this run folder \(process 1 on other\)"):
        lock.beat()
    (tmp_path / "lock-1.json").write_text(json.dumps({**lock._me, "token": "b"}))  # a later owner's, of its number
    lock.release()
    assert (tmp_path / "lock-1.json").exists()


def test_an_owner_whose_folder_is_gone_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lock = FolderLock(folder)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(LockLost, match="is gone, removed or renamed"):
        lock.beat()
    assert not folder.exists()
    lock.release()


def test_a_disk_that_is_full_leaves_no_lock_of_a_start_that_never_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")  # as a failed write raises it, without a name
    with monkeypatch.context() as patch:
        patch.setattr(locks.json, "dumps", Mock(side_effect=full))
        with pytest.raises(OSError, match=r"No space left .*lock-1\.json"):
            FolderLock(tmp_path)
    FolderLock(tmp_path).release()


def test_of_many_takers_exactly_one_gets_it(tmp_path: Path) -> None:
    """Both with a dead lock to take over and with none, again and again."""
    for attempt in range(30):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        if attempt % 2:
            _written_elsewhere(folder, age=1000)
        winners: list[FolderLock] = []
        barrier = threading.Barrier(6)

        def take() -> None:
            barrier.wait()  # noqa: B023
            with contextlib.suppress(UserError):
                winners.append(FolderLock(folder))  # noqa: B023

        takers = [threading.Thread(target=take) for _ in range(6)]
        for taker in takers:
            taker.start()
        for taker in takers:
            taker.join()
        assert len(winners) == 1, attempt
        assert [p.name for p in folder.iterdir()] == [winners[0]._path.name]
        winners[0].beat()
