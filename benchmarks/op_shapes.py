"""The shapes at which ops are checked and timed: odd ones, and those of the shipped models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.op_cases import (
    Build,
    Case,
    attention_case,
    dropout_case,
    entropy_case,
    expert_linear_case,
    handing_on,
    loss_case,
    norm_case,
    output_case,
    range_attention_case,
    rotate_case,
    route_case,
    sigma_moe_case,
    value_case,
)


def equality_cases(*, small: bool) -> list[Build]:
    """No size is a multiple of a tile; `small` is for an interpreter."""
    if small:
        return [
            partial(route_case, 37, 24, 2, 5, 3),
            partial(sigma_moe_case, 37, 24, 4, 2, 16),
            partial(value_case, 37, 24, 2, 4, 2, 8),
            partial(output_case, 37, 24, 2, 4, 2, 8),
            partial(value_case, 37, 24, 2, 5, 2, 8),
            partial(output_case, 37, 24, 2, 5, 2, 8),
            partial(expert_linear_case, 37, 24, 4, 2, 16),
            partial(attention_case, 2, 7, 2, 8, biases=True),
            partial(range_attention_case, 2, 7, 2, 8, length=3),
            partial(loss_case, 37, 24, 50),
            partial(dropout_case, 3, 5, 24),
            partial(norm_case, 3, 5, 24, 0.2),
            partial(entropy_case, 37, 5),
            partial(rotate_case, 2, 7, 3, 8, 2, "memory"),
        ]
    return [
        partial(route_case, 1000, 412, 8, 5, 3),
        partial(route_case, 1000, 512, 1, 64, 8),
        partial(sigma_moe_case, 1000, 512, 16, 4, 128),
        partial(sigma_moe_case, 1000, 412, 5, 1, 104),
        partial(value_case, 1000, 512, 4, 4, 2, 112),
        partial(output_case, 1000, 512, 4, 4, 2, 112),
        partial(value_case, 1000, 412, 2, 8, 2, 76),
        partial(output_case, 1000, 412, 2, 8, 2, 76),
        partial(expert_linear_case, 1000, 416, 10, 4, 88),
        partial(attention_case, 3, 333, 2, 76),
        partial(attention_case, 3, 221, 4, 88, shared=True),
        partial(range_attention_case, 3, 333, 2, 76, length=100),
        partial(range_attention_case, 3, 221, 4, 88, shared=True),
        partial(range_attention_case, 2, 221, 2, 197, length=50),
        partial(loss_case, 1000, 412, 8001),
        partial(dropout_case, 3, 333, 412),
        *(partial(norm_case, 3, 333, 412, probability) for probability in (None, 0.0, 0.2)),
        partial(entropy_case, 5003, 21),
        *(partial(rotate_case, 3, 333, 2, 76, 19, kind) for kind in ("", "joint", "memory", "documents")),
    ]


def handing_on_cases(*, small: bool) -> list[Build]:
    """What a block joins to an op, for checks of equality, not for timing: its backward pass adds to a gradient, and
    σ-MoE adds its sum to the residual stream."""
    if small:
        return [
            partial(sigma_moe_case, 37, 24, 4, 2, 16, adds=True),
            partial(handing_on, partial(value_case, 37, 24, 2, 4, 2, 8)),
            partial(handing_on, partial(route_case, 37, 24, 2, 5, 3)),
        ]
    value = partial(value_case, 5000, 2048, 8, 4, 2, 128), partial(value_case, 1000, 512, 4, 4, 2, 112)
    route = partial(route_case, 5000, 2048, 16, 4, 2), partial(route_case, 1000, 2048, 1, 64, 8)
    streams = [partial(sigma_moe_case, 5000, 2048, 64, 8, 128, adds=True)]
    streams += [partial(sigma_moe_case, 1000, 412, 16, 4, 104, adds=True)]
    return [*streams, *(partial(handing_on, build) for build in (*value, *route))]


MODELS = ("1b", "262m")
"""Whose shapes `shipped_cases` has."""


def shipped_cases(model: str, *, num_tokens: int | None = None) -> list[Build]:
    """What a micro-step of switchall_1b ("1b": 8 sequences of 2048 tokens) or of the published 262M models ("262m": 8
    of 512) computes, the costliest ops first; `num_tokens` instead for a quick run at the same widths."""
    if model == "1b":
        N, d = num_tokens or 16384, 2048
        return [
            partial(value_case, N, d, 8, 4, 2, 128),
            partial(output_case, N, d, 8, 4, 2, 128),
            partial(sigma_moe_case, N, d, 64, 8, 128),
            partial(route_case, N, d, 16, 4, 2),
            partial(route_case, N, d, 1, 64, 8),
            partial(loss_case, N, d, 32000),
            partial(range_attention_case, 8, N // 8, 8, 128, length=600),
            *(partial(norm_case, 8, N // 8, d, probability) for probability in (None, 0.0)),
            partial(entropy_case, N, 64),
            *(partial(rotate_case, 8, N // 8, 8, 128, 32, kind) for kind in ("", "documents")),
        ]
    N, d = num_tokens or 4096, 1024
    return [
        partial(value_case, N, d, 4, 4, 2, 112),
        partial(output_case, N, d, 4, 4, 2, 112),
        partial(sigma_moe_case, N, d, 32, 4, 128),
        partial(route_case, N, d, 4, 4, 2),
        partial(route_case, N, d, 1, 32, 4),
        partial(attention_case, 8, N // 8, 4, 112),
        partial(attention_case, 8, N // 8, 16, 64, biases=True),
        partial(range_attention_case, 8, N // 8, 16, 64, length=200),
        partial(range_attention_case, 8, N // 8, 4, 112),
        partial(loss_case, N, d, 8000),
        partial(dropout_case, 8, N // 8, d),
        *(partial(norm_case, 8, N // 8, d, probability) for probability in (None, 0.2)),
        partial(entropy_case, N, 32),
        partial(rotate_case, 8, N // 8, 16, 64, 16, "joint"),
        partial(rotate_case, 8, N // 8, 4, 100, 25, "memory"),
        *(partial(build, N, d, 2, 8, 4, 132) for build in (value_case, output_case)),
        *(partial(build, N, d, 4, 4, 2, h) for h in (100, 197, 256) for build in (value_case, output_case)),
        partial(expert_linear_case, N, d, 16, 4, 146),
        partial(attention_case, 8, N // 8, 2, 132),
        partial(attention_case, 8, N // 8, 8, 146, shared=True),
    ]


def outlines(builds: Sequence[Build]) -> list[Case]:
    """The cases on the meta device, where they cost nothing: their names and sizes."""
    with torch.device("meta"):
        return [build() for build in builds]
