"""A worker that is a fork bomb, in its bounds: the others do not notice, and it can be ended."""

from __future__ import annotations

import os
import time
from contextlib import suppress

import pytest

from fix_trials import Trial
from pgbgw import HandleStatus
from support.figures import spread
from support.honest import HonestClients, Pauses
from support.supervisors import supervisor
from support.waiting import poll_until

pytestmark = pytest.mark.xdist_group("live")

SLEEP = "support.workers:sleep_until_stopped"
BOMB = "support.bomb_workers:fork_bomb"
HANG = 60.0  # seconds


def session_of(leader: int) -> list[int]:
    """The processes of a worker: it leads a session, and these do not leave it."""
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with suppress(ProcessLookupError):
            if os.getsid(pid) == leader:
                found.append(pid)
    return found


@pytest.mark.timeout_s(3600)
@pytest.mark.parametrize(
    "ignores",
    [pytest.param(False, marks=pytest.mark.at_least("fault")), True],
    ids=["obeys-sigterm", "ignores-sigterm"],
)
def test_T07_a_fork_bomb_is_ended_with_all_its_processes(trial: Trial, ignores: bool) -> None:
    ends = []
    with supervisor(max_worker_processes=32) as client:
        steady = client.register(SLEEP)
        steady.wait_for_ready(HANG)
        pid = steady.pid
        pauses = Pauses(client)
        for _ in range(trial.pick(1, 2, 20)):
            bomb = client.register(BOMB, ignores)
            assert bomb.wait_for_ready(HANG) is HandleStatus.STARTED
            leader = bomb.pid
            assert leader is not None
            poll_until(lambda leader=leader: len(session_of(leader)) > 20)
            with HonestClients(client.address, 1, trial.seed) as honest:
                time.sleep(trial.pick(0.2, 1.0, 10.0))  # while they work
            for wrong in honest.wrong:
                trial.violation(f"another worker: {wrong}")
            if not honest.done:
                trial.violation("no other worker got through")
            began = time.monotonic()
            bomb.terminate(grace=0.3)
            bomb.wait_until_gone(HANG)
            poll_until(lambda leader=leader: not session_of(leader), HANG, message="the bomb")
            ends.append(time.monotonic() - began)
            trial.count()
        if steady.pid != pid:
            trial.violation("a bystander was hit")
        trial.note(f"ended: {spread(ends)}; others: {spread(honest.took)}; {pauses}")
