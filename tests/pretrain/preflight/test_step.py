"""A rehearsal finds a layer that calls a collective on some ranks of a group alone."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException

from common.errors import UserError
from model.layers import Block
from pretrain.config.rules import check_ranks
from pretrain.config.schema import Config
from pretrain.planning import rehearsal
from pretrain.planning.memory import estimate
from pretrain.planning.record import Rehearsal
from pretrain.preflight.checklist import Blocked, Checklist
from pretrain.preflight.run import PlannedRun
from pretrain.preflight.step import StepRehearsal
from tests.pretrain.runs import small_config

TWO = ("parallel.tensor=2", "model.feedforward.num_experts=6")
SHORT = ("model.num_layers=1", "batch.global_sequences=2", "batch.micro_sequences=2")  # one block, one micro-step


def rehearsed(
    prepared: Path,
    num_ranks: int,
    *overrides: str,
    rank: int | None = None,
    device: str = "cpu",
    memory: int | None = None,
) -> Checklist:
    """The two checks of a step."""
    config = small_config(prepared, *overrides)
    run = PlannedRun(config, num_ranks, None, device, data_size=check_ranks(config, num_ranks))
    checks = Checklist()
    StepRehearsal(run, rank, memory).check(checks)
    return checks


def test_a_collective_that_one_rank_does_not_call_is_found(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transform = Block.transform

    @functools.wraps(transform)
    def planted(self: Any, hidden: Any, *others: Any) -> Any:
        if dist.get_rank() % 2 == 0:
            dist.all_reduce(hidden.detach().clone(), group=self.attention.parallel.tensor_group)
        return transform(self, hidden, *others)

    monkeypatch.setattr(Block, "transform", planted)
    collectives, memory = rehearsed(prepared, 2, *TWO, *SHORT).outcomes
    assert memory.passed
    (problem,) = map(str, collectives.problems)
    assert problem.startswith("parallel.tensor: ") and "equal calls in their group of 2 ranks, rank 0 calls" in problem
    assert problem.endswith("let the layer, or the setting, that makes the difference do the same on all of them")


REASONS = {"strides": "strides (24, 384, 1) is not contiguous", "dtype": "int16 is no dtype of NCCL"}


@pytest.mark.parametrize("fault", ["strides", pytest.param("dtype", marks=pytest.mark.slow)])
def test_what_gloo_takes_and_nccl_does_not_is_found_for_a_gpu_alone(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    transform = Block.transform

    @functools.wraps(transform)
    def planted(self: Any, hidden: Any, *others: Any) -> Any:
        own = hidden.detach().clone()
        own = own.transpose(0, 1) if fault == "strides" else own.to(torch.int16)
        dist.all_reduce(own, group=self.attention.parallel.tensor_group)
        return transform(self, hidden, *others)

    monkeypatch.setattr(Block, "transform", planted)
    assert rehearsed(prepared, 2, *TWO, *SHORT).outcomes[0].passed
    (problem,) = map(str, rehearsed(prepared, 2, *TWO, *SHORT, device="cuda").outcomes[0].problems)
    assert problem.startswith("parallel.tensor: all_reduce of 768 ")
    assert f"{REASONS[fault]}, which NCCL does not take between GPUs" in problem


def test_deepspeed_forgets_the_world_that_was_played(prepared: Path) -> None:
    """Its groups, by which it would take this process for one of that world's ranks."""
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    layout = (*TWO, "parallel.sequence=true", "parallel.expert=2", "batch.global_sequences=4")
    config = small_config(prepared, *SHORT, *layout)
    assert rehearsal.rehearse(config, 4, 0, "cpu").calls
    kept = {
        name
        for name, value in vars(groups).items()
        if isinstance(value, dist.ProcessGroup) or (name.startswith("_EXPERT") and value)
    }
    assert (comm.cdb, groups.mpu, kept) == (None, None, set())


ALL = ("parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "parallel.expert=2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, overrides",
    [(2, TWO), (4, ("parallel.zero=3",)), (8, (*ALL, "model.feedforward.num_experts=6")), (4, ("model.num_layers=5",))],
)
def test_the_ranks_of_legal_layouts_call_the_same(prepared: Path, ranks: int, overrides: tuple[str, ...]) -> None:
    """That differences are found is held by test_same_calls.py and by the test above."""
    outcomes = rehearsed(prepared, ranks, "batch.micro_sequences=1", *overrides, rank=1).outcomes
    assert [outcome.passed for outcome in outcomes] == [True, True], outcomes
    collectives, memory = outcomes
    assert "rank 0 (the first" in collectives.said and "which stand for all" in collectives.said
    assert re.match(r"at the highest point of a step 0\.\d+ GiB on rank ", memory.said)
    assert ("as many blocks add what the third one adds" in memory.said) is ("model.num_layers=5" in overrides)
    assert ("as many tokens as possible" in memory.said) is ("parallel.expert=2" in overrides)


