"""What signals, and the death of the launcher, ask of this process. Imports nothing slow: installed first of all.

SIGTERM, SIGUSR1, SIGINT and SIGHUP ask for a stop. A C-level handler writes the number to a pipe and a thread acts on
it, so that a second signal works although the main thread waits inside a collective:

    before the run is known        leave as soon as it is, so that the run folder says so; at once if that takes long
    before the ranks have met      leave at once, there is nothing to lose
    start-up                       leave at the next agreed moment (`Stop.requested`), at once if none comes in time
    training                       stop after a step that all ranks agree on, see control.py
    ending                         nothing: the exit code is decided

A second signal ends the process at once. It counts only some seconds after the first: DeepSpeed's launcher and SLURM
both send SIGTERM to every rank, and a terminal sends SIGINT to the whole job.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import NoReturn, TextIO

from common.run_lock import stat_fields
from common.slurm import is_task_of_many
from pretrain.ranks import Ranks
from pretrain.report.exit_codes import ExitCode

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
IGNORABLE = (signal.SIGINT, signal.SIGHUP)
"""Left alone if they are ignored already, as under nohup. The others are taken over even then: a script uses `trap ''
USR1` to protect the launchers, which do not handle USR1, and this process inherits that."""
PARENT_DIED = getattr(signal, "SIGRTMIN", 34) + 5
"""Sent by the kernel when the launcher has died."""
SECOND_SIGNAL_SECONDS = 5.0
"""A signal that follows the first within this time is the same request, sent by another process."""
START_UP_SECONDS = 20.0
"""How long a stop may wait for an agreed moment during start-up. DeepSpeed's launcher kills 30 s after SIGTERM."""
PEER_SECONDS = 3.0
"""How long the main thread has to report by itself that another rank has died, before the process is ended."""
LEAVE_SECONDS = 10.0
"""How long leaving at once may take: the file system may be what hangs."""
ASIDE_SECONDS = 30.0
"""How long a rank waits for the first one of its node to say what all of them have found."""
STANDING_SECONDS = 2.0
"""How long a process that ends at once looks for what it leaves: the file system may be what hangs."""
LOOK_SECONDS = 0.5
"""How often parent and grandparent are looked at."""
LAUNCHER_SECONDS = 2.0
"""How long a stop signal may come after the launcher's death and still be of the same request: SLURM signals the
processes of a job one after the other, and a busy node may run this one late."""


def heard_signals() -> list[signal.Signals]:
    """The stop signals that a process takes over."""
    return [n for n in STOP_SIGNALS if n not in IGNORABLE or signal.getsignal(n) is not signal.SIG_IGN]


class ProcessState(Enum):
    """How far a process is, which decides what a stop does."""

    LOADING = "before the run is known"
    JOINING = "before the ranks have met"
    STARTING = "start-up"
    TRAINING = "training"
    ENDING = "ending"


