"""Ranks that are where a run becomes slow are warned of, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.parallel.placement import placement_warnings
from tests.pretrain.runs import small_config

TENSOR, BOTH = ("parallel.tensor=2",), ("parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2")


def machines(*names: str, each: int) -> list[str]:
    return [name for name in names for _ in range(each)]


@pytest.mark.parametrize(
    "overrides, hosts, said",
    [
        (TENSOR, machines("a", "b", each=4), []),
        (TENSOR, machines("a", "b", each=1), []),  # where else?
        (TENSOR, ["a", "b"] * 4, ["parallel.tensor: 4 of 4 groups of ranks are on several machines"]),
        (TENSOR, machines("a", "b", each=3), ["parallel.tensor: 1 of 3 groups"]),
        (BOTH, machines("a", "b", each=4), []),
        (BOTH, machines("a", "b", "c", "d", each=2), []),  # two tensor groups are 4 ranks
        (BOTH, ["a", *machines("b", "a", each=4)[:7]], ["parallel.tensor: 2 of 4", "parallel.expert: 2 of 4"]),
        ((), ["a", "b"] * 2, []),
    ],
)
def test_groups_that_could_be_on_one_machine(
    prepared: Path, overrides: tuple[str, ...], hosts: list[str], said: list[str]
) -> None:
    config = small_config(prepared, "model.feedforward.num_experts=6", "batch.micro_sequences=1", *overrides)
    config = config.replaced("batch", global_sequences=12)
    found = placement_warnings(config, hosts, [False] * len(hosts))
    assert len(found) == len(said), found
    assert all(one.startswith(words) for one, words in zip(found, said, strict=True)), found


def test_ranks_whose_cores_are_far_from_their_gpus_are_named(prepared: Path) -> None:
    (found,) = placement_warnings(small_config(prepared), ["a"] * 4, [False, True, False, True])
    assert found.startswith("2 of 4 ranks (1, 3) may run only on cores that are far from their GPUs")
    # A job has blocks already: with few cores a rank they are all of the first processor.
    assert "give each rank its share of all cores of its node (srun --cpus-per-task), in the order of the GPUs" in found
