"""C programs that include the slot protocol's headers: how they are built, run and read.

The programs are in tests/fault/core/.  They are built from a copy of the headers and of themselves,
so that a seeded bug (see core_bugs) is a replaced line in that copy: the shipped headers have no
switches for tests.
"""

from __future__ import annotations

import atexit
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

from fix_trials import Trial
from support.builds import ROOT, compile_c
from support.core_bugs import BUGS, SUPERVISOR

HEADERS = ROOT / "src" / "pgbgw"
PROGRAMS = ROOT / "tests" / "fault" / "core"
FLAGS = ("-std=c11", "-D_GNU_SOURCE", "-pthread", "-Wno-unused-function")
KINDS = {
    "plain": ("-O2", "-g", "-Wl,-z,now"),  # bound at start: no linker in the way of a step
    "quick": ("-O1", "-Wl,-z,now"),
    "address": ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-O1", "-g", "-fsanitize=thread"),
}
# Changes of a header that make a rare way a common one: what is promised stays promised.
VARIANTS = {
    "short-slices": (SUPERVISOR, "#define SLICE_EVENTS 1024 ", "#define SLICE_EVENTS 2 "),
}
TOOLS_REPORT = re.compile(
    r"ERROR: \w+Sanitizer.*|WARNING: ThreadSanitizer.*|runtime error: .*"
    r"|Invalid (read|write).*|uninitialised.*|definitely lost.*"
)
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=0",
    "TSAN_OPTIONS": "halt_on_error=1",
    "PATH": "/usr/bin:/bin",
}


class Report(NamedTuple):
    """What a program said: its last line's figures, and all of its output."""

    figures: dict[str, int]
    violations: list[str]
    output: str
    status: int

    @property
    def findings(self) -> list[str]:
        """Broken promises, and what sanitizers and memcheck report."""
        reported = TOOLS_REPORT.search(self.output)
        return self.violations + ([self.output[reported.start() :][:3000]] if reported else [])

    @property
    def problems(self) -> list[str]:
        """The same, and an end without a verdict."""
        if self.findings or (self.status == 0 and "violations" in self.figures):
            return self.findings
        return [f"status {self.status}: {self.output[-2000:]}"]


@functools.cache
def workshop() -> Path:
    where = Path(tempfile.mkdtemp(prefix="pgbgw-core-"))
    atexit.register(shutil.rmtree, where, ignore_errors=True)
    return where


@functools.cache
def build(
    program: str, kind: str = "plain", bug: str | None = None, variant: str | None = None
) -> Path:
    """Compile tests/fault/core/PROGRAM.c, with one of the seeded bugs or as shipped."""
    tree = workshop() / "-".join(filter(None, [bug or "shipped", variant]))
    headers, programs = tree / "src" / "pgbgw", tree / "tests" / "fault" / "core"
    if not tree.exists():
        headers.mkdir(parents=True)
        for header in HEADERS.glob("_slots*.h"):
            text = header.read_text()
            if bug and BUGS[bug].header == header.name:
                text = BUGS[bug].seed(text)
            if variant and VARIANTS[variant][0] == header.name:
                _, old, new = VARIANTS[variant]
                assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
                text = text.replace(old, new)
            (headers / header.name).write_text(text)
        shutil.copytree(PROGRAMS, programs)
    made = tree / f"{program}-{kind}"
    return compile_c(programs / f"{program}.c", made, *FLAGS, *KINDS[kind])


def run(made: Path, *arguments: object, under: tuple[str, ...] = (), timeout: float) -> Report:
    """Run a program to its end; timeout is a hang guard."""
    done = subprocess.run(
        [*under, made, *map(str, arguments)],
        env=SANITIZER_OPTIONS, timeout=timeout, capture_output=True, text=True, errors="replace",
        check=False,
    )  # fmt: skip
    if "unexpected memory mapping" in done.stderr and not under:
        # A thread sanitizer older than the kernel's wide address randomisation.
        return run(made, *arguments, under=("setarch", "-R"), timeout=timeout)
    lines = done.stdout.splitlines()
    figures = re.findall(r"(\w+)=(\d+)", lines[-1]) if lines else []
    return Report(
        {name: int(value) for name, value in figures},
        [line.removeprefix("VIOLATION ") for line in lines if line.startswith("VIOLATION ")],
        done.stdout + done.stderr,
        done.returncode,
    )


def tell(trial: Trial, report: Report) -> None:
    """What a program tried and found is what its trial did."""
    trial.count(report.figures.get("tried", 0))
    for problem in report.problems:
        trial.violation(problem)


def bugs_for(program: str, quick: str | None = None) -> list[object]:
    """Parameters: the bugs that a program must find, all but one in the long forms only."""
    return [
        pytest.param(name, marks=[] if name == quick else pytest.mark.at_least("fault"))
        for name, bug in BUGS.items()
        if program in bug.found_by
    ]


def must_find(trial: Trial, report: Report) -> None:
    """A run with a seeded bug; not to find it is the violation."""
    trial.count()
    if report.findings:
        trial.note(report.findings[0].partition("\n")[0][:90])
    else:
        trial.violation("the seeded bug was not found: " + report.output[-500:])
