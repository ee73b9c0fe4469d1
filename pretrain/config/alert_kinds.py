"""What a run can tell its user about, and the words of the command that tells it."""

from __future__ import annotations

import shlex
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator

AlertKind = Literal[
    "finished",
    "failed",
    "stopped",
    "started",
    "requeued",
    "node_excluded",
    "job_ended",
    "loss_spike",
    "rollback",
    "skipped_update",
    "replicas_differ",
    "router_collapsed",
    "slow_ranks",
    "data_waited",
    "checkpoint",
    "checkpoint_failed",
    "checkpoint_passed_over",
    "log_not_written",
    "validation",
]
"""The end of a start, the fate of its SLURM job, and events of events.jsonl."""

QUIET: tuple[AlertKind, ...] = ("stopped", "started", "checkpoint", "validation")
DEFAULT_ALERTS: tuple[AlertKind, ...] = tuple(kind for kind in get_args(AlertKind) if kind not in QUIET)
"""All but those of a run that does as it should, and of a stop, which somebody has asked for."""


def command_words(command: str | None) -> list[str]:
    """The words of monitor.alert_command, as a shell would split it; nothing else of a shell. None: no word."""
    return shlex.split(command or "")


def _check_command(command: str) -> str:
    try:
        words = command_words(command)
    except ValueError as error:  # a quote that does not end
        raise ValueError(f"{command} cannot be split into words: {str(error).lower()}; close it") from None
    if not words:
        raise ValueError("has no word; name a program, or set it to null")
    return command


AlertCommand = Annotated[str, AfterValidator(_check_command)]
