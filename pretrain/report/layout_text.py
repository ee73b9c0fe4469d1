"""Groups of ranks and pipeline stages in words."""

from __future__ import annotations

import numpy as np

from pretrain.config.schema import Config
from pretrain.parallel.stages import stage_bounds


def groups_text(groups: np.ndarray, *, most: int = 4) -> str:
    """`0-1, 2-3, ...`: the first groups, each as a range (with its stride if that is not 1)."""
    texts = []
    for group in groups[:most]:
        stride = int(group[1] - group[0])
        texts.append(f"{group[0]}-{group[-1]}" + (f" by {stride}" if stride > 1 and len(group) > 2 else ""))
        if len(group) == 2 and stride > 1:
            texts[-1] = f"{group[0]},{group[-1]}"
    return ", ".join(texts) + (f", ... ({len(groups)} groups)" if len(groups) > most else "")


def stage_text(config: Config, stage: int) -> str:
    """What a pipeline stage holds, e.g. `embedding, blocks 0-8`."""
    bounds, num_layers = stage_bounds(config), config.model.num_layers
    blocks = [layer - 1 for layer in range(bounds[stage], bounds[stage + 1]) if 1 <= layer <= num_layers]
    parts = ["embedding"] if stage == 0 else []
    parts.append(f"blocks {blocks[0]}-{blocks[-1]}" if len(blocks) > 1 else f"block {blocks[0]}")
    parts += ["final norm, output layer"] if stage == config.parallel.pipeline - 1 else []
    return ", ".join(parts)
