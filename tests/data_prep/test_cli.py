"""The command line as a user sees it: output, one-line errors, exit codes."""

import errno
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.json_config import keys
from common.paths import REPOSITORY
from common.splits import SplitName
from common.terminal import visible
from data_prep.cli import main
from data_prep.config.schema import DataConfig
from data_prep.report.stats import QUANTILES, RATIO_STEP, Lengths, pieces
from data_prep.shards.format import Manifest
from data_prep.stages.tokenizer import TextTokenizer
from tests.data_prep.conftest import Corpus


def test_show_prints_documents_of_both_splits(
    corpus: Corpus, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(prepared), "--split", "train", "--index", "3", "--count", "2"]) == 0
    out = capsys.readouterr().out
    assert "=== train document 3 of 186" in out
    assert corpus.train[3] in out
    assert corpus.train[4] in out
    config = corpus.write_config(prepared.parent / "config.json", output=str(prepared))
    assert main(["show", "--config", str(config), "--split", "validation"]) == 0
    assert visible(corpus.validation[0]) in capsys.readouterr().out


def test_show_lets_no_document_steer_the_terminal(
    corpus: Corpus, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(prepared), "--count", str(len(corpus.train))]) == 0
    out = capsys.readouterr().out
    assert all(visible(text) in out for text in corpus.train)
    assert "\\x00" in out and "\\r" in out and "\x00" not in out and "\r" not in out


def test_show_prints_documents_on_any_terminal(corpus: Corpus, prepared: Path) -> None:
    command = [sys.executable, "-m", "data_prep", "show", str(prepared), "--count", str(len(corpus.train))]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    shown = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, check=True).stdout
    assert corpus.train[0].encode("ascii", "backslashreplace") in shown and b"\\u4e2d" in shown


def test_stats_and_verify_print_tables(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", str(prepared)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == [
        "split",
        "shards",
        "documents",
        "tokens",
        "text",
        "bytes",
        "bytes/token",
    ]
    assert out.splitlines()[1].split()[:3:2] == ["train", "186"]
    assert "p50" in out
    assert main(["verify", str(prepared)]) == 0
    out = capsys.readouterr().out
    assert "train-00000.tar" in out
    assert "manifest digest" in out


