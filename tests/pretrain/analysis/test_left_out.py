"""Layers whose maps or choices nothing here computes: the page has all the rest, and says what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig, SigmaMoEConfig, SwitchHeadConfig
from model.language_model import build_model
from model.layer_section import LayerSection
from pretrain.analysis import report
from pretrain.analysis.findings import Findings
from tests.model.new_layers import SoftmaxMoEConfig, TopPConfig, make_known
from tests.pretrain.analysis.models import findings_of

HEADS = SwitchHeadConfig(num_heads=2, head_dim=6, num_experts=3, active_experts=2)
EXPERTS = SigmaMoEConfig(num_experts=5, expert_size=7, active_experts=2)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    make_known(monkeypatch)


def findings(attention: LayerSection, feedforward: LayerSection) -> Findings:
    sizes = ModelConfig(d_model=12, num_layers=2, vocab_size=50, sequence_length=7)
    config = sizes.model_copy(update={"attention": attention, "feedforward": feedforward})
    return findings_of(build_model(config, seed=3).eval(), config.attention.label, 9)


@pytest.mark.filterwarnings("ignore:Pydantic serializer")  # of sections that are in no union
def test_the_rest_is_shown_and_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.analysis.pictures._png", lambda figure: b"a picture")  # two dozen, for seconds
    found = [findings(TopPConfig(), EXPERTS), findings(HEADS, SoftmaxMoEConfig()), findings(HEADS, EXPERTS)]
    maps, experts = "model.attention.type is top_p, whose attention maps are", "softmax_moe, whose choices of experts"
    first, second, whole = (run.trace for run in found)
    assert not first.maps and [router.name for router in first.routers] == [f"blocks.{n}.feedforward" for n in (0, 1)]
    assert [*second.maps] == [0, 1] and {router.name for router in second.routers} == {
        f"blocks.{block}.attention.{owner}" for block in (0, 1) for owner in ("value", "output")
    }
    assert len(first.left_out) == 2 and first.left_out[0].startswith(maps) and len(second.left_out) == 1
    assert experts in second.left_out[0] and not whole.left_out and len(whole.routers) == 6
    images = report.drawn(found, report.Settings(), lambda name: None)
    assert "attention-heads-0-layer-0.png" not in images and "attention-heads-1-layer-0.png" in images
    assert any(name.startswith("load-0-feed-forward") for name in images)
    report.write(tmp_path / "out", found, images, "a text")
    page = (tmp_path / "out" / report.PAGE).read_text()
    assert maps in page and experts in page and "attention-heads-0" not in page
    described = json.loads((tmp_path / "out" / report.DESCRIPTION).read_text())["runs"]
    assert [run["maps"]["layers"] for run in described] == [[], [0, 1], [0, 1]]
    assert [len(run["left_out"]) for run in described] == [2, 1, 0]


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
def test_a_page_of_one_model_without_maps_has_its_experts(tmp_path: Path) -> None:
    run = findings(TopPConfig(), EXPERTS)
    report.write(tmp_path / "out", [run], report.drawn([run], report.Settings(), lambda name: None), "a text")
    assert torch.isfinite(torch.from_numpy(run.trace.losses)).all()
