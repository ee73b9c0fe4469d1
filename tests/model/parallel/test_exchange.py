"""Expert parallelism of one sigma-MoE layer against the layer in one process: outputs and every gradient, for uneven
and empty shares."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.config import ModelConfig
from model.feedforward.sigma_moe import SigmaMoE
from model.kernels.choice import Backends
from model.parallel.context import ParallelContext
from model.parallel.exchange import Exchange, collect, spread
from tests.harness import run_ranks
from tests.tensors import gradient_of

D, EXPERTS, WIDTH, CHOICES, T = 8, 6, 4, 2, 5
BACKENDS = {
    "reference": Backends(),
    "cpu": Backends(route="cpu", sigma_moe="cpu"),
    "grouped_mm": Backends(route="cpu", sigma_moe="grouped_mm"),
}
ROUTERS = ("random", "everything to the first rank", "one rank gets nothing")


def build(parallel: ParallelContext, backends: Backends) -> SigmaMoE:
    config = ModelConfig.model_validate(
        {
            "d_model": D,
            "num_layers": 1,
            "vocab_size": 4,
            "sequence_length": T,
            "feedforward": {
                "type": "sigma_moe",
                "num_experts": EXPERTS,
                "expert_size": WIDTH,
                "active_experts": CHOICES,
                "expert_dropout": 0.3,
            },
        }
    )
    return SigmaMoE(config, parallel=parallel, backends=backends, name="layer", seed=3)


def weights(router: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((EXPERTS, D), (EXPERTS, D, WIDTH), (EXPERTS, WIDTH, D))
    tensors = [torch.randn(*shape, generator=generator) for shape in shapes]
    if router == "everything to the first rank":
        tensors[0][:2] += 10.0  # its two experts; every feature is positive
    elif router == "one rank gets nothing":
        tensors[0][2:4] -= 10.0
    return tensors


def inputs(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ranks have 1, 3 and 2 sequences: as uneven as the choices."""
    generator = torch.Generator().manual_seed(10 + rank)
    B = (1, 3, 2)[rank]
    x, grad = torch.rand(B, T, D, generator=generator), torch.randn(B, T, D, generator=generator)
    return x, grad, torch.arange(B) + 10 * rank


def run(layer: SigmaMoE, x: Tensor, grad: Tensor, sequence_index: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y, _ = layer(x, sequence_index)
    layer.zero_grad()
    # A gradient that is not contiguous, as views downstream give.
    y.transpose(0, 2).backward(grad.transpose(0, 2))
    assert x.grad is not None
    return y.detach(), x.grad


def exchange(rank: int) -> None:
    for router in ROUTERS:
        for training in (True, False):
            compare(rank, router, training)


def compare(rank: int, router: str, training: bool) -> None:
    group, size = dist.group.WORLD, dist.get_world_size()
    common: dict[str, Any] = {"data_rank": rank, "data_size": size, "data_group": group}
    parallel = ParallelContext(**common, expert_rank=rank, expert_size=size, expert_group=group)
    held = slice(2 * rank, 2 * rank + 2)
    for backend, backends in BACKENDS.items():
        label = f"{router}, {'training' if training else 'evaluation'}, {backend}"
        plain, layer = build(ParallelContext(), backends), build(parallel, backends)
        plain.train(training), layer.train(training)
        with torch.no_grad():
            for p, q, value in zip(plain.parameters(), layer.parameters(), weights(router), strict=True):
                p.copy_(value)
                q.copy_(value if q.shape == value.shape else value[held])

        def labelled(said: str, label: str = label) -> str:
            return f"{label}: {said}"

        y, grad_x = run(layer, *inputs(rank))
        received = layer.up_experts.grad
        assert received is not None and layer.router.grad is not None
        if router == "everything to the first rank" and not training:
            assert (received == 0).all() == (rank > 0)
        first = [t.clone() for t in (y, grad_x, *(gradient_of(p) for p in layer.parameters()))]
        own_router_grad = layer.router.grad.clone()
        again = run(layer, *inputs(rank))
        for a, b in zip(first, (*again, *(gradient_of(p) for p in layer.parameters())), strict=True):
            assert torch.equal(a, b), f"{label}: not repeatable"

        expert_grads = [torch.zeros_like(p) for p in (plain.up_experts, plain.down_experts)]
        for source in range(size):
            expected_y, expected_grad = run(plain, *inputs(source))
            if source == rank:
                torch.testing.assert_close(y, expected_y, msg=labelled)
                torch.testing.assert_close(grad_x, expected_grad, msg=labelled)
                torch.testing.assert_close(own_router_grad, plain.router.grad, msg=labelled)
            for total, p in zip(expert_grads, (plain.up_experts, plain.down_experts), strict=True):
                total += gradient_of(p)
        # Of all ranks' tokens: no reduction over these ranks is left to do.
        torch.testing.assert_close(layer.up_experts.grad, expert_grads[0][held], msg=labelled)
        torch.testing.assert_close(layer.down_experts.grad, expert_grads[1][held], msg=labelled)


def test_a_layer_computes_the_same() -> None:
    """With every backend, in training (with expert dropout) and evaluation."""
    run_ranks(exchange, 3)


def test_received_rows_are_grouped_by_expert_in_the_order_of_their_sources() -> None:
    no_group: Any = None
    for load in ([[2, 0, 1], [0, 3, 1]], [[0, 0], [0, 4], [1, 2]], [[5]], [[0, 0]]):
        exchange = Exchange(no_group, sent=[], received=list(map(sum, load)), received_load=torch.tensor(load))
        experts = [expert for source in load for expert, rows in enumerate(source) for _ in range(rows)]
        assert exchange.row_experts().tolist() == experts
        assert exchange.row_order().tolist() == sorted(range(len(experts)), key=experts.__getitem__)


def test_spread_and_collect_are_adjoint_and_sum_in_fp32() -> None:
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(12, generator=generator)
    x = torch.randn(4, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    rows = torch.randn(12, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.equal(spread(x, order, 3), x.repeat_interleave(3, 0)[order])
    assert torch.autograd.gradcheck(lambda x: spread(x, order, 3), x)
    assert torch.autograd.gradcheck(lambda rows: collect(rows, order, 3), rows)
    half = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)  # 256 + 1 is 256 in bf16
    assert float(collect(half, torch.arange(3), 3)) == 258.0
