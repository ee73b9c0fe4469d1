"""The details of a step against plain PyTorch, and the same in every layout: no element and no token counts twice."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.choices import Recorder, Replayer
from model.language_model import routing_statistics
from model.parallel.context import ParallelContext
from model.parameters import parameter_specs
from model.routing import Place
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.engine import zero_1
from pretrain.engine.compiled import compile_blocks
from pretrain.engine.details import BINS, KINDS, Details, ScoreCounter, Survey, is_softmax
from pretrain.engine.graphed import GraphedForward
from pretrain.engine.parts import GROUPS, group_of
from tests.harness import run_ranks
from tests.pretrain.engine.recorded import Pool
from tests.pretrain.export.models import model_of
from tests.pretrain.matrix import Layout, config_of
from tests.pretrain.runs import one_step, plain_trace, trainer_of

STEPS = 3
ONE = Layout(zero=0, micro=4)
TWO = [
    Layout(data=2, zero=3),
    Layout(tensor=2, sequence=True, zero=1, recompute="full", micro=4),
    Layout(pipeline=2, micro=4),
    Layout(data=2, expert=2, zero=2),
]
FOUR = [
    Layout(tensor=2, pipeline=2),
    Layout(tensor=2, sequence=True, data=2, expert=2),
    Layout(pipeline=2, data=2, zero=1),
]


ADAMW = (
    "optimizer.eps=1e-4",
    "optimizer.betas=[0.7, 0.9]",
    "optimizer.weight_decay=5.0",
    "optimizer.groups.routers.weight_decay=0.5",
    "optimizer.groups.head.learning_rate_ratio=2",
)
"""A step decays by 2%, so that what is left out of its square shows."""


def configured(prepared: Path, model: str, layout: Layout, *keys: str) -> Config:
    return config_of(prepared, model, layout, "monitor.tensorboard=true", "monitor.details_every_steps=1", *keys)


def details_of(rank: int, configs: list[Config]) -> list[list[Details]]:
    """Of every step, of every configuration."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # as in test_checkpoint.py
    found = []
    for config in configs:
        trainer = trainer_of(config)
        results = [one_step(trainer, Progress(step, step * 8)) for step in range(STEPS)]
        found.append([result.details for result in results])
        trainer.engine.destroy()
    return found if rank == 0 else []  # type: ignore[return-value]


class Probe:
    """Keeps what a router saw."""

    replaces = False

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def settle(self, own: Tensor, logits: Tensor, place: Any, *, is_repeated: bool) -> Tensor:
        self.logits.append(logits.detach().clone())
        return own


def seen(rank: int, config: Config) -> tuple[list[Details], list[dict[str, Tensor]], list[dict[str, np.ndarray]]]:
    """One process: the details, the weights before and after every step, and every logit of its routers."""
    trainer = trainer_of(config)
    probes = {name: Probe() for name, _ in routing_statistics(trainer.engine.module)}
    for name, router in routing_statistics(trainer.engine.module):
        router.choices = probes[name]
    details, weights, logits = [], [copy(trainer.engine.module)], []
    for step in range(STEPS):
        details.append(one_step(trainer, Progress(step, step * 8)).details)
        assert all(router.choices is probes[name] for name, router in routing_statistics(trainer.engine.module))
        weights.append(copy(trainer.engine.module))
        logits.append({name: np.concatenate([t.numpy().ravel() for t in p.logits]) for name, p in probes.items()})
        for probe in probes.values():
            probe.logits.clear()
    return details, weights, logits  # type: ignore[return-value]


