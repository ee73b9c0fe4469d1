"""The memory of a micro-step, traced: forward and backward pass run on fake tensors, which have shapes and no data, and
a ledger follows every storage. So an estimate knows what autograd keeps, also under
recomputation, from the code that trains and from no formula of its own.

A model of a few layers is traced, and more layers add what one layer adds.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from model.config import ModelConfig
from model.kernels.choice import Backends
from model.language_model import LanguageModel
from model.memory import layer_memories
from model.recompute import Recompute
from pretrain.planning.ledger import Ledger

MOST_LAYERS = 3
"""Of a traced model. With three, the highest point lies where it lies with many."""


class Activations(NamedTuple):
    """Bytes above what is there between micro-steps; gradients of parameters go as soon as they are there."""

    kept: int
    """At the end of the forward pass, for the backward pass: outputs of layers, and gradients that the loss has."""
    of_a_layer: int
    """What one block adds to `kept`."""
    peak: int
    """At the highest point of both passes."""


class TracedRun(NamedTuple):
    """What decides the activations of a micro-step."""

    model: ModelConfig
    micro_sequences: int
    recompute: Recompute
    backends: Backends
    dtype: torch.dtype
    has_documents: bool


def traced(run: TracedRun) -> Activations:
    """The activations of a micro-step of a whole model in one piece."""
    layers = run.model.num_layers
    if layers <= MOST_LAYERS:
        kept, peak = _passes(run, layers)
        return Activations(kept, kept - _passes(run, layers - 1)[0] if layers > 1 else 0, peak)
    (fewer_kept, fewer_peak), (kept, peak) = (_passes(run, n) for n in (MOST_LAYERS - 1, MOST_LAYERS))
    more, of_a_layer = layers - MOST_LAYERS, kept - fewer_kept
    return Activations(kept + more * of_a_layer, of_a_layer, peak + more * (peak - fewer_peak))


@functools.lru_cache(maxsize=64)
def _passes(run: TracedRun, num_layers: int) -> tuple[int, int]:
    """`kept` and `peak` of a model of so many layers."""
    with FakeTensorMode():
        model = _model(run, num_layers)
        B, T = run.micro_sequences, run.model.sequence_length
        tokens, index = torch.zeros(B, T, dtype=torch.int64), torch.arange(B)
        documents = torch.zeros_like(tokens) if run.has_documents else None
        for _, memory in layer_memories(model):
            memory.assign(index, B)
            size = B, run.model.memory_length, run.model.d_model
            memory.place(*(torch.empty(size, dtype=run.dtype) for _ in range(2)))
        with Ledger() as ledger:
            objective, *_ = model(tokens, tokens, index, documents)
            kept = ledger.now
            objective.backward()
            return kept, ledger.peak


def _model(run: TracedRun, num_layers: int) -> LanguageModel:
    config, before = run.model.model_copy(update={"num_layers": num_layers}), torch.get_default_dtype()
    torch.set_default_dtype(run.dtype)  # parameters that are fake cannot be converted
    try:
        model = LanguageModel(config, backends=run.backends, recompute=run.recompute).train()
    finally:
        torch.set_default_dtype(before)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(_drop)
    return model


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
