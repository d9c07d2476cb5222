"""SIGKILL at every instruction of every operation of the slot protocol leaves nothing behind.

core/killstep.c single-steps the shipped core in a process of its own, which is a client or the
supervisor.  That it would find something is shown by seeded bugs.
"""

from __future__ import annotations

import pytest

from fix_trials import Trial
from support.core_bugs import BUGS
from support.core_programs import bugs_for, build, must_find, run, tell

pytestmark = pytest.mark.xdist_group("core")


@pytest.mark.timeout_s(1800)
def test_T02_SIGKILL_at_every_instruction_leaves_nothing_behind(trial: Trial) -> None:
    stride = trial.pick(20, 1, 1)
    for _ in range(trial.pick(1, 1, 5)):
        report = run(build("killstep"), trial.random.getrandbits(32), stride, timeout=600)
        tell(trial, report)
        if not report.problems:
            trial.note("{positions} positions, {missed} missed".format(**report.figures))
            if report.figures["missed"]:
                trial.violation("some instructions were never reached")
    if stride > 1:
        trial.note(f"one in {stride} of them")


@pytest.mark.parametrize("bug", bugs_for("killstep", quick="no-reclaim"))
def test_T02_stepping_finds_the_seeded_bug(trial: Trial, bug: str) -> None:
    operation = BUGS[bug].found_by["killstep"]
    must_find(trial, run(build("killstep", "quick", bug), trial.seed, 1, operation, timeout=50))
