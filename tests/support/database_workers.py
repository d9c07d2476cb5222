"""Entry points of workers that are connected to a database."""

from __future__ import annotations

import signal
import sqlite3
import time

from pgbgw import current_worker
from support.workers import append

# Runs for ever, and no Python code with it: that it runs is to be seen by the processor's time.
ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"


def _connect(dsn: str) -> sqlite3.Connection:
    connection: sqlite3.Connection = current_worker().connect(dsn)
    current_worker().ready()
    return connection


def cancelled_statement(path: str, dsn: str) -> None:
    """Be cancelled in an endless statement, go on with another one, then work until stopped."""
    connection = _connect(dsn)
    try:
        connection.execute(ENDLESS)
    except sqlite3.OperationalError as exc:
        append(path, f"{type(exc).__name__}: {exc}")
    append(path, str(connection.execute("SELECT 6 * 7").fetchone()))
    while current_worker().sleep(3600):
        pass


def endless_statement(dsn: str) -> None:
    _connect(dsn).execute(ENDLESS)


def endless_statement_and_callback(path: str, dsn: str) -> None:
    """As above, but SIGTERM is the callback's business; only SIGINT ends the statement."""
    current_worker().on_terminate(lambda: append(path, "asked to stop"))
    connection = _connect(dsn)
    try:
        connection.execute(ENDLESS)
    except sqlite3.OperationalError as exc:
        append(path, f"{exc}")


def cancelled_while_idle(path: str) -> None:
    """Wait between two statements; each wait that ends, and the statement, leave a line."""
    worker = current_worker()
    connection = worker.connect("sqlite://")
    worker.ready()
    worker.wait()
    append(path, "woken")
    append(path, str(connection.execute("SELECT 6 * 7").fetchone()))
    worker.ready()
    worker.sleep(3600)


def closed(path: str) -> None:
    """Close the connection, and wait."""
    worker = current_worker()
    worker.connect("sqlite://").close()
    worker.ready()
    worker.wait()
    append(path, "woken")


def wakes_up(path: str) -> None:
    """Wait with a connection until SIGHUP, then until SIGTERM."""
    worker = current_worker()
    worker.connect("sqlite://")
    worker.on_reload(lambda: append(path, "reload"))
    worker.on_terminate(lambda: append(path, "terminate"))
    worker.ready()
    worker.wait()
    append(path, "waited")
    append(path, f"slept {worker.sleep(3600)}")


def holds_signals_back(path: str) -> None:
    """SIGTERM in a block of signals that the watcher's thread must not open."""
    worker = current_worker()
    worker.connect("sqlite://")
    with worker.signals_blocked():
        worker.ready()
        while signal.SIGTERM not in signal.sigpending():
            time.sleep(0.001)
        append(path, "held back")
    append(path, "not reached")


def write_row(dsn: str, text: str) -> None:
    connection = current_worker().connect(dsn)
    with connection:
        connection.execute("CREATE TABLE IF NOT EXISTS t (x)")
        connection.execute("INSERT INTO t VALUES (?)", (text,))
    connection.close()


def two_memories(path: str) -> None:
    connection = current_worker().connect("sqlite://", isolation_level=None)
    name = connection.execute("PRAGMA database_list").fetchone()[2]
    append(path, f"{name!r} {connection.isolation_level}")


def try_to_connect(path: str, dsn: str, times: int = 1) -> None:
    """Leave what connect() raised in the end, with detail and hint."""
    try:
        for _ in range(times):
            current_worker().connect(dsn)
    except Exception as exc:
        detail, hint = getattr(exc, "detail", None), getattr(exc, "hint", None)
        append(path, f"{type(exc).__name__}: {exc} | {detail} | {hint}")


def connect_in_thread(path: str) -> None:
    from threading import Thread

    thread = Thread(target=try_to_connect, args=(path, "sqlite://"))
    thread.start()
    thread.join()


def cancelled_postgres(path: str, dsn: str) -> None:
    """As cancelled_statement, with whatever psycopg the worker finds."""
    worker = current_worker()
    connection = worker.connect(dsn, autocommit=True)
    worker.ready()
    try:
        connection.execute("SELECT pg_sleep(3600)")
    except Exception as exc:
        append(path, f"{type(exc).__name__}")
    append(path, str(connection.execute("SELECT 6 * 7").fetchone()))
