"""The backend of every op of a model, and what a measurement on a GPU decides."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from model.config import RopeConfig
from model.kernels.backend import BACKENDS
from model.kernels.choice import MEASURED, Backends, facts_of
from pretrain.config.loading import load_config

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
SWITCHHEAD = ("switchhead_value", "switchhead_output")


def chosen(name: str, requested: str = "auto", device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """Of SwitchHead's two ops, in a shipped configuration."""
    backends = Backends.choose(requested, load_config(CONFIGS / name, []).model, device_type=device, dtype=dtype)
    others = {vars(backends)[op] for op in vars(backends) if op not in (*SWITCHHEAD, "route")}
    assert others <= {"triton", "cpu", "reference"}
    wide = name == "switchall_1b.json"
    measured = wide and requested in ("auto", "sets") and device == "cuda" and dtype == torch.bfloat16
    assert backends.route == ("dense" if measured or requested == "dense" else backends.elementwise)
    return [vars(backends)[op] for op in SWITCHHEAD]


@pytest.mark.parametrize(
    "name", ["switchall_1b.json", "paper/c4_switchhead_262m.json", "paper/wt103_switchhead_262m.json"]
)
def test_half_precision_on_a_gpu_takes_dense_where_few_experts_are_left_out(name: str) -> None:
    assert chosen(name) == chosen(name, dtype=torch.float16) == ["dense"] * 2
    assert chosen(name, dtype=torch.float32) == ["triton"] * 2  # measured in half precision
    assert chosen(name, device="cpu") == ["cpu"] * 2
    assert chosen(name, requested="reference") == ["reference"] * 2
    assert chosen(name, requested="triton") == ["triton"] * 2


def test_the_table_names_ops_backends_and_facts_that_there_are() -> None:
    models = [load_config(path, []).model for path in sorted(CONFIGS.rglob("*.json")) if "data" not in path.parts]
    facts = {fact for model in models for fact in facts_of(model)}
    for line in MEASURED:
        assert all(line.backend in BACKENDS[op] for op in line.ops) and line.least <= line.most
        assert line.fact in facts and "2026" in line.because


def test_without_triton_the_reference_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.kernels.backend.triton_limit", lambda *_: "triton is not installed")
    model = load_config(CONFIGS / "switchall_1b.json", []).model
    found = Backends.choose("auto", model, device_type="cuda", dtype=torch.bfloat16)
    assert found.route == "reference"


def test_many_experts_left_out_are_not_multiplied() -> None:
    model = load_config(CONFIGS / "switchall_1b.json", []).model
    for num_experts, backend in ((6, "dense"), (7, "triton")):
        attention = model.attention.model_copy(update={"num_experts": num_experts, "active_experts": 2})
        found = Backends.choose(
            "auto", model.model_copy(update={"attention": attention}), device_type="cuda", dtype=torch.bfloat16
        )
        assert (found.switchhead_value, found.switchhead_output) == (backend, backend)


@pytest.mark.parametrize("name, backend", [("wt103_moa_8heads_262m", "reference"), ("c4_switchhead_262m", "triton")])
def test_wide_heads_of_transformer_xl_are_left_to_torch(name: str, backend: str) -> None:
    model = load_config(CONFIGS / "paper" / f"{name}.json", []).model
    found = Backends.choose("auto", model, device_type="cuda", dtype=torch.bfloat16)
    assert found.relative_attention == backend
    asked = Backends.choose("triton", model, device_type="cuda", dtype=torch.bfloat16)
    assert asked.relative_attention == "triton"


def test_the_border_is_where_tiles_are_filled_up() -> None:
    model = load_config(CONFIGS / "paper" / "c4_switchhead_262m.json", []).model
    for head_dim, backend in ((128, "triton"), (129, "reference"), (255, "reference"), (256, "triton")):
        attention = model.attention.model_copy(update={"head_dim": head_dim})
        changed = model.model_copy(update={"attention": attention})
        found = Backends.choose("auto", changed, device_type="cuda", dtype=torch.bfloat16)
        assert found.relative_attention == backend


def test_attention_is_limited_only_where_the_model_computes_it(logged: list[logging.LogRecord]) -> None:
    """Of wide heads with RoPE the kernels take none; without documents and memory nothing asks for them."""
    model = load_config(CONFIGS / "paper" / "wt103_dense_2heads_262m.json", []).model
    model = model.model_copy(update={"position": RopeConfig()})
    assert model.attention.head_dim == 512

    def attention(requested: str, dtype: torch.dtype, **options: bool) -> str:
        found = Backends.choose(requested, model, device_type="cuda", dtype=dtype, **options)
        assert found.relative_attention == "triton"
        return found.causal_attention

    for dtype in (torch.bfloat16, torch.float32):
        assert attention("auto", dtype) == attention("triton", dtype) == "triton"
        assert not [record for record in logged if "attention takes backend reference" in record.getMessage()]
        assert attention("auto", dtype, document_mask=True) == "reference"
        with pytest.raises(ValueError, match=r"^kernels\.backend=triton cannot compute causal_attention on cuda"):
            attention("triton", dtype, document_mask=True)
        logged.clear()
    model = model.model_copy(update={"position": RopeConfig(memory_chunks=1)})
    assert attention("auto", torch.bfloat16) == "reference"


def test_dense_can_be_asked_for_everywhere() -> None:
    name = "switchall_tiny.json"
    assert chosen(name, "dense") == chosen(name, "dense", "cpu") == ["dense"] * 2
    model = load_config(CONFIGS / name, []).model
    printed = str(Backends.choose("dense", model, device_type="cpu", dtype=torch.float64))
    assert printed.startswith("route dense, switchhead_value dense, switchhead_output dense, expert_linear cpu")


def test_sets_of_experts_are_refused_before_anything_is_built() -> None:
    assert chosen("switchall_1b.json", "sets") == chosen("switchall_1b.json", "sets", "cpu") == ["sets"] * 2
    with pytest.raises(ValueError, match=r"^kernels\.backend=sets cannot compute switchhead_value .* 6 experts, not 8"):
        chosen("paper/wt103_switchhead_262m.json", "sets")
    with pytest.raises(ValueError, match="take float32, bfloat16 and float16"):
        chosen("switchall_1b.json", "sets", dtype=torch.float64)
