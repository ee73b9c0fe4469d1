"""Files that cannot be read for a while."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Faults:
    """Lets calls for a file fail: those of Path.stat, Path.open and os.open whose path ends with `suffix`."""

    def __init__(self, suffix: str, number: int, times: int) -> None:
        self.suffix, self.number, self.left, self.met = suffix, number, times, 0

    def meet(self, path: Any) -> None:
        if self.left > 0 and str(path).endswith(self.suffix):
            self.left, self.met = self.left - 1, self.met + 1
            raise OSError(self.number, os.strerror(self.number), str(path))

    def install(self, patch: pytest.MonkeyPatch, *calls: str) -> None:
        for owner, name in ((Path, "stat"), (Path, "open"), (Path, "read_bytes"), (os, "open")):
            if f"{owner.__name__}.{name}" in calls:
                patch.setattr(owner, name, self._faulty(getattr(owner, name)))

    def _faulty(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(path: Any, *args: Any, **options: Any) -> Any:
            self.meet(path)
            return call(path, *args, **options)

        return faulty
