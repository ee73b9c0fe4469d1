"""What a step tells about the inside of the model, at a cost that not every step should pay: the norms of gradients,
parameters and updates by group of parameters, and how the selection scores of every router are distributed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.config import ModelConfig
from model.language_model import routing_statistics
from model.parallel.context import ParallelContext
from model.parameters import owner_of, parameter_specs
from model.routing import Choices, Place, RoutingStatistics
from pretrain.config.schema import Config
from pretrain.device import on_collective_device
from pretrain.engine.compiled import is_compiled
from pretrain.engine.graphed import GraphedForward
from pretrain.engine.optimizer import Rates, rates_of
from pretrain.engine.parts import GROUPS, Part, part_of
from pretrain.engine.zero_state import Piece, pieces, step_counter
from pretrain.late_reading import Reading

KINDS = ("gradient norm", "parameter norm", "update norm")
BINS = 20
"""Of a histogram of scores, which lie between 0 and 1."""


@dataclass(frozen=True)
class Details:
    """Of one optimizer step, the same on every rank."""

    norms: dict[str, dict[str, float]]
    """Kind -> group -> Euclidean norm; the gradient's is that before clipping. Groups without parameters are left out.
    """
    scores: dict[str, Tensor]
    """Router -> [BINS] fp64: the share of the scores of all its experts in each of BINS equal parts of 0 .. 1. Empty
    with CUDA graphs and with compiled blocks."""
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    """As `norms`, of each group in each block: `blocks.3.experts`, `embedding`."""


@dataclass(frozen=True)
class DetailsReading:
    """Details that the device may still be computing."""

    reading: Reading
    parts: Sequence[Part]
    routers: Sequence[str]

    def read(self) -> Details:
        """Waits for the device."""
        values = self.reading.get()
        split = len(KINDS) * len(self.parts)
        squares = values[:split].view(len(KINDS), -1).tolist()
        parts = {
            kind: {part: square for part, square in zip(self.parts, row, strict=True) if square > 0.0}
            for kind, row in zip(KINDS, squares, strict=True)
        }
        norms: dict[str, dict[str, float]] = {}
        for kind, of_part in parts.items():
            sums = {group: sum(x for part, x in of_part.items() if part.group == group) for group in GROUPS}
            norms[kind] = {group: math.sqrt(square) for group, square in sums.items() if square > 0.0}
        counts = values[split:].view(-1, BINS)
        return Details(
            norms,
            {name: row / row.sum() for name, row in zip(self.routers, counts, strict=True) if row.sum() > 0},
            {kind: {str(part): math.sqrt(x) for part, x in of_part.items()} for kind, of_part in parts.items()},
        )


class ScoreCounter:
    """Counts one router's scores in the place where its choices can be recorded; it changes none."""

    def __init__(self, inner: Choices | None, counts: Tensor, *, softmax: bool) -> None:
        """`inner`: what records or replaces the choices already, or None. `counts` [BINS] fp64 is added to."""
        self._inner, self._counts, self._softmax = inner, counts, softmax
        self.replaces = inner is not None and inner.replaces

    def settle(self, own: Tensor, logits: Tensor, place: Place, *, is_repeated: bool) -> Tensor:
        if not is_repeated:
            wide = logits.detach().float()
            scores = wide.softmax(-1) if self._softmax else wide.sigmoid()
            self._counts += _counted(scores)
        if self._inner is None:
            return own
        return self._inner.settle(own, logits, place, is_repeated=is_repeated)


def is_softmax(model: ModelConfig, router: str) -> bool:
    """Whether the scores of the router with this canonical name are a softmax of its logits, not sigmoids."""
    found = (model.attention if ".attention." in router else model.feedforward).routers
    return found is not None and found.scores == "softmax"


def _counted(scores: Tensor) -> Tensor:
    """`scores` [...] from 0 to 1 -> [BINS] int64: how many are in each part. Those that are no number are in none. Not
    by torch.histc, which train.deterministic forbids on a GPU."""
    part = (scores.reshape(-1) * BINS).clamp(max=BINS - 1).nan_to_num(BINS).long()
    return part.new_zeros(BINS + 1).scatter_add_(0, part, torch.ones_like(part))[:BINS]


