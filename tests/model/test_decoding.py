"""Reading on with kept keys and values against what training computes: whole chunks, with the memory before them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.cache import KVCache
from model.config import ModelConfig
from model.decoding import Decoding, context_limit, uncached_logits
from model.language_model import LanguageModel, build_model
from model.memory import layer_memories
from tests.model.options import check_kinds, kinds

SWITCHHEAD = {"type": "switchhead", "num_heads": 2, "head_dim": 6, "num_experts": 4, "active_experts": 2}
ALL_EXPERTS = {**SWITCHHEAD, "expert_projections": ["query", "key", "value", "output"]}
MOA = {"type": "moa", "num_heads": 2, "head_dim": 6, "num_experts": 5}
DENSE = {"type": "dense", "num_heads": 3, "head_dim": 5}
GROUPED = {"type": "dense", "num_heads": 6, "num_kv_heads": 2, "head_dim": 6}
FEEDFORWARD = {"type": "dense", "hidden_size": 9}
SIGMA_MOE = {"type": "sigma_moe", "num_experts": 5, "expert_size": 7, "active_experts": 2}
XL = {"type": "xl", "memory_chunks": 1}
CASES: dict[str, dict[str, Any]] = {
    "switchhead": {"attention": SWITCHHEAD},
    "switchhead xl": {"attention": SWITCHHEAD, "position": XL},
    "switchall xl": {"attention": SWITCHHEAD, "position": {"type": "xl", "memory_chunks": 2}, "feedforward": SIGMA_MOE},
    "rope with memory": {"attention": SWITCHHEAD, "position": {"type": "rope", "memory_chunks": 2}},
    "xl without memory": {"attention": SWITCHHEAD, "position": {"type": "xl", "memory_chunks": 0}},
    "dense": {"attention": DENSE, "feedforward": {"type": "swiglu", "hidden_size": 9}},
    "dense xl": {"attention": DENSE, "position": XL, "tied_embedding": True},
    "grouped queries": {"attention": GROUPED},
    "grouped queries, rope with memory": {"attention": GROUPED, "position": {"type": "rope", "memory_chunks": 1}},
    "grouped queries xl": {"attention": GROUPED, "position": XL},
    "moa": {"attention": MOA},
    "moa sigmoid xl": {"attention": {**MOA, "router": "sigmoid"}, "position": XL},
    "key and query experts": {"attention": {**SWITCHHEAD, "expert_projections": ["query", "key"]}},
    "one selector, swiglu experts": {
        "attention": {**ALL_EXPERTS, "selection": "shared"},
        "feedforward": {**SIGMA_MOE, "activation": "swiglu"},
    },
    "one selector, xl": {"attention": {**ALL_EXPERTS, "selection": "shared"}, "position": XL},
}
VOCABULARY = 50
SIZES = (13, 1, 6, 5)
"""Of the prompts, whose texts become 4 tokens longer. With memory a chunk has 5 tokens: the first text crosses three
borders, the last begins with a whole chunk."""


def tiny(case: str) -> LanguageModel:
    """2 layers of width 12; weights so large that attention and choices are far from even."""
    sections: dict[str, Any] = {"feedforward": FEEDFORWARD, **CASES[case]}
    has_memory = sections.get("position", {}).get("memory_chunks", 0) > 0
    sizes = {"d_model": 12, "num_layers": 2, "vocab_size": VOCABULARY, "sequence_length": 5 if has_memory else 19}
    model = build_model(ModelConfig.model_validate({**sizes, **sections}), seed=3).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():  # the biases of XL begin at 0
            parameter.mul_(1.5).add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        model.get_parameter("head.weight").mul_(0.3)  # logits as large as those of a trained model
    return model


def some_texts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def as_in_training(model: LanguageModel, text: list[int]) -> Tensor:
    """Logits [N, V]: one stream, chunk after chunk, as the training loop and validation read it."""
    for _, memory in layer_memories(model):
        memory.assign(torch.arange(1), 1)
    found = []
    for chunk in torch.tensor(text).split(model.config.sequence_length):
        found.append(model.logits(chunk[None], torch.zeros(1, dtype=torch.int64))[0][0])
        for _, memory in layer_memories(model):
            memory.advance()
    return torch.cat(found)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.3, "so even that a mistake would not be seen"
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() < (1e-5 if found.dtype == torch.float32 else 1e-11)


def test_every_layer_is_in_a_model_here() -> None:
    models = [tiny(case).config for case in CASES]
    types = {layer.type for model in models for layer in (model.attention, model.feedforward)}
    check_kinds(types, "CASES of tests/model/test_decoding.py", kinds())


@pytest.mark.parametrize("case", CASES)
def test_cached_logits_are_those_of_training(case: str) -> None:
    """In fp64, where rounding hides nothing; one text in fp32 too, token by token."""
    model = tiny(case)
    texts = some_texts(*(size + 4 for size in SIZES))
    alone = Decoding(model, 1)
    one_by_one = torch.cat([alone.read([[token]]) for token in texts[0]])
    assert_close(one_by_one, as_in_training(model, texts[0]))
    assert_close(uncached_logits(model, texts[0]), as_in_training(model, texts[0]))

    model.double()
    decoding = Decoding(model, len(texts))
    found = [[part] for part in decoding.read_all([text[:size] for text, size in zip(texts, SIZES, strict=True)])]
    for step in range(2):
        last = decoding.read([[text[size + step]] for text, size in zip(texts, SIZES, strict=True)])
        for parts, row in zip(found, last, strict=True):
            parts.append(row[None])
    # Several tokens at once, where the rows are at different places of their chunks.
    for parts, rest in zip(found, decoding.read_all([text[-2:] for text in texts]), strict=True):
        parts.append(rest)
    for parts, text in zip(found, texts, strict=True):
        assert_close(torch.cat(parts), as_in_training(model, text))
    assert decoding.cache.lengths == [len(text) for text in texts]


@pytest.mark.parametrize("case", ["switchhead xl", "rope with memory", "dense"])
def test_rows_that_are_kept_doubled_and_dropped(case: str) -> None:
    model = tiny(case)
    first, second, third = some_texts(14, 3, 9)
    decoding = Decoding(model, 3, capacity=17)
    decoding.read([first, second, third])
    decoding.cache.keep([2, 0, 2])
    more = some_texts(2, 2, 2)
    for found, text, new in zip(decoding.read(more), (third, first, third), more, strict=True):
        assert_close(found, as_in_training(model, text + new)[-1])
    decoding.cache.forget(1)
    more, texts = [[9], first[:5], [8, 7]], (third + more[0], [], third + more[2])
    for found, text, new in zip(decoding.read(more), texts, more, strict=True):
        assert_close(found, as_in_training(model, text + new)[-1])


def test_nothing_is_written_behind_the_last_slot() -> None:
    """A short text beside one that is nearly full: what is padded behind the full one must not take its first slots."""
    model = tiny("dense")
    full, short = some_texts(9, 2)
    decoding = Decoding(model, 2, capacity=10)
    decoding.read([full, short])
    more = [[3], [4, 5, 6, 7, 8]]
    for found, text, new in zip(decoding.read(more), (full, short), more, strict=True):
        assert_close(found, as_in_training(model, text + new)[-1])


def test_sizes() -> None:
    """2 layers of 2 heads x 6 keys and as many values, 4 bytes each, for every slot; 1 head with MoA, 2 of
    6 with grouped queries."""
    cases = ("switchhead xl", 2, 10), ("switchall xl", 2, 15), ("moa", 1, 19)
    for case, heads, slots in (*cases, ("grouped queries", 2, 19), ("grouped queries xl", 2, 10)):
        decoding = Decoding(tiny(case), 3)
        assert decoding.cache.bytes == 0
        decoding.read(some_texts(4, 2, 1))
        assert decoding.cache.bytes == 3 * slots * 2 * heads * 6 * 2 * 4
    short = Decoding(tiny("switchhead"), 1, capacity=7)
    short.read(some_texts(4))
    assert short.cache.bytes == 7 * 2 * 2 * 6 * 2 * 4
    assert context_limit(tiny("dense").config) == 19 and context_limit(tiny("dense xl").config) is None
    assert context_limit(tiny("xl without memory").config) == 19


def test_a_full_context_is_an_error_of_the_caller() -> None:
    cache = KVCache([None], rows=1, chunk=4, memory=0)
    cache.begin([0], [4], torch.device("cpu"))
    assert cache.limit == 4
    with pytest.raises(AssertionError, match="longer than the context"):
        cache.room(0)
