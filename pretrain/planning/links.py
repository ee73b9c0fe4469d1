"""How long a collective takes: the bytes that a rank sends, by the algorithm of rings, over the slowest link between
the ranks of its group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from model.parallel.context import DIMENSIONS
from pretrain.config.schema import Config
from pretrain.parallel.layout import group_ranks, mesh

INSIDE, BETWEEN = "inside a node", "between nodes"


@dataclass(frozen=True)
class Collective:
    """One call, or `count` equal ones in a row."""

    kind: str
    """all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, send, receive or barrier."""
    group: str
    """Whose: data, tensor, pipeline, expert, expert data, tied, model (tensor x pipeline), world (docs/glossary.md)."""
    ranks: int
    """Of the group."""
    num_bytes: int
    """Of the whole tensor: what an all-reduce adds up, an all-gather has in the end, a reduce-scatter is given, an
    all-to-all sends at the even split, the message of the others."""
    part: str
    """When: micro-step or update."""
    count: int = 1


class Spread(NamedTuple):
    """How the ranks of a group lie over nodes; of several groups, those that have it worst."""

    ranks: int
    on_a_node: int
    """The fewest of its ranks that a node has."""

    @property
    def link(self) -> str:
        return INSIDE if self.on_a_node == self.ranks else BETWEEN


class Rates(NamedTuple):
    """Bytes a second in one direction that a GPU reaches, and the seconds until the first byte."""

    inside: float
    between: float
    """While all GPUs of the node send."""
    start_inside: float
    start_between: float


def sent_bytes(kind: str, ranks: int, num_bytes: int) -> float:
    """Bytes that one rank sends in a collective on a tensor of `num_bytes` (`Collective.num_bytes`): nccl-tests
    counts with the same factors. An all-reduce is a reduce-scatter and an all-gather."""
    shares = {
        "all_reduce": 2 * (ranks - 1) / ranks,
        "all_gather": (ranks - 1) / ranks,
        "reduce_scatter": (ranks - 1) / ranks,
        "all_to_all": (ranks - 1) / ranks,
        "broadcast": float(ranks > 1),
        "reduce": float(ranks > 1),
        "send": 1.0,
        "receive": 0.0,  # its time is that of the send
        "barrier": 0.0,
    }
    return shares[kind] * num_bytes


def groups_of_ranks(config: Config, data_size: int) -> dict[str, np.ndarray]:
    """Name of a group, as in `Collective.group` -> ranks [groups, ranks of a group]. Where two are the same ranks, the
    more particular name comes first."""
    ranks, groups = mesh(config, data_size), group_ranks(config, data_size)
    stages, data, tensor = ranks.shape
    expert = config.parallel.expert
    if expert > 1:  # ranks that hold the same experts
        apart = ranks.reshape(stages, data // expert, expert, tensor)
        groups["expert data"] = np.moveaxis(apart, 2, 1).reshape(stages * expert, -1)
    if stages > 1:
        groups["tied"] = np.stack([ranks[0], ranks[-1]], axis=-1).reshape(-1, 2)
    groups["model"] = np.moveaxis(ranks, 1, 0).reshape(data, -1)
    groups["world"] = ranks.reshape(1, -1)
    order = (*DIMENSIONS, "expert", "expert data", "tied", "model", "world")
    return {name: groups[name] for name in order if name in groups}


def spreads(config: Config, data_size: int, gpus_per_node: int) -> dict[str, Spread]:
    """Name of a group -> how it lies. Nodes take neighbouring ranks."""
    return {name: _spread(rows, gpus_per_node) for name, rows in groups_of_ranks(config, data_size).items()}


def _spread(groups: np.ndarray, gpus_per_node: int) -> Spread:
    """groups: ranks [groups, ranks of a group]."""
    fewest = min(int(np.unique(group // gpus_per_node, return_counts=True)[1].min()) for group in groups)
    return Spread(groups.shape[1], fewest)


def seconds(collective: Collective, spread: Spread, rates: Rates) -> float:
    """Of one call. Ranks of a group on one node share the ports that other groups leave them: `on_a_node` times the
    rate of one GPU, and no more than the link inside the node carries."""
    if collective.ranks == 1 or collective.kind in ("barrier", "receive"):
        return 0.0
    sent = sent_bytes(collective.kind, collective.ranks, collective.num_bytes)
    if spread.link == INSIDE:
        return rates.start_inside + sent / rates.inside
    if collective.kind == "all_to_all":
        to_others = (spread.ranks - spread.on_a_node) / spread.ranks * collective.num_bytes
        within = max(0.0, sent - to_others)
        return rates.start_between + max(within / rates.inside, to_others / rates.between)
    if collective.kind == "send":
        return rates.start_between + sent / rates.between
    ring = min(rates.inside, spread.on_a_node * rates.between)
    return rates.start_between + sent / ring
