"""The job scripts under bash, with srun and scontrol that only write down how they were called: what follows which exit
code, and that arguments arrive as they were given. A real SLURM runs them in tests/slurm."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from common.paths import REPOSITORY
from launch.slurm import job
from tests.launch.slurm.bench import Bench, make_bench

SCRIPTS = sorted(job.FOLDER.glob("*.sbatch"))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return make_bench(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_and_shellcheck_accept_it(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed; bash -n passed")
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "code, requeued, words",
    [
        (0, False, "finished"),
        (2, False, "refused"),
        (3, False, "diverged"),
        (5, True, "a rank failed (exit code 5"),
        (6, False, "another run has taken over"),
        (85, True, "stopped by a signal"),
        (1, True, "a rank failed"),
        (137, True, "exit code 137"),
    ],
)
def test_what_follows_an_exit_code(bench: Bench, code: int, requeued: bool, words: str) -> None:
    ended, output = bench.train(SRUN_CODE=str(code))
    assert (ended, bench.requeues()) == (code, ["7"] if requeued else []), output
    assert words in output


def test_what_a_rank_of_this_start_refused_is_repeated(bench: Bench) -> None:
    _, output = bench.train(SRUN_CODE="2", SAYS="loading\nerror: rank 9: sees 7 GPUs\n", SAYS_IT="9")
    assert "\nerror: rank 9: sees 7 GPUs\n" in output and "refused (exit code 2): see " in output
    time.sleep(0.05)
    _, output = bench.train(SRUN_CODE="137")
    assert "sees 7 GPUs" not in output, "of an earlier start"


PYXIS = """\
slurmstepd: error: pyxis: failed to create container filesystem for image: /shared/a.sqsh
slurmstepd: error: pyxis:     [ERROR] No such file or directory: /shared/a.sqsh
slurmstepd: error: pyxis: --container-mounts: source path does not exist: /shared
slurmstepd: error: pyxis:     enroot-mount: failed to mount: /scratch at /run/a/scratch: No such file or directory
slurmstepd: error: pyxis: couldn't chdir to /shared/switchall: No such file or directory
"""


@pytest.mark.parametrize("why", [PYXIS, "FATAL:   While checking container: could not open image /shared/a.sif\n"])
def test_why_a_container_does_not_start_is_repeated(bench: Bench, why: str) -> None:
    rest = "slurmstepd: error: pyxis:     [INFO] Extracting\nslurmstepd: error: pyxis: child 9 failed with code 1\n"
    _, output = bench.train(SRUN_CODE="1", SAYS=f"{rest}{why}", SAYS_IT="0")
    assert set(why.splitlines()) <= set(output.splitlines())
    assert not set(rest.splitlines()) & set(output.splitlines())


def test_a_fault_that_comes_back_ends_the_job_and_a_checkpoint_forgives(bench: Bench) -> None:
    for restart, makes in enumerate(("", "", "step-00000010", "", "", "")):
        bench.train(SRUN_CODE="137", SLURM_RESTART_COUNT=str(restart), MAKES=makes, REPEATS="0")
    # Two without a checkpoint, one that made one, and two more: the third in a row is final.
    assert len(bench.requeues()) == 5
    _, output = bench.train(SRUN_CODE="85", FAULTS="1", MAKES="step-00000010")
    assert "not requeued: 4 starts in a row left no newer checkpoint than step-00000010" in output


def test_a_checkpoint_of_more_digits_is_newer(bench: Bench) -> None:
    """By name it comes before the others: each start would have left no newer one."""
    (bench.run_dir / "checkpoints" / "step-99999999").mkdir(parents=True)
    _, output = bench.train(SRUN_CODE="85", FAULTS="1", MAKES="step-100000000")
    assert "requeued, newest checkpoint: step-100000000" in output and bench.requeues() == ["7"]


def test_failed_ranks_start_again_on_the_same_nodes_as_long_as_that_helps(bench: Bench) -> None:
    code, output = bench.train(SRUN_CODE="137")
    ports = [call[1] for call in bench.calls("srun")]
    assert (code, len(ports), bench.requeues()) == (137, 2, ["7"]), output
    assert "(exit code 137; 128 + N: signal N); again on the same nodes, newest checkpoint: none" in output
    assert "start 1, again: 2 ranks on node[1-2]" in output and "requeued, newest checkpoint: none" in output
    # The first start after the requeue is the third in a row: final, and not repeated.
    code, output = bench.train(SRUN_CODE="137", SLURM_RESTART_COUNT="1")
    assert len(bench.calls("srun")) == 3 and "not requeued: 3 starts in a row" in output


KILLED = ["node2: task 1: Killed", "node1: task 0: Exited with exit code 7"]


def test_a_node_that_failed_alone_twice_is_excluded_and_its_faults_are_forgiven(bench: Bench) -> None:
    _, output = bench.train(SRUN_CODE="137", TASKS=json.dumps(KILLED), GIVEN="node[7-8]")
    assert len(bench.calls("srun")) == 2 and bench.requeues() == ["7"]
    assert bench.excluded() == ["ExcNodeList=node[7-8],node2"], output
    assert output.count("srun: error: node2: task 1: Killed") == 2
    assert "two starts in a row failed on node2 alone: excluded from this job from now on" in output
    assert (bench.run_dir / "slurm" / "7.faults").read_text() == "0\n"
    # The next bad node is one too many.
    _, output = bench.train(SRUN_CODE="137", TASKS=json.dumps(["node3: tasks 0-7: Exited with exit code 1"]))
    assert len(bench.excluded()) == 1 and "failed on node3 alone; not excluded: of this job 1 are already" in output


@pytest.mark.parametrize(
    "code, said",
    [
        # SLURM 22.05, where one rank of node2, whose GPU is gone, has refused to start.
        ("137", ["node2: task 1: Exited with exit code 2\nsrun: First task exited 120s ago", "node2: task 2: Killed"]),
        # Where node2 launches no task.
        (
            "1",
            [
                "Task launch for StepId=41.0 failed on node node2: Unable to layout tasks on given cpus",
                "Application launch failed: Unable to layout tasks on given cpus",
            ],
        ),
    ],
    ids=["refused", "not launched"],
)
def test_ranks_that_srun_kills_because_they_wait_are_no_fault_of_their_nodes(
    bench: Bench, code: str, said: list[str]
) -> None:
    bench.train(SRUN_CODE=code, TASKS=json.dumps([*said, "node1: task 0: Killed"]))
    assert len(bench.calls("srun")) == 2 and bench.excluded() == ["ExcNodeList=node2"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_srun_hands_the_environment_on_whatever_sbatch_was_told(bench: Bench, script: Path) -> None:
    """sbatch --export=NONE leaves SLURM_EXPORT_ENV=NONE, by which srun gives its tasks none of the job's variables."""
    (bench.folder / "bin" / "srun").write_text('#!/bin/sh\necho "srun: $SLURM_EXPORT_ENV"\n')
    _, output = bench.start(script, "dedup", SLURM_EXPORT_ENV="NONE")
    assert "srun: ALL\n" in output


