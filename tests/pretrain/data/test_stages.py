"""Sources and weights that change when a run continues: every source goes on where it stands."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from pretrain import resumed_stages
from pretrain.checkpoint import Checkpoint, list_checkpoints
from pretrain.cli.train import print_derived
from pretrain.config.schema import Config
from pretrain.data.order import window_order
from pretrain.data.progress import Progress
from pretrain.data.sources import Sources
from pretrain.data.stages import Stage
from pretrain.data.windows import TrainingStream
from pretrain.resumed_stages import reads_by_end, reads_so_far, stages_of
from pretrain.routing.record import Record, begin_record, description
from pretrain.trainer import LaunchedStep, StepInput, Trainer
from tests.data_prep.split_writer import random_documents, write_data
from tests.harness import run_ranks
from tests.pretrain.resilience.faults import train_with
from tests.pretrain.runs import assert_bit_identical, events, light_config, metrics, small_config
from tests.pretrain.saved import rewrite_state

G, T = 8, 16
Mix = dict[str, float]
"""Weights by the name of the data set."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four data sets of random ids, of one tokenizer, in folders of this folder."""
    folder, rng = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    shards = {"tokens_per_shard": 3000, "tokens_per_member": 500}
    for name, documents in (("c4", 12), ("pes2o", 6), ("books", 3), ("math", 2)):
        write_data(folder / name, random_documents(rng, documents, 200), vocab_size=400, **shards)
    return folder


def mixed(base: Path, mix: Mix, *overrides: str, ranks: int = 2) -> Config:
    rows = [{"manifest": str(base / name), "weight": weight} for name, weight in mix.items()]
    keys = ("evaluate.sequences=0", "train.steps=12", "checkpoint.keep_last=9")
    return light_config(base / "c4", f"data.sources={json.dumps(rows)}", *keys, *overrides, ranks=ranks)


def alone(base: Path, name: str, *overrides: str) -> Config:
    return small_config(base / name, "evaluate.sequences=0", "train.steps=12", "checkpoint.keep_last=9", *overrides)


def sequences(base: Path) -> dict[bytes, tuple[str, int]]:
    """Name and window of every sequence of training, by its tokens: they are random, so each is there once."""
    found: dict[bytes, tuple[str, int]] = {}
    for folder in base.iterdir():
        config = alone(base, folder.name)
        reader = Sources.load(config).reader("train", config)
        tokens, _ = reader.read(np.arange(reader.num_windows))
        found |= {row.numpy().tobytes(): (folder.name, window) for window, row in enumerate(tokens)}
    return found


def sizes(base: Path) -> dict[str, int]:
    names = [name for name, _ in sequences(base).values()]
    return {name: names.count(name) for name in set(names)}


def turns(mix: Mix) -> Iterator[str]:
    """The names that a stage of these weights reads: of the sources that are not ahead of their share by the bound of
    1 - 1 / (2 k - 2), the one that would be behind by it soonest, in floating point."""
    weights, counts, n = np.array(list(mix.values())) / sum(mix.values()), np.zeros(len(mix)), 0
    bound = 1 - 1 / max(1, 2 * len(mix) - 2)
    while True:
        n += 1
        may = n * weights - counts >= 1 - bound - 1e-9
        late = np.where(may, (counts + bound) / weights, np.inf)
        chosen = int(np.argmin(np.round(late, 6)))
        counts[chosen] += 1
        yield list(mix)[chosen]


class Expected:
    """The windows that a run must read, kept by hand: a list of windows for each source, and a place in it."""

    def __init__(self, base: Path, begins_with: Mix) -> None:
        self._sizes = sizes(base)
        self._orders: dict[str, np.ndarray] = {}
        self._place: dict[str, int] = {}
        self._alone = len(begins_with) == 1

    def stage(self, mix: Mix, count: int) -> list[tuple[str, int]]:
        """The next `count` sequences, with these weights."""
        for name in mix:
            if name not in self._orders:
                seed = 17 if self._alone and not self._orders else f"17/source {len(self._orders)}"
                self._orders[name] = window_order(np.arange(5000), self._sizes[name], seed=seed)
                self._place[name] = 0
        read = []
        for _, name in zip(range(count), turns(mix), strict=False):
            read.append((name, int(self._orders[name][self._place[name]])))
            self._place[name] += 1
        return read

    def epoch(self, name: str) -> float:
        return self._place[name] / self._sizes[name]


