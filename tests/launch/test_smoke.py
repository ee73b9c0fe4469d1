"""The smoke test: passes where all is well, and names what is not: a collective that lies, a resume that differs."""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from common.paths import REPOSITORY as ROOT
from pretrain.checkpoint.folder import digest_entry
from pretrain.config.loading import to_json
from pretrain.report.exit_codes import ExitCode
from pretrain.smoke import cli, collectives
from pretrain.smoke.collectives import check_collectives, distances
from tests.harness import run_ranks
from tests.pretrain.runs import small_config

HALF = ("all_gather", "reduce_scatter", "all_to_all")


def small_file(prepared: Path, folder: Path) -> Path:
    path = folder / "small.json"
    tasks = ('evaluate.tasks={"lambada": "unused too"}', "evaluate.tasks_every_steps=1", "evaluate.tasks_limit=1")
    unused = ("train.replay_routing=unused here", *tasks)
    config = small_config(prepared, "model.dropout=0.1", "parallel.zero=2", *unused)
    path.write_text(json.dumps(to_json(config)))
    return path


def smoke(rank: int, config: Path, run_dir: Path, *arguments: str) -> int:
    line = ["--config", str(config), "--run-dir", str(run_dir), "--steps", "2", "--mebibytes", "1", *arguments]
    with open(run_dir.parent / f"rank-{rank}.txt", "w") as file, contextlib.redirect_stdout(file):
        return cli.main(line)


def said(folder: Path) -> list[str]:
    lines = (folder / "rank-0.txt").read_text().splitlines()
    return [line for line in lines if line.startswith(cli.VERDICT)]


def test_two_ranks_pass_and_leave_no_checkpoint(prepared: Path, tmp_path: Path) -> None:
    config, run_dir = small_file(prepared, tmp_path), tmp_path / "run"
    (run_dir / "smoke-1").mkdir(parents=True)
    (run_dir / "smoke-1" / "of an earlier test").touch()
    assert run_ranks(smoke, 2, config, run_dir) == [0, 0]
    *measured, verdict = said(tmp_path)
    assert verdict.startswith("smoke: PASSED: collectives right, all_reduce ") and "2 ranks on 1 node," in verdict
    assert "resume equal in every bit" in verdict and "tokens/s" in verdict
    names = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "slowest pair"]
    assert [line.removeprefix("smoke: ").startswith(name) for line, name in zip(measured, names, strict=True)] == [
        True
    ] * 5
    assert not [line for line in (tmp_path / "rank-1.txt").read_text().splitlines() if line.startswith("smoke: ")]
    assert [len(cli._lines(run_dir / "smoke-2" / name)) for name in ("unbroken", "resumed")] == [4, 2]
    assert not list(run_dir.rglob("step-*")) and (run_dir / "smoke-1" / "of an earlier test").exists()


def test_one_rank_tries_no_collective_and_says_so(prepared: Path, tmp_path: Path) -> None:
    """In the folder of a run that has something there: it is none of the test's."""
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert run_ranks(smoke, 1, small_file(prepared, tmp_path), tmp_path / "run") == [0]
    [verdict] = said(tmp_path)
    assert verdict.startswith("smoke: PASSED: no collectives, as there is one rank; ")
    assert "resume equal in every bit" in verdict and "GB/s" not in verdict


def ending(rank: int, how: str, config: Path, run_dir: Path) -> int:
    """A smoke test of which one part ends in another way."""
    if how == "collective":
        collectives.check_collectives = lambda num_bytes, device: ([], [f"all_reduce of {num_bytes:,} bytes: wrong"])
    elif how == "resume":
        cli.differences = lambda folder, steps: ["loss of step 4 is another"]
    else:
        from pretrain import loop

        calls: list[object] = []

        def train(*arguments: object) -> ExitCode:
            calls.append(arguments)
            if how == "stop" and len(calls) == 1:  # after which nothing is trained
                return ExitCode.STOPPED
            raise RuntimeError("the first line\nand more")

        loop.train = train  # type: ignore[assignment]
    return smoke(rank, config, run_dir)


