"""Small files in the exact formats in which LAMBADA, BLiMP and the Children's Book Test are published."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = tuple("river house letter morning captain water window garden stone bread winter street lamp story".split())  # noqa: SIM905
SETS = ("adjunct_island", "wh_island", "npi_present_1")


def lambada(folder: Path, count: int = 7) -> Path:
    """{"text": ...} lines; one last word has a quotation mark before it."""
    draw = random.Random(1)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(4, 30))).capitalize() for _ in range(count)]
    texts[1] += ' she said, "Stone'
    path = folder / "lambada_test.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def blimp(folder: Path, count: int = 5) -> Path:
    """A file for each of three phenomena, with the published fields; their sizes differ."""
    draw, place = random.Random(2), folder / "blimp" / "data"
    place.mkdir(parents=True)
    for number, name in enumerate(SETS):
        lines = []
        for pair in range(count + number):
            good = draw.choices(WORDS, k=draw.randint(3, 9))
            row = {
                "sentence_good": " ".join(good).capitalize() + ".",
                "sentence_bad": " ".join(reversed(good)).capitalize() + ".",
                "field": "syntax",
                "linguistics_term": "island_effects",
                "UID": name,
                "simple_LM_method": True,
                "pairID": str(pair),
            }
            lines.append(json.dumps(row) + "\n")
        (place / f"{name}.jsonl").write_text("".join(lines))
    return folder / "blimp"


def cbt(folder: Path, count: int = 3) -> Path:
    """Four files of numbered blocks; the last question of each has nine candidates, which no protocol asks."""
    draw, place = random.Random(3), folder / "CBTest" / "data"
    place.mkdir(parents=True)
    for kind in ("NE", "CN", "V", "P"):
        blocks = []
        for number in range(count + 1):
            lines = [
                f"{line} `` {' '.join(draw.choices(WORDS, k=4)).capitalize()} , '' he did n't say ."
                for line in range(1, 21)
            ]
            candidates = draw.sample(WORDS, 9 if number == count else 10)
            before, after = (" ".join(draw.choices(WORDS, k=k)) for k in (3, draw.randint(1, 4)))
            lines.append(f"21 {before} XXXXX , {after} !\t{candidates[2]}\t\t{'|'.join(candidates)}")
            blocks.append("\n".join(lines) + "\n\n")
        (place / f"cbtest_{kind}_test_2500ex.txt").write_text("".join(blocks))
        (place / f"cbtest_{kind}_train.txt").write_text("another file of the archive")
    return folder / "CBTest"