COURSES: list[list[tuple[Mix, int]]] = [
    [({"c4": 0.7, "pes2o": 0.3}, 1000), ({"c4": 0.3, "pes2o": 0.7}, 1000)],
    [({"c4": 0.7, "pes2o": 0.3}, 333), ({"c4": 0.5, "pes2o": 0.2, "books": 0.3}, 777), ({"books": 1, "c4": 1}, 501)],
    [({"c4": 1}, 100), ({"c4": 0.6, "math": 0.4}, 400), ({"math": 1}, 90), ({"pes2o": 2, "c4": 1}, 250)],
]
"""Weights, and for how many sequences: changed; a source added, one removed; one alone, all gone, one back."""


@pytest.mark.parametrize("course", COURSES, ids=["changed", "added and removed", "alone and back"])
@pytest.mark.parametrize("size, micro", [(1, 8), (2, 2)])
def test_no_window_is_read_again_before_its_epoch_ends_and_none_is_left_out(
    base: Path, course: list[tuple[Mix, int]], size: int, micro: int
) -> None:
    expected, known, stage, first = Expected(base, course[0][0]), sequences(base), None, 0
    every: dict[str, list[int]] = {}
    for mix, count in course:
        config = mixed(base, mix, f"batch.micro_sequences={micro}")
        sources = Sources.load(config)
        stage = sources.stage() if stage is None else stage.followed_by(first, sources.stage().sources)
        reader = sources.reader("train", config)
        read: list[tuple[str, int]] = []
        streams = [TrainingStream(reader, config, data_rank=r, data_size=size, stage=stage) for r in range(size)]
        for consumed in range(first, first + count, G):
            batches = [s.batch(consumed, m) for m in range(streams[0].micro_steps) for s in streams]
            read += [known[row.numpy().tobytes()] for batch in batches for row in batch.tokens]
        read = read[:count]
        assert read == expected.stage(mix, count)
        assert streams[0].source_epochs(first + count) == [expected.epoch(name) for name in mix]
        for name, window in read:
            every.setdefault(name, []).append(window)
        first += count
    for name, windows in every.items():
        held = sizes(base)[name]
        for begin in range(0, len(windows), held):
            epoch = windows[begin : begin + held]
            assert len(set(epoch)) == len(epoch), f"{name} is read twice in an epoch"


def note_reads(trainer: Trainer, log: Path) -> None:
    """Writes the tokens of every step that is taken to `log`, a file for each rank and step."""
    launch = trainer.launch

    def noting(progress: Progress, given: StepInput) -> LaunchedStep:
        name = f"{progress.step:04d}-{trainer.setup.parallel.data_rank}.npz"
        tokens = np.stack([batch.tokens.numpy() for batch in given.batches])  # [micro-steps, B, T]
        index = np.stack([batch.sequence_index.numpy() for batch in given.batches])
        np.savez(log / name, tokens=tokens, index=index)
        return launch(progress, given)

    trainer.launch = noting


def read_at(base: Path, log: Path) -> dict[int, tuple[str, int]]:
    """What the steps in `log` read, by position; of a step that was taken again the last time."""
    known, found = sequences(base), {}
    for path in log.iterdir():
        with np.load(path) as file:
            rows = zip(file["index"].ravel().tolist(), file["tokens"].reshape(-1, T), strict=True)
            found |= {position: known[row.tobytes()] for position, row in rows}
    return found


def read_by(base: Path, log: Path) -> list[tuple[str, int]]:
    """What the steps in `log` read, in the order of positions, none of which is left out."""
    found = read_at(base, log)
    return [found[position] for position in range(len(found))]