@pytest.mark.parametrize(
    "how, ranks, code, words",
    [
        ("collective", 2, 1, "FAILED: a wrong result of a collective, all_reduce of 1,048,576 bytes: wrong (2 ranks "),
        ("resume", 1, 1, "FAILED: resume is not equal in every bit: loss of step 4 is another; see {run}/smoke-1 ("),
        ("stop", 1, 85, "STOPPED by a signal before it was done ("),
        ("fault", 1, 1, "FAILED: RuntimeError: the first line (1 rank on 1 node, "),
    ],
    ids=["collective", "resume", "stop", "fault"],
)
def test_what_is_wrong_has_its_verdict_and_exit_code(
    prepared: Path, tmp_path: Path, how: str, ranks: int, code: int, words: str
) -> None:
    run_dir = tmp_path / "run"
    assert run_ranks(ending, ranks, how, small_file(prepared, tmp_path), run_dir) == [code] * ranks
    assert said(tmp_path)[-1].startswith(f"smoke: {words.format(run=run_dir)}")
    if how == "resume":
        assert len(list((run_dir / "smoke-1").rglob("step-*"))) == 3, "to look at"


def measured(rank: int) -> list[tuple[str, float, float]]:
    """As if every call took 0.5 s on rank 0 and 1.5 s on rank 1."""
    collectives._median_seconds = lambda call, device: 0.5 + rank
    found, faults = check_collectives(4100, torch.device("cpu"))
    assert not faults
    return [(one.name, one.seconds, one.bytes_per_second) for one in found]


def test_bandwidths_are_those_of_nccl_tests_on_the_slowest_rank() -> None:
    """Bus bandwidth, worked out by hand: of 4,096 bytes, which two ranks divide, half crosses the link; of a sum twice
    that. A pair sends all of them."""
    wanted = [("all_reduce", 1.5, 4096 / 1.5), *((name, 1.5, 2048 / 1.5) for name in HALF)]
    assert run_ranks(measured, 2) == [[*wanted, ("slowest pair (0 to 1)", 1.5, 4096 / 1.5)]] * 2
    assert str(collectives.Measured("all_reduce", 0.5, 2.5e9)) == "all_reduce 2.5 GB/s"


def lies(rank: int, names: list[str]) -> list[list[str]]:
    return [*(lying(rank, name) for name in names), lying_pair(rank)]


def lying(rank: int, name: str) -> list[str]:
    """One collective of rank 1 is off by one element."""
    call = getattr(dist, name)

    def wrong(*arguments: object, **options: object) -> object:
        done = call(*arguments, **options)
        if rank == 1:
            next(a for a in arguments if isinstance(a, torch.Tensor))[7] += 1
        return done

    setattr(dist, name, wrong)
    measured, faults = check_collectives(4096, torch.device("cpu"))
    setattr(dist, name, call)
    assert [one.bytes_per_second > 0 for one in measured] == [True] * 5
    return faults


def lying_pair(rank: int) -> list[str]:
    receive = dist.batch_isend_irecv

    def wrong(p2p_op_list: list[dist.P2POp]) -> list[dist.Work]:
        works = receive(p2p_op_list)
        for work in works:
            work.wait()
        if rank == 1:
            p2p_op_list[1].tensor[3] = -5.0
        return []

    dist.batch_isend_irecv = wrong
    _, faults = check_collectives(4096, torch.device("cpu"))
    dist.batch_isend_irecv = receive
    return faults


def test_a_collective_that_lies_is_named() -> None:
    """Element 7 of rank 1: 8 + 7 twice is 15 + 1, and so on; the numbers are worked out by hand."""
    wanted = {
        "all_reduce": "all_reduce: rank 1 has 16.0 at 7, 15.0 is right",  # 7 + (7 + 1)
        "all_gather_into_tensor": "all_gather: rank 1 has 8.0 at 7, 7.0 is right",  # rank 0's 7
        "reduce_scatter_tensor": "reduce_scatter: rank 1 has 36.0 at 7, 35.0 is right",  # 2 x (519 mod 251) + 1
        "all_to_all_single": "all_to_all: rank 1 has 18.0 at 7, 17.0 is right",  # rank 0's 519 mod 251
        "broadcast": "broadcast: rank 1 has 9.0 at 7, 8.0 is right",  # rank 1's 7 + 1
    }
    of_a_pair = "point to point from rank 0: rank 1 has -5.0 at 3, 3.0 is right"
    assert run_ranks(lies, 2, list(wanted)) == [[[words] for words in (*wanted.values(), of_a_pair)]] * 2


