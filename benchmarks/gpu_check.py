"""Everything that a GPU has to show and no GPU has shown yet, in one command.

    python -m benchmarks.gpu_check [--op NAME] [--skip-timing] [--rounds 20] [--json]

1. Equality: every op with every backend that the device has, in fp32, bf16 and fp16, forward and every gradient,
   against the reference in fp64 on the same inputs; and the same bits when repeated.
2. A training step: a small SwitchAll trains three steps with the fastest backends and with the reference.
3. Timing at the width of the published models: CUDA events, medians over rounds in which all implementations run in
   turn; what counts are the ratios.

Exit status: 0 if all is equal, 1 if anything is not, 3 if there is no GPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import model.openmp  # noqa: F401  # as in training; before torch

# isort: split

import torch
from torch import Tensor

from benchmarks.op_cases import Case, equality_cases, timing_cases
from model.config import ModelConfig, SigmaMoEConfig, SwitchHeadConfig
from model.kernels.backend import BACKENDS, PREFERENCE, resolve
from model.kernels.choice import Backends
from model.kernels.ops.route import route
from model.language_model import build_model

NO_GPU = 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""||a - b|| / ||b|| of every tensor; half precision rounds the hidden activations of an op too."""
STEP_TOLERANCE = 1e-4
"""Of the losses of three steps in fp32."""


def backends_on(op: str, device: torch.device, dtype: torch.dtype, widths: Sequence[int] = ()) -> dict[str, str | None]:
    """Every backend of the op -> None, or why it cannot compute it here."""
    found: dict[str, str | None] = {}
    for name in BACKENDS[op]:
        try:
            resolve(name, op, device.type, dtype=dtype, widths=widths)
            found[name] = None
        except ValueError as error:
            found[name] = str(error)
    return found


def tensors(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Leaves rounded to `dtype` (scores to fp32 at least), and constants."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {
        name: t.to(device, wide if name == "scores" else dtype).requires_grad_() for name, t in case.leaves.items()
    }
    return leaves | {name: t.to(device) for name, t in case.constants.items()}


def results(case: Case, t: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """Outputs and the gradients of all leaves, for upstream gradients that depend on nothing but the shape."""
    outputs = case.compute(t, backend)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]
    grads = torch.autograd.grad(outputs, [t[name] for name in case.leaves], upstream)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return found | {f"gradient of {name}": g for name, g in zip(case.leaves, grads, strict=True)}


def equality(case: Case, device: torch.device, dtype: torch.dtype, backend: str) -> tuple[dict[str, float], bool]:
    """-> relative error of every output and gradient against fp64, and whether a repetition gave the same bits."""
    t = tensors(case, device, dtype)
    actual = results(case, dict(t), backend)
    again = results(case, dict(t), backend)
    same = all(torch.equal(actual[name], again[name]) for name in actual)
    exact = {name: t[name].detach().double().requires_grad_() for name in case.leaves}
    exact |= {name: value for name, value in t.items() if name not in exact}
    if case.op == "route":
        exact["index"] = route(t["x"].detach(), t["weight"].detach(), _choices_per_token(case), backend=backend).index
    expected = results(case, exact, "reference")
    errors = {}
    for name, value in expected.items():
        difference, norm = (actual[name].double() - value).norm().item(), value.norm().item()
        errors[name] = difference / norm if norm > 1e-8 else difference
    return errors, same


def _choices_per_token(case: Case) -> int:
    return int(case.shape.rsplit("k=", 1)[1])


