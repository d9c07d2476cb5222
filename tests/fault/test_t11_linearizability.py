"""T11: what concurrent clients see of the table is what one after the other could have seen.

Six client processes register, ask and terminate, some are killed, and a supervisor's side notices,
starts, stops and frees: all by the shipped code, in processes of their own.  Every call is recorded
with its begin and end; `support.linearizability` searches for an order that the specification of
the table allows.  In the longer forms the core is a build that gives way between any two accesses
to shared memory, so that calls do meet in their midst; in such builds with a bug the same search
must find it.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from pathlib import Path

import pytest

from fix_trials import Trial
from support.core_bugs import BUGS
from support.histories import Raw
from support.linearizability import (
    Operation,
    Room,
    Slot,
    linearizable,
    room_allows,
    slot_allows,
)
from support.processes import Script
from support.yielding_core import build_yielding_core

pytestmark = pytest.mark.xdist_group("core")

BATCH = 20  # histories that travel together

_RECORD = """
import sys

if core:
    sys.path.insert(0, core)
import pgbgw
from support.histories import Recorder

assert not core or pgbgw.__file__.startswith(core), pgbgw.__file__
recorder = Recorder(seed)
while n := test.recv():
    test.send([recorder.record() for _ in range(n)])
recorder.close()
"""


def histories(n: int, seed: int, core: Path | None = None) -> Iterator[Raw]:
    with Script(_RECORD, seed=seed, core=str(core or "")) as script:
        script.say(BATCH)
        for left in range(n, 0, -BATCH):
            batch = script.hear()
            script.say(BATCH if left > BATCH else 0)  # recorded while these are checked
            yield from batch[:left]


def check(trial: Trial, recorded: Iterator[Raw]) -> None:
    operations = cut_short = inexact = 0
    for raw in recorded:
        for problem in raw.problems():
            trial.violation(problem)
        trial.count()
        operations += len(raw.operations)
        cut_short += sum(o.pending for o in raw.operations)
        inexact += not raw.exact
    trial.note(
        f"{operations} operations, {cut_short} of them cut short by a kill, "
        f"{inexact} histories with an inexact refusal for the parallel limit"
    )


@pytest.mark.timeout_s(1800)
def test_T11_recorded_histories_are_linearizable(trial: Trial) -> None:
    check(trial, histories(trial.pick(60, 500, 20000), trial.seed))


@pytest.mark.timeout_s(7200)
@pytest.mark.at_least("fault")
def test_T11_histories_with_widened_windows_are_linearizable(trial: Trial, tmp_path: Path) -> None:
    core = build_yielding_core(tmp_path / "core")
    check(trial, histories(trial.pick(0, 2000, 60000), trial.seed, core))


# Each is one protocol rule less.
FOUND = ("inbox-freed-before-the-outbox", "terminate-any-generation", "token-leaked-by-a-death")


@pytest.mark.timeout_s(1800)
@pytest.mark.at_least("fault")
@pytest.mark.parametrize("bug", FOUND)
def test_T11_a_seeded_bug_is_found(trial: Trial, bug: str, tmp_path: Path) -> None:
    core = build_yielding_core(tmp_path / "core", BUGS[bug])
    for raw in histories(20_000, trial.seed, core):  # hundreds, as a rule
        trial.count()
        if next(iter(raw.problems()), None) is not None:
            trial.note(f"in history {trial.tried}")
            return
    trial.violation(f"not found: {bug}")


# --- the search itself --------------------------------------------------------------------------


def call(
    what: str, begin: float, end: float, *arguments: object, result: object = None
) -> Operation:
    return Operation(what, begin, end, arguments, result)


def asked(begin: float, end: float, status: str, pid: int = 0) -> Operation:
    return call("query", begin, end, 1, result=(status, pid))


NEW, GONE = "NOT_YET_STARTED", "STOPPED"
REGISTERED = call("register", 0, 10, 1)


@pytest.mark.parametrize(
    ("right", "history"),
    [
        (True, [REGISTERED, asked(11, 12, NEW)]),
        (False, [REGISTERED, asked(11, 12, GONE)]),
        # While it is being registered, it is there as soon as somebody sees it, and stays.
        (True, [REGISTERED, asked(3, 4, GONE), asked(5, 6, NEW)]),
        (False, [REGISTERED, asked(3, 4, NEW), asked(5, 6, GONE)]),
        (True, [REGISTERED, call("accept", 11, 12, 1), call("start", 13, 14, 1, 7),
                asked(13, 14, "STARTED", 7)]),
        (False, [REGISTERED, call("accept", 11, 12, 1), call("start", 13, 14, 1, 7),
                 asked(15, 16, "STARTED", 8)]),
        (False, [REGISTERED, call("accept", 11, 12, 1), call("start", 13, 14, 1, 7),
                 asked(15, 16, NEW)]),
        # A call that never returned may have had its effect or not, at any time.
        (True, [REGISTERED, call("terminate", 11, inf, 1), call("cancel", 90, 91, 1)]),
        (True, [REGISTERED, call("terminate", 11, inf, 1), asked(90, 91, NEW)]),
        (False, [REGISTERED, call("terminate", 92, inf, 1), call("cancel", 90, 91, 1)]),
        (False, [REGISTERED, call("cancel", 90, 91, 1)]),
        # A stale handle has no effect on who came later.
        (False, [REGISTERED, call("terminate", 11, 12, 1), call("cancel", 13, 14, 1),
                 call("register", 15, 16, 2), call("terminate", 17, 18, 1),
                 call("cancel", 19, 20, 2)]),
        (False, [REGISTERED, call("register", 11, 12, 1)]),
        (False, [REGISTERED, call("terminate", 11, 12, 1, result=False), asked(13, 14, NEW)]),
        (False, [REGISTERED, call("accept", 11, 12, 1), call("free", 13, 14, 1)]),
    ],
)  # fmt: skip
def test_a_history_of_a_slot_is_judged_rightly(right: bool, history: list[Operation]) -> None:
    assert linearizable(history, Slot(1), slot_allows) == right


@pytest.mark.parametrize(
    ("right", "history"),
    [
        (True, [call("claim", 0, 1, 0, None), call("claim", 2, 3, 1, None),
                call("FULL", 4, 5, None)]),
        (False, [call("claim", 0, 1, 0, None), call("FULL", 4, 5, None)]),
        (True, [call("claim", 0, 1, 0, None), call("claim", 2, 9, 1, None),
                call("FULL", 4, 5, None)]),
        (False, [call("claim", 0, 1, 0, None), call("claim", 2, 3, 0, None)]),
        (True, [call("take", 0, 1, "a"), call("LIMIT", 2, 3)]),
        (False, [call("LIMIT", 2, 3)]),
        (False, [call("take", 0, 1, "a"), call("take", 2, 3, "b")]),
        (True, [call("take", 0, 1, "a"), call("give", 0, 3, "a"), call("take", 2, 4, "b")]),
        # Refused for the limit one token after the other: each was in use for a time.
        (True, [call("take", 0, 1, "a"), call("used", 2, 3, 0)]),
        (False, [call("take", 4, 5, "a"), call("used", 2, 3, 0)]),
        # Of one that died, until it is buried.
        (True, [call("take", 0, inf, "a"), call("LIMIT", 1, 2), call("bury", 3, 4, "a"),
                call("take", 5, 6, "b")]),
        (False, [call("take", 0, 1, "a"), call("bury", 3, 4, "a"), call("LIMIT", 5, 6)]),
    ],
)  # fmt: skip
def test_a_history_of_the_table_is_judged_rightly(right: bool, history: list[Operation]) -> None:
    room = Room(frozenset({0, 1}), (None,))
    assert linearizable(history, room, room_allows) == right


def test_the_search_does_not_explode_on_calls_that_all_overlap() -> None:
    many = [asked(i, 100 + i, GONE) for i in range(40)]
    assert linearizable(many, Slot(2), slot_allows)
    assert not linearizable([*many, asked(0, 100, NEW)], Slot(2), slot_allows)
