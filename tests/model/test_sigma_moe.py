"""sigma-MoE against the fp64 loop: forward, every gradient, expert dropout, and the entropy regulariser."""

from __future__ import annotations

import pytest
import torch

from model.config import ModelConfig, SigmaMoEConfig
from model.dropout import keep_mask, site_key
from model.feedforward.sigma_moe import SigmaMoE
from model.kernels.choice import Backends
from model.parallel.context import ParallelContext
from model.routing import Place, RoutingStatistics, entropy_regularizer
from tests.harness import run_ranks
from tests.model import oracles
from tests.tensors import gradient_of

# d, E, G, k, B, T, expert dropout
SHAPES = [
    (7, 5, 6, 3, 2, 5, 0.0),
    (7, 5, 6, 3, 2, 5, 0.3),
    (4, 1, 3, 1, 1, 4, 0.0),
    (9, 8, 5, 8, 1, 3, 0.0),
    (6, 4, 2, 2, 3, 1, 0.8),
    (16, 16, 8, 4, 2, 6, 0.0),
]


BACKENDS = {
    "reference": Backends(),
    "cpu": Backends(route="cpu", sigma_moe="cpu"),
}


def build(
    d: int,
    E: int,
    G: int,
    k: int,
    dropout: float,
    gamma: float = 0.0,
    scope: str = "micro_batch",
    backend: str = "reference",
    activation: str = "relu",
) -> SigmaMoE:
    config = ModelConfig.model_validate(
        {
            "d_model": d,
            "num_layers": 1,
            "vocab_size": 4,
            "sequence_length": 4,
            "feedforward": {
                "type": "sigma_moe",
                "num_experts": E,
                "expert_size": G,
                "active_experts": k,
                "expert_dropout": dropout,
                "entropy_weight": gamma,
                "entropy_scope": scope,
                "activation": activation,
            },
        }
    )
    layer = SigmaMoE(
        config, parallel=ParallelContext(), backends=BACKENDS[backend], name="blocks.0.feedforward", seed=3
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d, E, G, k, B, T, dropout", SHAPES)
def test_forward_and_every_gradient_equal_the_loop(
    d: int, E: int, G: int, k: int, B: int, T: int, dropout: float, backend: str, activation: str
) -> None:
    gamma = 0.7
    layer = build(d, E, G, k, dropout, gamma, backend=backend, activation=activation)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, T, d, generator=generator).requires_grad_()
    upstream = torch.randn(B, T, d, generator=generator)
    sequence_index = torch.arange(B) + 11
    y, auxiliary_loss = layer(x, sequence_index)
    ((y * upstream).sum() + auxiliary_loss).backward()

    p = {name: value.detach().double().requires_grad_() for name, value in layer.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    keep = None
    if dropout:
        keep = keep_mask(
            probability=dropout,
            key=site_key(3, "blocks.0.feedforward.experts"),
            sequence_index=sequence_index,
            shape=(B, T, E),
        ).view(B * T, E)
        assert 0 < int(keep.sum()) < keep.numel()
    flat = x64.view(B * T, d)
    expected = oracles.sigma_moe(flat, p, k=k, keep=keep).view(B, T, d)
    expected_loss = gamma * oracles.entropy_term(flat, p["router"])
    ((expected * upstream.double()).sum() + expected_loss).backward()
    torch.testing.assert_close(y.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(auxiliary_loss.double(), expected_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient_of(x).double(), x64.grad, rtol=5e-5, atol=5e-5)
    assert len(p) == 3
    for name, parameter in layer.named_parameters():
        error = (gradient_of(parameter).double() - gradient_of(p[name])).norm() / gradient_of(p[name]).norm().clamp_min(
            1e-12
        )
        assert error < 1e-5, f"gradient of {name} is off by {error:.1e}"


@pytest.mark.parametrize("chosen", [0, 3])
def test_all_tokens_on_one_expert(chosen: int) -> None:
    layer = build(6, 4, 5, 1, 0.0)
    with torch.no_grad():
        layer.router.zero_()
        layer.router[chosen] = 5.0
    x = torch.rand(2, 3, 6, generator=torch.Generator().manual_seed(0)) + 0.1
    y, _ = layer(x, torch.zeros(2, dtype=torch.int64))
    p = {name: value.detach().double() for name, value in layer.named_parameters()}
    expected = oracles.sigma_moe(x.double().view(6, 6), p, k=1, keep=None).view(2, 3, 6)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert layer.statistics.load.tolist() == [6.0 if e == chosen else 0.0 for e in range(4)]


def test_global_batch_scope_linearises_at_the_previous_step() -> None:
    """First step: p uniform, zero gradient. Later: the gradient of sum p log p with its coefficient at the old p."""
    d, E, N = 5, 4, 9
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(N, d, generator=generator)
    router = torch.randn(E, d, generator=generator).requires_grad_()
    config = SigmaMoEConfig(num_experts=E, active_experts=2, entropy_weight=0.3, entropy_scope="global_batch")
    statistics = RoutingStatistics((E,), tracks_probability=True)

    first, _ = entropy_regularizer(x @ router.T, config, statistics, ParallelContext())
    (gradient,) = torch.autograd.grad(first, router)
    assert gradient.abs().max() < 1e-7

    old = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    statistics.probability = old
    value, _ = entropy_regularizer(x @ router.T, config, statistics, ParallelContext())
    (gradient,) = torch.autograd.grad(value, router)
    router64 = router.detach().double().requires_grad_()
    mean = (x.double() @ router64.T).softmax(-1).mean(0)
    (expected,) = torch.autograd.grad(0.3 * ((1 + old.log()) * mean).sum(), router64)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)

    # At its own p the linearised gradient is the true one.
    statistics.probability = mean.detach()
    value, _ = entropy_regularizer(x @ router.T, config, statistics, ParallelContext())
    (gradient,) = torch.autograd.grad(value, router)
    mean = (x.double() @ router64.T).softmax(-1).mean(0)
    (expected,) = torch.autograd.grad(0.3 * (mean * mean.log()).sum(), router64)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)


