"""The project can be installed: dependencies, lock and Makefile, without installing anything.

What is resolved is resolved by metadata alone, from plain PyPI: no option, mirror or wheel of this machine counts.
tests/test_real_install.py, slow, installs for real.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_packages

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
PRODUCT = ("common", "pretrain", "model", "launch", "data_prep")
IMPORT_NAMES = {"megatron-core": "megatron"}
NOT_IMPORTED_BY_US = {
    "tensorboard": "torch.utils.tensorboard imports it (pretrain/report/monitor.py)",
    "setuptools": "torch.utils.cpp_extension imports it, with which DeepSpeed builds its operators on a GPU",
    "aiohttp": "fsspec imports it for http:// and https:// inputs",
}


def environment() -> dict[str, str]:
    """Without the settings of pip and uv that this machine may have, but for certificates and proxies, and without what
    a `make test VARIABLE=value` around us hands down."""
    kept = ("PIP_CERT", "UV_CACHE_DIR", "SSL_CERT_FILE")
    dropped = ("PIP_", "UV_", "MAKE", "MFLAGS")
    ours = ("CUDA", "PYTHON", "RANKS")
    return {k: v for k, v in os.environ.items() if k in kept or (k not in ours and not k.startswith(dropped))}


UV_SETTINGS = """
[[index]]
url = "https://pypi.org/simple"
default = true
cache-control = { api = "max-age=600", files = "max-age=365000000, immutable" }
"""
"""All that uv is told. What PyPI allows to keep is said here, because a proxy may hide it: each of 12 resolutions would
then fetch and parse hundreds of pages again, 5 s of processor time."""


def compile_requirements(settings: Path, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "uv", "--config-file", str(settings)]
    line += ["pip", "compile", "--quiet", "--no-annotate", "--no-header"]
    line += ["--python", sys.executable]  # the one that asks; another one is named by --python-version
    return subprocess.run([*line, *arguments], cwd=cwd, env=environment(), capture_output=True, text=True, check=False)


CASES = {
    "all extras": ("--all-extras",),  # of which what fits without extras is a part
    "all extras beside torch 2.11": ("--all-extras", "--constraints", "{torch_2_11}"),
    "the lock": ("--all-extras", "--constraints", str(ROOT / "constraints.txt")),
}


@pytest.fixture(scope="module")
def resolved(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], subprocess.CompletedProcess[str]]:
    """(case, Python) -> what uv found. Skips, with the reason, where PyPI cannot be reached."""
    folder = tmp_path_factory.mktemp("uv")
    oldest, settings = folder / "torch.txt", folder / "uv.toml"
    oldest.write_text("torch==2.11.*\n")
    settings.write_text(UV_SETTINGS)

    def resolve(key: tuple[str, str]) -> subprocess.CompletedProcess[str]:
        case, python = key
        options = [option.format(torch_2_11=oldest) for option in CASES[case]]
        # Never --offline: without the newest version in its cache, uv takes an older one and does not say so.
        return compile_requirements(settings, "pyproject.toml", "--python-version", python, *options)

    first, *keys = [(case, python) for case in reversed(CASES) for python in PYTHONS]
    found = {first: reached(resolve(first))}  # alone: where nothing is reached, it takes half a minute to say so
    with ThreadPoolExecutor(len(keys)) as pool:
        found |= zip(keys, pool.map(resolve, keys), strict=True)
    return {key: reached(answer) for key, answer in found.items()}


def reached(answer: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """The connection may be lost in any of the resolutions."""
    unreachable = r"(?i)request failed|error sending request|failed to fetch|dns error|timed out|could not connect"
    if answer.returncode != 0 and re.search(unreachable, answer.stderr):
        pytest.skip("NOT TESTED: PyPI cannot be reached, so nothing says that the dependencies can be installed")
    return answer


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("case", CASES)
def test_dependencies_resolve(
    resolved: dict[tuple[str, str], subprocess.CompletedProcess[str]], case: str, python: str
) -> None:
    result = resolved[case, python]
    assert result.returncode == 0, result.stderr
    found = dict(line.split("==") for line in result.stdout.splitlines())
    torch, triton = (".".join(found[name].split(".")[:2]) for name in ("torch", "triton"))
    expected = {"all extras beside torch 2.11": ("2.11", "3.6"), "the lock": ("2.13", "3.7")}
    assert (torch, triton) == expected.get(case, ("2.15", "3.9"))
    if case == "the lock":
        assert found.items() <= pins(python).items(), "a package has no pin: make lock"


def pins(python: str) -> dict[str, str]:
    """Package -> version that constraints.txt gives for a Python on Linux. No package twice."""
    markers = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux"}
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate(markers):
            (specifier,) = pin.specifier
            assert specifier.operator == "==" and pin.name not in found
            found[canonicalize_name(pin.name)] = specifier.version
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_satisfies_pyproject(python: str) -> None:
    locked = pins(python)
    for text in (*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)):
        requirement = Requirement(text)
        assert locked.get(canonicalize_name(requirement.name), "none") in requirement.specifier, f"{text}: make lock"


def test_what_is_installed_is_declared_for_this_python() -> None:
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in PYTHONS
    for python in PYTHONS:
        assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(f"{python}.0")
    assert not Requirement(f"python{PROJECT['requires-python']}").specifier.contains("3.15.0")


def imported_at_run_time(path: Path) -> set[str]:
    """Top-level names of all imports of a file but those under `if TYPE_CHECKING:` and of files beside it."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            found.add(node.module.split(".")[0])
    return {name for name in found if not path.with_name(f"{name}.py").exists()}


