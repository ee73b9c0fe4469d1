"""Wikitext-103 and Enwik8: the files come back byte for byte, in their order and in their splits."""

import json
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import DataError
from common.paths import REPOSITORY
from data_prep.cli import main
from data_prep.config.loading import load_config
from data_prep.config.resolved import resolve
from data_prep.raw.documents import RawFile, Rejected, documents, is_article_heading
from data_prep.shards.format import Manifest
from data_prep.shards.reader import SplitReader
from tests.data_prep.conftest import WORDS
from tests.data_prep.outcome import decoded, one_error, outputs, run

SPLIT_BYTES = [30_011, 5_003, 5_000]
SHARD = {"tokens_per_shard": 8000, "tokens_per_member": 1024}
EMPTY_ARTICLE = " = Nothing = \n"


def page(rng: random.Random, number: int) -> bytes:
    """A page as the XML dump of Enwik8 has them: characters of one to four bytes, entities, CR, tabs."""
    text = " ".join(rng.choice([*WORDS, "&quot;", "[[a|b]]", "\r\n", "\t", "\n"]) for _ in range(rng.randint(0, 90)))
    return f"  <page>\n    <title>{number}</title>\n      <text>{text}</text>\n  </page>\n".encode()


def make_enwik8(path: Path, size: int = sum(SPLIT_BYTES)) -> bytes:
    """Writes a dump of exactly `size` bytes; as in the original, it ends anywhere and the parts cut pages."""
    rng = random.Random(8)
    data = b"<mediawiki>\n  <siteinfo>\n  </siteinfo>\n" + b"".join(page(rng, n) for n in range(size // 60))
    assert len(data) >= size
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data[:size])
    return data[:size]


def make_wikitext(count: int, *, seed: int, newline: str = "\n") -> list[str]:
    """Articles as in wiki.train.raw (the first one with the blank line that opens the file), odd ones included."""
    rng = random.Random(seed)
    articles = []
    for number in range(count):
        lines = [f" = Article {number} : größe = b = ", " "]
        for section in range(rng.randint(0, 3)):
            text = " ".join(rng.choice([*WORDS, "@-@", "▁", "\u2028", "\x85", "=", "= =", "\r"]) for _ in range(60))
            lines += [f" = = Section {section} = = ", " ", " " + text + " ", " ", " = = = Deeper = = = ", " "]
        articles.append("".join(line + newline for line in lines))
    articles[0] = " \n" + articles[0]
    return [*articles, EMPTY_ARTICLE, " = Last = \n no newline at the end"]


def write_config(folder: Path, **body: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({"output": str(folder / "out"), "workers": 1, "shard": SHARD, **body}))
    return path


@pytest.fixture
def enwik8(tmp_path: Path) -> Path:
    """A config for a small enwik8, and the file beside it."""
    make_enwik8(tmp_path / "raw" / "enwik8")
    return write_config(
        tmp_path,
        input=str(tmp_path / "raw" / "enwik8"),
        format="enwik8",
        tokenizer={"type": "bytes"},
        split_bytes=SPLIT_BYTES,
    )


@pytest.fixture
def wikitext(tmp_path: Path) -> Path:
    """A config for a small Wikitext-103, and its three files."""
    (tmp_path / "raw").mkdir()
    for seed, name in enumerate(("train", "valid", "test")):
        text = "".join(make_wikitext(40, seed=seed, newline="\r\n" if name == "test" else "\n"))
        (tmp_path / "raw" / f"wiki.{name}.raw").write_bytes(text.encode())
    return write_config(
        tmp_path,
        input=str(tmp_path / "raw" / "wiki.train.raw"),
        validation_input=str(tmp_path / "raw" / "wiki.valid.raw"),
        test_input=str(tmp_path / "raw" / "wiki.test.raw"),
        format="wikitext",
        tokenizer={"vocab_size": 500},
    )


def stream(manifest: Manifest, split: str) -> np.ndarray:
    """All ids of a split, int64 [tokens]."""
    with SplitReader(manifest, split, verify_on_first_read=True) as reader:
        return reader.read(0, reader.num_tokens)


def test_enwik8_is_its_bytes_in_order_in_three_exact_parts(enwik8: Path, tmp_path: Path) -> None:
    assert run(enwik8) == 0
    manifest = Manifest.load(tmp_path / "out")
    manifest.check("full")
    data = (tmp_path / "raw" / "enwik8").read_bytes()
    start = 0
    for split, size in zip(("train", "validation", "test"), SPLIT_BYTES, strict=True):
        ids = stream(manifest, split)
        assert ids.astype(np.uint8).tobytes() == data[start : start + size]
        assert ids.max() < 256
        totals = manifest.totals[split]  # type: ignore[index]
        assert totals.tokens == totals.text_bytes == size
        with SplitReader(manifest, split, verify_on_first_read=True) as reader:
            pages = [reader.document(number) for number in range(reader.num_documents)]
        assert np.array_equal(np.concatenate(pages), ids)
        # Every document but the first opens with a page, and no page is inside one.
        assert all(p.astype(np.uint8).tobytes().startswith(b"  <page>\n") for p in pages[1:])
        assert all(p.astype(np.uint8).tobytes().count(b"  <page>\n") <= 1 for p in pages)
        start += size
    assert len(manifest.split("train")) > 2


def test_the_manifest_of_bytes_says_so_and_holds_no_model(enwik8: Path, tmp_path: Path) -> None:
    assert run(enwik8) == 0
    body = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert body["tokenizer"] == {"kind": "bytes", "vocab_size": 256}
    assert (body["dtype"], set(body["splits"])) == ("uint16", {"train", "validation", "test"})
    assert body["provenance"]["config"]["split_bytes"] == SPLIT_BYTES
    assert body["provenance"]["config"]["tokenizer"] == {"type": "bytes"}
    (record,) = body["provenance"]["inputs"]
    assert (record["name"], record["bytes"], record["split"]) == ("enwik8", sum(SPLIT_BYTES), "position")
    assert not list((tmp_path / "out").glob("tokenizer*"))


def test_verify_stats_and_show_read_bytes(enwik8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(enwik8) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "tokenizer: bytes, 256 values, no model" in out
    assert "test-00000.tar" in out
    assert main(["stats", str(tmp_path / "out")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[1:4]] == ["train", "validation", "test"]
    assert rows[1][3:] == ["30,011", "30,011", "1.000"]
    with SplitReader(Manifest.load(tmp_path / "out"), "test", verify_on_first_read=True) as reader:
        lengths = [len(reader.document(number)) for number in range(reader.num_documents)]
    last = [row for row in rows if row[:1] == ["test"]][-1]
    assert int(last[6].replace(",", "")) == max(lengths)
    assert main(["show", str(tmp_path / "out"), "--split", "test", "--index", "1"]) == 0
    assert "=== test document 1 of" in (out := capsys.readouterr().out)
    assert "<title>" in out


def test_enwik8_without_pages_or_newlines_is_one_document(tmp_path: Path) -> None:
    """Also every byte value, so nothing on the way takes them for text."""
    data = bytes(range(256)) * 60
    (tmp_path / "enwik8").write_bytes(data)
    config = write_config(
        tmp_path,
        input=str(tmp_path / "enwik8"),
        format="enwik8",
        tokenizer={"type": "bytes"},
        split_bytes=[len(data) - 300, 300, 0],
    )
    assert run(config) == 0
    manifest = Manifest.load(tmp_path / "out")
    assert set(manifest.splits) == {"train", "validation"}
    assert [manifest.totals[s].documents for s in ("train", "validation")] == [1, 1]
    both = np.concatenate([stream(manifest, "train"), stream(manifest, "validation")])
    assert both.astype(np.uint8).tobytes() == data


@pytest.mark.parametrize("size, holds", [(40_000, "40,000"), (40_015, "more than 40,014"), (0, "0")])
def test_enwik8_of_another_size_is_refused(
    enwik8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int, holds: str
) -> None:
    (tmp_path / "raw" / "enwik8").unlink()
    make_enwik8(tmp_path / "raw" / "enwik8", size)
    assert run(enwik8) == 2
    error = one_error(capsys)
    assert f"enwik8 holds {holds} bytes, not 40,014 (30,011 + 5,003 + 5,000)" in error
    assert "fetch it again from http" in error and "or set split_bytes to" in error
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_standard_split_is_90_5_5_million(enwik8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(enwik8, "--set", "split_bytes=null") == 2
    assert "holds 40,014 bytes, not 100,000,000 (90,000,000 + 5,000,000 + 5,000,000)" in one_error(capsys)


def test_a_zip_gives_its_one_member_and_nothing_else(
    enwik8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(enwik8) == 0
    archive = tmp_path / "raw" / "enwik8.zip"
    from_zip = ("--set", f"input={archive}", "--set", f"output={tmp_path / 'zip'}")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("../../escaped", "x")
        target.writestr("folder/enwik8.txt", "x")
    assert run(enwik8, *from_zip) == 2
    assert "enwik8.zip holds 0 files named enwik8, expected 1" in one_error(capsys)
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as target:
        target.write(tmp_path / "raw" / "enwik8", "enwik8")
    assert run(enwik8, *from_zip) == 0
    assert not list(tmp_path.rglob("escaped"))
    for name, digest in outputs(tmp_path / "out").items():
        assert name == "manifest.json" or outputs(tmp_path / "zip")[name] == digest
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 1
    archive.write_bytes(data)
    assert run(enwik8, *from_zip, "--force") == 2
    assert "enwik8.zip is damaged" in one_error(capsys)


@pytest.mark.parametrize("corpus", ["enwik8", pytest.param("wikitext", marks=pytest.mark.slow)])
def test_two_workers_and_small_chunks_give_the_same_bytes_and_a_second_run_nothing_to_do(
    corpus: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = request.getfixturevalue(corpus)
    assert run(config) == 0
    monkeypatch.setattr("data_prep.stages.ingest.PART_BYTES", 700)
    two = ("--set", "workers=2", "--set", f"output={tmp_path / 'two'}")
    assert run(config, *two, command="tokenizer") == 0
    assert run(config, *two, command="shard") == 0
    assert outputs(tmp_path / "two") == outputs(tmp_path / "out")
    capsys.readouterr()
    assert run(config, *two) == 0
    assert "up to date" in capsys.readouterr().out


def test_changed_files_and_settings_are_refused_and_force_removes_what_was_there(
    wikitext: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(wikitext) == 0
    assert (tmp_path / "out" / "tokenizer.model").exists()
    as_bytes = ("--set", 'tokenizer={"type": "bytes"}')
    assert run(wikitext, *as_bytes) == 2
    assert "`tokenizer` was" in one_error(capsys)
    assert run(wikitext, *as_bytes, "--force") == 0
    assert not list((tmp_path / "out").glob("tokenizer*"))
    manifest = Manifest.load(tmp_path / "out")
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        raw = (tmp_path / "raw" / f"wiki.{name}.raw").read_bytes()
        assert stream(manifest, split).astype(np.uint8).tobytes() == raw
    with (tmp_path / "raw" / "wiki.test.raw").open("ab") as file:
        file.write(b".")
    assert run(wikitext, *as_bytes) == 2
    assert "wiki.test.raw has changed" in one_error(capsys)


def test_articles_are_documents_in_the_order_of_the_files(wikitext: Path, tmp_path: Path) -> None:
    assert run(wikitext) == 0
    manifest = Manifest.load(tmp_path / "out")
    for seed, (split, newline) in enumerate((("train", "\n"), ("validation", "\n"), ("test", "\r\n"))):
        assert decoded(manifest, split) == make_wikitext(40, seed=seed, newline=newline)
    assert [(r.name, r.split, r.documents) for r in manifest.provenance.inputs] == [
        ("wiki.train.raw", "train", 42),
        ("wiki.valid.raw", "validation", 42),
        ("wiki.test.raw", "test", 42),
    ]
    assert manifest.tokenizer.kind == "sentencepiece"
    assert "kind" not in json.loads((tmp_path / "out" / "manifest.json").read_text())["tokenizer"]


def test_the_archive_of_wikitext_holds_every_split(wikitext: Path, tmp_path: Path) -> None:
    assert run(wikitext) == 0
    archive = tmp_path / "wikitext-103-raw-v1.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        for path in sorted((tmp_path / "raw").iterdir()):
            target.write(path, f"wikitext-103-raw/{path.name}")
    keys = ("input", "validation_input", "test_input")
    changes = [word for key in keys for word in ("--set", f"{key}={archive}")]
    assert run(wikitext, *changes, "--set", f"output={tmp_path / 'zip'}") == 0
    raw, zipped = Manifest.load(tmp_path / "out"), Manifest.load(tmp_path / "zip")
    # The tokenizer's sample is by share of stored bytes, and all of this text is in both.
    assert (zipped.splits, zipped.totals) == (raw.splits, raw.totals)


@pytest.mark.parametrize(
    "line, is_heading",
    [
        (b" = Title = \n", True),
        (b" = Title = \r\n", True),
        (b" = Title =", True),
        (b" = E = mc\xc2\xb2 = \n", True),
        (b" = 2 = \n", True),
        (b" = = Section = = \n", False),
        (b" = = = Deeper = = = \n", False),
        (b" = Half = = \n", False),
        (b" = \n", False),
        (b" = = \n", False),
        (b" =  = \n", False),
        (b"= Title = \n", False),
        (b" = Title \n", False),
        (b" a = b = \n", False),
        (b" \n", False),
    ],
)
def test_which_lines_are_article_headings(line: bytes, is_heading: bool) -> None:
    assert is_article_heading(line) == is_heading


def test_text_before_the_first_heading_belongs_to_the_first_article() -> None:
    lines = [b" \n", b" = A = \n", b"a\n", b" = B = \n", b" = C = \n", b"c"]
    found = list(documents(iter(lines), starts=is_article_heading))
    assert found == [b" \n = A = \na\n", b" = B = \n", b" = C = \nc"]
    assert list(documents(iter([]), starts=is_article_heading)) == []


def test_an_article_that_is_not_utf8_is_quarantined_with_its_byte(tmp_path: Path) -> None:
    good = "".join(make_wikitext(30, seed=3)[:-1]).encode()
    bad = good + b" = Bad = \n \n \xff\xfe \n" + good
    (tmp_path / "wiki.train.raw").write_bytes(bad)
    raw = RawFile(tmp_path / "wiki.train.raw", format="wikitext", split="train")
    records = list(raw.read())
    (rejected,) = [record for record in records if isinstance(record, Rejected)]
    assert (rejected.position, rejected.reason) == (bad.index(b" = Bad"), "not UTF-8")
    offset = bad.index(b"\xff")
    assert f"byte {offset:,} is not UTF-8 (invalid start byte)" in rejected.detail
    assert len(records) == 2 * len(make_wikitext(30, seed=3)[:-1]) + 1


def test_a_file_without_articles_is_refused(wikitext: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in (b"", b'{"text": "json"}\n'):
        (tmp_path / "raw" / "wiki.valid.raw").write_bytes(content)
        assert run(wikitext) == 2
        assert "wiki.valid.raw has no line ` = Title = ` that opens an article" in one_error(capsys)


@pytest.mark.parametrize("name", ["enwik8", "wikitext103"])
def test_the_shipped_configs_say_where_missing_files_come_from(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(REPOSITORY / "configs" / "data" / f"{name}.json", [])
    assert config.output == str(REPOSITORY / "data" / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data_prep.config.resolved.REPOSITORY", tmp_path)
    refusal = r"input: 'raw/.*' matches no file .*; fetch https?://\S+zip and unpack it there, or"
    with pytest.raises(DataError, match=refusal):
        resolve(config)


def test_a_zip_of_another_format_and_two_enwik8_files_are_refused(enwik8: Path, tmp_path: Path) -> None:
    archive = tmp_path / "c4.zip"
    with zipfile.ZipFile(archive, "w") as target:
        target.writestr("c4.json", "{}")
    with pytest.raises(DataError, match=r"c4\.zip is a zip archive, which only the formats"):
        list(RawFile(archive).read())
    make_enwik8(tmp_path / "raw" / "enwik8.copy", 100)
    with pytest.raises(DataError, match="format enwik8 is one file, 2 are matched"):
        resolve(load_config(enwik8, [f"input={tmp_path / 'raw' / 'enwik8*'}"]))
