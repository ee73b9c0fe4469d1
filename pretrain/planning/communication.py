"""What a rank sends in one optimizer step: the collectives that it calls, in their order."""

from __future__ import annotations

from dataclasses import dataclass


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
