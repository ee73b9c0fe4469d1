"""docs/planning.md shows what plan.py prints: `fit` for GPUs that hold the model and that do not, and `search`.

Slow, for a rehearsal of a billion parameters takes seconds. The times of `fit` on 64 GPUs, which stand on other pages
too, have a fast test in test_step_time.py, the sums of its memory one in test_memory.py.
"""

from __future__ import annotations

import re
import shlex

import pytest

from common.paths import REPOSITORY
from pretrain.cli.plan import main

TEXT = (REPOSITORY / "docs" / "planning.md").read_text(encoding="utf-8")
CONTINUED = re.compile(r"\n {8,17}(?=\S)")
"""Where the page breaks a line; heads of tables stand farther to the right."""


def words(text: str) -> str:
    return " ".join(text.split())


def shown(first: str) -> list[str]:
    """Lines of the page's indented text that begins with `first`, whole and without their alignment."""
    whole = CONTINUED.sub(" ", TEXT)
    block = whole[whole.index(f"\n    {first}") + 1 :]
    lines = re.match(r"(?:(?: {4}.*)?\n)+", block)
    assert lines is not None
    return [words(line) for line in lines[0].splitlines() if line.strip()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, blocks",
    [
        (
            "fit configs/switchall_1b.json --gpus 64 --gpu h100-80gb",
            ["configs/switchall_1b.json on 64", "communication of a rank"],
        ),
        (
            "fit configs/switchall_1b.json --gpus 8 --gpu rtx-4090 --gpus-per-node 8 --set batch.micro_sequences=16",
            ["verdict:    does not fit"],
        ),
        ("search configs/switchall_1b.json --gpus 64 --gpu h100-80gb", ["9,360 layouts"]),
    ],
    ids=["fit", "fit of what is too large", "search"],
)
def test_the_page_shows_what_is_printed(
    command: str, blocks: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    page = words(TEXT)
    assert command in page or command.partition(" --gpus ")[2] in page
    assert main(shlex.split(command)) == 0
    printed = {words(line) for line in capsys.readouterr().out.splitlines()}
    for first in blocks:
        lines = shown(first)
        assert len(lines) > 1 and [line for line in lines if line not in printed] == [], sorted(printed)
