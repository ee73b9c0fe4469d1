"""launch/evaluate.py around what it computes: its options, what it reads, prints and writes, and how each rank ends."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from common.errors import PassingError, UserError
from pretrain import device
from pretrain.cli import evaluate_checkpoint as command
from pretrain.cli.evaluate import main
from pretrain.cli.evaluate_checkpoint import Choices
from pretrain.config.schema import TrainConfig
from pretrain.evaluation.harness_run import Options
from pretrain.evaluation.likelihood import Limits
from pretrain.parallel.agreement import PeerFailed
from pretrain.ranks import Ranks
from tests.pretrain.runs import small_config

MEMORY = ("--set", "model.position.memory_chunks=2")


@pytest.fixture
def evaluate_checkpoint(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """In place of all that it computes."""
    computes = Mock(return_value=None)
    monkeypatch.setattr(command, "evaluate_checkpoint", computes)
    return computes


def test_every_option_reaches_the_evaluation(evaluate_checkpoint: Mock) -> None:
    line = (
        "run --tasks validation=other,cbt --harness arc_easy --shots 0 --log-samples --limit 3 --batch 5 --context 7 "
    )
    line += "--data d --out o --ema --device cpu --set evaluate.sequences=4"
    assert main(line.split()) == 0
    choices = Choices(
        wanted={"validation": "other", "cbt": None},
        harness="arc_easy",
        shots=0,
        keeps_samples=True,
        limit=3,
        batch=5,
        context=7,
        data=("d",),
        out=Path("o"),
        overrides=("evaluate.sequences=4",),
        ema=True,
    )
    evaluate_checkpoint.assert_called_once_with(Path("run"), choices, torch.device("cpu"))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--shots", "0"], "--shots: is for the tasks of --harness, and there is none"),
        (["--log-samples"], "--log-samples: is for the tasks of --harness, and there is none"),
        (["--harness", "arc_easy", *MEMORY], "--set model.position.memory_chunks: is of a validation alone"),
        (["--harness", "arc_easy", "--tasks", "validation", *MEMORY], "--set model.position.memory_chunks: is of a"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    evaluate_checkpoint: Mock, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["run", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {words}") and not evaluate_checkpoint.called


@pytest.mark.parametrize(
    "ended_by, code, said",
    [
        (None, 0, ""),
        (UserError("planted"), 2, "error: planted\n"),
        (PassingError("planted"), 2, "error: planted\n"),
        (PeerFailed(), 2, ""),  # the other rank has said it
        (device.Unreachable("planted"), 7, "error: planted\n"),
        (dist.DistNetworkError("Connection closed by peer"), 7, "error: "),
        (RuntimeError("planted"), 1, "RuntimeError: planted\n"),
    ],
    ids=repr,
)
def test_each_rank_of_a_launcher_ends_with_the_code_of_what_ended_it(
    evaluate_checkpoint: Mock,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ended_by: Exception | None,
    code: int,
    said: str,
) -> None:
    """And leaves its group with that code, which a rank that waits for others would never do."""
    place = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "LOCAL_SIZE": 2, "MASTER_ADDR": "::1", "MASTER_PORT": 1}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    start, stop = Mock(), Mock()
    monkeypatch.setattr(device, "start", start)
    monkeypatch.setattr(device, "stop", stop)
    evaluate_checkpoint.side_effect = ended_by
    assert main(["run", "--device", "cpu"]) == code
    start.assert_called_once_with(Ranks(1, 1, 2, 2), TrainConfig(device="cpu"))
    stop.assert_called_once_with(code)
    printed = capsys.readouterr().err
    assert printed.endswith(said) if code == 1 else printed.startswith(said) and bool(printed) == bool(said)


LIMITS = Limits(5, 7, None)


def opened(config: Any = None, *, is_first: bool = True) -> Any:
    """A model, as far as what does not compute asks it."""
    checkpoint = SimpleNamespace(path=Path("step-00000003"), progress=SimpleNamespace(step=3))
    place = SimpleNamespace(parallel=SimpleNamespace(is_first=is_first))
    return SimpleNamespace(config=config, checkpoint=checkpoint, place=place, tokenizer=Mock())


@pytest.mark.parametrize("is_first", [True, False])
def test_the_first_rank_prints_all_tasks_with_their_notes_and_writes_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_first: bool
) -> None:
    model = opened(is_first=is_first)
    model.checkpoint.path = tmp_path
    read, harness, load = Mock(), Mock(), Mock(return_value=model)
    stand_ins: dict[str, Any] = {
        "find_checkpoint": lambda run: model.checkpoint,
        "config_of": lambda checkpoint: None,
        "evaluation_config": lambda *_, **__: (SimpleNamespace(model=None), None),
        "document_end_of": lambda config, tokenizer: None,
        "open_model": load,
        "task_specs": lambda names, shots: [names, shots],
        "evaluate_with_harness": harness,
        "_open": read,
        "_evaluate_one": lambda _, name, *__: command.Evaluated(
            f"{name}-file", {"task": name}, [(name, "", "accuracy", "0.5", "9")], [f"{name} is small"]
        ),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(command, name, stand_in)
    wanted, out = {"lambada": "l", "cbt": None}, tmp_path / "out"
    choices = Choices(wanted=wanted, harness="arc", shots=2, limit=3, batch=5, context=7, out=out, ema=True)
    command.evaluate_checkpoint(tmp_path / "run", choices, torch.device("cpu"))
    assert [(call.args[1:3], call.args[4]) for call in read.call_args_list] == [
        (("lambada", "l"), LIMITS),
        (("cbt", None), LIMITS),
    ]
    assert load.call_args.kwargs == {"ema": True, "weights": None}
    harness.assert_called_once_with(model, ["arc", 2], LIMITS, Options(limit=3, shots=2, keeps_samples=False), out)
    printed = capsys.readouterr().out.splitlines()
    written = {path.name: json.loads(path.read_text())["task"] for path in (tmp_path / "out").glob("*")}
    if not is_first:
        assert not printed and not written
        return
    assert written == {"lambada-file.json": "lambada", "cbt-file.json": "cbt"}
    assert printed[0] == f"{tmp_path}: step 3, moving average of the weights"
    assert [line.split()[:3] for line in printed[-5:-3]] == [["lambada", "accuracy", "0.5"], ["cbt", "accuracy", "0.5"]]
    assert printed[-3:-1] == ["note: lambada is small", "note: cbt is small"]
    assert printed[-1] == f"{tmp_path / 'out'}: a JSON file for each task"


def test_a_result_says_of_which_weights_it_is_and_how_long_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_validate", lambda *_, **__: {"split": "test", "loss": 2.0})
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=iter([100.0, 102.5] * 2).__next__))
    found: Any = command.HeldOut(None, None)  # type: ignore[arg-type]
    for ema in (False, True):
        choices = Choices(wanted={}, limit=4, ema=ema)
        file, content, rows, _ = command._evaluate_one(opened(), "validation", None, found, choices, LIMITS)
        checkpoint = str(Path("step-00000003").absolute())
        expected = {"limit": 4, "checkpoint": checkpoint, "step": 3, "seconds": 2.5, "split": "test", "loss": 2.0}
        assert file == "test" and content == expected | ({"moving_average": True} if ema else {})
        assert rows == [("validation", "", "loss", "2.0000", "")]


@pytest.mark.parametrize("named, read", [("named", "named"), (None, "of the run")])
def test_the_files_of_a_task_are_those_that_are_named_or_else_those_of_the_run(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, named: str | None, read: str
) -> None:
    """And the ranks compare them."""
    find, compare = Mock(), Mock()
    monkeypatch.setattr(command, "find_files", find)
    monkeypatch.setattr(command, "check_same", compare)
    monkeypatch.setattr(command.PreparedTask, "of", Mock(return_value=SimpleNamespace(digest="d" * 64)))
    config = small_config(prepared, 'evaluate.tasks={"blimp": "other", "lambada": "of the run"}')
    command._task(opened(config), "lambada", named, Choices(wanted={}), LIMITS)
    find.assert_called_once_with("lambada", read)
    compare.assert_called_once_with("lambada", f"files of digest {'d' * 12}")


def test_a_validation_of_a_run_without_one_is_refused_and_the_ranks_compare_its_data(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare, none = Mock(), opened(small_config(prepared, "evaluate.sequences=0"))
    monkeypatch.setattr(command, "check_same", compare)
    monkeypatch.setattr(command, "_data", lambda opened, config: SimpleNamespace(key="data.manifest", digest="d"))
    with pytest.raises(UserError, match=r"^validation: evaluate\.sequences is 0 in this run; set it"):
        command._held_out(none, Choices(wanted={}), None)
    assert command._held_out(none, Choices(wanted={}, limit=3), None).config.evaluate.sequences == 3
    compare.assert_called_once_with("validation: data.manifest (digest)", "d")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_no_result(value: float) -> None:
    """As of a perplexity that overflows. The first rank says it."""
    content = {"task": "lambada", "limit": None, "accuracy": 0.5}
    command._refuse_what_is_not_finite(opened(), "lambada", content)
    with pytest.raises(UserError, match=r"^lambada: the outputs of checkpoint step-00000003 are not finite"):
        command._refuse_what_is_not_finite(opened(), "lambada", {**content, "perplexity": value})
    command._refuse_what_is_not_finite(opened(is_first=False), "lambada", {**content, "perplexity": value})


def test_data_of_another_tokenizer_and_data_that_are_not_there(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint from before its tokenizer was kept in it is evaluated on what is named."""
    model = opened()
    sources: Any = SimpleNamespace(key="data.manifest", tokenizer=SimpleNamespace(sha256="a"))
    opens = Mock(return_value=sources)
    monkeypatch.setattr(command, "open_sources", opens)
    for model.checkpoint.state in ({"tokenizer_sha256": "a"}, {}):
        assert command._data(model, small_config(prepared)) is sources
    model.checkpoint.state = {"tokenizer_sha256": "b"}
    with pytest.raises(
        UserError, match=r"the data of data\.manifest were made with another tokenizer than the model's"
    ):
        command._data(model, small_config(prepared))
    opens.side_effect = UserError("planted")
    with pytest.raises(UserError, match=r"^planted$"):
        command._data(model, small_config(prepared))
    rows = [{"manifest": str(place), "weight": 1} for place in (prepared, tmp_path / "gone")]
    with pytest.raises(UserError, match=r"^validation: planted; name the place of the prepared data with --data$"):
        command._data(model, small_config(prepared, f"data.sources={json.dumps(rows)}"))
