"""Which device a run computes on, why a GPU that is there cannot be used, and the one GPU of this process.

Together with device.py this is where torch.cuda is called. No test executes branches marked `GPU-ONLY name`
(docs/untested-on-gpu.md).
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.errors import UserError
from common.tables import counted
from pretrain.ranks import ON_NODE, Ranks

DRIVER = Path("/proc/driver/nvidia/version")
"""Written by NVIDIA's kernel driver while it is loaded."""
DEVICES = Path("/dev")
"""Where each GPU that this process may open has a file nvidia0, nvidia1, ..."""
PCI = Path("/sys/bus/pci/devices")
"""Where Linux says of each device which cores are near it."""
HIDDEN = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES by which a user, or SLURM for a job without GPUs, hides every GPU."""
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_DETERMINISTIC = (":4096:8", ":16:8")
"""The values of CUBLAS_WORKSPACE_CONFIG that torch accepts with deterministic algorithms."""
NVLS = "NCCL_NVLS_ENABLE"
"""Whether NCCL may let the switches of NVLink add up: 0, 1, or 2 (its default) where it finds that it can."""
_NUMERICS = contextlib.ExitStack()
"""Holds them for the life of the process: torch's choice of fused attention has only a context manager."""
NCCL_HEARTBEAT = "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"
"""torch ends a process whose NCCL thread has stood still for this many seconds (480 if unset)."""


def gpu_memory() -> int | None:
    """Bytes of the first GPU that this process may use; None without one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an unusable driver
        if torch.cuda.is_available():  # GPU-ONLY gpu-memory
            return int(torch.cuda.get_device_properties(0).total_memory)
    return None


def card_name() -> str | None:
    """The name of this machine's first GPU as its driver gives it, read without starting CUDA; None without one."""
    for file in sorted(DRIVER.parent.glob("gpus/*/information")):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            found = re.search(r"^Model:\s*(.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            if found is not None:
                return found[1].strip()
    return None


def device_type(wanted: str = "auto") -> str:
    """`cuda` or `cpu`, what this machine's ranks compute on. `wanted` is train.device; `auto` takes DeepSpeed's own
    variable DS_ACCELERATOR, and where it is not set a usable GPU, else the CPU. Raises UserError where there is a GPU
    that cannot be used: otherwise the ranks would train on the CPU without a word."""
    chosen = _named(wanted)
    if chosen == "cpu":
        return "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an unusable driver: the reason is said below, in one sentence
        if torch.cuda.is_available():
            return "cuda"
        reason = why_unusable(os.environ)
    if chosen == "cuda":
        key = "train.device" if wanted == "cuda" else "DS_ACCELERATOR"
        fix = "--set train.device=cpu trains" if wanted == "cuda" else "unset it to train"
        raise UserError(
            f"{key}: is cuda, but torch finds no usable GPU here; {fix} on the CPU "
            f"({reason or 'there is no sign of an NVIDIA driver; python launch/doctor.py says what is missing'})"
        )
    if reason is not None:
        raise UserError(
            f"train.device: auto finds an NVIDIA driver or a request for a GPU, but torch cannot use one: {reason}; or "
            f"train on the CPU with --set train.device=cpu"
        )
    return "cpu"


def usable_gpus() -> int:
    """How many GPUs this process can compute on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def usable_device(name: str) -> torch.device:
    """cpu, cuda or cuda:1 of a program that asks a trained model. Raises UserError for another one, and for a GPU that
    cannot be used."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):  # of no such name, of no string
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device: is {name!r}; give cpu, cuda, or one of several GPUs as cuda:1")
    if device.type == "cuda" and (device.index or 0) >= (found := usable_gpus()):
        has = f"this process has {counted(found, 'GPU')}" if found else "torch finds no usable GPU here"
        raise UserError(
            f"device: is {name}, but {has} (python launch/doctor.py says why); leave it out to compute on the CPU"
        )
    return device


def planned_device_type(wanted: str) -> str:
    """The device that a dry run checks the configuration for: `wanted` where it names one, on any machine; else what
    can be used here."""
    chosen = _named(wanted, contradictions=False)
    if chosen != "auto":
        return chosen
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return "cuda" if torch.cuda.is_available() else "cpu"


def _named(wanted: str, *, contradictions: bool = True) -> str:
    """cuda or cpu where train.device or DS_ACCELERATOR names it, else auto. Raises UserError if the two disagree."""
    named = os.environ.get("DS_ACCELERATOR")
    if named not in (None, "cuda", "cpu"):
        raise UserError(
            f"DS_ACCELERATOR: is {named!r} in the environment, but this project computes on cuda and on cpu; set it to "
            f"one of the two, or unset it"
        )
    if wanted == "auto":
        return named or "auto"
    if contradictions and named not in (None, wanted):
        raise UserError(
            f"train.device: is {wanted}, but DS_ACCELERATOR is {named} in the environment; unset DS_ACCELERATOR, or "
            f"--set train.device={named}"
        )
    return wanted


def why_unusable(env: Mapping[str, str]) -> str | None:
    """Why torch, which found no GPU, can use none of this machine's, with the fix; None if there is no sign of a GPU,
    or if all are hidden on purpose."""
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in HIDDEN:
        return None
    files = sorted(DEVICES.glob("nvidia[0-9]*"))
    if not files and not _is_expected(env):
        return None
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} was built without CUDA; install a build with it (make -B install CUDA=cu130, "
            "or cu126 if the driver is older than 580)"
        )
    if not files:
        return (
            "no GPU was given to this container or job (there is no /dev/nvidia0); start it with one (docker run "
            "--gpus all, srun --gpus-per-node)"
        )
    closed = [str(file) for file in files if not os.access(file, os.R_OK | os.W_OK)]
    if len(closed) == len(files):
        return f"this user may not open {closed[0]}; ask for read and write permission"
    return _in_torchs_words(visible)


