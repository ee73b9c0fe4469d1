"""Many ranks: gloo connects those that speak to each other, and a process may open as many files as that takes."""

from __future__ import annotations

import os
import resource

import pytest

from common.errors import UserError
from common.open_files import allow_open_files
from pretrain import device
from pretrain.data.sources import open_shards_each


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The limits of open files, the newest last, of a process that begins with 1,024 of 8,192."""
    found = [(1024, 8192)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: found[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: found.append(limits))
    monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", "")
    monkeypatch.delenv("TORCH_GLOO_LAZY_INIT")
    open_shards_each.cache_clear()
    return found


def test_few_ranks_change_nothing(limits: list[tuple[int, int]]) -> None:
    device._prepare_connections(64)
    assert len(limits) == 1 and "TORCH_GLOO_LAZY_INIT" not in os.environ


def test_between_gpus_a_process_may_open_the_sockets_of_nccl(limits: list[tuple[int, int]]) -> None:
    device._prepare_connections(2, by_nccl=True)
    assert limits[-1] == (8192, 8192), "no more than the machine lets it, and nothing is refused"
    limits.append((1024, 1 << 20))
    device._prepare_connections(1, by_nccl=True)
    assert limits[-1] == (1024, 1 << 20), "alone"
    device._prepare_connections(128, by_nccl=True)
    assert limits[-1] == (16_384, 1 << 20)


def test_many_ranks_connect_when_they_speak_and_may_open_a_socket_for_each(limits: list[tuple[int, int]]) -> None:
    device._prepare_connections(1024)
    assert limits[-1] == (3072, 8192) and os.environ["TORCH_GLOO_LAZY_INIT"] == "1"


def test_a_limit_that_is_too_low_is_refused_with_the_number(limits: list[tuple[int, int]]) -> None:
    with pytest.raises(UserError, match=r"ulimit -n: 16384 ranks need 33792 open files in a process.* allows 8192; "):
        device._prepare_connections(16384)
    limits.append((1024, resource.RLIM_INFINITY))
    device._prepare_connections(16384)
    assert limits[-1] == (33792, resource.RLIM_INFINITY)


@pytest.mark.parametrize(
    "hard, sources, expected",
    [(1024, 1, 128), (1024, 2, 128), (1024, 8, 32), (1024, 600, 1), (4096, 8, 128), (8192, 40, 89), (-1, 40, 128)],
)
def test_many_sources_keep_no_more_shards_open_than_there_are_descriptors(
    limits: list[tuple[int, int]], hard: int, sources: int, expected: int
) -> None:
    """Of two splits; the limit rises where the machine lets it, and as much as before is left to sockets and others."""
    limits[-1] = (1024, hard)
    assert [open_shards_each(sources) for _ in range(3)] == [expected] * 3, "also after a rollback"
    assert 2 * sources * expected <= max(512, allow_open_files(0) - 1024) or expected == 1
    open_shards_each.cache_clear()
