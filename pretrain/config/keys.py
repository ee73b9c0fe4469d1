"""The dotted keys of a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from common.json_config import Key, keys
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


def fields() -> Iterator[Key]:
    """Every leaf key as (dotted key, owning section class, field name), those of each kind of layer in turn."""
    return keys(Config)
