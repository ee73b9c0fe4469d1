"""The traffic by arithmetic beside figures made by hand for switchall_1b."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest

from pretrain.config.loading import load_config
from pretrain.config.schema import Config
from pretrain.planning.layout_plan import rehearsed
from pretrain.planning.rough_traffic import expert_parameters, rough_collectives
from tests.pretrain.runs import small_config

ONE_BILLION = Path(__file__).resolve().parents[3] / "configs" / "switchall_1b.json"
PARAMETERS = 1_117_441_280
EXPERTS = 18 * 64 * 2048 * 256
"""Of sigma-MoE: blocks, experts, d_model, both projections."""
HIDDEN = 2 * 8 * 2048 * 2048
"""Bytes of the hidden state of a micro-step: bf16, sequences, tokens, d_model."""

Line = tuple[str, str, int, int, str, int]


def lines(num_ranks: int, *overrides: str, stage: int = 0) -> set[Line]:
    found = rough_collectives(load_config(ONE_BILLION, overrides), num_ranks, stage)
    assert len({(one.kind, one.group, one.part) for one in found}) == len(found)
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
                ("all_gather", "data", 8, 2 * 1_474_691_072, "micro-step", 8),
                ("all_gather", "data", 8, 2 * 2_542_848, "update", 1),  # test_zero_3_gathers.py
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
    for recompute in ("selective", "full"):  # what a block ends with is not sent again
        again = lines(8, "parallel.tensor=8", f"train.recompute={recompute}")
        assert ("all_reduce", "tensor", 8, HIDDEN, "micro-step", 5 * 18 * 64) in again
        divided = lines(8, "parallel.tensor=8", "parallel.sequence=true", f"train.recompute={recompute}")
        assert ("all_gather", "tensor", 8, HIDDEN, "micro-step", 6 * 18 * 64) in divided
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
    for recompute in ("selective", "full"):
        again = lines(8, "parallel.expert=4", f"train.recompute={recompute}")
        assert ("all_to_all", "expert", 4, 8 * HIDDEN, "micro-step", 6 * 18 * 8) in again


def test_experts_of_tensor_ranks_that_divide_tokens_are_the_same_on_all_of_them() -> None:
    found = lines(8, "parallel.expert=4", "parallel.tensor=2", "parallel.sequence=true")
    assert ("all_to_all", "expert", 4, 8 * HIDDEN // 2, "micro-step", 4 * 18 * 16) in found
    assert ("all_gather", "tensor", 2, HIDDEN, "micro-step", 2 * 18 * 16) in found  # of attention alone
    assert ("reduce_scatter", "tensor", 2, HIDDEN, "micro-step", 2 * 18 * 16) in found
    assert ("all_reduce", "expert data", 2, 4 * EXPERTS // 4, "update", 1) in found


def test_stages_send_one_hidden_state_over_each_border() -> None:
    for stage, borders in enumerate((1, 2, 2, 1)):
        found = lines(8, "parallel.pipeline=4", stage=stage)
        assert ("send", "pipeline", 4, HIDDEN, "micro-step", borders * 32) in found
    divided = lines(8, "parallel.pipeline=2", "parallel.tensor=2", "parallel.sequence=true")
    assert ("send", "pipeline", 2, HIDDEN // 2, "micro-step", 32) in divided


TP2, EP2 = ("parallel.tensor=2",), ("parallel.expert=2",)
SP = (*TP2, "parallel.sequence=true")


def of_a_block(config: Config, num_ranks: int) -> Counter[str]:
    """Calls with hidden states, or with tokens for experts, that one more block adds to a rehearsed micro-step."""
    counts = []
    for blocks in (1, 2):
        step = rehearsed(config.replaced("model", num_layers=blocks), num_ranks, 0, "cuda")
        made = [call for call in step.calls[step.starts[0] : step.starts[1]] if len(call.ranks) > 1]
        sizes = [one.num_bytes for one in rough_collectives(config, num_ranks, 0) if one.part == "micro-step"]
        counts.append(Counter(call.kind for call in made if call.num_bytes in sizes))
    return counts[1] - counts[0]


ALL = list(itertools.product([(2, TP2), (2, SP), (2, EP2), (4, (*SP, *EP2))], ("none", "selective", "full")))


@pytest.mark.slow  # the fast figures, made by hand, stand above: they have each way to send
@pytest.mark.parametrize("layout, recompute", ALL)
def test_a_rehearsed_block_sends_as_often(prepared: Path, layout: tuple[int, tuple[str, ...]], recompute: str) -> None:
    """Either recomputation repeats what the forward pass sends, and experts of other ranks need no hidden states of the
    tensor group."""
    ranks, keys = layout
    sizes = ("model.num_layers=1", "model.feedforward.num_experts=4", "batch.micro_sequences=2")
    config = small_config(prepared, *sizes, *keys, f"train.recompute={recompute}")
    found = [one for one in rough_collectives(config, ranks, 0) if one.part == "micro-step"]
    micro_steps = config.micro_steps(config.data_size(ranks))
    assert {one.kind: one.count / micro_steps for one in found} == of_a_block(config, ranks)
