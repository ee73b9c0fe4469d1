"""Curves, pictures and texts for Weights & Biases: one run there for all starts of a run folder, but for a branch of
another run, which has its own.

A thread of its own does everything, so that training never waits for a network. W&B takes no step twice and none after
a later one, and another start nothing for the steps that it has. How far it has come, with points or texts, stands in
RUN_DIR/wandb; points of steps that are computed again are not sent again.
"""

from __future__ import annotations

import contextlib
import html
import importlib.util
import io
import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import UserError, kind_of
from common.files import write_file
from pretrain.config.watching import MonitorConfig
from pretrain.report.writer import Position

if TYPE_CHECKING:
    from torch import Tensor

NAME = "Weights & Biases"
MOST_WAITING = 4096
"""Calls that wait for the thread, e.g. while W&B does not answer; what comes beyond them is left out."""
FLUSH_SECONDS = 2.0
CLOSE_SECONDS = 60.0
"""Longest time that the end of a run waits for what is not yet sent."""
Task = Callable[[Any], None]
"""Takes W&B's run."""


def check_installed(config: MonitorConfig) -> None:
    """Raises UserError if the package is wanted and missing."""
    if config.wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f'monitor.wandb: is {config.wandb}, but the package wandb is not installed; pip install -e ".[wandb]" '
            f"installs it, and monitor.wandb=off does without"
        )


