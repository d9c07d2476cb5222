"""A worker's database connection, and SIGINT as the cancellation of its running statement.

The main thread is inside the database library while a statement runs, and no Python code runs
there until it is over: a Python signal handler would come too late.  So a watcher thread reads what
the C signal handler writes to the wake-up descriptor, and cancels from outside, which both
libraries allow.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import sqlite3
import threading
from collections.abc import Callable, Mapping
from typing import Any

from pgbgw.errors import ConfigurationError, PgbgwError, WrongProcessError

logger = logging.getLogger(__name__)

CANCEL_TIMEOUT = 10.0  # seconds: PostgreSQL takes a cancellation over a connection of its own

_DSN_HINT = "Use sqlite:///relative/path, sqlite:////absolute/path, sqlite:// or postgresql://..."


def connect(
    dsn: str,
    options: Mapping[str, Any],
    wakeup: socket.socket,
    sigterm_cancels: Callable[[], bool],
) -> Any:
    """Connect to what dsn names; from then on SIGINT cancels the connection's running statement.

    So does SIGTERM if sigterm_cancels(): a worker that it is to end must get out of the library.
    options go to the library's own connect().  Every signal but SIGINT still ends up as a byte in
    wakeup, the non-blocking socket that was the wake-up descriptor so far.  Main thread only, since
    signal handlers can be set there alone.  Raises ConfigurationError for a dsn that names no
    database, PgbgwError if the library is not installed, and what the library raises.
    """
    if threading.current_thread() is not threading.main_thread():
        raise WrongProcessError("a worker connects in its main thread")
    scheme, separator, rest = dsn.partition("://")
    connection: Any
    cancel: Callable[[], object]
    if separator and scheme == "sqlite":
        connection = sqlite3.connect(_sqlite_path(rest), **options)
        cancel = connection.interrupt
    elif separator and scheme in ("postgresql", "postgres"):
        connection = _import_psycopg().connect(dsn, **options)
        cancel = _psycopg_cancel(connection)
    else:  # the rest may hold a password
        raise ConfigurationError(f"unknown kind of database: {scheme[:20]!r}", hint=_DSN_HINT)
    _watch_signals(cancel, wakeup, sigterm_cancels)
    return connection


def _sqlite_path(rest: str) -> str:
    """What follows "sqlite://": nothing is memory, else a slash and the path."""
    if rest in ("", "/"):
        return ":memory:"
    if not rest.startswith("/"):
        raise ConfigurationError(
            f"sqlite has no hosts: {rest.partition('/')[0]!r}",
            detail="the path of a database comes after three slashes",
            hint=_DSN_HINT,
        )
    return rest[1:]


def _import_psycopg() -> Any:
    try:
        import psycopg
    except ImportError as exc:  # it is there, but finds no libpq: the detail says so
        raise PgbgwError(
            "psycopg, which connects to PostgreSQL, cannot be imported",
            detail=str(exc),
            hint='Install it with the extra: pip install "pgbgw[postgres]".',
        ) from exc
    return psycopg


def _psycopg_cancel(connection: Any) -> Callable[[], object]:
    if not hasattr(connection, "cancel_safe"):  # before psycopg 3.2
        return connection.cancel  # type: ignore[no-any-return]
    return lambda: connection.cancel_safe(timeout=CANCEL_TIMEOUT)


# --- the watcher ------------------------------------------------------------------------------


def _watch_signals(
    cancel: Callable[[], object], wakeup: socket.socket, sigterm_cancels: Callable[[], bool]
) -> None:
    """Have a thread read the signals that come: SIGINT cancels, the others go on to wakeup."""
    arrivals, written = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    written.setblocking(False)
    # A thread has the mask of the one that starts it.  The watcher takes no signals: they belong to
    # the main thread, whose waits they interrupt and which may have them blocked.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        threading.Thread(
            target=_watch,
            args=(arrivals, written, cancel, wakeup, sigterm_cancels),
            name="pgbgw signals",
            daemon=True,  # a worker that ends does not wait for it
        ).start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _ignore)  # not SIG_IGN: only what has a handler is written


def _ignore(signum: int, frame: object) -> None:
    """The watcher has seen it."""


def _watch(
    arrivals: socket.socket,
    written: socket.socket,  # kept open as long as signals may come
    cancel: Callable[[], object],
    wakeup: socket.socket,
    sigterm_cancels: Callable[[], bool],
) -> None:
    while True:
        came = arrivals.recv(4096)
        # First what the main thread may be waiting for: to cancel may take time.
        if others := came.replace(bytes([signal.SIGINT]), b""):
            with contextlib.suppress(BlockingIOError):  # full: it will wake up anyway
                wakeup.send(others)
        if signal.SIGINT in came or (signal.SIGTERM in came and sigterm_cancels()):
            try:
                cancel()
            except sqlite3.ProgrammingError:
                pass  # the connection is closed
            except Exception as exc:
                logger.warning("could not cancel the running statement: %s", exc)
