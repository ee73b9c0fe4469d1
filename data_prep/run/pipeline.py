"""The stages in order. Each does what is not done yet, so calling one again, or after a kill, goes on where it was.

ingest     raw file -> parts, quarantine           per raw file
filter     part -> verdicts                        per part
sign       part -> MinHash signatures              per part
dedup      all signatures -> verdicts              one process group
tokenizer  sample of all parts -> model            one process
encode     part -> ids                             per part
shard      ids -> shards, manifest                 per shard
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from common.errors import DataError
from common.files import write_file
from common.hashing import sha256_file
from data_prep.raw.locations import identity, size_and_stamp
from data_prep.run import publish as prepare
from data_prep.run.assemble import write_data_manifest
from data_prep.run.output_files import TOKENIZER_RECORD, publish
from data_prep.run.plan import Plan
from data_prep.shards.format import BYTE_VALUES, TOKENIZER_FILE, dtype_name
from data_prep.stages import dedup
from data_prep.stages.dedup import Join
from data_prep.stages.encode import EncodeTask, encode_part, is_encoded
from data_prep.stages.filter import FilterTask, filter_part, is_filtered
from data_prep.stages.filters import check_languages
from data_prep.stages.id_maker import IdRecipe, symbols_of
from data_prep.stages.ingest import (
    BatchState,
    FileState,
    IngestTask,
    check_limits,
    cut_batches,
    ingest_batch,
    ingest_folder,
    ingest_tasks,
    read_state,
)
from data_prep.stages.lossy import check_vocab_size
from data_prep.stages.pack import ShardTask, cut_shards, read_entry, write_shard
from data_prep.stages.part_cutter import Encoding
from data_prep.stages.selection import Selection
from data_prep.stages.signatures import SignatureTask, is_signed, sign_part
from data_prep.stages.tokenizer import SampleSource, TextTokenizer, TrainTask, train_on_sample
from data_prep.work.folder import decided, finished, stage_folder, stage_key
from data_prep.work.parallel import Workers
from data_prep.work.parts import Part

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The batches of raw files that one SLURM array task takes: those whose position leaves `task` when divided by
    `tasks`."""

    task: int = 0
    tasks: int = 1

    def mine(self, number: int) -> bool:
        return number % self.tasks == self.task


