"""Curves, pictures and texts for TensorBoard: RUN_DIR/tensorboard.

TensorBoard draws against steps. The losses against tokens and against FLOPs are curves of their own, in the runs
`against tokens` and `against MFLOP`, whose steps are those units. What happened is in the run `events`: a start that
computes steps again hides their points, and no event.

TensorBoard's own reader hides a text behind a later one of its tag whose step is not above its own: of two events in
one step the first, and after a rollback all that happened beyond. So a text that would hide others begins with them:
with the newest, or starts that come to nothing, one after the other, would each write down all before.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import summary as summaries

from pretrain.report import tags
from pretrain.report.board import Board, texts_of
from pretrain.report.writer import Position

MEGA = 1e6
MOST_TEXTS = 50
"""Events of one kind that a text holds."""
EARLIER = "Earlier ones: events.jsonl."
FURTHER_AXES = "loss/train", "loss/validation", "loss/test split"
"""The curves that are drawn against tokens and FLOPs too."""


class TensorBoard:
    """A `Writer`."""

    def __init__(self, folder: Path, start: Position) -> None:
        """`start`: where the first point comes after. Raises UserError if the folder cannot be made."""
        self._main = Board(folder, first_step=start.step)
        self._events = Board(folder / "events", first_step=start.step, supersedes=False)
        self._told: dict[str, list[tuple[int, str]]] = {}
        """Steps and texts of the events that are shown, by tag, in rising steps."""
        for tag, step, text in texts_of(folder / "events"):
            self._hide(tag.removesuffix("/text_summary"), step)
            self._told[tag.removesuffix("/text_summary")].append((step, text))
        self._tokens = Board(folder / "against tokens", first_step=start.tokens)
        self._flops = Board(folder / "against MFLOP", first_step=int(start.flops / MEGA))

    def begin(self) -> None:
        """Hides what earlier starts wrote now, not with the first point: a start that is killed before that has lost
        none of its own, and the next one begins behind what is to be hidden."""
        for board in (self._main, self._tokens, self._flops):
            board.begin()

    def scalars(self, at: Position, values: Mapping[str, float]) -> None:
        self._main.scalars(at.step, values)
        for axis, board, place in (("tokens", self._tokens, at.tokens), ("MFLOP", self._flops, int(at.flops / MEGA))):
            points = {f"loss against {axis}/{tag[5:]}": values[tag] for tag in FURTHER_AXES if tag in values}
            if points:
                board.scalars(place, points)

    def text(self, step: int, tag: str, text: str) -> None:
        self._main.add(step, summaries.text(tag, text))

    def event(self, step: int, kind: str, text: str) -> None:
        tag = f"events/{kind}"
        texts = "\n\n".join([*self._hide(tag, step), text]).split("\n\n")
        if len(texts) > MOST_TEXTS:
            texts = [EARLIER, *texts[-MOST_TEXTS:]]
        text = "\n\n".join(texts)
        self._told[tag].append((step, text))
        self._events.add(step, summaries.text(tag, text))

    def _hide(self, tag: str, step: int) -> list[str]:
        """The texts that one more of `step` hides."""
        told = self._told.setdefault(tag, [])
        first = next((n for n, (at, _) in enumerate(told) if at >= step), len(told))
        hidden = [text for _, text in told[first:]]
        del told[first:]
        return hidden

    def histogram(self, step: int, tag: str, shares: Tensor) -> None:
        count = len(shares)
        edges, centres = [(i + 1) / count for i in range(count)], [(i + 0.5) / count for i in range(count)]
        weights = shares.tolist()
        mean = sum(c * w for c, w in zip(centres, weights, strict=True))
        squares = sum(c * c * w for c, w in zip(centres, weights, strict=True))
        self._main.add(step, summaries.histogram_raw(tag, 0.0, 1.0, 1.0, mean, squares, edges, weights))

    def image(self, step: int, tag: str, png: bytes) -> None:
        width, height = struct.unpack(">II", png[16:24])  # of the first chunk, IHDR
        picture = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
        self._main.add(step, Summary(value=[Summary.Value(tag=tag, image=picture)]))

    def settings(self, values: Mapping[str, Any]) -> None:
        kept = {
            key: value if isinstance(value, int | float | str) else json.dumps(value) for key, value in values.items()
        }
        page = tags.layout(
            has_tasks=any(key.startswith("evaluate.tasks.") for key in values),
            has_sources=len(values.get("data.sources", ())) > 1,
        )
        # The metrics of a run's row among the hyperparameters.
        compared = "loss/train", f"loss/{tags.split_words(values.get('evaluate.split', 'validation'))}"
        for part in (*summaries.hparams(kept, dict.fromkeys(compared, 0.0)), summaries.custom_scalars(page)):
            self._main.add(0, part)

    def flush(self) -> None:
        for board in (self._main, self._events, self._tokens, self._flops):
            board.flush()

    def close(self) -> None:
        self.flush()
