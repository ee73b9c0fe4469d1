"""MACs counted from the built model: what one forward pass does, on the meta device, for models of any size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from model.kernels.choice import Backends
from model.language_model import LanguageModel
from model.memory import layer_memories


@dataclass(frozen=True)
class CountedMACs:
    """Multiply-accumulates of the forward pass of one sequence of T tokens, its memory present."""

    attention: int
    """One attention layer."""
    feedforward: int
    """One feed-forward layer."""
    model: int
    """All layers and the output layer."""


def count_macs(config: ModelConfig) -> CountedMACs:
    """Runs one sequence through embedding, one block and output layer with torch's FlopCounterMode; all blocks cost
    the same. MACs are its FLOPs / 2. With Transformer-XL the memory is full: keys and values come from all C T tokens,
    and W_pos r of the C T distances counts for this one sequence although a batch shares it.

    It counts matrix products (not gates, softmax, norms and sums), expert products for the k experts that a token
    chooses, as the ops of model/kernels state them, and whole attention matrices: causal masking is not deducted.
    """
    single = config.model_copy(update={"num_layers": 1})
    # The ops, not the references: those compute every expert for every token.
    backends = Backends.choose("cpu", single, device_type="cpu", dtype=torch.float32)
    with torch.device("meta"):
        model = LanguageModel(single, backends=backends).eval()
        tokens = torch.zeros(1, config.sequence_length, dtype=torch.int64)
        sequence_index = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        for _, memory in layer_memories(model):
            memory.assign(sequence_index, num_streams=1)
        for _ in range(config.memory_length // config.sequence_length):
            model(tokens, tokens, sequence_index)
            for _, memory in layer_memories(model):
                memory.advance()
        with FlopCounterMode(display=False) as counter:
            model(tokens, tokens, sequence_index)
    counts = counter.get_flop_counts()
    attention, feedforward, head = (
        _macs(counts.get(f"LanguageModel.{name}", {}))
        for name in ("blocks.0.attention", "blocks.0.feedforward", "head")
    )
    assert attention + feedforward + head == _macs(counts["Global"]), "a matrix product outside the known layers"
    return CountedMACs(attention, feedforward, config.num_layers * (attention + feedforward) + head)


def _macs(flops: Mapping[Any, int]) -> int:
    return sum(flops.values()) // 2
