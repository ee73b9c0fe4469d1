"""Silent corruption of a weight on one rank is found, named, and handled as configured."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from model.language_model import build_model, routing_statistics
from model.parallel.context import ParallelContext
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.resilience import replicas
from pretrain.resilience.replicas import Difference, ReplicaCheck, both_ways, checksum, suspect_node
from pretrain.trainer import Trainer
from tests.harness import run_ranks
from tests.pretrain.resilience.faults import before_steps, outcome, train_with
from tests.pretrain.runs import (
    assert_bit_identical,
    events,
    light_config,
    metrics,
    one_step,
    small_config,
    train_runs,
    trainer_of,
)

NAME, ONLY = "blocks.1.feedforward.down_experts", "blocks.0.feedforward.down_experts"
SIX = "model.feedforward.num_experts=6"


def test_extremes_are_those_of_the_ranks_that_hold_a_number_whatever_its_sign() -> None:
    """Rank 0 holds keys 0, 1 and 3, rank 1 keys 1, 2 and 3; they differ in the last."""
    low = torch.iinfo(torch.int64).min
    both = [
        both_ways(torch.tensor(own), torch.tensor(places), 4)
        for own, places in (([-5, 7, low + 1], [0, 1, 3]), ([7, -9, -2], [1, 2, 3]))
    ]
    largest = torch.maximum(*both)
    assert largest[:4].tolist() == [-5, 7, -9, -2] and (~largest[4:]).tolist() == [-5, 7, -9, low + 1]


def test_every_flipped_bit_changes_the_checksum() -> None:
    for dtype, integer, bits in ((torch.float32, torch.int32, 32), (torch.bfloat16, torch.int16, 16)):
        value = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
        seen = {int(checksum(value))}
        for element in range(value.numel()):
            for bit in range(bits):
                flipped = value.clone()
                flipped.view(-1).view(integer)[element] ^= -(2 ** (bits - 1)) if bit == bits - 1 else 2**bit
                seen.add(int(checksum(flipped)))
        assert len(seen) == 1 + value.numel() * bits
    assert int(checksum(torch.tensor([1.0, 2.0]))) != int(checksum(torch.tensor([2.0, 1.0])))
    assert int(checksum(torch.zeros(0))) == 0


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_the_checksum_is_that_of_its_definition_in_chunks_of_any_size(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of more than 4 million elements take several; no other test has such."""
    monkeypatch.setattr(replicas, "CHUNK", chunk)
    bits = torch.randint(-(2**31), 2**31, (5, 3), generator=torch.Generator().manual_seed(2)).int()
    expected = sum(number * (2 * place + 1) for place, number in enumerate(bits.flatten().tolist())) % 2**64
    assert int(checksum(bits.view(torch.float32))) % 2**64 == expected


def test_a_majority_names_the_culprit_and_two_ranks_only_differ() -> None:
    assert str(Difference("w", [[0], [1, 2, 3]])) == "w: rank 0 differs from ranks 1-3"
    assert str(Difference("w", [[0], [1]])) == "w: rank 0 differs from rank 1"
    most = [rank for rank in range(16_384) if rank != 4_711]
    assert str(Difference("w", [[4_711], most])) == "w: rank 4711 differs from ranks 0-4710, 4712-16383"
    halves = Difference("w", [list(range(0, 16_384, 2)), list(range(1, 16_384, 2))])
    assert len(str(halves)) < 200, "no alert of this length could be sent"


def test_a_node_is_suspect_if_a_majority_contradicts_its_ranks_alone() -> None:
    hosts = ["node1", "node1", "node2", "node2", "node3", "node3"]
    one, both = Difference("a", [[3], [0, 1, 2, 4, 5]]), Difference("b", [[2], [3], [0, 1, 4, 5]])
    assert suspect_node([one], hosts) == suspect_node([one, both], hosts) == "node2"
    elsewhere = Difference("c", [[0], [1, 2, 3, 4, 5]])
    assert suspect_node([one, elsewhere], hosts) is None
    # Two replicas, and halves, have no majority: they say nothing, also of a node that another tensor names.
    half = Difference("d", [[0, 1, 2], [3, 4, 5]])
    assert suspect_node([half, Difference("e", [[0], [4]])], hosts) is None
    assert suspect_node([half, one], hosts) == "node2"


