"""The slot protocol as a model, and its memory orders, explored exhaustively (tests/model).

Every configuration must be verified, every seeded bug caught by the property that is there for it,
every weakened memory order noticed.  `make model` prints the details.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from fix_trials import Trial
from model import check

pytestmark = pytest.mark.xdist_group("core")


def note_all(trial: Trial, rows: Iterable[check.Row]) -> None:
    states = 0
    for row in rows:
        trial.count()
        states += row.states
        if not row.as_expected:
            trial.violation(f"{row.name}: {row.verdict}")
    trial.note(f"{states:,} states")


def test_T01_every_memory_order_is_needed_and_enough(trial: Trial) -> None:
    note_all(trial, check.litmus_rows())


@pytest.mark.at_least("fault")
@pytest.mark.timeout_s(7200)
def test_T01_the_models_keep_their_promises(trial: Trial) -> None:
    small = check.SMALL
    note_all(trial, check.verify_all(trial.pick(small, small, [*small, *check.LARGE]), lanes=1))


@pytest.mark.at_least("fault")
@pytest.mark.timeout_s(1800)
def test_T01_every_seeded_bug_of_the_models_is_caught(trial: Trial) -> None:
    note_all(trial, check.verify_all(check.BUGS, lanes=1))