def test_ranks_are_those_of_srun_whatever_the_shell_that_submitted_had(bench: Bench) -> None:
    """It held the variables of a launcher. An address that other nodes can reach is the user's wish."""
    ask = 'echo "srun: ${RANK-}${WORLD_SIZE-}${LOCAL_RANK-}${CROSS_SIZE-}, $MASTER_ADDR"\n'
    (bench.folder / "bin" / "srun").write_text(f"#!/bin/sh\n{ask}")
    (bench.folder / "bin" / "getent").write_text("#!/bin/sh\nexit 0\n")
    (bench.folder / "bin" / "getent").chmod(0o755)
    (bench.folder / "bin" / "scontrol").write_text("#!/bin/sh\necho node1\n")
    other = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "CROSS_SIZE": "1"}
    for given, address in (("localhost", "node1"), ("127.0.0.1", "node1"), ("10.0.0.1", "10.0.0.1")):
        _, output = bench.train(MASTER_ADDR=given, **other)
        assert f"srun: , {address}\n" in output


def test_it_is_not_tried_a_third_time_before_it_is_excluded(bench: Bench) -> None:
    """Although a checkpoint came in between."""
    bench.train(SRUN_CODE="137", TASKS=json.dumps(KILLED), MAKES="step-00000010", REPEATS="5", FAULTS="9")
    assert len(bench.calls("srun")) == 2 and bench.excluded() == ["ExcNodeList=node2"]


@pytest.mark.parametrize(
    "tasks",
    [
        ["node[1-2]: tasks 0-1: Exited with exit code 1"],
        ["node1: task 0: Killed", "node2: task 1: Segmentation fault (core dumped)"],
        ["node1: task 0: Exited with exit code 7", "node2: task 1: Exited with exit code 5"],
        [],
    ],
)
def test_a_fault_of_several_nodes_or_of_none_excludes_nothing(bench: Bench, tasks: list[str]) -> None:
    bench.train(SRUN_CODE="1", TASKS=json.dumps(tasks))
    assert bench.requeues() == ["7"] and not bench.excluded()


