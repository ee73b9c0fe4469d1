"""The counts of all routers kept together: the numbers of a loop, by a number of launches that no layer adds to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import ModelConfig
from model.language_model import LanguageModel, routing_statistics
from model.parallel.context import ParallelContext
from model.routing import RoutingStatistics, add_up
from model.routing_table import RoutingTable
from pretrain.engine.micro_steps import StepOutput
from pretrain.engine.step_sums import StepReducer

CPU = torch.device("cpu")
HEADS, EXPERTS, TOKENS, ACTIVE = 3, 5, 7, 2


def routers() -> dict[str, RoutingStatistics]:
    """Of four kinds, mixed in their order."""
    return {
        "sigma-MoE 0": RoutingStatistics((EXPERTS,), tracks_probability=True),
        "value 0": RoutingStatistics((HEADS, EXPERTS), tracks_probability=False, is_sharded=True),
        "MoA": RoutingStatistics((EXPERTS + 1,), tracks_probability=False, tracks_balance=True),
        "output 0": RoutingStatistics((HEADS, EXPERTS), tracks_probability=False, is_sharded=True),
        "value 1": RoutingStatistics((HEADS, EXPERTS), tracks_probability=False, is_sharded=True),
        "sigma-MoE 1": RoutingStatistics((EXPERTS,), tracks_probability=True),
        "unused": RoutingStatistics((EXPERTS,), tracks_probability=True),
    }


def forward(name: str, router: RoutingStatistics, generator: torch.Generator) -> dict[str, np.ndarray]:
    """Records a forward pass of made-up choices, those of the last heads alone; what it adds, by numpy."""
    E = router.shape[-1]
    if len(router.shape) == 2:
        load = torch.randint(0, 9, (HEADS - 1, E), generator=generator)
        router.record(load, None, heads=slice(1, None))
        return {"load": np.concatenate([np.zeros((1, E)), load.numpy()])}
    logits = torch.randn(TOKENS, E, generator=generator)
    index = torch.rand(TOKENS, E, generator=generator).topk(ACTIVE).indices
    gates = torch.rand(TOKENS, ACTIVE, generator=generator)
    router.record(index.flatten().bincount(minlength=E), logits, gates, index)
    exp = np.exp(logits.double().numpy())
    found = {"load": np.zeros(E), "gate_sum": np.zeros(E), "probability_sum": (exp / exp.sum(1, keepdims=True)).sum(0)}
    for token in range(TOKENS):
        for choice in range(ACTIVE):
            found["load"][index[token, choice]] += 1
            found["gate_sum"][index[token, choice]] += float(gates[token, choice])
    return found | {"num_tokens": np.float64(TOKENS)}


@pytest.mark.parametrize("is_together", [True, False], ids=["table", "alone"])
def test_sums_and_means_are_those_of_a_loop_over_tokens(is_together: bool) -> None:
    found, generator = routers(), torch.Generator().manual_seed(0)
    forward("value 0", found["value 0"], generator)
    found["value 0"].finish_step()
    before = forward("MoA", found["MoA"], generator)  # waits while the table is made, and must not be lost
    table = RoutingTable(list(found.values()), CPU, num_scalars=2) if is_together else None
    for step, keep in enumerate((True, False, True)):
        expected: dict[str, dict[str, Any]] = {name: {} for name in found}
        if step == 0:
            expected["MoA"] = before
        means = {name: {k: v.clone() for k, v in router.state().items()} for name, router in found.items()}
        for name in ("value 1", "MoA", "sigma-MoE 1", "sigma-MoE 0", "value 0", "MoA", "value 0", "output 0"):
            for kind, value in forward(name, found[name], generator).items():
                expected[name][kind] = expected[name].get(kind, 0.0) + value
        if is_together:
            add_up(found.values())
        for name, router in found.items():
            for kind, own in zip(
                ("load", "probability_sum", "gate_sum", "num_tokens"), router.accumulators(), strict=True
            ):
                if own.numel():
                    np.testing.assert_allclose(own.numpy(), expected[name].get(kind, 0.0), rtol=1e-6, err_msg=name)
        if table is not None:
            table.finish_step(torch.tensor(keep))
            assert not table.sums.any()
        else:
            for router in found.values():
                router.finish_step(torch.tensor(keep))
        for name, router in found.items():
            counted = expected[name]
            new = {
                "probability": lambda c: c["probability_sum"] / c["num_tokens"],
                "choice_share": lambda c: c["load"] / c["load"].sum(),
                "gate_mean": lambda c: c["gate_sum"] / c["num_tokens"],
            }
            for kind, value in router.state().items():
                if not value.numel():
                    continue
                wanted = new[kind](counted) if counted and keep else means[name][kind]
                np.testing.assert_allclose(value.numpy(), wanted, rtol=1e-6, err_msg=f"{name} {kind}")
            assert not any(own.any() for own in router.accumulators()), name


def test_sums_over_many_tokens_are_fp64() -> None:
    """Of fp32 numbers; fp32 sums of 20,000 of them would be off by 1e-7 and more, otherwise in every layout."""
    router = RoutingStatistics((3,), tracks_probability=True, tracks_balance=True)
    generator = torch.Generator().manual_seed(2)
    logits, gates = torch.randn(20_000, 3, generator=generator), torch.rand(20_000, 1, generator=generator)
    index = torch.randint(0, 3, (20_000, 1), generator=generator)
    router.record(index.flatten().bincount(minlength=3), logits, gates, index)
    probabilities = logits.softmax(-1).double().numpy().sum(0)
    chosen = np.bincount(index[:, 0].numpy(), weights=gates[:, 0].double().numpy(), minlength=3)
    np.testing.assert_allclose(router.probability_sum.numpy(), probabilities, rtol=1e-12)
    np.testing.assert_allclose(router.gate_sum.numpy(), chosen, rtol=1e-12)


def test_the_sums_over_tensor_parallel_ranks_come_first() -> None:
    found = routers()
    table = RoutingTable(list(found.values()), CPU, num_scalars=2)
    table.sums[2 : 2 + table.num_divided] = 1.0
    for router in found.values():
        assert all(bool((own == float(router.is_sharded)).all()) for own in router.accumulators())
    assert [list(found)[number] for number in table.order][:3] == ["value 0", "output 0", "value 1"]


class Launches(TorchDispatchMode):
    """Counts operators that are no views: each is at least one kernel or copy on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = [r.alias_info for r in func._schema.returns]
        if not (returned and all(info is not None and not info.is_write for info in returned)):
            self.names.append(str(func))
        return func(*args, **kwargs or {})


