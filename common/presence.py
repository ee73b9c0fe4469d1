"""Whether something is there, where a wrong "no" would cost something.

Path.exists and its kin call everything missing that cannot be looked at, from Python 3.14 on: a file system that does
not answer would then pass for a run without checkpoints. Before, they raised, as these do.
"""

from __future__ import annotations

import errno
import os
import stat

ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP})
"""What says that there is nothing of that name."""


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether the path, or what its link leads to, exists. Raises OSError if the file system does not say."""
    return _mode(path) is not None


def is_dir(path: str | os.PathLike[str]) -> bool:
    """As `exists`, of a folder."""
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def is_file(path: str | os.PathLike[str]) -> bool:
    """As `exists`, of a regular file."""
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def _mode(path: str | os.PathLike[str]) -> int | None:
    try:
        return os.stat(path).st_mode
    except ValueError:  # a null character
        return None
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise
