"""`plan.py check`: mistakes that are planted in a set-up without any are all found in one call, each with its key and
the fix."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from gzip import BadGzipFile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from common.errors import UserError
from pretrain.cli.plan import main
from pretrain.cli.plan_check import summary
from pretrain.cli.train import main as train_main
from pretrain.config.loading import load_config, to_json
from pretrain.planning.record import Rehearsal
from pretrain.preflight.checklist import Blocked, Checklist, Outcome
from pretrain.report.disk_space import checkpoint_space
from tests.corpus import with_another_tokenizer
from tests.harness import run_ranks
from tests.pretrain.runs import light_config, small_config, train_runs

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def place(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a configuration, and a copy of its data."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(prepared, tmp_path / "data")
    tree = to_json(
        small_config(tmp_path / "data", "train.device=cpu", "checkpoint.every_steps=10", "batch.micro_sequences=2")
    )
    (tmp_path / "c.json").write_text(json.dumps(tree))
    return tmp_path


def checked(capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str, list[str]]:
    """Exit code, what was said, and what is wrong, of a check of c.json."""
    code = main(["check", "c.json", "--no-step", *more])
    printed = capsys.readouterr()
    return code, printed.out, printed.err.splitlines()


def test_a_good_run_passes_and_nothing_is_written(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(place.rglob("*"))
    code, said, wrong = checked(capsys, "--ranks", "4")
    assert (code, wrong) == (0, [])
    assert "4 ranks = pipeline 1 x data 4 x tensor 1; ZeRO 1; 8 sequences a step = 1 x 2" in said
    assert "400 pieces for model.vocab_size = 400 rows" in said and said.rstrip().endswith("nothing was written")
    assert "WRONG" not in said and "not checked" not in said and sorted(place.rglob("*")) == before
    assert main(["check", "c.json", "--ranks", "4", "--json", "--no-step"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["passed"], report["ranks"], report["device"]) == (True, 4, "cpu")
    assert "1 rank = pipeline 1" in checked(capsys)[1]
    assert "2 ranks = pipeline 2" in checked(capsys, "--set", "parallel.pipeline=2")[1], "the fewest that it needs"
    assert all(check["passed"] is True for check in report["checks"])


def test_the_page_has_every_check(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", "c.json", "--json", "--no-step"])
    made = [check["name"] for check in json.loads(capsys.readouterr().out)["checks"]]
    page = (Path(__file__).resolve().parents[3] / "docs" / "planning.md").read_text(encoding="utf-8")
    table = page.partition("| check | what it looks at |")[2].partition("\n\n")[0]
    names = {name for row in table.splitlines()[2:] for name in row.split("|")[1].strip().split(", ")}
    assert {*made, "memory", "collectives"} == names


def test_all_mistakes_are_found_in_one_call(
    place: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = place / "data" / "train-00001.tar"
    os.truncate(shard, 1000)
    with_another_tokenizer(place / "data", place / "other")
    (place / "run").write_text("a file in the run folder's place")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1000, 0, 1000))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a))
    sources = [{"manifest": str(place / name), "weight": 1} for name in ("data", "other")]
    checkpoint = trained / "checkpoints" / "step-00000001"
    keys = [
        "model.d_modell=48",
        "model.vocab_size=384",
        "batch.global_sequences=9",
        "parallel.tensor=4",
        "train.precision=fp16",
        "optimizer.groups.feedforward.weight_decay=0.1",
        "optimizer.groups.norms.learning_rate_ratio=0.5",
        f"data.sources={json.dumps(sources)}",
        f"checkpoint.resume={checkpoint}",
        "evaluate.tasks.lambada=no/where",
        "train.replay_routing=no/record",
        "monitor.wandb=online",
    ]
    sets = [part for key in keys for part in ("--set", key)]
    code, said, wrong = checked(capsys, *sets, "--ranks", "6", "--run-dir", "run")
    expected = [
        ("model.d_modell: unknown key", "the nearest known key is model.d_model"),
        ("parallel.tensor: 4 does not divide model.attention.num_heads = 2", "set parallel.tensor to 1"),
        ("batch.global_sequences: 9 is not divisible by batch.micro_sequences = 2", "set it to"),
        (f"--run-dir: {place}/run is a file and not a folder", "name another folder"),
        ("monitor.wandb: is online, but the package wandb is not installed", 'pip install -e ".[wandb]"'),
        ("parallel: 6 ranks cannot be divided into groups of tensor x pipeline = 4", "start 8 ranks"),
        ("train.precision: fp16 needs CUDA", "set train.precision to bf16 or fp32"),
        ("optimizer.groups.feedforward.weight_decay: this model has no such parameters", "remove the key"),
        ("data.sources.1.manifest: ", "was made with another tokenizer", "prepare one of them again"),
        ("model.vocab_size: 384 rows cannot hold the tokenizer's 400 pieces", "set it to 400 or more"),
        (
            f"data.sources: {shard} does not match the manifest: expected bytes",
            "prepare the data again",
            "or copy them",
        ),
        (
            f"data.sources: {place}/other/train-00001.tar does not match the manifest: expected bytes",
            "prepare the data",
        ),
        ("batch.global_sequences: was 8 in ", "model.vocab_size", "values or choose another --run-dir; the saved"),
        ("--run-dir: the disk of ", "has no room for checkpoints of", "make room or choose another --run-dir"),
        ("evaluate.tasks.lambada: there is no ", "name the file or folder, or remove the task"),
        ("train.replay_routing: no/record holds no record.json", "name the run folder of a run with"),
    ]
    for line, (first, *words) in zip(wrong, expected, strict=True):
        assert line.startswith(f"error: {first}") and all(word in line for word in words), line
    assert code == 2 and said.splitlines()[-1].startswith(f"{len(expected)} problems in ")


@pytest.mark.parametrize(
    "error, code, last",
    [
        (
            ValueError("Type fp8 is not supported"),
            2,
            "1 problem in 20 checks, 1 could not be made (see above); ",
        ),
        (NotImplementedError("aten::new"), 0, "18 of 20 checks passed, 2 could not be made (see above); "),
    ],
    ids=["of the run", "of the rehearsal"],
)
def test_a_step_that_was_not_rehearsed_is_never_a_check_that_passed(
    place: Path,
    error: Exception,
    code: int,
    last: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pretrain.planning.rehearsal.rehearse", Mock(side_effect=error))
    for program, arguments in ((main, ["check", "c.json"]), (train_main, ["--config", "c.json", "--dry-run"])):
        assert program(arguments) == code
        printed = capsys.readouterr()
        warned = printed.out.count("warning: collectives: not checked; step: it cannot be rehearsed")
        assert printed.out.count("warning: memory: not checked; step: it cannot be rehearsed") == warned
        if code == 0:
            assert printed.err == "" and warned == 1
        else:
            words = "step: the code that trains ends in a rehearsed step, as it would in a run: ValueError: Type fp8"
            assert printed.err.startswith(f"error: {words}") and printed.err.count("\n") == 1 and warned == 0
        if code == 0 or program is main:
            assert printed.out.splitlines()[-1] == f"{last}nothing was written"


def test_the_last_line_blames_no_problem_for_a_check_that_was_not_made() -> None:
    """The disk has no room, and besides a step cannot be rehearsed."""
    checks = Checklist()
    checks.do("disk", Mock(side_effect=UserError("--run-dir: no room")))
    checks.do("memory", Mock(side_effect=Blocked("step: it cannot be rehearsed")))
    checks.do("text", lambda outcome: "is there")
    said = summary(SimpleNamespace(checks=checks))  # type: ignore[arg-type]
    assert said == "1 problem in 3 checks, 1 could not be made (see above); nothing was written"


@pytest.mark.parametrize(
    "error, words",
    [
        (PermissionError(13, "Permission denied", "data/x"), "data/x: Permission denied; see that this user may read"),
        (OSError(5, "Input/output error"), "data.manifest: Input/output error; see that"),  # of a read
        (BadGzipFile("Not a gzipped file"), "data.manifest: Not a gzipped file; see that"),
    ],
)
def test_what_the_system_refuses_names_what_is_known(error: OSError, words: str) -> None:
    checks = Checklist()
    checks.do("shards", Mock(side_effect=error), key="data.manifest")
    assert words in str(checks.problems[0]) and "None" not in str(checks.problems[0])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere.json"], "CONFIG: there is no file nowhere.json"),
        (["."], "CONFIG: . is a folder and holds no run"),
        (["c.json", "--set", "train.steps=-3"], "train.steps: input should be greater than"),
        (["c.json", "--set", "train.device=cpu", "--device", "cuda"], "--device: is cuda, but train.device is cpu"),
        (["c.json", "--set", "data.manifest=gone"], "data.manifest: there is no"),
        (["c.json", "--set", 'data.manifest=" "'], "data.manifest: the place of a data set is empty"),
        (["c.json", "--set", "monitor.alert_command=no-such-program"], "monitor.alert_command: there is no"),
    ],
)
def test_one_mistake_is_one_sentence(
    place: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--no-step", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {words}") and printed.err.count("\n") == 1, printed.err
    assert "not checked" in printed.out or "WRONG" in printed.out


def test_settings_of_tasks_without_a_task_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ("--set", "evaluate.tasks_every_steps=100", "--set", "evaluate.tasks_limit=5")
    code, _, wrong = checked(capsys, *sets, "--run-dir", "run", "--no-step")
    assert code == 2 and [line.partition(",")[0] for line in wrong] == [
        "error: evaluate.tasks_every_steps: is 100",
        "error: evaluate.tasks_limit: is 5",
    ]


def test_a_run_that_began_with_such_settings_goes_on(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under an earlier version: a job that comes back at night must not be refused for what does nothing."""
    config = light_config(prepared, "train.device=cpu", "evaluate.tasks_limit=5", "train.stop_after_steps=1")
    run_ranks(train_runs, 1, [(config, tmp_path / "run")])
    assert main(["check", str(tmp_path / "run"), "--no-step"]) == 0
    printed = capsys.readouterr()
    assert "warning: evaluate.tasks_limit: is 5, but evaluate.tasks names no task" in printed.out and not printed.err


