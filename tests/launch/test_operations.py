"""docs/operations.md against the code: every command parses, files and keys exist, exit codes are explained."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.config.loading import known_keys
from launch.slurm import preparation, training
from pretrain.cli import train as cli
from pretrain.config.keys import fields
from pretrain.report.exit_codes import MEANING
from pretrain.smoke import cli as smoke_cli

checkpoint_cli = pytest.importorskip("pretrain.cli.checkpoint")
ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "launch/pretrain.py": cli.build_parser,
    "launch/checkpoint.py": checkpoint_cli.build_parser,
    "launch/slurm/submit.py": training.build_parser,
    "launch/smoke.py": smoke_cli.build_parser,
    "launch/slurm/submit_data_prep.py": preparation.build_parser,
}


def commands() -> list[list[str]]:
    """Every `python launch/...` or `deepspeed launch/...` of an indented line or between backticks, continued lines
    joined."""
    joined = re.sub(r"\\\n\s+", "", TEXT)
    joined = re.sub(r"deepspeed (?:--num_gpus \d+ )?launch/", "python launch/", joined)
    found = re.findall(r"^\s{4,}(python launch/.*)$|`(python launch/[^`]*)`", joined, re.MULTILINE)
    return [
        shlex.split(line or inline, comments=True)[1:]
        for line, inline in found
        if not re.search(r"\.\.\.|--help", line or inline)
    ]


def test_every_command_exists() -> None:
    seen = set()
    for script, *arguments in commands():
        assert (ROOT / script).is_file(), script
        args = PARSERS[script]().parse_args(arguments)
        if hasattr(args, "config"):
            assert (ROOT / args.config).is_file(), args.config
        keys = set(known_keys()) if "data_prep" in script else {key for key, _, _ in fields()}
        for override in getattr(args, "overrides", []):
            assert override.partition("=")[0] in keys, override
        seen.add(script)
    assert seen == PARSERS.keys(), "the page shows each of them"


def test_every_option_key_file_and_target_exists() -> None:
    options = {option for build in PARSERS.values() for action in build()._actions for option in action.option_strings}
    sbatch = {"--signal", "--kill-on-bad-exit", "--gres", "--exclusive", "--mail-type"}
    deepspeed = {"--log_level"}
    for option in set(re.findall(r"`(--[a-z_-]+)", TEXT)):
        assert option in options | sbatch | deepspeed, option
    keys = {key for key, _, _ in fields()}
    sections = {key.partition(".")[0] for key in keys}
    for key in set(re.findall(r"`([a-z]+\.[a-z_]+)(?:=[a-z]+)?`", TEXT)):
        if key.partition(".")[0] in sections and key != "model.safetensors":
            assert key in keys, key
    for path in set(re.findall(r"`((?:launch|configs|tests)/[\w./-]+)`", TEXT)):
        assert (ROOT / path).is_file(), path
    for target in set(re.findall(r"(?:`|    )make ([a-z-]+)", TEXT)):
        assert f"\n{target}: " in (ROOT / "Makefile").read_text(), target


@pytest.mark.parametrize("code", sorted(MEANING))
def test_every_exit_code_is_in_the_table(code: int) -> None:
    rows = re.findall(r"^\| ([\d, +N]+) \|", TEXT, re.MULTILINE)
    assert str(int(code)) in {part.strip() for row in rows for part in row.split(",")}, code
