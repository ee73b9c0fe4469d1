"""docs/pictures/rooms.svg shows the rooms of test_rooms.py and imports that are there; step.svg names real files."""

from __future__ import annotations

import runpy
from itertools import combinations
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

from tests.test_rooms import MAY_IMPORT, MODULES, ROOMS, ROOT, SHARED, imports

FOLDER = ROOT / "docs" / "pictures"
SVG = "{http://www.w3.org/2000/svg}"
Point = tuple[float, float]


class Rectangle(NamedTuple):
    """In pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def has_on_its_border(self, point: Point) -> bool:
        x, y = point
        inside = self.left <= x <= self.right and self.top <= y <= self.bottom
        return inside and (x in (self.left, self.right) or y in (self.top, self.bottom))

    def holds(self, point: Point) -> bool:
        return self.left < point[0] < self.right and self.top < point[1] < self.bottom

    def contains(self, other: Rectangle) -> bool:
        return self.holds(other[:2]) and self.holds(other[2:])

    def meets(self, other: Rectangle) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


class Picture(NamedTuple):
    boxes: dict[str, Rectangle]
    arrows: dict[tuple[str, str], tuple[Point, Point]]


def picture(name: str) -> Picture:
    """Boxes and arrows by their ids: a room or a file, and `SOURCE--TARGET`."""
    root = ElementTree.parse(FOLDER / f"{name}.svg").getroot()
    boxes, arrows = {}, {}
    for group in root.iter(f"{SVG}g"):
        shape = group.find(f"{SVG}rect")
        assert shape is not None
        x, y, width, height = (float(shape.attrib[key]) for key in ("x", "y", "width", "height"))
        boxes[group.attrib["id"]] = Rectangle(x, y, x + width, y + height)
    for path in root.iter(f"{SVG}path"):
        if path.get("class") == "arrow":
            source, target = path.attrib["id"].split("--")
            numbers = [float(word.lstrip("ML")) for word in path.attrib["d"].split()]
            arrows[source, target] = ((numbers[0], numbers[1]), (numbers[2], numbers[3]))
    return Picture(boxes, arrows)


PICTURES = {name: picture(name) for name in ("rooms", "step")}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_what_its_program_draws(name: str) -> None:
    drawn = runpy.run_path(str(FOLDER / "draw.py"))[name]()
    assert (FOLDER / f"{name}.svg").read_text(encoding="utf-8") == drawn, "python docs/pictures/draw.py"


def test_every_room_is_drawn_below_those_that_may_import_it() -> None:
    """From top to bottom, and in a row from left to right."""
    boxes = PICTURES["rooms"].boxes
    for package, order in ROOMS.items():
        drawn = {name.split(".")[1]: box for name, box in boxes.items() if name.startswith(f"{package}.")}
        read = sorted(drawn, key=lambda room: (drawn[room].top, drawn[room].left))
        assert read == [room for room in reversed(order) if not room.startswith("__")], package
    assert {name for name in boxes if "." not in name} == ROOMS.keys()


def test_every_room_that_is_drawn_exists() -> None:
    for name in PICTURES["rooms"].boxes:
        place = ROOT / name.replace(".", "/")
        assert place.is_dir() or place.with_suffix(".py").is_file(), name


def test_every_arrow_between_rooms_is_an_import_and_allowed() -> None:
    found = {
        (module, target)
        for module, path in MODULES.items()
        for target in imports(path)
        if not target.startswith("tests")
    }
    for source, target in PICTURES["rooms"].arrows:
        package, other = source.split(".")[0], target.split(".")[0]
        assert other in MAY_IMPORT[package], f"{source} to {target}"
        if package == other:
            order = ROOMS[package]
            assert order.index(target.split(".")[1]) < order.index(source.split(".")[1]), f"{source} to {target}"
        elif (package, other) == ("pretrain", "data_prep"):
            assert target == SHARED
        assert any(f"{a}.".startswith(f"{source}.") and f"{b}.".startswith(f"{target}.") for a, b in found), (
            f"{source} imports nothing of {target}"
        )


def test_every_file_of_a_step_exists() -> None:
    assert all((ROOT / name).exists() for name in PICTURES["step"].boxes)


@pytest.mark.parametrize("name", PICTURES)
def test_arrows_go_from_box_to_box_and_boxes_do_not_overlap(name: str) -> None:
    boxes, arrows = PICTURES[name]
    for (source, target), (begin, end) in arrows.items():
        assert boxes[source].has_on_its_border(begin), f"{source} to {target}"
        assert boxes[target].has_on_its_border(end), f"{source} to {target}"
        (x, y), (width, height) = begin, (end[0] - begin[0], end[1] - begin[1])
        points = [(x + width * share / 100, y + height * share / 100) for share in range(1, 100)]
        rooms = {box for box in boxes if not any(boxes[box].contains(other) for other in boxes.values())}
        crossed = {box for box in rooms for point in points if boxes[box].holds(point)}
        assert not crossed, f"{source} to {target} crosses {crossed}"
    for one, other in combinations(boxes, 2):
        a, b = boxes[one], boxes[other]
        assert not a.meets(b) or a.contains(b) or b.contains(a), f"{one} lies over {other}"
