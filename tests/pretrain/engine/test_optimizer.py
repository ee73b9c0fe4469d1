"""AdamW in both of its forms: the same updates to rounding, the same checkpoints, a step counter where each keeps it.

A run takes the fused one; checkpoints of before may come from the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pretrain.engine.build
from common.errors import ConfigError
from model.language_model import build_on_meta
from pretrain.config.schema import Config
from pretrain.engine.optimizer import AdamW, Rates, build_optimizer, grouped
from pretrain.engine.zero_state import _adam_state, optimizer_steps, set_optimizer_steps
from tests.harness import run_ranks
from tests.pretrain.runs import small_config, state_tensors, train_runs


def train_in_forms(rank: int, runs: list[tuple[Config, Path, bool]]) -> None:
    """As train_runs, each run with AdamW in the form that it names: fused or not."""
    for config, folder, fused in runs:
        made: Callable[..., Any] = build_optimizer if fused else plain_optimizer
        pretrain.engine.build.build_optimizer = made
        train_runs(rank, [(config, folder)])


class _Plain(torch.optim.AdamW):
    """Refuses a flag that only the fused form reads; no update is skipped here."""

    found_inf = property(lambda self: None, lambda self, flag: None)


def plain_optimizer(model: torch.nn.Module, config: Config) -> torch.optim.AdamW:
    """As `build_optimizer`, but what torch takes by itself on a CPU."""
    fused = build_optimizer(model, config)
    options = {key: value for key, value in fused.defaults.items() if key in ("lr", "betas", "eps")}
    return _Plain([{key: group[key] for key in ("params", "weight_decay")} for group in fused.param_groups], **options)


@pytest.mark.slow  # the fast one: test_the_counter_is_where_adamw_keeps_it
@pytest.mark.parametrize("precision, zero", [("fp32", 0), ("bf16", 1)])
def test_a_run_goes_on_in_the_other_form(prepared: Path, tmp_path: Path, precision: str, zero: int) -> None:
    """Whatever form saved: masters and moments stay those of the run that never changed its form, to rounding."""
    keys = (f"train.precision={precision}", f"parallel.zero={zero}", "evaluate.sequences=0", "train.steps=4")
    whole = small_config(prepared, *keys, "optimizer.weight_decay=0.1")
    half = small_config(prepared, *keys, "optimizer.weight_decay=0.1", "train.stop_after_steps=2")
    forms = {"plain": (False, False), "to_fused": (False, True), "to_plain": (True, False)}
    runs = []
    for name, (first, second) in forms.items():
        runs += [(half, tmp_path / name, first), (whole, tmp_path / name, second)]
    run_ranks(train_in_forms, 2, runs)
    plain = state_tensors(tmp_path / "plain")
    assert any("exp_avg_sq/" in name for name in plain)
    for name in ("to_fused", "to_plain"):
        other = state_tensors(tmp_path / name)
        assert other.keys() == plain.keys()
        for key, expected in plain.items():
            assert (other[key].dtype, other[key].shape) == (expected.dtype, expected.shape)
            if expected.is_floating_point():
                # A counter that began again at 0 would move every weight: the correction of the moments is 10 then.
                torch.testing.assert_close(other[key], expected, rtol=2e-3, atol=2e-4, msg=f"{{}} of {key}".format)


@pytest.mark.parametrize("fused, place", [(True, "meta"), (False, "cpu")])
def test_the_counter_is_where_adamw_keeps_it(fused: bool, place: str) -> None:
    """On the device (here meta, as a device that is not the CPU) for the fused form, else in CPU memory."""
    parameter = torch.nn.Parameter(torch.zeros(5, device="meta"))
    optimizer = torch.optim.AdamW([parameter], fused=fused or None)
    state = _adam_state(optimizer, parameter)
    assert state["step"].device.type == place and state["step"].dtype == torch.float32
    engine: Any = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))
    set_optimizer_steps(engine, 7)
    counter = optimizer.state[parameter]["step"]
    assert (counter.device.type, counter.dtype, counter.shape) == (place, torch.float32, ())
    if not fused:
        assert optimizer_steps(engine) == 7


@pytest.mark.parametrize("keys", [(), ("parallel.offload_optimizer=true", "parallel.zero=1")])
def test_a_run_takes_the_fused_form(prepared: Path, keys: tuple[str, ...]) -> None:
    config = small_config(prepared, *keys)
    optimizer = build_optimizer(build_on_meta(config.model), config)
    assert [group["fused"] for group in optimizer.param_groups] == [True] * len(optimizer.param_groups)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_is_the_published_update(decay: float) -> None:
    """Against AdamW's equations in fp64 (Loshchilov and Hutter 2019, algorithm 2), gradients from 1e-6 to 1."""
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(1003, generator=generator)
    parameter, expected = torch.nn.Parameter(start.clone()), start.double()
    optimizer = torch.optim.AdamW([parameter], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay, fused=True)
    first, second = torch.zeros_like(expected), torch.zeros_like(expected)
    for step in range(1, 6):
        gradient = torch.randn(1003, generator=generator) * 10 ** (-6 * torch.rand(1003, generator=generator))
        parameter.grad = gradient.clone()
        optimizer.step()
        first = 0.9 * first + 0.1 * gradient.double()
        second = 0.95 * second + 0.05 * gradient.double() ** 2
        expected = (1 - 0.01 * decay) * expected
        expected -= 0.01 * (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ours_is_torchs_to_the_bit(dtype: torch.dtype) -> None:
    """Steps, state and what a load restores, hooks included."""
    torch.manual_seed(0)
    start = [torch.randn(5, 3, dtype=dtype), torch.randn(7, dtype=dtype)]
    gradients = [[torch.randn_like(tensor) for tensor in start] for _ in range(4)]
    runs = []
    for make in (torch.optim.AdamW, AdamW):
        parameters = [torch.nn.Parameter(tensor.clone()) for tensor in start]
        groups = [{"params": [parameters[0]], "weight_decay": 0.1}, {"params": [parameters[1]], "weight_decay": 0.0}]
        optimizer, steps = make(groups, lr=0.01, betas=(0.9, 0.95), fused=True), []
        optimizer.register_step_post_hook(lambda *_, steps=steps: steps.append(1))
        for number, values in enumerate(gradients):
            for parameter, gradient in zip(parameters, values, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
            optimizer.zero_grad()
            assert all(parameter.grad is None for parameter in parameters) and len(steps) == number + 1
            optimizer.load_state_dict(optimizer.state_dict())
        state = [value for parameter in parameters for value in optimizer.state[parameter].values()]
        runs.append([parameter.detach() for parameter in parameters] + state)
    for theirs, ours in zip(*runs, strict=True):
        assert torch.equal(theirs, ours)


def test_groups_of_parameters_that_differ_are_the_fewest(prepared: Path) -> None:
    """By name, those that decay most first; a tied output layer follows the embedding."""
    config = small_config(
        prepared,
        "model.tied_embedding=true",
        "optimizer.weight_decay=0.1",
        "optimizer.groups.routers.weight_decay=0",
        "optimizer.groups.embedding.learning_rate_ratio=0.5",
        "optimizer.groups.head.learning_rate_ratio=2",
    )
    names = [*dict(build_on_meta(config.model).named_parameters()), "head.weight"]
    found = grouped(names, config)
    assert list(found) == [(0.1, 1.0), (0.1, 0.5), (0.0, 2.0), (0.0, 1.0)]
    assert found[Rates(0.1, 0.5)] == ["embedding.weight", "head.weight"] and found[Rates(0.0, 2.0)] == ["head.bias"]
    assert {"blocks.0.feedforward.router", "blocks.0.attention.value_selector"} <= {*found[Rates(0.0, 1.0)]}
    assert "blocks.0.feedforward.up_experts" in found[Rates(0.1, 1.0)]
    assert len(grouped(names, small_config(prepared, "optimizer.groups.routers.weight_decay=0"))) == 1


def test_a_group_that_a_model_does_not_have_is_refused(prepared: Path) -> None:
    dense = ("model.attention.type=dense", "model.feedforward.type=dense", "model.attention.num_heads=2")
    config = small_config(prepared, *dense, "optimizer.groups.routers.weight_decay=0.1")
    with pytest.raises(
        ConfigError, match=r"^optimizer\.groups\.routers\.weight_decay: this model has no such parameters; remove"
    ):
        build_optimizer(build_on_meta(config.model), config)
    config = small_config(prepared, "model.tied_embedding=true", "optimizer.groups.head.weight_decay=0.1")
    with pytest.raises(ConfigError, match=r"^optimizer\.groups\.head\.weight_decay: nothing of it is decayed; remove"):
        build_optimizer(build_on_meta(config.model), config)
    with pytest.raises(ConfigError, match=r"optimizer\.groups\.norms\.weight_decay: unknown key"):
        small_config(prepared, "optimizer.groups.norms.weight_decay=0.1")
