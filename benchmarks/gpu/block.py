"""One block of a model, forward and backward, and its attention beside a dense one of as many parameters."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks.gpu import models, winners
from benchmarks.gpu.command import Context, Part
from benchmarks.gpu.timing import Clock, Times, Work, clock_of, measure
from model.kernels.triton.tiles import Entry, placed

if TYPE_CHECKING:
    from model.config import ModelConfig

SEQUENCES = 8


def parts(*, tiny: bool) -> Iterator[Part]:
    for name in ("tiny",) if tiny else ("1b", "262m"):
        yield Part(f"block {name}", functools.partial(compute, name=name))
    if not tiny:
        yield Part("block 1b sets", functools.partial(compute, name="1b", backend="sets"))
    for name, backend in (("tiny", "triton"),) if tiny else (("1b", "auto"), ("1b", "sets")):
        words = ("block tuned", name, *((backend,) if backend == "sets" else ()))
        yield Part(" ".join(words), functools.partial(compute, name=name, backend=backend, is_tuned=True), 20.0)


def compute(context: Context, *, name: str, backend: str = "auto", is_tuned: bool = False) -> dict[str, Any]:
    """Milliseconds of block and attention layer, of the model and of its dense counterpart; the ratio of the attention
    layers' times over the ratio of their multiply-accumulates. `backend`: the model's kernels.backend. `is_tuned`: the
    model has the tiles that tune found, and `today` are its times without (Unavailable where tune found none)."""
    entries = winners.of_here(context) if is_tuned else []
    with models.as_in_training(context.device):
        return _measured(context, name, backend, entries)


def _measured(context: Context, name: str, backend: str, entries: list[Entry]) -> dict[str, Any]:
    config = models.load(name, num_layers=1, **(models.SHORT if context.tiny and entries else {}))
    B = 1 if context.tiny else SEQUENCES
    with placed(entries) as table:
        model = _layers(context, config, B, backend)
    found: dict[str, Any] = {"sequences": B, "model": model}
    if entries:
        found["tiles"] = winners.launched(entries, table)
    found["dense"] = _layers(context, models.dense_counterpart(config), B, "auto")
    if entries:
        found["today"] = _layers(context, config, B, backend)
    if "attention" in model:
        time_ratio = model["attention"]["ms"] / found["dense"]["attention"]["ms"]
        mac_ratio = model["attention_macs"] / found["dense"]["attention_macs"]
        found |= {"time_ratio": round(time_ratio, 4), "mac_ratio": round(mac_ratio, 4)}
        found["time_over_macs"] = round(time_ratio / mac_ratio, 4)
    return found


def _layers(context: Context, config: ModelConfig, B: int, backend: str) -> dict[str, Any]:
    """Times of a block and of its attention layer alone."""
    from model.costs import attention_macs

    clock, rounds = clock_of(context.device), 2 if context.tiny else 20
    block = models.build(config, context.device, torch.bfloat16, backend).train().blocks[0]
    hidden = torch.randn(B, config.sequence_length, config.d_model, device=context.device, dtype=torch.bfloat16)
    index = torch.arange(B, device=context.device)
    whole = functools.partial(_block, block, index, torch.zeros((), device=context.device))
    chunks = config.memory_length // config.sequence_length
    models.fill_memory(block, index, chunks, functools.partial(whole, hidden))
    found: dict[str, Any] = {"block": timed(clock, block, whole, hidden, rounds).as_result()}
    if config.memory_length == 0:  # else the block gives its attention the memory too
        layer: Any = block.attention
        attention = functools.partial(_attention, layer, index)
        found["attention"] = timed(clock, layer, attention, hidden, rounds).as_result()
    found["parameters"] = sum(p.numel() for p in block.parameters())
    return found | {"attention_macs": attention_macs(config)}


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