def launches_of_a_step(num_layers: int) -> tuple[list[str], list[str]]:
    """For a SwitchAll model: what the counts of a micro-step launch when they are added, and of a step when it ends."""
    config = ModelConfig.model_validate(
        {
            "d_model": 8,
            "num_layers": num_layers,
            "vocab_size": 11,
            "sequence_length": 4,
            "attention": {
                "type": "switchhead",
                "num_heads": 2,
                "head_dim": 4,
                "num_experts": 3,
                "active_experts": 2,
            },
            "feedforward": {
                "type": "sigma_moe",
                "num_experts": 4,
                "expert_size": 3,
                "active_experts": 2,
                "entropy_weight": 0.01,
            },
        }
    )
    model = LanguageModel(config)
    reduce = StepReducer(model, ParallelContext(), CPU)
    names = [name for name, _ in routing_statistics(model)]
    assert len(names) == 3 * num_layers
    for _, router in routing_statistics(model):
        is_moe = router.tracks_probability
        router.record(torch.ones(router.shape, dtype=torch.int64), torch.zeros(6, 4) if is_moe else None)
    with Launches() as of_micro_step:
        add_up(router for _, router in routing_statistics(model))
    loss, auxiliary = torch.ones(2).unbind()
    with Launches() as of_step:
        report = reduce(StepOutput(loss, auxiliary, torch.tensor(1.0)), 1)
    sums = report.read()
    assert list(sums.load) == names
    assert all(bool((load == 1).all()) for load in sums.load.values())
    assert sums.negative_entropy == pytest.approx(-np.log(4))
    return of_micro_step.names, of_step.names


def test_launches_do_not_grow_with_the_layers() -> None:
    of_micro_step, of_step = launches_of_a_step(18)
    assert len(of_micro_step) <= 6, of_micro_step
    assert len(of_step) <= 40, of_step
    assert launches_of_a_step(2) == (of_micro_step, of_step)
