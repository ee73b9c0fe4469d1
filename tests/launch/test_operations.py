"""docs/operations.md and docs/planning.md against the code: options, files, keys and targets exist, exit codes are
explained. Their commands are parsed by tests/test_commands.py."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.json_config import keys
from launch.slurm import preparation, training
from pretrain.cli import plan as plan_cli
from pretrain.cli import status as status_cli
from pretrain.cli import train as cli
from pretrain.config.schema import Config
from pretrain.report.exit_codes import MEANING
from pretrain.smoke import cli as smoke_cli

checkpoint_cli = pytest.importorskip("pretrain.cli.checkpoint")
ROOT = Path(__file__).resolve().parents[2]
TEXT = "\n".join((ROOT / "docs" / page).read_text(encoding="utf-8") for page in ("operations.md", "planning.md"))
PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "launch/pretrain.py": cli.build_parser,
    "launch/plan.py": plan_cli.build_parser,
    "launch/checkpoint.py": checkpoint_cli.build_parser,
    "launch/slurm/submit.py": training.build_parser,
    "launch/status.py": status_cli.build_parser,
    "launch/smoke.py": smoke_cli.build_parser,
    "launch/slurm/submit_data_prep.py": preparation.build_parser,
}


def options_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Those of its subcommands too."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for subcommand in action.choices.values():
                yield from options_of(subcommand)


def test_every_option_key_file_and_target_exists() -> None:
    assert all(f" {script} " in TEXT for script in PARSERS), "the pages show each of them"
    options = {option for build in PARSERS.values() for option in options_of(build())}
    sbatch = {"--signal", "--kill-on-bad-exit", "--gres", "--exclusive", "--mail-type", "--constraint"}
    sbatch.add("--distribution")  # srun's
    deepspeed = {"--log_level"}
    for option in set(re.findall(r"`(--[a-z_-]+)", TEXT)):
        assert option in options | sbatch | deepspeed, option
    known = {key.dotted for key in keys(Config)}
    sections = {key.partition(".")[0] for key in known}
    known |= {".".join(key.split(".")[:2]) for key in known}  # sections of sections too
    for key in set(re.findall(r"`([a-z]+\.[a-z_]+)(?:=[a-z]+)?`", TEXT)):
        if key.partition(".")[0] in sections and key != "model.safetensors":
            assert key in known, key
    for path in set(re.findall(r"`((?:launch|configs|tests)/[\w./-]+)`", TEXT)):
        assert (ROOT / path).is_file(), path
    for target in set(re.findall(r"(?:`|    )make ([a-z-]+)", TEXT)):
        assert f"\n{target}: " in (ROOT / "Makefile").read_text(), target


def test_the_log_of_a_night_has_the_words_of_the_jobs_script() -> None:
    script = (ROOT / "launch" / "slurm" / "pretrain.sbatch").read_text(encoding="utf-8")
    lines = re.findall(r"(?m)^    20[-0-9]+ [0-9:]+ job 4711: (.+)$", TEXT)
    assert "exit code 137" in lines[1] and "; again on the same nodes, newest checkpoint: " in lines[1], lines[1]
    for words in (
        "a rank failed (exit code $code; 128 + N: signal N); again on the same nodes, newest checkpoint: $newest",
        "start $start: $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST, newest checkpoint: $first_checkpoint,",
        "stopped by a signal (exit code 85)",
        "; requeued, newest checkpoint: $newest",
        "finished",
    ):
        shown = re.sub(r"\\\$\w+", ".+", re.escape(words))
        assert words in script and any(re.search(shown, line) for line in lines), words


@pytest.mark.parametrize("code", sorted(MEANING))
def test_every_exit_code_is_in_the_table(code: int) -> None:
    rows = re.findall(r"^\| ([\d, +N]+) \|", TEXT, re.MULTILINE)
    assert str(int(code)) in {part.strip() for row in rows for part in row.split(",")}, code
