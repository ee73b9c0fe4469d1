"""Blocks compiled by torch.compile (train.compile): it fuses what lies between the products and is no op of ours.

A program is compiled for one block, not for the model, so compile time is bounded: the blocks of a model without
dropout share one program for each length of the context (Transformer-XL memory grows in the first steps). With dropout
every block has its own, because the keys of its masks are constants of the program. Shapes are constants too. Our ops
(model/kernels/) stay custom operators, which a program calls.

Only training is compiled: evaluation runs operator by operator. Nothing is compiled in part or falls back: what
torch.compile cannot take ends the run with one sentence.
"""

from __future__ import annotations

import types
from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.errors import UserError
from model.config import ModelConfig
from model.documents import Seen
from model.layers import Block
from model.routing import RoutingStatistics

Transformed = tuple[Tensor, Tensor, Tensor]
"""The results of Block.transform."""


def compile_blocks(model: nn.Module, config: ModelConfig, *, backend: str = "inductor") -> None:
    """From now on compiled programs compute the blocks of `model` (a language model or a pipeline stage) in training;
    each is compiled when it first runs. `backend` is torch.compile's. Names of parameters stay."""
    shared = None if has_dropout(config) else _own_code()
    for block in model.modules():
        if isinstance(block, Block):
            block.compiled = CompiledBlock(block, shared or _own_code(), backend)


def is_compiled(model: nn.Module) -> bool:
    """Whether compiled programs compute the blocks of `model` in training."""
    return any(isinstance(module, Block) and module.compiled is not None for module in model.modules())


def has_dropout(config: ModelConfig) -> bool:
    """Of any kind: each place in the model has a key."""
    of_experts = (getattr(part, "expert_dropout", 0.0) for part in (config.attention, config.feedforward))
    return config.dropout > 0.0 or any(probability > 0.0 for probability in of_experts)


class CompiledBlock:
    """Block.transform of one block by a compiled program."""

    def __init__(self, block: Block, transform: Callable[..., Transformed], backend: str) -> None:
        self._fill_tables = block.fill_tables
        self._routers = [recorder for recorder in block.recorders if isinstance(recorder, RoutingStatistics)]
        bound = types.MethodType(transform, block)
        self._program = torch.compile(bound, backend=backend, fullgraph=True, dynamic=False)

    def __call__(self, hidden: Tensor, context: Tensor, sequence_index: Tensor, documents: Seen | None) -> Transformed:
        """As Block.transform. Raises UserError where it cannot be compiled."""
        self._fill_tables(context)  # a program that fills them serves one call
        paused = [router for router in self._routers if router.is_paused]
        for router in paused:  # recomputation runs the same program, which keeps the same activations
            router.is_paused = False
        try:
            return self._program(hidden, context, sequence_index, documents)
        except _failures() as error:
            raise UserError(
                f"train.compile: the blocks cannot be compiled ({_reason(error)}); set it to off"
            ) from error
        finally:
            for router in paused:
                router.waiting.clear()
                router.is_paused = True


def _own_code() -> Callable[..., Transformed]:
    """Block.transform with code of its own. Dynamo keeps programs by code: it looks through all of one code at every
    call, and compiles at most eight."""
    function = Block.transform  # RELIES-ON torch-programs
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)


def _failures() -> tuple[type[Exception], ...]:
    from torch._dynamo import exc  # here: its import takes seconds. RELIES-ON torch-failures

    return exc.TorchDynamoException, exc.FailOnRecompileLimitHit


def _reason(error: BaseException) -> str:
    inner = getattr(error, "inner_exception", None)  # of a backend's; the words around it say less
    text = str(error) if inner is None else f"{type(inner).__name__}: {inner}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = (lines or [repr(error)])[0].rstrip(". :")
    if "C++ compile error" in reason and " " in torch.__path__[0]:
        reason += f": torch gives the compiler its own path, {torch.__path__[0]}, which may have no space"
    return reason