def copy(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def grouped(config: Config, values: dict[str, Tensor]) -> tuple[dict[str, float], dict[str, float]]:
    """Euclidean norms by group, and by block and group, in fp64 and by hand."""
    specs = parameter_specs(config.model)
    by_group: dict[str, float] = {}
    by_part: dict[str, float] = {}
    for name, value in values.items():
        group, (first, second, *_) = group_of(name, specs[name]), name.split(".")
        part = f"blocks.{second}.{group}" if first == "blocks" else group
        for sums, key in ((by_group, group), (by_part, part)):
            sums[key] = sums.get(key, 0.0) + float((value.double() ** 2).sum())
    by_group, by_part = ({key: math.sqrt(x) for key, x in sums.items() if x} for sums in (by_group, by_part))
    return by_group, by_part


@pytest.mark.parametrize("model", ["switchall", pytest.param("moa", marks=pytest.mark.slow)])
def test_one_process_gives_what_plain_pytorch_gives(prepared: Path, model: str) -> None:
    config = configured(prepared, model, ONE, *ADAMW)
    [(details, weights, logits)] = run_ranks(seen, 1, config)
    gradients = plain_trace(config_of(prepared, model, Layout(micro=8), *ADAMW), STEPS, tuple(range(STEPS))).gradients
    is_softmax = {name: model == "moa" and ".attention." in name for name in details[0].scores}
    assert is_softmax.keys() == logits[0].keys()
    for step, found in enumerate(details):
        before, after = weights[step], weights[step + 1]
        update = {name: after[name].double() - before[name].double() for name in before}
        for kind, values in zip(KINDS, (gradients[step], after, update), strict=True):
            for own, expected in zip((found.norms, found.parts), grouped(config, values), strict=True):
                # The update's reference is a difference of fp32 weights.
                assert own[kind] == pytest.approx(expected, rel=2e-3 if kind == KINDS[2] else 1e-5), kind
            assert "blocks.1.routers" in found.parts[kind]
        for name, shares in found.scores.items():
            experts = 5 if is_softmax[name] else 0
            values = logits[step][name].astype(np.float64)
            if is_softmax[name]:
                rows = np.exp(values.reshape(-1, experts))
                scores = (rows / rows.sum(-1, keepdims=True)).ravel()
            else:
                scores = 1 / (1 + np.exp(-values))
            counts, _ = np.histogram(scores, BINS, (0, 1))
            # A score on the edge of two bins may be rounded into either.
            assert np.abs(shares.numpy() * counts.sum() - counts).sum() <= 2 + 1e-6, name


def pairs(found: Details, expected: Details) -> Iterator[tuple[str, float, float]]:
    for kind in KINDS:
        assert found.norms[kind].keys() == expected.norms[kind].keys()
        yield from ((f"{kind} {g}", found.norms[kind][g], n) for g, n in expected.norms[kind].items())
        assert found.parts[kind].keys() == expected.parts[kind].keys()
        yield from ((f"{kind} {part}", found.parts[kind][part], n) for part, n in expected.parts[kind].items())


def check(prepared: Path, model: str, ranks: int, layouts: list[Layout]) -> None:
    [[reference]] = run_ranks(details_of, 1, [configured(prepared, model, ONE)])
    every = run_ranks(details_of, ranks, [configured(prepared, model, layout) for layout in layouts])[0]
    for layout, found in zip(layouts, every, strict=True):
        for step, (own, expected) in enumerate(zip(found, reference, strict=True)):
            for what, ours, theirs in pairs(own, expected):
                # AdamW's first steps divide small gradients by themselves.
                rel = 1e-2 if "update" in what else 1e-4
                assert ours == pytest.approx(theirs, rel=rel), f"{layout}, step {step + 1}: {what}"
            assert own.scores.keys() == expected.scores.keys()
            for name, shares in own.scores.items():
                assert float((shares - expected.scores[name]).abs().max()) < 0.01, f"{layout}: {name}"


@pytest.mark.parametrize(
    "layouts", [pytest.param(TWO[:3], id="some"), pytest.param(TWO[3:], id="others", marks=pytest.mark.slow)]
)
def test_layouts_of_two_ranks_give_the_same(prepared: Path, layouts: list[Layout]) -> None:
    check(prepared, "switchall", 2, layouts)


@pytest.mark.slow
@pytest.mark.parametrize("model, layouts", itertools.product(["switchall", "switchall xl"], [FOUR]))
def test_layouts_of_four_ranks_give_the_same(prepared: Path, model: str, layouts: list[Layout]) -> None:
    check(prepared, model, 4, layouts)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near_fp32(prepared: Path, precision: str) -> None:
    """Its gradients lie where DeepSpeed's optimizers for it keep them, those of fp16 scaled like the loss."""
    configs = [configured(prepared, "switchall", layout) for layout in TWO[:3]]
    wide = run_ranks(details_of, 2, configs)[0]
    trees = [config.replaced("train", precision=precision) for config in configs]
    narrow = run_ranks(details_of, 2, trees)[0]
    for layout, own, expected in zip(TWO, narrow, wide, strict=False):
        for what, ours, theirs in pairs(own[0], expected[0]):
            if "update" not in what:
                # A block's norms alone are few numbers: rounding moves them by 5.3 to 5.5% in all three layouts.
                near = 0.08 if "blocks." in what else 0.05
                assert ours == pytest.approx(theirs, rel=near), f"{layout}: {what}"


def total_norms(rank: int, configs: list[Config]) -> list[list[tuple[float, float]]]:
    """Of every step of every configuration: the norm of all groups together, and that of the step."""
    found = []
    for config in configs:
        trainer, pairs = trainer_of(config), []
        for step in range(STEPS):
            result = one_step(trainer, Progress(step, step * 8))
            assert result.details is not None and result.sums.grad_norm is not None
            groups = result.details.norms["gradient norm"]
            assert groups.keys() == result.details.norms["update norm"].keys()
            pairs.append((math.hypot(*groups.values()), result.sums.grad_norm))
        found.append(pairs)
        trainer.engine.destroy()
    return found


BF16, OFFLOAD = "train.precision=bf16", "parallel.offload_optimizer=true"


@pytest.mark.parametrize(
    "model, cases",
    [
        pytest.param(
            "switchall", [(Layout(pipeline=2, tied=True, micro=4), ()), (Layout(data=2, zero=3), (OFFLOAD,))], id="some"
        ),
        pytest.param(
            "switchall xl",
            [
                (Layout(data=2, zero=1), (BF16,)),
                (Layout(data=2, zero=2), (BF16, OFFLOAD)),
                (Layout(data=2, zero=3), (BF16,)),
                (Layout(pipeline=2), (BF16,)),
                (Layout(tensor=2, zero=1, tied=True), ("train.record_routing=true",)),
            ],
            id="others",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_groups_make_up_the_norm_of_the_step(
    prepared: Path, model: str, cases: list[tuple[Layout, tuple[str, ...]]]
) -> None:
    """Wherever DeepSpeed keeps gradients; DeepSpeed's own norm is the reference."""
    keys = ("monitor.tensorboard=true", "monitor.details_every_steps=1")
    configs = [config_of(prepared, model, layout, *keys, *more) for layout, more in cases]
    for (layout, more), pairs in zip(cases, run_ranks(total_norms, 2, configs)[0], strict=True):
        for ours, theirs in pairs:
            assert ours == pytest.approx(theirs, rel=1e-5), f"{layout} {more}"


def details_otherwise(rank: int, config: Config) -> list[list[Details]]:
    """Of the micro-steps as they are, replayed from a recording, and by compiled blocks."""
    ways: list[Callable[[Any], object]] = [
        lambda module: None,
        lambda module: vars(module).update(
            forward=GraphedForward(module, Pool().make_graph, taken_at_once=zero_1.is_used(config))
        ),
        lambda module: compile_blocks(module, config.model, backend="aot_eager"),
    ]
    found = []
    for change in ways:
        trainer = trainer_of(config)
        change(trainer.engine.module)
        found.append([one_step(trainer, Progress(step, step * 8)).details for step in range(STEPS)])
        trainer.close()
    return found  # type: ignore[return-value]


@pytest.mark.slow  # the fast one: test_one_process_gives_what_plain_pytorch_gives
def test_norms_are_the_same_and_scores_left_out_where_no_python_runs(prepared: Path) -> None:
    config = configured(prepared, "switchall", ONE, "model.num_layers=1")
    [(plain, graphed, compiled)] = run_ranks(details_otherwise, 1, config)
    for expected, *others in zip(plain, graphed, compiled, strict=True):
        assert len(expected.scores) == 3
        for found in others:
            assert not found.scores
            for what, ours, theirs in pairs(found, expected):
                assert ours == pytest.approx(theirs, rel=1e-2 if "update" in what else 1e-5), what


@pytest.mark.parametrize("every, due", [(0, []), (1, [1, 2, 3, 4, 5, 6]), (3, [1, 3, 6]), (9, [1])])
def test_the_first_step_is_due_and_every_so_many(prepared: Path, every: int, due: list[int]) -> None:
    config = configured(prepared, "dense", ONE, f"monitor.details_every_steps={every}")
    survey = Survey(None, config, ParallelContext(), torch.device("cpu"), [])
    assert [step for step in range(1, 7) if survey.is_due(step)] == due


class Operators(TorchDispatchMode):
    """The names of those that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.add(func._opname)
        return func(*args, **(kwargs or {}))


def test_scores_are_counted_with_deterministic_algorithms_too() -> None:
    """torch's documentation lists what those refuse on a GPU. A score that is no number counts nowhere."""
    documented = str(torch.use_deterministic_algorithms.__doc__).partition("will throw a\n")[2]
    refused = set(re.findall(r":func:`torch\.(\w+)` (?:with indices output )?when called on a CUDA", documented))
    assert {"histc", "median", "cumsum"} <= refused
    logits = torch.randn(3, 7, 2, 5, generator=torch.Generator().manual_seed(0)) * 4
    logits[0, 0, 0, :4] = torch.tensor([math.nan, math.inf, -math.inf, 0.0])  # no number, 1, 0, and an edge
    own, counts = logits.argsort(-1)[..., :2], torch.zeros(BINS, dtype=torch.float64)
    place = Place(torch.arange(3), slice(0, 2), 0)
    with Operators() as operators:
        assert ScoreCounter(None, counts, softmax=False).settle(own, logits, place, is_repeated=False) is own
        ScoreCounter(None, counts, softmax=False).settle(own, logits, place, is_repeated=True)  # was counted
    assert not operators.called & refused
    scores = logits.sigmoid().numpy()
    expected, _ = np.histogram(scores[~np.isnan(scores)], BINS, (0, 1))
    assert counts.tolist() == expected.tolist() and counts.sum() == logits.numel() - 1


def test_choices_that_are_replaced_stay_so_while_scores_are_counted() -> None:
    network, tokens = model_of("switchall").train(), torch.arange(14).view(2, 7)
    routers = [router for _, router in routing_statistics(network)]

    def loss() -> float:
        return network(tokens, tokens + 1, torch.arange(2))[0].item()

    recorders, replayers, counts = [Recorder() for _ in routers], [Replayer() for _ in routers], torch.zeros(BINS)
    for router, recorder in zip(routers, recorders, strict=True):
        router.choices = recorder
    own = loss()
    for router, recorder, replayer in zip(routers, recorders, replayers, strict=True):
        replayer.recorded = (recorder.pieces[0].index + 1) % router.shape[-1]
        router.choices = replayer
    others = loss()
    for router, replayer in zip(routers, replayers, strict=True):
        router.choices = ScoreCounter(replayer, counts, softmax=False)
    assert loss() == others != own


@pytest.mark.parametrize("model, attention", [("moa", True), ("moa xl, sigmoid", False), ("switchall", False)])
def test_the_scores_of_a_router_are_those_of_its_gates(model: str, attention: bool) -> None:
    network = model_of(model)
    found = {name: is_softmax(network.config, name) for name, _ in routing_statistics(network)}
    assert found and all(value == (attention and ".attention." in name) for name, value in found.items())


def test_every_parameter_has_a_group(prepared: Path) -> None:
    for model in ("switchall", "moa", "dense", "switchall xl"):
        config = config_of(prepared, model, ONE)
        groups = {name: group_of(name, spec) for name, spec in parameter_specs(config.model).items()}
        assert set(groups.values()) <= set(GROUPS)
        assert groups["blocks.0.attention.key.weight"] == "attention"
        assert groups["final_norm.weight"] == groups["blocks.0.feedforward_norm.bias"] == "norms"
        assert groups["head.weight"] == "head" and groups["embedding.weight"] == "embedding"
        assert ("experts" in groups.values()) == (model != "dense") == ("routers" in groups.values())
