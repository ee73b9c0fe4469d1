"""What a step adds up over ranks: losses and the choices of every router."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.language_model import routing_statistics
from model.parallel.context import ParallelContext
from model.routing import negative_entropy
from pretrain.engine.micro_steps import StepOutput


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


class StepReducer:
    """Adds up a step's scalars and counts over data-, tensor- and pipeline-parallel ranks."""

    def __init__(self, module: nn.Module, parallel: ParallelContext) -> None:
        """Collective over the pipeline: every stage learns which routers the others have."""
        self._parallel = parallel
        self._routers = dict(routing_statistics(module))
        own = {name: statistics.shape for name, statistics in self._routers.items()}
        stages = [own]
        if parallel.pipeline_group is not None:
            stages = [{} for _ in range(parallel.pipeline_size)]
            dist.all_gather_object(stages, own, group=parallel.pipeline_group)
        self._shapes = {name: shape for stage in stages for name, shape in stage.items()}

    def __call__(self, output: StepOutput, num_micro_steps: int) -> StepSums:
        """Ends the step of every router; if the update was skipped, the routing distribution of the step before stays.
        Collective: one reduction over data-parallel ranks and one for each other dimension in use."""
        parallel, routers = self._parallel, self._routers.values()
        loss_sum, auxiliary_sum, grad_norm = output
        wrong = (~torch.isfinite(loss_sum + auxiliary_sum)).double().view(1)
        tensors = [loss_sum.double().view(1), auxiliary_sum.double().view(1), wrong]
        tensors += [t.view(-1) for statistics in routers for t in statistics.accumulators()]
        _add_up(tensors, parallel.data_group)
        # Heads, or tokens, that another tensor-parallel rank counted are zero here.
        divided = [t.view(-1) for s in routers if s.is_sharded for t in s.accumulators()]
        _add_up([wrong, *divided], parallel.tensor_group)

        load = {name: statistics.load.clone() for name, statistics in self._routers.items()}
        for statistics in routers:
            statistics.finish_step(keep=grad_norm is not None)
        tracking = [s for s in routers if s.tracks_probability]
        scalars = torch.stack(
            [
                tensors[0][0] / (num_micro_steps * parallel.data_size) + torch.where(wrong[0] > 0, torch.nan, 0.0),
                tensors[1][0] / (num_micro_steps * parallel.data_size),
                sum((negative_entropy(s.probability) for s in tracking), tensors[0].new_zeros(())),
                tensors[0].new_tensor(float(len(tracking))),
            ]
        )
        if parallel.pipeline_group is not None:
            load = {
                name: load.get(name, torch.zeros(shape, dtype=torch.float64, device=scalars.device))
                for name, shape in self._shapes.items()
            }
            _add_up([scalars, *(t.view(-1) for t in load.values())], parallel.pipeline_group)
        loss, auxiliary_loss, entropy, num_tracking = scalars.tolist()
        return StepSums(
            loss,
            auxiliary_loss,
            {name: counts.cpu() for name, counts in load.items()},
            entropy / num_tracking if num_tracking else None,
        )


def _add_up(tensors: list[Tensor], group: dist.ProcessGroup | None) -> None:
    """Sums flat tensors over `group`, in place, in one reduction."""
    if group is None or not tensors:
        return
    flat = torch.cat(tensors)
    dist.all_reduce(flat, group=group)
    for target, summed in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        target.copy_(summed)
