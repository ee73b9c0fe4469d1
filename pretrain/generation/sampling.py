"""The next id from the logits of a text: temperature, top-k and top-p (nucleus sampling, arXiv 1904.09751)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How an id is drawn. Raises UserError for a value out of range, by its option of launch/generate.py."""

    temperature: float = 0.8
    """Divides the logits: below 1 likely ids become likelier; 0 takes the likeliest id, and nothing is drawn."""
    top_k: int = 0
    """Only this many of the likeliest ids; 0: all."""
    top_p: float = 0.95
    """Only the fewest of the likeliest ids whose probabilities, after temperature and top_k, sum to at least this."""
    seed: int = 0
    """Decides what is drawn."""

    def __post_init__(self) -> None:
        for option, number in (("temperature", self.temperature), ("top-p", self.top_p)):
            if not isinstance(number, Real):
                raise UserError(f"--{option}: is {number!r}; give a number")
        for option, number in (("top-k", self.top_k), ("seed", self.seed)):
            check_whole(option, number)
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise UserError(
                f"--temperature: is {self.temperature}; give 0 (the likeliest id, always) or a positive number"
            )
        if self.top_k < 0:
            raise UserError(f"--top-k: is {self.top_k}; give the number of ids to draw from, or 0 for all")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"--top-p: is {self.top_p}; give a probability above 0, up to 1 for all ids")
        if self.seed < 0:
            raise UserError(f"--seed: is {self.seed}; give a whole number of at least 0")


def check_whole(option: str, number: object) -> None:
    """Raises UserError unless it is a whole number (also of numpy)."""
    if not isinstance(number, Integral):
        raise UserError(f"--{option}: is {number!r}; give a whole number")


class Draws:
    """The random numbers of one text. They depend on (seed, sample) alone, so a prompt's texts are the same beside any
    others, on any device, but where rounding decides: the logits of two ids may be equal up to it."""

    def __init__(self, seed: int, sample: int) -> None:
        self._generator = np.random.default_rng([seed, sample])

    def next(self) -> float:
        """Uniform in [0, 1)."""
        return float(self._generator.random())


def choose(logits: Tensor, sampling: Sampling, draws: Sequence[Draws]) -> list[int]:
    """The next id of each of R texts by `logits` [R, V], finite. Of equal logits the smaller id counts as likelier."""
    if sampling.temperature == 0.0:
        return logits.cpu().numpy().argmax(1).tolist()  # numpy's takes the first of equal ones
    values, ids = logits.double().sort(dim=1, descending=True, stable=True)
    if sampling.top_k:
        values, ids = values[:, : sampling.top_k], ids[:, : sampling.top_k]
    # Differences first: a tiny temperature must not make infinities.
    sums = ((values - values[:, :1]) / sampling.temperature).softmax(1).cumsum(1).cpu().numpy()
    chosen = []
    for row, draw in zip(sums, draws, strict=True):
        kept = 1 + int(np.searchsorted(row, sampling.top_p)) if sampling.top_p < 1.0 else len(row)
        mass = row[min(kept, len(row)) - 1]
        chosen.append(int(np.searchsorted(row[:kept], draw.next() * mass, side="right")))
    # In fp64 too a number below 1 times the mass is less than the mass, so nothing behind the kept ids is drawn.
    return ids.gather(1, torch.tensor(chosen, device=ids.device)[:, None])[:, 0].tolist()
