"""When checkpoints are written: at once, or in the background while training goes on.

In the background, `save` copies this rank's state into a host buffer, which is kept for the next save, and returns; a
thread writes, flushes, hashes and commits it. Its collectives use a gloo group of their own, so they never meet those
of training. A save that fails leaves the earlier checkpoints as they were, and the next save tries again: at the end of
the run, where none follows, the same one, if the error may pass. Two failures in a row, or one at the end of the run,
end the run with the reason.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from common.errors import PassingError, UserError, kind_of
from model.parallel.context import ParallelContext
from pretrain.checkpoint.folder import Retention, list_checkpoints, remove_partials
from pretrain.checkpoint.fragments import Chunk, Fragments
from pretrain.checkpoint.state import State, constants, described, owned_state
from pretrain.data.progress import Progress
from pretrain.device import host_buffer, synchronize
from pretrain.parallel.agreement import PeerFailed

if TYPE_CHECKING:  # they import DCP: see `prepare`
    from pretrain.checkpoint.planners import AgreedPlan
    from pretrain.checkpoint.storage import Writer

THREAD_NAME = "checkpoint"
FAILURES_IN_A_ROW = 2
"""A full disk may be cleared before the next save; a run whose second save fails too would compute what is lost."""
ALIGNMENT = 64


@dataclass(frozen=True)
class Outcome:
    """The result of a save, which `report` gets on rank 0."""

    step: int
    path: Path
    error: str | None
    """Why it failed, None if it is committed."""
    bytes: int
    """Bytes of its files."""
    stall_seconds: float
    """How long training stood still."""
    seconds: float
    """Time from the call to the commit."""


class Saver:
    """Writes the checkpoints of one engine. Every method is collective unless it says otherwise."""

    def __init__(
        self,
        engine: Any,
        parallel: ParallelContext,
        device: torch.device,
        *,
        asynchronous: bool,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        """`alive` is called while training waits for a save that makes progress, however slowly."""
        self._alive = alive
        self._writer: Writer | None = None
        self._engine, self._parallel, self._device = engine, parallel, device
        self._asynchronous = asynchronous
        self._constants = constants(engine, parallel)
        self._group = _own_group(dist.group.WORLD)
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._plan: AgreedPlan | None = None
        self._thread: threading.Thread | None = None
        self._crash: BaseException | None = None
        self._errors: list[UserError] = []
        """Why the last saves in a row failed."""
        self._saved: Progress | None = None
        if asynchronous:  # touching memory for the first time takes longer than the copy (17 times, measured)
            self._reserve(_layout_in_buffer(owned_state(engine, parallel))[1])

    @staticmethod
    def prepare() -> None:
        """Imports what a save needs, DCP above all, in two seconds. Not collective. For after the first step, which so
        comes earlier, and not later: in a long run a save would read code that was replaced on the disk meanwhile."""
        import pretrain.checkpoint.planners
        import pretrain.checkpoint.storage  # noqa: F401

    def save(
        self,
        folder: Path,
        progress: Progress,
        *,
        extra: dict[str, Any],
        retention: Retention,
        before: Callable[[], None] = lambda: None,
        report: Callable[[Outcome], None] = lambda outcome: None,
    ) -> None:
        """Saves the current state to folder/step-N. `extra`, which has the step's `loss` and `validation_loss` (or
        None), is added to state.json. First waits for a save under way; does not save the same step twice in a row.
        Rank 0, in any thread, calls `before` first (if that raises OSError, the save has failed) and `report` when the
        save has ended. Raises UserError (PeerFailed on the other ranks) as the module's docstring says, a PassingError
        if the newest error may pass."""
        started = time.perf_counter()
        from pretrain.checkpoint.planners import AgreedPlan
        from pretrain.checkpoint.storage import Writer

        self.wait()
        if self._saved == progress:
            return
        self._saved = progress
        state = owned_state(self._engine, self._parallel)
        description = {**self._constants, **described(self._engine, progress), **extra}
        plan = self._plan = self._plan or AgreedPlan()
        writer = self._writer = Writer(folder / f"step-{progress.step:08d}", description, before)

        def work(state: State, stall_seconds: float | None) -> None:
            error = self._write(state, writer, plan)
            self._errors = [] if error is None else [*self._errors, error]
            if dist.get_rank() == 0:
                if error is None:
                    _remove_old(folder, retention)
                seconds = time.perf_counter() - started
                stall = seconds if stall_seconds is None else stall_seconds
                said = None if error is None else str(error)
                report(Outcome(progress.step, writer.final, said, writer.bytes, stall, seconds))

        if self._asynchronous:
            state = self._copied(state)
            stall_seconds = time.perf_counter() - started
            self._thread = threading.Thread(
                target=self._guarded, args=(work, state, stall_seconds), name=THREAD_NAME, daemon=True
            )
            self._thread.start()
        else:
            work(state, None)
            self._raise_if(len(self._errors) >= FAILURES_IN_A_ROW)

    @property
    def is_writing(self) -> bool:
        """Whether a save is under way on this rank. Not collective."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Returns when no save is under way. Raises UserError (PeerFailed on the others) after failures in a row."""
        if self._thread is not None:
            self._join(self._thread)
            self._thread = None
        if self._crash is not None:
            crash, self._crash = self._crash, None
            raise crash
        self._raise_if(len(self._errors) >= FAILURES_IN_A_ROW)

    def _join(self, thread: threading.Thread) -> None:
        written = None
        while thread.is_alive():
            if self._writer is not None and self._writer.written != written:
                written = self._writer.written
                self._alive()
            thread.join(timeout=1.0)

    def settle(self) -> None:
        """Returns when this rank has no save under way, whatever became of the last one. Not collective."""
        if self._thread is not None:
            self._join(self._thread)

    def should_try_again(self) -> bool:
        """`wait`; whether the last save has failed for a reason that may have passed by now."""
        self.wait()
        return bool(self._errors) and isinstance(self._errors[-1], PassingError)

    def finish(self) -> None:
        """`wait`, and the last save must have succeeded."""
        self.wait()
        self._raise_if(bool(self._errors))

    def _guarded(self, work: Callable[[State, float | None], None], state: State, stall_seconds: float) -> None:
        try:
            work(state, stall_seconds)
        except BaseException as error:  # a lost peer, or a mistake of ours: raised by the next `wait`
            self._crash = error

    def _write(self, state: State, writer: Writer, plan: AgreedPlan) -> UserError | None:
        """Returns, the same on every rank, why the checkpoint could not be written; None if it is committed. An error
        that stays goes before one that may pass."""
        import torch.distributed.checkpoint as dcp

        from pretrain.checkpoint.planners import SavePlanner

        try:
            dcp.save(state, storage_writer=writer, planner=SavePlanner(plan), process_group=self._group)
        except dcp.CheckpointException as failure:
            if not all(isinstance(error, UserError | OSError) for error, _ in failure.failures.values()):
                raise
            kinds = [(kind_of(error) is PassingError, rank) for rank, (error, _) in failure.failures.items()]
            may_pass, rank = min(kinds)
            error, _ = failure.failures[rank]
            if dist.get_rank() == 0:
                _clear(writer.partial.parent)
            self._saved = None
            self._plan = None  # the first rank may have agreed on one that the others have not heard of
            stands = _stands(writer.partial.parent)
            kind = PassingError if may_pass else UserError
            return kind(f"checkpoint.every_steps: rank {rank} could not save {error}; {stands}")
        return None

    def _raise_if(self, condition: bool) -> None:
        if condition:
            error, self._errors = self._errors[-1], []
            if dist.get_rank() > 0:
                raise PeerFailed(kind_of(error))
            if isinstance(error, PassingError):
                raise PassingError(f"{error}. This may pass; if it stays, look after the file system")
            raise UserError(f"{error}. When the disk takes files again, the same command continues")

    def _copied(self, state: State) -> State:
        """`state` in the host buffer."""
        places, size = _layout_in_buffer(state)
        self._reserve(size)
        copied: State = {}
        for name, fragments in state.items():
            chunks = []
            for offsets, values in fragments.chunks.items():
                start = places[name, offsets]
                target = self._buffer[start : start + values.nbytes].view(values.dtype).view(values.shape)
                chunks.append(Chunk(tuple(offsets), target.copy_(values, non_blocking=True)))
            copied[name] = Fragments(fragments.shape, chunks)
        synchronize(self._device)
        return copied

    def _reserve(self, size: int) -> None:
        if self._buffer.numel() < size:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # first: a memory of text has grown, and two are too much
            self._buffer = host_buffer(size, self._device)