def test_files_of_tasks_are_read_as_a_start_reads_them(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the targets that are longer than the model's context, for which a start has no option."""
    (place / "lambada.jsonl").write_text(json.dumps({"text": "the sea is " + "q" * 30}) + "\n")
    (place / "blimp.jsonl").write_text("{}\n")
    tasks = {"lambada": "lambada.jsonl", "blimp": "blimp.jsonl"}
    _, _, wrong = checked(capsys, "--set", f"evaluate.tasks={json.dumps(tasks)}")
    assert len(wrong) == 2 and wrong[1].startswith("error: evaluate.tasks.blimp: ")
    expected = r"error: evaluate\.tasks\.lambada: a target has \d+ tokens, more than the 16 of the model's context; "
    assert re.match(expected, wrong[0]) and "launch/evaluate.py --context" in wrong[0], wrong[0]


def test_choices_of_another_run_are_in_the_way(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a start says that is to record its own."""
    record, keys = place / "run" / "routing" / "record.json", ("--run-dir", "run", "--set", "train.record_routing=true")
    code, said, _ = checked(capsys, *keys)
    assert code == 0 and f"{record.parent} will be made" in said
    record.parent.mkdir(parents=True)
    for content, words in (('{"format": 1}', "holds the choices of another run"), ("{", "is not a record of choices")):
        record.write_text(content)
        code, _, wrong = checked(capsys, *keys)
        assert code == 2 and len(wrong) == 1 and words in wrong[0] and "move it away" in wrong[0]


def test_data_of_another_tokenizer_are_no_change_that_a_run_may_make(
    place: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_another_tokenizer(place / "data", place / "other")
    allowed = ("--set", "data.manifest=other", "--set", 'checkpoint.allow_changes=["data", "model", "train"]')
    code, _, wrong = checked(capsys, "--run-dir", str(trained), *allowed)
    assert (
        code == 2 and len(wrong) == 1 and wrong[0].startswith("error: data.manifest: was made with another tokenizer")
    )


def test_what_needs_the_data_is_not_checked_without_them(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "data" / "manifest.json").write_text("none")
    assert main(["check", "c.json", "--json", "--no-step"]) == 2
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert found["data sets"]["problems"][0]["key"] == "data.manifest"
    assert [name for name, check in found.items() if check["passed"] is None] == ["tokenizer", "text", "shards"]
    assert found["disk"]["passed"] and found["checkpoint"]["passed"]


def test_a_folder_without_its_shards_is_told_in_a_few_lines(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shard in (place / "data").glob("*.tar"):
        shard.unlink()
    for index in (place / "data").glob("*.safetensors"):
        index.unlink()
    code, _, wrong = checked(capsys)
    assert (
        code == 2
        and len(wrong) == 6
        and all(line.startswith("error: data.manifest: missing file ") for line in wrong[:5])
    )
    assert "more of its files are wrong; copy the data set again" in wrong[5]


def test_one_file_more_than_are_told_is_told_too(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(path for path in (place / "data").iterdir() if path.suffix in (".tar", ".safetensors"))
    for path in files[:6]:
        path.unlink()
    code, _, wrong = checked(capsys)
    assert code == 2 and [line.partition("missing file ")[0] for line in wrong] == ["error: data.manifest: "] * 6


def test_a_byte_that_only_the_sha256_shows_is_found_where_it_is_asked_for(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = place / "data" / "train-00001.tar"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    code, said, _ = checked(capsys)
    assert code == 0 and "each has its size (data.verify=full hashes them)" in said
    code, _, wrong = checked(capsys, "--set", "data.verify=full")
    assert code == 2 and wrong[-1].startswith(f"error: data.manifest: {shard} does not match"), "behind the progress"


def test_what_is_legal_and_may_be_a_mistake_is_a_warning(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said, wrong = checked(capsys, "--set", "model.vocab_size=800", "--set", "train.steps=100000")
    assert (code, wrong) == (0, [])
    assert "warning: model.vocab_size: 400 of 800 rows are no piece of the tokenizer" in said
    assert re.search(r"warning: data\.manifest: the run reads the [\d,]+ tokens of .* times", said)


def test_options_of_a_step_reach_its_rehearsal(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = Rehearsal(1, {}, 0, {}, 2 * 2**30, {}, [], [])
    monkeypatch.setattr("pretrain.planning.rehearsal.rehearse", lambda *_, **__: result)
    line = ["check", "c.json", "--ranks", "4", "--rank", "2", "--device-memory", "2"]
    assert main(line) == 0
    said = capsys.readouterr().out
    assert ", 2 (--rank), which stand for all" in said and "may fill 1.80 GiB of the device (90% of 2.0)" in said
    assert "warning: memory: a step needs about 2." in said
    assert main(["check", "c.json", "--device-memory", "2", "--no-step"]) == 2
    assert "--device-memory: is for the memory of a step, but --no-step" in capsys.readouterr().err


def test_a_shard_that_may_not_be_read(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system's answer is made up: root may read everything."""
    shard, opened = place / "data" / "train-00000.tar", os.open

    def refused(path: Any, *args: Any, **options: Any) -> int:
        if Path(path) == shard:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(os, "open", refused)
    code, _, wrong = checked(capsys)
    assert code == 2
    permission = f"{shard} cannot be read: Permission denied; let its owner give this user read permission"
    assert wrong == [f"error: data.manifest: {permission}"]


def test_warnings_are_seen_beside_errors(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a disk with room for two checkpoints and not for all that are kept: in its row, and by a dry run too."""
    keys = ["--set", "checkpoint.every_steps=1", "--run-dir", str(place / "run")]
    size = checkpoint_space(load_config(place / "c.json", [keys[1]]), place / "run").size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2 * size, 0, 2 * size))
    (place / "data" / "manifest.json").write_text("none")
    _, said, wrong = checked(capsys, *keys)
    assert re.search(r"^  warning disk ", said, re.MULTILINE) and "no room for the" in said and len(wrong) == 1
    assert train_main(["--config", "c.json", "--dry-run", "--no-step", *keys]) == 2
    assert "warning: the disk of " in capsys.readouterr().out


def test_a_list_of_checks_goes_on_where_a_start_ends() -> None:
    def two(found: Outcome) -> str:
        for name in ("a", "b"):
            found.problem(UserError(name))
        return "said"

    def blocked(found: Outcome) -> str:
        raise Blocked("of two")

    heard: list[str] = []
    checks = Checklist(tell=lambda outcome: heard.append(outcome.name))
    for name, check in (("two", two), ("again", two), ("late", blocked), ("good", lambda found: "fine")):
        checks.do(name, check)
    assert [str(error) for error in checks.problems] == ["a", "b"], "what was said is not said again"
    assert [outcome.passed for outcome in checks.outcomes] == [False, None, None, True]
    assert heard == ["two", "again", "late", "good"]
    with pytest.raises(UserError, match=r"^a$"):
        Checklist(stops=True).do("two", two)
    with pytest.raises(PermissionError):
        Checklist(stops=True).do("shards", Mock(side_effect=PermissionError(13, "Permission denied")))


def test_a_check_that_finds_something_new_beside_what_is_said_already_has_failed() -> None:
    def found(*names: str) -> Callable[[Outcome], str]:
        return lambda outcome: "".join(outcome.problem(UserError(name)) or "" for name in names)  # type: ignore[func-returns-value]

    checks = Checklist()
    checks.do("first", found("a"))
    checks.do("second", found("a", "b"))
    assert [outcome.passed for outcome in checks.outcomes] == [False, False]
    assert [str(error) for error in checks.problems] == ["a", "b"]
