"""Every kind of model of the family, small enough for a few steps on several ranks."""

from __future__ import annotations

from pathlib import Path

from pretrain.config.schema import Config
from tests.pretrain.runs import small_config

DROPOUT = ("model.dropout=0.1",)
EXPERT_DROPOUT = (*DROPOUT, "model.attention.expert_dropout=0.2", "model.feedforward.expert_dropout=0.2")
SWITCHALL = ("model.attention.num_heads=4", "model.feedforward.num_experts=6")
DENSE_FEEDFORWARD = ("model.feedforward.type=dense", "model.feedforward.hidden_size=22")
MOA = (
    'model.attention={"type": "moa", "num_heads": 2, "head_dim": 6, "num_experts": 5, "z_loss_weight": 0.01, '
    '"switch_loss_weight": 0.02, "cv_loss_weight": 0.01}',
    *DENSE_FEEDFORWARD,
)
MODELS = {
    "switchall": SWITCHALL,
    "switchall, every dropout": (*SWITCHALL, *EXPERT_DROPOUT),
    "switchall, micro_batch scope": (*SWITCHALL, "model.feedforward.entropy_scope=micro_batch"),
    "switchall xl": (*SWITCHALL, *EXPERT_DROPOUT, "model.position.type=xl"),
    "switchall rope with memory": (
        *SWITCHALL,
        *EXPERT_DROPOUT,
        'model.position={"type": "rope", "memory_chunks": 1}',
        "model.feedforward.activation=swiglu",
    ),
    "all projections experts": (
        *SWITCHALL,
        'model.attention.expert_projections=["query", "key", "value", "output"]',
        "model.feedforward.type=swiglu",
        "model.feedforward.hidden_size=18",
        *DROPOUT,
    ),
    "dense xl": (
        'model.attention={"type": "dense", "num_heads": 4, "head_dim": 5}',
        *DENSE_FEEDFORWARD,
        *DROPOUT,
        "model.position.type=xl",
    ),
    "dense xl, grouped queries": (
        'model.attention={"type": "dense", "num_heads": 4, "num_kv_heads": 2, "head_dim": 5}',
        *DENSE_FEEDFORWARD,
        *DROPOUT,
        "model.position.type=xl",
    ),
    "moa": MOA,
    "moa xl": (*MOA, *DROPOUT, "model.attention.expert_dropout=0.2", "model.position.type=xl"),
}
SEEDS = {
    "switchall": 3,
    "switchall, every dropout": 7,
    "switchall xl": 2,
    "moa xl": 1,
}
"""Seeds whose smallest top-k margin is clear of 1e-5, where that of 17 is not."""


def config_of(prepared: Path, model: str, *overrides: str) -> Config:
    return small_config(prepared, *MODELS[model], f"train.seed={SEEDS.get(model, 17)}", *overrides)
