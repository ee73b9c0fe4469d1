"""Texts that a model writes for a task: those of a loop that computes one text anew for every token of it."""

from __future__ import annotations

import string
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from model.language_model import LanguageModel
from pretrain.evaluation.greedy import Wanted, Written, write
from pretrain.evaluation.likelihood import Limits, without_memory
from pretrain.generation.ids import Cost, Work, continued
from pretrain.generation.sampling import Sampling
from tests.pretrain.analysis.models import CASES, some_tokens, tiny

SYMBOLS = string.ascii_letters[:49] + "."
"""Of the 50 ids of a tiny model, each a character."""


class Characters:
    """A tokenizer."""

    has_text = True
    has_blanks_before_lines = False
    vocab_size = 48
    """The last two ids have no meaning."""

    def __init__(self, eos_id: int | None) -> None:
        self.eos_id, self.decoded = eos_id, 0

    def content(self, number: int) -> bytes:
        return SYMBOLS[number].encode()

    def encode(self, text: str) -> list[int]:
        return [SYMBOLS.index(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        self.decoded += len(ids)
        return "".join(SYMBOLS[number] for number in ids if number != self.eos_id)


def written(model: LanguageModel, eos_id: int | None, wanted: list[Wanted], limits: Limits) -> Written:
    return write(model, Characters(eos_id), wanted, limits)  # type: ignore[arg-type]


@torch.no_grad()
def by_a_loop(model: LanguageModel, one: Wanted, eos_id: int | None, context: int) -> str:
    ids, text = Characters(eos_id).encode(one.prompt) or [eos_id or 0], ""
    ids = ids[-(context - one.tokens) :]
    for _ in range(one.tokens):
        with without_memory(model, 1, torch.device("cpu")):
            number = int(model.logits(torch.tensor([ids]))[0][0, -1, : Characters.vocab_size].argmax())
        ids.append(number)
        text += "" if number == eos_id else SYMBOLS[number]
        if number == eos_id or any(stop and stop in text for stop in one.stops):
            break
    return min((text.partition(stop)[0] for stop in one.stops if stop), key=len, default=text)


@pytest.mark.parametrize("case", CASES)
def test_they_are_those_of_a_loop(case: str) -> None:
    """Odd lengths, in batches, beyond a chunk of 7 tokens, cut prompts, an empty one, and other ends."""
    model, context = tiny(case), 29

    def wanted(length: int, tokens: int, *stops: str) -> Wanted:
        return Wanted(Characters(None).decode(some_tokens(length, seed=length)), tokens, stops)

    asked = [wanted(5, 11), wanted(1, 28), wanted(40, 7), wanted(13, 16), wanted(0, 3), wanted(9, 0), wanted(22, 9)]
    free = [by_a_loop(model, one, None, context) for one in asked]
    assert written(model, None, asked, Limits(3, context)) == (free, 2)
    # What occurs in the texts ends them: two characters that follow each other, EOS, and a stop that never comes.
    stops = (free[3][1:3], "", "..", free[1][4])
    asked = [Wanted(one.prompt, one.tokens, stops) for one in asked]
    eos = SYMBOLS.index(free[0][6])
    ended = [by_a_loop(model, one, eos, context) for one in asked]
    assert ended != free and written(model, eos, asked, Limits(3, context)).texts == ended
    assert written(model, eos, asked, Limits(1, context)).texts == ended, "each alone"


def test_drawn_texts_are_decided_by_their_sample_alone() -> None:
    """Beside greedy ones and others, in any batch; each sample of a prompt is another text."""
    model, context = tiny("switchhead"), 29
    prompt, warm = Characters(None).decode(some_tokens(5, seed=5)), Sampling(temperature=2.0, top_p=1.0)
    draw = [Wanted(prompt, 11, (), warm, sample) for sample in (0, 1, 2**64 + 3)]
    greedy = [Wanted(prompt, 11, ()), Wanted(prompt, 4, ())]
    mixed = [draw[0], greedy[0], draw[1], greedy[1], draw[2]]
    texts = written(model, None, mixed, Limits(2, context)).texts
    assert texts[1::2] == [by_a_loop(model, one, None, context) for one in greedy]
    assert len({*texts[::2], texts[1]}) == 4
    for one, text in zip(draw, texts[::2], strict=True):
        assert written(model, None, [one], Limits(1, context)).texts == [text]
        work = Work([some_tokens(5, seed=5)], [one.sample], warm, [11], None, Characters.vocab_size, context=context)
        assert "".join(SYMBOLS[number] for _, number in continued(model, work, Cost())) == text


def test_no_token_is_computed_twice_nor_decoded_for_each_that_follows() -> None:
    model, seen = tiny("switchhead xl"), 0

    def count(module: nn.Module, inputs: tuple[tuple[Tensor, ...]], output: object) -> None:
        nonlocal seen
        seen += inputs[0][0].numel()

    model.get_submodule("embedding").register_forward_hook(count)
    prompts = [Characters(None).decode(some_tokens(9, seed=seed)) for seed in (1, 2)]
    heard: list[int] = []
    wanted = [Wanted(prompt, 10, ("..",)) for prompt in prompts]
    tokenizer = Characters(None)
    write(model, tokenizer, wanted, Limits(2, 21), after_batch=heard.append)  # type: ignore[arg-type]
    assert seen == 2 * (9 + 10 - 1) and heard == [2]
    assert tokenizer.decoded == 2 * (9 + 9 + 19), "twice the prompt, and once the whole"
