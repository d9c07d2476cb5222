"""T15: workers that fail at once, again and again, take no more than their share.

Fifty workers without a restart interval exit 1 as soon as they run.  The delay rule holds for each
of them, every start and every end is accounted for, and four clients that start and stop workers
of their own are served meanwhile.  What that costs them is measured, beside the same without
the storm.
"""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import pytest

from fix_trials import Trial
from pgbgw import Client, WaitTimeoutError, WorkerHandle
from support.books import Books, check_log
from support.control import Log
from support.crowd import Crowd
from support.figures import spread
from support.supervisors import lines, supervisor
from support.zygote import Zygote

pytestmark = pytest.mark.xdist_group("live")

STORM, CLIENTS = 50, 4
LEAVE = "support.storm_workers:note_and_leave"


class Phase:
    """The clients' doings over some seconds, with what they measured."""

    def __init__(self, client: Client, zygote: Zygote, trial: Trial, directory: Path) -> None:
        self._crowd = Crowd(client, zygote, trial)
        for n in range(CLIENTS):
            self._crowd.add("support.load:measuring_client", str(directory / f"client.{n}"))

    def last(self, seconds: float) -> None:
        self._crowd.listen(time.monotonic() + seconds)
        self._crowd.end()
        self.times = self._crowd.times

    def __str__(self) -> str:
        return ", ".join(
            f"{what} {spread(t / 1e9 for t in times)}" for what, times in self.times.items()
        )


def least_delay(failures: int) -> int:
    """Nanoseconds before that restart in a row, at the least that jitter of 20 % makes of it: 10 ms
    twice, then 20 ms, 40 ms, ..., 60 s."""
    if failures <= 2:
        return 10_000_000
    return min(10_000_000 << (failures - 2), 60_000_000_000) * 8 // 10


def most_starts(nanoseconds: int) -> int:
    """How many starts the delay rule allows in that time."""
    starts = 1
    while (nanoseconds := nanoseconds - least_delay(starts)) >= 0:
        starts += 1
    return starts


def check_starts(handle: WorkerHandle, starts: list[int], lasted: int, trial: Trial) -> None:
    """The delay rule, told from the moments at which it ran."""
    if len(starts) > most_starts(lasted):
        trial.violation(f"{handle!r} was started {len(starts)} times in {lasted / 1e9:.1f} s")
    for failures, (before, after) in enumerate(pairwise(starts), 1):
        if after - before < least_delay(failures):
            gap = (after - before) / 1e6
            trial.violation(f"{handle!r}: only {gap:.1f} ms before restart {failures}")


def check_end(handle: WorkerHandle, starts: list[int], trial: Trial) -> None:
    """Once terminated it is gone, and no run and no end of it has been lost."""
    try:
        outcome = handle.wait_until_gone(60)
    except WaitTimeoutError as exc:
        trial.violation(str(exc))
        return
    # The last run may have been terminated before it could note anything.
    if outcome.restarts + 1 - len(starts) not in (0, 1) or outcome.exitcode != 1:
        trial.violation(f"{handle!r}: {outcome}, {outcome.restarts} restarts, but {len(starts)}")


@pytest.mark.timeout_s(600)
def test_T15_workers_that_fail_at_once_keep_to_their_delays_and_hold_up_nobody(
    trial: Trial, runtime_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = Log(capfd)
    path = runtime_dir / "starts"
    with supervisor(max_worker_processes=96) as client:
        books = Books(client).open()
        with Zygote("support.load", "support.workers") as zygote:
            calm = Phase(client, zygote, trial, runtime_dir)
            calm.last(trial.pick(0.5, 5.0, 15.0))
            began = time.monotonic_ns()
            handles = [client.register(LEAVE, str(path), 1, restart_time=0) for _ in range(STORM)]
            stormy = Phase(client, zygote, trial, runtime_dir)
            stormy.last(trial.pick(2.0, 15.0, 120.0))
            for handle in handles:
                handle.terminate()
            lasted = time.monotonic_ns() - began
        books.see_out(handles, trial)
        starts: dict[int, list[int]] = {handle.slot: [] for handle in handles}
        for line in lines(path):
            slot, started, _ = map(int, line.split())
            starts[slot].append(started)
        for handle in handles:
            check_starts(handle, starts[handle.slot], lasted, trial)
            check_end(handle, starts[handle.slot], trial)
        books.settle(trial)
        check_log(log.text, trial)
    numbers = sorted(map(len, starts.values()))
    trial.count(sum(numbers))
    trial.note(
        f"{numbers[0]} to {numbers[-1]} starts each, {most_starts(lasted)} allowed;"
        f" in the storm: {stormy}; without: {calm}"
    )
