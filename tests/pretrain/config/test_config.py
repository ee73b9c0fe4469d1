"""Configuration: overrides, refusals in one message, help, derived DeepSpeed JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from common.errors import ConfigError, UserError
from common.json_config import keys
from model.config import SigmaMoEConfig, SwitchHeadConfig
from model.kernels.backend import MOST_EXPERTS_IN_SETS
from pretrain.cli.train import keys_help
from pretrain.config.compile_rules import compile_decision
from pretrain.config.graph_rules import graph_decision
from pretrain.config.keys import flatten
from pretrain.config.loading import apply_override, inspect_config, load_config, parse_config, to_json
from pretrain.config.resume_rules import SavedRun, changes_since, free_keys
from pretrain.config.rules import check_device, check_ranks
from pretrain.config.schema import Config, KernelsConfig
from pretrain.engine.deepspeed_json import deepspeed_json

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "configs" / "switchall_tiny.json"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda p: p.stem)
def test_shipped_configs_are_valid_and_survive_a_round_trip(path: Path) -> None:
    config = load_config(path)
    assert config.description
    assert parse_config(json.loads(json.dumps(to_json(config)))) == config


def test_the_help_says_what_each_backend_of_the_kernels_is() -> None:
    said = " ".join(str(KernelsConfig.model_fields["backend"].description).split())
    for backend in get_args(KernelsConfig.model_fields["backend"].annotation):
        assert f"{backend}:" in said, backend
    assert f"at most {MOST_EXPERTS_IN_SETS} experts a head" in said  # `sets` had been F.grouped_mm, with other limits


def test_tiny_is_even_enough_for_every_later_layout() -> None:
    config = load_config(TINY)
    model = config.model
    assert model.num_layers >= 4
    assert isinstance(model.attention, SwitchHeadConfig) and isinstance(model.feedforward, SigmaMoEConfig)
    even = (
        model.attention.num_heads,
        model.attention.num_experts,
        model.attention.active_experts,
        model.feedforward.num_experts,
        model.feedforward.active_experts,
        model.sequence_length,
        model.vocab_size,
    )
    assert all(value % 2 == 0 for value in even)
    assert (model.dropout, model.attention.expert_dropout, model.feedforward.expert_dropout) == (0, 0, 0)
    for ranks in (1, 2, 4):  # eight divide it where a micro-batch has at most 4 sequences
        assert check_ranks(config, ranks) == ranks


def test_overrides_are_typed() -> None:
    config = load_config(
        TINY,
        [
            "train.steps=7",
            "monitor.tensorboard=false",
            "optimizer.betas=[0.5,0.6]",
            "train.stop_after_steps=null",
            "data.manifest=elsewhere",
            "optimizer.eps=1e-6",
        ],
    )
    assert (config.train.steps, config.monitor.tensorboard, config.optimizer.betas) == (7, False, (0.5, 0.6))
    assert (config.train.stop_after_steps, config.data.manifest, config.optimizer.eps) == (None, "elsewhere", 1e-6)


def test_a_manifest_beside_the_sources_of_a_file_is_not_passed_over(tmp_path: Path) -> None:
    """A run of the file's mixture would pass for one of these data."""
    path = tmp_path / "mixed.json"
    tree = json.loads(TINY.read_text())
    path.write_text(json.dumps({**tree, "data": {"manifest": "data/a", "sources": [{"manifest": "b", "weight": 1}]}}))
    assert load_config(path).data.locations == ["b"]
    with pytest.raises(ConfigError, match=r"^data.manifest: would not be read.*add --set 'data.sources=\[\]'$"):
        load_config(path, ["data.manifest=c"])
    assert [str(found)[:13] for found in inspect_config(path, ["data.manifest=c"])[1]] == ["data.manifest"]
    assert load_config(path, ["data.manifest=c", "data.sources=[]"]).data.locations == ["c"]
    assert load_config(path, ['data.sources=[{"manifest": "d", "weight": 1}]']).data.locations == ["d"]


def test_another_type_of_layer_starts_from_its_defaults() -> None:
    config = load_config(TINY, ["model.attention.type=dense", "model.attention.num_heads=3"])
    assert to_json(config)["model"]["attention"] == {"type": "dense", "num_heads": 3, "head_dim": 64}
    other_order = load_config(TINY, ["model.attention.num_heads=3", "model.attention.type=dense"])
    assert other_order == config
    same = load_config(TINY, ["model.attention.type=switchhead"])
    assert same.model == load_config(TINY).model


