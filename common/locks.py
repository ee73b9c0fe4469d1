"""Locks between processes of one machine, or of all that share a file system."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_held: set[IO[str]] = set()
os.register_at_fork(after_in_child=lambda: [file.close() for file in _held] and None)


class NoLocks(OSError):
    """The file system has no locks, such as Lustre mounted without flock."""


@contextlib.contextmanager
def file_lock(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of a file for this process alone or, `shared`, beside others that share it. It ends with the
    process.

    Yields whether the lock is held: without `wait`, False where another process has it. Raises NoLocks. The file is
    made and stays: if it were removed, two processes could each lock a file of that name. It is opened for writing,
    because NFS gives no exclusive lock otherwise. A forked process gives its copy back, or it would hold the lock for
    a moment after this process was killed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise NoLocks(error.errno, error.strerror, str(path)) from None
        _held.add(file)
        try:
            yield True
        finally:
            _held.discard(file)
