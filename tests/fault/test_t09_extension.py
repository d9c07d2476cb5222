"""T9 and T13: the extensions, not the core alone, under the sanitizers and under valgrind.

The tests of the extensions are run once more, in an interpreter whose `_slots` and `_kernel` were
built with the address and undefined behaviour sanitizers: a report ends it.  Valgrind needs no
build of its own, but is too slow for a test runner and knows no pidfds: it is given a tour of the
extensions.  The interpreter has complaints of its own, so that only those count in which one of
our extensions stands.  With a bug seeded into the build, on the same ways, either must complain.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fix_trials import Trial
from support.builds import ROOT, build_extensions, copy_package
from support.core_bugs import BUGS

pytestmark = [
    pytest.mark.xdist_group("core"),
    pytest.mark.at_least("fault"),
    pytest.mark.timeout_s(3600),
]

UNITS = ["tests/unit/test_slots.py", "tests/unit/test_slots_damage.py", "tests/unit/test_kernel.py"]
LIVE = ["tests/process/test_attach.py", "tests/conformance/test_a_registration.py"]
TOUR = ROOT / "tests" / "fault" / "extension_tour.py"
OURS = re.compile(r"\b(_slots|_kernel)\.cpython")
BUG = "length-of-the-entry-unchecked"


def python(
    build: Path, *arguments: object, under: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run another interpreter that imports pgbgw from that build."""
    return subprocess.run(
        [*under, sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ
        | {"PYTHONMALLOC": "malloc", "PYTHONPATH": f"{build}:{ROOT / 'tests'}"}
        | environment,
        capture_output=True,
        text=True,
    )


def sanitized(build: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    # Python frees nothing at its end, and a supervisor under test is killed anyway.
    options = {"LD_PRELOAD": library("libasan.so"), "ASAN_OPTIONS": "detect_leaks=0"}
    show = "from pgbgw import _kernel, _slots; print(_kernel.__file__, _slots.__file__)"
    _kernel, _slots = python(build, "-c", show, **options).stdout.split()
    for file in (_kernel, _slots):
        assert Path(file).is_relative_to(build), f"{file} would be tried, not the build"
        assert b"__asan_report" in Path(file).read_bytes(), f"{file} is not sanitized"
    return python(build, *arguments, **options)


def memchecked(build: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return python(build, *arguments, under=("valgrind", "-q"))


def complaints(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Valgrind's, of our extensions."""
    every = re.split(r"^==\d+== \n", done.stderr, flags=re.MULTILINE)
    return [complaint for complaint in every if OURS.search(complaint)]


def seeded(target: Path, **switches: str) -> Path:
    """A build with a bug in it."""
    header = copy_package(target) / BUGS[BUG].header
    header.write_text(BUGS[BUG].seed(header.read_text()))
    return build_extensions(target, **switches)


def library(name: str) -> str:
    path = subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip()
    if not os.path.isabs(path):
        pytest.skip(f"gcc has no {name}")
    return path


def test_T09_the_extensions_pass_their_tests_under_the_sanitizers(
    trial: Trial, tmp_path: Path
) -> None:
    places = UNITS + trial.pick([], LIVE, [*LIVE, "tests/conformance", "tests/model"])
    build = build_extensions(tmp_path / "sanitized", PGBGW_SANITIZE="1")
    done = sanitized(build, "-m", "pytest", "-q", "-p", "no:cacheprovider", *places)
    passed = re.search(r"(\d+) passed", done.stdout)
    trial.count(int(passed[1]) if passed else 0)
    if done.returncode != 0:
        trial.violation(done.stdout[-4000:] + done.stderr[-4000:])


def test_T09_the_sanitizers_report_a_bug_of_the_extensions(trial: Trial, tmp_path: Path) -> None:
    done = sanitized(seeded(tmp_path / "seeded", PGBGW_SANITIZE="1"), TOUR, trial.seed, 20)
    trial.count()
    report = re.search(r"ERROR: AddressSanitizer: .*|runtime error: .*", done.stderr)
    if report and done.returncode != 0:
        trial.note(report[0][:90])
    else:
        trial.violation(f"{BUG} was not found: status {done.returncode}: {done.stderr[-2000:]}")


def test_T13_valgrind_finds_no_fault_of_the_extensions(trial: Trial) -> None:
    done = memchecked(ROOT / "src", TOUR, trial.seed, trial.pick(1, 20, 400))
    assert done.returncode == 0, done.stderr
    trial.count(int(done.stdout))
    for complaint in complaints(done):
        trial.violation(complaint)


def test_T13_valgrind_reports_a_bug_of_the_extensions(trial: Trial, tmp_path: Path) -> None:
    found = complaints(memchecked(seeded(tmp_path / "seeded"), TOUR, trial.seed, 5))
    trial.count()
    if found:
        trial.note(re.sub(r"==\d+== ", "", found[0]).partition("\n")[0])
    else:
        trial.violation(f"{BUG} was not found")
