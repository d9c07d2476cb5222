"""Terminating: once, for good, whatever state the worker is in (F01 to F09).

F10, terminating all that hold a resource, is a feature of later.
"""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from pgbgw import Client, Flags, HandleStatus, WorkerHandle
from support import observed_workers, poll_until, workers
from support.control import Log, Startup, paused
from support.processes import is_alive, run_script
from support.supervisors import lines, supervisor

STARTED, STOPPED = HandleStatus.STARTED, HandleStatus.STOPPED


def in_gap(client: Client) -> WorkerHandle:
    """A worker that has failed and is to be restarted in an hour."""
    handle = client.register(workers.exit_with, 1, restart_time=3600)
    poll_until(lambda: handle.outcome)
    assert handle.status() is STOPPED
    assert handle.outcome is not None
    assert not handle.outcome.final
    return handle


def stays_started(handle: WorkerHandle) -> None:
    """Nothing becomes of it within a fifth of a second."""
    pid = handle.pid
    with pytest.raises(TimeoutError):
        handle.wait_for_shutdown(0.2)
    assert (handle.status(), handle.pid) == (STARTED, pid)


@pytest.mark.parametrize("code", [0, 1])
def test_F01_a_running_worker_is_asked_to_stop_and_never_started_again(
    code: int, tmp_path: Path
) -> None:
    with supervisor(max_worker_processes=1) as client:
        handle = client.register(observed_workers.exit_on_stop, code, restart_time=0)
        handle.wait_for_ready(30)
        handle.terminate()
        outcome = handle.wait_until_gone(30)
        assert (outcome.kind, outcome.exitcode, outcome.final) == ("exited", code, True)
        assert outcome.restarts == 0
        # Its slot is free, and launching goes on without it.
        assert client.register(workers.noop).wait_until_gone(30).exitcode == 0
        assert client.workers() == []


