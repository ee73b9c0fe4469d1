"""Runs of a sweep as SLURM jobs, each submitted as launch/slurm/submit.py submits a run."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from common.slurm import jobs_in_queue
from launch.slurm import training
from launch.sweeps.record import Sweep
from pretrain.cli.refusals import INTERRUPTED
from pretrain.views.sweep import SweepRun

OWN = ("--config", "--set", "--run-dir", "--job-name", "--smoke", "--dry-run", "--help", "-h")
"""Options of submit.py that the sweep gives, or that are for a single run, or for none."""

SQUEUE_SECONDS = 120.0


class Queue:
    """`options` of submit.py for every run. Raises UserError for those that belong to the sweep."""

    def __init__(self, sweep: Sweep, options: Sequence[str], at_once: int | None) -> None:
        given = {option.partition("=")[0] for option in options}
        for option in OWN:
            if option in given:
                raise UserError(f"{option}: stands behind -- and is not for every run of a sweep; leave it out there")
        if at_once is not None and "--after" in given:
            raise UserError("--at-once: lets jobs wait for each other, so they cannot wait --after another one")
        self._sweep, self._options, self._at_once = sweep, list(options), at_once
        self._warned: set[str] = set()

    def command(self, run: SweepRun, config: Path | None = None) -> list[str]:
        """Arguments of launch/slurm/submit.py. `config`: instead of the sweep's copy."""
        return [*self._sweep.arguments(run, config), *self._options]

    def problems(self, run: SweepRun, config: Path) -> list[str]:
        """What submit.py --dry-run finds wrong. Its warnings are said, each once."""
        code, _, said = _submit([*self.command(run, config), "--dry-run"])
        for warning in re.findall(r"(?m)^warning: .*$", said):
            if warning not in self._warned:
                print(warning, file=sys.stderr, flush=True)
                self._warned.add(warning)
        return _errors(said) if code else []

    def submit_all(self, runs: Sequence[SweepRun]) -> None:
        """Submits what is not in the queue yet. Raises UserError, also where SLURM cannot tell whether a job has ended:
        one that is submitted twice would find the run taken. Raises OSError if there is no squeue."""
        waiting, left = [], []
        results = [self._sweep.result(run) for run in runs]
        known = {result.job for result in results if result.job}
        in_queue = jobs_in_queue(known, timeout_seconds=SQUEUE_SECONDS) if known else {}
        for run, result in zip(runs, results, strict=True):
            if result.job in in_queue:
                print(f"{run.name}: job {result.job} is in the queue already", flush=True)
                waiting.append(result.job)
            elif result.state is not None and result.state.goes_on:
                print(f"{run.name}: passed over: another process trains it", flush=True)
            else:
                left.append(run)
        waiting.sort(key=int)  # each waits for one before it, and a run may have been submitted anew
        for run in left:
            line = self.command(run)
            if self._at_once is not None and len(waiting) >= self._at_once:
                # Whatever becomes of that one: a requeued job has not ended.
                line.append(f"--sbatch=--dependency=afterany:{waiting[-self._at_once]}")
            code, printed, said = _submit(line)
            found = re.match(r"submitted job (\d+)", printed)
            if code or found is None:
                raise UserError(f"{run.name}: {'; '.join(_errors(said))}; the same command submits the others")
            waiting.append(found[1])
            self._sweep.note(run, job=found[1])
            print(f"{run.name}: submitted job {found[1]}", flush=True)
        if waiting:
            print(f"  state   squeue --job {','.join(waiting)}\n  cancel  scancel {' '.join(waiting)}", flush=True)


def _submit(arguments: Sequence[str]) -> tuple[int, str, str]:
    """Exit code of submit.py, what it printed, and what it said on stderr."""
    printed, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        try:
            code = training.main(arguments)
        except SystemExit as refused:  # argparse
            code = refused.code if isinstance(refused.code, int) else 1
    if code == INTERRUPTED:  # Ctrl-C is meant for the sweep, not for this run alone
        raise KeyboardInterrupt
    return code, printed.getvalue(), said.getvalue()


def _errors(said: str) -> list[str]:
    return re.findall(r"(?m)^(?:launch/slurm/submit\.py: )?error: (.*)$", said) or [said.strip()]
