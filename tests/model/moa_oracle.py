"""Mixture of Attention Heads as loops over tokens, choices and keys in fp64, written from the equations.

Independent of the project's model code: plain tensors in and out; gradients come from autograd over the loops.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tests.model.oracles import choose, rotate, sinusoid
from tests.tensors import sum_of


class Routed(NamedTuple):
    """One token: all logits, all probabilities, and the gate of every chosen expert, best first."""

    logits: Tensor
    probability: Tensor
    gates: dict[int, Tensor]


def route(x: Tensor, selector: Tensor, *, k: int, router: str, keep: Tensor | None) -> Routed:
    """`x` [d], `selector` [E, d], `keep` [E] bool: the experts that expert dropout leaves."""
    logits = selector @ x
    exponent = torch.exp(logits - logits.max())
    probability = exponent / exponent.sum()
    weight = probability if router == "softmax" else 1 / (1 + torch.exp(-logits))
    choosing = [float(v.detach()) if keep is None or bool(keep[e]) else -math.inf for e, v in enumerate(logits)]
    return Routed(logits, probability, {e: weight[e] for e in choose(choosing, k)})


def attend(
    context: Tensor, routed: list[Routed], p: dict[str, Tensor], *, fraction: float | None
) -> tuple[Tensor, Tensor]:
    """One sequence: `context` [L, d], its last len(routed) tokens the queries. RoPE of `fraction` of h; None: XL.

    p: query_experts [E, d, h], output_experts [E, h, d], key.weight, value.weight [h, d], position.weight [h, d],
    scale [1]. -> [T, d], and the weights of every choice, best first: [k, T, L].
    """
    L, d = context.shape
    M = L - len(routed)
    keys, values = [p["key.weight"] @ x for x in context], [p["value.weight"] @ x for x in context]
    rows, maps = [], torch.zeros(len(routed[0].gates), len(routed), L, dtype=torch.float64)
    for t, token in enumerate(routed):
        y = torch.zeros(d, dtype=context.dtype)
        for slot, (e, gate) in enumerate(token.gates.items()):
            q = context[M + t] @ p["query_experts"][e]
            logits = []
            for u in range(M + t + 1):
                if fraction is None:
                    logit = q @ (keys[u] + p["position.weight"] @ sinusoid(M + t - u, d)) * p["scale"][0]
                else:
                    turned = [rotate(v, at, fraction=fraction, base=10000.0) for v, at in ((q, M + t), (keys[u], u))]
                    logit = turned[0] @ turned[1] / math.sqrt(q.numel())
                logits.append(logit)
            weights = torch.stack(logits)
            weights = torch.exp(weights - weights.max())
            weights = weights / weights.sum()
            maps[slot, t, : M + t + 1] = weights.detach()
            y = y + gate * (sum(w * v for w, v in zip(weights, values, strict=False)) @ p["output_experts"][e])
        rows.append(y)
    return torch.stack(rows), maps


def z_loss(routed: list[Routed]) -> Tensor:
    return sum_of(torch.log(torch.exp(t.logits).sum()) ** 2 for t in routed) / len(routed)


def choice_share(routed: list[Routed]) -> Tensor:
    """f [E]."""
    counts = torch.zeros_like(routed[0].logits).detach()
    for token in routed:
        for e in token.gates:
            counts[e] += 1
    return counts / counts.sum()


def switch_loss(routed: list[Routed], share: Tensor | None = None) -> Tensor:
    """E sum_e f_e P_e; f = `share` where given."""
    share = choice_share(routed) if share is None else share
    probability = sum_of(t.probability for t in routed) / len(routed)
    return len(share) * sum_of(f * p for f, p in zip(share, probability, strict=True))


def gate_mean(routed: list[Routed]) -> Tensor:
    """m [E]."""
    E = len(routed[0].logits)
    zero = torch.zeros((), dtype=torch.float64)
    return torch.stack([sum((t.gates.get(e, zero) for t in routed), zero) for e in range(E)]) / len(routed)


def cv_loss(mean: Tensor) -> Tensor:
    """var(g) / (mean(g)^2 + 1e-10), g = m / sum(m); 0 for one expert."""
    g, E = mean / mean.sum(), len(mean)
    if E == 1:
        return torch.zeros((), dtype=torch.float64)
    average = sum(g) / E
    return sum((v - average) ** 2 for v in g) / (E - 1) / (average**2 + 1e-10)