@pytest.mark.parametrize(
    "override, words",
    [
        ("train.stepz=3", ["train.stepz", "unknown key", "train.steps"]),
        ("model.attention.num_head=2", ["model.attention.num_head", "model.attention.num_heads"]),
        ("steps=3", ["steps: unknown key", "train.steps"]),
        ("optimizer.lr=1", ["optimizer.lr: unknown key; optimizer has learning_rate, betas, eps, weight_decay"]),
        ("parallel.context=2", ["parallel.context: unknown key; parallel has tensor, pipeline, sequence, expert"]),
        ("optimizer.warmup_steps=2", ["the nearest known key is schedule.warmup_steps"]),
        ("seed=3", ["the nearest known key is train.seed"]),
        ("model.attention.active_experts=9", ["model.attention", "active_experts is 9", "at most 4"]),
        ("model.feedforward.active_experts=17", ["model.feedforward", "17", "num_experts = 16"]),
        ("batch.global_sequences=30", ["batch.global_sequences", "30", "micro_sequences = 8", "set it to 32"]),
        ("parallel.zero=7", ["parallel.zero", "7"]),
        ("parallel.tensor=3", ["parallel.tensor", "num_heads", "set parallel.tensor to 2"]),
        ("parallel.pipeline=5", ["parallel.pipeline", "set parallel.pipeline to at most 4"]),
        ("train.seed=99999999999999999999999", ["train.seed"]),
        ("train.steps=true", ["train.steps", "integer"]),
        ('checkpoint.allow_changes=["optimizer.lr"]', ["checkpoint.allow_changes", "optimizer.lr", "nearest"]),
        ("deepspeed.communication_data_type=bf16", ["deepspeed.communication_data_type", "parallel.reduce_dtype"]),
        ("optimizer.learning_rate=Infinity", ["optimizer.learning_rate"]),
        ("parallel.sequence=true", ["parallel.sequence", "false"]),
        ("train.precision=fp64", ["train.precision", "fp64", "bf16"]),
        ("model.d_model=wide", ["model.d_model", "integer", "wide"]),
        ("train=3", ["train", "3"]),
        ("train.steps", ["--set train.steps", "dotted.key=value"]),
        ("train.steps.more=3", ["train.steps is a value"]),
        ("model.attention.type=sparse", ["model.attention.type: there is no 'sparse'", "'switchhead', 'dense', 'moa'"]),
        ("deepspeed.gradient_clipping=3", ["deepspeed.gradient_clipping", "optimizer.clip_norm"]),
        ('deepspeed={"zero_optimization":{"stage":3}}', ["deepspeed.zero_optimization.stage", "parallel.zero"]),
        ("optimizer.learning_rate=-1", ["optimizer.learning_rate", "greater than 0"]),
        ("optimizer.learning_rate=NaN", ["optimizer.learning_rate"]),
    ],
)
def test_refusals_name_the_key_and_the_fix(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(TINY, [override])
    message = str(refusal.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_the_best_checkpoint_needs_validation() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.keep_best: 2 .* set evaluate\.sequences to 256"):
        load_config(TINY, ["checkpoint.keep_best=2", "evaluate.sequences=0"])


def test_rollback_needs_a_threshold() -> None:
    with pytest.raises(ConfigError, match=r"resilience\.spike_action: rollback never happens"):
        load_config(TINY, ["resilience.spike_action=rollback", "resilience.spike_threshold=0"])


def test_zero_0_needs_fp32() -> None:
    assert load_config(TINY, ["parallel.zero=0"]).parallel.zero == 0
    with pytest.raises(ConfigError, match=r"parallel\.zero: stage 0 trains in fp32 only"):
        load_config(TINY, ["parallel.zero=0", "train.precision=bf16"])


def test_ranks_that_do_not_divide_the_batch() -> None:
    config = load_config(TINY, ["batch.global_sequences=24"])
    with pytest.raises(ConfigError, match=r"batch\.global_sequences: 24 .* 8 x 4 = 32; set it to 32"):
        check_ranks(config, 4)
    assert check_ranks(config, 3) == 3


@pytest.mark.parametrize(
    "keys, ranks, advice",
    [
        (["batch.global_sequences=24"], 4, ["32", "batch.micro_sequences to 6", "start 3 ranks"]),
        (["batch.global_sequences=512"], 3, ["504", "start 2 ranks"]),
        (["batch.global_sequences=8"], 2, ["16", "batch.micro_sequences to 4", "start 1 rank"]),
        (["batch.global_sequences=32", "parallel.expert=2"], 6, ["48", "start 4 ranks"]),
        (["batch.global_sequences=32", "parallel.tensor=2"], 6, ["24", "start 4 ranks"]),
        (
            ["batch.global_sequences=40", "parallel.expert=4", "parallel.zero=1"],
            4,
            ["32", "batch.micro_sequences to 5"],
        ),
    ],
)
def test_the_advice_for_a_batch_that_ranks_do_not_divide_helps(keys: list[str], ranks: int, advice: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_ranks(load_config(TINY, keys), ranks)
    assert str(refusal.value).rpartition("; set it to ")[2].split(", or ") == advice
    for way in advice:
        number = int(re.sub(r"[^0-9]", "", way))
        changed = {"s": [], "b": [f"batch.micro_sequences={number}"]}.get(way[0], [f"batch.global_sequences={number}"])
        check_ranks(load_config(TINY, [*keys, *changed]), number if way.startswith("start") else ranks)


def test_fp16_is_refused_on_the_cpu_with_the_reason() -> None:
    config = load_config(TINY, ["train.precision=fp16"])
    with pytest.raises(ConfigError, match=r"train\.precision: fp16 needs CUDA"):
        check_device(config, "cpu")
    check_device(config, "cuda")


MOA_LOSSES = [
    f'model.attention={{"type": "moa", "{name}_loss_weight": 0.1, "loss_scope": "micro_batch"}}'
    for name in ("cv", "switch")
]
NEITHER = {
    # What neither graphs nor compiled blocks go with: what the message names, and what it offers.
    "parallel.tensor=2": (r"parallel\.tensor = 2 \(collectives", r"parallel\.tensor to 1"),
    "parallel.expert=2": (r"parallel\.expert = 2 \(how many", r"parallel\.expert to 1"),
    "parallel.zero=3": (r"parallel\.zero = 3 \(parameters", r"parallel\.zero to 2"),
    "train.record_routing=true": (r"train\.record_routing \(the host", r"remove train\.record_routing"),
    "train.replay_routing=run": (r"train\.replay_routing \(the host", r"remove train\.replay_routing"),
    'deepspeed={"flops_profiler": {"enabled": true}}': (
        r"flops_profiler\.enabled",
        r"remove deepspeed\.flops_profiler",
    ),
}
NO_GRAPHS = {**NEITHER, "parallel.pipeline=2": (r"parallel\.pipeline = 2 \(DeepSpeed", r"parallel\.pipeline to 1")}
NOT_COMPILED = {
    **NEITHER,
    "train.recompute=selective": (r"train\.recompute = selective \(torch", r"train\.recompute to none or full"),
}


def check_refused(key: str, override: str, what: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: on does not go with .*{what}.*; set it to auto, or {fix}$"):
        load_config(TINY, [f"{key}=on", override])


@pytest.mark.parametrize("override", NO_GRAPHS)
def test_graphs_are_refused_where_they_are_impossible(override: str) -> None:
    what, fix = NO_GRAPHS[override]
    check_refused("train.cuda_graph", override, what, fix)
    wanted, why = graph_decision(load_config(TINY, [override]), data_size=2, device_type="cuda")
    assert not wanted and re.search(what.split(r" \(")[0], why)


@pytest.mark.parametrize("override", NOT_COMPILED)
def test_blocks_are_compiled_where_it_is_asked_for_and_possible(override: str) -> None:
    check_refused("train.compile", override, *NOT_COMPILED[override])
    for key, override_of_key in (("auto", override), ("auto", "train.seed=0"), ("off", "train.seed=0")):
        wanted, why = compile_decision(load_config(TINY, [f"train.compile={key}", override_of_key]), data_size=2)
        assert not wanted and why.startswith(f"operator by operator (train.compile = {key}")
    assert compile_decision(load_config(TINY, ["train.compile=on"]), data_size=2)[0]


@pytest.mark.parametrize("key", ["train.cuda_graph", "train.compile"])
@pytest.mark.parametrize("override", ["model.feedforward.entropy_scope=micro_batch", *MOA_LOSSES])
def test_graphs_and_programs_hold_no_collective_of_data_parallel_ranks(key: str, override: str) -> None:
    keys = [override, "model.feedforward.entropy_weight=0.01", f"{key}=on"]
    config = load_config(TINY, keys)
    assert check_ranks(config, 1) == 1
    with pytest.raises(
        ConfigError, match=rf"^{re.escape(key)}: .*_scope = micro_batch .*2 ranks.*_scope to global_batch$"
    ):
        check_ranks(config, 2)


def test_when_micro_steps_are_recorded() -> None:
    """`on` and `auto` where it is possible."""

    def decided(key: str, device: str, *others: str) -> tuple[bool, str]:
        config = load_config(TINY, [f"train.cuda_graph={key}", *others])
        return graph_decision(config, data_size=2, device_type=device)

    with pytest.raises(ConfigError, match=r"train\.cuda_graph: on does not go with a CPU .*; set it to auto$"):
        check_device(load_config(TINY, ["train.cuda_graph=on"]), "cpu")
    assert decided("on", "cuda") == (True, "CUDA graphs (train.cuda_graph = on)")
    assert decided("off", "cuda") == (False, "kernels launched one by one (train.cuda_graph = off)")
    assert decided("auto", "cuda") == (True, "CUDA graphs (train.cuda_graph = auto)")
    assert not decided("auto", "cpu")[0] and "a CPU" in decided("auto", "cpu")[1]
    compiled, words = decided("auto", "cuda", "train.compile=on")
    assert not compiled and "compiled blocks" in words and decided("on", "cuda", "train.compile=on")[0]


def test_a_file_of_no_model_and_one_that_prepares_data(tmp_path: Path) -> None:
    """Files that are none of any program's: tests/common/test_json_config.py."""
    path = tmp_path / "run.json"
    path.write_text("{}")
    with pytest.raises(ConfigError, match="model: is required"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"prepares data \(python -m data_prep run"):
        load_config(TINY.parent / "data" / "sample.json")


def test_every_key_is_documented_and_in_the_help() -> None:
    text = keys_help()
    for key in keys(Config):
        assert key.field.description, f"{key.dotted} has no docstring"
        assert f"  {key.dotted} = " in text


def test_what_may_change_on_resume() -> None:
    sections = {key.split(".")[0] for key in flatten(to_json(load_config(TINY)))}
    free = free_keys()
    assert {key.split(".")[0] for key in free} <= sections | {"description", "deepspeed"}
    assert not any(key.startswith(("model.", "optimizer.", "schedule.")) for key in free)
    assert {key for key in free if key.startswith("batch.")} == {"batch.micro_sequences"}, "how a step is cut is layout"
    assert {"train.stop_after_steps", "train.threads", "parallel.zero", "data.verify"} <= free
    assert not {"train.steps", "train.seed", "train.precision"} & free


@pytest.mark.parametrize("shape", ["constant", "cosine"])
def test_a_run_shortened_below_what_is_done_is_refused_for_that_and_not_for_its_rates(shape: str) -> None:
    """The rates of a constant schedule are the same, so saying that they would differ sends the reader astray."""
    keys = [f"schedule.shape={shape}", "schedule.warmup_steps=0"]
    saved = SavedRun("step-00000012", to_json(load_config(TINY, [*keys, "train.steps=12"])), "digest", 12)
    with pytest.raises(UserError, match=r"train\.steps: was 12 .* is 8 now; .* \(12 steps are done") as found:
        changes_since(saved, load_config(TINY, [*keys, "train.steps=8"]), "digest")
    assert "learning rates" not in str(found.value) and "spans" not in str(found.value)


def test_another_batch_is_not_offered_where_the_checkpoint_has_a_memory_of_each_stream() -> None:
    for chunks, offered in ((1, False), (0, True)):
        keys = [f'model.position={{"type": "rope", "memory_chunks": {chunks}}}', "batch.global_sequences=24"]
        saved = SavedRun("step-00000012", to_json(load_config(TINY, [*keys])), "digest", 12)
        with pytest.raises(UserError, match=r"batch\.global_sequences: was 24 .* is 48 now") as found:
            changes_since(saved, load_config(TINY, [*keys, "batch.global_sequences=48"]), "digest")
        assert ("allow_changes" in str(found.value)) == offered
        assert ("the memory of 24 streams of text" in str(found.value)) != offered


def test_deepspeed_json_is_derived() -> None:
    config = load_config(
        TINY,
        [
            "train.precision=bf16",
            "parallel.zero=2",
            'deepspeed={"zero_optimization":{"reduce_bucket_size":1000}, "memory_breakdown": true}',
            "deepspeed.log_level=info",
        ],
    )
    derived = deepspeed_json(config, data_size=2)
    assert derived["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert (derived["train_micro_batch_size_per_gpu"], derived["gradient_accumulation_steps"]) == (8, 2)
    assert derived["gradient_clipping"] == config.optimizer.clip_norm
    assert derived["bf16"]["enabled"] and derived["data_types"]["grad_accum_dtype"] == "fp32"
    assert derived["memory_breakdown"] is True
    assert "optimizer" not in derived and "fp16" not in derived


def test_the_tree_is_frozen() -> None:
    config = load_config(TINY)
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]
    tree: dict = {}
    apply_override(tree, "a.b.c=1")
    assert tree == {"a": {"b": {"c": 1}}}
    assert Config.model_config["extra"] == "forbid"
