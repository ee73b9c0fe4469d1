"""The backend of every op of a model, and the table of SwitchHead's shapes that a measurement on a GPU changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.kernels import choice
from model.kernels.choice import Backends, ProjectionShape
from pretrain.config.loading import load_config

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
SWITCHHEAD = ("switchhead_value", "switchhead_output")


def chosen(name: str, requested: str = "auto", device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """Of SwitchHead's two ops, in a shipped configuration."""
    backends = Backends.choose(requested, load_config(CONFIGS / name, []).model, device_type=device, dtype=dtype)
    others = {vars(backends)[op] for op in vars(backends) if op not in (*SWITCHHEAD, "route")}
    assert others <= {"triton", "cpu", "reference"}
    assert backends.route == ("dense" if requested == "dense" else backends.elementwise)
    return [vars(backends)[op] for op in SWITCHHEAD]


def test_a_row_of_the_table_is_taken_for_its_shape_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    name, other = "paper/c4_switchhead_262m.json", "paper/enwik8_switchhead_41m.json"
    assert chosen(name) == chosen(other) == ["triton"] * 2
    monkeypatch.setattr(choice, "ON_CUDA", {ProjectionShape(1024, 4, 112, 4, 2): "dense"})
    assert chosen(name) == chosen(name, dtype=torch.float16) == ["dense"] * 2
    assert chosen(other) == ["triton"] * 2
    assert chosen(name, dtype=torch.float32) == ["triton"] * 2  # measured in half precision
    assert chosen(name, device="cpu") == ["cpu"] * 2
    assert chosen(name, requested="reference") == ["reference"] * 2
    assert chosen(name, requested="triton") == ["triton"] * 2


def test_dense_can_be_asked_for_everywhere() -> None:
    name = "switchall_tiny.json"
    assert chosen(name, "dense") == chosen(name, "dense", "cpu") == ["dense"] * 2
    model = load_config(CONFIGS / name, []).model
    printed = str(Backends.choose("dense", model, device_type="cpu", dtype=torch.float64))
    assert printed.startswith("route dense, switchhead_value dense, switchhead_output dense, expert_linear cpu")


def test_rows_are_shapes_of_shipped_configurations_and_name_backends() -> None:
    shapes = set()
    for path in [*CONFIGS.glob("*.json"), *CONFIGS.glob("paper/*switchhead*.json")]:
        model = load_config(path, []).model
        a = model.attention
        if a.type == "switchhead":
            shapes.add((model.d_model, a.num_heads, a.head_dim, a.num_experts, a.active_experts))
    assert choice.ON_CUDA.keys() <= shapes
    assert set(choice.ON_CUDA.values()) <= {"triton", "dense", "sets"}


def test_sets_of_experts_are_refused_before_anything_is_built() -> None:
    assert chosen("switchall_1b.json", "sets") == chosen("switchall_1b.json", "sets", "cpu") == ["sets"] * 2
    with pytest.raises(ValueError, match=r"^kernels\.backend=sets cannot compute switchhead_value .* are 70 sets"):
        chosen("paper/wt103_switchhead_262m.json", "sets")
    with pytest.raises(ValueError, match="takes bfloat16 on CUDA"):
        chosen("switchall_1b.json", "sets", dtype=torch.float16)
