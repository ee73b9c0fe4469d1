"""What commands share: they end in one line on stderr where a user can put something right, and compute on the device
that --device names."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from common.errors import UserError
from common.folders import is_full
from common.terminal import prepare_streams, reader_may_leave, visible
from pretrain.report.exit_codes import ExitCode

if TYPE_CHECKING:
    import torch


INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a command that Ctrl-C ended, as shells have it."""


def exit_code_of(command: Callable[[], int | None]) -> int:
    """Runs `command`: its exit code (None: 0), REFUSED after a UserError or what the system refused (OSError), or
    INTERRUPTED after Ctrl-C."""
    prepare_streams()
    code: int | None = None  # of a reader that left: it ended well
    try:
        with reader_may_leave():
            code = command()
    except UserError as error:
        print(f"error: {visible(str(error))}", file=sys.stderr, flush=True)
        return ExitCode.REFUSED
    except OSError as error:
        # Of a file the system says which one, and common.files does where it does not.
        unnamed = "stdout cannot be written: " if is_full(error) else ""
        where = unnamed if error.filename is None else f"{error.filename}: "
        print(f"error: {visible(where)}{error.strerror or error}", file=sys.stderr, flush=True)
        return ExitCode.REFUSED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    return code or 0


def code_of_failure(error: Exception) -> ExitCode:
    """Says what ended this rank unforeseen, at once, for the process group may not let the process go; and its code."""
    from pretrain.parallel.lost_ranks import lost_connection, lost_text  # here: it imports torch

    if (reason := lost_connection(error)) is None:
        traceback.print_exception(error)
        return ExitCode.UNFORESEEN
    print(f"error: {lost_text(reason)}", file=sys.stderr, flush=True)
    return ExitCode.CUT_OFF


def device_named(wanted: str) -> torch.device:
    """The device of --device, cpu or cuda. Raises UserError."""
    import torch  # here: a command that refuses its arguments does not wait for it

    if wanted == "cpu":
        return torch.device("cpu")
    from pretrain.gpus import device_type

    try:
        return torch.device(device_type("cuda"))
    except UserError:
        raise UserError(
            "--device: is cuda, but torch finds no usable GPU here (python launch/doctor.py says why); leave it out to "
            "compute on the CPU"
        ) from None
