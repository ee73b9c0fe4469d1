"""Absurd numbers: every numeric key at extreme values is either a run that can be described, or refused by name."""

from __future__ import annotations

import itertools
import json
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.errors import ConfigError
from common.json_config import keys
from model.language_model import build_model
from model.memory import layer_memories
from pretrain.cli import train as cli
from pretrain.config.loading import load_config
from pretrain.config.schema import Config
from pretrain.preflight.whole import Wanted
from pretrain.report.model_text import parameter_count
from tests.model.options import ATTENTIONS, FEEDFORWARDS, check_kinds

TINY = Path(__file__).resolve().parents[3] / "configs" / "switchall_tiny.json"
VALUES = ("0", "-1", str(2**31 - 1), "1e400", "NaN")
OTHERS = ("1", str(10**30), "1e-300", "1e300")


def is_numeric(annotation: typing.Any) -> bool:
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) in (tuple, typing.Literal):
        return False
    return annotation in (int, float) or any(map(is_numeric, arguments))


def numeric_keys() -> Iterator[tuple[str, tuple[str, ...]]]:
    """(dotted key, overrides that make it a key of the configuration), keys of every type of layer included."""
    for key in keys(Config):
        if is_numeric(key.field.annotation):
            kind = key.section.model_fields.get("type")
            yield key.dotted, () if kind is None else (f"{key.dotted.rpartition('.')[0]}.type={kind.default}",)


def test_there_are_numeric_keys() -> None:
    found = {key for key, _ in numeric_keys()}
    assert len(found) > 50
    assert {"model.d_model", "model.attention.num_heads", "train.threads", "resilience.hang_timeout_seconds"} <= found
    assert "train.precision" not in found and "monitor.tensorboard" not in found


@pytest.mark.parametrize("values", [VALUES, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["some", "others"])
@pytest.mark.parametrize(
    "key, needs", [pytest.param(*case, id=f"{case[0]} {' '.join(case[1])}") for case in numeric_keys()]
)
def test_extreme_numbers(
    prepared: Path,
    tmp_path: Path,
    key: str,
    needs: tuple[str, ...],
    values: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = ("model.num_layers=1", "model.sequence_length=16", "batch.global_sequences=4", "batch.micro_sequences=1")
    refused = []
    for value in values:
        override = f"{key}={value}"
        overrides = [f"data.manifest={prepared}", *small, *needs, override]
        wanted = Wanted(config=TINY, option="--config", overrides=overrides, run_dir=tmp_path / "run")
        code = cli.dry_run(wanted, with_step=False)
        printed = capsys.readouterr()
        if code:
            refused.append(value)
            section, _, leaf = key.rpartition(".")
            message = printed.err.splitlines()[0]
            assert message.startswith("error: ") and section in message and leaf in message, f"{override}: {message}"
        else:
            assert "run folder" in printed.out, override
    assert {"-1", "1e400", "NaN"} & set(values) <= set(refused)


@pytest.mark.parametrize(
    "override, words",
    [
        ("train.threads=100000", "less than or equal to 1024 (given 100000)"),
        ("resilience.hang_timeout_seconds=1e300", "less than or equal to 604800 (given 1e+300)"),
        ("resilience.hang_timeout_seconds=1e-9", "1e-09 s is shorter than any step; set it to at least 1"),
        ("resilience.hang_timeout_seconds=NaN", "finite number (given NaN)"),
        (
            "resilience.step_timeout_factor=1.5",
            "1.5 times the longest step may be less than the next one takes; set it",
        ),
        ("model.d_model=1", "greater than or equal to 2 (given 1)"),
    ],
)
def test_refusals(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(TINY, [override])
    assert str(refusal.value).startswith(f"{override.partition('=')[0]}: ") and words in str(refusal.value)


def test_the_largest_model_that_is_legal_can_be_described() -> None:
    """No tensor of it has more bytes than PyTorch can count."""
    attention = {"type": "switchhead", "num_heads": 2**12, "head_dim": 2**12, "num_experts": 2**12}
    overrides = [
        f"model.attention={json.dumps(attention)}",
        f"model.feedforward.num_experts={2**16}",
        f"model.feedforward.expert_size={2**20}",
        f"model.d_model={2**20}",
        f"model.vocab_size={2**24}",
        "model.num_layers=2",
    ]
    count = parameter_count(load_config(TINY, overrides).model)
    assert count.total > 2 * (2 * 2**56 + 2 * 2**56)  # value and output experts, feed-forward, of two blocks


ATTENTION = {
    "switchhead": {"num_heads": 2, "head_dim": 4, "num_experts": 2, "active_experts": 1},
    "dense": {"num_heads": 2, "head_dim": 4},
    "moa": {"num_heads": 1, "head_dim": 4, "num_experts": 2},
}
FEEDFORWARD = {
    "sigma_moe": {"num_experts": 2, "expert_size": 4, "active_experts": 1},
    "dense": {"hidden_size": 4},
    "swiglu": {"hidden_size": 4},
}


def test_every_layer_is_among_the_smallest() -> None:
    check_kinds(ATTENTION, "ATTENTION of tests/pretrain/config/test_numeric_keys.py", ATTENTIONS)
    check_kinds(FEEDFORWARD, "FEEDFORWARD of tests/pretrain/config/test_numeric_keys.py", FEEDFORWARDS)


@pytest.mark.parametrize("attention, feedforward", itertools.product(ATTENTION, FEEDFORWARD))
@pytest.mark.parametrize("position", ["rope", "xl"])
def test_the_smallest_models_that_are_legal_train(attention: str, feedforward: str, position: str) -> None:
    """Each size at 1 (d_model: 2) by itself, then all of them: loss and gradients are numbers."""
    sizes = {f"attention.{key}": value for key, value in ATTENTION[attention].items()}
    sizes |= {f"feedforward.{key}": value for key, value in FEEDFORWARD[feedforward].items()}
    sizes |= {"d_model": 8, "sequence_length": 4}
    smallest = {key: 2 if key == "d_model" else 1 for key in sizes}
    # Fewer experts than active ones, or than heads of MoA, are refused by a rule of their own.
    alone = [key for key in sizes if not key.endswith("num_experts")]
    types = [
        f"model.attention.type={attention}",
        f"model.feedforward.type={feedforward}",
        f"model.position.type={position}",
    ]
    for chosen in [*([key] for key in alone), [*sizes]]:
        these = {**sizes, **{key: smallest[key] for key in chosen}}
        overrides = [f"model.{key}={value}" for key, value in these.items()]
        config = load_config(TINY, [*types, *overrides, "model.num_layers=1", "model.vocab_size=16"]).model
        model = build_model(config, seed=0)
        sequences = torch.arange(2)
        for _, memory in layer_memories(model):
            memory.assign(sequences, 2)
        tokens = torch.arange(2 * config.sequence_length).reshape(2, -1) % 16
        objective = model(tokens, tokens.roll(1, 0), sequences)[0]
        objective.backward()
        assert torch.isfinite(objective), chosen
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients), chosen
