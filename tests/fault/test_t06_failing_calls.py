"""The n-th call of a function fails inside the supervisor, for n = 1, 2, 3, ...

A library of ours is preloaded into the supervisor and makes it so (failing_calls.c).  Each time the
same things are asked of the supervisor, some of which may fail; but every request must reach a
final state, and when the fault is over all must work as before, with nothing left behind.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from fix_trials import Trial
from pgbgw import (
    AttachError,
    Client,
    Flags,
    StartError,
    Supervisor,
    SupervisorDiedError,
    WaitTimeoutError,
)
from support.failing_calls import NEXT, FailingCalls
from support.rogues import welcomed
from support.supervisors import supervisor
from support.waiting import poll_until

pytestmark = pytest.mark.xdist_group("live")

NOOP = "support.workers:noop"
SLEEP = "support.workers:sleep_until_stopped"
EXIT = "support.workers:exit_with"
HANG = 15.0  # seconds
MOST = 30  # the n of the n-th call

# What each call may really fail with.
ERRORS = {
    "fork": [errno.EAGAIN, errno.ENOMEM],
    "pidfd_open": [errno.EMFILE, errno.ENFILE, errno.ENOMEM],
    "accept4": [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ECONNABORTED, errno.EINTR],
    "epoll_ctl": [errno.ENOMEM, errno.ENOSPC],
    "epoll_wait": [errno.EINTR],
    "send": [errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN, errno.EINTR],
    "sendmsg": [errno.ENOBUFS, errno.ETOOMANYREFS, errno.EAGAIN, errno.EINTR],
    "recv": [errno.EAGAIN, errno.EINTR],
    "waitid": [errno.EINTR],
    "socketpair": [errno.EMFILE, errno.ENFILE, errno.ENOMEM],
    "read": [errno.EAGAIN, errno.EINTR],
    "poll": [errno.ENOMEM, errno.EINTR],
    "getsockopt": [errno.EMFILE, errno.ENOMEM],
    "setsockopt": [errno.ENOMEM],
    "pidfd_send_signal": [errno.EPERM, errno.ENOMEM],
}


def attach_and_go(client: Client) -> bool:
    """Become another connection of this process, and leave; False if the supervisor hangs up, or
    listens no more: it is about to end."""
    try:
        sock = welcomed(client)
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    if sock is None:
        return False
    sock.close()
    return True


def requests(client: Client) -> list[str]:
    """Ask for everything there is; what did not come to an end."""
    wrong = []
    try:
        attach_and_go(client)
    except AssertionError as exc:
        wrong.append(str(exc))
    once = client.register(NOOP)
    again = client.register(EXIT, 1, restart_time=0)
    member = client.register(SLEEP, flags=Flags.SHMEM_ACCESS)
    parallel = client.register(SLEEP, flags=Flags.CLASS_PARALLEL)
    for handle in (member, parallel):
        with suppress(WaitTimeoutError):
            handle.wait_for_startup(HANG)
        handle.wake()
    os.kill(client.supervisor_pid, signal.SIGHUP)  # which it reads and does not mind
    again.terminate()
    member.terminate(grace=1)
    parallel.terminate(grace=0.2)
    for handle in (once, again, member, parallel):
        try:
            outcome = handle.wait_until_gone(HANG)
        except WaitTimeoutError as exc:
            wrong.append(f"{exc}; its status is {handle.status().name}")
        else:
            if not outcome.final:
                wrong.append(f"{handle!r} is gone, but not for good")
    return wrong


class Watched:
    """The supervisor, what it held when nothing had failed yet, and the plan."""

    def __init__(self, client: Client, calls: FailingCalls, trial: Trial) -> None:
        self.client, self.calls, self.trial = client, calls, trial
        self.process = psutil.Process(client.supervisor_pid)
        assert requests(client) == []
        calls.watch(client.supervisor_pid)
        assert requests(client) == []
        self.descriptors = self.process.num_fds()

    def fails(self, name: str, error: int, after: int, times: int = 1) -> bool:
        """Ask for everything while the call fails; False if it never came to fail."""
        self.calls.fail(name, error, after=after, times=times)
        wrong = requests(self.client)
        self.calls.stop()
        case = f"{name} {after + 1} with {errno.errorcode[error]}"
        for what in wrong:
            self.trial.violation(f"{case}: {what}")
        self.trial.count()
        assert self.process.is_running(), case
        return self.calls.failed > 0

    def recovers(self, what: str) -> None:
        """The fault is over: all works, nothing is left over, and it sleeps."""
        self.calls.stop()
        poll_until(lambda: attach_and_go(self.client), message=f"attaching after {what}")
        for wrong in requests(self.client):
            self.trial.violation(f"after {what}: {wrong}")
        outcome = self.client.register(NOOP).wait_until_gone(HANG)
        if outcome.exitcode != 0:
            self.trial.violation(f"after {what}: {outcome}")
        if self.client.workers():
            self.trial.violation(f"after {what}: left in the table: {self.client.workers()}")
        poll_until(lambda: self.process.num_fds() == self.descriptors, message=f"fds, {what}")
        poll_until(lambda: len(self.process.children()) == 1, message=f"children, {what}")
        before = self.process.cpu_times()
        began = time.monotonic()
        poll_until(lambda: time.monotonic() - began > 0.25)
        spent = sum(self.process.cpu_times()[:2]) - sum(before[:2])
        if spent > 0.2 * (time.monotonic() - began) + 0.02:  # and a tick of the clock it counts by
            self.trial.violation(f"after {what}: spins, {spent:.2f} s of CPU in 0.25 s")


@pytest.mark.timeout_s(7200)
def test_T06_a_system_call_that_fails_costs_at_most_its_own_request(
    trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = trial.pick(2, MOST, 5 * MOST)
    with (
        FailingCalls.preloaded(tmp_path, monkeypatch) as calls,
        supervisor(max_worker_processes=16, shared_memory=4096) as client,
    ):
        watched = Watched(client, calls, trial)
        for name, errors in ERRORS.items():
            if trial.form == "quick":
                errors = [trial.random.choice(errors)]
            for error in errors:
                reached = 0
                while reached < most and watched.fails(name, error, reached):
                    reached += 1
                assert reached, f"{name} is never called"
                if trial.form != "quick":  # not one call, but all for a while
                    watched.fails(name, error, 0, times=20)
            if trial.form != "quick":
                watched.recovers(name)
        watched.recovers("all that")


@pytest.mark.timeout_s(1800)
def test_T06_a_start_in_which_a_call_fails_works_or_says_why(
    trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails before the first connection is accepted: StartError, and nothing is left."""
    names = ["fork", "mmap", "madvise", "socketpair", "memfd_create", "pidfd_open", "epoll_ctl"]
    started = refused = 0
    with FailingCalls.preloaded(tmp_path, monkeypatch) as calls:
        for name in trial.pick([trial.random.choice(names)], names, names):
            for after in range(trial.pick(2, 4, MOST)):
                calls.watch(NEXT)
                calls.fail(name, trial.random.choice([errno.ENOMEM, errno.EMFILE]), after=after)
                trial.count()
                try:
                    client = Supervisor(shared_memory=4096).start()
                except StartError as exc:
                    refused += 1
                    if not exc.detail:
                        trial.violation(f"{name} {after + 1}: {exc} does not say why")
                    continue
                finally:
                    calls.watch(0)
                    # How often each is called is the supervisor's affair, but not whether.
                    if after == 0 and not calls.failed:
                        trial.violation(f"{name} is never called, and has not failed")
                started += 1
                outcome = client.register(NOOP).wait_until_gone(HANG)
                if outcome.exitcode != 0:
                    trial.violation(f"{name} {after + 1}: started, but then: {outcome}")
                client.stop("fast", timeout=HANG)
                client.close()
    if not refused:
        trial.violation("no start was refused")
    trial.note(f"{started} started, {refused} refused")


