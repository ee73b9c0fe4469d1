"""What the ranks of a run check together once they have met, each its share.

One rank alone would keep all others waiting; all of them alone would read everything as often as there are ranks.
"""

from __future__ import annotations

import dataclasses
import os

import torch.distributed as dist

from common.filesystems import filesystem_type, is_shared
from data_prep.shards.format import Manifest, Part
from pretrain.config.schema import Config
from pretrain.data.sources import Sources
from pretrain.parallel.agreement import said_by_first

MANY_RANKS = 16
"""From here on shards are hashed at the start even with data.verify = size: in a shuffled order every rank soon reads,
and would hash, every shard."""
SHARE_BYTES = 32 << 30
"""Largest share of a rank that is hashed without being asked for: half a minute at a gigabyte a second."""


def check_data(sources: Sources, config: Config) -> Sources:
    """Checks size, index and, where it is due, sha256 of every shard that lies on a disk, and the tokenizers. Returns
    the sources, which know whether shards were hashed. Collective; raises UserError on the first rank, PeerFailed on
    the others. A process alone has looked at sizes before it came here."""
    rank, size = dist.get_rank(), dist.get_world_size()
    hashes = config.data.verify == "full" or hashes_at_start(sources, size)
    if hashes or size > 1:
        said_by_first(lambda: sources.check("full" if hashes else "size", show_progress=rank == 0, part_of=part_of))
    sources.patience.files_were_seen = True
    return dataclasses.replace(sources, hashed=hashes)


def hashes_at_start(sources: Sources, world_size: int) -> bool:
    """Whether to hash all shards before the first step although data.verify is size."""
    shares = [
        source.manifest.num_bytes / part_of(source.manifest)[1] for source in sources.sources if source.cache is None
    ]
    return world_size >= MANY_RANKS and sum(shares) <= SHARE_BYTES


def part_of(manifest: Manifest) -> Part:
    """This rank's part of a data set: of all ranks, or of those of its node if other nodes have a copy of their own."""
    if is_shared(filesystem_type(manifest.folder.resolve())):
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_SIZE"])
