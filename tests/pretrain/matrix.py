"""The matrix of layouts: which models, which ways to divide them, and the seeds that make their choices clear."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pretrain.config.schema import Config
from tests.pretrain.runs import small_config

STEPS, GRADIENT_STEPS = 5, (0, 2, 4)

SIZES = (
    "model.num_layers=4",
    "model.sequence_length=8",
    'model.feedforward={"type": "sigma_moe", "num_experts": 8, "expert_size": 7, "active_experts": 2, '
    '"entropy_weight": 0.05}',
)
SWITCHHEAD = (*SIZES, "model.attention.num_heads=4")
MODELS = {
    "switchall": SWITCHHEAD,
    "switchall xl": (*SWITCHHEAD, "model.position.type=xl"),
    "switchall rope with memory": (
        *SWITCHHEAD,
        'model.position={"type": "rope", "memory_chunks": 1}',
        "model.attention.entropy_weight=0.05",
    ),
    "dense": (
        *SIZES,
        'model.attention={"type": "dense", "num_heads": 4, "head_dim": 5}',
        'model.feedforward={"type": "dense", "hidden_size": 22}',
    ),
    "dense, grouped queries": (
        *SIZES,
        'model.attention={"type": "dense", "num_heads": 4, "num_kv_heads": 2, "head_dim": 5}',
        'model.feedforward={"type": "dense", "hidden_size": 22}',
    ),
    "moa": (
        *SIZES,
        'model.attention={"type": "moa", "num_heads": 2, "head_dim": 6, "num_experts": 5, "z_loss_weight": 0.01, '
        '"switch_loss_weight": 0.02, "cv_loss_weight": 0.01}',
    ),
}
SEEDS = {
    ("switchall", False): 3,
    ("switchall", True): 14,
    ("switchall xl", False): 61,
    ("switchall xl", True): 4,
    ("switchall rope with memory", False): 7,
    ("switchall rope with memory", True): 15,
    ("moa", False): 4,
    ("moa", True): 2,
}
"""Of (model, dropouts on): the smallest top-k margin over the steps is clear of 1e-5, tied or not, and the gradients of
the trainer on one rank (ZeRO 0 and 3) differ from those of plain PyTorch by less than 3e-6. Not every seed is so well
conditioned: Adam's first steps turn the sign of a gradient near 0 into a whole step. 2e-5 was met on one CPU with a
seed that gave less than 1e-5 on another."""


def dropouts(model: str) -> tuple[str, ...]:
    """Overrides that turn on every dropout that the model has."""
    keys = ["model.dropout=0.1"]
    if not model.startswith("dense"):
        keys += ["model.attention.expert_dropout=0.2", "model.feedforward.expert_dropout=0.2"]
    return tuple(keys)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to divide a model; 8 sequences a step, of which `micro` are a micro-step of a data-parallel rank."""

    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    data: int = 1
    expert: int = 1
    zero: int = 1
    micro: int = 2
    recompute: str = "none"
    tied: bool = False

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        parts = [f"TP{self.tensor}" + "+SP" * self.sequence, f"PP{self.pipeline}", f"DP{self.data}"]
        parts += [f"EP{self.expert}", f"ZeRO-{self.zero}", f"micro {self.micro}", f"recompute {self.recompute}"]
        return " ".join(parts) + " tied" * self.tied


def config_of(prepared: Path, model: str, layout: Layout, *overrides: str, with_dropouts: bool = False) -> Config:
    """The model in a layout, with the seed of the matrix."""
    return small_config(
        prepared,
        *MODELS[model],
        *(dropouts(model) if with_dropouts else ()),
        f"train.seed={SEEDS.get((model, with_dropouts), 17)}",
        f"model.tied_embedding={str(layout.tied).lower()}",
        f"parallel.tensor={layout.tensor}",
        f"parallel.sequence={str(layout.sequence).lower()}",
        f"parallel.pipeline={layout.pipeline}",
        f"parallel.expert={layout.expert}",
        f"parallel.zero={layout.zero}",
        f"batch.micro_sequences={layout.micro}",
        f"train.recompute={layout.recompute}",
        *overrides,
    )
