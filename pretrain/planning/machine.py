"""The GPUs and links that a run is planned for: the table's, or what options of the command line say of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from common.errors import UserError
from common.units import GIB
from pretrain.planning.devices import (
    GB,
    TERA,
    Device,
    Figure,
    Interconnect,
    catalogue,
    device_named,
    interconnect_named,
)


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """As given on the command line; None: what the table says."""

    gpu: str
    gpus: int
    gpus_per_node: int | None = None
    interconnect: str | None = None
    ports_per_node: int | None = None
    memory_gib: float | None = None
    peak_tflops: float | None = None
    """Dense, in the precision of the run."""
    link_gb_per_second: float | None = None
    """One direction."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    device: Device
    num_gpus: int
    gpus_per_node: int
    interconnect: Interconnect | None
    """None: one node, or not known."""
    ports_per_node: int
    """Of the interconnect, for all GPUs of a node together."""
    assumed: tuple[str, ...] = ()
    """What was neither given nor in the table, in words."""

    @property
    def num_nodes(self) -> int:
        return -(-self.num_gpus // self.gpus_per_node)

    @property
    def capacity(self) -> int | None:
        """Bytes of a GPU."""
        return None if self.device.memory is None else int(self.device.memory.value)

    @property
    def between(self) -> float | None:
        """Bytes a second that one GPU sends to other nodes while all of its node do, at the data sheet's rate."""
        if self.interconnect is None:
            return None
        return self.interconnect.bandwidth.value * self.ports_per_node / self.gpus_per_node


def machine(options: MachineOptions) -> Machine:
    """Raises UserError where an option is wrong or something cannot be done without it."""
    _check_numbers(options)
    device = _device(options)
    per_node = _gpus_per_node(options, device)
    if options.gpus > per_node and options.gpus % per_node:
        below = options.gpus // per_node * per_node
        raise UserError(
            f"--gpus: {options.gpus} do not fill nodes of {per_node}; give {below} or {below + per_node}, or another "
            "--gpus-per-node"
        )
    per_node = min(per_node, options.gpus)
    interconnect, ports, assumed = _between(options, device, is_one_node=options.gpus <= per_node)
    return Machine(
        device=device,
        num_gpus=options.gpus,
        gpus_per_node=per_node,
        interconnect=interconnect,
        ports_per_node=ports,
        assumed=tuple(assumed),
    )


def _check_numbers(options: MachineOptions) -> None:
    """Every number must be above 0."""
    for name in ("gpus", "gpus_per_node", "ports_per_node", "memory_gib", "peak_tflops", "link_gb_per_second"):
        value = getattr(options, name)
        if value is not None and not 0 < value < 1e9:
            option = "--memory" if name == "memory_gib" else "--" + name.replace("_", "-")
            raise UserError(f"{option}: {value:g} is impossible; give a number above 0")


def _device(options: MachineOptions) -> Device:
    """The table's, with what options say instead."""
    if options.gpu.lower() in catalogue().devices or options.memory_gib is None:
        device = device_named(options.gpu)
    else:
        device = Device(name=options.gpu, what=f"{options.gpu}, which is not in the table", flops={})
    if options.memory_gib is not None:
        device = replace(device, memory=Figure(options.memory_gib * GIB, "--memory"))
    if options.peak_tflops is not None:
        peak = Figure(options.peak_tflops * TERA, "--peak-tflops")
        device = replace(device, flops=dict.fromkeys(("fp32", "bf16", "fp16"), peak))
    if options.link_gb_per_second is not None:
        device = replace(device, link_bandwidth=Figure(options.link_gb_per_second * GB, "--link-gb-per-second"))
    return device


def _gpus_per_node(options: MachineOptions, device: Device) -> int:
    if options.gpus_per_node is not None:
        return options.gpus_per_node
    if device.gpus_per_node is not None:
        return int(device.gpus_per_node.value)
    if options.gpus == 1 or device.device_type == "cpu":
        return options.gpus
    raise UserError(
        f"--gpus-per-node: how many {device.name} stand in a node is not in the table of devices; give it, e.g. "
        f"--gpus-per-node {min(options.gpus, 8)}"
    )


def _between(
    options: MachineOptions, device: Device, *, is_one_node: bool
) -> tuple[Interconnect | None, int, list[str]]:
    """The link between nodes, its ports in a node, and what was assumed of it."""
    name = options.interconnect or device.interconnect
    if options.interconnect is not None:
        interconnect_named(options.interconnect)  # a misspelt one is refused on one node too
    if is_one_node or name is None:
        return None, options.ports_per_node or 1, []
    usual = device.ports_per_node if name.lower() == device.interconnect else None
    if options.ports_per_node is not None:
        return interconnect_named(name), options.ports_per_node, []
    if usual is not None:
        return interconnect_named(name), int(usual.value), []
    return interconnect_named(name), 1, [f"1 port of {name} in a node (--ports-per-node says otherwise)"]
