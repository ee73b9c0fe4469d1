"""How long an optimizer step takes: arithmetic from peaks, bandwidths and efficiencies, all of which are listed with
the result. Two ends of a range are computed, one with what helps everywhere and one with what does not.

    micro-step = max(FLOPs / (peak x efficiency), launches x time of a launch) + gradients added up + its links
                 + what selective recomputation repeats
    step       = (micro-steps + stages - 1) x micro-step of the slowest stage + links of the update + Adam

The fast end hides the reduction of gradients behind the backward pass (two thirds of the computing), where the engine
overlaps them, half of what the tensor groups send, and the messages between stages. The slow end hides nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields

from model.costs import training_flops_per_token
from pretrain.config.schema import Config
from pretrain.engine.deepspeed_json import deepspeed_json
from pretrain.parallel.layout import RankBytes, rank_bytes
from pretrain.parallel.stages import stage_bounds
from pretrain.planning.links import INSIDE, Collective, Rates, Spread, seconds, spreads
from pretrain.planning.machine import Machine

BACKWARD = 2 / 3
"""Share of a micro-step's computing that is its backward pass."""
REDUCTIONS = ("all_reduce", "reduce_scatter")
GRADIENT_GROUPS = ("data", "expert data")


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Seconds of a step by what they are spent on."""

    compute: float = 0.0
    host: float = 0.0
    """The GPU waits for the host to launch kernels."""
    memory: float = 0.0
    """Gradients that are added up, what selective recomputation repeats, and Adam: bound by the bandwidth of the GPU's
    memory."""
    inside: float = 0.0
    """Links inside a node."""
    between: float = 0.0
    """Links between nodes."""
    bubble: float = 0.0
    """Pipeline stages that wait for others."""

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def plus(self, other: Terms, times: float = 1.0) -> Terms:
        """self + times x other."""
        return Terms(**{f.name: getattr(self, f.name) + times * getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True, kw_only=True)
class StageWork:
    """What a rank of a pipeline stage does."""

    flops: float
    """Of a micro-step, executed ones: recomputation included."""
    launched: float
    """Blocks whose kernels the host launches in a micro-step; a repeated forward pass counts as half a block."""
    activations: float
    """Numbers in the hidden states between the blocks, all together: what selective recomputation repeats grows with
    them. 0 without it."""
    parameters: int
    """That the rank computes with."""
    optimizer: int
    """Bytes of master weights and moments that the rank updates."""
    collectives: tuple[Collective, ...]
    """Of an optimizer step."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """One end of the range: what a GPU reaches."""

    flops: float
    """A second."""
    memory: float
    """Bytes a second."""
    launches: float
    """Seconds in which the host launches a block, forward and backward."""
    repeated: float
    """Bytes read and written for each of `StageWork.activations`."""
    rates: Rates
    hides: bool
    """Whether communication is hidden behind computing where the engine allows it."""


def model_flops(config: Config) -> int:
    """FLOPs of an optimizer step that the model needs, over all ranks: what utilisation counts."""
    tokens = config.batch.global_sequences * config.model.sequence_length
    return tokens * training_flops_per_token(config.model)


def stage_flops(config: Config) -> list[float]:
    """FLOPs of a micro-step that a rank of each stage executes. `full` recomputation repeats the forward pass of the
    blocks, a third; `selective` repeats no product."""
    model, parallel = config.model, config.parallel
    tokens = config.batch.micro_sequences * model.sequence_length
    head = 6 * model.vocab_size * model.d_model
    block = (training_flops_per_token(model) - head) / model.num_layers
    block *= 4 / 3 if config.train.recompute == "full" else 1
    last = parallel.pipeline - 1
    return [
        tokens * (block * blocks + head * (stage == last)) / parallel.tensor
        for stage, blocks in enumerate(blocks_of_stages(config))
    ]


def blocks_of_stages(config: Config) -> list[int]:
    """Number of blocks of each pipeline stage. The list of layers begins with the embedding and ends with final norm
    and head."""
    bounds = stage_bounds(config)
    first, last = 1, config.model.num_layers
    return [min(end - 1, last) - max(start, first) + 1 for start, end in itertools.pairwise(bounds)]


_held: dict[tuple[object, ...], list[RankBytes]] = {}


def held_by_stages(config: Config, data_size: int) -> list[RankBytes]:
    """`rank_bytes`, each once in a process: a search asks for thousands of layouts, which differ in micro-batches."""
    train = config.train
    key = config.model, config.parallel, train.precision, train.recompute, train.ema_decay, data_size
    if key not in _held:
        _held[key] = rank_bytes(config, data_size)
    return _held[key]


def stage_works(config: Config, data_size: int, collectives: Sequence[Sequence[Collective]]) -> list[StageWork]:
    """collectives: of a rank of each stage."""
    held = held_by_stages(config, data_size)
    return [
        StageWork(
            flops=flops,
            launched=blocks * (1.0 if config.train.recompute == "none" else 1.5),
            activations=blocks * _repeated_width(config),
            parameters=held[stage].parameters,
            optimizer=held[stage].optimizer,
            collectives=tuple(collectives[stage]),
        )
        for stage, (flops, blocks) in enumerate(zip(stage_flops(config), blocks_of_stages(config), strict=True))
    ]


def step_terms(config: Config, machine: Machine, works: Sequence[StageWork], pace: Pace) -> Terms:
    """Seconds of a step, by the stage whose micro-steps take longest."""
    data_size = config.data_size(machine.num_gpus)
    micro_steps = config.micro_steps(data_size)
    where = spreads(config, data_size, machine.gpus_per_node)
    overlaps = pace.hides and _reduces_in_the_backward_pass(config, data_size)
    links = Links(where, overlaps, _gradient_bytes(config))
    slowest = max((_micro_step(work, micro_steps, pace, links) for work in works), key=_total)
    update = max((_update(work, pace, links, behind=slowest.compute) for work in works), key=_total)
    return Terms(bubble=(config.parallel.pipeline - 1) * slowest.total).plus(slowest, micro_steps).plus(update)


@dataclass(frozen=True)
class Links:
    """What communication needs to know."""

    where: dict[str, Spread]
    overlaps: bool
    """Whether gradients are reduced during the backward pass, and that counts."""
    gradient_bytes: int
    """Read and written per parameter and micro-step."""

    def hidden(self, computing: float) -> float:
        """Seconds of reductions that a micro-step of so many seconds of computing hides."""
        return BACKWARD * computing if self.overlaps else 0.0


def _micro_step(work: StageWork, micro_steps: int, pace: Pace, links: Links) -> Terms:
    """A micro-step of a rank."""
    computing = work.flops / pace.flops
    launching = work.launched * pace.launches
    sent, reductions = Terms(), Terms()
    for collective in work.collectives:
        if collective.part != "micro-step":
            continue
        one = _call(collective, pace, links)
        times = collective.count / micro_steps
        if collective.group in GRADIENT_GROUPS:  # ZeRO 2 reduces, and ZeRO 3 gathers, while the passes go on
            reductions = reductions.plus(one, times)
        else:
            sent = sent.plus(one, times * _exposed(collective, pace))
    own = Terms(
        compute=computing,
        host=max(0.0, launching - computing),
        memory=(links.gradient_bytes * work.parameters + pace.repeated * work.activations) / pace.memory,
    )
    return own.plus(sent).plus(_less(reductions, links.hidden(computing)))


def _update(work: StageWork, pace: Pace, links: Links, *, behind: float) -> Terms:
    """What follows the last micro-step, of which `behind` seconds compute: gradients of the ranks are added up, Adam
    reads and writes its states, and new weights are gathered."""
    reductions, rest = Terms(), Terms()
    for collective in work.collectives:
        if collective.part == "update":
            one = _call(collective, pace, links)
            is_gradient = collective.group in GRADIENT_GROUPS and collective.kind in REDUCTIONS
            if is_gradient:
                reductions = reductions.plus(one, collective.count)
            else:
                rest = rest.plus(one, collective.count)
    adam = 2.5 * work.optimizer / pace.memory  # 12 bytes read and written, 4 of gradients read, 2 of weights written
    return _less(reductions, links.hidden(behind)).plus(rest).plus(Terms(memory=adam))


def _call(collective: Collective, pace: Pace, links: Links) -> Terms:
    """One call, on the link that it crosses."""
    if collective.ranks == 1:
        return Terms()
    spread = links.where[collective.group]
    taken = seconds(collective, spread, pace.rates)
    return Terms(inside=taken) if spread.link == INSIDE else Terms(between=taken)


def _exposed(collective: Collective, pace: Pace) -> float:
    """Share of a collective's time that is not hidden behind computing."""
    if not pace.hides:
        return 1.0
    return {"tensor": 0.5, "pipeline": 0.0}.get(collective.group, 1.0)


