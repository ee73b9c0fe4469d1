"""Pipeline parallelism: division into stages, auxiliary losses on every stage, what a step and a second build leave.
(That all numbers are those of one process: test_matrix.py. Checkpoints: test_checkpoint_resharding.py.)"""

from __future__ import annotations

import re
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from common.errors import ConfigError
from model.feedforward.swiglu import SwiGLU
from model.kernels.choice import Backends
from model.language_model import routing_statistics
from model.parameters import DeclarationError
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.engine.pipeline import PipelineStage
from pretrain.parallel.context import parallel_context
from pretrain.parallel.stages import layer_costs, stage_bounds
from tests.harness import run_ranks
from tests.pretrain.matrix import GRADIENT_STEPS, MODELS, STEPS, Layout, config_of
from tests.pretrain.runs import (
    assert_same,
    engine_trace,
    one_step,
    plain_trace,
    small_config,
    trainer_of,
)


def longest(costs: list[int], bounds: list[int]) -> int:
    return max(sum(costs[a:b]) for a, b in pairwise(bounds))


@pytest.mark.parametrize("layers, stages", [(4, 1), (4, 4), (5, 2), (7, 3), (18, 4)])
@pytest.mark.parametrize("vocab_size", [400, 40000])
def test_stages_are_contiguous_and_the_longest_is_as_short_as_can_be(
    prepared: Path, layers: int, stages: int, vocab_size: int
) -> None:
    keys = (f"model.num_layers={layers}", f"parallel.pipeline={stages}", f"model.vocab_size={vocab_size}")
    config = config_of(prepared, "switchall", Layout(pipeline=stages), *keys)
    costs, bounds = layer_costs(config), stage_bounds(config)
    assert len(costs) == layers + 3 and bounds[0] == 0 and bounds[-1] == len(costs)
    blocks_per_stage = [sum(1 for layer in range(a, b) if 1 <= layer <= layers) for a, b in pairwise(bounds)]
    assert sum(blocks_per_stage) == layers and min(blocks_per_stage) >= 1
    # By trying every division whose stages have a block each.
    every = ([0, *cuts, len(costs)] for cuts in combinations(range(2, layers + 1), stages - 1))
    assert longest(costs, bounds) == min(longest(costs, other) for other in every)
    if vocab_size == 40000 and 1 < stages < layers:
        assert blocks_per_stage[-1] < max(blocks_per_stage), "the output layer counts"
    # An early stage keeps the activations of more micro-steps. The last one has the output layer besides.
    assert blocks_per_stage[:-1] == sorted(blocks_per_stage[:-1])


def test_layers_weigh_three_forward_passes_and_blocks_four_if_they_are_computed_again() -> None:
    d, T, V, H, h, width = 16, 8, 50, 2, 8, 40
    model = {
        "d_model": d, "num_layers": 3, "vocab_size": V, "sequence_length": T, "position": {"type": "rope"},
        "attention": {"type": "dense", "num_heads": H, "head_dim": h},
        "feedforward": {"type": "dense", "hidden_size": width},
    }  # fmt: skip
    block = 4 * T * d * H * h + 2 * T * T * H * h + 2 * T * d * width  # projections; scores and sums; both layers
    for recompute, passes in (("none", 3), ("full", 4)):
        config = Config.model_validate({"model": model, "train": {"recompute": recompute}})
        assert layer_costs(config) == [0, *[passes * block] * 3, 0, 3 * T * d * V]


def kept(rank: int, config: Config) -> tuple[int, list[int]]:
    """Of how many steps DeepSpeed's timers keep the time, on a GPU two events; and how many counts of routers wait to
    be added up after the micro-steps of each step."""
    trainer, waiting = trainer_of(config), []  # type: Any, list[int]
    take_step = trainer.engine._take_model_step

    def counting(*args: Any) -> None:
        waiting.append(sum(len(router.waiting) for _, router in routing_statistics(trainer.engine.module)))
        take_step(*args)

    trainer.engine._take_model_step = counting
    for step in range(3):
        one_step(trainer, Progress(step, step * config.batch.global_sequences))
    return sum(len(timer.event_timers) for timer in trainer.engine.timers.get_timers().values()), waiting


def test_nothing_is_kept_of_a_step(prepared: Path) -> None:
    config = config_of(prepared, "switchall", Layout(pipeline=2, micro=4))
    assert run_ranks(kept, 2, config) == [(0, [0, 0, 0])] * 2


def groups_of_two_builds(rank: int, config: Config) -> list[list[list[int]]]:
    """The ranks of each group that this one belongs to, after each of two builds: a rollback builds again."""
    found = []
    for _ in range(2):
        trainer = trainer_of(config)
        one_step(trainer, Progress(0, 0))
        trainer.close()
        found.append([dist.get_process_group_ranks(group) for group in dist.distributed_c10d._world.pg_names])
    return found


def test_a_second_build_makes_no_groups(prepared: Path) -> None:
    """NCCL keeps buffers on the GPU for each of them. Nor does DeepSpeed have two of the same ranks."""
    config = config_of(prepared, "switchall", Layout(pipeline=2, micro=4, tied=True))
    for first, second in run_ranks(groups_of_two_builds, 2, config):
        assert first == second
        assert first.count([0, 1]) == 5  # all ranks, the pipeline, the tied weights, the saver, DeepSpeed's


