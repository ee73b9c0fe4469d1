"""Pictures for the board, drawn in memory."""

from __future__ import annotations

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

LABELS = 16
"""Most labels of an axis that can be read."""


def draw_load(title: str, rows: Tensor, *, heads: int, active: int) -> bytes:
    """PNG of a heat map. rows: [blocks x heads, E], 1 is even; the scale ends at the most that is possible, E / k."""
    height, experts = rows.shape
    wide, high = max(4.4, min(14.0, 2.2 + 0.2 * experts)), max(2.6, min(14.0, 1.4 + 0.2 * height))
    figure = Figure(figsize=(wide, high), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(rows.numpy(), aspect="auto", vmin=0.0, vmax=max(2.0, experts / active), cmap="viridis")
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("expert")
    axes.set_ylabel("block" if heads == 1 else f"block (its {heads} heads in turn)")
    axes.set_xticks(range(0, experts, -(-experts // LABELS)))
    blocks = height // heads
    shown = range(0, blocks, -(-blocks // LABELS))
    axes.set_yticks([block * heads + (heads - 1) / 2 for block in shown], [str(block) for block in shown])
    if heads > 1:
        for block in range(1, blocks):
            axes.axhline(block * heads - 0.5, color="white", linewidth=1.2)
    figure.colorbar(image, label="load (1 is even)")
    # Inches that the words need: to measure them (tight_layout) would take a third of the time.
    figure.subplots_adjust(left=0.6 / wide, right=1 - 0.55 / wide, bottom=0.5 / high, top=1 - 0.35 / high)
    data = io.BytesIO()
    canvas.print_png(data)
    return data.getvalue()
