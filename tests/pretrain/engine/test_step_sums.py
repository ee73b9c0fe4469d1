"""What a step adds up, against numpy, over groups of ranks that one process stands in for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.parallel.context import ParallelContext
from model.routing import RoutingStatistics
from pretrain.engine.micro_steps import StepOutput
from pretrain.engine.step_sums import WRONG, StepReducer, StepReport

CPU = torch.device("cpu")
HEADS, EXPERTS, TOKENS, MICRO_STEPS = 2, 3, 5, 4
STAGES = (("moe 0", "value 0", "moe 1"), ("value 1", "moe 2"))
"""Routers of each pipeline stage, of feed-forward layers and of heads, which tensor parallelism divides."""
LOSSES = ((0.0, 0.25), (11.0, 0.5))
"""Summed loss and auxiliary loss on each stage: the last one alone has a loss."""


def router(name: str) -> tuple[RoutingStatistics, np.ndarray, list[float]]:
    """One after some tokens; its choices per expert; the negative entropy of its mean distribution, if it has one."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    if name.startswith("value"):
        made = RoutingStatistics((HEADS, EXPERTS), tracks_probability=False, is_sharded=True)
        load = torch.randint(1, 9, (HEADS, EXPERTS), generator=generator)
        made.record(load, None)
        return made, load.numpy(), []
    made = RoutingStatistics((EXPERTS,), tracks_probability=True)
    load = torch.randint(1, 9, (EXPERTS,), generator=generator)
    logits = torch.randn(TOKENS, EXPERTS, generator=generator)
    made.record(load, logits)
    exp = np.exp(logits.double().numpy())
    mean = (exp / exp.sum(1, keepdims=True)).mean(0)
    return made, load.numpy(), [float((mean * np.log(mean)).sum())]


def stage_of(names: tuple[str, ...]) -> tuple[nn.Module, dict[str, np.ndarray], list[float]]:
    """A module with these routers, their choices by canonical name, their negative entropies."""
    module, loads, entropies = nn.ModuleDict(), {}, []
    for name in names:
        layer: Any = nn.Module()
        layer.statistics, loads[f"{name}.statistics"], found = router(name)
        module[name] = layer
        entropies += found
    return module, loads, entropies


class Peers:
    """The other ranks: each of the data and of the tensor group has the numbers of this one, and the other pipeline
    stage has said `theirs`."""

    def __init__(self, stage: int, theirs: StepReport | None) -> None:
        self.stage, self.theirs = stage, theirs

    def all_reduce(self, own: Tensor, group: Any) -> None:
        if group != "pipeline":
            own *= 2.0
        elif self.theirs is not None:
            own += self.theirs.reading.get()[:-1]  # the gradient norm is no sum

    def all_gather_object(self, found: list[Any], own: Any, group: Any) -> None:
        for number, names in enumerate(STAGES):
            found[number] = StepReducer(stage_of(names)[0], ParallelContext(), CPU)._parts[0]
        assert found[self.stage] == own


def context(stage: int, groups: tuple[str, ...]) -> ParallelContext:
    keys: dict[str, Any] = {f"{name}_group": name for name in groups} | {f"{name}_size": 2 for name in groups}
    return ParallelContext(**keys, pipeline_rank=stage if "pipeline" in groups else 0)


@pytest.mark.parametrize(
    "groups", [(), ("data",), ("tensor",), ("pipeline",), ("data", "tensor", "pipeline")], ids="-".join
)
@pytest.mark.parametrize("wrong", [None, math.inf])
def test_every_rank_s_choices_count_once_and_losses_are_means(
    groups: tuple[str, ...], wrong: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = (0, 1) if "pipeline" in groups else (1,)
    norm = torch.tensor(1.5 if wrong is None else wrong)
    report: StepReport | None = None
    for stage in stages:
        peers = Peers(stage, report)
        monkeypatch.setattr(dist, "all_reduce", peers.all_reduce)
        monkeypatch.setattr(dist, "all_gather_object", peers.all_gather_object)
        loss, auxiliary = LOSSES[stage]
        output = StepOutput(torch.tensor(loss), torch.tensor(auxiliary if wrong is None else wrong), norm)
        reduce = StepReducer(stage_of(STAGES[stage])[0], context(stage, groups), CPU)
        report = reduce(output, MICRO_STEPS)
    assert report is not None
    sums = report.read()
    assert sums.grad_norm == (1.5 if wrong is None else None)
    assert math.isnan(sums.loss) if wrong else sums.loss == 11.0 / MICRO_STEPS
    assert sums.auxiliary_loss == (wrong or sum(LOSSES[stage][1] for stage in stages) / MICRO_STEPS)
    found = [stage_of(STAGES[stage]) for stage in stages]
    loads = {name: load for _, own, _ in found for name, load in own.items()}
    assert list(sums.load) == list(loads) == reduce.router_names
    for name, load in loads.items():
        times = (1 + ("data" in groups)) * (1 + ("tensor" in groups and name.startswith("value")))
        np.testing.assert_array_equal(sums.load[name].numpy(), times * load, err_msg=name)
    if wrong is None:
        assert sums.negative_entropy == pytest.approx(np.mean([e for *_, own in found for e in own]))


def test_where_no_router_tracks_its_distribution_there_is_no_entropy() -> None:
    losses = StepOutput(torch.tensor(1.0), torch.tensor(0.0), torch.tensor(2.0))
    for names in ((), ("value 1",)):
        sums = StepReducer(stage_of(names)[0], ParallelContext(), CPU)(losses, 1).read()
        assert sums.negative_entropy is None and sums.loss == 1.0 and len(sums.load) == len(names)


@pytest.mark.parametrize("group", ["data", "tensor", "pipeline"])
def test_a_loss_that_is_not_finite_on_another_rank_is_no_loss_here(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that disagreed on it would go different ways from there."""

    def all_reduce(own: Tensor, group: Any) -> None:
        place = WRONG - own.storage_offset()  # a tensor-parallel rank reduces what begins there
        if place >= 0:
            own[place] += 1.0

    def all_gather_object(found: list[Any], own: Any, group: Any) -> None:
        found[:] = [own, own]

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "all_gather_object", all_gather_object)
    losses = StepOutput(torch.tensor(3.0), torch.tensor(0.0), torch.tensor(2.0))
    reduce = StepReducer(stage_of(STAGES[0])[0], context(0, (group,)), CPU)
    assert math.isnan(reduce(losses, 1).read().loss)
