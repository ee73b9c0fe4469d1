"""All attentions but MoA against the fp64 loop, forward and every gradient: which projections are experts, who selects,
RoPE or Transformer-XL positions, with and without memory. What SwitchHead chooses, counts and drops, and its
regulariser."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model.attention.dense as dense_module
import model.attention.switchhead as switchhead_module
from model.attention.dense import DenseAttention
from model.attention.switchhead import PROJECTIONS, SwitchHeadAttention
from model.attention.xl import Sinusoids, sinusoids
from model.config import ModelConfig, SwitchHeadConfig
from model.dropout import keep_mask, site_key
from model.initialization import initial_value
from model.kernels.choice import Backends
from model.kernels.ops.relative_attention import relative_shift
from model.kernels.ops.route import Routing
from model.parallel.context import ParallelContext
from model.parallel.overlap import Late
from model.parameters import parameter_specs
from model.routing import RoutingStatistics, entropy_of_sequences
from tests.model import attention_oracle, oracles
from tests.tensors import gradient_of, sum_of

ALL_SUBSETS = [c for n in range(1, 5) for c in itertools.combinations(PROJECTIONS, n)]
VO = ("value", "output")
# projections, selection, position (of RoPE also fraction and base), memory, expert dropout, d, H, h, E, k, T, B
CASES = [
    *[
        (subset, "side", "rope" if i % 2 else "xl", 5 * (i % 4 == 0), 0.0, 11, 2, 5, 3, 2, 4, 2)
        for i, subset in enumerate(ALL_SUBSETS)
    ],
    (VO, "shared", "xl", 3, 0.0, 9, 3, 7, 4, 1, 5, 1),
    (VO, "shared", "rope", 0, 0.3, 9, 3, 7, 4, 1, 5, 1),
    (VO, "side", "xl", 6, 0.4, 13, 2, 4, 5, 3, 3, 2),
    (PROJECTIONS, "shared", "xl", 4, 0.3, 10, 1, 6, 4, 2, 4, 2),
    (PROJECTIONS, "projection", "xl", 4, 0.3, 10, 1, 6, 4, 2, 4, 2),
    (PROJECTIONS, "projection", "rope", 0, 0.0, 12, 2, 3, 2, 1, 6, 1),
    (VO, "side", "xl", 4, 0.0, 7, 1, 3, 1, 1, 1, 3),
    ((), "side", "xl", 5, 0.0, 11, 3, 5, 1, 1, 4, 2),
    ((), "side", "xl", 0, 0.0, 10, 2, 4, 1, 1, 6, 1),
    ((), "side", "rope", 0, 0.0, 10, 2, 7, 1, 1, 6, 1),
    (VO, "side", "rope", 6, 0.4, 13, 2, 4, 5, 3, 3, 2),
    (VO, "shared", "rope", 3, 0.0, 9, 3, 7, 4, 1, 5, 1),
    (PROJECTIONS, "projection", "rope", 4, 0.3, 10, 1, 6, 4, 2, 4, 2),
    (VO, "side", "rope", 4, 0.0, 7, 1, 3, 1, 1, 1, 3),
    ((), "side", "rope", 5, 0.0, 11, 3, 5, 1, 1, 4, 2),
    (VO, "side", "rope", 0, 0.0, 11, 2, 7, 5, 3, 6, 2),
    (VO, "side", "rope", 0, 0.4, 11, 2, 7, 5, 3, 6, 2),
    (VO, "side", "rope", 0, 0.0, 8, 1, 4, 1, 1, 5, 1),
    (VO, "side", (1.0, 50.0), 0, 0.0, 9, 3, 5, 4, 4, 4, 2),
    (VO, "side", (0.25, 10000.0), 0, 0.0, 16, 4, 8, 4, 2, 1, 3),
    (VO, "side", (0.1, 10000.0), 0, 0.9, 13, 1, 3, 2, 1, 7, 1),
]  # fmt: skip
BACKENDS = {
    "reference": Backends(),
    "cpu": Backends(route="cpu", switchhead_value="cpu", switchhead_output="cpu"),
    "dense": Backends(route="cpu", switchhead_value="dense", switchhead_output="dense"),
}


Position = str | tuple[float, float]


def model_config(attention: dict[str, Any], position: Position, d: int, T: int) -> ModelConfig:
    rope = {} if isinstance(position, str) else {"fraction": position[0], "base": position[1]}
    return ModelConfig.model_validate(
        {
            "d_model": d,
            "num_layers": 1,
            "vocab_size": 4,
            "sequence_length": T,
            "attention": attention,
            "position": {"type": "rope", **rope} if rope else {"type": position},
        }
    )


def build(config: ModelConfig, backend: str) -> SwitchHeadAttention | DenseAttention:
    kind = DenseAttention if config.attention.type == "dense" else SwitchHeadAttention
    parallel, backends = ParallelContext(), BACKENDS[backend]
    layer = kind(config, parallel=parallel, backends=backends, name="blocks.0.attention", seed=3)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return layer


def copy_first_experts(layer: nn.Module, dense: nn.Module) -> None:
    """Makes `dense` what `layer` is without gates: its first value and output experts; no biases, the usual scale."""
    ours, theirs = dict(layer.named_parameters()), dict(dense.named_parameters())
    (H, _, d, h) = ours["value_experts"].shape
    with torch.no_grad():
        theirs["query.weight"].copy_(ours["query.weight"])
        theirs["key.weight"].copy_(ours["key.weight"])
        theirs["value.weight"].copy_(ours["value_experts"][:, 0].transpose(1, 2).reshape(H * h, d))
        theirs["output.weight"].copy_(ours["output_experts"][:, 0].reshape(H * h, d).T)
        if "position.weight" in ours:
            theirs["position.weight"].copy_(ours["position.weight"])
            theirs["content_bias"].zero_()
            theirs["position_bias"].zero_()
            theirs["scale"].fill_(h**-0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("experts, selection, position, memory, dropout, d, H, h, E, k, T, B", CASES)
def test_forward_and_every_gradient_equal_the_loop(
    experts: tuple[str, ...], selection: str, position: Position, memory: int, dropout: float, d: int, H: int, h: int,
    E: int, k: int, T: int, B: int, backend: str,
) -> None:  # fmt: skip
    attention = {"type": "dense", "num_heads": H, "head_dim": h}
    delta = 0.7 if experts and E != 2 else 0.0
    if experts:
        attention |= {"type": "switchhead", "num_experts": E, "active_experts": k, "expert_dropout": dropout}
        attention |= {"entropy_weight": delta}
        attention |= {"expert_projections": list(experts), "selection": selection}
    config = model_config(attention, position, d, T)
    layer, L = build(config, backend), memory + T
    generator = torch.Generator().manual_seed(1)
    context = torch.randn(B, L, d, generator=generator).requires_grad_()
    upstream = torch.randn(B, T, d, generator=generator)
    sequence_index = torch.arange(B) + 40
    y, auxiliary = layer(context, T, sequence_index)
    assert (auxiliary is None) == (delta == 0.0)
    ((y * upstream).sum() + (0.0 if auxiliary is None else auxiliary)).backward()

    p64 = {name: value.detach().double().requires_grad_() for name, value in layer.named_parameters()}
    scale = p64["scale"] if "scale" in p64 else h**-0.5
    rope = {"rope": (0.5, 10000.0), "xl": None}[position] if isinstance(position, str) else position
    sources = [name for name in ("key", "value") if name in experts]
    keep: list[attention_oracle.Keep | None] = [None] * B
    if dropout:
        masks = {}
        assert isinstance(layer, SwitchHeadAttention) and isinstance(config.attention, SwitchHeadConfig)
        for owner in layer.selectors:
            of_source = any(config.attention.selector_of(name) == owner for name in sources)
            masks[owner] = keep_mask(
                probability=dropout,
                key=site_key(3, f"blocks.0.attention.{owner}_experts"),
                sequence_index=sequence_index,
                shape=(B, L if of_source else T, H, E),
            )
        keep = [{owner: mask[b] for owner, mask in masks.items()} for b in range(B)]
    context64 = context.detach().double().requires_grad_()
    expected = torch.stack(
        [
            attention_oracle.attention(
                context64[b],
                T,
                attention_oracle.shaped(p64, H, h),
                k=k,
                selector_of=getattr(config.attention, "selector_of", str),
                rope=rope,
                scale=scale,
                keep=keep[b],
            )[0]
            for b in range(B)
        ]
    )
    objective = (expected * upstream.double()).sum()
    if auxiliary is not None:
        selectors = [value for name, value in p64.items() if name.endswith("_selector")]
        entropies = [attention_oracle.negative_entropy(one[memory:], rows) for one in context64 for rows in selectors]
        expected_loss = delta / (B * H) * sum_of(entropies)
        objective = objective + expected_loss
        assert (auxiliary.dtype, auxiliary.shape) == (torch.float32, ())
        torch.testing.assert_close(auxiliary.double(), expected_loss, rtol=1e-6, atol=1e-7)
    objective.backward()
    torch.testing.assert_close(y.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(gradient_of(context).double(), context64.grad, rtol=5e-5, atol=5e-5)
    largest = max(float(gradient_of(value).norm()) for value in p64.values())
    for name, parameter in layer.named_parameters():
        error = float((gradient_of(parameter).double() - gradient_of(p64[name])).norm())
        size = float(gradient_of(p64[name]).norm())
        # Of a query that sees one key alone: a softmax of one number has no gradient, but for what two sums of the same
        # products in fp32 differ by, which is none on some processors.
        least = 1e-3 if size > 1e-9 * largest else 0.1
        assert error < 1e-5 * max(size, least * largest), f"gradient of {name} is off by {error}"


@pytest.mark.parametrize("position, memory", [("rope", 0), ("xl", 0), ("xl", 5)])
def test_one_expert_with_gates_of_one_is_dense_attention(
    position: str, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    d, H, h, T, B = 12, 3, 6, 5, 2
    one = {"type": "switchhead", "num_heads": H, "head_dim": h, "num_experts": 1, "active_experts": 1}
    layer = build(model_config(one, position, d, T), "cpu")
    dense = build(model_config({"type": "dense", "num_heads": H, "head_dim": h}, position, d, T), "cpu")
    original = switchhead_module.route_handing_on

    def open_gates(*arguments: Any, **options: Any) -> tuple[torch.Tensor, Routing]:
        x, routing = original(*arguments, **options)
        return x, routing._replace(scores=torch.ones_like(routing.scores))

    monkeypatch.setattr(switchhead_module, "route_handing_on", open_gates)
    copy_first_experts(layer, dense)
    context = torch.randn(B, memory + T, d, generator=torch.Generator().manual_seed(5))
    index = torch.zeros(B, dtype=torch.int64)
    torch.testing.assert_close(layer(context, T, index)[0], dense(context, T, index)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position, memory", [("rope", 0), ("xl", 0), ("xl", 5)])
def test_identical_experts_are_the_dense_projection_times_the_sum_of_the_chosen_gates(
    position: str, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of one expert: v[h] = (sum of the key token's chosen gates) x W_V[h], and the same for the output."""
    d, H, h, E, k, T, B = 12, 2, 6, 4, 2, 5, 2
    attention = {"type": "switchhead", "num_heads": H, "head_dim": h, "num_experts": E, "active_experts": k}
    layer = build(model_config(attention, position, d, T), "cpu")
    dense = build(model_config({"type": "dense", "num_heads": H, "head_dim": h}, position, d, T), "cpu")
    with torch.no_grad():
        for experts in (layer.get_parameter("value_experts"), layer.get_parameter("output_experts")):
            experts.copy_(experts[:, :1].expand_as(experts).clone())
    copy_first_experts(layer, dense)
    context = torch.randn(B, memory + T, d, generator=torch.Generator().manual_seed(5))

    def gate_sums(selector: torch.Tensor) -> torch.Tensor:  # [B, L, H h]
        sums = torch.sigmoid(torch.einsum("bld,hed->blhe", context, selector)).topk(k, -1).values.sum(-1)
        assert float(sums.detach().std()) > 0.05
        return sums.repeat_interleave(h, dim=-1)

    # A linear layer followed by a product per token and head, of the dense layer's own projections.
    values = gate_sums(layer.get_parameter("value_selector"))
    outputs = gate_sums(layer.get_parameter("output_selector"))[:, memory:]
    own = dense_module.region_linear

    def gated(x: torch.Tensor, late: Late) -> torch.Tensor:
        return own(x, late) * values if late.weights[0] is dense.get_parameter("value.weight") else own(x, late)

    monkeypatch.setattr(dense_module, "region_linear", gated)
    dense.get_submodule("output").register_forward_pre_hook(lambda module, inputs: (inputs[0] * outputs,))
    index = torch.zeros(B, dtype=torch.int64)
    torch.testing.assert_close(layer(context, T, index)[0], dense(context, T, index)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("selection", ["side", "projection", "shared"])
def test_permuting_experts_with_their_selector_rows_changes_nothing(selection: str) -> None:
    attention = {"type": "switchhead", "num_heads": 2, "head_dim": 5, "num_experts": 4, "active_experts": 2}
    attention |= {"expert_projections": list(PROJECTIONS), "selection": selection}
    layer = build(model_config(attention, "xl", 9, 6), "cpu")
    context = torch.randn(2, 10, 9, generator=torch.Generator().manual_seed(2))
    index = torch.zeros(2, dtype=torch.int64)
    before, _ = layer(context, 6, index)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith(("_selector", "_experts")):
                parameter.copy_(parameter[:, [2, 0, 3, 1]].clone())
    torch.testing.assert_close(layer(context, 6, index)[0], before, rtol=1e-5, atol=1e-5)


def switchhead(**settings: object) -> SwitchHeadAttention:
    attention = {"type": "switchhead", "num_heads": 2, "head_dim": 4, "num_experts": 5, "active_experts": 2, **settings}
    layer = build(model_config(attention, "rope", 8, 6), "reference")
    assert isinstance(layer, SwitchHeadAttention)
    return layer


def statistics_of(layer: SwitchHeadAttention, side: str) -> RoutingStatistics:
    found = getattr(layer, f"{side}_statistics")
    assert isinstance(found, RoutingStatistics)
    return found


def test_selectors_learn_only_through_chosen_scores() -> None:
    layer = switchhead(num_experts=4, active_experts=1)
    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    layer(x, 5, torch.zeros(1, dtype=torch.int64))[0].square().sum().backward()
    chosen = statistics_of(layer, "value").load > 0
    has_gradient = gradient_of(layer.get_parameter("value_selector")).abs().sum(-1) > 0
    assert torch.equal(chosen, has_gradient)
    assert 0 < int(chosen.sum()) < chosen.numel()


def test_evaluation_drops_no_expert_and_counts_nothing() -> None:
    layer, spared = switchhead(expert_dropout=0.6, entropy_weight=0.1).eval(), switchhead()
    x, index = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(5)), torch.arange(2)
    y, loss = layer(x, 6, index)
    assert loss is None and torch.equal(y, spared(x, 6, index)[0])
    assert not any(statistics_of(layer, side).load.any() for side in ("value", "output"))
    assert not torch.equal(layer.train()(x, 6, index)[0], spared(x, 6, index)[0])


