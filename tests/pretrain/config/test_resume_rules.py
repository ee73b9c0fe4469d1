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
    del tree["optimizer"]["eps"], tree["model"]["attention"]["selection"]  # of which there is one
    assert not changes(then=tree)
    with pytest.raises(UserError, match=r"^model\.attention\.num_experts: was 4 "):
        changes("model.attention.num_experts=8", then=tree)
    with pytest.raises(UserError, match=r"^optimizer\.eps: was 1e-08 .* is 1e-06 now"):
        changes("optimizer.eps=1e-6", then=tree)


def test_what_is_advised_allows_no_more_than_what_changed() -> None:
    with pytest.raises(UserError, match=r"allow_changes=\[\"deepspeed\.zero_optimization\.reduce_bucket_size\"\]'$"):
        changes("deepspeed.zero_optimization.reduce_bucket_size=5000")


def test_a_run_that_is_to_end_where_it_is_keeps_its_schedule() -> None:
    with pytest.raises(UserError, match=r"^train\.steps: was 200 .* \(schedule\.shape = cosine spans the whole run; "):
        changes("train.steps=5")


@pytest.mark.parametrize("fits", [True, False])
def test_another_model_can_be_allowed_if_the_saved_weights_fit_it(fits: bool) -> None:
    saved = SavedRun("the checkpoint", to_json(load_config(TINY)), "a" * 64, 5)
    with pytest.raises(UserError, match=r"^model\.dropout: was 0\.0 ") as refused:
        changes_since(saved, load_config(TINY, ["model.dropout=0.1"]), "a" * 64, lambda: fits)
    assert (
        "or allow the change with --set 'checkpoint.allow_changes=[\"model.dropout\"]'" in str(refused.value)
    ) == fits
    assert str(refused.value).endswith("the saved weights have other sizes, so the change cannot be allowed") != fits


def test_a_section_is_above_its_keys_and_not_above_names_that_begin_like_it() -> None:
    assert _is_under("train.steps", {"train"}) and _is_under("train.steps", {"train.steps"})
    assert not _is_under("train.steps_more", {"train.steps"}) and not _is_under("train", {"train.steps"})
