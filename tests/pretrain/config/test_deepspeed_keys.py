"""The `deepspeed` section against DeepSpeed's own configuration: every key is passed on with an effect, or refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from pretrain.config import deepspeed_keys
from pretrain.config.deepspeed_keys import BREAKS, EXTRA, LEAVES, NO_EFFECT, OWNED, REMOVED
from pretrain.config.keys import flatten
from pretrain.config.loading import load_config
from pretrain.config.rules import check_device
from pretrain.engine import zero_1
from pretrain.engine.deepspeed_json import deepspeed_json

TINY = Path(__file__).resolve().parents[3] / "configs" / "switchall_tiny.json"
TABLES = (OWNED, NO_EFFECT, BREAKS, EXTRA)


class Asked(dict):
    """An empty configuration that remembers which keys DeepSpeed asked for."""

    def __init__(self, names: set[str]) -> None:
        super().__init__(train_micro_batch_size_per_gpu=1)
        self.names = names

    def __copy__(self) -> Asked:
        return self

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)

    def keys(self) -> Any:
        return self  # `name in config.keys()` asks too

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()


def known(key: str) -> bool:
    """Whether a table has `key`, or keys below it."""
    return any(key in table or any(name.startswith(f"{key}.") for name in table) for table in TABLES)


def test_every_key_that_deepspeed_reads_is_in_a_table() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    names: set[str] = set()
    DeepSpeedConfig(Asked(names))
    assert {"zero_optimization", "gradient_clipping", "flops_profiler", "wandb"} <= names  # it listens
    unknown = sorted(name for name in names - set(REMOVED) if not known(name))
    assert not unknown, f"DeepSpeed reads keys that no table of pretrain/config/deepspeed_keys.py has: {unknown}"


def test_every_zero_key_is_in_exactly_one_table_with_its_type() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig

    names = {name for name in DeepSpeedZeroConfig.model_fields}
    names |= {field.alias for field in DeepSpeedZeroConfig.model_fields.values() if field.alias}
    names = names - {"leaf_module"} | {f"leaf_module.{name}" for name in DeepSpeedZeroLeafModuleConfig.model_fields}
    for name in names:
        assert sum(f"zero_optimization.{name}" in table for table in TABLES) == 1, name
    ours = {key.removeprefix("zero_optimization.") for table in TABLES for key in table if key.startswith("zero_opt")}
    assert ours == names, "a key that DeepSpeed's ZeRO configuration has not"


def test_every_key_of_other_sections_is_deepspeeds() -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, WandbConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    models: dict[str, Any] = {
        "comms_logger": CommsLoggerConfig,
        "csv_monitor": CSVConfig,
        "wandb": WandbConfig,
        "comet": CometConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
    }
    for section, model in models.items():
        keys = {key.removeprefix(f"{section}.") for key in (*EXTRA, *NO_EFFECT) if key.startswith(f"{section}.")}
        assert keys == set(model.model_fields), section


def test_what_deepspeed_removed_is_refused() -> None:
    from deepspeed.runtime import config

    removed = {*config._REMOVED_TOP_LEVEL_CONFIG_KEYS}
    removed |= {f"zero_optimization.{key}" for key in config._REMOVED_ZERO_CONFIG_KEYS}
    assert removed == set(REMOVED) | (removed & set(OWNED))
    for key in removed:
        with pytest.raises(ConfigError, match=f"deepspeed.{key}: "):
            load_config(TINY, [f'deepspeed.{key}={{"enabled":true}}'])


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_every_key_that_we_set_is_refused_by_name() -> None:
    """deepspeed_json writes `x.y`: then `x.y` or `x` is in OWNED, or a user's value would silently win over ours. Or it
    is a default of ours, which the user may change."""
    overrides = (
        ["parallel.zero=0"],
        ["train.precision=bf16", "parallel.offload_optimizer=true"],
        ["train.precision=fp16"],
        ["parallel.pipeline=2"],
    )
    written = {key for case in overrides for key in leaves(deepspeed_json(load_config(TINY, case), 1))}
    assert {"bf16.enabled", "fp16.enabled", "pipeline.pipe_partitioned", "zero_optimization.stage"} <= written
    defaults = {"zero_optimization.reduce_bucket_size", "timers.throughput.enabled"}
    assert defaults <= written & EXTRA.keys()
    for key in written - defaults:
        names = key.split(".")
        assert any(".".join(names[: depth + 1]) in OWNED for depth in range(len(names))), key


VALUES = {
    bool: True,
    deepspeed_keys.Names: ["all_reduce"],
    deepspeed_keys.LeafClasses: ["SigmaMoE", "model.attention.dense.DenseAttention"],
    deepspeed_keys.LeafNames: ["blocks.10.feedforward"],
    deepspeed_keys.LeafSuffixes: ["attention", "3.feedforward"],
    str: "text",
    deepspeed_keys.Level: "info",
}


@pytest.mark.parametrize("key", sorted(EXTRA))
def test_every_extra_key_is_passed_on_and_taken_by_deepspeed(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    monkeypatch.setattr(deepspeed_keys.importlib.util, "find_spec", lambda name: name)
    extra = EXTRA[key]
    value = VALUES.get(extra.type, "create" if key == "comet.mode" else 2)
    stage = f"parallel.zero={extra.stages[0]}"
    printed = ["deepspeed.log_level=info", "deepspeed.comms_logger.verbose=true"]
    others = [*(printed if key in deepspeed_keys.PRINTED else ()), stage]
    derived = deepspeed_json(load_config(TINY, [*others, f"deepspeed.{key}={json.dumps(value)}"]), 1)
    # Beside our own keys of its section, all of which stay.
    assert flatten(derived) == flatten(deepspeed_json(load_config(TINY, others), 1)) | {key: value}
    DeepSpeedConfig(derived)
    for wrong in ("null", '"wrong"' if extra.type is not str else "1", "-7", "[1]", '{"a":1}'):
        with pytest.raises(ConfigError, match=rf"^deepspeed\.{key.replace('.', '[.]')}: .*\(given .*\); correct it"):
            load_config(TINY, [f"deepspeed.{key}={wrong}", stage])


@pytest.mark.parametrize("key", sorted({key.rpartition(".")[0] for key in EXTRA if "." in key}))
@pytest.mark.parametrize("value", ["null", "true", "[]", "7"])
def test_a_section_is_an_object(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"^deepspeed\.{key.replace('.', '[.]')}: must be an object of extra keys"):
        load_config(TINY, [f"deepspeed.{key}={value}"])


@pytest.mark.parametrize("key", sorted((*OWNED, *NO_EFFECT)))
@pytest.mark.parametrize("value", ["null", "0", '{"enabled":true}'])
def test_keys_without_an_effect_are_refused_whatever_their_value(key: str, value: str) -> None:
    """Also null: DeepSpeed took it for the key left out, or fell over it."""
    with pytest.raises(ConfigError, match=rf"^deepspeed\.{key.replace('.', '[.]')}"):
        load_config(TINY, [f"deepspeed.{key}={value}"])


@pytest.mark.parametrize("key", sorted(BREAKS))
def test_keys_with_which_no_run_works_may_be_off(key: str) -> None:
    """As they are by default: a checkpoint may have it in its configuration."""
    off = "false" if key.endswith("gradients") else "0"
    load_config(TINY, [f"deepspeed.{key}={off}"])
    for value in ("null", "true", "7", '{"enabled":true}'):
        with pytest.raises(ConfigError, match=rf"^deepspeed\.{key.replace('.', '[.]')}: does not work here"):
            load_config(TINY, [f"deepspeed.{key}={value}"])


@pytest.mark.parametrize(
    "override, words",
    [
        ("zero_optimization.overlap_com=true", "the nearest known key is deepspeed.zero_optimization.overlap_comm"),
        ("overlap_comm=true", "the nearest known key is deepspeed.zero_optimization.overlap_comm"),
        ("flops_profile.enabled=true", "no such key; the nearest known key is deepspeed.flops_profiler"),
        ("zero_optimisation.overlap_comm=true", "no such key; the nearest known key is deepspeed.zero_optimization"),
        (
            "gradient_clippping=1",
            "deepspeed.gradient_clippping: DeepSpeed 0.19.8 has no such key; the nearest known key is "
            "deepspeed.gradient_clipping, which is decided by optimizer.clip_norm; remove this key",
        ),
        ("stage=2", "deepspeed.zero_optimization.stage, which is decided by parallel.zero; remove this key"),
        ("foo=3", "deepspeed.foo: DeepSpeed 0.19.8 has no such key; remove this key"),
        ('zero_optimization.reduce_bucket_size="big"', 'valid integer (given "big"); correct it or remove this key'),
        ("zero_optimization.reduce_bucket_size=0", "greater than 0 (given 0)"),
        ("zero_optimization.reduce_bucket_size=1.5", "(given 1.5)"),
        ("zero_optimization.reduce_bucket_size=true", "(given true)"),
        (
            "zero_optimization.stage3_max_live_parameters=5",
            "only with parallel.zero = 3, but it is 1; remove this key, or set parallel.zero to 3",
        ),
        ("checkpoint.tag_validation=fail", "deepspeed.checkpoint: has no effect here (is for DeepSpeed's own check"),
        ("comet.api_key=x", "deepspeed.comet.api_key: has no effect here (is a secret"),
        ("pipeline.partition=best", "deepspeed.pipeline.partition: has no effect here (it is decided by parallel.pipe"),
        ("wandb.enabled=true", "deepspeed.wandb.enabled: needs the package wandb, which is not installed"),
        ("zero_optimization.allgather_bucket_size=7", "multiple of 2 (given 7)"),
        ("zero_optimization.stage3_module_granularity_threshold=9", "does not work here (it gathers whole blocks at"),
        ("zero_optimization.round_robin_gradients=true", "a checkpoint would hold other weights than the model's"),
        ('zero_optimization.leaf_module.classes=["Block"]', "SigmaMoE|DenseFeedForward|SwiGLU)$' (given"),
        ('zero_optimization.leaf_module.names=["blocks.0"]', '(given ["blocks.0"])'),
        ('zero_optimization.leaf_module.name_suffixes=["norm"]', '(attention|feedforward)$\' (given ["norm"])'),
        ("log_level=loud", "'debug', 'info', 'warning', 'error' or 'critical' (given \"loud\")"),
    ],
)
def test_refusals(override: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_keys.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as refusal:
        load_config(TINY, [f"deepspeed.{override}"])
    assert words in str(refusal.value) and "\n" not in str(refusal.value), str(refusal.value)


def test_leaves_are_the_layers_that_there_are() -> None:
    from model.layers import ATTENTIONS, FEEDFORWARDS

    layers = {layer.__name__ for layer in (*ATTENTIONS.values(), *FEEDFORWARDS.values())}
    assert layers == {*LEAVES}, "name the layer in LEAVES of pretrain/config/deepspeed_keys.py"


def test_what_quantizes_on_gpus_alone() -> None:
    config = load_config(TINY, ["deepspeed.zero_optimization.zero_quantized_weights=true", "parallel.zero=3"])
    with pytest.raises(ConfigError, match=r"^deepspeed\.zero_optimization\.zero_quantized_weights: needs CUDA"):
        check_device(config, "cpu")
    check_device(config, "cuda")


def test_refusals_by_other_keys() -> None:
    with pytest.raises(ConfigError, match=r"overlap_comm: has no effect with parallel\.pipeline = 2"):
        load_config(TINY, ["deepspeed.zero_optimization.overlap_comm=true", "parallel.pipeline=2"])
    both = '{"max_reuse_distance": 1, "stage3_max_reuse_distance": 2}'
    with pytest.raises(ConfigError, match="is the same key as stage3_max_reuse_distance"):
        load_config(TINY, [f"deepspeed.zero_optimization={both}", "parallel.zero=3"])


def test_what_is_only_printed_needs_its_level() -> None:
    quiet: tuple[list[str], ...] = ([], ["deepspeed.log_level=warning"])
    for key, more in product(("memory_breakdown", "dump_state", "comms_logger.enabled"), quiet):
        with pytest.raises(ConfigError, match=rf"deepspeed\.{key}: is printed only at DeepSpeed's level info; set"):
            load_config(TINY, [f"deepspeed.{key}=true", *more])
    with pytest.raises(ConfigError, match=r"log_level to info and deepspeed\.comms_logger\.verbose to true"):
        load_config(TINY, ["deepspeed.comms_logger.enabled=true", "deepspeed.log_level=info"])


def test_sizes_as_deepspeeds_documentation_writes_them() -> None:
    config = load_config(TINY, ["deepspeed.zero_optimization.reduce_bucket_size=5e8"])
    assert deepspeed_json(config, 1)["zero_optimization"]["reduce_bucket_size"] == 5e8


def test_clipping_and_sums_of_gradients_by_stage_and_precision() -> None:
    """At stage 0 we clip by a norm of our own; sums are in fp32 but where bf16 is asked for; fp16 scales its loss."""

    def derived(*overrides: str) -> dict[str, Any]:
        return deepspeed_json(load_config(TINY, ["optimizer.clip_norm=0.75", *overrides]), 2)

    assert [derived(f"parallel.zero={stage}")["gradient_clipping"] for stage in (0, 1, 2, 3)] == [0.0, 0.75, 0.75, 0.75]
    plain, bf16, fp16 = (derived(f"train.precision={precision}") for precision in ("fp32", "bf16", "fp16"))
    assert not {"bf16", "fp16", "data_types", "communication_data_type"} & plain.keys()
    assert (bf16["communication_data_type"], bf16["data_types"]) == ("fp32", {"grad_accum_dtype": "fp32"})
    assert (fp16["communication_data_type"], fp16["fp16"]) == ("fp32", {"enabled": True, "loss_scale": 0})
    assert derived("train.precision=bf16", "parallel.reduce_dtype=bf16")["communication_data_type"] == "bf16"


def test_what_a_pipeline_is_told() -> None:
    """Nothing that travels is divided: under sequence parallelism each rank has its own part already. And bf16
    gradients join their fp32 sum at once, else all of them are kept besides."""
    derived = deepspeed_json(load_config(TINY, ["parallel.pipeline=2", "train.precision=bf16"]), 2)
    assert derived["pipeline"] == {"pipe_partitioned": False, "grad_partitioned": False}
    assert derived["bf16"] == {"enabled": True, "immediate_grad_update": True}
    assert not derived["zero_optimization"].keys() & zero_1.settings(2).keys()


@pytest.mark.parametrize(
    "keys, expected",
    [
        ((), True),
        (("parallel.zero=2",), False),
        (("parallel.zero=3",), False),
        (("train.precision=fp32",), False),
        (("train.precision=fp16",), False),
        (("parallel.pipeline=2",), False),  # DeepSpeed's engine of pipelines knows BF16_Optimizer by its type
        (("parallel.offload_optimizer=true",), False),  # DeepSpeed itself takes the ZeRO optimizer, by other settings
    ],
)
def test_where_the_zero_optimizer_stands_in_for_bf16s(keys: tuple[str, ...], expected: bool) -> None:
    config = load_config(TINY, ["train.precision=bf16", "parallel.zero=1", *keys])
    assert zero_1.is_used(config) == expected
    overlap = [deepspeed_json(config, size)["zero_optimization"].get("overlap_comm") for size in (1, 2)]
    assert overlap == ([False, True] if expected else [None, None]), "a rank alone needs no second buffer"
