"""Selection of experts: sigmoid scores, top-k, expert dropout, the entropy regulariser and load statistics.

Tensor shapes: N tokens, E experts, k chosen experts; leading axes (heads) are allowed everywhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_reduce as differentiable_all_reduce

from model.config import SigmaMoEConfig
from model.parallel.context import ParallelContext


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """fp32 logits [..., E] of `x` [..., d] against the rows of `weight` [E, d], whatever dtype both are stored in."""
    return F.linear(x.float(), weight.float())


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices [..., k] (int64) of the k largest scores, best first; ties go to the lowest index in every backend."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def select(logits: Tensor, k: int, *, keep: Tensor | None = None, drop_scores: bool = False) -> tuple[Tensor, Tensor]:
    """Chooses k experts by sigmoid score (SwitchHead section 2.2; sigma-MoE eq. 11).

    `logits` [..., E] fp32. `keep` [..., E] bool marks the experts that expert dropout leaves. With `drop_scores`
    (sigma-MoE) a dropped expert scores 0 for choosing and for weighting; without (SwitchHead) it is only never
    preferred in choosing and the weight is the true score. Returns the chosen scores [..., k] (fp32, differentiable)
    and their indices [..., k]. No softmax over experts and no renormalisation.
    """
    scores = torch.sigmoid(logits)
    if keep is not None and drop_scores:
        scores = scores * keep
    choosing = scores if keep is None or drop_scores else logits.masked_fill(~keep, float("-inf"))
    index = top_k(choosing.detach(), k)
    return scores.gather(-1, index), index


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
    def record(self, index: Tensor, logits: Tensor | None) -> None:
        """Adds one forward pass: chosen `index` [..., heads, k] or [N, k], and [N, E] logits where they are tracked."""
        num_experts = self.shape[-1]
        if len(self.shape) == 1:
            self.load += torch.bincount(index.flatten(), minlength=num_experts)
        else:  # one router per head: number the experts of all heads consecutively
            offset = torch.arange(self.shape[0], device=index.device)[:, None] * num_experts
            flat = (index + offset).flatten()
            self.load += torch.bincount(flat, minlength=self.load.numel()).view(self.shape)
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
