"""A model that was trained with data.document_mask sees nothing of what stands before an EOS behind it, in whatever way
it is used: each document is computed as if it stood alone, where a model without the mask sees them all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.shards.format import Manifest
from model.language_model import LanguageModel
from model.parallel.context import ParallelContext
from pretrain.analysis.trace import Request, trace_text
from pretrain.api import open_model
from pretrain.cli.evaluate import main
from pretrain.data.windows import WindowReader
from pretrain.engine.without_engine import ModelEvaluator
from pretrain.evaluation.examples import as_query
from pretrain.evaluation.likelihood import Limits, Place, answer
from pretrain.generation.ids import Cost, Work, continued
from pretrain.generation.sampling import Sampling
from pretrain.saved_model import load_model
from tests.pretrain.analysis.models import CASES, tiny
from tests.pretrain.evaluation import published
from tests.pretrain.saved import rewrite_state

END = 5
PLACE = Place(ParallelContext(), torch.device("cpu"))


@pytest.fixture(scope="module")
def masked(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose configuration has the mask."""
    folder = tmp_path_factory.mktemp("masked") / "run"
    shutil.copytree(trained, folder)
    for checkpoint in (folder / "checkpoints").iterdir():
        rewrite_state(checkpoint, lambda state: state["config"]["data"].update(document_mask=True))
    return folder


def test_the_api_has_the_losses_that_training_had(masked: Path, prepared: Path) -> None:
    """Of windows with several documents."""
    opened = open_model(masked)
    T, end = opened.config.model.sequence_length, opened.tokenizer.eos_id
    assert end is not None
    reader = WindowReader(Manifest.load(prepared), "train", T)
    documents = reader.documents(np.arange(reader.num_windows))
    windows = np.flatnonzero(documents[:, -1].numpy() > 0)[:4]
    tokens, targets = reader.read(windows)
    _, expected, _ = opened.model(tokens, targets, torch.zeros(4, dtype=torch.int64), documents[windows])
    _, unmasked, _ = opened.model(tokens, targets, torch.zeros(4, dtype=torch.int64))
    assert (expected - unmasked).abs().min() > 1e-5, "the mask makes no difference here"
    for row in range(4):
        loss = opened.loss([*tokens[row].tolist(), int(targets[row, -1])])
        assert loss.mean == pytest.approx(float(expected[row]), abs=1e-5)

    one, two = opened.encode("gab de"), opened.encode("fab\nc")
    text = [*one, end, *two]
    assert torch.allclose(opened.logits(text)[len(one) + 1 :], opened.logits(two), atol=1e-5)
    assert torch.allclose(opened.hidden_states(text)[:, len(one) + 1 :], opened.hidden_states(two), atol=1e-5)
    maps = opened.attention(text)
    for layer, weights in opened.attention(two).weights.items():
        found = maps.weights[layer][:, len(one) + 1 :]
        assert torch.allclose(found[:, :, len(one) + 1 :], weights, atol=1e-5)
        assert not found[:, :, : len(one) + 1].any(), "keys of the other document"
    gates = [router.gates[len(one) + 1 :] for router in opened.routing(text)]
    assert all(
        np.allclose(*pair, atol=1e-5) for pair in zip(gates, [r.gates for r in opened.routing(two)], strict=True)
    )


@pytest.mark.parametrize("case", [case for case in CASES if "position" not in CASES[case]])
def test_maps_of_every_attention(case: str) -> None:
    model, one, two = tiny(case), [7, 1, END], [9, 8, 2, 4]
    trace = trace_text(model, one + two, Request([0, 1]), document_end=END)
    alone = trace_text(model, two, Request([0, 1]))
    for layer, weights in alone.maps.items():
        assert np.allclose(trace.maps[layer][:, 3:, 3:], weights, atol=1e-5) and not trace.maps[layer][:, 3:, :3].any()
    assert np.allclose(trace.losses[3:], alone.losses, atol=1e-5)


def log_p(model: LanguageModel, context: list[int], token: int) -> float:
    with torch.no_grad():
        return float(model.logits(torch.tensor([context]))[0][0, -1].double().log_softmax(0)[token])


def test_a_target_behind_an_end_does_not_see_it() -> None:
    """The first token alone is told by EOS, as in training."""
    model = tiny("switchhead")
    queries = [as_query([END], [3, 8, 1]), as_query([2, 6, END, 4], [9]), as_query([3, 4], [END])]
    expected = [
        log_p(model, [END], 3) + log_p(model, [3], 8) + log_p(model, [3, 8], 1),
        log_p(model, [4], 9),
        log_p(model, [3, 4], END),
    ]
    found = answer(ModelEvaluator(model, in_stages=False), queries, Limits(3, 7, END), PLACE)
    assert found is not None
    assert [one.log_likelihood for one in found.answers] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow  # the fast one: test_a_target_behind_an_end_does_not_see_it
def test_tasks_of_a_checkpoint(masked: Path, trained: Path, tmp_path: Path) -> None:
    """BLiMP's sentences stand behind an EOS. LAMBADA's texts hold none, and are the same."""
    named = f"blimp={published.blimp(tmp_path)},lambada={published.lambada(tmp_path)}"
    results = []
    for run in (trained, masked):
        out = tmp_path / run.parent.name
        assert main([str(run), "--tasks", named, "--context", "99", "--out", str(out)]) == 0
        results.append([json.loads((out / f"{task}.json").read_text()) for task in ("lambada", "blimp")])
    assert results[0][0]["perplexity"] == pytest.approx(results[1][0]["perplexity"], rel=1e-6)
    saved = load_model(masked)
    end, rows = saved.tokenizer.eos_id, []
    assert end is not None
    for path in (tmp_path / "blimp").rglob("*.jsonl"):
        for line in path.read_text().splitlines():
            sums = []
            for key in ("sentence_good", "sentence_bad"):
                first, *others = saved.tokenizer.encode(json.loads(line)[key])
                total = log_p(saved.model, [end], first)
                sums.append(
                    total + sum(log_p(saved.model, [first, *others[:n]], token) for n, token in enumerate(others))
                )
            rows.append((path.stem, sums[0] > sums[1]))
    accuracy = {name: np.mean([right for of, right in rows if of == name]) for name, _ in rows}
    assert {name: group["accuracy"] for name, group in results[1][1]["groups"].items()} == pytest.approx(accuracy)


@pytest.mark.parametrize("is_cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("context", [None, 7])
def test_texts(is_cached: bool, context: int | None) -> None:
    """What is written goes on from the document that the prompt is in; EOS itself still sees the one that it ends."""
    model = tiny("dense")

    def texts(*prompts: list[int], slides: bool = False, tokens: int = 3) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in prompts]
        greedy = Sampling(temperature=0.0)
        work = Work(
            prompts, [0] * len(prompts), greedy, [tokens] * len(prompts), None, 50,
            is_cached=is_cached, context=context, slides=slides, document_end=END,
        )  # fmt: skip
        for text, number in continued(model, work, Cost()):
            found[text].append(number)
        return found

    (alone,), (first,) = texts([9, 8]), texts([9, 8, 7, END], tokens=1)
    (rest,) = texts(first)
    whole = texts([1, 2, END, 9, 8], [9, 8, 7, END], [END, 9, 8], [9, 8])
    assert whole == [alone, [*first, *rest[:2]], alone, alone]
    assert texts([1, 2, 3, 4, END, 9, 8], slides=True, tokens=5)[0] == texts([9, 8], tokens=5)[0]
