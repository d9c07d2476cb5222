"""The core's programs under valgrind's memcheck: no invalid access, nothing lost."""

from __future__ import annotations

import shutil

import pytest

from fix_trials import Trial
from support.core_programs import bugs_for, build, must_find, run, tell

pytestmark = [
    pytest.mark.xdist_group("core"),
    pytest.mark.at_least("fault"),
    pytest.mark.skipif(not shutil.which("valgrind"), reason="no valgrind"),
]

MEMCHECK = (
    "valgrind",
    "--quiet",
    "--error-exitcode=99",
    "--leak-check=full",
    "--errors-for-leak-kinds=definite,indirect,possible",
    "--fair-sched=yes",
)


@pytest.mark.timeout_s(1800)
@pytest.mark.parametrize(
    ("program", "fault", "soak"),
    [("images", 40_000, 1_000_000), ("threads", 4, 120), ("cycles", 40_000, 1_000_000)],
)
def test_T13_memcheck_finds_nothing_in_the_core(
    trial: Trial, program: str, fault: int, soak: int
) -> None:
    size = trial.pick(0, fault, soak)
    report = run(build(program), trial.seed, size, "memcheck", under=MEMCHECK, timeout=1700)
    tell(trial, report)


@pytest.mark.parametrize("bug", bugs_for("cycles"))
def test_T13_memcheck_finds_the_seeded_bug(trial: Trial, bug: str) -> None:
    made = build("cycles", "quick", bug)
    must_find(trial, run(made, trial.seed, 2_000, "memcheck", under=MEMCHECK, timeout=50))
