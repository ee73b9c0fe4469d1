"""Rules that join keys: what each refuses, with its key and a fix, and the nearest settings that it lets pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.errors import ConfigError
from pretrain.config.loading import load_config
from pretrain.config.rules import check_device, check_ranks, smallest_world

TINY = Path(__file__).resolve().parents[3] / "configs" / "switchall_tiny.json"


def mixture(*sources: tuple[str, float]) -> str:
    return f"data.sources={json.dumps([{'manifest': place, 'weight': weight} for place, weight in sources])}"


ROLLBACK = "resilience.spike_action=rollback"
DENSE = ("model.attention.type=dense", "model.feedforward.type=dense")
EXPERTS = ("parallel.expert=2", "parallel.zero=1")
MEMORY = 'model.position={"type": "xl", "memory_chunks": 1}'
URL = "data.manifest=s3://bucket/c4"
TWO = mixture(("a", 1), ("b", 1))
HANG = "resilience.hang_timeout_seconds"
REFUSED: list[tuple[tuple[str, ...], str, list[tuple[str, ...]]]] = [
    # Settings that are refused, how the message begins (`...`: whatever) and ends, and settings that are legal.
    (
        ("parallel.zero=3", "train.recompute=selective"),
        "train.recompute: selective does not go with parallel.zero = 3...to full or none, or parallel.zero to 2",
        [("parallel.zero=2", "train.recompute=selective"), ("parallel.zero=3", "train.recompute=full")],
    ),
    (
        ("parallel.zero=0", "train.precision=fp16"),
        "parallel.zero: stage 0 trains in fp32 only...",
        [("parallel.zero=0",), ("parallel.zero=1", "train.precision=fp16")],
    ),
    (
        ("parallel.reduce_dtype=bf16", "train.precision=fp16"),
        "parallel.reduce_dtype: gradients of a run in fp16 are summed in fp32...",
        [("parallel.reduce_dtype=bf16", "train.precision=bf16"), ("train.precision=fp16",)],
    ),
    (
        ("checkpoint.keep_best=1", "evaluate.sequences=0"),
        "checkpoint.keep_best: 1 needs validation losses...",
        [("checkpoint.keep_best=1",), ("evaluate.sequences=0",)],
    ),
    (
        (ROLLBACK, "resilience.spike_threshold=0"),
        "resilience.spike_action: rollback never happens...",
        [(ROLLBACK,), ("resilience.spike_threshold=0",)],
    ),
    (
        ("batch.global_sequences=1",),
        "batch.global_sequences: 1 is not divisible by batch.micro_sequences = 8; set it to 8",
        [("batch.global_sequences=8",)],
    ),
    (
        ("resilience.hang_timeout_seconds=0.5",),
        "resilience.hang_timeout_seconds: 0.5 s is shorter than any step...",
        [("resilience.hang_timeout_seconds=1",), ("resilience.hang_timeout_seconds=0",), (f"{HANG}={7 * 86400}",)],
    ),
    (
        ("resilience.step_timeout_factor=1.5",),
        "resilience.step_timeout_factor: 1.5 times the longest step...",
        [("resilience.step_timeout_factor=2",), ("resilience.step_timeout_factor=0",)],
    ),
    (
        ("monitor.profile_steps=[3, 2]",),
        "monitor.profile_steps: [3, 2] ends before it begins...e.g. [3, 5]",
        [("monitor.profile_steps=[3, 3]",)],
    ),
    (('checkpoint.resume=" "',), "checkpoint.resume: is empty...", [("checkpoint.resume=a",)]),
    (
        ("evaluate.ema=true",),
        "evaluate.ema: there is no moving average...",
        [("evaluate.ema=true", "train.ema_decay=0.9")],
    ),
    (('train.init_from=" "',), "train.init_from: is empty...", [("train.init_from=a",)]),
    (
        (*DENSE, "train.record_routing=true"),
        "train.record_routing: this model has no routers; remove the key",
        [(DENSE[0], "train.record_routing=true"), (DENSE[1], "train.replay_routing=a")],
    ),
    (('train.replay_routing=" "',), "train.replay_routing: is empty...", [("train.replay_routing=a",)]),
    (
        ("train.record_routing=true", "train.replay_routing=a"),
        "train.record_routing: a run with train.replay_routing has the choices...",
        [("train.record_routing=true",)],
    ),
    (
        ("parallel.tensor=2", "model.vocab_size=8001"),
        "parallel.tensor: 2 does not divide model.vocab_size = 8001; set parallel.tensor to 1, or model.vocab_size "
        "to 8002",
        [("model.vocab_size=8001",)],
    ),
    (
        ("parallel.tensor=4", "model.feedforward.num_experts=6"),
        "parallel.tensor: 4 does not divide model.feedforward.num_experts = 6...",
        # Experts that are divided over expert-parallel ranks are not divided over these too; heads are.
        [("parallel.tensor=4", "parallel.sequence=true", *EXPERTS, "model.feedforward.num_experts=6")],
    ),
    (
        ("parallel.tensor=2", *DENSE, "model.attention.num_heads=6", "model.attention.num_kv_heads=3"),
        "parallel.tensor: 2 does not divide model.attention.num_kv_heads = 3; set parallel.tensor to 1, or "
        "model.attention.num_kv_heads to null",
        [
            ("parallel.tensor=2", *DENSE, "model.attention.num_heads=6", "model.attention.num_kv_heads=2"),
            ("parallel.tensor=2", *DENSE, "model.attention.num_heads=6", "model.attention.num_kv_heads=null"),
        ],
    ),
    (
        ("parallel.tensor=4", *DENSE, "model.attention.num_heads=6", "model.attention.num_kv_heads=3"),
        "parallel.tensor: 4 does not divide model.attention.num_heads = 6; set parallel.tensor to 1, or "
        "model.attention.num_heads to 12",
        [("parallel.tensor=4", *DENSE, "model.attention.num_heads=12", "model.attention.num_kv_heads=4")],
    ),
    (
        ("parallel.tensor=8", "parallel.sequence=true", *EXPERTS),
        "parallel.tensor: 8 does not divide model.attention.num_heads = 4; set parallel.tensor to 4...",
        [],
    ),
    (
        ("parallel.pipeline=2", "parallel.zero=0"),
        "parallel.zero: 0 does not go with parallel.pipeline = 2 (at stage 0 DeepSpeed clips...",
        [("parallel.pipeline=2", "parallel.zero=1")],
    ),
    (
        ("parallel.pipeline=2", "parallel.zero=2"),
        "parallel.zero: 2 does not go with parallel.pipeline = 2 (DeepSpeed's pipeline engine refuses...",
        [("parallel.zero=2",)],
    ),
    (
        ("parallel.pipeline=5",),
        "parallel.pipeline: 5 stages need a block each...set parallel.pipeline to at most 4",
        [("parallel.pipeline=4",)],
    ),
    (
        ("parallel.offload_optimizer=true", "parallel.zero=0"),
        "parallel.offload_optimizer: ZeRO 0 keeps the optimizer with the parameters...",
        [("parallel.offload_optimizer=true",), ("parallel.offload_optimizer=true", "parallel.zero=3")],
    ),
    (
        ("parallel.offload_optimizer=true", "parallel.pipeline=2"),
        "parallel.offload_optimizer: does not go with parallel.pipeline = 2...",
        [("parallel.pipeline=2",)],
    ),
    (
        ("parallel.sequence=true",),
        "parallel.sequence: divides the tokens over tensor-parallel ranks, but parallel.tensor is 1...",
        [("parallel.sequence=true", "parallel.tensor=2")],
    ),
    (
        ("parallel.sequence=true", "parallel.tensor=4", "model.sequence_length=130"),
        "parallel.sequence: parallel.tensor = 4 does not divide model.sequence_length = 130...to 128",
        [("parallel.sequence=true", "parallel.tensor=4"), ("parallel.tensor=4", "model.sequence_length=130")],
    ),
    (
        ("parallel.expert=2", "model.feedforward.type=dense"),
        "parallel.expert: 2 ranks would divide the feed-forward experts...it has no experts; set parallel.expert to 1",
        [("model.feedforward.type=dense",)],
    ),
    (
        ("parallel.expert=3",),
        "parallel.expert: 3 does not divide model.feedforward.num_experts = 16; set parallel.expert to 2, or "
        "model.feedforward.num_experts to 15",
        [("parallel.expert=4",)],
    ),
    (
        (*EXPERTS, "parallel.tensor=2"),
        "parallel.expert: with parallel.tensor = 2 each tensor-parallel rank must have tokens of its own...",
        [(*EXPERTS, "parallel.tensor=2", "parallel.sequence=true")],
    ),
    (
        ("parallel.expert=2", "parallel.zero=0"),
        "parallel.zero: stage 0 is impossible with parallel.expert = 2...set parallel.zero to 1 or parallel.expert "
        "to 1",
        [EXPERTS],
    ),
    (
        ("parallel.expert=2", "parallel.zero=3"),
        "parallel.zero: stage 3 is impossible with parallel.expert = 2...set parallel.zero to 2 or parallel.expert "
        "to 1",
        [("parallel.expert=2", "parallel.zero=2")],
    ),
    *(
        (
            (*EXPERTS, f"deepspeed.zero_optimization.{key}=false"),
            f"deepspeed.zero_optimization.{key}: without it DeepSpeed sums the gradients of experts over the wrong...",
            [(*EXPERTS, f"deepspeed.zero_optimization.{key}=true"), (f"deepspeed.zero_optimization.{key}=false",)],
        )
        for key in ("reduce_scatter", "contiguous_gradients")
    ),
    (
        (mixture(("a", 1), ("b", 10_000)),),
        "data.sources: the weights add up to 10001 in whole numbers...",
        # In their smallest ratio.
        [(mixture(("a", 1), ("b", 9999)),), (mixture(("a", 0.02), ("b", 199.98)),)],
    ),
    (
        (mixture(("far/a", 1), ("a/manifest.json", 1)),),
        "data.sources: two sources are called a; give each a `name` of its own",
        [
            ('data.sources=[{"manifest": "a", "weight": 1}, {"manifest": "a", "weight": 1, "name": "b"}]',),
            (mixture(("far/c4.1", 1), ("far/c4.2", 1)),),
        ],
    ),
    ((URL,), "data.cache_dir: s3://bucket/c4 is a URL; name a folder...", [(URL, "data.cache_dir=/cache")]),
    (
        (URL, "data.cache_dir=/cache", "data.verify=full"),
        "data.verify: full would fetch every shard of s3://bucket/c4...",
        [("data.verify=full",)],
    ),
    (
        ("data.manifest=https://me:word@host/c4", "data.cache_dir=/cache"),
        "data.manifest: the URL of https://host/c4 has a password or a query...",
        [],
    ),
    (
        ("data.document_mask=true", "model.position.type=xl"),
        "data.document_mask: Transformer-XL positions and memory reach across documents...",
        [("data.document_mask=true",), ("model.position.type=xl",)],
    ),
    (
        ("data.document_mask=true", "model.position.memory_chunks=1"),
        "data.document_mask: memory reaches across documents on purpose...(it is 1)",
        [("model.position.memory_chunks=1",)],
    ),
    (
        ("data.document_mask=true", "parallel.pipeline=2"),
        "data.document_mask: no document index travels between pipeline stages...(it is 2)",
        [],
    ),
    ((TWO, "data.max_tokens=9"), "data.max_tokens: limits one data set...", [("data.max_tokens=9",), (TWO,)]),
    (
        (MEMORY, "data.order=shuffled"),
        "data.order: memory reads contiguous streams...or model.position.memory_chunks to 0",
        [(MEMORY,), (MEMORY, "data.order=streams"), ("data.order=shuffled",)],
    ),
    (
        (TWO, "data.order=streams"),
        "data.sources: data.order is streams, which are cut from one data set...or set data.order to shuffled",
        [(mixture(("a", 1)), "data.order=streams")],
    ),
    (
        ("data.order=streams", "data.shuffle_block_windows=8"),
        "data.shuffle_block_windows: data.order is streams, nothing is shuffled...",
        [("data.shuffle_block_windows=8",)],
    ),
    (
        ('checkpoint.allow_changes=["optimizer.lr"]',),
        "checkpoint.allow_changes: 'optimizer.lr' is no key...",
        [('checkpoint.allow_changes=["optimizer", "deepspeed.zero_optimization.reduce_bucket_size"]',)],
    ),
]


@pytest.mark.parametrize("broken, words, legal", REFUSED, ids=[" ".join(broken) for broken, _, _ in REFUSED])
def test_a_rule_refuses_what_it_says_and_nothing_beside_it(
    broken: tuple[str, ...], words: str, legal: list[tuple[str, ...]]
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(TINY, broken)
    begin, _, end = words.partition("...")
    assert str(refused.value).startswith(begin) and str(refused.value).endswith(end), refused.value
    for settings in legal:
        load_config(TINY, settings)


HALVES = ("parallel.tensor=2", "parallel.sequence=true")
UNLESS = " (ranks / (tensor x pipeline)); set parallel.expert to 1 or start "


@pytest.mark.parametrize(
    "settings, ranks, words, fewer",
    [
        (
            ("parallel.tensor=2",),
            3,
            "parallel: 3 ranks cannot be divided into groups of tensor x pipeline = 2; start 4 ranks",
            2,
        ),
        (EXPERTS, 3, "parallel.expert: 2 does not divide the 3 data-parallel ranks" + UNLESS + "4 ranks", 2),
        (
            (*EXPERTS, *HALVES),
            6,
            "parallel.expert: 2 does not divide the 3 data-parallel ranks" + UNLESS + "8 ranks",
            4,
        ),
    ],
)
def test_a_number_of_ranks_is_refused_with_one_that_can_be(
    settings: tuple[str, ...], ranks: int, words: str, fewer: int
) -> None:
    config = load_config(TINY, settings)
    with pytest.raises(ConfigError) as refused:
        check_ranks(config, ranks)
    assert str(refused.value).startswith(words)
    assert smallest_world(config) == fewer and check_ranks(config, fewer) >= 1


def test_weights_that_gpus_alone_quantize_are_refused_on_the_cpu() -> None:
    config = load_config(TINY, ["parallel.zero=3", "deepspeed.zero_optimization.zero_quantized_weights=true"])
    with pytest.raises(ConfigError, match=r"^deepspeed\.zero_optimization\.zero_quantized_weights: needs CUDA"):
        check_device(config, "cpu")
    check_device(config, "cuda")


def test_heads_too_wide_for_the_kernel_of_documents_are_refused_where_there_are_documents() -> None:
    wide = ["kernels.backend=triton", "model.attention.head_dim=512", "train.precision=bf16"]
    check_device(load_config(TINY, wide), "cuda")
    with pytest.raises(
        ConfigError, match=r"^kernels\.backend: kernels\.backend=triton cannot compute causal_attention"
    ):
        check_device(load_config(TINY, [*wide, "data.document_mask=true"]), "cuda")
