"""T16: the wall clock jumps by ten years, forth and back, and no wait, interval or backoff moves.

A preloaded library moves CLOCK_REALTIME for a supervisor, its client and its workers at once, some
hundred times a second, while waits run into their timeouts, workers are restarted after intervals
and backoff, sleep, and are killed after a grace.  Whatever is measured in monotonic time must have
taken as long as was asked for; only the times that are shown are off.  (That the source reads the
wall clock for nothing else is a test of the conformance case C09.)
"""

from __future__ import annotations

import statistics
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from fix_trials import Trial
from support.builds import build_library
from support.processes import Script
from support.supervisors import lines

pytestmark = pytest.mark.xdist_group("core")

TEN_YEARS = 10 * 365 * 86400
GUARD = 10.0  # seconds: what is late by that much waits for a clock that went away

_SCENARIO = """
import time

from pgbgw import Supervisor, WaitTimeoutError

measured = []  # (what, seconds wanted, seconds taken)

def measure(what, wanted, call):
    begin = time.monotonic()
    call()
    measured.append((what, wanted, time.monotonic() - begin))

def must_time_out(call):
    try:
        call()
    except WaitTimeoutError:
        return
    raise AssertionError("the wait did not time out")

shown = []
with Supervisor(max_worker_processes=8) as client:
    sleeper = client.register("support.workers:sleep_until_stopped")
    sleeper.wait_for_ready(30)
    interval = client.register(
        "support.clock_workers:note_and_fail", f"{directory}/interval", restart_time=0.25
    )
    backoff = client.register(
        "support.clock_workers:note_and_fail", f"{directory}/backoff", restart_time=0
    )
    sleeps = client.register("support.clock_workers:note_sleeps", f"{directory}/sleeps", 0.1)
    sleeps.wait_for_ready(30)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for wanted in (0.05, 0.15):
            measure("wait", wanted, lambda: must_time_out(lambda: sleeper.wait_until_gone(wanted)))
            measure("client.wait", wanted, lambda: client.wait([sleeper], wanted))
        stubborn = client.register("support.workers:ignore_sigterm")
        stubborn.wait_for_ready(30)
        shown += [info.started_at - time.time() for info in client.workers() if info.started_at]

        def kill_it():
            stubborn.terminate(grace=0.15)
            assert stubborn.wait_until_gone(30).signal == 9

        measure("grace", 0.15, kill_it)
        test.send(None)  # it goes on
    for handle in (interval, backoff, sleeps):
        handle.terminate()
        handle.wait_until_gone(30)
test.send((measured, shown))
"""


@contextmanager
def jumping_clock(path: Path) -> Iterator[list[int]]:
    """Let the clock jump some hundred times a second; the list has the number of jumps."""
    jumps = [0]
    over = threading.Event()

    def jump() -> None:
        with path.open("r+b", buffering=0) as file:
            while not over.is_set():
                offset = (TEN_YEARS, 0, -TEN_YEARS)[jumps[0] % 3]
                file.seek(0)
                file.write(struct.pack("<q", offset))
                jumps[0] += 1
                over.wait(0.003)

    thread = threading.Thread(target=jump)
    thread.start()
    try:
        yield jumps
    finally:
        over.set()
        thread.join()


def backoff_least(restart: int) -> float:
    """The least seconds before the n-th restart in a row of a worker with restart_time 0."""
    return 0.01 if restart <= 2 else 0.01 * 2 ** (restart - 2) * 0.8


@pytest.mark.timeout_s(900)
def test_T16_jumps_of_the_wall_clock_move_nothing_but_what_is_shown(
    trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = build_library("wall_clock.c", tmp_path)
    clock = tmp_path / "clock"
    clock.write_bytes(bytes(8))
    monkeypatch.setenv("PGBGW_TEST_WALL_CLOCK", str(clock))
    monkeypatch.setenv("LD_PRELOAD", str(library))
    seconds = trial.pick(1.5, 10, 120)
    with Script(_SCENARIO, directory=str(tmp_path), seconds=seconds) as script:
        monkeypatch.delenv("LD_PRELOAD")
        with jumping_clock(clock) as jumps:
            while (told := script.hear()) is None:
                pass
    measured, shown = told
    measured += [("sleep", 0.1, float(line)) for line in lines(tmp_path / "sleeps")]
    for name in ("interval", "backoff"):
        runs = [tuple(map(int, line.split())) for line in lines(tmp_path / name)]
        for n, ((_, ended), (begun, _)) in enumerate(pairwise(runs), start=1):
            least = 0.25 if name == "interval" else backoff_least(n)
            measured.append((name, least, (begun - ended) / 1e9))
    late = []
    for what, wanted, taken in measured:
        trial.count()
        if not wanted <= taken < wanted + GUARD:
            trial.violation(f"{what} of {wanted} s took {taken:.3f} s")
        if what not in ("backoff", "interval", "grace"):  # these include a fork or an end
            late.append(taken - wanted)
    # The clock was really moved, in the supervisor and in its client.
    assert max(map(abs, shown)) > TEN_YEARS / 2
    late.sort()
    trial.note(
        f"{jumps[0]} jumps; waits were late by {statistics.median(late) * 1e3:.1f} ms (median), "
        f"{late[-1] * 1e3:.0f} ms (max); kinds: {', '.join(sorted({m[0] for m in measured}))}"
    )
