"""The micro-step as CUDA graphs (train.cuda_graph): the host replays what it recorded instead of launching each kernel.

The forward pass is one graph. The backward pass is one for each piece of the model (embedding, every block, end), so
that DeepSpeed's hooks fire for the parameters of a block while the graphs of the blocks before it are still running: it
reduces gradients during the last backward pass. For autograd each piece is a function of its parameters; a scalar joins
one to the next, so no activation is held but by the graphs.

A graph repeats the same kernels on the same addresses. So what changes from one micro-step to the next is copied to
where the graph reads it: tokens, targets, the indices of the sequences, which are the state of every dropout mask,
documents, the gradient of the objective, which brings DeepSpeed's scales, and Transformer-XL memory. Sums of routers
and what regularisers take from the step before are changed in place anyway (model/routing_table.py). Parameters never
move. Micro-steps of one kind have inputs of the same shapes and memory of the same length. The first of a kind is
launched one by one, which compiles and allocates what it needs once; the second is recorded, and a recording computes
nothing, so every micro-step is computed once and nothing needs to be undone.

The design is that of PyTorch's make_graphed_callables, which has neither kinds, nor outside
state, nor a sum of gradients over micro-steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from common.errors import UserError
from model.language_model import LanguageModel
from model.memory import LayerMemory, layer_memories

Outputs = tuple[Tensor, Tensor, Tensor]
"""Objective, loss of each sequence and auxiliary loss: LanguageModel.forward's."""


class Graph(Protocol):
    """Work that is recorded once and then repeated on the same tensors."""

    def recording(self) -> AbstractContextManager[Any]:
        """What is queued inside is recorded, and computed at each replay alone."""

    def replay(self) -> None:
        """Queues the work that was recorded."""


class Piece(NamedTuple):
    """The backward pass of one piece of the model."""

    graph: Graph
    parameters: tuple[nn.Parameter, ...]
    gradients: tuple[Tensor, ...]
    """Where `graph` leaves those of `parameters`."""
    result: Tensor
    """What autograd sees of the forward pass: the objective of the last piece; a zero that stands for the state which
    goes to the next one."""
    result_gradient: Tensor | None
    """Where the graph reads the gradient of `result`; None but for the last piece."""


class _Node(torch.autograd.Function):
    """A piece to autograd: its parameters go in, and what stands for the state before it."""

    @staticmethod
    def forward(ctx: Any, piece: Piece, taken_at_once: bool, before: Tensor, *parameters: Tensor) -> Tensor:
        ctx.piece, ctx.taken_at_once = piece, taken_at_once
        return piece.result.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # What it hands on makes autograd run the piece before this one next; its value is not read.
        piece: Piece = ctx.piece
        if piece.result_gradient is not None:
            piece.result_gradient.copy_(gradient)
        piece.graph.replay()
        # Autograd makes a tensor that nobody else refers to the parameter's .grad, and copies any other. The next
        # replay writes over it, so it may be the .grad only where a hook takes it away at once.
        gradients = tuple(g.detach() for g in piece.gradients) if ctx.taken_at_once else piece.gradients
        return None, None, gradient, *gradients


class _Kind(NamedTuple):
    """What must be the same for a graph to be the right one."""

    shapes: tuple[torch.Size, ...]
    memory_length: int


class _Recorded(NamedTuple):
    """The graphs of one kind of micro-step."""

    forward: Graph
    inputs: tuple[Tensor, ...]
    memories: list[tuple[Tensor | None, Tensor]]
    """Where each layer's memory is read, and where it is noted."""
    pieces: list[Piece]
    """In the order of the forward pass."""
    outputs: Outputs


class _Open(NamedTuple):
    """A piece whose backward pass is not recorded yet."""

    parameters: tuple[nn.Parameter, ...]
    inputs: list[Tensor]
    outputs: list[Tensor]


