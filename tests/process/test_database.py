"""A worker's database connection, and what signals do to its running statement."""

from __future__ import annotations

import os
import signal
import sqlite3
from pathlib import Path

import psutil
import pytest

from pgbgw import BackgroundWorker, Client, Flags, HandleStatus, WorkerHandle
from support import poll_until
from support.supervisors import lines, supervisor

DATABASE = Flags.SHMEM_ACCESS | Flags.DATABASE_CONNECTION
MODULE = "support.database_workers"


def launch(client: Client, function: str, *args: object, **fields: object) -> WorkerHandle:
    fields = {"flags": DATABASE, **fields}
    return client.register(
        BackgroundWorker(entry=f"{MODULE}:{function}", args=args, **fields)  # type: ignore[arg-type]
    )


def wait_for_statement(handle: WorkerHandle) -> None:
    """Wait until the worker is in its endless statement: nothing else in it takes long."""
    assert handle.wait_for_ready(30) is HandleStatus.STARTED
    process = psutil.Process(handle.pid)
    before = process.cpu_times().user
    poll_until(lambda: process.cpu_times().user >= before + 0.05)


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(tmp_path / "out")


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_cancel_ends_the_running_statement_and_the_worker_goes_on(
    start_method: str, out: str, tmp_path: Path
) -> None:
    with supervisor(start_method=start_method) as client:
        handle = launch(client, "cancelled_statement", out, f"sqlite:///{tmp_path}/db")
        wait_for_statement(handle)
        pid = handle.pid
        handle.cancel()
        poll_until(lambda: len(lines(out)) == 2)
        assert lines(out) == ["OperationalError: interrupted", "(42,)"]
        assert handle.pid == pid
        # An idle connection does not mind, and sleeps and statements can still be interrupted.
        handle.cancel()
        handle.terminate()
        outcome = handle.wait_until_gone(30)
    assert (outcome.kind, outcome.exitcode, outcome.restarts) == ("exited", 1, 0)


def test_terminate_ends_the_running_statement_too() -> None:
    with supervisor() as client:
        handle = launch(client, "endless_statement", "sqlite://")
        wait_for_statement(handle)
        handle.terminate()
        assert handle.wait_until_gone(30).exitcode == 1


def test_with_a_callback_for_terminate_only_cancel_ends_the_statement(out: str) -> None:
    with supervisor() as client:
        handle = launch(client, "endless_statement_and_callback", out, "sqlite://")
        wait_for_statement(handle)
        handle.terminate()
        handle.cancel()
        assert handle.wait_until_gone(30).exitcode == 0
    # Python called back as soon as it could: when the library had returned.
    assert sorted(lines(out)) == ["asked to stop", "interrupted"]


def test_cancel_between_two_statements_changes_nothing(out: str) -> None:
    with supervisor() as client:
        handle = launch(client, "cancelled_while_idle", out)
        assert handle.wait_for_ready(30) is HandleStatus.STARTED
        handle.cancel()
        assert lines(out) == []
        handle.wake()
        poll_until(lambda: len(lines(out)) == 2)
    assert lines(out) == ["woken", "(42,)"]


