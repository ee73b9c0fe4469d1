"""A layer that the project does not know yet: it trains and is counted by what it declares, what it lacks is refused
with its own words, and what nobody has said of it is asked for, not guessed. new_layers.py has two."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch

from common.errors import ConfigError, UserError
from common.json_config import validate
from model import costs
from model.config import MoAConfig, ModelConfig
from model.decoding import Decoding
from model.language_model import build_model, routing_statistics
from model.layer_section import LayerSection, Routers
from model.layers import Block
from model.parameters import count_parameters
from pretrain.analysis.routers import routers_of
from pretrain.api import OpenModel
from pretrain.config.graph_rules import check_graphs
from pretrain.config.loading import load_config
from pretrain.config.rules import broken_rules
from pretrain.config.schema import Config
from pretrain.engine.details import is_softmax
from pretrain.export.hf_config import check_layers
from pretrain.parallel import stages
from pretrain.preflight.checklist import Checklist
from pretrain.preflight.run import PlannedRun
from pretrain.report.model_text import model_family, model_text
from pretrain.report.router_load import Collapsed, advice, choices
from pretrain.saved_model import SavedModel
from tests.harness import run_ranks
from tests.model.new_layers import SoftmaxMoEConfig, TopPAttention, TopPConfig, make_known
from tests.pretrain.runs import TOLERANCE, Trace, engine_trace, gradient_error, small_config

Tree = dict[str, Any]
TINY = Path(__file__).resolve().parents[2] / "configs" / "switchall_tiny.json"


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    make_known(monkeypatch)


def new_model() -> ModelConfig:
    model = ModelConfig(d_model=12, num_layers=2, vocab_size=50, sequence_length=7)
    return model.model_copy(update={"attention": TopPConfig(), "feedforward": SoftmaxMoEConfig()})


def new_run(*overrides: str) -> Config:
    return load_config(TINY, overrides).model_copy(update={"model": new_model()})


def test_they_train_count_and_read_on() -> None:
    torch.manual_seed(0)
    model = build_model(new_model(), seed=3)
    tokens = torch.randint(50, (2, 7))
    objective, _, auxiliary_loss = model(tokens, tokens.roll(1, 1), torch.arange(2))
    objective.backward()
    # Of both layers the regulariser, at the even p of a first step.
    assert float(auxiliary_loss) == pytest.approx(-2 * 0.01 * math.log(5), rel=1e-5)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    load = {name: statistics.load for name, statistics in routing_statistics(model)}
    recorders = {recorder for b in model.modules() if isinstance(b, Block) for recorder in b.recorders}
    assert len(load) == 6 and recorders == {statistics for _, statistics in routing_statistics(model)}
    assert load["blocks.1.feedforward.statistics"].sum() == 2 * 7 * 2
    chosen = load["blocks.0.attention.value_statistics"].sum(-1)
    assert (chosen > 2 * 7).all() and (chosen < 2 * 7 * 4).all(), "some tokens choose one expert, some more"
    model.eval()
    reading, text = Decoding(model, 1), tokens[0].tolist()
    with torch.no_grad():
        whole = model.logits(tokens[:1])[0][0]
    parts = torch.cat([reading.read_all([text[:4]])[0], reading.read_all([text[4:]])[0]])
    assert (parts - whole).abs().max() < 1e-5


def traced(rank: int, configs: list[Config]) -> list[Trace]:
    """This process ends with the test."""
    make_known(pytest.MonkeyPatch())
    for name in ("attention_macs", "feedforward_macs"):  # of step 4, which they lack
        setattr(stages, name, lambda model: 1000)
    return engine_trace(rank, configs, 2, (1,))


def test_they_train_alike_in_every_layout_that_they_do_not_lack(prepared: Path) -> None:
    """What docs/new-layer.md promises of four files."""
    keys = ("parallel.zero=0", "parallel.zero=3", "parallel.zero=2", "parallel.pipeline=2")
    again = ("none", "full", "selective", "selective")
    runs = [small_config(prepared, key, f"train.recompute={kind}") for key, kind in zip(keys, again, strict=True)]
    new = {"attention": TopPConfig(), "feedforward": SoftmaxMoEConfig()}
    configs = [run.replaced("model", **new) for run in runs]
    ((alone,),) = run_ranks(traced, 1, [small_config(prepared).replaced("model", **new)])
    for key, found in zip(keys, run_ranks(traced, 2, configs)[0], strict=True):
        assert found.losses + found.grad_norms == pytest.approx(alone.losses + alone.grad_norms, rel=TOLERANCE), key
        for step, load in enumerate(alone.loads):
            assert {n: c.tolist() for n, c in load.items()} == {n: c.tolist() for n, c in found.loads[step].items()}, (
                key
            )
        errors = {n: gradient_error(found.gradients[1][n], g) for n, g in alone.gradients[1].items()}
        assert max(errors.values()) < TOLERANCE, (key, errors)


def test_advice_names_what_a_layer_has() -> None:
    """Of experts that collapse: no key that the user would look for in vain."""
    both = [Collapsed(f"blocks.0.{place}", None, 0.9, 100) for place in ("attention.value", "feedforward")]
    assert advice(new_model(), both) == "raise model.feedforward.entropy_weight, or lower optimizer.learning_rate"
    assert advice(new_model(), both[:1]) == "lower optimizer.learning_rate"
    known = load_config(TINY).model
    keys = "model.feedforward.entropy_weight and model.attention.entropy_weight"
    assert advice(known, both) == f"raise {keys}, or lower optimizer.learning_rate"
    for router, key in (("softmax", "switch_loss_weight"), ("sigmoid", "expert_dropout")):
        moa = known.model_copy(update={"attention": validate(MoAConfig, {"router": router})})
        assert advice(moa, both[:1]).startswith(f"raise model.attention.{key}, or "), router


def test_they_are_called_by_their_names() -> None:
    model = new_model()
    assert model_family(model) == "top-p SwitchHead with softmax MoE"
    assert model_text(model).startswith(
        "2 x (top-p SwitchHead: 2 heads of 6, up to 4 experts for 0.7; softmax MoE: 2 of 5 experts of 7), d_model 12"
    )
    assert choices(model) == {"attention": Routers(4, 1, "softmax"), "feedforward": Routers(5, 2, "softmax")}
    assert is_softmax(model, "blocks.0.attention.value") and is_softmax(model, "blocks.0.feedforward")
    # Expert tensors in the share that a token uses: 2 of 5 feed-forward experts, and all of attention's.
    count = count_parameters(build_model(model, seed=0), model)
    assert count.total - count.active == 2 * 3 * 5 * 12 * 7 * 3 // 5


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["parallel.tensor=2"], "parallel.tensor: 2 ranks would divide every layer, but model.attention.type is top_p: "
         "every rank has all of its heads; set parallel.tensor to 1"),
        (["parallel.expert=2"], "parallel.expert: 2 ranks would divide the feed-forward experts, but "
         "model.feedforward.type is softmax_moe: it does not send tokens to other ranks; set parallel.expert to 1"),
        (["train.record_routing=true"], "train.record_routing: model.attention.type is top_p: a record holds as many "
         "experts for each token; remove the key"),
    ],
)  # fmt: skip
def test_what_they_lack_is_refused(overrides: list[str], message: str) -> None:
    assert message in [str(error) for error in broken_rules(new_run(*overrides)).values()]


def test_what_they_lack_is_refused_where_it_is_asked_for() -> None:
    model = new_model()
    with pytest.raises(UserError, match=r"model\.attention\.type is top_p, which no export has: it is not in"):
        check_layers(model)
    opened = OpenModel(cast("SavedModel", (build_model(model, seed=0), None, None, None)))
    with pytest.raises(UserError, match=r"^model\.attention\.type is top_p, whose attention maps are not shown: no"):
        opened.attention([1, 2, 3])
    with pytest.raises(UserError, match=r"^model\.attention\.type is top_p, whose choices of experts are not shown"):
        opened.routing([1, 2, 3])


def test_an_attention_that_keeps_nothing_writes_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token would be read as the first one."""
    forward = TopPAttention.forward
    monkeypatch.setattr(TopPAttention, "forward", lambda self, x, T, index, documents=None: forward(self, x, T, index))
    with pytest.raises(AssertionError, match="attention keeps nothing of what it reads"):
        Decoding(build_model(new_model(), seed=0).eval(), 1).read([[3, 1]])


