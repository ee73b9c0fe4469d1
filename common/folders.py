"""Checks of output folders before any work: what is wrong with one, in one sentence, and how much room is left.

Errors are raised as DataError with the key that names the folder.
"""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from common.errors import DataError, kind_of

KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
FULL = {errno.ENOSPC, errno.EDQUOT}  # no block, or none of this user's quota, is left


def expanded(path: str, key: str) -> Path:
    """An absolute path; ~ is the user's home, as in a shell. DataError for a user that does not exist."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError:
        raise DataError(f"{key}: {path} is in the home of a user that does not exist; name another folder") from None


def check_writable_folder(folder: Path, key: str) -> None:
    """Raises DataError unless the folder is there and may be written, or can be made. `folder` is absolute. Makes
    nothing."""
    check_folder(folder, key)
    check_permission(folder, key)


def check_folder(folder: Path, key: str) -> None:
    """Raises DataError if the path, or a part of it, exists and is not a folder. `folder` is absolute."""
    for place in (*reversed(folder.parents), folder):
        try:
            mode = place.stat().st_mode
        except FileNotFoundError:
            if place.is_symlink():
                raise DataError(
                    f"{key}: {place} is a link to {os.readlink(place)}, which is not there; make that folder, or "
                    "remove the link"
                ) from None
            return
        except OSError as error:
            if error.errno == errno.ELOOP:
                reason = "is a link that leads back to itself; remove it"
            elif error.errno == errno.EACCES:
                reason = f"is out of reach: no permission to look into {place.parent}; name another folder"
            else:
                reason = f"cannot be used: {error.strerror}; name another folder"
            raise kind_of(error, DataError)(f"{key}: {place} {reason}") from None
        if not stat.S_ISDIR(mode):
            kind = KINDS.get(stat.S_IFMT(mode), "no folder")
            below = "" if place == folder else f", so there can be no {folder}"
            raise DataError(f"{key}: {place} is {kind} and not a folder{below}; name another folder")


def check_permission(folder: Path, key: str) -> None:
    """Raises DataError if this user may not write into the folder, or may not make it. `folder` is absolute."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        where = "" if existing == folder else f" to make {folder}"
        raise DataError(f"{key}: no permission to write into {existing}{where}; name another folder")


@contextlib.contextmanager
def making(folder: Path) -> Iterator[None]:
    """Makes a folder and those that it is in. If the block ends with an error, the ones made here that are empty then
    are gone again."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # something is in it
            for place in made:
                place.rmdir()
        raise


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write on the disk of the folder, which need not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk, or a quota on it, is full."""
    return isinstance(error, OSError) and error.errno in FULL


def room_text(folder: Path) -> str:
    """How much room a disk that has refused a file has, and what would help; empty if nobody knows."""
    try:
        there = os.statvfs(folder)
    except OSError:
        return ""
    if there.f_files and not there.f_favail:
        return "no more files may be made there, however small (inodes): remove some"
    return f"{there.f_bavail * there.f_frsize:,} bytes are free there (a quota may leave less): make room"


def no_room(folder: Path, needed: int, what: str, *, about: bool = False) -> str:
    """The sentence, without a fix, that the disk has no room for `needed` bytes (`about`: approximately) for `what`."""
    amount = f"{'about ' * about}{needed:,} bytes are needed, {free_bytes(folder):,} are free"
    return f"the disk of {folder} has no room for {what}: {amount}"
