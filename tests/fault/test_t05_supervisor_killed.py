"""T05: a supervisor that is killed takes its workers along, and nobody waits for it in vain.

Each round starts a supervisor at the same address, with workers that compute in C, read what never
comes or are deaf to signals, with clients that wait in all the ways there are, and others that
register so fast that it is always forking.  It is killed at a random moment.  From then on the
time is taken until each waiter is released and each worker is gone.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from fix_trials import Trial
from pgbgw import Client, HandleStatus, StartTime, Supervisor, SupervisorDiedError, WorkerHandle
from support.books import check_log
from support.control import Log
from support.figures import spread
from support.processes import GUARD
from support.waiters import DIED, KINDS
from support.waiting import poll_until
from support.zygote import Fork, Zygote

pytestmark = [pytest.mark.xdist_group("live"), pytest.mark.leaves_sockets]

ADDRESS = "killed"
MARK = "PGBGW_TEST_ROUND"
QUIET = ["support.storm_workers:blocked_in_read"] * 5 + ["support.storm_workers:deaf"] * 5
BUSY = ["support.storm_workers:busy_in_c"] * 6
WAITERS, REGISTRARS = 16, 4
LONGEST = 0.08  # seconds of life, once all wait


class Killed:
    """The rounds, and what was measured in them, in nanoseconds from the kill."""

    def __init__(self, zygote: Zygote, trial: Trial, directory: Path) -> None:
        self._trial = trial
        self._directory = directory
        kinds = list(KINDS)
        self._waiters = {
            zygote.fork("support.waiters:waiter"): kinds[n % len(kinds)] for n in range(WAITERS)
        }
        self._registrars = [zygote.fork("support.waiters:registrar") for _ in range(REGISTRARS)]
        self.starts: list[int] = []
        self.measured: dict[bool, dict[str, list[int]]] = {
            at_rest: {
                name: []
                for name in ("supervisor", "waiters", "last waiter", "workers", "last worker")
            }
            for at_rest in (True, False)
        }

    def round(self, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        at_rest = number % 2 == 1  # else while it is forking
        times = self.measured[at_rest]
        mark = f"{os.getpid()}.{number}"
        monkeypatch.setenv(MARK, mark)
        began = time.monotonic_ns()
        client = Supervisor(
            max_worker_processes=256, address=ADDRESS, startup="support.storm_workers:never_done"
        ).start()
        self.starts.append(time.monotonic_ns() - began)
        process = client._process
        assert process is not None
        try:
            with ExitStack() as stack:
                # The busy ones come last: all else would take its time beside them.
                self.running = self._run_workers(client, QUIET)
                self.pending = client.register("support.workers:noop")
                self._set_to_wait(client)
                self.running += self._run_workers(client, BUSY)
                pids = [process.pid, *(handle.pid or 0 for handle in self.running)]
                pidfds = [os.pidfd_open(pid) for pid in pids]
                for fd in pidfds:
                    stack.callback(os.close, fd)
                if not at_rest:
                    self._set_to_register(client)
                if self._trial.random.random() < 0.5:  # else in the first rush
                    time.sleep(self._trial.random.uniform(0, LONGEST))
                killed = time.monotonic_ns()
                process.send_signal(signal.SIGKILL)
                self._see_workers_go(pidfds, killed, times)
                self._see_clients_released(killed, times)
                if not at_rest:
                    for fork in self._registrars:
                        self._hear(fork, "registrar", killed)
        finally:
            process.kill()
            process.wait()
        self._find_orphans(mark)
        self._try_everything(client)
        client.close()
        self._trial.count()

    def _run_workers(self, client: Client, entries: list[str]) -> list[WorkerHandle]:
        handles = [client.register(e, start_time=StartTime.SUPERVISOR_START) for e in entries]
        for handle in handles:
            assert handle.wait_for_ready(GUARD) is HandleStatus.STARTED
        return handles

    def _set_to_wait(self, client: Client) -> None:
        for n, (fork, kind) in enumerate(self._waiters.items()):
            fork.say((kind, client.address, self.pending, self.running[n % len(self.running)]))
        for fork in self._waiters:
            assert fork.hear() == "waiting"

    def _set_to_register(self, client: Client) -> None:
        for fork in self._registrars:
            fork.say(client.address)
        for fork in self._registrars:
            assert fork.hear() == "registering"

    def _see_workers_go(self, pidfds: list[int], killed: int, times: dict[str, list[int]]) -> None:
        """The supervisor's own is the first."""
        poll = select.poll()
        for fd in pidfds:
            poll.register(fd, select.POLLIN)
        ends: dict[int, int] = {}
        while len(ends) < len(pidfds) and (events := poll.poll(GUARD * 1000)):
            now = time.monotonic_ns()
            for fd, _ in events:
                poll.unregister(fd)
                ends[fd] = now - killed
        if left := len(pidfds) - len(ends):
            self._trial.violation(f"{left} of {len(pidfds)} processes outlive their supervisor")
        times["supervisor"] += [ends.pop(fd) for fd in pidfds[:1] if fd in ends]
        times["workers"] += ends.values()
        times["last worker"].append(max(ends.values(), default=0))

    def _see_clients_released(self, killed: int, times: dict[str, list[int]]) -> None:
        released = [self._hear(fork, kind, killed) for fork, kind in self._waiters.items()]
        times["waiters"] += released
        times["last waiter"].append(max(released))

    def _hear(self, fork: Fork, kind: str, killed: int) -> int:
        """How long after the kill it was released, and rightly."""
        released, how = fork.hear()
        if released == "failed":
            raise AssertionError(f"{kind}: {how}")
        if how != DIED:
            self._trial.violation(f"who waits for {kind} is told {how}")
        if released < killed:
            self._trial.violation(f"who waits for {kind} was released before the kill")
        return int(released - killed)

    def _find_orphans(self, mark: str) -> None:
        """No process that the supervisor made is left, the log's relay included, and none that can
        no longer be told by its environment holds the lock that workers inherit."""
        with (self._directory / f"{ADDRESS}.workers.lock").open() as file:

            def free() -> bool:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
                return True

            try:
                poll_until(lambda: not marked(mark) and free(), GUARD)
            except AssertionError:
                self._trial.violation(f"orphans: {marked(mark)}; workers.lock is free: {free()}")

    def _try_everything(self, client: Client) -> None:
        """Whoever still has the dead supervisor's client is told so, at once."""
        statuses = {handle.status() for handle in (*self.running, self.pending)}
        if statuses != {HandleStatus.SUPERVISOR_DIED}:
            self._trial.violation(f"after death a handle is {statuses}")
        for name, call in {
            "register": lambda: client.register("support.workers:noop"),
            "wait_until_gone": lambda: self.running[0].wait_until_gone(GUARD),
        }.items():
            try:
                self._trial.violation(f"after death {name} gives {call()}")
            except SupervisorDiedError:
                pass


def marked(mark: str) -> list[int]:
    """All processes that carry the mark in their environment, zombies left out."""
    wanted = f"{MARK}={mark}\0".encode()
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if wanted in Path("/proc", pid, "environ").read_bytes():
                found.append(int(pid))
        except OSError:  # gone by now, or somebody else's
            pass
    return found


@pytest.mark.timeout_s(3600)
def test_T05_a_killed_supervisor_leaves_no_orphan_and_nobody_waiting(
    trial: Trial,
    runtime_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    log = Log(capfd)
    with Zygote("support.waiters") as zygote:
        killed = Killed(zygote, trial, runtime_dir)
        for number in range(trial.pick(3, 100, 1000)):
            killed.round(number, monkeypatch)
            if trial.violations:
                break  # orphans stay until the test is over, and some are busy
    check_log(log.text, trial)
    for at_rest, times in killed.measured.items():
        spreads = ", ".join(
            f"{name} {spread(v / 1e9 for v in values)}" for name, values in times.items()
        )
        trial.note(f"killed {'at rest' if at_rest else 'forking'}: {spreads}")
    trial.note(f"starts {spread(v / 1e9 for v in killed.starts)}")
