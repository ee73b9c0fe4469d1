"""Runs a function on N forked gloo ranks in seconds: torch and deepspeed are imported once, in a fork server that never
computes (a process that has run OpenMP or autograd threads must not fork)."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

from common.ports import reserved_port

LIMIT_SECONDS = 900.0
"""Only what hangs takes so long: one busy core, as a shared machine may leave, needs ten times what two need."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.harness_preload"])


class RankFailed(AssertionError):
    """A rank raised, died or did not finish in time; holds the first rank's traceback."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = LIMIT_SECONDS
) -> list[Any]:
    """Calls `function(rank, *args)` on every rank inside a gloo process group; returns the results in rank order.

    `function` and its results must be picklable by reference (module level). Every rank runs with one thread. If one
    fails or the time is over, the others are killed and RankFailed shows what happened.
    """
    with reserved_port() as held:
        return _run_ranks(function, world_size, held.getsockname()[1], args, timeout_seconds)


def _run_ranks(
    function: Callable[..., Any], world_size: int, port: int, args: tuple[Any, ...], timeout_seconds: float
) -> list[Any]:
    ranks = []
    for rank in range(world_size):
        receiver, sender = _context.Pipe(duplex=False)
        process = _context.Process(
            target=_rank_main, args=(sender, function, rank, world_size, port, args), daemon=True
        )
        process.start()
        sender.close()
        ranks.append((process, receiver))
    deadline = time.monotonic() + timeout_seconds
    results: list[Any] = []
    try:
        for rank, (process, receiver) in enumerate(ranks):
            while not receiver.poll(0.2):
                _raise_if_failed(ranks)
                if time.monotonic() > deadline:
                    raise RankFailed(f"rank {rank} of {world_size} did not finish within {timeout_seconds:.0f} s")
            succeeded, value = _receive(receiver, rank)
            if not succeeded:
                raise RankFailed(f"rank {rank} of {world_size} failed:\n{value}")
            results.append(value)
            process.join(max(1.0, deadline - time.monotonic()))
        return results
    finally:
        for process, _ in ranks:
            if process.is_alive():
                process.kill()
            process.join()


@contextmanager
def forked(function: Callable[..., Any], *args: Any) -> Iterator[BaseProcess]:
    """`function(*args)` in a process of its own, outside of any group, that has torch imported already; at the end it
    is killed. What it returns is the exit code."""
    process = _context.Process(target=_leave_with, args=(function, args), daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _leave_with(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    raise SystemExit(function(*args))


def _raise_if_failed(ranks: list[tuple[Any, Any]]) -> None:
    for rank, (process, receiver) in enumerate(ranks):
        if process.exitcode not in (None, 0):
            value = _receive(receiver, rank)[1] if receiver.poll() else f"exit code {process.exitcode}"
            raise RankFailed(f"rank {rank} failed:\n{value}")


def _receive(receiver: Any, rank: int) -> tuple[bool, Any]:
    try:
        return pickle.loads(receiver.recv_bytes())
    except EOFError:
        return False, f"rank {rank} died without a word"


def _send(sender: Any, result: tuple[bool, Any]) -> None:
    # Plain pickle copies tensors; multiprocessing's own would leave them in shared memory of a process that exits.
    sender.send_bytes(pickle.dumps(result))


def _rank_main(sender: Any, function: Callable[..., Any], rank: int, world_size: int, port: int, args: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
    )
    code = 1
    try:
        import torch.distributed

        from pretrain.config.schema import TrainConfig
        from pretrain.device import start, stop
        from pretrain.ranks import Ranks

        start(Ranks.from_environment(), TrainConfig(threads=1))
        torch.distributed.barrier()  # rank 0 holds the store: if it ended at once, others could not join
        result = function(rank, *args)
        stop()
        _send(sender, (True, result))
        code = 0
    except BaseException:
        _send(sender, (False, traceback.format_exc()))
    finally:
        sender.close()
        os._exit(code)  # no exit handlers of libraries that were imported before the fork
