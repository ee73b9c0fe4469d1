"""What a rank sends in a step, by arithmetic: enough to rank hundreds of layouts, each in a millisecond.

The collectives themselves are counted where the engine is rehearsed (rehearsed_traffic.py); what is left out here is
small: norms, counts of routers, the embedding, the output layer and its loss.
"""

from __future__ import annotations

from collections.abc import Iterator

from model.config import SigmaMoEConfig
from pretrain.config.schema import Config
from pretrain.planning.links import Collective
from pretrain.planning.step_time import blocks_of_stages, held_by_stages
from pretrain.planning.zero_3_gathers import gathered

FP32 = 4
"""Bytes of a number."""


def rough_collectives(config: Config, num_ranks: int, stage: int) -> list[Collective]:
    """Of a rank of a pipeline stage in an optimizer step, in no order."""
    return [*_gradients_and_weights(config, num_ranks, stage), *_activations(config, num_ranks, stage)]


def expert_parameters(config: Config, stage: int) -> int:
    """Of sigma-MoE experts that expert-parallel ranks divide, on one rank of a stage; 0 without expert parallelism."""
    feedforward, expert = config.model.feedforward, config.parallel.expert
    if expert == 1:
        return 0
    assert isinstance(feedforward, SigmaMoEConfig), "the one layer whose experts travel"
    one = config.model.d_model * (feedforward.up_width + feedforward.expert_size)
    return blocks_of_stages(config)[stage] * feedforward.num_experts // expert * one


def _gradients_and_weights(config: Config, num_ranks: int, stage: int) -> Iterator[Collective]:
    """ZeRO's: gradients are summed once a step, or at stages 2 and 3 in every micro-step; weights are gathered after
    the update, at stage 3 for the passes, but for what stays whole or stays from the first to the second."""
    parallel, weight = config.parallel, FP32 if config.train.precision == "fp32" else 2
    data = config.data_size(num_ranks)
    micro_steps = config.micro_steps(data)
    experts = expert_parameters(config, stage)
    rest = held_by_stages(config, data)[stage].parameters - experts
    groups = [("data", data, rest), ("expert data", data * parallel.tensor // parallel.expert, experts)]
    for group, ranks, parameters in groups:
        if ranks == 1 or not parameters:
            continue
        part, times = ("micro-step", micro_steps) if parallel.zero >= 2 else ("update", 1)
        kind = "reduce_scatter" if parallel.zero == 3 else "all_reduce"
        item = 2 if parallel.reduce_dtype == "bf16" else FP32
        yield Collective(kind, group, ranks, item * parameters, part, times)
        if parallel.zero == 3:
            sent = gathered(config)
            yield Collective("all_gather", group, ranks, weight * sent.micro_step, "micro-step", micro_steps)
            yield Collective("all_gather", group, ranks, weight * sent.update, "update")
        elif parallel.zero:
            yield Collective("all_gather", group, ranks, weight * parameters, "update")


def _activations(config: Config, num_ranks: int, stage: int) -> Iterator[Collective]:
    """Hidden states, twice forward and twice backward of a block (docs/parallelism.md), and at the borders of stages.
    Recomputation of either kind repeats the forward pass of a block up to what it ends with."""
    parallel, model, again = config.parallel, config.model, config.train.recompute != "none"
    item = FP32 if config.train.precision == "fp32" else 2
    micro_steps, blocks = config.micro_steps(config.data_size(num_ranks)), blocks_of_stages(config)[stage]
    tokens = config.batch.micro_sequences * model.sequence_length
    hidden = item * tokens * model.d_model
    divided = model.feedforward.routers if parallel.expert > 1 else None
    if parallel.tensor > 1:
        layers = 1 if divided else 2  # experts of other ranks take the tokens that a rank has
        times = {"all_reduce": 2 * layers + again}
        if parallel.sequence:
            times = {"all_gather": (2 + again) * layers, "reduce_scatter": 2 * layers + again}
        for kind, of_a_block in times.items():
            yield Collective(kind, "tensor", parallel.tensor, hidden, "micro-step", of_a_block * blocks * micro_steps)
    if divided:
        routed = hidden * divided.active // (parallel.tensor if parallel.sequence else 1)
        count = (4 + 2 * again) * blocks * micro_steps
        yield Collective("all_to_all", "expert", parallel.expert, routed, "micro-step", count)
    borders = (stage > 0) + (stage < parallel.pipeline - 1)
    if borders:
        state = hidden // (parallel.tensor if parallel.sequence else 1)
        yield Collective("send", "pipeline", parallel.pipeline, state, "micro-step", borders * micro_steps)
