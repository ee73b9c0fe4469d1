"""Where in a step an operator belongs: the part of the model whose code is running, found on Python's stack."""

from __future__ import annotations

import functools
from pathlib import Path
from types import FrameType

ROOT = str(Path(__file__).parents[1])
"""Of the checkout, whose own name says nothing."""
OTHER = "other"
RULES: tuple[tuple[str, str, str], ...] = (
    # Part of the file's name, beginning of the function's qualified name, place. The first that fits.
    ("/model/", "keep_mask", "dropout"),
    ("/dropout.py", "", "dropout"),
    ("/model/layers.py", "Dropout.", "dropout"),
    ("/elementwise.py", "dropout", "dropout"),
    ("/model/layers.py", "LayerNorm.", "norm"),
    ("/model/layers.py", "FinalNorm.", "norm"),
    ("/pretrain/engine/gradient_norm.py", "poisoned", "head"),
    ("/pretrain/engine/gradient_norm.py", "", "gradient norm"),
    ("/layer_norm.py", "", "norm"),
    ("/model/layers.py", "Embedding.", "embedding"),
    ("/model/layers.py", "Block.", "residual"),
    ("/model/layers.py", "Head.", "head"),
    ("/linear_cross_entropy", "", "head"),
    ("/model/language_model.py", "", "head"),
    ("/model/routing.py", "entropy_", "router"),
    ("/model/routing.py", "_mean_over", "router"),
    ("/model/routing.py", "", "statistics"),
    ("/model/routing_table.py", "", "statistics"),
    ("/model/balance.py", "", "router"),
    ("/route.py", "", "router"),
    ("/model/attention/", "", "attention"),
    ("/model/documents.py", "", "attention"),
    ("/model/memory.py", "", "memory"),
    ("/model/feedforward/", "", "feed-forward"),
    ("/pretrain/engine/step_sums.py", "", "statistics"),
    ("/pretrain/late_reading.py", "", "statistics"),
    ("/pretrain/engine/micro_steps.py", "", "head"),
    ("/torch/optim/", "", "optimizer"),
)
PLACES = ("attention", "feed-forward", "router", "dropout", "norm", "residual", "memory", "embedding", "head")
PLACES_OF_STEP = ("statistics", "gradient norm", "optimizer")


def place_of_stack(frame: FrameType | None) -> str:
    """Of the innermost function that has a place."""
    while frame is not None:
        found = _place(frame.f_code.co_filename, frame.f_code.co_qualname)
        if found is not None:
            return found
        frame = frame.f_back
    return OTHER


@functools.cache
def _place(file: str, function: str) -> str | None:
    file = file.removeprefix(ROOT)
    if "/benchmarks/" in file or "/tests/" in file or ("/torch/" in file and "/torch/optim/" not in file):
        return None
    for part, beginning, place in RULES:
        if part in file and function.startswith(beginning):
            return place
    return None
