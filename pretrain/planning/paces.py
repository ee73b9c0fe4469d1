"""What a GPU is taken to reach: peaks of data sheets times assumed efficiencies, or measurements in their place. Every
number that a step time rests on is a line of the list that comes with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from common.tables import counted
from model.costs import formula_parameters, training_flops_per_token
from pretrain.config.graph_rules import takes_graphs
from pretrain.config.schema import Config
from pretrain.planning.devices import GB, TERA, Figure, Range, catalogue
from pretrain.planning.links import Rates
from pretrain.planning.machine import Machine
from pretrain.planning.measured import DENSE, Measurements, MicroStep, has_experts, kind_of
from pretrain.planning.step_time import Pace

MICRO = 1e-6


class Assumption(NamedTuple):
    """One line of what a step time rests on."""

    what: str
    value: str
    source: str


class Paces(NamedTuple):
    fast: Pace
    slow: Pace
    assumptions: tuple[Assumption, ...]


def why_no_time(config: Config, machine: Machine) -> str | None:
    """What rules a step time out; None if there is one."""
    device, precision = machine.device, config.train.precision
    if device.flops.get(precision) is None:
        option = "give it with --peak-tflops"
        return f"the peak of {device.name} in {precision} is not in the table of devices: {option}"
    if machine.gpus_per_node > 1 and device.link_bandwidth is None:
        option = "give it with --link-gb-per-second"
        return f"the rate of the link between {device.name} of a node is not in the table of devices: {option}"
    if machine.num_nodes > 1 and machine.interconnect is None:
        known = ", ".join(catalogue().interconnects)
        return f"the link between nodes of {device.name} is not known: give --interconnect, one of {known}"
    if config.parallel.offload_optimizer:
        return "parallel.offload_optimizer: how fast the CPUs of a node update the weights is not known"
    return None


def paces(config: Config, machine: Machine, measured: Measurements) -> Paces:
    """Both ends, for a configuration and machine of which `why_no_time` is None."""
    lines: list[Assumption] = []
    compute, peak = _compute(config, machine, measured, lines)
    memory = _memory(machine, measured, lines)
    inside, between, starts = _link_rates(machine, lines)
    launch = _launches(config, machine, measured, lines)
    repeated = _repeated(config, lines)
    fast, slow = (
        Pace(
            flops=compute[end] * peak,
            memory=memory[end],
            launches=launch[end],
            repeated=repeated[end],
            rates=Rates(inside[end], between[end], starts[0][end], starts[1][end]),
            hides=end == 0,
        )
        for end in (0, 1)
    )
    lines.append(
        Assumption(
            "overlap",
            "fast: all that the engine allows; slow: none",
            "pretrain/planning/step_time.py says what is hidden behind what",
        )
    )
    return Paces(fast, slow, tuple(lines))


Ends = tuple[float, float]
"""Fast, slow."""


def _compute(config: Config, machine: Machine, measured: Measurements, lines: list[Assumption]) -> tuple[Ends, float]:
    """Share of the peak that products reach, and the peak."""
    device, precision = machine.device, config.train.precision
    figure = device.flops[precision]
    assert figure is not None
    peak = figure.value
    name = f"peak of {device.name}, {precision}"
    lines.append(Assumption(name, f"{peak / TERA:g} TFLOP/s", figure.source))
    ranks = config.data_size(machine.num_gpus)
    own = measured.of_model(config, ranks)
    if own is not None:
        share = own.tokens_per_second * training_flops_per_token(config.model) / peak
        value = f"{share:.1%} of the peak, measured with this model and {own.sequences} sequences at once"
        lines.append(Assumption("computing", value, own.source))
        return (share, share), peak
    others = _of_others(config, ranks, measured)
    if others and precision == "bf16":
        nearest = _nearest(config, others)
        slowest = min(others, key=_flops)
        low, high = _flops(slowest) / peak, _flops(nearest) * nearest.seconds / nearest.busy / peak
        value = (
            f"{low:.1%} of the peak, the least that a model of its kind reached ({_part(slowest)}), to {high:.1%}, "
            f"while the GPU was busy with the nearest one ({_part(nearest)})"
        )
        lines.append(Assumption("computing", value, "; ".join(sorted({slowest.source, nearest.source}))))
        return (high, low), peak
    kind = "models with experts" if has_experts(config.model) else "dense models"
    assumed = catalogue().assumptions[f"compute of {kind}"]
    high = assumed.high
    if measured.product is not None and precision == "bf16":
        high = min(high, measured.product / peak)
        lines.append(
            Assumption("largest product", f"{measured.product / TERA:.4g} TFLOP/s measured", measured.ceilings_source)
        )
    lines.append(Assumption(f"computing, {kind}", f"{assumed.low:.0%} to {high:.0%} {assumed.unit}", assumed.why))
    return (high, min(assumed.low, high)), peak


def _of_others(config: Config, data_size: int, measured: Measurements) -> list[MicroStep]:
    """Micro-steps of the shipped models, with or without experts as the run's model has; of each model the one with the
    number of tokens nearest to the run's."""
    wanted = kind_of(config, data_size) if has_experts(config.model) else DENSE
    tokens = config.batch.micro_sequences * config.model.sequence_length
    nearest: dict[int, MicroStep] = {}
    for step in sorted(measured.micro_steps, key=lambda step: (-abs(step.tokens - tokens), step.source)):
        if step.kind == wanted and step.flops_per_second is not None:
            nearest[step.parameters] = step
    return list(nearest.values())


