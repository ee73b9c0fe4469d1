"""Which shards an earlier start of the run has hashed: RUN_DIR/verified.json, so that the next one need not.

It holds for files that have not been touched since: same place, size and time of change, under the same manifest.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from common.files import write_json
from common.hashing import sha256_json
from data_prep.shards.format import Manifest, ShardEntry
from data_prep.shards.reader import Stamp

FILE = "verified.json"
VERSION = 1


class VerifiedShard(NamedTuple):
    """A shard as it was before it was hashed, and found to be what the manifest says."""

    manifest: str
    """Digest of the manifest."""
    folder: str
    name: str
    size: int
    """Bytes."""
    mtime_ns: int
    """When its content last changed, nanoseconds since the epoch, as the file system tells."""
    sha256: str


def stamps_of(shards: Iterable[VerifiedShard]) -> dict[str, dict[str, Stamp]]:
    """As readers take them, by manifest and name."""
    found: dict[str, dict[str, Stamp]] = {}
    for shard in shards:
        found.setdefault(shard.manifest, {})[shard.name] = (shard.size, shard.mtime_ns)
    return found


def as_it_is(manifest: Manifest, entry: ShardEntry) -> VerifiedShard | None:
    """The shard as it is now, if it has the content that the manifest says; None if the system does not tell."""
    with contextlib.suppress(OSError):
        status, folder = (manifest.folder / entry.file).stat(), str(manifest.folder.resolve())
        return VerifiedShard(manifest.digest, folder, entry.file, status.st_size, status.st_mtime_ns, entry.sha256)
    return None


def recall(run_dir: Path) -> frozenset[VerifiedShard]:
    """What earlier starts have verified. Nothing if the file is not there, not whole or not of this version."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        tree = json.loads((run_dir / FILE).read_bytes())
        body = {"version": VERSION, "data_sets": tree["data_sets"]}
        if tree == body | {"digest": sha256_json(body)}:
            return frozenset(
                VerifiedShard(of_set["manifest"], of_set["folder"], name, size, mtime_ns, sha256)
                for of_set in tree["data_sets"]
                for name, size, mtime_ns, sha256 in of_set["shards"]
            )
    return frozenset()


def remember(run_dir: Path, shards: Iterable[VerifiedShard]) -> None:
    """Writes what is verified, in place of what was. Raises OSError."""
    data_sets = [
        {"manifest": manifest, "folder": folder, "shards": [list(shard[2:]) for shard in of_set]}
        for (manifest, folder), of_set in groupby(sorted(set(shards)), key=lambda shard: shard[:2])
    ]
    body = {"version": VERSION, "data_sets": data_sets}
    write_json(run_dir / FILE, body | {"digest": sha256_json(body)}, indent=None)
