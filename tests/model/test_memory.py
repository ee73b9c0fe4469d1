"""Transformer-XL memory: chunks with memory against one long attention, and what a step may see."""

from __future__ import annotations

import pytest
import torch

from model.config import ModelConfig
from model.kernels.choice import Backends
from model.language_model import LanguageModel, build_model
from model.memory import LayerMemory, layer_memories, separate_streams
from tests.tensors import gradient_of

ATTENTIONS = {
    "dense": {"type": "dense", "num_heads": 3, "head_dim": 5},
    "switchhead": {"type": "switchhead", "num_heads": 2, "head_dim": 5, "num_experts": 4, "active_experts": 2},
    "moa": {"type": "moa", "num_heads": 2, "head_dim": 5, "num_experts": 4},
}


def build(attention: str, T: int, memory_chunks: int, position: str = "xl") -> LanguageModel:
    config = ModelConfig.model_validate(
        {
            "d_model": 18,
            "num_layers": 3,
            "vocab_size": 40,
            "sequence_length": T,
            "attention": ATTENTIONS[attention],
            "position": {"type": position, "memory_chunks": memory_chunks},
            "feedforward": {"type": "sigma_moe", "num_experts": 5, "expert_size": 7, "active_experts": 2},
        }
    )
    backends = Backends.choose("cpu", config, device_type="cpu", dtype=torch.float32)
    return build_model(config, backends=backends, seed=1).eval()


def kept(memory: LayerMemory) -> torch.Tensor:
    """What it remembers, which must be something."""
    assert memory.kept is not None
    return memory.kept


@pytest.mark.parametrize("position", ["xl", "rope"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_chunks_with_memory_equal_one_long_attention(attention: str, position: str) -> None:
    """Three layers, two chunks of memory: the third chunk sees all tokens before it, as a sequence three times as long
    does without memory (the weights do not depend on the length)."""
    T, B = 6, 2
    chunked, long = build(attention, T, 2, position), build(attention, 3 * T, 0, position)
    tokens = torch.randint(40, (B, 3 * T), generator=torch.Generator().manual_seed(0))
    index = torch.arange(B)
    for _, memory in layer_memories(chunked):
        memory.assign(index, B)
    logits = []
    for chunk in tokens.split(T, dim=1):
        logits.append(chunked.logits(chunk.contiguous(), index)[0])
        for _, memory in layer_memories(chunked):
            memory.advance()
    torch.testing.assert_close(torch.cat(logits, 1), long.logits(tokens, index)[0], rtol=1e-5, atol=1e-5)
    assert not list(layer_memories(long))


def test_memory_has_no_gradient_but_its_projections_do() -> None:
    """The loss of a second chunk reaches W_K through the memory's tokens, not the first chunk's embeddings."""
    model = build("dense", 4, 1)
    for _, memory in layer_memories(model):
        memory.assign(torch.arange(1), 1)
    first, second = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[5, 6, 7, 8]])
    model.logits(first, torch.zeros(1, dtype=torch.int64))
    for _, memory in layer_memories(model):
        memory.advance()
    model.logits(second, torch.zeros(1, dtype=torch.int64))[0].sum().backward()
    touched = gradient_of(model.get_parameter("embedding.weight")).abs().sum(1) > 0
    assert touched.nonzero().flatten().tolist() == [5, 6, 7, 8]


def test_a_step_sees_what_the_last_one_left_whatever_the_order_of_micro_steps() -> None:
    memory = LayerMemory(max_length=3)
    memory.assign(torch.tensor([4, 1, 2]), 6)
    chunks = torch.randn(3, 2, 5)  # rows in the order 4, 1, 2
    for order in ((0, 1, 2), (2, 0, 1, 0)):  # a repetition is a recomputation
        memory.forget()
        for row in order:
            context = memory.extend(chunks[row : row + 1], torch.tensor([[4, 1, 2][row] + 12]))
            assert torch.equal(context, chunks[row : row + 1])
        assert memory.kept is None
        memory.advance()
        assert torch.equal(kept(memory), chunks)
    following = torch.randn(1, 2, 5)
    context = memory.extend(following, torch.tensor([1]))
    assert torch.equal(context, torch.cat([chunks[1:2], following], 1))
    memory.advance()
    assert torch.equal(kept(memory)[1:2], torch.cat([chunks[1:2, 1:], following], 1)), "only the last 3 tokens stay"


def test_what_is_forgotten_is_what_a_step_noted_too() -> None:
    """After a step whose loss is no number: the next one begins a stream, with nothing before its chunk."""
    memory = LayerMemory(max_length=4)
    memory.assign(torch.tensor([0]), 1)
    index, chunks = torch.tensor([0]), torch.randn(3, 1, 2, 5)
    memory.extend(chunks[0], index)
    memory.advance()
    memory.extend(chunks[1], index)
    memory.forget()
    assert torch.equal(memory.extend(chunks[2], index), chunks[2])
    memory.advance()
    assert memory.kept is not None and torch.equal(memory.kept, chunks[2])


def test_validation_streams_leave_the_training_memory_alone() -> None:
    model = build("switchhead", 4, 1)
    for _, memory in layer_memories(model):
        memory.assign(torch.arange(2), 2)
    tokens = torch.randint(40, (2, 4))
    model.logits(tokens, torch.arange(2))
    for _, memory in layer_memories(model):
        memory.advance()
    before = [kept(memory).clone() for _, memory in layer_memories(model)]
    with separate_streams(model, torch.arange(3), 3):
        assert all(memory.kept is None for _, memory in layer_memories(model))
        model.logits(torch.randint(40, (3, 4)), torch.arange(3))
    for (_, memory), expected in zip(layer_memories(model), before, strict=True):
        assert torch.equal(kept(memory), expected) and memory.streams.tolist() == [0, 1]