def _is_expected(env: Mapping[str, str]) -> bool:
    """Whether driver, container, scheduler or user speak of GPUs, though there is no device file of one."""
    asked = any(
        env.get(name, "0") not in ("", "0") for name in ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE")
    )
    in_container = env.get("NVIDIA_VISIBLE_DEVICES", "void") not in ("", "void", "none")
    # DeepSpeed's launcher, which also sets CROSS_SIZE, numbers the ranks of a machine without GPUs by this variable.
    by_user = "CUDA_VISIBLE_DEVICES" in env and "CROSS_SIZE" not in env
    return asked or in_container or by_user or DRIVER.exists() or shutil.which("nvidia-smi") is not None


def _in_torchs_words(visible: str | None) -> str:
    try:
        torch.cuda.init()
        words = "no GPU is usable"
    except Exception as error:  # RuntimeError of CUDA, AssertionError of a build without it
        words = str(error).splitlines()[0].rstrip(". ")
    driver = ""
    with contextlib.suppress(OSError, IndexError):
        driver = f", driver {DRIVER.read_text().split('Module')[1].split()[0]}"
    versions = f"torch is built for CUDA {torch.version.cuda}{driver}"
    if "too old" in words:
        return (
            f"the NVIDIA driver is too old ({versions}); update it, or install a torch that is built for an older CUDA "
            "(make -B install CUDA=cu126)"
        )
    if visible is not None and "No CUDA GPUs" in words:
        return f"CUDA_VISIBLE_DEVICES = {visible} names no GPU of this machine; correct or unset it"
    return f"torch says: {words} ({versions}); see nvidia-smi and python launch/doctor.py"


def own_gpu(ranks: Ranks) -> torch.device:
    """Makes the GPU of this rank the current one, before any call that would start CUDA on another: GPU LOCAL_RANK of
    those that the process sees, or the only one where the launcher shows each process its own (srun --gpus-per-task, or
    CUDA_VISIBLE_DEVICES with one number or UUID). Two ranks on one GPU are found by NCCL, when the ranks meet. Raises
    UserError."""
    count, index = torch.cuda.device_count(), ranks.local_rank
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if count == 1 and len(visible) == 1:
        index = 0
    if index >= count:
        raise UserError(
            f"LOCAL_RANK: is {ranks.local_rank}, but this process sees {counted(count, 'GPU')}; start one rank "
            f"per GPU of a node, each of which sees all of them (srun --gpu-bind=none) or its own alone (srun "
            f"--gpus-per-task=1)"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    # DeepSpeed's engine takes the GPU of this number.
    os.environ.update({ON_NODE: str(ranks.local_rank), "LOCAL_RANK": str(index)})
    return device


def is_far_from_its_cores(device: torch.device) -> bool:
    """Whether this process may run on no core of the processor that its GPU is attached to; False where the machine
    does not say."""
    if device.type != "cuda":
        return False
    properties: Any = torch.cuda.get_device_properties(device)  # GPU-ONLY gpu-cores
    try:
        place = (properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id)
        near = cores_in((PCI / "{:04x}:{:02x}:{:02x}.0".format(*place) / "local_cpulist").read_text(encoding="ascii"))
        return bool(near) and near.isdisjoint(os.sched_getaffinity(0))
    except (AttributeError, OSError, ValueError):  # another torch, another system
        return False


def cores_in(text: str) -> set[int]:
    """0, 1, 2, 8 of `0-2,8`. Raises ValueError."""
    ends = [part.partition("-") for part in text.strip().split(",") if part]
    return {core for first, _, last in ends for core in range(int(first), int(last or first) + 1)}


def set_numerics(device: torch.device, *, deterministic: bool) -> None:
    """`numerics` for the life of the process."""
    _NUMERICS.enter_context(numerics(device, deterministic=deterministic))


@contextlib.contextmanager
def numerics(device: torch.device, *, deterministic: bool) -> Iterator[None]:
    """torch's switches as a run has them on `device`, a GPU; afterwards they are as they were. Products are never added
    up in half precision. Fused attention is cuDNN's first on capability 9.0 (H100, H200), where it is expected to be
    the fastest that torch has; not measured here. Its backward pass is not deterministic, so it is left out where
    `deterministic` (train.deterministic) asks for that."""
    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with contextlib.ExitStack() as stack:
        for flag in ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
            stack.enter_context(_switched_off(torch.backends.cuda.matmul, flag))
        if deterministic:
            stack.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
            torch.use_deterministic_algorithms(True)
            # It would find bugs by filling every new tensor.
            stack.enter_context(_switched_off(torch.utils.deterministic, "fill_uninitialized_memory"))
            stack.enter_context(sdpa_kernel(others, set_priority=True))
        elif torch.cuda.get_device_capability(device) == (9, 0):
            stack.enter_context(sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *others], set_priority=True))
        yield


