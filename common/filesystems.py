"""Which kind of file system a path is on, and whether other machines see it."""

from __future__ import annotations

import re
from pathlib import Path

SHARED_TYPES = set(
    """9p afs beegfs ceph cifs cvmfs fuse gfs2 glusterfs gpfs lustre nfs nfs4 ocfs2 panfs pvfs2 smb3 virtiofs
    wekafs""".split()  # noqa: SIM905
)
"""File systems that other hosts see (fuse.* too)."""


def is_shared(kind: str) -> bool:
    """Whether other hosts see a file system of this type."""
    return kind in SHARED_TYPES or kind.startswith("fuse.")


def filesystem_type(path: Path, mounts: str | None = None) -> str:
    """The type of the file system that `path` is or would be on, from /proc/self/mounts (or `mounts`, its text); empty
    if unknown."""
    if mounts is None:
        try:
            mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
    best, kind = Path("/"), ""
    for line in mounts.splitlines():
        fields = line.split(" ")
        # Blanks in names of folders are written as \040.
        folder = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[1]))
        if path.is_relative_to(folder) and (folder.is_relative_to(best)):
            best, kind = folder, fields[2]
    return kind
