"""The record of choices without a run: what describes it, and how the pieces of ranks become a step's choices."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from model.choices import Piece
from model.routing import Place
from pretrain.data.stages import StageSource, first_stage
from pretrain.routing.record import Record, begin_record, description, remove_after, step_folder, write_step
from pretrain.routing.tape import Replaying
from tests.pretrain.runs import small_config

SEQUENCES, TOKENS, HEADS, EXPERTS, K = 4, 6, 2, 5, 2
CONTENT = {"routers": {"router": [HEADS, EXPERTS, K]}, "global_sequences": SEQUENCES}
WINDOW_KEYS = (
    "data.max_tokens=655",
    "data.shuffle_block_windows=4",
    "data.shuffle_blocks=3",
    "data.document_mask=true",
)


def test_whatever_decides_which_text_a_step_reads_is_in_the_description(prepared: Path) -> None:
    stage, config = first_stage(["a"], ["digest"], [1]), small_config(prepared)
    later = stage.followed_by(24, [StageSource("a", "digest", 1), StageSource("b", "other", 2)])
    stages = [stage, later, replace(later, first=32), replace(stage, streams=4)]
    found = [description(config, "digest", one) for one in stages]
    found.append(description(config, "another", stage))
    found += [description(small_config(prepared, key), "digest", stage) for key in ("train.seed=18", *WINDOW_KEYS)]
    assert all(one != other for n, one in enumerate(found) for other in found[:n])
    assert found[0] == description(config, "digest", stage)


def choices() -> Tensor:
    """[S, L, H, k]: different experts for each token and head."""
    scores = torch.rand(SEQUENCES, TOKENS, HEADS, EXPERTS, generator=torch.Generator().manual_seed(1))
    return scores.topk(K).indices.to(torch.uint8)


def piece(index: Tensor, sequences: list[int], first_token: int = 0, heads: slice = slice(0, HEADS)) -> Piece:
    """Of the choices of a whole step, what a forward pass of these sequences, tokens and heads makes."""
    rows = torch.tensor(sequences)
    return Piece(Place(rows, heads, first_token), index[rows % SEQUENCES][:, first_token:, heads])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    begin_record(tmp_path / "routing", CONTENT, 0)
    return tmp_path / "routing"


def test_the_pieces_of_all_ranks_are_put_together(folder: Path) -> None:
    """Of micro-steps, heads and tokens, in any order; each sequence by its position in the run."""
    expected = choices()
    one, other = slice(0, 1), slice(1, 2)
    for rank, (heads, first) in enumerate([(one, 0), (other, 0), (one, 3), (other, 3)]):
        parts = [piece(expected, sequences, first, heads) for sequences in ([7, 4], [5, 6])]
        parts = [replace(part, index=part.index[:, :3]) for part in parts]
        write_step(folder, 1, rank, {"router": parts})
    found = Record(folder).load(1, ["router"], [TOKENS])["router"]
    assert torch.equal(found.choices, expected) and found.positions.tolist() == [4, 5, 6, 7]


def test_what_is_not_whole_or_cannot_be_is_refused(folder: Path) -> None:
    expected = choices()

    def refused(words: str, step: int, lengths: tuple[int, ...] = (TOKENS,)) -> None:
        with pytest.raises(UserError, match=words):
            Record(folder).load(step, ["router"], lengths)

    write_step(folder, 1, 0, {"router": [piece(expected, [0, 1, 2])]})
    refused("step-00000001 cannot be replayed: router is incomplete", 1)
    write_step(folder, 1, 1, {"router": [piece(expected, [3])]})
    Record(folder).load(1, ["router"], [TOKENS, 9])
    refused(f"its sequences have {TOKENS} tokens with memory, this run's 9 or 12; let both begin", 1, (9, 12))
    twice = expected.clone()
    twice[2, 1, 0] = 3
    write_step(folder, 2, 0, {"router": [piece(twice, [0, 1, 2, 3])]})
    refused(f"names experts that are not {K} different ones of {EXPERTS}", 2)
    refused("step-00000003 cannot be replayed: router is incomplete", 3)


def test_choices_for_other_sequences_are_refused(folder: Path) -> None:
    """A run that a rollback made leave data out reads others in the same step."""
    write_step(folder, 1, 0, {"router": [piece(choices(), [4, 5, 6, 7])]})
    replaying = Replaying.__new__(Replaying)
    memories = [SimpleNamespace(kept=kept) for kept in (None, torch.zeros(2, 1, 4))]  # 1 token on each of 3 ranks
    vars(replaying).update(_record=Record(folder), _memories=memories, _replayers=["router"])
    vars(replaying).update(_sequence_length=TOKENS - 3, _parallel=SimpleNamespace(token_shards=3))
    found = replaying._load(1, torch.tensor([6, 5]))
    assert torch.equal(found["router"], choices())
    for others in ([6, 8], [2, 1], [6, 9]):
        with pytest.raises(UserError, match=r"step 1 of \S+ read other sequences \(router router\)"):
            replaying._load(1, torch.tensor(others))
    memories[1].kept = None
    with pytest.raises(UserError, match=f"sequences have {TOKENS} tokens with memory, this run's {TOKENS - 3};"):
        replaying._load(1, torch.tensor([6, 5]))


def test_a_start_removes_the_choices_of_later_steps_alone(folder: Path) -> None:
    for step in (1, 2, 3):
        write_step(folder, step, 0, {"router": [piece(choices(), [0, 1, 2, 3])]})
    begin_record(folder, CONTENT, 2)
    assert [path.name for path in sorted(folder.glob("step-*"))] == ["step-00000001", "step-00000002"]
    (step_folder(folder, 2) / "mine").touch()
    with pytest.raises(OSError):
        remove_after(folder, 1)
    assert [path.name for path in step_folder(folder, 2).iterdir()] == ["mine"]
    with pytest.raises(UserError, match="holds the choices of another run"):
        begin_record(folder, {**CONTENT, "seed": 4}, 2)
    assert json.loads((folder / "record.json").read_text())["routers"] == CONTENT["routers"]