FIRST: Mix = {"c4": 0.7, "pes2o": 0.3}
SECOND: Mix = {"c4": 0.2, "pes2o": 0.5, "books": 0.3}
THIRD: Mix = {"books": 0.5, "c4": 0.5}
ALLOWED = 'checkpoint.allow_changes=["data.sources"]'


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_whose_weights_change_goes_on_and_resumes_bit_by_bit(base: Path, tmp_path: Path, ranks: int) -> None:
    log, twin_log, run, twin = (tmp_path / name for name in ("log", "twin-log", "run", "twin"))
    log.mkdir()

    def take(mix: Mix, until: int, folder: Path, reads: Path, *keys: str) -> None:
        config = mixed(base, mix, f"train.stop_after_steps={until}", *keys, ranks=ranks)
        assert set(run_ranks(train_with, ranks, config, folder, note_reads, reads)) == {"FINISHED"}

    take(FIRST, 3, run, log)
    shutil.copytree(run, twin)
    shutil.copytree(log, twin_log)
    take(SECOND, 8, twin, twin_log, ALLOWED)  # unbroken from the change on
    take(SECOND, 5, run, log, ALLOWED)
    take(SECOND, 8, run, log)
    assert_bit_identical(run, twin)
    assert read_by(base, log) == read_by(base, twin_log)
    (event,) = events(run, "data_stage")
    assert (event["step"], event["first"]) == (3, 24)
    assert [(s["name"], s["read"]) for s in event["sources"]] == [("c4", 17), ("pes2o", 7), ("books", 0)]
    assert "c4 0.2 (after 17 of its windows)" in event["text"] and "books 0.3 (from its beginning)" in event["text"]

    take(THIRD, 11, run, log, ALLOWED)
    expected = Expected(base, FIRST)
    wanted = expected.stage(FIRST, 3 * G) + expected.stage(SECOND, 5 * G) + expected.stage(THIRD, 3 * G)
    assert read_by(base, log) == wanted
    last = metrics(run)[-1]
    assert [last["epoch/c4"], last["epoch/books"]] == [expected.epoch("c4"), expected.epoch("books")]
    held = sizes(base)["c4"] + sizes(base)["books"]
    of_both = sum(name in THIRD for name, _ in wanted)
    assert last["epoch"] == pytest.approx(of_both / held)

    # Each checkpoint has the stages of its own past: a branch from an earlier one knows nothing of later ones.
    saved = {step_path.name[-2:]: Checkpoint.open(step_path) for step_path in list_checkpoints(run / "checkpoints")}
    assert [len(saved[step].progress.stages) for step in ("03", "08", "11")] == [1, 2, 3]
    branch = stages_of(saved["03"], Sources.load(mixed(base, THIRD)), mixed(base, THIRD))
    assert [stage.first for stage in branch] == [0, 24] and branch[-1].mixed[0].read == 0


def checkpoint_of(config: Config, folder: Path, progress: Progress) -> Checkpoint:
    """What `stages_of` reads of a checkpoint at `progress`, as a run of `config` would have written it."""
    from pretrain.config.loading import to_json

    state = {"config": to_json(config), "manifest_digest": Sources.load(config).digest, "progress": progress.to_json()}
    return Checkpoint(folder, state)


def standing(stage: Stage) -> dict[str, tuple[int, int | None]]:
    return {source.name: (source.read, source.shuffle) for source in stage.sources}


def test_a_checkpoint_from_before_stages_is_one_stage_from_position_0(base: Path, tmp_path: Path) -> None:
    then, config = mixed(base, FIRST), mixed(base, SECOND)
    now = Sources.load(config)
    old = checkpoint_of(then, tmp_path, Progress(1000, 8000))
    del old.state["progress"]["stages"]
    assert stages_of(old, Sources.load(then), then) == (Sources.load(then).stage(),)
    first, second = stages_of(old, now, config)
    assert first.first == 0 and second.first == 8000
    assert standing(second) == {"c4": (5600, 0), "pes2o": (2400, 1), "books": (0, 2)}
    one = checkpoint_of(alone(base, "c4"), tmp_path, Progress(10, 80))
    del one.state["progress"]["stages"]
    assert standing(stages_of(one, now, config)[-1]) == {"c4": (80, None), "pes2o": (0, 1), "books": (0, 2)}


def test_a_source_is_known_by_its_data_or_else_by_its_name(base: Path, tmp_path: Path) -> None:
    stage = Sources.load(mixed(base, FIRST)).stage()
    (tmp_path / "moved").symlink_to(base / "c4")
    moved = Sources.load(mixed(base, {str(tmp_path / "moved"): 0.5, "pes2o": 0.5})).stage().sources
    assert standing(stage.followed_by(100, moved)) == {"moved": (70, 0), "pes2o": (30, 1)}
    made_again = [replace(source, digest=f"again {source.name}") for source in stage.sources]
    assert standing(stage.followed_by(100, made_again)) == {"c4": (70, 0), "pes2o": (30, 1)}
    other = [replace(made_again[0], name="c4 of today"), made_again[1]]
    assert standing(stage.followed_by(100, other)) == {"c4 of today": (0, 2), "pes2o": (30, 1), "c4": (70, 0)}
    # Data decide before names: c4's data under the name pes2o are c4's, and pes2o's wait for their return.
    renamed = stage.followed_by(100, [replace(stage.sources[0], name="pes2o")])
    assert [(source.weight > 0, source.read, source.shuffle) for source in renamed.sources] == [
        (True, 70, 0),
        (False, 30, 1),
    ]
    back = renamed.followed_by(110, stage.sources)
    assert standing(back) == {"c4": (80, 0), "pes2o": (30, 1)}
    # The same data in a moved folder are no change at all, and begin no stage.
    same = checkpoint_of(mixed(base, FIRST), tmp_path, Progress(5, 40, stages=(stage,)))
    config = mixed(base, {str(tmp_path / "moved"): 0.7, "pes2o": 0.3})
    assert stages_of(same, Sources.load(config), config) == (stage,)


