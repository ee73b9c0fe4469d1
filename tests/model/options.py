"""Which options of a model's layers a table of models leaves out. A new option joins each such table, or it would be
computed in one place, and ignored in another without a word."""

from __future__ import annotations

from collections.abc import Iterable
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from common.json_config import Section
from model.config import AttentionConfig, FeedForwardConfig, ModelConfig
from model.layer_section import Ability, LayerSection

ATTENTIONS: tuple[type[LayerSection], ...] = get_args(get_args(AttentionConfig)[0])
FEEDFORWARDS: tuple[type[LayerSection], ...] = get_args(get_args(FeedForwardConfig)[0])

TRAINING_ALONE = {
    "initialization",
    "init_scale",
    "normalized_init",
    "dropout",
    "expert_dropout",
    "z_loss_weight",
    "switch_loss_weight",
    "cv_loss_weight",
    "loss_scope",
    "entropy_weight",
    "entropy_scope",
}
"""Keys of the model that change nothing of what trained weights compute."""


def kinds(ability: Ability | None = None) -> list[type[LayerSection]]:
    """The sections of every attention and feed-forward layer, or of those that do not lack an ability."""
    return [kind for kind in (*ATTENTIONS, *FEEDFORWARDS) if ability is None or ability not in kind.lacks]


def check_options(models: Iterable[ModelConfig], where: str, *sections: type[Section]) -> None:
    """Fails with what to add to the table `where` of `models`, so that it has every option of `sections`."""
    missing = "\n".join(f"  {option}" for option in left_out(models, *sections))
    assert not missing, f"{where} needs a model with each of\n{missing}\n(docs/new-layer.md)"


def check_kinds(types: Iterable[str], where: str, wanted: Iterable[type[LayerSection]]) -> None:
    """Fails with what to add to the table `where`, so that its `types` are all of those of the sections `wanted`."""
    missing = sorted({section.model_fields["type"].default for section in wanted} - set(types))
    assert not missing, f"{where} needs a model with each of the types {missing} (docs/new-layer.md)"


def left_out(models: Iterable[ModelConfig], *sections: type[Section]) -> list[str]:
    """Of these sections (none: of the model and all of its sections), but for TRAINING_ALONE: `SECTION.KEY = VALUE` for
    each value of a choice that none of `models` has, `SECTION.KEY` for each number that has its default in all."""
    found: dict[type[Section], list[Section]] = {section: [] for section in sections or sections_of(ModelConfig)}
    for model in models:
        for part in (model, model.attention, model.position, model.feedforward):
            found.setdefault(type(part), []).append(part)
    return [
        f"{section.__name__}.{name}{value}"
        for section in sections or sections_of(ModelConfig)
        for name, field in section.model_fields.items()
        if name not in TRAINING_ALONE
        for value in _missing(field, [getattr(part, name) for part in found[section]])
    ]


def sections_of(section: type[Section]) -> list[type[Section]]:
    inner = [part for field in section.model_fields.values() for part in _members(field.annotation)]
    return [section, *(part for part in inner if isinstance(part, type) and issubclass(part, Section))]


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)


def _missing(field: FieldInfo, values: list[Any]) -> list[str]:
    if isinstance(values[0] if values else None, Section):
        return []  # each has its own keys
    if get_origin(field.annotation) is Literal:
        return [f" = {value}" for value in get_args(field.annotation) if value not in values]
    if field.annotation is bool:
        return [f" = {value}" for value in (False, True) if value not in values]
    return [] if any(value != field.default for value in values) else [""]
