"""sigma-MoE feed-forward (arXiv 2310.10837, section 5): sigmoid-routed two-layer experts without biases."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig, SigmaMoEConfig
from model.dropout import keep_mask, site_key
from model.parallel.context import ParallelContext
from model.routing import RoutingStatistics, entropy_regularizer, router_logits, select


class SigmaMoE(nn.Module):
    """y = sum over the k chosen experts e of s_e ReLU(x W_1[e]) W_2[e], s = sigmoid(x W_S). Dropless."""

    def __init__(self, config: ModelConfig, *, parallel: ParallelContext, name: str, seed: int) -> None:
        super().__init__()
        assert isinstance(config.feedforward, SigmaMoEConfig)
        self.config = config.feedforward
        self.parallel = parallel
        d, E, G = config.d_model, self.config.num_experts, self.config.expert_size
        self.router = nn.Parameter(torch.empty(E, d))
        self.up_experts = nn.Parameter(torch.empty(E, d, G))
        self.down_experts = nn.Parameter(torch.empty(E, G, d))
        self.statistics = RoutingStatistics((E,), tracks_probability=self.config.entropy_weight > 0.0)
        self._dropout_key = site_key(seed, f"{name}.experts")

    def forward(self, x: Tensor, sequence_index: Tensor) -> tuple[Tensor, Tensor]:
        """`x` [B, T, d] -> output [B, T, d] and the weighted entropy regulariser (fp32 scalar, part of the loss)."""
        B, T, d = x.shape
        logits = router_logits(x, self.router)  # [B, T, E]
        keep = None
        if self.training and self.config.expert_dropout > 0.0:
            keep = keep_mask(
                probability=self.config.expert_dropout,
                key=self._dropout_key,
                sequence_index=sequence_index,
                shape=tuple(logits.shape),
            )
        scores, index = select(logits, self.config.active_experts, keep=keep, drop_scores=True)

        # The regulariser sees the clean logits: expert dropout must not teach the router to look balanced.
        flat_logits = logits.view(B * T, -1)
        auxiliary_loss = logits.new_zeros(())
        if self.training:
            if self.config.entropy_weight > 0.0:
                auxiliary_loss = entropy_regularizer(flat_logits, self.config, self.statistics, self.parallel)
            self.statistics.record(index, flat_logits)

        y = self._experts(x.view(B * T, d), scores.view(B * T, -1).to(x.dtype), index.view(B * T, -1))
        return y.view(B, T, d), auxiliary_loss

    def _experts(self, x: Tensor, scores: Tensor, index: Tensor) -> Tensor:
        """`x` [N, d], `scores` and `index` [N, k] -> [N, d]: every expert computes just the tokens that chose it."""
        k = index.shape[1]
        order = index.flatten().sort(stable=True).indices  # slots, grouped by expert, in token order
        counts = torch.bincount(index.flatten(), minlength=self.config.num_experts)
        gathered, gates = x[order // k], scores.flatten()[order, None]
        # The gate is applied to the hidden layer, which is narrower than the output: the same product, fewer bytes.
        rows = [
            (F.relu(expert_rows @ self.up_experts[e]) * expert_gates) @ self.down_experts[e]
            for e, (expert_rows, expert_gates) in enumerate(
                zip(gathered.split(counts.tolist()), gates.split(counts.tolist()), strict=True)
            )
        ]
        slots = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        return torch.cat(rows)[slots].view(x.shape[0], k, -1).sum(1)
