"""Whole training steps of our loop on 1, 2 and more ranks, with the same micro-batch for each rank (weak scaling).

The ranks of every group are started once and then wait for their turn, which costs no processor time. A rank computes
with one thread.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.loop.loops import our_loop
from benchmarks.loop.speed import WARM_UP_STEPS, Piece, timed
from benchmarks.rounds import orders
from common.errors import UserError
from common.ports import free_port
from pretrain import device as devices
from pretrain.config.loading import load_config
from pretrain.config.rules import check_ranks
from pretrain.config.schema import Config
from pretrain.data.sources import open_sources
from pretrain.planning.links import sent_bytes
from pretrain.planning.rehearsed_traffic import rehearsed_collectives
from pretrain.ranks import Ranks

SETTINGS = (
    "train.device=cpu",
    "train.precision=fp32",
    "train.threads=1",
    "data.max_tokens=null",
    "evaluate.sequences=0",
    "monitor.details_every_steps=0",
    "checkpoint.every_steps=1000000",
    "resilience.hang_timeout_seconds=0",
    "train.steps=1000000",
)
"""Nothing happens between two steps, and a rank may wait for its turn for as long as it takes."""
LIMIT_SECONDS = 600.0
"""What takes longer hangs."""


def config_for(path: Path, overrides: Sequence[str], ranks: int) -> Config:
    """`path` for so many ranks, one micro-step of batch.micro_sequences on each. Its data are there. Raises
    UserError."""
    micro = load_config(path, [*SETTINGS, *overrides]).batch.micro_sequences
    config = load_config(path, [*SETTINGS, *overrides, f"batch.global_sequences={ranks * micro}"])
    check_ranks(config, ranks)
    open_sources(config).check("size")
    return config


def sent_by_a_rank(config: Config, ranks: int) -> int:
    """Bytes of a step, by the collectives that a rehearsed step calls; rings."""
    if ranks == 1:
        return 0
    calls = rehearsed_collectives(config, ranks, 0, "cpu")
    return round(sum(call.count * sent_bytes(call.kind, call.ranks, call.num_bytes) for call in calls))


def measured(configs: dict[int, Config], *, rounds: int, steps: int) -> list[dict[str, Any]]:
    """For each number of ranks: `ranks`; of each round the seconds of a step that passed on the slowest rank
    (`passed`), and those of a processor on a rank, on average (`worked`); `sent`, counted. Raises UserError if a rank
    fails."""
    pieces: dict[int, list[list[Piece]]] = {ranks: [] for ranks in configs}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        groups = {n: stack.enter_context(group(config, n, folder / str(n))) for n, config in configs.items()}
        for ranks in orders(list(groups), rounds):
            pieces[ranks].append(groups[ranks](steps))
    return [
        {
            "ranks": ranks,
            "passed": [max(piece.passed for piece in turn) / steps for turn in turns],
            "worked": [sum(piece.worked for piece in turn) / ranks / steps for turn in turns],
            "sent": sent_by_a_rank(configs[ranks], ranks),
        }
        for ranks, turns in pieces.items()
    ]


@contextlib.contextmanager
def group(config: Config, ranks: int, folder: Path) -> Iterator[Callable[[int], list[Piece]]]:
    """Processes that are ready to train. The function trains so many steps and returns a piece for each rank."""
    folder.mkdir(parents=True)
    port = free_port()
    context = multiprocessing.get_context("spawn")  # this process may have computed with threads: it must not fork
    members = []
    try:
        for rank in range(ranks):
            own, other = context.Pipe()
            arguments = (Ranks(rank, rank, ranks, ranks), port, config, folder, other)
            process = context.Process(target=rank_main, args=arguments, daemon=True)
            process.start()
            other.close()
            members.append((process, own))
        _answers(members, folder)

        def train(steps: int) -> list[Piece]:
            for _, connection in members:
                connection.send(steps)
            return _answers(members, folder)

        yield train
        for _, connection in members:
            connection.send(0)
        for process, _ in members:
            process.join(LIMIT_SECONDS)
    finally:
        for process, _ in members:
            if process.is_alive():
                process.kill()
            process.join()


def _answers(members: Sequence[tuple[Any, Connection]], folder: Path) -> list[Any]:
    """One of each rank, in their order."""
    deadline, found = time.monotonic() + LIMIT_SECONDS, []
    for _, connection in members:
        while not connection.poll(0.2):
            if time.monotonic() > deadline or any(process.exitcode is not None for process, _ in members):
                raise _failure(members, folder)
        try:
            found.append(connection.recv())
        except EOFError:
            raise _failure(members, folder) from None
    return found


def _failure(members: Sequence[tuple[Any, Connection]], folder: Path) -> UserError:
    """Of the rank that has ended, or of the first one if all hang."""
    time.sleep(0.2)  # the pipe of an ended process closes before its exit code is known
    ended = [rank for rank, (process, _) in enumerate(members) if process.exitcode is not None]
    rank = (ended or [0])[0]
    said = log_of(folder, rank).read_text(encoding="utf-8", errors="replace")[-2000:]
    return UserError(f"ranks: rank {rank} of {len(members)} does not train; the end of what it said:\n{said}")


def log_of(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.log"


def rank_main(ranks: Ranks, port: int, config: Config, folder: Path, connection: Connection) -> None:
    """The process of one rank: answers every number of steps with the piece that it took, until that is 0."""
    with log_of(folder, ranks.rank).open("wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    # A launcher's variables of the process that measures are none of this group.
    place = {"RANK": ranks.rank, "LOCAL_RANK": ranks.local_rank, "WORLD_SIZE": ranks.world_size}
    place |= {"LOCAL_SIZE": ranks.local_size, "LOCAL_WORLD_SIZE": ranks.local_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    device = devices.start(ranks, config.train, timeout_seconds=LIMIT_SECONDS)
    with our_loop(config, folder / "run", device) as loop:
        loop.train(WARM_UP_STEPS)
        connection.send(None)
        while steps := connection.recv():
            connection.send(timed(loop, steps))
    devices.stop()
