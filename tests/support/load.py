"""Clients that do all that clients do, at random: the load under which others are killed or hit.

A client reports by its pipe ("registered", slot, generation), and ("violation", text) when a
promise to it was broken.  What it is refused is no violation, nor that a wait takes long: the
machine is busy and it may be stopped meanwhile.
"""

from __future__ import annotations

import os
import pickle
import random
import select
import signal
import socket
import time
from contextlib import suppress
from multiprocessing.connection import Connection

from pgbgw import (
    Client,
    Flags,
    HandleStatus,
    Outcome,
    PgbgwError,
    WaitTimeoutError,
    WorkerHandle,
    attach,
)
from support.supervisors import lines

HANG = 30.0  # seconds
KEPT = 64  # handles of each client, the stale ones counted
NOOP = "support.workers:noop"
SLEEP = "support.workers:sleep_until_stopped"
TYPE = "at random"  # of workers that any of these clients may terminate
CODE = 7
EXIT = "support.workers:exit_with"
LEAVE = "support.storm_workers:note_and_leave"

_ORDER = {
    HandleStatus.NOT_YET_STARTED: 0,
    HandleStatus.STARTED: 1,
    HandleStatus.STOPPED: 2,
    HandleStatus.SUPERVISOR_DIED: 3,
}

# Where clients leave handles for each other: inherited by all forks of one zygote.
_left, _found = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
for _end in (_left, _found):
    _end.setblocking(False)


class RandomClient:
    """One client's life; `steps` are its choices, with their weights."""

    def __init__(self, test: Connection, address: str, seed: int) -> None:
        self.test = test
        self.random = random.Random(seed)
        self.address = address
        self.client: Client = attach(address)
        self.own: dict[WorkerHandle, str] = {}  # and the entry; of this attachment
        self.others: list[WorkerHandle] = []
        self.seen: dict[WorkerHandle, int] = {}
        self.steps = {
            self.register: 8,
            self.terminate_own: 5,
            self.terminate_any: 1,
            self.look: 8,
            self.wait: 5,
            self.wait_until_gone: 3,
            self.list: 1,
            self.leave_a_handle: 2,
            self.find_a_handle: 2,
            self.detach: 1,
        }

    def live(self) -> None:
        """Until killed, or told to end."""
        steps, weights = list(self.steps), list(self.steps.values())
        self.test.send(("attached",))
        while not self.test.poll():
            for step in self.random.choices(steps, weights, k=16):
                started = time.monotonic()
                step()
                if time.monotonic() - started > HANG:
                    self.violation(f"{step.__name__} took {time.monotonic() - started:.1f} s")
        self.client.close()

    def violation(self, what: str) -> None:
        self.test.send(("violation", what))

    # --- what it does -----------------------------------------------------------------------

    def register(self) -> None:
        entry, args = self.random.choice([(NOOP, ()), (EXIT, (CODE,)), (SLEEP, ())])
        flags = self.random.choice([Flags.NONE, Flags.NONE, Flags.CLASS_PARALLEL])
        handle = self.client.try_register(entry, *args, flags=flags, type=TYPE)
        if handle is None:
            return
        self.test.send(("registered", handle.slot, handle.generation))
        self.own[handle] = entry
        while len(self.own) > KEPT:
            self.forget(next(iter(self.own)))

    def terminate_own(self) -> None:
        if handle := self.any_handle():
            handle.terminate()

    def terminate_any(self) -> None:
        """Somebody's, who may be dead."""
        if workers := self.client.workers(type=TYPE):
            self.client.handle(self.random.choice(workers)).terminate()

    def look(self) -> None:
        if handle := self.any_handle():
            self.observe(handle, handle.status())
            outcome = handle.outcome
            if outcome is not None:
                self.check(handle, outcome)

    def wait(self) -> None:
        if handle := self.any_handle():
            wait = self.random.choice([handle.wait_for_startup, handle.wait_for_shutdown])
            with suppress(WaitTimeoutError):
                self.observe(handle, wait(self.random.choice([0, 0.001, 0.02])))

    def wait_until_gone(self) -> None:
        """Terminated, or short-lived: its end must come and be told."""
        if handle := self.any_handle():
            handle.terminate()
            try:
                self.check(handle, handle.wait_until_gone(HANG))
            except WaitTimeoutError as exc:
                self.violation(f"{handle!r}: {exc}; it is {handle.status().name}")
            self.observe(handle, handle.status())
            if handle.status() is not HandleStatus.STOPPED:
                self.violation(f"{handle!r} is gone and {handle.status().name}")

    def list(self) -> None:
        for info in self.client.workers():
            if info.outcome is not None:
                self.check(self.client.handle(info), info.outcome)

    def leave_a_handle(self) -> None:
        if handle := self.any_handle():
            with suppress(BlockingIOError):
                _left.send(pickle.dumps(handle))

    def find_a_handle(self) -> None:
        with suppress(BlockingIOError):
            handle = pickle.loads(_found.recv(4096))
            if handle not in self.own:
                self.others.append(handle)
            if len(self.others) > KEPT:
                self.forget(self.others[0])

    def detach(self) -> None:
        """Leave and come back as another client; handles go on."""
        self.client.close()
        self.client = attach(self.address)
        # Their ends are no longer told to us.
        self.others = [*self.others, *self.own][-KEPT:]
        self.own.clear()

    # --- what must hold ---------------------------------------------------------------------

    def any_handle(self) -> WorkerHandle | None:
        handles = [*self.own, *self.others]
        return self.random.choice(handles) if handles else None

    def forget(self, handle: WorkerHandle) -> None:
        self.own.pop(handle, None)
        self.seen.pop(handle, None)
        self.others = [h for h in self.others if h != handle]

    def observe(self, handle: WorkerHandle, status: HandleStatus) -> None:
        """None of these workers restarts: the status of a handle never goes back."""
        if _ORDER[status] < self.seen.get(handle, 0):
            self.violation(f"{handle!r} went back to {status.name}")
        self.seen[handle] = _ORDER[status]

    def check(self, handle: WorkerHandle, outcome: Outcome) -> None:
        """A worker ends as its entry says, killed by the test, terminated, or cancelled; and who
        registered it is told which."""
        entry = self.own.get(handle)
        right = {
            "exited": entry is None or outcome.exitcode in {1, CODE if entry == EXIT else 0},
            "signaled": outcome.signal == 9,
            "cancelled": True,
            "lost": entry is None,
        }
        if not right.get(outcome.kind, False) or (entry == SLEEP and outcome.exitcode == 0):
            self.violation(f"{handle!r} of {entry}: {outcome}")


