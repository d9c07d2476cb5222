"""Clients that fork, exec and close in the middle of everything.  For Zygote.fork().

What does not go as it must is raised, and a Connection to the test says so; else it says "done".
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection

from pgbgw import (
    AttachError,
    Client,
    HandleStatus,
    NoFreeSlotError,
    PgbgwError,
    WorkerHandle,
    WrongProcessError,
    attach,
)
from support.processes import in_fork

SLEEP = "support.workers:sleep_until_stopped"
EXIT = "support.workers:exit_with"
GUARD = 30.0  # seconds
THREADS = 3


def works(client: Client) -> None:
    assert client.register(EXIT, 7).wait_until_gone(GUARD).exitcode == 7


def is_not_mine(client: Client, handle: WorkerHandle) -> None:
    """In a fork: the parent's client refuses each call, its handle asks for an attached one."""
    calls: list[Callable[[], object]] = [
        lambda: client.register(EXIT, 7),
        client.workers,
        lambda: client.wait([handle], 0),
        lambda: client.watch(handle),
        lambda: client.epoch,
        lambda: client.stop("immediate", 0),
    ]
    for call in calls:
        try:
            raise AssertionError(f"the parent's client answers {call()}")
        except WrongProcessError:
            pass
    for ask in (handle.status, handle.terminate, lambda: handle.wait_until_gone(0)):
        try:
            raise AssertionError(f"a handle answers {ask()} in a process that is not attached")
        except AttachError:
            pass
    client.close()  # no error, and no harm


def attaches_anew(address: str, handle: WorkerHandle | None = None) -> None:
    """As any process: with a client of its own, through which handles work again."""
    with attach(address) as client:
        works(client)
        if handle is not None:
            assert handle.status() is HandleStatus.STARTED


@contextmanager
def registering(client: Client) -> Iterator[None]:
    """Threads that register and terminate without pause; in the end they must all be well."""
    failures: list[BaseException] = []
    enough = threading.Event()

    def register() -> None:
        while not enough.is_set():
            try:
                with suppress(NoFreeSlotError):
                    client.register(EXIT, 7).terminate()
            except BaseException as exc:
                failures.append(exc)
                return

    threads = [threading.Thread(target=register) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        enough.set()
        for thread in threads:
            thread.join()
    assert not failures, failures


def patient(client: Client) -> WorkerHandle:
    """A worker that sleeps; the table may be full for a moment."""
    deadline = time.monotonic() + GUARD
    while time.monotonic() < deadline:
        with suppress(NoFreeSlotError):
            handle = client.register(SLEEP, type="patient")
            assert handle.wait_for_ready(GUARD) is HandleStatus.STARTED
            return handle
    raise AssertionError("no slot becomes free")


# --- forks ------------------------------------------------------------------------------------


def forks_while_it_registers(test: Connection, address: str, times: int) -> None:
    with attach(address) as client:
        handle = patient(client)
        with registering(client):
            for _ in range(times):
                in_fork(lambda: is_not_mine(client, handle))
        for _ in range(times):
            in_fork(lambda: attaches_anew(address, handle))
        assert handle.status() is HandleStatus.STARTED
        handle.terminate()
        assert handle.wait_until_gone(GUARD).exitcode == 1
        works(client)
    test.send(("done",))


def forks_while_it_waits(test: Connection, address: str, times: int) -> None:
    with attach(address) as client:
        handle = patient(client)
        ends: list[object] = []
        threads = [
            threading.Thread(target=lambda: ends.append(handle.wait_until_gone(GUARD)))
            for _ in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        for _ in range(times):
            in_fork(lambda: is_not_mine(client, handle))
            in_fork(lambda: attaches_anew(address, handle))
        assert not ends
        # A fork that takes nobody's wake-up: it waits itself, and outlives the wait of the parent.
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                with attach(address):
                    os.write(write, b".")
                    os._exit(0 if handle.wait_until_gone(GUARD).exitcode == 1 else 1)
            finally:
                os._exit(2)
        os.read(read, 1)
        handle.terminate()
        for thread in threads:
            thread.join()
        assert [getattr(end, "exitcode", None) for end in ends] == [1] * THREADS, ends
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        works(client)
    test.send(("done",))


def daemonises(test: Connection, address: str, times: int) -> None:
    """Fork, setsid, fork, close what is standard, and go on in the grandchild."""
    client = attach(address)
    handle = patient(client)
    for first in (True, False):
        if os.fork():
            os._exit(0)
        if first:
            os.setsid()
    for fd in range(3):
        os.close(fd)
    is_not_mine(client, handle)
    with attach(address) as client:
        works(client)
        assert handle.status() is HandleStatus.STARTED
        handle.terminate()
        assert handle.wait_until_gone(GUARD).exitcode == 1
    test.send(("done",))


# --- exec -------------------------------------------------------------------------------------

_AFTER_EXEC = """
import os, pickle, sys
paths = {int(fd): f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")}
inherited = {fd: os.readlink(path) for fd, path in paths.items() if os.path.islink(path)}
from multiprocessing.connection import Connection
from pgbgw import HandleStatus, attach
from support.misuse import GUARD, works
test, address, handle = Connection(int(sys.argv[1])), sys.argv[2], sys.argv[3]
handle = pickle.loads(bytes.fromhex(handle))
with attach(address) as client:
    works(client)
    assert handle.status() is HandleStatus.STARTED, handle.status()
    handle.terminate()
    assert handle.wait_until_gone(GUARD).exitcode == 1
meant = {0, 1, 2, test.fileno()}
test.send(("done", [what for fd, what in inherited.items() if fd not in meant]))
"""


def executes_another_program(test: Connection, address: str, times: int) -> None:
    """In the middle of registrations.  The new program inherits nothing, and attaches as any."""
    client = attach(address)
    handle = patient(client)
    with registering(client):
        time.sleep(0.01)  # they are at it, wherever they are
        os.set_inheritable(test.fileno(), True)
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        words = [str(test.fileno()), address, pickle.dumps(handle).hex()]
        os.execve(sys.executable, [sys.executable, "-P", "-c", _AFTER_EXEC, *words], environ)


# --- closed descriptors -----------------------------------------------------------------------


def closes_all_descriptors(test: Connection, address: str, times: int) -> None:
    """Its own fault; but it gets errors and answers, does not wait for ever, and can attach anew
    once it has closed its client."""
    client = attach(address)
    handle = patient(client)
    keep = test.fileno()
    os.closerange(3, keep)
    os.closerange(keep + 1, 4096)
    calls: list[Callable[[], object]] = [
        lambda: client.register(EXIT, 7),
        client.workers,
        handle.status,
        lambda: handle.wait_until_gone(1),
        lambda: client.wait([handle], 1),
        lambda: client.watch(handle),
        handle.terminate,
        lambda: handle.outcome,
        client.close,
    ]
    for call in calls:
        with suppress(PgbgwError, OSError):
            call()
    with attach(address) as client:
        works(client)
    test.send(("done",))


def closes_all_descriptors_in_a_fork(test: Connection, address: str, times: int) -> None:
    """What daemons do in the child: no business of the parent's."""
    with attach(address) as client:
        handle = patient(client)
        for _ in range(times):
            pid = os.fork()
            if pid == 0:
                try:
                    os.closerange(3, 4096)
                    is_not_mine(client, handle)
                    attaches_anew(address, handle)
                    os._exit(0)
                finally:
                    os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert handle.status() is HandleStatus.STARTED
        handle.terminate()
        assert handle.wait_until_gone(GUARD).exitcode == 1
        works(client)
    test.send(("done",))
