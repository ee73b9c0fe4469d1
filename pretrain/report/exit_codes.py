"""How a training process ends: one code per reason, the same on every rank, for scripts that decide what to do next."""

from __future__ import annotations

from enum import IntEnum

from common.errors import PassingError, UserError

NONE_IS_WHOLE = "no checkpoint is whole"
"""How the reason of such a start begins."""
STANDS = "what was saved stands"
"""Of a run that saved nothing it is not said."""


class ExitCode(IntEnum):
    """Codes of launch/pretrain.py."""

    FINISHED = 0
    UNFORESEEN = 1
    REFUSED = 2
    DIVERGED = 3
    REPLICAS_DIFFER = 4
    HUNG = 5
    FOLDER_LOST = 6
    CUT_OFF = 7
    STOPPED = 85
    INTERRUPTED = 86


MEANING = {
    ExitCode.FINISHED: "finished, or reached train.stop_after_steps",
    ExitCode.UNFORESEEN: "an unforeseen error, with its traceback",
    ExitCode.REFUSED: "refused: configuration, data, checkpoint or run folder; the message says what to change",
    ExitCode.DIVERGED: f"diverged: too many updates skipped in a row, or too many rollbacks; {STANDS}",
    ExitCode.REPLICAS_DIFFER: f"ranks that must hold the same weights do not; {STANDS}",
    ExitCode.HUNG: "a rank did not arrive within resilience.hang_timeout_seconds, or within the shorter limit of a "
    f"step (resilience.step_timeout_factor); {STANDS}",
    ExitCode.FOLDER_LOST: "another run has taken over the run folder, or it was removed or renamed; this one stopped "
    "writing",
    ExitCode.CUT_OFF: "a rank could not go on: another one died or never came, or its data could not be read for "
    "minutes, or the run folder could not be used at the start or in the last save (a fault that may pass); "
    f"{STANDS}",
    ExitCode.STOPPED: "stopped by a signal, checkpoint saved (or nothing trained yet): start the same command again",
    ExitCode.INTERRUPTED: f"a second signal ended it at once; {STANDS}: start the same command again",
}


def meaning_of(code: object, *, something_saved: bool = True) -> str:
    """What a process said by its exit code, which may be of none of ours."""
    meaning = next((meaning for known, meaning in MEANING.items() if known == code), f"exit code {code}")
    return meaning if something_saved else meaning.replace(f"; {STANDS}", "")


def code_of(kind: type[UserError]) -> ExitCode:
    """How a run ends that meets an error of this kind."""
    return ExitCode.CUT_OFF if issubclass(kind, PassingError) else ExitCode.REFUSED


def exit_codes_help() -> str:
    """The codes and their meaning, a line each."""
    rows = [f"  {int(code):>3}  {meaning}" for code, meaning in MEANING.items()]
    return "\n".join(["exit codes:", *rows])
