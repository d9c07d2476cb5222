"""Clients that wait, and clients that register all the while, until their supervisor is dead.

For Zygote.fork().  They live on from one supervisor to the next: each order is the address of one.
"""

from __future__ import annotations

import select
import time
from multiprocessing.connection import Connection

from pgbgw import Client, HandleStatus, StartTime, SupervisorDiedError, WorkerHandle, attach

DIED = "died"


def waiter(test: Connection) -> None:
    """Wait as each order (kind, address, pending, running) says; "waiting", then (when it was
    released in monotonic ns, how)."""
    while (order := test.recv()) is not None:
        kind, address, pending, running = order
        client = attach(address)
        wait = KINDS[kind]
        test.send("waiting")
        how = wait(client, pending, running)
        test.send((time.monotonic_ns(), how))
        client.close()


def _shutdown(client: Client, pending: WorkerHandle, running: WorkerHandle) -> str:
    return _died(running.wait_for_shutdown())


def _startup(client: Client, pending: WorkerHandle, running: WorkerHandle) -> str:
    return _died(pending.wait_for_startup())


def _gone(client: Client, pending: WorkerHandle, running: WorkerHandle) -> str:
    try:
        return str(running.wait_until_gone())
    except SupervisorDiedError:
        return DIED


def _several(client: Client, pending: WorkerHandle, running: WorkerHandle) -> str:
    done, rest = client.wait([pending, running], return_when="ALL_STOPPED")
    return DIED if not rest and {_died(h.status()) for h in done} == {DIED} else f"{done}, {rest}"


def _watch(client: Client, pending: WorkerHandle, running: WorkerHandle) -> str:
    """As an event loop does: wait for the descriptor, then ask what has changed."""
    with client.watch(pending, running) as watch:
        while True:
            select.select([watch], [], [])
            try:
                for handle in watch.changes():
                    if handle == running and handle.status() is HandleStatus.STOPPED:
                        return "stopped"
            except SupervisorDiedError:
                return DIED


def _died(status: HandleStatus) -> str:
    return DIED if status is HandleStatus.SUPERVISOR_DIED else status.name


KINDS = {f.__name__.strip("_"): f for f in (_shutdown, _startup, _gone, _several, _watch)}


def registrar(test: Connection) -> None:
    """Start workers without pause at each address, which end soon, but not without us: who misses
    the supervisor's death stays.  "registering", then (when it noticed the death, "died")."""
    while (address := test.recv()) is not None:
        client = attach(address)
        test.send("registering")
        try:
            while True:
                handle = client.try_register(DEAF, start_time=StartTime.SUPERVISOR_START)
                if handle is None:
                    time.sleep(0.0005)
                else:
                    handle.wait_for_startup()
                    handle.terminate(grace=0.05)
        except SupervisorDiedError:
            test.send((time.monotonic_ns(), DIED))
        client.close()


DEAF = "support.storm_workers:deaf"
