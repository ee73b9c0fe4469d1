"""What stands between two attempts: other versions of the code, lost connections, killed workers."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.arguments import set_options
from common.errors import DataError
from common.paths import REPOSITORY
from data_prep.cli import main
from data_prep.config import versions
from data_prep.config.loading import load_config
from data_prep.config.resolved import resolve
from data_prep.config.schema import DedupConfig, FilterConfig
from data_prep.config.tokenizer import TokenizerConfig
from data_prep.raw import locations
from data_prep.run.pipeline import Pipeline
from data_prep.run.preparation import Preparation
from data_prep.run.stages import STAGES, _training, spread
from data_prep.stages.id_maker import IdRecipe
from data_prep.stages.ingest import ingest_folder, ingest_tasks
from data_prep.stages.tokenizer import train_tokenizer
from data_prep.work.parallel import Workers
from tests.data_prep.outcome import one_error, outputs
from tests.data_prep.raw_corpus import write_config, write_corpus


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("restarts")
    return folder, write_corpus(folder / "raw")


def folders_of(config: Path, *overrides: str) -> dict[str, str]:
    """Stage -> the name of its folder, in the order of the stages; what is ingested must be there."""
    made = Preparation(resolve(load_config(config, overrides)))
    # Any file is the model: its hash is the key.
    recipe = IdRecipe(model=config, settings=made.resolved.config.tokenizer)
    paths = [made.filter_folder(), made.signature_folder(), made.dedup_folder(), made.tokenizer_folder()]
    return {path.name.partition("-")[0]: path.name for path in [*paths, made._folder_of_ids(recipe)]}


FIRST_CHANGED = {
    "filter.language=[]": "filter",
    "filter.language_characters=100": "filter",
    "filter.min_words=10": "filter",
    "filter.max_words=5000": "filter",
    "filter.gopher_quality=false": "filter",
    "filter.gopher_repetition=false": "filter",
    "filter.c4=true": "filter",
    "filter.c4_min_sentences=4": "filter",
    "filter.c4_lines=true": "filter",
    "filter.samples=1": "filter",
    "dedup.shingle_words=3": "signatures",
    "dedup.threshold=0.7": "signatures",
    "dedup.exact=false": "dedup",
    "dedup.near=false": "signatures",  # which are not needed then
    "dedup.samples=1": None,  # taken from the verdicts when they are published
    "dedup.memory_bytes=2000000": None,
}
"""Setting of every key of the filters and of the removal of duplicates -> the first stage that it makes anew."""


def test_work_of_other_settings_is_not_taken_over(raw: tuple[Path, dict[str, Any]]) -> None:
    """A run that was killed or kept its work, and goes on with another value: what a key decides is made again, and all
    that follows."""
    config = write_config(raw, "settings", input=f"{raw[0]}/raw/own.jsonl", validation_input=[])
    assert main(["ingest", "--config", str(config)]) == 0
    every = {
        f"{name}.{key}"
        for name, kind in (("filter", FilterConfig), ("dedup", DedupConfig))
        for key in kind.model_fields
    }
    assert {setting.partition("=")[0] for setting in FIRST_CHANGED} == every
    names = folders_of(config)
    for setting, first in FIRST_CHANGED.items():
        found = folders_of(config, setting)
        changed = [name for name in names if found[name] != names[name]]
        stages = list(names)
        assert changed == (stages[stages.index(first) :] if first else []), setting
    for setting in ("vocab_size=500", "split_digits=false", "sample_bytes=50000", "seed=3", "type=unigram"):
        assert folders_of(config, f"tokenizer.{setting}")["tokenizer"] != names["tokenizer"], setting
    for setting in ("separator=<S>", "sentences=lines"):
        assert folders_of(config, f"tokenizer.{setting}")["encode"] != names["encode"], setting


def test_what_is_to_be_read_otherwise_is_read_again(tmp_path: Path) -> None:
    """Each key that decides what a raw file gives names the folder of what was read, and no other key does."""
    for name in ("a.txt", "one.model", "other.model"):
        (tmp_path / name).write_text(name)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"input": str(tmp_path / "a.txt"), "output": str(tmp_path / "out")}))
    ids = ["format=token_array", 'tokenizer={"type": "ids", "name": "x", "vocab_size": 300}', "end_of_document=0"]
    model = f"tokenizer.model={tmp_path / 'one.model'}"

    def folder(encodes: bool, *overrides: str) -> str:
        return ingest_folder(resolve(load_config(config, overrides)), encodes=encodes).name

    for encodes, given, others in (
        (False, [], ["ingest.max_document_bytes=2000", "format=jsonl", "text_key=body"]),
        (False, ["format=text"], ["text_documents=blank_lines", "validation_from=end"]),
        (False, ["format=text", "validation_from=end"], ["validation_fraction=0.1"]),
        (False, ["format=enwik8", 'tokenizer={"type": "bytes"}'], ["split_bytes=[5,0,0]"]),
        (True, ids, ["end_of_document=1", "id_dtype=uint32", "tokenizer.name=y", "tokenizer.vocab_size=301"]),
        (True, [model], [model.replace("one", "other"), "tokenizer.separator=S", "validation_fraction=0.1"]),
    ):
        names = [folder(encodes, *given), *(folder(encodes, *given, other) for other in others)]
        assert len(set(names)) == len(names), given
    for other in ("workers=3", "ingest.max_bad_files=1", "validation_fraction=0.1", "tokenizer.seed=3"):
        assert folder(False, other) == folder(False), other
    # A copy of the model elsewhere is the same model.
    (tmp_path / "copy.model").write_text("one.model")
    assert folder(True, model.replace("one", "copy")) == folder(True, model)


def test_work_on_other_files_is_not_taken_over(raw: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """What is found over all files is found again where there is one more; what is said of a part stays."""
    model = tmp_path / "m.model"
    model.write_bytes(train_tokenizer(["a few words of text"], TokenizerConfig(vocab_size=275)))
    files = [f"{raw[0]}/raw/own.jsonl", f"{raw[0]}/raw/c4-validation.json.gz"]
    changes: dict[str, Any] = {"input": files[:1], "validation_input": [], "filter": None, "keep_work": True}
    config = write_config(raw, "files", **changes, tokenizer={"model": str(model), "allow_lossy": True})
    more, alone = f"input={json.dumps(files)}", "dedup=null"

    def folders(*overrides: str) -> dict[str, str]:
        assert main(["ingest", "--config", str(config), *set_options(overrides)]) == 0
        made = Preparation(resolve(load_config(config, overrides)))
        made._copied_model()
        paths = [made.ingest_folder(), made.encode_folder(), made.shard_folder()]
        if made.resolved.config.dedup is not None:
            paths += [made.signature_folder(), made.dedup_folder()]
        return {path.name.partition("-")[0]: path.name for path in paths}

    def changed(one: dict[str, str], other: dict[str, str]) -> set[str]:
        return {name for name in one if one[name] != other[name]}

    names, without = folders(), folders(alone)
    assert changed(names, folders(more)) == {"dedup", "encode", "shards"}
    assert changed(without, folders(more, alone)) == {"shards"}
    assert changed(without, folders("shard.tokens_per_shard=9000", alone)) == {"shards"}
    assert changed(without, folders("validation_fraction=0.1", alone)) == {"encode", "shards"}
    trained = ["tokenizer.model=null", "tokenizer.vocab_size=300", alone]
    found = [
        Preparation(resolve(load_config(config, [*trained, *more_of]))).tokenizer_folder().name
        for more_of in ([], [more], ["validation_fraction=0.1"], ["tokenizer.sample_files=1"])
    ]
    assert len(set(found)) == 4


def test_a_tokenizer_is_trained_on_the_train_split_of_the_files_that_are_asked_for(
    raw: tuple[Path, dict[str, Any]],
) -> None:
    config = write_config(raw, "trained", filter=None, dedup=None)
    assert main(["ingest", "--config", str(config)]) == 0

    def looked_at(*overrides: str) -> tuple[set[str], set[str]]:
        sources = _training(Preparation(resolve(load_config(config, overrides)))).sources
        parts = [(source, part) for source in sources for part in source.parts]
        names = {name for source, part in parts for name, _ in part.files if name in source.files}
        return names, {part.split for _, part in parts}

    train = {"c4-train.00000.json.gz", "c4-train.00001.json.gz", "pes2o-train.json.gz", "own.jsonl"}
    assert looked_at() == (train, {"train"})
    assert looked_at("tokenizer.sample_files=1") == ({"c4-train.00000.json.gz"}, {"train"})


def test_a_raw_file_that_changed_or_goes_elsewhere_is_read_again(tmp_path: Path) -> None:
    config, raw = tmp_path / "config.json", [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in raw:
        path.write_text("a")
        os.utime(path, ns=(0, 0))

    def keys(**more: str) -> list[str]:
        body = {"input": [str(path) for path in raw], "output": str(tmp_path / "out"), **more}
        config.write_text(json.dumps(body))
        return [task.key for task in ingest_tasks(resolve(load_config(config, ())), None)]

    (first,) = keys()
    seen = [first]
    assert keys() == seen
    raw[1].write_text("b")
    os.utime(raw[1], ns=(0, 1))  # as large
    seen += keys()
    raw[1].write_text("bb")
    os.utime(raw[1], ns=(0, 1))  # as old
    seen += keys()
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "v.jsonl").write_text("v")
    seen += keys(validation_input=str(tmp_path / "held" / "v.jsonl"))  # then all of the others are train
    (tmp_path / "held" / "v.jsonl").rename(tmp_path / "held" / "b.jsonl")  # then they are named by their folders
    seen += keys(validation_input=str(tmp_path / "held" / "b.jsonl"))
    raw.pop()
    seen += keys()
    assert len(set(seen)) == len(seen) == 8


def test_work_of_other_versions_is_not_taken_over(
    raw: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed run that newer code continues, and `keep_work` after an update: the manifest names one version."""
    config = write_config(raw, "versions", input=f"{raw[0]}/raw/own.jsonl", validation_input=[])
    assert main(["ingest", "--config", str(config)]) == 0

    def folders() -> dict[str, str]:
        return folders_of(config)

    names, real = folders(), versions.package_version
    for package, stage in (("py3langid", "filter"), ("rensa", "signatures"), ("sentencepiece", "tokenizer")):
        with monkeypatch.context() as patch:
            patch.setattr(versions, "package_version", lambda name, p=package: "0" if name == p else real(name))
            changed = [name for name in names if folders()[name] != names[name]]
        after = {"filter": 0, "signatures": 1, "tokenizer": 3}[stage]
        assert changed == [name for name in list(names)[after:]], "it and what follows from it"
    monkeypatch.setattr(versions, "PREPARATION_VERSION", "next")
    with pytest.raises(DataError, match="is not finished"):
        folders()


