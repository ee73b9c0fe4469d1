"""The memory of a micro-step, traced: forward and backward pass run on fake tensors, which have shapes and no data, and
a ledger follows every storage. So an estimate knows what autograd keeps, also under
recomputation, from the code that trains and from no formula of its own.

A model of a few layers is traced, and more layers add what one layer adds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
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
    """Bytes above what is there between micro-steps. Gradients of parameters go as soon as they are there, if nothing
    else is said."""

    kept: int
    """At the end of the forward pass, for the backward pass: outputs of layers, and gradients that the loss has."""
    of_a_layer: int
    """What one block adds to `kept`."""
    at_loss: int
    """At the highest point until the first gradient of a parameter is there."""
    later: int
    """At the highest point from then on."""
    at_a_gradient: int
    """At the highest point when a gradient of a parameter has just been made."""
    with_gradients: int
    """As `later`, but gradients stay, until the last block's backward pass is over."""
    at_the_end: int
    """What the backward pass of the first block and the embedding takes above the gradients of the whole model."""

    @property
    def peak(self) -> int:
        """At the highest point of both passes."""
        return max(self.at_loss, self.later)


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
    traced_layers = min(layers, MOST_LAYERS)
    most = _passes(run, traced_layers)
    if traced_layers == 1:
        return most
    fewer = _passes(run, traced_layers - 1)
    more = layers - traced_layers
    found = Activations(*(of_most + more * (of_most - of_fewer) for of_most, of_fewer in zip(most, fewer, strict=True)))
    return found._replace(of_a_layer=most.kept - fewer.kept, at_the_end=most.at_the_end)


@functools.lru_cache(maxsize=64)
def _passes(run: TracedRun, num_layers: int) -> Activations:
    """Of a model of so many layers; `of_a_layer` is not known."""
    gone, stay = (_trace(run, num_layers, drops=drops) for drops in (True, False))
    later = max(gone.last_block, gone.first_block)
    return Activations(gone.kept, 0, gone.at_loss, later, gone.at_a_gradient, stay.last_block, stay.first_block)


class _Trace(NamedTuple):
    kept: int
    at_loss: int
    last_block: int
    """At the highest point from the first gradient until the last block's backward pass is over."""
    first_block: int
    """And in that of the first block and the embedding, above the gradients that are there in the end."""
    at_a_gradient: int


def _trace(run: TracedRun, num_layers: int, *, drops: bool) -> _Trace:
    """`drops`: gradients of parameters go as soon as they are there."""
    with FakeTensorMode():  # RELIES-ON torch-fake
        model = _model(run, num_layers)
        B, T = run.micro_sequences, run.model.sequence_length
        tokens, index = torch.zeros(B, T, dtype=torch.int64), torch.arange(B)
        documents = torch.zeros_like(tokens) if run.has_documents else None
        for _, memory in layer_memories(model):
            memory.assign(index, B)
            size = B, run.model.memory_length, run.model.d_model
            memory.place(*(torch.empty(size, dtype=run.dtype) for _ in range(2)))
        with Ledger() as ledger:
            peaks, at_a_gradient = dict[str, int](), 0

            def end_of(phase: str) -> None:
                """Notes the highest point of a phase, once."""
                if phase not in peaks:
                    peaks[phase] = ledger.peak
                    ledger.forget_peak()

            def of_a_parameter(parameter: Tensor) -> None:
                nonlocal at_a_gradient
                end_of("loss")
                at_a_gradient = max(at_a_gradient, ledger.now)
                if drops:
                    parameter.grad = None

            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(of_a_parameter)
            _before_backward(model.blocks[max(0, num_layers - 2)], lambda: end_of("last block"))
            _before_backward(model.blocks[0], lambda: end_of("others"))
            objective, *_ = model(tokens, tokens, index, documents)
            kept = ledger.now
            objective.backward()
            gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
            return _Trace(kept, peaks["loss"], peaks["last block"], ledger.peak - gradients, at_a_gradient)


def _before_backward(block: nn.Module, call: Callable[[], None]) -> None:
    """Calls `call` when the backward pass comes to `block`."""

    def watch(module: nn.Module, given: Any, state: tuple[Tensor, ...]) -> None:
        state[0].register_hook(lambda gradient: call())

    block.register_forward_hook(watch)


def _model(run: TracedRun, num_layers: int) -> LanguageModel:
    config, before = run.model.model_copy(update={"num_layers": num_layers}), torch.get_default_dtype()
    torch.set_default_dtype(run.dtype)  # parameters that are fake cannot be converted
    try:
        model = LanguageModel(config, backends=run.backends, recompute=run.recompute).train()
    finally:
        torch.set_default_dtype(before)
    return model
