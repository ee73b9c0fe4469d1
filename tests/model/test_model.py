"""The assembled model: names, initialisation, dropout masks, parameter counts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from model.attention.rope import RopeTables, rope_tables
from model.config import ModelConfig, RopeConfig
from model.documents import Documents
from model.dropout import Draw, keep_mask, site_key
from model.kernels.ops.elementwise import dropout
from model.language_model import LanguageModel, build_model, build_on_meta
from model.parameters import count_parameters
from pretrain.config.loading import load_config
from tests.tensors import sum_of

ROOT = Path(__file__).resolve().parents[2]


def small(**changes: object) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "d_model": 64,
            "num_layers": 3,
            "vocab_size": 500,
            "sequence_length": 16,
            "attention": {"type": "switchhead", "num_heads": 2, "head_dim": 24, "num_experts": 5, "active_experts": 3},
            "feedforward": {"type": "sigma_moe", "num_experts": 8, "expert_size": 40, "active_experts": 2},
            **changes,
        }
    )


def test_parameter_names_are_canonical() -> None:
    names = set(dict(build_on_meta(small()).named_parameters()))
    block = {
        "attention_norm.weight",
        "attention_norm.bias",
        "attention.query.weight",
        "attention.key.weight",
        "attention.value_selector",
        "attention.output_selector",
        "attention.value_experts",
        "attention.output_experts",
        "feedforward_norm.weight",
        "feedforward_norm.bias",
        "feedforward.router",
        "feedforward.up_experts",
        "feedforward.down_experts",
    }
    expected = {f"blocks.{i}.{name}" for i in range(3) for name in block}
    assert names == expected | {"embedding.weight", "final_norm.weight", "final_norm.bias", "head.weight", "head.bias"}


def test_initial_weights_depend_on_name_and_seed_alone() -> None:
    deep, shallow = build_model(small(num_layers=3), seed=4), build_model(small(num_layers=3, vocab_size=300), seed=4)
    name = "blocks.2.attention.value_experts"
    assert torch.equal(dict(deep.named_parameters())[name], dict(shallow.named_parameters())[name])
    other = build_model(small(), seed=5)
    assert not torch.equal(dict(deep.named_parameters())[name], dict(other.named_parameters())[name])
    blocks = [dict(deep.named_parameters())[f"blocks.{i}.attention.value_experts"] for i in range(2)]
    assert not torch.equal(*blocks)


def test_parameter_counts_by_hand() -> None:
    config = small()
    attention = 2 * 64 * 2 * 24 + 2 * 2 * 5 * 64
    attention_experts = 2 * (2 * 5 * 64 * 24)
    router, experts = 8 * 64, 2 * 8 * 64 * 40
    outside = 500 * 64 + 500 * 64 + 500 + 2 * 64 + 3 * 4 * 64
    count = count_parameters(build_on_meta(config), config)
    assert count.total == outside + 3 * (attention + attention_experts + router + experts)
    assert count.active == outside + 3 * (attention + attention_experts * 3 // 5 + router + experts * 2 // 8)
    assert count.total == sum(p.numel() for p in build_model(config, seed=0).parameters())


def test_switchall_1b_has_1_to_1_2_billion_parameters() -> None:
    config = load_config(ROOT / "configs" / "switchall_1b.json").model
    count = count_parameters(build_on_meta(config), config)
    assert 1.0e9 <= count.total <= 1.2e9
    assert count.active < count.total
    assert (config.d_model, config.num_layers, config.vocab_size, config.sequence_length) == (2048, 18, 32000, 2048)


def test_dropout_masks_are_functions_of_place() -> None:
    key = site_key(1, "blocks.0.attention")
    index = torch.tensor([3, 900_000_000_007, 12])
    mask = keep_mask(probability=0.3, key=key, sequence_index=index, shape=(3, 40, 50))
    for row, single in zip(mask, index, strict=True):
        assert torch.equal(
            row[None], keep_mask(probability=0.3, key=key, sequence_index=single[None], shape=(1, 40, 50))
        )
    assert not torch.equal(mask[0], mask[2])
    other = keep_mask(probability=0.3, key=site_key(1, "blocks.1.attention"), sequence_index=index, shape=(3, 40, 50))
    assert not torch.equal(mask, other)
    assert torch.equal(mask, keep_mask(probability=0.3, key=key, sequence_index=index, shape=(3, 40, 50)))


@pytest.mark.parametrize("shape", [(3, 12, 5), (3, 12), (3, 12, 2, 7)])
def test_a_rank_draws_the_masks_of_its_tokens(shape: tuple[int, ...]) -> None:
    options: dict[str, Any] = {
        "probability": 0.3,
        "key": site_key(1, "x"),
        "sequence_index": torch.tensor([3, 900_000_000_007, 12]),
    }
    mask = keep_mask(**options, shape=shape)
    for first, last in ((0, 4), (4, 8), (5, 12), (11, 12)):
        part = (shape[0], last - first, *shape[2:])
        assert torch.equal(keep_mask(**options, shape=part, first_token=first), mask[:, first:last])
    x = torch.randn(3, 12, 4)
    whole = dropout(x, Draw(**options), backend="cpu")
    assert torch.equal(dropout(x[:, 4:8], Draw(**options, first_token=4), backend="cpu"), whole[:, 4:8])


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.5, 0.9])
def test_dropout_rate_independence_and_scale(probability: float) -> None:
    index = torch.arange(200, dtype=torch.int64)
    mask = keep_mask(probability=probability, key=site_key(0, "x"), sequence_index=index, shape=(200, 50, 40)).double()
    sigma = math.sqrt(probability * (1 - probability) / mask.numel())
    assert abs(float(mask.mean()) - (1 - probability)) < 5 * sigma
    # Neighbouring sequences, tokens and features are uncorrelated.
    centred = mask - mask.mean()
    for axis in range(3):
        product = centred * centred.roll(1, axis)
        assert abs(float(product.mean())) < 5 * probability * (1 - probability) / math.sqrt(mask.numel()), axis
    ones = dropout(torch.ones(200, 50, 40), Draw(probability, site_key(0, "x"), index), backend="cpu")
    assert float(ones.max()) == pytest.approx(1 / (1 - probability))
    assert torch.equal(ones != 0, mask.bool())


def test_loss_is_the_mean_cross_entropy_of_the_logits() -> None:
    model = build_model(small(), seed=0)
    tokens = torch.randint(0, 500, (3, 17), generator=torch.Generator().manual_seed(0))
    objective, sequence_loss, _ = model(tokens[:, :-1], tokens[:, 1:], torch.arange(3))
    logits, _ = model.logits(tokens[:, :-1])
    by_hand = -logits.double().log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0].mean(1)
    torch.testing.assert_close(sequence_loss.double(), by_hand, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(objective.double(), by_hand.mean(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("room", [0, 3 * 4 * 500, 2**20], ids=["one at a time", "three", "all"])
def test_likelihoods_of_chosen_places_are_those_of_the_logits(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of as many tokens as `room` bytes of logits hold; one at least."""
    monkeypatch.setattr("model.layers.chunk_bytes", lambda device_type: room)
    model = build_model(small(), seed=0)
    tokens = torch.randint(0, 500, (2, 16), generator=torch.Generator().manual_seed(0))
    logits = model.logits(tokens)[0].flatten(0, 1)
    places = torch.tensor([30, 0, 7, 7, 16])
    targets = logits[places].argmax(-1)
    targets[1], targets[3] = (targets[1] + 1) % 500, logits[7].argmin()
    found, is_likeliest = model.log_likelihood(tokens, targets, places)
    expected = logits[places].double().log_softmax(-1)[torch.arange(5), targets]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert is_likeliest.tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("attention", ["switchhead", "moa", "dense"])