def test_statistics_are_those_of_the_documents(
    corpus: Corpus, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.report.stats.READ_TOKENS", 999)  # documents go on in the next piece
    tokenizer = TextTokenizer.load(manifest.folder / "tokenizer.model")
    splits: dict[SplitName, list[str]] = {"train": corpus.train, "validation": corpus.validation}
    for split, texts in splits.items():
        tokens = np.array([len(tokenizer.encode(text)) for text in texts])
        lengths = Lengths.of(manifest, split)
        assert np.repeat(lengths.values, lengths.counts).tolist() == sorted(tokens.tolist())
        assert lengths.quantiles() == np.quantile(tokens, list(QUANTILES.values()), method="lower").tolist()
        assert lengths.mean == pytest.approx(tokens.mean())
        found = pieces(manifest, split, tokenizer.piece_bytes(), tokenizer.prefix_bytes())
        size = np.array([len(text.encode()) for text in texts])
        assert found.text_bytes == size.sum() == manifest.totals[split].text_bytes
        bins = np.bincount((size / tokens / RATIO_STEP).astype(np.int64), minlength=len(found.ratios))
        assert found.ratios.tolist() == bins.tolist()
        assert found.counts.sum() == tokens.sum() + len(texts)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["show", "{data}", "--index", "186"], "no document 186: the split has 186"),
        (["show", "{data}", "--index", "-1"], "argument --index: expected"),
        (
            ["show", "{data}", "--count", "0"],
            "argument --count: expected a whole number of at least 1, not '0'",
        ),
        (["show", "{data}", "--split", "valid"], "argument --split: invalid choice"),
        (["show", "{data}", "--split", "test"], "has no split 'test'; it has train, validation"),
        (["verify"], "verify needs either the FOLDER of prepared data or --config CONFIG"),
        (["stats", "nowhere"], "no prepared data"),
        (["run"], "the following arguments are required: --config"),
        (["run", "--config", "nowhere.json"], "--config: there is no file nowhere.json"),
        (["bake"], "invalid choice: 'bake'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_mistakes_are_one_line_and_exit_with_2(
    prepared: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    try:
        code = main([argument.format(data=prepared) for argument in arguments])
    except SystemExit as stop:
        code = int(str(stop.code))
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    "line, said",
    [
        (["verify", "FOLDER"], "interrupted\n"),
        (["run", "--config", "configs/data/sample.json"], "interrupted; the same command goes on where it was\n"),
    ],
)
def test_ctrl_c_promises_to_go_on_only_where_that_is_so(
    prepared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: list[str], said: str
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("data_prep.cli.show.verify", interrupt)
    monkeypatch.setattr("data_prep.cli.resolve", interrupt)
    monkeypatch.chdir(REPOSITORY)
    assert main([str(prepared) if word == "FOLDER" else word for word in line]) == 130
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    "number, code",
    [
        *((number, 1) for number in (errno.ENOMEM, errno.EMFILE, errno.ENOLCK, errno.ENOSPC, errno.EIO)),
        *((number, 2) for number in (errno.EACCES, errno.EISDIR)),
    ],
)
def test_a_task_that_may_go_better_elsewhere_is_started_again(
    prepared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    """Exit code 1, as of a node on which others have all the memory; 2 is not repeated."""

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("data_prep.cli.show.verify", fail)
    assert main(["verify", str(prepared)]) == code
    assert os.strerror(number) in capsys.readouterr().err


def test_help_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["run", "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(key.dotted in out for key in keys(DataConfig))
    assert "tokenizer.vocab_size = 8000" in out
    assert "input = (required)" in out


def test_verify_fails_on_a_damaged_shard(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = prepared / "train-00000.tar"
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    for command in ("verify", "show"):
        assert main([command, str(prepared)]) == 2
        assert "train-00000.tar does not match the manifest: expected sha256" in capsys.readouterr().err


def test_the_module_runs_from_a_shell_and_a_closed_pipe_is_no_error(prepared: Path) -> None:
    show = f"{shlex.quote(sys.executable)} -m data_prep show {prepared} --count 150 | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", show], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("=== train document 0 of 186")


STDOUT = {
    "full": (
        ">/dev/full",
        "warning: stdout cannot be written (No space left on device); the command goes on without it\n",
    ),
    "closed": (">&-", ""),
    "no reader": ("| true; exit ${PIPESTATUS[0]}", ""),
}


@pytest.mark.parametrize(
    "name, unbuffered",
    [
        ("full", "1"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("full", ""), ("no reader", ""), ("no reader", "1"), ("closed", ""), ("closed", "1"))
        ),
    ],
)
def test_data_are_made_whatever_becomes_of_stdout(tmp_path: Path, name: str, unbuffered: str) -> None:
    """`reading 1 raw files` is printed before a file is read, the tables after the last is written."""
    stdout, said = STDOUT[name]
    for name in "ab":
        lines = [f'{{"text": "document {name} {number}"}}\n' for number in range(50)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    out = tmp_path / "out"
    config = {"input": f"{tmp_path}/*.jsonl", "output": str(out), "workers": 1, "max_input_files": 1}
    (tmp_path / "c.json").write_text(json.dumps({**config, "tokenizer": {"vocab_size": 280}}))
    command = f"{shlex.quote(sys.executable)} -m data_prep run --config {tmp_path}/c.json {stdout}"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    result = subprocess.run(
        ["bash", "-c", command], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert Manifest.load(out).provenance.inputs
    lines = [line for line in result.stderr.splitlines(keepends=True) if "stdout" in line or "Error" in line]
    assert "".join(lines) == said
