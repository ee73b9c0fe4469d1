"""One writer per run folder: `lock-N.json` holds host, process and start; its age is the owner's last sign of life.

A copy of a folder holds a copy of the lock, whose owner writes to the original: it counts as no lock.
Locks are taken over by number: a process that finds lock N dead creates lock N + 1. Creating a file is exclusive on
every file system, so of two such processes one gets the lock and the other finds a living owner. Ages are differences
between times of the file server, never between the clocks of two machines.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.slurm import job_id

BEAT_SECONDS = 10.0
"""How often the owner touches its lock."""
DEAD_SECONDS = 60.0
"""Age from which the lock of another machine, whose processes cannot be seen, counts as left behind."""


UNSEEN = "unseen"
"""The namespace of a process in whose /proc the numbers are those of other processes."""
KEYS = {"host", "boot", "namespace", "pid", "start", "token"}


class LockLost(Exception):
    """The lock is no longer this process's."""


class FolderLock:
    """The lock of one run folder, held from construction to `release`."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError, which names the owner, if the folder is in use, and OSError if it cannot be written. If
        this SLURM job left the lock on another node, waits for up to a minute, because a refusal would end the job."""
        self._folder = folder
        self._me = {
            **process_identity(os.getpid()),
            "token": secrets.token_hex(8),
            "job": job_id(os.environ),
            "folder": str(folder.resolve()),
        }
        self._is_released = False
        self.taken_over: list[str] = []
        """Owners that were found dead."""
        while True:
            found = _locks(folder)
            for path in found:
                self._refuse_if_alive(path)
            self._path = folder / f"lock-{_number(found[-1]) + 1 if found else 1}.json"
            try:
                descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                continue  # somebody was faster: look at that one
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    file.write(json.dumps(self._me))
            except OSError as error:  # on a full disk: an empty lock would pass for that of a start under way
                with contextlib.suppress(OSError):
                    self._path.unlink()
                raise OSError(error.errno, error.strerror, str(self._path)) from error
            break
        try:
            for path in _locks(folder):
                if path != self._path:
                    self._refuse_if_alive(path)  # it was created between the two looks
                    if not _is_copy(path, _read(path) or {}):
                        self.taken_over.append(_name(_read(path) or {}))
                    path.unlink(missing_ok=True)
        except (UserError, OSError):
            self.release()
            raise

    @property
    def owner(self) -> dict[str, Any]:
        """Host, process number and start of this process."""
        return {key: self._me[key] for key in ("host", "pid", "start")}

    def beat(self) -> None:
        """A sign of life. Raises LockLost if another process has taken the folder over, or if lock or folder are
        gone."""
        if self._is_released:
            return
        try:
            own = json.loads(self._path.read_text(encoding="utf-8"))["token"] == self._me["token"]
            os.utime(self._path)
        except FileNotFoundError:
            own = False
        except (OSError, ValueError, KeyError):
            return  # the file system does not answer: the next beat will say more
        if not own:
            raise LockLost(f"{self._folder}: {self._why_lost()}")

    def _why_lost(self) -> str:
        try:
            others = _locks(self._folder)
        except FileNotFoundError:
            return "this run folder is gone, removed or renamed while the run went on"
        except OSError as error:
            return f"the lock of this run folder is gone, and the folder cannot be read ({error.strerror})"
        if not others:
            return f"the lock of this run folder, {self._path.name}, was removed while the run went on"
        return f"another process has taken over this run folder ({_name(_read(others[-1]) or {})})"

    def release(self) -> None:
        """Removes the lock if it is still this process's, and if the disk lets it: one that stays is that of a dead
        process soon."""
        self._is_released = True
        owner = _read(self._path)
        if owner is not None and owner.get("token") == self._me["token"]:
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _refuse_if_alive(self, path: Path) -> None:
        owner = _read(path)
        age = _age(path)
        if age is None or _is_copy(path, owner or {}):  # None: released in between
            return
        if owner is None:  # being written this moment, or left torn by a machine that stopped
            alive, owner = age < BEAT_SECONDS, {}
        elif is_same_machine(owner, self._me):
            alive = is_alive(owner)
        else:
            alive = age < DEAD_SECONDS
            if alive and self._is_of_this_job(owner):
                alive = not self._falls_silent(path)
        if alive:
            raise UserError(
                f"--run-dir: {self._folder} is in use by {_name(owner)}, last sign of life {age:.0f} s ago; stop that "
                f"run first, or choose another --run-dir (if its machine or container is gone, wait "
                f"{DEAD_SECONDS:.0f} s)"
            )

    def _is_of_this_job(self, owner: dict[str, Any]) -> bool:
        return self._me["job"] is not None and owner.get("job") == self._me["job"]

    def _falls_silent(self, path: Path) -> bool:
        """Waits until an earlier start of this SLURM job, on a node that the job has lost, is dead by its lock's
        age."""
        for _ in range(int(2 * DEAD_SECONDS) + 1):
            age = _age(path)
            if age is None or age >= DEAD_SECONDS:
                return True
            time.sleep(1.0)
        return False


