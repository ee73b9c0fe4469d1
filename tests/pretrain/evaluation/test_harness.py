"""The adapter to lm-evaluation-harness: its numbers are those of our tasks; refusals without the package."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import UserError
from pretrain.cli.evaluate import main
from pretrain.evaluation import harness_run
from pretrain.evaluation.greedy import GREEDY
from pretrain.evaluation.harness_args import ModelArgs, pairs, sampling_of
from pretrain.evaluation.harness_run import task_specs
from pretrain.evaluation.likelihood import Limits
from pretrain.evaluation.results import write_lines
from pretrain.generation.sampling import Sampling
from tests.harness import run_ranks
from tests.pretrain.evaluation import published
from tests.pretrain.runs import small_config, train_runs

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason='lm_eval is not installed: pip install -e ".[eval]"'
)


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    config = small_config(prepared, "train.steps=1", "evaluate.sequences=0", "model.sequence_length=64")
    run_ranks(train_runs, 1, [(config, folder / "run")])
    return folder / "run"


def test_tasks_are_names_or_local_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
    file = published.lambada(tmp_path)
    ours, local = {"path": str(tmp_path)}, dict.fromkeys(("train", "validation", "test"), str(file))
    lines: dict[str, Any] = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": local}}
    lines["num_fewshot"] = 0
    tasks = [{"task": "lambada_openai", **lines}, {"task": "switchall_cbt", "dataset_kwargs": ours}]
    assert task_specs(f"hellaswag, lambada_openai={file},switchall_cbt={tmp_path},arc_easy") == [
        "hellaswag",
        "arc_easy",
        {"group": "local files", "task": tasks},
    ]
    assert task_specs("hellaswag") == ["hellaswag"]
    for text, words in ((",a", "'' is no task"), ("a=", "'a=' is no task"), ("a=/gone", "a: there is no /gone")):
        with pytest.raises(UserError, match=f"--harness: {re.escape(words)}"):
            task_specs(text)
    with pytest.raises(UserError, match="--shots: switchall_lambada has questions alone"):
        task_specs("gsm8k,switchall_lambada", 2)
    names = {path.stem for path in harness_run.TASK_FILES.glob("*.yaml")}
    assert names == {"switchall_lambada", "switchall_blimp", "switchall_cbt"}


def test_examples_before_a_question_are_of_another_file(tmp_path: Path) -> None:
    """One file for all splits would show a question with its answer."""
    (tmp_path / "test.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "train.jsonl").write_text('{"a": 2}\n')
    (tmp_path / "other.jsonl").write_text('{"a": 3}\n')
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "test")}
    found = harness_run.local_data("gsm8k", tmp_path, 5)
    assert found["dataset_kwargs"] == {"data_files": files} and "num_fewshot" not in found
    assert harness_run.local_data("gsm8k", tmp_path / "test.jsonl", 0)["num_fewshot"] == 0
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin").write_bytes(b'{"a": 1}\n{"a": "\xe9"}\n')
    (tmp_path / "blank").write_text("\n")
    (tmp_path / "plain").write_text("The river")
    for place, shots, words in (
        (
            "test.jsonl",
            5,
            "--shots: gsm8k reads the one file .*test.jsonl, which would show a question",
        ),
        ("empty", 5, "gsm8k: .*empty has no train.jsonl, validation.jsonl or test.jsonl"),
        ("latin", None, "gsm8k: .*latin line 2: is no text in UTF-8"),
        ("blank", None, "gsm8k: .*blank: holds no line; name a file of JSON lines"),
        ("plain", None, "gsm8k: .*plain line 1: is not JSON; this file has one JSON object a line"),
    ):
        with pytest.raises(UserError, match=words) as error:
            harness_run.local_data("gsm8k", tmp_path / place, shots)
        assert str(error.value).startswith("--")


def test_lines_of_a_result_are_whole_or_not_there(tmp_path: Path) -> None:
    assert write_lines(tmp_path / "out", "samples", ["{}", '"\ud800 é"']) == tmp_path / "out" / "samples.jsonl"
    assert (tmp_path / "out" / "samples.jsonl").read_text() == '{}\n"? é"\n'
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out: .*file.* cannot be written"):
        write_lines(tmp_path / "file", "samples", [])


def test_without_the_package_it_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([str(tmp_path), "--harness", "hellaswag"]) == 2
    printed = capsys.readouterr().err
    assert 'pip install -e ".[eval]"' in printed and printed.count("\n") == 1
    for option in (["--shots", "2"], ["--log-samples"]):
        assert main([str(tmp_path), *option]) == 2
        assert f"{option[0]}: is for the tasks of --harness" in capsys.readouterr().err


def test_what_lm_eval_is_told_of_the_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ModelArgs.of({"pretrained": "runs/a"}) == ModelArgs(run=Path("runs/a"))
    told = pairs("pretrained=runs/a=b, data=d,ema=True,max_length=7") | {"batch_size": "3", "device": "cuda:1"}
    expected = ModelArgs(run=Path("runs/a=b"), batch=3, device="cuda:1", context=7, data=("d",), ema=True)
    assert ModelArgs.of(told) == expected
    for batch in ("auto", "auto:4"):
        assert ModelArgs.of({"pretrained": "a", "batch_size": batch}).batch == 16
    assert ModelArgs.of({"pretrained": "a", "batch_size": "auto", "max_batch_size": 5}).batch == 5
    for wrong, words in (
        ({}, "names no model; write pretrained=RUN"),
        ({"dtype": "float16"}, "there is no dtype; switchall knows pretrained, batch_size"),
        ({"ema": 2}, "ema is 2; write ema=true"),
        ({"batch_size": "many"}, "batch_size: is 'many'; give a whole number of at least 1, or auto, which is 16"),
        ({"batch_size": 0}, "batch_size: is '0'"),
        ({"max_length": "1.5"}, "max_length: is '1.5'; give a whole number of at least 1"),
    ):
        with pytest.raises(UserError, match=words):
            ModelArgs.of({"pretrained": "a", **wrong} if wrong else {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ModelArgs.of({"pretrained": "a", "device": "cuda:0"}).usable_device() == torch.device("cpu")
    assert "computes on the CPU" in capsys.readouterr().err
    with pytest.raises(UserError, match="device: is cuda, but torch finds no usable GPU"):
        ModelArgs.of({"pretrained": "a", "device": "cuda"}).usable_device()
    with pytest.raises(UserError, match="model_args: 'runs/a' has no value; write NAME=VALUE"):
        pairs("runs/a")


def test_how_a_task_draws_its_texts() -> None:
    settings = {"until": ["Q:"], "max_gen_toks": 9, "do_sample": True}
    assert sampling_of({**settings, "do_sample": False, "temperature": 0.0, "num_beams": 1}) == GREEDY
    assert sampling_of(settings) == Sampling(temperature=1.0, top_k=0, top_p=1.0)
    given = {"temperature": 0.2, "top_k": 40, "top_p": 0.9, "min_p": None}
    assert sampling_of({**settings, **given}) == Sampling(temperature=0.2, top_k=40, top_p=0.9)
    assert sampling_of({**settings, "temperature": 0.0}).temperature == 0.0, "the likeliest id"
    with pytest.raises(UserError, match="a task draws its texts with min_p; switchall draws by temperature, top_k"):
        sampling_of({**settings, "min_p": 0.1})
    with pytest.raises(UserError, match="a task draws its texts so: --temperature: is -1"):
        sampling_of({**settings, "temperature": -1})


@needs_lm_eval
@pytest.mark.slow  # lm_eval takes seconds to import; test_tasks.py has the numbers of the tasks
def test_its_numbers_are_those_of_our_tasks(run: Path, tmp_path: Path) -> None:
    file, blimp, cbt = published.lambada(tmp_path), published.blimp(tmp_path), published.cbt(tmp_path)
    named = f"lambada_openai={file},switchall_lambada={tmp_path},switchall_blimp={blimp},switchall_cbt={cbt}"
    assert main([str(run), "--harness", named, "--tasks", f"lambada={file},blimp={blimp}", "--batch", "3"]) == 0
    folder = run / "evaluation" / "step-00000001"
    results = json.loads((folder / "harness.json").read_text())["results"]
    ours = json.loads((folder / "lambada.json").read_text())
    for name in ("lambada_openai", "switchall_lambada"):
        assert results[name]["acc,none"] == ours["accuracy"]
        assert results[name]["perplexity,none"] == pytest.approx(ours["perplexity"], rel=1e-6)
    groups = json.loads((folder / "blimp.json").read_text())["groups"].values()
    pairs = sum(group["accuracy"] * group["examples"] for group in groups) / sum(group["examples"] for group in groups)
    assert results["switchall_blimp"]["acc,none"] == pytest.approx(pairs)
    assert 0 <= results["switchall_cbt"]["acc_norm,none"] <= 1


@needs_lm_eval
@pytest.mark.slow  # as above
def test_examples_before_a_question(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": f"What is {n} and one?", "answer": f"It is so. #### {n + 1}"} for n in range(3)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [str(run), "--context", "800", "--limit", "1", "--harness"]
    for given, expected in (
        ((f"gsm8k={tmp_path}", "--shots", "2"), 2),
        ((f"gsm8k={tmp_path / 'test.jsonl'}", "--log-samples"), 0),
    ):
        assert main([*arguments, *given]) == 0
        found = json.loads((run / "evaluation" / "step-00000001" / "harness.json").read_text())
        assert found["n-shot"] == {"gsm8k": expected}
    lines = (run / "evaluation" / "step-00000001" / "harness-samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [(one["task"], one["doc"]) for one in samples] == [("gsm8k", rows[0])] * 2, "by both filters"
    assert "What is 2 and one?" not in samples[0]["arguments"][0][0] and "exact_match" in samples[0]
    capsys.readouterr()
    assert main([*arguments, f"gsm8k={tmp_path}", "--shots", "4"]) == 2
    assert "fewer examples than it puts before a question" in capsys.readouterr().err
    (tmp_path / "test.jsonl").write_text('{"query": "What?"}\n')
    assert main([*arguments, f"gsm8k={tmp_path / 'test.jsonl'}"]) == 2
    assert "a local file lacks what its task reads" in capsys.readouterr().err.splitlines()[-1]


@needs_lm_eval
@pytest.mark.slow  # as above
def test_rolling_and_generated_texts(run: Path) -> None:
    from pretrain.evaluation.harness import HarnessModel

    model = HarnessModel.create_from_arg_string(f"pretrained={run}", {"batch_size": "auto", "device": None})
    model._limits = Limits(2, 64)
    saved_model, tokenizer = model._opened.evaluator.module, model._opened.tokenizer
    assert isinstance(saved_model, torch.nn.Module)
    text = "river house letter morning captain water " * 12

    def request(*args: Any) -> SimpleNamespace:
        return SimpleNamespace(args=args)

    ids = tokenizer.encode(text)
    expected = 0.0
    for first in range(0, len(ids), 64):
        window = [tokenizer.eos_id if first == 0 else ids[first - 1], *ids[first : first + 63]]
        targets = torch.tensor(ids[first : first + 64])
        with torch.no_grad():
            logits: torch.Tensor = saved_model.logits(torch.tensor([window]))[0][0, : len(targets)]  # type: ignore[operator]
        if len(targets) == 64:
            expected -= float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        else:  # the last window keeps as much context as fits
            whole = torch.tensor([ids[-65:-1]])
            with torch.no_grad():
                logits = saved_model.logits(whole)[0][0, -len(targets) :]  # type: ignore[operator]
            expected -= float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    short, long, empty = model.loglikelihood_rolling([request("A river"), request(text), request("")])
    assert math.isfinite(short) and empty == 0.0 and long == pytest.approx(expected, rel=1e-5)

    settings = {"until": ["\n\n"], "max_gen_toks": 6}
    made = model.generate_until([request("The river", settings), request("A", settings), request("", settings)])
    tokens = tokenizer.encode("The river")
    for _ in range(6):
        with torch.no_grad():
            tokens.append(int(saved_model.logits(torch.tensor([tokens]))[0][0, -1].argmax()))  # type: ignore[operator]
    kept = [t for t in tokens if t != tokenizer.eos_id]
    assert made[0] == tokenizer.decode(kept)[len("The river") :].partition("\n\n")[0] and len(made) == 3
    assert model.cut == 0
    model.generate_until([request("river house letter morning " * 20, {"until": [], "max_gen_toks": 60})])
    assert model.cut == 1, "of the prompt only what leaves room for the text was read"
    with pytest.raises(UserError, match=r"texts of 64 tokens .* and the model looks back over 64"):
        model.generate_until([request("A", {"until": [], "max_gen_toks": 64})])
    drawn = [request("A", {"do_sample": True, "temperature": 3.0, "until": [], "max_gen_toks": 9})] * 3
    texts = model.generate_until(drawn)
    assert len(set(texts)) == 3 and model.generate_until(drawn[:2]) == texts[:2]
