"""Whether the sparse tensor cores are worth a backend of SwitchHead's output: a product whose left factor is zero
where a head did not choose an expert.

With 2 of 4 experts, and the four experts' numbers of a column side by side, exactly 2 of 4 neighbours are not zero:
what NVIDIA's cards since capability 8.0 multiply at twice the dense rate. That holds for the output's forward pass and
for the gradient of value's input, the two products that `kernels.backend=sets` leaves dense. Nothing of ours uses it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.ceilings import ceilings
from benchmarks.gpu.command import Context, Failed, Part, Unavailable
from benchmarks.gpu.timing import clock_of, measure

N, HEADS, EXPERTS, CHOSEN, WIDTH, D = 16384, 8, 4, 2, 128, 2048
"""switchall_1b: 8 x 2048 tokens, 8 heads of 128 with 2 of 4 experts, d_model 2048."""
TOLERANCE = 2e-2
"""Of bf16, as everywhere."""


def parts() -> list[Part]:
    return [Part("sparse 1b output", compute)]


def gated_rows(tokens: int, heads: int, width: int, device: torch.device) -> Tensor:
    """[tokens, heads * width * EXPERTS] bf16: random rows times random gates at 2 of 4 random experts of each head."""
    rows = torch.randn(tokens, heads, width, 1, device=device)
    order = torch.rand(tokens, heads, 1, EXPERTS, device=device).argsort(-1)
    gates = torch.rand(tokens, heads, 1, EXPERTS, device=device) * (order < CHOSEN)
    return (rows * gates).to(torch.bfloat16).flatten(1)


def is_there() -> bool:
    """torch's CUDA builds have cuSPARSELt on a machine without a GPU too."""
    return torch.backends.cusparselt.is_available() and torch.cuda.is_available()


def compute(context: Context) -> dict[str, Any]:
    """cuBLAS over all experts; cuSPARSELt on what it has compressed, by its default and by the fastest algorithm that
    its search finds; and the compression, which a kernel of ours would do as it spreads the rows."""
    if not is_there():
        raise Unavailable("torch has no cuSPARSELt here, or no GPU")
    _, flops_per_second = ceilings(context)
    clock, rounds = clock_of(context.device), 3 if context.tiny else 30
    tokens, heads, width, d = (64, 2, 16, 64) if context.tiny else (N, HEADS, WIDTH, D)
    torch.manual_seed(0)
    sets = [gated_rows(tokens, heads, width, context.device) for _ in range(2)]
    weights = torch.randn(sets[0].shape[1], d, device=context.device).to(torch.bfloat16)
    packed = [torch._cslt_compress(rows) for rows in sets]
    best = int(torch._cslt_sparse_mm_search(packed[0], weights))
    useful = 2 * sets[0].numel() * d * CHOSEN // EXPERTS
    ways = {
        "cuBLAS, all experts": [lambda rows=rows: rows @ weights for rows in sets],
        "cuSPARSELt": [lambda one=one: torch._cslt_sparse_mm(one, weights) for one in packed],
        f"cuSPARSELt, algorithm {best}": [
            lambda one=one: torch._cslt_sparse_mm(one, weights, alg_id=best) for one in packed
        ],
        "compression": [lambda rows=rows: torch._cslt_compress(rows) for rows in sets],
    }
    wanted = sets[0].double() @ weights.double() if context.tiny else sets[0] @ weights
    rows: list[dict[str, Any]] = []
    for name, works in ways.items():
        times = measure(clock, works, rounds)
        share = useful / (1e-3 * times.median) / flops_per_second if "compression" not in name else 0.0
        row: dict[str, Any] = {"backend": name, "forward": times.as_result() | {"of_ceiling": round(share, 4)}}
        if "compression" not in name:
            found = works[0]()
            row["relative_error"] = float((found - wanted).float().norm() / wanted.float().norm())
        rows.append(row)
    result = {"shape": [*sets[0].shape, d], "useful_flops": useful, "backends": rows}
    if bad := [row for row in rows if not row.get("relative_error", 0.0) <= TOLERANCE]:  # so of a NaN too
        raise Failed("; ".join(f"{row['backend']} differs by {row['relative_error']:.1e}" for row in bad), result)
    return result
