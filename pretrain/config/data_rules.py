"""Rules of the data section, and the names and weights of its sources."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import PurePosixPath

from common.errors import ConfigError
from common.urls import URL, may_hold_secret, without_secrets
from pretrain.config.schema import Config

LARGEST_PERIOD = 10_000
"""The longest period of a schedule, in positions; it takes about 0.1 s to compute."""


def check_data(config: Config) -> None:
    """Mixtures need a short schedule and names; memory needs contiguous text."""
    data = config.data
    if not all(location.strip() for location in data.locations):  # which would mean the current folder
        raise ConfigError(
            f"data.{'sources' if data.sources else 'manifest'}: the place of a data set is empty; set it to the "
            f"folder that data_prep wrote"
        )
    names = source_names(config)
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ConfigError(f"data.sources: two sources are called {repeated}; give each a `name` of its own")
    period = sum(whole_weights([source.weight for source in data.sources])) if data.sources else 1
    if period > LARGEST_PERIOD:
        raise ConfigError(
            f"data.sources: the weights add up to {period} in whole numbers, but the schedule has at most "
            f"{LARGEST_PERIOD} positions; round them, e.g. to shares with three decimals"
        )
    for location in data.locations:
        if URL.match(location) and may_hold_secret(location):
            raise ConfigError(
                f"data.{'sources' if data.sources else 'manifest'}: the URL of {without_secrets(location)} has a "
                f"password or a query, which the files of a run would keep; leave it out and give credentials in the "
                f"environment or in fsspec's own configuration"
            )
        if URL.match(location) and data.cache_dir is None:
            raise ConfigError(
                f"data.cache_dir: {location} is a URL; name a folder on a disk of each node for its shards"
            )
        if URL.match(location) and data.verify == "full":
            raise ConfigError(
                f"data.verify: full would fetch every shard of {location} at start, and each is hashed when it is "
                f"fetched; set it to size"
            )
    if data.document_mask and config.model.position.type != "rope":
        raise ConfigError(
            "data.document_mask: Transformer-XL positions and memory reach across documents on purpose; set it to "
            "false, or model.position.type to rope"
        )
    if data.document_mask and config.model.memory_length:
        raise ConfigError(
            f"data.document_mask: memory reaches across documents on purpose; set it to false, or "
            f"model.position.memory_chunks to 0 (it is {config.model.position.memory_chunks})"
        )
    attention = config.model.attention
    if data.document_mask and (reason := attention.lacks.get("documents")) is not None:
        raise ConfigError(
            f"data.document_mask: model.attention.type is {attention.type}: {reason}; set data.document_mask to false"
        )
    if data.document_mask and config.parallel.pipeline > 1:
        raise ConfigError(
            f"data.document_mask: no document index travels between pipeline stages; set it to false, or "
            f"parallel.pipeline to 1 (it is {config.parallel.pipeline})"
        )
    _check_order(config)


def whole_weights(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the ratio of the weights as written in decimal, e.g. [0.7, 0.3] -> [7, 3]."""
    fractions = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    whole = [int(fraction * scale) for fraction in fractions]
    common = math.gcd(*whole)
    return [weight // common for weight in whole]


def _check_order(config: Config) -> None:
    """Streams are contiguous text of one data set."""
    data = config.data
    if data.max_tokens is not None and data.sources:
        raise ConfigError(
            "data.max_tokens: limits one data set, not a mixture of data.sources; set it to null and lower the weight "
            "of a source, or prepare fewer of its raw files"
        )
    if not config.reads_streams:
        return
    has_memory = config.model.memory_length > 0
    reason = "memory reads contiguous streams" if has_memory else "data.order is streams"
    otherwise = "model.position.memory_chunks to 0" if has_memory else "data.order to shuffled"
    if data.order == "shuffled":
        raise ConfigError(f"data.order: {reason}, nothing is shuffled; set it to streams, or {otherwise}")
    if len(data.sources) > 1:
        raise ConfigError(
            f"data.sources: {reason}, which are cut from one data set; name one source, or set {otherwise}"
        )
    if data.shuffle_block_windows:
        raise ConfigError(f"data.shuffle_block_windows: {reason}, nothing is shuffled; set it to 0, or {otherwise}")


def source_names(config: Config) -> list[str]:
    """Names of data.sources: as given, or the folders'."""
    return [source.name or folder_name(source.manifest) for source in config.data.sources]


def folder_name(manifest: str) -> str:
    """Name of the folder of a manifest, which is given as the folder or as the file in it."""
    path = PurePosixPath(manifest)
    return (path.parent if path.suffix == ".json" else path).name
