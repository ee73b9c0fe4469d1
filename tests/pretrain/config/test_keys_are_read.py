"""No key of a run or of a preparation is taken, and read nowhere.

By its name alone, so a key that has that of another attribute is not seen. Options of layers are compared by what they
compute: tests/model/test_options_matter.py."""

from __future__ import annotations

import re

import pytest

from common.json_config import Section
from common.paths import REPOSITORY
from data_prep.config.schema import DataConfig
from pretrain.config.schema import Config
from tests.model.options import sections_of

PRODUCT = ("common", "data_prep", "launch", "model", "pretrain")


def all_sections(section: type[Section]) -> set[type[Section]]:
    """It, and all that are keys of it or of theirs."""
    _, *inner = sections_of(section)
    return {section}.union(*map(all_sections, inner))


@pytest.mark.parametrize("root", [Config, DataConfig])
def test_every_key_is_read_somewhere(root: type[Section]) -> None:
    files = (path for folder in PRODUCT for path in (REPOSITORY / folder).rglob("*.py"))
    read = {name for path in files for name in re.findall(r"\.([a-z_0-9]+)\b(?! *=[^=])", path.read_text())}
    sections = all_sections(root)
    assert len(sections) >= 6
    unread = [f"{section.__name__}.{key}" for section in sections for key in section.model_fields.keys() - read]
    assert not unread