@pytest.fixture(scope="module")
def imported() -> set[str]:
    """What the product imports and is not its own or Python's."""
    files = [path for folder in PRODUCT for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    return set().union(*map(imported_at_run_time, files)) - sys.stdlib_module_names - {*PRODUCT, "benchmarks"}


def declared_for_users() -> set[str]:
    """Names by which the dependencies of the product, extras included, are imported."""
    texts = [*PROJECT["dependencies"], *(text for name in EXTRAS if name != "dev" for text in EXTRAS[name])]
    names = {canonicalize_name(Requirement(text).name) for text in texts}
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}


def test_every_dependency_is_imported_by_the_code_that_it_is_for(imported: set[str]) -> None:
    unused = declared_for_users() - imported
    assert unused <= set(NOT_IMPORTED_BY_US), "not imported: move it to [dev], or name its reason in this file"


def test_every_import_is_a_dependency(imported: set[str]) -> None:
    """What tests and benchmarks alone import is in [dev]."""
    # torch brings the triton it works with, pydantic its own core, lm_eval the templates of its tasks.
    assert imported - declared_for_users() == {"triton", "pydantic_core", "jinja2"}


def test_every_package_folder_is_installed() -> None:
    """What setuptools finds by pyproject.toml is every folder of the product that holds Python files, but the script
    that rebuilds the sample."""
    installed = set(find_packages(str(ROOT), **PYPROJECT["tool"]["setuptools"]["packages"]["find"]))
    folders = {file.parent.relative_to(ROOT) for folder in PRODUCT for file in (ROOT / folder).rglob("*.py")}
    assert installed == {".".join(folder.parts) for folder in folders} - {"data_prep.sample"}


def test_libraries_import_what_they_are_said_to_import() -> None:
    """The reasons in NOT_IMPORTED_BY_US hold for the installed versions."""
    for package, file, name in (
        ("torch", "utils/tensorboard/writer.py", "tensorboard"),
        ("torch", "utils/cpp_extension.py", "setuptools"),
        ("fsspec", "implementations/http.py", "aiohttp"),
    ):
        origin = find_spec(package).origin  # type: ignore[union-attr]
        assert name in imported_at_run_time(Path(str(origin)).parent / file)


@pytest.fixture
def odd_copy(tmp_path: Path) -> Path:
    """The Makefile and what it reads, in a folder with a space and brackets."""
    folder = tmp_path / "a dir [work]"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


