"""How an op of ours is made known to torch: schema, kernel, shapes of its results, gradient.

torch.library.custom_op does this too, and at the first call of an op it imports torch's compiler, to say that the
compiler must not look into the kernel. That takes two seconds of every start; here the compiler is told if it is there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "switchall"
OPS: dict[str, Op] = {}
"""Name -> op, of those whose module is imported."""

Function = Callable[..., Any]


class Op:
    """One op, called as the function that defines it. Its results must not be, or share memory with, its arguments."""

    def __init__(self, name: str, body: Function, changes: tuple[str, ...] = ()) -> None:
        """`changes`: arguments that `body` writes to. Raises ValueError, of torch, if the annotations of `body` are no
        schema."""
        self.name, self.body = name, body
        self._uncompiled: Function | None = None
        self._gradient: tuple[Function, Function] | None = None
        self._added_gradient: Function | None = None
        if name in OPS:  # its module is imported again: after an import that failed, or in a notebook
            OPS[name]._library._destroy()  # RELIES-ON torch-library
        qualified = f"{NAMESPACE}::{name}"
        self._library: torch.library.Library = torch.library.Library(NAMESPACE, "FRAGMENT")
        schema = torch.library.infer_schema(body, mutates_args=changes)
        torch.library.define(qualified, schema, lib=self._library, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(qualified, "default", self._kernel, lib=self._library)
        if not changes:
            setup, library = self._setup_context, self._library
            torch.library.register_autograd(qualified, self._backward, setup_context=setup, lib=library)
        self.overload: Any = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.overload(*arguments, **named)

    def register_fake(self, function: Function) -> Function:
        """`function`: from the arguments, empty tensors as the results are."""
        torch.library.register_fake(self.overload, function, lib=self._library)
        return function

    def register_autograd(self, backward: Function, *, setup_context: Function) -> None:
        """`backward`: from (ctx, gradients of the results), those of the arguments. `setup_context`: from (ctx,
        arguments, results), keeps what `backward` needs in ctx. Without them there is no gradient."""
        self._gradient = backward, setup_context

    def register_added_gradient(self, backward: Function) -> None:
        """`backward`: from (ctx, the gradient of the first argument by its other uses, gradients of the results), those
        of the arguments, the first one the sum. It may write to the gradient that it is given (`hand_on`)."""
        self._added_gradient = backward

    def hand_on(self, x: Tensor, *arguments: Any) -> tuple[Any, ...]:
        """`x`, and the op's results for (x, *arguments). Who uses `x` after the op takes the one handed on: the
        gradient that comes back for it is added up inside the op's backward pass, by a product or by a kernel that
        reads it, and autograd needs no pass over memory of its own for that sum. That gradient may be written to, so
        `x` goes to ops that give a new tensor as its gradient (products do; a sum or a view of `x` does not)."""
        asks = x.requires_grad and torch.is_grad_enabled()
        if self._added_gradient is None or not asks or torch.compiler.is_compiling():  # compilers add up themselves
            return x, *self(x, *arguments)
        return _HandOn.apply(self, x, *arguments)

    def _kernel(self, *arguments: Any) -> Any:
        if self._uncompiled is None:
            if "torch._dynamo" not in sys.modules:  # RELIES-ON torch-compiler
                return self.body(*arguments)
            self._uncompiled = torch.compiler.disable(self.body)
        return self._uncompiled(*arguments)

    def _setup_context(self, ctx: Any, inputs: Any, output: Any) -> None:
        if self._gradient is not None:
            self._gradient[1](ctx, inputs, output)

    def _backward(self, ctx: Any, *gradients: Any) -> Any:
        if self._gradient is None:
            raise RuntimeError(f"{NAMESPACE}::{self.name} has no gradient")
        return self._gradient[0](ctx, *gradients)


class _HandOn(torch.autograd.Function):
    """An op of several results, behind its first argument."""

    @staticmethod
    def forward(ctx: Any, op: Op, *arguments: Any) -> tuple[Tensor, ...]:
        assert op._gradient is not None
        ctx.op, results = op, op(*arguments)
        op._gradient[1](ctx, arguments, results)
        return arguments[0].view_as(arguments[0]), *results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        total, *of_results = gradients
        if total is None:
            return None, *ctx.op._gradient[0](ctx, *of_results)
        return None, *ctx.op._added_gradient(ctx, total, *of_results)


def op(name: str, *, changes: tuple[str, ...] = ()) -> Callable[[Function], Op]:
    """Decorates the function that computes switchall::NAME, by its annotations an operator's schema, and writes to the
    arguments that `changes` names."""

    def decorate(body: Function) -> Op:
        OPS[name] = Op(name, body, changes)
        return OPS[name]

    return decorate
