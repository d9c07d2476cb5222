"""T03: processes killed at random moments leave nothing behind.

Eight clients do all that clients do, at random; a killer picks one every few dozen milliseconds,
stops it first now and then, so that others meet what it was in the middle of, and kills it, or a
worker.  A new one takes its place at once.  Afterwards every handle that anybody was given is final
and every slot, token, descriptor and byte is given back.
"""

from __future__ import annotations

import os
import signal
import time

import pytest

from fix_trials import Trial
from pgbgw import Client
from support.books import Books, check_log
from support.control import Log
from support.crowd import Crowd, open_worker
from support.supervisors import supervisor
from support.zygote import Zygote

pytestmark = pytest.mark.xdist_group("live")

CLIENTS = 8
STOPPED_FIRST = 0.3
WORKERS = 0.15  # of the victims
SHORTEST, MEAN, LONGEST = 0.001, 0.015, 0.2  # seconds between kills
GROWTH = 16 << 20  # bytes that a supervisor may have gained


class Killer:
    def __init__(self, client: Client, crowd: Crowd, trial: Trial) -> None:
        self._client = client
        self._crowd = crowd
        self._trial = trial
        self.clients = self.stopped_first = self.attaching = self.workers = 0

    @property
    def killed(self) -> int:
        return self.clients + self.workers

    def kill_one(self) -> None:
        """A worker, or a client, which has a successor at once."""
        chance = self._trial.random
        if chance.random() < WORKERS and self._kill_a_worker():
            self.workers += 1
            return
        victim = chance.choice(self._crowd.clients)
        if chance.random() < STOPPED_FIRST:
            victim.signal(signal.SIGSTOP)
            self.stopped_first += 1
            self._crowd.listen(time.monotonic() + delay(self._trial))
        self.clients += 1
        self.attaching += victim not in self._crowd.attached
        self._crowd.replace(victim)

    def _kill_a_worker(self) -> bool:
        running = [info for info in self._client.workers() if info.pid is not None]
        if not running:
            return False
        pidfd = open_worker(self._client, self._trial.random.choice(running))
        if pidfd is None:
            return False
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return False
        finally:
            os.close(pidfd)
        return True


def delay(trial: Trial) -> float:
    return min(max(SHORTEST, trial.random.expovariate(1 / MEAN)), LONGEST)


@pytest.mark.timeout_s(14_400)
def test_T03_random_kills_leave_nothing_behind(
    trial: Trial, capfd: pytest.CaptureFixture[str]
) -> None:
    kills = trial.pick(60, 1600, 30_000)
    log = Log(capfd)
    memory = []
    with supervisor(max_worker_processes=48, max_parallel_workers=12) as client:
        books = Books(client).open()
        began = time.monotonic()
        with Zygote("support.load", "support.workers") as zygote:
            crowd = Crowd(client, zygote, trial)
            for _ in range(CLIENTS):
                crowd.add("support.load:random_client")
            killer = Killer(client, crowd, trial)
            while killer.killed < kills:
                crowd.listen(time.monotonic() + delay(trial))
                killer.kill_one()
                if killer.killed * 20 // kills > len(memory):
                    memory.append(books.memory)
            crowd.kill()
        lasted = time.monotonic() - began
        trial.count(killer.killed)
        outcomes = books.see_out(crowd.handles, trial)
        books.settle(trial)
        # From when a quarter of it is over: by then everything has happened once.
        growth = books.memory - memory[len(memory) // 4]
        if growth > GROWTH:
            trial.violation(f"the supervisor has grown by {growth} bytes: {memory}")
        check_log(log.text, trial)
    lost = sum(outcome.kind == "lost" for outcome in outcomes)
    trial.note(
        f"{lasted:.0f} s; {killer.clients} clients ({killer.stopped_first} stopped first,"
        f" {killer.attaching} while attaching), {killer.workers} workers;"
        f" {len(outcomes)} handles final ({lost} too old to tell);"
        f" memory {growth >> 10:+} KiB in the last three quarters"
    )
