"""The entropy regulariser and the load statistics of routers; the selection itself is model/kernels/route.py.

Tensor shapes: N tokens, H heads, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.nn.functional import all_reduce as differentiable_all_reduce

from model.config import SigmaMoEConfig
from model.parallel.context import ParallelContext


class RoutingStatistics:
    """Counts of one router, fp64 (exact beyond 2^24 tokens) on the router's device; not module buffers, so that a cast
    of the module to bf16 cannot touch them.

    `load` [E] or [H, E]: how often each expert was chosen since the last step. `probability_sum` [E] and `num_tokens`
    []: sum over tokens of softmax(logits), only where the entropy regulariser needs it. `probability` [E]: the mean
    routing distribution of the previous global batch, part of the training state (checkpointed).
    """

    def __init__(self, shape: tuple[int, ...], *, tracks_probability: bool) -> None:
        self.shape = shape
        self.tracks_probability = tracks_probability
        self.load = torch.zeros(shape, dtype=torch.float64, device="cpu")
        self.num_tokens = torch.zeros((), dtype=torch.float64, device="cpu")
        self.probability_sum = torch.zeros(shape if tracks_probability else (0,), dtype=torch.float64, device="cpu")
        self.probability = torch.full_like(self.probability_sum, 1.0 / shape[-1])

    def to(self, device: torch.device) -> None:
        """Moves all tensors to `device` (the engine moves only parameters and buffers)."""
        for name in ("load", "num_tokens", "probability_sum", "probability"):
            setattr(self, name, getattr(self, name).to(device))

    @torch.no_grad()
    def record(self, load: Tensor, logits: Tensor | None) -> None:
        """Adds one forward pass: `load` of shape `shape`, and the clean logits [N, E] where p is tracked."""
        self.load += load
        if self.tracks_probability:
            assert logits is not None
            self.probability_sum += logits.softmax(-1).sum(0, dtype=torch.float64)
            self.num_tokens += logits.shape[0]

    def accumulators(self) -> list[Tensor]:
        """The tensors to be summed over data-parallel ranks at the end of a step, in a fixed order."""
        return [self.load, self.probability_sum, self.num_tokens]

    @torch.no_grad()
    def finish_step(self, *, keep: bool = True) -> None:
        """Called after the sum over ranks: keeps the step's distribution (not a skipped one's), clears counts."""
        if (
            self.tracks_probability and keep
        ):  # without a host sync: a step that recorded nothing keeps the old distribution
            updated = self.probability_sum / self.num_tokens.clamp_min(1.0)
            self.probability = torch.where(self.num_tokens > 0, updated, self.probability)
        for tensor in self.accumulators():
            tensor.zero_()


def entropy_regularizer(
    logits: Tensor, config: SigmaMoEConfig, statistics: RoutingStatistics, parallel: ParallelContext
) -> Tensor:
    """gamma * sum_e p_e log p_e, to be added to the loss (sigma-MoE eq. 21): minimal for a uniform p. Scalar, fp32.

    `logits` [N, E] before expert dropout. Scope `micro_batch`: p is the mean of softmax(logits) over the N tokens of
    every data-parallel rank, reduced by a collective that autograd knows. Scope `global_batch`: the coefficient
    log p, p of the previous step, multiplies this micro-step's mean: the gradient of the true term linearised
    at that p, and no communication. Data-parallel gradients are averages over ranks, so is this term.
    """
    distribution = logits.softmax(-1).mean(0)
    if config.entropy_scope == "global_batch":
        # The 1 of (1 + log p) is left out: sum_e p_e = 1 has no gradient, and without it the value is the entropy's.
        coefficient = statistics.probability.float().clamp_min(1e-30).log()
        return config.entropy_weight * (coefficient * distribution).sum()
    if parallel.data_size > 1:
        distribution = differentiable_all_reduce(distribution, group=parallel.data_group) / parallel.data_size
    return config.entropy_weight * torch.xlogy(distribution, distribution).sum()


def negative_entropy(probability: Tensor) -> Tensor:
    """sum_e p_e log p_e over the last axis, 0 log 0 = 0: what the regulariser measures. From -log E to 0."""
    return torch.xlogy(probability, probability).sum(-1)