class Stop:
    """A request to stop, as this rank knows it. Without `install` nothing ever asks for one."""

    def __init__(self) -> None:
        self.state = ProcessState.JOINING
        self.before_leaving: list[Callable[[ExitCode, str], None]] = []
        """Called with code and message when the process is left at once (not by SIGKILL)."""
        self.peer_is_dead: Callable[[], bool] = lambda: False
        """Whether a rank of this machine has died. Set once the ranks have met."""
        self.standing: Callable[[], str] = lambda: "Nothing was trained"
        """Says from which checkpoint the run can go on, a sentence without its stop. Set once the ranks have met."""
        self._reason: str | None = None
        self._asked = 0.0
        self._changing = threading.Lock()
        """Of `state` and `_reason`, by two threads."""
        self._installed = False
        self._parent = -1
        self._runner: int | None = None

    @property
    def requested(self) -> str | None:
        """What asked this rank to stop, e.g. `SIGTERM`; None if nothing did. Other ranks may not know of it."""
        return self._reason

    @property
    def launcher_ends_others(self) -> bool:
        """Whether a launcher started this process that ends the other ranks of the node once one has left, and leaves
        with that one's code. DeepSpeed's does; of two that it finds ended at once it takes any."""
        return self._parent >= 0 and not is_task_of_many(os.environ)

    def install(self, *, launched: bool) -> None:
        """Takes over the stop signals; main thread only. `launched`: this process is to end with its launcher."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)  # first: what a handler alone gets is heard by nobody
        taken = heard_signals()
        for number in (*taken, PARENT_DIED) if launched else taken:
            signal.signal(number, lambda *_: None)  # the work is done by the thread, from the pipe
        if launched:
            _signal_on_parent_death(PARENT_DIED)
            self._parent = os.getppid()
            self._runner = _deepspeed_runner(self._parent)
            if os.getppid() != self._parent or _launcher_is_gone():
                os._exit(ExitCode.INTERRUPTED)
        self._installed = True
        threading.Thread(target=self._serve, args=(read,), name="signals", daemon=True).start()

    def enter(self, state: ProcessState) -> None:
        """Called by the main thread when it reaches `state`."""
        with self._changing:
            self.state, reason = state, self._reason
        if state is ProcessState.JOINING and reason is not None:  # asked while the process was loading
            self._leave_untrained(reason)
        if state is ProcessState.ENDING and self._installed:
            for number in STOP_SIGNALS:  # DeepSpeed's launcher sends SIGTERM to the others as soon as one rank has left
                signal.signal(number, signal.SIG_IGN)

    def say_refusal(
        self, error: Exception, ranks: Ranks, *, prefix: str = "error: ", stream: TextIO | None = None
    ) -> bool:
        """Prints on `stream` (stderr) why this rank refuses the run before the ranks have met. Most often all of a node
        have found it, and the first of them says it; one that alone has found it, such as a GPU that is gone, says it
        with its number. Returns whether it has found it alone; under srun nobody knows."""
        stream = sys.stderr if stream is None else stream
        if ranks.local_rank == 0:
            print(f"{prefix}{error}", file=stream, flush=True)
            return False
        is_alone = self.step_aside()
        if is_alone:
            print(f"{prefix}rank {ranks.rank}: {error}", file=stream, flush=True)
        return is_alone and not is_task_of_many(os.environ)

    def step_aside(self) -> bool:
        """Called if the ranks have not met and this one, which is not the first of its node, refuses the run. Returns
        whether it shall say why.

        The first has most often found the same. Launchers end all other ranks when one has left, so the rank that says
        why must leave first; this one waits silently to be ended. If nothing ends it, it alone has found the fault.
        Under srun nothing does, and each task may have a log of its own: all of them say it."""
        if is_task_of_many(os.environ):
            return True
        if not self._installed:
            return False
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        time.sleep(ASIDE_SECONDS)
        return True

    def what_stands(self) -> str:
        """What `standing` says, for a process that ends now, from any thread; that it is not known, if the file system
        does not answer soon."""
        said: list[str] = []
        asking = threading.Thread(target=lambda: said.append(self.standing()), name="standing", daemon=True)
        asking.start()
        asking.join(STANDING_SECONDS)
        return said[0] if said else "Its checkpoints cannot be read now"

    def leave(self, code: ExitCode, message: str, reason: str = "") -> NoReturn:
        """Ends the process at once, from any thread; an empty message is not written. `reason`: what the outcome says,
        where that is more than the message of one rank."""
        late = threading.Timer(LEAVE_SECONDS, os._exit, (code,))
        late.daemon = True
        late.start()
        with contextlib.suppress(OSError):
            os.write(2, f"{message}\n".encode() if message else b"")
        for function in self.before_leaving:
            with contextlib.suppress(Exception):
                function(code, reason or message.removeprefix("error: "))
        os._exit(code)

    def _serve(self, pipe: int) -> None:
        while True:
            self._hear(pipe, LOOK_SECONDS)
            self._look_at_launcher(pipe)
            self._look_at_peers()
            late = self._reason is not None and time.monotonic() - self._asked > START_UP_SECONDS
            if self.state in (ProcessState.LOADING, ProcessState.STARTING) and late:
                self.leave(ExitCode.STOPPED, f"{self._reason} during start-up: nothing was trained")

    def _hear(self, pipe: int, seconds: float) -> None:
        """Acts on the signals in the pipe, and waits so long for one."""
        ready, _, _ = select.select([pipe], [], [], seconds)
        for number in os.read(pipe, 64) if ready else b"":
            if number in STOP_SIGNALS:
                self._ask(signal.Signals(number).name)

    def _ask(self, reason: str) -> None:
        with self._changing:
            state, is_first = self.state, self._reason is None
            if is_first and state is not ProcessState.ENDING:
                self._reason, self._asked = reason, time.monotonic()
        if state is ProcessState.ENDING:
            return
        if is_first:
            if state is ProcessState.JOINING:
                self._leave_untrained(reason)
        elif time.monotonic() - self._asked > SECOND_SIGNAL_SECONDS:
            self._leave_unless_ending(ExitCode.INTERRUPTED, f"{reason} after {self._reason}: leaving at once")

    def _leave_untrained(self, reason: str) -> NoReturn:
        # Said once per node; the launcher also ends a rank like this when another one has refused the run.
        is_speaker = os.environ.get("LOCAL_RANK", "0") == "0"
        self.leave(ExitCode.STOPPED, f"{reason} during start-up: nothing was trained" if is_speaker else "")

    def _look_at_launcher(self, pipe: int) -> None:
        if self._parent >= 0 and os.getppid() != self._parent:
            # Killed with the whole job (SLURM's USR1 reaches launchers that do not expect it), or killed alone?
            deadline = time.monotonic() + LAUNCHER_SECONDS
            while self._reason is None and (left := deadline - time.monotonic()) > 0:
                self._hear(pipe, left)
            if self._reason is None:
                os.kill(os.getpid(), signal.SIGKILL)
        elif self._runner is not None and _parent_of(self._parent) != self._runner and self._reason is None:
            self._ask("the death of the deepspeed command")

    def _look_at_peers(self) -> None:
        """A rank that waits for the agreement of a dead one waits for ever, and DeepSpeed's launcher waits 30 s for
        each such rank."""
        if self._reason is None or self.state is ProcessState.ENDING or not self.peer_is_dead():
            return
        time.sleep(PEER_SECONDS)
        self._leave_unless_ending(ExitCode.CUT_OFF, "another rank of this machine has died")

    def _leave_unless_ending(self, code: ExitCode, message: str) -> None:
        """Leaves with what stands, unless the main thread has come to its own end while that was looked for."""
        stands = self.what_stands()
        if self.state is not ProcessState.ENDING:
            self.leave(code, f"{message}. {stands}")


def is_launched() -> bool:
    """Whether a launcher started this process, by the variables that launchers and srun set."""
    # Not converted to a number: ranks.py refuses what is none, in a sentence.
    is_of_many = os.environ.get("WORLD_SIZE", "1").strip() != "1"
    return "CROSS_RANK" in os.environ or is_of_many or is_task_of_many(os.environ)


def _signal_on_parent_death(number: int) -> None:
    if sys.platform.startswith("linux"):
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)


def _launcher_is_gone() -> bool:
    """Whether DeepSpeed's launcher (which sets CROSS_RANK) died before this process could ask to be told."""
    if "CROSS_RANK" not in os.environ:
        return False
    try:
        return os.getpgid(os.getppid()) != os.getpgrp()
    except OSError:
        return True


def _deepspeed_runner(launcher: int) -> int | None:
    """The `deepspeed` command above DeepSpeed's launcher of this node, if that is who started it."""
    runner = _parent_of(launcher)
    if runner is None or "CROSS_RANK" not in os.environ:
        return None
    try:
        arguments = Path(f"/proc/{runner}/cmdline").read_bytes().split(b"\0")[:3]
    except OSError:
        return None
    names = {os.path.basename(argument) for argument in arguments}
    return runner if names & {b"deepspeed", b"ds", b"deepspeed.launcher.runner"} else None


def _parent_of(pid: int) -> int | None:
    """Parent of a process; None where /proc does not say."""
    try:
        return int(stat_fields(pid)[1])
    except (OSError, ValueError, IndexError):
        return None