@pytest.mark.parametrize("feedforward", ["sigma_moe", "dense", "swiglu"])
def test_evaluation_drops_nothing_anywhere(attention: str, feedforward: str) -> None:
    def model(dropout: float) -> LanguageModel:
        of_experts = {} if attention == "dense" else {"expert_dropout": dropout}
        of_hidden = {"expert_dropout": dropout} if feedforward == "sigma_moe" else {}
        config = small(
            attention={"type": attention, "num_heads": 2, "head_dim": 6, **of_experts},
            feedforward={"type": feedforward, **of_hidden},
            dropout=dropout,
        )
        return build_model(config, seed=0).eval()

    tokens = torch.randint(0, 500, (2, 16), generator=torch.Generator().manual_seed(0))
    dropping, plain = model(0.4), model(0.0).logits(tokens)[0]
    assert torch.equal(dropping.logits(tokens)[0], plain)
    assert not torch.allclose(dropping.train().logits(tokens)[0], plain, atol=0.1)


def keys_of(model: LanguageModel) -> list[int]:
    """Of every place that drops something."""
    found: list[int] = []
    for module in model.modules():
        values = vars(module)
        found += [values[name] for name in ("_key", "_dropout_key") if name in values]
        found += values.get("_dropout_keys", {}).values()
    return found


