"""The same numbers in every layout: data-parallel ranks, ZeRO stages and micro-batch sizes against plain PyTorch.

The fast tests of test_matrix.py hold the other dimensions, every dropout, the dense baseline and SwitchHead with
Transformer-XL memory, all of them with data-parallel ranks; what is slow here says which fast test has its property."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import run_ranks
from tests.pretrain.runs import MOA, TOLERANCE, Trace, assert_near, assert_same, engine_trace, plain_trace, small_config

STEPS, GRADIENT_STEPS = 4, (0, 3)

# ranks: [(ZeRO stage, micro_sequences)]; 8 sequences a step, so 1 to 8 micro-steps.
LAYOUTS = {
    1: [(0, 8), (0, 1), (1, 2), (2, 4), (3, 8), (3, 2)],
    2: [(0, 4), (0, 2), (1, 4), (1, 1), (2, 2), (3, 4), (3, 1)],
    4: [(0, 2), (0, 1), (1, 1), (1, 2), (2, 2), (2, 1), (3, 1), (3, 2)],
}
SOME = [(0, 4), (1, 2), (2, 1)]
"""Of two ranks, 1 to 4 micro-steps. ZeRO 3 is in the fast layouts of test_matrix.py."""


@pytest.fixture(scope="module")
def reference(prepared: Path) -> Trace:
    trace = plain_trace(small_config(prepared, "batch.micro_sequences=8"), STEPS, GRADIENT_STEPS)
    assert max(trace.grad_norms) > 0.5, "clipping was never active"
    return trace


@pytest.mark.parametrize(
    "ranks, layouts",
    [
        pytest.param(2, SOME, id="some"),
        *(pytest.param(ranks, LAYOUTS[ranks], id=f"{ranks} ranks", marks=pytest.mark.slow) for ranks in LAYOUTS),
    ],
)
def test_every_data_parallel_layout_gives_the_same_numbers(
    prepared: Path, reference: Trace, ranks: int, layouts: list[tuple[int, int]]
) -> None:
    configs = [
        small_config(prepared, f"parallel.zero={zero}", f"batch.micro_sequences={micro}") for zero, micro in layouts
    ]
    traces = run_ranks(engine_trace, ranks, configs, STEPS, GRADIENT_STEPS)[0]
    for (zero, micro), trace in zip(layouts, traces, strict=True):
        assert_same(trace, reference, f"{ranks} ranks, ZeRO {zero}, micro {micro}")


@pytest.mark.parametrize("ranks, zero", [(2, 1), pytest.param(4, 3, marks=pytest.mark.slow)])
def test_micro_batch_scope_is_the_same_for_every_split_with_the_same_sequences_per_micro_step(
    prepared: Path, ranks: int, zero: int
) -> None:
    scope = "model.feedforward.entropy_scope=micro_batch"
    # 4 sequences per micro-step however they are split: 1 rank x 4, 2 ranks x 2, 4 ranks x 1.
    reference = plain_trace(small_config(prepared, scope, "batch.micro_sequences=4"), STEPS, GRADIENT_STEPS)
    config = small_config(prepared, scope, f"batch.micro_sequences={4 // ranks}", f"parallel.zero={zero}")
    trace = run_ranks(engine_trace, ranks, [config], STEPS, GRADIENT_STEPS)[0][0]
    assert_same(trace, reference, f"{ranks} ranks, ZeRO {zero}, micro_batch scope")
    other = plain_trace(small_config(prepared, scope, "batch.micro_sequences=8"), 2, ())
    assert abs(other.grad_norms[1] / reference.grad_norms[1] - 1) > TOLERANCE, (
        "the scope has no effect: the test is blind"
    )


@pytest.mark.parametrize(
    "scope, position", [("global_batch", "xl"), pytest.param("micro_batch", "rope", marks=pytest.mark.slow)]
)
def test_moa_trains_the_same_in_every_layout(prepared: Path, scope: str, position: str) -> None:
    """With its three losses; of scope micro_batch in a layout with the same 4 sequences per micro-step."""
    moa = (MOA, f"model.attention.loss_scope={scope}", f"model.position.type={position}", "train.seed=5")
    moa = (*moa, "model.attention.expert_dropout=0.1")
    reference = plain_trace(small_config(prepared, *moa, "batch.micro_sequences=4"), STEPS, GRADIENT_STEPS)
    zero, micro = {"global_batch": (3, 2), "micro_batch": (1, 2)}[scope]
    config = small_config(prepared, *moa, f"parallel.zero={zero}", f"batch.micro_sequences={micro}")
    trace = run_ranks(engine_trace, 2, [config], STEPS, GRADIENT_STEPS)[0][0]
    assert_same(trace, reference, f"2 ranks, ZeRO {zero}, micro {micro}, MoA")
    without_cv = small_config(prepared, *moa, "model.attention.cv_loss_weight=0.0", "batch.micro_sequences=4")
    other = plain_trace(without_cv, 3, ())
    assert abs(other.grad_norms[2] / reference.grad_norms[2] - 1) > TOLERANCE, "the cv loss has no effect"


@pytest.mark.slow  # the fast one: test_some in test_matrix.py, of SwitchHead
def test_transformer_xl_memory_is_the_same_in_every_layout(prepared: Path) -> None:
    """Of dense attention."""
    xl = ["model.position.type=xl", "model.attention.type=dense", "model.dropout=0.1", "train.seed=10"]
    xl += ["model.attention.head_dim=6", "model.attention.num_heads=2"]
    reference = plain_trace(small_config(prepared, *xl, "batch.micro_sequences=8"), STEPS, GRADIENT_STEPS)
    layouts = ((0, 2), (1, 1), (3, 4))
    configs = [small_config(prepared, *xl, f"parallel.zero={z}", f"batch.micro_sequences={m}") for z, m in layouts]
    for (zero, micro), trace in zip(
        layouts, run_ranks(engine_trace, 2, configs, STEPS, GRADIENT_STEPS)[0], strict=True
    ):
        assert_same(trace, reference, f"2 ranks, ZeRO {zero}, micro {micro}, XL")
    forgetful = plain_trace(
        small_config(prepared, *xl, "model.position.memory_chunks=0", "batch.micro_sequences=8"), 1, ()
    )
    assert forgetful.losses[0] != reference.losses[0], "another data order"


def test_bf16_stays_near_fp32(prepared: Path) -> None:
    """bf16 has 8 bits of mantissa and Adam amplifies rounding in its first steps: measured 0.9% in single losses
    of this 24-wide model, 0.3% in their mean."""
    steps = 10
    reference = plain_trace(small_config(prepared, "batch.micro_sequences=8"), steps, ())
    bf16 = "train.precision=bf16"
    configs = [
        small_config(prepared, bf16, f"parallel.zero={zero}", f"batch.micro_sequences={micro}")
        for zero, micro in ((1, 2), (3, 2))  # the two ways in which we run bf16
    ]
    for config, trace in zip(configs, run_ranks(engine_trace, 2, configs, steps, ())[0], strict=True):
        assert_near(trace, reference, f"ZeRO {config.parallel.zero}")
        assert sum(trace.losses) == pytest.approx(sum(reference.losses), rel=5e-3), f"ZeRO {config.parallel.zero}"


def test_stages_of_a_pipeline_may_have_groups_of_their_own(prepared: Path) -> None:
    """Rates that no parameter of a block has: the stages have different numbers of groups in their optimizers."""
    keys = (
        "optimizer.weight_decay=0.3",
        "optimizer.groups.embedding.learning_rate_ratio=0.5",
        "optimizer.groups.head.learning_rate_ratio=3",
        "optimizer.groups.head.weight_decay=2",
    )
    stages = ("parallel.pipeline=2", "parallel.zero=1")
    reference = plain_trace(small_config(prepared, *keys, "batch.micro_sequences=8"), STEPS, GRADIENT_STEPS)
    configs = [small_config(prepared, *keys, *stages), small_config(prepared, *keys, *stages, "train.precision=bf16")]
    exact, half = run_ranks(engine_trace, 2, configs, STEPS, GRADIENT_STEPS)[0]
    assert_same(exact, reference, "2 stages, groups of their own")
    assert half.losses == pytest.approx(reference.losses, rel=0.01) and len(half.losses) == STEPS
    experts = (*keys, "model.feedforward.num_experts=6", "train.seed=3")
    config = small_config(prepared, *experts, *stages, "parallel.expert=2", "batch.micro_sequences=2")
    few = plain_trace(small_config(prepared, *experts, "batch.micro_sequences=8"), 3, (0, 2))
    assert_same(run_ranks(engine_trace, 4, [config], 3, (0, 2))[0][0], few, "2 stages, experts divided")
    other = plain_trace(small_config(prepared, *keys[:1], "batch.micro_sequences=8"), STEPS, ())
    assert abs(other.losses[-1] / reference.losses[-1] - 1) > TOLERANCE, "the groups have no effect"


def test_adamw_has_its_keys_in_every_layout(prepared: Path) -> None:
    """Weight decay, which spares vectors, the decay rates of both moments, eps, and what groups have of their own."""
    keys = (
        "optimizer.weight_decay=0.3",
        "optimizer.betas=[0.7, 0.9]",
        "optimizer.eps=1e-4",
        "optimizer.groups.routers.weight_decay=6",
        "optimizer.groups.experts.learning_rate_ratio=0.5",
        "optimizer.groups.norms.learning_rate_ratio=3",
        "optimizer.groups.embedding.weight_decay=0",
    )
    reference = plain_trace(small_config(prepared, *keys, "batch.micro_sequences=8"), STEPS, GRADIENT_STEPS)
    configs = [small_config(prepared, *keys, f"parallel.zero={zero}", "batch.micro_sequences=4") for zero in (0, 1, 3)]
    for trace in run_ranks(engine_trace, 2, configs, STEPS, GRADIENT_STEPS)[0]:
        assert_same(trace, reference, "2 ranks, AdamW's keys")
    for left_out in keys:
        others = [key for key in keys if key != left_out]
        other = plain_trace(small_config(prepared, *others, "batch.micro_sequences=8"), STEPS, ())
        assert abs(other.losses[-1] / reference.losses[-1] - 1) > TOLERANCE, f"{left_out} has no effect"