def _less(terms: Terms, hidden: float) -> Terms:
    """`terms` of communication, `hidden` seconds shorter."""
    total = terms.total
    return terms.plus(terms, -min(hidden, total) / total) if total else terms


def _repeated_width(config: Config) -> float:
    """Numbers in the hidden state of a micro-step on a rank, where selective recomputation repeats what is made of
    it."""
    if config.train.recompute != "selective":
        return 0.0
    tokens = config.batch.micro_sequences * config.model.sequence_length
    return tokens * config.model.d_model / (config.parallel.tensor if config.parallel.sequence else 1)


def _total(terms: Terms) -> float:
    return terms.total


def _gradient_bytes(config: Config) -> int:
    """Read and written per parameter when a micro-step's gradients join the sum: docs/parallelism.md counts those of
    ZeRO's optimizer and of BF16_Optimizer, which pipelines keep; at ZeRO 0 autograd adds in fp32."""
    if config.parallel.zero == 0:
        return 12
    return 18 if config.parallel.pipeline > 1 and config.train.precision == "bf16" else 10


def _reduces_in_the_backward_pass(config: Config, data_size: int) -> bool:
    """Whether DeepSpeed sums gradients while the last backward pass goes on (docs/parallelism.md). Pipelines, which
    cannot, may not have the key."""
    settings = deepspeed_json(config, data_size)["zero_optimization"]
    default = config.parallel.zero == 3  # DeepSpeed's own
    return bool(settings.get("overlap_comm", default))
