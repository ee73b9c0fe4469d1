"""How the micro-steps of one optimizer step are executed, by a model in one piece or (pipeline.py) in stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pretrain.data.windows import Batch
from pretrain.engine.gradient_norm import GradientNorm, poisoned_unless_finite
from pretrain.phases import Phases


class StepOutput(NamedTuple):
    """What the micro-steps of one optimizer step give on this rank."""

    loss_sum: Tensor
    """Mean cross-entropy of each micro-step's sequences, summed over micro-steps: fp32 scalar. 0 on a pipeline stage
    that is not the last."""
    auxiliary_sum: Tensor
    """Auxiliary losses of this rank's layers, summed over micro-steps: fp32 scalar."""
    grad_norm: Tensor
    """Global gradient norm before clipping, the same on every rank: scalar on the device of the sums; not finite if the
    update was skipped, because norm or loss is not finite."""


@dataclass(frozen=True)
class Queries:
    """Texts whose chosen tokens' log-likelihoods are asked for, on their device."""

    tokens: Tensor
    """[B, T] int64 inputs."""
    targets: Tensor
    """[n] int64: the tokens that are asked about."""
    places: Tensor
    """[n] int64: for each of them the input before it, in the flattened [B T]."""
    documents: Tensor | None = None
    """With data.document_mask, [B, T] int64: which document of its text each input belongs to, from 0."""


class Evaluator(Protocol):
    """What evaluates a model, with or without an engine around it."""

    @property
    def module(self) -> nn.Module:
        """What this rank holds of the model."""

    def evaluate(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Mean cross-entropy of each sequence, [B] fp32 per batch, without dropout and gradients; zeros on a stage that
        is not the last. Collective."""

    def log_likelihoods(self, batches: Sequence[Queries]) -> list[tuple[Tensor, Tensor]]:
        """Per batch log p of each target [n] fp32 in nats, and whether it is the likeliest token [n] bool; zeros on a
        stage that is not the last. Collective. Memories are neither read nor written: see `without_memory`."""


class Executor(Evaluator, Protocol):
    """What differs between a model in one piece and a pipeline."""

    before_update: Callable[[], None] | None
    """Called once a step, when all gradients are there and none is clipped or used yet."""

    def train(self, batches: Sequence[Batch], phases: Phases) -> StepOutput:
        """All micro-steps, clipping and the optimizer step. Collective."""


class PlainExecutor:
    """One micro-step after the other, by a model that this rank (or its tensor-parallel group) holds in one piece."""

    def __init__(self, engine: Any, norm: GradientNorm) -> None:
        self._engine, self._norm = engine, norm
        self.before_update: Callable[[], None] | None = None

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    def train(self, batches: Sequence[Batch], phases: Phases) -> StepOutput:
        loss_sum, auxiliary_sum = torch.zeros((2,), device=batches[0].tokens.device).unbind()
        for batch in batches:
            phases.enter("forward", quick=True)
            objective, sequence_loss, auxiliary_loss = self._engine(*batch.model_inputs())
            phases.enter("backward", quick=True)
            self._engine.backward(poisoned_unless_finite(objective, sequence_loss))
            loss_sum = loss_sum + sequence_loss.mean()
            auxiliary_sum = auxiliary_sum + auxiliary_loss
            if batch is batches[-1]:
                phases.enter("update", quick=True)
                if self.before_update is not None:
                    self.before_update()
                self._norm.before_step()
            self._engine.step()
        return StepOutput(loss_sum, auxiliary_sum, self._norm.value(loss_sum.device))

    def evaluate(self, batches: Sequence[Batch]) -> list[Tensor]:
        self._engine.eval()
        losses = [self._engine(*b.model_inputs())[1] for b in batches]
        self._engine.train()
        return losses

    def log_likelihoods(self, batches: Sequence[Queries]) -> list[tuple[Tensor, Tensor]]:
        # Through the engine: under ZeRO 3 it gathers the weights. What it calls is `module.forward`.
        module, own = self._engine.module, vars(self._engine.module).get("forward")
        module.forward = module.log_likelihood
        self._engine.eval()
        try:
            return [self._engine(b.tokens, b.targets, b.places, b.documents) for b in batches]
        finally:
            self._engine.train()
            del module.forward
            if own is not None:
                module.forward = own