def test_every_stage_refuses_a_parameter_that_is_not_declared(prepared: Path) -> None:
    config = config_of(prepared, "dense", Layout(pipeline=2), 'model.feedforward={"type": "swiglu", "hidden_size": 22}')
    where = "is not declared; declare it in SwiGLU.parameter_specs (model/feedforward/swiglu.py)"
    first_blocks = [0, stage_bounds(config)[1] - 1]
    assert run_ranks(build_undeclared, 2, config) == [
        f"the parameter blocks.{block}.feedforward.gate.weight {where}" for block in first_blocks
    ]


def build_undeclared(rank: int, config: Config) -> str:
    """What a stage says of layers that do not declare SwiGLU's gate."""
    parallel, specs = parallel_context(config), SwiGLU.parameter_specs(config.model)
    PipelineStage(config, parallel, Backends())
    del specs["gate.weight"]
    SwiGLU.parameter_specs = staticmethod(lambda config: specs)
    try:
        PipelineStage(config, parallel, Backends())
    except DeclarationError as error:
        return str(error)
    return "built"


@pytest.mark.slow
def test_auxiliary_losses_of_every_stage_reach_the_routers(prepared: Path) -> None:
    """Micro-steps and stages scale the attached gradients: a wrong factor shows where the losses are strong."""
    strong = "model.feedforward.entropy_weight=0.2"
    layout = Layout(pipeline=4, micro=4)
    reference = plain_trace(config_of(prepared, "switchall", Layout(micro=8), strong), STEPS, GRADIENT_STEPS)
    weak = plain_trace(config_of(prepared, "switchall", Layout(micro=8)), STEPS, GRADIENT_STEPS)
    for block in range(4):
        router = f"blocks.{block}.feedforward.router"
        assert not torch.allclose(reference.gradients[2][router], weak.gradients[2][router], rtol=1e-2)
    trace = run_ranks(engine_trace, 4, [config_of(prepared, "switchall", layout, strong)], STEPS, GRADIENT_STEPS)[0][0]
    assert_same(trace, reference, str(layout))


@pytest.mark.slow  # the fast one: the one of test_layouts.py
def test_bf16_stays_near_fp32(prepared: Path) -> None:
    """Measured on one rank: single losses 0.7%, norms 2.7% away; a gradient's norm 12% (a LayerNorm's bias)."""
    reference = plain_trace(config_of(prepared, "switchall", Layout(micro=8)), STEPS, (0,))
    configs = [
        config_of(prepared, "switchall", Layout(pipeline=2, micro=4, recompute=recompute), "train.precision=bf16")
        for recompute in ("none", "full")
    ]
    for trace in run_ranks(engine_trace, 2, configs, STEPS, (0,))[0]:
        assert trace.losses != reference.losses
        assert trace.losses == pytest.approx(reference.losses, rel=2e-2)
        assert trace.grad_norms == pytest.approx(reference.grad_norms, rel=0.05)
        for name, gradient in reference.gradients[0].items():
            ratio = float(trace.gradients[0][name].norm() / gradient.norm())
            assert ratio == pytest.approx(1.0, abs=0.25), f"gradient of {name} is {ratio} times that of fp32"


@pytest.mark.slow
def test_bf16_stays_near_fp32_on_eight_ranks(prepared: Path) -> None:
    """Every dimension at once; measured as on one rank."""
    reference = plain_trace(config_of(prepared, "switchall", Layout(micro=8)), STEPS, ())
    composed = Layout(tensor=2, sequence=True, pipeline=2, data=2, expert=2)
    config = config_of(prepared, "switchall", composed, "train.precision=bf16")
    trace = run_ranks(engine_trace, 8, [config], STEPS, ())[0][0]
    assert trace.losses != reference.losses
    assert trace.losses == pytest.approx(reference.losses, rel=2e-2)
    assert trace.grad_norms[:3] == pytest.approx(reference.grad_norms[:3], rel=0.05)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("parallel.zero=0",), "parallel.zero: 0 does not go with parallel.pipeline = 2 (at stage 0 DeepSpeed clips"),
        (("parallel.zero=2",), "parallel.zero: 2 does not go with parallel.pipeline = 2 (DeepSpeed's pipeline engine"),
        (("parallel.zero=3",), "set parallel.zero to 1, or parallel.pipeline to 1"),
        (("model.num_layers=1",), "parallel.pipeline: 2 stages need a block each, but model.num_layers is 1; set"),
        (("parallel.offload_optimizer=true",), "parallel.offload_optimizer: does not go with parallel.pipeline = 2"),
        (('deepspeed={"pipeline": true}',), "deepspeed.pipeline: must be an object of extra keys"),
        (('deepspeed={"pipeline": {"pipe_partitioned": true}}',), "deepspeed.pipeline.pipe_partitioned: is decided by"),
    ],
)
def test_impossible_divisions_are_refused(prepared: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        small_config(prepared, *MODELS["switchall"], "parallel.pipeline=2", *overrides)
