"""T12: a long life leaves nothing behind: no descriptor, process, slot, token or memory."""

from __future__ import annotations

import os
import signal

import pytest

from fix_trials import Trial
from pgbgw import Client, Flags, attach
from support import poll_until
from support.books import Books
from support.slot_tables import FREE
from support.supervisors import supervisor

pytestmark = pytest.mark.xdist_group("live")

NOOP = "support.workers:noop"
SLEEP = "support.workers:sleep_until_stopped"


def live(client: Client, cycles: int) -> None:
    """Register and stop, in the ways there are, twelve at a time."""
    for n in range(0, cycles, 12):
        workers = []
        for i in range(3):
            started = client.register(SLEEP, flags=Flags.CLASS_PARALLEL if i else Flags.NONE)
            cancelled = client.register(SLEEP)
            cancelled.terminate()
            member = client.register(NOOP, flags=Flags.SHMEM_ACCESS)
            large = client.register(NOOP, "x" * 800, name=f"worker {n}")
            workers += [started, cancelled, member, large]
        for started in workers[::4]:
            started.wait_for_startup(30)
            started.terminate()
        for worker in workers:
            assert worker.wait_until_gone(30).final


def come_and_go(address: str, clients: int) -> None:
    for _ in range(clients):
        with attach(address) as client:
            client.register(NOOP).wait_until_gone(30)


def come_and_die(address: str, clients: int) -> None:
    """Fork clients that die of SIGKILL; a worker in four is left to be started first."""
    for n in range(clients):
        pid = os.fork()
        if pid == 0:
            try:
                handle = attach(address).register(NOOP)
                if n % 4 == 0:
                    handle.wait_for_startup(30)
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.timeout_s(7200)
def test_T12_worker_cycles_and_passing_clients_leave_nothing_behind(trial: Trial) -> None:
    cycles = trial.pick(400, 20_000, 200_000)
    clients = trial.pick(50, 2000, 20_000)
    with supervisor(max_worker_processes=16, max_parallel_workers=2) as client:
        books = Books(client)
        descriptors = books.descriptors  # now: who has died may not have been noticed later
        live(client, cycles // 20)  # caches fill, arenas are taken
        come_and_go(client.address, 10)
        come_and_die(client.address, 10)
        poll_until(lambda: books.states == {FREE})
        memory = books.memory
        live(client, cycles)
        come_and_go(client.address, clients)
        come_and_die(client.address, clients // 4)
        poll_until(lambda: books.states == {FREE}, message="a slot or token is not given back")
        trial.count(cycles + clients + clients // 4)
        # The last client to die may not have been noticed yet.
        poll_until(lambda: books.descriptors == descriptors, message="descriptors are left")
        assert books.children == 1
        assert client.workers() == []
        growth = books.memory - memory
        trial.note(f"{growth} bytes more after {cycles} workers and {clients} clients")
        # Less than 64 bytes a cycle, but not less than an arena of Python's allocator.
        if growth >= max(1 << 20, 64 * cycles):
            trial.violation(f"the supervisor has grown by {growth} bytes")
