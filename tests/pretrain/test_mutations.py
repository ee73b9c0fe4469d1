"""The tests of layouts can fail: each classic silent bug, put in on purpose, is caught by test_matrix.py's check.

the gradient of the router's gates is not summed over tensor-parallel ranks     Megatron-LM issue 1652
an auxiliary loss counts once per tensor-parallel rank                          Megatron-LM issue 3672
DeepSpeed's pipe_partitioned is on under sequence parallelism                   (its default)
the gradient of a norm is not summed over the ranks that divide its tokens
a micro-step's auxiliary loss counts in full on a pipeline stage
choices that recomputation makes again count again
choices that every tensor-parallel rank makes count once per rank
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

Reached = list[bool]
"""Not empty once the mutated code was called."""


def unsummed_gates() -> Reached:
    import model.feedforward.sigma_moe as module

    reached: Reached = []

    def entered(x: Any, group: Any) -> Any:
        reached.append(True)
        return x

    assert callable(module.enter_shards)
    module.enter_shards = entered
    return reached


def auxiliary_loss_per_rank() -> Reached:
    import model.feedforward.sigma_moe as module
    from model.parallel.collectives import enter_shards

    original, reached = module.entropy_regularizer, []

    def counted_by_every_rank(logits: Any, config: Any, statistics: Any, parallel: Any, **more: Any) -> Any:
        reached.append(True)
        return original(enter_shards(logits, parallel.tensor_group), config, statistics, parallel, **more)

    module.entropy_regularizer = counted_by_every_rank
    return reached


def partitioned_pipe() -> Reached:
    import pretrain.engine.build as module

    original, reached = module.deepspeed_json, []

    def with_the_default(config: Config, data_size: int) -> dict[str, Any]:
        tree = original(config, data_size)
        assert tree["pipeline"]["pipe_partitioned"] is False, "nothing to mutate: DeepSpeed's default is not overridden"
        reached.append(True)
        return {**tree, "pipeline": {"pipe_partitioned": True, "grad_partitioned": True}}

    module.deepspeed_json = with_the_default
    return reached


def unsummed_norms() -> Reached:
    import model.layers as module

    reached: Reached = []

    def between(parameter: Any, parallel: Any) -> Any:
        reached.append(True)
        return parameter

    assert callable(module.between_regions)
    module.between_regions = between
    return reached


def unscaled_auxiliary_loss() -> Reached:
    import pretrain.engine.pipeline as module

    reached: Reached = []

    def scale(self: Any) -> float:
        reached.append(True)
        return 1.0

    assert callable(module.PipelineExecutor._gradient_scale)
    module.PipelineExecutor._gradient_scale = scale
    return reached


def always(name: str) -> Reached:
    """RoutingStatistics whose attribute no router can set: is_paused is never, is_sharded always true."""
    from model.routing import RoutingStatistics

    reached: Reached = []
    fixed = name == "is_sharded"

    def read(router: Any) -> bool:
        reached.append(True)
        return fixed

    setattr(RoutingStatistics, name, property(read, lambda router, value: None))
    return reached


def recomputed_choices() -> Reached:
    return always("is_paused")


def choices_per_rank() -> Reached:
    return always("is_sharded")


def mutated_trace(rank: int, mutate: Callable[[], Reached] | None, config: Config) -> tuple[list[Trace], bool]:
    """The trace of a mutated rank, and whether it called the mutated code."""
    reached = [] if mutate is None else mutate()
    try:
        return engine_trace(rank, [config], STEPS, GRADIENT_STEPS), bool(reached)
    except AssertionError:
        if not reached:
            raise RuntimeError("the check failed before the mutated code was called") from None
        raise


REPLICAS_DIFFER = r"blocks\.\d\.[\w.]+: replicas have different gradients"
CASES = {
    "unsummed gates": (unsummed_gates, Layout(tensor=2), REPLICAS_DIFFER),
    "auxiliary loss per rank": (auxiliary_loss_per_rank, Layout(tensor=2), r"TP2 .*: gradient norm of step 1"),
    "partitioned pipe": (
        partitioned_pipe,
        Layout(tensor=2, sequence=True, pipeline=2),
        r"TP2\+SP PP2 .*: loss of step 0",
    ),
    "unsummed norms": (unsummed_norms, Layout(tensor=2, sequence=True), REPLICAS_DIFFER),
    "unscaled auxiliary loss": (unscaled_auxiliary_loss, Layout(pipeline=2), r"PP2 .*: gradient norm of step 1"),
    "recomputed choices": (recomputed_choices, Layout(recompute="full"), r": choices that blocks\.0\..* step 0"),
    "choices per rank": (choices_per_rank, Layout(tensor=2), r"TP2 .*: choices that blocks\.0\.feedforward.* step 0"),
}
"""Mutation, layout, and the words of the check that it must fail with: the mutation's own crash has others."""


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_check_of_the_matrix_catches(prepared: Path, name: str) -> None:
    mutate, layout, message = CASES[name]
    reference = plain_trace(config_of(prepared, "switchall", Layout(micro=8)), STEPS, GRADIENT_STEPS)
    config = config_of(prepared, "switchall", layout)
    (right,), _ = run_ranks(mutated_trace, layout.ranks, None, config)[0]
    assert_same(right, reference, "without the bug")
    with pytest.raises((AssertionError, RankFailed), match=message):
        check(mutate, layout, config, reference)


def check(mutate: Callable[[], Reached], layout: Layout, config: Config, reference: Trace) -> None:
    results = run_ranks(mutated_trace, layout.ranks, mutate, config, timeout_seconds=600)
    assert any(reached for _, reached in results), "no rank called the mutated code"
    assert_same(results[0][0][0], reference, str(layout))
