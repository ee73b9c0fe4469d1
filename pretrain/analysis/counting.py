"""Counts of a router's choices: load, dead experts, which experts are chosen together, whose tokens they are.

Shapes: N tokens, R heads (1 for a router without), k choices of E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pretrain.analysis.trace import RouterTrace


@dataclass(frozen=True)
class Counts:
    """Of one router."""

    load: np.ndarray
    """int64 [R, E]: how many tokens chose each expert."""
    together: np.ndarray
    """int64 [R, E, E]: how many tokens chose both; `load` on the diagonal."""

    @classmethod
    def of(cls, trace: RouterTrace) -> Counts:
        one_hot = chosen(trace)
        together = np.einsum("nre,nrf->ref", one_hot, one_hot).astype(np.int64)
        return cls(np.diagonal(together, axis1=1, axis2=2).copy(), together)

    @property
    def dead(self) -> int:
        """Experts of all heads that no token chose."""
        return int((self.load == 0).sum())

    @property
    def experts(self) -> int:
        """Experts of all heads."""
        return self.load.size

    @property
    def load_max(self) -> float:
        """The busiest expert's load in units of the mean load of its head; the worst head's. 1 is even."""
        return float((self.load.max(1) / np.maximum(self.load.mean(1), 1e-9)).max())

    @property
    def entropy(self) -> float:
        """Of the shares of the load, over its maximum log E: 1 is even, 0 is one expert; the mean over heads."""
        share = self.load / np.maximum(self.load.sum(1, keepdims=True), 1)
        terms = -share * np.log(np.maximum(share, 1e-300))
        return float(terms.sum(1).mean() / np.log(share.shape[1])) if share.shape[1] > 1 else 1.0

    def given(self) -> np.ndarray:
        """fp64 [R, E, E]: of the tokens that chose the row's expert, the share that chose the column's too; NaN in the
        row of a dead expert."""
        load = self.load[:, :, None].astype(np.float64)
        return np.divide(self.together, load, out=np.full(self.together.shape, np.nan), where=load > 0)


def chosen(trace: RouterTrace) -> np.ndarray:
    """fp32 [N, R, E]: 1 where the token chose the expert."""
    one_hot = np.zeros((*trace.index.shape[:2], trace.num_experts), np.float32)
    np.put_along_axis(one_hot, trace.index, 1.0, axis=2)
    return one_hot


def gate_matrix(trace: RouterTrace, tokens: slice) -> np.ndarray:
    """fp32 [n, R, E]: the gate of each chosen expert, NaN where it was not chosen."""
    index, gates = trace.index[tokens], trace.gates[tokens]
    matrix = np.full((*index.shape[:2], trace.num_experts), np.nan, np.float32)
    np.put_along_axis(matrix, index, gates, axis=2)
    return matrix


class Favourite(NamedTuple):
    """A token that an expert takes more often than its share of all choices explains."""

    token: int
    taken: int
    """Occurrences that chose the expert."""
    occurrences: int


def favourites(trace: RouterTrace, tokens: np.ndarray, head: int, count: int = 8) -> list[list[Favourite]]:
    """For each expert of a head the `count` tokens with the largest excess: occurrences that chose it minus those that
    would if it took every token equally often. `tokens` [N] ids. Experts that take nothing have none."""
    kinds, kind, occurrences = np.unique(tokens, return_inverse=True, return_counts=True)
    found = []
    for expert in range(trace.num_experts):
        takes = (trace.index[:, head] == expert).any(1)
        taken = np.bincount(kind, weights=takes, minlength=len(kinds)).astype(np.int64)
        excess = taken - occurrences * takes.mean()
        best = np.lexsort((kinds, -taken, -excess))[:count]
        found.append([Favourite(int(kinds[i]), int(taken[i]), int(occurrences[i])) for i in best if taken[i]])
    return found
