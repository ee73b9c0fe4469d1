"""What devices and links can do at their best, and what is assumed of both: devices.json, read and checked.

Every figure there names its source. What no source says is null there and None here: nothing is guessed, and what
would follow from it is not estimated.
"""

from __future__ import annotations

import difflib
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError

FILE = Path(__file__).with_name("devices.json")
GB, TERA = 1e9, 1e12
PRECISIONS = ("fp32", "bf16", "fp16")
"""train.precision; DeepSpeed's 16-bit dtypes sum in fp32, as the peaks do."""


class Figure(NamedTuple):
    value: float
    source: str
    """Address of the page that says so, or the option that gave it."""


class Range(NamedTuple):
    """Of what is assumed: between these two."""

    low: float
    high: float
    unit: str
    why: str
    """Sources, and what of it has none."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU as torch counts them, or a process of a CPU."""

    name: str
    """As --gpu takes it."""
    what: str
    names: tuple[str, ...] = ()
    """Parts of the name that its driver gives."""
    device_type: str = "cuda"
    memory: Figure | None = None
    """Bytes."""
    flops: dict[str, Figure | None]
    """Dense FLOP/s by train.precision."""
    memory_bandwidth: Figure | None = None
    """Bytes a second, read and written together."""
    link: str = "unknown"
    """What joins the GPUs of a node."""
    link_bandwidth: Figure | None = None
    """Bytes a second in one direction, of one GPU."""
    gpus_per_node: Figure | None = None
    """In the maker's own nodes."""
    interconnect: str | None = None
    """Between the maker's own nodes: a key of `interconnects`."""
    ports_per_node: Figure | None = None
    note: str = ""

    @property
    def unit(self) -> str:
        """What a person calls the device of one rank."""
        return "rank" if self.device_type == "cpu" else "GPU"


@dataclass(frozen=True, kw_only=True)
class Interconnect:
    """A link between nodes."""

    name: str
    what: str
    bandwidth: Figure
    """Bytes a second in one direction, of one port."""


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    devices: dict[str, Device]
    interconnects: dict[str, Interconnect]
    assumptions: dict[str, Range]


@functools.cache
def catalogue(path: Path = FILE) -> Catalogue:
    """All of the file. A figure without a source, or one that is not above 0, is a fault of the file."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    sources = {name: entry["url"] for name, entry in raw["sources"].items()}

    def figure(entry: list[Any] | None, scale: float = 1.0) -> Figure | None:
        if entry is None:
            return None
        value, source = entry
        assert value > 0, f"{path.name}: {entry} is not above 0"
        return Figure(value * scale, sources[source])

    devices = {
        name: Device(
            name=name,
            what=entry["what"],
            names=tuple(entry["names"]),
            device_type=entry["device_type"],
            memory=figure(entry["memory_gb"], GB),
            flops={precision: figure(entry["tflops"][precision], TERA) for precision in PRECISIONS},
            memory_bandwidth=figure(entry["memory_gb_per_second"], GB),
            link=entry["link"],
            link_bandwidth=figure(entry["link_gb_per_second"], GB),
            gpus_per_node=figure(entry["gpus_per_node"]),
            interconnect=entry["interconnect"],
            ports_per_node=figure(entry["ports_per_node"]),
            note=entry["note"],
        )
        for name, entry in raw["devices"].items()
    }
    interconnects = {}
    for name, entry in raw["interconnects"].items():
        bandwidth = figure(entry["gbit_per_second"], GB / 8)
        assert bandwidth is not None, f"{path.name}: {name} has no rate"
        interconnects[name] = Interconnect(name=name, what=entry["what"], bandwidth=bandwidth)
    for device in devices.values():
        assert device.interconnect is None or device.interconnect in interconnects, device.name
    return Catalogue(devices=devices, interconnects=interconnects, assumptions=_assumptions(raw, sources))


def _assumptions(raw: dict[str, Any], sources: dict[str, str]) -> dict[str, Range]:
    found = {}
    for name, entry in raw["assumptions"].items():
        assert 0 < entry["low"] <= entry["high"], f"{FILE.name}: {name} is no range"
        why = [*(sources[source] for source in entry["sources"]), *filter(None, [entry["note"]])]
        assert why, f"{FILE.name}: {name} says neither a source nor that it is assumed"
        found[name] = Range(entry["low"], entry["high"], entry["unit"], "; ".join(why))
    return found


def device_of_card(card: str) -> Device | None:
    """The device whose driver gives it this name, such as "NVIDIA H100 80GB HBM3"; None if it is not known. The longest
    part of a name that fits counts."""
    fitting = [
        (len(part), name)
        for name, device in catalogue().devices.items()
        for part in device.names
        if part.lower() in card.lower()
    ]
    return catalogue().devices[max(fitting)[1]] if fitting else None


def device_named(name: str) -> Device:
    """The device that --gpu names. Raises UserError with the nearest names."""
    devices = catalogue().devices
    if name.lower() in devices:
        return devices[name.lower()]
    raise UserError(
        f"--gpu: {name!r} is not in the table of devices{_nearest(name, list(devices))}; of a device that is not there "
        "give --memory GIB (and --peak-tflops, --link-gb-per-second for times)"
    )


def interconnect_named(name: str) -> Interconnect:
    """The link that --interconnect names. Raises UserError with the nearest names."""
    interconnects = catalogue().interconnects
    if name.lower() in interconnects:
        return interconnects[name.lower()]
    raise UserError(
        f"--interconnect: {name!r} is not in the table of links between nodes{_nearest(name, list(interconnects))}"
    )


def _nearest(name: str, known: list[str]) -> str:
    """Names that begin or look like `name`, or all."""
    lower = name.lower()
    near = [other for other in known if lower in other or other in lower]
    near = near or difflib.get_close_matches(lower, known, n=3, cutoff=0.5)
    if near:
        return f", the nearest are {', '.join(near)}" if len(near) > 1 else f", the nearest is {near[0]}"
    return f", which has {', '.join(known)}"