@pytest.mark.parametrize("feedforward, place", [("sigma_moe", "experts"), ("dense", "hidden"), ("swiglu", "hidden")])
@pytest.mark.parametrize(
    "attention, places",
    [
        ({"type": "switchhead", "expert_projections": ["key", "value", "output"]}, ["value_experts", "output_experts"]),
        (
            {"type": "switchhead", "expert_projections": ["key", "query"], "selection": "projection"},
            ["key_experts", "query_experts"],
        ),
        ({"type": "moa"}, ["experts"]),
        ({"type": "dense"}, []),
    ],
    ids=["sides", "projections", "moa", "dense"],
)
def test_every_place_has_a_mask_of_its_own(
    attention: dict[str, object], places: list[str], feedforward: str, place: str
) -> None:
    """By the names that earlier versions gave them: a run that goes on has the masks that it would have had."""
    model = build_on_meta(small(attention=attention, feedforward={"type": feedforward}))
    names = ["embedding", "head"]
    for block in (f"blocks.{index}" for index in range(3)):
        names += [f"{block}.attention", f"{block}.feedforward", f"{block}.feedforward.{place}"]
        names += [f"{block}.attention.{name}" for name in places]
    assert sorted(keys_of(model)) == sorted(site_key(0, name) for name in names)
    assert len(set(keys_of(model))) == len(names)


def test_auxiliary_losses_of_attention_and_feedforward_join_the_objective() -> None:
    attention = {"type": "moa", "num_heads": 2, "head_dim": 6, "num_experts": 4, "z_loss_weight": 0.5}
    model = build_model(small(attention=attention, feedforward={"type": "sigma_moe", "entropy_weight": 0.3}), seed=0)
    parts: list[torch.Tensor] = []
    for name, layer in model.named_modules():
        if name.endswith((".attention", ".feedforward")):
            layer.register_forward_hook(lambda module, inputs, output: parts.append(output[1]))
    tokens = torch.randint(0, 500, (2, 17), generator=torch.Generator().manual_seed(0))
    objective, sequence_loss, auxiliary_loss = model(tokens[:, :-1], tokens[:, 1:], torch.arange(2))
    assert len(parts) == 6 and all(abs(float(part.detach())) > 0.1 for part in parts)
    torch.testing.assert_close(auxiliary_loss, sum_of(parts).detach())
    torch.testing.assert_close(objective, sequence_loss.mean() + sum(parts))


def test_no_token_sees_its_future() -> None:
    model = build_model(small(), seed=0)
    tokens = torch.randint(0, 500, (1, 16), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 500
    before, after = model.logits(tokens)[0], model.logits(changed)[0]
    # Not bitwise: experts compute their tokens in groups, and a matrix product rounds by the size of the group.
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=1e-6, atol=1e-6)
    assert (before[:, 9] - after[:, 9]).abs().max() > 0.1


def test_rope_tables_of_documents_are_those_of_their_positions() -> None:
    """To the last bit; they begin again in each document."""
    config = RopeConfig(fraction=0.5)
    documents = Documents.of(torch.tensor([[0, 0, 1, 1, 1, 2], [0] * 6, [0, 1, 2, 3, 4, 5]]))
    found = RopeTables(12, config)(documents, 6, torch.device("cpu"))
    for table, expected in zip(found, rope_tables(documents.positions, 12, config), strict=True):
        assert table.shape == (3, 6, 1, 3) and torch.equal(table, expected)


def test_rope_tables_of_any_length_are_the_first_rows_of_one_that_is_kept() -> None:
    config = RopeConfig(fraction=0.5)
    tables, device = RopeTables(12, config), torch.device("cpu")
    for L in (1, 2, 3, 12, 7, 16, 17, 12):
        for found, expected in zip(tables(None, L, device), rope_tables(torch.arange(L), 12, config), strict=True):
            assert found.shape == (L, 1, 3) and torch.equal(found, expected)
    places = [tables(None, L, device)[1].data_ptr() for L in (7, 8, 9, 16)]
    assert places[0] == places[1] != places[2] == places[3]
    documents = Documents.of(torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1]]))
    tables(documents, 7, device)
    kept = [len(cos) for cos, _ in tables._kept.values()]
    assert sorted(kept) == [1, 2, 4, 8, 16, 32], "at most twice the longest together"