@pytest.mark.parametrize(
    "ability, position, message",
    [
        ("xl", {"type": "xl"}, "position.type is xl, but attention.type is moa: for a test; set position.type to rope"),
        ("memory", {"type": "rope", "memory_chunks": 2}, "position.memory_chunks is 2, but attention.type is moa: for "
         "a test; set position.memory_chunks to 0"),
    ],
)  # fmt: skip
def test_a_lack_of_positions(ability: str, position: Tree, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {"d_model": 8, "num_layers": 1, "vocab_size": 9, "sequence_length": 4, "attention": {"type": "moa"}}
    validate(ModelConfig, {**tree, "position": position})
    monkeypatch.setattr(MoAConfig, "lacks", {ability: "for a test"})
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(ModelConfig, {**tree, "position": position})


def test_a_lack_of_graphs_is_told_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SoftmaxMoEConfig, "lacks", {"graphs": "it waits for the device"})
    with pytest.raises(ConfigError, match=r"softmax_moe.*it waits for the device"):
        check_graphs(new_run("train.cuda_graph=on"))


def test_what_nobody_said_is_asked_for() -> None:
    with pytest.raises(TypeError, match=r"^Forgetful does not say lacks, routers, divided; model/layer_section\.py"):

        class Forgetful(LayerSection):
            label = "forgetful"
            type: Literal["forgetful"] = "forgetful"

            @property
            def sizes(self) -> str:
                return "all"

    with pytest.raises(TypeError, match=r"does not say label, lacks, sizes, routers, divided"):

        class Heir(MoAConfig):
            """What is said of the kind that it is made of need not be true of it."""


