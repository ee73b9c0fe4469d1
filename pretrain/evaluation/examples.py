"""An example of a task: texts that a model compares, or a word that it is to find."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import UserError
from pretrain.saved_model.tokenizer import TASK_IS_TEXT, Tokenizer


@dataclass(frozen=True)
class Example:
    """One question to a model."""

    place: str
    """File and line, for messages."""
    group: str
    """What it is averaged with first: a set of BLiMP, a kind of word of CBT; empty: there are no groups."""
    context: str
    """Text before all targets; may be empty."""
    targets: tuple[str, ...]
    """Ways to go on, the right one first."""


class Examples(NamedTuple):
    """The content of a task's files."""

    examples: list[Example]
    left_out: int = 0
    """Questions of the files that the protocol cannot ask."""


class Query(NamedTuple):
    """A target after a context, as ids."""

    context: np.ndarray
    """[c] int32, c >= 1."""
    target: np.ndarray
    """[n] int32, n >= 1."""


class Answer(NamedTuple):
    """What a model says about one target."""

    log_likelihood: float
    """log p(target | context) in nats, summed over its tokens."""
    is_likeliest: bool
    """Whether every token of the target is the likeliest one after those before it: greedy decoding gives the
    target."""
    tokens: int


def right_if_decoded(answers: Sequence[Answer]) -> bool:
    """Greedy decoding gives the only target."""
    return answers[0].is_likeliest


def right_if_likelier(answers: Sequence[Answer]) -> bool:
    """The first target has a higher log-likelihood than each other."""
    return all(answers[0].log_likelihood > other.log_likelihood for other in answers[1:])


def right_if_likelier_per_token(answers: Sequence[Answer]) -> bool:
    """The first target has a higher log-likelihood per token than each other."""
    first, *others = (answer.log_likelihood / answer.tokens for answer in answers)
    return all(first > other for other in others)


@dataclass(frozen=True)
class Task:
    """A file format, and a protocol."""

    name: str
    read: Callable[[Path], Examples]
    """The examples of a file or folder. Raises UserError with file and line."""
    is_right: Callable[[Sequence[Answer]], bool]
    """Whether the answers about an example's targets are right."""
    groups: int = 0
    """Published groups of examples, whose mean is the result; 0: there are none."""
    has_perplexity: bool = False
    """Whether the perplexity of the right target says something."""


class Encoder:
    """Texts as ids, in the way of lm-evaluation-harness, so that both give the same numbers.

    Context and target are encoded together, and the target is what comes after as many ids as the context alone has.
    Blanks at the end of a context belong to the target, because a piece of SentencePiece holds the blank before a word.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises UserError where ids have no text."""
        if not tokenizer.has_text:
            raise UserError(TASK_IS_TEXT)
        self._tokenizer = tokenizer

    def of_example(self, example: Example) -> list[Query]:
        """As `queries`; a UserError names the example's place."""
        try:
            return self.queries(example.context, example.targets)
        except UserError as error:
            raise UserError(f"{example.place}: {error}") from None

    def queries(self, context: str, targets: Sequence[str]) -> list[Query]:
        """One for each target; where the context is blank, of both as one text. Raises UserError where a text has no
        ids."""
        kept = context.rstrip()
        if not kept:
            return [self.whole(context + target) for target in targets]
        ids = self._ids(kept)
        return [_checked(ids, self._ids(context + target)[len(ids) :]) for target in targets]

    def whole(self, text: str) -> Query:
        """A text without context: after the end of another document (EOS); where the tokenizer has no EOS, without
        its first token, which nothing predicts."""
        ids, eos = self._ids(text), self._tokenizer.eos_id
        start = ids[:1] if eos is None else np.array([eos], np.int32)
        return _checked(start, ids[1:] if eos is None else ids)

    def prompt(self, text: str) -> list[int]:
        """A text that is read on: its ids; of an empty one EOS, or without an EOS the first token."""
        eos = self._tokenizer.eos_id
        return self._tokenizer.encode(text) or [0 if eos is None else eos]

    def _ids(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text), np.int32)


def as_query(context: Sequence[int], target: Sequence[int]) -> Query:
    """Of ids."""
    return Query(np.array(context, np.int32), np.array(target, np.int32))


def _checked(context: np.ndarray, target: np.ndarray) -> Query:
    if not len(context) or not len(target):
        what = "target" if len(context) else "context"
        raise UserError(f"the {what} gives no token by the run's tokenizer; remove this example")
    return Query(context, target)


def limited(examples: Iterable[Example], limit: int | None) -> list[Example]:
    """The first `limit` examples of each group."""
    counts: dict[str, int] = {}
    kept = []
    for example in examples:
        counts[example.group] = counts.get(example.group, 0) + 1
        if limit is None or counts[example.group] <= limit:
            kept.append(example)
    return kept