@dataclass
class Pipeline:
    """The stages of one plan. `slice` limits ingest, filter, sign and encode to some raw files."""

    plan: Plan
    workers: Workers
    slice: Slice = Slice()
    force: bool = False
    """Whether foreign files in the output may be replaced."""
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each stage took."""
    _states: dict[str, BatchState] = field(default_factory=dict)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - started

    def _run(self, function: Callable[[T], None], tasks: Sequence[T], sizes: Sequence[int], description: str) -> None:
        self.workers.run(function, tasks, sizes=sizes, description=description)

    # What the stages before have left.

    def tasks(self, *, whole: bool) -> list[IngestTask]:
        """The batches of raw files of this slice, or all."""
        return [task for n, task in enumerate(self._all_tasks) if whole or self.slice.mine(n)]

    @cached_property
    def _encodes_while_reading(self) -> bool:
        """Whether ingest makes the ids and stores no text. Not with fewer batches of raw files than workers: stored
        text is shared out in smaller parts. Decided once for all runs and array tasks, whatever their workers."""
        if not self.plan.may_encode_while_reading:
            return False
        sources = self.plan.sources
        folder = stage_folder(self.plan.work, "reading", [identity(source.path) for source in sources])
        batches = cut_batches([(source.split, size_and_stamp(source.path)[0]) for source in sources])
        return decided(folder / "encodes.json", len(batches) >= self.plan.workers)

    def _ingest_folder(self) -> Path:
        return ingest_folder(self.plan, encodes=self._encodes_while_reading)

    @cached_property
    def _all_tasks(self) -> list[IngestTask]:
        encoding = None
        if self._encodes_while_reading:
            model = self._given_model()
            encoding = Encoding(
                recipe=self._recipe(model),
                validation_fraction=self.plan.validation_fraction,
                folder=self._encode_folder(model),
            )
        return ingest_tasks(self.plan, encoding)

    def batches(self, *, whole: bool) -> list[BatchState]:
        """What ingest found in the batches. DataError if one is not ingested yet."""
        for task in self.tasks(whole=whole):
            if task.key not in self._states:
                self._states[task.key] = finished(read_state(task), f"ingest of {task.files[0].raw}")
        return [self._states[task.key] for task in self.tasks(whole=whole)]

    def states(self, *, whole: bool) -> list[FileState]:
        """What ingest found in the raw files."""
        return [file for batch in self.batches(whole=whole) for file in batch.files]

    def parts(self, *, whole: bool) -> list[Part]:
        """All parts in reading order."""
        return [part for batch in self.batches(whole=whole) for part in batch.parts]

    def selection(self, *, deduplicated: bool) -> Selection:
        """The documents left by the filters, and by removal of duplicates if asked."""
        config = self.plan.config
        return Selection(
            ingest=self._ingest_folder(),
            filter=self._filter_folder() if config.filter else None,
            dedup=self.dedup_folder() if config.dedup and deduplicated else None,
            clean_lines=bool(config.filter and config.filter.c4_lines),
        )

    # Folders: the settings of a stage, the versions of its packages and the key of the stage before.

    def _version(self, package: str) -> str | None:
        """Of a package that this config uses: what another version made is made again."""
        return prepare.versions(self.plan).get(package)

    def _filter_folder(self) -> Path:
        assert self.plan.config.filter is not None, "there is no filter section"
        settings = self.plan.config.filter.model_dump(mode="json")
        before = stage_key(self._ingest_folder())
        return stage_folder(self.plan.work, "filter", settings, self._version("py3langid"), before)

    def _before_dedup(self) -> str:
        return stage_key(self._filter_folder() if self.plan.config.filter else self._ingest_folder())

    def _signature_folder(self) -> Path:
        config = self.plan.config.dedup
        assert config is not None, "there is no dedup section"
        return stage_folder(
            self.plan.work,
            "signatures",
            [config.shingle_words, config.threshold, self._version("rensa"), self._before_dedup()],
        )

    def dedup_folder(self) -> Path:
        config = self.plan.config.dedup
        assert config is not None, "there is no dedup section"
        names = [part.name for part in self.parts(whole=True)]
        settings = config.model_dump(mode="json", exclude={"samples", "memory_bytes"})
        return stage_folder(self.plan.work, "dedup", settings, self._version("rensa"), self._before_dedup(), names)

    def _after_dedup(self) -> str:
        return stage_key(self.dedup_folder()) if self.plan.config.dedup else self._before_dedup()

    # Stages per raw file and per part.

    def ingest(self) -> None:
        with self._timed("ingest"):
            tasks = self.tasks(whole=False)
            todo = [task for task in tasks if read_state(task) is None]
            self._run(ingest_batch, todo, [task.size for task in todo], "reading raw files")
            if self.slice.tasks == 1:  # shares of the whole; an array task may have a single, damaged file
                check_limits(tasks, self.states(whole=False), self.plan.config)

    def filter_tasks(self, *, whole: bool) -> list[FilterTask]:
        config = self.plan.config.filter
        if config is None:
            return []
        ingest, folder = self._ingest_folder(), self._filter_folder()
        return [FilterTask(config=config, part=part, ingest=ingest, folder=folder) for part in self.parts(whole=whole)]

    def filter(self) -> None:
        config = self.plan.config.filter
        if config is not None and any(read_state(task) is None for task in self.tasks(whole=False)):
            check_languages(config.language)  # 1 s, before hours of reading
        self.ingest()
        with self._timed("filter"):
            todo = [task for task in self.filter_tasks(whole=False) if not is_filtered(task)]
            self._run(filter_part, todo, [task.part.bytes for task in todo], "filtering")

    def _signature_tasks(self, *, whole: bool) -> list[SignatureTask]:
        config = self.plan.config.dedup
        if config is None or not config.near:
            return []
        selection, folder = self.selection(deduplicated=False), self._signature_folder()
        return [
            SignatureTask(
                part=part,
                selection=selection,
                shingle_words=config.shingle_words,
                threshold=config.threshold,
                folder=folder,
            )
            for part in self.parts(whole=whole)
        ]

    def sign(self) -> None:
        self.filter()
        with self._timed("sign"):
            todo = [task for task in self._signature_tasks(whole=False) if not is_signed(task)]
            self._run(sign_part, todo, [task.part.bytes for task in todo], "signing")

    # Stages over everything.

    def join(self) -> Join:
        """What the dedup stage joins. DataError if a part is not filtered or signed yet."""
        config = self.plan.config.dedup
        assert config is not None, "there is no dedup section"
        for filtering in self.filter_tasks(whole=True):
            finished(is_filtered(filtering) or None, f"filtering of part {filtering.part.name}")
        for signing in self._signature_tasks(whole=True):
            finished(is_signed(signing) or None, f"signing of part {signing.part.name}")
        return Join(
            config=config,
            parts=tuple(self.parts(whole=True)),
            selection=self.selection(deduplicated=False),
            signatures=self._signature_folder() if config.near else None,
            folder=self.dedup_folder(),
        )

    def dedup(self) -> None:
        self.sign()
        if self.plan.config.dedup is None:
            return
        with self._timed("dedup"):
            task = self.join()
            if not dedup.is_joined(task.folder):
                dedup.join(task, self.workers)

    def tokenizer_folder(self) -> Path:
        """The folder that holds tokenizer.model and tokenizer.json, once they are made; nothing for bytes."""
        settings = self.plan.tokenizer_settings()
        if self.plan.external_model is not None:
            return stage_folder(self.plan.work, "tokenizer", settings)
        names = [part.name for part in self.parts(whole=True)]
        before = [settings, self.plan.validation_fraction, self._after_dedup(), names]
        return stage_folder(self.plan.work, "tokenizer", before, self._version("sentencepiece"))

    def tokenizer(self) -> Path | None:
        """Trains or copies the model, after all stages before it; the model, None for bytes."""
        self.dedup()
        if self.plan.external_model is not None or self.plan.config.tokenizer.type == "bytes":
            return self._given_model()
        with self._timed("tokenizer"):
            if not any(part.split == "train" for part in self.parts(whole=True)):
                raise self._nothing_to_train_on()
            return self._model_file(self._train if self.plan.config.tokenizer.has_model else self._find_symbols)

    def _given_model(self) -> Path | None:
        """A copy of the model that is there already, so that it stays the same until the end; None for bytes."""
        external = self.plan.external_model
        return None if external is None else self._model_file(external.read_bytes)

    def _model_file(self, make: Callable[[], bytes]) -> Path:
        """tokenizer.model, made unless it is there, and its record, which comes last."""
        model = self.tokenizer_folder() / TOKENIZER_FILE
        record = model.with_name(TOKENIZER_RECORD)
        if not record.exists():
            content = make()
            self._check_model(content)
            write_file(model, content)
            body = {"sha256": sha256_file(model), "settings": self.plan.tokenizer_settings()}
            write_file(record, (json.dumps(body, indent=2) + "\n").encode("ascii"))
        return model

    def _train(self) -> bytes:
        sampled = frozenset(source.name for source in self.plan.sources[: self.plan.config.tokenizer.sample_files])
        sources = []
        for batch in self.batches(whole=True):
            parts = [part for part in batch.parts if part.split == "train" and sampled & dict(part.files).keys()]
            sources.append(SampleSource(parts=tuple(parts), files=sampled))
        task = TrainTask(
            sources=tuple(sources),
            selection=self.selection(deduplicated=True),
            config=self.plan.config.tokenizer,
            validation_fraction=self.plan.validation_fraction,
        )
        return self.workers.alone(train_on_sample, task)

    def _find_symbols(self) -> bytes:
        """The byte values that occur in any split, in rising order."""
        counts, selection = np.zeros(BYTE_VALUES, np.int64), self.selection(deduplicated=True)
        for part in self.parts(whole=True):
            for _, data in selection.documents(part):
                counts += np.bincount(np.frombuffer(data, np.uint8), minlength=BYTE_VALUES)
        return symbols_of(counts, self.plan.config.tokenizer)

    def _check_model(self, model: bytes) -> None:
        if not self.plan.config.tokenizer.has_model:
            return
        name = str(self.plan.external_model or TOKENIZER_FILE)
        check_vocab_size(TextTokenizer(model, name=name), self.plan.config.tokenizer, name)

    # Ids and shards.

    def _recipe(self, model: Path | None) -> IdRecipe:
        return IdRecipe(model=model, settings=self.plan.config.tokenizer)

    def _encode_folder(self, model: Path | None) -> Path:
        settings = [*self._recipe(model).key(), self._version("sentencepiece"), self.plan.validation_fraction]
        return stage_folder(self.plan.work, "encode", settings, self._after_dedup())

    def _encode_tasks(self, model: Path | None, *, whole: bool) -> list[EncodeTask]:
        if self.plan.config.dedup is not None:
            finished(dedup.is_joined(self.dedup_folder()) or None, "removal of duplicates")
        selection, folder = self.selection(deduplicated=True), self._encode_folder(model)
        return [
            EncodeTask(
                part=part,
                selection=selection,
                recipe=self._recipe(model),
                validation_fraction=self.plan.validation_fraction,
                folder=folder,
            )
            for part in self.parts(whole=whole)
        ]

    def encode(self, model: Path | None) -> None:
        """Tokenises the parts of this slice; the stages before must be done."""
        with self._timed("encode"):
            todo = [task for task in self._encode_tasks(model, whole=False) if not is_encoded(task)]
            self._run(encode_part, todo, [task.part.bytes for task in todo], "tokenising")

    def publish_tokenizer(self, model: Path) -> None:
        """Puts a model into the output; data that another one made go."""
        folder = stage_folder(self.plan.work, "publish")
        for path in (model, model.with_name(TOKENIZER_RECORD)):
            shutil.copyfile(path, folder / path.name)
        publish(folder, self.plan.output, force=self.force)

    def shard(self, model: Path | None) -> None:
        """Encodes what is left, writes the shards and the manifest, and publishes them."""
        self.encode(model)
        with self._timed("shard"):
            encoded = self._encode_folder(model)
            tokenizer = self._recipe(model).entry()
            tasks = self._shard_tasks(encoded, dtype_name(tokenizer.vocab_size))
            if not any(task.split == "train" for task in tasks):
                raise self._nothing_to_train_on()
            todo = [task for task in tasks if read_entry(task) is None]
            self._run(write_shard, todo, [task.tokens for task in todo], "writing shards")
            folder = tasks[0].folder
            if model is not None:
                shutil.copyfile(model, folder / TOKENIZER_FILE)
                shutil.copyfile(model.with_name(TOKENIZER_RECORD), folder / TOKENIZER_RECORD)
            write_data_manifest(self, folder, encoded, tokenizer, tasks)
            publish(folder, self.plan.output, force=self.force)

    def _nothing_to_train_on(self) -> DataError:
        reasons = sorted({reason for state in self.states(whole=True) for reason in state.rejected})
        return DataError(
            "the input holds no document for the train split; check `input`, `validation_fraction`, `filter` and the "
            f"raw files (quarantined: {', '.join(reasons) or 'nothing'})"
        )

    def _shard_tasks(self, encoded: Path, dtype: str) -> list[ShardTask]:
        parts, settings = self.parts(whole=True), self.plan.config.shard
        names = [part.name for part in parts]
        folder = stage_folder(self.plan.work, "shards", stage_key(encoded), settings.model_dump(mode="json"), names)
        return [
            ShardTask(
                name=f"{split}-{number:05d}",
                split=split,
                pieces=pieces,
                tokens=tokens,
                encoded=encoded,
                folder=folder,
                dtype=dtype,
                tokens_per_member=settings.tokens_per_member,
            )
            for split in self.plan.splits
            for number, (pieces, tokens) in enumerate(cut_shards(parts, encoded, split, settings.tokens_per_shard))
        ]
