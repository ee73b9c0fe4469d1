"""The published initial weights: which parameters have which distribution, and the same values in every layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.initialization import initial_value, initialize
from model.kernels.choice import Backends
from model.language_model import build_model
from model.layers import Head
from model.memory import layer_memories
from model.parallel.context import ParallelContext
from model.parameters import parameter_specs
from pretrain.config.loading import load_config
from tests.tensors import gradient_of

ROOT = Path(__file__).resolve().parents[2]
SWITCHHEAD = {"type": "switchhead", "num_heads": 2, "head_dim": 24, "num_experts": 4}
ATTENTIONS = {
    "switchhead": SWITCHHEAD,
    "dense": {"type": "dense", "num_heads": 4, "head_dim": 24},
    "moa": {"type": "moa", "num_heads": 2, "head_dim": 24, "num_experts": 4},
}
FEEDFORWARDS = {
    "sigma_moe": {"type": "sigma_moe", "num_experts": 8, "expert_size": 20, "active_experts": 2},
    "dense": {"type": "dense", "hidden_size": 96},
    "swiglu": {"type": "swiglu", "hidden_size": 96},
}


def small(attention: str, feedforward: str, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "d_model": 64,
            "num_layers": 2,
            "vocab_size": 500,
            "sequence_length": 8,
            "attention": ATTENTIONS[attention],
            "feedforward": FEEDFORWARDS[feedforward],
            "position": {"type": "xl"},
            "initialization": "published",
            **changes,
        }
    )


def parameters(config: ModelConfig, parallel: ParallelContext | None = None) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in build_model(config, parallel, seed=3).named_parameters()}


def distance(values: Tensor, expected: Tensor) -> float:
    """Kolmogorov and Smirnov's: the largest gap between the two samples' distribution functions."""
    ordered = expected.flatten().sort().values
    n, place = values.numel(), torch.searchsorted(ordered, values.flatten().sort().values.contiguous())
    return float((torch.arange(n) / n - place / ordered.numel()).abs().max())


def test_output_layer_is_pytorchs_default() -> None:
    config = small("switchhead", "dense", d_model=48, vocab_size=4000)
    found, torchs = parameters(config), nn.Linear(48, 4000)
    bound = 1 / math.sqrt(48)
    for name in ("weight", "bias"):
        value, expected = found[f"head.{name}"], getattr(torchs, name).detach()
        assert 0.999 * bound < float(value.abs().max()) <= bound
        assert distance(value, expected) < 1.63 * math.sqrt(2 / value.numel())  # of equal distributions 99% are below
        assert float(value.std()) == pytest.approx(1 / math.sqrt(3 * 48), rel=0.03)


def test_the_embedding_of_the_sigma_moe_paper_is_torchs_xavier_uniform() -> None:
    """Nothing else differs from the SwitchHead paper's."""
    sizes: dict[str, Any] = {"d_model": 48, "vocab_size": 4000}
    found = parameters(small("dense", "sigma_moe", **sizes, initialization="published_sigma_moe"))
    later = parameters(small("dense", "sigma_moe", **sizes))
    assert {name for name in found if not torch.equal(found[name], later[name])} == {"embedding.weight"}
    value, expected = found["embedding.weight"], nn.init.xavier_uniform_(torch.empty(4000, 48))
    assert distance(value, expected) < 1.63 * math.sqrt(2 / value.numel())
    assert float(value.std()) == pytest.approx(math.sqrt(2 / 4048), rel=0.01)
    assert float(later["embedding.weight"].std()) == pytest.approx(1 / math.sqrt(48), rel=0.01)


def test_dense_weights_are_the_authors_truncated_normal() -> None:
    """torch's trunc_normal_ with its own bounds, then scaled to the standard deviation, as in the authors' code."""
    found = parameters(small("dense", "dense", d_model=64))
    s = math.sqrt(2 / 2)
    fan_in = {"feedforward.up": 64, "feedforward.down": 96, "attention.output": 4 * 24}
    fan_in |= {f"attention.{name}": 64 for name in ("query", "key", "value", "position")}
    for name, width in fan_in.items():
        value, std = found[f"blocks.1.{name}.weight"], s / math.sqrt(width)
        expected = nn.init.trunc_normal_(torch.empty(200_000), generator=torch.Generator().manual_seed(1))
        expected *= std / expected.std()
        assert float(value.std()) == pytest.approx(std, rel=1e-6), name
        assert distance(value, expected) < 1.63 / math.sqrt(value.numel()) + 0.004, name
        # The tails end at 2 / 0.88 standard deviations: of 4,096 untruncated values 67 would lie beyond 2.4.
        assert 2.2 * std < float(value.abs().max()) < 2.4 * std, name
    swiglu = parameters(small("dense", "swiglu", d_model=64))
    for name, width in {"up": 64, "gate": 64, "down": 96}.items():
        value = swiglu[f"blocks.1.feedforward.{name}.weight"]
        assert float(value.std()) == pytest.approx(s / math.sqrt(width), rel=1e-6), name
    assert found["blocks.1.attention.scale"].tolist() == pytest.approx([1 / math.sqrt(24)])
    assert not any(found[f"blocks.1.attention.{name}_bias"].any() for name in ("content", "position"))


