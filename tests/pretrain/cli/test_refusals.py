"""How commands that read and print end: one line on stderr, whatever ended them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.paths import REPOSITORY
from pretrain.cli.refusals import exit_code_of

STATUS = str(REPOSITORY / "launch" / "status.py")


@pytest.mark.parametrize(
    "ending, code, said",
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            2,
            "error: stdout cannot be written: No space left on device\n",
        ),
        (OSError(errno.EIO, "Input/output error", "/a/b"), 2, "error: /a/b: Input/output error\n"),
    ],
)
def test_a_command_that_cannot_go_on_ends_in_one_line(
    ending: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise ending

    assert exit_code_of(command) == code
    assert capsys.readouterr().err == said


def test_a_closed_or_full_stdout_and_letters_that_it_lacks_end_no_command_in_a_traceback(tmp_path: Path) -> None:
    run = tmp_path / "café"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')

    def ended(redirection: str, **environment: str) -> tuple[int, str, str]:
        line = ["sh", "-c", f'exec "$0" "$@" {redirection}', sys.executable, STATUS, str(run)]
        done = subprocess.run(line, capture_output=True, text=True, check=False, env=os.environ | environment)
        return done.returncode, done.stdout, done.stderr

    for redirection in (">&-", "2>&-", "<&- >&- 2>&-"):
        code, _, said = ended(redirection)
        assert (code, said) == (0, ""), redirection
    assert ended("> /dev/full") == (2, "", "error: stdout cannot be written: No space left on device\n")
    code, printed, said = ended("", PYTHONIOENCODING="ascii")
    assert (code, said) == (0, "") and "caf\\xe9" in printed
