"""`replaced` and `items_replaced` against unittest.mock, which product code does without."""

from __future__ import annotations

import contextlib
import os
import sys
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

from common.replaced import items_replaced, replaced


class Base:
    inherited = 1

    @staticmethod
    def static(x: int) -> int:
        return x

    @classmethod
    def of_class(cls) -> type:
        return cls

    def method(self) -> Base:
        return self

    @property
    def size(self) -> int:
        return 3


class Slots:
    __slots__ = ("slot",)

    def __init__(self) -> None:
        self.slot = "before"


class Derived(Base):
    own = 2


def module() -> types.ModuleType:
    made = types.ModuleType("made")
    made.value = 5  # type: ignore[attr-defined]
    made.absent = None  # type: ignore[attr-defined]
    return made


def stored(owner: Any) -> dict[str, Any]:
    return {"slot": owner.slot} if isinstance(owner, Slots) else dict(vars(owner))


OWNERS: list[tuple[Callable[[], Any], str]] = [
    (lambda: Derived, "own"),
    (lambda: Derived, "inherited"),
    (lambda: Base, "static"),
    (lambda: Derived, "static"),
    (lambda: Base, "of_class"),
    (lambda: Derived, "of_class"),
    (lambda: Base, "method"),
    (lambda: Base, "size"),
    (Derived, "method"),
    (Derived, "own"),
    (Slots, "slot"),
    (module, "value"),
    (module, "absent"),
]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("make, name", OWNERS)
def test_inside_and_afterwards_all_is_as_with_mock(make: Callable[[], Any], name: str, fails: bool) -> None:
    """The very objects that were stored, and none where the attribute was inherited; also where an exception leaves,
    which it lets pass."""
    owner = make()
    before = stored(owner)
    seen = []
    for patch in (mock.patch.object(owner, name, "other"), replaced(owner, name, "other")):
        with pytest.raises(LookupError) if fails else contextlib.nullcontext(), patch:
            seen.append((getattr(owner, name), stored(owner)))
            if fails:
                raise LookupError
        after = stored(owner)
        assert after.keys() == before.keys() and all(after[key] is before[key] for key in before)
    assert seen[0] == seen[1] and seen[1][0] == "other"


def test_one_inside_another_gives_back_the_outer_one() -> None:
    owner = module()
    with replaced(owner, "value", "outer"):
        with replaced(owner, "value", "inner"):
            assert owner.value == "inner"
        assert owner.value == "outer"
    assert owner.value == 5
    with replaced(Derived, "inherited", 8), replaced(Base, "inherited", 9):
        assert (Derived.inherited, Base.inherited) == (8, 9)
    assert "inherited" not in vars(Derived) and Derived.inherited == 1


@pytest.mark.parametrize(
    "owner, of",
    [(Derived, rf"{__name__}\.Derived"), (Derived(), rf"{__name__}\.Derived"), (sys.modules[__name__], __name__)],
)
def test_what_is_not_there_is_not_replaced(owner: Any, of: str) -> None:
    message = rf"^{of} has no gone, which is to be replaced for a while \(docs/upgrading\.md\)$"
    with pytest.raises(AttributeError, match=message), replaced(owner, "gone", 1):
        raise AssertionError("not reached")
    assert not hasattr(owner, "gone")


@pytest.mark.parametrize("fails", [False, True])
def test_a_mapping_is_as_it_was_whatever_was_done_to_it_inside(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SWITCHALL_A", "SWITCHALL_B"):
        monkeypatch.setenv(name, "before")
    monkeypatch.delenv("SWITCHALL_C", raising=False)
    before, seen = dict(os.environ), []
    given = {"SWITCHALL_A": "inside", "SWITCHALL_C": "inside"}
    for patch in (mock.patch.dict(os.environ, given), items_replaced(os.environ, given)):
        with pytest.raises(LookupError) if fails else contextlib.nullcontext(), patch:
            seen.append(dict(os.environ))
            del os.environ["SWITCHALL_B"]
            os.environ["SWITCHALL_A"] = os.environ["SWITCHALL_D"] = "later"
            if fails:
                raise LookupError
        assert dict(os.environ) == before
    assert seen[0] == seen[1]


def test_no_variable_is_missing_for_a_moment_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """mock empties a mapping before it fills it again; other threads read the environment."""

    removed = list[str]()

    class Noted(dict[str, int]):
        def __delitem__(self, key: str) -> None:
            removed.append(key)
            super().__delitem__(key)

        def clear(self) -> None:
            raise AssertionError

    noted = Noted(a=1, b=2)
    with items_replaced(noted, {"b": 3, "c": 4}):
        assert noted == {"a": 1, "b": 3, "c": 4}
    assert noted == {"a": 1, "b": 2} and removed == ["c"]