def random_client(test: Connection, address: str, seed: int) -> None:
    """For Zygote.fork(): a client's life."""
    os.nice(5)  # it never rests; those who kill and count keep their pace all the same
    RandomClient(test, address, seed).live()


def counting_client(test: Connection, address: str, seed: int) -> None:
    """For Zygote.fork(): register workers that end by themselves, some at a time, and see that the
    end of each is told, in all the ways there are, and told right."""
    chance = random.Random(seed)
    told = 0
    client = attach(address)
    test.send(("attached",))
    while not test.poll():
        codes = {}
        for _ in range(chance.randint(1, 6)):
            code = chance.randint(2, 255)
            if (handle := client.try_register(EXIT, code)) is not None:
                codes[handle] = code
        if not codes:
            time.sleep(0.01)
            continue
        wait = chance.choice([_wait_for_all, _wait_for_each, _watch_all])
        left = wait(client, set(codes))
        if left:
            test.send(("violation", f"{wait.__name__}: the end of {left} was not told"))
        for handle in codes.keys() - left:
            outcome = handle.outcome
            if outcome is None or outcome.exitcode != codes[handle]:
                test.send(("violation", f"{handle!r}: {outcome}, not {codes[handle]}"))
            told += 1
    test.send(("counted", "exits", told))
    client.close()


def _wait_for_all(client: Client, handles: set[WorkerHandle]) -> set[WorkerHandle]:
    return client.wait(handles, HANG, "ALL_GONE")[1]


def _wait_for_each(client: Client, handles: set[WorkerHandle]) -> set[WorkerHandle]:
    left = set()
    for handle in handles:
        try:
            handle.wait_until_gone(HANG)
        except WaitTimeoutError:
            left.add(handle)
    return left


def _watch_all(client: Client, handles: set[WorkerHandle]) -> set[WorkerHandle]:
    left = set(handles)
    deadline = time.monotonic() + HANG
    with client.watch(*handles) as watch:
        while left and (seconds := deadline - time.monotonic()) > 0:
            select.select([watch], [], [], seconds)
            left -= {h for h in watch.changes() if h.status() is HandleStatus.STOPPED}
    return left


def measuring_client(test: Connection, address: str, seed: int, path: str) -> None:
    """For Zygote.fork(): start and stop workers, some dozens a second, and take the time."""
    chance = random.Random(seed)
    took: dict[str, list[int]] = {"register": [], "launch": [], "stop": [], "reap": []}
    client = attach(address)
    test.send(("attached",))
    try:
        while not test.poll(chance.expovariate(1 / 0.02)):
            before = time.monotonic_ns()
            handle = client.register(SLEEP)
            registered = time.monotonic_ns()
            handle.wait_for_startup(HANG)
            started = time.monotonic_ns()
            handle.terminate()
            outcome = handle.wait_until_gone(HANG)
            took["register"].append(registered - before)
            took["launch"].append(started - registered)
            took["stop"].append(time.monotonic_ns() - started)
            if outcome.exitcode != 1:
                test.send(("violation", f"{handle!r} was terminated: {outcome}"))
            outcome = client.register(LEAVE, path, 3).wait_until_gone(HANG)
            _, _, left = lines(path)[-1].split()
            took["reap"].append(int(outcome.at * 1e9) - int(left))
            if outcome.exitcode != 3:
                test.send(("violation", f"{outcome}, not 3"))
    except PgbgwError as exc:
        test.send(("violation", repr(exc)))
    for what, times in took.items():
        test.send(("took", what, times))
    client.close()


def interrupted_random_client(test: Connection, address: str, seed: int) -> None:
    _take_notice_of_signals()
    random_client(test, address, seed)


def interrupted_counting_client(test: Connection, address: str, seed: int) -> None:
    _take_notice_of_signals()
    counting_client(test, address, seed)


def _take_notice_of_signals() -> None:
    """By handlers that do nothing but interrupt every system call that they meet."""
    for signum in INTERRUPTING:
        signal.signal(signum, lambda *_: None)


INTERRUPTING = (
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGWINCH,
    signal.SIGCHLD,
)
