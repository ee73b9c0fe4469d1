"""sigma-MoE feed-forward (arXiv 2310.10837, section 5): sigmoid-routed two-layer experts without biases."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import ModelConfig, SigmaMoEConfig
from model.dropout import keep_mask, site_key
from model.kernels.choice import Backends
from model.kernels.route import route
from model.kernels.sigma_moe import sigma_moe
from model.parallel.collectives import enter_shards
from model.parallel.context import ParallelContext
from model.parallel.regions import enter_region_twice, leave_region
from model.routing import RoutingStatistics, entropy_regularizer


class SigmaMoE(nn.Module):
    """y = sum over the k chosen experts e of s_e ReLU(x W_1[e]) W_2[e], s = sigmoid(x W_S). Dropless."""

    def __init__(
        self, config: ModelConfig, *, parallel: ParallelContext, backends: Backends, name: str, seed: int
    ) -> None:
        super().__init__()
        assert isinstance(config.feedforward, SigmaMoEConfig)
        self.config = config.feedforward
        self.parallel = parallel
        self.backends = backends
        d, E, G = config.d_model, self.config.num_experts, self.config.expert_size
        self.router = nn.Parameter(torch.empty(E, d))
        self.up_experts = nn.Parameter(torch.empty(parallel.share(E), d, G))
        self.down_experts = nn.Parameter(torch.empty(parallel.share(E), G, d))
        self.statistics = RoutingStatistics((E,), tracks_probability=self.config.entropy_weight > 0.0)
        self._dropout_key = site_key(seed, f"{name}.experts")

    def forward(self, x: Tensor, sequence_index: Tensor) -> tuple[Tensor, Tensor]:
        """`x` [B, T, d], with sequence parallelism this rank's tokens -> output of the same shape and the weighted
        entropy regulariser (fp32 scalar, part of the loss)."""
        divided, x = enter_region_twice(x, self.parallel)
        B, T, d = x.shape
        tokens, keep = x.reshape(B * T, d), None
        if self.training and self.config.expert_dropout > 0.0:
            keep = keep_mask(
                probability=self.config.expert_dropout,
                key=self._dropout_key,
                sequence_index=sequence_index,
                shape=(B, T, self.config.num_experts),
            ).view(B * T, 1, -1)
        logits, scores, index, load, order = (
            t.squeeze(dim)
            for t, dim in zip(
                route(
                    tokens,
                    self.router[None],
                    self.config.active_experts,
                    keep=keep,
                    drop_scores=True,
                    backend=self.backends.route,
                ),
                (1, 1, 1, 0, 0),  # the axis of the single router
                strict=True,
            )
        )
        # The regulariser sees the clean logits: expert dropout must not teach the router to look balanced.
        auxiliary_loss = logits.new_zeros(())
        if self.training:
            if self.config.entropy_weight > 0.0:
                auxiliary_loss = entropy_regularizer(logits, self.config, self.statistics, self.parallel)
            self.statistics.record(load, logits)
        group = self.parallel.tensor_group
        if group is not None:
            # Every rank routes all tokens, alike, and computes the slots of its own experts. The gates' gradients are
            # summed where they enter; the regulariser's, the same on every rank, reaches the logits directly, once.
            held = self.parallel.slice_of(self.config.num_experts)
            first, last = int(load[: held.start].sum()), int(load[: held.stop].sum())
            order, load, index = order[first:last], load[held], index - held.start
        y = sigma_moe(
            divided.reshape(B * T, d),
            enter_shards(scores, group),
            index,
            order,
            load,
            self.up_experts,
            self.down_experts,
            backend=self.backends.sigma_moe,
        )
        return leave_region(y.view(B, T, d), self.parallel), auxiliary_loss
