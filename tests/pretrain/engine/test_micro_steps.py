"""A model that trains is evaluated without dropout, and goes on training as before; micro-steps around stand-ins."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from model.language_model import build_model, routing_statistics
from pretrain.data.windows import Batch
from pretrain.engine import pipeline
from pretrain.engine.micro_steps import PlainExecutor, Queries
from pretrain.engine.pipeline import PipelineExecutor, PipelineStage, _AttachLoss
from tests.corpus import VOCAB_SIZE
from tests.pretrain.matrix import dropouts
from tests.pretrain.runs import light_config


class Engine:
    """What executors know of DeepSpeed's engine, around a model; writes down what it is told."""

    def __init__(self, module: nn.Module, told: list[str] | None = None) -> None:
        self.module, self.told = module, [] if told is None else told
        self.eval, self.train = module.eval, module.train

    def __call__(self, *inputs: Any) -> Any:
        self.told.append("forward")
        return self.module.forward(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        self.told.append("backward")
        loss.backward()

    def step(self) -> None:
        self.told.append("step")


def test_a_model_in_training_is_evaluated_without_dropout(prepared: Path) -> None:
    """Losses and log-likelihoods are those of the model's logits in evaluation mode, and nothing is counted."""
    config = light_config(prepared, *dropouts("switchall"))
    network = build_model(config.model, seed=5).train()
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(VOCAB_SIZE, (2, 3, 17), generator=generator)
    batches = [Batch(part[:, :-1], part[:, 1:], torch.arange(3)) for part in text]
    places = torch.tensor([0, 7, 16, 40])
    queries = [Queries(batch.tokens, batch.targets.flatten()[places], places) for batch in batches]
    executor = PlainExecutor(Engine(network), None)  # type: ignore[arg-type]
    with torch.no_grad():
        network.eval()
        logits = [network.logits(batch.tokens)[0].double() for batch in batches]
        network.train()
        losses = executor.evaluate(batches)
        assert all(module.training for module in network.modules())
        answers = executor.log_likelihoods(queries)
    assert all(module.training for module in network.modules())
    assert all(not statistics.load.any() for _, statistics in routing_statistics(network))
    for batch, expected, loss, (values, hits) in zip(batches, logits, losses, answers, strict=True):
        log_p = expected.log_softmax(-1)
        of_targets = log_p.gather(-1, batch.targets[..., None])[..., 0]
        torch.testing.assert_close(loss.double(), -of_targets.mean(1), rtol=1e-5, atol=0)
        torch.testing.assert_close(values.double(), of_targets.flatten()[places], rtol=1e-5, atol=0)
        assert torch.equal(hits, log_p.argmax(-1).flatten()[places] == batch.targets.flatten()[places])


class Network(nn.Module):
    """Whose answer says in which mode it is asked, or that cannot answer."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error

    def forward(self, *inputs: Any) -> str:
        return "a loss"

    def log_likelihood(self, *inputs: Any) -> bool:
        if self.error is not None:
            raise self.error
        return self.training

    def log_likelihoods(self, batches: list[Any]) -> list[bool]:
        return [self.log_likelihood() for _ in batches]


def in_one_piece(network: Network) -> PlainExecutor:
    return PlainExecutor(Engine(network), None)  # type: ignore[arg-type]


def in_stages(network: Network) -> PipelineExecutor:
    return PipelineExecutor(SimpleNamespace(module=network, _take_model_step=print, timers=None))


@pytest.mark.parametrize("make", [in_one_piece, in_stages])
@pytest.mark.parametrize("error", [None, ValueError("no answer")])
def test_a_question_leaves_the_model_as_it_was(make: Callable[[Network], Any], error: Exception | None) -> None:
    """In training, and with its own forward pass, also where the question failed."""
    text = torch.zeros(1, 2, dtype=torch.int64)
    for own in (None, lambda *inputs: "a loss of a recording"):
        network = Network(error)
        if own is not None:
            network.forward = own
        executor = make(network)
        if error is None:
            assert executor.log_likelihoods([Queries(text, text[0], text[0])] * 2) == [False, False]
        else:
            with pytest.raises(ValueError, match="no answer"):
                executor.log_likelihoods([Queries(text, text[0], text[0])])
        assert network.training
        assert network(text) == ("a loss" if own is None else "a loss of a recording")


@pytest.mark.parametrize("is_last", [True, False])
def test_an_evaluation_in_stages_leaves_the_model_in_training(is_last: bool) -> None:
    """DeepSpeed's eval_batch leaves it in evaluation. A stage that is not the last knows no losses."""
    network = Network()
    network.parallel = SimpleNamespace(is_last_stage=is_last)  # type: ignore[assignment]
    executor = in_stages(network)

    def eval_batch(inputs: Any, **options: Any) -> None:
        network.eval()
        if is_last:
            executor._stage.sequence_losses = [torch.full((3,), 2.5) for _ in inputs]

    executor._engine.eval_batch = eval_batch
    text = torch.zeros(3, 2, dtype=torch.int64)
    for _ in range(2):
        losses = executor.evaluate([Batch(text, text, torch.arange(3))] * 2)
        assert [loss.tolist() for loss in losses] == [[2.5 if is_last else 0.0] * 3] * 2
        assert network.training


@pytest.mark.parametrize("shards", [1, 2])
def test_a_stage_gets_the_tokens_of_its_rank_from_the_stage_before(
    monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    """Under sequence parallelism each rank has its part of a sequence between the blocks."""
    received: list[tuple[tuple[int, ...], int]] = []
    sent = SimpleNamespace(
        get_global_rank=lambda group, rank: 10 + rank,
        recv=lambda hidden, source, group: received.append((tuple(hidden.shape), source)),
    )
    monkeypatch.setattr(pipeline, "dist", sent)
    stage: Any = SimpleNamespace(
        parallel=SimpleNamespace(pipeline_group="group", pipeline_rank=1, token_shards=shards, is_last_stage=True),
        parameters=lambda: iter([torch.zeros(2)]),
        config=SimpleNamespace(d_model=5),
        forward_funcs=[lambda state: state],
    )
    tokens = torch.zeros(3, 8, dtype=torch.int64)
    state = PipelineStage.through_stages(stage, tokens, torch.arange(3), lambda head, state: state)
    assert received == [((3, 8 // shards, 5), 10)]
    assert state is not None and state[0].shape == (3, 8 // shards, 5)


def test_gradients_of_all_micro_steps_are_there_when_the_norm_is_taken_and_before_the_update() -> None:
    """And the loss is the mean over sequences of each micro-step, added up, without the auxiliary loss."""
    told: list[str] = []
    weight = nn.Linear(1, 1)

    class Losses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, tokens: torch.Tensor, *others: torch.Tensor) -> Any:
            own = tokens.float().mean(1)
            return self.weight(own[:, None]).mean(), own, torch.tensor(0.25)

    norm: Any = SimpleNamespace(before_step=lambda: told.append("norm"), value=lambda device: torch.tensor(7.0))
    executor = PlainExecutor(Engine(Losses(), told), norm)
    executor.before_update = lambda: told.append("before")
    batches = [Batch(torch.full((2, 3), value), torch.zeros(2, 3), torch.arange(2)) for value in (1, 4, 8)]
    phases: Any = SimpleNamespace(enter=lambda *names, quick: None)
    output = executor.train(batches, phases)
    one = ["forward", "backward", "step"]
    assert told == [*one, *one, "forward", "backward", "before", "norm", "step"]
    assert (float(output.loss_sum), float(output.auxiliary_sum), float(output.grad_norm)) == (13.0, 0.75, 7.0)
    assert weight.weight.grad is not None and float(weight.weight.grad) == 13.0


@pytest.mark.parametrize("fp16, scale", [(False, 0.25), (True, 16.0)])
def test_an_auxiliary_loss_has_the_gradient_of_the_objective_scaled_like_it(fp16: bool, scale: float) -> None:
    """4 micro-steps, and a loss scale of 64 that fp16 alone uses. A loss that is not finite spoils its gradient, so
    that the norm shows it."""
    network = Network()
    engine = SimpleNamespace(module=network, _take_model_step=print, timers=None)
    engine.optimizer, engine.fp16_enabled = SimpleNamespace(loss_scale=64.0), lambda: fp16
    engine.gradient_accumulation_steps = lambda: 4
    PipelineExecutor(engine)
    for wrong in (0.0, math.inf, math.nan):
        hidden, weight = (torch.tensor([1.0, 2.0], requires_grad=True) for _ in range(2))
        sent = _AttachLoss.apply(hidden, 3.0 * weight.sum() + wrong, network.gradient_scale)
        sent.backward(torch.tensor([5.0, 7.0]))
        assert sent.tolist() == [1.0, 2.0]
        assert hidden.grad is not None and hidden.grad.tolist() == [5.0, 7.0]
        assert weight.grad is not None
        assert weight.grad.isnan().all() if wrong else weight.grad.tolist() == [3.0 * scale] * 2


def test_a_stage_gives_the_sums_of_its_own_micro_steps() -> None:
    """Each time from zero, with the targets in their order; what waits for all gradients runs before the update."""
    stage: Any = Network()
    told: list[str] = []
    for name in ("sequence_losses", "auxiliary_losses"):
        setattr(stage, name, [torch.tensor([100.0])])  # of a step before

    def train_batch(inputs: Any) -> None:
        for (tokens, index), nothing in inputs:
            assert nothing is None and index.tolist() == [0, 1]
            stage.sequence_losses.append(tokens.float().mean(1) + next(stage.targets).float().mean(1))
            stage.auxiliary_losses.append(torch.tensor(0.25))
        engine._take_model_step("the rate")

    engine: Any = SimpleNamespace(module=stage, timers=None, train_batch=train_batch)
    engine._take_model_step = told.append
    engine.optimizer, engine.get_global_grad_norm = SimpleNamespace(overflow=False), lambda: 7.0
    executor = PipelineExecutor(engine)
    executor.before_update = lambda: told.append("before")
    batches = [Batch(torch.full((2, 3), n), torch.full((2, 3), 10 * n), torch.arange(2)) for n in (1, 4)]
    phases: Any = SimpleNamespace(enter=lambda *names, quick: None)
    for _ in range(2):
        output = executor.train(batches, phases)
        assert (float(output.loss_sum), float(output.auxiliary_sum), float(output.grad_norm)) == (55.0, 0.5, 7.0)
    assert told == ["before", "the rate"] * 2


@pytest.mark.parametrize("stage, shards", [(0, 1), (1, 1), (1, 3), (2, 3)])
def test_a_batch_goes_through_three_stages(stage: int, shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between stages goes the hidden state of the tokens that this rank has of them, under sequence parallelism a part;
    ranks of a group have other numbers among all."""
    sent: list[tuple[torch.Tensor, int, Any]] = []
    taken: list[tuple[list[int], int, Any]] = []

    def recv(hidden: torch.Tensor, source: int, group: Any) -> None:
        taken.append((list(hidden.shape), source, group))
        hidden.fill_(3.0)

    monkeypatch.setattr(dist, "recv", recv)
    monkeypatch.setattr(dist, "send", lambda hidden, target, group: sent.append((hidden, target, group)))
    monkeypatch.setattr(dist, "get_global_rank", lambda group, rank: 10 + rank)
    place = SimpleNamespace(pipeline_rank=stage, pipeline_group="stages", token_shards=shards, is_last_stage=stage == 2)
    own: Any = SimpleNamespace(parallel=place, config=SimpleNamespace(d_model=5))
    own.parameters = lambda: iter([torch.zeros(1, dtype=torch.bfloat16)])
    own.forward_funcs = [lambda state: (2.0 * state[0], *state[1:])] * 2
    tokens, index = torch.ones(2, 6, dtype=torch.int64), torch.tensor([4, 5])
    found = PipelineStage.through_stages(own, tokens, index, lambda head, state: state)
    assert taken == ([] if stage == 0 else [([2, 6 // shards, 5], 10 + stage - 1, "stages")])
    if stage < 2:
        ((hidden, target, group),) = sent
        assert found is None and (target, group) == (10 + stage + 1, "stages") and hidden.is_contiguous()
    else:
        assert found is not None and not sent and torch.equal(found[1], index) and float(found[2]) == 0.0
        hidden = found[0]
    assert hidden.unique().tolist() == [4.0 if stage == 0 else 12.0]
    assert stage == 0 or hidden.dtype == torch.bfloat16
