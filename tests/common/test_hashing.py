"""Hashes keep their values: names of folders, the order of data and manifests hang on them."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np

from common.hashing import mix64, number_of, sha256_file, sha256_json, sha256_stream, splitmix64


def test_splitmix64_gives_the_published_numbers() -> None:
    """The first outputs of the generator for seed 1234567, as its author's C code prints them."""
    step, state = 0x9E3779B97F4A7C15, 1234567
    states = np.array([(state + number * step) % 2**64 for number in range(5)], np.uint64)
    assert splitmix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_mixing_is_that_of_whole_numbers() -> None:
    def mixed(value: int) -> int:
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    values = [0, 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF]
    assert mix64(np.array(values, np.uint64)).tolist() == [mixed(value) for value in values]


def test_sha256_of_files_streams_and_json(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40_000  # more than two blocks
    (tmp_path / "a").write_bytes(content)
    heard: list[int] = []
    assert sha256_file(tmp_path / "a", heard.append) == hashlib.sha256(content).hexdigest()
    assert sum(heard) == len(content) and len(heard) == 3
    assert sha256_stream(io.BytesIO(content)) == sha256_file(tmp_path / "a")
    assert sha256_json({"b": [1, "é"], "a": None}) == hashlib.sha256(b'{"a":null,"b":[1,"\\u00e9"]}').hexdigest()


def test_a_name_decides_its_number() -> None:
    assert number_of("") == 0x141CFC9842C4B0E3  # the first bytes of sha256 of nothing, e3 b0 c4 42 98 fc 1c 14
    assert number_of("a") != number_of("b") and 0 <= number_of("a") < 2**64
    assert number_of("\ud83d") != number_of("\ud83c"), "halves of pairs, which UTF-8 has not"
