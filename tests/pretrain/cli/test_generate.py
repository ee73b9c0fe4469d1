"""launch/generate.py: what it prints, where, and what it refuses."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import pretrain.export.loading
import pretrain.generation.texts
import pretrain.saved_model.loading
from model.language_model import build_model
from pretrain.cli import generate as cli
from pretrain.cli.generate import main
from pretrain.generation.ids import Cost
from pretrain.generation.texts import Generated, Piece, Settings, stream
from pretrain.saved_model import load_model
from tests.pretrain.saved import add_moving_average

Printed = tuple[int, str, str]
PROMPT = "gab de"


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are hashed by tests of the loader."""
    monkeypatch.setattr(pretrain.saved_model.loading.Checkpoint, "damaged_file", lambda *args, **kwargs: None)


@pytest.fixture
def generate(capsys: pytest.CaptureFixture[str]) -> Callable[..., Printed]:
    def run(*arguments: object) -> Printed:
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_a_text_with_and_without_a_cache(trained: Path, generate: Callable[..., Printed]) -> None:
    options = ("--prompt", PROMPT, "--tokens", 6, "--seed", 3)
    code, text, said = generate(trained, *options)
    assert code == 0 and text.startswith(PROMPT) and len(text) > len(PROMPT) + 1 and text.endswith("\n")
    # 2 layers of 2 heads x 6, keys and values, 4 bytes; as wide as the model: 24.
    assert " tokens in " in said and "to read the prompts (7 tokens) and write" in said
    assert "tokens/s with a cache" in said
    assert "tokens/s" not in generate(trained, *options[:2], "--tokens", 1)[2], "one token has no rate"
    assert "0.2 KiB a token" in said
    assert "= d_model = 24) keeps 0.4 KiB, 2.00 times" in said
    assert generate(trained, *options, "--no-cache")[1] == text
    assert "tokens/s without a cache" in generate(trained, *options, "--no-cache")[2]
    assert generate(trained, *options[:-1], 4)[1] != text


def test_the_moving_average_writes(trained: Path, generate: Callable[..., Printed], tmp_path: Path) -> None:
    """By greedy decoding of a model that is built with it, one whole text after the other."""
    run = shutil.copytree(trained, tmp_path / "averaged")
    (checkpoint,) = (run / "checkpoints").iterdir()
    options = ("--prompt", PROMPT, "--tokens", 6, "--temperature", 0, "--json")
    code, out, said = generate(run, *options, "--ema")
    assert (code, out) == (2, "") and "holds no moving average of the weights; leave --ema out" in said
    average = add_moving_average(checkpoint, lambda weight: weight.flip(-1) + 0.05)
    saved = load_model(run, verify=False)
    model = build_model(saved.config.model, seed=0).eval()
    model.load_state_dict(average)
    ids = saved.tokenizer.encode(PROMPT)
    length = len(ids)
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model.logits(torch.tensor([ids]))[0][0, -1, : saved.tokenizer.vocab_size].argmax()))
    found, of_weights = (json.loads(generate(run, *options, *more)[1])["ids"] for more in (("--ema",), ()))
    assert found == ids[length:] and found != of_weights


