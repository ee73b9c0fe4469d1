"""What makes a run slow without a word: ranks that are not where the machines would serve them best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from common.tables import listed
from pretrain.config.schema import Config
from pretrain.parallel.layout import group_ranks

LISTED = 8
"""Ranks that a warning names."""


def placement_warnings(config: Config, hosts: Sequence[str], far: Sequence[bool]) -> list[str]:
    """`hosts`: the machine of every rank. `far`: whether it may run on no core near its GPU."""
    found = []
    groups = group_ranks(config, config.data_size(len(hosts)))
    most = max(Counter(hosts).values())
    tensor, expert = config.parallel.tensor, config.parallel.expert
    for name, neighbours in (("tensor", tensor), ("expert", tensor * expert)):
        ranks = groups[name].tolist() if name in groups else []
        spread = sum(len({hosts[rank] for rank in group}) > 1 for group in ranks)
        if spread and neighbours <= most:
            found.append(
                f"parallel.{name}: {spread} of {len(ranks)} groups of ranks are on several machines, and what they "
                f"send each other goes over the network; start the ranks of a machine one after the other (srun "
                f"--distribution=block), {neighbours} or a multiple of it"
            )
    if any(far):
        who = listed([str(rank) for rank, is_far in enumerate(far) if is_far], LISTED)
        found.append(
            f"{sum(far)} of {len(far)} ranks ({who}) may run only on cores that are far from their GPUs, at another "
            f"processor, which each copy between CPU and GPU then crosses; give each rank its share of all cores of "
            f"its node (srun --cpus-per-task), in the order of the GPUs (--distribution=block:block), or bind it "
            f"(--cpu-bind)"
        )
    return found
