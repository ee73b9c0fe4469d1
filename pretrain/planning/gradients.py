"""What DeepSpeed's ZeRO optimizers (0.19.8, stages 0 to 2) hold of gradients at each point of a step, of the rank that
holds most: read from their code, and compared with rehearsed steps by a test.

What decides it is whether gradients are reduced during the backward pass or after it, and where a rank keeps the sum of
its share: in fp32 runs each micro-step has its own copy, of whole parameters, beside the sum of those before; in bf16
runs the sum is one flat fp32 tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from model.language_model import build_on_meta
from pretrain.config.schema import Config
from pretrain.engine import zero_1
from pretrain.engine.deepspeed_json import deepspeed_json
from pretrain.engine.optimizer import grouped
from pretrain.parallel.layout import mesh

BUCKET = 500_000_000
"""Elements of a bucket of gradients at ZeRO 0, where nothing sets reduce_bucket_size: DeepSpeed's default."""
ITEM = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of an element of weights and of the gradients that the backward pass makes."""


class Gradients(NamedTuple):  # RELIES-ON deepspeed-gradients
    """Bytes of one rank, besides what rests."""

    between: int
    """Sums that are kept between micro-steps. 0 where there is one micro-step."""
    at_loss: int
    """Until the first gradient of the last micro-step is there: sums, and buckets that were not given back."""
    first: int
    """While its first gradients come: sums and buckets."""
    coming: int
    """From when the first bucket of them is reduced: also where the rank's own share goes."""
    passed: int
    """Blocks whose backward pass is over then."""
    joined: int
    """What is held besides each time that a bucket of them is reduced, when its gradients are all there."""
    stay: int
    """Gradients of this micro-step that are there at its end, where nothing reduces them before; else 0."""
    afterwards: int
    """At the highest point after the backward pass: the last reductions, the update, what it sends."""
    buckets: int
    """Of `coming`, DeepSpeed's buffers of gradients on their way."""


class _Sizes(NamedTuple):
    """Elements."""

    all: int
    largest: int
    """Of a parameter."""
    share: int
    """Of a rank's share of all optimizer groups, with what fills the last one up."""
    touched: int
    """Of all parameters of which a rank's share has a part: the most of any rank."""


def gradients(config: Config, data_size: int, micro_steps: int, device_type: str) -> Gradients:
    """Of a rank of a run whose model is in one piece, at ZeRO 0 to 2, on `cuda` or `cpu`."""
    sizes, settings = _sizes(config, data_size), deepspeed_json(config, data_size)["zero_optimization"]
    stage = {0: _stage_0, 1: _stage_1, 2: _stage_2}[config.parallel.zero]
    found = stage(config, sizes, settings, data_size, micro_steps)
    if device_type == "cpu" and config.parallel.zero:  # gloo's copy of the weights that ranks gather after an update
        found = found._replace(afterwards=max(found.afterwards, ITEM[config.train.precision] * sizes.all))
    return found


def fullest_rank(config: Config, data_size: int, stage: int) -> int:
    """The rank of a pipeline stage that holds most, in a rehearsed step. Where gradients are reduced during the
    backward pass, each rank makes room for its share when the first of them is there: the last rank does so first,
    while all activations are there, because gradients come in the opposite order of parameters. Elsewhere no rank holds
    more than the first, which often has a part of one parameter more than its share."""
    is_last = config.parallel.zero == 2 or zero_1.is_used(config)
    return int(mesh(config, data_size)[stage, -1 if is_last else 0, 0])


def _stage_0(config: Config, sizes: _Sizes, settings: dict[str, Any], data_size: int, micro_steps: int) -> Gradients:
    """fp32. The engine copies the gradients of a bucket when it reduces them, after the backward pass."""
    everything = 4 * sizes.all
    sums = everything if micro_steps > 1 else 0
    copied = 4 * min(int(settings.get("reduce_bucket_size", BUCKET)) + sizes.largest, sizes.all) if data_size > 1 else 0
    return Gradients(sums, sums, sums, sums, 0, 0, everything - sums, everything + copied, 0)


