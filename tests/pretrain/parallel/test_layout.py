"""What each rank holds and which ranks belong together: the arithmetic, the table, and what engines really hold."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from common.paths import REPOSITORY
from model.parallel.context import ParallelContext
from model.parallel.megatron_core import HyperCommGrid
from pretrain.config.loading import load_config
from pretrain.config.schema import Config
from pretrain.data.sources import Sources
from pretrain.parallel import context, groups
from pretrain.parallel.context import parallel_context
from pretrain.parallel.layout import group_ranks, mesh, rank_bytes
from pretrain.report.layout_text import groups_text
from pretrain.trainer import RunSetup, build_trainer
from tests.harness import run_ranks
from tests.pretrain.matrix import Layout, config_of
from tests.pretrain.runs import one_step, small_config

TWO_BY_TWO: dict[str, Any] = {"data_size": 2, "data_group": [0, 2], "tensor_size": 2, "tensor_group": [0, 1]}
ONE_BILLION = REPOSITORY / "configs" / "switchall_1b.json"


def one_billion(*overrides: str) -> Config:
    return load_config(ONE_BILLION, list(overrides))


def test_bytes_of_switchall_1b_fall_as_the_arithmetic_says() -> None:
    """TP2 PP2 DP2. By hand, from the configuration alone: d 2048, 18 blocks, vocabulary 32000, H 8, h 128, E 4, 64
    sigma-MoE experts of 128."""
    d, V, H, h, E = 2048, 32000, 8, 128, 4
    divided = 2 * d * H * h + 2 * E * H * d * h + 2 * H * E * d + 64 * 2 * d * 128  # attention; experts
    replicated = 64 * d + 4 * d  # router; two LayerNorms
    entries = rank_bytes(one_billion("parallel.tensor=2", "parallel.pipeline=2"), 2)
    blocks = (11, 7)  # the output layer weighs as much as four blocks
    outside = (V * d // 2, (V * d + V) // 2 + 2 * d)
    for entry, count, more in zip(entries, blocks, outside, strict=True):
        elements = count * (divided // 2 + replicated) + more
        assert entry.parameters == elements
        assert entry.weights == 2 * elements, "bf16"
        assert entry.optimizer == 12 * elements // 2, "fp32 master weight and two moments, divided over DP 2"
    whole = rank_bytes(one_billion(), 1)[0]
    assert whole.parameters == 1_117_441_280 and whole.optimizer == 12 * whole.parameters
    # Replicated parameters are 1.2% of the model: a quarter of it per rank, and an eighth of the optimizer.
    assert sum(e.weights for e in entries) / 2 == pytest.approx(whole.weights / 4, rel=0.02)
    assert sum(e.optimizer for e in entries) / 2 == pytest.approx(whole.optimizer / 8, rel=0.02)


WHOLE = 1_117_441_280
EXPERTS = 18 * 64 * 2 * 2048 * 128
UNDIVIDED = (18 * (64 + 4) + 2) * 2048
"""Elements of SwitchAll 1B, those of its sigma-MoE experts, and those that no tensor parallelism divides."""


@pytest.mark.parametrize(
    "keys, data_size, weights, optimizer",
    [
        # ZeRO 0: the fp32 weights are the master weights, so two moments remain; nothing is divided.
        (("parallel.zero=0", "train.precision=fp32"), 8, 4 * WHOLE, 8 * WHOLE),
        (("parallel.zero=0", "train.precision=fp32", "train.ema_decay=0.9"), 8, 4 * WHOLE, 12 * WHOLE),
        (("parallel.zero=1", "train.precision=fp32"), 8, 4 * WHOLE, 12 * WHOLE // 8),
        (("parallel.zero=2", "train.ema_decay=0.9"), 8, 2 * WHOLE, 16 * WHOLE // 8),
        (("parallel.zero=3",), 8, 2 * WHOLE // 8, 12 * WHOLE // 8),
        (("parallel.zero=1", "train.precision=fp16"), 8, 2 * WHOLE, 12 * WHOLE // 8),
        # What does not divide is rounded up.
        (("parallel.zero=1",), 7, 2 * WHOLE, -(-12 * UNDIVIDED // 7) - (12 * (UNDIVIDED - WHOLE) // 7)),
        (("parallel.zero=3",), 3, -(-2 * WHOLE // 3), -(-12 * WHOLE // 3)),
        # A quarter of the experts is on two of eight ranks, which share its optimizer: a rank has an eighth as before.
        (("parallel.expert=4",), 8, 2 * (WHOLE - EXPERTS + EXPERTS // 4), 12 * WHOLE // 8),
        # Routers and norms are whole; the rest is halved, but experts are there once in four of eight ranks.
        (
            ("parallel.tensor=2", "parallel.sequence=true", "parallel.expert=4"),
            4,
            2 * (UNDIVIDED + (WHOLE - EXPERTS - UNDIVIDED) // 2 + EXPERTS // 4),
            12 * (UNDIVIDED + (WHOLE - EXPERTS - UNDIVIDED) // 2) // 4 + 12 * EXPERTS // 8,
        ),
        (("model.tied_embedding=true",), 1, 2 * (WHOLE - 32000 * 2048), 12 * (WHOLE - 32000 * 2048)),
    ],
    ids=[
        "ZeRO 0",
        "ZeRO 0, average",
        "ZeRO 1",
        "ZeRO 2, average",
        "ZeRO 3",
        "ZeRO 1, fp16",
        "ZeRO 1, uneven",
        "ZeRO 3, uneven",
        "experts",
        "experts, TP",
        "tied",
    ],
)
def test_bytes_follow_zero_precision_average_experts_and_tying(
    keys: tuple[str, ...], data_size: int, weights: int, optimizer: int
) -> None:
    (entry,) = rank_bytes(one_billion(*keys), data_size)
    assert (entry.weights, entry.optimizer) == (weights, optimizer)


def test_groups_of_sixteen_ranks_by_hand() -> None:
    """Tensor-parallel ranks are neighbours, then data-parallel ones, then stages. An expert group has neighbours of
    the data-parallel ranks."""
    keys = ("parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "parallel.expert=2")
    found = {name: ranks.tolist() for name, ranks in group_ranks(one_billion(*keys), 4).items()}
    assert found == {
        "pipeline": [[rank, rank + 8] for rank in range(8)],
        "data": [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]],
        "tensor": [[rank, rank + 1] for rank in range(0, 16, 2)],
        "expert": [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]],
    }
    assert group_ranks(one_billion(), 1) == {}
    neighbours = group_ranks(one_billion("parallel.expert=2"), 8)["expert"]
    assert neighbours.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(
    "keys, ranks",
    [
        (("parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "parallel.expert=2"), 16),
        (("parallel.tensor=2", "parallel.sequence=true", "parallel.expert=4"), 8),
        (("parallel.tensor=2", "parallel.pipeline=2"), 12),
        (("parallel.expert=2",), 8),
        (("parallel.expert=2",), 2),
        (("parallel.tensor=2",), 2),
        ((), 4),
    ],
    ids=str,
)
def test_every_rank_is_where_the_mesh_has_it(
    keys: tuple[str, ...], ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its place and its groups, which are lists of ranks here. Those that hold the same experts are all that have its
    place in an expert group and its stage."""
    config = one_billion(*keys)
    data = config.data_size(ranks)
    expected, places = group_ranks(config, data), mesh(config, data)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    calls: Any = SimpleNamespace(get_world_size=lambda group=None: ranks if group is None else len(group))
    calls.group = SimpleNamespace(WORLD=list(range(ranks)))
    monkeypatch.setattr(context, "dist", calls)
    monkeypatch.setattr(groups, "dist", calls)
    # Without the cache, which would take one process for one rank.
    monkeypatch.setattr(groups, "_process_groups", groups._process_groups.__wrapped__)
    held: dict[tuple[int, int], list[int]] = defaultdict(list)  # the ranks of each part of a stage's experts
    replicas: dict[int, Any] = {}
    for rank in range(ranks):

        def group_of(grid: Any, dims: Any, rank: int = rank) -> list[int]:
            (group,) = (sorted(group) for group in grid.get_rank_enum(dims) if rank in group)
            return group

        calls.get_rank = lambda rank=rank: rank
        monkeypatch.setattr(HyperCommGrid, "create_pg", group_of)
        found = parallel_context(config)
        assert places[found.pipeline_rank, found.data_rank, found.tensor_rank] == rank
        assert (found.pipeline_size, found.data_size, found.tensor_size) == places.shape
        assert (found.expert_size, found.sequence_parallel) == (config.parallel.expert, config.parallel.sequence)
        for name in ("pipeline", "data", "tensor", "expert"):
            (group,) = [row.tolist() for row in expected.get(name, []) if rank in row] or [None]
            assert getattr(found, f"{name}_group") == group, name
            if group is not None:
                assert group.index(rank) == getattr(found, f"{name}_rank")
        held[found.pipeline_rank, found.expert_rank].append(rank)
        replicas[rank] = groups.replica_group(found, of_experts=found.expert_size > 1)
    if config.parallel.expert > 1:
        for same in held.values():
            assert all(replicas[rank] == (same if len(same) > 1 else None) for rank in same)


