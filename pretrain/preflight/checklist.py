"""Checks, one after the other: a program that starts ends at the first that fails, one that plans finds them all."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from common.errors import UserError, refuse
from common.tables import counted

KEYED = re.compile(r"(--)?[a-z_]+([.\[-][a-z0-9_\]]+)*: ")
"""How a message begins that names its key or option."""


class Blocked(Exception):
    """A check cannot be made, because an earlier one has failed; says which."""


@dataclass
class Outcome:
    """One check."""

    name: str
    said: str = ""
    """What was checked, of a check that passed."""
    problems: list[UserError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """What does not keep the run from starting."""
    blocked_by: str = ""
    """Why the check was not made; empty if it was."""
    _key: str = ""
    _stops: bool = False

    def problem(self, error: UserError) -> None:
        """Takes what is wrong, or raises it where the program ends at the first fault. An error without a key gets that
        of the check."""
        if self._key and not KEYED.match(str(error)):
            error = type(error)(f"{self._key}: {error}")
        refuse(error) if self._stops else self.problems.append(error)

    @property
    def passed(self) -> bool | None:
        """None: the check was not made."""
        return None if self.blocked_by else not self.problems

    def line(self) -> str:
        """For a terminal; what is wrong stands elsewhere."""
        if self.blocked_by:
            return f"  -       {self.name:<18}  not checked: {self.blocked_by}"
        if self.problems:
            return f"  WRONG   {self.name:<18}  {counted(len(self.problems), 'problem')}, said below"
        return f"  {'warning' if self.warnings else 'ok     '} {self.name:<18}  {self.said}"

    def to_json(self) -> dict[str, Any]:
        """A problem's key is what stands before its first colon."""
        return {
            "name": self.name,
            "passed": self.passed,
            "said": self.said,
            "blocked_by": self.blocked_by or None,
            "problems": [{"key": str(e).partition(": ")[0], "message": str(e)} for e in self.problems],
            "warnings": self.warnings,
        }


class Checklist:
    """The checks that were made."""

    def __init__(self, *, stops: bool = False, tell: Callable[[Outcome], None] = lambda outcome: None) -> None:
        """`stops`: the first UserError is raised. `tell` hears of every check that is done."""
        self.outcomes: list[Outcome] = []
        self._stops, self._tell = stops, tell

    def do(self, name: str, check: Callable[[Outcome], str], *, key: str = "") -> None:
        """Makes a check: it says what it checked, hands problems and warnings to its Outcome or raises a UserError, and
        raises Blocked if it cannot be made. `key`: what is to blame where a message does not say it."""
        outcome = Outcome(name, _key=key, _stops=self._stops)
        try:
            outcome.said = check(outcome)
        except Blocked as blocked:
            outcome.blocked_by = str(blocked)
        except UserError as error:
            outcome.problem(error)
        except OSError as error:
            if self._stops:
                raise
            outcome.problem(_of_the_system(error))
        said = {str(problem) for earlier in self.outcomes for problem in earlier.problems}
        again = [problem for problem in outcome.problems if str(problem) in said]
        if again and len(again) == len(outcome.problems):
            outcome.blocked_by = "what is wrong there is said already"
        outcome.problems = [problem for problem in outcome.problems if str(problem) not in said]
        self.outcomes.append(outcome)
        self._tell(outcome)

    @property
    def problems(self) -> list[UserError]:
        return [problem for outcome in self.outcomes for problem in outcome.problems]

    @property
    def warnings(self) -> list[str]:
        return [warning for outcome in self.outcomes for warning in outcome.warnings]


def _of_the_system(error: OSError) -> UserError:
    """A failed read names no file, and a damaged one has no words of the system."""
    where = f"{error.filename}: " if error.filename is not None else ""
    return UserError(f"{where}{error.strerror or error}; see that this user may read it")
