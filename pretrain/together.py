"""What the ranks of a run check together once they have met, each its share.

One rank alone would keep all others waiting; all of them alone would read everything as often as there are ranks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from common.errors import UserError, kind_of
from common.filesystems import filesystem_type, is_shared
from common.hashing import sha256_json
from common.paths import REPOSITORY
from common.requirements import installed
from data_prep.shards.format import WHOLE, Manifest, Part
from pretrain.config.keys import flatten
from pretrain.config.loading import to_json
from pretrain.config.schema import Config
from pretrain.data.sources import Sources
from pretrain.data.verified import FILE, VerifiedShard, as_it_is, recall, remember, stamps_of
from pretrain.device import on_collective_device
from pretrain.parallel.agreement import agree, agreed, of_all_ranks, said_by_first
from pretrain.ranks import place_on_node

MANY_RANKS = 16
"""From here on shards are hashed at the start even with data.verify = size: in a shuffled order every rank soon reads,
and would hash, every shard."""
SHARE_BYTES = 32 << 30
"""Largest share of a rank that is hashed without being asked for: half a minute at a gigabyte a second."""
ROUND_SECONDS = 20.0
"""How often the ranks meet while they hash: collectives give up after a minute at the earliest."""


CODE = ("common", "data_prep/shards", "model", "pretrain")
"""Folders of what ranks compute by, but for libraries."""
CODE_KINDS = (".py", ".cu", ".json")
OF_A_NODE = ("data.manifest", "data.sources", "data.cache_dir", "data.cache_bytes", "evaluate.tasks", "train.threads")
"""Keys and sections that nodes may have their own values of: where copies of the same data lie, and how fast they are.
"""


@dataclasses.dataclass
class _Hashed:
    """What one rank has done."""

    hashed: int = 0
    """Shards."""
    known: int = 0
    verified: list[VerifiedShard] = dataclasses.field(default_factory=list)


def check_config(config: Config) -> None:
    """Collective: raises UserError (agreed), which names a key, unless all ranks have the same configuration. Each has
    read the file itself, perhaps a copy on its node, and a learning rate of its own would show in no number."""
    own = {key: json.dumps(value) for key, value in flatten(to_json(config)).items() if not _is_of_a_node(key)}
    _check_alike(own, "give all nodes the same configuration")


def check_code() -> None:
    """Collective: raises UserError (agreed), which names a library or a file, unless all nodes have the same code:
    other code would train along without a word. The first rank of each node reads it, about 400 files in 10 to 20 ms;
    where all ranks are on one node, none does."""
    number, size = place_on_node(os.environ)
    reads = number == 0 and size < dist.get_world_size()
    _check_alike(agreed(lambda: code_here(REPOSITORY) if reads else None), "give all nodes the same code")


def code_here(root: Path) -> dict[str, str]:
    """Of what this process computes by: the versions of libraries and, behind names of files below `root`, the first 64
    bits of their sha256, in hex. Raises UserError."""
    found = {name: installed(name) or "unknown" for name in ("torch", "deepspeed")}
    try:
        for start in CODE:
            for folder, folders, names in os.walk(root / start):
                # What an editor leaves, such as Emacs' lock of an unsaved file, a link to nowhere, is none of it.
                folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
                names = [name for name in names if name.endswith(CODE_KINDS) and not name.startswith(".")]
                for path in (Path(folder, name) for name in names):
                    found[str(path.relative_to(root))] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise kind_of(error)(f"{error.filename}: the code of this run cannot be read: {error.strerror}") from None
    return found


def _check_alike(own: dict[str, str] | None, advice: str) -> None:
    """Collective: raises UserError (agreed) unless the ranks that have something have the same, rank 0 among them. Only
    digests are sent while they are."""
    digests = of_all_ranks(None if own is None else sha256_json(own))
    different = next((rank for rank, digest in enumerate(digests) if digest not in (None, digests[0])), None)
    if different is None:
        return
    all_own = of_all_ranks(own if dist.get_rank() in (0, different) else None)
    first, other = all_own[0] or {}, all_own[different] or {}
    name = next(name for name in sorted(first.keys() | other.keys()) if first.get(name) != other.get(name))
    here, there = (values.get(name, "not there") for values in (first, other))
    agree(UserError(f"{name}: is {here} on rank 0 and {there} on rank {different}; {advice}"))


def _is_of_a_node(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in OF_A_NODE)


def check_data(sources: Sources, config: Config, run_dir: Path) -> Sources:
    """Checks size, index and, where it is due, sha256 of every shard that lies on a disk, and the tokenizers. A shard
    that an earlier start of the run in `run_dir` has verified, and that nobody has touched, is not hashed again unless
    data.verify is full. Returns the sources, which know which files were hashed: one that is replaced before a reader
    opens it is hashed then. Collective; raises UserError on the first rank, PeerFailed on the others. A process alone
    has looked at sizes before it came here."""
    rank, size, done = dist.get_rank(), dist.get_world_size(), _Hashed()
    # All ranks or none: nodes may have other disks, and other numbers of ranks.
    hashes = config.data.verify == "full" or all(of_all_ranks(hashes_at_start(sources, size)))

    def check() -> None:
        sources.check("size", part_of=part_of)
        if hashes:
            known = recall(run_dir) if config.data.verify == "size" else frozenset()
            _hash(sources, known, done, show_progress=rank == 0)

    own = list[VerifiedShard]()
    if hashes:  # all ranks, before anybody hashes
        said_by_first(lambda: own.extend(_on_own_disks(sources)))
    if hashes or size > 1:
        said_by_first(lambda: in_rounds(check))
    sources.patience.files_were_seen = True
    if not hashes:
        return sources
    verified = _gathered(done)
    return dataclasses.replace(sources, hashed=stamps_of([*own, *verified]), verified=() if rank else verified)


def _on_own_disks(sources: Sources) -> list[VerifiedShard]:
    """The shards on disks of this node, whose ranks hash them, as they are now."""
    found = []
    for source in sources.sources:
        if source.cache is None and not _is_shared(source.manifest):
            found += [as_it_is(source.manifest, entry) for entry in source.manifest.part(WHOLE)]
    return [shard for shard in found if shard is not None]


def remember_data(run_dir: Path, sources: Sources) -> None:
    """Rank 0 writes down for the next start what this one knows of the shards; it must own the run folder."""
    if not sources.verified:
        return
    try:
        remember(run_dir, sources.verified)
    except OSError as error:  # the next start hashes again
        print(f"warning: {run_dir / FILE} cannot be written: {error.strerror}", file=sys.stderr, flush=True)


def in_rounds(work: Callable[[], None]) -> None:
    """Calls `work`, which may take any time, in a thread, while the ranks meet again and again: no collective waits for
    a rank that works until it gives up. Collective; returns when all have ended, or raises what this rank's raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="checking data", daemon=True)  # a rank that is to leave does not wait
    thread.start()
    all_have_ended = False
    while not all_have_ended:
        thread.join(ROUND_SECONDS)
        ended = on_collective_device(torch.tensor([not thread.is_alive()], dtype=torch.int64))
        dist.all_reduce(ended, op=dist.ReduceOp.MIN)
        all_have_ended = bool(int(ended))
    if raised:
        raise raised[0]


