"""A million cycles of the core's slots leave no byte, no descriptor and no generation behind."""

from __future__ import annotations

import pytest

from fix_trials import Trial
from support.core_programs import bugs_for, build, must_find, run, tell

pytestmark = pytest.mark.xdist_group("core")


@pytest.mark.timeout_s(600)
def test_T12_cycles_of_the_core_leave_nothing_behind(trial: Trial) -> None:
    cycles = trial.pick(100_000, 1_000_000, 50_000_000)
    report = run(build("cycles"), trial.seed, cycles, timeout=500)
    tell(trial, report)
    if not report.problems:
        trial.note("{frees} frees, {reclaimed} of them of the dead".format(**report.figures))


@pytest.mark.at_least("fault")
@pytest.mark.parametrize("bug", bugs_for("cycles"))
def test_T12_cycles_find_the_seeded_bug(trial: Trial, bug: str) -> None:
    must_find(trial, run(build("cycles", "quick", bug), trial.seed, 100_000, timeout=50))
