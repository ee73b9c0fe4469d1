"""Every command that a page shows can be given: the real parser of its program takes it, and the files, targets and
configuration keys that it names exist.

A command stands in an indented block, a fenced one or between backticks. HOW says what is done with each program; a
program that it does not know is a failure: any line of a fenced shell block, and in an indented block what this machine
could run.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest

import data_prep.cli
import launch.doctor
import launch.slurm.preparation
import launch.slurm.training
import launch.sweeps.command
import launch.webhook
import pretrain.cli.alert
import pretrain.cli.analyze
import pretrain.cli.checkpoint
import pretrain.cli.compare
import pretrain.cli.evaluate
import pretrain.cli.export
import pretrain.cli.generate
import pretrain.cli.import_weights
import pretrain.cli.plan
import pretrain.cli.status
import pretrain.cli.train
import pretrain.smoke.cli
from data_prep.config.loading import load_config as load_data_config
from launch.sweeps.plan import values_of
from pretrain.config.loading import load_config
from pretrain.report.run_paths import SAVED_CONFIG

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    page
    for page in (
        *ROOT.glob("*.md"),
        *(page for room in ("docs", "configs", "data_prep", "tests") for page in (ROOT / room).rglob("*.md")),
    )
)
SCRIPTS: dict[str, Callable[..., Any]] = {
    "launch/pretrain.py": pretrain.cli.train.main,
    "launch/alert.py": pretrain.cli.alert.main,
    "launch/analyze.py": pretrain.cli.analyze.main,
    "launch/evaluate.py": pretrain.cli.evaluate.main,
    "launch/checkpoint.py": pretrain.cli.checkpoint.main,
    "launch/export.py": pretrain.cli.export.main,
    "launch/import_weights.py": pretrain.cli.import_weights.main,
    "launch/plan.py": pretrain.cli.plan.main,
    "launch/smoke.py": pretrain.smoke.cli.main,
    "launch/status.py": pretrain.cli.status.main,
    "launch/compare.py": pretrain.cli.compare.main,
    "launch/generate.py": pretrain.cli.generate.main,
    "launch/doctor.py": launch.doctor.main,
    "launch/webhook.py": launch.webhook.main,
    "launch/sweep.py": launch.sweeps.command.main,
    "launch/slurm/submit.py": launch.slurm.training.main,
    "launch/slurm/submit_data_prep.py": launch.slurm.preparation.main,
}
HOW = {
    "python": "parsed: by the program's own parser, stopped before it acts",
    "python3": "parsed: as python",
    "deepspeed": "parsed: what follows the launcher's own options, as python",
    "make": "parsed: the Makefile has the target",
    "pip": "skipped: tests/test_real_install.py runs what the Makefile installs",
    "source": "skipped: the shell's own",
    "export": "skipped: the shell's own",
    "for": "skipped: the shell's own",
    "cp": "skipped: the shell's own",
    "test": "skipped: the shell's own",
    "rm": "skipped: the shell's own",
    "mkdir": "skipped: fetches packages of Debian",
    "lm_eval": "skipped: another project's program",
    "tensorboard": "skipped: another project's program",
    "scontrol": "skipped: SLURM's; tests/slurm runs it",
    "scancel": "skipped: SLURM's; tests/slurm runs it",
    "sbatch": "skipped: SLURM's; tests/slurm runs it",
    "apptainer": "skipped: another project's program",
    "srun": "skipped: SLURM's; tests/slurm runs it",
}
"""Program -> what this test does with a command of it."""


def spoken(page: Path) -> Iterator[str]:
    """Every command of a page, continued lines joined, without comments."""
    text = re.sub(r"\\\n\s+", "", page.read_text(encoding="utf-8"))
    fenced = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
    for language, block in fenced.findall(text):
        if language in ("sh", "bash", "shell", "console"):
            yield from (line.removeprefix("$ ") for line in block.splitlines() if line.strip())
    text = fenced.sub("", text)
    for block in re.findall(r"(?:^ {4,}\S.*\n?)+", text, re.MULTILINE):
        lines = [line.strip() for line in block.splitlines()]
        if program(lines[0]) in HOW or shutil.which(program(lines[0])):
            yield from lines
    for inline in re.findall(r"`([^`\n]+)`", text):
        if program(inline) in HOW and " " in inline.strip():
            yield inline


def words_of(command: str) -> list[str]:
    """Without variables that are set for it, and up to the first && or pipe."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    for end in ("&&", "|", ";"):
        words = words[: words.index(end)] if end in words else words
    return words