def _hash(sources: Sources, known: frozenset[VerifiedShard], done: _Hashed, *, show_progress: bool) -> None:
    """Hashes the shards of this rank's parts that are not known."""
    for source in sources.sources:
        if source.cache is not None:
            continue
        manifest, part = source.manifest, part_of(source.manifest)
        # Asked before it is read, so that a change meanwhile is one that the next start sees.
        now = [(entry, as_it_is(manifest, entry)) for entry in manifest.part(part)]
        # Other nodes have other files under the same names.
        shared = _is_shared(manifest)
        unknown = [entry for entry, shard in now if not (shared and shard in known)]
        if part[0] == 0:
            manifest.check_records(sources.patience)
        manifest.hash_shards(unknown, show_progress, sources.patience)
        done.hashed += len(unknown)
        done.known += len(now) - len(unknown)
        done.verified += [shard for _, shard in now if shared and shard is not None]


def _gathered(done: _Hashed) -> tuple[VerifiedShard, ...]:
    """The shards on shared disks of all ranks; rank 0 says what they have done. Collective."""
    parts = of_all_ranks(done)
    hashed, known = sum(part.hashed for part in parts), sum(part.known for part in parts)
    if dist.get_rank() == 0:
        print(f"data: {hashed:,} shards verified, {known:,} known from an earlier start", flush=True)
    return tuple(shard for part in parts for shard in part.verified)


def hashes_at_start(sources: Sources, world_size: int) -> bool:
    """Whether to hash all shards before the first step although data.verify is size."""
    shares = [
        source.manifest.num_bytes / part_of(source.manifest)[1] for source in sources.sources if source.cache is None
    ]
    return world_size >= MANY_RANKS and sum(shares) <= SHARE_BYTES


def part_of(manifest: Manifest) -> Part:
    """This rank's part of a data set: of all ranks, or of those of its node if other nodes have a copy of their own."""
    if _is_shared(manifest):
        return dist.get_rank(), dist.get_world_size()
    return place_on_node(os.environ)


def _is_shared(manifest: Manifest) -> bool:
    return is_shared(filesystem_type(manifest.folder.resolve()))
