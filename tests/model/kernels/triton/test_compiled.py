"""The gate over compiled kernels: every shipped configuration passes on four architectures, and it can fail.

Compiling needs a process without TRITON_INTERPRET, so everything here runs `benchmarks.compiled` in one."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks import compiled, compiled_case
from benchmarks.compiled_records import in_one_table, read_records, summary, write_records
from benchmarks.marked import with_table
from model.kernels.backend import attention_limit

ROOT = Path(__file__).resolve().parents[4]
GATE_KERNELS = "tests.model.kernels.triton.gate_kernels"


def compiling(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    without = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=without, capture_output=True, text=True, check=False
    )


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return compiling(["-m", "benchmarks.compiled", *arguments])


SEVERAL = """
import contextlib, io, json, sys
from benchmarks import compiled_entries
from benchmarks.compiled import main
compiled_entries.load = dict
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(arguments)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def run_several(calls: list[tuple[str, ...]]) -> list[subprocess.CompletedProcess[str]]:
    """What `run` of each gives, in one process: torch and Triton are imported once. Entries of the table of measured
    tiles are compiled by a slow test."""
    done = compiling(["-c", SEVERAL, json.dumps(calls)])
    assert done.returncode == 0, done.stdout + done.stderr
    return [
        subprocess.CompletedProcess(call, *json.loads(said))
        for call, said in zip(calls, done.stdout.splitlines(), strict=True)
    ]


def verdicts(output: str) -> dict[tuple[str, int], str]:
    """(case, architecture) -> why it fails, from the Markdown table."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines() if line[:1] == "|"]
    assert rows[0][:2] == ["kernel", "sm"] and rows[0][-1] == "fails"
    return {(row[0], int(row[1])): row[-1] for row in rows[2:]}


class Checked(NamedTuple):
    """What --check said of all configurations, of some whose records are another Triton's, and of a part."""

    every: subprocess.CompletedProcess[str]
    foreign: subprocess.CompletedProcess[str]
    part: subprocess.CompletedProcess[str]
    complete: str
    """The version of the foreign records that are taken."""


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    others = read_records(compiled.RECORDS)
    others.pop(version("triton"), None)
    foreign = tmp_path_factory.mktemp("foreign") / "compiled.csv"
    write_records(foreign, others)
    # What is kept of every version.
    names = ("--representative", "--only", "switchhead_(value|output) forward .*2048x128")
    calls = [("--check",), ("--check", "--records", str(foreign), *names), ("--check", "--representative")]
    every, of_foreign, part = run_several(calls)
    return Checked(every, of_foreign, part, complete=next(iter(others)))


def test_every_shipped_configuration(checked: Checked) -> None:
    """All of them by the record of what the compiler gave, or compiled where there is none."""
    assert checked.every.returncode == 0, checked.every.stdout + checked.every.stderr


def test_the_records_of_another_triton_are_said_to_be_so(checked: Checked) -> None:
    """Nothing is compiled for a Triton without records; the output names both versions and the command."""
    result, installed = checked.foreign, version("triton")
    assert result.returncode == 0 and "2 configurations, 0 compiled" in result.stdout, result.stdout + result.stderr
    named = f"2 of them are records of Triton {checked.complete}, and this is Triton {installed}, of which"
    assert named in result.stderr
    assert "to compile and record them for it: python -m benchmarks.compiled --check --update" in result.stderr


