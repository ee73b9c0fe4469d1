"""Attributes and items of what is not ours, another value for a while. Each use of it on a library is marked RELIES-ON
and explained in docs/upgrading.md."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, MutableMapping
from typing import Any, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, `owner` (a module, a class or an object) has `value` for its attribute `name`; afterwards it has what it
    had: its own attribute as it was stored, so that a staticmethod stays one, or none of its own where it inherited the
    attribute. Every thread of the process sees `value`. Raises AttributeError where there is nothing to replace."""
    if not hasattr(owner, name):
        module = "" if getattr(owner, "__module__", None) is None else f"{owner.__module__}."
        of = getattr(owner, "__qualname__", getattr(owner, "__name__", type(owner).__qualname__))
        raise AttributeError(f"{module}{of} has no {name}, which is to be replaced for a while (docs/upgrading.md)")
    own = getattr(owner, "__dict__", {})
    is_own = name in own
    before = own[name] if is_own else getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if not is_own:
            delattr(owner, name)
        if is_own or not hasattr(owner, name):  # not inherited: a slot
            setattr(owner, name, before)


@contextlib.contextmanager
def items_replaced(mapping: MutableMapping[Key, Value], items: dict[Key, Value]) -> Iterator[None]:
    """Inside, `mapping`, such as os.environ, has `items` too; afterwards it is as it was before, whatever was changed
    inside."""
    before = dict(mapping)
    mapping.update(items)
    try:
        yield
    finally:
        for key in mapping.keys() - before.keys():
            del mapping[key]
        mapping.update(before)
