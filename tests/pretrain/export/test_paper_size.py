"""Exports of published models, whole: logits, generation and the way back at their real widths.

Slow; test_modeling.py and test_export.py have the same properties at small widths.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from common.paths import REPOSITORY
from model.language_model import LanguageModel, build_model
from pretrain.cli.import_weights import main as import_weights
from pretrain.config.loading import load_config
from pretrain.export.writing import ExportOptions, export
from tests.pretrain.export.models import checkpoint_of, our_logits
from tests.pretrain.saved import whole_tensors

pytestmark = pytest.mark.slow
LENGTHS = {"c4_switchhead_rope_244m": 301, "c4_switchall_259m": 2 * 512 + 37}
"""Tokens that are compared: with Transformer-XL's memory a third chunk begins."""
PROMPT, NEW = 11, 6


def initial_model(name: str) -> LanguageModel:
    """As a run begins, but with biases and norms that are not all equal."""
    model = build_model(load_config(REPOSITORY / "configs" / "paper" / f"{name}.json").model, seed=3).eval()
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    return model


@pytest.mark.parametrize("name", LENGTHS)
def test_a_published_model(
    name: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    from transformers import AutoModelForCausalLM

    ours, out = initial_model(name), tmp_path / "exported"
    tokens = torch.randint(ours.config.vocab_size, (1, LENGTHS[name]), generator=torch.Generator().manual_seed(1))
    checkpoint = checkpoint_of(ours, tmp_path / "step-00000003", prepared)
    export(checkpoint, out, ExportOptions(most_bytes=300_000_000))
    with torch.no_grad():
        expected = our_logits(ours, tokens)
    del ours
    theirs = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    with torch.no_grad():
        difference = float((theirs(tokens).logits - expected).abs().max())
        assert difference < 1e-5 and float(expected.abs().max()) > 1, difference
        settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        cached = theirs.generate(tokens[:, :PROMPT], **settings)
        assert cached.shape == (1, PROMPT + NEW)
        for place in range(PROMPT, PROMPT + NEW):  # greedy, each text whole
            scores = theirs(cached[:, :place], use_cache=False).logits[0, -1]
            scores[theirs.generation_config.eos_token_id] = -torch.inf
            assert int(scores.argmax()) == int(cached[0, place])
    parameters = sum(parameter.numel() for parameter in theirs.parameters())
    del theirs
    with capsys.disabled():
        print(f"\n{name}: {parameters:,} parameters, logits differ by at most {difference:.1e}")

    assert import_weights([str(out), "--to", str(tmp_path / "again")]) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    shutil.rmtree(out)
    again = whole_tensors(tmp_path / "again", prefixes=("master/",))
    assert {key.removeprefix("master/") for key in again} == index.keys()
    (shard,) = checkpoint.path.glob("rank-*.safetensors")
    with safe_open(shard, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  # no dict
            assert torch.equal(file.get_tensor(key), again[key.partition("@")[0]]), key
