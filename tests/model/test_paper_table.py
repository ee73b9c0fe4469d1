"""The table of configs/paper/README.md against the files: one row each, with the sizes that the models have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from model.config import DenseAttentionConfig, MoAConfig, ModelConfig, SigmaMoEConfig, SwitchHeadConfig
from model.costs import formula_parameters
from pretrain.config.loading import load_config

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "paper"
PAPER = sorted(path.stem for path in FOLDER.glob("*.json"))
PUBLISHED = re.compile(r"(?<=perplexity )\d+\.\d+|\d+\.\d+(?= bits per byte)")


def rows() -> dict[str, list[list[str]]]:
    """Cells of every row that begins with a configuration's name."""
    found: dict[str, list[list[str]]] = {}
    for line in (FOLDER / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            found.setdefault(name.strip("`"), []).append(cells)
    return found


def attention_text(model: ModelConfig) -> str:
    attention = model.attention
    if isinstance(attention, MoAConfig):
        return f"MoA, {attention.num_heads} of {attention.num_experts} heads x {attention.head_dim}"
    text = f"{attention.num_heads} heads x {attention.head_dim}"
    if isinstance(attention, SwitchHeadConfig):
        text += f", {attention.active_experts} of {attention.num_experts} experts"
        if set(attention.expert_projections) != {"value", "output"}:
            text += f" in {', '.join(attention.expert_projections)}"
        text += ", one selector" * (attention.selection == "shared")
    else:
        assert isinstance(attention, DenseAttentionConfig)
    return text + ", memory" * (model.position.type == "rope" and model.memory_length > 0)


def feedforward_text(model: ModelConfig) -> str:
    layer = model.feedforward
    if isinstance(layer, SigmaMoEConfig):
        return f"σ-MoE, {layer.active_experts} of {layer.num_experts} x {layer.expert_size}"
    return str(layer.hidden_size)


def test_every_config_has_one_row_and_every_row_a_config() -> None:
    assert {name: len(found) for name, found in rows().items()} == dict.fromkeys(PAPER, 1)


@pytest.mark.parametrize("name", PAPER)
def test_a_row_says_what_the_file_holds(name: str) -> None:
    config = load_config(FOLDER / f"{name}.json")
    attention, feedforward, parameters, published = rows()[name][0]
    assert (attention, feedforward) == (attention_text(config.model), feedforward_text(config.model))
    assert parameters == f"{formula_parameters(config.model).total / 1e6:.2f}M"
    printed = PUBLISHED.search(config.description)
    assert published == (printed.group() if printed else "-")