DIFFER = ["node1: task 0: Exited with exit code 4", "node2: task 1: Exited with exit code 4"]


def test_a_node_whose_weights_differ_from_the_majority_is_excluded_at_once(bench: Bench) -> None:
    outcome = {"exit_code": 4, "reason": 'rank 1 "differs"', "step": 8, "time": 1e9, "node": "node2"}
    code, output = bench.train(SRUN_CODE="4", TASKS=json.dumps(DIFFER), OUTCOME=json.dumps(outcome))
    assert (code, len(bench.calls("srun")), bench.requeues()) == (4, 1, ["7"])
    assert bench.excluded() == ["ExcNodeList=node2"], output
    words = "the weights on node2 differ from those of most replicas: excluded from this job from now on"
    assert words in output
    # An outcome of that start says nothing about the next one, nor does one that names no node.
    bench.train(SRUN_CODE="4", TASKS=json.dumps(DIFFER), EXCLUDES="9")
    outcome.pop("node")
    bench.train(SRUN_CODE="4", TASKS=json.dumps(DIFFER), EXCLUDES="9", OUTCOME=json.dumps(outcome))
    assert len(bench.excluded()) == 1


def test_nodes_that_failed_in_turns_are_not_excluded(bench: Bench) -> None:
    for restart, node in enumerate(("node1", "node2", "node1")):
        tasks = json.dumps([f"{node}: task 0: Killed"])
        bench.train(SRUN_CODE="137", TASKS=tasks, REPEATS="0", FAULTS="9", SLURM_RESTART_COUNT=str(restart))
    assert len(bench.requeues()) == 3 and not bench.excluded()


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"UP": "node1\nnode2"}, "not excluded: too few others are up"),
        ({"UPDATE_CODE": "1"}, "not excluded: SLURM refuses it"),
        ({"EXCLUDES": "0"}, "requeued, newest checkpoint: none"),
    ],
)
def test_a_job_that_could_not_start_without_the_node_keeps_it(
    bench: Bench, variables: dict[str, str], words: str
) -> None:
    code, output = bench.train(SRUN_CODE="137", TASKS=json.dumps(KILLED), **variables)
    assert code == 137 and words in output and "from now on" not in output


@pytest.mark.parametrize("code, variables", [("4", {}), ("85", {}), ("143", {}), ("137", {"PROGRAM": "smoke.py"})])
def test_what_would_not_help_is_not_started_again(bench: Bench, code: str, variables: dict[str, str]) -> None:
    bench.train(SRUN_CODE=code, **variables)
    assert len(bench.calls("srun")) == 1


@pytest.mark.parametrize(
    "seconds, warned, starts", [(600, {}, 1), (3600, {}, 2), (3600, {"SIGNAL_SECONDS": "3660"}, 1)]
)
def test_ranks_are_not_started_again_shortly_before_the_limit(
    bench: Bench, seconds: int, warned: dict[str, str], starts: int
) -> None:
    """Or once SLURM has warned them: it does so once, and they would train until they are killed. Of a SLURM that sets
    no SLURM_JOB_END_TIME scontrol says when that is."""
    end = int(time.time()) + seconds
    bench.train(SRUN_CODE="137", SLURM_JOB_END_TIME=str(end), **warned)
    assert len(bench.calls("srun")) == starts
    (bench.run_dir / "slurm" / "7.faults").unlink()
    bench.train(SRUN_CODE="137", END_TIME=time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(end)), **warned)
    assert len(bench.calls("srun")) == 2 * starts


def test_a_limit_that_was_changed_since_the_job_started_counts(bench: Bench) -> None:
    """scontrol update TimeLimit=...: the job's own variable keeps the end that it had."""
    now = int(time.time())
    ends = {"SLURM_JOB_END_TIME": str(now + 600), "END_TIME": time.strftime("%FT%T", time.localtime(now + 3600))}
    bench.train(SRUN_CODE="137", **ends)
    assert len(bench.calls("srun")) == 2


def test_options_of_srun_follow_ours_and_words_in_quotes_stay_one(bench: Bench) -> None:
    bench.train(SRUN_OPTIONS="--container-image='/shared/a b.sqsh' --cpu-bind=none")
    [(arguments, _, _)] = bench.calls("srun")
    given = ["--container-image=/shared/a b.sqsh", "--cpu-bind=none"]
    # Of two values of an option the last one counts. 120 s: ranks may still save when the first has left.
    assert arguments[:5] == ["--distribution=block:block", *given, "--kill-on-bad-exit=0", "--wait=120"]
    bench.start(job.FOLDER / "data_prep.sbatch", "dedup", SRUN_OPTIONS="--container-image='/shared/a b.sqsh'")
    assert bench.calls("srun")[1][0][:2] == ["--container-image=/shared/a b.sqsh", "--ntasks=1"]


