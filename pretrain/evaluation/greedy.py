"""Texts that a model writes for a task: continuations of prompts, greedy or drawn, in batches, with a cache of keys and
values.

Like the texts of every task they are read in one pass that begins with empty memory (likelihood.py), so greedy decoding
writes a target exactly where `answer` finds each of its tokens the likeliest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from model.language_model import LanguageModel
from pretrain.evaluation.examples import Encoder
from pretrain.evaluation.likelihood import Limits
from pretrain.generation.ids import Cost, Work, continued
from pretrain.generation.pieces import TextStream
from pretrain.generation.sampling import Sampling
from pretrain.saved_model import Tokenizer

GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class Wanted:
    """A text that is asked for."""

    prompt: str
    """May be empty."""
    tokens: int
    """At most; less than the context, so that there is room for the prompt's end."""
    stops: Sequence[str]
    """The text ends before the first of them."""
    sampling: Sampling = GREEDY
    sample: int = 0
    """Of drawn texts: decides the random numbers, with the seed of `sampling`."""


class Written(NamedTuple):
    """The texts, in the order they were asked for."""

    texts: list[str]
    cut: int
    """Prompts whose beginning was cut off."""


def write(
    model: LanguageModel,
    tokenizer: Tokenizer,
    wanted: Sequence[Wanted],
    limits: Limits,
    *,
    after_batch: Callable[[int], object] = lambda n: None,
) -> Written:
    """Calls `after_batch` with the number of texts of each batch. Raises NotFinite."""
    encoder, texts = Encoder(tokenizer), [""] * len(wanted)
    prompts = [encoder.prompt(one.prompt) for one in wanted]
    rows = [prompt[-(limits.context - one.tokens) :] for prompt, one in zip(prompts, wanted, strict=True)]
    # The longest first: texts of like length cost the least together, and too little memory shows at once.
    order = sorted((n for n, one in enumerate(wanted) if one.tokens > 0), key=lambda n: -len(rows[n]))
    for batch in _batches(order, wanted, limits.batch):
        written = _write_some(model, tokenizer, [rows[n] for n in batch], [wanted[n] for n in batch], limits)
        for n, text in zip(batch, written, strict=True):
            texts[n] = text
        after_batch(len(batch))
    return Written(texts, sum(len(row) < len(prompt) for row, prompt in zip(rows, prompts, strict=True)))


def _batches(order: Sequence[int], wanted: Sequence[Wanted], size: int) -> Iterator[list[int]]:
    """The texts in `order`, those that are drawn alike together."""
    for sampling in dict.fromkeys(wanted[n].sampling for n in order):
        alike = [n for n in order if wanted[n].sampling == sampling]
        for first in range(0, len(alike), size):
            yield alike[first : first + size]


def _write_some(
    model: LanguageModel, tokenizer: Tokenizer, rows: Sequence[list[int]], wanted: Sequence[Wanted], limits: Limits
) -> list[str]:
    """The texts of one batch, whose prompts are the ids `rows`, drawn alike."""
    made: list[list[int]] = [[] for _ in rows]
    streams = [TextStream(tokenizer, after=tokenizer.decode(row)) for row in rows]
    said = [""] * len(rows)

    def is_over(row: int) -> bool:
        # First by what was said piece by piece: to decode the whole text for each token takes longer than a GPU's pass.
        stops = wanted[row].stops
        return _ends(said[row], stops) and _ends(_text(tokenizer, rows[row], made[row]), stops)

    work = Work(
        rows,
        [one.sample for one in wanted],
        wanted[0].sampling,
        [one.tokens for one in wanted],
        tokenizer.eos_id,
        tokenizer.vocab_size,
        context=limits.context,
        document_end=limits.document_end,
    )
    for row, token in continued(model, work, Cost(), is_over=is_over):
        made[row].append(token)
        if token != tokenizer.eos_id:
            said[row] += streams[row].add(token)
    return [_before(_text(tokenizer, *row), one.stops) for *row, one in zip(rows, made, wanted, strict=True)]


def _text(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> str:
    """What the tokens add to the prompt's text; EOS adds nothing."""
    kept = [token for token in tokens if token != tokenizer.eos_id]
    return tokenizer.decode([*prompt, *kept])[len(tokenizer.decode(prompt)) :]


def _ends(text: str, stops: Sequence[str]) -> bool:
    return any(stop and stop in text for stop in stops)


def _before(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop sequences."""
    return text[: min([text.find(stop) for stop in stops if stop and stop in text], default=len(text))]
