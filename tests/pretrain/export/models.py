"""Small models of every kind that an export must carry, and what this project computes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.json_config import validate
from data_prep.shards.format import Manifest
from model.config import ModelConfig
from model.language_model import LanguageModel, build_model
from model.memory import layer_memories, separate_streams
from pretrain.checkpoint import Checkpoint
from pretrain.checkpoint.tokenizer_file import StoredTokenizer
from pretrain.checkpoint.weights import WeightsOrigin, write_weights
from pretrain.config.loading import parse_config
from pretrain.data.progress import Progress
from pretrain.export.writing import ExportOptions, export

VOCAB, CHUNK, WIDTH = 403, 7, 22  # the tokenizer of the small corpus has 400 pieces
SWITCHHEAD = {"type": "switchhead", "num_heads": 3, "head_dim": 6, "num_experts": 4, "active_experts": 2}
SIGMA_MOE = {"type": "sigma_moe", "num_experts": 5, "expert_size": 9, "active_experts": 2}
DENSE = {"type": "dense", "num_heads": 3, "head_dim": 5}
GROUPED = {"type": "dense", "num_heads": 6, "num_kv_heads": 2, "head_dim": 5}
MOA = {"type": "moa", "num_heads": 2, "head_dim": 6, "num_experts": 5}
RELU, SWIGLU = {"type": "dense", "hidden_size": 31}, {"type": "swiglu", "hidden_size": 21}
ALL = ["query", "key", "value", "output"]

TIED = "switchhead of queries, xl without memory, tied"
"""The model of tests that need one alone."""

MODELS: dict[str, dict[str, Any]] = {
    "switchall": {"attention": SWITCHHEAD, "feedforward": SIGMA_MOE},
    "switchall xl": {
        "attention": {**SWITCHHEAD, "expert_projections": ALL},
        "feedforward": {**SIGMA_MOE, "activation": "swiglu"},
        "position": {"type": "xl", "memory_chunks": 1},
    },
    "switchhead shared, rope with memory": {
        "attention": {
            **SWITCHHEAD,
            "num_experts": 5,
            "active_experts": 3,
            "expert_projections": ["key", "value", "output"],
            "selection": "shared",
        },
        "feedforward": RELU,
        "position": {"type": "rope", "fraction": 0.8, "base": 500.0, "memory_chunks": 2},
    },
    "switchhead of queries, xl without memory, tied": {
        "attention": {**SWITCHHEAD, "expert_projections": ["query", "value"], "selection": "projection"},
        "feedforward": SWIGLU,
        "position": {"type": "xl", "memory_chunks": 0},
        "tied_embedding": True,
    },
    "dense": {
        "attention": DENSE,
        "feedforward": RELU,
        "position": {"type": "rope", "fraction": 1.0, "base": 500.0},
    },
    "dense xl": {"attention": DENSE, "feedforward": SWIGLU, "position": {"type": "xl"}},
    "grouped queries": {"attention": GROUPED, "feedforward": RELU},
    "grouped queries xl": {"attention": GROUPED, "feedforward": SWIGLU, "position": {"type": "xl"}},
    "sigma-moe": {"attention": DENSE, "feedforward": SIGMA_MOE, "tied_embedding": True},
    "moa": {"attention": MOA, "feedforward": RELU},
    "moa xl, sigmoid": {
        "attention": {**MOA, "router": "sigmoid"},
        "feedforward": SIGMA_MOE,
        "position": {"type": "xl"},
    },
}
"""Every attention, selection and feed-forward, with rotary and relative positions, with and without memory."""


def config_of(name: str) -> ModelConfig:
    sizes = {"d_model": WIDTH, "num_layers": 2, "vocab_size": VOCAB, "sequence_length": CHUNK}
    return validate(ModelConfig, {**sizes, **MODELS[name]})


def model_of(name: str) -> LanguageModel:
    """The model with weights as after some training: nothing is zero, biases and norms included."""
    model = build_model(config_of(name), seed=3).eval()
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    return model


def our_logits(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Logits [B, L, vocab_size] of `tokens` [B, L], with memory chunk by chunk; differentiable."""
    if not model.config.memory_length:
        return model.logits(tokens)[0]
    streams, parts = torch.arange(len(tokens)), []
    with separate_streams(model, streams, len(tokens)):
        for chunk in tokens.split(model.config.sequence_length, dim=1):
            parts.append(model.logits(chunk, streams)[0])
            for _, memory in layer_memories(model):
                memory.advance()
    return torch.cat(parts, dim=1)


def some_tokens(batch: int, length: int) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(length))


def checkpoint_of(model: LanguageModel, folder: Path, prepared: Path) -> Checkpoint:
    """A checkpoint of these weights, with the tokenizer of the data `prepared`, as after 3 steps of 8 sequences."""
    manifest = Manifest.load(prepared)
    data = {"manifest": str(prepared)}
    origin = WeightsOrigin(
        config=parse_config({"model": model.config.model_dump(mode="json"), "data": data}),
        source="a test",
        tokenizer=StoredTokenizer.of(manifest),
        manifest_digest=manifest.digest,
        progress=Progress(3, 24),
        loss=5.5,
        validation_loss=5.25,
    )
    parameters = dict(model.named_parameters())
    return write_weights(folder, origin, {name: p.detach for name, p in parameters.items()})


def export_of(name: str, folder: Path, prepared: Path) -> LanguageModel:
    """Exports the model `name` to `folder`, and returns it."""
    model = model_of(name)
    export(checkpoint_of(model, folder.with_name(f"{folder.name}-step"), prepared), folder, ExportOptions())
    return model
