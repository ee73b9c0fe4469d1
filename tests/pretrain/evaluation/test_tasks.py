"""What launch/evaluate.py computes of a checkpoint, against a loop over single texts; batches, layouts, refusals."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.errors import UserError
from model.language_model import build_model
from pretrain.checkpoint import Checkpoint
from pretrain.cli import evaluate_checkpoint as command
from pretrain.cli.evaluate import main
from pretrain.cli.evaluate_checkpoint import Choices, evaluate_checkpoint
from pretrain.data.sources import Sources
from pretrain.evaluation import results
from pretrain.evaluation.training import RunTasks
from pretrain.export.origin import evaluations_of
from pretrain.parallel.agreement import PeerFailed
from pretrain.report.tags import layout as board
from pretrain.saved_model import SavedModel, load_model
from pretrain.views.reading import RunView
from pretrain.views.status import screen, summary
from tests.harness import run_ranks
from tests.pretrain.evaluation import published
from tests.pretrain.runs import events, small_config, train_runs
from tests.pretrain.saved import rewrite_state

STEPS = ("train.steps=1", "evaluate.sequences=24", "model.sequence_length=64", "model.dropout=0.5")
"""Dropout acts in training alone."""
EVEN = "model.feedforward.num_experts=6"
XL = (EVEN, "model.position.type=xl")
CONTEXT = 128
"""Two windows of 64: what the model with a memory of one window looks back to."""


@pytest.fixture(scope="module")
def runs(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two runs: `rope`, and `xl` with Transformer-XL's memory, which also computes tasks after its step; and
    of the published files."""
    folder = tmp_path_factory.mktemp("evaluated")
    paths = {"lambada": published.lambada(folder), "blimp": published.blimp(folder), "cbt": published.cbt(folder)}
    xl = small_config(prepared, *STEPS, *XL, tasks_of_a_run(paths), "monitor.tensorboard=true")
    run_ranks(train_runs, 1, [(small_config(prepared, *STEPS, EVEN), folder / "rope"), (xl, folder / "xl")])
    return folder


def tasks_of_a_run(paths: dict[str, Path]) -> str:
    return f"evaluate.tasks={json.dumps({name: str(path) for name, path in paths.items()})}"


def evaluations(run: Path) -> dict[str, dict[str, Any]]:
    """What a run recorded while it trained, by task."""
    return {event["task"]: event for event in events(run, "evaluation")}


