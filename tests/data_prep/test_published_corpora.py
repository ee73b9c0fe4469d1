"""The corpora as the SwitchHead runs read them, through the shipped configs: the ids are those of the recipe written
out with SentencePiece alone, in order; what it loses is lost, and nothing else."""

import gzip
import json
import random
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from common.splits import SplitName
from data_prep.cli import main
from data_prep.config.tokenizer import TokenizerConfig
from data_prep.shards.format import Manifest
from data_prep.shards.manifest_records import TokenizerEntry
from data_prep.shards.reader import SplitReader

ROOT = Path(__file__).resolve().parents[2]
PIECES = 320
SEPARATOR = "<STORY_SEP>"


def texts(count: int, *, seed: int) -> list[str]:
    """Documents with what other recipes would drop or mend: duplicates, code, other languages, one line without a full
    stop, runs of blanks, tabs, digits, symbols, and one that is longer than SentencePiece trains on."""
    draw = random.Random(seed)
    letters = random.Random(1)
    words = ["".join(letters.choices("abcdefghilmnorstu", k=letters.randint(2, 7))) for _ in range(150)]
    found = [" ".join(draw.choices(words, k=draw.randint(5, 60))) + ".\nTwo\tlines 2024" for _ in range(count)]
    found[3] = found[2]
    found[5] = "{ lorem ipsum }  ½ ™ größe ﬁ"
    found[7] = " ".join(draw.choices(words, k=1500))
    return found


def run(config: str, output: Path, *overrides: str, steps: Sequence[str] = ("run",)) -> Manifest:
    """Does `steps` with a shipped config."""
    keys = [f"output={output}", "workers=1", "shard.tokens_per_shard=4000", "shard.tokens_per_member=1000", *overrides]
    path = ROOT / "configs" / "data" / "paper" / f"{config}.json"
    for step in steps:
        assert main([step, "--config", str(path), *(part for key in keys for part in ("--set", key))]) == 0
    return Manifest.load(output)


def ids_of(manifest: Manifest, split: SplitName) -> list[int]:
    with SplitReader(manifest, split, verify_on_first_read=True) as reader:
        return reader.read(0, manifest.num_tokens(split)).tolist()


def same_bytes(one: Path, other: Path) -> bool:
    """All that is published, but for run.json, which says when."""
    published = [[p for p in folder.glob("[!.]*") if p.is_file() and p.name != "run.json"] for folder in (one, other)]
    names = [sorted(path.name for path in paths) for paths in published]
    return names[0] == names[1] and all((one / n).read_bytes() == (other / n).read_bytes() for n in names[0])


def authors_tokenizer(prefix: Path, **source: Any) -> sentencepiece.SentencePieceProcessor:
    """SentencePiece's defaults, but for the two options of the authors' code."""
    sentencepiece.SentencePieceTrainer.train(
        model_prefix=str(prefix), vocab_size=PIECES, split_digits=True, model_type="bpe", minloglevel=2, **source
    )
    return sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")


def write_json(path: Path, documents: Sequence[str], keys: dict[str, str]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text, **keys}) + "\n" for text in documents)


RAW_FILES = {  # names as downloaded, and the keys beside `text`
    "c4": ("c4-train.{:05d}-of-01024.json.gz", "c4-validation.00000-of-00008.json.gz", "timestamp url"),
    "pes2o": ("train-{:05d}-of-00020.json.gz", "validation-00000-of-00002.json.gz", "added created id source version"),
}


