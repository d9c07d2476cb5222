"""T14: signals, whatever their number, lose no exit, wake no waiter wrongly and fail no call.

Thousands of signals a second hit the supervisor, its workers and its clients, which take notice of
them by handlers, so that every system call is interrupted again and again; some stop a process for
a moment.  All the while clients do all that they do, and others count the ends of workers: each
must be told, and told right.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from fix_trials import Trial
from pgbgw import Client
from support.books import Books, check_log
from support.control import Log
from support.crowd import Crowd, open_worker
from support.load import INTERRUPTING
from support.supervisors import supervisor
from support.zygote import Zygote

pytestmark = pytest.mark.xdist_group("live")

BURST = 50
PAUSE = (signal.SIGSTOP, signal.SIGCONT)

# One, or several right after each other.  None of these asks anybody to stop.
Signals = tuple[signal.Signals, ...]
TO_SUPERVISOR: list[Signals] = [
    (signal.SIGCHLD,),
    (signal.SIGHUP,),
    (signal.SIGUSR1,),
    (signal.SIGUSR2,),
    (signal.SIGWINCH,),
    (signal.SIGALRM,),
    (signal.SIGPIPE,),
    PAUSE,
]
TO_WORKERS: list[Signals] = [
    (signal.SIGCHLD,),
    (signal.SIGHUP,),
    (signal.SIGUSR1,),
    (signal.SIGUSR2,),
    (signal.SIGWINCH,),
    (signal.SIGINT,),
    (signal.SIGPIPE,),
    PAUSE,
]
TO_CLIENTS: list[Signals] = [*((signum,) for signum in INTERRUPTING), PAUSE]


class Storm:
    def __init__(self, client: Client, crowd: Crowd, trial: Trial) -> None:
        self._client = client
        self._crowd = crowd
        self._random = trial.random
        self._supervisor = os.pidfd_open(client.supervisor_pid)
        self.sent = {"supervisor": 0, "workers": 0, "clients": 0}

    def burst(self) -> None:
        workers = [info for info in self._client.workers() if info.pid is not None]
        for _ in range(BURST):
            kind = self._random.choice(["supervisor", "workers", "clients"])
            if kind == "supervisor":
                self._send(kind, TO_SUPERVISOR, self._to(self._supervisor))
            elif kind == "clients" and self._crowd.attached:
                fork = self._random.choice(self._crowd.attached)
                self._send(kind, TO_CLIENTS, fork.signal)
            elif kind == "workers" and workers:
                pidfd = open_worker(self._client, self._random.choice(workers))
                if pidfd is not None:
                    self._send(kind, TO_WORKERS, self._to(pidfd))
                    os.close(pidfd)

    def _to(self, pidfd: int) -> Callable[[int], None]:
        return lambda signum: signal.pidfd_send_signal(pidfd, signum)

    def _send(self, kind: str, choice: list[Signals], send: Callable[[int], None]) -> None:
        for signum in self._random.choice(choice):
            try:
                send(signum)
            except ProcessLookupError:
                return
            self.sent[kind] += 1

    def close(self) -> None:
        os.close(self._supervisor)


@pytest.mark.timeout_s(1800)
def test_T14_a_storm_of_signals_loses_no_exit_and_no_waiter(
    trial: Trial, capfd: pytest.CaptureFixture[str]
) -> None:
    signals = trial.pick(4000, 100_000, 1_000_000)
    a_second = 5000
    log = Log(capfd)
    with supervisor(max_worker_processes=48, max_parallel_workers=12) as client:
        books = Books(client).open()
        with Zygote("support.load", "support.workers") as zygote:
            crowd = Crowd(client, zygote, trial)
            for _ in range(4):
                crowd.add("support.load:interrupted_random_client")
                crowd.add("support.load:interrupted_counting_client")
            storm = Storm(client, crowd, trial)
            began = time.monotonic()
            while (sent := sum(storm.sent.values())) < signals:
                storm.burst()
                crowd.listen(max(began + sent / a_second, time.monotonic() + 0.0001))
            lasted = time.monotonic() - began
            storm.close()
            crowd.end()
        trial.count(sent)
        books.see_out(crowd.handles, trial)
        books.settle(trial)
        check_log(log.text, trial)
    trial.note(
        f"{lasted:.0f} s; {', '.join(f'{n} to {kind}' for kind, n in storm.sent.items())};"
        f" {crowd.counts['exits']} exits counted, {len(crowd.handles)} other handles final"
    )
