"""Random legal configurations of tiny models, and layouts of them, by seed: what no table of chosen models holds, the
product of all settings. A seed gives the same case on every machine."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from common.errors import UserError
from pretrain.config.loading import parse_config
from pretrain.config.rules import check_device, check_ranks
from pretrain.config.schema import Config
from pretrain.data.sources import open_sources

Tree = dict[str, Any]
PROJECTIONS = ("query", "key", "value", "output")
ATTEMPTS = 1000


def _attention(draw: random.Random) -> Tree:
    kind = draw.choice(("dense", "switchhead", "switchhead", "switchhead", "moa"))
    heads = draw.choice((1, 2, 2, 3, 4))
    found: Tree = {"type": kind, "num_heads": heads, "head_dim": draw.choice((1, 2, 3, 5, 6, 11))}
    if kind == "dense":
        groups = [size for size in range(1, heads + 1) if heads % size == 0]
        return found | {"num_kv_heads": draw.choice((None, *groups))}
    found["expert_dropout"] = draw.choice((0.0, 0.0, 0.2, 0.6))
    if kind == "switchhead":
        experts = draw.randint(1, 5)
        return found | {
            "num_experts": experts,
            "active_experts": draw.randint(1, experts),
            "expert_projections": draw.choice((["value", "output"], draw.sample(PROJECTIONS, draw.randint(1, 4)))),
            "selection": draw.choice(("side", "projection", "shared")),
            "normalized_init": draw.random() < 0.3,
        }
    found |= {"num_experts": heads + draw.randint(0, 3), "router": draw.choice(("softmax", "softmax", "sigmoid"))}
    if found["router"] == "softmax":
        found |= {name: draw.choice((0.0, 0.3)) for name in ("z_loss_weight", "switch_loss_weight", "cv_loss_weight")}
        found["loss_scope"] = draw.choice(("global_batch", "micro_batch"))
    return found


def _feedforward(draw: random.Random) -> Tree:
    kind = draw.choice(("sigma_moe", "sigma_moe", "sigma_moe", "dense", "swiglu"))
    if kind != "sigma_moe":
        return {"type": kind, "hidden_size": draw.choice((1, 2, 6, 22, 31))}
    experts = draw.choice((1, 2, 3, 4, 4, 6, 8))
    return {
        "type": kind,
        "num_experts": experts,
        "active_experts": draw.randint(1, experts),
        "expert_size": draw.choice((1, 2, 7, 8)),
        "activation": draw.choice(("relu", "swiglu")),
        "expert_dropout": draw.choice((0.0, 0.0, 0.2, 0.6)),
        "entropy_weight": draw.choice((0.0, 0.05, 0.3)),
        "entropy_scope": draw.choice(("global_batch", "micro_batch")),
    }


def _position(draw: random.Random) -> Tree:
    found: Tree = {"type": draw.choice(("rope", "rope", "xl")), "memory_chunks": draw.choice((0, 0, 0, 1, 2, 3))}
    return found if found["type"] == "xl" else found | {"fraction": draw.choice((0.1, 0.5, 0.8, 1.0))}


def _data(draw: random.Random, prepared: Path, position: Tree) -> Tree:
    found: Tree = {"manifest": str(prepared), "order": draw.choice((None, None, "streams"))}
    if draw.random() < 0.25:
        found["max_tokens"] = draw.choice((50, 200, 1000))  # several epochs in a step or two
    if position["type"] == "rope" and draw.random() < 0.35:
        found["document_mask"] = True
    return found


def _tree(draw: random.Random, prepared: Path) -> Tree:
    position = _position(draw)
    tree: Tree = {
        "model": {
            "d_model": draw.choice((4, 5, 8, 12, 16, 24)),
            "num_layers": draw.choice((1, 1, 2, 3)),
            "vocab_size": draw.choice((400, 401, 402, 404, 406)),
            "sequence_length": draw.choice((1, 2, 3, 5, 7, 8, 12, 16)),
            "attention": _attention(draw),
            "position": position,
            "feedforward": _feedforward(draw),
            "initialization": draw.choice(("normal", "published")),
            "init_scale": draw.choice(("paper", "library")),
            "tied_embedding": draw.random() < 0.4,
            "dropout": draw.choice((0.0, 0.0, 0.1, 0.5)),
        },
        "data": _data(draw, prepared, position),
        "batch": {"global_sequences": draw.choice((1, 2, 3, 4, 4, 6, 8, 12))},
        "optimizer": {
            "learning_rate": draw.choice((1e-3, 4e-3)),
            "betas": draw.choice(([0.9, 0.999], [0.0, 0.5], [0.8, 0.95])),
            "eps": 1e-3,  # Adam's first steps turn the sign of a gradient near 0 into a whole step
            "weight_decay": draw.choice((0.0, 0.3)),
            "clip_norm": draw.choice((0.05, 0.5, 100.0)),
        },
        "train": {"steps": 10, "seed": draw.randrange(10**6), "precision": "fp32", "ema_decay": draw.choice((0, 0.5))},
        "evaluate": {"sequences": draw.choice((1, 5, 24)), "streams": draw.choice((1, 3, 64))},
        "monitor": {"tensorboard": False},
    }
    if tree["model"]["attention"]["type"] == "switchhead":
        tree["model"]["attention"]["entropy_weight"] = draw.choice((0.0, 0.05, 0.4))
    return tree


def _layout(draw: random.Random, tree: Tree, ranks: int) -> Tree:
    """`tree` in a layout; perhaps no legal one."""
    tensor = draw.choice([size for size in (1, 1, 2) if ranks % size == 0])
    pipeline = draw.choice([size for size in (1, 1, 2) if ranks // tensor % size == 0])
    data_size = ranks // tensor // pipeline
    expert = draw.choice([size for size in (1, 2) if data_size % size == 0])
    zero = 1 if pipeline > 1 else draw.choice((1, 2)) if expert > 1 else draw.choice((0, 1, 2, 3, 3))
    share = tree["batch"]["global_sequences"] // data_size
    parallel = {
        "tensor": tensor,
        "sequence": tensor > 1 and draw.random() < 0.5,
        "pipeline": pipeline,
        "expert": expert,
        "zero": zero,
        "offload_optimizer": zero > 0 and pipeline == 1 and draw.random() < 0.25,
    }
    if _is_of_micro_batch(tree):
        micro = 2 // data_size  # the sequences of a micro-step are the same in every layout
    else:
        micro = draw.choice([size for size in range(1, share + 1) if share % size == 0] or [1])
    return {
        **tree,
        "parallel": parallel,
        "batch": {**tree["batch"], "micro_sequences": micro},
        "train": {**tree["train"], "recompute": draw.choice(("none", "full") if zero == 3 else ("none", "selective"))},
        "kernels": {"backend": draw.choice(("auto", "auto", "reference", "dense", "grouped_mm"))},
        "deepspeed": {"zero_optimization": {"reduce_bucket_size": draw.choice((1, 7, 200))}} if zero else {},
    }


def _is_of_micro_batch(tree: Tree) -> bool:
    """Whether a regulariser depends on which sequences a micro-step has."""
    feedforward, attention = tree["model"]["feedforward"], tree["model"]["attention"]
    return "micro_batch" in (feedforward.get("entropy_scope"), attention.get("loss_scope"))


def _legal(tree: Tree, ranks: int) -> Config | None:
    try:
        config = parse_config(tree)
        check_ranks(config, ranks)
        check_device(config, "cpu")
        open_sources(config)
    except UserError:
        return None
    return config


def plain(config: Config) -> Config:
    """With the fewest micro-steps that give the same numbers in one process."""
    sequences = config.batch.global_sequences
    micro = min(2, sequences) if _is_of_micro_batch(config.model_dump()) else sequences
    return config.model_copy(update={"batch": config.batch.model_copy(update={"micro_sequences": micro})})


def drawn(seed: int, prepared: Path, ranks: tuple[int, ...]) -> list[Config]:
    """A model and a layout of it for each of the numbers of ranks."""
    for attempt in range(ATTEMPTS):
        draw = random.Random(f"{seed}/{attempt}")
        tree = _tree(draw, prepared)
        if all(found := [_legal(_layout(draw, tree, number), number) for number in ranks]):
            return [config for config in found if config is not None]
    raise AssertionError(f"seed {seed}: no legal configuration")