@pytest.mark.parametrize(
    "lacks, divided, message",
    [
        ({"tensors": "misspelt"}, ("num_heads",), "names tensors, of which nothing is known"),
        ({}, ("heads",), "names heads, of which nothing is known"),
        ({}, (), "lacks no tensor parallelism, and divided names nothing"),
    ],
)
def test_an_answer_that_nobody_would_hear_is_refused(lacks: Any, divided: tuple[str, ...], message: str) -> None:
    answers = {name: vars(MoAConfig)[name] for name in ("label", "sizes", "routers")}
    with pytest.raises(TypeError, match=rf"^Own {message}"):
        type("Own", (MoAConfig,), {**answers, "lacks": lacks, "divided": divided, "__module__": __name__})


@pytest.mark.parametrize(
    "cost",
    [
        costs.attention_macs,
        costs.attention_memory,
        costs.cache_floats,
        costs.feedforward_macs,
        costs.feedforward_memory,
        costs.formula_parameters,
        costs.training_flops_per_token,
    ],
)
def test_no_cost_is_guessed(cost: Callable[[ModelConfig], object]) -> None:
    with pytest.raises(UserError, match=r"^model: the costs of layers of type (top_p|softmax_moe) are not known; give"):
        cost(new_model())


def test_a_start_without_costs_is_refused_before_its_ranks_meet_with_one_sentence(tmp_path: Path) -> None:
    checks = Checklist()
    PlannedRun(new_run(), 1, tmp_path, "cpu").check(checks, thorough=False)
    assert [str(error).partition(" are not known")[0] for error in checks.problems if "cost" in str(error)] == [
        "model: the costs of layers of type top_p"
    ]


def test_no_router_is_passed_over() -> None:
    layer = build_model(new_model(), seed=0).blocks[0].get_submodule("feedforward")
    with pytest.raises(AssertionError, match="SoftmaxMoE"):
        routers_of(layer)
