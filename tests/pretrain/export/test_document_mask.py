"""Exports of models that were trained with data.document_mask: as in training, nothing before the id that ends a
document is seen behind it, with and without a cache, padding and beams."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from model.documents import document_index
from pretrain.api import open_model
from pretrain.cli.export import main
from pretrain.export.hf_config import hf_config
from pretrain.export.loading import load_export
from tests.pretrain.export.models import MODELS, checkpoint_of, model_of, some_tokens
from tests.pretrain.export.test_modeling import TOLERANCE, theirs
from tests.pretrain.saved import rewrite_state
from tests.tensors import gradient_of

END, LENGTH = 5, 23
ROPE = [name for name in MODELS if MODELS[name].get("position", {"type": "rope"})["type"] == "rope"]
MASKED = [name for name in ROPE if not MODELS[name].get("position", {}).get("memory_chunks")]
"""data.document_mask wants these."""


def texts() -> torch.Tensor:
    """Two rows of three documents, one of them EOS alone, and of one that ends last."""
    tokens = some_tokens(2, LENGTH)
    assert not (tokens == END).any()
    tokens[0, 4] = tokens[0, 12] = tokens[0, 13] = tokens[1, LENGTH - 1] = END
    return tokens


def masked(name: str, attention: str = "sdpa") -> Any:
    model = theirs(model_of(name), attention)
    model.config.document_end = END
    return model


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("switchall", "moa") else pytest.mark.slow) for name in MASKED]
)
def test_logits_and_gradients_are_those_of_the_mask(name: str) -> None:
    ours, tokens = model_of(name), texts()
    documents = document_index(tokens, END)
    logits = ours.logits(tokens, documents=documents)[0]
    assert not torch.allclose(logits, ours.logits(tokens)[0], atol=1e-3), "the mask makes no difference here"
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for attention in ("sdpa", "eager"):
        model = masked(name, attention)
        found = model(tokens, labels=tokens)
        assert torch.allclose(found.logits, logits, atol=TOLERANCE, rtol=0)
        found.loss.backward()
        for parameter, value in ours.named_parameters():
            theirs_of = gradient_of(model.get_parameter(parameter))
            assert torch.allclose(theirs_of, gradient_of(value), atol=TOLERANCE, rtol=1e-4), parameter


@pytest.mark.parametrize("name", MASKED)
@torch.no_grad()
def test_cache_and_padding_know_the_documents(name: str) -> None:
    ours, tokens = model_of(name), texts()
    logits = ours.logits(tokens, documents=document_index(tokens, END))[0]
    model = masked(name)
    for pieces in ([5, 1, 1, 2, 4, 1, LENGTH - 14], [1] * LENGTH):  # ends stand last, first, alone and inside
        cache, parts = None, []
        for piece in tokens.split(pieces, dim=1):
            output = model(piece, cache=cache, use_cache=True)
            cache = output.cache
            parts.append(output.logits)
        assert torch.allclose(torch.cat(parts, dim=1), logits, atol=TOLERANCE, rtol=0)

    pad = 4
    mask = torch.ones(2, LENGTH + pad, dtype=torch.int64)
    mask[0, :pad] = mask[1, LENGTH:] = 0
    rows = torch.full_like(mask, END)  # padding with EOS, as many do, ends no document
    rows[0, pad:], rows[1, :LENGTH] = tokens
    for each in (model, masked(name, "eager")):
        found = each(rows, attention_mask=mask).logits
        assert torch.allclose(found[0, pad:], logits[0], atol=TOLERANCE, rtol=0)
        assert torch.allclose(found[1, :LENGTH], logits[1], atol=TOLERANCE, rtol=0) and found.isfinite().all()
    begun = model(rows[:, :9], attention_mask=mask[:, :9], use_cache=True)
    rest = model(rows[:, 9:], attention_mask=mask, cache=begun.cache).logits
    assert torch.allclose(rest[0], logits[0, 9 - pad :], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_goes_on_from_the_last_document(beams: int) -> None:
    """Of prompts of other lengths, padded on the left, by the cache and without it."""
    model = masked("switchall")
    rows, mask = texts(), torch.ones(2, LENGTH, dtype=torch.int64)
    rows[1, 9], mask[1, :3] = END, 0
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "eos_token_id": None, "pad_token_id": 0}
    texts_of = [model.generate(rows, attention_mask=mask, use_cache=cached, **settings) for cached in (True, False)]
    assert torch.equal(*texts_of)
    found = texts_of[0][:, LENGTH:]
    for row, begin in ((0, 14), (1, 10)):  # behind the last end
        alone = model.generate(rows[row : row + 1, begin:], **settings)[:, LENGTH - begin :]
        assert torch.equal(alone[0], found[row])


def test_what_cannot_know_the_documents_is_refused() -> None:
    model, tokens = masked("dense"), texts()
    with pytest.raises(ValueError, match=r"give them instead of inputs_embeds, or set config\.document_end to None"):
        model(inputs_embeds=model.embedding(tokens))
    model.config.document_end = None
    cache = model(tokens, use_cache=True).cache
    model.config.document_end = END
    with pytest.raises(ValueError, match="keeps in the cache where documents end, and finds it not in this one"):
        model(tokens, cache=cache)


def test_an_export_of_such_a_run_has_the_mask_and_keeps_it(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """config.json names the end; --verify compares across one; what comes back has the mask, without training.json
    too."""
    checkpoint = checkpoint_of(model_of("dense"), tmp_path / "step-00000003", prepared)
    rewrite_state(checkpoint.path, lambda state: state["config"]["data"].update(document_mask=True))
    out = tmp_path / "mine"
    assert main([str(checkpoint.path), "--to", str(out), "--verify"]) == 0, capsys.readouterr().err
    end = open_model(checkpoint.path).tokenizer.eos_id
    assert json.loads((out / "config.json").read_text())["document_end"] == end is not None
    assert "(`document_end` in `config.json`) nothing before is seen" in (out / "README.md").read_text()
    tuned = shutil.copytree(out, tmp_path / "tuned")
    (tuned / "training.json").unlink()
    assert [load_export(folder).document_end for folder in (out, tuned)] == [end, end]
    assert hf_config(model_of("dense").config, dtype="float32", special={})["document_end"] is None
