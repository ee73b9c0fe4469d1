"""A rehearsed step beside a real one: what a rank holds, and every collective that it calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from torch import Tensor

from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.planning.record import Call
from pretrain.planning.rehearsal import rehearse
from pretrain.planning.rehearsed_traffic import rehearsed_collectives
from tests.harness import run_ranks
from tests.pretrain.runs import one_step, small_config, trainer_of

Sums = Counter[tuple[str, int, int]]
"""(kind, ranks of the group, bytes of a call) -> calls in a step."""
SIZES = ("model.num_layers=4", "model.attention.num_heads=4", "model.feedforward.num_experts=8")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "ZeRO 0": (2, ("parallel.zero=0",)),
    "ZeRO 2 in bf16": (2, ("parallel.zero=2", "train.precision=bf16")),
    "ZeRO 3": (2, ("parallel.zero=3",)),
    "TP2 SP": (2, ("parallel.tensor=2", "parallel.sequence=true")),
    "PP2 tied": (2, ("parallel.pipeline=2", "model.tied_embedding=true")),
    "EP2 ZeRO 1 in bf16": (2, ("parallel.expert=2", "train.precision=bf16")),
    "TP2 PP2": (4, ("parallel.tensor=2", "parallel.pipeline=2")),
    "TP2 EP2 SP": (4, ("parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2")),
    "TP2 PP2 DP2 SP EP2": (
        8, ("parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true", "parallel.expert=2"),
    ),
    "ZeRO 3, 8 ranks": (8, ("parallel.zero=3", "batch.global_sequences=24")),
}  # fmt: skip


def steps_before(config: Config) -> int:
    """Until a step is as all later ones: ZeRO 3 knows the order of its gathers after two."""
    return 2 if config.parallel.zero == 3 else 1


def measured_calls(rank: int, config: Config) -> list[Call]:
    """Of a step of a real run, in the steady state."""
    trainer, progress = trainer_of(config), Progress(0, 0)
    for _ in range(steps_before(config)):
        one_step(trainer, progress)
        progress = progress.after_step(config.batch.global_sequences, updated=True)
    with counted() as calls:
        trainer.launch(progress, trainer.read_input(progress))
    trainer.close()
    return calls


@contextmanager
def counted() -> Iterator[list[Call]]:
    """Every collective of torch.distributed that is called inside, by its functions, not by its operators."""
    from deepspeed.comm import comm
    from megatron.core.tensor_parallel import layers, mappings

    calls: list[Call] = []

    def note(kind: str, group: Any, tensors: list[Tensor], peer: int | None = None) -> None:
        ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
        if peer is not None:
            ranks = (dist.get_rank(), peer) if kind == "send" else (peer, dist.get_rank())
        elements, dtype = sum(t.numel() for t in tensors), tensors[0].dtype
        calls.append(Call(kind, ranks, str(dtype)[6:], elements, elements * dtype.itemsize, ""))

    def wrapped(name: str, kind: str, which: int, key: str, peer: str | None = None) -> Any:
        original = getattr(dist, name)

        def function(*args: Any, **kwargs: Any) -> Any:
            value = args[which] if len(args) > which else kwargs[key]
            other = None
            if peer is not None:
                other = args[1] if len(args) > 1 else kwargs[peer]
            group = kwargs.get("group", next((a for a in args if isinstance(a, dist.ProcessGroup)), None))
            note(kind, group, value if isinstance(value, list) else [value], other)
            return original(*args, **kwargs)

        return mock.patch.object(dist, name, function)

    patches = [
        wrapped("all_reduce", "all_reduce", 0, "tensor"),
        wrapped("broadcast", "broadcast", 0, "tensor"),
        wrapped("all_gather", "all_gather", 0, "tensor_list"),
        wrapped("all_gather_into_tensor", "all_gather", 0, "output_tensor"),
        wrapped("reduce_scatter_tensor", "reduce_scatter", 1, "input"),
        wrapped("all_to_all_single", "all_to_all", 1, "input"),
        wrapped("send", "send", 0, "tensor", "dst"),
        wrapped("recv", "receive", 0, "tensor", "src"),
    ]
    for patch in patches:
        patch.start()
    # Functions that libraries took out of torch.distributed when they were imported.
    for place, name, function in (
        (comm.cdb, "all_gather_function", dist.all_gather_into_tensor),
        (comm.cdb, "reduce_scatter_function", dist.reduce_scatter_tensor),
        *((module, "dist_all_gather_func", dist.all_gather_into_tensor) for module in (layers, mappings)),
        *((module, "dist_reduce_scatter_func", dist.reduce_scatter_tensor) for module in (layers, mappings)),
    ):
        patches.append(mock.patch.object(place, name, function))
        patches[-1].start()
    try:
        yield calls
    finally:
        for patch in patches:
            patch.stop()


def rehearsed_calls(rank: int, config: Config, num_ranks: int, played: list[int]) -> list[list[Call]]:
    dist.destroy_process_group()  # of this process alone, which plays others
    return [rehearse(config, num_ranks, each, "cpu", most_micro_steps=99).calls for each in played]


def planned(rank: int, config: Config, num_ranks: int) -> list[Sums]:
    """What plan.py fit says that the first rank of each stage sends."""
    dist.destroy_process_group()
    found = []
    for stage in range(config.parallel.pipeline):
        sums: Sums = Counter()
        for one in rehearsed_collectives(config, num_ranks, stage, "cpu"):
            sums[one.kind, one.ranks, one.num_bytes if one.kind != "all_to_all" else 0] += one.count
        found.append(sums)
    return found


def of_several(calls: list[Call]) -> list[tuple[Any, ...]]:
    """Kind, ranks and bytes of what is sent at all; of the exchange of tokens, whose sizes data decide, the count."""
    return [(c.kind, c.ranks, c.num_bytes if c.kind != "all_to_all" else 0) for c in calls if len(c.ranks) > 1]


# That the ranks of a group call the same is held by the fast tests of tests/pretrain/preflight.
@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rehearsed_step_calls_the_collectives_of_a_real_one(prepared: Path, name: str) -> None:
    """All ranks of a run, in order, byte by byte."""
    ranks, overrides = LAYOUTS[name]
    config = small_config(prepared, *SIZES, "model.sequence_length=8", "batch.micro_sequences=1", *overrides)
    real = run_ranks(measured_calls, ranks, config)
    played = [0, ranks - 1]
    (found,) = run_ranks(rehearsed_calls, 1, config, ranks, played)
    for rank, calls in zip(played, found, strict=True):
        expected = of_several(real[rank])
        assert of_several(calls) == expected, f"rank {rank}"
        assert len(expected) > 1
    # Of a plan, where micro-steps that repeat are not rehearsed.
    for stage, sums in enumerate(run_ranks(planned, 1, config, ranks)[0]):
        calls = of_several(real[stage * ranks // config.parallel.pipeline])
        assert sums == Counter((kind, len(members), size) for kind, members, size in calls), f"stage {stage}"
