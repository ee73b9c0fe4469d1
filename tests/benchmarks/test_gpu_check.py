"""benchmarks/gpu_check.py says that there is no GPU, and sees a wrong kernel: run on the CPU, Triton interpreted."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_check, op_cases


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "there is no GPU here: nothing was checked and nothing was timed" in captured.err


def test_equality_and_timing_of_one_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--device", "cpu", "--op", "sigma_moe", "--rounds", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["device"] == "CPU: this tests the script, not a GPU" and report["failed"] == 0
    checked = {(row["dtype"], row["backend"]) for row in report["equality"] if not row["failed"]}
    assert checked == {(t, b) for t in ("fp32", "bf16", "fp16") for b in ("reference", "cpu", "grouped_mm", "triton")}
    names = {"output 0", *(f"gradient of {name}" for name in ("x", "scores", "up", "down"))}
    assert all(row["errors"].keys() == names for row in report["equality"])
    assert {row["backend"] for row in report["timing"]} == {"reference", "cpu", "grouped_mm", "triton"}
    assert all(row["forward_ms"] > 0 and row["both_ms"] > 0 for row in report["timing"])


def test_what_cannot_run_here_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--device", "cpu", "--op", "route", "--skip-timing"]) == 0
    output = capsys.readouterr().out
    assert "fp32 triton: equal" in output
    assert "fp32 cuda: skipped: kernels.backend=cuda cannot compute route on cpu" in output


@pytest.mark.parametrize("fault", ["wrong", "NaN", "wrong gradient", "other bits", "raises"])
def test_a_broken_kernel_is_seen(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = op_cases.sigma_moe
    calls = 0

    def broken(x: Tensor, scores: Tensor, *rest: Tensor, backend: str) -> Tensor:
        nonlocal calls
        calls += 1
        if backend != "triton":
            return right(x, scores, *rest, backend=backend)
        if fault == "raises":
            raise RuntimeError("no such kernel")
        if fault == "wrong gradient":
            scores = scores.detach() + 0 * scores
        y = right(x, scores, *rest, backend="reference")
        if fault == "other bits":
            return y + calls * 1e-6
        return y * {"wrong": 1.05, "NaN": torch.nan, "wrong gradient": 1.0}[fault]

    monkeypatch.setattr(op_cases, "sigma_moe", broken)
    assert gpu_check.main(["--device", "cpu", "--op", "sigma_moe", "--skip-timing", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    failed = {(row["dtype"], row["backend"]) for row in report["equality"] if row.get("failed") or "error" in row}
    expected = {("fp32", "triton"), ("bf16", "triton"), ("fp16", "triton")}
    assert failed == expected
    assert report["failed"] == len(expected)


def test_a_wrong_choice_is_seen() -> None:
    logits = torch.tensor([[[0.0, 2.0, 1.0]], [[3.0, 1.0, 2.0]]])
    index, load = torch.tensor([[[1, 2]], [[0, 2]]]), torch.tensor([[1, 1, 2]])
    order = torch.tensor([[2, 0, 1, 3]])
    op_cases.check_choice(logits, index, load, order)
    for wrong in ((index.flip(0), load, order), (index, load + 1, order), (index, load, order.flip(1))):
        with pytest.raises(AssertionError):
            op_cases.check_choice(logits, *wrong)


@pytest.mark.slow  # tests/pretrain/test_triton.py trains with the interpreted kernels in the fast tier
def test_training_step() -> None:
    ours, reference, backends = gpu_check.training_step(torch.device("cpu"))
    assert "sigma_moe triton" in backends
    assert len(ours) == len(reference) == 3
    assert ours == pytest.approx(reference, rel=gpu_check.STEP_TOLERANCE)
    assert len(set(ours)) == 3  # weights move


@pytest.mark.slow
def test_everything() -> None:
    assert gpu_check.main(["--device", "cpu", "--rounds", "1"]) == 0
