"""What is asked of a model and made of its answers, with a table of bigrams in the model's place: no rank, no run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from model.config import ModelConfig
from model.memory import LayerMemory
from model.parallel.context import ParallelContext
from pretrain.engine.micro_steps import Queries
from pretrain.evaluation.examples import (
    Answer,
    Encoder,
    Example,
    Query,
    Task,
    as_query,
    right_if_decoded,
    right_if_likelier,
    right_if_likelier_per_token,
)
from pretrain.evaluation.likelihood import (
    Answers,
    Limits,
    Place,
    answer,
    check_lengths,
    learned_context,
    without_memory,
)
from pretrain.evaluation.tasks import PreparedTask

V = 11
PLACE = Place(ParallelContext(), torch.device("cpu"))


class Bigrams:
    """A model whose next token depends on the one before it alone."""

    def __init__(self) -> None:
        self.module = nn.Module()
        self.table = torch.randn(V, V, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
        self.shapes: list[tuple[int, ...]] = []

    def log_likelihoods(self, batches: Sequence[Queries]) -> list[tuple[Tensor, Tensor]]:
        found = []
        for batch in batches:
            self.shapes.append(tuple(batch.tokens.shape))
            rows = self.table[batch.tokens.flatten()[batch.places]]
            found.append((rows.gather(1, batch.targets[:, None])[:, 0], rows.argmax(-1) == batch.targets))
        return found

    def answer(self, query: Query) -> Answer:
        """One text by a loop over its tokens."""
        ids, total, right = [*query.context.tolist(), *query.target.tolist()], 0.0, True
        for place in range(len(query.context), len(ids)):
            row = self.table[ids[place - 1]]
            total += float(row[ids[place]])
            right = right and int(row.argmax()) == ids[place]
        return Answer(total, right, len(query.target))


def greedy(model: Bigrams, first: int, tokens: int) -> list[int]:
    found = [first]
    for _ in range(tokens):
        found.append(int(model.table[found[-1]].argmax()))
    return found[1:]


def some_queries(model: Bigrams) -> list[Query]:
    """Of 2 to 40 tokens; some targets are what greedy decoding gives, of one the last token alone is not."""
    chosen = np.random.default_rng(0)
    queries = []
    for context, target in ((1, 1), (30, 10), (3, 2), (5, 1), (1, 9), (12, 3), (20, 1)):
        queries.append(as_query(chosen.integers(V, size=context).tolist(), chosen.integers(V, size=target).tolist()))
    for tokens in (1, 4):
        queries.append(as_query([2, 5], greedy(model, 5, tokens)))
    almost = greedy(model, 5, 3)
    return [*queries, as_query([2, 5], [*almost[:-1], (almost[-1] + 1) % V])]


@pytest.mark.parametrize("batch", [1, 3, 99])
@pytest.mark.parametrize("context", [10, 16, 39, 99])
def test_answers_are_those_of_a_loop_over_tokens(batch: int, context: int) -> None:
    """Of a text that is too long the beginning is cut off, which leaves these answers as they are."""
    model = Bigrams()
    queries = some_queries(model)
    found = answer(model, queries, Limits(batch, context), PLACE)  # type: ignore[arg-type]
    assert found is not None
    expected = [model.answer(query) for query in queries]
    assert [one.log_likelihood for one in found.answers] == pytest.approx([one.log_likelihood for one in expected])
    assert [one[1:] for one in found.answers] == [one[1:] for one in expected]
    assert [one.is_likeliest for one in found.answers[-3:]] == [True, True, False]
    assert found.cut == sum(len(query.context) + len(query.target) - 1 > context for query in queries)
    assert [shape[0] for shape in model.shapes[:-1]] == [min(batch, 10)] * (len(model.shapes) - 1)
    assert [shape[1] for shape in model.shapes] == sorted((shape[1] for shape in model.shapes), reverse=True)
    assert model.shapes[0][1] == -(-min(context, 39) // 16) * 16


def test_it_says_how_many_are_done_and_stops_when_it_is_told() -> None:
    model, heard = Bigrams(), list[int]()

    def until(most: int) -> Callable[[int], bool]:
        def goes_on(done: int) -> bool:
            heard.append(done)
            return done < most

        return goes_on

    queries = some_queries(model)
    assert answer(model, queries, Limits(1, 99), PLACE, goes_on=until(8)) is None  # type: ignore[arg-type]
    assert heard == [0, 4, 8]
    assert answer(model, queries, Limits(1, 99), PLACE, goes_on=until(99)) is not None  # type: ignore[arg-type]
    assert heard[3:] == [0, 4, 8, 10]


def test_a_target_may_be_as_long_as_the_context() -> None:
    query = as_query([1], [2, 3, 4])
    check_lengths([query], Limits(1, 3))
    with pytest.raises(UserError, match="a target has 3 tokens, more than the 2 of the model's context"):
        check_lengths([query], Limits(1, 2))
    tree = {"d_model": 8, "num_layers": 1, "vocab_size": 9, "sequence_length": 64}
    for position, expected in (({"type": "rope"}, 64), ({"type": "xl", "memory_chunks": 2}, 192)):
        assert learned_context(ModelConfig.model_validate({**tree, "position": position})) == expected


def test_texts_are_computed_with_empty_memory_and_leave_none() -> None:
    model: Any = nn.Module()
    memory = model.memory = LayerMemory(4)
    memory.assign(torch.tensor([0, 1]), 2)
    memory.kept = before = torch.randn(2, 4, 3)
    with without_memory(model, 5, torch.device("cpu")):
        assert memory.kept is None and memory.num_streams == 5
        hidden = torch.randn(3, 2, 3)
        assert torch.equal(memory.extend(hidden, torch.arange(3)), hidden)
        memory.advance()
        assert memory.kept is None, "nothing was noted"
    assert memory.kept is before and memory.num_streams == 2 and not memory.is_paused


def result_of(answers: list[list[Answer]], groups: list[str], task: Task) -> dict[str, float]:
    examples = [Example("", group, "", ("x",) * len(own)) for group, own in zip(groups, answers, strict=True)]
    prepared = PreparedTask(task, examples, [], 0)
    found = prepared._result(Answers([one for own in answers for one in own], 0))
    assert found.examples == len(answers)
    return found.values


def test_a_digest_is_of_all_ids_and_of_where_contexts_end() -> None:
    """Ranks with others would compute together what does not belong together."""
    task = Task("t", lambda path: None, right_if_decoded)  # type: ignore[arg-type, return-value]
    many = [
        [([1, 2], [3])], [([1], [2, 3])], [([1, 2], [4])], [([5, 2], [3])], [([1, 2], [3]), ([6], [7])],
        [([1, 2], [3, 6]), ([7], [8])], [([1, 2], [3]), ([6, 7], [8])],
    ]  # fmt: skip
    digests = [PreparedTask(task, [], [as_query(*query) for query in queries], 0).digest for queries in many]
    assert len(set(digests)) == len(many)
    assert digests[0] == PreparedTask(task, [], [as_query([1, 2], [3])], 0).digest


def test_a_result_is_the_mean_of_groups_and_the_perplexity_of_whole_targets() -> None:
    def lone(log_likelihood: float, right: bool) -> list[Answer]:
        return [Answer(log_likelihood, right, 3)]

    task = Task("t", lambda path: None, right_if_decoded, has_perplexity=True)  # type: ignore[arg-type, return-value]
    answers = [lone(-1.0, True), lone(-2.0, False), lone(-4.0, False), lone(-5.0, True)]
    values = result_of(answers, ["a", "b", "b", "b"], task)
    assert values == {"accuracy": pytest.approx((1 + 1 / 3) / 2), "perplexity": pytest.approx(math.exp(3.0))}
    assert result_of([lone(-1e4, False)], [""], task)["perplexity"] == math.exp(700.0)
    unknown = result_of([lone(math.nan, False), lone(-1.0, True)], ["", ""], task)
    assert all(map(math.isnan, unknown.values())) and len(unknown) == 2


def test_a_tie_is_wrong_and_length_counts_where_the_protocol_says() -> None:
    short, long = Answer(-4.0, False, 2), Answer(-5.0, False, 5)
    assert right_if_likelier([short, long]) and not right_if_likelier([long, short])
    assert right_if_likelier_per_token([long, short]) and not right_if_likelier_per_token([short, long])
    for rule in (right_if_likelier, right_if_likelier_per_token):
        assert not rule([short, short._replace(is_likeliest=True)]) and not rule([long, short, long])
    assert right_if_decoded([Answer(-9.0, True, 1)]) and not right_if_decoded([Answer(-0.1, False, 1)])


class Characters:
    """A tokenizer whose ids are numbers of characters."""

    has_text = True

    def __init__(self, eos_id: int | None) -> None:
        self.eos_id = eos_id

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


def test_blanks_before_a_target_are_its_own_and_a_text_alone_follows_the_end_of_another() -> None:
    encoder = Encoder(Characters(eos_id=3))  # type: ignore[arg-type]
    for query in (encoder.of_example(Example("", "", "ab  ", ("c",)))[0], encoder.queries("ab  ", ["c"])[0]):
        assert (query.context.tolist(), query.target.tolist()) == ([97, 98], [32, 32, 99])
    first, second = encoder.queries("", ("ab", "c"))
    assert (first.context.tolist(), first.target.tolist()) == ([3], [97, 98])
    assert (second.context.tolist(), second.target.tolist()) == ([3], [99])
    without_end = Encoder(Characters(eos_id=None)).whole("abc")  # type: ignore[arg-type]
    assert (without_end.context.tolist(), without_end.target.tolist()) == ([97], [98, 99])
    assert encoder.prompt("a") == [97] and encoder.prompt("") == [3]
    with pytest.raises(UserError, match="file line 2: the target gives no token"):
        encoder.of_example(Example("file line 2", "", "ab", ("",)))
