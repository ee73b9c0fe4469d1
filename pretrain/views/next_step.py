"""What launch/status.py says is to be done next with a run, and where it would go on."""

from __future__ import annotations

import shlex

from pretrain.config.validated import setting
from pretrain.report.exit_codes import NONE_IS_WHOLE, ExitCode, meaning_of
from pretrain.views.reading import RunView, State

NOT_THE_SAME_COMMAND = {
    ExitCode.REFUSED: "Change that, then start it again",
    ExitCode.DIVERGED: "The same command would diverge again: lower optimizer.learning_rate{}, or raise "
    "resilience.max_rollbacks or resilience.max_skipped_updates",
    ExitCode.FOLDER_LOST: "See who has the folder before you start it again",
}
"""What ends a run that would end there again. {}: how a run that goes on from a checkpoint is given other settings."""
BEGINS_ANEW = "it begins anew: nothing was saved"


def resume_text(view: RunView) -> str:
    """Where the run's own command would go on, following checkpoint.resume."""
    choice, begun = setting(view.config, "checkpoint.resume"), view.last("started").get("step")
    newest = view.checkpoints[-1] if view.checkpoints else None
    is_branch = isinstance(choice, str) and choice not in ("auto", "never")
    if is_branch and (newest is None or (isinstance(begun, int) and int(newest.removeprefix("step-")) <= begun)):
        # What lies in the folder may be of another branch.
        return f"it continues from {view.last('resumed').get('path', choice)}, for nothing was saved since"
    if newest is None:
        return BEGINS_ANEW
    return f"{'with checkpoint.resume=auto ' * (choice == 'never')}it continues from {newest}"


def again_text(view: RunView) -> str:
    """A run that was submitted starts by itself: its job goes back into the queue (docs/operations.md)."""
    is_job = (view.path / "slurm").is_dir()
    return "start the same command again" + ", unless its SLURM job is back in the queue (squeue)" * is_job


def next_text(view: RunView) -> str:
    """What to do now."""
    state, run, hang = view.state, shlex.quote(str(view.path)), view.path / "hang" / "message.txt"
    resume = resume_text(view)
    if state is State.STARTING:
        return f"wait; `python launch/status.py {run} --watch` follows it"
    if state is State.RUNNING:
        return f"`python launch/status.py {run} --watch` follows it; SIGUSR1 or SIGTERM stops it with a checkpoint"
    if state is State.FINISHED:
        steps = setting(view.config, "train.steps")
        if isinstance(steps, int) and view.step < steps:
            return f"the same command with a later train.stop_after_steps goes on; {resume}"
        return f"`python launch/generate.py {run} --interactive` lets it write; docs/use.md has the rest"
    if state is State.STOPPED:
        return f"{again_text(view)}; {resume}"
    if state is State.DEAD:
        return f"read the end of its log, then {again_text(view)}; {resume}"
    code = view.outcome.get("exit_code")
    if code == ExitCode.HUNG:
        return f"read {hang}: it names the rank that did not arrive; then {again_text(view)}; {resume}"
    if code == ExitCode.REFUSED and NONE_IS_WHOLE in str(view.outcome.get("reason")):
        resume = "what lies in checkpoints/ cannot be gone on from"
    goes_on = resume != BEGINS_ANEW
    changed = (text for known, text in NOT_THE_SAME_COMMAND.items() if known == code)
    then = next(changed, f"Then {again_text(view)}").format(" (with checkpoint.allow_changes)" * goes_on)
    return f"{meaning_of(code, something_saved=goes_on)}; the end of its log says more. {then}; {resume}"