def test_the_triton_of_the_lock_has_records_of_its_own(checked: Checked) -> None:
    """Every kernel on sm_90, at the shapes of 262M and 1B models. Another Triton takes those of the newest."""
    recorded = read_records(compiled.RECORDS).keys()
    locked = re.search(r"^triton==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert locked is not None and locked[1] in recorded
    result = checked.part
    assert result.returncode == 0, result.stdout + result.stderr
    assert ("are records of Triton" in result.stderr) == (version("triton") not in recorded), (
        "python -m benchmarks.compiled --check --update --representative"
    )


@pytest.mark.slow  # test_every_shipped_configuration has the kernels' own tiles; gpu/test_tuned.py the verdicts
def test_measured_tiles_are_what_they_should_be() -> None:
    """Those of model/kernels/triton/tiles.json, each compiled for its card."""
    result = run("--check")
    assert result.returncode == 0, result.stderr


def test_what_smaller_gpus_launch_fits_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but attention with wide heads, which `auto` leaves to the reference there."""
    found = [case for module in compiled.case_modules() for case in compiled.cases([module])]
    left_out = [case for case in found if 80 in case.architectures and 120 not in case.architectures]
    assert left_out and all(re.search(r"attention .* 256 ", case.name) for case in left_out)
    for capability, widest in (((8, 0), 256), ((8, 6), 128), ((8, 9), 128), ((12, 0), 128)):
        monkeypatch.setattr("model.kernels.backend.cuda_capability", lambda capability=capability: capability)
        assert attention_limit("cuda", torch.bfloat16, (widest,)) is None
        assert attention_limit("cuda", torch.bfloat16, (widest + 1,)) is not None
    record = next(iter(next(iter(read_records(compiled.RECORDS).values())).values()))
    of_80 = replace(record, architecture=80, shared_bytes=(99 << 10) + 1, stack_bytes=0)
    assert replace(of_80, is_for_small=False).failures() == []
    assert replace(of_80, is_for_small=True).failures() == [
        "101377 bytes of shared memory, 101376 fit on capability 8.6 and 8.9"
    ]
    assert replace(of_80, shared_bytes=99 << 10, is_for_small=True).failures() == []
    assert replace(of_80, architecture=120).failures() == ["101377 bytes of shared memory, 101376 fit"]


@pytest.mark.slow
def test_they_are_what_it_compiles() -> None:
    """test_versions.py compiles with each Triton."""
    result = run("--check", "--representative", "--recompile", "all")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def gate_kernels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Records, and what --check said when it wrote them."""
    records = tmp_path_factory.mktemp("records") / "compiled.csv"
    arguments = ("--modules", GATE_KERNELS, "--arch", "90", "--records", str(records))
    return records, run("--check", "--update", "--markdown", *arguments)


@pytest.mark.slow
def test_each_rule_can_fail(gate_kernels: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, result = gate_kernels
    assert result.returncode == 1, result.stderr
    found = verdicts(result.stdout)
    expected = {
        "good": "",
        "good copy": "",
        "spills": "bytes of stack per thread",
        "shared": "bytes of shared memory, 232448 fit",
        "no tensor cores": "no tensor-core instruction of sm_90 (0 older)",
        "narrow": "widest global load 4 bytes",
        "atomic": "2 atomics on floats",
        "impossible": "does not compile: CompileTimeAssertionFailure",
    }
    assert {name for name, _ in found} == expected.keys()  # "good again" equals "good": compiled once
    for name, reason in expected.items():
        actual = found[name, 90]
        assert reason in actual and bool(reason) == bool(actual), (name, actual)
        assert "; " not in actual, (name, actual)  # for that reason alone


@pytest.mark.slow
def test_records(gate_kernels: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """What is recorded is not compiled; a record that lies is found by compiling again; failures are not recorded."""
    records, _ = gate_kernels
    arguments = ("--modules", GATE_KERNELS, "--arch", "90", "--records", str(records), "--only", "^good$")
    before = records.read_text()
    result = run("--check", "--update", *arguments)
    assert result.returncode == 0 and "1 configurations, 0 compiled" in result.stdout, result.stdout + result.stderr
    assert records.read_text() == before  # with those that were not asked for
    with records.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["name"] for row in rows}.isdisjoint({"impossible", "good again"})
    text = records.read_text()
    good = next(line for line in text.splitlines() if ",good," in line)
    registers = next(row["registers"] for row in rows if row["name"] == "good")
    assert f",{registers}," in good
    lying = records.with_name("lying.csv")
    lying.write_text(text.replace(good, good.replace(f",{registers},", f",{int(registers) - 1},", 1)))
    renamed = records.with_name("renamed.csv")
    renamed.write_text(text.replace(good, good.replace(",good,", ",before,").replace(",kernels.", ",elsewhere.")))
    result = run("--check", "--recompile", "sample", *arguments[:4], "--records", str(renamed), *arguments[6:])
    assert result.returncode == 0 and "before" not in result.stdout, result.stdout + result.stderr
    arguments = (*arguments[:4], "--records", str(lying), *arguments[6:])
    assert run("--check", *arguments).returncode == 0
    result = run("--check", "--recompile", "sample", *arguments)
    assert result.returncode == 1 and "lying" not in result.stdout
    assert "compiled.csv says otherwise of good sm_90: --update it" in result.stderr


def test_refuses_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    """Which the process of the tests has chosen (conftest.py)."""
    assert compiled.main(["--check"]) == 2
    assert "TRITON_INTERPRET=1 turns the compiler off: unset it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "instruction, width",
    [
        ("LDG.E", 4),
        ("LDG.E.U8.CONSTANT", 1),
        ("LDG.E.U16", 2),
        ("LDG.E.64", 8),
        ("LDG.E.128.CONSTANT", 16),
        ("LDGSTS.E.BYPASS.LTC128B.64", 8),
        ("LDGSTS.E.LTC128B.128", 16),
        ("UTMALDG.2D", 16),
    ],
)
def test_load_width(instruction: str, width: int) -> None:
    assert compiled_case.GLOBAL_LOAD.match(instruction)
    assert compiled_case.load_width(instruction) == width


@pytest.mark.parametrize("code", ["/*0a10*/  @!P0 LDG.E R1, [R2] ;", "        /*1230*/     UTCHMMA gdesc[UR4] ;"])
def test_instructions_are_read(code: str) -> None:
    assert compiled_case.INSTRUCTION.findall(code) in (["LDG.E"], ["UTCHMMA"])


@pytest.mark.parametrize("name", ["RED.E.ADD.F32.FTZ.RN.STRONG.GPU", "ATOMG.E.ADD.F16x2.RN", "ATOM.E.ADD.F64.RN"])
def test_float_atomics_are_known(name: str) -> None:
    assert compiled_case.FLOAT_ATOMIC.match(name)
    for other in ("ATOMS.POPC.INC.32", "REDUX.SUM.S32"):
        assert not compiled_case.FLOAT_ATOMIC.match(other)


def test_the_table_of_the_documentation_is_that_of_the_records() -> None:
    text = compiled.DOCUMENT.read_text()
    table = summary(list(in_one_table(read_records(compiled.RECORDS))))
    assert text == with_table(text, "benchmarks.compiled", table)
