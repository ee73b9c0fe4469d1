"""How a command that reads and prints ends: what a user can put right is one line on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable

from common.errors import UserError
from common.terminal import reader_may_leave, visible
from pretrain.report.exit_codes import ExitCode


def exit_code_of(command: Callable[[], int | None]) -> int:
    """Runs `command`: its exit code (None: 0), or REFUSED after a UserError or what the system refused (OSError)."""
    code: int | None = None  # of a reader that left: it ended well
    try:
        with reader_may_leave():
            code = command()
    except UserError as error:
        print(f"error: {visible(str(error))}", file=sys.stderr, flush=True)
        return ExitCode.REFUSED
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr, flush=True)
        return ExitCode.REFUSED
    return code or 0
