"""Configurations of any program: what is refused, in one grammar, and what --help says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from common.errors import ConfigError
from common.json_config import (
    Section,
    apply_override,
    describe_keys,
    keys,
    nearest_key,
    read_tree,
    validate,
    validate_all,
)


class Round(Section):
    """A circle."""

    type: Literal["round"] = "round"
    radius: float = 1.0
    """Metres."""


class Square(Section):
    """A square."""

    type: Literal["square"] = "square"
    side: float = 1.0
    """Metres."""


class Paint(Section):
    """Its colour."""

    red: int = Field(0, ge=0, le=255)
    """Red."""


class Picture(Section):
    """A picture."""

    name: str
    """Its name."""
    shape: Annotated[Round | Square, Field(discriminator="type")] = Round()
    paint: Paint | None = None
    sizes: tuple[int, ...] = ()
    """Sizes."""


def test_keys_are_the_leaves_of_every_kind() -> None:
    assert [key.dotted for key in keys(Picture)] == [
        "name", "shape.type", "shape.radius", "shape.type", "shape.side", "paint.red", "sizes",
    ]  # fmt: skip
    text = "\n".join(describe_keys(Picture, lambda field: " !" * (field.description == "Red.")))
    assert "  name = (required)\n      Its name." in text and "shape: A square.\n  shape.type" in text
    assert "  paint.red = 0 !\n" in text and "  sizes = []" in text


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"name": "a", "nam": 1}, "nam: unknown key; the nearest known key is name"),
        ({"nam": 1}, "nam: unknown key; the nearest known key is name (and 1 more)"),
        ({"name": "a", "radius": 1.0}, "radius: unknown key; the nearest known key is shape.radius"),
        ({"name": "a", "qqq": 1}, "qqq: unknown key; see --help for all keys"),
        ({"name": "a", "paint": {"hue": 1}}, "paint.hue: unknown key; paint has red"),
        ({"name": "a", "shape": {"type": "round", "qqq": 1}}, "shape.qqq: unknown key; see --help for all keys"),
        ({}, "name: is required and missing"),
        ({"name": "a", "shape": {"side": 2.0, "type": "round"}}, "belongs to shape.type = square"),
        (
            {"name": "a", "shape": {"type": "oval"}},
            "shape.type: there is no 'oval'; set it to one of 'round', 'square'",
        ),
        ({"name": "a", "paint": {"red": 256}}, "paint.red: input should be less than or equal to 255 (given 256)"),
        ({"name": "a", "shape": {"type": "round", "radius": float("nan")}}, "shape.radius: input should be a finite"),
        ({"name": "a\0"}, "name: 'a\\x00' holds a character that is no text; remove it"),
    ],
)
def test_a_problem_is_one_sentence_with_the_key(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(Picture, tree)
    assert message in str(error.value) and "\n" not in str(error.value)


class Dot(Section):
    """A dot, and a key of that name."""

    type: Literal["dot"] = "dot"
    dot: int = Field(1, ge=1)
    """Millimetres."""


class Point(Section):
    """What may be a dot."""

    mark: Annotated[Round | Dot, Field(discriminator="type")] = Round()


def test_a_key_may_have_the_name_of_its_kind() -> None:
    with pytest.raises(ConfigError, match=r"^mark\.dot: input should be greater than or equal to 1 \(given 0\)"):
        validate(Point, {"mark": {"type": "dot", "dot": 0}})
    known, errors = validate_all(Point, {"mark": {"type": "dot", "dot": 3, "size": 4}})
    assert known == Point(mark=Dot(dot=3)) and [str(e).partition(":")[0] for e in errors] == ["mark.size"]


@pytest.mark.parametrize("place", ["round", "paint.square", "shape.square", "shape.round"])
def test_an_unknown_key_may_have_the_name_of_a_kind(place: str) -> None:
    """Anywhere; the other keys are still a configuration."""
    tree: dict[str, Any] = {"name": "a", "shape": {"type": "round"}, "paint": {}}
    apply_override(tree, f"{place}.x=1")
    known, (error,) = validate_all(Picture, tree)
    assert known == Picture(name="a", paint=Paint()) and str(error).startswith(f"{place}: unknown key; ")


@pytest.mark.parametrize(
    "value", ["1" * 5000, "-" + "1" * 5000, "[" + "1" * 5000 + "]", "[" * 60 + "]" * 60, "[" * 5000]
)
def test_values_without_end_are_refused_by_their_key(value: str, tmp_path: Path) -> None:
    """Python reads no integer of 5,000 digits and pydantic no 200 brackets: both say so in words about themselves."""
    path = tmp_path / "a.json"
    path.write_text(f'{{"name": "a", "paint": {{"red": {value}}}}}')

    def from_file() -> None:
        validate(Picture, read_tree(path))

    def from_the_line() -> None:
        tree: dict[str, Any] = {"name": "a"}
        apply_override(tree, f"paint.red={value}")
        assert validate_all(Picture, tree)[0] is None
        validate(Picture, tree)

    for read in (from_file, from_the_line):
        with pytest.raises(ConfigError, match=r"(digits|brackets)") as refused:
            read()
        said = str(refused.value)
        assert len(said) < 400 and "\n" not in said and "recursion" not in said and "int_max_str" not in said, said
        assert said.startswith("paint.red: ") or (read is from_file and value == "[" * 5000), said


def test_a_refused_value_is_shown_by_its_beginning() -> None:
    with pytest.raises(
        ConfigError, match=r"^paint.red: input should be a valid integer \(given \"xxx.*\.\.\. \("
    ) as error:
        validate(Picture, {"name": "a", "paint": {"red": "x" * 10_000}})
    assert len(str(error.value)) < 400


def test_overrides_make_sections_and_another_kind_clears_one() -> None:
    tree: dict[str, Any] = {"name": "a", "shape": {"type": "round", "radius": 2.0}, "paint": None}
    for override in ("shape.radius=3", "paint.red=7", "name=b=c", "sizes=[1,2]"):
        apply_override(tree, override, tag="type")
    assert tree == {"name": "b=c", "shape": {"type": "round", "radius": 3}, "paint": {"red": 7}, "sizes": [1, 2]}
    apply_override(tree, "shape.type=square")
    assert tree["shape"] == {"type": "square", "radius": 3}
    apply_override(tree, "shape.type=round", tag="type")
    assert tree["shape"] == {"type": "round"}
    for override, message in (("name", "write it as dotted.key=value"), ("name.x=1", "name is a value, not a section")):
        with pytest.raises(ConfigError, match=message):
            apply_override(tree, override)


def test_an_override_of_an_entry_of_a_list_changes_that_entry_alone() -> None:
    tree: dict[str, Any] = {"sources": [{"weight": 1, "shape": None}, {"weight": 2}], "sizes": [1, 2], "none": []}
    for override in ("sources.1.weight=0.5", "sources.0.shape.radius=3"):
        apply_override(tree, override)
    assert tree["sources"] == [{"weight": 1, "shape": {"radius": 3}}, {"weight": 0.5}]
    for override, message in (
        ("sources.2.weight=1", "sources is a list without entry 2; its entries are 0 to 1"),
        ("sources.c4.weight=1", "sources is a list without entry c4; its entries are 0 to 1"),
        ("sources.-1.weight=1", "without entry -1"),
        ("sources.01.weight=1", "without entry 01"),  # else one key has two names, and a sweep could vary it twice
        ("sources.\u0661.weight=1", "without entry"),  # a digit to Python, of another script
        ("none.0.weight=1", "none is a list without entry 0; it is empty"),
        ("sizes.0=3", "sizes is a list; give all of it, or a key of an entry"),
        ("sizes.0.x=3", "sizes.0 is a value, not a section"),
    ):
        with pytest.raises(ConfigError, match=message):
            apply_override(tree, override)
    assert tree["sizes"] == [1, 2] and len(tree["sources"]) == 2


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(ConfigError, match=r"^--config: there is no file .*a\.json"):
        read_tree(path)
    with pytest.raises(ConfigError, match=r"^--like: .* is a folder; name one configuration file"):
        read_tree(tmp_path, "--like")
    for content, message in [
        (b"{", "is not JSON: line 1: Expecting"),
        (b"\xff", r"is not UTF-8 text \(byte 0\)"),
        (b"3", "holds a number; a configuration is a JSON object"),
        (b'{"a": {"b": 1, "b": 2}}', "^b: stands twice in the same JSON object"),
        (b"[" * 100_000, "cannot be read as JSON"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            read_tree(path)
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": 1}).encode())
    assert read_tree(path) == {"a": 1}


def test_the_nearest_key_may_be_in_another_section() -> None:
    found = {name: nearest_key(Picture, name) for name in ("pant.red", "red", "shap", "sizes.x", "qqq")}
    assert found == {"pant.red": "paint.red", "red": "paint.red", "shap": "shape", "sizes.x": "sizes", "qqq": None}
