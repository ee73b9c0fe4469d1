"""What a run shows on its boards: curves every few steps, pictures and histograms every monitor.details_every_steps.

Pictures are drawn by a thread of their own; this thread hands them to the writers with its next point, or at a flush.
"""

from __future__ import annotations

import collections
import json
import math
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from common.line_log import Row
from pretrain.config.keys import flatten
from pretrain.config.loading import to_json
from pretrain.config.schema import Config
from pretrain.engine.details import Details
from pretrain.report import tags
from pretrain.report.event_text import event_text
from pretrain.report.router_load import choices, without_ending
from pretrain.report.source_losses import source_losses
from pretrain.report.writer import Position, Writer

SHOWN_EVENTS = {
    "changed_setting",
    "checkpoint_failed",
    "checkpoint_passed_over",
    "data_stage",
    "estimate_compared",
    "estimated",
    "hang",
    "lock_taken_over",
    "loss_spike",
    "replicas_differ",
    "rollback",
    "router_collapsed",
    "skipped_update",
    "slow_ranks",
    "started",
}


class Curves:
    """Gives what a step tells to every writer. Called by one thread."""

    def __init__(self, writers: Sequence[Writer], config: Config, start: Position, facts: Mapping[str, str]) -> None:
        """facts: title -> text, of this start. Nothing is written before the first point."""
        self._writers, self._config, self._at, self._facts = writers, config, start, facts
        self._has_begun = False
        self._choices = choices(config.model)
        self._load: dict[str, Tensor] = {}
        """Choices per expert, summed since the last details."""
        self._counted_from = 0
        """The first step of those sums."""
        self._artist = ThreadPoolExecutor(1, thread_name_prefix="pictures")
        self._can_draw = True
        self._drawn: list[tuple[int, str, Future[bytes]]] = []
        self._events: collections.deque[Row] = collections.deque()

    def _begin(self, step: int) -> None:
        if self._has_begun:
            return
        self._has_begun, tree = True, to_json(self._config)
        for writer in self._writers:
            writer.settings(_settings(tree))
            writer.text(step, "run/configuration", f"```json\n{json.dumps(tree, indent=1)}\n```")
            for title, text in self._facts.items():
                writer.text(step, f"run/{title}", text)

    def step(self, at: Position, values: dict[str, Any], phase_seconds: dict[str, float]) -> None:
        """values: the line of metrics.jsonl."""
        self._begin(at.step)
        self._at, points = at, {}
        for key, value in values.items():
            if value is not None and key != "step":
                tag, factor = tags.tag_of(key)
                points[tag] = float(value) * factor
        points |= {f"time of a step in seconds/{name}": seconds for name, seconds in phase_seconds.items()}
        if values.get("loss") is not None:
            points["perplexity/train"] = math.exp(min(float(values["loss"]), 700.0))
        for writer in self._writers:
            writer.scalars(at, points)
        self._hand_over(wait=False)

    def tell(self, title: str, text: str) -> None:
        """One more fact about this start."""
        self._facts = {**self._facts, title: text}

    def count(self, step: int, load: dict[str, Tensor]) -> None:
        """Adds the choices of a step to those that the next pictures show."""
        if not self._load:
            self._counted_from = step
        for name, counts in load.items():
            self._load[name] = self._load[name] + counts if name in self._load else counts

    def details(self, at: Position, details: Details) -> Row:
        """Norms, histograms, and the experts' load since the details before. Returns the line of details.jsonl."""
        points = {f"{kind} by group/{group}": norm for kind, of in details.norms.items() for group, norm in of.items()}
        for group, norm in details.norms["parameter norm"].items():
            update = details.norms["update norm"].get(group)
            if update is not None:
                points[f"update norm over parameter norm/{group}"] = update / norm
        points |= tags.router_points(self._load)
        for writer in self._writers:
            writer.scalars(at, points)
            for name, shares in details.scores.items():
                kind, block = tags.router_of(name)
                writer.histogram(at.step, f"selection scores/{kind}/block {block:02d}", shares)
        if self._can_draw:
            self._draw(at.step)
        norms = {kind.replace(" ", "_"): of_part for kind, of_part in details.parts.items()}
        load = {without_ending(name): counts.long().tolist() for name, counts in self._load.items()}
        row = {"step": at.step, "load_from_step": self._counted_from, **norms, "load": load}
        self._load = {}
        return row

    def validation(self, at: Position, values: dict[str, Any], split: str) -> None:
        self._begin(at.step)
        where = tags.split_words(split)
        names = {"loss": "loss", "perplexity": "perplexity", "bits_per_byte": "bits per byte"}
        points = {f"{names[key]}/{where}": float(v) for key, v in values.items() if key in names and v is not None}
        points |= {
            f"{name}/{where} of the moving average": float(values[f"ema_{key}"])
            for key, name in names.items()
            if values.get(f"ema_{key}") is not None
        }
        for prefix, ending in (("loss/", ""), ("ema_loss/", " of the moving average")):
            for name, loss in source_losses(values, prefix).items():
                if loss is not None:
                    points[f"{where} loss by source/{name}{ending}"] = float(loss)
        for writer in self._writers:
            writer.scalars(at, points)

    def evaluation(self, at: Position, task: str, values: dict[str, Any]) -> None:
        """One of evaluate.tasks."""
        self._begin(at.step)
        points = {f"tasks/{task} {key}": float(value) for key, value in values.items() if value is not None}
        for writer in self._writers:
            writer.scalars(at, points)

    def event(self, row: Row) -> None:
        """One of events.jsonl, from any thread."""
        if row["event"] in SHOWN_EVENTS:
            self._events.append(row)

    def flush(self) -> None:
        """At every point that the run may continue from: all that was shown is on the disk."""
        self._hand_over(wait=True)
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        self.flush()
        self._artist.shutdown()
        for writer in self._writers:
            writer.close()

    def _draw(self, step: int) -> None:
        first = self._counted_from
        since = f"step {step}" if step == first else f"steps {first} to {step}"
        for kind, rows in tags.load_by_block(self._load).items():
            choice, heads = self._choices[_layer(kind)], len(rows) // self._config.model.num_layers
            title = f"{kind}, {since}"
            drawn = self._artist.submit(_picture, title, rows, heads=heads, active=choice.active)
            self._drawn.append((step, f"load of the experts/{kind}", drawn))

    def _show(self, step: int, tag: str, drawn: Future[bytes]) -> None:
        """A picture that cannot be drawn (no fonts, no room for matplotlib's cache) is one warning, and no more are
        tried: a run does not end for it."""
        try:
            png = drawn.result()
        except Exception as error:
            if self._can_draw:
                self._can_draw = False
                print(f"warning: {tag}: cannot be drawn ({error!r}); the run goes on without pictures", file=sys.stderr)
            return
        for writer in self._writers:
            writer.image(step, tag, png)

    def _hand_over(self, *, wait: bool) -> None:
        while self._has_begun and self._events:
            row = self._events.popleft()
            texts = [event_text(row, row["time"])]
            while self._events and _is_beside(self._events[0], row):  # settings that changed at once
                beside = self._events.popleft()
                texts.append(event_text(beside, beside["time"]))
            step = row.get("step")
            for writer in self._writers:
                at = step if isinstance(step, int) else self._at.step
                writer.event(at, row["event"].replace("_", " "), "\n\n".join(texts))
        waiting = []
        for step, tag, drawn in self._drawn:
            if wait or drawn.done():
                self._show(step, tag, drawn)
            else:
                waiting.append((step, tag, drawn))
        self._drawn = waiting


def _is_beside(one: Row, other: Row) -> bool:
    return one["event"] == other["event"] and one.get("step") == other.get("step")


def _picture(title: str, rows: Tensor, *, heads: int, active: int) -> bytes:
    from pretrain.report.pictures import draw_load  # imports matplotlib: here, in the thread that draws

    return draw_load(title, rows, heads=heads, active=active)


def _layer(kind: str) -> str:
    """attention value -> attention; feed-forward -> feedforward."""
    return "feedforward" if kind.startswith("feed-forward") else "attention"


def _settings(tree: dict[str, Any]) -> dict[str, Any]:
    """Every setting that may tell runs apart, by dotted key; what is written where is left out."""
    return {
        key: value for key, value in flatten(tree).items() if value not in (None, {}) and not key.startswith("monitor.")
    }