def program(command: str) -> str:
    try:
        words = words_of(command)
    except ValueError:  # a quote that stands alone: prose
        return ""
    return words[0] if words else ""


COMMANDS = [(page.relative_to(ROOT).as_posix(), command) for page in PAGES for command in spoken(page)]


def test_the_pages_show_every_entry_point() -> None:
    shown = {word for _, command in COMMANDS for word in words_of(command)}
    assert set(SCRIPTS) - {"launch/doctor.py"} <= shown  # `make doctor` runs that one
    assert len(COMMANDS) > 60 and {page for page, _ in COMMANDS} >= {"README.md", "docs/data.md", "docs/checkpoints.md"}


def test_what_commands_of_the_pages_write_is_no_change_of_the_clone() -> None:
    """Folders with names of the pages' own, which `git status` would show to who tries them."""
    written = {re.search(r" (?:--to|--out|convert \S+) ([a-z][a-z0-9-]*)(?: |$)", command) for _, command in COMMANDS}
    saved = {name for page in PAGES for name in re.findall(r'\.save\("([a-z0-9-]+)"', page.read_text(encoding="utf-8"))}
    names = {found[1] for found in written if found} | saved | {"evaluation"}  # the last is beside an export
    assert {"my-model", "imported", "mean", "fine-tuned", "weights", "early", "tuned"} <= names
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert [name for name in sorted(names) if f"/{name}/" not in ignored] == []


class Parsed(Exception):
    """Thrown by the parser in place of its result, so that the program does nothing."""


@pytest.mark.parametrize("page, command", sorted(set(COMMANDS)))
def test_command(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, *words = words_of(command)
    assert name in HOW, f"{page}: {command}"
    if HOW[name].startswith("skipped"):
        return
    if name == "make":
        targets = re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"))
        assert {word for word in words if "=" not in word and not word.startswith("-")} <= set(targets)
        return
    if name == "deepspeed":
        words = words[next((i for i, word in enumerate(words) if word.startswith("launch/")), len(words)) :]
        if not words:
            return  # options of the launcher alone
    parse(words, monkeypatch)


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`words`: a script or `-m module`, and its arguments."""
    if words[0] == "-m":
        _, module, *arguments = words
        ours = (ROOT / module.partition(".")[0]).is_dir()
        # Of others only the path is asked: on Python 3.11 setuptools gives up its own distutils, for the whole process,
        # where a finder of sys.meta_path is asked for pip, and then it cannot be imported any more.
        find: Callable[[str], Any] = importlib.util.find_spec if ours else PathFinder.find_spec
        assert find(module if ours else module.partition(".")[0]) is not None, module
        if module == "pytest":
            assert all((ROOT / word).exists() for word in arguments if word.startswith("tests/"))
        if not module.startswith(("data_prep", "benchmarks.")):
            return
        if not arguments or "..." in arguments or "--help" in arguments:
            return  # the page leaves the rest to the reader
        if (ROOT / module.replace(".", "/")).is_dir():
            module += ".__main__"
        main = data_prep.cli.main if module == "data_prep.__main__" else importlib.import_module(module).main
    else:
        script, *arguments = words
        monkeypatch.syspath_prepend((ROOT / script).parent)  # as Python does
        main = SCRIPTS[script] if script in SCRIPTS else runpy.run_path(str(ROOT / script))["main"]
    if not arguments or "..." in arguments or "--help" in arguments:
        return
    parsed: list[argparse.Namespace] = []
    parse_args = argparse.ArgumentParser.parse_args

    def stop_after(parser: argparse.ArgumentParser, *given: Any) -> None:
        parsed.append(parse_args(parser, *given))
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after)
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    with pytest.raises(Parsed):
        main(arguments) if main.__code__.co_argcount else main()
    check_config(parsed[0])


def options_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Those of its subcommands too."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subcommand in action.choices.values():
                yield from options_of(subcommand)
        elif action.option_strings:
            yield action


def parser_of(program: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The one that the program itself makes."""
    if program.startswith("benchmarks."):
        file = program if (ROOT / f"{program.replace('.', '/')}.py").is_file() else f"{program}.__main__"
        main = importlib.import_module(file).main
    else:
        main = SCRIPTS.get(program, data_prep.cli.main)
    parsers: list[argparse.ArgumentParser] = []

    def stop(parser: argparse.ArgumentParser, *given: Any) -> None:
        parsers.append(parser)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Parsed):
        main([]) if main.__code__.co_argcount else main()
    return parsers[0]