class WeightsAndBiases:
    """A `Writer`."""

    def __init__(self, run_dir: Path, config: MonitorConfig, facts: Mapping[str, Any], *, anew: bool = False) -> None:
        """facts: shown among the settings, e.g. versions. `anew`: what W&B has of the folder is another branch's, so
        this one begins a run there. Raises UserError if the package is missing or RUN_DIR/wandb cannot be written."""
        check_installed(config)
        self._run_dir, self._config, self._facts = run_dir, config, dict(facts)
        self._mark = Mark(run_dir / "wandb", anew=anew)
        self._sent = self._newest = self._mark.step
        self._tasks: queue.Queue[Task | None] = queue.Queue(MOST_WAITING)
        self._told: dict[str, tuple[int, str]] = {}
        """The step and the text of the newest event, by tag."""
        self._has_failed = self._is_open = False
        self._waits_for_points = anew
        """A start that is killed before its first step has another run there next time: this one would stay empty."""
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def scalars(self, at: Position, values: Mapping[str, float]) -> None:
        if at.step <= self._sent:
            return
        self._newest, points, self._waits_for_points = at.step, dict(values), False
        if "loss/train" in points:  # W&B draws against any curve of the same steps
            points["progress/training FLOPs"] = at.flops

        def send(run: Any) -> None:
            run.log(points, step=at.step)
            self._mark.move(at.step)

        self._put(send)

    def text(self, step: int, tag: str, text: str) -> None:
        shown = f"<pre>{html.escape(text)}</pre>"
        # W&B takes nothing for a step that it has: what a start says of itself goes to the first new one.
        self._log(max(step, self._sent + 1), tag, lambda wandb: wandb.Html(shown, inject=False))

    def event(self, step: int, kind: str, text: str) -> None:
        """W&B keeps one text of a tag and step, and until a run is beyond the steps that it has, all go to the newest:
        one that would replace others of this start begins with them."""
        tag, place = f"events/{kind}", max(step, self._sent + 1, self._newest)
        at, before = self._told.get(tag, (-1, ""))
        text = f"{before}\n{text}" if at == place else text
        self._told[tag] = place, text
        self.text(step, tag, text)

    def histogram(self, step: int, tag: str, shares: Tensor) -> None:
        counts, edges = shares.numpy(), np.linspace(0.0, 1.0, len(shares) + 1)
        self._log(step, tag, lambda wandb: wandb.Histogram(np_histogram=(counts, edges)))

    def image(self, step: int, tag: str, png: bytes) -> None:
        from matplotlib.image import imread  # here: a run without pictures need not wait for it

        pixels = (imread(io.BytesIO(png)) * 255).round().astype(np.uint8)
        self._log(step, tag, lambda wandb: wandb.Image(pixels, caption=f"step {step}"))

    def settings(self, values: Mapping[str, Any]) -> None:
        self._put(lambda run: run.config.update({**values, **self._facts}, allow_val_change=True))

    def flush(self) -> None:
        """Waits a moment for what the thread has not handed over, unless W&B does not answer."""
        if self._is_open and not self._has_failed:
            done, late = threading.Event(), time.monotonic() + FLUSH_SECONDS
            self._put(lambda run: done.set())
            while self._thread.is_alive() and time.monotonic() < late and not done.wait(0.02):
                pass

    def close(self) -> None:
        with contextlib.suppress(queue.Full):
            self._tasks.put(None, timeout=FLUSH_SECONDS)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._warn(f"did not take everything in {CLOSE_SECONDS:.0f} s; `wandb sync` sends what is left")

    def _log(self, step: int, tag: str, make: Callable[[Any], Any]) -> None:
        """Something that is no number. A picture is drawn while later steps come: it goes to the newest one."""
        if step <= self._sent:
            return
        place = self._newest = max(step, self._newest)

        def send(run: Any) -> None:
            import wandb

            run.log({tag: make(wandb)}, step=place)
            self._mark.move(place)

        self._put(send)

    def _put(self, task: Task) -> None:
        if self._has_failed:
            return
        try:
            self._tasks.put_nowait(task)
        except queue.Full:
            self._warn(f"does not keep up: {MOST_WAITING} points wait")

    def _warn(self, what: str) -> None:
        if not self._has_failed:
            self._has_failed = True
            print(
                f"warning: {NAME} {what}; the run goes on without it, and metrics.jsonl has every step",
                file=sys.stderr,
                flush=True,
            )

    def _work(self) -> None:
        run, kept = None, list[Task]()
        try:
            while self._waits_for_points:
                if (task := self._tasks.get()) is None:
                    return
                kept.append(task)
            run = self._open()
            self._is_open = True
            for task in kept:
                task(run)
            while (task := self._tasks.get()) is not None:
                if not self._has_failed:
                    task(run)
        except BaseException as error:  # wandb raises many kinds, SystemExit among them
            self._warn(f"does not work ({error or type(error).__name__})".replace("\n", " "))
        finally:
            if run is not None:
                with contextlib.suppress(Exception):
                    run.finish()
            self._mark.close()  # here: nobody else moves it, and W&B may keep this thread longer than a run waits

    def _open(self) -> Any:
        os.environ["WANDB_SILENT"] = "true"  # before the import: a run without a key must not ask for one
        import wandb

        config = self._config
        # The command line, the remote of a repository and what is printed may hold passwords.
        settings: dict[str, Any] = {
            "console": "off",
            "disable_git": True,
            "save_code": False,
            "silent": True,
            "x_disable_meta": True,
        }
        if "finish_timeout" in getattr(wandb.Settings, "model_fields", {}):  # else a process waits at its exit for ever
            settings["finish_timeout"] = 0.8 * CLOSE_SECONDS
        run = wandb.init(
            project=config.wandb_project,
            entity=config.wandb_entity,
            id=self._mark.identity,
            name=self._run_dir.name,
            dir=str(self._run_dir),
            mode=config.wandb,
            resume="allow",
            settings=wandb.Settings(**settings),
        )
        where = f"`wandb sync {Path(run.dir).parent}` sends it" if config.wandb == "offline" else run.url
        print(f"{NAME}: {where}", flush=True)
        if self._sent:
            print(f"{NAME} has the steps up to {self._sent}; what comes after them is sent", flush=True)
        return run


class Mark:
    """Which run of W&B a run folder belongs to, and the newest step that it has: two small files."""

    def __init__(self, folder: Path, *, anew: bool = False) -> None:
        """`anew`: of another run than before. Raises UserError if they cannot be written."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            name = folder / "run-id"
            if anew:
                (folder / "newest-step").unlink(missing_ok=True)
            if anew or not name.exists():
                write_file(name, secrets.token_hex(8).encode())
            self.identity = name.read_text().strip()
            self._file = os.open(folder / "newest-step", os.O_RDWR | os.O_CREAT, 0o644)
            found = os.pread(self._file, 32, 0).strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise kind_of(error)(
                f"monitor.wandb: {folder} cannot be written ({reason}); move it away, or set monitor.wandb to off"
            ) from None
        self.step = int(found) if found.isdigit() else 0

    def move(self, step: int) -> None:
        """One write in place: a process that is killed leaves it whole. A full disk costs the mark, not the run."""
        with contextlib.suppress(OSError):
            os.pwrite(self._file, b"%020d\n" % step, 0)

    def close(self) -> None:
        """A rollback opens another one."""
        with contextlib.suppress(OSError):  # a network file system says so late that it has no room
            os.close(self._file)
