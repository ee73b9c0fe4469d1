"""The record of a sweep, sweep.json in its folder, and the copies of its configurations: what a later command of the
same sweep goes on with."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.arguments import set_options
from common.errors import ConfigError, UserError
from common.files import write_file, write_json
from common.locks import NoLocks, file_lock
from launch.sweeps.plan import is_entry_key, normal
from pretrain.checkpoint.folder import check_output_folder
from pretrain.config.loading import config_tree
from pretrain.report.run_paths import SWEEP_RECORD, is_run
from pretrain.views.comparison import as_meant, flattened
from pretrain.views.sweep import Result, SweepRun

CONFIGS = "configs"
LOCK = ".lock"


@dataclass
class Sweep:
    """The runs of a sweep folder, those of earlier commands too."""

    folder: Path
    """Absolute."""
    keys: list[str]
    """That are varied."""
    overrides: list[str]
    """KEY=VALUE of --set, for every run."""
    runs: dict[str, SweepRun] = field(default_factory=dict)
    """By name."""
    unrecorded: dict[str, int] = field(default_factory=dict)
    """Name -> exit code of the newest start, if that left no outcome in the run folder."""
    jobs: dict[str, str] = field(default_factory=dict)
    """Name -> number of the newest SLURM job."""
    solved: str | None = None
    """The key among `keys` whose values follow from the others (--equal-parameters)."""
    is_new: bool = False
    """Whether the folder has no record of it yet."""

    @classmethod
    def load(cls, folder: Path) -> Sweep | None:
        """None if there is no sweep. Raises UserError."""
        path = folder / SWEEP_RECORD
        try:
            tree: dict[str, Any] = json.loads(path.read_bytes())
            runs = [SweepRun(**run) for run in tree["runs"]]
            if any(set(run.values) != set(tree["keys"]) for run in runs):
                raise ValueError("a run has values of other keys than the sweep")
            found = {"unrecorded": tree["unrecorded"], "jobs": tree["jobs"], "solved": tree.get("solved")}
            return cls(folder, tree["keys"], tree["overrides"], {run.name: run for run in runs}, **found)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"--sweep-dir: {path} is no record of a sweep; name another folder") from None

    @classmethod
    def open(
        cls,
        folder: Path,
        keys: Sequence[str],
        overrides: Sequence[str],
        configs: dict[str, Path],
        solved: str | None = None,
    ) -> Sweep:
        """The sweep of the folder, or a new one. Writes nothing. Raises UserError if the folder has another one."""
        keys = [*keys, *([] if solved is None else [solved])]
        check_output_folder(folder, "--sweep-dir")
        found = cls.load(folder)
        if found is None:
            if folder.exists() and any(folder.iterdir()):
                raise UserError(f"--sweep-dir: {folder} holds other files and no sweep; name a new folder")
            return cls(folder, list(keys), list(overrides), solved=solved, is_new=True)
        if set(keys) != set(found.keys):
            solved_for = " (solved for by --equal-parameters)" if found.solved else ""
            raise UserError(
                f"--vary: {folder} is a sweep of {' and '.join(found.keys) or 'no key'}{solved_for}, and this command "
                f"varies {' and '.join(keys) or 'none'}; vary the same keys, or name another --sweep-dir"
            )
        if solved != found.solved:
            raise UserError(
                f"--equal-parameters: {folder} is a sweep with {found.solved or 'no key'} solved for, and this command "
                f"solves for {solved or 'none'}; give the option as before, or name another --sweep-dir"
            )
        for name, path in configs.items():
            found._check_unchanged(name, path, overrides)
        return found

    def _check_unchanged(self, name: str, path: Path, overrides: Sequence[str]) -> None:
        """Whether the configuration with --set, but for what is varied, is what earlier runs had."""
        copy = self.config(name)
        old = self._unvaried(copy if copy.exists() else path, self.overrides)
        new = self._unvaried(path, overrides)
        for key in sorted((old.keys() | new.keys()) - {"description"}):
            is_varied = any(f"{key}.".startswith(f"{varied}.") for varied in self.keys)  # no run has the file's value
            is_same = as_meant(key, old.get(key)) == as_meant(key, new.get(key))
            is_target = self.solved is not None and key.startswith("model.")  # its parameters are those of all runs
            if not is_same and (is_target or not is_varied):
                before, now = (json.dumps(tree[key]) if key in tree else "not given" for tree in (old, new))
                raise UserError(
                    f"{key}: is {before} in the runs of {self.folder}, and {now} in this command; a sweep takes other "
                    f"values of what it varies alone, so name another --sweep-dir"
                )

    def _unvaried(self, path: Path, overrides: Sequence[str]) -> dict[str, Any]:
        """Every key and its value. A list is one value, so what is varied of its entries is null."""
        entries = [f"{key}=null" for key in self.keys if is_entry_key(key)]
        try:
            return flattened(config_tree(path, [*overrides, *entries]))
        except ConfigError:  # no list, or one without that entry: another value than that of the runs
            return flattened(config_tree(path, overrides))

    def add(self, wanted: Sequence[SweepRun]) -> list[SweepRun]:
        """Adds what is new. Returns the runs that were asked for, in the spelling in which they are recorded. Raises
        UserError where the folder of a new one has another run already."""
        known = {_identity(run): run for run in self.runs.values()}
        asked = [known.get(_identity(run), run) for run in wanted]
        for run in asked:
            if run.name not in self.runs and is_run(self.run_dir(run)):
                raise UserError(
                    f"--sweep-dir: {self.run_dir(run)} holds a run that is not of this sweep; move it to another place"
                )
        self.runs |= {run.name: run for run in asked}
        return asked

    @property
    def chosen_keys(self) -> list[str]:
        """Those of which the user chose the values."""
        return [key for key in self.keys if key != self.solved]

    def config(self, name: str) -> Path:
        """The sweep's own copy of a configuration, because the user's file may be edited while it goes on."""
        return self.folder / CONFIGS / f"{name}.json"

    def run_dir(self, run: SweepRun) -> Path:
        return self.folder / run.name

    def settings(self, run: SweepRun) -> list[str]:
        """KEY=VALUE of all that one run sets."""
        return [*self.overrides, *(f"{key}={value}" for key, value in run.values.items())]

    def arguments(self, run: SweepRun, config: Path | None = None) -> list[str]:
        """Of launch/pretrain.py for one run. `config`: instead of the sweep's copy, which may not be there yet."""
        line = ["--config", str(config or self.config(run.config)), "--run-dir", str(self.run_dir(run))]
        return [*line, *set_options(self.settings(run))]

    def result(self, run: SweepRun) -> Result:
        return Result.read(run, self.folder, self.unrecorded.get(run.name), self.jobs.get(run.name, ""))

    def results(self) -> list[Result]:
        return [self.result(run) for run in self.runs.values()]

    def begin(self, configs: dict[str, Path]) -> None:
        """Makes the folder, copies the configurations that are new, and writes the record. Raises UserError and
        OSError."""
        with self._alone():
            newest = self.load(self.folder)
            if newest is not None:
                if self.is_new:
                    raise UserError(
                        f"--sweep-dir: another command has begun a sweep in {self.folder} meanwhile; give this command "
                        f"once more"
                    )
                self._take_over(newest)
            (self.folder / CONFIGS).mkdir(parents=True, exist_ok=True)
            for name, path in configs.items():
                if not self.config(name).exists():
                    write_file(self.config(name), path.read_bytes())
            self.save()
        self.is_new = False

    def _take_over(self, newest: Sweep) -> None:
        """What another command has added to the record, or noted in it, since it was read."""
        self.runs = newest.runs | self.runs
        self.unrecorded, self.jobs = newest.unrecorded, newest.jobs

    def note(self, run: SweepRun, *, unrecorded: int | None = None, job: str | None = None) -> None:
        """Writes down how the newest start of a run ended, or its job. Raises UserError and OSError."""
        with self._alone():
            newest = self.load(self.folder)
            if newest is not None:
                self._take_over(newest)
            self.unrecorded.pop(run.name, None)
            if unrecorded is not None:
                self.unrecorded[run.name] = unrecorded
            if job is not None:
                self.jobs[run.name] = job
            self.save()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other command changes the record in the block, if the file system has locks."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(NoLocks):
                stack.enter_context(file_lock(self.folder / CONFIGS / LOCK))
            yield

    def save(self) -> None:
        """Raises OSError."""
        names = ("keys", "overrides", "unrecorded", "jobs", "solved")
        tree = {name: getattr(self, name) for name in names}
        write_json(self.folder / SWEEP_RECORD, tree | {"runs": [dataclasses.asdict(run) for run in self.runs.values()]})


def _identity(run: SweepRun) -> tuple[str, frozenset[tuple[str, str]]]:
    return run.config, frozenset((key, normal(value)) for key, value in run.values.items())
