"""What a person reads on a board: the names of curves, and the page of those that one looks at first."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from common.units import GIB

TAGS: dict[str, tuple[str, float]] = {
    "loss": ("loss/train", 1.0),
    "auxiliary_loss": ("loss/auxiliary", 1.0),
    "grad_norm": ("optimizer/gradient norm", 1.0),
    "lr": ("optimizer/learning rate", 1.0),
    "loss_scale": ("optimizer/loss scale", 1.0),
    "tokens": ("progress/tokens", 1.0),
    "epoch": ("progress/epoch", 1.0),
    "tokens_per_second": ("speed/tokens per second", 1.0),
    "flops_per_second": ("speed/model TFLOP per second", 1e-12),
    "flops_utilization": ("speed/share of the peak FLOP per second", 1.0),
    "step_seconds": ("time of a step in seconds/whole step", 1.0),
    "data_wait_seconds": ("time of a step in seconds/waiting for its batches", 1.0),
    "slowest_rank": ("speed/slowest rank", 1.0),
    "slowest_rank_behind_seconds": ("time of a step in seconds/slowest rank, own work beyond the median rank's", 1.0),
    "memory_bytes": ("memory of rank 0 in GiB/now", 1 / GIB),
    "memory_reserved_bytes": ("memory of rank 0 in GiB/reserved", 1 / GIB),
    "memory_peak_bytes": ("memory of rank 0 in GiB/peak", 1 / GIB),
    "routing_negative_entropy": ("routing/of the regulariser/negative entropy", 1.0),
    "routing_choices": ("routing/replayed/choices taken from the record", 1.0),
    "routing_flips": ("routing/replayed/choices that would have been different", 1.0),
    "routing_flip_distance": ("routing/replayed/farthest from a tie, difference of the logits", 1.0),
}
"""Key of metrics.jsonl -> tag, and the factor to its unit."""
SUMMARY = {
    "load_max": "busiest expert, 1 is even",
    "busiest_share": "share of the choices of the k busiest experts, worst router",
    "unused_experts": "experts without a token",
    "unused_share": "share of experts without a token",
}
"""Ending of a key of metrics.jsonl -> words."""
KINDS_OF_LAYER = {"attention": "attention", "feedforward": "feed-forward"}


def split_words(split: str) -> str:
    """What the names of curves say of a split that a run was evaluated on."""
    return "validation" if split == "validation" else f"{split} split"


def tag_of(key: str) -> tuple[str, float]:
    """The tag of a key of metrics.jsonl, and the factor to its unit."""
    if key in TAGS:
        return TAGS[key]
    if key.startswith("epoch/"):
        return f"progress/epoch of {key.removeprefix('epoch/')}", 1.0
    kind, _, ending = key.partition("_")
    if kind in KINDS_OF_LAYER and ending in SUMMARY:
        return f"routing/all {KINDS_OF_LAYER[kind]} layers/{SUMMARY[ending]}", 1.0
    return f"other/{key.replace('_', ' ')}", 1.0


def router_of(name: str) -> tuple[str, int]:
    """Kind of router and block of a canonical name: blocks.3.attention.value_statistics -> attention value, 3."""
    _, block, layer, rest = name.split(".")
    selector = re.sub(r"_?statistics$", "", rest)
    return f"{KINDS_OF_LAYER[layer]} {selector}".rstrip(), int(block)


def router_points(load: dict[str, Tensor]) -> dict[str, float]:
    """Choices per expert of every router, [E] or [H, E] -> per block and kind: the load of the busiest expert (1 is
    even; the worst head's), the entropy as a share of an even router's (mean over heads), the experts without a token.
    """
    width = len(str(max((router_of(name)[1] for name in load), default=0)))
    points: dict[str, float] = {}
    for name, counts in load.items():
        kind, block = router_of(name)
        rows = counts.double().view(-1, counts.shape[-1])
        share = rows / rows.sum(-1, keepdim=True).clamp_min(1.0)
        entropy = -(share * share.clamp_min(1e-300).log()).sum(-1).mean() / math.log(max(2, rows.shape[-1]))
        where = f"block {block:0{width}d}"
        points[f"routing/{kind}/load max/{where}"] = float(share.max()) * rows.shape[-1]
        points[f"routing/{kind}/entropy, 1 is even/{where}"] = float(entropy)
        points[f"routing/{kind}/dead experts/{where}"] = float((rows == 0).sum())
    return points


def load_by_block(load: dict[str, Tensor]) -> dict[str, Tensor]:
    """Choices per expert of every router, [E] or [H, E] -> for each kind of router [blocks x H, E]: an expert's load in
    units of the mean load of its router."""
    kinds: dict[str, dict[int, Tensor]] = {}
    for name, counts in load.items():
        kind, block = router_of(name)
        rows = counts.double().view(-1, counts.shape[-1])
        mean = rows.sum(-1, keepdim=True).clamp_min(1.0) / rows.shape[-1]
        kinds.setdefault(kind, {})[block] = rows / mean
    return {kind: torch.cat([blocks[block] for block in sorted(blocks)]) for kind, blocks in kinds.items()}


def layout(*, has_tasks: bool, has_sources: bool) -> dict[str, dict[str, list[object]]]:
    """The page of custom scalars: what a person looks at first. Charts name tags by regular expressions; without tasks,
    or a mixture, theirs would be empty."""

    def chart(*patterns: str) -> list[object]:
        return ["Multiline", list(patterns)]

    return {
        "how well it learns": {
            "loss": chart("^loss/(train|(validation|test split)( of the moving average)?)$"),
            **({"validation loss by source": chart("^[a-z ]+ loss by source/")} if has_sources else {}),
            "perplexity": chart("^perplexity/"),
            "gradient norm": chart("^optimizer/gradient norm$"),
            "learning rate": chart("^optimizer/learning rate$"),
            **({"accuracy of tasks": chart("^tasks/.* accuracy$")} if has_tasks else {}),
        },
        "how its experts are used": {
            "busiest expert (1 is even)": chart("^routing/all .* layers/busiest"),
            "share of experts without a token": chart("^routing/all .* layers/share of experts"),
        },
        "how fast it is": {
            "tokens per second": chart("^speed/tokens per second$"),
            "where a step's time goes (s)": chart(
                "^time of a step in seconds/(whole step|waiting for its batches|forward|backward|update)$"
            ),
            "memory of rank 0 (GiB)": chart("^memory of rank 0 in GiB/"),
        },
        "how far its parts move": {
            "gradient norm by group": chart("^gradient norm by group/"),
            "update norm / parameter norm": chart("^update norm over parameter norm/"),
        },
    }
