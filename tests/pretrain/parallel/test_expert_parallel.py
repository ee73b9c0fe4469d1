"""Expert parallelism over data-parallel ranks: the numbers of plain PyTorch in one process, alone and with tensor and
sequence parallelism, ZeRO 1 and 2; what cannot be is refused. (Checkpoints: test_checkpoint_resharding.py.)"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from common.errors import ConfigError
from pretrain.config.rules import check_ranks, smallest_world
from pretrain.parallel import experts
from pretrain.parallel.experts import separate_experts
from pretrain.parallel.groups import process_groups
from tests.harness import run_ranks
from tests.pretrain.family import config_of
from tests.pretrain.runs import (
    assert_near,
    assert_same,
    engine_trace,
    plain_trace,
)

STEPS, GRADIENT_STEPS = 6, (0, 3, 5)
FEW_STEPS, FEW_GRADIENT_STEPS = 4, (0, 3)
"""Of what every commit runs."""
SEQUENCE = ("parallel.tensor=2", "parallel.sequence=true")
LAYOUTS = {
    "EP 2": (2, ("parallel.expert=2", "batch.micro_sequences=2")),
    "EP 2 with TP 2 and SP": (4, ("parallel.expert=2", *SEQUENCE, "batch.micro_sequences=2")),
    "EP 2 of DP 4": (4, ("parallel.expert=2", "batch.micro_sequences=1")),
}
"""Label -> ranks and settings; 4 sequences per micro-step in all of them, as scope micro_batch needs."""
FAST = {("switchall, micro_batch scope", "EP 2"): (2,), ("switchall xl", "EP 2 with TP 2 and SP"): (1,)}
"""What every commit runs, with its ZeRO stages."""
SLOW = [
    (model, layout)
    for model in ("switchall, micro_batch scope", "switchall rope with memory")
    for layout in LAYOUTS
    if (model, layout) not in FAST
]
"""Of the models with experts those that test_matrix.py::test_all does not have; the second is of SwiGLU experts."""


@pytest.mark.parametrize(
    "model, layout", [*FAST, *(pytest.param(model, layout, marks=pytest.mark.slow) for model, layout in SLOW)]
)
def test_models_give_the_same_numbers(prepared: Path, model: str, layout: str) -> None:
    is_fast = (model, layout) in FAST
    steps, gradient_steps = (FEW_STEPS, FEW_GRADIENT_STEPS) if is_fast else (STEPS, GRADIENT_STEPS)
    reference = plain_trace(config_of(prepared, model, "batch.micro_sequences=4"), steps, gradient_steps)
    assert max(reference.grad_norms) > 0.5, "clipping was never active"
    (ranks, keys), zeros = LAYOUTS[layout], FAST.get((model, layout), (1, 2))
    configs = [config_of(prepared, model, *keys, f"parallel.zero={zero}") for zero in zeros]
    for zero, trace in zip(zeros, run_ranks(engine_trace, ranks, configs, steps, gradient_steps)[0], strict=True):
        assert_same(trace, reference, f"{layout}, ZeRO {zero}, {model}")


@pytest.mark.slow
def test_four_tensor_parallel_ranks_do_not_divide_six_experts(prepared: Path) -> None:
    """More experts on more ranks are in test_matrix.py."""
    keys = ("model.vocab_size=404", "train.seed=8")
    layout = ("parallel.expert=2", "parallel.tensor=4", "parallel.sequence=true")
    reference = plain_trace(config_of(prepared, "switchall", *keys, "batch.micro_sequences=8"), STEPS, GRADIENT_STEPS)
    config = config_of(prepared, "switchall", *keys, *layout)
    trace = run_ranks(engine_trace, 8, [config], STEPS, GRADIENT_STEPS)[0][0]
    assert_same(trace, reference, "EP 2 of TP 4")


@pytest.mark.slow
def test_reference_kernels_and_optimizer_offload(prepared: Path) -> None:
    reference = plain_trace(config_of(prepared, "switchall", "batch.micro_sequences=8"), STEPS, GRADIENT_STEPS)
    keys = ("kernels.backend=reference", "parallel.offload_optimizer=true")
    for ranks, layout in ((2, ()), (4, SEQUENCE)):
        configs = [config_of(prepared, "switchall", "parallel.expert=2", *layout, key) for key in keys]
        for key, trace in zip(keys, run_ranks(engine_trace, ranks, configs, STEPS, GRADIENT_STEPS)[0], strict=True):
            assert_same(trace, reference, f"{ranks} ranks, {key}")


@pytest.mark.slow
def test_bf16_stays_near_fp32_under_expert_parallelism(prepared: Path) -> None:
    reference = plain_trace(config_of(prepared, "switchall", "batch.micro_sequences=8"), STEPS, ())
    for ranks, layout in ((2, ()), (4, SEQUENCE)):
        keys = (*layout, "parallel.expert=2", "train.precision=bf16", "batch.micro_sequences=2")
        configs = [config_of(prepared, "switchall", *keys, f"parallel.zero={zero}") for zero in (1, 2)]
        for trace in run_ranks(engine_trace, ranks, configs, STEPS, ())[0]:
            assert_near(trace, reference, f"{ranks} ranks")


def mesh_groups(rank: int) -> None:
    """The groups that DeepSpeed would make itself hold the same ranks."""
    from deepspeed.utils import groups

    for pipeline, data, tensor, expert in ((1, 4, 2, 2), (1, 8, 1, 4), (2, 2, 2, 2), (1, 4, 2, 4), (2, 4, 1, 2)):
        ours = process_groups(pipeline=pipeline, data=data, tensor=tensor, expert=expert)
        for table in (groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP):
            table.clear()
        groups._create_expert_and_data_parallel(expert, mp_size=tensor, pp_size=pipeline, mp_mode="tp")
        name = f"ep_size_{expert}"
        for theirs, group in (
            (groups._get_expert_parallel_group(name), ours.expert),
            (groups._get_expert_data_parallel_group(name), ours.expert_replicas),
        ):
            assert dist.get_process_group_ranks(theirs) == dist.get_process_group_ranks(group)
        data_rank = rank // tensor % data
        assert dist.get_process_group_ranks(ours.data).index(rank) == data_rank
        assert dist.get_process_group_ranks(ours.expert).index(rank) == data_rank % expert


def test_experts_have_groups_of_the_optimizer_of_their_own() -> None:
    """Each with the settings of the group that they were in; no group is empty, on which ZeRO fails."""
    plain, other, expert, last = (torch.nn.Parameter(torch.zeros(n)) for n in range(1, 5))
    groups = [{"params": [plain, other], "weight_decay": 0.1}, {"params": [last], "weight_decay": 0.0}]
    assert separate_experts(groups) == groups
    for parameter in (expert, last):
        parameter.allreduce, parameter.group_name = False, "ep_size_2"  # type: ignore[attr-defined]
    groups[0]["params"] = [plain, expert, other]
    of_experts = {"moe": True, "name": "ep_size_2"}
    assert separate_experts(groups) == [
        {"params": [plain, other], "weight_decay": 0.1},
        {"params": [expert], "weight_decay": 0.1, **of_experts},
        {"params": [last], "weight_decay": 0.0, **of_experts},
    ]


def test_deepspeed_finds_the_groups_of_this_engine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks for the largest of all that are registered: those of an engine before, in another layout, are gone."""
    from deepspeed.utils import groups

    for kind in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP"):
        monkeypatch.setattr(groups, kind, {"ep_size_4": "before"})
        monkeypatch.setattr(groups, f"{kind}_RANKS", {"ep_size_4": [0, 1, 2, 3]})
    parts, replicas = [0, 1], [0, 2]
    ours: Any = SimpleNamespace(expert=parts, expert_replicas=replicas)
    monkeypatch.setattr(experts, "groups_of", lambda parallel: ours)
    monkeypatch.setattr(dist, "get_process_group_ranks", list)
    parallel: Any = SimpleNamespace(expert_group=parts)
    experts._register_groups("ep_size_2", parallel)
    for kind, group in (("_EXPERT_PARALLEL_GROUP", parts), ("_EXPERT_DATA_PARALLEL_GROUP", replicas)):
        assert getattr(groups, kind) == getattr(groups, f"{kind}_RANKS") == {"ep_size_2": group}


