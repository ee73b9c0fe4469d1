"""Which layers each pipeline stage holds."""

from __future__ import annotations

import functools

from model.costs import attention_macs, feedforward_macs
from pretrain.config.schema import Config


def layer_costs(config: Config) -> list[int]:
    """Relative time of every layer on one sequence, forward and backward: MACs, and a third more where a block's
    forward pass is computed again. Embedding and final norm count as nothing."""
    model = config.model
    block = attention_macs(model) + feedforward_macs(model)
    head = model.sequence_length * model.d_model * model.vocab_size
    passes = 4 if config.train.recompute == "full" else 3
    return [0, *[passes * block] * model.num_layers, 0, 3 * head]


def stage_bounds(config: Config) -> list[int]:
    """Stage s holds the layers bounds[s] .. bounds[s + 1] - 1 of the model's list: each has at least one block, and the
    longest stage is as short as possible; so is the longest of the first s stages for the layers that they hold. Among
    such divisions it is the one with short early stages, because a stage keeps the activations of as many micro-steps
    as stages follow it."""
    return list(_bounds(tuple(layer_costs(config)), config.parallel.pipeline))


@functools.lru_cache(maxsize=256)
def _bounds(costs: tuple[int, ...], stages: int) -> tuple[int, ...]:
    """Of layers with these costs: embedding, blocks, final norm, output layer."""
    blocks = len(costs) - 3
    assert stages <= blocks, "a stage without a block"
    # Units are the blocks; the first brings the embedding along, the last the final norm and the output layer.
    unit = list(costs[1 : blocks + 1])
    unit[0] += costs[0]
    unit[-1] += sum(costs[blocks + 1 :])
    best: dict[tuple[int, int], tuple[int, list[int]]] = {(0, 0): (0, [0])}  # (stages, blocks) -> longest, cuts
    for stage in range(1, stages + 1):
        for end in range(stage, blocks + 1):
            before = [(best[stage - 1, start], start) for start in range(stage - 1, end) if (stage - 1, start) in best]
            best[stage, end] = min(
                (max(longest, sum(unit[start:end])), [*cuts, end]) for (longest, cuts), start in before
            )
    cuts = best[stages, blocks][1]
    return (0, *(cut + 1 for cut in cuts[1:-1]), len(costs))
