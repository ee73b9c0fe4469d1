"""Every attention of the family as loops over tokens, heads and experts in fp64, written from the equations.

Independent of the project's model code: plain tensors in and out; gradients come from autograd over the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.model.oracles import choose, rotate, sinusoid
from tests.tensors import sum_of

Keep = dict[str, Tensor]
"""Per selector [tokens, H, E] bool: experts that expert dropout leaves."""


def shaped(parameters: dict[str, Tensor], H: int, h: int) -> dict[str, Tensor]:
    """Parameters of a layer as `attention` takes them."""
    found = {}
    for name, value in parameters.items():
        if name == "output.weight":
            found["output"] = value.view(-1, H, h).transpose(0, 1)
        elif name.endswith(".weight"):
            found[name.removesuffix(".weight")] = value.view(-1, h, value.shape[1])
        else:
            found[name] = value
    return found


def attention(
    context: Tensor,
    num_queries: int,
    p: dict[str, Tensor],
    *,
    k: int,
    selector_of: Callable[[str], str],
    rope: tuple[float, float] | None,
    scale: Tensor | float,
    keep: Keep | None = None,
) -> tuple[Tensor, Tensor]:
    """One sequence `context` [L, d], of which the last `num_queries` tokens attend. -> [num_queries, d], and weights
    [H, num_queries, L].

    `p` holds, for each of query, key, value: NAME [H, h, d] or NAME_experts [H, E, d, h]; output [H, d, h] or
    output_experts [H, E, h, d]; OWNER_selector [H, E, d]. `rope` (fraction, base), or None for relative positions with
    position [H, h, d] and, if present, content_bias and position_bias [H, h]. key, value and position may have K heads,
    each of H / K heads.
    """
    (L, d), T = context.shape, num_queries
    H = next(value.shape[0] for name, value in p.items() if name.startswith("query"))

    def gates(projection: str, head: int, token: int) -> dict[int, Tensor]:
        owner = selector_of(projection)
        logits = p[f"{owner}_selector"][head] @ context[token]
        # A selector that looks at the chunk alone numbers its tokens from the chunk's first.
        of_chunk = keep is not None and keep[owner].shape[0] == T < L
        kept = None if keep is None else keep[owner][token - (L - T) if of_chunk else token, head]
        choosing = [float(v.detach()) if kept is None or bool(kept[e]) else -math.inf for e, v in enumerate(logits)]
        return {e: 1 / (1 + torch.exp(-logits[e])) for e in choose(choosing, k)}

    def shared(name: str, head: int) -> Tensor:
        return p[name][head * len(p[name]) // H]

    def project(projection: str, head: int, token: int) -> Tensor:
        if projection in p:
            return shared(projection, head) @ context[token]
        experts = p[f"{projection}_experts"][head]
        return sum_of(s * (context[token] @ experts[e]) for e, s in gates(projection, head, token).items())

    y, maps = [torch.zeros(d, dtype=torch.float64) for _ in range(T)], torch.zeros(H, T, L, dtype=torch.float64)
    for head in range(H):
        keys = [project("key", head, j) for j in range(L)]
        values = [project("value", head, j) for j in range(L)]
        if rope is not None:
            keys = [rotate(key, j, fraction=rope[0], base=rope[1]) for j, key in enumerate(keys)]
        for t in range(T):
            i = L - T + t
            q = project("query", head, i)
            if rope is not None:
                logits = torch.stack([rotate(q, i, fraction=rope[0], base=rope[1]) @ keys[j] for j in range(i + 1)])
            else:
                u, v = (p[name][head] if name in p else 0.0 for name in ("content_bias", "position_bias"))
                far = [shared("position", head) @ sinusoid(i - j, d) for j in range(i + 1)]
                logits = torch.stack([(q + u) @ keys[j] + (q + v) @ far[j] for j in range(i + 1)])
            weights = torch.exp(scale * logits - (scale * logits).max().detach())
            weights = weights / weights.sum()
            maps[head, t, : i + 1] = weights.detach()
            attended = sum_of(weights[j] * values[j] for j in range(i + 1))
            if "output" in p:
                y[t] = y[t] + p["output"][head] @ attended
            else:
                for e, s in gates("output", head, i).items():
                    y[t] = y[t] + s * (attended @ p["output_experts"][head, e])
    return torch.stack(y), maps


def negative_entropy(chunk: Tensor, selector: Tensor) -> Tensor:
    """sum_e p_e log p_e, summed over the heads of one `selector` [H, E, d], p the mean of softmax over the tokens of
    one sequence's `chunk` [T, d]. Authors' code that was run beside ours on random tokens (MoEUT's SwitchHeadCore:
    get_sel, with expert dropout too, and get_reg_loss; up to 8 heads, 12 experts, 200 tokens) gave the same values to
    8e-7 and the same gradients of selectors and tokens to 8e-7."""
    total = []
    for head in selector:
        shares = []
        for token in chunk:
            powers = torch.exp(head @ token)
            shares.append(powers / powers.sum())
        p = sum_of(shares) / len(chunk)
        total += [value * torch.log(value) for value in p]
    return sum_of(total)
