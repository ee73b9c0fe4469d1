"""Recomputed activations: the same numbers and the same counts as kept ones, and fewer bytes between the passes."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from model.config import ModelConfig
from model.kernels.choice import Backends
from model.language_model import LanguageModel, build_model, routing_statistics
from model.memory import layer_memories
from model.recompute import KEPT_OPERATORS
from tests.model.options import ATTENTIONS, check_kinds
from tests.tensors import gradient_of

ATTENTION: dict[str, dict[str, Any]] = {
    "switchhead": {
        "type": "switchhead",
        "num_heads": 2,
        "head_dim": 6,
        "num_experts": 3,
        "active_experts": 2,
        "entropy_weight": 0.1,
    },
    "dense": {"type": "dense", "num_heads": 3, "head_dim": 6},
    "moa": {"type": "moa", "num_heads": 2, "head_dim": 6, "num_experts": 5, "cv_loss_weight": 0.1},
}
SIGMA_MOE = {"type": "sigma_moe", "num_experts": 5, "expert_size": 7, "active_experts": 2, "entropy_weight": 0.1}


def config_of(attention: str, position: str, **changes: Any) -> ModelConfig:
    tree = {
        "d_model": 24,
        "num_layers": 2,
        "vocab_size": 50,
        "sequence_length": 9,
        "attention": ATTENTION[attention],
        "position": {"type": position},
        "feedforward": SIGMA_MOE if attention != "dense" else {"type": "dense", "hidden_size": 20},
        "dropout": 0.2,
        **changes,
    }
    return ModelConfig.model_validate(tree)


def two_steps(config: ModelConfig, recompute: Any, backends: Backends | None = None) -> dict[str, torch.Tensor]:
    """Gradients, counts and memories after two forward and backward passes."""
    model = build_model(config, None, backends, seed=3, recompute=recompute)
    generator = torch.Generator().manual_seed(0)
    found = {}
    for _, memory in layer_memories(model):
        memory.assign(torch.arange(4), 4)
    for step in range(2):
        tokens = torch.randint(0, 50, (4, config.sequence_length + 1), generator=generator)
        objective, _, _ = model(tokens[:, :-1], tokens[:, 1:], torch.arange(4) + 4 * step)
        objective.backward()
        for name, statistics in routing_statistics(model):
            found[f"load {name} {step}"] = statistics.load.clone()
            statistics.finish_step()
            found |= {f"{name} {key} {step}": value.clone() for key, value in statistics.state().items()}
        for name, memory in layer_memories(model):
            memory.advance()
            assert memory.kept is not None
            found[f"memory {name} {step}"] = memory.kept.clone()
    return found | {name: gradient_of(p) for name, p in model.named_parameters()}


def test_every_attention_is_here() -> None:
    check_kinds(ATTENTION, "ATTENTION of tests/model/test_recompute.py", ATTENTIONS)


@pytest.mark.parametrize("position", ["rope", "xl"])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_numbers_counts_and_memories_do_not_change(attention: str, position: str, recompute: str) -> None:
    config = config_of(attention, position)
    kept = two_steps(config, "none")
    again = two_steps(config, recompute)
    assert again.keys() == kept.keys()
    for name, value in kept.items():
        assert torch.equal(again[name], value), name


def test_with_the_fast_ops_and_expert_dropout() -> None:
    tree = config_of("switchhead", "rope").model_dump()
    tree["attention"]["expert_dropout"] = tree["feedforward"]["expert_dropout"] = 0.3
    tree["feedforward"]["entropy_scope"] = "micro_batch"
    config = ModelConfig.model_validate(tree)
    backends = Backends.choose("cpu", config, device_type="cpu", dtype=torch.float32)
    kept = two_steps(config, "none", backends)
    for recompute in ("selective", "full"):
        for name, value in two_steps(config, recompute, backends).items():
            assert torch.equal(value, kept[name]), f"{recompute}: {name}"


@pytest.mark.slow  # the test before this one has the bits in every mode, by the CPU's kernels
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_dropout_and_norms_in_triton_are_computed_again(recompute: str) -> None:
    """The same bits in every mode, and the numbers of plain operators."""
    config = config_of("switchhead", "rope", num_layers=1, sequence_length=4)
    backends = Backends(elementwise="triton")
    kept = two_steps(config, "none", backends)
    for name, value in two_steps(config, "none").items():
        torch.testing.assert_close(kept[name], value, rtol=1e-4, atol=1e-6)
    for name, value in two_steps(config, recompute, backends).items():
        assert torch.equal(value, kept[name]), name


@pytest.mark.parametrize("recompute", ["full", pytest.param("selective", marks=pytest.mark.slow)])
def test_a_sum_over_experts_that_adds_the_residual_stream_is_computed_again(recompute: str) -> None:
    """Blocks without dropout: the same bits in every mode, and the numbers of the plain addition."""
    config = config_of("switchhead", "rope", num_layers=1, sequence_length=4, dropout=0.0)
    backends = Backends(sigma_moe="triton")
    kept, plain = two_steps(config, "none", backends), two_steps(config, "none")
    assert kept.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(kept[name], value, rtol=1e-4, atol=1e-6)
    for name, value in two_steps(config, recompute, backends).items():
        assert torch.equal(value, kept[name]), name


class _Storages(TorchDispatchMode):
    """Holds weak references to every storage that an operator made."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: WeakSet[Any] = WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor):
                self.alive.add(tensor.untyped_storage())
        return result

    def num_bytes(self) -> int:
        return sum({s.data_ptr(): s.nbytes() for s in self.alive}.values())


def kept_bytes(config: ModelConfig, recompute: Any) -> int:
    """Bytes that are alive between forward and backward pass, without parameters."""
    backends = Backends.choose("cpu", config, device_type="cpu", dtype=torch.float32)
    model: LanguageModel = build_model(config, None, backends, seed=3, recompute=recompute)
    for _, memory in layer_memories(model):
        memory.assign(torch.arange(4), 4)
    tokens = torch.randint(0, 50, (4, config.sequence_length), generator=torch.Generator().manual_seed(0))
    with _Storages() as storages:
        objective, _, _ = model(tokens, tokens, torch.arange(4))
    found = storages.num_bytes()
    objective.backward()
    return found


@pytest.mark.parametrize("name", sorted(KEPT_OPERATORS))
def test_torch_has_each_operator_that_is_kept(name: str) -> None:
    """Those of GPUs too: one by another name would be computed again, without a word."""
    assert hasattr(torch.ops.aten, name.removeprefix("aten::"))


@pytest.mark.parametrize("position", ["rope", "xl"])
def test_fewer_bytes_are_kept(position: str) -> None:
    config = config_of("switchhead", position, sequence_length=64, num_layers=6, dropout=0.0)
    none, selective, full = (kept_bytes(config, mode) for mode in ("none", "selective", "full"))
    assert full < selective < none
    # Per block: its input [4, 64, 24] fp32.
    assert full < none / 4, (none, selective, full)