def _nearest(config: Config, others: Sequence[MicroStep]) -> MicroStep:
    """Of models with the run's kind of positions, where there are any, the one nearest in size: the small kernels of
    Transformer-XL keep a GPU from what it reaches with rotary positions."""
    alike = [step for step in others if step.positions == config.model.position.type]
    size = formula_parameters(config.model).total
    return min(alike or others, key=lambda step: (abs(math.log(step.parameters / size)), step.source))


def _flops(step: MicroStep) -> float:
    assert step.flops_per_second is not None
    return step.flops_per_second


def _part(step: MicroStep) -> str:
    return step.source.partition(" on ")[0]


def _memory(machine: Machine, measured: Measurements, lines: list[Assumption]) -> Ends:
    """Bytes a second."""
    if measured.copy is not None:
        value = f"{measured.copy / GB:,.0f} GB/s, measured"
        lines.append(Assumption("memory bandwidth", value, measured.ceilings_source))
        return measured.copy, measured.copy
    figure = machine.device.memory_bandwidth
    if figure is None:
        lines.append(
            Assumption("memory bandwidth", "unknown", "adding up gradients and Adam's update are not in the times")
        )
        return math.inf, math.inf
    return _share(figure, "memory bandwidth", catalogue().assumptions["memory bandwidth"], lines)


def _share(figure: Figure, name: str, assumed: Range, lines: list[Assumption]) -> Ends:
    """A bandwidth of a data sheet, and which share of it is reached."""
    value = f"{figure.value / GB:,.4g} GB/s, of which {assumed.low:.0%} to {assumed.high:.0%}"
    lines.append(Assumption(name, value, f"{figure.source}; {assumed.why}"))
    return figure.value * assumed.high, figure.value * assumed.low


def _link_rates(machine: Machine, lines: list[Assumption]) -> tuple[Ends, Ends, tuple[Ends, Ends]]:
    """Bytes a second inside a node and, of one GPU, between nodes, and the seconds that a collective takes to start;
    infinite and 0 where there is no such link."""
    assumptions, device = catalogue().assumptions, machine.device
    inside, between = (math.inf, math.inf), (math.inf, math.inf)
    starts: list[Ends] = [(0.0, 0.0), (0.0, 0.0)]
    if machine.gpus_per_node > 1 and device.link_bandwidth is not None:
        kind = "link inside a node, PCIe" if device.link.startswith("PCIe") else "link inside a node"
        name = f"{device.link}, one direction of a GPU"
        inside = _share(device.link_bandwidth, name, assumptions[kind], lines)
        starts[0] = _start("inside a node", lines)
    if machine.interconnect is not None and machine.between is not None:
        port = machine.interconnect.bandwidth
        ports = counted(machine.ports_per_node, "port")
        name = f"{machine.interconnect.what}, {ports} for {machine.gpus_per_node} GPUs, one direction of a GPU"
        between = _share(Figure(machine.between, port.source), name, assumptions["link between nodes"], lines)
        starts[1] = _start("between nodes", lines)
    return inside, between, (starts[0], starts[1])


def _start(where: str, lines: list[Assumption]) -> Ends:
    assumed = catalogue().assumptions[f"start of a collective {where}"]
    value = f"{assumed.low:g} to {assumed.high:g} {assumed.unit}"
    lines.append(Assumption(f"start of a collective {where}", value, assumed.why))
    return assumed.low * MICRO, assumed.high * MICRO


def _launches(config: Config, machine: Machine, measured: Measurements, lines: list[Assumption]) -> Ends:
    """Seconds in which the host launches a block. In the time of a measured micro-step they are contained."""
    kind, ranks = machine.device.device_type, config.data_size(machine.num_gpus)
    graphs = takes_graphs(config, data_size=ranks, device_type=kind)
    if kind != "cuda" or graphs or measured.of_model(config, ranks):
        return 0.0, 0.0
    count, each = (catalogue().assumptions[name] for name in ("launches of a block", "launch of a kernel by the host"))
    value = f"{count.low:g} to {count.high:g} a block and micro-step, {each.low:g} to {each.high:g} {each.unit} each"
    lines.append(Assumption("launches by the host", value, f"{count.why}; {each.why}"))
    return count.low * each.low * MICRO, count.high * each.high * MICRO


def _repeated(config: Config, lines: list[Assumption]) -> Ends:
    """Bytes that selective recomputation reads and writes again, as `Pace.repeated` counts."""
    assumed = catalogue().assumptions["repeated by selective recomputation"]
    if config.train.recompute == "selective":
        value = f"{assumed.low:g} to {assumed.high:g} {assumed.unit}"
        lines.append(Assumption("repeated by selective recomputation", value, assumed.why))
    return assumed.low, assumed.high
