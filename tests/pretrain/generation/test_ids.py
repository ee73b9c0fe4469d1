"""Texts of ids: with and without a cache, alone and beside others, until their end, and past a full context."""

from __future__ import annotations

import pytest
import torch

from common.errors import UserError
from model.decoding import context_limit, uncached_logits
from model.language_model import LanguageModel
from pretrain.generation.ids import Cost, NotFinite, Work, check_lengths, continued, first_read, window_start
from pretrain.generation.sampling import Sampling
from pretrain.generation.texts import Settings
from tests.pretrain.analysis.models import some_tokens, tiny

GREEDY = Sampling(temperature=0.0)


def work(*prompts: list[int], tokens: int = 5, **changes: object) -> Work:
    settings = {"sampling": Sampling(1.0, 0, 1.0, seed=5), "eos_id": None, "num_ids": 50, **changes}
    return Work(prompts, list(range(len(prompts))), tokens=[tokens] * len(prompts), **settings)  # type: ignore[arg-type]


def texts_of(model: LanguageModel, wanted: Work, cost: Cost | None = None) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in wanted.prompts]
    for text, number in continued(model, wanted, cost or Cost()):
        found[text].append(number)
    return found


@pytest.mark.parametrize("case", ["switchhead", "one selector, xl"])
def test_alone_beside_others_cached_and_not(case: str) -> None:
    """With a memory over borders of chunks, which have 7 tokens; without, up to the last token of the context."""
    model = tiny(case)
    has_memory = context_limit(model.config) is None
    tokens = 9 if has_memory else 4
    prompts = [some_tokens(length, seed=length) for length in ((13, 2, 7) if has_memory else (4, 1, 3))]
    cost, uncached = Cost(), Cost()
    found = texts_of(model, work(*prompts, tokens=tokens), cost)
    assert texts_of(model, work(*prompts, tokens=tokens, is_cached=False), uncached) == found
    for sample, prompt in enumerate(prompts):
        alone = Work([prompt], [sample], Sampling(1.0, 0, 1.0, seed=5), [tokens], None, 50)
        assert texts_of(model, alone) == [found[sample]]
    assert len({tuple(text) for text in found}) == 3 and all(len(text) == tokens for text in found)
    assert (cost.tokens, cost.prompt_tokens, uncached.cache_bytes) == (3 * tokens, sum(map(len, prompts)), 0)
    heads, slots = 2, 21 if has_memory else 7  # a memory of 2 chunks beside that of the text
    assert cost.cache_bytes == 3 * slots * 2 * heads * 6 * 2 * 4
    assert texts_of(model, work(*prompts, tokens=tokens, sampling=Sampling(1.0, 0, 1.0, seed=6))) != found
    short = Cost()
    texts_of(model, work([1], tokens=3), short)
    assert short.cache_bytes == 4 * 2 * heads * 6 * 2 * 4, "as many slots as the longest text has tokens"


def test_a_text_ends_with_its_end_and_the_others_go_on() -> None:
    model = tiny("switchhead xl")
    prompts = [some_tokens(3, seed=1), some_tokens(5, seed=2)]
    free = texts_of(model, work(*prompts, tokens=12))
    eos = next(number for number in free[0] if number not in free[1])
    ended = texts_of(model, work(*prompts, tokens=12, eos_id=eos))
    assert ended == [free[0][: free[0].index(eos) + 1], free[1]] and len(ended[0]) < 12


def test_ids_beyond_the_tokenizers_are_never_chosen() -> None:
    model = tiny("dense")
    with torch.no_grad():
        model.get_parameter("head.bias")[20:] = 50.0
    assert min(texts_of(model, work([1, 2], sampling=GREEDY))[0]) >= 20
    assert max(texts_of(model, work([1, 2], sampling=GREEDY, num_ids=20))[0]) < 20


@pytest.mark.parametrize("is_cached", [True, False], ids=["cached", "uncached"])
def test_a_full_context_slides(is_cached: bool) -> None:
    """By a reader that holds the tokens of a context of 7, and keeps the last 3 when the next one has no place."""
    model = tiny("switchhead")
    prompts = [some_tokens(2, seed=1), some_tokens(7, seed=2), some_tokens(18, seed=3)]
    expected = []
    for prompt in prompts:
        context: list[int] = []
        text = []
        for place in range(len(prompt) + 15):
            token = prompt[place] if place < len(prompt) else int(uncached_logits(model, context)[-1].argmax())
            text.append(token)
            context = [*context[-2:], token] if len(context) == 7 else [*context, token]
        expected.append(text[len(prompt) :])
    wanted = work(*prompts, tokens=15, sampling=GREEDY, slides=True, is_cached=is_cached)
    assert texts_of(model, wanted) == expected
    assert [window_start(length, 7) for length in (7, 8, 12, 13, 17, 18)] == [0, 5, 5, 10, 10, 15]
    assert window_start(2, 1) == 1 and window_start(5, 1) == 4 and window_start(99, None) == 0


def test_logits_that_are_not_finite() -> None:
    model = tiny("dense")
    with torch.no_grad():
        model.get_parameter("embedding.weight")[9] = float("nan")
    with pytest.raises(NotFinite) as error:
        texts_of(model, work([3], [9]))
    assert (error.value.text, error.value.place) == (1, 1)


@pytest.mark.parametrize(
    "prompt, tokens, words",
    [
        ([], 1, "the prompt: is empty"),
        (
            [1] * 8,
            1,
            r"has 8 tokens, .* context is model.sequence_length = 7; shorten it, or give --slide",
        ),
        ([1] * 7, 2, r"--tokens: 2 after the 7 of the prompt .* give at most --tokens 1, or --slide"),
    ],
)
def test_lengths_that_do_not_fit(prompt: list[int], tokens: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_lengths(work(prompt, tokens=tokens), 7, ["the prompt"])
    if prompt:
        check_lengths(work(prompt, tokens=tokens), None, ["the prompt"])
        check_lengths(work(prompt, tokens=tokens, slides=True), 7, ["the prompt"])
        check_lengths(work(prompt[:7], tokens=1), 7, ["the prompt"])


def test_without_a_number_a_text_has_100_tokens_or_as_many_as_there_is_room_for() -> None:
    wanted = Settings()
    assert [wanted.most(prompt, 128) for prompt in (3, 29, 30, 127, 128)] == [100, 100, 99, 2, 1]
    assert wanted.most(1000, None) == Settings(slides=True).most(128, 128) == 100
    assert Settings(tokens=7).most(128, 128) == 7


def test_what_is_read_begins_behind_the_end_of_the_document_before() -> None:
    for ids, first in (([5, 6], 0), ([1, 5], 1), ([5, 1, 6, 1, 7], 4), ([5, 1, 6, 1], 2), ([1], 0), ([1, 1], 1)):
        assert first_read(ids, None, 1) == first, ids
    assert first_read([5, 1, 6, 1, 7], None, None) == 0
    ids = [5, 5, 1, *range(10, 20)]  # of the ten of the document the last ones fit
    assert first_read(ids, 7, 1) == 3 + window_start(10, 7) > 3