def _stage_1(config: Config, sizes: _Sizes, settings: dict[str, Any], data_size: int, micro_steps: int) -> Gradients:
    """All gradients are summed on every rank, and reduced with the last micro-step: during its backward pass if
    overlap_comm is on, else after it. The buckets that the first micro-step has made stay."""
    is_flat = config.train.precision == "bf16"  # of the rank's share
    item = 4 if is_flat else ITEM[config.train.precision]
    everything = item * sizes.all
    sums = everything if micro_steps > 1 else 0
    buckets, bucket = _buckets(settings, item)
    own = 4 * sizes.share if is_flat else item * sizes.touched
    joined = min(max(bucket, item * sizes.largest), everything)
    update = 0 if is_flat else _copies(config, sizes)
    first, at_loss = sums + buckets, sums + (buckets if micro_steps > 1 else 0)
    if not settings.get("overlap_comm", False):
        # When the first bucket is reduced, its gradients lie in it and nowhere else.
        beside = max(0, buckets - everything) if buckets else 0
        reduced = everything + beside + (own + joined if is_flat else max(own, joined))
        afterwards = max(reduced, own + update)
        return Gradients(sums, at_loss, first, first, 0, 0, everything - sums, afterwards, buckets)
    afterwards = max(buckets + own + joined, own + update)
    if bucket > everything:  # one reduction, at the end
        return Gradients(sums, at_loss, first, first, 0, 0, 0, afterwards, buckets)
    # Gradients of a bucket are gone from the sums when it is reduced; beside it are its copy and the rank's share.
    coming = first + max(0, own - (bucket if sums else 0))
    return Gradients(sums, at_loss, first, coming, _passed(config, bucket // item), joined, 0, afterwards, buckets)


def _stage_2(config: Config, sizes: _Sizes, settings: dict[str, Any], data_size: int, micro_steps: int) -> Gradients:
    """Every micro-step reduces its gradients during the backward pass, and gives the buckets back."""
    is_flat = config.train.precision == "bf16"
    item = ITEM[config.train.precision]
    buckets, bucket = _buckets(settings, item)
    own = 4 * sizes.share if is_flat else item * sizes.touched
    sums = own if micro_steps > 1 else 0
    first = sums + buckets
    # The flat sum is the one of all micro-steps.
    of_this = own if not is_flat or not sums else 0
    joined = min(max(bucket, item * sizes.largest), item * sizes.all)
    if item == 2 and config.parallel.reduce_dtype == "fp32":
        # The copy that is sent, too; and of a parameter that no bucket holds one more.
        joined *= 3 + (is_flat and item * sizes.largest > bucket)
    is_one = bucket > item * sizes.all  # it is reduced before the share is made, unless that is flat
    last = of_this + joined if is_flat or not is_one else max(of_this, joined)
    afterwards = max(sums + buckets + last, own + (0 if is_flat else _copies(config, sizes)))
    if is_one:
        return Gradients(sums, sums, first, first, 0, 0, 0, afterwards, buckets)
    passed = _passed(config, bucket // item)
    return Gradients(sums, sums, first, first + of_this, passed, joined, 0, afterwards, buckets)


def _copies(config: Config, sizes: _Sizes) -> int:
    """What the update makes of a share that is no flat fp32 tensor: a flat one and, of fp16, that in fp32."""
    return 4 * sizes.share if config.train.precision == "fp32" else (2 + 4) * sizes.share


def _buckets(settings: dict[str, Any], item: int) -> tuple[int, int]:
    """Bytes of all buckets, and of one."""
    bucket = item * int(settings["reduce_bucket_size"])
    if not settings.get("contiguous_gradients", True):
        return 0, bucket
    return (2 if settings.get("overlap_comm", False) else 1) * bucket, bucket


def _passed(config: Config, elements: int) -> int:
    """Blocks of which all gradients are among the first `elements`: they come in the opposite order of parameters."""
    begun, done, count = set[str](), 0, 0
    for name, parameter in reversed(list(build_on_meta(config.model).named_parameters())):
        block = name.split(".")[1] if name.startswith("blocks.") else ""
        if block not in begun:
            begun.add(block)
            done = max(done, len(begun - {""}) - 1)
        count += parameter.numel()
        if count > elements:
            break
    return done


def _sizes(config: Config, data_size: int) -> _Sizes:
    """The optimizer's groups are divided one by one, at equal borders, through the middle of parameters."""
    counts = {name: parameter.numel() for name, parameter in build_on_meta(config.model).named_parameters()}
    share, touched = 0, [0] * data_size
    for names in grouped(counts, config).values():
        group = [counts[name] for name in names]
        of_a_rank = -(-sum(group) // (2 * data_size)) * 2
        share += of_a_rank
        start = 0
        for count in group:
            for rank in range(start // of_a_rank, -(-(start + count) // of_a_rank)):
                touched[rank] += count
            start += count
    return _Sizes(sum(counts.values()), max(counts.values()), share, max(touched))
