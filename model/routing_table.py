"""The counts of all routers of a model in one flat tensor, so that a step sums and clears them at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from model.routing import Counts, RoutingStatistics, negative_entropy

Kind = tuple[bool, tuple[int, ...], bool, bool]


def _kind(router: RoutingStatistics) -> Kind:
    """Routers of one kind have tensors of the same shapes; those whose sums are also over tensor-parallel ranks come
    first."""
    return not router.is_sharded, router.shape, router.tracks_probability, router.tracks_balance


class RoutingTable:
    """Keeps the counts of `routers`, whose tensors become views of it. On the routers' device, or on `device`.

    `sums` [num_scalars + n] fp64: first a place for scalars that the caller adds up with the counts, then all sums.
    """

    def __init__(self, routers: Sequence[RoutingStatistics], device: torch.device, *, num_scalars: int = 0) -> None:
        self.routers = list(routers)
        kinds: dict[Kind, list[int]] = {}
        for number, router in enumerate(self.routers):
            kinds.setdefault(_kind(router), []).append(number)
        ordered = sorted(kinds.items())
        sizes = [len(members) * sum(map(math.prod, _shapes(kind))) for kind, members in ordered]
        self.sums = torch.zeros(num_scalars + sum(sizes), dtype=torch.float64, device=device)
        self.num_divided = sum(size for (kind, _), size in zip(ordered, sizes, strict=True) if not kind[0])
        """How many sums, the first ones, are also over tensor-parallel ranks."""
        self._kinds: list[Counts] = []
        self._order: list[int] = []
        for (kind, members), part in zip(ordered, self.sums[num_scalars:].split(sizes), strict=True):
            together = _counts(kind, len(members), part)
            for row, number in enumerate(members):
                self.routers[number].become(_row(together, row))
            self._kinds.append(together)
            self._order += members

    def loads(self) -> list[Tensor]:
        """The sums of choices, one tensor [R, ...] for each kind; their rows in turn are the routers of `order`."""
        return [counts.load for counts in self._kinds]

    @property
    def order(self) -> list[int]:
        """For each row, which of `routers` it belongs to."""
        return self._order

    def negative_entropies(self) -> list[Tensor]:
        """Of the mean routing distributions, [R] for each kind that tracks them."""
        return [negative_entropy(counts.probability) for counts in self._kinds if counts.probability.numel()]

    def finish_step(self, keep: Tensor | None = None) -> None:
        """Called after the sum over ranks: new means (see `Counts.update_means`), sums and scalars cleared."""
        for counts in self._kinds:
            counts.update_means(keep)
        self.sums.zero_()


def _shapes(kind: Kind) -> list[tuple[int, ...]]:
    """Shapes of one router's sums, in the order of `Counts.accumulators`."""
    _, shape, tracks_probability, tracks_balance = kind
    return [shape, shape if tracks_probability else (0,), shape if tracks_balance else (0,), ()]


def _counts(kind: Kind, num_routers: int, flat: Tensor) -> Counts:
    """Counts of several routers, whose sums are `flat`."""
    shapes = [(num_routers, *shape) for shape in _shapes(kind)]
    parts = flat.split([math.prod(shape) for shape in shapes])
    found = Counts()
    found.load, found.probability_sum, found.gate_sum, found.num_tokens = (
        part.view(shape) for part, shape in zip(parts, shapes, strict=True)
    )
    found.probability = torch.zeros_like(found.probability_sum)
    found.choice_share, found.gate_mean = (torch.zeros_like(found.gate_sum) for _ in range(2))
    return found


def _row(counts: Counts, row: int) -> Counts:
    """One router of several."""
    found = Counts()
    for name in Counts.__annotations__:
        setattr(found, name, getattr(counts, name)[row])
    return found