def test_an_expert_whose_probability_underflows_has_a_finite_gradient() -> None:
    logits = torch.tensor([[0.0, 0.0, -200.0], [1.0, 0.0, -150.0]])[None, :, None].requires_grad_()
    value = entropy_of_sequences(logits)
    value.backward()
    p = logits.detach()[0, :, 0].double().softmax(-1).mean(0)[:2]
    assert float(value.detach()) == pytest.approx(float((p * p.log()).sum()), rel=1e-6)
    assert torch.isfinite(gradient_of(logits)).all() and float(gradient_of(logits)[..., 2].abs().max()) == 0.0


def test_tokens_of_memory_are_chosen_for_but_not_counted_again() -> None:
    """They were counted when they were new; the value selector looks at them all the same."""
    layer = switchhead()
    context = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(6))
    layer(context, 3, torch.arange(2))
    for side in ("value", "output"):
        logits = torch.einsum("btd,hed->hbte", context[:, 4:], layer.get_parameter(f"{side}_selector"))
        chosen = F.one_hot(logits.topk(2).indices, 5).sum((1, 2, 3))
        assert torch.equal(statistics_of(layer, side).load, chosen.double()), side


def test_selectors_are_shared_as_the_setting_says() -> None:
    def selectors(selection: str, *experts: str) -> set[str]:
        attention = {"type": "switchhead", "expert_projections": experts, "selection": selection}
        names = dict(build(model_config(attention, "rope", 8, 4), "reference").named_parameters())
        return {name.removesuffix("_selector") for name in names if name.endswith("_selector")}

    assert selectors("side", "query", "key", "value", "output") == {"value", "output"}
    assert selectors("side", "query", "key") == {"query", "key"}
    assert selectors("side", "key", "output") == {"key", "output"}
    assert selectors("projection", "key", "value", "output") == {"key", "value", "output"}
    assert selectors("shared", "query", "key", "value") == {"value"}
    assert selectors("shared", "value", "output") == {"output"}


