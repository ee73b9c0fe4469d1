"""Transformer-XL memory: what each layer keeps of the previous chunks of every stream (arXiv 1901.02860, section 3.2).

A stream is one contiguous run of text; a step feeds the next chunk of every stream. Sequence n of the run belongs to
stream n mod S, in every layout; S is the number of sequences of a step. A layer keeps its inputs (hidden states before
its first LayerNorm), without gradient. A read sees what the previous step left, and writes become visible at `advance`,
once per step, so micro-steps and recomputation cannot see each other in any order.

With sequence parallelism a rank keeps its tokens of every chunk, and `max_length` counts only these.

All streams begin, wrap around and forget together, so a whole batch has one length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class LayerMemory:
    """The memory of one layer for the streams of one rank. Not a buffer: it is data, not a parameter of the model."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.streams = torch.zeros(0, dtype=torch.int64, device="cpu")
        """[n] int64: the streams held here, a row each."""
        self.kept: Tensor | None = None
        """[n, m, d], m <= max_length: inputs of the tokens before this step's; None if there are none yet."""
        self.is_paused = False
        """While this is set nothing is noted, because a forward pass is being repeated (model/recompute.py)."""
        self._written: Tensor | None = None
        self._row = self.streams

    def assign(self, streams: Tensor, num_streams: int) -> None:
        """Makes empty rows for the streams `streams` [n] int64 of `num_streams`; indices stay on the device of
        `streams`."""
        self.streams = streams
        self._row = torch.full((num_streams,), -1, dtype=torch.int64, device=streams.device)
        self._row[streams] = torch.arange(len(streams), device=streams.device)
        self.forget()

    @property
    def num_streams(self) -> int:
        """Streams of all ranks."""
        return len(self._row)

    def forget(self) -> None:
        """The next chunk begins a stream."""
        self.kept = self._written = None

    def extend(self, hidden: Tensor, sequence_index: Tensor) -> Tensor:
        """Context [B, m + T, d] of `hidden` [B, T, d], the chunks of the sequences `sequence_index` [B]; notes the
        chunks for the next step. Memory carries no gradient."""
        assert self.num_streams, "no streams were assigned to this memory"
        rows = self._row[sequence_index % self.num_streams]
        context = hidden if self.kept is None else torch.cat([self.kept[rows].to(hidden.dtype), hidden], dim=1)
        if self.is_paused:
            return context
        tail = context[:, -self.max_length :].detach()
        if self._written is None:
            self._written = tail.new_zeros(len(self.streams), *tail.shape[1:])
        self._written[rows] = tail
        return context

    @property
    def length(self) -> int:
        """Tokens of each stream that this step sees."""
        return 0 if self.kept is None else self.kept.shape[1]

    def place(self, kept: Tensor | None, written: Tensor) -> None:
        """From now on this step reads from `kept` and notes in `written` [n, min(max_length, m + T), d], tensors of a
        CUDA graph, which is recorded for their places alone. Both get the present values; in `written` rows that were
        not noted keep what they had: a step notes all."""
        if kept is not None and self.kept is not None and self.kept is not kept:
            kept.copy_(self.kept)
        if self._written is not None and self._written is not written:
            written.copy_(self._written)
        self.kept, self._written = kept, written

    def advance(self) -> None:
        """Ends a step: what was noted is the memory of the next one."""
        self.kept, self._written = self._written, None


def layer_memories(model: nn.Module) -> Iterator[tuple[str, LayerMemory]]:
    """Every layer's memory with the layer's canonical name, e.g. `blocks.3`, in order; none without memory."""
    for name, module in model.named_modules():
        memory = getattr(module, "memory", None)
        if isinstance(memory, LayerMemory):
            yield name, memory


@contextlib.contextmanager
def separate_streams(model: nn.Module, streams: Tensor, num_streams: int) -> Iterator[None]:
    """Context in which the model reads other streams (validation); afterwards its own streams go on untouched."""
    saved = [(memory, dict(vars(memory))) for _, memory in layer_memories(model)]
    for memory, _ in saved:
        memory.assign(streams, num_streams)
    try:
        yield
    finally:
        for memory, before in saved:
            vars(memory).update(before)
