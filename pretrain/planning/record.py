"""What a rehearsed step tells (rehearsal.py)."""

from __future__ import annotations

from typing import Literal, NamedTuple

Routed = Literal["even", "worst"]
"""How experts are chosen: each as often as any other, or as many as possible of all tokens of the group for this
rank."""

BACKWARD = "backward pass"
BUCKETS = "buckets"
GRADIENTS = "gradients"
RESTING = ("weights", "optimizer", GRADIENTS, "memory", "pipeline", BUCKETS, "engine")
"""Parts that are there between steps."""


class Rehearsal(NamedTuple):
    """What one rank holds and sends in a step. Bytes; `parts` name what they are for."""

    micro_steps: int
    """As many were rehearsed; the run may have more, which repeat one of them."""
    resting: dict[str, int]
    """Between steps, by part: RESTING."""
    elsewhere: int
    """Of the optimizer, in CPU memory (parallel.offload_optimizer on a GPU); not in `resting` and `peak`."""
    kept: dict[str, int]
    """What each layer keeps of the first micro-batch for its backward pass, by its name."""
    peak: int
    """At the highest point of the step."""
    at_peak: dict[str, int]
    """Then, by part: those of RESTING, layers (what they keep), `backward pass`, `buckets`, `update`, `loss`, `gloo`
    (its copies, on CPUs)."""
    calls: list[Call]
    """Collectives in their order."""
    starts: list[int]
    """The number of the first call of each micro-step, and of the first after the last one; of a pipeline only the
    beginning and the end."""


class Call(NamedTuple):
    """One collective, as this rank calls it."""

    kind: str
    """all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, reduce, send, receive or barrier."""
    ranks: tuple[int, ...]
    """Of the group, among all ranks; of a message the sender and the receiver."""
    dtype: str
    elements: int
    """Of the whole tensor: what an all-reduce adds up, an all-gather has in the end, a reduce-scatter is given, an
    all-to-all sends, the message of the others."""
    num_bytes: int
    part: str
    """micro-step or update."""
    refused: str = ""
    """Why NCCL does not take it, though gloo may; empty if it does."""