def test_relative_shift_against_indices_and_sinusoids_at_a_known_place() -> None:
    x = torch.randn(2, 3, 4, 9)
    shifted = relative_shift(x)
    for i, j in itertools.product(range(4), range(9)):
        if j + 3 - i < 9:
            assert torch.equal(shifted[..., i, j], x[..., i, j + 3 - i])
    for width in (6, 7):
        rows = torch.stack([oracles.sinusoid(distance, width) for distance in (0, 1, 700)])
        torch.testing.assert_close(sinusoids(torch.tensor([0, 1, 700]), width).double(), rows, rtol=0, atol=1e-7)


def test_sinusoids_of_any_length_are_the_last_rows_of_a_table_that_is_kept() -> None:
    kept, like = Sinusoids(), torch.zeros(1, dtype=torch.bfloat16)
    for L in (1, 2, 3, 12, 9, 16, 17, 12):
        expected = sinusoids(torch.arange(L - 1, -1, -1), 6)
        assert torch.equal(kept(L, 6, like), expected.bfloat16()) and torch.equal(kept(L, 6, like.float()), expected)
    assert kept(9, 6, like).untyped_storage().data_ptr() == kept(16, 6, like).untyped_storage().data_ptr()
    assert kept(9, 6, like).untyped_storage().data_ptr() != kept(17, 6, like).untyped_storage().data_ptr()
    bfloat16 = [table for (_, _, dtype, _), table in kept._kept.items() if dtype == torch.bfloat16]
    assert sorted(len(table) for table in bfloat16) == [1, 2, 4, 16, 32], "at most twice the longest together"


def test_normalized_initial_experts_have_one_norm_and_the_same_deviation() -> None:
    attention = {"type": "switchhead", "num_heads": 2, "head_dim": 8, "num_experts": 3, "normalized_init": True}
    name = "blocks.0.attention.value_experts"
    value, plain = (
        initial_value(name, parameter_specs(model_config(chosen, "rope", 64, 4))[name], seed=0)
        for chosen in (attention, attention | {"normalized_init": False})
    )
    assert value.shape == (2, 3, 64, 8)
    norms = value.norm(dim=(0, 1))
    torch.testing.assert_close(norms, norms.mean().expand_as(norms), rtol=1e-5, atol=0)
    assert float(value.std()) == pytest.approx(float(plain.std()), rel=1e-5)
    # By one number for all heads and experts, entry by entry: what differs between heads stays.
    expected = plain / plain.square().sum((0, 1)).sqrt()
    torch.testing.assert_close(value / value.std(), expected / expected.std(), rtol=1e-5, atol=1e-6)
    assert float(plain.norm(dim=(0, 1)).std()) > 1e-3