def _flip(trainer: Trainer, name: str) -> bool:
    """Changes the lowest bit of one weight of this rank, if it holds it whole. Whether it did."""
    parameter = dict(trainer.engine.module.named_parameters()).get(name)
    if parameter is None or parameter.numel() == 0:
        return False
    with torch.no_grad():
        bits = parameter.data.view(-1).view(torch.int16 if parameter.element_size() == 2 else torch.int32)
        bits[3] ^= 1
    return True


ALONE = "rank 3 differs from ranks 0-2"
LAYOUTS = {
    ("parallel.zero=0",): f"{ONLY}: {ALONE}",
    ("parallel.zero=1", "train.precision=bf16"): f"{ONLY}: {ALONE}",
    ("parallel.zero=2",): f"{ONLY}: {ALONE}",
    ("parallel.zero=3",): f"{ONLY}: {ALONE}",  # all parameters of this model are small enough to stay whole
    ("parallel.tensor=2", SIX): f"{ONLY} (part 2 of 2): rank 1 differs from rank 3",
    ("parallel.pipeline=2", "model.num_layers=2"): f"{NAME}: rank 2 differs from rank 3",
    ("parallel.expert=2", SIX): f"{ONLY} (part 2 of 2): rank 1 differs from rank 3",
    ("parallel.expert=4", "model.feedforward.num_experts=8"): None,  # every expert on one rank
}
"""Layout -> what is said of the flipped weight of rank 3."""


def test_a_flipped_bit_is_found_wherever_there_is_a_replica(prepared: Path) -> None:
    configs = [light_config(prepared, *layout, ranks=4) for layout in LAYOUTS]
    for results in run_ranks(_flip_on_last_rank, 4, configs):
        for (layout, said), (before, after, statistic) in zip(LAYOUTS.items(), results, strict=True):
            assert before == [], layout
            assert after == ([] if said is None else [said]), layout
            assert len(statistic) == len(after) + 1, (layout, statistic)


def _flip_on_last_rank(rank: int, configs: list[Config]) -> list[tuple[list[str], list[str], list[str]]]:
    results = []
    for config in configs:
        trainer = trainer_of(config)
        check = ReplicaCheck(trainer.engine, trainer.setup.parallel, dist.group.WORLD)
        everybody: list[list[str]] = [[]] * 4
        dist.all_gather_object(everybody, check.own_keys)
        others = {key for other, keys in enumerate(everybody) if other != rank for key in keys}
        assert len(others & set(check.own_keys)) > 10
        assert check._keys == sorted(others | set(check.own_keys)), "another order than that of other ranks"
        one_step(trainer, Progress(0, 0))
        before = [str(difference) for difference in check()]
        if rank == 3:
            assert _flip(trainer, f"blocks.{config.model.num_layers - 1}.feedforward.down_experts")
        after = [str(difference) for difference in check()]
        if rank == 3:
            tracking = [s for _, s in routing_statistics(trainer.engine.module) if s.tracks_probability]
            tracking[0].probability[-1] += 1e-9
        results.append((before, after, [str(difference) for difference in check()]))
        trainer.engine.destroy()
    return results


def test_of_parameters_that_zero_3_divides_those_that_stay_whole_alone_are_compared(prepared: Path) -> None:
    model = build_model(small_config(prepared).model, seed=1)
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_persist = number % 2 == 0  # type: ignore[attr-defined]
    names = [name for name, _ in model.named_parameters()]
    for stage, compared in ((2, names), (3, names[::2])):
        engine = SimpleNamespace(module=model, zero_optimization_stage=lambda stage=stage: stage)
        keys = ReplicaCheck(engine, ParallelContext(), None).own_keys
        assert [key for key in keys if not key.startswith("routing ")] == compared