def dry_make(folder: Path, *arguments: str) -> str:
    """The commands that make would run; continued lines in one."""
    # Inside `make test` it is a make below a make, which names the folder that it enters.
    command = ["make", "--no-print-directory", "-n", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace("\\\n", " ")


@pytest.mark.parametrize("build", ["cpu", "cu126", "cu130"])
def test_make_install_takes_the_chosen_build_of_torch(odd_copy: Path, build: str) -> None:
    pip = ".venv/bin/python -m pip --disable-pip-version-check install --no-compile --progress-bar off"
    torch, rest = (line for line in dry_make(odd_copy, "install", f"CUDA={build}").splitlines() if pip in line)
    index = f"https://download.pytorch.org/whl/{build}"
    # Ours are pins of CUDA 13's libraries, which torch's build for CUDA 12 does not take.
    constraints = ".venv/constraints.txt" if build == "cu126" else "constraints.txt"
    torch, _, otherwise = torch.partition(" || ")
    assert torch == f'{pip} "torch=={pins("3.11")["torch"]}+{build}" -c {constraints} --extra-index-url {index}'
    assert "error: only download.pytorch.org has this torch" in otherwise and "exit 1" in otherwise
    before, _, rest = rest.partition(" & ")
    assert "import torch._dynamo" in before and before.endswith(">/dev/null 2>&1"), "beside pip, and never in its way"
    assert " ".join(rest.split()) == (
        f'PATH="$PWD/.venv/bin:$PATH" {pip} -e ".[dev]" -c {constraints}; status=$?; wait; exit $status'
    )
    stamp = odd_copy / ".venv" / ".installed"
    stamp.parent.mkdir()
    stamp.write_text(f"{build}\n")
    assert pip not in dry_make(odd_copy, "install", f"CUDA={build}"), "installed again"
    assert pip not in dry_make(odd_copy, "install"), "what is installed is good enough"
    assert pip in dry_make(odd_copy, "-B", "install"), "what `make doctor` advises where a package is missing"
    other = {"cpu": "cu130", "cu126": "cu130", "cu130": "cpu"}[build]
    assert f"+{other}" in dry_make(odd_copy, "install", f"CUDA={other}")


def test_make_install_takes_what_pip_finds_and_hides_nothing(odd_copy: Path) -> None:
    lines = dry_make(odd_copy, "install")
    assert (
        'install --no-compile --progress-bar off "torch" -c constraints.txt' in lines
        and "download.pytorch.org" not in lines
    )
    assert "--quiet" not in lines and " -q" not in lines
    on_a_terminal = dry_make(odd_copy, "install", "MAKE_TERMOUT=/dev/pts/0")
    assert on_a_terminal == lines.replace("--progress-bar off", "--progress-bar on")


def test_bytecode_is_written_where_the_environment_forbids_it(odd_copy: Path) -> None:
    """Or each process compiles torch and deepspeed anew: 17 s of processor time before training, for 6."""
    show = "show: ; @echo ${PYTHONDONTWRITEBYTECODE-not set}".replace("$", "$$")
    done = subprocess.run(
        ["make", "--no-print-directory", "-s", f"--eval={show}", "show"],
        cwd=odd_copy,
        env=environment() | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "not set\n"
    assert '.venv/bin/python -c "import tests.harness_preload"' in dry_make(odd_copy, "install")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["CUDA=12"], "CUDA=12: choose CUDA=cpu, CUDA=cu126 or CUDA=cu130"),
        (["PYTHON=/nowhere/python"], "error: Python 3.11 to 3.14 is needed"),
        (["PYTHON="], "error: Python 3.11 to 3.14 is needed"),
    ],
)
def test_make_install_refuses_with_the_fix(odd_copy: Path, arguments: list[str], words: str) -> None:
    done = subprocess.run(
        ["make", "install", *arguments], cwd=odd_copy, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and words in done.stdout + done.stderr
    assert not (odd_copy / ".venv").exists()


@pytest.mark.parametrize(
    "gpus, arguments, ranks", [(None, [], 2), (0, [], 2), (1, [], 1), (2, [], 2), (8, [], 2), (1, ["RANKS=3"], 3)]
)
def test_the_demo_puts_no_two_ranks_on_one_gpu(
    odd_copy: Path, monkeypatch: pytest.MonkeyPatch, gpus: int | None, arguments: list[str], ranks: int
) -> None:
    """None: no driver, as on a laptop; 0: a driver that sees no GPU."""
    smi = odd_copy / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    lines = [f"GPU {n}: NVIDIA H100 80GB HBM3 (UUID: GPU-{n})" for n in range(gpus or 0)] or ["No devices found."]
    smi.write_text("#!/bin/sh\n" + ("exit 127\n" if gpus is None else f"printf '%s\\n' {shlex.join(lines)}\n"))
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("RANKS", raising=False)
    assert re.findall(r"--num_gpus (\d+)", dry_make(odd_copy, "demo", *arguments)) == [str(ranks)]


def test_no_console_script_of_the_venv_is_run(odd_copy: Path) -> None:
    """Their first line is the path of Python, which may hold no space: everything runs as `python -m`."""
    targets = re.findall(r"(?m)^([a-z-]+):.*##", (ROOT / "Makefile").read_text())
    assert {"install", "doctor", "demo", "test", "lint"} <= set(targets)
    text = dry_make(odd_copy, *targets)
    # Not /.../.venv/bin/python3.11, the PYTHON of a shell in which an environment is active.
    assert set(re.findall(r"(?<!/)\.venv/bin/([\w.-]+)", text.replace("$PWD/.venv", ".venv"))) == {"python"}
    commands = {line.split()[0].strip('"') for line in text.splitlines() if line.strip()}
    assert not commands & {"deepspeed", "tensorboard", "ruff", "mypy", "pytest", "pip", "uv"}
    assert str(odd_copy) not in text, "an absolute path, which would need quotes"
