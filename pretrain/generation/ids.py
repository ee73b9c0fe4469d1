"""Texts of ids that a model continues, several at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import UserError
from model.decoding import Decoding, context_limit, uncached_logits
from model.language_model import LanguageModel
from pretrain.generation.sampling import Draws, Sampling, choose


@dataclass(frozen=True)
class Work:
    """What is to be continued, and until when."""

    prompts: Sequence[Sequence[int]]
    """Of each text one id or more."""
    samples: Sequence[int]
    """Of each text: which sample of its prompt it is, from 0; decides its random numbers."""
    sampling: Sampling
    tokens: Sequence[int]
    """Of each text: most new ids."""
    eos_id: int | None
    """The id that ends a text; None: no id does."""
    num_ids: int
    """Ids from this one on have no meaning (rows of the embedding beyond the tokenizer's), and are never chosen."""
    is_cached: bool = True
    """Keeps keys and values; otherwise every new id costs a pass over its whole text."""
    slides: bool = False
    """See `window_start`."""
    context: int | None = None
    """Texts are read as tasks are: in one chunk of up to this many tokens, without memory; None: as training reads
    them."""
    document_end: int | None = None
    """The id behind which nothing before is seen (`document_end_of`). It ends texts, so it stands in prompts alone."""


@dataclass
class Cost:
    """What the work has cost so far."""

    tokens: int = 0
    """New ids, ends included."""
    seconds: float = 0.0
    """Reading of prompts included."""
    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    """Until the first ids were known."""
    first_tokens: int = 0
    """Those first ids: one a text."""
    cache_bytes: int = 0
    """The largest at any time."""


def window_start(length: int, limit: int | None) -> int:
    """The first token that is read of a text of `length` tokens whose model has a context of `limit`: 0 while the text
    fits; when the context is full, its last half is read anew, and so on."""
    if limit is None or length <= limit:
        return 0
    stride = limit + 1 - max(1, limit // 2)
    return (length - limit - 1) // stride * stride + stride


def first_read(ids: Sequence[int], limit: int | None, document_end: int | None) -> int:
    """The first token that is read for the one after `ids`: of the document that it goes on, if that has an end; then
    as `window_start`."""
    begin = 0
    if document_end is not None and document_end in ids[:-1]:  # the last id still sees what it ends
        begin = len(ids) - 1 - list(ids[-2::-1]).index(document_end)
    return begin + window_start(len(ids) - begin, limit)


class NotFinite(Exception):
    """The logits of the next id are not finite."""

    def __init__(self, text: int, place: int) -> None:
        super().__init__(f"text {text}, token {place}")
        self.text, self.place = text, place


def continued(
    model: LanguageModel, work: Work, cost: Cost, *, is_over: Callable[[int], bool] = lambda text: False
) -> Iterator[tuple[int, int]]:
    """Yields (text, id) as ids are chosen, every text once a step, the id that ends a text included; a text that has
    ended costs nothing more. `is_over(text)`, asked after each of its ids, may end it too. Adds to `cost`. Raises
    NotFinite."""
    texts = [list(prompt) for prompt in work.prompts]
    draws = [Draws(work.sampling.seed, sample) for sample in work.samples]
    ends = [len(text) + tokens for text, tokens in zip(texts, work.tokens, strict=True)]
    live = list(range(len(texts)))
    reader = (_Cached if work.is_cached else _Uncached)(model, texts, max(ends, default=0), work)
    cost.prompt_tokens += sum(map(len, texts))
    began, is_first = time.perf_counter(), True
    while live:
        started = time.perf_counter()
        logits = reader.next_logits(live)[:, : work.num_ids].float()
        finite = logits.isfinite().all(1)
        if not bool(finite.all()):
            text = live[int(finite.logical_not().nonzero()[0])]
            raise NotFinite(text, len(texts[text]) - len(work.prompts[text]) + 1)
        chosen = choose(logits, work.sampling, [draws[text] for text in live])
        cost.tokens += len(chosen)
        cost.cache_bytes = max(cost.cache_bytes, reader.bytes)
        cost.seconds += time.perf_counter() - started
        if is_first:
            cost.prompt_seconds += time.perf_counter() - began
            cost.first_tokens += len(chosen)
            is_first = False
        for text, number in zip(live, chosen, strict=True):
            texts[text].append(number)
            yield text, number
        live = [
            text
            for text in live
            if texts[text][-1] != work.eos_id and len(texts[text]) < ends[text] and not is_over(text)
        ]


def check_lengths(work: Work, limit: int | None, names: Sequence[str]) -> None:
    """Raises UserError for a prompt that is empty or does not fit into the context together with the new tokens."""
    for prompt, tokens, name in zip(work.prompts, work.tokens, names, strict=True):
        if not prompt:
            raise UserError(f"{name}: is empty; give some words for the model to continue")
        if limit is None or work.slides:
            continue
        if len(prompt) > limit:
            raise UserError(
                f"{name}: has {len(prompt):,} tokens, and the model's context is model.sequence_length = {limit:,}; "
                f"shorten it, or give --slide to read its end alone"
            )
        if len(prompt) + tokens - 1 > limit:  # the last new id is never read
            raise UserError(
                f"--tokens: {tokens:,} after the {len(prompt):,} of {name} are more than the model's context, "
                f"model.sequence_length = {limit:,}; give at most --tokens {limit - len(prompt) + 1:,}, or --slide"
            )


class _Cached:
    def __init__(self, model: LanguageModel, texts: list[list[int]], longest: int, work: Work) -> None:
        self._texts, self._limit, self._end = texts, work.context or context_limit(model.config), work.document_end
        capacity = longest if self._limit is None else min(longest, self._limit)
        self._decoding = Decoding(model, len(texts), capacity=capacity, context=work.context)
        self._rows = list(range(len(texts)))
        """Of each row of the cache its text."""
        self._read = [0] * len(texts)
        """Tokens of each text that were read,"""
        self._first = [0] * len(texts)
        """and the first that was not forgotten."""

    @property
    def bytes(self) -> int:
        return self._decoding.cache.bytes

    def next_logits(self, live: Sequence[int]) -> Tensor:
        cache = self._decoding.cache
        if list(live) != self._rows:
            cache.keep([self._rows.index(text) for text in live])
            self._rows = list(live)
        new = []
        for row, text in enumerate(live):
            ids, read = self._texts[text], self._read[text]
            first = first_read(ids, self._limit, self._end)
            if first > self._first[text]:
                cache.forget(row)
                read = self._first[text] = first
            new.append(ids[read:])
            self._read[text] = len(ids)
        return self._decoding.read(new)


class _Uncached:
    bytes = 0

    def __init__(self, model: LanguageModel, texts: list[list[int]], longest: int, work: Work) -> None:
        self._model, self._texts, self._context, self._end = model, texts, work.context, work.document_end
        self._limit = work.context or context_limit(model.config)

    def next_logits(self, live: Sequence[int]) -> Tensor:
        rows = []
        for text in live:
            ids = self._texts[text]
            read = ids[first_read(ids, self._limit, self._end) :]
            rows.append(uncached_logits(self._model, read, last=1, context=self._context))
        return torch.cat(rows)
