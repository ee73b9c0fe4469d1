"""An export, or what transformers saved after fine-tuning one, back as configuration, weights and tokenizer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from common.errors import ConfigError, UserError
from data_prep.shards.manifest_records import TokenizerEntry
from model.config import ModelConfig
from model.parameters import owner_of, parameter_specs
from pretrain.checkpoint.folder import CONVERTED, check_not_converted
from pretrain.checkpoint.tokenizer_file import StoredTokenizer
from pretrain.checkpoint.weights import WeightsOrigin
from pretrain.config.loading import parse_config
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.data.stages import Stage
from pretrain.export.folder import CONFIG, INDEX, ORIGIN, WEIGHTS
from pretrain.export.hf_config import DOCUMENT_END, model_config
from pretrain.export.tokenizer_config import stored_tokenizer


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An opened export."""

    folder: Path
    config: Config
    """Of the run, without places on its machine; of a folder without training.json the defaults with its model."""
    tensors: dict[str, Callable[[], Tensor]]
    """By canonical name, a tied output layer excepted: functions that read a whole parameter, as fp32."""
    tokenizer: StoredTokenizer
    origin: dict[str, Any] | None
    """The content of training.json."""

    def weights_origin(self) -> WeightsOrigin:
        """What a checkpoint of these weights records (`write_weights`). Of a folder without training.json, which
        transformers saved, steps and losses are not known."""
        source, known = f"the export {self.folder.name}", self.origin
        if known is None:
            return WeightsOrigin(config=self.config, source=source, tokenizer=self.tokenizer)
        return WeightsOrigin(
            config=self.config,
            source=source,
            tokenizer=self.tokenizer,
            manifest_digest=known["data_digest"],
            progress=progress_of(known, self.config),
            loss=known["loss"],
            validation_loss=known["validation_loss"],
        )


def progress_of(origin: dict[str, Any], config: Config) -> Progress:
    """How far the run was, by training.json. Of an export from before it had stages, they are not known."""
    sequences, length = origin["sequences"], config.model.sequence_length
    tokens = origin.get("tokens", sequences * length)
    stages = tuple(map(Stage.from_json, origin.get("stages", ())))
    return Progress(origin["step"], sequences, stages=stages, extra_tokens=tokens - sequences * length)


def is_export(folder: Path) -> bool:
    """Whether a folder looks like one that `open_export` reads."""
    has_weights = (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()
    return has_weights and (folder / CONFIG).is_file() and not (folder / CONVERTED).exists()


def open_export(folder: Path) -> Exported:
    """Opens a folder that launch/export.py, or transformers' save_pretrained, wrote. Names, shapes and dtypes of all
    tensors are checked without reading them. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name one that launch/export.py wrote")
    check_not_converted(folder, "SOURCE")
    origin = _origin(folder)
    text = _text(folder / CONFIG)
    run = _run_of_none(text) if origin is None else dict(origin["config"])
    model = model_config(text, str(folder / CONFIG), run.get("model"))
    try:
        config = parse_config({**run, "model": model.model_dump(mode="json")})
    except ConfigError as error:
        raise UserError(f"{folder / ORIGIN}: another version wrote its configuration ({error})") from None
    tokenizer = stored_tokenizer(folder, None if origin is None else origin["tokenizer"])
    if tokenizer.entry.vocab_size > model.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.entry.vocab_size} pieces, the model {model.vocab_size}; they do "
            f"not belong together"
        )
    return Exported(folder=folder, config=config, tensors=_tensors(folder, model), tokenizer=tokenizer, origin=origin)


def _run_of_none(text: str) -> dict[str, Any]:
    """What config.json, with content `text`, says of the run where there is no training.json: how its text is seen."""
    with contextlib.suppress(ValueError, AttributeError, RecursionError):  # `model_config` says what is wrong with it
        return {"data": {"document_mask": json.loads(text).get(DOCUMENT_END) is not None}}
    return {}


def _origin(folder: Path) -> dict[str, Any] | None:
    path = folder / ORIGIN
    if not path.exists():
        return None
    tree = _json(path)
    try:
        _check_origin(tree)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        raise UserError(f"{path} is not of an export; restore it, or remove it to import without it") from None
    return dict(tree)


def _check_origin(tree: Any) -> None:
    """Raises one of several errors unless what is read of training.json is there and of its type."""
    for name in ("step", "sequences"):
        int(tree[name])
    int(tree.get("tokens", 0))
    for name in ("loss", "validation_loss"):
        if tree[name] is not None:
            float(tree[name])
    if not isinstance(tree["data_digest"], str | None):
        raise TypeError
    for stage in tree.get("stages", ()):
        Stage.from_json(stage).text()
    tree["config"]["model"].items()
    if tree["tokenizer"].get("kind") == "ids":
        TokenizerEntry.model_validate(tree["tokenizer"])
    if not isinstance(tree["tokenizer"]["sha256"], str | None):
        raise TypeError


def _tensors(folder: Path, model: ModelConfig) -> dict[str, Callable[[], Tensor]]:
    """Raises UserError for a tensor that is missing, unknown or of another shape."""
    shapes = {name: spec.shape for name, spec in parameter_specs(model).items() if owner_of(name, model) == name}
    places: dict[str, Path] = {}
    for path in _files(folder):
        for name, shape, dtype in _headers(path):
            if name != owner_of(name, model):
                continue  # a copy of the embedding
            if name not in shapes:
                raise UserError(f"{path}: has {name}, which this model has not; config.json and weights differ")
            if shape != shapes[name] or dtype not in ("F32", "BF16", "F16"):
                raise UserError(
                    f"{path}: {name} is {dtype} {list(shape)}, the model's is {list(shapes[name])}; config.json and "
                    f"weights differ"
                )
            places[name] = path
    if missing := next((name for name in shapes if name not in places), None):
        raise UserError(f"{folder}: its weights have no {missing}; export the model again")
    return {name: (lambda name=name: _read(places[name], name)) for name in shapes}  # type: ignore[misc]


def _files(folder: Path) -> list[Path]:
    """As transformers chooses: one file goes before an index, which its save_pretrained leaves behind."""
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return [folder / WEIGHTS]
    tree = _json(folder / INDEX)
    try:
        files = sorted(set(tree["weight_map"].values()))
        if any(Path(name).name != name for name in files):
            raise ValueError
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{folder / INDEX} is no index of weights; export the model again") from None
    return [folder / name for name in files]


def _headers(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of the tensors of a file."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            return [(name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()]
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); export the model again") from None


def _read(path: Path, name: str) -> Tensor:
    with safetensors.safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor.float()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; name a folder that launch/export.py wrote") from None
    except ValueError as error:
        raise UserError(f"{path} is no text in UTF-8 ({error}); export the model again") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); export the model again") from None