@pytest.mark.leaves_sockets
@pytest.mark.timeout_s(14_400)
def test_T06_an_allocation_that_fails_leaves_nobody_waiting(
    trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MemoryError anywhere in the supervisor's Python.

    Memory that runs short is met by refusing registrations in time (T08).  What fails all the same
    may end the supervisor, as it would PostgreSQL's: Python cannot go on from the middle of
    anything.  Then every waiter hears of it, and every worker is gone with it.
    """
    ended = usual = 0
    with FailingCalls.preloaded(tmp_path, monkeypatch, malloc=True) as calls:
        for _ in range(trial.pick(2, 60, 2000)):
            client = Supervisor(max_worker_processes=16, shared_memory=4096).start()
            try:
                requests(client)
                calls.watch(client.supervisor_pid)
                if not usual:
                    requests(client)
                    usual = calls.count("malloc")
                after = trial.random.randrange(usual)
                calls.fail("malloc", errno.ENOMEM, after=after)
                workers = [client.register(SLEEP) for _ in range(2)]
                trial.count()
                try:
                    for wrong in requests(client):
                        trial.violation(f"allocation {after + 1}: {wrong}")
                    for handle in workers:
                        handle.terminate()
                        handle.wait_until_gone(HANG)
                except SupervisorDiedError:
                    ended += 1
            finally:
                calls.watch(0)
                with suppress(SupervisorDiedError, AttachError):
                    client.stop("immediate", timeout=HANG)
                client.close()
    trial.note(f"one of {usual} allocations failed; {ended} supervisors ended by it")
