"""What a trained model writes after prompts, as it comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from common.errors import UserError
from model.decoding import context_limit
from pretrain.generation.ids import Cost, NotFinite, Work, check_lengths, continued
from pretrain.generation.pieces import TextStream
from pretrain.generation.sampling import Sampling, check_whole
from pretrain.saved_model import SavedModel
from pretrain.saved_model.tokenizer import NO_TEXT

TOKENS = 100
"""New tokens of a text where nothing is said."""


@dataclass(frozen=True)
class Settings:
    """How texts are generated."""

    tokens: int | None = None
    """Most new tokens of a text; it ends earlier where the model ends it (EOS). None: 100, or as many as the context
    has room for."""
    sampling: Sampling = field(default_factory=Sampling)
    samples: int = 1
    """Texts for each prompt; the n-th is the same whatever other prompts and however many samples there are."""
    batch: int = 16
    """Texts that are computed at once."""
    is_cached: bool = True
    """Keys and values are kept; False computes the whole text for every token, which gives the same, slowly."""
    slides: bool = False
    """A text may be longer than the context of a model without memory: its last half is then read anew."""
    until: str | None = None
    """A text ends with the first of these words that the model writes."""

    def __post_init__(self) -> None:
        if self.until is not None and not isinstance(self.until, str):
            raise UserError(f"--until: is {self.until!r}; give the words that end a text")
        if self.until == "":
            raise UserError("--until: is empty; give the words that end a text, or leave it out")
        for option, value in (("tokens", self.tokens), ("samples", self.samples), ("batch", self.batch)):
            if value is not None:
                check_whole(option, value)
            if value is not None and value < 1:
                raise UserError(f"--{option}: is {value}; the least is 1")

    def most(self, prompt_tokens: int, limit: int | None) -> int:
        """New tokens after a prompt, in a context of `limit`."""
        if self.tokens is not None:
            return self.tokens
        return TOKENS if limit is None or self.slides else max(1, min(TOKENS, limit - prompt_tokens + 1))


@dataclass(frozen=True)
class Generated:
    prompt: str
    sample: int
    """Of its prompt, from 0."""
    text: str
    """What the model wrote after the prompt."""
    ids: tuple[int, ...]
    """The new tokens, without EOS."""
    is_ended: bool
    """Whether the model ended it, or wrote `until`; otherwise the number of tokens did."""


@dataclass(frozen=True)
class Piece:
    """News of a text."""

    number: int
    """Of the text: prompts in order, of each its samples in order."""
    content: str
    """What is added to it; all of it and nothing more is `Generated.text`."""
    finished: Generated | None
    """The whole text, with its last piece."""


def generate(saved: SavedModel, prompts: Sequence[str], settings: Settings) -> list[Generated]:
    """The texts: prompts in order, of each its samples in order. Raises UserError as `stream`."""
    return [piece.finished for piece in stream(saved, prompts, settings, Cost()) if piece.finished is not None]


def stream(
    saved: SavedModel,
    prompts: Sequence[str],
    settings: Settings,
    cost: Cost,
    *,
    names: Sequence[str] | None = None,
) -> Iterator[Piece]:
    """Pieces of the texts as they are certain, one text after the other. Adds to `cost`. `names`: of each prompt, for
    messages.

    Raises UserError: no prompt, an empty one, one that does not fit into the context, logits that are not finite.
    """
    model, tokenizer = saved.model, saved.tokenizer
    if settings.until is not None and not tokenizer.has_text:
        raise UserError(f"--until: {NO_TEXT}; leave the option out")
    names = names or [f"prompt {number}" if len(prompts) > 1 else "the prompt" for number, _ in enumerate(prompts, 1)]
    if not prompts:
        raise UserError("--prompt: there is none; give a text to continue")
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    limit = context_limit(model.config)
    most = [settings.most(len(ids), limit) for ids in encoded]

    def work(part: Sequence[tuple[int, int]]) -> Work:
        return Work(
            [encoded[prompt] for prompt, _ in part],
            [sample for _, sample in part],
            settings.sampling,
            [most[prompt] for prompt, _ in part],
            tokenizer.eos_id,
            tokenizer.vocab_size,
            is_cached=settings.is_cached,
            slides=settings.slides,
            document_end=saved.document_end,
        )

    check_lengths(work([(prompt, 0) for prompt in range(len(prompts))]), limit, names)
    total = len(prompts) * settings.samples
    for first in range(0, total, settings.batch):
        part = [divmod(number, settings.samples) for number in range(first, min(first + settings.batch, total))]
        texts = [_Text(saved, prompts[prompt], sample, (most[prompt], settings.until)) for prompt, sample in part]
        news = continued(model, work(part), cost, is_over=partial(_is_finished, texts))
        try:
            for piece in _in_order(texts, news):
                yield Piece(first + piece.number, piece.content, piece.finished)
        except NotFinite as error:
            path, step = saved.checkpoint.path, saved.checkpoint.progress.step
            raise UserError(
                f"checkpoint {path} (step {step:,}): the logits of new token {error.place} of "
                f"{names[part[error.text][0]]} are not finite; name a checkpoint from before the run diverged"
            ) from None


class _Text:
    """One text while it grows."""

    def __init__(self, saved: SavedModel, prompt: str, sample: int, end: tuple[int, str | None]) -> None:
        """`end`: most tokens, and the words that end it."""
        self.prompt, self.sample, self.eos_id = prompt, sample, saved.tokenizer.eos_id
        self.most, self.until = end
        self.stream = TextStream(saved.tokenizer, after=prompt)
        self.ids: list[int] = []
        self.text = ""
        self.taken = 0
        """Characters of it that were handed on."""
        self.is_finished = self.is_ended = False

    def add(self, number: int) -> None:
        if number == self.eos_id:
            self.is_ended = True
        else:
            self.ids.append(number)
            self.text += self.stream.add(number)
        if self.until is not None and (place := self.text.find(self.until)) >= 0:
            self.text, self.is_ended = self.text[: place + len(self.until)], True
        elif self.is_ended or len(self.ids) == self.most:
            self.text += self.stream.end()
        self.is_finished = self.is_ended or len(self.ids) == self.most

    @property
    def has_news(self) -> bool:
        return self.is_finished or len(self.text) > self.taken

    def take(self, number: int) -> Piece:
        content, self.taken = self.text[self.taken :], len(self.text)
        finished = None
        if self.is_finished:
            finished = Generated(self.prompt, self.sample, self.text, tuple(self.ids), self.is_ended)
        return Piece(number, content, finished)


def _is_finished(texts: list[_Text], number: int) -> bool:
    return texts[number].is_finished


def _in_order(texts: list[_Text], news: Iterator[tuple[int, int]]) -> Iterator[Piece]:
    """Pieces of the first text that is not finished; what the others say waits for their turn."""
    turn = 0
    for number, token in news:
        texts[number].add(token)
        while turn < len(texts) and texts[turn].has_news:
            yield texts[turn].take(turn)
            if not texts[turn].is_finished:
                break
            turn += 1
