"""One block of a model, forward and backward, and its attention beside a dense one of as many parameters."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu import models
from benchmarks.gpu.command import Context, Part
from benchmarks.gpu.timing import Clock, Times, Work, clock_of, measure

SEQUENCES = 8


def parts(*, tiny: bool) -> Iterator[Part]:
    for name in ("tiny",) if tiny else ("1b", "262m"):
        yield Part(f"block {name}", functools.partial(compute, name=name))
    if not tiny:
        yield Part("block 1b sets", functools.partial(compute, name="1b", backend="sets"))


def compute(context: Context, *, name: str, backend: str = "auto") -> dict[str, Any]:
    """Milliseconds of block and attention layer, of the model and of its dense counterpart; the ratio of the attention
    layers' times over the ratio of their multiply-accumulates. `backend`: the model's kernels.backend."""
    with models.as_in_training(context.device):
        return _measured(context, name, backend)


def _measured(context: Context, name: str, backend: str) -> dict[str, Any]:
    from model.costs import attention_macs

    config = models.load(name, num_layers=1)
    dense = models.dense_counterpart(config)
    clock, B = clock_of(context.device), 1 if context.tiny else SEQUENCES
    found: dict[str, Any] = {"sequences": B}
    for kind, one in (("model", config), ("dense", dense)):
        model = models.build(one, context.device, torch.bfloat16, backend if kind == "model" else "auto").train()
        block = model.blocks[0]
        hidden = torch.randn(B, one.sequence_length, one.d_model, device=context.device, dtype=torch.bfloat16)
        index = torch.arange(B, device=context.device)
        rounds = 2 if context.tiny else 20
        whole = functools.partial(_block, block, index, torch.zeros((), device=context.device))
        chunks = one.memory_length // one.sequence_length
        models.fill_memory(block, index, chunks, functools.partial(whole, hidden))
        found[kind] = {"block": timed(clock, block, whole, hidden, rounds).as_result()}
        if one.memory_length == 0:  # else the block gives its attention the memory too
            layer: Any = block.attention
            attention = functools.partial(_attention, layer, index)
            found[kind]["attention"] = timed(clock, layer, attention, hidden, rounds).as_result()
        found[kind]["parameters"] = sum(p.numel() for p in block.parameters())
        found[kind]["attention_macs"] = attention_macs(one)
    if "attention" in found["model"]:
        time_ratio = found["model"]["attention"]["ms"] / found["dense"]["attention"]["ms"]
        mac_ratio = found["model"]["attention_macs"] / found["dense"]["attention_macs"]
        found |= {"time_ratio": round(time_ratio, 4), "mac_ratio": round(mac_ratio, 4)}
        found["time_over_macs"] = round(time_ratio / mac_ratio, 4)
    return found


def _block(block: nn.Module, index: Tensor, zero: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    y, _, auxiliary_loss = block((hidden, index, zero))
    return y, auxiliary_loss


def _attention(attention: nn.Module, index: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    y, auxiliary_loss = attention(hidden, hidden.shape[1], index, None)
    return y, auxiliary_loss


def timed(clock: Clock, layer: nn.Module, forward: Any, hidden: Tensor, rounds: int) -> Times:
    """Forward and backward of a layer together, on two inputs in turn; the upstream gradients are drawn before."""
    leaves = [hidden.clone().requires_grad_() for _ in range(2)]
    upstream = torch.randn_like(hidden)
    parameters = [p for p in layer.parameters() if p.requires_grad]

    def work(x: Tensor) -> None:
        y, auxiliary_loss = forward(x)
        outputs, gradients = [y], [upstream]
        if isinstance(auxiliary_loss, Tensor) and auxiliary_loss.requires_grad:
            outputs.append(auxiliary_loss)
            gradients.append(torch.ones_like(auxiliary_loss))
        torch.autograd.grad(outputs, [x, *parameters], gradients)

    works: list[Work] = [functools.partial(work, leaf) for leaf in leaves]
    return measure(clock, works, rounds)
