"""What TensorBoard's own reader finds in the event files of a run."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read(folder: Path) -> EventAccumulator:
    """Every point of the event files in a folder."""
    return EventAccumulator(
        str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0, "histograms": 0}
    ).Reload()


def steps_of(board: EventAccumulator, tag: str) -> list[int]:
    return [point.step for point in board.Scalars(tag)]
