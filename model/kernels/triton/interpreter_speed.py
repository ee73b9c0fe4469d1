"""The Triton interpreter made quick: it computes the same, without what it repeats or throws away.

Most of an interpreted launch at small tiles patched the language again for every call of a helper, looked for integer
overflow of which nothing is said, and described types that were described before: the tests of SwitchHead's kernels
take a quarter of their time without that.
"""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.errors import InterpreterError

MOST_CONSTANTS = 512
"""Of numbers in kernels that are kept as blocks; a block is at most a few tens of KB."""


def speed_up() -> None:  # RELIES-ON triton-quick
    """Once in a process; triton 3.6 to 3.9 have the same functions here."""
    _patch_the_language_once_a_launch()
    _leave_out_unread_checks()
    _remember_types()
    _remember_operands()
    _call_the_language_directly()


def _patch_the_language_once_a_launch() -> None:
    """Stock patches the modules of the language when a kernel is launched, and again, for two milliseconds, whenever it
    calls a jitted function: tl.zeros, tl.sum, our helpers. A launch patches here all that they need."""
    launch, call, patch = stock.GridExecutor.__call__, stock.InterpretedFunction.__call__, stock._patch_lang
    whole = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    running = 0

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal running
        running += 1
        try:
            launch(self, *args, **kwargs)
        finally:
            running -= 1

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        if running == 0:
            return call(self, *args, **kwargs)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise InterpreterError(repr(error)) from error

    stock.GridExecutor.__call__, stock.InterpretedFunction.__call__ = launched, called
    stock._patch_lang = lambda _: patch(whole)


def _leave_out_unread_checks() -> None:
    """Stock computes every +, - and * of integers a second time in 64 bits, and asserts only with `debug` that both
    agree."""
    builder = stock.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _remember_types() -> None:
    """Types and shapes of blocks are values: those of an element type and a shape are made once."""
    block_type, tensor = tl.core.block_type, tl.core.tensor
    make_type, make_tensor, of_numpy = block_type.__init__, tensor.__init__, stock._get_np_dtype
    types: dict[Any, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}

    @functools.wraps(make_type)
    def type_of(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *(size.value if isinstance(size, tl.constexpr) else size for size in shape)
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key], element_ty=element_ty)

    @functools.wraps(make_tensor)
    def tensor_of(self: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = dict(vars(self), handle=None)
        vars(self).update(tensors[type.name], handle=handle, type=type, dtype=type.scalar)

    numpy_types: dict[str, Any] = {}

    def numpy_type_of(type: Any) -> Any:
        if type.name not in numpy_types:
            numpy_types[type.name] = of_numpy(type)
        return numpy_types[type.name]

    make_other, others = block_type.with_element_ty, dict[tuple[str, str], Any]()

    def other_type_of(self: Any, element: Any) -> Any:
        key = self.name, element.name
        if key not in others:
            others[key] = make_other(self, element)
        return others[key]

    block_type.__init__, tensor.__init__, stock._get_np_dtype = type_of, tensor_of, numpy_type_of
    block_type.with_element_ty = other_type_of
    equal = tl.core.dtype.__eq__
    tl.core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)


def _remember_operands() -> None:
    """What an operator does to its operands (promotion, broadcasting) depends on their types, and on the value of a
    number. Two types that it leaves as they are, and the block that it makes of a number, are looked up the next time:
    no operation writes into a block."""
    semantic, tensor = stock.interpreter_semantic, tl.core.tensor
    check = semantic.binary_op_type_checking_impl
    unchanged: set[tuple[Any, ...]] = set()
    constants: dict[tuple[Any, ...], Any] = {}

    def checked(lhs: Any, rhs: Any, *flags: Any, **named: Any) -> Any:
        left, right = type(lhs) is tensor, type(rhs) is tensor
        if left and right:
            key = (lhs.type.name, rhs.type.name, flags, *named.items())
            if key in unchanged:
                return lhs, rhs
            found = check(lhs, rhs, *flags, **named)
            if found[0] is lhs and found[1] is rhs:
                unchanged.add(key)
            return found
        if left == right:
            return check(lhs, rhs, *flags, **named)
        block, number = (lhs, rhs) if left else (rhs, lhs)
        key = (left, block.type.name, type(number), number, flags, *named.items())
        constant = constants.get(key)
        if constant is None:
            found = check(lhs, rhs, *flags, **named)
            if found[0 if left else 1] is not block:
                return found
            if len(constants) >= MOST_CONSTANTS:
                constants.clear()
            constant = constants[key] = found[1 if left else 0]
        return (block, constant) if left else (constant, block)

    semantic.binary_op_type_checking_impl = checked


def _call_the_language_directly() -> None:
    """Stock wraps each function of the language twice, to pass on who interprets it and to ask whether that was
    passed."""

    def patched(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function = getattr(member, "__wrapped__", member)

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = stock.interpreter_semantic
            return function(*args, **kwargs)

        scope.set_attr(owner, name, call)

    unwrap, plain = tl.core._unwrap_if_constexpr, {tl.core.tensor, int, float, bool, type(None)}
    tl.core._unwrap_if_constexpr = lambda value: value if type(value) in plain else unwrap(value)
    stock._patch_attr = patched
