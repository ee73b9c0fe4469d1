"""The SLURM jobs of a run folder, by the marks that submitting and starting them leave there."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

from pretrain.report.exit_codes import ExitCode
from pretrain.views.reading import RunView

ENDS_ITS_JOB = (ExitCode.FINISHED, ExitCode.REFUSED, ExitCode.DIVERGED, ExitCode.FOLDER_LOST)
"""Exit codes after which no job is requeued."""


def jobs_to_come(view: RunView) -> list[str]:
    """Numbers of the jobs that may start the run that does not go on, the last one first: those that were submitted
    since it ended, and where it ended in a way for which its job goes back into the queue, or starts it again
    (docs/operations.md), those that trained here. Those of smoke tests are among the latter."""
    if view.state.goes_on:
        return []
    started, ended = _marks(view.path, "started"), _ended(view)
    found = {} if view.outcome.get("exit_code") in ENDS_ITS_JOB else dict(started)
    for job, when in _marks(view.path, "submitted").items():
        if started.get(job, math.inf) > ended:  # else the outcome may be its own
            found.setdefault(job, when)
    return _newest_first(found)


def unheard_job(view: RunView) -> str | None:
    """The number of the last job that has started since the run ended, by an outcome that another start has left: it is
    about to open the folder, or has ended before it came to that."""
    if view.state.goes_on or not view.outcome:
        return None
    started, ended = _marks(view.path, "started"), _ended(view)
    trains = _marks(view.path, "submitted")
    return next(
        iter(_newest_first({job: when for job, when in started.items() if job in trains and when > ended})), None
    )


def submitted_jobs(folder: Path) -> list[str]:
    """Numbers of the jobs that were submitted for a run which has not begun, the last one first."""
    return _newest_first(_marks(folder, "submitted"))


def mark_submitted(folder: Path, job: str) -> None:
    """Leaves the mark of a job that will train in `folder`. Raises OSError."""
    (folder / "slurm" / f"{job}.submitted").touch()


def _ended(view: RunView) -> float:
    """When the outcome was written; before all times if there is none."""
    try:
        return (view.path / "outcome.json").stat().st_mtime
    except OSError:
        when = view.outcome.get("time")  # of an event in its place
        return when if isinstance(when, int | float) else -math.inf


def _marks(folder: Path, kind: str) -> dict[str, float]:
    """Job -> when its mark was made."""
    found = {}
    with contextlib.suppress(OSError):
        for path in (folder / "slurm").glob(f"*.{kind}"):
            found[path.stem] = path.stat().st_mtime
    return found


def _newest_first(found: dict[str, float]) -> list[str]:
    return sorted(found, key=lambda job: found[job], reverse=True)