def evaluated(run: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """The JSON files of a checkpoint, by task."""
    assert main([str(run), *arguments]) == 0
    return {path.stem: json.loads(path.read_text()) for path in (run / "evaluation" / "step-00000001").glob("*.json")}


def tasks_of(folder: Path) -> str:
    return f"lambada={folder},blimp={folder / 'blimp'},cbt={folder / 'CBTest'}"


class Loop:
    """One text after the other, each alone in a forward pass of a model that has no memory."""

    def __init__(self, saved: SavedModel, context: int) -> None:
        position = saved.config.model.position.model_copy(update={"memory_chunks": 0})
        self.model = build_model(saved.config.model.model_copy(update={"position": position}), seed=0).eval()
        self.model.load_state_dict(saved.model.state_dict())
        self.encode, self.eos, self.context = saved.tokenizer.encode, saved.tokenizer.eos_id, context

    @torch.no_grad()
    def log_likelihoods(self, context: list[int], target: list[int]) -> tuple[torch.Tensor, bool]:
        """Of each token of the target, and whether greedy decoding gives it."""
        ids = context + target
        inputs = ids[:-1][-self.context :]
        logits = self.model.logits(torch.tensor([inputs]))[0][0, -len(target) :].double()
        right = bool((logits.argmax(-1) == torch.tensor(target)).all())
        return logits.log_softmax(-1)[range(len(target)), target], right

    def lambada(self, path: Path) -> dict[str, float]:
        hits, sums = [], []
        for line in path.read_text().splitlines():
            text = json.loads(line)["text"]
            context = self.encode(text[: text.rindex(" ")])
            values, hit = self.log_likelihoods(context, self.encode(text)[len(context) :])
            hits.append(hit)
            sums.append(float(values.sum()))
        return {"accuracy": float(np.mean(hits)), "perplexity": math.exp(-float(np.mean(sums)))}

    def blimp_sets(self, folder: Path) -> dict[str, float]:
        """File -> accuracy."""
        assert self.eos is not None
        of_sets = {}
        for path in folder.glob("*.jsonl"):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            sums = [
                [
                    float(self.log_likelihoods([self.eos], self.encode(row[key]))[0].sum())
                    for key in ("sentence_good", "sentence_bad")
                ]
                for row in rows
            ]
            of_sets[path.stem] = float(np.mean([good > bad for good, bad in sums]))
        return of_sets

    def blimp(self, folder: Path) -> dict[str, float]:
        return {"accuracy": float(np.mean(list(self.blimp_sets(folder).values())))}

    def cbt(self, folder: Path) -> dict[str, float]:
        of_kinds = []
        for path in folder.glob("*_test_*.txt"):
            hits = []
            for block in path.read_text().split("\n\n")[:3]:  # the fourth has nine candidates
                lines = [line.split(" ", 1)[1] for line in block.splitlines()]
                question, answer, _, candidates = lines[20].split("\t")
                text = " ".join([*lines[:20], question])
                for apart, together in (
                    (" , ''", ',"'),
                    ("`` ", '"'),
                    (" n't", "n't"),
                    (" .", "."),
                    (" ,", ","),
                    (" !", "!"),
                ):
                    text = text.replace(apart, together)
                before, after = text.split(" XXXXX")
                context, means = self.encode(before), {}
                for word in candidates.split("|"):
                    target = self.encode(f"{before} {word}{after}")[len(context) :]
                    means[word] = float(self.log_likelihoods(context, target)[0].mean())
                hits.append(max(means, key=lambda word: means[word]) == answer)
            of_kinds.append(np.mean(hits))
        return {"accuracy": float(np.mean(of_kinds))}


@pytest.mark.parametrize("name, context", [pytest.param("rope", CONTEXT // 2, marks=pytest.mark.slow), ("xl", CONTEXT)])
def test_the_numbers_are_those_of_a_loop_over_single_texts(runs: Path, name: str, context: int) -> None:
    found = evaluated(runs / name, "--tasks", f"validation,{tasks_of(runs)}", "--batch", "5")
    loop = Loop(load_model(runs / name), context)
    expected = {
        "lambada": loop.lambada(runs / "lambada_test.jsonl"),
        "blimp": loop.blimp(runs / "blimp" / "data"),
        "cbt": loop.cbt(runs / "CBTest" / "data"),
    }
    for task, values in expected.items():
        assert {key: found[task][key] for key in values} == pytest.approx(values, rel=1e-5), task
    assert found["lambada"]["context"] == context and found["cbt"]["texts_cut"] == 12 * 10
    assert found["cbt"]["questions_left_out"] == 4 and found["cbt"]["examples"] == 12
    assert {key: group["examples"] for key, group in found["blimp"]["groups"].items()} == {
        "adjunct_island": 5,
        "npi_present_1": 7,
        "wh_island": 6,
    }
    validation = events(runs / name, "validation")[0]
    assert found["validation"]["loss"] == pytest.approx(validation["loss"], rel=1e-5)
    of_run = evaluations(runs / name)
    assert set(of_run) == ({"lambada", "blimp", "cbt"} if name == "xl" else set())
    for task, event in of_run.items():
        for key, value in expected[task].items():
            assert event["step"] == 1 and event[key] == pytest.approx(value, rel=1e-5), task


@pytest.mark.slow  # the test above has three sets
def test_blimp_with_all_its_sets(runs: Path, tmp_path: Path) -> None:
    """The mean is over the 67 files, however many pairs a file has: 12 to 21 here."""
    place = published.blimp(tmp_path, 12, published.ALL_SETS)
    assert len(list((place / "data").iterdir())) == 67
    for name, context in (("rope", CONTEXT // 2), ("xl", CONTEXT)):
        out = tmp_path / name
        assert main([str(runs / name), "--tasks", f"blimp={place}", "--out", str(out)]) == 0
        found = json.loads((out / "blimp.json").read_text())
        expected = Loop(load_model(runs / name), context).blimp_sets(place / "data")
        assert {group: values["accuracy"] for group, values in found["groups"].items()} == expected
        assert found["accuracy"] == pytest.approx(sum(expected.values()) / 67, rel=1e-12)
        assert len(set(expected.values())) > 20 and found["examples"] == sum(12 + n % 10 for n in range(67))


def test_a_run_in_other_layouts_computes_the_same_while_it_trains(runs: Path, prepared: Path, tmp_path: Path) -> None:
    tasks = tasks_of_a_run({"lambada": runs, "blimp": runs / "blimp"})
    layouts = {"zero 3": "parallel.zero=3", "pipeline": "parallel.pipeline=2"}
    configs = [
        (small_config(prepared, *STEPS, *XL, tasks, "evaluate.sequences=0", layout), tmp_path / name)
        for name, layout in layouts.items()
    ]
    run_ranks(train_runs, 2, configs)
    expected = evaluations(runs / "xl")
    for name in layouts:
        found = evaluations(tmp_path / name)
        assert set(found) == {"lambada", "blimp"}
        for task, event in found.items():
            keys = ("step", "accuracy", "examples", *(["perplexity"] if task == "lambada" else []))
            assert [event[key] for key in keys] == pytest.approx([expected[task][key] for key in keys], rel=1e-5), name


def test_a_run_computes_its_tasks_when_they_are_due_and_again_if_one_of_them_is_new(
    runs: Path, prepared: Path, tmp_path: Path
) -> None:
    few, keys = {"blimp": runs / "blimp"}, ("train.steps=3", "evaluate.tasks_every_steps=2", "evaluate.tasks_limit=1")
    wanted = [tasks_of_a_run(paths) for paths in (few, few, {**few, "lambada": runs})]
    configs = [small_config(prepared, *STEPS, *XL, *keys, tasks) for tasks in wanted]
    run_ranks(train_runs, 1, [(config, tmp_path / "run") for config in configs])
    text = (tmp_path / "run" / "events.jsonl").read_text()
    found = [(e["step"], e["task"]) for e in map(json.loads, text.splitlines()) if e["event"] == "evaluation"]
    assert found == [(2, "blimp"), (3, "blimp"), (3, "blimp"), (3, "lambada")], "the second start has nothing new"


def test_a_run_computes_as_many_examples_as_its_key_says(runs: Path, prepared: Path) -> None:
    config = small_config(prepared, *STEPS, tasks_of_a_run({"lambada": runs}), "evaluate.tasks_limit=3")
    found = RunTasks.open(config, Sources.load(config))
    assert [len(task.examples) for task in found.prepared] == [3]


def test_a_run_shows_its_tasks(runs: Path) -> None:
    view, events = RunView.open(runs / "xl"), evaluations(runs / "xl")
    in_card = evaluations_of(Checkpoint.open(runs / "xl" / "checkpoints" / "step-00000001"))
    assert {one["task"]: one["accuracy"] for one in in_card if one["task"] != "validation"} == pytest.approx(
        {task: event["accuracy"] for task, event in events.items()}, rel=1e-5
    )
    assert f"lambada {events['lambada']['accuracy']:.1%} after step 1" in screen(view, width=200, now=0.0)
    assert summary(view)["tasks"]["blimp"]["accuracy"] == events["blimp"]["accuracy"]
    (folder,) = {path.parent for path in (runs / "xl" / "tensorboard").glob("events.*")}
    curves = EventAccumulator(str(folder))
    curves.Reload()
    points = [(point.step, point.value) for point in curves.Scalars("tasks/lambada perplexity")]
    assert points == [(1, pytest.approx(events["lambada"]["perplexity"]))]
    page = board(has_tasks=True, has_sources=False)
    assert page["how well it learns"]["accuracy of tasks"][1] == ["^tasks/.* accuracy$"]


def test_the_batch_changes_nothing(runs: Path) -> None:
    found = [
        evaluated(runs / "xl", "--tasks", f"lambada={runs},cbt={runs / 'CBTest'}", "--limit", "2", "--batch", batch)
        for batch in ("1", "7")
    ]
    for other in found[1:]:
        for task in ("lambada", "cbt"):
            numbers = {
                key: found[0][task][key] for key in ("accuracy", "perplexity", "examples") if key in found[0][task]
            }
            assert {key: other[task][key] for key in numbers} == pytest.approx(numbers, rel=1e-5), task
    assert found[0]["lambada"]["examples"] == 2 and found[0]["cbt"]["examples"] == 8 and found[0]["cbt"]["limit"] == 2


def evaluate_on_ranks(rank: int, runs: list[tuple[Path, Choices]]) -> None:
    for run, choices in runs:
        evaluate_checkpoint(run, choices, torch.device("cpu"))


def test_tensor_and_pipeline_parallel_ranks_give_the_numbers_of_one_process(runs: Path) -> None:
    wanted: dict[str, str | None] = {"validation": None, "lambada": str(runs), "blimp": str(runs / "blimp")}
    layouts = {
        "rope": ("parallel.tensor=2", "parallel.pipeline=2"),
        "xl": ("parallel.tensor=2", "parallel.sequence=true"),  # and two data-parallel ranks
    }
    commands = [
        (runs / name, Choices(wanted=wanted, batch=3, overrides=layout, out=runs / name / "four"))
        for name, layout in layouts.items()
    ]
    run_ranks(evaluate_on_ranks, 4, commands)
    for name in layouts:
        one = evaluated(runs / name, "--tasks", f"validation,lambada={runs},blimp={runs / 'blimp'}")
        for task in wanted:
            many = json.loads((runs / name / "four" / f"{task}.json").read_text())
            numbers = {key: one[task][key] for key in ("accuracy", "perplexity", "loss") if key in one[task]}
            assert {key: many[key] for key in numbers} == pytest.approx(numbers, rel=1e-5), (name, task)
            assert many.get("groups") == one[task].get("groups"), (name, task)


def refused_on_ranks(rank: int, run: Path, choices: Choices) -> tuple[str, str]:
    """How an evaluation ends whose results the disk does not take, and what it prints."""
    results.write_json = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            evaluate_checkpoint(run, choices, torch.device("cpu"))
        except (UserError, PeerFailed) as error:
            return repr(error), printed.getvalue()
    return "no error", printed.getvalue()


def test_results_that_the_disk_does_not_take_are_printed_and_no_rank_waits(runs: Path, tmp_path: Path) -> None:
    choices = Choices(wanted={"validation": None, "lambada": str(runs)}, limit=2, out=tmp_path / "out")
    (refusal, table), (other, nothing) = run_ranks(refused_on_ranks, 2, runs / "rope", choices)
    assert "--out: " in refusal and "validation.json cannot be written: No space left on device" in refusal
    assert "PeerFailed" in other and not nothing
    assert re.search(r"validation +perplexity +\d", table) and "a JSON file for each task" not in table


def opened_on_ranks(rank: int, run: Path) -> list[str]:
    """Which checkpoint a rank opens, where each finds another one the newest."""
    opened: list[str] = []

    def config_of(checkpoint: Checkpoint) -> Any:
        opened.append(checkpoint.path.name)
        raise UserError("enough")

    command.find_checkpoint = lambda place: Checkpoint(place / f"step-0000000{rank + 1}", {})
    command.config_of = config_of
    with contextlib.suppress(UserError, PeerFailed):
        evaluate_checkpoint(run, Choices(wanted={}, out=run), torch.device("cpu"))
    return opened


def test_all_ranks_evaluate_one_checkpoint_of_a_run_that_goes_on(tmp_path: Path) -> None:
    """Each reads a part of it for the others."""
    assert run_ranks(opened_on_ranks, 2, tmp_path) == [["step-00000001"]] * 2


def test_a_validation_with_more_memory_than_in_training(runs: Path, tmp_path: Path) -> None:
    """As the figures of the σ-MoE paper: nothing is new to two windows in a row, and to the third what it now sees."""

    def loss(windows: int, chunks: int) -> float:
        folder = tmp_path / f"{windows} {chunks}"
        keys = [f"model.position.memory_chunks={chunks}", "evaluate.streams=1"]
        sets = [word for key in keys for word in ("--set", key)]
        line = [str(runs / "xl"), "--tasks", "validation", "--limit", str(windows), "--batch", "1"]
        assert main([*line, "--out", str(folder), *sets]) == 0
        (file,) = folder.glob("*.json")
        content = json.loads(file.read_text())
        assert file.stem == ("validation" if chunks == 1 else f"validation-memory-{chunks}")
        assert (content["task"] == "validation") == (chunks == 1) and content["split"] == "validation"
        assert content.get("memory_chunks") == (None if chunks == 1 else chunks)
        return float(content["loss"])

    assert loss(2, 1) == pytest.approx(loss(2, 2), rel=1e-6)
    assert abs(loss(3, 1) - loss(3, 2)) > 1e-5


def test_refusals(runs: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(words: str, *arguments: str, run: Path = runs / "rope") -> None:
        capsys.readouterr()
        try:
            code: object = main([str(run), "--out", str(tmp_path / "out"), *arguments])
        except SystemExit as end:  # an option that argparse refuses
            code = end.code
        assert code == 2
        printed = capsys.readouterr().err
        assert re.search(words, printed) and printed.count("\n") == 1, printed

    refused("RUN: .*gone is not there", run=tmp_path / "gone")
    refused("--tasks: 'squad' is none of validation, lambada, blimp, cbt", "--tasks", "lambada,squad")
    refused("--tasks: 'lambada=' is none of", "--tasks", "lambada=")
    refused("--tasks validation=x: there is no .*x; prepare the data first", "--tasks", "validation=x")
    refused("--tasks validation=s3://a/b: is behind a URL", "--tasks", "validation=s3://a/b")
    refused("--tasks: names cbt twice", "--tasks", "cbt,cbt=x")
    refused("--batch: expected a whole number of at least 1, not '0'", "--batch", "0")
    refused("--limit: expected a whole number of at least 1, not '-1'", "--limit", "-1")
    refused("--device: is cuda, but torch finds no usable GPU", "--device", "cuda")
    refused("--out: .*lambada_test.jsonl is a file", "--out", str(runs / "lambada_test.jsonl"))
    refused("--set train.steps=3: an evaluation takes keys of parallel", "--set", "train.steps=3")
    memory = "model.position.memory_chunks"
    refused(f"--set {memory}: is of a validation alone", "--set", f"{memory}=4", "--tasks", "validation,cbt")
    refused("parallel: 1 rank cannot be divided", "--set", "parallel.tensor=2")
    refused(f"lambada: there is no {tmp_path / 'none'}; download", "--tasks", f"lambada={tmp_path / 'none'}")
    for last in (f"cbt={tmp_path / 'none'}", "validation=x"):  # before the first is computed
        refused(f"there is no .*{last.rpartition('=')[2]}", "--tasks", f"lambada={runs},{last}", "--limit", "2")
        assert not (tmp_path / "out").exists()
    (tmp_path / "wrong.jsonl").write_text('{"text": "two words"}\nnothing\n')
    refused("lambada: .*wrong.jsonl line 2: is not JSON", "--tasks", f"lambada={tmp_path / 'wrong.jsonl'}")
    refused(
        "cbt: a target has .* tokens, more than the 1 of the model's context",
        "--tasks",
        f"cbt={runs / 'CBTest'}",
        "--context",
        "1",
    )
    assert not (tmp_path / "out").exists()

    copy = shutil.copytree(runs / "rope", tmp_path / "copy")
    checkpoint = copy / "checkpoints" / "step-00000001"
    rewrite_state(checkpoint, lambda state: state["config"]["data"].update(manifest=str(tmp_path / "gone")))
    refused("no tokenizer: data.manifest: there is no .*gone.*--data", run=copy)
    assert main([str(copy), "--data", str(prepared), "--limit", "4"]) == 0  # validation: the split moved too
    other = shutil.copytree(prepared, tmp_path / "other")
    (other / "tokenizer.model").write_bytes(b"another")
    refused("no tokenizer: .*tokenizer.model .*(bytes|does not match)", "--data", str(other), run=copy)

    shard = checkpoint / "rank-00000.safetensors"
    tensors = load_file(shard)
    name = next(key for key in tensors if key.startswith("master/final_norm.weight"))
    tensors[name].fill_(float("nan"))
    save_file(tensors, shard)
    rewrite_state(checkpoint, lambda state: state["files"][shard.name].update(bytes=shard.stat().st_size))
    arguments = ("--data", str(prepared), "--tasks", f"lambada={runs}")
    refused("rank-00000.safetensors does not match its sha256; name an earlier one", *arguments, run=copy)
    digest = hashlib.sha256(shard.read_bytes()).hexdigest()
    rewrite_state(checkpoint, lambda state: state["files"][shard.name].update(sha256=digest))
    refused("lambada: the outputs of checkpoint .*step-00000001 are not finite", *arguments, run=copy)


def test_a_checkpoint_that_its_run_removes_meanwhile(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, check_files = shutil.copytree(runs / "rope", tmp_path / "copy"), Checkpoint.check_files

    def removed_first(checkpoint: Checkpoint, **named: int) -> None:
        shutil.rmtree(checkpoint.path)
        check_files(checkpoint, **named)

    monkeypatch.setattr(Checkpoint, "check_files", removed_first)
    assert main([str(copy), "--limit", "1"]) == 2
    assert re.search(r"RUN: .*step-00000001 was removed while it was read, by a run that goes", capsys.readouterr().err)