class Survey:
    """Takes the details of a step. Its calls are collective."""

    def __init__(
        self,
        engine: Any,
        config: Config,
        parallel: ParallelContext,
        device: torch.device,
        routers: Sequence[str],
    ) -> None:
        """`routers`: canonical names of all routers of the model, those of other pipeline stages included."""
        self._engine, self._config, self._parallel = engine, config, parallel
        self._names = list(routers)
        self._parts = list(dict.fromkeys(part_of(*item) for item in parameter_specs(config.model).items()))
        split = len(KINDS) * len(self._parts)
        self._flat = torch.zeros(split + len(routers) * BINS, dtype=torch.float64, device=device)
        self._squares = self._flat[:split].view(len(KINDS), -1)
        self._counts = self._flat[split:].view(-1, BINS)
        self._listening: list[tuple[RoutingStatistics, Choices | None]] = []
        """What counts scores now, or did in the last step that was surveyed, and its choices before and after."""

    def is_due(self, step: int) -> bool:
        every = self._config.monitor.details_every_steps
        return every > 0 and (step == 1 or step % every == 0)

    def begin(self) -> Callable[[], None]:
        """Before the first micro-step. Returns what to call when all gradients are there and none is used yet."""
        self._flat.zero_()
        model: ModelConfig = self._config.model
        # A recorded micro-step would go on counting: none of its kernels can be left out later.
        # A compiled block takes in what its routers are attached to: with others it would be compiled anew.
        module = self._engine.module
        if isinstance(vars(module).get("forward"), GraphedForward) or is_compiled(module):
            return self._take_gradients
        self._listening = [(router, router.choices) for _, router in routing_statistics(module)]
        for name, router in routing_statistics(module):
            counts, softmax = self._counts[self._names.index(name)], is_softmax(model, name)
            router.choices = ScoreCounter(router.choices, counts, softmax=softmax)
        return self._take_gradients

    def end(self, learning_rate: float) -> DetailsReading:
        """After the update, made with this learning rate."""
        for router, before in self._listening:
            router.choices = before
        for part, piece, rates in self._own_pieces():
            self._add(1, part, piece.master)
            self._add(2, part, self._update(piece, learning_rate * rates.ratio, rates.weight_decay))
        summed = on_collective_device(self._flat.clone())
        dist.all_reduce(summed)
        return DetailsReading(Reading(summed), self._parts, self._names)

    def _take_gradients(self) -> None:
        from deepspeed.utils import safe_get_full_grad

        # Each element is counted by the rank that would save it, so that no layout counts one twice.
        own = {piece.name: (place, piece) for place, piece, _ in self._own_pieces()}
        scale = float(self._engine.optimizer.loss_scale) if self._engine.fp16_enabled() else 1.0
        for name, parameter in self._engine.module.named_parameters():
            gradient = safe_get_full_grad(parameter)  # collective, one parameter at a time
            if name in own and gradient is not None:
                place, piece = own[name]
                part = gradient.detach().reshape(-1)[piece.start : piece.start + piece.master.numel()]
                self._add(0, place, part.float() / scale)

    def _own_pieces(self) -> list[tuple[Part, Piece, Rates]]:
        """Part, piece and rates, of what this rank alone would save."""
        parallel, specs = self._parallel, parameter_specs(self._config.model)
        return [
            (part_of(piece.name, spec), piece, rates_of(piece.name, spec, self._config.optimizer))
            for piece in pieces(self._engine, rank=parallel.data_rank, world_size=parallel.data_size, for_saving=True)
            for spec in (specs[piece.name],)
            if (parallel.tensor_rank == 0 or spec.divided is not None)
            and owner_of(piece.name, self._config.model) == piece.name  # not a last stage's copy of a tied embedding
        ]

    def _update(self, piece: Piece, learning_rate: float, weight_decay: float) -> Tensor:
        """What AdamW has added to the weights, computed back from the state that it left (Loshchilov & Hutter 2019,
        algorithm 2): a copy of the weights before the step would cost as much memory as the weights."""
        settings, (beta1, beta2) = self._config.optimizer, self._config.optimizer.betas
        steps = step_counter(self._engine).to(piece.master.device)
        first = piece.moments["exp_avg"] / (1.0 - beta1**steps)
        second = piece.moments["exp_avg_sq"] / (1.0 - beta2**steps)
        change = learning_rate * first / (second.sqrt() + settings.eps)
        decay = learning_rate * weight_decay
        return change + decay * (piece.master + change) / (1.0 - decay)

    def _add(self, kind: int, part: Part, values: Tensor) -> None:
        square = torch.linalg.vector_norm(values, dtype=torch.float64) ** 2
        self._squares[kind, self._parts.index(part)] += square.to(self._flat.device)
