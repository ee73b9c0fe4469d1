"""How commands that read and print end: one line on stderr, whatever ended them."""

from __future__ import annotations

import errno

import pytest

from pretrain.cli.refusals import exit_code_of


@pytest.mark.parametrize(
    "ending, code, said",
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device\n"),
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