def test_statistics_ignore_evaluation_and_expert_dropout() -> None:
    layer = build(6, 4, 5, 2, 0.5, gamma=0.1)
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    layer.eval()
    _, auxiliary_loss = layer(x, torch.zeros(2, dtype=torch.int64))
    assert auxiliary_loss is None and float(layer.statistics.num_tokens) == 0
    layer.train()
    layer(x, torch.zeros(2, dtype=torch.int64))
    layer.statistics.finish_step()
    clean = (x.view(6, 6) @ layer.router.T).softmax(-1).mean(0)
    torch.testing.assert_close(layer.statistics.probability, clean.double().detach(), rtol=1e-6, atol=1e-7)
    assert float(layer.statistics.load.sum()) == 0


class OwnChoices:
    """A record that holds what the router chooses anyway."""

    replaces = True

    def settle(self, own: torch.Tensor, logits: torch.Tensor, place: Place, *, is_repeated: bool) -> torch.Tensor:
        return own


def test_a_dropped_expert_scores_0_for_choices_of_a_record_too() -> None:
    """Four of five experts are chosen and three of five dropped, so dropped ones are among the choices."""
    layer = build(7, 5, 6, 4, 0.6)
    x, index = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(3)), torch.arange(2)
    y, _ = layer(x, index)
    layer.statistics.choices = OwnChoices()
    torch.testing.assert_close(layer(x, index)[0], y, rtol=1e-6, atol=1e-6)


def _rank_gradients(
    rank: int, x: torch.Tensor, router: torch.Tensor, world_size: int
) -> list[tuple[torch.Tensor, float]]:
    """Gradient and value of ranks that have a share of the tokens each: as data-parallel ranks, whose average it is,
    and two of them as ranks that divide the tokens of the same sequences, whose sum it is."""
    import torch.distributed as dist

    group = dist.group.WORLD if world_size > 1 else None
    config = SigmaMoEConfig(
        num_experts=router.shape[0], active_experts=2, entropy_weight=1.0, entropy_scope="micro_batch"
    )
    statistics = RoutingStatistics((router.shape[0],), tracks_probability=True)
    ways: list[tuple[ParallelContext, dist.ProcessGroup | None]] = [
        (ParallelContext(data_rank=rank, data_size=world_size, data_group=group), None)
    ]
    ways += [(ParallelContext(), group)] if world_size == 2 else []
    found, share = [], x.chunk(world_size)[rank]
    for parallel, token_group in ways:
        own = router.clone().requires_grad_()
        value, _ = entropy_regularizer(share @ own.T, config, statistics, parallel, token_group=token_group)
        value.backward()
        assert own.grad is not None
        gradient = own.grad / parallel.data_size
        if world_size > 1:
            dist.all_reduce(gradient)
        found.append((gradient, float(value.detach())))
    return found


def test_micro_batch_regulariser_has_the_single_process_gradient_on_any_number_of_ranks() -> None:
    generator = torch.Generator().manual_seed(9)
    x, router = torch.randn(8, 5, generator=generator), torch.randn(4, 5, generator=generator)
    router64 = router.double().requires_grad_()
    expected = oracles.entropy_term(x.double(), router64)
    expected.backward()
    for world_size in (1, 2, 4):
        for found in run_ranks(_rank_gradients, world_size, x, router, world_size):
            for gradient, value in found:
                torch.testing.assert_close(gradient.double(), router64.grad, rtol=1e-5, atol=1e-7)
                assert value == pytest.approx(float(expected.detach()), rel=1e-6)


@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
def test_an_expert_whose_probability_underflows_has_a_finite_gradient(scope: str) -> None:
    tree = {"num_experts": 3, "active_experts": 1, "entropy_weight": 1.0, "entropy_scope": scope}
    config = SigmaMoEConfig.model_validate(tree)
    logits = torch.tensor([[0.0, 0.0, -200.0], [1.0, 0.0, -150.0]], requires_grad=True)
    statistics = RoutingStatistics((3,), tracks_probability=True)
    loss, _ = entropy_regularizer(logits, config, statistics, ParallelContext())
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(gradient_of(logits)).all()
    assert float(gradient_of(logits)[:, 2].abs().max()) == 0.0
    if scope == "micro_batch":
        p = logits.detach().double().softmax(-1).mean(0)[:2]
        assert float(loss) == pytest.approx(float((p * p.log()).sum()), rel=1e-6)
