"""Every way in which a prepared folder can be wrong is found and named with its fix."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from common.errors import DataError, UserError
from data_prep.shards.format import Manifest, dtype_name, manifest_digest
from data_prep.shards.reader import ShardReader, SplitReader

Edit = Callable[[dict[str, Any]], None]


def edit_manifest(folder: Path, edit: Edit, *, sign: bool = True) -> None:
    """Changes manifest.json; with `sign` its digest is made right again, so that only the edit itself is
    wrong."""
    path = folder / "manifest.json"
    body = json.loads(path.read_text())
    edit(body)
    if sign:
        body["digest"] = manifest_digest(body)
    path.write_text(json.dumps(body))


def flip_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def edit_index(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Rewrites the index of the first shard and makes the manifest agree with the new file."""
    entry = Manifest.load(folder).split("train")[0]
    arrays = safetensors.numpy.load_file(folder / entry.index_file)
    change(arrays)
    data = safetensors.numpy.save(arrays)
    (folder / entry.index_file).write_bytes(data)

    def edit(body: dict[str, Any]) -> None:
        body["splits"]["train"][0]["index_bytes"] = len(data)
        body["splits"]["train"][0]["index_sha256"] = hashlib.sha256(data).hexdigest()

    edit_manifest(folder, edit)


@pytest.mark.parametrize("vocab_size, name", [(2, "uint16"), (8000, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_dtype_is_the_narrowest_that_holds_every_id(vocab_size: int, name: str) -> None:
    assert dtype_name(vocab_size) == name


def test_a_good_folder_passes_both_levels_from_folder_or_file(prepared: Path) -> None:
    for path in (prepared, prepared / "manifest.json", str(prepared)):
        manifest = Manifest.load(path)
        assert manifest.folder == prepared
        manifest.check("size")
        manifest.check("full")


def canonical_hash(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def test_digest_is_the_hash_of_the_canonical_json_of_the_rest_without_versions(prepared: Path) -> None:
    body = json.loads((prepared / "manifest.json").read_text())
    digest = body.pop("digest")
    assert set(body["provenance"].pop("versions")) >= {"python", "numpy", "sentencepiece"}
    assert digest == canonical_hash(body) == Manifest.load(prepared).digest


def test_the_same_bytes_made_by_another_python_are_the_same_data_set(prepared: Path) -> None:
    digest = Manifest.load(prepared).digest
    edit_manifest(prepared, lambda body: body["provenance"]["versions"].update(python="3.15.0", numpy="9.0"))
    assert Manifest.load(prepared).digest == digest
    edit_manifest(prepared, lambda body: body["provenance"]["config"].update(format="c4"))
    assert Manifest.load(prepared).digest != digest


def test_data_keep_the_digest_that_earlier_code_gave_them(prepared: Path) -> None:
    """It holds the versions too; runs and checkpoints know the data by it."""
    path = prepared / "manifest.json"
    body = json.loads(path.read_text())
    del body["digest"]
    earlier = canonical_hash(body)
    path.write_text(json.dumps({**body, "digest": earlier}))
    assert Manifest.load(prepared).digest == earlier != manifest_digest(body)
    body["provenance"]["versions"]["python"] = "3.15.0"
    path.write_text(json.dumps({**body, "digest": earlier}))
    with pytest.raises(DataError, match=r"manifest\.json was edited: its digest is"):
        Manifest.load(prepared)


def test_missing_shard_is_named(manifest: Manifest) -> None:
    path = manifest.folder / manifest.split("train")[1].file
    path.unlink()
    for refuses in (
        lambda: manifest.check("size"),
        lambda: ShardReader(manifest, manifest.split("train")[1], False),
    ):
        with pytest.raises(DataError, match=rf"missing file .*{path.name}; prepare the data again"):
            refuses()


def test_truncated_shard_is_named_with_both_sizes(manifest: Manifest) -> None:
    entry = manifest.split("train")[0]
    path = manifest.folder / entry.file
    path.write_bytes(path.read_bytes()[:-512])
    message = rf"{entry.file} does not match .* expected bytes {entry.bytes}, found {entry.bytes - 512}; prepare"
    with pytest.raises(DataError, match=message):
        manifest.check("size")


def test_flipped_byte_is_found_on_first_read_and_by_the_full_check(manifest: Manifest) -> None:
    entry = manifest.split("train")[1]
    path = manifest.folder / entry.file
    flip_byte(path, 700)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    message = rf"{entry.file} does not match .* sha256 {entry.sha256}, found {found}; prepare"
    manifest.check("size")
    with pytest.raises(DataError, match=message):
        manifest.check("full")
    first_shard_tokens = manifest.split("train")[0].tokens
    with SplitReader(manifest, "train", verify_on_first_read=True) as reader:
        reader.read(0, first_shard_tokens)  # the damaged shard is not touched yet
        for _ in range(2):  # nor is it taken for whole once that was said
            with pytest.raises(DataError, match=message):
                reader.read(first_shard_tokens - 1, first_shard_tokens + 1)


def test_the_full_check_hashes_every_shard_of_every_split(manifest: Manifest) -> None:
    entries = [*manifest.split("train"), *manifest.split("validation")]
    for entry in entries:
        flip_byte(manifest.folder / entry.file, 700)
    found: list[UserError] = []
    manifest.check("full", problem=found.append)
    assert [str(error).split()[0].rpartition("/")[2] for error in found] == [entry.file for entry in entries]


@pytest.mark.parametrize("level", ["size", "full"])
def test_changed_tokenizer_is_found_at_every_level(manifest: Manifest, level: Any) -> None:
    flip_byte(manifest.folder / "tokenizer.model", 100)
    with pytest.raises(DataError, match=r"tokenizer\.model does not match the manifest: expected sha256"):
        manifest.check(level)
    (manifest.folder / "tokenizer.model").unlink()
    with pytest.raises(DataError, match=r"missing file .*tokenizer\.model"):
        manifest.check(level)


def test_changed_index_is_found_by_check_and_by_the_reader(manifest: Manifest) -> None:
    entry = manifest.split("validation")[0]
    flip_byte(manifest.folder / entry.index_file, entry.index_bytes - 8)
    for refuses in (lambda: manifest.check("size"), lambda: ShardReader(manifest, entry, False)):
        with pytest.raises(DataError, match=rf"{entry.index_file} does not match the manifest: expected sha256"):
            refuses()


def add(name: str, position: int, value: int) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name][position] += value

    return change


def replace(name: str, make: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name] = np.ascontiguousarray(make(arrays[name]))

    return change


def empty_document(arrays: dict[str, np.ndarray]) -> None:
    arrays["document_start"][1] = 0


def document_behind_the_last_id(arrays: dict[str, np.ndarray]) -> None:
    arrays["document_start"][-1] = arrays["member_tokens"].sum()


@pytest.mark.parametrize(
    "change, message",
    [
        (add("member_tokens", 0, 1), "members hold"),
        (add("member_tokens", 0, -1), "members hold"),
        (add("member_offset", -1, 1 << 30), "leave the shard"),
        (add("member_offset", 1, 2), "off the tar blocks"),
        (add("member_offset", 1, -1024), "member offsets overlap"),
        (add("member_offset", 1, -512), "member offsets overlap"),  # no room for its header
        (add("document_start", 0, 1), "document starts must rise from 0"),
        (add("document_start", -1, 1 << 40), "document starts must rise from 0"),
        (replace("document_start", lambda a: a[::-1]), "document starts must rise from 0"),
        (empty_document, "document starts must rise from 0"),
        (document_behind_the_last_id, "document starts must rise from 0"),
        (replace("document_start", lambda a: a[:-1]), r"\d+ document starts, the manifest says"),
        (replace("member_offset", lambda a: a[:-1]), "member offsets for"),
        (replace("member_tokens", lambda a: a.astype(np.int32)), "expected the int64 vectors"),
        (lambda arrays: arrays.pop("document_start"), "expected the int64 vectors"),
    ],
)
def test_an_index_that_does_not_describe_its_shard_is_refused(
    prepared: Path, change: Callable[[dict[str, np.ndarray]], None], message: str
) -> None:
    edit_index(prepared, change)
    manifest = Manifest.load(prepared)
    for refuses in (
        lambda: manifest.check("size"),
        lambda: ShardReader(manifest, manifest.split("train")[0], False),
    ):
        with pytest.raises(DataError, match=rf"train-00000\.idx\.safetensors: .*{message}.*prepare the data again"):
            refuses()


def set_shard(key: str, value: Any) -> Edit:
    def edit(body: dict[str, Any]) -> None:
        body["splits"]["train"][0][key] = value

    return edit


@pytest.mark.parametrize(
    "edit, message",
    [
        (set_shard("file", "../x.tar"), r"splits\.train\.0\.file: .*'\.\./x\.tar' must be relative"),
        (set_shard("file", "a/../../x.tar"), "must be relative"),
        (set_shard("file", "/etc/passwd"), "must be relative"),
        (set_shard("index_file", "..\\x"), "must be relative"),
        (set_shard("file", ""), "must be relative"),
        (set_shard("file", "train-00001.tar"), "listed twice"),
        (set_shard("tokens", "12"), r"splits\.train\.0\.tokens: Input should be a valid integer"),
        (set_shard("tokens", 12), "totals of split 'train'"),
        (set_shard("documents", 12), "totals of split 'train'"),
        (set_shard("sha256", "ABC"), r"splits\.train\.0\.sha256"),
        (set_shard("checksum", "x"), r"splits\.train\.0\.checksum: Extra inputs are not permitted"),
        (lambda body: body.update(colour="red"), "colour: Extra inputs are not permitted"),
        (lambda body: body.update(format_version=2), "format_version is 2, this code reads 1"),
        (lambda body: body.pop("format_version"), "format_version is None"),
        (lambda body: body.update(dtype="uint32"), "dtype, vocab_size and eos_id contradict"),
        (lambda body: body["tokenizer"].update(eos_id=500), "dtype, vocab_size and eos_id contradict"),
        (lambda body: body["tokenizer"].update(file="../tokenizer.model"), "must be relative"),
        (lambda body: body["tokenizer"].update(kind="words"), r"tokenizer\.kind: Input should be"),
        (lambda body: body["tokenizer"].update(kind="bytes"), "bytes have vocab_size 256 and neither file"),
        (lambda body: body["tokenizer"].pop("file"), "a SentencePiece model needs file and sha256"),
        (lambda body: body["splits"].update(test=[]), "splits and totals must have the keys train, validation"),
        (lambda body: body["splits"].pop("validation"), "splits and totals must have the keys train, validation"),
    ],
)
def test_a_manifest_that_breaks_a_rule_is_refused(prepared: Path, edit: Edit, message: str) -> None:
    edit_manifest(prepared, edit)
    with pytest.raises(DataError, match=rf"manifest\.json: .*{message}.*prepare the data again"):
        Manifest.load(prepared)


def test_an_edited_manifest_is_refused_by_its_digest(prepared: Path) -> None:
    edit_manifest(prepared, lambda body: body["provenance"]["config"].update(format="c4"), sign=False)
    with pytest.raises(DataError, match=r"manifest\.json was edited: its digest is"):
        Manifest.load(prepared)


def test_no_manifest_or_no_json_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file .*manifest\.json; make it with `python -m data_prep run"):
        Manifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format_version": 1,')
    with pytest.raises(DataError, match="is not JSON"):
        Manifest.load(tmp_path)


def test_a_link_out_of_the_folder_is_refused(prepared: Path, tmp_path: Path) -> None:
    shard = prepared / "train-00000.tar"
    shard.rename(tmp_path / "elsewhere.tar")
    shard.symlink_to(tmp_path / "elsewhere.tar")
    with pytest.raises(DataError, match=r"train-00000\.tar leads out of the manifest's folder"):
        Manifest.load(prepared)


def test_unknown_split_names_the_known_ones(manifest: Manifest) -> None:
    with pytest.raises(DataError, match="no split 'test'; it has train, validation"):
        manifest.split("test")


def test_a_shard_is_hashed_once_unless_its_file_is_replaced(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the hash and the first opening, or where it was closed to open others."""
    entries, hashed = manifest.split("train"), list[str]()
    verify = ShardReader._verify

    def noted(reader: ShardReader) -> None:
        hashed.append(reader._path.name)
        verify(reader)

    monkeypatch.setattr(ShardReader, "_verify", noted)
    status = (manifest.folder / entries[0].file).stat()
    known = {entries[0].file: (status.st_size, status.st_mtime_ns)}
    end = entries[0].tokens
    for start_known, first in (({}, [entries[0].file]), (known, [])):
        hashed.clear()
        with SplitReader(manifest, "train", True, max_open_shards=1) as reader:
            reader.trust(start_known)
            for start in (0, end, 0, end):
                reader.read(start, start + 1)
            assert hashed == [*first, entries[1].file]
            reader.read(end, end + 1)
            path = manifest.folder / entries[0].file
            other = bytearray(path.read_bytes())
            other[-700] ^= 1
            whole = path.rename(path.with_suffix(".whole"))
            path.write_bytes(other)
            with pytest.raises(DataError, match="expected sha256"):
                reader.read(0, 1)
        whole.rename(path)
    with SplitReader(manifest, "train", True) as reader:
        reader.trust({entries[0].file: (status.st_size, 0)})
        reader.read(0, 1)
    assert hashed[-1] == entries[0].file, "another stamp than that of the file says nothing of it"


def test_a_shard_that_was_opened_for_its_index_alone_is_hashed_when_it_is_read(manifest: Manifest) -> None:
    first = manifest.split("train")[0]
    flip_byte(manifest.folder / first.file, 700)
    with SplitReader(manifest, "train", True, max_open_shards=1) as reader:
        reader.document_index(np.array([0, first.tokens]), 1)  # opens the second, so closes the first
        with pytest.raises(DataError, match=f"expected sha256 {first.sha256}"):
            reader.read(0, 1)
