"""What a step adds up over ranks: losses and the choices of every router."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.language_model import routing_statistics
from model.parallel.context import ParallelContext
from model.routing import add_up
from model.routing_table import RoutingTable
from pretrain.engine.micro_steps import StepOutput
from pretrain.late_reading import Reading

LOSS, AUXILIARY, WRONG = range(3)
"""Places of the scalars before the counts: summed loss and auxiliary loss, and on how many ranks one is not finite."""
NUM_SCALARS = 3


@dataclass(frozen=True)
class StepSums:
    """Global sums of one optimizer step, the same on every rank."""

    loss: float
    """Mean cross-entropy over the tokens of the global batch, nats. NaN if any rank's losses are not finite."""
    auxiliary_loss: float
    """Mean of the auxiliary losses over micro-steps and ranks."""
    load: dict[str, Tensor]
    """Choices per expert of every router of the model, fp64 [E] or [H, E], by canonical name."""
    negative_entropy: float | None
    """sum_e p_e log p_e of the step's mean routing distribution, averaged over the routers that track it."""
    grad_norm: float | None
    """Global gradient norm before clipping; None where the update was skipped, because it or the loss is not finite."""


@dataclass(frozen=True)
class _Part:
    """What the report holds of a pipeline stage, in order: the loads of its routers, and the negative entropies of
    those that track their distribution."""

    names: list[str]
    """Of its routers, in the order of the model."""
    rows: list[tuple[str, tuple[int, ...]]]
    """Name and shape of each router, in the order of the report."""
    num_tracking: int

    @property
    def sizes(self) -> list[int]:
        return [*(math.prod(shape) for _, shape in self.rows), self.num_tracking]


@dataclass(frozen=True)
class StepReport:
    """The sums of a step that the device may still be computing."""

    parts: list[_Part]
    reading: Reading
    """[n] fp64: the scalars, each stage's part, the gradient norm (not finite where the update was skipped)."""
    divisor: int
    """Micro-steps of all data-parallel ranks."""

    def read(self) -> StepSums:
        """Waits for the device."""
        values = self.reading.get()
        loss_sum, auxiliary_sum, wrong = values[:NUM_SCALARS].tolist()
        pieces = iter(values[NUM_SCALARS:].split([*(size for part in self.parts for size in part.sizes), 1]))
        load: dict[str, Tensor] = {}
        entropies: list[float] = []
        for part in self.parts:
            found = {name: next(pieces).view(shape) for name, shape in part.rows}
            load |= {name: found[name] for name in part.names}
            entropies += next(pieces).tolist()
        norm = float(next(pieces))
        return StepSums(
            loss_sum / self.divisor if not wrong else math.nan,
            auxiliary_sum / self.divisor,
            load,
            sum(entropies) / len(entropies) if entropies else None,
            norm if math.isfinite(norm) else None,
        )


class StepReducer:
    """Adds up a step's scalars and counts over data-, tensor- and pipeline-parallel ranks."""

    def __init__(self, module: nn.Module, parallel: ParallelContext, device: torch.device) -> None:
        """Collective over the pipeline: every stage learns which routers the others have."""
        self._parallel = parallel
        routers = list(routing_statistics(module))
        self._table = RoutingTable([router for _, router in routers], device, num_scalars=NUM_SCALARS)
        own = _Part(
            [name for name, _ in routers],
            [(routers[number][0], routers[number][1].shape) for number in self._table.order],
            sum(router.tracks_probability for _, router in routers),
        )
        self._parts: list[_Part] = [own]
        if parallel.pipeline_group is not None:
            parts: list[Any] = [None] * parallel.pipeline_size
            dist.all_gather_object(parts, own, group=parallel.pipeline_group)
            self._parts = parts

    @property
    def router_names(self) -> list[str]:
        """Canonical names of the routers of all stages, in the order of the model."""
        return [name for part in self._parts for name in part.names]

    def __call__(self, output: StepOutput, num_micro_steps: int) -> StepReport:
        """Ends the step of every router; if the update was skipped, the routing distribution of the step before stays.
        Waits for no device. Collective: one reduction over data-parallel ranks and one for each other dimension in
        use."""
        parallel, table = self._parallel, self._table
        add_up(table.routers)
        loss_sum, auxiliary_sum, grad_norm = output
        wrong = ~torch.isfinite(loss_sum + auxiliary_sum)
        table.sums[:NUM_SCALARS] = torch.stack([loss_sum.double(), auxiliary_sum.double(), wrong.double()])
        if parallel.data_group is not None:
            dist.all_reduce(table.sums, group=parallel.data_group)
        if parallel.tensor_group is not None:
            # Heads, or tokens, that another tensor-parallel rank counted are zero here.
            dist.all_reduce(table.sums[WRONG : NUM_SCALARS + table.num_divided], group=parallel.tensor_group)
        sums = torch.cat([table.sums[:NUM_SCALARS], *(load.view(-1) for load in table.loads())])
        table.finish_step(torch.isfinite(grad_norm))
        report = torch.cat([sums, *table.negative_entropies()])
        if parallel.pipeline_group is not None:
            report = self._of_all_stages(report)
        report = torch.cat([report, grad_norm.double().view(1)])
        return StepReport(self._parts, Reading(report), num_micro_steps * parallel.data_size)

    def _of_all_stages(self, own: Tensor) -> Tensor:
        """[n] of this stage -> the scalars summed over stages, and every stage's part."""
        sizes = [sum(part.sizes) for part in self._parts]
        first = NUM_SCALARS + sum(sizes[: self._parallel.pipeline_rank])
        whole = own.new_zeros(NUM_SCALARS + sum(sizes))
        whole[:NUM_SCALARS] = own[:NUM_SCALARS]
        whole[first : first + len(own) - NUM_SCALARS] = own[NUM_SCALARS:]
        dist.all_reduce(whole, group=self._parallel.pipeline_group)
        return whole
