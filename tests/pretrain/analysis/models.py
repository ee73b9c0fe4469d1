"""Tiny models of every attention, with weights large enough that attention and choices are far from even."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.config import ModelConfig
from model.language_model import LanguageModel, build_model
from pretrain.analysis.findings import Findings
from pretrain.analysis.trace import Request, trace_text

SWITCHHEAD = {"type": "switchhead", "num_heads": 2, "head_dim": 6, "num_experts": 3, "active_experts": 2}
ALL_EXPERTS = {**SWITCHHEAD, "expert_projections": ["query", "key", "value", "output"]}
GROUPED = {"type": "dense", "num_heads": 6, "num_kv_heads": 2, "head_dim": 5}
MOA = {"type": "moa", "num_heads": 2, "head_dim": 6, "num_experts": 5}
XL = {"type": "xl", "memory_chunks": 1}
SIGMA_MOE = {"type": "sigma_moe", "num_experts": 5, "expert_size": 7, "active_experts": 2}
DENSE = {"type": "dense", "hidden_size": 9}
CASES: dict[str, dict[str, Any]] = {
    "switchhead": {"attention": SWITCHHEAD, "feedforward": SIGMA_MOE},
    "switchhead xl": {"attention": SWITCHHEAD, "position": XL, "feedforward": SIGMA_MOE},
    "all projections, rope with memory": {
        "attention": {**ALL_EXPERTS, "selection": "projection"},
        "position": {"type": "rope", "memory_chunks": 1, "fraction": 0.8, "base": 500.0},
        "feedforward": DENSE,
    },
    "one selector, xl": {
        "attention": {**ALL_EXPERTS, "num_experts": 4, "active_experts": 1, "selection": "shared"},
        "position": {**XL, "memory_chunks": 2},
        "feedforward": {**SIGMA_MOE, "activation": "swiglu"},
    },
    "dense": {"attention": {"type": "dense", "num_heads": 3, "head_dim": 5}, "feedforward": DENSE},
    "dense xl": {"attention": {"type": "dense", "num_heads": 3, "head_dim": 5}, "position": XL, "feedforward": DENSE},
    "dense, grouped queries": {"attention": GROUPED, "feedforward": DENSE},
    "dense xl, grouped queries": {"attention": GROUPED, "position": XL, "feedforward": DENSE},
    "moa": {"attention": MOA, "feedforward": SIGMA_MOE},
    "moa sigmoid xl": {"attention": {**MOA, "router": "sigmoid"}, "position": XL, "feedforward": DENSE},
}
"""Sections of a ModelConfig."""


def tiny(case: str, *, seed: int = 3) -> LanguageModel:
    """2 layers of width 12, 50 ids, windows of 7 tokens; in evaluation mode."""
    sizes = {"d_model": 12, "num_layers": 2, "vocab_size": 50, "sequence_length": 7}
    config = ModelConfig.model_validate_json(json.dumps({**sizes, **CASES[case]}))
    model = build_model(config, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # the biases of XL begin at 0
            parameter.mul_(2.0).add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def some_tokens(count: int, *, seed: int = 0) -> list[int]:
    return torch.randint(50, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def findings_of(model: LanguageModel, label: str, num_tokens: int, *, window: int = 0) -> Findings:
    """Both layers of such a model, by some tokens."""
    tokens = some_tokens(num_tokens)
    return Findings(
        label=label,
        place=Path("step-00000020"),
        step=20,
        model=model.config,
        num_parameters=1,
        tokens=np.array(tokens),
        pieces=[f"piece{number}" for number in tokens],
        layers=[0, 1],
        trace=trace_text(model, tokens, Request(layers=[0, 1], window=window)),
    )