@pytest.mark.parametrize("init_scale, s", [("paper", math.sqrt(2 / 3)), ("library", math.sqrt(1 / 3))])
def test_standard_deviations_are_the_published(init_scale: str, s: float) -> None:
    """Of 3 layers; d = 64, H h = 2 x 24, N_E G = 8 x 20: the fan-in of the dense layer that experts stand for."""
    config = small("switchhead", "sigma_moe", num_layers=3, init_scale=init_scale, initialization="normal")
    found = parameters(config)
    experts = {"attention.value_experts": 64, "attention.output_experts": 48}
    experts |= {"feedforward.up_experts": 64, "feedforward.down_experts": 160, "feedforward.router": 64}
    dense = {f"attention.{name}.weight": 64 for name in ("query", "key", "position")}
    selectors = {f"attention.{name}_selector": 64 for name in ("value", "output")}
    expected = {f"blocks.{i}.{n}": s / math.sqrt(w) for i in range(3) for n, w in (experts | dense | selectors).items()}
    expected |= {"embedding.weight": 1 / 8, "head.weight": 1 / 8}
    for name, std in expected.items():
        value = found.pop(name)
        assert float(value.std()) == pytest.approx(std, rel=4 / math.sqrt(2 * value.numel())), name
    assert {float(value.min()) for value in found.values()} <= {0.0, 1.0}
    assert all((name.endswith("bias") and not value.any()) or bool((value == 1).all()) for name, value in found.items())
    rows = initial_value("blocks.0.feedforward.router", parameter_specs(config)["blocks.0.feedforward.router"], seed=3)
    torch.testing.assert_close(rows.norm(dim=1), rows.norm(dim=1).mean().expand(8), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "attention, feedforward, others",
    [
        ("switchhead", "sigma_moe", set()),
        ("switchhead", "dense", {"feedforward.up.weight", "feedforward.down.weight"}),
        ("switchhead", "swiglu", {f"feedforward.{name}.weight" for name in ("up", "gate", "down")}),
        ("moa", "dense", {"feedforward.up.weight", "feedforward.down.weight"}),
        (
            "dense",
            "sigma_moe",
            {f"attention.{name}.weight" for name in ("query", "key", "value", "output", "position")},
        ),
    ],
)
def test_only_the_output_layer_and_dense_layers_differ(attention: str, feedforward: str, others: set[str]) -> None:
    """Everything else keeps its bits: SwitchHead's and MoA's dense projections are untruncated in the authors' code."""
    published = parameters(small(attention, feedforward))
    ours = parameters(small(attention, feedforward, initialization="normal"))
    differ = {name for name in published if not torch.equal(published[name], ours[name])}
    assert differ == {"head.weight", "head.bias"} | {f"blocks.{i}.{name}" for i in range(2) for name in others}


def test_a_tied_output_layer_keeps_the_embedding_and_its_own_bias() -> None:
    config = small("switchhead", "dense", tied_embedding=True)
    found = parameters(config)
    specs = parameter_specs(small("switchhead", "dense", initialization="normal"))
    normal = initial_value("embedding.weight", specs["embedding.weight"], seed=3)
    assert torch.equal(found["embedding.weight"], normal) and "head.weight" not in found
    assert float(found["head.bias"].abs().max()) > 0.12
    last_stage = nn.ModuleDict({"head": Head(config, parallel=ParallelContext(), backends=Backends(), seed=3)})
    initialize(last_stage, config, ParallelContext(), seed=3)  # a pipeline's copy
    assert torch.equal(last_stage.get_parameter("head.weight"), normal)
    assert torch.equal(last_stage.get_parameter("head.bias"), found["head.bias"])


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("feedforward", FEEDFORWARDS)
def test_tensor_parallel_ranks_hold_slices_of_the_same_weights(attention: str, feedforward: str) -> None:
    """The scaling by a tensor's own deviation is over the whole tensor, not over a rank's part."""
    config = small(attention, feedforward)
    whole, specs = parameters(config), parameter_specs(config)
    group: Any = object()  # nobody asks it anything
    ranks = [
        parameters(config, ParallelContext(tensor_size=2, tensor_rank=rank, tensor_group=group)) for rank in range(2)
    ]
    divided = 0
    for name, value in whole.items():
        dim = specs[name].divided
        parts = [rank[name] for rank in ranks]
        assert torch.equal(value, parts[0] if dim is None else torch.cat(parts, dim)), name
        divided += dim is not None
    assert divided >= 4


@pytest.mark.slow
def test_the_first_step_of_the_published_47m_switchhead() -> None:
    """The published run of C4 begins with loss 9.12 and gradient norm 9.2; with initialization = normal it would be
    9.59 and 16.0. One batch of 64 x 256, as published, of generated text: pieces whose frequencies follow Zipf's law.

    ln 8000 + 1/2 of the logits' variance is 8.99 + 1/6, or + 1/5 with the dropout before the output layer."""
    config = load_config(ROOT / "configs" / "paper" / "c4_switchhead_47m.json").model
    model = build_model(config, backends=Backends.choose("cpu", config, device_type="cpu", dtype=torch.float32), seed=0)
    frequencies = 1 / torch.arange(1, 8001).double()
    generator, losses = torch.Generator().manual_seed(0), []
    tokens = torch.multinomial(frequencies, 64 * 257, replacement=True, generator=generator).view(64, 257)
    for _, memory in layer_memories(model):
        memory.assign(torch.arange(64), 64)
    for index in torch.arange(64).split(4):
        objective, sequence_loss, _ = model(tokens[index, :-1], tokens[index, 1:], index)
        (objective / 16).backward()
        losses.append(float(sequence_loss.mean()))
    assert sum(losses) / 16 == pytest.approx(9.12, abs=0.12)
    assert float(nn.utils.get_total_norm([gradient_of(p) for p in model.parameters()])) == pytest.approx(9.2, abs=1.5)
