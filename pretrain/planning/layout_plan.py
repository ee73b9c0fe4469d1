"""One layout on one machine: what its ranks hold, what they send, and how long a step takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from model.kernels.ops.linear_cross_entropy import working_bytes
from pretrain.config.schema import Config
from pretrain.parallel.layout import RankBytes, state_bytes
from pretrain.planning.gradients import fullest_rank
from pretrain.planning.links import Collective, sent_bytes, spreads
from pretrain.planning.machine import Machine
from pretrain.planning.measured import Measurements
from pretrain.planning.memory import DTYPES, USABLE, MemoryEstimate, estimate, why_unknown
from pretrain.planning.paces import paces
from pretrain.planning.record import Rehearsal
from pretrain.planning.rough_traffic import rough_collectives
from pretrain.planning.step_time import Terms, blocks_of_stages, held_by_stages, stage_works, step_terms
from pretrain.planning.stops import told


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes of a rank of one pipeline stage."""

    stage: int
    blocks: int
    parameters: int
    parts: dict[str, int]
    """What for, in the order of a table; not all of it is there at once."""
    total: int
    """At the highest point of a step; on a CPU with `staging`, which lies in the same memory."""
    staging: int
    """In CPU memory, for a checkpoint that is written while training goes on."""
    offloaded: int
    """In CPU memory, of the optimizer."""


class StepTime(NamedTuple):
    fast: Terms
    slow: Terms

    @property
    def middle(self) -> float:
        """Seconds, half way between the ends: what layouts are ranked by."""
        return (self.fast.total + self.slow.total) / 2

    @property
    def mean(self) -> Terms:
        """Every term half way between the ends."""
        return Terms().plus(self.fast, 0.5).plus(self.slow, 0.5)


class Traffic(NamedTuple):
    """All equal collectives of a rank in an optimizer step."""

    part: str
    kind: str
    group: str
    ranks: int
    link: str
    calls: int
    tensor_bytes: int
    """Of all calls together, as `Collective.num_bytes` counts them."""
    sent: float
    """Bytes that the rank sends."""


def decisive_stages(config: Config) -> list[int]:
    """Pipeline stages one of which needs the most memory. Between the ends a later stage with no more blocks holds no
    more: it has the same parts, and has begun fewer micro-steps when it goes back."""
    blocks, chosen = blocks_of_stages(config), list[int]()
    for stage, number in enumerate(blocks):
        is_between = 0 < stage < len(blocks) - 1
        if not (is_between and any(other > 0 and blocks[other] >= number for other in chosen)):
            chosen.append(stage)
    return chosen


def stage_memories(config: Config, machine: Machine, stages: Sequence[int] | None = None) -> list[StageMemory]:
    """Of `stages`, by default of every pipeline stage. Where the model is in one piece its activations are traced
    (memory.py); elsewhere a step of the fullest rank of each stage is rehearsed."""
    data_size = config.data_size(machine.num_gpus)
    held = held_by_stages(config, data_size)
    found = []
    for stage, blocks in enumerate(blocks_of_stages(config)):
        if stages is not None and stage not in stages:
            continue
        if why_unknown(config) is None:
            kind = machine.device.device_type
            traced = estimate(config, machine.num_gpus, kind)
            parts, total, offloaded = _traced_parts(config, traced, kind), traced.total, 0
        else:
            rank = fullest_rank(config, data_size, stage)
            rehearsal = rehearsed(config, machine.num_gpus, rank, machine.device.device_type)
            parts, total, offloaded = _rehearsed_parts(rehearsal), rehearsal.peak, rehearsal.elsewhere
        beside = copy_beside_a_step(config, machine.num_gpus, stage, machine.device.device_type)
        found.append(
            StageMemory(
                stage=stage,
                blocks=blocks,
                parameters=held[stage].parameters,
                parts={**parts, "checkpoint's copy": beside},
                total=total + beside,
                staging=staging_bytes(config, held[stage], blocks, data_size),
                offloaded=offloaded,
            )
        )
    return found


_rehearsed: dict[tuple[str, int, int, str, int | None], Rehearsal] = {}


def rehearsed(
    config: Config, num_ranks: int, rank: int, device_type: str, most_micro_steps: int | None = None
) -> Rehearsal:
    """A rehearsal, each once in a process. Raises StepStops or CannotRehearse."""
    key = config.model_dump_json(), num_ranks, rank, device_type, most_micro_steps
    if key not in _rehearsed:
        with told():
            from pretrain.planning.rehearsal import rehearse  # imports DeepSpeed

            _rehearsed[key] = rehearse(config, num_ranks, rank, device_type, most_micro_steps=most_micro_steps)
    return _rehearsed[key]


def _traced_parts(config: Config, found: MemoryEstimate, device_type: str) -> dict[str, int]:
    return {
        "weights": found.weights,
        "optimizer": found.optimizer,
        "gradients": max(found.gradients.between, found.gradients.stay),
        "ZeRO buffers": found.gradients.buckets,
        "XL memory": found.memory,
        "CUDA graphs": found.graphs,
        "update": found.gradients.afterwards,
        "kept by a block": found.activations.of_a_layer,
        "kept activations": found.activations.kept,
        "activations' peak": found.activations.peak,
        "loss": _loss_bytes(config, device_type),
    }