def test_cancel_after_the_connection_was_closed_changes_nothing(
    out: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with supervisor() as client:
        handle = launch(client, "closed", out)
        assert handle.wait_for_ready(30) is HandleStatus.STARTED
        handle.cancel()
        handle.wake()
        assert handle.wait_until_gone(30).exitcode == 0
    assert lines(out) == ["woken"]
    assert "could not cancel" not in capfd.readouterr().err


def test_other_signals_end_the_waits_of_a_connected_worker(out: str) -> None:
    with supervisor() as client:
        handle = launch(client, "wakes_up", out)
        assert handle.wait_for_ready(30) is HandleStatus.STARTED
        assert handle.pid is not None
        os.kill(handle.pid, signal.SIGHUP)
        poll_until(lambda: len(lines(out)) == 2)
        handle.terminate()
        assert handle.wait_until_gone(30).exitcode == 0
    assert lines(out) == ["reload", "waited", "terminate", "slept False"]


def test_a_connected_worker_can_still_hold_signals_back(out: str) -> None:
    with supervisor() as client:
        handle = launch(client, "holds_signals_back", out)
        assert handle.wait_for_ready(30) is HandleStatus.STARTED
        handle.terminate()
        assert handle.wait_until_gone(30).exitcode == 1
    assert lines(out) == ["held back"]


def test_sigquit_ends_a_worker_in_a_statement_at_once() -> None:
    with supervisor() as client:
        handle = launch(client, "endless_statement", "sqlite://")
        wait_for_statement(handle)
        assert handle.pid is not None
        os.kill(handle.pid, signal.SIGQUIT)
        assert handle.wait_until_gone(30).exitcode == 2


# --- what a dsn names -----------------------------------------------------------------------------


def test_three_slashes_make_a_path_relative_to_the_directory_of_the_supervisor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with supervisor() as client:
        monkeypatch.chdir("/")
        for dsn in ("sqlite:///relative.db", f"sqlite:///{tmp_path}/absolute.db"):
            outcome = launch(client, "write_row", dsn, dsn).wait_until_gone(30)
            assert outcome.exitcode == 0, outcome.error
    for name in ("relative.db", "absolute.db"):
        connection = sqlite3.connect(tmp_path / name)
        rows = connection.execute("SELECT x FROM t").fetchall()
        connection.close()
        assert len(rows) == 1


def test_no_path_means_memory_and_options_reach_the_library(out: str) -> None:
    with supervisor() as client:
        assert launch(client, "two_memories", out).wait_until_gone(30).exitcode == 0
    assert lines(out) == ["'' None"]


@pytest.mark.parametrize(
    ("dsn", "error"),
    [
        ("mysql://user:secret@host/db", "ConfigurationError: unknown kind of database: 'mysql'"),
        ("some.db", "ConfigurationError: unknown kind of database: 'some.db'"),
        ("sqlite://host/db", "ConfigurationError: sqlite has no hosts: 'host'"),
        ("sqlite:////no/such/directory/db", "OperationalError: unable to open database file"),
    ],
)
def test_a_dsn_that_names_no_database_is_a_clear_error(dsn: str, error: str, out: str) -> None:
    with supervisor() as client:
        assert launch(client, "try_to_connect", out, dsn).wait_until_gone(30).exitcode == 0
    (line,) = lines(out)
    assert line.startswith(error)
    assert "secret" not in line


def test_a_worker_connects_once(out: str) -> None:
    with supervisor() as client:
        launch(client, "try_to_connect", out, "sqlite://", 2).wait_until_gone(30)
    (line,) = lines(out)
    assert line.startswith("WrongProcessError: this worker is already connected | None | ")


def test_a_worker_connects_in_its_main_thread(out: str) -> None:
    with supervisor() as client:
        launch(client, "connect_in_thread", out).wait_until_gone(30)
    (line,) = lines(out)
    assert line.startswith("WrongProcessError: a worker connects in its main thread")


def test_a_worker_without_the_flag_cannot_connect(out: str) -> None:
    with supervisor() as client:
        handle = launch(client, "try_to_connect", out, "sqlite://", flags=Flags.SHMEM_ACCESS)
        handle.wait_until_gone(30)
    (line,) = lines(out)
    assert line.startswith("WrongProcessError: worker ")
    assert line.endswith("Register it with Flags.DATABASE_CONNECTION.")


# --- PostgreSQL -----------------------------------------------------------------------------------


def test_without_psycopg_the_error_names_the_extra(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whether it is installed here or not: the first on the path cannot be imported.
    (tmp_path / "psycopg.py").write_text('raise ImportError("no pq wrapper available")\n')
    monkeypatch.syspath_prepend(tmp_path)
    with supervisor() as client:
        launch(client, "try_to_connect", out, "postgresql://host/db").wait_until_gone(30)
    assert lines(out) == [
        "PgbgwError: psycopg, which connects to PostgreSQL, cannot be imported"
        " | no pq wrapper available"
        ' | Install it with the extra: pip install "pgbgw[postgres]".'
    ]


PSYCOPG = """
import threading

class QueryCanceled(Exception):
    pass

class connect:
    def __init__(self, dsn, autocommit):
        assert dsn.startswith("postgresql://") and autocommit
        self.cancelled = threading.Event()

    def execute(self, statement):
        if "sleep" in statement:
            self.cancelled.wait()
            raise QueryCanceled
        return self

    def fetchone(self):
        return (42,)

    def {cancel}:
        self.cancelled.set()
"""


@pytest.mark.parametrize("cancel", ["cancel_safe(self, *, timeout)", "cancel(self)"])
def test_cancel_asks_psycopg_to_cancel(
    cancel: str, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A stand-in with what we use of psycopg 3, as it is since 3.2 and as it was before.
    (tmp_path / "psycopg.py").write_text(PSYCOPG.format(cancel=cancel))
    monkeypatch.syspath_prepend(tmp_path)
    with supervisor() as client:
        handle = launch(client, "cancelled_postgres", out, "postgresql://host/db")
        assert handle.wait_for_ready(30) is HandleStatus.STARTED
        handle.cancel()
        assert handle.wait_until_gone(30).exitcode == 0
    assert lines(out) == ["QueryCanceled", "(42,)"]


@pytest.mark.skipif(
    "PGBGW_TEST_POSTGRES" not in os.environ, reason="PGBGW_TEST_POSTGRES names no server"
)
def test_cancel_ends_a_statement_in_a_real_server(out: str) -> None:
    dsn = os.environ["PGBGW_TEST_POSTGRES"]
    with supervisor() as client:
        handle = launch(client, "cancelled_postgres", out, dsn)
        assert handle.wait_for_ready(30) is HandleStatus.STARTED
        # The statement may not run yet; a cancellation that comes too early is without effect.
        poll_until(lambda: handle.cancel() or lines(out))  # type: ignore[func-returns-value]
        assert handle.wait_until_gone(30).exitcode == 0
    assert lines(out) == ["QueryCanceled", "(42,)"]