def test_json_of_several_prompts_and_samples(
    trained: Path, generate: Callable[..., Printed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["gab de", "\x1b[31m", "fé"]
    (tmp_path / "p.txt").write_text("gab de\n\n\x1b[31m\r\nfé\n", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    options = ("--tokens", 4, "--samples", 2, "--json", "--batch", 3)
    code, out, _ = generate(trained, "--prompts", tmp_path / "p.jsonl", *options)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and '"prompt": "fé"' in out and "\x1b" not in out
    assert [(row["prompt"], row["sample"]) for row in rows] == [(p, s) for p in prompts for s in (0, 1)]
    assert all(row["ended"] or len(row["ids"]) == 4 for row in rows)
    assert generate(trained, "--prompts", tmp_path / "p.txt", *options)[1] == out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((tmp_path / "p.txt").read_bytes())))
    assert generate(trained, "--prompts", "-", *options)[1] == out
    alone = generate(trained, "--prompt", "fé", *options)[1]
    assert alone.splitlines() == out.splitlines()[4:]
    code, out, _ = generate(trained, "--prompt", "a", "--prompt", "b", "--tokens", 2)
    assert out.startswith("--- 1 of 2\na") and "\n--- 2 of 2\nb" in out


def test_samples_without_end_begin_at_once(trained: Path) -> None:
    settings = Settings(samples=10**12, tokens=1, batch=2)
    pieces = list(itertools.islice(stream(load_model(trained), ["gab"], settings, Cost()), 5))
    assert [piece.number for piece in pieces] == [0, 1, 2, 3, 4] and all(piece.finished for piece in pieces)


def test_a_terminal_is_not_steered(
    trained: Path, generate: Callable[..., Printed], monkeypatch: pytest.MonkeyPatch
) -> None:
    def says(*_args: object, **_options: object) -> Iterator[tuple[int, int]]:
        yield from ((0, number) for number in of_escape)

    saved = load_model(trained, verify=False)
    of_escape = saved.tokenizer.encode("\x1b[2Ja")
    monkeypatch.setattr(pretrain.generation.texts, "continued", says)
    options = ("--prompt", "b\r", "--tokens", len(of_escape))
    assert generate(trained, *options)[1] == "b\r \x1b[2Ja\n"  # a file gets what the model wrote
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert generate(trained, *options)[1] == "b\\r \\x1b[2Ja\n"


def test_a_conversation(trained: Path, generate: Callable[..., Printed], monkeypatch: pytest.MonkeyPatch) -> None:
    """A line each; what is wrong with one is said, and the next is asked for; the end of input ends it."""
    lines = iter([PROMPT, "", "gab " * 30, PROMPT])

    def read(_sign: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    code, out, said = generate(trained, "--interactive", "--tokens", 3)
    first, second, end = out.split("\n")[0], out.split("\n")[1], out.split("\n")[2:]
    assert code == 0 and first == second and first.startswith(PROMPT) and end == ["", ""]
    assert said.startswith("error: the prompt: has ") and "give --slide" in said


def test_ctrl_c_ends_a_text_early(
    trained: Path, generate: Callable[..., Printed], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_args: object, **_options: object) -> Iterator[tuple[int, int]]:
        yield 0, 20
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain.generation.texts, "continued", interrupted)
    code, out, _ = generate(trained, "--prompt", PROMPT)
    assert code == 130 and out.startswith(PROMPT) and out.endswith("\n")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--prompt", ""], "--prompt: is empty; give some words"),
        (["--prompt", "gab " * 30], "--prompt: has .* tokens, and the model's context is model.sequence_length = 16"),
        (["--prompt", "a", "--tokens", "17"], r"--tokens: 17 after the .* give at most --tokens 1\d, or --slide"),
        (["--prompt", "a", "--tokens", "0"], "--tokens: is 0; the least is 1"),
        (["--prompt", "a", "--until", ""], "--until: is empty; give the words"),
        (["--prompt", "a", "--samples", "0"], "--samples: is 0"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature: is -1.0; give 0"),
        (["--prompt", "a", "--top-p", "1.1"], "--top-p: is 1.1; give a probability"),
        (["--prompt", "a", "--top-k", "-2"], "--top-k: is -2"),
        (["--prompts", "nowhere.txt"], "--prompts: nowhere.txt cannot be read: No such file"),
        (["--prompts", "EMPTY"], "--prompts: .*empty has no line with a prompt"),
        (["--prompts", "BAD.jsonl"], "--prompts: line 1 of .*bad.jsonl has no text under the key prompt"),
        (["--prompts", "DEEP.jsonl"], "--prompts: line 1 of .*deep.jsonl is no JSON"),
        (["--prompts", "BINARY"], "--prompts: .*binary is no text in UTF-8 .byte 1.; convert it .* iconv -f"),
    ],
)
def test_what_is_refused(
    arguments: list[str], words: str, trained: Path, generate: Callable[..., Printed], tmp_path: Path
) -> None:
    files = {"empty": b"\n \n", "bad.jsonl": b'{"text": 1}\n', "deep.jsonl": b"[" * 100_000, "binary": b"a\xff"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        arguments = [str(tmp_path / name) if a.lower() == name else a for a in arguments]
    code, out, said = generate(trained, *arguments)
    assert (code, out) == (2, "") and said.count("\n") == 1
    assert re.match("error: " + words, said), said


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_the_end_of_the_last_line_of_standard_input_is_no_part_of_the_prompt(
    end: str, trained: Path, generate: Callable[..., Printed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"one\r\n{PROMPT}{end}".encode())))
    code, out, _ = generate(trained, "--prompt", "-", "--tokens", 2, "--json")
    assert code == 0 and json.loads(out)["prompt"] == f"one\r\n{PROMPT}"


