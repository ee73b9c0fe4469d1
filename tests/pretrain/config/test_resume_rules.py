"""What a run may change when it continues, by the rules alone: no checkpoint, no rank."""

from __future__ import annotations

import json
from typing import Any

import pytest

from common.errors import UserError
from common.paths import REPOSITORY
from pretrain.config.loading import load_config, to_json
from pretrain.config.resume_rules import SavedRun, _is_under, changes_since

TINY = REPOSITORY / "configs" / "switchall_tiny.json"
DATA = 'checkpoint.allow_changes=["data.manifest"]'


def changes(*overrides: str, then: dict[str, Any] | None = None, digest: str = "a" * 64) -> dict[str, tuple[Any, Any]]:
    """Since step 5 of a run of switchall_tiny.json, or of the configuration `then`."""
    tree = to_json(load_config(TINY)) if then is None else then
    return changes_since(SavedRun("the checkpoint", tree, "a" * 64, 5), load_config(TINY, list(overrides)), digest)


def test_other_data_must_be_allowed_and_allow_nothing_else() -> None:
    with pytest.raises(UserError, match=r"^data\.manifest \(digest\): was \"a{12}\" .* is \"b{12}\" now"):
        changes(digest="b" * 64)
    for allowed in (DATA, 'checkpoint.allow_changes=["data"]'):
        assert changes(allowed, digest="b" * 64)["data.manifest (digest)"] == ("a" * 12, "b" * 12)
    with pytest.raises(UserError, match=r"^optimizer\.learning_rate: was .* is 0\.5 now"):
        changes(DATA, "optimizer.learning_rate=0.5", digest="b" * 64)


def test_a_section_that_was_empty_or_becomes_so_changed_in_its_keys_alone() -> None:
    """It was said to become null."""
    task = 'evaluate.tasks={"lambada": "raw/lambada"}'
    for pair, found in (
        ((None, "raw/lambada"), changes(task)),
        (("raw/lambada", None), changes(then=to_json(load_config(TINY, [task])))),
    ):
        assert found["evaluate.tasks.lambada"] == pair and found.keys() == {"evaluate.tasks.lambada", "description"}


def test_a_key_that_the_checkpoint_did_not_know_had_its_default_of_that_kind_of_layer() -> None:
    """SwitchHead has 4 experts by default, MoA 8."""
    tree = json.loads(json.dumps(to_json(load_config(TINY))))
    assert tree["model"]["attention"].pop("num_experts") == 4
    del tree["optimizer"]["eps"]
    assert not changes(then=tree)
    with pytest.raises(UserError, match=r"^model\.attention\.num_experts: was 4 "):
        changes("model.attention.num_experts=8", then=tree)
    with pytest.raises(UserError, match=r"^optimizer\.eps: was 1e-08 .* is 1e-06 now"):
        changes("optimizer.eps=1e-6", then=tree)


def test_a_section_is_above_its_keys_and_not_above_names_that_begin_like_it() -> None:
    assert _is_under("train.steps", {"train"}) and _is_under("train.steps", {"train.steps"})
    assert not _is_under("train.steps_more", {"train.steps"}) and not _is_under("train", {"train.steps"})
