"""Every file of the repository that a docstring, a comment or a page names is there."""

from __future__ import annotations

import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TRACKED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
).stdout.splitlines()
FILES = [name for name in TRACKED if (ROOT / name).is_file()]
OTHERS = {
    "data/c4/report/report.md": "what data_prep stats writes",
    "report.md": "what data_prep stats writes",
    "text/c4_utils.py": "tensorflow-datasets",
    "tools/preprocess_data.py": "Megatron-LM",
    "preprocess_data.py": "Megatron-LM",
    "tensor_parallel/mappings.py": "megatron-core",
    "distributed/_checkpointable.py": "torch",
}
"""Files that are named and belong to others, or to a run."""
NAME = re.compile(r"(?<![\w/.{}<*$:-])(?:\.\./)*[\w-][\w./-]*\.(?:py|md)\b(?!\.)")


def prose(path: Path) -> str:
    """A page; of a Python file its docstrings and comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    kept, before = [], tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        statement = before in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.NL)
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and statement):
            kept.append(token.string)
        if token.type != tokenize.COMMENT:
            before = token.type
    return "\n".join(kept)


def missing(path: Path) -> Iterator[str]:
    for name in NAME.findall(prose(path)):
        places = (ROOT / name, path.parent / name)
        is_ours = any(place.is_file() for place in places) or any(f"/{file}".endswith(f"/{name}") for file in FILES)
        if not is_ours and name not in OTHERS:
            yield name


@pytest.mark.parametrize("folder", sorted({name.split("/")[0] for name in FILES if name.endswith((".py", ".md"))}))
def test_files_that_are_named_exist(folder: str) -> None:
    found = {
        f"{name}: {other}"
        for name in FILES
        if name.split("/")[0] == folder and name.endswith((".py", ".md"))
        for other in missing(ROOT / name)
    }
    assert not found, "\n".join(sorted(found))


@pytest.mark.parametrize("text", ["# see gone.py", "'''As docs/gone.py says.'''", "def f():\n    '''../gone.py'''"])
def test_a_file_that_is_gone_is_found(tmp_path: Path, text: str) -> None:
    (tmp_path / "module.py").write_text(f"x = 'other.py'\n{text}\n")
    assert [name.rpartition("/")[2] for name in missing(tmp_path / "module.py")] == ["gone.py"]


def anchors(page: Path) -> set[str]:
    """What a link to a heading of the page ends in, as GitHub makes it."""
    headings = re.findall(r"(?m)^#+ (.+)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> Iterator[str]:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        place = page.parent / name if name else page
        if not link.startswith("http") and (
            not place.exists() or (anchor and place.suffix == ".md" and anchor not in anchors(place))
        ):
            yield link


def test_links_of_pages_lead_somewhere() -> None:
    pages = [ROOT / name for name in FILES if name.endswith(".md")]
    broken = {page.relative_to(ROOT).as_posix(): list(broken_links(page)) for page in pages}
    assert not {page: links for page, links in broken.items() if links}


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page, of `two` parts\n[1](#a-page-of-two-parts) [2](#three) [3](gone.png) [4](http://a/b)")
    assert list(broken_links(page)) == ["#three", "gone.png"]


def test_the_glossary_names_what_is_there() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    named = re.findall(r"`([A-Za-z_.]+)` in `([\w./]+[.]py)`", text)
    assert len(named) >= 5
    for name, file in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert all(re.search(rf"(class|def) {part}\b", source) for part in name.split(".")), f"{name} in {file}"


def test_headings_that_messages_name_are_there() -> None:
    named = {
        (page, anchor)
        for name in FILES
        if name.endswith(".py") and not name.startswith("tests/")
        for page, anchor in re.findall(r"(docs/[\w-]+\.md)#([\w-]+)", (ROOT / name).read_text(encoding="utf-8"))
    }
    assert ("docs/monitoring.md", "which-rank-is-slow") in named
    assert {(page, anchor) for page, anchor in named if anchor not in anchors(ROOT / page)} == set()
