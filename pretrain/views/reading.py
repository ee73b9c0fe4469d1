"""A run folder as a reader sees it: also while the run writes, after a crash, from another machine or version.

Nothing here imports torch or takes a run's lock; all that is written is an empty file of a moment, by which the file
server's clock tells the age of that lock. What another version wrote differently is left out.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shlex
import stat
from array import array
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import UserError, kind_of
from common.line_log import Row, is_event, is_step
from common.presence import exists
from common.run_lock import SignOfLife, last_sign_of_life
from common.splits import SPLITS, SplitName
from pretrain.config.validated import setting
from pretrain.report.exit_codes import ExitCode
from pretrain.report.run_paths import SWEEP_RECORD
from pretrain.report.source_losses import source_losses
from pretrain.views.windows import Reads, reads_by_step

LOGS = ("metrics.jsonl", "events.jsonl", "config.json")
"""A folder that has one of these is a run folder."""
MODELS = ("model.safetensors", "model.safetensors.index.json")
"""Beside the config.json of an export and of converted weights."""
LONG = re.compile(rb"\d{19}")
"""More digits than an integer of 64 bits surely holds."""
TAIL_BYTES = 1000
"""A line of metrics.jsonl or more: its times tell two courses of a run apart."""
NOT_FOLLOWED = {"superseded_metrics"}
"""Events that repeat what metrics.jsonl once held: of a long run they would be most of what is kept."""
BEFORE_A_RUN = re.compile(r"slurm|smoke-\d+|checkpoints|lock-\d+\.json|\..*")
"""What its folder may hold before a run has begun: what submitting it, a smoke test and the first moments of a start
leave there."""


class NotYet(UserError):
    """There is no run, but there may be one later: it waits in a queue, or is about to start."""


class State(Enum):
    """What a run is doing."""

    STARTING = "starting"
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"
    DEAD = "dead"

    @property
    def goes_on(self) -> bool:
        return self in (State.STARTING, State.RUNNING)


class GrowingFile:
    """The lines of a file that another process appends to, and may replace by one that has less of them or others."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._tail = b""
        """What stands before the offset. A file that was replaced twice may have the number of the first one again."""

    def new_lines(self) -> tuple[bool, list[bytes]]:
        """Whether the file begins anew (then forget what was read), and the whole lines since the last call; a line
        that is still being written waits for its end. Nothing if there is no file. Raises OSError."""
        try:
            with open_regular(self.path) as file:
                status = os.fstat(file.fileno())
                identity = status.st_dev, status.st_ino
                is_new = identity != self._identity or status.st_size < self._offset
                if not is_new:
                    file.seek(self._offset - len(self._tail))
                    is_new = file.read(len(self._tail)) != self._tail
                if is_new:
                    self._identity, self._offset, self._tail = identity, 0, b""
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            is_new, self._identity, self._offset, self._tail = self._identity is not None, None, 0, b""
            return is_new, []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._tail = (self._tail + whole[-TAIL_BYTES:])[-TAIL_BYTES:]
        return is_new, whole.splitlines()


class Metrics:
    """metrics.jsonl by column, so that a million steps fit."""

    def __init__(self, path: Path) -> None:
        self._file = GrowingFile(path)
        self._columns: dict[str, array[float]] = {}
        self.damaged = 0
        """Lines that are no step."""
        self.newest: Row = {}

    def __len__(self) -> int:
        return len(self._columns.get("step", ()))

    def column(self, key: str) -> array[float]:
        """A value per step, NaN where a step has none (a loss that is not finite, a value of a later version)."""
        return self._columns.get(key, array("d", [math.nan]) * len(self))

    @property
    def names(self) -> list[str]:
        """Keys of all steps, in the order of their first appearance."""
        return list(self._columns)

    def update(self) -> None:
        """Reads what was written since. Raises OSError."""
        is_new, lines = self._file.new_lines()
        if is_new:
            self._columns, self.damaged, self.newest = {}, 0, {}
        for line in lines:
            row = parsed(line)
            if is_step(row):
                self._append(row)
            elif line.strip():
                self.damaged += 1

    def _append(self, row: Row) -> None:
        count = len(self)
        self.newest = row
        for key, value in row.items():
            if key not in self._columns:
                self._columns[key] = array("d", [math.nan]) * count
            self._columns[key].append(float(value) if isinstance(value, int | float) else math.nan)
        for column in self._columns.values():
            if len(column) == count:
                column.append(math.nan)


