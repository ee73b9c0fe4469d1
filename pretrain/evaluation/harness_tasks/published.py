"""What the tasks of this folder read: the published files, by the same readers as launch/evaluate.py --tasks."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from pretrain.evaluation.tasks import TASKS, find_files


def lambada(path: str | None = None, **unused: Any) -> dict[str, Dataset]:
    """`path`: the file or folder; None: raw/lambada."""
    return _documents("lambada", path)


def blimp(path: str | None = None, **unused: Any) -> dict[str, Dataset]:
    """`path`: the folder; None: raw/blimp."""
    return _documents("blimp", path)


def cbt(path: str | None = None, **unused: Any) -> dict[str, Dataset]:
    """`path`: the folder; None: raw/cbt."""
    return _documents("cbt", path)


def _documents(name: str, path: str | None) -> dict[str, Dataset]:
    examples = TASKS[name].read(find_files(name, path)).examples
    rows = [{"context": one.context, "targets": list(one.targets), "group": one.group} for one in examples]
    return {"test": Dataset.from_list(rows)}
