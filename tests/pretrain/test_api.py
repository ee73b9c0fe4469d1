"""pretrain/api.py against plain use of the model, and the example notebook, run from its first cell to its last."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pretrain
from common.errors import UserError
from model.config import XLConfig
from model.language_model import build_model
from pretrain.api import OpenModel, open_model
from pretrain.export.writing import ExportOptions, export
from pretrain.saved_model import load_model
from tests.pretrain.saved import whole_tensors

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "notebooks" / "use_a_model.ipynb"
TEXT = "gab de fab\nc"


@pytest.fixture(scope="module")
def opened(trained: Path) -> OpenModel:
    return open_model(trained)


def test_logits_hidden_states_and_losses(opened: OpenModel) -> None:
    ids = opened.encode(TEXT)
    assert 2 < len(ids) <= 16
    logits = opened.model.logits(torch.tensor([ids]))[0][0]
    assert torch.allclose(opened.logits(TEXT), logits, atol=1e-5) and torch.equal(
        opened.logits(ids), opened.logits(TEXT)
    )

    hidden = opened.hidden_states(TEXT)
    weights = whole_tensors(opened.checkpoint.path, prefixes=("master/",))
    assert hidden.shape == (3, len(ids), 24) and torch.equal(hidden[0], weights["master/embedding.weight"][ids])
    norm = torch.nn.functional.layer_norm(
        hidden[-1], (24,), weights["master/final_norm.weight"], weights["master/final_norm.bias"]
    )
    assert torch.allclose(norm @ weights["master/head.weight"].T + weights["master/head.bias"], logits, atol=1e-5)

    loss = opened.loss(TEXT)
    expected = [-float(logits[place].double().log_softmax(0)[ids[place + 1]]) for place in range(len(ids) - 1)]
    assert loss.tokens.tolist() == pytest.approx(expected, abs=1e-5)
    assert loss.mean == pytest.approx(sum(expected) / len(expected)) and loss.perplexity == pytest.approx(
        math.exp(loss.mean)
    )
    size = len(TEXT.encode()) - len(opened.tokenizer.decode(ids[:1]).encode())
    assert loss.bits_per_byte == pytest.approx(sum(expected) / math.log(2) / size)
    assert math.isnan(opened.loss([*ids, 0]).bits_per_byte), "an unknown piece stands for any text"


@pytest.mark.parametrize("count", [33, 40])
def test_the_loss_of_a_long_text_takes_the_logits_of_a_chunk_at_a_time(opened: OpenModel, count: int) -> None:
    """Chunks of 16 tokens, the last one of a single token, which predicts nothing, or of 8."""
    ids, seen = [3 + 7 * n % 300 for n in range(count)], list[int]()
    expected = -opened.logits(ids)[:-1].log_softmax(1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    hook = opened.model.head.register_forward_hook(lambda module, given, made: seen.append(made[0].shape[1]))
    try:
        found = opened.loss(ids).tokens
    finally:
        hook.remove()
    assert torch.allclose(found, expected, atol=1e-5) and seen == [16, 16, count - 32]


def test_a_model_on_a_cpu_is_ready_for_single_tokens(opened: OpenModel, trained: Path) -> None:
    """Other ops for the same logits."""
    plain = load_model(trained)
    ids = torch.tensor([opened.encode(TEXT)])
    assert torch.allclose(plain.model.logits(ids)[0], opened.model.logits(ids)[0], atol=1e-5)
    for name, found in (("cpu", plain.model), ("reference", opened.model)):
        for block in found.blocks:
            attention: Any = block.get_submodule("attention")
            feedforward: Any = block.get_submodule("feedforward")
            b = attention.backends
            assert (b.route, b.switchhead_value, b.switchhead_output) == (name, name, name)
            assert feedforward.backends.sigma_moe == "cpu"


def test_maps_and_choices_and_texts(opened: OpenModel) -> None:
    maps = opened.attention(TEXT, layers=[1])
    n = len(opened.encode(TEXT))
    assert (
        list(maps.weights) == [1]
        and maps.weights[1].shape == (2, n, n)
        and (maps.first_query, maps.first_key) == (0, 0)
    )
    assert torch.allclose(maps.weights[1].sum(2), torch.ones(2, n), atol=1e-5)
    xl = opened.config.model.model_copy(update={"position": XLConfig()})
    memory = OpenModel(opened.saved._replace(model=build_model(xl, seed=1).eval()))
    with_memory = memory.attention(TEXT * 4, window=1)
    assert list(with_memory.weights) == [0, 1] and (with_memory.first_query, with_memory.first_key) == (16, 0)
    names = [router.name for router in opened.routing(TEXT)]
    assert (
        names[:3] == ["blocks.0.attention.value", "blocks.0.attention.output", "blocks.0.feedforward"]
        and len(names) == 6
    )
    first, second = opened.generate("gab", tokens=5, samples=2, seed=4)
    assert (first.prompt, first.sample, second.sample) == ("gab", 0, 1) and first.ids != second.ids
    assert opened.generate(["de", "gab"], tokens=5, seed=4)[1] == first
    assert "rope/checkpoints/step-00000001, step 1, 2 layers of 24" in repr(opened)


def test_an_export_is_opened_like_its_run(opened: OpenModel, tmp_path: Path) -> None:
    export(opened.checkpoint, tmp_path / "exported", ExportOptions())
    exported = open_model(tmp_path / "exported")
    assert torch.equal(exported.logits(TEXT), opened.logits(TEXT)) and "exported, step 1, 2 layers" in repr(exported)
    assert exported.generate("gab", tokens=5, seed=4) == opened.generate("gab", tokens=5, seed=4)


def test_what_a_program_made_of_the_weights_is_a_checkpoint(opened: OpenModel, trained: Path, tmp_path: Path) -> None:
    """Trained on in plain PyTorch, of a run and of an export of it."""
    export(opened.checkpoint, tmp_path / "exported", ExportOptions())
    for number, place in enumerate((trained, tmp_path / "exported")):
        tuned = open_model(place)
        before = tuned.logits(TEXT)
        model = tuned.model.train().requires_grad_(True)
        tokens = torch.tensor([tuned.encode(TEXT)])
        model(tokens[:, :-1], tokens[:, 1:], torch.arange(1))[0].backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        model.eval()
        found = open_model(tuned.save(tmp_path / f"tuned {number}", "one more step"))
        assert torch.equal(found.logits(TEXT), tuned.logits(TEXT)) and not torch.equal(found.logits(TEXT), before)
        assert found.checkpoint.state["weights_only"]["source"] == "one more step"
        assert found.checkpoint.progress.step == 1 and found.encode(TEXT) == tuned.encode(TEXT)
        assert (found.checkpoint.path / "tokenizer.model").exists(), "no data are needed to read text"
    with pytest.raises(UserError, match=r"^folder: .*tuned 0"):
        tuned.save(tmp_path / "tuned 0")


def test_who_saves_a_large_model_sees_how_far_it_is(
    opened: OpenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: dict[str, list[int]] = {}

    def count_bytes(description: str, total: int) -> Callable[[int], None]:
        counts = bars[description] = [total]
        return counts.append

    monkeypatch.setattr("pretrain.api.count_bytes", count_bytes)
    written = next(opened.save(tmp_path / "mine").glob("*.safetensors"))
    total, *counts = bars["mine"]
    assert total == sum(4 * parameter.numel() for parameter in opened.model.parameters())
    assert len(counts) > 1 and sum(counts) == written.stat().st_size


def test_a_text_ends_where_it_is_told(opened: OpenModel) -> None:
    free, other = opened.generate(["gab", "de"], tokens=12, seed=4)
    word = free.text[4:6]
    ended = opened.generate(["gab", "de"], tokens=12, seed=4, until=word)
    assert ended[0].is_ended and ended[0].text == free.text[: free.text.index(word) + 2] != free.text
    assert len(ended[0].ids) < 12 and free.ids[: len(ended[0].ids)] == ended[0].ids
    assert ended[1].text == other.text[: other.text.index(word) + 2] if word in other.text else ended[1] == other


def test_what_is_refused(opened: OpenModel) -> None:
    def refused(words: str, call: Any, *args: Any, **options: Any) -> None:
        with pytest.raises(UserError, match=words):
            call(*args, **options)

    refused("text: is empty", opened.logits, "")
    refused("text: holds the id 400, but the model's ids are 0 to 399", opened.logits, [3, 400])
    for wrong in (["gab"], 3, None, b"gab", [1.5], torch.tensor([[3, 4]])):
        refused(r"text: is .*; give a str, or the ids of one text", opened.logits, wrong)
    refused("text: is a single token", opened.loss, [3])
    for wrong in (0, "0", [0.5]):
        refused(r"layers: is .*; give the numbers of layers in a list", opened.attention, TEXT, layers=wrong)
    refused("layers: there is no layer 2", opened.attention, TEXT, layers=[2])
    refused("window: is 0.0, but", opened.attention, TEXT, window=0.0)
    refused("window: is 1, but", opened.attention, TEXT, window=1)
    refused("the prompt: is empty", opened.generate, "")
    refused("prompt 2: is empty", opened.generate, ["a", ""])
    for wrong in ([3, 4], 3, None, ["gab", None]):
        refused(r"prompt: is (3|None); give a str, or a list of them", opened.generate, wrong)
    for name, value in (("temperature", "hot"), ("temperature", None), ("top_p", [1])):
        refused(rf"^{name}: is .*; give a number", opened.generate, "a", **{name: value})
    for name in ("tokens", "samples", "top_k", "seed"):
        refused(rf"^{name}: is 2.5; give a whole number", opened.generate, "a", **{name: 2.5})
    refused(r"^until: is \['a'\]; give the words", opened.generate, "a", until=["a"])
    refused("^top: generate has no such argument", opened.generate, "a", top=3)
    assert len(opened.generate("a", tokens=2, top_k=np.int32(3), temperature=np.float32(1.0))[0].ids) <= 2
    for wrong in (None, 3, b"runs/mine"):
        refused(r"place: is .*; give a run folder", open_model, wrong)
    refused("^top_p: is 0", opened.generate, "a", top_p=0.0)
    most = opened.config.model.sequence_length
    refused(rf"^tokens: {most + 9} .* give at most tokens \d+, or slide$", opened.generate, "a", tokens=most + 9)
    assert len(opened.generate("a", tokens=most + 9, slide=True)[0].ids) > most


def test_the_notebook_runs(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a run in the place of the demo's, in the folder where Jupyter starts it. It is stored without outputs, which
    would hold paths of a machine."""
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"]) and len(cells) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(trained)
    (tmp_path / "docs" / "notebooks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "docs" / "notebooks")
    monkeypatch.setattr(pretrain, "__file__", str(tmp_path / "pretrain" / "__init__.py"))
    variables: dict[str, Any] = {}
    for cell in cells:
        # As in a notebook every cell sees what the cells before it defined.
        text = "".join(cell["source"]).replace("The river had risen in the night", "gab de fab c")
        text = text.replace("tokens=20", "tokens=5")
        exec(compile(text, cell["id"], "exec"), variables)
    printed = capsys.readouterr().out
    assert "perplexity" in printed and "head 1: the last token looks" in printed and "blocks.1.feedforward" in printed
    assert len(re.findall(r"^'The river", printed, re.MULTILINE)) == 2