@pytest.mark.parametrize(("corpus", "sampled"), [("c4", 2), ("pes2o", 1)])
def test_json_corpora(tmp_path: Path, capsys: pytest.CaptureFixture[str], corpus: str, sampled: int) -> None:
    train, validation, keys = RAW_FILES[corpus]
    files = [texts(40, seed=seed) for seed in range(3)]
    held_out = [*texts(12, seed=9), "中 is in no piece"]
    other_keys = dict.fromkeys(keys.split(), "x")
    for number, documents in enumerate(files):
        write_json(tmp_path / train.format(number), documents, other_keys)
    write_json(tmp_path / validation, held_out, other_keys)
    pattern = json.loads((ROOT / "configs" / "data" / "paper" / f"{corpus}.json").read_text())
    overrides = [
        *(f"{key}={tmp_path / Path(pattern[key]).name}" for key in ("input", "validation_input")),
        f"tokenizer.vocab_size={PIECES}",
        f"tokenizer.sample_files={sampled}",
        "max_input_files=2",
    ]
    manifest = run(corpus, tmp_path / "out", *overrides)
    printed = capsys.readouterr().out
    assert "reading 3 raw files, 2 of `input` (max_input_files), not its 1 others" in printed

    sample = (text + SEPARATOR for documents in files[:sampled] for text in documents)
    authors = authors_tokenizer(tmp_path / "authors", sentence_iterator=sample)
    ours = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
    assert [ours.id_to_piece(n) for n in range(PIECES)] == [authors.id_to_piece(n) for n in range(PIECES)]
    read = files[0] + files[1]
    splits: dict[SplitName, list[str]] = {"train": read, "validation": held_out}
    for split, documents in splits.items():
        assert ids_of(manifest, split) == [n for text in documents for n in authors.encode(text + SEPARATOR)]
        assert manifest.totals[split].documents == len(documents)
    assert manifest.tokenizer.eos_id is None and manifest.provenance.dropped == {}
    assert [record.name for record in manifest.provenance.inputs][:2] == [train.format(0), train.format(1)]

    with SplitReader(manifest, "train", verify_on_first_read=True) as reader:
        back = [ours.decode(reader.document(number).tolist()) for number in range(6)]
        pieces = [ours.id_to_piece(n) for n in reader.document(0).tolist()]
    assert "\n" in read[0] and "\t" in read[0] and back[0] == " ".join(read[0].split()) + SEPARATOR
    assert back[5].startswith("{ lorem ipsum") and back[5].endswith(" fi" + SEPARATOR), "the ligature is two letters"
    assert " \u2047 " in back[5], "what is in no piece is lost"
    tail = next(n for n in range(1, len(pieces)) if "".join(pieces[-n:]).endswith(SEPARATOR))
    assert 2 <= tail <= len(SEPARATOR), "several pieces, none of its own"
    with SplitReader(manifest, "validation", verify_on_first_read=True) as reader:
        assert 0 in reader.document(len(held_out) - 1), "unk: there are no pieces for bytes"
    assert main(["verify", str(tmp_path / "out")]) == 0
    run(corpus, tmp_path / "again", *overrides, "workers=2")
    assert same_bytes(tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize("given", [True, False], ids=["while reading", "from stored text"])
def test_a_document_without_a_piece_or_an_end_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: bool
) -> None:
    """nmt_nfkc takes a zero-width blank away, and with no separator nothing of the document is left."""
    lines = [json.dumps({"text": text}) for text in [*texts(40, seed=1), "\u200b"]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    authors = authors_tokenizer(tmp_path / "authors", sentence_iterator=iter(texts(40, seed=1)))
    assert authors.encode("\u200b") == []
    lossy = {"separator": "", "allow_lossy": True}
    own = {"vocab_size": PIECES, "normalization": "nmt_nfkc", "byte_fallback": False}
    tokenizer = {**lossy, **({"model": str(tmp_path / "authors.model")} if given else own)}
    body = {"input": str(tmp_path / "a.jsonl"), "output": str(tmp_path / "out"), "workers": 1, "tokenizer": tokenizer}
    (tmp_path / "config.json").write_text(json.dumps(body))
    assert main(["run", "--config", str(tmp_path / "config.json")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: tokenizer.separator: a document has neither a piece nor an end")
    assert "'\\u200b'" in error and "set separator to null" in error
    assert main(["run", "--config", str(tmp_path / "config.json"), "--set", "tokenizer.separator=null"]) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0


def articles(count: int, *, seed: int) -> Iterator[str]:
    """Text as in wiki.*.tokens: blanks around each line, <unk> and @-@ in it."""
    for number, text in enumerate(texts(count, seed=seed)):
        body = text.replace("\n", " \n ").replace("\t", " <unk> ")
        yield f" \n = Title {number} = \n \n {body} @-@ in 1 @,@ 200 \n \n = = Part = = \n \n {body} \n"


def test_wikitext_tokens(tmp_path: Path) -> None:
    names: dict[SplitName, str] = {
        "train": "wiki.train.tokens",
        "validation": "wiki.valid.tokens",
        "test": "wiki.test.tokens",
    }
    for seed, (split, name) in enumerate(names.items()):
        (tmp_path / name).write_text("".join(articles(30 if split == "train" else 10, seed=seed)), encoding="utf-8")
    inputs = zip(("input", "validation_input", "test_input"), names.values(), strict=True)
    overrides = [*(f"{key}={tmp_path / name}" for key, name in inputs), f"tokenizer.vocab_size={PIECES}"]
    manifest = run("wikitext103", tmp_path / "out", *overrides)
    authors = authors_tokenizer(tmp_path / "authors", input=str(tmp_path / names["train"]))
    ours = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
    assert [ours.id_to_piece(n) for n in range(PIECES)] == [authors.id_to_piece(n) for n in range(PIECES)]
    for split, name in names.items():
        with (tmp_path / name).open(encoding="utf-8") as lines:
            assert ids_of(manifest, split) == [n for line in lines for n in authors.encode(line)], split
    assert manifest.totals["train"].documents == 30, "articles, for show and stats"
    run("wikitext103", tmp_path / "again", *overrides, "workers=2")
    assert same_bytes(tmp_path / "out", tmp_path / "again")
    with zipfile.ZipFile(tmp_path / "wikitext-103-v1.zip", "w") as archive:
        for name in names.values():
            archive.write(tmp_path / name, f"wikitext-103/{name}")
    keys = [f"{key}={tmp_path / 'wikitext-103-v1.zip'}" for key in ("input", "validation_input", "test_input")]
    packed = run("wikitext103", tmp_path / "packed", *keys, f"tokenizer.vocab_size={PIECES}")
    assert all(ids_of(packed, split) == ids_of(manifest, split) for split in names)


def test_the_archive_that_holds_the_tokens_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "configs" / "data" / "paper" / "wikitext103.json"
    for key, archive in ((f"input={tmp_path}/wiki.train.tokens", "103-v1"), (f"input={tmp_path}/a.raw", "103-raw-v1")):
        assert main(["run", "--config", str(path), "--set", key, "--set", f"output={tmp_path / 'out'}"]) != 0
        assert f"fetch https://wikitext.smerity.com/wikitext-{archive}.zip" in capsys.readouterr().err


def test_enwik8_symbols(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(4)
    words = ["the ", "größe ", "[[link]] ", "\n  <page>\n", "&amp;\t", "1984 "]
    data = "".join(draw.choices(words, k=2000)).encode()[:9000]
    data = data[:-1] + b"\xff"  # a byte that only the test split has: all splits decide the symbols
    (tmp_path / "enwik8").write_bytes(data)
    symbols = sorted(set(data))
    overrides = [f"input={tmp_path / 'enwik8'}", "split_bytes=[7000,1000,1000]"]
    manifest = run("enwik8", tmp_path / "out", *overrides, f"tokenizer.vocab_size={len(symbols)}")
    assert (manifest.tokenizer.vocab_size, manifest.tokenizer.eos_id) == (len(symbols), None)
    parts: dict[SplitName, bytes] = {"train": data[:7000], "validation": data[7000:8000], "test": data[8000:]}
    for split, part in parts.items():
        assert ids_of(manifest, split) == [symbols.index(byte) for byte in part]
    capsys.readouterr()
    assert main(["show", str(tmp_path / "out"), "--split", "train", "--index", "1"]) == 0
    assert "<page>" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert f"{len(symbols)} symbols" in capsys.readouterr().out
    assert main(["stats", str(tmp_path / "out")]) == 0
    assert "`0x74`" in (tmp_path / "out" / "report" / "report.md").read_text(), "the byte t, not its number"
    steps = ("tokenizer", "encode", "shard")  # as array tasks on a cluster do them
    run("enwik8", tmp_path / "again", *overrides, f"tokenizer.vocab_size={len(symbols)}", steps=steps)
    assert same_bytes(tmp_path / "out", tmp_path / "again")


def test_a_file_with_other_symbols_than_enwik8_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "enwik8").write_bytes(b"abc" * 1000)
    path = ROOT / "configs" / "data" / "paper" / "enwik8.json"
    keys = [f"input={tmp_path / 'enwik8'}", f"output={tmp_path / 'out'}", "split_bytes=[1000,1000,1000]", "workers=1"]
    assert main(["run", "--config", str(path), *(part for key in keys for part in ("--set", key))]) != 0
    assert "tokenizer.vocab_size: the raw files hold 3 different bytes, not 205" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_settings_at_their_defaults_leave_what_was_made_before_them_up_to_date() -> None:
    settings = TokenizerConfig(vocab_size=500).training_settings()
    assert list(settings) == ["vocab_size", "type", "split_digits", "byte_fallback", "sample_bytes", "seed"]
    assert TokenizerConfig(vocab_size=500, separator="").training_settings()["separator"] == ""
    with pytest.raises(ValueError, match="normalization nmt_nfkc changes text"):
        TokenizerConfig(normalization="nmt_nfkc")


def test_bits_per_byte_of_symbols_are_those_of_bytes() -> None:
    entry = {"file": "tokenizer.model", "sha256": "0" * 64, "vocab_size": 205}
    kinds = {kind: entry if kind != "bytes" else {"vocab_size": 256} for kind in ("symbols", "bytes", "sentencepiece")}
    found = {kind: TokenizerEntry.model_validate({"kind": kind, **body}) for kind, body in kinds.items()}
    assert {kind: one.tokens_are_bytes for kind, one in found.items()} == dict(
        symbols=True, bytes=True, sentencepiece=False
    )
    with pytest.raises(ValueError, match="symbols need file and sha256"):
        TokenizerEntry.model_validate({"kind": "symbols", "vocab_size": 205})