def training_step(device: torch.device) -> tuple[list[float], list[float], str]:
    """Losses of three steps in fp32 with the fastest backends and with the reference, and what the fastest are."""
    config = ModelConfig(
        vocab_size=97,
        d_model=32,
        num_layers=2,
        sequence_length=32,
        attention=SwitchHeadConfig(num_heads=2, head_dim=16, num_experts=4, active_experts=2),
        feedforward=SigmaMoEConfig(num_experts=8, active_experts=2, expert_size=16),
    )
    fastest = {}
    for op in BACKENDS:
        names = backends_on(op, device, torch.float32, (32, 16))
        fastest[op] = min(
            (n for n, why in names.items() if why is None and n in PREFERENCE),
            key=("triton", *PREFERENCE).index,  # on a CPU, the interpreted kernels rather than the fastest
        )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 97, (3, 2, 33), generator=generator).to(device)
    sequence = torch.arange(2, device=device)
    losses: list[list[float]] = []
    for backends in (Backends(**fastest), Backends()):
        network = build_model(config, None, backends, seed=0).to(device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
        losses.append([])
        for batch in tokens:
            loss, _, _ = network(batch[:, :-1], batch[:, 1:], sequence)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    return losses[0], losses[1], str(Backends(**fastest))


def milliseconds(work: Callable[[], Any], device: torch.device) -> float:
    """Of one call: between CUDA events on a GPU, by the clock on a CPU (which only tests this script)."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - begin)


def timing(case: Case, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, tuple[float, float]]:
    """backend -> median ms of the forward pass and of forward + backward, in which all run in turn."""
    names = [name for name, why in backends_on(case.op, device, dtype, _widths(case)).items() if why is None]
    t = tensors(case, device, dtype)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for measured in (False, False, *[True] * rounds):  # two warm up: compilation, allocator
        for name in names:
            forward = milliseconds(functools.partial(case.compute, dict(t), name), device)
            both = milliseconds(functools.partial(results, case, dict(t), name), device)
            if measured:
                seconds[name].append((forward, both))
    return {
        name: (statistics.median(f for f, _ in pairs), statistics.median(b for _, b in pairs))
        for name, pairs in seconds.items()
    }


def _widths(case: Case) -> tuple[int, ...]:
    return tuple(case.leaves["up"].shape[1:]) if case.op == "sigma_moe" else ()


def _silent(line: str) -> None:
    """For --json."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--op", choices=tuple(BACKENDS), help="only this one, and no training step")
    parser.add_argument("--skip-timing", action="store_true")
    parser.add_argument("--rounds", type=int, default=20, help="of the timing")
    parser.add_argument("--json", action="store_true", help="one object with everything, for a file")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu, small, to test this script
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu_check: there is no GPU here: nothing was checked and nothing was timed", file=sys.stderr)
        return NO_GPU
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU: this tests the script, not a GPU"
    say = _silent if options.json else print
    say(f"{name}, torch {torch.__version__}")
    report: dict[str, Any] = {"device": name, "torch": torch.__version__, "equality": [], "timing": []}
    report["failed"] = check_all(device, options.op, report["equality"], say)
    if options.op is None:
        ours, reference, chosen = training_step(device)
        difference = max(abs(a - b) / b for a, b in zip(ours, reference, strict=True))
        report["training_step"] = {"backends": chosen, "losses": ours, "reference": reference}
        report["failed"] += difference > STEP_TOLERANCE
        say(f"training step: {chosen}\n  losses {ours}, reference {reference}: {difference:.1e}")
    if not options.skip_timing:
        time_all(device, options.op, options.rounds, report["timing"], say)
    say(f"{len(report['equality'])} checks, {report['failed']} failed")
    if options.json:
        print(json.dumps(report, indent=1))
    return 1 if report["failed"] else 0


def check_all(device: torch.device, op: str | None, rows: list[dict[str, Any]], say: Callable[[str], None]) -> int:
    """Appends a row per op, shape, dtype and backend; returns how many failed."""
    failed = 0
    torch.manual_seed(0)
    for case in equality_cases(small=device.type == "cpu"):
        for label, dtype in DTYPES.items() if op in (None, case.op) else ():
            for backend, why_not in backends_on(case.op, device, dtype, _widths(case)).items():
                row: dict[str, Any] = {"op": case.op, "shape": case.shape, "dtype": label, "backend": backend}
                rows.append(row)
                if why_not is not None:
                    row["skipped"] = why_not
                    say(f"{case.op} {case.shape} {label} {backend}: skipped: {why_not}")
                    continue
                try:
                    errors, same = equality(case, device, dtype, backend)
                except Exception as error:  # one broken kernel must not hide the others
                    row["error"] = f"{type(error).__name__}: {error}"
                    failed += 1
                    say(f"{case.op} {case.shape} {label} {backend}: FAILED: {row['error']}")
                    continue
                worst = max(errors, key=lambda name: errors[name])
                # `not <=`: a NaN fails. Only our kernels promise the same bits.
                bad = not all(value <= TOLERANCE[dtype] for value in errors.values())
                bad |= not same and backend in ("triton", "cuda")
                failed += bad
                row.update(errors=errors, repeats=same, failed=bad)
                verdict = "FAILED" if bad else "equal"
                bits = "same bits again" if same else "other bits when repeated"
                say(f"{case.op} {case.shape} {label} {backend}: {verdict} ({worst} {errors[worst]:.1e}; {bits})")
    return failed


def time_all(
    device: torch.device, op: str | None, rounds: int, rows: list[dict[str, Any]], say: Callable[[str], None]
) -> None:
    """bf16: what training uses."""
    for case in timing_cases(small=device.type == "cpu"):
        if op not in (None, case.op):
            continue
        medians = timing(case, device, torch.bfloat16, rounds)
        ours = next(name for name in ("triton", "cpu", "reference") if name in medians)
        say(f"{case.op} {case.shape} bf16")
        for name, (forward, both) in medians.items():
            rate = case.useful_flops / forward / 1e9
            ratio = both / medians[ours][1]
            rows.append({"op": case.op, "shape": case.shape, "backend": name, "forward_ms": forward, "both_ms": both})
            say(f"  {name:11} forward {forward:8.3f} ms ({rate:.1f} TF/s), all {both:8.3f} ms, {ratio:.2f} x {ours}")


if __name__ == "__main__":
    sys.exit(main())
