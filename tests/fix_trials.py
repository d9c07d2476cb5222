"""Trials: tests whose size is chosen, and which report what they tried.

The same test has up to three forms: `quick` in `make test`, `fault` in `make fault`, `soak` in
`make soak`.  It asks its `trial` how often to try, counts, and draws its chances from
`trial.random`; `--seed` repeats a run.  A table of all trials ends the run:

    test                                      tried  violations  seed
    T03 random kills leave nothing behind      1512           0  4711   notes
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Generator
from typing import TypeVar

import pytest

FORMS = ("quick", "fault", "soak")
T = TypeVar("T")

ROW = "trial"


class Trial:
    """What a test asks and tells; violations are asserted to be none when it ends."""

    def __init__(self, form: str, seed: int) -> None:
        self.form = form
        self.seed = seed
        self.random = random.Random(seed)
        self.tried = 0
        self.violations: list[str] = []
        self.notes: list[str] = []

    def pick(self, quick: T, fault: T, soak: T) -> T:
        """Return the value for the form that is run."""
        return {"quick": quick, "fault": fault, "soak": soak}[self.form]

    def count(self, tries: int = 1) -> None:
        self.tried += tries

    def violation(self, what: str) -> None:
        """Note that a promise was broken; the test goes on, and fails in the end."""
        self.violations.append(what)

    def note(self, text: str) -> None:
        """Add what was measured or found on the way to the table."""
        self.notes.append(text)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("trials")
    group.addoption("--form", choices=FORMS, default="quick", help="how long trials are")
    group.addoption("--seed", type=int, help="repeat the run that had this seed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep what the form is for: all but the long ones, or nothing but trials."""
    form = config.getoption("form")
    kept, dropped = [], []
    for item in items:
        marker = item.get_closest_marker("at_least")
        is_trial = "trial" in getattr(item, "fixturenames", ())
        if is_trial:
            item.user_properties.append((ROW, (0, 0, "", "")))  # of one that never begins
        long_enough = FORMS.index(form) >= FORMS.index(marker.args[0] if marker else "quick")
        wanted = is_trial or marker is not None or form == "quick"
        (kept if long_enough and wanted else dropped).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture
def trial(request: pytest.FixtureRequest) -> Trial:
    seed = request.config.getoption("seed")
    return Trial(
        request.config.getoption("form"),
        int.from_bytes(os.urandom(4), "big") if seed is None else seed,
    )


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Fail a test whose trial met violations or tried nothing, and hand its row to the report."""
    trial = pyfuncitem.funcargs.get("trial")
    try:
        result = yield
    finally:
        # By way of the report, so that it arrives from other processes, too.
        if isinstance(trial, Trial):
            row = (trial.tried, len(trial.violations), trial.seed, "; ".join(trial.notes))
            pyfuncitem.user_properties.append((ROW, row))
    if isinstance(trial, Trial):
        assert not trial.violations, "\n".join(trial.violations[:20])
        assert trial.tried, "nothing was tried"
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = [
        (sentence(report.nodeid), row)
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport) and (row := row_of(report))
    ]
    if not rows:
        return
    width = max(len(name) for name, _ in rows)
    terminalreporter.section("trials")
    terminalreporter.line(f"{'test':{width}}  {'tried':>9}  {'violations':>10}  {'seed':>10}")
    for name, (tried, violations, seed, notes) in sorted(rows, key=lambda row: row[0]):
        line = f"{name:{width}}  {tried:>9}  {violations:>10}  {seed:>10}  {notes}"
        terminalreporter.line(line.rstrip())


def row_of(report: pytest.TestReport) -> tuple[object, ...] | None:
    """What the table says of a test: nothing of one that is no trial."""
    properties = dict(report.user_properties)
    if ROW in properties and report.skipped and isinstance(report.longrepr, tuple):
        why = report.longrepr[2].removeprefix("Skipped: ")
        tried, violations, seed, notes = properties[ROW]
        return tried, violations, seed, "; ".join(filter(None, [f"skipped: {why}", notes]))
    return properties.get(ROW) if report.when == "call" else None


def sentence(nodeid: str) -> str:
    """A test's name as the sentence that it is."""
    name = nodeid.rpartition("::")[2].removeprefix("test_")
    name, bracket, parameters = name.partition("[")
    return re.sub("_+", " ", name) + bracket + parameters
