"""A model that trains is evaluated without dropout, and goes on training as before; micro-steps around stand-ins."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from model.language_model import build_model, routing_statistics
from pretrain.data.windows import Batch
from pretrain.engine.micro_steps import PlainExecutor, Queries
from pretrain.engine.pipeline import PipelineExecutor, _AttachLoss
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
            network.forward = own  # type: ignore[method-assign]
        executor = make(network)
        if error is None:
            assert executor.log_likelihoods([Queries(text, text[0], text[0])] * 2) == [False, False]
        else:
            with pytest.raises(ValueError, match="no answer"):
                executor.log_likelihoods([Queries(text, text[0], text[0])])
        assert network.training
        assert network(text) == ("a loss" if own is None else "a loss of a recording")


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
