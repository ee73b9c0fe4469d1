"""The choices of routers, written down or taken from a record, so that two runs can be compared to rounding.

A choice is a step function of the logits: if two experts are closer than rounding, another layout (or kernel, or
machine) may choose the other one, and one such flip moves a loss by about 1e-5. A run that takes its choices from the
record of another computes logits, scores and gradients by itself; what remains between the two is rounding, or a bug.

Shapes: B sequences of a forward pass, S of a step, L tokens of a sequence (memory first, where it is routed), H heads
(1 for a router without), E experts, k choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.kernels.ops.route import Routing, with_choice
from model.routing import Place, RoutingStatistics


def settled(
    routing: Routing,
    routers: Sequence[RoutingStatistics],
    sequence_index: Tensor,
    *,
    keep: Tensor | None = None,
    drop_scores: bool = False,
    heads: slice = slice(None),
    first_token: int = 0,
    training: bool = True,
) -> Routing:
    """`routing` of B sequences, [B L, R, ...], as the `choices` of its routers, R / len(routers) heads each, will have
    it, or without `training` their `choices_in_use`; itself where they are None or only record. `keep` and
    `drop_scores` are those of `route`: where dropout spares the scores, neither is needed."""
    if (routers[0].choices if training else routers[0].choices_in_use) is None:
        return routing
    place = Place(sequence_index, heads, first_token)
    own, logits = (t.detach().unflatten(0, (len(sequence_index), -1)) for t in (routing.index, routing.logits))
    num_heads, chosen, replaces = own.shape[2] // len(routers), [], False
    with torch.no_grad():
        for router, part, of_part in zip(routers, own.split(num_heads, 2), logits.split(num_heads, 2), strict=True):
            choices = router.choices if training else router.choices_in_use
            assert choices is not None
            chosen.append(choices.settle(part, of_part, place, is_repeated=router.is_paused))
            replaces |= choices.replaces
        if not replaces:
            # Bit-equal to an unrecorded run, and to tensor-parallel ranks that do not record.
            return routing
        index = torch.cat(chosen, 2).flatten(0, 1)
    return with_choice(routing, index, keep=keep, drop_scores=drop_scores)


def choice_dtype(num_experts: int) -> torch.dtype:
    """The narrowest type of an expert's number."""
    return torch.uint8 if num_experts <= 256 else torch.int16 if num_experts <= 1 << 15 else torch.int32


@dataclass(frozen=True)
class Piece:
    """What one forward pass chose."""

    place: Place
    index: Tensor
    """[B, L, H, k] of `choice_dtype`."""


class Recorder:
    """Records one router's choices, a piece for each forward pass, without changing them."""

    replaces = False

    def __init__(self) -> None:
        self.pieces: list[Piece] = []

    def settle(self, own: Tensor, logits: Tensor, place: Place, *, is_repeated: bool) -> Tensor:
        if not is_repeated:
            self.pieces.append(Piece(place, own.to(choice_dtype(logits.shape[-1]))))
        return own


class Replayer:
    """Gives one router the choices of a record, and counts those that it would have made differently."""

    replaces = True

    def __init__(self) -> None:
        self.recorded: Tensor | None = None
        """[S, L, H, k]: the step's choices of all heads and tokens, in the order of the run's sequences."""
        self.num_choices = 0
        self.flips: list[Tensor] = []
        """For each forward pass since `clear`: [2] fp64, the number of choices that differ from the record, and the
        largest difference between the logits of an expert chosen here and of one chosen there."""

    def settle(self, own: Tensor, logits: Tensor, place: Place, *, is_repeated: bool) -> Tensor:
        assert self.recorded is not None, "no step was begun"
        rows = place.sequence_index % self.recorded.shape[0]
        tokens = slice(place.first_token, place.first_token + own.shape[1])
        chosen = self.recorded[rows][:, tokens, place.heads].long()
        assert chosen.shape == own.shape, f"recorded {tuple(chosen.shape)}, chosen {tuple(own.shape)}"
        if not is_repeated:
            self.num_choices += own.numel()
            self.flips.append(_compare(own, chosen, logits))
        return chosen

    def clear(self) -> None:
        self.num_choices, self.flips = 0, []


def _compare(own: Tensor, chosen: Tensor, logits: Tensor) -> Tensor:
    """[2] fp64, see `Replayer.flips`. The order of the k choices does not matter, and ties are no distance."""
    others = (chosen[..., :, None] != own[..., None, :]).all(-1)
    # Of the last one that each side chose: rounding had to cross this distance. 0 where all are the same.
    distance = logits.gather(-1, own).amin(-1) - logits.gather(-1, chosen).amin(-1)
    return torch.stack([others.sum().double(), distance.max().double()])