@pytest.mark.parametrize("graphs", ["auto", pytest.param("off", marks=pytest.mark.slow)])
def test_cuda_graphs_which_no_rehearsal_has_are_added_up(prepared: Path, graphs: str) -> None:
    keys = (*SHORT, "train.precision=bf16", f"train.cuda_graph={graphs}")
    config = small_config(prepared, *keys)
    _, memory = rehearsed(prepared, 1, *keys, device="cuda").outcomes
    total = f"; {estimate(config, 1, 'cuda').total / 2**30:.2f} GiB with what CUDA graphs keep (train.cuda_graph)"
    assert memory.passed and (total in memory.said) is (graphs == "auto"), memory.said


def test_the_memory_of_a_step_is_compared_with_that_of_the_device(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rehearse(config: Config, *others: Any, **options: Any) -> Rehearsal:
        return Rehearsal(1, {}, 0, {}, 9 * 2**30, {}, [], [])

    monkeypatch.setattr(rehearsal, "rehearse", rehearse)
    keys = (*SHORT, "train.cuda_graph=off", "checkpoint.asynchronous=false")
    assert "of the device" not in rehearsed(prepared, 1, *keys).outcomes[1].said
    for gib, fits in ((10, True), (9.9, False)):
        memory = rehearsed(prepared, 1, *keys, memory=int(gib * 2**30)).outcomes[1]
        assert memory.passed and f"may fill {0.9 * gib:.2f} GiB of the device (90% of {gib:.1f})" in memory.said
        warned = [text.partition(",")[0] for text in memory.warnings]
        assert warned == ([] if fits else ["memory: a step needs about 9.00 GiB"])
    monkeypatch.setattr("pretrain.gpus.gpu_memory", lambda: 8 * 2**30)
    (warning,) = rehearsed(prepared, 1, *keys, device="cuda").outcomes[1].warnings
    assert "may fill 7.20 GiB of this machine's GPU (90% of 8.0; --device-memory GIB is another's)" in warning
    assert not rehearsed(prepared, 1, *keys).outcomes[1].warnings, "a run on CPUs"
    full = {kind: rehearsed(prepared, 1, *keys[:-1], device=kind, memory=10 * 2**30) for kind in ("cpu", "cuda")}
    for kind, checks in full.items():  # beside a GPU the copy lies in CPU memory
        memory, is_beside = checks.outcomes[1], kind == "cpu"
        assert bool(memory.warnings) == ("more for the copy that a checkpoint" in memory.said) == is_beside


def test_what_is_rehearsed_stands_for_the_whole_run(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GiB for each block and one beside them: many blocks of a model in one piece are added up from three, both
    ends of a pipeline are rehearsed whole, and with expert-parallel ranks two splits of tokens."""

    def rehearse(config: Config, num_ranks: int, rank: int, device: str, *, routed: str) -> Rehearsal:
        peak = (1 + config.model.num_layers) * 2**30 + (rank + 1) * (routed == "worst") * 2**30
        return Rehearsal(1, {}, 0, {}, peak, {}, [], [])

    monkeypatch.setattr(rehearsal, "rehearse", rehearse)
    keys = ("model.num_layers=7", "checkpoint.asynchronous=false", "batch.micro_sequences=2")
    collectives, memory = rehearsed(prepared, 4, *keys, rank=2).outcomes
    assert "8.00 GiB on rank 2 (rehearsed: rank 0 and 2, as many blocks add what the third one adds)" in memory.said
    assert ", 2 (--rank), which stand for all, with 2 of the 7 blocks" in collectives.said
    memory = rehearsed(prepared, 2, *keys, "parallel.pipeline=2").outcomes[1]
    assert "8.00 GiB on rank 1 (rehearsed: rank 0 and 1)" in memory.said
    memory = rehearsed(prepared, 2, *keys, "parallel.expert=2", "model.feedforward.num_experts=6").outcomes[1]
    assert "8.00 GiB on rank 0, tokens evenly split over experts; 9.00 GiB on rank 0, as many tokens" in memory.said


def test_what_cuda_graphs_keep_may_be_too_much(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "rehearse", lambda *_, **__: Rehearsal(1, {}, 0, {}, 0, {}, [], []))
    keys = (*SHORT, "train.precision=bf16", "train.cuda_graph=auto")
    total = estimate(small_config(prepared, *keys), 1, "cuda").total
    for has, warns in ((round(total / 0.9) + 9, False), (total, True)):
        assert bool(rehearsed(prepared, 1, *keys, device="cuda", memory=has).outcomes[1].warnings) == warns


def test_the_copy_for_a_checkpoint_is_that_of_the_stage_with_most(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.planning.layout_plan.copy_beside_a_step", lambda *given: (5, 9, 7)[given[2]])
    config = small_config(prepared, "parallel.pipeline=3", "model.num_layers=3")
    assert StepRehearsal(PlannedRun(config, 3, None, "cpu", data_size=1))._copy() == 9


def test_the_last_rank_may_be_rehearsed_too(prepared: Path) -> None:
    run = PlannedRun(small_config(prepared), 4, None, "cpu", data_size=4)
    assert [StepRehearsal(run, rank)._ends() for rank in (0, 3, 4)] == [[0], [0, 3], [0]]


def test_data_parallel_ranks_have_no_setting_of_their_own(prepared: Path) -> None:
    """parallel.data is no key: their number follows from the others."""
    run = PlannedRun(small_config(prepared, *TWO), 4, None, "cpu", data_size=2)
    assert [StepRehearsal(run)._key(group) for group in ((0, 1), (0, 2))] == ["parallel.tensor", "parallel"]


def test_sizes_are_compared_where_tokens_are_split_evenly(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere ranks of an expert group send each other what they have."""
    monkeypatch.setattr(rehearsal, "rehearse", lambda *_, **__: Rehearsal(1, {}, 0, {}, 0, {}, [], []))
    compare = Mock(return_value=None)
    monkeypatch.setattr("pretrain.planning.same_calls.first_difference", compare)
    rehearsed(prepared, 2, *SHORT, "parallel.expert=2", "batch.micro_sequences=1", TWO[1])
    assert [call.kwargs for call in compare.call_args_list] == [{"is_even": True}, {"is_even": False}]


@pytest.mark.parametrize("fault", [UserError("train.steps: is wrong"), Blocked("it is not known")])
@pytest.mark.parametrize("name", ["configuration", "rules", "layout", "device", "optimizer"])
def test_no_step_is_rehearsed_of_a_run_that_cannot_be(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, name: str, fault: Exception
) -> None:
    monkeypatch.setattr(rehearsal, "rehearse", lambda *_, **__: pytest.fail("it was rehearsed"))
    checks = Checklist()
    checks.do(name, Mock(side_effect=fault))
    StepRehearsal(PlannedRun(small_config(prepared), 1, None, "cpu", data_size=1)).check(checks)
    assert [outcome.blocked_by for outcome in checks.outcomes[1:]] == [f"{name} has a fault"] * 2


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(rehearsal, "rehearse", fail)


@pytest.mark.parametrize(
    "error, words",
    [
        (DataDependentOutputException(torch.ops.aten._local_scalar_dense.default), "DataDependentOutputException"),
        (NotImplementedError("and more\nno such operator\n"), "(NotImplementedError: no such operator)"),
        (RuntimeError(".numpy() is not supported for tensor subclasses."), "tensor subclasses"),
        (MemoryError(), "(MemoryError: )"),
    ],
)
def test_what_a_rehearsal_cannot_do_is_a_warning(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    failing(monkeypatch, error)
    checks = rehearsed(prepared, 1)
    collectives, memory = checks.outcomes
    assert memory.passed is collectives.passed is None and not checks.problems
    assert memory.blocked_by.startswith("step: it cannot be rehearsed on tensors without data (")
    assert words in memory.blocked_by
    assert [text.partition(";")[0] for text in checks.warnings] == ["collectives: not checked", "memory: not checked"]
    (problem,) = rehearsed(prepared, 1, rank=1).problems
    assert str(problem) == "--rank: is 1, but the run has the ranks 0 to 0; name one of them"


def test_where_the_step_stops_is_an_error_once(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an exception of the model or of DeepSpeed would end a start."""
    failing(monkeypatch, ValueError("DeepSpeed says\nType fp8 is not supported"))
    checks = rehearsed(prepared, 1)
    (problem,) = map(str, checks.problems)
    assert problem.startswith("step: the code that trains ends in a rehearsed step, as it would in a run: ValueError: ")
    assert "Type fp8 is not supported; change the setting" in problem and checks.warnings == []
