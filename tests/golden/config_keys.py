"""Every configuration key of both programs, with its type and default, kept in config_keys.txt.

    python -m tests.golden.config_keys            prints the keys of this tree
    python -m tests.golden.config_keys --write    writes the file anew

A key is a promise to the configurations that users wrote and to the checkpoints that hold one. A commit that adds,
renames or removes a key, or changes a default, writes the file anew, so that the change is seen in review and stands
in CHANGELOG.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from data_prep.config.schema import DataConfig
from pretrain.config.fields import FREE
from pretrain.config.schema import Config

FILE = Path(__file__).with_name("config_keys.txt")


def keys() -> list[str]:
    """One line for each key: program, dotted key, type, default, and whether it may change on resume."""
    programs: dict[str, type[BaseModel]] = {"pretrain": Config, "data_prep": DataConfig}
    return [f"{program} {line}" for program, config in programs.items() for line in _lines(config, "")]


def _lines(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        free = ", may change on resume" if field.json_schema_extra == FREE else ""
        yield f"{prefix}{name}: {_type_name(field.annotation)} = {_default(field)}{free}"
        for member in _sections(field.annotation):
            kinds = _kinds(member)
            yield from _lines(member, f"{prefix}{name}({kinds[0]})." if len(kinds) == 1 else f"{prefix}{name}.")


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation names, those in unions and lists too."""
    if _is_section(annotation):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _kinds(section: type[BaseModel]) -> tuple[str, ...]:
    """The values of its key `type`; one alone chooses this section among those of a union."""
    return get_args(section.model_fields["type"].annotation) if "type" in section.model_fields else ()


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _type_name(annotation: Any) -> str:
    """The annotation as one writes it, without the limits of its values and the names of section classes."""
    if _is_section(annotation):
        return "section"
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(parts[0])
    if origin is Literal:
        return " | ".join(map(repr, parts))
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(map(_type_name, parts)))  # sections of a union: one word
    if origin is not None:
        return f"{origin.__name__}[{', '.join('...' if part is ... else _type_name(part) for part in parts)}]"
    return "None" if annotation is types.NoneType else getattr(annotation, "__name__", str(annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        kinds = _kinds(type(value))
        return f"its defaults, type {kinds[0]}" if len(kinds) == 1 else "its defaults"
    return json.dumps(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write config_keys.txt anew")
    text = "\n".join(keys()) + "\n"
    if parser.parse_args().write:
        FILE.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
