"""Which settings of a saved configuration decide what a validation reads of its split."""

from __future__ import annotations

from typing import Any

WINDOWS = ("evaluate.sequences", "evaluate.placement", "evaluate.streams", "model.sequence_length")
"""Settings that decide what a validation reads of its split."""
MEMORY = "model.position.memory_chunks"


def setting(config: dict[str, Any], key: str) -> Any:
    """The value of a dotted key of config.json; None if it is not there."""
    found: Any = config
    for name in key.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def has_effect(key: str, config: dict[str, Any]) -> bool:
    """Whether a setting of WINDOWS does anything in a run of that configuration: of models without memory every window
    is a stream of its own, unless `evaluate.placement` is start."""
    if key != "evaluate.streams" or setting(config, "evaluate.placement") == "start":
        return True
    return setting(config, MEMORY) != 0


def reads_streams(config: dict[str, Any]) -> bool:
    """Whether validations of that configuration read on from window to window, with memory: then they read others than
    those of a model without, unless `evaluate.placement` is start."""
    has_memory = setting(config, MEMORY) not in (0, None)
    return has_memory and setting(config, "evaluate.placement") != "start"
