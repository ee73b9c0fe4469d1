"""Clipping uses the true global norm in every layout.

Adam hides a wrong factor on all gradients from the losses, but its first moment after one step is (1 - beta_1) times
the clipped gradient: over all ranks its norm must be (1 - beta_1) x optimizer.clip_norm."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pretrain.checkpoint.state import owned_state
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.data.sources import Sources
from pretrain.parallel.context import parallel_context
from pretrain.trainer import RunSetup, build_trainer
from tests.harness import run_ranks
from tests.pretrain.matrix import Layout, config_of
from tests.pretrain.runs import one_step
from tests.pretrain.test_matrix import LAYOUTS


def first_moment_norms(rank: int, configs: list[Config]) -> list[tuple[float, float]]:
    """After one step of each configuration: the reported gradient norm, and the norm of Adam's first moment."""
    found = []
    for config in configs:
        parallel = parallel_context(config)
        trainer = build_trainer(RunSetup(config, Sources.load(config), parallel, torch.device("cpu")), None)
        result = one_step(trainer, Progress(0, 0))
        copy_of_tied = "exp_avg/head.weight" if config.model.tied_embedding else "none"
        # What a checkpoint saves of this rank: every element of the state comes from exactly one rank.
        owned = owned_state(trainer.engine, parallel)
        kept = [f for k, f in owned.items() if k.startswith("exp_avg/") and k != copy_of_tied]
        moments = [values for fragments in kept for values in fragments.chunks.values()]
        squares = torch.tensor([float(t.double().square().sum()) for t in moments], dtype=torch.float64).sum()
        dist.all_reduce(squares)
        found.append((float(result.sums.grad_norm or 0.0), math.sqrt(float(squares))))
        trainer.engine.destroy()
    return found


def check(prepared: Path, layouts: list[Layout], *overrides: str) -> None:
    configs = [config_of(prepared, "switchall", layout, *overrides) for layout in layouts]
    for layout, config, (norm, moment) in zip(
        layouts, configs, run_ranks(first_moment_norms, layouts[0].ranks, configs, timeout_seconds=600)[0], strict=True
    ):
        clip, beta = config.optimizer.clip_norm, config.optimizer.betas[0]
        assert norm > 2 * clip, "clipping is not active"
        assert moment / (1 - beta) == pytest.approx(clip, rel=1e-5), str(layout)


def test_with_every_dimension_at_once(prepared: Path) -> None:
    everything = {"tensor": 2, "sequence": True, "pipeline": 2, "data": 2, "expert": 2}
    check(prepared, [Layout(**everything), Layout(**everything, tied=True)])  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_in_every_layout(prepared: Path, ranks: int) -> None:
    check(prepared, [layout for layout in LAYOUTS if layout.ranks == ranks])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 8])
def test_in_bf16(prepared: Path, ranks: int) -> None:
    check(prepared, [x for x in LAYOUTS if x.ranks == ranks and x.zero > 0], "train.precision=bf16")
