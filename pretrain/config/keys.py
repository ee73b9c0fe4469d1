"""The dotted keys of a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from pretrain.config.schema import Config


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as {dotted.key: value}; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def fields(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, type[BaseModel], str]]:
    """Every leaf field as (dotted key, owning section class, field name), union members in turn."""
    for name, field in model.model_fields.items():
        # A list of sections (data.sources) is one value: its entries have no dotted keys of their own.
        is_list = get_origin(field.annotation) is tuple
        members = [m for m in (field.annotation, *get_args(field.annotation)) if _is_section(m) and not is_list]
        if not members:
            yield f"{prefix}{name}", model, name
        for member in members:
            yield from fields(member, f"{prefix}{name}.")


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
