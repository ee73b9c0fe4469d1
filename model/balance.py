"""The load-balancing losses of MoA's softmax router (arXiv 2210.05144, section 3), as its authors' code has them.

The SwitchHead authors' copy of that code scatters the gates of a [B, T, E] tensor along T, so its choices and gates are
not counted per expert; here they are.

Tensor shapes: N tokens of a micro-step on this rank, E experts, k choices. P [E] is the mean over tokens of the
probabilities, f [E] the share of choices (no gradient), m [E] the mean over tokens of the chosen gates (0 elsewhere).
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import MoAConfig
from model.parallel.collectives import sum_for_each
from model.parallel.context import ParallelContext
from model.routing import RoutingStatistics, chosen_gates

CV_EPSILON = 1e-10


def balance_losses(
    logits: Tensor,
    probability: Tensor,
    gates: Tensor,
    index: Tensor,
    load: Tensor,
    config: MoAConfig,
    statistics: RoutingStatistics,
    parallel: ParallelContext,
) -> Tensor:
    """Weighted sum of three losses, to be added to the training loss. Scalar, fp32.

        z       mean over tokens of logsumexp(logits)^2
        switch  E sum_e f_e P_e                                 1 where choices or probabilities are even
        cv      var(g) / (mean(g)^2 + 1e-10), g = m / sum(m)    squared coefficient of variation, unbiased variance

    `logits`, `probability` [N, E] before expert dropout, `gates`, `index` [N, k], `load` [E]: choices per expert.
    Scope `micro_batch`: f, P and m over the tokens of every data-parallel rank, reduced by a collective that autograd
    knows. Scope `global_batch`: f of the previous step, and the tangent of the cv loss at m of the previous step: both
    linear in this micro-step's means, no communication. Data-parallel gradients are averages over ranks, so are these.
    """
    loss = logits.new_zeros((), dtype=torch.float32)
    if config.z_loss_weight > 0.0:
        loss = loss + config.z_loss_weight * logits.logsumexp(-1).square().mean()
    if config.switch_loss_weight == 0.0 and config.cv_loss_weight == 0.0:
        return loss
    mean_probability = probability.mean(0)
    gate_mean = chosen_gates(gates, index, config.num_experts).mean(0)
    if config.loss_scope == "global_batch":
        choice_share = statistics.choice_share.to(logits.dtype)
        cv = cv_tangent(gate_mean, statistics.gate_mean)
    else:
        choice_share = load.to(logits.dtype) / index.numel()
        if parallel.data_size > 1:
            means = torch.stack([mean_probability, gate_mean, choice_share])
            means = sum_for_each(means, parallel.data_group) / parallel.data_size
            mean_probability, gate_mean, choice_share = means.unbind()
        cv = squared_variation(gate_mean)
    switch = config.num_experts * (choice_share * mean_probability).sum()
    return loss + config.switch_loss_weight * switch + config.cv_loss_weight * cv


def squared_variation(gate_mean: Tensor) -> Tensor:
    """var(g) / (mean(g)^2 + 1e-10) of g = m / sum(m), from `gate_mean` m [E]; 0 for a single expert."""
    if gate_mean.numel() == 1:
        return gate_mean.sum() * 0.0  # an unbiased variance needs two
    g = gate_mean / gate_mean.sum()
    return g.var() / (g.mean().square() + CV_EPSILON)


def cv_tangent(gate_mean: Tensor, at: Tensor) -> Tensor:
    """Tangent of `squared_variation` at `at` [E] fp64, evaluated at `gate_mean` [E] fp32: its gradient is the constant
    one of `at`, so means over micro-steps and ranks are the mean of the whole batch."""
    if at.numel() == 1:
        return squared_variation(gate_mean)
    # With c = dC/dg the chain rule through g = m / sum(m) gives dC/dm = (c - <c, g>) / sum(m), where what is the same
    # for all experts cancels. <dC/dm, at> = 0 (the loss does not see the scale of m), so the tangent starts at C(at).
    g = at / at.sum()
    c = 2.0 * g / ((at.numel() - 1) * (g.mean().square() + CV_EPSILON))
    slope = (c - (c * g).sum()) / at.sum()
    return squared_variation(at).to(gate_mean.dtype) + (slope.to(gate_mean.dtype) * gate_mean).sum()