@dataclass(frozen=True)
class SignOfLife:
    """What the newest lock of a folder says of its owner."""

    owner: str
    is_alive: bool
    age: float
    """Seconds since the owner touched its lock."""


def last_sign_of_life(folder: Path) -> SignOfLife | None:
    """For a reader of the folder, who takes no lock; None if there is none. Raises OSError if the folder cannot be
    listed."""
    for path in reversed(_locks(folder)):
        owner = _read(path)
        if _is_copy(path, owner or {}):
            continue
        age: float | None = None
        try:
            age = _age(path)
        except OSError:  # nothing may be written there, so this machine's clock has to do
            with contextlib.suppress(FileNotFoundError):
                age = max(0.0, time.time() - path.stat().st_mtime)
        if age is None:
            continue
        if owner is not None and is_same_machine(owner, process_identity(os.getpid())):
            return SignOfLife(_name(owner), is_alive(owner), age)
        return SignOfLife(_name(owner or {}), age < (DEAD_SECONDS if owner else BEAT_SECONDS), age)
    return None


def process_identity(pid: int) -> dict[str, Any]:
    """What identifies a process among all others, on this machine or another."""
    return {
        "host": socket.gethostname(),
        "boot": _first_line("/proc/sys/kernel/random/boot_id"),
        "namespace": _namespace(),
        "pid": pid,
        "start": process_start(pid),
    }


def is_same_machine(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two processes see each other's process numbers."""
    return all(one[key] == other[key] for key in ("host", "boot", "namespace")) and one["namespace"] != UNSEEN


def is_alive(identity: dict[str, Any]) -> bool:
    """Whether a process of this machine still runs, and not another one with the same number."""
    return process_start(identity["pid"]) == identity["start"]


def process_start(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since boot; None if it does not run, or is a zombie."""
    if not Path("/proc/self/stat").exists():  # not Linux
        import psutil

        return int(100 * psutil.Process(pid).create_time()) if psutil.pid_exists(pid) else None
    try:
        fields = stat_fields(pid)
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def stat_fields(pid: int) -> list[bytes]:
    """What /proc/PID/stat says behind the name of the process, which may hold blanks: its state, its parent, ... Raises
    OSError."""
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()


def process_state(pid: int) -> str:
    """What a process of this machine is doing, in words."""
    try:
        letter = stat_fields(pid)[0].decode()
    except OSError:
        return "is gone"
    words = {"T": "is stopped (SIGSTOP)", "t": "is stopped by a debugger", "D": "waits for a disk or file system"}
    return {**words, "Z": "is dead", "X": "is dead"}.get(letter, "runs, but its watchdog does not answer")


def _locks(folder: Path) -> list[Path]:
    found = [p for p in folder.iterdir() if re.fullmatch(r"lock-\d+\.json", p.name)]
    return sorted(found, key=_number)


def _number(path: Path) -> int:
    return int(path.stem.removeprefix("lock-"))


def _read(path: Path) -> dict[str, Any] | None:
    """The owner; None if the file is torn or gone."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return owner if isinstance(owner, dict) and owner.keys() >= KEYS else None


def _age(path: Path) -> float | None:
    """Seconds since the file was touched, by the clock that dates files there; None if it is gone."""
    probe = path.with_name(f".clock-{secrets.token_hex(8)}")
    try:
        probe.touch()
        return max(0.0, probe.stat().st_mtime - path.stat().st_mtime)
    except FileNotFoundError:
        return None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _is_copy(path: Path, owner: dict[str, Any]) -> bool:
    """Whether the lock came here with a copy of the owner's folder, as `cp -r` of a run that goes on makes one: the
    owner's own lock is still where it was made, and that is another folder. A new name in this folder tells them apart,
    because two mounts or links of one folder may differ in device and inode."""
    home = owner.get("folder")
    if not isinstance(home, str) or home == str(path.parent.resolve()):
        return False
    own = _read(Path(home) / path.name)
    if own is None or own["token"] != owner["token"]:
        return False
    probe = path.with_name(f".clock-{secrets.token_hex(8)}")
    try:
        probe.touch()
        return not (Path(home) / probe.name).exists()
    except OSError:  # a reader who may not write here
        return not os.path.samefile(home, path.parent)
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _name(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']}" if owner else "a process that is just starting"


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _namespace() -> str:
    """In which process numbers mean what they mean here; UNSEEN where /proc is that of another one, as `unshare --pid`
    and `bwrap --unshare-pid` alone leave it: number 1 would be the host's, and never dead."""
    own = _link("/proc/self")
    return _link("/proc/self/ns/pid") if own in ("", str(os.getpid())) else UNSEEN


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
