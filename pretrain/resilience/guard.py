"""What runs beside a run and watches it, as long as it writes to its folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.errors import PassingError, UserError
from common.run_lock import is_alive, is_same_machine, process_identity
from common.slurm import node_name
from pretrain.config.watching import MonitorConfig, ResilienceConfig
from pretrain.device import control_group, gloo_address
from pretrain.parallel.agreement import PeerFailed, agreed, of_all_ranks
from pretrain.parallel.lost_ranks import lost_connection, lost_text
from pretrain.parallel.rounds import maximum
from pretrain.phases import Phases
from pretrain.report.exit_codes import ExitCode, code_of
from pretrain.report.run_folder import RunFolder, refusal
from pretrain.resilience.control import Control
from pretrain.resilience.early_end import EarlyEnd
from pretrain.resilience.signals import Stop
from pretrain.resilience.watchdog import Peers, Watchdog

COLLECTIVE_SECONDS = 1800.0
"""How long collectives wait where the watchdog is off: torch's own limit for gloo."""


class RunFailed(RuntimeError):
    """The run cannot go on; what it saved stands. Raised on every rank."""

    code: ExitCode


class Diverged(RunFailed):
    """Loss or gradients are no longer numbers, or spikes come back."""

    code = ExitCode.DIVERGED


class RankLost(RunFailed):
    """Another rank has ended, or cannot be reached any more."""

    code = ExitCode.CUT_OFF


class ReplicasDiffer(RunFailed):
    """Ranks that must hold the same weights do not."""

    code = ExitCode.REPLICAS_DIFFER

    def __init__(self, message: str, *, node: str | None = None) -> None:
        """`node`: see replicas.suspect_node."""
        super().__init__(message)
        self.node = node


def collective_timeout(config: ResilienceConfig) -> float:
    """Seconds after which a collective gives up by itself: later than the watchdog, which can say why."""
    return 2 * config.hang_timeout_seconds + 60.0 if config.hang_timeout_seconds else COLLECTIVE_SECONDS


def check_address(own: Mapping[str, Any], identities: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError where other machines cannot reach this rank over gloo, which would wait until it gives up: as on
    Debian, /etc/hosts may give a machine's own name to the loopback. `identities`: process_identity of every rank."""
    others = {str(other["host"]) for other in identities if other["boot"] != own["boot"]}
    address = gloo_address(os.environ)
    if others and address is not None and ip_address(address.partition("%")[0]).is_loopback:
        raise UserError(
            f"GLOO_SOCKET_IFNAME: is not set, and {own['host']} knows itself as {address}, where {min(others)} cannot "
            f"reach it; set it to the name of the network between the nodes on all of them (ip -brief address), or let "
            f"the name of each node resolve to its address there"
        )


@contextlib.contextmanager
def early_end_noted(run_dir: Path, monitor: MonitorConfig, stop: Stop) -> Iterator[EarlyEnd]:
    """Notes how a start ended in the block, in which it opens its folder (early_end.py)."""
    end, is_first = EarlyEnd(run_dir, lambda: monitor), dist.get_rank() == 0
    if is_first:
        end.hear(stop)
    try:
        yield end
    except BaseException as error:
        if is_first:
            end.note(*_early_end(error))
        raise
    finally:
        end.close(stop)


def _early_end(error: BaseException) -> tuple[ExitCode, str]:
    if isinstance(error, UserError):
        return code_of(type(error)), str(error)
    if isinstance(error, PeerFailed):
        return code_of(error.kind), error.words or "another rank met an error and said so"
    if (reason := lost_connection(error)) is not None:
        return ExitCode.CUT_OFF, lost_text(reason)
    return ExitCode.UNFORESEEN, repr(error)


def _ending(error: BaseException, stop: Stop, phases: Phases, *, has_lock: bool) -> tuple[BaseException, ExitCode, str]:
    """What this rank leaves a run with, and the code and the words of its outcome: with what stands, where the run may
    go on from it."""
    if isinstance(error, RunFailed):
        return error, error.code, str(error)
    code, words = _early_end(error)
    if code is not ExitCode.CUT_OFF:
        return error, code, words
    if isinstance(error, PeerFailed):
        # Of all ranks that were told, the one with the lock writes it down; the others need not look.
        return error, code, f"{words}. {stop.what_stands()}" if has_lock else words
    if isinstance(error, PassingError):
        leaving: BaseException = PassingError(f"{words}. {stop.what_stands()}")
    else:
        reason = lost_connection(error)
        assert reason is not None
        leaving = RankLost(f"{lost_text(reason, f' in {phases.record}')}. {stop.what_stands()}")
    return leaving, code, str(leaving)


@contextlib.contextmanager
def guarded(config: ResilienceConfig, folder: RunFolder, stop: Stop, phases: Phases) -> Iterator[Control]:
    """Runs the block with a watchdog, signs of life and agreement; on exit records the run's outcome, releases the
    lock and waits a moment for alerts. Collective."""
    watchdog: Watchdog | None = None

    def leave(code: ExitCode, message: str) -> None:
        folder.end(code, message)
        folder.finish_alerts()

    def watch() -> None:
        nonlocal watchdog
        try:
            watchdog = Watchdog(
                folder.path,
                phases,
                stop,
                Peers(dist.get_rank(), identities),
                hang_timeout_seconds=config.hang_timeout_seconds,
                lock=folder.lock,
            )
        except OSError as error:  # on this rank alone, perhaps: its node may see the folder otherwise
            raise refusal(folder.path, error, f"written by rank {dist.get_rank()}") from None

    stop.before_leaving.append(leave)
    try:
        own = {**process_identity(os.getpid()), "node": node_name(os.environ)}
        identities = of_all_ranks(own)
        neighbours = [other for other in identities if is_same_machine(own, other)]
        stop.peer_is_dead = lambda: not all(is_alive(other) for other in neighbours)
        agreed(lambda: check_address(identities[dist.get_rank()], identities))
        group = control_group(
            collective_timeout(config), lambda group: maximum(torch.zeros(1, dtype=torch.int64), group)
        )
        control = Control(stop, group, [str(identity["node"]) for identity in identities])
        agreed(watch)
        try:
            yield control
        except BaseException:
            if watchdog is not None:
                watchdog.settle()
            raise
    except BaseException as error:
        leaving, code, words = _ending(error, stop, phases, has_lock=folder.lock is not None)
        folder.end(code, words, node=error.node if isinstance(error, ReplicasDiffer) else None)
        if leaving is error:
            raise
        raise leaving from None
    finally:
        if watchdog is not None:
            watchdog.close()
        stop.peer_is_dead = lambda: False
        stop.before_leaving.remove(leave)
        folder.finish_alerts()