def test_a_stage_begins_behind_what_its_checkpoint_leaves_out(base: Path, tmp_path: Path) -> None:
    then, now = mixed(base, FIRST), mixed(base, {"c4": 0.3, "pes2o": 0.7})
    progress = Progress(5, 40, ((8, 18), (50, 60)), stages=(Sources.load(then).stage(),))
    stage = stages_of(checkpoint_of(then, tmp_path, progress), Sources.load(now), now)[-1]
    assert stage.first == 50 + 10 and standing(stage) == {"c4": (42, 0), "pes2o": (18, 1)}


def test_what_is_said_before_a_start_counts_from_where_it_continues(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    then, config = mixed(base, FIRST), mixed(base, {"pes2o": 0.5, "books": 0.5}, "train.steps=200")
    sources, newest = Sources.load(config), checkpoint_of(then, tmp_path, Progress(100, 800))
    stages = stages_of(newest, sources, config)
    assert reads_by_end(config, newest, stages[-1]) == [240 + 400, 400]
    print_derived(config, 1, sources, tmp_path, newest)
    output, held = capsys.readouterr().out, sizes(base)
    assert "data stage 2" in output and "position 800 on: pes2o 0.5 (after 240 of its windows)" in output
    assert f"1 of 2 sequences, {640 / held['pes2o']:.2f} epochs" in output
    assert f"{400 / held['books']:.1f} times, and text that is read more than 4 times" in output
    assert f"or set train.steps to at most {100 + held['books']}\n" in output  # from step 100 on half of each step's 8
    assert re.search(rf"tokens of the run +{200 * G * T:,} +tokens per step x train.steps\n", output)
    less = mixed(base, {"pes2o": 0.5, "books": 0.5}, "train.steps=200", "batch.global_sequences=2", ranks=4)
    print_derived(less, 1, sources, tmp_path, newest)
    text = rf"tokens of the run +{800 * T + 100 * 2 * T:,} +{800 * T:,} so far \+ tokens per step x 100 steps\n"
    output = capsys.readouterr().out
    assert re.search(text, output) and f"1 of 2 sequences, {(240 + 100) / held['pes2o']:.2f} epochs" in output


def test_a_record_of_choices_is_of_one_stage(base: Path, tmp_path: Path) -> None:
    config = mixed(base, SECOND)
    sources = Sources.load(config)
    later = Sources.load(mixed(base, FIRST)).stage().followed_by(24, sources.stage().sources)
    whole, changed = (description(config, sources.digest, stage) for stage in (sources.stage(), later))
    for recorded, replayed in ((whole, changed), (changed, whole)):
        folder = tmp_path / ("whole" if recorded is whole else "changed")
        begin_record(folder, recorded, 0)
        begin_record(folder, recorded, 0)
        Record(folder).check(recorded)
        with pytest.raises(UserError, match="data stage"):
            Record(folder).check(replayed)


def test_a_checkpoint_of_a_real_run_without_stages_continues_as_before(base: Path, tmp_path: Path) -> None:
    old, new, logs = tmp_path / "old", tmp_path / "new", tmp_path / "log"
    logs.mkdir()
    config: Any = mixed(base, FIRST, "train.stop_after_steps=2")
    run_ranks(train_with, 1, config, new, note_reads, logs)
    shutil.copytree(new, old)
    rewrite_state(list_checkpoints(old / "checkpoints")[-1], lambda state: state["progress"].pop("stages"))
    for folder in (old, new):
        run_ranks(train_with, 1, mixed(base, FIRST, "train.stop_after_steps=4"), folder, note_reads, logs)
    assert_bit_identical(old, new)
    assert events(old, "data_stage") == []


def test_a_run_that_is_beyond_its_end_reads_no_less_than_it_has_read(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where train.steps was lowered after it had gone further."""
    config = small_config(prepared, "train.steps=30")
    stage = Sources.load(config).stage()
    for step, by_end in ((0, 240), (10, 240), (30, 240), (40, 320)):
        monkeypatch.setattr(resumed_stages, "progress_now", lambda *_, step=step: Progress(step, 8 * step))
        assert (reads_so_far(config, None, stage), reads_by_end(config, None, stage)) == ([8 * step], [by_end])