def test_a_broken_connection_is_tried_again_and_then_one_error(
    raw: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the middle of a file, with an error that is no OSError, as those of botocore and aiohttp."""

    class Lost(Exception):
        pass

    class Breaking:
        def __init__(self, stream: Any) -> None:
            self.stream, self.left = stream, 2

        def __enter__(self) -> "Breaking":
            return self

        def __exit__(self, *_: object) -> None:
            self.stream.close()

        def read(self, size: int = -1) -> bytes:
            self.left -= 1
            if self.left < 0 and next(failures):
                raise Lost("connection lost")
            data: bytes = self.stream.read(min(size, 5000))
            return data

        def seek(self, place: int) -> None:
            self.stream.seek(place)

    original, failures = locations.RemoteFile.open, iter([True] * 2 + [False] * 1000)
    monkeypatch.setattr(locations.RemoteFile, "open", lambda self, mode: Breaking(original(self, mode)))
    monkeypatch.setattr("data_prep.stages.ingest.time.sleep", lambda seconds: None)
    name = "c4-train.00001.json.gz"
    settings = {"validation_input": [], "filter": None, "dedup": None}
    plain = write_config(raw, "plain", input=str(raw[0] / "raw" / name), **settings)
    config = write_config(raw, "lost", input=f"file://{raw[0]}/raw/{name}", **settings)
    assert main(["run", "--config", str(plain)]) == main(["run", "--config", str(config)]) == 0
    assert outputs(raw[0] / "lost") == outputs(raw[0] / "plain")
    assert capsys.readouterr().err.count("Lost: connection lost; the file is read again") == 2
    failures = iter([True] * 1000)
    assert main(["run", "--config", str(config), "--force"]) == 1, "which launch/slurm/data_prep.sbatch starts again"
    assert "Lost: connection lost" in one_error(capsys)


def _die(task: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_no_mistake_of_the_user(
    raw: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ingest, *others = STAGES
    deadly = dataclasses.replace(ingest, make=spread(_die, "reading", lambda task: task.size))
    monkeypatch.setattr("data_prep.run.pipeline.STAGES", (deadly, *others))
    assert main(["ingest", "--config", str(write_config(raw, "died", workers=2))]) == 1
    assert "a process died (most often: killed for memory)" in one_error(capsys)


HEARD = ("", ", unheard")
INTERRUPTED = """
import os, pathlib, signal, sys, threading, time
from concurrent.futures import ProcessPoolExecutor
from data_prep.work import parallel

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell inherits that it is ignored
how, closing, shutdown = sys.argv[1], pathlib.Path("closing"), ProcessPoolExecutor.shutdown

def stay(number):
    if number == 1 and how == "after an error":
        raise ValueError("one")
    while how == "after an error" and not closing.exists():
        time.sleep(0.001)
    if number == 0:
        os.kill(os.getppid(), signal.SIGINT)
    time.sleep(600)
    pathlib.Path("left").touch()

def noted(pool, **options):
    closing.touch()
    shutdown(pool, **options)

if how.endswith("unheard"):  # as by a main thread that just begins to wait: another thread has the signal
    parallel._start_method, parallel.LOOK_SECONDS = lambda: "fork", 0.1
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
how = how.removesuffix(", unheard")
ProcessPoolExecutor.shutdown = noted
with parallel.worker_pool(2) as workers:
    if how == "alone":
        workers.alone(stay, 0)
    else:
        workers.run(stay, [0, 1], sizes=[1, 1], description="working")
"""


@pytest.mark.parametrize("how", [f"{when}{how}" for when in ("at work", "alone", "after an error") for how in HEARD])
def test_ctrl_c_waits_for_no_task(tmp_path: Path, how: str) -> None:
    """A raw file, or the training of a tokenizer, may take hours; what another task raised is said after them."""
    line, environment = [sys.executable, "-c", INTERRUPTED, how], {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=90, check=False)
    # Behind it the executor's own thread may still say that its processes are gone.
    assert ended.returncode == -signal.SIGINT and "\nKeyboardInterrupt\n" in ended.stderr, ended.stderr
    assert ("a task failed; the others in work end first" in ended.stderr) == how.startswith("after an error")
    assert not (tmp_path / "left").exists()


def test_progress_is_of_the_whole_and_not_of_this_start(
    raw: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every stage that many tasks share; the pieces of `dedup` count by themselves (test_dedup_pieces.py)."""
    bars: dict[str, tuple[int, int]] = {}

    def run(self: Workers, function: Any, tasks: Any, *, sizes: Any, description: str, done: int = 0) -> None:
        bars[description] = (sum(sizes), done)

    monkeypatch.setattr(Workers, "run", run)

    def task(size: int) -> SimpleNamespace:
        return SimpleNamespace(size=size, tokens=0, bytes=size, part=SimpleNamespace(bytes=size))

    spread_over_tasks = [stage for stage in STAGES if stage.name not in ("dedup", "tokenizer")]
    for stage in spread_over_tasks:
        stage.make([task(1), task(2)], [task(30), task(400)], Workers(1))
    assert len(bars) == len(spread_over_tasks) and set(bars.values()) == {(3, 430)}

    given: list[tuple[Any, Any]] = []
    stage = dataclasses.replace(
        STAGES[0],
        tasks=lambda preparation: [1, 2, 3, 4],
        is_done=lambda task: task in (1, 3),
        make=lambda tasks, finished, workers: given.append((tasks, finished)),
        finish=lambda preparation, tasks: None,
    )
    monkeypatch.setattr("data_prep.run.pipeline.STAGES", (stage,))
    preparation = Preparation(resolve(load_config(write_config(raw, "progress"), [])))
    Pipeline(preparation, Workers(1)).run("ingest")
    assert given == [([2, 4], [1, 3])]