def test_the_verdict_of_a_smoke_test_is_the_last_line_and_nothing_is_requeued(bench: Bench) -> None:
    rank0 = "smoke: all_reduce 1 GB/s\nsmoke: PASSED: all of it\nfrom a library\n"
    code, output = bench.train(PROGRAM="smoke.py", SAYS=rank0)
    assert code == 0 and output.splitlines()[-1].endswith("job 7: smoke: PASSED: all of it (exit code 0)")
    [(arguments, _, _)] = bench.calls("srun")
    assert str(REPOSITORY / "launch" / "smoke.py") in arguments
    code, output = bench.train(PROGRAM="smoke.py", SAYS="Killed\n", SRUN_CODE="137")
    assert code == 137 and "smoke: FAILED: no verdict, see " in output.splitlines()[-1]
    assert not bench.requeues()


def test_a_half_written_checkpoint_is_none(bench: Bench) -> None:
    _, output = bench.train(SRUN_CODE="1", MAKES="step-00000010.partial", REPEATS="0")
    assert "newest checkpoint: none" in output and (bench.run_dir / "slurm" / "7.faults").read_text() == "1\n"


def test_requeues_are_bounded(bench: Bench) -> None:
    code, output = bench.train(SRUN_CODE="85", REQUEUES="4", SLURM_RESTART_COUNT="4")
    assert code == 85 and not bench.requeues() and "4 restarts were allowed and used" in output
    code, output = bench.train(REQUEUES="4", SLURM_RESTART_COUNT="5")  # SLURM's own, after a node failure
    assert code == 1 and len(bench.calls("srun")) == 1 and "4 restarts are allowed" in output


def test_slurm_may_end_the_script_before_scontrol_returns(bench: Bench) -> None:
    """And scontrol itself: what was done is written all the same."""
    code, output = bench.train(SRUN_CODE="137", ENDS="1")
    assert code == 137 and "exit code 137; 128 + N: signal N); requeued" in output
    code, output = bench.start(job.FOLDER / "data_prep.sbatch", "dedup", SRUN_CODE="137", ENDS="1")
    assert code == 137 and "exit code 137; requeued" in output
    assert not bench.calls("sleep"), "what SLURM has ended waits for nothing"


def test_a_refused_requeue_is_said(bench: Bench) -> None:
    code, output = bench.train(SRUN_CODE="85", REQUEUE_CODE="1")
    assert code == 85 and "SLURM refuses it" in output


