"""Everything that can be known to be wrong with a run, from its command line on."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from pretrain.config.loading import inspect_config
from pretrain.config.rules import RULES, broken_rules, smallest_world
from pretrain.config.schema import Config
from pretrain.preflight.checklist import Blocked, Checklist, Outcome
from pretrain.preflight.run import PlannedRun
from pretrain.preflight.step import StepRehearsal
from pretrain.report.run_paths import config_file, run_folder

NO_CONFIG = "there is no configuration"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A run, as a command line names it."""

    config: str | Path
    """A configuration file or a run folder."""
    option: str
    """The argument that it came from, for messages."""
    overrides: Sequence[str] = ()
    run_dir: str | Path | None = None
    num_ranks: int | None = None
    """None: the fewest that the layout allows."""
    device: str | None = None
    """cuda or cpu; None: train.device, and where that is auto what this machine has."""
    device_memory: int | None = None
    """Bytes of a rank's device; None: those of the GPU that is here, if there is one."""


class Examination:
    """Goes on after what is wrong, and finds the rest."""

    def __init__(self, wanted: Wanted, tell: Callable[[Outcome], None] = lambda outcome: None) -> None:
        """`tell` hears of every check that is done."""
        self.wanted, self.tell = wanted, tell
        self.checks = Checklist(tell=lambda outcome: self.tell(outcome))
        self.config: Config | None = None
        self.run: PlannedRun | None = None
        """Once the run was checked."""
        self._broken: frozenset[str] = frozenset()
        self._path = Path(wanted.config)
        self._run_dir: Path | None = None
        self._device = wanted.device or "cuda"

    def check_settings(self) -> None:
        """Configuration and run folder."""
        self.checks.do("configuration", self._configuration)
        self.checks.do("rules", self._rules)
        self.checks.do("run folder", self._folder)
        self.checks.do("alerts", self._alerts)

    def check_run(self, *, thorough: bool) -> None:
        """The rest, if there is a configuration: see PlannedRun."""
        if self.config is None:
            self.checks.do("the rest", self._nothing)
            return
        self.checks.do("machine", self._machine)
        ranks = self.wanted.num_ranks or smallest_world(self.config)
        self.run = PlannedRun(self.config, ranks, self._run_dir, self._device, self._broken, self._nearest_folder())
        self.run.check(self.checks, thorough=thorough)

    def check_step(self, rank: int | None = None) -> None:
        """A training step, rehearsed, if the run was checked. `rank`: one more that is rehearsed."""
        if self.run is not None:
            StepRehearsal(self.run, rank, self.wanted.device_memory).check(self.checks)

    @property
    def not_rehearsed(self) -> list[str]:
        """Warnings of what a rehearsed step could not tell."""
        return [words for o in self.checks.outcomes if o.name in ("collectives", "memory") for words in o.warnings]

    @property
    def is_sound(self) -> bool:
        """Whether nothing wrong was found."""
        return not self.checks.problems

    def _configuration(self, found: Outcome) -> str:
        wanted = self.wanted
        self._path = config_file(wanted.config, wanted.option)
        self.config, problems = inspect_config(self._path, wanted.overrides, option=wanted.option)
        for error in problems:
            found.problem(error)
        overridden = f", and {len(wanted.overrides)} --set" if wanted.overrides else ""
        return f"{self._path}{overridden}: every key is known and has a legal value"

    def _rules(self, found: Outcome) -> str:
        if self.config is None:
            raise Blocked(NO_CONFIG)
        broken = broken_rules(self.config)
        for error in broken.values():
            found.problem(error)
        self._broken = frozenset(broken)
        return f"{len(RULES)} rules that join keys"

    def _nearest_folder(self) -> Path:
        """The folder that is there in which the run folder was to be, whether it can be one or not."""
        given = self.wanted.run_dir
        wished = Path(given if given is not None else Path("runs") / self._path.stem).absolute()
        return next(place for place in wished.parents if os.path.isdir(place))

    def _folder(self, found: Outcome) -> str:
        self._run_dir = run_folder(self._path, self.wanted.run_dir)
        there = "is there" if self._run_dir.exists() else "will be made"
        return f"{self._run_dir} {there}, and this user may write there"

    def _alerts(self, found: Outcome) -> str:
        if self.config is None:
            raise Blocked(NO_CONFIG)
        from pretrain.report.alerts import check_command

        check_command(self.config.monitor)  # a start only warns: its job may be requeued, and must not end for this
        return f"{self.config.monitor.alert_command or 'no command'} tells what happens"

    def _nothing(self, found: Outcome) -> str:
        raise Blocked(NO_CONFIG)

    def _machine(self, found: Outcome) -> str:
        assert self.config is not None
        if self.wanted.device is not None and self.config.train.device not in ("auto", self.wanted.device):
            raise UserError(
                f"--device: is {self.wanted.device}, but train.device is {self.config.train.device}; leave the option "
                f"out, or --set train.device={self.wanted.device}"
            )
        if self.wanted.device is None:
            from pretrain.gpus import planned_device_type

            self._device = planned_device_type(self.config.train.device)
        why = "--device" if self.wanted.device else f"train.device = {self.config.train.device}"
        return f"checked for ranks on {self._device} ({why})"
