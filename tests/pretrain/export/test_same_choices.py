"""What rounding decides between two experts does not tell an export from its checkpoint; a wrong router does."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from model.language_model import LanguageModel
from pretrain.checkpoint import Checkpoint
from pretrain.export import layers_switchall
from pretrain.export.same_choices import kept_choices
from pretrain.export.verify import CHUNKS, logits_of, verify
from pretrain.export.writing import ExportOptions, export
from tests.pretrain.export.models import CHUNK, checkpoint_of, model_of, some_tokens

NAMES = ("switchall", "switchall xl", "switchhead shared, rope with memory", "moa", "moa xl, sigmoid")


def exported(
    name: str,
    prepared: Path,
    tmp_path: Path,
    change: Callable[[LanguageModel], None] = lambda model: None,
    dtype: torch.dtype = torch.float32,
) -> Checkpoint:
    """The model `name`, changed, exported to tmp_path/out."""
    model = model_of(name)
    with torch.no_grad():
        change(model)
    checkpoint = checkpoint_of(model, tmp_path / "step-00000003", prepared)
    export(checkpoint, tmp_path / "out", ExportOptions(dtype=str(dtype).removeprefix("torch.")))
    return checkpoint


def alike(model: LanguageModel) -> None:
    """All experts of every router are chosen by the same numbers but for 3e-7 of them; what they compute differs."""
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(("selector", "router")):
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.copy_(parameter[..., :1, :] * (1.0 + 3e-7 * noise))


def choosing_by(noise: float) -> Callable[..., tuple[Tensor, Tensor]]:
    """gates_of that chooses by scores that are `noise` off. The gates are right."""
    draw = torch.Generator().manual_seed(2)

    def gates_of(x: Tensor, selector: Tensor, k: int, *arguments: Any, **settings: Any) -> tuple[Tensor, Tensor]:
        scores = torch.sigmoid(torch.einsum("...d,red->...re", x.float(), selector.float()))
        off = scores + noise * torch.randn(scores.shape, generator=draw)
        index = off.topk(k, -1).indices
        return torch.zeros_like(scores).scatter(-1, index, scores.gather(-1, index)), index

    return gates_of


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float32) for name in NAMES), ("switchall", torch.bfloat16)])
def test_choices_that_rounding_decides_are_taken_over(
    name: str, dtype: torch.dtype, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = exported(name, prepared, tmp_path, alike, dtype)
    monkeypatch.setattr(layers_switchall, "gates_of", choosing_by(3e-7))
    said = verify(tmp_path / "out", checkpoint, dtype)
    found = re.search(r"differ by at most \S+ \(rounding decides ([\d,]+) choices of experts, taken as there\)", said)
    assert found is not None and int(found[1].replace(",", "")) > 20, said


@pytest.mark.parametrize("name", NAMES)
def test_a_router_that_chooses_wrong_is_named(
    name: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = exported(name, prepared, tmp_path)
    said = verify(tmp_path / "out", checkpoint, torch.float32)
    assert "rounding decides" not in said, said
    monkeypatch.setattr(layers_switchall, "gates_of", choosing_by(0.05))
    words = (
        r"logits differ by \S+ from those of the checkpoint \(blocks\.[01]\.\S+ chooses experts \S+ apart\); this is"
    )
    with pytest.raises(UserError, match=words):
        verify(tmp_path / "out", checkpoint, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_watching_changes_no_logit_and_is_taken_away(name: str) -> None:
    """A model with memory, which routes the tokens of its memory again, chooses the same again."""
    model = model_of(name)
    length = CHUNKS * CHUNK - 2
    tokens = some_tokens(1, length)
    with torch.no_grad():
        alone = logits_of(model, tokens, None)
        chunk = CHUNK if model.config.memory_length else length
        passes = [min(chunk, length - first) for first in range(0, length, chunk)]
        with kept_choices(model, passes) as kept:
            watched = logits_of(model, tokens, None)
        again = logits_of(model, tokens, None)
    assert torch.equal(alone, again)
    torch.testing.assert_close(watched, alone, rtol=1e-6, atol=1e-6)
    assert model.config.memory_length or torch.equal(watched, alone)
    for choices in kept.values():
        assert choices.index is not None and choices.index.shape[:2] == (1, length)
