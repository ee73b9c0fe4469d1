"""Steps and evaluation of a model that one rank (or one tensor-parallel group) holds whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pretrain.data.windows import Batch
from pretrain.engine.build import GradientNorm, poisoned_unless_finite
from pretrain.phases import Phases

StepLosses = tuple[Tensor, Tensor]
"""Sums over micro-steps of this rank's mean cross-entropy and of its auxiliary losses: fp32 scalars."""


class Executor(Protocol):
    """What differs between a whole model and a pipeline."""

    def train(self, batches: Sequence[Batch]) -> StepLosses:
        """All micro-steps and the optimizer step, clipped. Collective. On a stage that is not the last, the
        cross-entropy's sum is 0."""

    def evaluate(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Mean cross-entropy of each sequence, [B] fp32 per batch, without dropout and gradients; zeros on a stage that
        is not the last. Collective."""


class PlainExecutor:
    """The micro-steps one after the other."""

    def __init__(self, engine: Any, norm: GradientNorm, phases: Phases) -> None:
        self._engine, self._norm, self._phases = engine, norm, phases

    def train(self, batches: Sequence[Batch]) -> StepLosses:
        loss_sum, auxiliary_sum = torch.zeros((2,), device=batches[0].tokens.device).unbind()
        for batch in batches:
            self._phases.enter("forward")
            objective, sequence_loss, auxiliary_loss = self._engine(*batch.model_inputs())
            self._phases.enter("backward")
            self._engine.backward(poisoned_unless_finite(objective, objective, sequence_loss))
            loss_sum = loss_sum + sequence_loss.mean()
            auxiliary_sum = auxiliary_sum + auxiliary_loss
            if batch is batches[-1]:
                self._phases.enter("update")
                self._norm.before_step()
            self._engine.step()
        return loss_sum, auxiliary_sum

    def evaluate(self, batches: Sequence[Batch]) -> list[Tensor]:
        self._engine.eval()
        losses = [self._engine(*b.model_inputs())[1] for b in batches]
        self._engine.train()
        return losses