def test_the_first_and_the_last_stage_share_a_tied_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the stages between them, which would wait for gradients that they do not have."""
    made: list[list[list[int]]] = []

    def new_groups(ranks: list[list[int]]) -> tuple[Any, None]:
        made.append(ranks)
        return "the group", None

    calls: Any = SimpleNamespace(get_world_size=lambda: 16, new_subgroups_by_enumeration=new_groups)
    calls.group = SimpleNamespace(WORLD=None)
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setattr(groups, "dist", calls)
    monkeypatch.setattr(groups, "_tied_groups", groups._tied_groups.__wrapped__)
    assert groups.tied_group(ParallelContext(pipeline_size=4, pipeline_group=calls, **TWO_BY_TWO)) == "the group"
    assert [sorted(ranks) for ranks in made] == [[[rank, rank + 12] for rank in range(4)]]


def test_deepspeed_is_told_the_place_of_this_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its norm counts on the first of the tensor-parallel ranks what all of them hold."""
    monkeypatch.setattr(groups, "groups_of", lambda parallel: SimpleNamespace(data=[1, 3]))
    unit = groups.ModelParallelUnit(
        ParallelContext(**(TWO_BY_TWO | {"data_rank": 0, "tensor_rank": 1, "data_size": 3}))
    )
    assert (unit.get_data_parallel_rank(), unit.get_data_parallel_world_size()) == (0, 3)
    assert (unit.get_model_parallel_rank(), unit.get_model_parallel_world_size()) == (1, 2)
    assert (unit.get_data_parallel_group(), unit.get_model_parallel_group()) == ([1, 3], [0, 1])
    other = groups.ModelParallelUnit(ParallelContext(**(TWO_BY_TWO | {"data_rank": 1, "tensor_rank": 0})))
    assert (other.get_data_parallel_rank(), other.get_model_parallel_rank()) == (1, 0)