def _rehearsed_parts(found: Rehearsal) -> dict[str, int]:
    blocks = [size for name, size in found.kept.items() if "blocks" in name]
    return {
        "weights": found.resting.get("weights", 0),
        "optimizer": found.resting.get("optimizer", 0),
        "gradients": max(found.resting.get("gradients", 0), found.at_peak.get("gradients", 0)),
        "ZeRO buffers": max(found.resting.get("buckets", 0), found.at_peak.get("buckets", 0)),
        "stage borders": found.resting.get("pipeline", 0),
        "DeepSpeed's own": found.resting.get("engine", 0),
        "XL memory": found.resting.get("memory", 0),
        "update": found.at_peak.get("update", 0),
        "kept by a block": max(blocks, default=0),
        "kept activations": sum(found.kept.values()),
        "loss": found.at_peak.get("loss", 0),
    }


def _loss_bytes(config: Config, device_type: str) -> int:
    """Of a model in one piece."""
    tokens = config.batch.micro_sequences * config.model.sequence_length
    dtype = DTYPES[config.train.precision]
    return working_bytes(tokens, config.model.vocab_size, config.model.d_model, dtype, dtype, device_type)


def staging_bytes(config: Config, held: RankBytes, blocks: int, data_size: int) -> int:
    """Bytes of the buffer that a rank copies its share of a checkpoint to: fp32 weights and moments, the moving average
    and the Transformer-XL memory of its streams. Nothing where training waits for the files. blocks: of its stage."""
    if not config.checkpoint.asynchronous:
        return 0
    model, parallel = config.model, config.parallel
    streams = config.batch.global_sequences // data_size
    memory = streams * blocks * model.memory_length * model.d_model * DTYPES[config.train.precision].itemsize
    # At ZeRO 0 every rank holds all, and saves a part of it.
    own = held.optimizer if parallel.zero else -(-held.parameters * state_bytes(config) // data_size)
    return own + memory // (parallel.tensor if parallel.sequence else 1)


def copy_beside_a_step(config: Config, num_ranks: int, stage: int, device_type: str) -> int:
    """Bytes of `staging_bytes` that lie in the memory in which a rank of this stage computes: a CPU's."""
    if device_type != "cpu":
        return 0
    data_size = config.data_size(num_ranks)
    held, blocks = held_by_stages(config, data_size)[stage], blocks_of_stages(config)[stage]
    return staging_bytes(config, held, blocks, data_size)


def at_least(config: Config, machine: Machine) -> int:
    """Bytes of a rank that are there at the end of a forward pass in any case, without a trace: weights, optimizer, and
    the input of each block, which the backward pass needs, for every micro-step that a stage has begun. A bound below
    the estimate."""
    parallel, item = config.parallel, 4 if config.train.precision == "fp32" else 2
    size = config.data_size(machine.num_gpus)
    tokens = config.batch.micro_sequences * config.model.sequence_length
    hidden = item * tokens * config.model.d_model // (parallel.tensor if parallel.sequence else 1)
    needed = 0
    for held, blocks in zip(held_by_stages(config, size), blocks_of_stages(config), strict=True):
        begun = min(config.micro_steps(size), parallel.pipeline - held.stage)
        optimizer = 0 if parallel.offload_optimizer else held.optimizer
        needed = max(needed, held.weights + optimizer + begun * blocks * hidden)
    return needed


def fits(memories: Sequence[StageMemory], machine: Machine) -> bool:
    assert machine.capacity is not None
    return all(memory.total <= USABLE * machine.capacity for memory in memories)


def step_time(config: Config, machine: Machine, measured: Measurements) -> StepTime:
    """Of a run of which `why_no_time` is None, with the traffic by arithmetic: a rehearsed step takes seconds. What a
    GPU reaches depends on the layout as well (CUDA graphs, the size of a measured micro-step), so that each has paces
    of its own."""
    pace = paces(config, machine, measured)
    collectives = [rough_collectives(config, machine.num_gpus, stage) for stage in range(config.parallel.pipeline)]
    works = stage_works(config, config.data_size(machine.num_gpus), collectives)
    return StepTime(*(step_terms(config, machine, works, end) for end in (pace.fast, pace.slow)))


def traffic(config: Config, machine: Machine, collectives: Sequence[Collective]) -> list[Traffic]:
    """Equal collectives of a rank's step together, the largest first."""
    where = spreads(config, config.data_size(machine.num_gpus), machine.gpus_per_node)
    found: dict[tuple[str, str, str, int], list[float]] = {}
    for one in collectives:
        sums = found.setdefault((one.part, one.kind, one.group, one.ranks), [0, 0, 0.0])
        sums[0] += one.count
        sums[1] += one.count * one.num_bytes
        sums[2] += one.count * sent_bytes(one.kind, one.ranks, one.num_bytes)
    rows = [
        Traffic(
            part=part,
            kind=kind,
            group=group,
            ranks=ranks,
            link=where[group].link if ranks > 1 else "none",
            calls=int(calls),
            tensor_bytes=int(size),
            sent=sent,
        )
        for (part, kind, group, ranks), (calls, size, sent) in found.items()
    ]
    return sorted(rows, key=lambda row: (-row.sent, row.part, row.kind, row.group))


def bubble(config: Config, machine: Machine) -> float:
    """Share of a step's micro-steps in which a pipeline stage waits: (stages - 1) / (micro-steps + stages - 1)."""
    stages = config.parallel.pipeline
    return (stages - 1) / (config.micro_steps(config.data_size(machine.num_gpus)) + stages - 1)


def rounded(seconds: float) -> float:
    """Three digits: what an estimate can tell apart."""
    return 0.0 if seconds == 0 else round(seconds, 2 - math.floor(math.log10(seconds)))
