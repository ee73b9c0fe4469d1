"""Other implementations of an op's work, on the op's own inputs: library products as its bound, and peers that import.

A bound computes the same products without routing: no gather, no gate, no sum over choices.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.timing import Clock, Inputs, Work
from model.kernels.ops import causal_attention
from model.kernels.ops import relative_attention as attention

Tensors = dict[str, Tensor]
WATCHED = (
    "cut_cross_entropy",
    "flash_attn",
    "liger_kernel",
    "megablocks",
    "scattermoe",
    "sonicmoe",
    "transformer_engine",
)
"""Packages that a record names where they can be imported; those of `PEERS` are timed."""


class Peer(NamedTuple):
    """`prepare`: from the op's tensors, on the device -> leaves; not timed. `compute`: from leaves -> the result."""

    name: str
    prepare: Callable[[Tensors], list[Tensor]]
    compute: Callable[..., Tensor]


def importable() -> list[str]:
    return [name for name in WATCHED if importlib.util.find_spec(name) is not None]


def works(peer: Peer, sets: list[Inputs], clock: Clock) -> dict[str, list[Work]]:
    """As `kernels.works_of`."""
    found: dict[str, list[Work]] = {"forward": [], "backward": []}
    for inputs in sets:
        with clock.draw_on():
            leaves = peer.prepare(inputs.tensors)
            y = peer.compute(*leaves)
            upstream = torch.randn_like(y)
        differentiated = [leaf for leaf in leaves if leaf.requires_grad]
        found["forward"].append(lambda leaves=leaves: peer.compute(*leaves))  # type: ignore[misc]
        found["backward"].append(
            lambda y=y, leaves=differentiated, upstream=upstream: torch.autograd.grad(  # type: ignore[misc]
                y, leaves, upstream, retain_graph=True
            )
        )
    return found


def _leaf(t: Tensor) -> Tensor:
    return t.detach().contiguous().requires_grad_()


def _value_product(t: Tensors) -> list[Tensor]:
    """x [N, d] and all experts side by side [d, H E h]."""
    d = t["x"].shape[1]
    return [_leaf(t["x"]), _leaf(t["experts"].movedim(2, 0).reshape(d, -1))]


def _output_product(t: Tensors) -> list[Tensor]:
    """Every head's row at each expert [N, H E h] and all experts below each other [H E h, d]."""
    H, E, h, d = t["experts"].shape
    rows = t["a"][:, :, None].expand(-1, H, E, h).reshape(-1, H * E * h)
    return [_leaf(rows), _leaf(t["experts"].reshape(-1, d))]


def _sorted_rows(t: Tensors) -> list[Tensor]:
    """Rows of tokens sorted by expert [N k, d], both experts, and where each expert's rows end."""
    k = t["index"].shape[1]
    rows = t["x"][t["order"] // k]
    return [_leaf(rows), _leaf(t["up"]), _leaf(t["down"]), t["load"].cumsum(0).int()]


def _grouped_products(rows: Tensor, up: Tensor, down: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(F.relu(F.grouped_mm(rows, up, offs=ends)), down, offs=ends)


def _dense_products(rows: Tensor, up: Tensor, down: Tensor, ends: Tensor) -> Tensor:
    """As many rows and columns through one expert."""
    return F.relu(rows @ up[0]) @ down[0]


def _loss_leaves(t: Tensors) -> list[Tensor]:
    return [_leaf(t["hidden"]), _leaf(t["weight"]), _leaf(t["bias"]), t["targets"]]


def _plain_loss(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), targets)


def _cut_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    found: Tensor = linear_cross_entropy(hidden, weight, targets, bias=bias)
    return found


def _attention_leaves(t: Tensors) -> list[Tensor]:
    names = ("content_queries", "k", "v", "position_keys", "position_queries")
    return [_leaf(t[name]) for name in names if name in t]


def _attention_of_operators(
    content: Tensor, k: Tensor, v: Tensor, position_keys: Tensor, position: Tensor | None = None
) -> Tensor:
    queries = content, content if position is None else position
    return attention.relative_attention_reference(attention.Inputs(*queries, k, v, position_keys))


def _range_leaves(t: Tensors) -> list[Tensor]:
    q, k, v = (_leaf(t[name].transpose(1, 2)) for name in "qkv")
    return [q, k, v, causal_attention.dense_mask(causal_attention.Inputs(q, k, v, t.get("first")))]


def _attention_with_a_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return causal_attention.torch_attention(q, k, v, mask=mask, shared=q.shape[1] != k.shape[1])


PEERS: dict[str, list[Peer]] = {
    "switchhead_value": [Peer("cuBLAS, all experts", _value_product, torch.mm)],
    "switchhead_output": [Peer("cuBLAS, all experts", _output_product, torch.mm)],
    "sigma_moe": [
        Peer("F.grouped_mm, sorted rows", _sorted_rows, _grouped_products),
        Peer("cuBLAS, one expert", _sorted_rows, _dense_products),
    ],
    "relative_attention": [Peer("torch's operators", _attention_leaves, _attention_of_operators)],
    "causal_attention": [Peer("torch's, with a mask", _range_leaves, _attention_with_a_mask)],
    "linear_cross_entropy": [
        Peer("F.cross_entropy", _loss_leaves, _plain_loss),
        *([Peer("cut_cross_entropy", _loss_leaves, _cut_cross_entropy)] if "cut_cross_entropy" in importable() else []),
    ],
}
"""Op -> what is timed beside it."""
