"""One preparation: its settings, the share of this process, and what its stages have left on disk.

A stage's folder is named after its settings, the versions of the packages that it uses and the folder of the stage
before, so a result in it is valid, whichever process made it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from common.errors import DataError
from common.splits import SplitName
from data_prep.config.resolved import ResolvedConfig
from data_prep.config.versions import versions
from data_prep.raw.documents import ID_FORMATS
from data_prep.raw.locations import identity, size_and_stamp
from data_prep.shards.format import TOKENIZER_FILE
from data_prep.stages.id_maker import IdRecipe
from data_prep.stages.ingest import (
    BatchState,
    FileState,
    IngestTask,
    cut_batches,
    ingest_folder,
    ingest_tasks,
    read_state,
)
from data_prep.stages.model_file import ModelTask, has_model, write_model
from data_prep.stages.part_cutter import Encoding
from data_prep.stages.selection import Selection
from data_prep.work.folder import decided, finished, stage_folder, stage_key
from data_prep.work.parts import Part


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The batches of raw files that one SLURM array task takes: those whose position leaves `task` when divided by
    `tasks`."""

    task: int = 0
    tasks: int = 1

    def holds(self, position: int) -> bool:
        """Whether the batch at a position of the reading order is in the slice."""
        return position % self.tasks == self.task

    @property
    def is_all(self) -> bool:
        """Whether this process prepares everything."""
        return self.tasks == 1


