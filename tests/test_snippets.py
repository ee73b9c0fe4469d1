"""What pages show of Python and of settings: each program runs, on a small run where it asks for one, and each setting
is one that the real configuration takes. tests/test_commands.py holds the commands.

The programs of a page run one after the other, as a reader types them: later ones see what earlier ones defined.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from data_prep.config.loading import load_config as load_data_config
from data_prep.config.schema import DataConfig
from pretrain.cli.checkpoint import main as checkpoint
from pretrain.cli.export import main as export
from pretrain.config.loading import load_config
from pretrain.config.schema import Config
from tests.golden.config_keys import keys
from tests.harness import run_ranks
from tests.pretrain.runs import small_config, train_runs
from tests.test_commands import PAGES, ROOT

TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = {
    name: [block for language, block in FENCED.findall(text) if language == "python"] for name, text in TEXTS.items()
}
PROGRAMS = {name: own for name, blocks in BLOCKS.items() if (own := [x for x in blocks if "transformers" not in x])}
"""Page -> its programs, without those of the next."""
IN_TRANSFORMERS = list(dict.fromkeys(x for blocks in BLOCKS.values() for x in blocks if "transformers" in x))
"""Of all pages, each once."""
LANGUAGES = {"python", "bash", "text"}
"""Of fenced blocks: run here, parsed by tests/test_commands.py, and what a program prints."""
MLFLOW = ("log_metrics", "log_text", "log_image", "log_params", "set_experiment", "start_run", "end_run")


@pytest.fixture(scope="module")
def folder(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a page's program opens: runs/mine, and weights that were converted from it."""
    folder = tmp_path_factory.mktemp("snippets")
    keys = ("train.steps=1", "evaluate.sequences=0", "model.sequence_length=64", "monitor.tensorboard=true")
    config = small_config(prepared, *keys)
    run_ranks(train_runs, 1, [(config, folder / "runs" / "mine")])
    assert checkpoint(["convert", str(folder / "runs" / "mine"), str(folder / "weights")]) == 0
    return folder


@pytest.mark.parametrize("page", sorted(PROGRAMS))
def test_the_programs_of_a_page_run(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = types.ModuleType("mlflow")  # no dependency of this project
    for name in MLFLOW:
        setattr(mlflow, name, lambda *args, **options: None)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    for number, program in enumerate(PROGRAMS[page]):
        exec(compile(program, f"{page}, program {number}", "exec"), names)


@pytest.mark.slow  # the import takes seconds; pretrain/export/test_modeling.py tests what is called
@pytest.mark.parametrize("program", IN_TRANSFORMERS, ids=range(len(IN_TRANSFORMERS)))
def test_the_programs_for_transformers_run(program: str, folder: Path) -> None:
    """Each in a process of its own, which keeps the code of the exported folder where it is told."""
    assert export([str(folder / "runs" / "mine"), "--to", str(folder / "my-model")]) == 0
    settings = {"HF_HOME": str(folder / "hub"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "The river" in done.stdout


def test_every_fenced_block_is_of_a_known_kind() -> None:
    """A block of another language, JSON for instance, would be looked at by no test."""
    fences = [(name, line) for name, text in TEXTS.items() for line in re.findall(r"(?m)^ *```.*$", text)]
    opening = fences[::2]
    assert {line for _, line in fences[1::2]} == {"```"}
    assert [(name, line) for name, line in opening if line.removeprefix("```") not in LANGUAGES] == []


SECTIONS = {name for program in (Config, DataConfig) for name in program.model_fields}
KNOWN = {re.sub(r"\(\w+\)", "", line.split()[1].rstrip(":")) for line in keys()}
"""Dotted keys of both programs."""
OTHERS = {"model.safetensors", "train.jsonl", "model.push_to_hub", "tokenizer.push_to_hub"}
"""Files and methods that look like a key."""
NAMED = [
    (name, inline.removeprefix("--set ").strip("'"))
    for name, text in TEXTS.items()
    if name != "CHANGELOG.md"  # it names keys that are gone
    for inline in re.findall(r"`([^`\n]+)`", FENCED.sub("", text))
    if inline not in OTHERS
]
"""What stands between backticks."""
KEYS = {(name, key) for name, inline in NAMED for key in re.findall(r"^((?:[a-z_]+\.)+[a-z_]+)(?:$|=)", inline)}
SETTINGS = {(name, inline) for name, inline in NAMED if re.match(r"[a-z_]+\.[a-z_.]+=", inline) and "..." not in inline}
BASES = ("switchall_tiny", "switchall_1b", "paper/c4_dense_47m", "paper/wt103_moa_2heads_47m", "data/own", "data/c4")
BESIDE = {"evaluate.ema=true": ["train.ema_decay=0.999"]}
"""Setting -> those that it needs."""


def takes(base: str, settings: list[str]) -> bool:
    load: Callable[[Path, list[str]], Any] = load_data_config if base.startswith("data/") else load_config
    try:
        load(ROOT / "configs" / f"{base}.json", settings)
    except ConfigError:
        return False
    return True


def test_every_key_that_a_page_names_exists() -> None:
    keys_of_pages = {
        (name, key) for name, key in KEYS if key.split(".")[0] in SECTIONS - {"deepspeed"} and not key.endswith(".py")
    }
    assert len(keys_of_pages) > 100
    assert sorted((name, key) for name, key in keys_of_pages if key not in KNOWN) == []


def test_every_setting_that_a_page_names_is_taken() -> None:
    """By one of the shipped configurations at least: a rule may forbid it beside other keys of the rest."""
    assert len(SETTINGS) > 30
    refused = []
    for name, inline in sorted(SETTINGS):
        settings = re.split(r" (?=[a-z_]+\.)", inline) + BESIDE.get(inline, [])  # a page may join two by a blank
        if not any(takes(base, settings) for base in BASES):
            refused.append((name, inline))
    assert refused == []
