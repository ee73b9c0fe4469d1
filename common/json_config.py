"""Configurations of both programs: a JSON file, `--set key=value` on top, a pydantic model; and what is wrong, in one
grammar: `KEY: what is wrong; what would work`. Everything refused is one ConfigError."""

from __future__ import annotations

import difflib
import json
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from common.arguments import MOST_DIGITS
from common.errors import ConfigError, kind_of

Model = TypeVar("Model", bound=BaseModel)
HELP_WIDTH = 96
DEEPEST = 50
"""Brackets in brackets of a value: more than any needs, while pydantic reads 200 and Python 1,000."""
LONGEST_SHOWN = 200
"""Characters of a refused value in a message."""


class _LongNumber(str):
    """A whole number of more than MOST_DIGITS digits, as it was written, until `validate` refuses it by its key: Python
    reads only those of less than 4,300, and says why in words about itself."""


class Section(BaseModel):
    """Base of every configuration section: frozen, unknown keys refused, docstrings under the fields feed `--help`."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class Key(NamedTuple):
    dotted: str
    """train.steps"""
    section: type[BaseModel]
    """The class that the field stands in."""
    name: str
    """steps"""

    @property
    def field(self) -> FieldInfo:
        return self.section.model_fields[self.name]


def read_tree(path: Path, option: str = "--config") -> dict[str, Any]:
    """The JSON object in a file. ConfigError, or PassingError, names `option` as the argument that `path` came from."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors begin a file with a mark
        tree = json.loads(text, object_pairs_hook=_refuse_repeated_keys, parse_int=_whole_number)
    except FileNotFoundError:
        raise ConfigError(f"{option}: there is no file {path}; the project's are in configs") from None
    except IsADirectoryError:
        raise ConfigError(f"{option}: {path} is a folder; name one configuration file, e.g. one in it") from None
    except OSError as error:
        raise kind_of(error, ConfigError)(f"{option}: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option}: {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{option}: {path} is not JSON: line {error.lineno}: {error.msg}") from None
    except RecursionError:
        raise ConfigError(f"{option}: {path} cannot be read as JSON: it has too many brackets in brackets") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{option}: {path} holds {_kind(tree)}; a configuration is a JSON object, {{...}}")
    return tree


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in pairs:
        if key in tree:
            raise ConfigError(f"{key}: stands twice in the same JSON object; keep one")
        tree[key] = value
    return tree


