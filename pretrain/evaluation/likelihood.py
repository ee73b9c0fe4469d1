"""What a model answers, in any layout: log-likelihoods of targets after contexts, in batches of texts of like length.

Every text is computed by itself, in one forward pass, by a model without memory of other text; that is how the authors
of SwitchHead compute these tasks, with Transformer-XL too: its memory is emptied before every text, and attention
reaches over all of the text. A model has learned contexts of (1 + memory_chunks) x sequence_length tokens. Of a longer
text the beginning is cut off, and the number of such texts is said.

Texts are sorted by length, the longest first, and filled up at their end, which no token before it sees: so a text's
answer does not depend on the texts beside it, but for rounding.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import UserError
from model.config import ModelConfig
from model.documents import document_index
from model.memory import layer_memories, separate_streams
from model.parallel.context import ParallelContext
from pretrain.engine.micro_steps import Evaluator, Queries
from pretrain.evaluation.examples import Answer, Query

LENGTH_STEP = 16
"""Lengths are rounded up to multiples of this many tokens: few shapes, of which an allocator keeps few blocks."""


@dataclass(frozen=True)
class Place:
    """Where this rank computes."""

    parallel: ParallelContext
    device: torch.device


@dataclass(frozen=True)
class Limits:
    """How much is computed at once, and how far back a model looks."""

    batch: int
    """Texts of one forward pass of a rank."""
    context: int
    """Most input tokens of a text."""
    document_end: int | None = None
    """The id behind which nothing before is seen, of a model that was trained with data.document_mask."""
    remedy: str = "set --context to {longest} or more, which the model has not learned, or leave the task out"
    """What helps where a target of `longest` tokens is longer than that, for a message."""


class Answers(NamedTuple):
    """The answers to queries, in their order."""

    answers: list[Answer]
    cut: int
    """Texts whose beginning was cut off."""


def learned_context(model: ModelConfig) -> int:
    """The most tokens that a token could look back to in training, itself included."""
    return model.sequence_length + model.memory_length


def check_lengths(queries: Sequence[Query], limits: Limits) -> None:
    """Raises UserError for a target that is longer than the context."""
    longest = max((len(query.target) for query in queries), default=0)
    if longest > limits.context:
        raise UserError(
            f"a target has {longest} tokens, more than the {limits.context} of the model's context; "
            + limits.remedy.format(longest=longest)
        )


@contextlib.contextmanager
def without_memory(model: nn.Module, batch: int, device: torch.device) -> Iterator[None]:
    """While it is open, every text of a batch of up to `batch` is computed with empty memory, and leaves none; then the
    model's own streams go on untouched."""
    streams = torch.arange(batch, device=device)
    with separate_streams(model, streams, batch):
        for _, memory in layer_memories(model):
            memory.is_paused = True  # nothing is noted for a step that would follow
        yield


@torch.no_grad()
def answer(
    evaluator: Evaluator,
    queries: Sequence[Query],
    limits: Limits,
    place: Place,
    *,
    goes_on: Callable[[int], bool] = lambda done: True,
) -> Answers | None:
    """The same on every rank; collective. `goes_on`, which is collective too, hears the number of texts that are done
    before each group of batches and says whether to go on; if not, the result is None. A log-likelihood that is not
    finite stands as NaN. Raises UserError for a target that is longer than the context."""
    check_lengths(queries, limits)
    lengths = np.array([len(query.context) + len(query.target) - 1 for query in queries], np.int64)
    order = np.argsort(-lengths, kind="stable")
    parallel, device = place.parallel, place.device
    rows = limits.batch * parallel.data_size
    sums = torch.zeros(2, len(queries), dtype=torch.float64, device=device)
    batches = [order[first : first + rows] for first in range(0, len(order), rows)]
    at_once, done = 4 * parallel.pipeline_size, 0  # as in pretrain/evaluate.py
    with without_memory(evaluator.module, limits.batch, device):
        for first in range(0, len(batches), at_once):
            if not goes_on(done):
                return None
            _answer_some(evaluator, queries, batches[first : first + at_once], sums, limits, place)
            done += sum(map(len, batches[first : first + at_once]))
    for group in (parallel.data_group, parallel.pipeline_group):
        if group is not None:
            dist.all_reduce(sums, group=group)
    goes_on(done)
    likelihood, hits = sums.cpu().numpy()
    answers = [
        Answer(float(value), hit == len(query.target), len(query.target))
        for value, hit, query in zip(likelihood, hits, queries, strict=True)
    ]
    return Answers(answers, int((lengths > limits.context).sum()))


def _answer_some(
    evaluator: Evaluator,
    queries: Sequence[Query],
    batches: Sequence[np.ndarray],
    sums: Tensor,
    limits: Limits,
    place: Place,
) -> None:
    """Adds this rank's part of the answers to some global batches to `sums` [2, queries]: log-likelihoods, and targets
    that were the likeliest tokens."""
    parallel, device = place.parallel, place.device
    step = math.lcm(LENGTH_STEP, parallel.token_shards)
    own, made = [], []
    for batch in batches:
        longest = min(limits.context, len(queries[batch[0]].context) + len(queries[batch[0]].target) - 1)
        mine = batch[parallel.data_rank * limits.batch :][: limits.batch]
        own.append(mine)
        # A rank without a text computes one that does not count: under ZeRO 3 every forward pass is collective.
        shown = [queries[i] for i in (mine if len(mine) else batch[:1])]
        made.append(_queries(shown, -(-longest // step) * step, limits, device))
    for mine, (values, are_likeliest) in zip(own, evaluator.log_likelihoods(made), strict=True):
        if not parallel.is_last_stage or not len(mine):
            continue
        counts = [len(queries[i].target) for i in mine]
        which = torch.from_numpy(np.repeat(mine, counts)).to(device)
        sums[0].index_add_(0, which, values.double())
        sums[1].index_add_(0, which, are_likeliest.double())


def _queries(shown: Sequence[Query], length: int, limits: Limits, device: torch.device) -> Queries:
    """Texts as one batch of `length` tokens, filled up with token 0."""
    tokens = np.zeros((len(shown), length), np.int64)
    places, targets = [], []
    for row, query in enumerate(shown):
        inputs = np.concatenate([query.context, query.target[:-1]])[-limits.context :]
        tokens[row, : len(inputs)] = inputs
        places.append(row * length + len(inputs) - len(query.target) + np.arange(len(query.target)))
        targets.append(query.target)

    def on_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(device)

    text, end = on_device(tokens), limits.document_end
    documents = None if end is None else document_index(text, end)
    return Queries(text, on_device(np.concatenate(targets)), on_device(np.concatenate(places)), documents)
