"""`plan.py check`: everything that can be wrong with a run, found without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from common.strict_json import dumps
from common.tables import counted
from common.terminal import visible
from pretrain.preflight.checklist import Outcome
from pretrain.preflight.whole import Examination, Wanted
from pretrain.report.exit_codes import ExitCode


def print_check(wanted: Wanted, *, as_json: bool, rank: int | None, with_step: bool) -> int:
    """Makes all checks and prints a line for each; what is wrong goes to stderr, that of the settings before the data
    are opened, and all but that of a step before one is rehearsed. `rank`: is rehearsed beside those that
    stand for all; `with_step`: whether a step is rehearsed. Returns the exit code: REFUSED where anything is wrong."""
    examination = Examination(wanted, (lambda outcome: None) if as_json else print_line)
    errors = Errors(examination, is_silent=as_json)
    examination.check_settings()
    errors.say()
    examination.check_run(thorough=True)
    errors.say()
    if with_step:
        examination.check_step(rank)
    if as_json:
        run = examination.run
        content = {
            "config": str(wanted.config),
            "ranks": None if run is None else run.world_size,
            "device": None if run is None else run.device,
            "passed": examination.is_sound,
            "checks": [outcome.to_json() for outcome in examination.checks.outcomes],
        }
        print(dumps(content, indent=1))
    else:
        print_warnings(examination.checks.warnings)
        errors.say()
        print(summary(examination), flush=True)
    return 0 if examination.is_sound else ExitCode.REFUSED


def print_line(outcome: Outcome) -> None:
    """One check, as soon as it is done: some take seconds."""
    print(visible(outcome.line()), flush=True)


def print_warnings(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(visible(f"warning: {warning}"), flush=True)


class Errors:
    """What is wrong, a sentence each, on stderr: said before the checks that follow, which may take half a minute."""

    def __init__(self, examination: Examination, *, is_silent: bool = False) -> None:
        self._checks, self._is_silent, self._said = examination.checks, is_silent, 0

    def say(self) -> None:
        """What was found since the last call."""
        problems = self._checks.problems
        for error in () if self._is_silent else problems[self._said :]:
            print(visible(f"error: {error}"), file=sys.stderr, flush=True)
        self._said = len(problems)


def summary(examination: Examination) -> str:
    """The last line."""
    outcomes = examination.checks.outcomes
    wrong, left_out = len(examination.checks.problems), sum(outcome.passed is None for outcome in outcomes)
    if wrong:
        found = f"{counted(wrong, 'problem')} in {counted(len(outcomes), 'check')}"
    else:
        made = f"{len(outcomes) - left_out} of" if left_out else "all"
        found = f"{made} {len(outcomes)} checks passed"
    later = f", {left_out} could not be made (see above)" if left_out else ""
    return f"{found}{later}; nothing was written"
