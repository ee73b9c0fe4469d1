"""Tasks on threads: each once, errors reach the caller, thread counts come back, a forked child has its own workers."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch

from model.kernels.cpu import workers
from model.kernels.cpu.workers import run_blocks, run_tasks, scratch


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("sizes", [[], [0, 0], [5], [1, 0, 7, 3, 3], [1] * 50, [100, 1]])
def test_every_task_with_rows_runs_once(sizes: list[int]) -> None:
    done: list[int] = []
    run_tasks(sizes, done.append)
    assert sorted(done) == [i for i, size in enumerate(sizes) if size > 0]
    assert torch.get_num_threads() == 3


def test_balanced_tasks_have_one_thread_each_and_a_lone_one_has_all() -> None:
    seen: dict[str, set[int]] = {"balanced": set(), "lone": set()}
    run_tasks([1] * 12, lambda i: seen["balanced"].add(torch.get_num_threads()))
    run_tasks([100, 1], lambda i: seen["lone"].add(torch.get_num_threads()))
    assert seen == {"balanced": {1}, "lone": {3}}


def test_tasks_run_at_the_same_time() -> None:
    barrier = threading.Barrier(3, timeout=30)

    def meet(task: int) -> None:
        barrier.wait()

    run_tasks([1, 1, 1], meet)


@pytest.mark.parametrize("failing", [0, 4])
def test_error_reaches_the_caller(failing: int) -> None:
    def task(i: int) -> None:
        if i == failing:
            raise RuntimeError(f"task {i}")

    with pytest.raises(RuntimeError, match=f"task {failing}"):
        run_tasks([9, 1, 1, 1, 9], task)
    assert torch.get_num_threads() == 3


def test_no_gradient_is_recorded_in_tasks() -> None:
    weight = torch.ones(3, requires_grad=True)
    recorded: list[bool] = []
    for sizes in ([1] * 6, [6]):
        run_tasks(sizes, lambda i: recorded.append((weight * 2).requires_grad))
    assert recorded == [False] * 7


@pytest.mark.parametrize("num_tokens", [0, 1, 1024, 1025, 3000])
def test_blocks_cover_every_token_once(num_tokens: int) -> None:
    count = torch.zeros(num_tokens, dtype=torch.int64)

    def task(block: slice) -> None:
        count[block] += 1

    run_blocks(num_tokens, task)
    assert torch.equal(count, torch.ones_like(count))


def test_scratch_is_kept_per_name_dtype_and_thread() -> None:
    first = scratch("test", (4, 8), torch.float32)
    assert scratch("test", (2, 3), torch.float32).data_ptr() == first.data_ptr()
    assert scratch("test", (2, 3), torch.float64).data_ptr() != first.data_ptr()
    assert scratch("test other", (4, 8), torch.float32).data_ptr() != first.data_ptr()
    pointers: list[int] = []
    thread = threading.Thread(target=lambda: pointers.append(scratch("test", (4, 8), torch.float32).data_ptr()))
    thread.start()
    thread.join()
    assert pointers != [first.data_ptr()]


def test_forked_child_starts_its_own_workers() -> None:
    run_tasks([1] * 6, lambda i: None)
    assert workers._pool is not None
    child = os.fork()
    if child == 0:
        done: list[int] = []
        run_tasks([1] * 6, done.append)
        os._exit(0 if sorted(done) == list(range(6)) else 1)
    assert os.waitpid(child, 0)[1] == 0