@pytest.mark.parametrize("reason, requeued", [("TimeLimit", True), ("None", False)])
def test_sigterm_at_the_limit_requeues_and_scancel_does_not(bench: Bench, reason: str, requeued: bool) -> None:
    script = job.FOLDER / "pretrain.sbatch"
    process = bench.open(script, "--config", "c.json", RANKS_STAY="1", SRUN_CODE="85", REASON=reason)
    bench.terminate(process, starts=1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 85, output
    assert bench.requeues() == (["7"] if requeued else []), output


@pytest.mark.parametrize("has_disk", [True, False])
def test_the_exit_code_of_the_ranks_is_known_though_bash_has_lost_it(bench: Bench, has_disk: bool) -> None:
    """As bash 5.2 does when a second signal comes while it handles one. Without a disk there is its answer alone."""
    lost = 'builtin wait "$@"; return -1' if has_disk else 'builtin wait "$@"'
    if not has_disk:
        (bench.run_dir / "slurm" / "7.code").mkdir(parents=True)
    code, output = bench.train(SRUN_CODE="3", **{"BASH_FUNC_wait%%": "() { " + lost + "; }"})
    assert code == 3 and "diverged (exit code 3)" in output


@pytest.mark.parametrize("reason, requeued", [("TimeLimit", True), ("None", False)])
@pytest.mark.parametrize("script, arguments", [("pretrain", ["--config", "c.json"]), ("data_prep", ["dedup"])])
def test_ranks_that_scancel_ends_before_the_script_hears_of_it_are_not_revived(
    bench: Bench, script: str, arguments: list[str], reason: str, requeued: bool
) -> None:
    """SLURM signals the steps of a job one after the other, and its own state is COMPLETING by then."""
    code, output = bench.start(
        job.FOLDER / f"{script}.sbatch", *arguments, SRUN_CODE="143", STATE="COMPLETING", REASON=reason
    )
    assert code == 143 and bench.requeues() == (["7"] if requeued else []), output
    assert ("terminated from outside (scancel or preemption); not requeued from here" in output) == (not requeued)


def test_arguments_and_settings_arrive_as_they_were_given(bench: Bench) -> None:
    nasty = ["--set", "description=$(touch injected) `touch injected` \"; touch injected #'", "a  b", "*", "~", "\\"]
    text = job.script(
        job.Template.load("pretrain.sbatch"),
        options={"output": job.output_pattern(bench.run_dir / "50%") + "/%j.log"},
        more_options=["--gres=gpu:8", "--exclusive"],
        settings={"RUN_DIR": str(bench.run_dir), "NOTE": "$(touch injected)"},
        setup=["touch set-up"],
        arguments=nasty,
    )
    assert f'#SBATCH --output="{bench.run_dir}/50%%/%j.log"\n' in text
    assert "#SBATCH --gres=gpu:8\n" in text and "#SBATCH --exclusive\n" in text
    assert text.count("#SBATCH --output") == 1, "the template's default stayed"
    path = bench.folder / "job.sbatch"
    path.write_text(text)
    code, output = bench.start(path)
    assert code == 0, output
    (arguments, _, _) = bench.calls("srun")[0]
    assert arguments[-len(nasty) :] == nasty
    assert arguments[-len(nasty) - 2 : -len(nasty)] == ["--run-dir", str(bench.run_dir)]
    assert (bench.folder / "set-up").exists() and not list(bench.folder.rglob("injected"))


def test_the_port_is_the_jobs_and_free(bench: Bench) -> None:
    bench.train(SLURM_CPUS_PER_TASK="3")
    [(_, port, threads)] = bench.calls("srun")
    assert port == str(10000 + 7 * 131) and threads == "3"
    # Of whatever address of the node another program has it, as the server of another job beside this one.
    places = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "127.0.0.2")]
    places += [(socket.AF_INET6, "::1")] if Path("/proc/net/if_inet6").exists() else []
    with contextlib.ExitStack() as stack:
        for more, (family, address) in enumerate(places):
            other = stack.enter_context(socket.socket(family))
            other.bind((address, int(port) + more))
            other.listen()
        bench.train()
    assert bench.calls("srun")[1][1] == str(int(port) + len(places))
    # Of a later start another one, and none from 32768 on, where the kernel takes those of outgoing connections from.
    bench.train(SLURM_JOB_ID="400", SLURM_RESTART_COUNT="2")
    assert bench.calls("srun")[2][1] == str(10000 + (400 * 131 + 2) % 20000) == "22402"


def test_data_preparation_takes_its_slice_and_requeues_its_task_alone(bench: Bench) -> None:
    script = job.FOLDER / "data_prep.sbatch"
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}
    code, output = bench.start(script, "dedup", "--config", "a b.json", SRUN_CODE="143", **array)
    assert code == 143 and bench.requeues() == ["7_3"], output
    arguments = bench.calls("srun")[0][0]
    assert arguments[-9:] == [
        *("dedup", "--task", "3", "--tasks", "4", "--set", "workers=1"),
        *("--config", "a b.json"),
    ]
    code, _ = bench.start(script, "encode", SRUN_CODE="143", SLURM_RESTART_COUNT="5", **array)
    assert code == 143 and len(bench.requeues()) == 1
    code, _ = bench.start(script, "shard", SRUN_CODE="2")
    assert code == 2 and len(bench.requeues()) == 1
    assert "--task" not in bench.calls("srun")[-1][0]


def test_a_task_whose_configuration_has_changed_is_refused(bench: Bench) -> None:
    """One that may hold secrets is not copied; its sum stands in the script."""
    script, config = job.FOLDER / "data_prep.sbatch", bench.folder / "it's data.json"
    config.write_text("{}")
    checked = f"{hashlib.sha256(b'{}').hexdigest()}  {config}"
    code, output = bench.start(script, "dedup", "--config", str(config), CONFIG_SUM=checked)
    assert code == 0 and len(bench.calls("srun")) == 1, output
    config.write_text('{"workers": 1}')
    code, output = bench.start(script, "dedup", "--config", str(config), CONFIG_SUM=checked)
    assert code == 2 and len(bench.calls("srun")) == 1 and not bench.requeues()
    assert f"refused: {config} has changed since this job was submitted" in output
