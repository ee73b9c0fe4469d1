"""From JSON and `--set` to a checked Config and back. Every refusal is one ConfigError that names the key."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from common.errors import ConfigError
from pretrain.config.keys import fields
from pretrain.config.rules import check_rules
from pretrain.config.schema import Config


def load_config(path: Path, overrides: Sequence[str] = (), *, option: str = "--config") -> Config:
    """Reads the JSON file at `path`, applies `--set` overrides in order and validates. Raises ConfigError, which names
    `option` as the argument that `path` came from."""
    tree = _read_json(path, option)
    if not isinstance(tree, dict):
        raise ConfigError(f"{option}: {path} holds {_kind(tree)}; a configuration is a JSON object, {{...}}")
    if "model" not in tree and "input" in tree:
        raise ConfigError(
            f"{option}: {path} prepares data (python -m data_prep run --config {path}); those of runs are in configs "
            "and configs/paper"
        )
    # Types first: a change of type resets its section, which must not discard a key set before it on the line.
    for override in sorted(overrides, key=lambda text: not text.partition("=")[0].strip().endswith(".type")):
        apply_override(tree, override)
    _correct_description(tree, path, overrides)
    return parse_config(tree)


DESCRIBED = ("model", "data", "batch", "optimizer", "schedule", "train", "parallel", "evaluate", "deepspeed")
"""Sections that a description may speak of."""


def _correct_description(tree: dict[str, Any], path: Path, overrides: Sequence[str]) -> None:
    """What a file says of itself does not hold for what `--set` makes of it: then its name and those keys stand for it,
    in the saved configuration too."""
    keys = {override.partition("=")[0].strip() for override in overrides}
    changed = sorted(key for key in keys if key.partition(".")[0] in DESCRIBED)
    if changed and "description" in tree and "description" not in keys:
        tree["description"] = f"{path.name} with other values of {', '.join(changed)}"


def _read_json(path: Path, option: str) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors of Windows begin a file with a mark
        return json.loads(text, object_pairs_hook=_refuse_repeated_keys)
    except FileNotFoundError:
        raise ConfigError(f"{option}: there is no file {path}; the project's are in configs") from None
    except IsADirectoryError:
        raise ConfigError(f"{option}: {path} is a folder; name one configuration file, e.g. one in it") from None
    except OSError as error:
        raise ConfigError(f"{option}: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option}: {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{option}: {path} is not JSON: line {error.lineno}: {error.msg}") from None
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:  # a number of too many digits, brackets in brackets
        raise ConfigError(f"{option}: {path} cannot be read as JSON: {error}") from None


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Applies `dotted.key=value` to `tree` in place. The value is JSON if it parses as JSON, else a string."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: write it as dotted.key=value")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    except (ValueError, RecursionError) as error:  # too many digits, too deep
        raise ConfigError(f"{key}: the value of --set cannot be read: {error}") from None
    *sections, leaf = key.strip().split(".")
    node = tree
    for depth, section in enumerate(sections):
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {'.'.join(sections[: depth + 1])} is a value, not a section")
    # Another kind of layer has other keys: those of the previous kind would be refused as unknown.
    if leaf == "type" and node.get("type", value) != value:
        node.clear()
    node[leaf] = value


def parse_config(tree: dict[str, Any]) -> Config:
    """Validates a JSON tree. Raises ConfigError with the first problem and how many more there are."""
    _refuse_unprintable(tree)
    try:
        # JSON mode: arrays may become tuples although every other conversion (true -> 1, "3" -> 3) is refused.
        config = Config.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        problems = error.errors(include_url=False)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(_describe(problems[0]) + more) from None
    check_rules(config)
    return config


def _refuse_unprintable(value: Any, key: str = "") -> None:
    """No file system takes a name with NUL, and no encoding half of a surrogate pair: refused here, by key."""
    if isinstance(value, dict):
        for name, entry in value.items():
            _refuse_unprintable(name, key)
            _refuse_unprintable(entry, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for entry in value:
            _refuse_unprintable(entry, key)
    elif isinstance(value, str) and any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in value):
        raise ConfigError(f"{key or 'a key'}: {value!a} holds a character that is no text; remove it")


def to_json(config: Config) -> dict[str, Any]:
    """The resolved tree, defaults included, as plain JSON types."""
    return config.model_dump(mode="json")


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ConfigError(f"{repeated}: stands twice in the same JSON object; keep one")
    return tree


def _describe(problem: ErrorDetails) -> str:
    """One line for one pydantic problem: the dotted key, what is wrong, and what would work."""
    # A tagged union adds the tag as an extra path element: model.attention.switchhead.num_heads.
    tags = {section.model_fields["type"].default for _, section, _ in fields() if "type" in section.model_fields}
    key = ".".join(str(part) for part in problem["loc"] if part not in tags)
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return str(cause)
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key{_suggestion(key)}"
    if problem["type"] == "missing":
        return f"{key}: is required and missing"
    if problem["type"] == "union_tag_invalid":
        context = problem["ctx"]
        return f"{key}.type: there is no {context['tag']!r}; set it to one of {context['expected_tags']}"
    message = str(cause) if cause is not None else problem["msg"][0].lower() + problem["msg"][1:]
    given = "" if cause is not None else f" (given {json.dumps(problem['input'], default=str)})"
    return f"{key}: {message}{given}"


def _suggestion(key: str) -> str:
    owners = sorted(
        section.model_fields["type"].default
        for dotted, section, _ in fields()
        if dotted == key and "type" in section.model_fields
    )
    if owners:
        section = key.rsplit(".", 1)[0]
        return f" for this {section}.type; it belongs to {section}.type = {' or '.join(owners)}"
    known = sorted({dotted for dotted, _, _ in fields()} | {dotted.rsplit(".", 1)[0] for dotted, _, _ in fields()})
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not close:
        leaf = key.rsplit(".", 1)[-1]
        close = [k for k in known if k.rsplit(".", 1)[-1] == leaf][:1]
    return f"; the nearest known key is {close[0]}" if close else "; see --help for all keys"
