"""`python -m benchmarks.gpu speed`: rooflines, peers, timelines and counters, by arithmetic that can be done here."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import op_cases
from benchmarks.gpu import (
    block,
    ceilings,
    counters,
    kernel_peers,
    kernels,
    micro_step,
    models,
    sparse,
    speed,
    tables,
    timing,
)
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.command import Context, Failed, Unavailable
from benchmarks.gpu.kernels import Phase, nbytes, work_of
from benchmarks.gpu.micro_step import Activity, timeline, union
from benchmarks.gpu.record import read
from benchmarks.gpu.timing import CudaClock, HostClock, draw
from model.language_model import build_on_meta
from pretrain.gpus import numerics
from tests.benchmarks.gpu import cases
from tests.benchmarks.gpu.cases import CPU, MEASURED, entry
from tests.benchmarks.gpu.test_tuned import FASTER, recorded
from tests.marks import HAS_SPACE
from tests.pretrain.test_gpus import switches


def context(folder: Path, **more: dict[str, Any]) -> Context:
    return cases.context(folder, **(MEASURED | more))


def test_least_work_of_an_op() -> None:
    """σ-MoE, 37 tokens of 24 numbers, 2 of 4 experts of 16: by hand."""
    N, d, E, k, G = 37, 24, 4, 2, 16
    work = work_of(partial(op_cases.sigma_moe_case, N, d, E, k, G), torch.bfloat16)
    x, weights, scores, index = 2 * N * d, 2 * 2 * E * d * G, 4 * N * k, 8 * N * k
    read_bytes = x + weights + scores + index
    assert work["forward"] == Phase(4 * N * k * d * G, read_bytes + x)
    assert work["backward"] == Phase(8 * N * k * d * G, read_bytes + x + (x + weights + scores))
    assert Phase(6 * 10**9, 10**6).roofline(1e9, 1e12) == pytest.approx(6.0)
    assert Phase(10**6, 6 * 10**6).roofline(1e9, 1e12) == pytest.approx(6.0)


def test_a_kernel_beside_its_peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usable = {"reference": None, "cpu": None, "triton": "not here"}
    monkeypatch.setattr(kernels, "backends_on", lambda *_: usable)
    drawn, draw_sets = list[timing.Inputs](), kernels.draw_sets

    def noting(*args: Any, **options: Any) -> list[timing.Inputs]:
        drawn.extend(found := draw_sets(*args, **options))
        return found

    monkeypatch.setattr(kernels, "draw_sets", noting)
    result = kernels.compute(context(tmp_path), build=partial(op_cases.value_case, 37, 24, 2, 4, 2, 8))
    rows = {row["backend"]: row for row in result["backends"]}
    assert list(rows) == ["cpu", "triton", "cuBLAS, all experts"] and rows["triton"]["skipped"] == "not here"
    for work in result["work"].values():  # of MEASURED: 1e9 bytes and 1e12 FLOPs a second
        assert work["roofline_ms"] == pytest.approx(max(work["bytes"] / 1e6, work["flops"] / 1e9), abs=1e-5)
    assert {one.tensors["x"].dtype for one in drawn} == {torch.bfloat16}  # of which the roofline is
    for name in ("cpu", "cuBLAS, all experts"):
        for phase in ("forward", "backward"):
            found = rows[name][phase]
            assert found["of_roofline"] == pytest.approx(result["work"][phase]["roofline_ms"] / found["ms"], rel=0.05)
    monkeypatch.setattr(kernels, "works_of", lambda *_: 1 / 0)
    with pytest.raises(Failed, match="cpu: ZeroDivisionError"):
        kernels.compute(context(tmp_path), build=partial(op_cases.value_case, 37, 24, 2, 4, 2, 8))
    with pytest.raises(Unavailable, match="have not been measured"):
        kernels.compute(cases.context(tmp_path), build=partial(op_cases.value_case, 37, 24, 2, 4, 2, 8))


class TwoWays(HostClock):
    """The n-th piece of work that is captured takes n milliseconds."""

    def __init__(self) -> None:
        self.captured = 0

    def capture(self, work: timing.Work) -> timing.Work:
        work()
        self.captured += 1
        return lambda number=self.captured: number  # type: ignore[misc]

    def timed(self, replay: timing.Work) -> Callable[[], float]:
        milliseconds = float(replay())
        return lambda: milliseconds


def test_ceilings_are_bytes_and_flops_a_second(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a copy what is read and what is written, by the faster way; of a product two FLOPs for a multiply-add."""
    monkeypatch.setattr(ceilings, "clock_of", lambda device: TwoWays())
    copied = ceilings.copy(cases.context(tmp_path))
    assert (copied["driver_ms"], copied["kernel_ms"], copied["ms"]) == (1.0, 2.0, 1.0)
    assert copied["bytes"] == 2 * 4 * 2**14 and copied["bytes_per_second"] == copied["bytes"] / 1e-3
    factors: list[torch.Tensor] = []
    product = torch.mm

    def noted(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        factors.extend((a, b))
        return product(a, b, out=out)

    monkeypatch.setattr(torch, "mm", noted)
    multiplied = ceilings.product(cases.context(tmp_path))
    assert multiplied["ms"] == 1.5  # the median of two pieces of work in turn
    assert multiplied["flops_per_second"] == pytest.approx(2 * 64**3 / 1.5e-3)
    assert all(0.9 < float(f.float().std()) < 1.1 for f in factors)  # a card multiplies zeros faster
    measured: dict[str, Any] = {ceilings.COPY: copied, ceilings.PRODUCT: multiplied}
    found = ceilings.ceilings(cases.context(tmp_path, **measured))
    assert found == (copied["bytes_per_second"], multiplied["flops_per_second"])


@pytest.mark.parametrize("way", ["copy_", "bitwise_or"])
def test_a_copy_that_copies_nothing_is_no_ceiling(way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where the other way has copied before it."""
    monkeypatch.setattr(torch.Tensor if way == "copy_" else torch, way, lambda *_, **__: None)
    with pytest.raises(AssertionError):
        ceilings.copy(cases.context(tmp_path))


@pytest.mark.parametrize(
    "build",
    [
        partial(op_cases.value_case, 37, 24, 2, 4, 2, 8),
        partial(op_cases.output_case, 37, 24, 2, 4, 2, 8),
        partial(op_cases.sigma_moe_case, 37, 24, 4, 2, 16),
    ],
)
def test_peers_multiply_what_the_op_does(build: op_cases.Build) -> None:
    """Where every gate is one and every expert chosen, the products' sums are the op's results."""
    inputs = draw(build, CPU, torch.float32, 0)
    case, t = inputs.case, dict(inputs.tensors)
    every = partial(build.func, *build.args[:-2], build.args[-3], build.args[-1])  # type: ignore[attr-defined]
    inputs = draw(every, CPU, torch.float32, 0)  # k = E
    t = dict(inputs.tensors)
    t["scores"] = torch.ones_like(t["scores"])
    (wanted,) = inputs.case.compute(t, "reference")
    for peer in kernel_peers.PEERS[case.op]:
        if "one expert" in peer.name:
            continue
        found = peer.compute(*peer.prepare(t))
        if case.op == "switchhead_value":
            H, E, _, h = t["experts"].shape
            found = found.view(-1, H, E, h).sum(2)
        if case.op == "sigma_moe":
            k = t["index"].shape[1]
            found = torch.zeros_like(wanted).index_add_(0, t["order"] // k, found)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def compressed(rows: torch.Tensor) -> torch.Tensor:
    """As the hardware takes it: of 4 neighbours at most 2 are not zero. (Here nothing is packed.)"""
    assert (rows.view(len(rows), -1, 4) != 0).sum(-1).max() <= 2
    return rows.clone()


def test_the_sparse_product_is_that_of_all_experts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as without_gpu:
        without_gpu.setattr(torch.backends.cusparselt, "is_available", lambda: True)
        without_gpu.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(Unavailable, match="no cuSPARSELt here"):
            sparse.compute(context(tmp_path))
    monkeypatch.setattr(sparse, "is_there", lambda: True)
    monkeypatch.setattr(torch, "_cslt_compress", compressed)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", lambda packed, weights: 3)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", lambda packed, weights, alg_id=0: packed @ weights)
    result = sparse.compute(context(tmp_path))
    assert result["useful_flops"] == 2 * 64 * (2 * 16 * 2) * 64 and result["shape"] == [64, 2 * 16 * 4, 64]
    rows = {row["backend"]: row for row in result["backends"]}
    assert list(rows) == ["cuBLAS, all experts", "cuSPARSELt", "cuSPARSELt, algorithm 3", "compression"]
    assert all(row["forward"]["ms"] > 0 for row in rows.values())
    assert all(row["relative_error"] < 1e-2 for name, row in rows.items() if name != "compression")
    for wrong in (lambda y: 1.03 * y, lambda y: y.roll(1, 0), lambda y: y * torch.nan):
        monkeypatch.setattr(torch, "_cslt_sparse_mm", lambda packed, weights, alg_id=0, f=wrong: f(packed @ weights))
        with pytest.raises(Failed, match=r"cuSPARSELt differs by .*; cuSPARSELt, algorithm 3 differs by"):
            sparse.compute(context(tmp_path))


def test_half_of_the_gated_rows_is_zero_of_each_head() -> None:
    rows = sparse.gated_rows(33, 2, 5, CPU).view(33, 2, 5, 4)
    chosen = rows != 0
    assert (chosen.sum(-1) == 2).all() and (chosen == chosen[:, :, :1]).all(), "a head's columns share its experts"
    assert len(torch.unique(chosen[:, :, 0].flatten(0, 1), dim=0)) == 6


def test_busy_and_idle_time() -> None:
    """Two streams overlap; a copy follows after a gap."""
    activities = [
        Activity("gemm", 10.0, 20.0),
        Activity("copy", 30.0, 31.0),
        Activity("add", 15.0, 25.0),
        Activity("gemm", 25.0, 26.0),
    ]
    found = timeline(activities)
    assert (found["launches"], found["busy_ms"], found["idle_ms"], found["gaps"]) == (4, 0.017, 0.004, 1)
    assert found["kernels"][0] == {"name": "gemm", "calls": 2, "ms": 0.011}
    assert list(union([(3.0, 4.0), (1.0, 2.0), (1.5, 1.75)])) == [(1.0, 2.0), (3.0, 4.0)]
    assert timeline([])["launches"] == 0


def test_the_dense_counterpart_has_as_many_parameters() -> None:
    for name in ("1b", "262m", "tiny"):
        config = models.load(name, num_layers=1)
        ours, dense = (
            sum(p.numel() for n, p in build_on_meta(one).named_parameters() if not re.search("selector|router", n))
            for one in (config, models.dense_counterpart(config))
        )
        assert dense == pytest.approx(ours, rel=0.025), name  # W_pos of Transformer-XL has all heads


def test_a_micro_step_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = models.load("tiny", num_layers=1, sequence_length=16)
    monkeypatch.setattr(models, "load", lambda name: small)
    result = micro_step.compute(context(tmp_path), name="tiny", sequences=2)
    assert result["tokens"] == 32 and result["launches"] > 10 and result["wall_ms"] >= result["host_ms"] > 0
    assert result["busy_ms"] > 0 and result["kernels"] and "mfu" not in result
    head, row = tables.step_rows([entry("micro-step tiny 2", **result)])
    assert len(head) == len(row) and row[0] == "tiny 2"


@pytest.mark.parametrize("kind, keys", [("", 16), ("documents", 6)])
def test_attention_inside_documents_has_their_flops(
    kind: str, keys: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three documents in 16 tokens: no token attends to more than 6."""
    small = models.load("tiny", num_layers=1, sequence_length=16)
    monkeypatch.setattr(models, "load", lambda name: small)
    monkeypatch.setattr(micro_step, "utilisation", lambda config, *_: {"keys": config.sequence_length})
    result = micro_step.compute(context(tmp_path), name="tiny", sequences=2, kind=kind)
    assert result["tokens"] == 32 and result["keys"] == keys
    (documents,) = micro_step.Step(small, CPU, 2, has_documents=True).documents
    assert int(documents[0].bincount().max()) == 6


def test_models_are_timed_with_the_numerics_of_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Micro-steps, blocks and what ncu counts; afterwards torch is as it was, for the parts that follow."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda of: (9, 0))
    before, seen = switches(), []  # type: list[Any], list[list[Any]]

    class Stop(Exception):
        pass

    def building(*args: Any, **options: Any) -> Any:
        seen.append(switches())
        raise Stop

    monkeypatch.setattr(models, "build", building)
    on_card = dataclasses.replace(context(tmp_path), device=device)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(block, "clock_of", lambda device: HostClock())
    for compute in (
        partial(micro_step.compute, on_card, name="tiny", sequences=1),
        partial(block.compute, on_card, name="tiny"),
        partial(micro_step.main, ["tiny", "1", "cuda"]),
    ):
        with pytest.raises(Stop):
            compute()
        assert switches() == before
    with numerics(device, deterministic=False):
        assert seen == [switches()] * 3 and switches() != before


def test_a_model_with_memory_has_it_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the published 262M models: a block and a micro-step read a whole chunk besides their own."""
    small = models.load("262m", num_layers=1, d_model=64, sequence_length=16, vocab_size=50)
    step = micro_step.Step(small, CPU, 2)
    memory: Any = step.model.blocks[0].memory
    assert memory.kept.shape == (2, 16, 64)
    step()
    assert torch.isfinite(step.loss)
    monkeypatch.setattr(models, "load", lambda name, **_: small)
    result = block.compute(context(tmp_path), name="262m")
    assert result["model"]["block"]["ms"] > 0 and result["dense"]["block"]["ms"] > 0
    assert "attention" not in result["model"]


NCU = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","gpu__time_duration.sum","sm__throughput.avg.pct_of_peak_sustained_elapsed"
"","","","ns","%"
"0","7","value_forward_kernel","1,200.0","40.5"
"1","7","value_forward_kernel","1,500.0","50.5"
"2","7","gemm","900.0","80.0"
"""


def test_counters_are_read_and_named() -> None:
    assert counters.read(NCU) == [
        {"kernel": "value_forward_kernel", "ns": 1500.0, "sm_percent": 50.5},
        {"kernel": "gemm", "ns": 900.0, "sm_percent": 80.0},
    ]
    assert counters.read("==ERROR== no kernels were profiled") == []
    names = {
        "void at::native::elementwise_kernel<4, at::native::F<float>>(int, F)": "elementwise_kernel",
        "value_forward_kernel": "value_forward_kernel",
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT": "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT",
    }
    assert {name: counters.function_name(name) for name in names} == names


@pytest.mark.parametrize(
    "script, error, words",
    [
        ("echo '==ERROR== ERR_NVGPUCTRPERM - no permission'; exit 1", Unavailable, "may not read the counters"),
        ("echo broken; exit 1", Failed, "ncu ended with 1: broken"),
        (f"cat <<'END'\n{NCU}END\nexit 3", Failed, "ncu ended with 3"),  # it counted some and died
    ],
)
def test_ncu_that_cannot_count(
    script: str, error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured = {"micro-step tiny 2": {"kernels": [{"name": "void gemm<1>(int)"}]}}
    with monkeypatch.context() as without:
        without.setenv("PATH", str(tmp_path))
        with pytest.raises(Unavailable, match="ncu is not on the PATH"):
            counters.compute(context(tmp_path, **measured), model="tiny", sequences=2)
    cases.on_the_path(tmp_path, "ncu", f'echo "$@" > "{tmp_path}/line"\n{script}', monkeypatch)
    with pytest.raises(error, match=words):
        counters.compute(context(tmp_path, **measured), model="tiny", sequences=2)
    line = (tmp_path / "line").read_text()
    assert "--clock-control none" in line and "regex:(^|::)(gemm)$" in line


class Recorded:
    """torch.cuda as far as `CudaClock` calls it; every call is written down."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def named(self, name: str, result: Any = None) -> Any:
        def call(*_: Any, **__: Any) -> Any:
            self.calls.append(name)
            return result

        return call


def test_the_side_stream_waits_for_the_inputs_and_no_round_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is captured reads tensors that the current stream has drawn; the device has work until all rounds are asked
    for."""
    import contextlib

    log = Recorded()

    class Stream:
        wait_stream = staticmethod(log.named("side waits for current"))
        synchronize = staticmethod(log.named("host waits for side"))

    @contextlib.contextmanager
    def entered(name: str, *_: Any, **__: Any) -> Iterator[None]:
        log.calls.append(f"{name} begins")
        yield
        log.calls.append(f"{name} ends")

    class Graph:
        replay = staticmethod(log.named("replay"))

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        record = staticmethod(log.named("event"))

        def elapsed_time(self, other: Event) -> float:
            return 2.0

    class Cache:
        """Twice as large as the L2 cache of 1024 bytes."""

        def __init__(self, numel: int, *, dtype: torch.dtype, device: str) -> None:
            assert numel * dtype.itemsize >= 2048 and device == "cuda"

        zero_ = staticmethod(log.named("overwritten"))

    for name, value in {
        "Stream": Stream, "current_stream": lambda: None, "stream": partial(entered, "side"), "CUDAGraph": Graph,
        "graph": partial(entered, "capture"), "Event": Event, "synchronize": log.named("host waits"),
        "_sleep": log.named("device sleeps"),
        "current_device": lambda: 0,
        "get_device_properties": lambda _: type("Properties", (), {"L2_cache_size": 1024}),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing.torch, "empty", Cache)
    clock = CudaClock()
    found = timing.measure(clock, [log.named("work")], 2)
    assert found.median == 2.0 and isinstance(timing.clock_of(CPU), HostClock)
    warm_up = ["side waits for current", "side begins", *["work"] * timing.WARM_UP, "side ends"]
    capture = [*warm_up, "host waits for side", "capture begins", "work", "capture ends"]
    rounds = ["overwritten", "event", "replay", "event"] * 2
    assert log.calls == [*capture, "replay", "overwritten", "host waits", "device sleeps", *rounds, "host waits"]


def test_kernel_tables() -> None:
    times = {"ms": 2.0, "low": 1.5, "high": 2.5}
    rows = [
        {"backend": "triton", "forward": times | {"of_roofline": 0.5}, "backward": times | {"of_roofline": 0.25}},
        {"backend": "cuda", "skipped": "no"},
    ]
    found = entry("kernel 1b route N=1", backends=rows)
    assert tables.kernel_rows([found])[1:] == [
        ("1b route N=1", "triton", "2 (1.5 to 2.5)", "50.0%", "2 (1.5 to 2.5)", "25.0%")
    ]
    assert tables.headline(found) == "triton forward 2 ms, backward 2 ms"
    failed = entry("micro-step 1b 8", "failed", tokens_per_second=1.0)
    assert len(tables.step_rows([failed])) == len(tables.block_rows([failed])) == 1
    assert nbytes([torch.ones(3), torch.ones(2, dtype=torch.int64)]) == 28


@pytest.mark.slow
def test_every_part_on_the_cpu(tmp_path: Path) -> None:
    recorded(tmp_path, FASTER)  # as if tune had run
    words = ["speed", "--device", "cpu", "--tiny", "--results", str(tmp_path), "--seconds", "3000"]
    assert main(words) == int(HAS_SPACE)
    entries = {one.part: one.status for one in read(tmp_path / "cpu" / "speed.jsonl")}
    compiled = entries.pop("micro-step tiny compiled 1")
    assert compiled == ("failed" if HAS_SPACE else "passed")  # see tests/marks.py
    of_a_gpu_alone = {part for part in entries if part.startswith(("counters", "sparse"))}
    assert {entries[part] for part in of_a_gpu_alone} == {"skipped"}
    assert {status for part, status in entries.items() if part not in of_a_gpu_alone} == {"passed"}
    assert len(entries) == len(list(speed.parts(tiny=True))) - 1
