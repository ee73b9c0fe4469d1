"""Rebuild the text sample beside this script from extracted Debian packages.

SOURCE holds one folder per package, named like the package, with the package's files below it (see README.md). Every
choice depends only on the packages' bytes: documents are selected, ordered and split by SHA-256 of their identifiers.
"""

import argparse
import gzip
import hashlib
import json
import re
import struct
import sys
import unicodedata
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from html_blocks import Block, Page

MIN_CHARS = 500
"""Shorter documents are dropped."""
MAX_CHARS = {"c4": 8_000, "pes2o": 18_000}
"""Longer units are cut between paragraphs into parts of about equal length."""
VALIDATION_SHARE = 0.03
"""Share of each source's characters held out, by whole units (pages, book chapters)."""
MAX_CODE_LINES = 12
MAX_CODE_SHARE = 0.12
"""Code blocks longer than the first are dropped, and further ones once code is this share of a document."""


@dataclass(frozen=True, kw_only=True)
class Source:
    package: str
    part: str
    """c4 or pes2o."""
    root: str
    """Folder of the pages inside the package, or the file that holds the books."""
    base: str
    """What comes before a page's relative path in its identifier."""
    num_chars: int
    """Budget: units are taken in hash order until their characters reach it."""
    date: str
    """Date of the package's version, used as time stamp of all its documents."""
    keep: str = r".*\.html"
    """Pages to read, as a pattern of the relative path."""
    drop: str = (
        r"(.*/)?(genindex|py-modindex|search|index|copyright|license|about|bugs|contents|changes|changelog)\.html"
    )


LICENSE_FILES = {"rust-doc": ("LICENSE-MIT.txt", "LICENSE-APACHE.txt.gz")}
"""Licence texts that a package keeps beside its pages; those of the others are in their copyright files."""

ENGLISH = frozenset(
    ("the", "of", "to", "and", "is", "in", "that", "for", "it", "with", "be", "this", "are", "on", "by")
)
ADMONITIONS = ("Note", "Tip", "Caution", "Warning", "Important")
NOTICES = re.compile(r"copyright|all rights reserved", re.I)
REGISTRIES = re.compile(r"pypi\.|crates\.io|npmjs|anaconda\.|deb\.debian", re.I)


def clean(text: str) -> str:
    """One line of NFC text: no control or zero-width characters, single spaces."""
    text = unicodedata.normalize("NFC", text).replace("¶", "").replace("\u00ad", "")
    text = "".join(c if unicodedata.category(c)[0] != "C" else " " if c.isspace() else "" for c in text)
    return re.sub(r"\s+([,.;:])(?=\s|$)", r"\1", re.sub(r"\s+", " ", text)).strip()


def is_prose(text: str) -> bool:
    """True for text of words: mostly letters, few symbols, not a legal notice."""
    letters = sum(c.isalpha() or c == " " for c in text)
    words = re.findall(r"[A-Za-z]{2,}", text)
    if "\ufffd" in text or NOTICES.search(text):
        return False
    return letters >= 0.8 * len(text) and len(words) >= 4


def is_stub(kind: str, text: str) -> bool:
    """True for fragments: short text without an end, items that only list functions."""
    is_fragment = len(text) < 40 and not text.endswith((".", ":", "?", "!"))
    return is_fragment or (kind == "li" and text.count("()") >= 2 and len(text) < 200)


def is_english(paragraphs: list[str]) -> bool:
    words = re.findall(r"[^\W\d_]+", " ".join(paragraphs).lower())
    return sum(word in ENGLISH for word in words) >= 0.15 * len(words)


