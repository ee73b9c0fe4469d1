"""The table of devices: every figure has a source, names are found, and what a user may get wrong is one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from pretrain.planning.devices import FILE, catalogue, device_named, device_of_card, interconnect_named
from pretrain.planning.machine import MachineOptions, machine
from pretrain.report import peak


def test_every_source_is_used_and_every_figure_has_one() -> None:
    raw = json.loads(FILE.read_text(encoding="utf-8"))
    used = set()
    for device in raw["devices"].values():
        figures = [value for key, value in device.items() if key.endswith(("_gb", "_second", "_node"))]
        for entry in (*figures, *device["tflops"].values()):
            if entry is not None:
                used.add(entry[1])
    used |= {entry["gbit_per_second"][1] for entry in raw["interconnects"].values()}
    used |= {source for entry in raw["assumptions"].values() for source in entry["sources"]}
    assert used == raw["sources"].keys()
    assert all(entry["url"].startswith(("https://", "docs/")) for entry in raw["sources"].values())
    assert len(catalogue().devices) == len(raw["devices"])


@pytest.mark.parametrize(
    "card, name, flops",
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb", 989e12),
        ("NVIDIA H100 PCIe", "h100-pcie", 756e12),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb", 312e12),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb", 312e12),
        ("NVIDIA L40S", "l40s", 362e12),
        ("NVIDIA L4", "l4", 121e12),
        ("NVIDIA GB200", "gb200", 2500e12),
        ("Tesla T4", "t4", None),
    ],
)
def test_a_card_is_found_by_the_name_of_its_driver(card: str, name: str, flops: float | None) -> None:
    found = device_of_card(card)
    assert found is not None and found.name == name
    assert (found.flops["bf16"] and found.flops["bf16"].value) == (flops and pytest.approx(flops))


def test_an_unheard_of_card_has_no_device() -> None:
    assert device_of_card("Unheard Of 9000") is None


def test_utilisation_reads_the_same_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "device_name", lambda device: "NVIDIA H200")
    found = peak.find_peak(torch.device("cuda"), "bf16", None)
    assert found is not None and found.flops == pytest.approx(989e12) and "NVIDIA H200" in found.source
    assert peak.find_peak(torch.device("cuda"), "fp32", None) is None
    monkeypatch.setattr(peak, "device_name", lambda device: "Unheard Of 9000")
    assert peak.find_peak(torch.device("cuda"), "bf16", None) is None


def test_units_are_bytes_and_seconds() -> None:
    found = device_named("H100-80GB")
    assert found.memory is not None and found.memory.value == 80e9
    assert found.link_bandwidth is not None and found.link_bandwidth.value == 450e9
    assert interconnect_named("ib-ndr-400").bandwidth.value == 50e9


@pytest.mark.parametrize(
    "options, said",
    [
        (MachineOptions(gpu="h100", gpus=8), "nearest are h100-80gb, h100-pcie, h100-nvl"),
        (MachineOptions(gpu="h100-08gb", gpus=8), "h100-80gb"),
        (MachineOptions(gpu="abacus", gpus=8), "which has gb200"),
        (MachineOptions(gpu="h100-80gb", gpus=12), "--gpus: 12 do not fill nodes of 8; give 8 or 16"),
        (MachineOptions(gpu="h100-80gb", gpus=0), "--gpus: 0 is impossible"),
        (MachineOptions(gpu="h100-80gb", gpus=8, memory_gib=-1.0), "--memory: -1 is impossible"),
        (MachineOptions(gpu="h100-80gb", gpus=8, memory_gib=float("inf")), "--memory: inf is impossible"),
        (MachineOptions(gpu="l40s", gpus=8), "--gpus-per-node: how many l40s"),
        (MachineOptions(gpu="h100-80gb", gpus=8, interconnect="ib-ndr"), "--interconnect: 'ib-ndr'"),
    ],
)
def test_what_a_user_may_get_wrong(options: MachineOptions, said: str) -> None:
    with pytest.raises(UserError, match=r"^--") as refusal:
        machine(options)
    assert said in str(refusal.value)


def test_machines() -> None:
    usual = machine(MachineOptions(gpu="h100-80gb", gpus=64))
    assert (usual.num_nodes, usual.gpus_per_node, usual.ports_per_node, usual.between) == (8, 8, 8, 50e9)
    other = machine(MachineOptions(gpu="h100-80gb", gpus=64, interconnect="ethernet-25"))
    assert other.between == 25e9 / 8 / 8 and "1 port of ethernet-25" in other.assumed[0]
    two = machine(MachineOptions(gpu="h100-80gb", gpus=64, interconnect="ethernet-25", ports_per_node=2))
    assert two.between == 2 * other.between
    alone = machine(MachineOptions(gpu="h100-80gb", gpus=4))
    assert (alone.num_nodes, alone.gpus_per_node, alone.between) == (1, 4, None)
    unknown = machine(MachineOptions(gpu="prototype", gpus=2, memory_gib=1.5, gpus_per_node=2))
    assert unknown.capacity == 3 * 2**29 and unknown.device.flops == {}


def test_a_figure_without_a_source_is_a_fault_of_the_file(tmp_path: Path) -> None:
    raw = json.loads(FILE.read_text(encoding="utf-8"))
    raw["devices"]["t4"]["memory_gb"] = [16, "hearsay"]
    path = tmp_path / "devices.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(KeyError, match="hearsay"):
        catalogue(path)