def test_bytes_that_are_no_text_are_refused_as_an_argument_and_in_a_conversation(
    trained: Path, generate: Callable[..., Printed], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, said = generate(trained, "--prompt", "a\udcff", "--tokens", 2)
    assert (code, out, said.count("\n")) == (2, "", 1) and "character 2 of the text" in said
    lines = iter(["a\udcff", PROMPT])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or (_ for _ in ()).throw(EOFError))
    code, out, said = generate(trained, "--interactive", "--tokens", 2)
    assert code == 0 and PROMPT in out and "error: character 2 of the text" in said


def test_a_damaged_checkpoint(trained: Path, generate: Callable[..., Printed], tmp_path: Path) -> None:
    copy = shutil.copytree(trained, tmp_path / "rope")
    (shard,) = copy.rglob("rank-*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    code, _, said = generate(copy, "--prompt", "a")
    assert code == 2 and re.fullmatch(r"error: .*rank-00000.safetensors is .* bytes, not .*\n", said), said


def test_logits_that_are_not_finite_and_ids_that_do_not_fit(
    trained: Path, generate: Callable[..., Printed], monkeypatch: pytest.MonkeyPatch
) -> None:
    def altered(change: Callable[[Any], None]) -> Callable[..., Any]:
        def load(*args: Any, **options: Any) -> Any:
            saved = load_model(*args, **options)
            change(saved)
            return saved

        return load

    def with_change(change: Callable[[Any], None]) -> None:
        monkeypatch.setattr(pretrain.export.loading, "load_model", altered(change))

    with_change(lambda saved: saved.model.final_norm.weight.fill_(torch.nan))
    code, _, said = generate(trained, "--prompt", "a")
    assert code == 2 and "step-00000001 (step 1): the logits of new token 1 of --prompt are not finite" in said
    with_change(lambda saved: vars(saved.tokenizer).update(eos_id=None))
    code, _, said = generate(trained, "--prompt", "a", "--tokens", 3)
    assert code == 0 and said.startswith("the run's data have no id that ends a text: texts end after --tokens\n")


def test_each_text_begins_with_its_prompt_which_messages_call_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = cli._prompts(argparse.Namespace(prompts=None, prompt=["a", "b"]))
    assert prompts == [("a", "--prompt 1"), ("b", "--prompt 2")]
    pieces = [Piece(number, content, None) for number in range(4) for content in ("x", "y")]
    monkeypatch.setattr(pretrain.generation.texts, "stream", lambda *_, **__: pieces)
    printer, nothing = Mock(), Mock()
    assert cli._print_all(nothing, prompts, Settings(samples=2), Cost(), printer) == 0
    assert [call.args for call in printer.begin.call_args_list] == [(p, n, 4) for n, p in enumerate("aabb")]
    assert [call.args[0] for call in printer.add.call_args_list] == list("xyxyxyxy")


@pytest.mark.parametrize("is_ended", [True, False])
def test_json_says_whether_the_model_ended_the_text(is_ended: bool) -> None:
    found = cli._as_dict(Generated("a", 1, " b", (3, 4), is_ended))
    assert found == {"prompt": "a", "sample": 1, "text": " b", "ids": [3, 4], "ended": is_ended}


def test_the_rate_is_of_what_comes_after_the_first_tokens() -> None:
    cost = Cost(tokens=30, seconds=3.0, prompt_tokens=7, prompt_seconds=1.0, first_tokens=10)
    said = cli._report(Mock(), Settings(is_cached=False), cost)
    assert said.startswith("30 tokens in 3.00 s: 1.00 s to read the prompts (7 tokens)")
    assert said.endswith("; then 10.0 tokens/s without a cache")
    assert [cli._size(count) for count in (1536, 3 << 20)] == ["1.5 KiB", "3.0 MiB"]


def test_ctrl_c_where_a_prompt_is_asked_for_ends_the_conversation_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", Mock(side_effect=["gab", KeyboardInterrupt]))
    assert list(cli._lines()) == ["gab"]