@dataclass
class RunView:
    """A run folder. `update` reads what has changed since."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    """The tree of config.json as it is there; empty if it cannot be read."""
    events: list[Row] = field(default_factory=list)
    outcome: dict[str, Any] = field(default_factory=dict)
    """outcome.json, or the event of a failure that it does not tell; empty while the run goes on or if it was
    killed."""
    checkpoints: list[str] = field(default_factory=list)
    """Names of the whole ones, oldest first."""
    sign: SignOfLife | None = None
    damaged_events: int = 0

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.path / "metrics.jsonl")
        self._log = GrowingFile(self.path / "events.jsonl")

    @classmethod
    def open(cls, path: Path) -> RunView:
        """Raises UserError if `path` is no run folder or cannot be read, and NotYet if it may become one."""
        try:
            cls._check(path)
        except OSError as error:
            raise UserError(f"RUN: {path} cannot be read: {error.strerror}") from None
        view = cls(path)
        view.update()
        return view

    @staticmethod
    def _check(path: Path) -> None:
        """Raises UserError, NotYet and OSError, as `open` says."""
        if not os.path.lexists(path):
            raise NotYet(f"RUN: there is no folder {path}; name a run folder (runs/NAME)")
        if not path.is_dir():
            raise UserError(f"RUN: there is no folder {path}; name a run folder (runs/NAME)")
        if exists(path / SWEEP_RECORD):
            line = f"python launch/sweep.py --sweep-dir {shlex.quote(str(path))} --table"
            raise UserError(f"RUN: {path} is the folder of a sweep; name runs in it, or show all of them: {line}")
        if not any(exists(path / name) for name in LOGS):
            kind = NotYet if _may_become_one(path) else UserError
            raise kind(f"RUN: {path} is no run folder: it holds none of {', '.join(LOGS)}")
        if any(exists(path / name) for name in MODELS) and not any(exists(path / name) for name in LOGS[:2]):
            raise UserError(f"RUN: {path} holds the weights of a model, and is no run folder; name runs/NAME")

    def update(self) -> None:
        """Raises UserError if something is there that cannot be read, and PassingError if another look may read it."""
        try:
            self.sign = last_sign_of_life(self.path)
            self.config = read_object(self.path / "config.json")
            self.outcome = read_object(self.path / "outcome.json")
            if not self.outcome and not (self.sign is not None and self.sign.is_alive):
                self.sign = last_sign_of_life(self.path)  # a start may have come between, which removes the outcome
            self.metrics.update()
            self.update_events()
            if not self.outcome and self._last_index("failed") > max(map(self._last_index, ("opened", "started"))):
                self.outcome = dict(self.last("failed"))  # of a full disk, which took that line alone
            folder = self.path / "checkpoints"
            names = os.listdir(folder) if folder.is_dir() else []
            found = (name for name in names if re.fullmatch(r"step-\d{8,}", name))
            self.checkpoints = sorted(found, key=lambda name: (len(name), name))  # from 10^8 on there are more digits
        except OSError as error:
            raise kind_of(error)(f"RUN: {error.filename or self.path} cannot be read: {error.strerror}") from None

    def update_events(self) -> None:
        """Reads events.jsonl alone. Raises OSError."""
        is_new, lines = self._log.new_lines()
        if is_new:
            self.events, self.damaged_events = [], 0
        for line in lines:
            row = parsed(line)
            if not is_event(row):
                self.damaged_events += bool(line.strip())
            elif row["event"] not in NOT_FOLLOWED:
                self.events.append(row)

    @property
    def state(self) -> State:
        if self.sign is not None and self.sign.is_alive:
            opened, started = (self._last_index(kind) for kind in ("opened", "started"))
            return State.STARTING if opened > started else State.RUNNING
        code = self.outcome.get("exit_code")
        if code == ExitCode.FINISHED:
            return State.FINISHED
        if code in (ExitCode.STOPPED, ExitCode.INTERRUPTED):
            return State.STOPPED
        return State.DEAD if code is None else State.FAILED

    def last(self, kind: str) -> Row:
        """The newest event of a kind; empty if there is none."""
        index = self._last_index(kind)
        return self.events[index] if index >= 0 else {}

    def _last_index(self, kind: str) -> int:
        return max((i for i, event in enumerate(self.events) if event["event"] == kind), default=-1)

    @property
    def step(self) -> int:
        """Of the newest line of metrics.jsonl; 0 before the first."""
        return int(self.metrics.newest.get("step", 0))

    @property
    def last_step(self) -> int | None:
        """Where this start ends; None if nothing says so."""
        found = self.last("started").get("last_step", setting(self.config, "train.steps"))
        return found if isinstance(found, int) else None

    def validations(self, split: str = "validation") -> list[tuple[int, float]]:
        """Step and loss of those on a split that still count: a start from before a step computes its validation
        again."""
        return [(step, _loss(event.get("loss"))) for step, event in self._validation_events(split)]

    def reads(self, split: str = "validation") -> dict[int, Reads]:
        """Step -> what its validation on a split has read, as far as that changed in the life of the run."""
        return reads_by_step(self.events, split, self.config)

    def best_validation(self, split: str = "validation") -> tuple[int, float] | None:
        """Step and loss of the lowest among those that read the windows of the newest one; None without a finite
        one."""
        reads, validations = self.reads(split), self.validations(split)
        alike = [(step, loss) for step, loss in validations if reads[step] == reads[validations[-1][0]]]
        return min((one for one in alike if math.isfinite(one[1])), key=lambda one: one[1], default=None)

    @property
    def splits(self) -> list[SplitName]:
        """Those on which it was validated, see `evaluate.split`: mostly one, two where a resume changed it."""
        return [split for split in SPLITS if self._validation_events(split)]

    @property
    def newest_validation(self) -> tuple[SplitName, int, float] | None:
        """Split, step and loss; of two of one step that of the split which the configuration names."""
        chosen = setting(self.config, "evaluate.split")
        found = [(split, *self.validations(split)[-1]) for split in self.splits]
        return max(found, key=lambda one: (one[1], one[0] == chosen), default=None)

    def source_validations(self, split: str = "validation") -> list[tuple[int, dict[str, float]]]:
        """Step and the loss of each source, on a split; none of one data set, or of a version that did not record
        them."""
        return [
            (step, {name: _loss(loss) for name, loss in source_losses(event).items()})
            for step, event in self._validation_events(split)
        ]

    def bits_per_byte(self, split: str = "validation") -> list[tuple[int, float]]:
        """Step and bits per byte of the text, of those validations that have them: none of a version that did not
        record them, or of ids whose text nobody knows."""
        found = self._validation_events(split)
        return [(step, _loss(event["bits_per_byte"])) for step, event in found if "bits_per_byte" in event]

    def average_validations(self, split: str = "validation") -> list[tuple[int, float]]:
        """Step and loss of the moving average in those validations that computed it (`evaluate.ema`)."""
        found = self._validation_events(split)
        return [(step, _loss(event["ema_loss"])) for step, event in found if "ema_loss" in event]

    def _validation_events(self, split: str) -> list[tuple[int, Row]]:
        found = self._counting("validation")
        by_step = {event["step"]: event for event in found if event.get("split", "validation") == split}
        return sorted(by_step.items(), key=lambda pair: pair[0])

    def tasks(self, at_step: int | None = None) -> dict[str, Row]:
        """Task -> its newest evaluation that still counts, as of `validations`; with `at_step` the one after it."""
        return {one["task"]: one for one in self._evaluations() if at_step in (None, one["step"])}

    def task_accuracies(self) -> dict[str, dict[int, float]]:
        """Task -> step -> accuracy, of evaluations that still count."""
        found: dict[str, dict[int, float]] = {}
        for one in self._evaluations():
            if isinstance(one.get("accuracy"), int | float):
                found.setdefault(one["task"], {})[one["step"]] = one["accuracy"]
        return found

    def _evaluations(self) -> list[Row]:
        return [event for event in self._counting("evaluation") if isinstance(event.get("task"), str)]

    def _counting(self, kind: str) -> list[Row]:
        """Events of a kind after a step, those that still count: a start from before that step makes it again, and
        those before a branch are another one's."""
        found: list[Row] = []
        for event in self.events:
            step = event.get("step")
            if event["event"] == "branch":
                found = []
            elif event["event"] == "started" and isinstance(step, int):
                found = [one for one in found if one["step"] <= step]
            elif event["event"] == kind and isinstance(step, int):
                found.append(event)
        return found


def _may_become_one(folder: Path) -> bool:
    try:
        return all(BEFORE_A_RUN.fullmatch(name) for name in os.listdir(folder))
    except OSError:
        return False


def _loss(value: Any) -> float:
    return value if isinstance(value, int | float) else math.nan


def parsed(line: bytes) -> Any:
    """The value of a line of JSON; None if it is none. What is too large for an integer is infinite."""
    try:
        return json.loads(line, parse_int=_integer) if LONG.search(line) else json.loads(line)
    except (ValueError, RecursionError):
        return None


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < 19 else float(digits)


def open_regular(path: Path) -> BinaryIO:
    """For reading; a named pipe, of which opening waits for a writer, raises OSError as a folder does."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "is no file", str(path))
    return file


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none, or if it is torn. Raises OSError."""
    try:
        with open_regular(path) as file:
            found = parsed(file.read())
    except FileNotFoundError:
        return {}
    return found if isinstance(found, dict) else {}
