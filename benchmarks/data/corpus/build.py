"""About 100 MB of real English text from Debian's documentation packages, in C4's raw format, to repeat the numbers of
`benchmarks/data/preparation.py`. Needs apt-get, dpkg-deb, 200 MB of download and 1.5 GB of disk; takes some minutes.

    python benchmarks/data/corpus/build.py OUT            # OUT/c4-train.0000N-of-00008.json.gz, OUT/sources.json

Pages are ordered by the sha256 of their names, so every file mixes all sources. The same package versions give the same
text. It is for measuring: manuals, with code and other languages in between, are no corpus to train on, and it stays on
your machine (each package's terms are in its own copyright file).
"""

import argparse
import gzip
import hashlib
import html
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (
    "linux-doc-6.1", "rust-doc", "postgresql-doc-15", "python3.11-doc", "openjdk-17-doc", "libboost1.81-doc",
    "qtbase5-doc-html", "erlang-doc", "octave-doc", "perl-doc", "python-sympy-doc", "python-scipy-doc",
    "python-pandas-doc", "python-astropy-doc", "python-django-doc", "libgtk-4-doc", "libglib2.0-doc",
    "libstdc++-12-doc", "git-doc", "debian-handbook",
)  # fmt: skip
SUFFIXES = (".html", ".htm", ".rst", ".txt", ".pod", ".gz")
MIN_CHARACTERS, MAX_CHARACTERS = 300, 500_000  # longer pages are indexes and tables
MAX_BYTES_PER_PACKAGE = 6_000_000  # so that no source is most of the text
NUM_FILES = 8
DROPPED = re.compile(r"<(script|style|head|nav|footer|header)\b.*?</\1>", re.DOTALL | re.IGNORECASE)
BLOCK_END = re.compile(r"</(p|div|li|tr|h[1-6]|pre|dt|dd|table|section)>|<br ?/?>", re.IGNORECASE)
TAG = re.compile(r"<[^>]*>")


def page_text(path: Path) -> str:
    """The text of a page, blank lines closed up."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    text = data.decode("utf-8", errors="replace")
    if "<html" in text[:2000].lower():
        text = html.unescape(TAG.sub("", BLOCK_END.sub("\n", DROPPED.sub("", text))))
    lines = (" ".join(line.split()) if "\t" in line or "  " in line.strip() else line for line in text.split("\n"))
    return re.sub(r"\n\s*\n+", "\n\n", "\n".join(line.rstrip() for line in lines)).strip()


def pages(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of the pages of an extracted package, in the order of their names' hashes."""
    found = [p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file() and not p.is_symlink()]
    names = {p.relative_to(folder).as_posix(): p for p in found}
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        try:
            text = page_text(names[name])
        except (OSError, EOFError):  # a .gz that is something else
            continue
        if MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS and text.count("\ufffd") < 10:
            yield name, text


def collect(packages: Path, sources: dict[str, dict[str, object]]) -> list[tuple[bytes, str, str]]:
    """(hash of the name, url, text) of every page that is taken; fills in what came from where."""
    taken = []
    seen: set[bytes] = set()
    for package in PACKAGES:
        size = count = 0
        for name, text in pages(packages / package):
            digest = hashlib.sha256(text.encode()).digest()
            if digest in seen or size >= MAX_BYTES_PER_PACKAGE:
                continue
            seen.add(digest)
            size, count = size + len(text.encode()), count + 1
            taken.append((hashlib.sha256(name.encode()).digest(), f"urn:debian:{package}:{name}", text))
        sources[package] |= {"documents": count, "bytes": size}
        print(f"{package:22} {count:6} documents {size / 1e6:6.1f} MB", file=sys.stderr)
    return sorted(taken)


def fetch(folder: Path) -> dict[str, dict[str, object]]:
    """Downloads and extracts the packages that are not there yet; their versions."""
    sources: dict[str, dict[str, object]] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        if not list(folder.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True)
        (deb,) = folder.glob(f"{package}_*.deb")
        if not (folder / package).exists():
            subprocess.run(["dpkg-deb", "-x", deb, folder / package], check=True)
        sources[package] = {"deb": deb.name, "sha256": hashlib.sha256(deb.read_bytes()).hexdigest()}
    return sources


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write to")
    arguments = parser.parse_args()
    sources = fetch(arguments.out / "packages")
    taken = collect(arguments.out / "packages", sources)
    for number in range(NUM_FILES):
        path = arguments.out / f"c4-train.{number:05d}-of-{NUM_FILES:05d}.json.gz"
        lines = [
            json.dumps({"text": text, "timestamp": "2023-06-10T00:00:00Z", "url": url})
            for _, url, text in taken[number::NUM_FILES]
        ]
        path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), 6, mtime=0))
    (arguments.out / "sources.json").write_text(json.dumps(sources, indent=2) + "\n")
    total = sum(len(text.encode()) for _, _, text in taken)
    print(f"{len(taken)} documents, {total / 1e6:.1f} MB of text in {NUM_FILES} files")


if __name__ == "__main__":
    main()