def test_a_rank_without_a_replica_compares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO 3 may divide all parameters of a model without routers."""
    monkeypatch.setattr(replicas, "maximum", lambda values, group: values)
    check = ReplicaCheck.__new__(ReplicaCheck)
    nowhere = torch.zeros(0, dtype=torch.int64)
    vars(check).update(_tensors=lambda: iter(()), _places=nowhere, _keys=[], _group=None)
    assert check() == []


def flip_once(trainer: Trainer, step: int, marker: Path) -> None:
    """One bit of a weight of rank 1 changes when `step` begins, the first time that it does."""

    def flip(now: int) -> None:
        if now == step and dist.get_rank() == 1 and not marker.exists():
            marker.touch()
            assert _flip(trainer, ONLY)

    before_steps(trainer, flip)


def test_a_mismatch_stops_or_is_rolled_back_as_configured(prepared: Path, tmp_path: Path) -> None:
    """ZeRO 0: the flipped weight stays wrong on its rank for good, and is found before it is saved."""
    keys = ("train.steps=6", "evaluate.sequences=0", "checkpoint.every_steps=2", "parallel.zero=0")
    stop = light_config(prepared, *keys, ranks=2)
    endings = run_ranks(train_with, 2, stop, tmp_path / "stop", flip_once, 3, tmp_path / "flipped-1")
    assert all(ending.startswith(f"REPLICAS_DIFFER: replicas differ after step 4: {ONLY}") for ending in endings)
    assert all("memory of those machines" in ending and "the layer of that parameter" in ending for ending in endings)
    assert all(ending.endswith("checkpoint is that of step 2: the same command goes on from it") for ending in endings)
    assert outcome(tmp_path / "stop")["exit_code"] == 4 and "node" not in outcome(tmp_path / "stop")
    assert [p.name for p in (tmp_path / "stop" / "checkpoints").iterdir()] == ["step-00000002"]

    back = light_config(prepared, *keys, "resilience.replica_action=rollback", ranks=2)
    assert run_ranks(train_with, 2, back, tmp_path / "back", flip_once, 3, tmp_path / "flipped-2") == ["FINISHED"] * 2
    (rollback,) = events(tmp_path / "back", "rollback")
    assert rollback["skipped"] is None
    run_ranks(train_runs, 2, [(back, tmp_path / "unbroken")])
    assert_bit_identical(tmp_path / "back", tmp_path / "unbroken")
    assert [row["step"] for row in metrics(tmp_path / "back")] == [1, 2, 3, 4, 5, 6]


def test_a_node_that_two_others_contradict_is_named_for_the_job(prepared: Path, tmp_path: Path) -> None:
    keys = (
        "train.steps=4",
        "batch.micro_sequences=2",
        "evaluate.sequences=0",
        "checkpoint.every_steps=2",
        "parallel.zero=0",
    )
    config = light_config(prepared, *keys)
    config = config.replaced("batch", global_sequences=6)
    endings = run_ranks(_train_on_three_nodes, 3, config, tmp_path / "run", tmp_path / "flipped")
    assert all("Check the memory of node1, whose ranks alone differ from the majority" in ending for ending in endings)
    assert outcome(tmp_path / "run")["node"] == events(tmp_path / "run", "replicas_differ")[0]["node"] == "node1"


def _train_on_three_nodes(rank: int, config: Config, run_dir: Path, marker: Path) -> str:
    """Each rank is a task of srun on a node of its own."""
    os.environ |= {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "3", "SLURMD_NODENAME": f"node{rank}"}
    return train_with(rank, config, run_dir, flip_once, 2, marker)
