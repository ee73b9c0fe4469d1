"""Configs: each mistake is one message with the key and the fix; paths are found by the documented rule."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError, DataError
from common.json_config import keys
from common.paths import REPOSITORY
from data_prep.cli import main
from data_prep.config.loading import load_config
from data_prep.config.resolved import resolve
from data_prep.config.schema import DataConfig, ShardConfig
from data_prep.config.tokenizer import TokenizerConfig
from data_prep.shards.format import Manifest
from tests.data_prep.conftest import c4_line, write_dump


def load(tmp_path: Path, body: dict[str, Any], *overrides: str) -> DataConfig:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"input": "a.json.gz", "output": "out", **body}))
    return load_config(path, list(overrides))


@pytest.mark.parametrize(
    "body, overrides, message",
    [
        ({"wokers": 2}, [], "wokers: unknown key; the nearest known key is workers"),
        (
            {"shard": {"tokens_per_shart": 2}},
            [],
            "shard.tokens_per_shart: unknown key; the nearest known key is shard.tokens_per_shard",
        ),
        ({"vocab_size": 2}, [], "vocab_size: unknown key; the nearest known key is tokenizer.vocab_size"),
        ({"zzz": 2}, [], "zzz: unknown key; see --help for all keys"),
        (
            {},
            ["tokenizer.vocabsize=9000"],
            "tokenizer.vocabsize: unknown key; the nearest known key is tokenizer.vocab_size",
        ),
        ({}, ["workers"], "--set workers: write it as dotted.key=value"),
        ({}, ["output.x=1"], "--set output.x=1: output is a value, not a section"),
        ({"workers": True}, [], "workers: input should be a valid integer (given true)"),
        ({"workers": -1}, [], "workers: input should be greater than or equal to 0 (given -1)"),
        ({"validation_fraction": 1}, [], "validation_fraction: input should be less than 1 (given 1)"),
        (
            {"format": "csv"},
            [],
            "format: input should be 'auto', 'c4', 'pes2o', 'jsonl', 'parquet', 'webdataset', 'text', "
            "'wikitext', 'enwik8', 'megatron' or 'token_array' (given \"csv\")",
        ),
        (
            {"tokenizer": {"type": "word"}},
            [],
            "tokenizer.type: input should be 'bpe', 'unigram', 'bytes', 'symbols' or 'ids' (given \"word\")",
        ),
        (
            {"tokenizer": {"split_digits": "yes"}},
            [],
            'tokenizer.split_digits: input should be a valid boolean (given "yes")',
        ),
        ({"input": []}, [], "input: tuple should have at least 1 item after validation, not 0 (given [])"),
        ({"input": [3]}, [], "input.0: input should be a valid string (given 3)"),
        ({"validation_input": "b", "validation_fraction": 0.1}, [], "validation_fraction: has no effect with"),
        ({"output": "s3://bucket/out"}, [], "output: 's3://bucket/out' is a URL; name a local folder"),
        ({"dedup": {"exact": False, "near": False}}, [], "exact and near are both false"),
        ({"filter": {"min_words": 9, "max_words": 3}}, [], "filter: min_words 9 is more than max_words 3"),
        (
            {"filter": {"language": "English"}},
            [],
            "filter.language.0: string should match pattern '^[a-z]{2,3}$' (given \"English\")",
        ),
        ({"treshold": 0.7}, [], "treshold: unknown key; the nearest known key is dedup.threshold"),
        ({"format": "wikitext", "validation_input": "v", "dedup": {}}, [], 'format "wikitext" is used whole'),
        ({"shard": {"tokens_per_shard": 9}}, [], "tokens_per_member 131072 is more than tokens_per_shard 9"),
        ({"format": "enwik8"}, [], 'tokenizer.type: format "enwik8" is bytes; set tokenizer to {"type": "bytes"}'),
        ({"format": "enwik8", "validation_input": "b"}, [], 'validation_input: has no effect with format "enwik8"'),
        ({"format": "enwik8", "test_input": "b"}, [], 'test_input: has no effect with format "enwik8"'),
        ({"format": "enwik8", "validation_fraction": 0.1}, [], 'validation_fraction: has no effect with format "enw'),
        ({"split_bytes": [1, 1, 1]}, [], 'split_bytes: has no effect without format "enwik8"; drop it'),
        ({"format": "enwik8", "split_bytes": [1, 1]}, [], "split_bytes.2"),
        ({"format": "enwik8", "split_bytes": [0, 1, 1]}, [], "split_bytes.0: input should be greater than"),
        ({"format": "wikitext"}, [], "set validation_input to its wiki.valid.raw"),
        ({"tokenizer": {"type": "bytes"}}, [], 'which the documents of format "auto" need; use bpe or unigram'),
        ({"tokenizer": {"type": "bytes", "seed": 1}}, [], "tokenizer: seed has no effect with type bytes"),
        ({"tokenizer": {"type": "bytes", "vocab_size": 300}}, [], "vocab_size is 256 with type bytes"),
        ({"test_input": "b"}, [], "test_input: needs validation_input; set it too"),
    ],
)
def test_every_mistake_is_one_message(tmp_path: Path, body: dict[str, Any], overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, body, *overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_without_input_and_one_of_a_run(tmp_path: Path) -> None:
    """Files that are none of any program's: tests/common/test_json_config.py."""
    path = tmp_path / "config.json"
    for text, message in [
        ('{"model": {}}', "is the configuration of a run"),
        ('{"output": "x"}', "input: is required and missing"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(path, [])


def test_overrides_are_json_or_strings(tmp_path: Path) -> None:
    config = load(tmp_path, {}, "tokenizer.split_digits=false", "shard.tokens_per_member=7", "input=b.gz", "workers=3")
    assert config.tokenizer.split_digits is False
    assert (config.shard.tokens_per_member, config.input, config.workers) == (7, ("b.gz",), 3)


def test_every_key_is_documented() -> None:
    assert {
        "input",
        "validation_input",
        "workers",
        "tokenizer.sample_bytes",
        "shard.tokens_per_member",
    } <= {key.dotted for key in keys(DataConfig)}
    for section in (DataConfig, TokenizerConfig, ShardConfig):
        assert all(field.description for field in section.model_fields.values())


@pytest.mark.parametrize("name", sorted(path.stem for path in (REPOSITORY / "configs" / "data").glob("*.json")))
def test_shipped_configs_are_valid_and_write_below_the_repository_root(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = REPOSITORY / "configs" / "data" / f"{name}.json"
    monkeypatch.chdir(tmp_path)
    assert load_config(path, []).output == str(REPOSITORY / "data" / name)
    assert load_config(path, ["output=here"]).output == "here"


def test_inputs_are_found_here_and_then_in_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data_prep.config.resolved.REPOSITORY", tmp_path / "repository")
    for name in ("b", "a"):
        write_dump(tmp_path / "repository" / "raw" / f"{name}.json.gz", [c4_line(name)])
    config = load(tmp_path, {"input": "raw/*.json.gz"})
    assert [source.path.name for source in resolve(config).sources] == ["a.json.gz", "b.json.gz"]
    found = resolve(config).sources[0].path
    assert isinstance(found, Path) and found.is_relative_to(tmp_path / "repository")
    write_dump(tmp_path / "raw" / "c.json.gz", [c4_line("c")])
    resolved = resolve(config)
    assert [source.path for source in resolved.sources] == [Path("raw/c.json.gz")]
    assert resolved.output == tmp_path / "out"


def test_files_of_one_name_are_told_apart_and_others_keep_theirs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [" ".join(f"{folder}{number}" for number in range(50)) for folder in "abc"]
    for top in ("raw", "moved"):
        for folder, text in zip(("2019/en", "2020/en", "2020/de"), texts, strict=True):
            write_dump(tmp_path / top / folder / "x.json.gz", [c4_line(text), b"{bad"])
        write_dump(tmp_path / top / "y.json.gz", [c4_line("y " * 40)])
    files = ["20*/*/x.json.gz", "y.json.gz"]
    body = {"validation_fraction": 0.0, "ingest": {"max_bad_records": 1}, "tokenizer": {"vocab_size": 277}}
    digests = []
    for top in ("raw", "moved"):
        config = tmp_path / f"{top}.json"
        inputs = [f"{tmp_path}/{top}/{name}" for name in files]
        config.write_text(json.dumps({**body, "input": inputs, "output": str(tmp_path / f"{top}-out"), "workers": 1}))
        assert main(["run", "--config", str(config)]) == 0
        digests.append(Manifest.load(tmp_path / f"{top}-out").digest)
    assert digests[0] == digests[1], "where the dumps lie does not matter"
    names = ["2019/en/x.json.gz", "2020/de/x.json.gz", "2020/en/x.json.gz"]
    assert [record.name for record in Manifest.load(tmp_path / "raw-out").provenance.inputs] == [*names, "y.json.gz"]
    quarantine = (tmp_path / "raw-out" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["file"] for line in quarantine] == names
    capsys.readouterr()
    assert main(["run", "--config", str(config)]) == 0
    assert "up to date" in capsys.readouterr().out
    assert main(["verify", "--config", str(config)]) == 0


def test_input_mistakes_name_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_dump(tmp_path / "raw" / "a.json.gz", [c4_line("a")])
    (tmp_path / "links").mkdir()
    write_dump(tmp_path / "links" / "b.json.gz", [c4_line("b")])
    (tmp_path / "links" / "c.json.gz").symlink_to(tmp_path / "not-fetched")
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"input": "links/*.gz"}, r"input: links/c\.json\.gz is a link to a file that is not there"),
        ({"input": "none/*.gz"}, r"input: 'none/\*\.gz' matches no file"),
        ({"input": "raw"}, "input: 'raw' is a folder; name its files"),
        ({"input": "/dev/null"}, "input: '/dev/null' is a device or a named pipe; write the command"),
        ({"input": ["raw/a.json.gz", "raw/*.gz"]}, r"a\.json\.gz is matched twice, by `input` and `input`"),
        ({"input": "raw/*", "validation_input": "raw/*"}, "matched twice, by `input` and `validation_input`"),
        ({"input": "raw/*", "tokenizer": {"model": "no.model"}}, r"tokenizer\.model: no file no\.model"),
    ]
    for body, message in mistakes:
        with pytest.raises(DataError, match=message):
            resolve(load(tmp_path, body))
