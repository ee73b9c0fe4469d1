"""The traffic by arithmetic beside figures made by hand for switchall_1b."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.config.loading import load_config
from pretrain.planning.rough_traffic import expert_parameters, rough_collectives

ONE_BILLION = Path(__file__).resolve().parents[3] / "configs" / "switchall_1b.json"
PARAMETERS = 1_117_441_280
EXPERTS = 18 * 64 * 2048 * 256
"""Of sigma-MoE: blocks, experts, d_model, both projections."""
HIDDEN = 2 * 8 * 2048 * 2048
"""Bytes of the hidden state of a micro-step: bf16, sequences, tokens, d_model."""

Line = tuple[str, str, int, int, str, int]


def lines(num_ranks: int, *overrides: str, stage: int = 0) -> set[Line]:
    found = rough_collectives(load_config(ONE_BILLION, overrides), num_ranks, stage)
    assert len({(one.kind, one.group) for one in found}) == len(found)
    return {(one.kind, one.group, one.ranks, one.num_bytes, one.part, one.count) for one in found}


def test_one_rank_sends_nothing() -> None:
    assert lines(1) == set()


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (
            ("parallel.zero=1",),
            {
                ("all_reduce", "data", 8, 4 * PARAMETERS, "update", 1),
                ("all_gather", "data", 8, 2 * PARAMETERS, "update", 1),
            },
        ),
        (
            ("parallel.zero=2",),
            {
                ("all_reduce", "data", 8, 4 * PARAMETERS, "micro-step", 8),
                ("all_gather", "data", 8, 2 * PARAMETERS, "update", 1),
            },
        ),
        (
            ("parallel.zero=3",),
            {
                ("reduce_scatter", "data", 8, 4 * PARAMETERS, "micro-step", 8),
                ("all_gather", "data", 8, 2 * PARAMETERS, "micro-step", 16),
            },
        ),
        (
            ("parallel.zero=1", "parallel.reduce_dtype=bf16"),
            {
                ("all_reduce", "data", 8, 2 * PARAMETERS, "update", 1),
                ("all_gather", "data", 8, 2 * PARAMETERS, "update", 1),
            },
        ),
        (("parallel.zero=0", "train.precision=fp32"), {("all_reduce", "data", 8, 4 * PARAMETERS, "update", 1)}),
    ],
)
def test_zero(overrides: tuple[str, ...], expected: set[Line]) -> None:
    assert lines(8, *overrides) == expected


def test_tensor_ranks_send_hidden_states_four_times_a_block() -> None:
    assert ("all_reduce", "tensor", 8, HIDDEN, "micro-step", 4 * 18 * 64) in lines(8, "parallel.tensor=8")
    divided = lines(8, "parallel.tensor=8", "parallel.sequence=true", "train.recompute=full")
    assert ("all_gather", "tensor", 8, HIDDEN, "micro-step", 5 * 18 * 64) in divided
    assert ("reduce_scatter", "tensor", 8, HIDDEN, "micro-step", 5 * 18 * 64) in divided


def test_expert_ranks_send_eight_choices_of_each_token() -> None:
    config = load_config(ONE_BILLION, ["parallel.expert=4"])
    assert expert_parameters(config, 0) == EXPERTS // 4
    found = lines(8, "parallel.expert=4")
    assert ("all_to_all", "expert", 4, 8 * HIDDEN, "micro-step", 4 * 18 * 8) in found
    assert ("all_reduce", "expert data", 2, 4 * EXPERTS // 4, "update", 1) in found
    assert ("all_reduce", "data", 8, 4 * (PARAMETERS - EXPERTS), "update", 1) in found
    gated = load_config(ONE_BILLION, ["parallel.expert=4", "model.feedforward.activation=swiglu"])
    assert expert_parameters(gated, 0) == 3 * EXPERTS // 2 // 4  # a third projection, the gate
    again = lines(8, "parallel.expert=4", "train.recompute=full")
    assert ("all_to_all", "expert", 4, 8 * HIDDEN, "micro-step", 6 * 18 * 8) in again


def test_experts_of_tensor_ranks_that_divide_tokens_are_the_same_on_all_of_them() -> None:
    found = lines(8, "parallel.expert=4", "parallel.tensor=2", "parallel.sequence=true")
    assert ("all_to_all", "expert", 4, 8 * HIDDEN // 2, "micro-step", 4 * 18 * 16) in found
    assert ("all_reduce", "expert data", 2, 4 * EXPERTS // 4, "update", 1) in found


def test_stages_send_one_hidden_state_over_each_border() -> None:
    for stage, borders in enumerate((1, 2, 2, 1)):
        found = lines(8, "parallel.pipeline=4", stage=stage)
        assert ("send", "pipeline", 4, HIDDEN, "micro-step", borders * 32) in found
    divided = lines(8, "parallel.pipeline=2", "parallel.tensor=2", "parallel.sequence=true")
    assert ("send", "pipeline", 2, HIDDEN // 2, "micro-step", 32) in divided