def test_F01_the_default_is_to_exit_with_1_at_the_next_safe_point(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with supervisor() as client:
        handle = client.register(workers.busy_until_killed, name="busy", restart_time=0)
        handle.wait_for_ready(30)
        handle.terminate()
        outcome = handle.wait_until_gone(30)
        assert (outcome.kind, outcome.exitcode, outcome.error) == ("exited", 1, None)
        Log(capfd).wait_for('"busy"', "terminated")


def test_F01_a_stop_that_comes_where_no_exception_can_get_out_is_not_lost(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with supervisor() as client:
        handle = client.register(observed_workers.stopped_in_finalizer, str(trace))
        handle.wait_for_ready(30)
        handle.terminate()
        outcome = handle.wait_until_gone(30)
        assert (outcome.kind, outcome.exitcode, outcome.error) == ("exited", 1, None)
        assert lines(trace) == ["x", "x"]


def test_F01_a_worker_is_terminated_by_whoever_has_its_handle() -> None:
    code = """
        from pgbgw import attach
        with attach(handle.address):
            handle.terminate()
        test.send(True)
    """
    with supervisor() as client:
        handle = client.register(workers.sleep_until_stopped, restart_time=0)
        handle.wait_for_ready(30)
        assert run_script(code, handle=handle)
        assert handle.wait_until_gone(30).exitcode == 1


def test_F02_in_its_restart_gap_a_worker_is_unregistered_at_once() -> None:
    with supervisor(max_worker_processes=1) as client, ThreadPoolExecutor(1) as pool:
        handle = in_gap(client)
        waiter = pool.submit(handle.wait_until_gone, 30)
        poll_until(lambda: client._channels.waiting)
        handle.terminate()
        outcome = waiter.result(30)
        # Nothing new happened to it: it is told how it ended the last time, now for good.
        assert (outcome.kind, outcome.exitcode, outcome.final) == ("exited", 1, True)
        assert outcome.restarts == 0
        assert client.register(workers.noop).wait_until_gone(30).exitcode == 0


def test_F02_a_grace_period_changes_nothing_in_the_gap() -> None:
    with supervisor() as client:
        handle = in_gap(client)
        handle.terminate(grace=3600)
        assert handle.wait_until_gone(30).exitcode == 1


@pytest.mark.parametrize("grace", [None, 5.0])
def test_F03_a_registration_that_was_not_noticed_never_runs(
    grace: float | None, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    with (
        supervisor(max_worker_processes=2, max_parallel_workers=1) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        with paused(client):
            handle = client.register(workers.append, str(trace), flags=Flags.CLASS_PARALLEL)
            waiter = pool.submit(handle.wait_for_shutdown, 30)
            poll_until(lambda: client._channels.waiting)
            handle.terminate(grace=grace)
            assert handle.status() is HandleStatus.NOT_YET_STARTED
        assert waiter.result(30) is STOPPED
        assert handle.wait_for_startup() is STOPPED
        assert handle.wait_until_gone().kind == "cancelled"
        # Its slot, and its place in the class, are free again.
        for _ in range(2):
            again = client.register(workers.noop, flags=Flags.CLASS_PARALLEL)
            assert again.wait_until_gone(30).exitcode == 0
        both = [client.register(workers.sleep_until_stopped) for _ in range(2)]
        assert client.wait(both, 30, "ALL_STARTED")[1] == set()
        assert lines(trace) == []


def test_F04_a_worker_whose_phase_is_not_reached_is_unregistered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "trace"
    startup = Startup(tmp_path / "startup", monkeypatch)
    with supervisor(startup=startup.entry, max_worker_processes=1) as client:
        handle = client.register(workers.append, str(trace))
        poll_until(client.workers)  # it is known, and waits for recovery
        assert handle.status() is HandleStatus.NOT_YET_STARTED
        handle.terminate()
        assert handle.wait_for_shutdown(30) is STOPPED
        assert handle.wait_until_gone().kind == "cancelled"
        other = client.register(workers.noop)
        startup.finish()
        assert other.wait_until_gone(30).exitcode == 0
        assert lines(trace) == []


def test_F05_three_terminates_are_one_stop_signal(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with supervisor() as client:
        handle = client.register(observed_workers.count_stop_signals, str(trace))
        handle.wait_for_ready(30)
        handle.terminate()
        poll_until(lambda: lines(trace) == ["x"])
        # Each of these is looked at on its own, by the same handle and by others on the same.
        handle.terminate()
        client.register(workers.noop).wait_until_gone(30)
        pickle.loads(pickle.dumps(handle)).terminate(grace=3600)
        client.register(workers.noop).wait_until_gone(30)
        assert handle.status() is STARTED
        handle.cancel()  # this worker ends by it, after all that came before
        assert handle.wait_until_gone(30).exitcode == 0
        assert lines(trace) == ["x"]


def test_F05_a_terminate_and_a_shutdown_are_one_stop_signal(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with supervisor() as client:
        handle = client.register(observed_workers.count_stop_signals, str(trace))
        handle.wait_for_ready(30)
        handle.terminate()
        poll_until(lambda: lines(trace) == ["x"])
        with pytest.raises(TimeoutError):
            client.stop("fast", timeout=0)
        poll_until(lambda: client.phase.name == "STOPPING")
        handle.cancel()
        client.stop("fast", timeout=30)
        assert lines(trace) == ["x"]


def test_F06_a_worker_that_ignores_the_signal_stays_until_somebody_gives_it_a_grace_period(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace"
    with supervisor() as client:
        handle = client.register(
            observed_workers.count_stop_signals, str(trace), name="deaf", restart_time=0
        )
        handle.wait_for_ready(30)
        handle.terminate()
        poll_until(lambda: lines(trace) == ["x"])
        stays_started(handle)
        handle.terminate(grace=3600)
        handle.terminate(grace=0.05)  # the shorter one counts
        outcome = handle.wait_until_gone(30)
        assert (outcome.kind, outcome.signal, outcome.final) == ("signaled", signal.SIGKILL, True)
        assert lines(trace) == ["x"]
        Log(capfd).wait_for('"deaf"', "did not stop in time: sending SIGKILL")


def test_F06_a_later_and_longer_grace_period_does_not_save_it() -> None:
    with supervisor() as client:
        handle = client.register(workers.ignore_sigterm)
        handle.wait_for_ready(30)
        handle.terminate(grace=0.3)
        handle.terminate(grace=3600)
        assert handle.wait_until_gone(30).signal == signal.SIGKILL


def test_F06_a_grace_period_of_zero_kills_at_once() -> None:
    with supervisor() as client:
        handle = client.register(workers.ignore_sigterm)
        handle.wait_for_ready(30)
        handle.terminate(grace=0)
        assert handle.wait_until_gone(30).signal == signal.SIGKILL


def test_F06_a_worker_with_a_stop_timeout_is_killed_without_being_told_to() -> None:
    with supervisor() as client:
        handle = client.register(workers.ignore_sigterm, stop_timeout=0.1)
        patient = client.register(workers.ignore_sigterm, stop_timeout=0.1)
        client.wait([handle, patient], 30, "ALL_STARTED")
        for h in (handle, patient):
            h.wait_for_ready(30)
        patient.terminate(grace=3600)  # what the caller says counts
        handle.terminate()
        assert handle.wait_until_gone(30).signal == signal.SIGKILL
        stays_started(patient)
        patient.terminate(grace=0)
        assert patient.wait_until_gone(30).signal == signal.SIGKILL


def test_F06_a_fast_shutdown_keeps_to_the_stop_timeout() -> None:
    with supervisor() as client:
        handle = client.register(workers.ignore_sigterm, stop_timeout=0.1)
        handle.wait_for_ready(30)
        client.stop("fast", timeout=30)
        outcome = handle.outcome
        assert outcome is not None
        assert outcome.signal == signal.SIGKILL


@pytest.mark.parametrize("grace", [-1, float("nan"), float("inf")])
def test_a_grace_period_is_a_number_of_seconds(grace: float) -> None:
    with supervisor() as client:
        handle = client.register(workers.sleep_until_stopped)
        handle.wait_for_ready(30)
        with pytest.raises(ValueError, match="grace must be"):
            handle.terminate(grace=grace)
        stays_started(handle)


def test_F07_terminating_one_that_is_gone_does_nothing() -> None:
    with supervisor() as client:
        handle = client.register(workers.exit_with, 3)
        handle.wait_until_gone(30)
        for _ in range(3):
            handle.terminate()
            handle.terminate(grace=0)
        assert handle.status() is STOPPED
        assert handle.wait_until_gone().exitcode == 3
        assert client.register(workers.noop).wait_until_gone(30).exitcode == 0


def test_F08_a_terminated_member_that_crashes_resets_the_others_and_stays_away(
    tmp_path: Path,
) -> None:
    trace = tmp_path / "trace"
    with supervisor(shared_memory=4096) as client:
        other = client.register(
            observed_workers.needs_memory, str(trace), flags=Flags.SHMEM_ACCESS, restart_time=0
        )
        handle = client.register(
            observed_workers.exit_on_stop, -9, flags=Flags.SHMEM_ACCESS, restart_time=0
        )
        for h in (other, handle):
            h.wait_for_ready(30)
        first = other.pid
        handle.terminate()
        outcome = handle.wait_until_gone(30)
        assert (outcome.kind, outcome.signal, outcome.final) == ("signaled", 9, True)
        assert outcome.restarts == 0
        poll_until(lambda: lines(trace) == ["x", "x"] and other.ready)
        assert other.pid != first
        assert [info.name for info in client.workers()] == [other.info().name]


def test_F08_without_shared_memory_nobody_else_is_touched(tmp_path: Path) -> None:
    with supervisor(shared_memory=4096) as client:
        other = client.register(
            workers.sleep_until_stopped, flags=Flags.SHMEM_ACCESS, restart_time=0
        )
        handle = client.register(observed_workers.exit_on_stop, -9, restart_time=0)
        for h in (other, handle):
            h.wait_for_ready(30)
        first = other.pid
        handle.terminate()
        assert handle.wait_until_gone(30).signal == 9
        assert client.register(workers.noop).wait_until_gone(30).exitcode == 0
        assert (other.status(), other.pid) == (STARTED, first)


@contextmanager
def killed_at_the_end(*pids: int) -> Iterator[None]:
    found = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    try:
        yield
    finally:
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def left_by(path: Path) -> object:
    poll_until(path.exists)
    return pickle.loads(path.read_bytes())


def test_F09_terminate_signals_the_worker_alone_and_what_it_forked_dies_with_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "pids"
    with supervisor() as client:
        handle = client.register(observed_workers.have_children, str(path))
        handle.wait_for_ready(30)
        program, fork = left_by(path)  # type: ignore[misc]
        with killed_at_the_end(program, fork):
            handle.terminate()
            assert handle.wait_until_gone(30).exitcode == 0
            # What it forked is bound to it; another program is not, as with PostgreSQL.
            poll_until(lambda: not is_alive(fork))
            assert is_alive(program)


def test_F09_a_grace_period_ends_with_the_whole_group(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with supervisor() as client:
        handle = client.register(observed_workers.have_child_and_ignore_stop, str(path))
        handle.wait_for_ready(30)
        program = left_by(path)
        assert isinstance(program, int)
        with killed_at_the_end(program):
            assert os.getpgid(program) == handle.pid
            handle.terminate(grace=0.05)
            assert handle.wait_until_gone(30).signal == signal.SIGKILL
            poll_until(lambda: not is_alive(program))


def test_F09_a_fast_shutdown_signals_the_whole_group(tmp_path: Path) -> None:
    path = tmp_path / "pids"
    with supervisor() as client:
        handle = client.register(observed_workers.have_children, str(path))
        handle.wait_for_ready(30)
        program, fork = left_by(path)  # type: ignore[misc]
        with killed_at_the_end(program, fork):
            client.stop("fast", timeout=30)
            poll_until(lambda: not is_alive(program))
            poll_until(lambda: not is_alive(fork))
