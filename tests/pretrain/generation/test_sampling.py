"""Which id is drawn: against the distribution written out in numpy, over every random number that a draw can be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from common.errors import UserError
from pretrain.generation.sampling import Draws, Sampling, choose

GRID = 2000
SETTINGS = [
    Sampling(1.0, 0, 1.0),
    Sampling(0.7, 3, 1.0),
    Sampling(1.3, 0, 0.6),
    Sampling(0.9, 4, 0.75),
    Sampling(1.0, 99, 1e-9),
    Sampling(1e-300, 0, 1.0),
]


class Given(Draws):
    def __init__(self, number: float) -> None:
        self._number = number

    def next(self) -> float:
        return self._number


def distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """[V]: the probability of each id, by the definitions."""
    scaled = [logit / sampling.temperature for logit in logits]
    order = sorted(range(len(logits)), key=lambda id_: (-scaled[id_], id_))
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights = {id_: math.exp(scaled[id_] - scaled[order[0]]) for id_ in order}
    total, kept = sum(weights.values()), []
    for id_ in order:
        kept.append(id_)
        if sum(weights[i] for i in kept) / total >= sampling.top_p:
            break
    mass = sum(weights[id_] for id_ in kept)
    return np.array([weights[id_] / mass if id_ in kept else 0.0 for id_ in range(len(logits))])


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_every_id_is_drawn_as_often_as_it_is_probable(sampling: Sampling) -> None:
    logits = torch.tensor([[0.3, 2.0, -1.0, 2.0, 0.9, -3.0, 1.4]])
    numbers = (np.arange(GRID) + 0.5) / GRID
    drawn = choose(logits.expand(GRID, -1), sampling, [Given(number) for number in numbers])
    share = np.bincount(drawn, minlength=7) / GRID
    expected = distribution(logits[0].double().numpy(), sampling)
    assert np.abs(share - expected).max() <= 1.0 / GRID
    assert set(np.flatnonzero(share)) == set(np.flatnonzero(expected > 1.0 / GRID))


def test_a_probability_that_is_reached_exactly_is_enough() -> None:
    drawn = choose(torch.zeros(9, 2), Sampling(1.0, 0, 0.5), [Given(number / 9) for number in range(9)])
    assert drawn == [0] * 9


def test_the_largest_number_draws_the_last_id_that_is_kept() -> None:
    """Whatever their mass: no product with a number below 1 is rounded up to it."""
    logits = torch.randn(500, 40, generator=torch.Generator().manual_seed(0))
    largest = [Given(np.nextafter(1.0, 0.0)) for _ in range(500)]
    for kept in (1, 7, 40):
        drawn = choose(logits, Sampling(1.0, kept, 1.0), largest)
        assert drawn == logits.sort(1, descending=True).indices[:, kept - 1].tolist()


def test_temperature_0_takes_the_first_of_the_likeliest() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [-5.0, -6.0, -4.0]])
    assert choose(logits, Sampling(temperature=0.0), [Draws(0, 0), Draws(0, 0)]) == [1, 2]


def test_draws_are_of_seed_and_sample() -> None:
    numbers = {key: [Draws(*key).next() for _ in range(2)] + [Draws(*key).next()] for key in ((3, 0), (3, 1), (4, 0))}
    assert len({tuple(found) for found in numbers.values()}) == 3
    draws = Draws(3, 1)  # a prompt's texts are those of earlier versions
    assert [draws.next(), draws.next()] == list(np.random.default_rng([3, 1]).random(2))
    draws = Draws(3, 0)
    assert [draws.next(), draws.next()] == [draws.next() for draws in [Draws(3, 0)] for _ in range(2)]


@pytest.mark.parametrize(
    "values, words",
    [
        ({"temperature": -0.1}, "--temperature: is -0.1; give 0"),
        ({"temperature": math.nan}, "--temperature: is nan"),
        ({"temperature": math.inf}, "--temperature: is inf"),
        ({"top_k": -1}, "--top-k: is -1"),
        ({"top_p": 0.0}, "--top-p: is 0.0"),
        ({"top_p": 1.5}, "--top-p: is 1.5"),
        ({"top_p": math.nan}, "--top-p: is nan"),
        ({"seed": -1}, "--seed: is -1"),
    ],
)
def test_values_out_of_range(values: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Sampling(**values)  # type: ignore[arg-type]
