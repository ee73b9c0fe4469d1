"""Compiled Triton kernels on a node: one folder on its own disk, and one process that compiles each kernel.

Without this, N ranks of a node that start together compile every kernel N times, and on a cluster they do so in the
home folder, which is a network file system there. A kernel that another process is compiling is waited for.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from triton import knobs
from triton.runtime.cache import FileCacheManager

from common.filesystems import filesystem_type, is_shared

WAIT_SECONDS = 120.0
"""How long a process waits for one kernel before it compiles it too; a kernel takes seconds."""


class OneCompiler(FileCacheManager):  # RELIES-ON triton-cache
    """triton's folder of compiled kernels, in which a process that finds no kernel holds a lock until it has put it
    there. A process that dies, or whose kernel does not compile, holds nothing."""

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        super().__init__(key, override=override, dump=dump)
        self._lock: IO[bytes] | None = None

    def get_group(self, filename: str) -> dict[str, str] | None:
        found = super().get_group(filename)
        if found is not None or self._lock is not None or self.lock_path is None:
            return found
        self._lock = _locked(Path(self.cache_dir) / "compiling")
        return super().get_group(filename)  # another process may have put it there meanwhile

    def put_group(self, filename: str, group: dict[str, str]) -> str:
        try:
            return super().put_group(filename, group)
        finally:
            self._release()

    def __del__(self) -> None:
        self._release()

    def _release(self) -> None:
        lock, self._lock = getattr(self, "_lock", None), None
        if lock is not None:
            lock.close()


def _locked(path: Path) -> IO[bytes] | None:
    """The lock file, held by this process; None if it was not had in time or the file system has no locks."""
    deadline = time.monotonic() + WAIT_SECONDS
    try:
        file = open(path, "ab")  # noqa: SIM115 (closing it gives the lock back)
    except OSError:
        return None
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() >= deadline:
                break
            time.sleep(0.05)
        except OSError:
            break
    file.close()
    return None


def share_on_this_node(*, speaks: bool) -> None:
    """Makes all processes of this node compile each kernel once. Where the folder would be on a file system that other
    nodes see, it becomes one on this node's disk; TRITON_CACHE_DIR and TRITON_CACHE_MANAGER, if set, stay. Call before
    the first kernel. `speaks`: print a line if the node's disk cannot be used."""
    if knobs.cache.manager_class is None:
        knobs.cache.manager_class = OneCompiler
    if "TRITON_CACHE_DIR" in os.environ or not is_shared(filesystem_type(Path(knobs.cache.dir).resolve())):
        return
    folder = Path(tempfile.gettempdir()) / f"switchall-triton-{os.getuid()}"
    reason = _unusable(folder)
    if reason is None:
        os.environ["TRITON_CACHE_DIR"] = str(folder)  # processes that torch.compile starts read it too
    elif speaks:
        print(
            f"warning: {reason}, so compiled kernels go to {knobs.cache.dir}, which all nodes share; set "
            f"TRITON_CACHE_DIR to a folder on a disk of each node",
            file=sys.stderr,
            flush=True,
        )


def _unusable(folder: Path) -> str | None:
    """Why code from this folder, whose name anybody can guess, must or can not be run; makes it if it is missing."""
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
    except OSError as error:
        return f"{folder} cannot be made ({error.strerror})"
    if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o022:
        return f"{folder} is not this user's alone"
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        return f"{folder} is on a disk whose programs may not be run (noexec)"
    return None
