"""The auxiliary_loss of metrics.jsonl has all its digits in every layout: against fp64 sums of router probabilities."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

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
OF_HEADS, HEADS = 3e-3, 4
"""Weight of attention's regulariser, and heads of a layer."""
LAYOUTS = [
    Layout(data=2, zero=0),
    Layout(data=2, zero=3, recompute="full"),
    Layout(data=2, expert=2),
    Layout(tensor=2, micro=4),
    Layout(tensor=2, sequence=True, micro=4, recompute="selective"),
    Layout(pipeline=2, micro=4),
]


class Watched:
    """Adds up sum_e p_e log p_e in fp64, p of each sequence and head, of the logits that the selectors show."""

    replaces = False

    def __init__(self) -> None:
        self.total = torch.zeros((), dtype=torch.float64)

    def settle(self, own: Tensor, logits: Tensor, place: Any, *, is_repeated: bool) -> Tensor:
        p = logits.double().softmax(-1).mean(1)
        self.total += 0.0 if is_repeated else (p * p.log()).sum()
        return own


def compare(rank: int, configs: list[Config]) -> list[list[tuple[float, float, float]]]:
    """Per configuration and step the auxiliary loss as metrics.jsonl gets it, and its values in fp64, of feed-forward
    and attention. With the regulariser's scope global_batch the former is w sum over layers and experts of p_e log q_e:
    p the step's mean probabilities and q those of the step before, which the routers keep in fp64; both hold the whole
    batch's on every rank. The latter is a sum over all ranks: each sequence and head of a layer is on one."""
    found = []
    for config in configs:
        parallel = parallel_context(config)
        trainer = build_trainer(RunSetup(config, Sources.load(config), parallel, torch.device("cpu")), None)
        pairs, watched = [], Watched()
        for name, statistics in routing_statistics(trainer.engine.module):
            statistics.choices = watched if ".attention." in name else None
        for step in range(STEPS):
            routers = [s for _, s in routing_statistics(trainer.engine.module) if s.tracks_probability]
            before = [s.probability.clone() for s in routers]
            result = one_step(trainer, Progress(step, step * config.batch.global_sequences))
            exact = torch.stack([(s.probability * q.log()).sum() for s, q in zip(routers, before, strict=True)]).sum()
            if parallel.pipeline_group is not None:
                torch.distributed.all_reduce(exact, group=parallel.pipeline_group)
            torch.distributed.all_reduce(watched.total)
            of_heads = float(watched.total) / (config.batch.global_sequences * HEADS)
            watched.total.zero_()
            pairs.append((result.sums.auxiliary_loss, WEIGHT * float(exact), OF_HEADS * of_heads))
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
    keys = (f"model.feedforward.entropy_weight={WEIGHT}", f"model.attention.entropy_weight={OF_HEADS}")
    keys = (*keys, f"model.attention.num_heads={HEADS}", "optimizer.learning_rate=0.05")
    configs = [config_of(prepared, "switchall", layout, *keys) for layout in layouts]
    for found in run_ranks(compare, 2, configs):
        for layout, pairs in zip(layouts, found, strict=True):
            # At first q is uniform: every layer gives -w log E, but for the fp32 sums of p, which are 1 to rounding.
            assert pairs[0][1] == pytest.approx(-WEIGHT * LAYERS * math.log(EXPERTS), rel=1e-6)
            assert all(pairs[1][i] != pytest.approx(pairs[0][i], rel=1e-5) for i in (1, 2)), "nothing was learnt"
            for step, (value, exact, of_heads) in enumerate(pairs):
                assert of_heads < -1e-3 and value == pytest.approx(exact + of_heads, rel=1e-6), f"{layout}, step {step}"