@dataclass
class Preparation:
    """What stages are told. In its methods `all_slices` asks for the tasks of all slices, not of this one alone."""

    resolved: ResolvedConfig
    slice: Slice = Slice()
    takes_published_model: bool = False
    """Whether the tokenizer is the one that `tokenizer` left in the output, and is not made anew."""
    _states: dict[str, BatchState] = field(default_factory=dict)

    # What the stages have left.

    def batches(self, *, all_slices: bool) -> list[IngestTask]:
        """The batches of raw files."""
        return [task for position, task in enumerate(self._all_batches) if all_slices or self.slice.holds(position)]

    def batch_states(self, *, all_slices: bool) -> list[BatchState]:
        """What ingest found in the batches. DataError if one is not ingested yet."""
        for task in self.batches(all_slices=all_slices):
            if task.key not in self._states:
                self._states[task.key] = finished(read_state(task), f"ingest of {task.files[0].raw}")
        return [self._states[task.key] for task in self.batches(all_slices=all_slices)]

    def file_states(self, *, all_slices: bool) -> list[FileState]:
        """What ingest found in the raw files."""
        return [file for batch in self.batch_states(all_slices=all_slices) for file in batch.files]

    def parts(self, *, all_slices: bool) -> list[Part]:
        """The parts in reading order."""
        return [part for batch in self.batch_states(all_slices=all_slices) for part in batch.parts]

    def selection(self, *, deduplicated: bool) -> Selection:
        """The documents left by the filters, and by removal of duplicates if asked."""
        config = self.resolved.config
        return Selection(
            ingest=self.ingest_folder(),
            filter=self.filter_folder() if config.filter else None,
            dedup=self.dedup_folder() if config.dedup and deduplicated else None,
            clean_lines=bool(config.filter and config.filter.c4_lines),
        )

    @cached_property
    def _all_batches(self) -> list[IngestTask]:
        encoding = None
        if self._encodes_while_reading:
            recipe = self._recipe(self._copied_model())
            encoding = Encoding(
                recipe=recipe,
                validation_fraction=self.resolved.validation_fraction,
                folder=self._folder_of_ids(recipe),
            )
        return ingest_tasks(self.resolved, encoding)

    @cached_property
    def _encodes_while_reading(self) -> bool:
        """Whether ingest makes the ids and stores no text. False if there are fewer batches of raw files than workers,
        because stored text is divided into smaller parts. The first run decides it for all runs and array tasks,
        however many workers they have."""
        if self.resolved.config.format in ID_FORMATS:  # there is no text to store
            return True
        if not self.resolved.may_encode_while_reading:
            return False
        sources = self.resolved.sources
        folder = stage_folder(self.resolved.work, "reading", [identity(source.path) for source in sources])
        batches = cut_batches([(source.split, size_and_stamp(source.path)[0]) for source in sources])
        return decided(folder / "encodes", len(batches) >= self.resolved.workers)

    # The tokenizer.

    @property
    def model(self) -> Path | None:
        """The tokenizer's file, once it is made; None for bytes and ids, which have none."""
        if not self.resolved.config.tokenizer.has_file:
            return None
        folder = self.resolved.output if self.takes_published_model else self.tokenizer_folder()
        return folder / TOKENIZER_FILE

    @property
    def recipe(self) -> IdRecipe:
        """How documents become ids."""
        return self._recipe(self.model)

    def _recipe(self, model: Path | None) -> IdRecipe:
        config = self.resolved.config
        return IdRecipe(
            model=model,
            settings=config.tokenizer,
            takes_ids=config.format in ID_FORMATS,
            eos_id=config.end_of_document if config.tokenizer.type == "ids" else None,
        )

    def given_model(self) -> ModelTask:
        """The task of copying the model that is there already."""
        return ModelTask(
            folder=self.tokenizer_folder(),
            config=self.resolved.config.tokenizer,
            settings=self.resolved.tokenizer_settings(),
            given=self.resolved.external_model,
            training=None,
        )

    def _copied_model(self) -> Path | None:
        """A copy of the given model, made unless it is there; None for bytes."""
        if self.resolved.external_model is None:
            return None
        task = self.given_model()
        if not has_model(task):
            write_model(task)
        return task.model

    # Folders: the settings of a stage, the versions of its packages and the key of the stage before.

    def ingest_folder(self) -> Path:
        """Parts, quarantine and states of the batches."""
        return ingest_folder(self.resolved, encodes=self._encodes_while_reading)

    def filter_folder(self) -> Path:
        assert self.resolved.config.filter is not None, "there is no filter section"
        settings = self.resolved.config.filter.settings()
        before = stage_key(self.ingest_folder())
        return stage_folder(self.resolved.work, "filter", settings, self._version("py3langid"), before)

    def signature_folder(self) -> Path:
        """MinHash signatures."""
        config = self.resolved.config.dedup
        assert config is not None, "there is no dedup section"
        settings = [config.shingle_words, config.threshold, self._version("rensa"), self._before_dedup()]
        return stage_folder(self.resolved.work, "signatures", settings)

    def dedup_folder(self) -> Path:
        """Verdicts of the removal of duplicates."""
        config = self.resolved.config.dedup
        assert config is not None, "there is no dedup section"
        settings = config.model_dump(mode="json", exclude={"samples", "memory_bytes"})
        before = self._before_dedup()
        return stage_folder(self.resolved.work, "dedup", settings, self._version("rensa"), before, self._part_names())

    def tokenizer_folder(self) -> Path:
        """tokenizer.model and tokenizer.json; nothing for bytes."""
        settings = self.resolved.tokenizer_settings()
        if self.resolved.external_model is not None:
            return stage_folder(self.resolved.work, "tokenizer", settings)
        before = [settings, self.resolved.validation_fraction, self._after_dedup(), self._part_names()]
        return stage_folder(self.resolved.work, "tokenizer", before, self._version("sentencepiece"))

    def encode_folder(self) -> Path:
        """Ids of the parts."""
        return self._folder_of_ids(self.recipe)

    def shard_folder(self) -> Path:
        """Shards, indexes, and what is published with them."""
        settings = self.resolved.config.shard.model_dump(mode="json")
        key = stage_key(self.encode_folder())
        return stage_folder(self.resolved.work, "shards", key, settings, self._part_names())

    def _folder_of_ids(self, recipe: IdRecipe) -> Path:
        settings = [*recipe.key(), self._version("sentencepiece"), self.resolved.validation_fraction]
        return stage_folder(self.resolved.work, "encode", settings, self._after_dedup())

    def _before_dedup(self) -> str:
        return stage_key(self.filter_folder() if self.resolved.config.filter else self.ingest_folder())

    def _after_dedup(self) -> str:
        return stage_key(self.dedup_folder()) if self.resolved.config.dedup else self._before_dedup()

    def _part_names(self) -> list[str]:
        return [part.name for part in self.parts(all_slices=True)]

    def _version(self, package: str) -> str | None:
        """The version of a package, if this config uses it: what another version made is made again."""
        return versions(self.resolved).get(package)

    def need_train(self, splits: Sequence[SplitName]) -> None:
        """Raises DataError, with what may be the reason, unless there is something for the train split."""
        if "train" in splits:
            return
        reasons = sorted({reason for state in self.file_states(all_slices=True) for reason in state.rejected})
        raise DataError(
            "the input holds no document for the train split; check `input`, `validation_fraction`, `filter` and the "
            f"raw files (quarantined: {', '.join(reasons) or 'nothing'})"
        )
