"""A preparation that dies again and again, each time a bit further on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import main


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the program catches it."""


def run_with_kills(arguments: list[str], *, files: int, kills: int) -> list[Path]:
    """Runs a preparation until it is done. Every finished file of its work folder is a step, and it dies in the one
    after `files` of them, `kills` times or more. -> the finished files in their order, also those of the data, whose
    putting in place has tests of its own in test_output_files.py."""
    real, finished, left = os.replace, list[Path](), 0

    def replace(source: Any, target: Any) -> None:
        nonlocal left
        if ".work" in Path(target).parts:
            if left == 0:
                raise Killed
            left -= 1
        real(source, target)
        finished.append(Path(target))

    died = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        while died < 200:
            left = files
            try:
                assert main(arguments) == 0
                break
            except Killed:
                died += 1
    assert kills <= died < 200
    return finished
