"""What one rank finds, all ranks leave for: one message, no hang, no broken collective."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

import pretrain.evaluate
import pretrain.report.tensorboard
import pretrain.together
from common.errors import DataError, PassingError, UserError
from data_prep.shards.format import Manifest
from pretrain.config.schema import Config
from pretrain.data.sources import Sources
from pretrain.parallel.agreement import PeerFailed, agreed, check_same, check_shared, raise_agreed, said_by_first
from pretrain.together import check_code
from tests.harness import run_ranks
from tests.pretrain.runs import light_config, small_config, train_runs


def _outcome_of_training(rank: int, config: Config, run_dir: Path) -> str:
    try:
        train_runs(rank, [(config, run_dir)])
    except (UserError, DataError, PeerFailed) as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


def _outcomes_of_own_settings(rank: int, prepared: Path, folder: Path, settings: list[tuple[str, str]]) -> list[str]:
    """Of runs to each of which the two ranks give another setting."""
    keys = ("train.steps=1", "evaluate.sequences=0")
    runs = [
        (light_config(prepared, *keys, own[rank], ranks=2), folder / str(number)) for number, own in enumerate(settings)
    ]
    return [_outcome_of_training(rank, *run) for run in runs]


def test_ranks_of_other_settings_are_refused_but_for_those_of_their_nodes(prepared: Path, tmp_path: Path) -> None:
    """Each reads the file itself, which a node may have a copy of; nothing would show another learning rate."""
    settings = [
        ("optimizer.learning_rate=1e-3", "optimizer.learning_rate=2e-3"),
        ("train.threads=1", "train.threads=2"),
    ]
    first, second = run_ranks(_outcomes_of_own_settings, 2, prepared, tmp_path, settings)
    said = "optimizer.learning_rate: is 0.001 on rank 0 and 0.002 on rank 1; give all nodes the same configuration"
    assert first == [f"UserError: {said}", "trained"] and second == ["PeerFailed: ", "trained"]


def _outcomes_of_own_code(rank: int, config: Config, folder: Path, places: list[tuple[Path, Path]]) -> list[str]:
    """Each rank as the only one of its node, which has the checkout `places[n][rank]`; then both on one node."""
    found = []
    for number, own in enumerate(places):
        pretrain.together.REPOSITORY = own[rank]  # this process ends with the test
        with patch.dict(os.environ, LOCAL_RANK="0", LOCAL_SIZE="1"):
            own_config = config.replaced("train", seed=7) if (rank, number) == (1, 0) else config
            found.append(_outcome_of_training(rank, own_config, folder / str(number)))
    check_code()
    return found


def test_nodes_of_other_code_are_refused_with_the_file(prepared: Path, tmp_path: Path) -> None:
    """A change on one node alone would train along. Bytecode, tests, what editors leave and what is no code may
    differ. The code is compared before the configuration: an older one lacks keys, which nobody has to correct."""
    first, same, changed, more = (tmp_path / name for name in ("first", "same", "changed", "more"))
    for root in (first, same, changed, more):
        for name in ("common/a.py", "model/kernels/b.cu", "pretrain/c/d.json", "data_prep/shards/e.py"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"of {name}")
    others = ("common/__pycache__/a.py", "common/.ipynb_checkpoints/a.py", "data_prep/cli.py", "model/notes.md")
    for name in (*others, "tests/test_a.py"):
        (same / name).parent.mkdir(parents=True, exist_ok=True)
        (same / name).touch()
    (same / "common" / ".#a.py").symlink_to("somebody@a-node.4711")  # Emacs', of a file that is not saved
    (changed / "model/kernels/b.cu").write_text("other")
    (more / "pretrain/c/f.json").touch()
    digests = [hashlib.sha256(text).hexdigest()[:16] for text in (b"of model/kernels/b.cu", b"other", b"")]
    config = light_config(prepared, "train.steps=1", "evaluate.sequences=0", ranks=2)
    places = [(first, other) for other in (changed, more, same)]
    found = run_ranks(_outcomes_of_own_code, 2, config, tmp_path / "runs", places)
    refused = [
        f"model/kernels/b.cu: is {digests[0]} on rank 0 and {digests[1]} on rank 1; give all nodes the same code",
        f"pretrain/c/f.json: is not there on rank 0 and {digests[2]} on rank 1; give all nodes the same code",
    ]
    assert found[0] == [*(f"UserError: {said}" for said in refused), "trained"]
    assert found[1] == ["PeerFailed: ", "PeerFailed: ", "trained"]


def test_an_altered_shard_is_one_ranks_message_and_stops_all(prepared: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(prepared, tmp_path / "copy"))
    for shard in folder.glob("train-*.tar"):
        content = bytearray(shard.read_bytes())
        content[700] ^= 1
        shard.write_bytes(content)
    outcomes = run_ranks(
        _outcome_of_training,
        3,
        small_config(folder, "batch.global_sequences=6", "batch.micro_sequences=2"),
        tmp_path / "run",
    )
    assert sorted(outcome.split(":")[0] for outcome in outcomes) == ["DataError", "PeerFailed", "PeerFailed"]
    (message,) = [outcome for outcome in outcomes if outcome.startswith("DataError")]
    assert "train-0000" in message
    assert "sha256" in message


def test_an_altered_validation_shard_too(prepared: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(prepared, tmp_path / "copy"))
    shard = next(folder.glob("validation-*.tar"))
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    config = small_config(folder, "train.steps=1", "evaluate.sequences=8")
    outcomes = run_ranks(_outcome_of_training, 2, config, tmp_path / "run")
    assert sorted(outcome.split(":")[0] for outcome in outcomes) == ["DataError", "PeerFailed"]


def _outcome_without_a_second_look(rank: int, config: Config, run_dir: Path) -> str:
    def gone(reader: Any, windows: Any) -> Any:
        raise DataError("validation-00000.tar is gone")

    pretrain.evaluate.target_counts = gone  # this process ends with the test
    return _outcome_of_training(rank, config, run_dir)


def test_a_validation_shard_that_the_first_rank_alone_reads_again_too(prepared: Path, tmp_path: Path) -> None:
    config = small_config(prepared, "train.steps=1", "evaluate.sequences=8")
    outcomes = run_ranks(_outcome_without_a_second_look, 2, config, tmp_path / "run")
    assert [outcome.split(":")[0] for outcome in outcomes] == ["DataError", "PeerFailed"]


def test_a_run_folder_that_cannot_be_written(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcomes = run_ranks(_outcome_of_training, 2, small_config(prepared), tmp_path / "file" / "run")
    assert outcomes[0].startswith("UserError: --run-dir:")
    assert outcomes[1].startswith("PeerFailed")


def _outcome_without_earlier_texts(rank: int, config: Config, run_dir: Path) -> str:
    def unanswered(folder: Path) -> Any:
        raise OSError(errno.EIO, "Input/output error", str(folder))

    pretrain.report.tensorboard.texts_of = unanswered  # this process ends with the test
    return _outcome_of_training(rank, config, run_dir)


def test_a_board_that_the_first_rank_cannot_open(prepared: Path, tmp_path: Path) -> None:
    config = small_config(prepared, "monitor.tensorboard=true")
    first, second = run_ranks(_outcome_without_earlier_texts, 2, config, tmp_path / "run")
    assert first.startswith("PassingError: --run-dir:") and "tensorboard/events cannot be written" in first
    assert second.startswith("PeerFailed")


def _primitives(rank: int, folder: Path) -> list[str]:
    outcomes = []

    def attempt(function: object) -> None:
        try:
            outcomes.append(str(function()))  # type: ignore[operator]
        except UserError as error:
            outcomes.append(f"UserError: {error}")
        except PeerFailed as error:
            outcomes.append(f"PeerFailed: {error.words}")

    def fail_on_rank_1() -> int:
        if rank == 1:
            raise UserError("mine")
        return rank

    attempt(lambda: agreed(lambda: rank))
    attempt(lambda: agreed(fail_on_rank_1))
    attempt(lambda: check_same("data", "a"))
    attempt(lambda: check_same("data", "a" if rank == 0 else "b"))
    attempt(lambda: check_shared(folder))
    own = folder / str(rank)
    own.mkdir()
    attempt(lambda: check_shared(own))

    def both_kinds() -> None:
        raise UserError("stays") if rank == 1 else PassingError("may pass")

    for function in (agreed, said_by_first):
        try:
            function(both_kinds)
        except UserError as error:
            outcomes.append(f"{type(error).__name__}: {error}")
        except PeerFailed as error:
            outcomes.append(f"PeerFailed of {error.kind.__name__}: {error.words}")
    attempt(lambda: check_shared(own if rank == 0 else folder / ("x" * 300)))  # to ask after it is an error itself

    def unanswered(self: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EIO, "Input/output error", str(self))

    Path.unlink = unanswered  # this process ends with the test
    attempt(lambda: check_shared(folder))
    return outcomes


def test_primitives(tmp_path: Path) -> None:
    first, second = run_ranks(_primitives, 2, tmp_path)
    assert first[:3] == ["0", "PeerFailed: rank 1: mine", "None"]
    assert second[:3] == ["1", "UserError: mine", "None"]
    assert first[3] == "UserError: data: rank 0 has a, rank 1 has b; give all nodes the same"
    assert second[3] == "PeerFailed: rank 0: data: rank 0 has a, rank 1 has b; give all nodes the same"
    assert first[4] == second[4] == "None"
    assert "rank 1 does not see the folder" in second[5]
    assert first[5] == second[5].replace("UserError: ", "PeerFailed: rank 1: ")
    assert first[8].startswith("PeerFailed: rank 1: --run-dir") and "rank 1 does not see the folder" in second[8]
    assert first[9] == second[9] == "None"
    assert not list(tmp_path.glob("*/.seen*"))
    # An error that stays goes before one that may pass, which would be waited for in vain.
    assert (first[6], second[6]) == ("PeerFailed of UserError: rank 1: stays", "UserError: stays")
    assert (first[7], second[7]) == ("UserError: stays", "PeerFailed of UserError: rank 0: stays")


def test_a_process_alone_raises_its_own_error() -> None:
    """That generates a text, say, without a process group."""

    def fail() -> None:
        raise UserError("mine")

    assert agreed(lambda: 3) == 3
    with pytest.raises(UserError, match="mine"):
        agreed(fail)


def test_words_go_through_the_group_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two steps that is one of CPUs: through the GPUs' they would wait for what these still compute."""
    asked: list[tuple[int, Any]] = []

    def broadcast(words: list[str], src: int, group: Any) -> None:
        asked.append((src, group))
        words[0] = "of rank 3"

    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    control: Any = "control"
    raise_agreed(None, None, group=control)
    with pytest.raises(PeerFailed) as met:
        raise_agreed(UserError("a later rank's"), 3, passes=True, group=control)
    assert (met.value.kind, met.value.words) == (PassingError, "rank 3: of rank 3") and asked == [(3, control)]


def test_ranks_with_other_data_do_not_train(prepared: Path, tmp_path: Path) -> None:
    assert Manifest.load(prepared).digest
    outcomes = run_ranks(_outcome_with_own_digest, 2, small_config(prepared), tmp_path)
    assert outcomes[0].startswith("UserError: data.manifest (digest): rank 0 has")


def _outcome_with_own_digest(rank: int, config: Config, run_dir: Path) -> str:
    import torch

    from pretrain.loop import train

    sources = Sources.load(config)
    if rank == 1:
        other = sources.sources[0].manifest.model_copy(update={"digest": "0" * 64})
        sources = Sources((dataclasses.replace(sources.sources[0], manifest=other),))
    try:
        train(config, sources, run_dir, torch.device("cpu"))
    except (UserError, PeerFailed) as error:
        return f"{type(error).__name__}: {error}"
    return "trained"
