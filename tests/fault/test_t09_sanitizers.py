"""Clients and a supervisor as threads, at full speed: no sanitizer says a word, every count agrees.

core/threads.c adds plain memory whose only order is the protocol's, so that the thread sanitizer
sees a memory order that is too weak.
"""

from __future__ import annotations

import pytest

from fix_trials import Trial
from support.core_programs import bugs_for, build, must_find, run, tell

pytestmark = pytest.mark.xdist_group("core")


@pytest.mark.timeout_s(1800)
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_T09_threads_of_the_core_please_the_sanitizer(trial: Trial, sanitizer: str) -> None:
    seconds = trial.pick(1, 10, 600)
    report = run(build("threads", sanitizer), trial.seed, seconds, timeout=seconds + 50)
    tell(trial, report)
    if not report.problems:
        assert all(report.figures[what] for what in ("full", "deaths", "cancelled", "details"))
        trial.note("{full} times full, {deaths} deaths, {sleeps} sleeps".format(**report.figures))


@pytest.mark.parametrize("bug", bugs_for("threads", quick="publish-relaxed"))
def test_T09_the_thread_sanitizer_finds_the_seeded_bug(trial: Trial, bug: str) -> None:
    must_find(trial, run(build("threads", "thread", bug), trial.seed, 5, timeout=50))