def _whole_number(digits: str) -> int | _LongNumber:
    return int(digits) if len(digits.lstrip("-")) <= MOST_DIGITS else _LongNumber(digits)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def apply_override(tree: dict[str, Any], override: str, *, tag: str | None = None) -> None:
    """Applies `dotted.key=value` to `tree` in place. The value is JSON if it parses as JSON, else a string.

    A section that is absent or null begins empty. In a list of sections a number stands for an entry, the first is 0:
    `data.sources.0.weight=2`. `tag`: the key that says which kind of section one is; kinds have
    different keys, so a new value of it clears the section.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: write it as dotted.key=value")
    try:
        value = json.loads(text, parse_int=_whole_number)
    except json.JSONDecodeError:
        value = text
    except RecursionError:
        raise ConfigError(f"{key}: the value of --set cannot be read: it has too many brackets in brackets") from None
    *sections, leaf = key.strip().split(".")
    node: Any = tree
    for depth, section in enumerate(sections):
        if isinstance(node, list):
            node = _entry(node, section, ".".join(sections[:depth]), override)
        else:
            if node.get(section) is None:
                node[section] = {}
            node = node[section]
        if not isinstance(node, dict | list):
            raise ConfigError(f"--set {override}: {'.'.join(sections[: depth + 1])} is a value, not a section")
    if isinstance(node, list):
        raise ConfigError(f"--set {override}: {'.'.join(sections)} is a list; give all of it, or a key of an entry")
    if leaf == tag and node.get(leaf, value) != value:
        node.clear()
    node[leaf] = value


def _entry(entries: list[Any], number: str, key: str, override: str) -> Any:
    if re.fullmatch("0|[1-9][0-9]{0,8}", number) and int(number) < len(entries):
        return entries[int(number)]
    known = f"its entries are 0 to {len(entries) - 1}" if entries else "it is empty"
    raise ConfigError(f"--set {override}: {key} is a list without entry {number}; {known}")


def validate(model: type[Model], tree: dict[str, Any]) -> Model:
    """The checked configuration. Raises ConfigError with the first problem and how many more there are."""
    config, problems = validate_all(model, tree)
    if config is not None and not problems:
        return config
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    raise ConfigError(f"{problems[0]}{more}")


def validate_all(model: type[Model], tree: dict[str, Any]) -> tuple[Model | None, list[ConfigError]]:
    """The configuration, and every problem of it, one ConfigError each; unknown keys before others, because they often
    explain them. Beside unknown keys alone there is a configuration, that of the other keys; else it is None."""
    try:
        _refuse_unreadable(tree)
        # JSON mode: arrays may become tuples although every other conversion (true -> 1, "3" -> 3) is refused.
        return model.model_validate_json(json.dumps(tree)), []
    except ConfigError as error:
        return None, [error]
    except ValidationError as error:
        problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    found = [ConfigError(_describe(model, problem)) for problem in problems]
    if any(problem["type"] != "extra_forbidden" for problem in problems):
        return None, found
    known = json.loads(json.dumps(tree))
    for problem in problems:
        _remove(known, _without_tags(model, problem["loc"]))
    try:
        return model.model_validate_json(json.dumps(known)), found
    except ValidationError:
        return None, found


def _remove(tree: Any, place: list[int | str]) -> None:
    *sections, leaf = place
    for part in sections:
        tree = tree[part]
    tree.pop(leaf, None)


def _refuse_unreadable(value: Any, key: str = "", depth: int = 0) -> None:
    """What nothing that comes later would take is refused here, by key: numbers without end, brackets in brackets, NUL,
    which is in no name of a file, and half of a surrogate pair, which no encoding has."""
    if depth > DEEPEST:
        raise ConfigError(f"{key}: has more than {DEEPEST} brackets in brackets; no value needs that many")
    if isinstance(value, dict):
        for name, entry in value.items():
            _refuse_unreadable(name, key, depth)
            _refuse_unreadable(entry, f"{key}.{name}" if key else name, depth + 1)
    elif isinstance(value, list):
        for entry in value:
            _refuse_unreadable(entry, key, depth + 1)
    elif isinstance(value, _LongNumber):
        count = len(value.lstrip("-"))
        raise ConfigError(f"{key}: is a number of {count:,} digits, {value[:20]}...; write at most {MOST_DIGITS}")
    elif isinstance(value, str) and any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in value):
        raise ConfigError(f"{key or 'a key'}: {value!a} holds a character that is no text; remove it")


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Every leaf key; if a section may be one of several kinds, the keys of each kind in turn."""
    for name, field in model.model_fields.items():
        # A list of sections is one value: its entries have no dotted keys of their own.
        is_list = get_origin(field.annotation) is tuple
        kinds = () if is_list else (field.annotation, *get_args(field.annotation))
        sections = [kind for kind in kinds if _is_section(kind)]
        if not sections:
            yield Key(f"{prefix}{name}", model, name)
        for section in sections:
            yield from keys(section, f"{prefix}{name}.")


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _without_tags(model: type[BaseModel], place: tuple[int | str, ...]) -> list[int | str]:
    """pydantic's path to a problem without the tags of unions, each an element of its own behind the union's:
    model.attention.switchhead.num_heads. A key that nobody knows may have the name of a tag."""
    unions = {key.dotted.rpartition(".")[0] for key in keys(model) if _is_tagged(key.section)}
    parts: list[int | str] = []
    is_tag = False
    for part in place:
        if not is_tag:
            parts.append(part)
        is_tag = not is_tag and ".".join(map(str, parts)) in unions
    return parts


