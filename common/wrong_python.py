"""What to tell somebody who starts a command with a Python that cannot run it: one that is too old, or one that lacks
the packages, because the environment is not active. Any Python from 3.8 on can read this file."""

from __future__ import annotations

import importlib.util
import platform
import sys
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ((3, 11), (3, 15))
"""The oldest, and the first that is too new (pyproject.toml, requires-python)."""


def why_it_failed(error: BaseException, trace: TracebackType | None) -> str | None:
    """One sentence with the fix, where this Python is the reason for an error that nobody handled; else None."""
    if sys.version_info[:2] < PYTHONS[0]:
        return f"Python 3.11 to 3.14 is needed, and {sys.executable} is {platform.python_version()}; {_fix()}"
    package = _absent_package(error, trace)
    return None if package is None else f"{package} is not installed for {sys.executable}; {_fix()}"


def _absent_package(error: BaseException, trace: TracebackType | None) -> str | None:
    """The package that a file of the project imports and this Python has not. What a library misses is that library's
    own affair, and a file of ours that is missing is a fault."""
    name = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or not name or (ROOT / name).exists() or trace is None:
        return None
    while trace.tb_next is not None:
        trace = trace.tb_next
    by_us = Path(trace.tb_frame.f_code.co_filename).resolve()
    is_ours = by_us.is_relative_to(ROOT) and not by_us.is_relative_to(ROOT / ".venv")
    return name if is_ours and importlib.util.find_spec(name) is None else None


def _fix() -> str:
    venv = ROOT / ".venv"
    if not (venv / "bin" / "python").exists():
        return f"`make install` in {ROOT} makes .venv with all that is needed, `source .venv/bin/activate` takes it"
    if Path(sys.prefix).resolve() == venv.resolve():
        return f"`make -B install` in {ROOT} installs what is missing"
    return f"`source '{venv}/bin/activate'` first"
