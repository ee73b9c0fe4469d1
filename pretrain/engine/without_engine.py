"""Evaluates the model of this rank as it is, without DeepSpeed's engine: one that was loaded and is not trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.data.windows import Batch
from pretrain.engine.micro_steps import Queries


class ModelEvaluator:
    """Of a LanguageModel, or of this rank's PipelineStage, in evaluation mode; see `Evaluator` for the interface."""

    def __init__(self, module: nn.Module, *, in_stages: bool) -> None:
        self._module: Any = module
        self._in_stages = in_stages

    @property
    def module(self) -> nn.Module:
        return self._module

    def evaluate(self, batches: Sequence[Batch]) -> list[Tensor]:
        if not self._in_stages:
            return [self._module(*batch.model_inputs())[1] for batch in batches]
        losses = []
        for batch in batches:
            found = self._module.through_stages(
                batch.tokens,
                batch.sequence_index,
                lambda head, state, targets=batch.targets: head(state, targets),
            )
            losses.append(torch.zeros(len(batch.tokens), device=batch.tokens.device) if found is None else found[1])
        return losses

    def log_likelihoods(self, batches: Sequence[Queries]) -> list[tuple[Tensor, Tensor]]:
        if self._in_stages:
            return self._module.log_likelihoods(batches)
        return [self._module.log_likelihood(b.tokens, b.targets, b.places, b.documents) for b in batches]
