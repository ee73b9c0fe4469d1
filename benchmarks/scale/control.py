"""What ranks tell each other between steps: every rank's messages, played by one process in lockstep."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.scale.figures import Figure
from model.config import ModelConfig
from model.parameters import parameter_specs
from pretrain.parallel.agreement import agreement, said
from pretrain.parallel.rounds import Message, maximum_in_rounds
from pretrain.resilience.replicas import both_ways


class Played(NamedTuple):
    """A reduction over all ranks."""

    results: list[Tensor]
    """Of every rank."""
    rounds: int
    bytes_sent: int
    """By each rank."""
    peers: int
    """Ranks that each rank is connected to."""
    seconds: float
    """Of CPU, all ranks together."""


def play(values: list[Tensor]) -> Played:
    """Every rank's `maximum_in_rounds`, of which `values` are the numbers: what one sends, the other receives."""
    started, size, rounds, sent = time.process_time(), len(values), 0, 0
    ranks = [maximum_in_rounds(own, number, size) for number, own in enumerate(values)]
    results: list[Tensor] = []
    peers: set[int] = set()
    messages: list[Message | None] = [next(rank) for rank in ranks] if size > 1 else [None]
    while messages[0] is not None:
        rounds, sent = rounds + 1, sent + messages[0].values.nbytes
        peers |= {messages[0].to, messages[0].source}
        heard = []
        for number, message in enumerate(messages):
            assert message is not None
            from_there = messages[message.source]
            assert from_there is not None and from_there.to == number, f"round {rounds}: {number} waits for nothing"
            heard.append(from_there.values)
        messages = []
        for rank, received in zip(ranks, heard, strict=True):
            try:
                messages.append(rank.send(received))
            except StopIteration as end:
                results.append(end.value)
                messages.append(None)
    return Played(results or values, rounds, sent, len(peers), time.process_time() - started)


def figures(ranks: int, config: ModelConfig) -> list[Figure]:
    failed, stopping = ranks // 2, ranks - 1
    # Five flags, as pretrain/segment.py sends.
    flags = (False, True, True, False, False)
    message = play(
        [said(rank, ranks, rank == failed, rank == stopping, False, rank == 0, *flags[2:]) for rank in range(ranks)]
    )
    for result in message.results:
        found = agreement(result, ranks)
        assert found.first_failed == failed and found.stopping and found.flags == list(flags)

    keys = len(parameter_specs(config))
    sums = torch.arange(keys) * 7 - 3
    own = [
        both_ways(sums + (rank == failed) * (torch.arange(keys) == 1), torch.arange(keys), keys)
        for rank in range(ranks)
    ]
    replicas = play(own)
    for result in replicas.results:
        different = torch.nonzero(~result[keys:] != result[:keys]).view(-1).tolist()
        assert different == ([1] if ranks > 1 else [])

    return [
        Figure("step message: messages after each other", message.rounds, "messages"),
        Figure("  around gloo's ring", 2 * (ranks - 1), "messages"),
        Figure("  sent by a rank", message.bytes_sent, "bytes"),
        Figure("  connections of a rank", message.peers, "connections"),
        Figure("  CPU of a rank", 1e6 * message.seconds / ranks, "us"),
        Figure("comparison of replicas: sent by a rank", replicas.bytes_sent, "bytes"),
        Figure("  gathered by every rank before", ranks * keys * 8, "bytes"),
        Figure("  CPU of a rank", 1e6 * replicas.seconds / ranks, "us"),
    ]
