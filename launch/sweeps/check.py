"""Everything that is wrong with any run of a sweep, before the first one starts.

What imports torch is imported inside functions, because refusals of arguments do not need it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from common.folders import free_bytes
from common.tables import counted
from launch.sweeps.record import Sweep
from pretrain.views.sweep import SweepRun

Problems = Callable[[SweepRun], Iterable[str]]
"""What is wrong with a run, one sentence each."""


def problems_of(runs: Sequence[SweepRun], problems: Problems) -> list[str]:
    """A sentence for each different problem, which names the runs that have it."""
    found: dict[str, list[str]] = {}
    for run in runs:
        for problem in problems(run):
            found.setdefault(problem, []).append(run.name)
    return [f"{problem} ({_names(names, len(runs))})" for problem, names in found.items()]


def _names(names: Sequence[str], num_runs: int) -> str:
    if len(names) == num_runs > 1:
        return "in every run"
    return f"in {names[0]}" + (f" and {counted(len(names) - 1, 'other')}" if len(names) > 1 else "")


class LocalCheck:
    """The checks of `launch/plan.py check`, but for those that read whole checkpoints or rehearse a step."""

    def __init__(self, sweep: Sweep, configs: dict[str, Path], ranks: int | None) -> None:
        """`ranks`: None: the fewest that the layout allows."""
        self._sweep, self._configs, self._ranks = sweep, configs, ranks
        self._bytes = 0

    def problems(self, run: SweepRun) -> list[str]:
        from pretrain.preflight.whole import Examination, Wanted

        examination = Examination(
            Wanted(
                config=self._configs[run.config],
                option="--config",
                overrides=self._sweep.settings(run),
                run_dir=self._sweep.run_dir(run),
                num_ranks=self._ranks,
            )
        )
        examination.check_settings()
        examination.check_run(thorough=False)
        if examination.is_sound and examination.config is not None:
            from pretrain.report.disk_space import checkpoint_space

            self._bytes += checkpoint_space(examination.config, self._sweep.run_dir(run)).wanted
        return [str(problem) for problem in examination.checks.problems]

    def warning(self) -> str:
        """Whether the disk holds the checkpoints of all runs that were checked, which each of them checks for itself
        alone; empty if it does."""
        free = free_bytes(self._sweep.folder)
        if self._bytes <= free:
            return ""
        return (
            f"the disk of {self._sweep.folder} has no room for the checkpoints of all runs: {self._bytes:,} bytes are "
            f"needed, {free:,} are free; make room, or lower checkpoint.keep_last and keep_best"
        )
