"""Writer and reader against independent references: literal bytes, tarfile, webdataset, numpy."""

import gc
import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from common.errors import DataError
from data_prep.shards.format import Manifest, ShardIndex
from data_prep.shards.reader import ShardReader, SplitReader
from data_prep.shards.writer import ShardWriter
from tests.data_prep.split_writer import EOS, joined, random_documents, write_data


def test_a_shard_is_what_tarfile_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the standard library's tarfile, told every field: no field comes of the machine, the user or the clock."""
    tokens = np.arange(1000, 3500)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        writer = ShardWriter(tmp_path / name, "train-00007", dtype=np.dtype("uint16"), tokens_per_member=999)
        writer.add_documents(tokens, np.array([2000, 500]))
        entry = writer.finish()
        monkeypatch.setattr("time.time", lambda: 1e9 + 0.5)
        monkeypatch.setattr("os.getuid", lambda: 4242)
        monkeypatch.setenv("USER", "somebody")
    expected = io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for number, start in enumerate(range(0, 2500, 999)):
            data = tokens[start : start + 999].astype("<u2").tobytes()
            member = tarfile.TarInfo(f"train-00007-{number:06d}.tok.bin")
            member.size, member.mode, member.mtime, member.uid, member.gid = len(data), 0o644, 0, 0, 0
            archive.addfile(member, io.BytesIO(data))
        end = archive.offset
    reference = expected.getvalue()
    assert not reference[end:].strip(b"\0") and len(reference) == tarfile.RECORDSIZE
    for name in ("one", "two"):
        assert (tmp_path / name / "train-00007.tar").read_bytes() == reference[: end + 1024]
        assert [path.name for path in sorted((tmp_path / name).iterdir())] == [entry.index_file, entry.file]
    assert entry.sha256 == hashlib.sha256(reference[: end + 1024]).hexdigest() and entry.bytes == end + 1024


def test_a_shard_that_is_given_up_leaves_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    writer = ShardWriter(tmp_path, "train-00000", dtype=np.dtype("uint16"), tokens_per_member=10)
    writer.add_documents(np.arange(100), np.array([100]))
    writer.discard(KeyError())
    del writer
    gc.collect()
    assert not list(tmp_path.iterdir()) and not capfd.readouterr().err


def test_a_small_shard_byte_for_byte(tmp_path: Path) -> None:
    """Literal offsets, and a literal sha256: the same on every machine, at any time, for any user."""
    documents = [np.array([5, 6, 7]), np.array([], np.int64), np.array([8, 9])]
    manifest = write_data(tmp_path, documents, vocab_size=100, tokens_per_shard=100, tokens_per_member=3)
    (entry,) = manifest.split("train")
    index = ShardIndex.load(manifest, entry)
    assert index.member_offset.tolist() == [512, 1536, 2560]
    assert index.member_tokens.tolist() == [3, 3, 2]
    assert index.document_start.tolist() == [0, 4, 5]
    raw = (tmp_path / entry.file).read_bytes()
    assert len(raw) == entry.bytes == 3 * 1024 + 1024
    assert raw[512:518] == b"\x05\0\x06\0\x07\0"
    assert raw[1536:1542] == b"\x01\0\x01\0\x08\0"
    assert raw[2560:2564] == b"\x09\0\x01\0"
    assert entry.sha256 == "1c16714ff1f74e755bc85bee2dd558f1188456af6b8857a4b4373adfe46b8503"


@pytest.mark.parametrize("vocab_size, stored", [(8000, "<u2"), (65536, "<u2"), (70000, "<u4")])
def test_webdataset_reads_the_same_tokens(tmp_path: Path, vocab_size: int, stored: str) -> None:
    documents = random_documents(np.random.default_rng(1), 40, vocab_size)
    documents.append(np.array([vocab_size - 1]))
    manifest = write_data(tmp_path, documents, vocab_size=vocab_size, tokens_per_shard=2000, tokens_per_member=256)
    entries = manifest.split("train")
    assert len(entries) > 2
    assert manifest.numpy_dtype == np.dtype(stored)
    urls = [str(tmp_path / entry.file) for entry in entries]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    tokens = np.concatenate([np.frombuffer(sample["tok.bin"], stored) for sample in samples])
    np.testing.assert_array_equal(tokens, joined(documents))
    with SplitReader(manifest, "train", verify_on_first_read=True) as reader:
        np.testing.assert_array_equal(reader.read(0, reader.num_tokens), tokens)


@pytest.mark.parametrize("tokens_per_shard, tokens_per_member", [(1, 7), (700, 64), (5000, 5000), (3000, 1000)])
def test_random_ranges_equal_slices_of_one_array(tmp_path: Path, tokens_per_shard: int, tokens_per_member: int) -> None:
    rng = np.random.default_rng(tokens_per_shard)
    documents = random_documents(rng, 6 if tokens_per_shard == 1 else 30, 8000)  # a file each token takes its time
    expected = joined(documents)
    manifest = write_data(
        tmp_path,
        documents,
        vocab_size=8000,
        tokens_per_shard=tokens_per_shard,
        tokens_per_member=tokens_per_member,
    )
    # Two open shards at most: reading must not depend on what is still open.
    with SplitReader(manifest, "train", verify_on_first_read=True, max_open_shards=2) as reader:
        assert reader.num_tokens == len(expected) == manifest.num_tokens("train")
        assert reader.num_documents == len(documents)
        for _ in range(300):
            start, stop = sorted(rng.integers(0, len(expected) + 1, size=2).tolist())
            tokens = reader.read(start, stop)
            assert tokens.dtype == np.int64
            np.testing.assert_array_equal(tokens, expected[start:stop])
        for number in rng.permutation(len(documents)).tolist():
            np.testing.assert_array_equal(reader.document(number), documents[number])
        for start, stop in [(-1, 3), (3, 2), (0, len(expected) + 1)]:
            with pytest.raises(IndexError, match="outside"):
                reader.read(start, stop)
        for number in (-1, len(documents)):
            with pytest.raises(DataError, match=f"no document {number}: the split has {len(documents)}"):
                reader.document(number)


def test_shards_start_with_a_document_and_end_with_eos(manifest: Manifest) -> None:
    for split in ("train", "validation"):
        for entry in manifest.split(split):
            reader = ShardReader(manifest, entry, True)
            tokens = reader.read(0, reader.num_tokens)
            starts = reader.document_starts
            assert starts[0] == 0
            assert tokens[-1] == EOS
            assert (tokens[starts[1:] - 1] == EOS).all()
            # EOS ends documents and occurs nowhere else: the text "</s>" is ordinary text.
            assert (tokens == EOS).sum() == entry.documents
            reader.close()


def test_every_shard_but_the_last_reaches_the_asked_size(manifest: Manifest) -> None:
    entries = manifest.split("train")
    assert len(entries) >= 3
    assert all(entry.tokens >= 5000 for entry in entries[:-1])


def test_nothing_is_left_under_a_temporary_name(prepared: Path) -> None:
    left = [path.name for path in prepared.iterdir() if path.name.startswith(".") or "tmp" in path.name]
    assert left == [".lock"]
