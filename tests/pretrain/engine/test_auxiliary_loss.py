"""The auxiliary_loss of metrics.jsonl has all its digits in every layout: against fp64 sums of router probabilities."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from model.language_model import routing_statistics
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.data.sources import Sources
from pretrain.parallel.context import parallel_context
from pretrain.trainer import RunSetup, build_trainer
from tests.harness import run_ranks
from tests.pretrain.matrix import Layout, config_of
from tests.pretrain.runs import one_step

WEIGHT, EXPERTS, LAYERS, STEPS = 1e-3, 8, 4, 2
LAYOUTS = [
    Layout(data=2, zero=0),
    Layout(data=2, zero=3, recompute="full"),
    Layout(data=2, expert=2),
    Layout(tensor=2, micro=4),
    Layout(tensor=2, sequence=True, micro=4, recompute="selective"),
    Layout(pipeline=2, micro=4),
]


def compare(rank: int, configs: list[Config]) -> list[list[tuple[float, float]]]:
    """Per configuration and step the auxiliary loss as metrics.jsonl gets it, and its value in fp64. With the
    regulariser's scope global_batch it is w sum over layers and experts of p_e log q_e: p the step's mean probabilities
    and q those of the step before, which the routers keep in fp64; both hold the whole batch's on every rank."""
    found = []
    for config in configs:
        parallel = parallel_context(config)
        trainer = build_trainer(RunSetup(config, Sources.load(config), parallel, torch.device("cpu")), None)
        pairs = []
        for step in range(STEPS):
            routers = [s for _, s in routing_statistics(trainer.engine.module) if s.tracks_probability]
            before = [s.probability.clone() for s in routers]
            result = one_step(trainer, Progress(step, step * config.batch.global_sequences))
            exact = torch.stack([(s.probability * q.log()).sum() for s, q in zip(routers, before, strict=True)]).sum()
            if parallel.pipeline_group is not None:
                torch.distributed.all_reduce(exact, group=parallel.pipeline_group)
            pairs.append((result.sums.auxiliary_loss, WEIGHT * float(exact)))
        trainer.close()
        found.append(pairs)
    return found


@pytest.mark.parametrize(
    "layouts",
    [
        pytest.param([LAYOUTS[1], LAYOUTS[2], LAYOUTS[4], LAYOUTS[5]], id="some"),
        pytest.param(LAYOUTS, id="all", marks=pytest.mark.slow),
    ],
)
def test_it_is_computed_not_a_difference_of_larger_numbers(prepared: Path, layouts: list[Layout]) -> None:
    keys = (f"model.feedforward.entropy_weight={WEIGHT}", "optimizer.learning_rate=0.05")
    configs = [config_of(prepared, "switchall", layout, *keys) for layout in layouts]
    for found in run_ranks(compare, 2, configs):
        for layout, pairs in zip(layouts, found, strict=True):
            # At first q is uniform: every layer gives -w log E, but for the fp32 sums of p, which are 1 to rounding.
            assert pairs[0][1] == pytest.approx(-WEIGHT * LAYERS * math.log(EXPERTS), rel=1e-6)
            assert pairs[1][1] != pytest.approx(pairs[0][1], rel=1e-5), "nothing was learnt"
            for step, (value, exact) in enumerate(pairs):
                assert value == pytest.approx(exact, rel=1e-6), f"{layout}, step {step}"
