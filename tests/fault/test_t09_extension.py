"""T9 and T13: the extensions, not the core alone, under the sanitizers and under valgrind.

The tests of the extensions are run once more, in an interpreter whose `_slots` and `_kernel` were
built with the address and undefined behaviour sanitizers: a report ends it.  Valgrind needs no
build of its own, but is too slow for a test runner and knows no pidfds: it is given a tour of the
extensions.  The interpreter has complaints of its own, so that only those count in which one of
our extensions stands.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fix_trials import Trial
from support.extension_builds import ROOT, build_extensions

pytestmark = [
    pytest.mark.xdist_group("core"),
    pytest.mark.at_least("fault"),
    pytest.mark.timeout_s(1800),
]

UNITS = ["tests/unit/test_slots.py", "tests/unit/test_slots_damage.py", "tests/unit/test_kernel.py"]
LIVE = ["tests/process/test_attach.py", "tests/conformance/test_a_registration.py"]
TOUR = ROOT / "tests" / "fault" / "extension_tour.py"
OURS = re.compile(r"\b(_slots|_kernel)\.cpython")


def run_tests(
    trial: Trial, command: list[str], places: list[str], **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run tests in another interpreter, and count those that passed."""
    done = subprocess.run(
        [*command, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *places],
        cwd=ROOT,
        env=os.environ | {"PYTHONMALLOC": "malloc"} | environment,
        capture_output=True,
        text=True,
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    trial.count(int(passed[1]) if passed else 0)
    return done


def library(name: str) -> str:
    path = subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip()
    if not os.path.isabs(path):
        pytest.skip(f"gcc has no {name}")
    return path


def test_T09_the_extensions_pass_their_tests_under_the_sanitizers(
    trial: Trial, tmp_path: Path
) -> None:
    path = build_extensions(tmp_path / "sanitized", PGBGW_SANITIZE="1")
    done = run_tests(
        trial,
        [],
        UNITS + trial.pick([], LIVE, [*LIVE, "tests/conformance", "tests/model"]),
        PYTHONPATH=str(path),
        LD_PRELOAD=library("libasan.so"),
        # Python frees nothing at its end, and a supervisor under test is killed anyway.
        ASAN_OPTIONS="detect_leaks=0",
    )
    if done.returncode != 0:
        trial.violation(done.stdout[-4000:] + done.stderr[-4000:])


def test_T13_valgrind_finds_no_fault_of_the_extensions(trial: Trial) -> None:
    rounds = trial.pick(1, 20, 400)
    done = subprocess.run(
        ["valgrind", "-q", sys.executable, TOUR, str(trial.seed), str(rounds)],
        env=os.environ
        | {"PYTHONMALLOC": "malloc", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    trial.count(int(done.stdout))
    complaints = re.split(r"^==\d+== \n", done.stderr, flags=re.MULTILINE)
    for complaint in filter(OURS.search, complaints):
        trial.violation(complaint)