def test_a_tied_weight_is_there_on_the_first_and_on_the_last_stage() -> None:
    tied, apart = (
        rank_bytes(one_billion("parallel.pipeline=2", f"model.tied_embedding={tied}"), 1) for tied in ("true", "false")
    )
    assert [entry.parameters for entry in tied] == [entry.parameters for entry in apart]


LAYOUTS = [
    Layout(tensor=2, pipeline=2, data=2),
    Layout(tensor=2, sequence=True, pipeline=2, data=2, expert=2, tied=True),
    Layout(tensor=2, sequence=True, data=4, expert=4, zero=2),
    Layout(data=8, zero=3, micro=1),
    Layout(data=8, zero=0, micro=1),
]


def held_bytes(rank: int, configs: list[Config]) -> list[tuple[int, int, int]]:
    """Of each engine on this rank: stage, bytes of weights and bytes of master weights and moments after a step."""
    from pretrain.data.progress import Progress

    found = []
    for config in configs:
        parallel = parallel_context(config)
        trainer = build_trainer(RunSetup(config, Sources.load(config), parallel, torch.device("cpu")), None)
        one_step(trainer, Progress(0, 0))
        engine, zero = trainer.engine, config.parallel.zero
        weights = sum(bytes_of(getattr(p, "ds_tensor", p)) for p in engine.module.parameters())
        inner: Any = getattr(engine.optimizer, "optimizer", engine.optimizer)
        optimizer = sum(
            bytes_of(value) for state in inner.state.values() for key, value in state.items() if key != "step"
        )
        if zero in (1, 2):  # the flat fp32 weights that Adam updates
            optimizer += sum(bytes_of(p) for group in inner.param_groups for p in group["params"])
        elif zero == 3:
            optimizer += sum(bytes_of(p) for p in engine.optimizer.fp32_partitioned_groups_flat)
        found.append((parallel.pipeline_rank, weights, optimizer))
        engine.destroy()
    return found


def bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_engines_hold_what_the_table_says(prepared: Path, precision: str) -> None:
    layouts = [x for x in LAYOUTS if precision == "fp32" or x.zero > 0]
    configs = [config_of(prepared, "switchall", layout, f"train.precision={precision}") for layout in layouts]
    ranks = run_ranks(held_bytes, 8, configs, timeout_seconds=600)
    for index, layout in enumerate(layouts):
        expected = rank_bytes(configs[index], layout.data)
        for rank, found in enumerate(ranks):
            stage, weights, optimizer = found[index]
            # DeepSpeed pads each flat partition, and at ZeRO 3 each parameter's share.
            slack = 4096 if layout.zero < 3 else 8192
            assert 0 <= weights - expected[stage].weights <= slack, f"{layout}, rank {rank}: weights"
            assert 0 <= optimizer - expected[stage].optimizer <= slack, f"{layout}, rank {rank}: optimizer"


@pytest.mark.slow
def test_groups_are_those_of_the_process_groups(prepared: Path) -> None:
    layouts = LAYOUTS[:3]
    configs = [config_of(prepared, "switchall", layout) for layout in layouts]
    ranks = run_ranks(own_groups, 8, configs)
    for index, layout in enumerate(layouts):
        expected = group_ranks(configs[index], layout.data)
        for rank, found in enumerate(ranks):
            assert found[index].keys() == expected.keys()
            for name, members in found[index].items():
                row = next(group for group in expected[name] if rank in group)
                assert members == row.tolist(), f"{layout}: {name} group of rank {rank}"


def own_groups(rank: int, configs: list[Config]) -> list[dict[str, list[int]]]:
    found = []
    for config in configs:
        parallel = parallel_context(config)
        own = {name: getattr(parallel, f"{name}_group") for name in ("pipeline", "data", "tensor", "expert")}
        found.append({name: dist.get_process_group_ranks(g) for name, g in own.items() if g is not None})
    dist.barrier()  # rank 0 keeps the store that others still make their groups with
    return found


def test_groups_as_text(prepared: Path) -> None:
    config = small_config(prepared, "parallel.tensor=2", "model.vocab_size=402", "model.feedforward.num_experts=6")
    found = group_ranks(config, 8)
    assert groups_text(found["tensor"]) == "0-1, 2-3, 4-5, 6-7, ... (8 groups)"
    assert groups_text(found["data"]) == "0-14 by 2, 1-15 by 2"
    assert groups_text(np.array([[0, 4], [1, 5]])) == "0,4, 1,5"