def _describe(model: type[BaseModel], problem: ErrorDetails) -> str:
    """One line for one pydantic problem: the dotted key, what is wrong, and what would work."""
    key = ".".join(map(str, _without_tags(model, problem["loc"])))
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return str(cause)
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key{_suggestion(model, key)}"
    if problem["type"] == "missing":
        return f"{key}: is required and missing"
    if problem["type"] == "union_tag_invalid":
        context = problem["ctx"]
        return f"{key}.type: there is no {context['tag']!r}; set it to one of {context['expected_tags']}"
    if cause is not None:  # a rule over several keys names them itself
        return f"{key}: {cause}" if key else str(cause)
    given = json.dumps(problem["input"], default=str)
    if len(given) > LONGEST_SHOWN:
        given = f"{given[:LONGEST_SHOWN]}... ({len(given):,} characters)"
    return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]} (given {given})"


def _is_tagged(section: type[BaseModel]) -> bool:
    """Whether a section is one of several kinds: then its `type` has one value."""
    field = section.model_fields.get("type")
    return field is not None and len(get_args(field.annotation)) == 1


def _suggestion(model: type[BaseModel], key: str) -> str:
    sections = [known.section for known in keys(model) if known.dotted == key]
    owners = sorted(section.model_fields["type"].default for section in sections if _is_tagged(section))
    if owners:
        section = key.rsplit(".", 1)[0]
        return f" for this {section}.type; it belongs to {section}.type = {' or '.join(owners)}"
    nearest = nearest_key(model, key)
    if nearest:
        return f"; the nearest known key is {nearest}"
    section = key.rpartition(".")[0]
    is_one_kind = len({known.section for known in keys(model) if known.dotted.rpartition(".")[0] == section}) == 1
    if section and is_one_kind:
        return f"; {section} has {', '.join(_names_in(model, section))}"
    return "; see --help for all keys"


def _names_in(model: type[BaseModel], section: str) -> list[str]:
    """The keys and sections in a section ("": the top level), in order, of all its kinds; empty if there is none."""
    start = f"{section}." if section else ""
    inside = (known.dotted.removeprefix(start) for known in keys(model) if known.dotted.startswith(start))
    return list(dict.fromkeys(name.partition(".")[0] for name in inside))


def nearest_key(model: type[BaseModel], key: str) -> str | None:
    """The known key or section that is most like an unknown one; None if nothing is like it. In a known section that is
    a key of it, else one of another section that is called almost the same. The whole names are compared only where the
    section is unknown too: all keys of a section are alike in their first half, and none of `parallel` means what
    `parallel.context` would."""
    section, _, leaf = key.rpartition(".")
    dotted = {known.dotted for known in keys(model)}
    known = sorted(dotted | {name.rpartition(".")[0] for name in dotted} - {""})
    last_parts = {name.rpartition(".")[2]: name for name in reversed(known)}
    last_parts.pop("type", None)  # which kind a section is says nothing of another section
    name, here = leaf, {name: f"{section}.{name}".lstrip(".") for name in _names_in(model, section)}
    if not here:
        name, here = key, {name: name for name in known}
    for wanted, among, cutoff in (name, here, 0.8), (leaf, last_parts, 0.9), (name, here, 0.6):
        if close := difflib.get_close_matches(wanted, among, n=1, cutoff=cutoff):
            return among[close[0]]
    return None


def describe_keys(model: type[BaseModel], note: Callable[[FieldInfo], str] = lambda field: "") -> list[str]:
    """Lines for --help: each section with its docstring, its keys with default and docstring. `note`: text after the
    default of a field."""
    lines: list[str] = []
    heading: tuple[str, type[BaseModel]] | None = None
    for key in keys(model):
        if heading != (heading := (key.dotted.rpartition(".")[0], key.section)):
            lines += ["", f"{heading[0] or 'top level'}: {' '.join((key.section.__doc__ or '').split())}"]
        lines.append(f"  {key.dotted} = {_default(key.field)}{note(key.field)}")
        text = " ".join((key.field.description or "").split())
        lines += textwrap.wrap(text, HELP_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(required)"
    return json.dumps(field.get_default(call_default_factory=True), default=str)