def page_paragraphs(blocks: list[Block], has_tex: bool) -> list[str]:
    """Keeps headings with text below them, prose, list items and a little code."""
    out: list[Block] = []
    num_chars = num_code = 0
    for kind, raw in blocks:
        text = clean(raw)
        if has_tex:
            text = re.sub(r"\\[()]", "$", re.sub(r"\\[\[\]]", "$$", text))
        if REGISTRIES.search(text):
            continue
        if kind == "pre":
            text = "\n".join(line.rstrip() for line in raw.expandtabs(4).strip("\n").split("\n"))
            text = "".join(c for c in text.strip("\n") if c == "\n" or unicodedata.category(c)[0] != "C")
            if text.count("\n") >= MAX_CODE_LINES or num_code + len(text) > MAX_CODE_SHARE * num_chars:
                continue
            num_code += len(text)
        elif kind in ("h", "h1"):
            text = re.sub(r"^(Chapter )?[\dA-Z]?[\d.]+ +", "", text)
            if not re.search(r"[a-z]{3}", text) or len(text) > 120 or text in ADMONITIONS:
                continue
            while out and out[-1][0] in ("h", "dt"):
                out.pop()
        elif kind == "dt":
            if len(text) > 80 or not re.search(r"[a-z]{3}", text):
                continue
        elif kind == "math":
            if len(text) > 200 or not out or out[-1][0] != "p":
                continue
        elif not is_prose(text) or is_stub(kind, text):
            continue
        text = "- " + text if kind == "li" else text
        num_chars += len(text)
        out.append((kind, text))
    while out and (out[-1][0] in ("h", "h1", "dt") or out[-1][1].endswith(":")):
        out.pop()
    return [text for _, text in out]


def pages(source: Source, folder: Path) -> Iterator[tuple[str, list[str]]]:
    for path in sorted(folder.rglob("*.html")):
        name = path.relative_to(folder).as_posix()
        if not re.fullmatch(source.keep, name) or re.fullmatch(source.drop, name) or path.is_symlink():
            continue
        page = Page()
        page.feed(path.read_text(encoding="utf-8", errors="replace"))
        page.flush()
        starts = [i for i, (kind, _) in enumerate(page.blocks) if kind == "h1"] if "Tutorial" in name else []
        for i, (start, end) in enumerate(zip([0, *starts], [*starts, len(page.blocks)], strict=True)):
            paragraphs = page_paragraphs(page.blocks[start:end], has_tex=source.part == "pes2o")
            yield source.base + name + (f"#chapter-{i}" if i else ""), paragraphs


def r_strings(path: Path) -> Iterator[str]:
    """Every character vector of an R lazy-load database, as one text of lines (XDR serialization, zlib chunks)."""
    data = path.read_bytes()
    while data:
        inflate = zlib.decompressobj()
        chunk, data = inflate.decompress(data[4:]), inflate.unused_data
        pos = chunk.index(b"UTF-8") + 5
        length, pos, lines = struct.unpack_from(">i", chunk, pos + 4)[0], pos + 8, []
        for _ in range(length):
            size = max(0, struct.unpack_from(">i", chunk, pos + 4)[0])  # -1 is NA
            lines.append(chunk[pos + 8 : pos + 8 + size].decode("utf-8"))
            pos += 8 + size
        yield "\n".join(lines).replace("\r\n", "\n")


def chapters(source: Source, path: Path) -> Iterator[tuple[str, list[str]]]:
    """Chapters of each book, without what stands before the first (title, contents, the transcriber's notices)."""
    for book in r_strings(path):
        title = re.search(r"^Title: (.*)$", book, re.M)
        name = re.sub(r"\W+", "-", (title[1] if title else book[:60].split("\n")[0]).lower()).strip("-")
        book = re.split(r"\n\*\*\* ?END OF|\nEnd of Project Gutenberg|\nFINIS\b", book)[0]
        heading = r"\n(?=(?:CHAPTER|Chapter) [\dIVXLC]+\b|Epilogue\n)"
        for i, chapter in enumerate(re.split(heading, book)[1:], 1):
            paragraphs = [clean(text.replace("_", "")) for text in re.split(r"\n\s*\n", chapter)]
            yield f"{source.base}{name}:chapter-{i}", [text for text in paragraphs if re.search("[A-Za-z]", text)]


