"""Types of arguments: what they take, and what they refuse in words."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.arguments import Parser, a_path, above_zero, at_least, not_empty, quoted


def parser(**settings: Any) -> Parser:
    found = Parser(prog="launch/it.py", **settings)
    found.add_argument("run")
    found.add_argument("--tasks", action="append")
    one = found.add_mutually_exclusive_group(required=True)
    one.add_argument("--prompt")
    one.add_argument("--prompts")
    return found


@pytest.mark.parametrize(
    "given, words",
    [
        (["--promt", "hi"], "there is no option --promt; did you mean --prompt?"),  # not: --prompt is required
        (["--promts=hi"], "there is no option --promts; did you mean --prompts?"),
        (["--prompt", "--hello"], "there is no option --hello"),
        (["x", "--prompt", "a", "y"], "unrecognized arguments: y"),
        (["x"], "one of the arguments --prompt --prompts is required"),
        (["x", "--prompt"], "argument --prompt: expected one argument"),
    ],
)
def test_a_mistake_is_one_line(given: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parser().parse_args(given)
    assert raised.value.code == 2
    assert capsys.readouterr().err == f"error: {words} (see launch/it.py --help)\n"


def test_a_mistake_in_a_command_of_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    program = Parser(prog="launch/it.py")
    command = program.add_subparsers(dest="command", required=True).add_parser("fit")
    command.add_argument("--gpus", required=True)
    for given, words in (
        (["fit", "--gpuz", "8"], "there is no option --gpuz; did you mean --gpus? (see launch/it.py fit --help)"),
        ([], "the following arguments are required: command (see launch/it.py --help)"),
    ):
        with pytest.raises(SystemExit):
            program.parse_args(given)
        assert capsys.readouterr().err == f"error: {words}\n"
    assert program.parse_args(["fit", "--gpus", "8"]).gpus == "8"


def test_what_is_no_option_is_read_as_argparse_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert parser().parse_args(["x", "--prompt", "--a text, with blanks"]).prompt == "--a text, with blanks"
    assert parser().parse_args(["--prompt", "a", "--", "--run"]).run == "--run"
    assert parser().parse_args(["x", "--prompt", "a", "--task", "b"]).tasks == ["b"]  # a beginning is enough
    with pytest.raises(SystemExit):
        parser(allow_abbrev=False).parse_args(["x", "--prompt", "a", "--task", "b"])
    assert "there is no option --task; did you mean --tasks?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as raised:
        parser().parse_args(["--promt", "a", "--help"])
    assert raised.value.code == 0


@pytest.mark.parametrize(
    "kind, text, value",
    [
        (a_path, "runs/a b", Path("runs/a b")),
        (a_path, ".", Path(".")),
        (not_empty, "https://host/data", "https://host/data"),
        (at_least(2), "2", 2),
        (above_zero(), "1e-3", 0.001),
        (above_zero(10), "10", 10.0),
    ],
)
def test_what_is_taken(kind: Callable[[str], Any], text: str, value: Any) -> None:
    assert kind(text) == value


@pytest.mark.parametrize(
    "kind, text",
    [
        *[(kind, text) for kind in (a_path, not_empty) for text in ("", "  ")],
        *[(at_least(2), text) for text in ("1", "-3", "2.5", "", "two")],
        *[(above_zero(10), text) for text in ("0", "-1", "nan", "inf", "1e300", "10.1", "", "ten")],
        (above_zero(), "inf"),
        *[(kind, "9" * 5000) for kind in (at_least(2), above_zero())],  # Python's int raises above 4,300 digits
    ],
)
def test_what_is_refused(kind: Callable[[str], Any], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"is empty; |expected a ") as refused:
        kind(text)
    assert len(str(refused.value)) < 200


def test_what_a_user_wrote_is_quoted_by_its_beginning() -> None:
    assert quoted("5 apples") == "'5 apples'"
    assert quoted("9" * 5000, most=3) == "'999'... (5,000 characters)"