@pytest.mark.slow
def test_groups_are_those_of_deepspeed() -> None:
    run_ranks(mesh_groups, 8)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("parallel.expert=4",), "parallel.expert: 4 does not divide model.feedforward.num_experts = 6; set "
         "parallel.expert to 3, or model.feedforward.num_experts to 8"),
        (("parallel.zero=0",), "parallel.zero: stage 0 is impossible with parallel.expert = 2"),
        (("parallel.zero=3",), "parallel.zero: stage 3 is impossible with parallel.expert = 2"),
        (("parallel.tensor=2",), "set parallel.sequence to true or parallel.expert to 1"),
        (
            ("model.feedforward.type=dense", "model.feedforward.hidden_size=8"),
            "parallel.expert: 2 ranks would divide the feed-forward experts, but model.feedforward.type is dense: it "
            "has no experts; set parallel.expert to 1",
        ),
        (('deepspeed={"zero_optimization": {"reduce_scatter": false}}',), "zero_optimization.reduce_scatter: "),
        (('deepspeed={"use_data_before_expert_parallelism": true}',), "is decided by parallel.expert"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(prepared: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_of(prepared, "switchall", "parallel.expert=2", *overrides)


def test_the_data_parallel_size_must_be_a_multiple(prepared: Path) -> None:
    config = config_of(prepared, "switchall", "parallel.expert=3", *SEQUENCE, "batch.micro_sequences=1")
    message = "parallel.expert: 3 does not divide the 4 data-parallel ranks"
    with pytest.raises(ConfigError, match=re.escape(message) + r".*set parallel.expert to 2 or start 6 ranks"):
        check_ranks(config, 8)
    config = config_of(prepared, "switchall", "parallel.expert=2", *SEQUENCE, "batch.micro_sequences=2")
    assert check_ranks(config, 8) == 4
    assert check_ranks(config, smallest_world(config)) == 2  # what --dry-run checks without --ranks
