"""Shapes of the ops in the shipped configurations (configs/): what benchmarks/kernel_cases compiles.

tests/model/kernels/triton/test_shipped.py holds these tables against what the configurations launch. Of d_model d and
head_dim h the kernels make constants, so that every pair is machine code of its own.
"""

from __future__ import annotations

GATED = {
    (1024, 112): 4,
    (412, 76): 5,
    (2048, 128): 4,
    (1024, 132): 8,
    (1024, 100): 4,
    (512, 112): 4,
    (412, 64): 5,
    (412, 126): 5,
    (412, 171): 5,
    (1024, 197): 4,
    (1024, 256): 4,
    (128, 32): 4,
}
"""SwitchHead with at least half of the experts chosen: (d, h) -> experts of a head."""

SORTED = {(412, 112): 2, (412, 76): 2, (412, 56): 2, (412, 48): 2}
"""SwitchHead with 2 of 5 experts: (d, h) -> heads."""

GATED_ROWS = (
    (112, 2),
    (128, 2),
    (76, 3),
    (132, 4),
    (32, 2),
    (48, 2),
    (56, 2),
    (64, 3),
    (76, 2),
    (100, 2),
    (126, 3),
    (171, 3),
    (197, 2),
    (256, 2),
)
"""SwitchHead with `kernels.backend=dense`: (h, chosen experts) that `auto` takes on CUDA."""

SETS = ((2048, 128, 8, 4, 2), (1024, 112, 4, 4, 2), (1024, 256, 4, 4, 2), (512, 64, 4, 5, 3))
"""SwitchHead with `kernels.backend=sets`: (d, h, heads, experts of a head, chosen ones). The last is no shipped one."""

MOA = {(1024, 146): 16, (412, 88): 10}
"""Mixture of attention heads: (d, h) -> experts."""

MOA_CHOICES = {412: (2, 4, 6, 8), 1024: (2, 4, 6, 8, 12)}
"""d_model -> active experts."""

ROUTERS = (
    (1024, 4, 4, 2, (0, 1)),
    (1024, 8, 4, 2, (0,)),
    (2048, 16, 4, 2, (0,)),
    (1024, 2, 8, 4, (0,)),
    (512, 2, 4, 2, (0,)),
    (412, 2, 5, 2, (0,)),
    (412, 2, 5, 3, (0,)),
    (412, 4, 5, 3, (0,)),
    (128, 8, 4, 2, (0,)),
)
"""SwitchHead's: d, routers (value's and output's are multiplied together where they see the same tokens), experts,
choices, and the kinds of expert dropout (`choose_kernel`)."""

SIGMA_MOE_ROUTERS = (
    (1024, 1, 32, 4, (0, 2)),
    (2048, 1, 64, 8, (0,)),
    (412, 1, 16, 4, (0,)),
    (412, 1, 128, 4, (0, 2)),
    (512, 1, 16, 4, (0, 2)),
    (128, 1, 16, 4, (0,)),
)
"""The feed-forward's, likewise."""
UNREGULARISED_ROUTERS = ((412, 1, 16, 4, ()),)
"""Those of the feed-forward that have a configuration with `entropy_weight` 0: no gradient reaches their logits."""

SIGMA_MOE = {
    "47m": (412, 16, 128, 4, 16384),
    "41m": (512, 16, 128, 4, 16384),
    "237m": (412, 128, 128, 4, 16384),
    "259m": (1024, 32, 128, 4, 4096),
    "1b": (2048, 64, 128, 8, 16384),
    "tiny": (128, 16, 64, 4, 512),
}
"""d_model, experts, expert size, active experts, and tokens of a micro-batch."""

ROTATED = ((128, 32), (64, 16), (32, 8), (100, 25), (126, 31), (197, 49), (512, 128), (41, 10), (205, 51))
"""Heads with RoPE: head_dim, pairs that are rotated."""

NORMS = ((2048, False), (1024, True), (412, True), (512, True), (128, False))
"""d_model, and whether its configurations have dropout."""

VOCABULARIES = (205, 256, 8000, 32000, 50257)
"""And one that is longer than a block and odd."""