def modules() -> set[str]:
    """The benchmarks that pages show."""
    return {words[2] for _, command in COMMANDS if (words := words_of(command))[1:2] == ["-m"] and "bench" in words[2]}


@pytest.mark.parametrize("program", [*SCRIPTS, "data_prep", *sorted(modules())])
def test_help_names_the_command_and_every_default(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = parser_of(program, monkeypatch)
    assert parser.prog.endswith(program)
    silent = {
        action.option_strings[0]
        for action in options_of(parser)
        if action.default not in (None, False, "", [])
        and action.help != argparse.SUPPRESS
        and action.default != argparse.SUPPRESS
        and "default" not in (action.help or "")
    }
    assert silent == set()


OPTION_OF = re.compile(r"(launch/(?:slurm/)?\w+\.py|plan\.py|submit\.py) (?:[a-z]\w+ )?(--[a-z][a-z-]+)")
"""A program of ours and the option that follows it, in a message, a docstring or a page."""


def test_options_that_messages_and_pages_name_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    shorts = {"plan.py": "launch/plan.py", "submit.py": "launch/slurm/submit.py"}
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    for room in ("launch", "pretrain", "data_prep", "common", "model"):
        for path in (ROOT / room).rglob("*.py"):
            texts.append(re.sub(r'"\n\s*f?"', "", path.read_text(encoding="utf-8")))
    named = {(shorts.get(found[1], found[1]), found[2]) for text in texts for found in OPTION_OF.finditer(text)}
    assert {("launch/sweep.py", "--submit"), ("launch/slurm/submit.py", "--smoke")} <= named
    known = {
        program: {name for action in options_of(parser_of(program, monkeypatch)) for name in action.option_strings}
        for program in {program for program, _ in named}
    }
    assert {(program, option) for program, option in named if option not in known[program]} == set()


def test_a_command_of_pip_asks_no_finder_that_setuptools_put_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Finder:
        @staticmethod
        def find_spec(name: str, *others: Any) -> None:
            asked.append(name)

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    monkeypatch.delitem(sys.modules, "pip", raising=False)
    parse(["-m", "pip", "install", "x"], monkeypatch)
    assert asked == []


def check_config(args: argparse.Namespace) -> None:
    """The configuration exists and takes the overrides; of a sweep each one, and the first of the varied values."""
    given, overrides = getattr(args, "config", None), list(getattr(args, "overrides", []))
    for text in getattr(args, "vary", []):
        key, _, listed = text.partition("=")
        overrides.append(f"{key}={values_of(listed)[0]}")
    for path in given if isinstance(given, list) else [given]:
        if path is None or str(path) == "CONFIG":
            continue
        if Path(path).name == SAVED_CONFIG:  # of a run folder that a reader has
            path = "configs/switchall_tiny.json"
        loads = load_data_config if "configs/data" in str(path) else load_config
        loads(ROOT / path, overrides)
