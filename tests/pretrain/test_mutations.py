"""The tests of layouts can fail: each classic silent bug, put in on purpose, is caught by test_matrix.py's check.

the gradient of the router's gates is not summed over tensor-parallel ranks     Megatron-LM issue 1652
an auxiliary loss counts once per tensor-parallel rank                          Megatron-LM issue 3672
DeepSpeed's pipe_partitioned is on under sequence parallelism                   (its default)
the gradient of a norm is not summed over the ranks that divide its tokens
a micro-step's auxiliary loss counts in full on a pipeline stage
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.schema import Config
from tests.harness import RankFailed, run_ranks
from tests.pretrain.matrix import GRADIENT_STEPS, STEPS, Layout, config_of
from tests.pretrain.runs import Trace, assert_same, engine_trace, plain_trace


def unsummed_gates() -> None:
    import model.feedforward.sigma_moe as module

    module.enter_shards = lambda x, group: x  # type: ignore[assignment]


def auxiliary_loss_per_rank() -> None:
    import model.feedforward.sigma_moe as module
    from model.parallel.collectives import enter_shards

    original = module.entropy_regularizer

    def counted_by_every_rank(logits: Any, config: Any, statistics: Any, parallel: Any, **more: Any) -> Any:
        return original(enter_shards(logits, parallel.tensor_group), config, statistics, parallel, **more)

    module.entropy_regularizer = counted_by_every_rank


def partitioned_pipe() -> None:
    import pretrain.engine.build as module

    original = module.deepspeed_json

    def with_the_default(config: Config, data_size: int) -> dict[str, Any]:
        return {**original(config, data_size), "pipeline": {"pipe_partitioned": True, "grad_partitioned": True}}

    module.deepspeed_json = with_the_default


def unsummed_norms() -> None:
    import model.layers as module

    module.between_regions = lambda parameter, parallel: parameter  # type: ignore[assignment]


def unscaled_auxiliary_loss() -> None:
    import pretrain.engine.pipeline as module

    module.PipelineExecutor._gradient_scale = lambda self: 1.0  # type: ignore[method-assign]


def mutated_trace(rank: int, mutate: Callable[[], None] | None, config: Config) -> list[Trace]:
    if mutate is not None:
        mutate()
    return engine_trace(rank, [config], STEPS, GRADIENT_STEPS)


CASES = {
    "unsummed gates": (unsummed_gates, Layout(tensor=2), "replicas have different gradients"),
    "auxiliary loss per rank": (auxiliary_loss_per_rank, Layout(tensor=2), "gradient norm of step 1"),
    "partitioned pipe": (partitioned_pipe, Layout(tensor=2, sequence=True, pipeline=2), ""),
    "unsummed norms": (unsummed_norms, Layout(tensor=2, sequence=True), "replicas have different gradients"),
    "unscaled auxiliary loss": (unscaled_auxiliary_loss, Layout(pipeline=2), "gradient norm of step 1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_check_of_the_matrix_catches(prepared: Path, name: str) -> None:
    mutate, layout, message = CASES[name]
    reference = plain_trace(config_of(prepared, "switchall", Layout(micro=8)), STEPS, GRADIENT_STEPS)
    config = config_of(prepared, "switchall", layout)
    assert_same(run_ranks(mutated_trace, layout.ranks, None, config)[0][0], reference, "without the bug")
    with pytest.raises((AssertionError, RankFailed), match=message):
        check(mutate, layout, config, reference)


def check(mutate: Callable[[], None], layout: Layout, config: Config, reference: Trace) -> None:
    trace = run_ranks(mutated_trace, layout.ranks, mutate, config, timeout_seconds=600)[0][0]
    assert_same(trace, reference, str(layout))
