"""What commands refuse of their arguments before a model is read, and what they take them for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import UserError
from pretrain.cli import compare, evaluate, export, status
from pretrain.cli.export import size_of

FEW = ["run", "--to", "out"]


@pytest.mark.parametrize(
    "main, arguments, words",
    [
        (evaluate.main, ["run", "--tasks", "lambada,lambada"], "--tasks: names lambada twice; name it once"),
        (evaluate.main, ["run", "--tasks", "lambada="], "--tasks: 'lambada=' is none of validation, lambada, blimp,"),
        (export.main, [*FEW, "--license", "Apache 2"], "--license: 'Apache 2' is no licence that the hub knows"),
        (export.main, [*FEW, "--max-shard-size", "0"], "--max-shard-size: '0' is no size; give e.g. 5GB, 500MB or"),
        (export.main, [*FEW, "--max-shard-size", "5 GB"], "--max-shard-size: '5 GB' is no size; give e.g. 5GB"),
        (compare.main, ["run", "--tolerance", "nan"], "--tolerance: is nan; it must be 0 or more"),
    ],
)
def test_an_argument_is_refused_in_a_sentence(
    main: Callable[[list[str]], int],
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {words}") and said.count("\n") == 1, said
    assert not os.listdir(tmp_path)


def test_the_harness_is_no_task_of_several_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert evaluate.main(["run", "--harness", "arc_easy"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: --harness: computes in one process; start it with python, without"
    )


def test_what_is_evaluated_where_nothing_is_said() -> None:
    assert evaluate.wanted_tasks(None, default=True) == {"validation": None}
    assert evaluate.wanted_tasks(None, default=False) == {}
    assert evaluate.wanted_tasks("lambada=a=b, cbt", default=True) == {"lambada": "a=b", "cbt": None}


def test_sizes_are_powers_of_ten() -> None:
    """As transformers counts them."""
    assert [size_of(text) for text in ("5GB", "500MB", "7")] == [5_000_000_000, 500_000_000, 7]
    with pytest.raises(UserError):
        size_of("5TB")


def test_of_several_folders_without_a_run_none_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(tmp_path / name) for name in ("a", "b")]
    for folder in folders:
        os.mkdir(folder)
    assert status.main(folders) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and said[-1] == "error: RUN: none of these is a run folder"