class GraphedForward:
    """Takes the place of a model's `forward` in training. Elsewhere, without gradients or in evaluation, it calls it.

    `make_graph` makes graphs that share their memory: kinds replay one after the other, never at once.
    `taken_at_once`: a hook takes each gradient from .grad as soon as it is there.
    """

    def __init__(self, model: LanguageModel, make_graph: Callable[[], Graph], *, taken_at_once: bool) -> None:
        self._model, self._make_graph, self._taken_at_once = model, make_graph, taken_at_once
        self._memories = [memory for _, memory in layer_memories(model)]
        self._parameters = list(model.parameters())
        self._places = [p.data_ptr() for p in self._parameters]
        self._seen: set[_Kind] = set()
        self._recorded: dict[_Kind, _Recorded] = {}

    def __call__(self, *inputs: Tensor) -> Outputs:
        """`inputs`: of LanguageModel.forward. The results are overwritten by the next call. Raises UserError where the
        micro-step cannot be recorded."""
        model = self._model
        if not (model.training and torch.is_grad_enabled()):
            return LanguageModel.forward(model, *inputs)
        kind = _Kind(tuple(t.shape for t in inputs), self._memories[0].length if self._memories else 0)
        if kind not in self._seen:
            self._seen.add(kind)
            return LanguageModel.forward(model, *inputs)
        assert self._places == [p.data_ptr() for p in self._parameters], "a parameter was moved"
        if kind not in self._recorded:
            self._recorded[kind] = self._record(inputs)
        return self._replay(self._recorded[kind], inputs)

    def _replay(self, recorded: _Recorded, inputs: tuple[Tensor, ...]) -> Outputs:
        for place, value in zip(recorded.inputs, inputs, strict=True):
            place.copy_(value)
        for memory, (kept, written) in zip(self._memories, recorded.memories, strict=True):
            memory.place(kept, written)
        recorded.forward.replay()
        result = recorded.pieces[0].result  # before the first piece nothing needs a gradient
        for piece in recorded.pieces:
            result = _Node.apply(piece, self._taken_at_once, result, *piece.parameters)
        return result, *recorded.outputs[1:]

    def _record(self, inputs: tuple[Tensor, ...]) -> _Recorded:
        static = tuple(torch.empty_like(t).copy_(t) for t in inputs)
        memories = [_places_of(memory, self._model, inputs[0].shape[1]) for memory in self._memories]
        for memory, (kept, written) in zip(self._memories, memories, strict=True):
            memory.place(kept, written)
        try:
            with _other_leaves(self._model) as parameters:
                forward = self._make_graph()
                with forward.recording():
                    opened, outputs = _forward(self._model, *static)
                pieces = self._record_backward(opened, outputs[0], parameters)
        except RuntimeError as ended:
            error = _first(ended)
            if isinstance(error, torch.OutOfMemoryError):
                raise error from None
            reason = (str(error) or repr(error)).splitlines()[0].rstrip(". ")
            raise UserError(
                f"train.cuda_graph: the micro-step cannot be recorded as CUDA graphs ({reason}); set it to off"
            ) from error
        return _Recorded(forward, static, memories, pieces, outputs)

    def _record_backward(
        self, opened: list[_Open], objective: Tensor, parameters: dict[nn.Parameter, nn.Parameter]
    ) -> list[Piece]:
        """Empties `opened`, so that no activation is held any longer than in a usual backward pass. `parameters`: of
        `_other_leaves`."""
        result, result_gradient = objective.detach(), torch.ones_like(objective)
        zero = torch.zeros_like(result)
        pieces: list[Piece] = []
        gradients: tuple[Tensor, ...] = (result_gradient,)
        while opened:
            of = opened.pop()
            graph = self._make_graph()
            with graph.recording():
                found = torch.autograd.grad(of.outputs, (*of.inputs, *of.parameters), gradients)
            gradients, own = found[: len(of.inputs)], found[len(of.inputs) :]
            is_last, theirs = not pieces, tuple(parameters[leaf] for leaf in of.parameters)
            pieces.append(Piece(graph, theirs, own, result if is_last else zero, result_gradient if is_last else None))
        return pieces[::-1]


def _first(error: BaseException) -> BaseException:
    """What went wrong in a recording: its end may fail too, because of that."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return error


def _forward(model: LanguageModel, tokens: Tensor, targets: Tensor, *more: Tensor) -> tuple[list[_Open], Outputs]:
    """LanguageModel.forward, cut into pieces: none sees the autograd graph of another."""

    def opened(given: Sequence[Tensor], results: Sequence[Tensor], *modules: nn.Module) -> _Open:
        parameters = tuple(p for module in modules for p in module.parameters())
        return _Open(parameters, *([t for t in tensors if t.requires_grad] for tensors in (given, results)))

    state, apart = model.begin(tokens, *more)
    pieces = [opened((), state, model.embedding)]
    for block in model.blocks:
        given = _cut(state)
        state = block(given, apart)
        pieces.append(opened(given, state, block))
    given = _cut(state)
    objective, sequence_loss, auxiliary_loss = model.end(given, targets)
    pieces.append(opened(given, [objective], model.final_norm, model.head))
    return pieces, (objective, sequence_loss, auxiliary_loss)


@contextlib.contextmanager
def _other_leaves(model: nn.Module) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """Inside, the model's modules have new leaves in the place of their parameters, in the same memory -> leaf to
    parameter. Autograd orders a gradient after the stream on which its leaf was first used; DeepSpeed's hooks keep that
    of a parameter, the default stream, which must not be waited for in a recording."""
    places = [(m, name, p) for m in model.modules() for name, p in m._parameters.items() if p is not None]
    leaves = {p: nn.Parameter(p.detach()) for _, _, p in places}
    for module, name, parameter in places:
        module._parameters[name] = leaves[parameter]  # RELIES-ON torch-parameters
    try:
        yield {leaf: parameter for parameter, leaf in leaves.items()}
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def _cut(state: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    hidden, sequence_index, auxiliary_loss = (t.detach().requires_grad_(t.requires_grad) for t in state)
    return hidden, sequence_index, auxiliary_loss


def _places_of(memory: LayerMemory, model: LanguageModel, num_tokens: int) -> tuple[Tensor | None, Tensor]:
    """New tensors for LayerMemory.place."""
    length = min(memory.max_length, memory.length + num_tokens)
    size, dtype = (len(memory.streams), length, model.config.d_model), next(model.parameters()).dtype
    written = torch.zeros(size, dtype=dtype, device=memory.streams.device)
    return None if memory.kept is None else torch.empty_like(memory.kept), written