def split_parts(paragraphs: list[str], max_chars: int) -> list[list[str]]:
    num_parts = -(-sum(map(len, paragraphs)) // max_chars)
    target = sum(map(len, paragraphs)) / max(1, num_parts)
    parts: list[list[str]] = [[]]
    for text in paragraphs:
        if sum(map(len, parts[-1])) + len(text) / 2 > target and len(parts) < num_parts:
            parts.append([])
        parts[-1].append(text)
    return parts


def digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def record(source: Source, unit: str, text: str) -> dict[str, str]:
    if source.part == "c4":
        return {"text": text, "timestamp": source.date + "T00:00:00Z", "url": unit}
    stamp = source.date + "T00:00:00.000Z"
    return {
        "added": stamp,
        "created": stamp,
        "id": f"{digest(unit):016x}",
        "source": "sample/" + source.package,
        "text": text,
        "version": "v2-sample",
    }


def collect(source: Source, path: Path, seen: set[str]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """(unit, its records) of one source up to its budget; `seen` holds every line of 30 characters taken so far."""
    reader = chapters if source.base.startswith("urn:") else pages
    num_chars = 0
    for unit, paragraphs in sorted(reader(source, path), key=lambda item: digest(item[0])):
        fresh: list[str] = []
        taken: set[str] = set()
        for text in paragraphs:
            lines = {line.lower() for line in text.split("\n") if len(line) >= 30}
            if seen.isdisjoint(lines) and taken.isdisjoint(lines):
                fresh.append(text)
                taken |= lines
        size = sum(map(len, fresh))
        is_running_text = sum(len(text) for text in fresh if len(text) >= 80) >= 0.6 * size
        if size < MIN_CHARS or not is_running_text or not is_english(fresh) or num_chars >= source.num_chars:
            continue
        seen |= taken
        num_chars += size
        separator = "&" if "#" in unit else ":" if unit.startswith("urn:") else "#"
        parts = ["\n".join(part) for part in split_parts(fresh, MAX_CHARS[source.part])]
        names = [unit] + [f"{unit}{separator}part-{i}" for i in range(2, len(parts) + 1)]
        yield (
            unit,
            [record(source, name, text) for name, text in zip(names, parts, strict=True) if len(text) >= MIN_CHARS],
        )


def hold_out(units: list[tuple[str, list[dict[str, str]]]]) -> set[str]:
    """The units for validation: in hash order until they reach the share, passing over units twice as large as it."""
    sizes = {unit: sum(len(item["text"]) for item in records) for unit, records in units}
    budget = VALIDATION_SHARE * sum(sizes.values())
    held: set[str] = set()
    for unit in sorted(sizes, key=lambda name: digest("split " + name)):
        if sum(sizes[name] for name in held) < budget and sizes[unit] <= 2 * budget:
            held.add(unit)
    return held


def copy_licenses(package: Path, out: Path) -> None:
    doc = package / "usr/share/doc" / package.name
    names = LICENSE_FILES.get(package.name)
    for path in [doc / "html" / name for name in names] if names else [doc / "copyright"]:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        (out / f"{package.name}.{path.name.split('.')[0]}.txt").write_bytes(data)


def write(path: Path, records: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in records)
    path.write_bytes(gzip.compress(lines.encode(), compresslevel=9, mtime=0))
    print(f"{path.name}: {len(records)} documents, {path.stat().st_size} bytes", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with one folder per extracted package")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="where to write (default: beside this file)"
    )
    args = parser.parse_args()
    (args.out / "LICENSES").mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    picked: dict[tuple[str, bool], list[dict[str, str]]] = {}
    for fields in json.loads(Path(__file__).with_name("sources.json").read_text()):
        source = Source(**fields)
        units = list(collect(source, args.source / source.package / source.root, seen))
        held = hold_out(units)
        for unit, records in units:
            picked.setdefault((source.part, unit in held), []).extend(records)
        copy_licenses(args.source / source.package, args.out / "LICENSES")
        num_documents = [
            sum(len(records) for unit, records in units if (unit in held) == side) for side in (False, True)
        ]
        num_bytes = sum(len(item["text"].encode()) for _, records in units for item in records)
        print(f"| {source.part} | {source.package} | {num_documents[0]} | {num_documents[1]} | {num_bytes:,} |")
    for records in picked.values():
        records.sort(key=lambda item: digest("order " + item["text"]))
    train = picked["c4", False]
    half = (len(train) + 1) // 2
    write(args.out / "c4/c4-train.00000-of-00002.json.gz", train[:half])
    write(args.out / "c4/c4-train.00001-of-00002.json.gz", train[half:])
    write(args.out / "c4/c4-validation.00000-of-00001.json.gz", picked["c4", True])
    write(args.out / "pes2o/train-00000-of-00001.json.gz", picked["pes2o", False])
    write(args.out / "pes2o/valid-00000-of-00001.json.gz", picked["pes2o", True])


if __name__ == "__main__":
    main()
