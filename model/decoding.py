"""Reading texts on, token by token, with the keys and values of what was read before kept (model/cache.py).

What a token's logits are, with or without a cache, is what training computes: a text is read in chunks of
sequence_length tokens. A model with memory (Transformer-XL, or RoPE with memory_chunks) sees the memory_length tokens
before the chunk too, and has no longest text; a model without memory has one chunk, so sequence_length is its context.

Tasks are computed in another way, which `context` asks for: a text of up to so many tokens is one chunk, with empty
memory (pretrain/evaluation/likelihood.py says why).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from model.attention.rope import apply_rope, rope_tables
from model.attention.switchhead import SwitchHeadAttention
from model.cache import KVCache, Rotation
from model.config import ModelConfig, RopeConfig
from model.documents import document_index
from model.language_model import LanguageModel
from model.memory import layer_memories, separate_streams


def context_limit(config: ModelConfig) -> int | None:
    """Tokens that a text may have; None: any number, of a model with memory."""
    return None if config.memory_length else config.sequence_length


def prefer_single_tokens(model: LanguageModel) -> None:
    """Once, before a model on a CPU generates: SwitchHead's ops let every expert compute every token (the reference).
    To group a single token by its experts costs more than that: 110 ms a token instead of 60 for the published 47M
    SwitchHead on one core. Other models, and other devices, stay as they are."""
    for block in model.blocks:
        attention = block.get_submodule("attention")
        if isinstance(attention, SwitchHeadAttention) and attention.backends.switchhead_value == "cpu":
            ops = dict.fromkeys(("route", "switchhead_value", "switchhead_output"), "reference")
            attention.backends = dataclasses.replace(attention.backends, **ops)


class Decoding:
    """R texts that one model (in evaluation mode) reads on."""

    def __init__(
        self, model: LanguageModel, rows: int, *, capacity: int | None = None, context: int | None = None
    ) -> None:
        """`capacity`: no text becomes longer than this, so that less is kept; None: the context. `context`: every text
        is one chunk of up to this many tokens, without memory; None: chunks as in training."""
        assert not model.training, "generation is without dropout: call model.eval()"
        self.model = model
        config = model.config
        chunk, memory = (config.sequence_length, config.memory_length) if context is None else (context, 0)
        rotation = None
        if isinstance(config.position, RopeConfig) and memory:
            rotation = partial(_rotated, config=config.position)
        rotations: list[Rotation | None] = [rotation] * config.num_layers
        self.cache = KVCache(rotations, rows=rows, chunk=chunk, memory=memory, capacity=capacity)

    def read(self, new: Sequence[Sequence[int]]) -> Tensor:
        """Reads new[r], one or more ids of text r, after what it has read. -> logits [R, vocab_size] of the id that
        follows each text. Texts are read together, up to the end of a chunk in one pass."""
        last: list[Tensor | None] = [None] * len(new)
        for rows, counts, hidden in self._hidden(new):
            for place, (row, count) in enumerate(zip(rows, counts, strict=True)):
                last[row] = hidden[place, count - 1]
        ends = [end for end in last if end is not None]
        assert len(ends) == len(new), "every text needs a new token"
        return head_logits(self.model, torch.stack(ends)[:, None])[:, 0]

    def read_all(self, new: Sequence[Sequence[int]]) -> list[Tensor]:
        """As `read` -> of each text the logits after each of its new tokens, [len(new[r]), vocab_size]."""
        found: list[list[Tensor]] = [[] for _ in new]
        for rows, counts, hidden in self._hidden(new):
            logits = head_logits(self.model, hidden)
            for place, (row, count) in enumerate(zip(rows, counts, strict=True)):
                found[row].append(logits[place, :count])
        return [torch.cat(parts) for parts in found]

    @torch.no_grad()
    def _hidden(self, new: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], list[int], Tensor]]:
        """Of each pass its rows, their numbers of new tokens and the last block's output [B, n, d_model]. A pass does
        not cross the end of a row's chunk."""
        device, done = next(self.model.parameters()).device, [0] * len(new)
        while rows := [row for row, text in enumerate(new) if done[row] < len(text)]:
            room = min(self.cache.room(row) for row in rows)
            parts = [new[row][done[row] : done[row] + room] for row in rows]
            counts = [len(part) for part in parts]
            padded = [[*part, *[0] * (max(counts) - len(part))] for part in parts]
            tokens = torch.tensor(padded, device=device)
            self.cache.begin(rows, counts, device)
            state, _ = self.model.begin(tokens, tokens.new_zeros(len(rows)))
            for block, layer in zip(self.model.blocks, self.cache.layers, strict=True):
                state = block(state, layer)
                assert layer.tensors(), "attention keeps nothing of what it reads; docs/new-layer.md says what it must"
            yield rows, counts, state[0]
            for row, count in zip(rows, counts, strict=True):
                done[row] += count


@torch.no_grad()
def hidden_states(
    model: LanguageModel, tokens: Sequence[int], *, context: int | None = None, document_end: int | None = None
) -> Iterator[Tensor]:
    """Reads one text of N >= 1 ids as training does: chunk by chunk, with the memory of the chunks before, and nothing
    else kept; with a `context` of at least N in one chunk. This defines what `Decoding` computes. `document_end`: the
    id behind which nothing before is seen; None: there is none. -> of each chunk of n tokens the embedding's and every
    block's output, [num_layers + 1, n, d_model]."""
    assert context is None or len(tokens) <= context, "the text is longer than the context"
    device, length = next(model.parameters()).device, context or model.config.sequence_length
    ids, stream = torch.tensor(list(tokens), device=device), torch.zeros(1, dtype=torch.int64, device=device)
    with separate_streams(model, stream, 1):
        for chunk in ids.split(length):
            documents = None if document_end is None else document_index(chunk[None], document_end)
            state, apart = model.begin(chunk[None], stream, documents)
            states = [state[0]]
            for block in model.blocks:
                state = block(state, apart)
                states.append(state[0])
            for _, memory in layer_memories(model):
                memory.advance()
            yield torch.cat(states)


def uncached_logits(
    model: LanguageModel,
    tokens: Sequence[int],
    *,
    last: int = 0,
    context: int | None = None,
    document_end: int | None = None,
) -> Tensor:
    """Logits after each token of a text [N, vocab_size], or after its `last` tokens alone, by `hidden_states`."""
    found = hidden_states(model, tokens, context=context, document_end=document_end)
    hidden = torch.cat([states[-1] for states in found])
    return head_logits(model, hidden[None, -last:])[0]


@torch.no_grad()
def head_logits(model: LanguageModel, hidden: Tensor) -> Tensor:
    """The last block's output [B, n, d_model] -> logits [B, n, vocab_size]."""
    unused = hidden.new_zeros(len(hidden), dtype=torch.int64)
    logits, _, _ = model.head(model.final_norm((hidden, unused, hidden.new_zeros(()))))
    return logits


def _rotated(x: Tensor, positions: Tensor, *, config: RopeConfig) -> Tensor:
    """As model.cache.Rotation."""
    cos, sin = rope_tables(positions, x.shape[3], config)
    return apply_rope(x.transpose(1, 2), cos, sin).transpose(1, 2)