def _layout_in_buffer(state: State) -> tuple[dict[tuple[str, torch.Size], int], int]:
    """Where each chunk lies in the host buffer, bytes, and the size of the buffer."""
    places, end = {}, 0
    for name, fragments in state.items():
        for offsets, values in fragments.chunks.items():
            places[name, offsets] = end
            end += -(-values.nbytes // ALIGNMENT) * ALIGNMENT
    return places, end


@contextlib.contextmanager
def drained() -> Iterator[None]:
    """On exit, waits for this process's saves, however training ended: their collectives need the process group, and
    their files need the lock of the run folder. If another rank has died, a save fails at once."""
    try:
        yield
    finally:
        for thread in threading.enumerate():
            if thread.name == THREAD_NAME:
                thread.join()


@functools.cache
def _own_group(world: Any) -> Any:
    """A gloo group of all ranks, made once for a world. The slowest file system decides how long a rank may wait for
    the others' files."""
    return dist.new_group(backend="gloo", timeout=timedelta(hours=2), group_desc="saver")


def _stands(folder: Path) -> str:
    """What a save that failed leaves; raises nothing, for the ranks count failures alike."""
    try:
        newest = list_checkpoints(folder)[-1:]
    except UserError as error:
        return f"which checkpoints there are is not known ({error})"
    return f"the newest checkpoint is {newest[0]}" if newest else "there is no checkpoint yet"


def _clear(folder: Path) -> None:
    try:
        remove_partials(folder)
    except OSError as error:
        print(f"warning: {folder}: what a failed save left cannot be removed: {error}", file=sys.stderr, flush=True)


def _remove_old(folder: Path, retention: Retention) -> None:
    """Removes what `retention` does not keep. A checkpoint that cannot be removed does not end the run."""
    try:
        retention.apply(folder)
    except (OSError, UserError) as error:
        print(f"warning: {folder}: an old checkpoint cannot be removed: {error}", file=sys.stderr, flush=True)
