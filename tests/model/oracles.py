"""Sigma-MoE as a loop over tokens and experts, and what the oracles of attentions share, written from the papers'
equations, in fp64.

Independent of the project's model code: plain tensors in and out; gradients come from autograd over the loop.
"""

from __future__ import annotations

import cmath
import math

import torch
from torch import Tensor

from tests.tensors import sum_of


def choose(scores: list[float], k: int) -> list[int]:
    """Indices of the k largest scores; of equal ones the lowest index."""
    return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:k]


def rotate(vector: Tensor, position: int, *, fraction: float, base: float) -> Tensor:
    """RoPE as multiplication by a complex number: dimensions i and i + n/2 are its real and imaginary part."""
    width = int(fraction * vector.numel())
    width -= width % 2
    half = width // 2
    parts = list(vector.unbind())
    for i in range(half):
        turn = cmath.exp(1j * position * base ** (-2 * i / width))
        real, imaginary = vector[i], vector[i + half]
        parts[i] = real * turn.real - imaginary * turn.imag
        parts[i + half] = real * turn.imag + imaginary * turn.real
    return torch.stack(parts)


def sinusoid(distance: int, width: int) -> Tensor:
    """Transformer-XL's r: sine on even channels, cosine on odd ones."""
    angles = [distance / 10000.0 ** (2 * (c // 2) / width) for c in range(width)]
    return torch.tensor([math.cos(a) if c % 2 else math.sin(a) for c, a in enumerate(angles)], dtype=torch.float64)


def sigma_moe(x: Tensor, p: dict[str, Tensor], *, k: int, keep: Tensor | None) -> Tensor:
    """Tokens x [N, d]. p: router [E, d], up_experts [E, d, G], with SwiGLU [E, d, 2 G], down_experts [E, G, d]. keep
    [N, E] bool."""
    rows, G = [], p["down_experts"].shape[1]

    def activated(hidden: Tensor) -> Tensor:
        return torch.relu(hidden) if len(hidden) == G else hidden[G:] * hidden[:G] / (1 + torch.exp(-hidden[:G]))

    for t in range(x.shape[0]):
        scores = 1 / (1 + torch.exp(-(p["router"] @ x[t])))
        if keep is not None:
            scores = torch.stack([s if bool(keep[t, e]) else s * 0 for e, s in enumerate(scores)])
        chosen = choose([float(s.detach()) for s in scores], k)
        rows.append(sum_of(scores[e] * (activated(x[t] @ p["up_experts"][e]) @ p["down_experts"][e]) for e in chosen))
    return torch.stack(rows)


def entropy_term(x: Tensor, router: Tensor) -> Tensor:
    """sum_e p_e log p_e with p the mean over tokens of softmax(x router^T)."""
    probability = torch.zeros(router.shape[0], dtype=x.dtype)
    for token in x:
        exponent = torch.exp(router @ token)
        probability = probability + exponent / exponent.sum() / x.shape[0]
    return (probability * torch.log(probability)).sum()