@pytest.mark.parametrize("size", [2, 1021, 20_000])
def test_right_results_are_whole_numbers_that_fp32_holds(size: int) -> None:
    """Else the order of a sum would decide whether thousands of ranks pass."""
    rank, base = size - 1, torch.arange(size).double() % 251
    found = {name: right for name, _, right in collectives._cases(rank, size, size, torch.device("cpu"))}
    total = size * base + sum(other % 1021 for other in range(size))  # fp64
    assert torch.equal(found["all_reduce"].double(), total) and float(total.max()) < 2**24
    assert found["reduce_scatter"].tolist() == [total[rank]]
    assert found["all_gather"].tolist() == [base[0] + other % 1021 for other in range(size)]
    assert found["all_to_all"].tolist() == [base[rank] + other % 1021 for other in range(size)]
    assert torch.equal(found["broadcast"].double(), base + rank % 1021)


def test_every_pair_of_few_ranks_exchanges_and_some_of_many() -> None:
    assert distances(5) == [1, 2, 3, 4] and len(distances(64)) == 63
    assert distances(65) == [1, 2, 4, 8, 16, 32, 64] and distances(16384)[-1] == 8192


def test_a_resume_that_differs_is_named(tmp_path: Path) -> None:
    """Two runs of which the second has another loss in its last step and another bit in its last checkpoint."""
    for name, last, bits in (("unbroken", 0.25, b"\x00"), ("resumed", 0.2500000001, b"\x01")):
        folder = tmp_path / name / "checkpoints" / "step-00000004"
        folder.mkdir(parents=True)
        other = 0.0 if name == "unbroken" else 1.0
        lines = [{"step": n, "loss": 0.5, "grad_norm": 1.0, "auxiliary_loss": 0.0} for n in (2, 3, 4)]
        lines[0] |= {"loss": other}  # before the checkpoint
        lines[1] |= {"grad_norm": 1.0 + other, "auxiliary_loss": other}
        lines[2] |= {"loss": last}
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "rank-00000.safetensors").write_bytes(bits)
        state = {"format_version": 2, "files": {p.name: digest_entry(p) for p in folder.iterdir()}}
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "commit.json").write_text(json.dumps(digest_entry(folder / "state.json")))
    assert cli.differences(tmp_path, 2) == [
        "auxiliary_loss of step 3 is 1.0 after the resume, 0.0 without",
        "grad_norm of step 3 is 2.0 after the resume, 1.0 without",
        "loss of step 4 is 0.2500000001 after the resume, 0.25 without",
        "rank-00000.safetensors of step-00000004 holds other bits",
    ]


def test_refusals(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_file(prepared, tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for arguments, words in (
        (["--steps", "1"], "error: --steps: 1 is too small; write 2 or more"),
        (["--mebibytes", "0"], "error: --mebibytes: 0 is too small; write 1 or more"),
        (["--set", "train.stepz=1"], "error: train.stepz: unknown key"),
        (["--set", "data.manifest=nowhere"], "error: data.manifest: there is no"),
        (["--set", "monitor.wandb=online"], "error: monitor.wandb: is online, but the package wandb is not installed"),
    ):
        assert cli.main(["--config", str(config), "--run-dir", str(tmp_path / "run"), *arguments]) == 2
        assert capsys.readouterr().err.startswith(words)
    assert not (tmp_path / "run").exists()


def test_the_first_two_steps_which_allocate_are_no_speed(tmp_path: Path) -> None:
    speeds = {1: 1.0, 2: 2.0, 3: 50.0, 4: 40.0, 5: 60.0, 6: 45.0}
    lines = [json.dumps({"step": step, "tokens_per_second": speed}) for step, speed in speeds.items()]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert cli.tokens_per_second(tmp_path) == 47.5


def test_nothing_is_sent_to_boards_or_people(prepared: Path, tmp_path: Path) -> None:
    """Of a run that does."""
    config = ("monitor.wandb=online", "monitor.tensorboard=true", "monitor.alert_command=date")
    found = cli.smoke_config(small_file(prepared, tmp_path), config, 2).monitor
    assert (found.wandb, found.tensorboard, found.alert_command) == ("off", False, None)


def test_help_says_what_a_pass_prints() -> None:
    assert "smoke: PASSED" in " ".join(cli.build_parser().format_help().split())


@pytest.mark.slow
def test_through_the_launcher(prepared: Path, tmp_path: Path) -> None:
    """Two ranks of the real launcher on the CPU, with the demo's model."""
    from tests.launch.launcher import command, environment

    line = command(2, prepared, tmp_path / "run")
    line[line.index(str(ROOT / "launch" / "pretrain.py"))] = str(ROOT / "launch" / "smoke.py")
    done = subprocess.run(
        [*line, "--steps", "2", "--mebibytes", "1"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "smoke: PASSED" in done.stdout
