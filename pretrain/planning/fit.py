"""`plan.py fit`: whether a run fits a machine, how long it takes, what binds it, and which one change would help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common.errors import ConfigError
from pretrain.config.loading import apply_override, parse_config, to_json
from pretrain.config.rules import check_device, check_ranks
from pretrain.config.schema import Config
from pretrain.engine.optimizer import group_problems
from pretrain.planning import layout_plan
from pretrain.planning.layout_plan import StageMemory, StepTime, Traffic
from pretrain.planning.machine import Machine
from pretrain.planning.measured import RESULTS, Measurements, measurements
from pretrain.planning.memory import USABLE, why_unknown
from pretrain.planning.paces import Assumption, paces, why_no_time
from pretrain.planning.rehearsed_traffic import rehearsed_collectives
from pretrain.planning.step_time import model_flops, stage_flops
from pretrain.planning.stops import CannotRehearse, StepStops

Tell = Callable[[str], None]
"""Takes a line about what is done now: traces take seconds."""


class Change(NamedTuple):
    """What would make a run fit."""

    overrides: tuple[str, ...]
    """KEY=VALUE, for --set."""
    total: int
    """Bytes of the rank that then needs most."""
    time: StepTime | None


@dataclass(frozen=True, kw_only=True)
class FitReport:
    config: Config
    machine: Machine
    data_size: int
    micro_steps: int
    stages: tuple[StageMemory, ...]
    fits: bool | None
    """None: not known."""
    traffic: tuple[tuple[Traffic, ...], ...]
    """Of a rank of each stage."""
    model_flops: int
    """Of an optimizer step, over all ranks."""
    executed_flops: float
    """With what recomputation repeats."""
    bubble: float
    time: StepTime | None
    why_no_time: str | None
    assumptions: tuple[Assumption, ...]
    constraint: str
    change: Change | None
    tried: int
    """Changes whose memory was estimated to find `change`."""

    @property
    def usable(self) -> int | None:
        """Bytes of a GPU that an estimate may fill."""
        return None if self.machine.capacity is None else int(USABLE * self.machine.capacity)

    @property
    def needed(self) -> int:
        """Bytes of the rank that needs most."""
        return max(stage.total for stage in self.stages)


def check_on(config: Config, machine: Machine) -> None:
    """Raises ConfigError if the run would be refused on so many GPUs."""
    check_ranks(config, machine.num_gpus)
    check_device(config, machine.device.device_type)
    for error in group_problems(config):
        raise error


def fit(config: Config, machine: Machine, *, results: Path = RESULTS, tell: Tell = lambda line: None) -> FitReport:
    """Everything about a run on a machine. Raises ConfigError if it would be refused there."""
    check_on(config, machine)
    tell(_told(config))
    stages = layout_plan.stage_memories(config, machine)
    measured = measurements(machine.device, results)
    no_time = why_no_time(config, machine)
    found = None if no_time else paces(config, machine, measured)
    time = None if no_time else layout_plan.step_time(config, machine, measured)
    does_fit = layout_plan.fits(stages, machine) if machine.capacity is not None else None
    change, tried = cheapest_change(config, machine, measured, tell) if does_fit is False else (None, 0)
    flops = stage_flops(config)
    kind = machine.device.device_type
    ranks_of_a_stage = machine.num_gpus // config.parallel.pipeline
    data_size = config.data_size(machine.num_gpus)
    steps = config.micro_steps(data_size)
    return FitReport(
        config=config,
        machine=machine,
        data_size=data_size,
        micro_steps=steps,
        stages=tuple(stages),
        fits=does_fit,
        traffic=tuple(
            tuple(layout_plan.traffic(config, machine, rehearsed_collectives(config, machine.num_gpus, stage, kind)))
            for stage in range(config.parallel.pipeline)
        ),
        model_flops=model_flops(config),
        executed_flops=sum(flops) * steps * ranks_of_a_stage,
        bubble=layout_plan.bubble(config, machine),
        time=time,
        why_no_time=no_time,
        assumptions=found.assumptions if found else (),
        constraint=constraint(machine, does_fit, time),
        change=change,
        tried=tried,
    )


def _told(config: Config) -> str:
    """What takes the time."""
    stages = config.parallel.pipeline
    step = f"rehearsing a step of {'a rank' if stages == 1 else f'a rank of each of {stages} stages'}"
    return f"tracing activations and {step}" if why_unknown(config) is None else step


def constraint(machine: Machine, does_fit: bool | None, time: StepTime | None) -> str:
    """What binds the run, in words."""
    if does_fit is False:
        return f"memory of the {machine.device.unit}"
    if time is None:
        return "not known, because the time of a step is not"
    mean = time.mean
    between = machine.interconnect.what if machine.interconnect else "none"
    words = {
        "compute": "computing",
        "host": f"the host, which launches kernels more slowly than the {machine.device.unit} computes them",
        "memory": f"bandwidth of the {machine.device.unit}'s memory",
        "inside": f"the link inside a node ({machine.device.link})",
        "between": f"the link between nodes ({between})",
        "bubble": "pipeline stages that wait for others (more micro-steps or fewer stages)",
    }
    name = max(words, key=lambda term: getattr(mean, term))
    return f"{words[name]}, {getattr(mean, name) / mean.total:.0%} of the step"


# ------------------------------------------------------------------------------------------------------ the one change


def with_overrides(config: Config, overrides: tuple[str, ...]) -> Config:
    """The configuration with other values. Raises ConfigError if rules refuse it."""
    tree = to_json(config)
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree)


def cheapest_change(
    config: Config, machine: Machine, measured: Measurements, tell: Tell = lambda line: None
) -> tuple[Change | None, int]:
    """The change that costs the least time among those after which the run fits, and how many were tried; None if no
    single one is enough. Times by arithmetic decide the order, so that few are traced."""
    assert machine.capacity is not None
    candidates = []
    for overrides in changes(config, machine):
        try:
            changed = with_overrides(config, overrides)
            check_on(changed, machine)
        except ConfigError:
            continue
        if layout_plan.at_least(changed, machine) <= USABLE * machine.capacity:
            candidates.append((overrides, changed, _time(changed, machine, measured)))
    order = sorted(range(len(candidates)), key=lambda number: (_seconds(candidates[number][2]), number))
    for tried, number in enumerate(order, 1):
        overrides, changed, time = candidates[number]
        tell(f"trying {' '.join(overrides)}")
        try:
            memories = layout_plan.stage_memories(changed, machine, layout_plan.decisive_stages(changed))
        except (StepStops, CannotRehearse):  # not a change to advise
            continue
        if layout_plan.fits(memories, machine):
            return Change(overrides, max(memory.total for memory in memories), time), tried
    return None, len(order)


def changes(config: Config, machine: Machine) -> Iterator[tuple[str, ...]]:
    """What could make a run smaller, one change at a time; the simplest first, as ties are decided by the order."""
    batch, parallel, recompute = config.batch, config.parallel, config.train.recompute
    for size in reversed(range(1, batch.micro_sequences)):
        if batch.micro_sequences % size == 0:
            yield (f"batch.micro_sequences={size}",)
    for kind in {"none": ("selective", "full"), "selective": ("full",), "full": ()}[recompute]:
        yield (f"train.recompute={kind}",)
    for stage in range(parallel.zero + 1, 4):
        yield (f"parallel.zero={stage}",)
    for size in _doubled(parallel.tensor, machine.gpus_per_node):
        yield f"parallel.tensor={size}", "parallel.sequence=true"
    sequence = ("parallel.sequence=true",) if parallel.tensor > 1 and not parallel.sequence else ()
    if sequence:
        yield sequence
    with_expert = (*sequence, *(("parallel.zero=1",) if parallel.zero in (0, 3) else ()))
    with_stages = ("parallel.zero=1",) if parallel.zero != 1 else ()
    for size in _doubled(parallel.expert, machine.num_gpus):
        yield f"parallel.expert={size}", *with_expert
    for size in _doubled(parallel.pipeline, machine.num_gpus):
        yield f"parallel.pipeline={size}", *with_stages
    if not parallel.offload_optimizer:
        yield ("parallel.offload_optimizer=true",)


def _doubled(size: int, most: int) -> Iterator[int]:
    """2, 4, 8, ... times `size`, up to `most`."""
    while (size := 2 * size) <= most:
        yield size


def _time(config: Config, machine: Machine, measured: Measurements) -> StepTime | None:
    if why_no_time(config, machine):
        return None
    return layout_plan.step_time(config, machine, measured)


def _seconds(time: StepTime | None) -> float:
    return float("inf") if time is None else layout_plan.rounded(time.middle)
