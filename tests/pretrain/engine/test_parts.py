"""Every layer with routers has parameters in the group of routers: it is found by their names, and a layer with others
would learn with the rates of the wrong group, unseen."""

from __future__ import annotations

import pytest

from model.config import ModelConfig
from model.layer_section import LayerSection
from model.layers import ATTENTIONS, Block
from pretrain.engine.parts import Part, group_of, part_of
from tests.model.new_layers import SoftmaxMoEConfig, TopPConfig, make_known
from tests.model.options import kinds


@pytest.mark.parametrize("kind", [*kinds(), TopPConfig, SoftmaxMoEConfig])
def test_routers_and_experts_are_told_by_their_parameters(
    kind: type[LayerSection], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_known(monkeypatch)
    place, section = "attention" if kind in ATTENTIONS else "feedforward", kind()
    model = ModelConfig(d_model=8, num_layers=1, vocab_size=9, sequence_length=4).model_copy(update={place: section})
    specs = {name: spec for name, spec in Block.parameter_specs(model).items() if name.startswith(f"{place}.")}
    groups = {group_of(f"blocks.0.{name}", spec) for name, spec in specs.items()}
    has = {"routers" in groups, "experts" in groups}
    assert has == {section.routers is not None}, f"call a router's parameter `router` or `..._selector`: {[*specs]}"


def test_a_part_is_a_group_of_a_block() -> None:
    model = ModelConfig(d_model=8, num_layers=12, vocab_size=9, sequence_length=4)
    spec = Block.parameter_specs(model)["feedforward.router"]
    assert part_of("blocks.11.feedforward.router", spec) == Part("blocks.11", "routers")
    assert str(part_of("blocks.11.feedforward.router", spec)) == "blocks.11.routers"
    assert str(part_of("final_norm.weight", Block.parameter_specs(model)["attention_norm.weight"])) == "norms"
