"""No option of a layer is taken and ignored: with the same weights another value gives other logits.

The oracles compare a layer with its equation for the values that they know. A value that is new in the section alone
would pass them, and the tables of models that want one with it: it would compute what the default computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args, get_origin

import torch
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from common.json_config import Section
from model.config import ModelConfig
from model.language_model import LanguageModel, build_model
from tests.model.options import TRAINING_ALONE, kinds, sections_of
from tests.pretrain.export.models import CHUNK, MODELS, model_of, our_logits, some_tokens

ONLY_TRAINED = set(kinds()) - set(kinds("export"))
"""Layers that are in no model of the table."""


class Option(NamedTuple):
    """A key of a section and two of its values."""

    section: type[Section]
    key: str
    values: frozenset[Any]


def other_values(part: Section) -> Iterator[tuple[str, Any]]:
    """Key and value: of choices and switches all others, of what else has a default the default."""
    for key, field in type(part).model_fields.items():
        value = getattr(part, key)
        if key in TRAINING_ALONE or isinstance(value, Section) or key == "type" or field.is_required():
            continue
        others = choices_of(field) or (field.default,)
        yield from ((key, other) for other in others if other != value)


def choices_of(field: FieldInfo) -> tuple[Any, ...]:
    if get_origin(field.annotation) is Literal:
        return get_args(field.annotation)
    return (True, False) if field.annotation is bool else ()


def variants(config: ModelConfig) -> Iterator[tuple[Option, ModelConfig]]:
    """The model with another value of one option, where that is a legal model."""
    parts = {"": config, "attention": config.attention, "position": config.position, "feedforward": config.feedforward}
    for place, part in parts.items():
        for key, other in other_values(part):
            tree = config.model_dump(mode="json")
            (tree[place] if place else tree)[key] = other
            with contextlib.suppress(ValidationError):
                option = Option(type(part), key, frozenset((getattr(part, key), other)))
                yield option, ModelConfig.model_validate(tree)


def shapes(model: LanguageModel) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


@torch.no_grad()
def test_every_option_changes_what_some_model_computes() -> None:
    """Or what parameters it has. Two values may be the same in a model: `selection` with one projection on a side."""
    found: dict[Option, bool] = {}
    for name in MODELS:
        ours, tokens = model_of(name), some_tokens(1, 5 * CHUNK)
        logits = our_logits(ours, tokens)
        for option, config in variants(ours.config):
            if found.get(option):
                continue
            model = build_model(config, seed=3).eval()
            found[option] = shapes(model) != shapes(ours)
            if not found[option]:
                model.load_state_dict(ours.state_dict())
                found[option] = float((our_logits(model, tokens) - logits).abs().max()) > 1e-4
    same = [f"{key} of {section.__name__}: {set(values)}" for (section, key, values), it in found.items() if not it]
    assert not same, f"values that compute the same in every model of tests/pretrain/export/models.py: {same}"
    for section in sections_of(ModelConfig):
        for key, field in section.model_fields.items():
            compared = set().union(*(option.values for option in found if option[:2] == (section, key)))
            wanted = section not in ONLY_TRAINED and key != "type" and key not in TRAINING_ALONE
            assert not wanted or set(choices_of(field)) <= compared, f"{section.__name__}.{key} is not compared"