@contextlib.contextmanager
def _switched_off(owner: Any, name: str) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, False)
    try:
        yield
    finally:
        setattr(owner, name, before)


def ask_cublas_for_determinism() -> None:
    """cuBLAS reads this when CUDA starts. Raises UserError where the environment has another wish."""
    given = os.environ.setdefault(CUBLAS, CUBLAS_DETERMINISTIC[0])
    if given not in CUBLAS_DETERMINISTIC:
        raise UserError(
            f"train.deterministic: cuBLAS repeats its results only with {CUBLAS} = "
            f"{' or '.join(CUBLAS_DETERMINISTIC)}, but it is {given!r} in the environment; unset it, or set "
            f"train.deterministic to false"
        )


def ask_nccl_for_determinism() -> None:
    """NCCL reads this when the ranks meet. The switches of NVLink add up in another order at every call
    (github.com/NVIDIA/nccl/issues/1497). torch, asked for deterministic algorithms, excludes NCCL's algorithm NVLS by
    NCCL_ALGO, but not NVLSTree, by which nodes with such switches add up together. Raises UserError where the
    environment has another wish."""
    given = os.environ.setdefault(NVLS, "0")
    if given != "0":
        raise UserError(
            f"train.deterministic: NCCL repeats its sums only with {NVLS} = 0, but it is {given!r} in the environment; "
            f"unset it, or set train.deterministic to false"
        )


def let_the_watchdog_speak_first(timeout_seconds: float, *, speaks: bool) -> None:
    """Gives NCCL no shorter patience than `timeout_seconds`, in which the watchdog has long named the rank that did not
    arrive: for torch's monitor of NCCL's thread, and for groups that are made without a limit of their own (600 s).
    Call before the process group. `speaks`: warn if the environment says otherwise."""
    given = os.environ.setdefault(NCCL_HEARTBEAT, str(math.ceil(timeout_seconds)))
    if speaks and given.strip().isdigit() and int(given) < timeout_seconds:
        print(
            f"warning: {NCCL_HEARTBEAT} = {given} is shorter than the {timeout_seconds:.0f} s that ranks wait for each "
            f"other, so NCCL may end a run that hangs before the watchdog says why; unset it",
            file=sys.stderr,
            flush=True,
        )
    # new_group(timeout=None), which DeepSpeed and megatron-core call, reads this and not the world's own limit.
    # RELIES-ON torch-limit
    dist.distributed_c10d.default_pg_nccl_timeout = timedelta(seconds=timeout_seconds)


@contextlib.contextmanager
def refusing_a_shared_gpu() -> Iterator[None]:
    """NCCL's refusal of two ranks on one GPU becomes a UserError."""
    try:
        yield
    except dist.DistError as error:
        if "Duplicate GPU" not in str(error):
            raise
        detail = next(line for line in str(error).splitlines() if "Duplicate GPU" in line).strip()
        raise UserError(
            f"CUDA_VISIBLE_DEVICES: two ranks of a node have the same GPU (NCCL: {detail}); let each rank see all GPUs "
            f"of its node (srun --gpu-bind=none), or another one each"
        ) from None


def what_nccl_says(error: dist.DistError) -> str | None:
    """The kind of NCCL's error and its own reason, which torch puts below its first line; None if it is another's."""
    kind, *more = str(error).splitlines()
    if not kind.startswith("NCCL error in:"):
        return None
    kind = kind.partition(", ")[2].partition(" (run with")[0] or kind  # without the line of torch's code
    reasons = [line.strip() for line in more if line.strip() and line.strip() != "Last error:"]
    return f"{kind}: {reasons[-1]}" if reasons else kind
