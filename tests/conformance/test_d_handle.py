"""Handles: what they say of a worker, of its slot's next one, and of how it ended (D01 to D09)."""

from __future__ import annotations

import os
import pickle
import signal
import time
from pathlib import Path

import pytest

from pgbgw import EntryNotAllowedError, Flags, HandleStatus, PgbgwError
from support import observed_workers, poll_until, workers
from support.control import paused
from support.supervisors import lines, noticed, supervisor

NOT_YET, STARTED, STOPPED = (
    HandleStatus.NOT_YET_STARTED,
    HandleStatus.STARTED,
    HandleStatus.STOPPED,
)
# A startup worker that never ends: nothing that waits for recovery is launched.
NEVER_RUNNING = "support.workers:sleep_until_stopped"


def test_D01_a_handle_tells_the_three_states_and_a_pid_only_while_started(tmp_path: Path) -> None:
    go = tmp_path / "go"
    with supervisor() as client:
        with paused(client):
            handle = client.register(observed_workers.exit_when_told, str(go))
            assert (handle.status(), handle.pid) == (NOT_YET, None)
        assert handle.wait_for_ready(30) is STARTED
        assert handle.status() is STARTED
        pid = handle.pid
        assert pid == handle.info().pid
        os.kill(pid or 0, 0)
        go.touch()
        handle.wait_until_gone(30)
        assert (handle.status(), handle.pid) == (STOPPED, None)


def test_D01_a_restart_gap_is_stopped_without_a_pid_and_ends_with_another_pid(
    tmp_path: Path,
) -> None:
    trace = tmp_path / "trace"
    with supervisor() as client:
        handle = client.register(observed_workers.ready_in_second_run, str(trace), restart_time=0.3)
        assert handle.wait_for_startup(30) is STARTED
        first = handle.pid
        (tmp_path / "trace.go").touch()
        assert handle.wait_for_shutdown(30) is STOPPED
        assert (handle.status(), handle.pid) == (STOPPED, None)
        # As in PostgreSQL a wait for its start that begins in the gap ends at once.
        assert handle.wait_for_startup(30) is STOPPED
        poll_until(lambda: handle.ready)
        assert handle.status() is STARTED
        assert handle.pid not in (None, first)


def test_D02_a_handle_says_stopped_when_its_slot_is_another_workers() -> None:
    with supervisor(max_worker_processes=1) as client:
        old = client.register(workers.noop)
        old.wait_until_gone(30)
        new = client.register(workers.sleep_until_stopped)
        assert new.wait_for_ready(30) is STARTED
        assert (old.slot, new.slot) == (0, 0)
        assert old != new
        assert hash(old) != hash(new)
        assert (old.status(), old.pid, old.ready) == (STOPPED, None, False)
        # It never comes back, and its waits end at once, whatever the new one does.
        assert old.wait_for_startup(30) is STOPPED
        assert old.wait_for_ready(30) is STOPPED
        assert old.wait_for_shutdown(30) is STOPPED
        assert old.wait_until_gone(30).exitcode == 0


def test_D03_terminating_through_an_old_handle_leaves_the_new_worker_running() -> None:
    with supervisor(max_worker_processes=1) as client:
        old = client.register(workers.noop)
        old.wait_until_gone(30)
        new = client.register(workers.sleep_until_stopped)
        new.wait_for_ready(30)
        pid = new.pid
        old.terminate()
        old.terminate(grace=0)
        old.cancel()
        old.wake()
        # What the supervisor was asked to do after that is done: all of it was looked at.
        another = client.watch(new)
        with another:
            poll_until(another.changes)
        assert (new.status(), new.pid) == (STARTED, pid)
        new.terminate()
        assert new.wait_until_gone(30).exitcode == 1


def test_D04_a_terminate_that_meets_an_empty_slot_does_not_stick_to_it(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with supervisor(max_worker_processes=1) as client:
        old = client.register(workers.noop)
        old.wait_until_gone(30)
        old.terminate()
        new = client.register(workers.append_and_sleep, str(trace))
        old.terminate()
        assert new.wait_for_ready(30) is STARTED
        assert lines(trace) == ["x"]


def test_D05_started_promises_a_process_and_ready_that_it_said_so(tmp_path: Path) -> None:
    go = tmp_path / "go"
    with supervisor() as client:
        handle = client.register(observed_workers.ready_when_told, str(go))
        assert handle.wait_for_startup(30) is STARTED
        assert not handle.ready
        assert not handle.info().ready
        with pytest.raises(TimeoutError):
            handle.wait_for_ready(0.05)
        go.touch()
        assert handle.wait_for_ready(30) is STARTED
        assert handle.ready
        assert handle.info().ready


def test_D06_a_trace_of_the_worker_may_come_before_started_does(tmp_path: Path) -> None:
    with supervisor(preload=["support.workers"]) as client:
        for i in range(20):
            trace = tmp_path / str(i)
            handle = client.register(workers.append_and_sleep, str(trace))
            while not lines(trace):
                assert handle.status() in (NOT_YET, STARTED)
            # Whichever of the two was first: no wait is for ever, and ready implies started.
            assert handle.status() in (NOT_YET, STARTED)
            assert handle.wait_for_startup(30) is STARTED
            assert handle.wait_for_ready(30) is STARTED
            handle.terminate()
            handle.wait_until_gone(30)


def test_D07_the_type_of_a_running_worker_is_found_by_its_pid_and_nothing_else_is() -> None:
    with supervisor() as client:
        handle = client.register(workers.sleep_until_stopped, name="n", type="kind")
        handle.wait_for_ready(30)
        pid = handle.pid or 0
        assert client.worker_type(pid) == "kind"
        assert client.find(pid=pid) == handle
        for other in (0, -1, os.getpid(), client.supervisor_pid, 2**31 - 1, 2**32 + pid, -pid):
            assert client.worker_type(other) is None
            assert client.find(pid=other) is None
        handle.terminate()
        handle.wait_until_gone(30)
        assert client.worker_type(pid) is None
        assert client.find(pid=pid) is None


def test_D08_the_outcome_tells_the_exit_code_and_that_it_is_final() -> None:
    before = time.time()
    with supervisor() as client:
        handle = client.register(workers.exit_with, 7)
        assert handle.wait_until_gone(30) == handle.outcome
        outcome = handle.outcome
        assert outcome is not None
        assert (outcome.kind, outcome.exitcode, outcome.signal) == ("exited", 7, None)
        assert (outcome.final, outcome.restarts, outcome.error) == (True, 0, None)
        assert before <= outcome.at <= time.time()
        assert str(outcome) == "exited with code 7"
        assert outcome.status == 7


def test_D08_the_outcome_tells_the_signal() -> None:
    with supervisor() as client:
        handle = client.register(workers.kill_self, signal.SIGKILL)
        outcome = handle.wait_until_gone(30)
        assert (outcome.kind, outcome.exitcode, outcome.signal) == ("signaled", None, 9)
        assert str(outcome) == "killed by SIGKILL"
        assert outcome.status == 137


def test_D08_the_outcome_keeps_the_end_of_the_traceback() -> None:
    with supervisor() as client:
        handle = client.register(workers.fail, "what went wrong: ☃ " + "x" * 300)
        handle.wait_until_gone(30)
        outcome = handle.outcome
        assert outcome is not None
        assert (outcome.kind, outcome.exitcode) == ("exited", 1)
        assert outcome.error is not None
        assert outcome.error.rstrip().endswith("x" * 300)
        assert "ValueError: what went wrong: ☃" in outcome.error
        assert len(outcome.error.encode()) <= 512


def test_D08_the_outcome_of_a_worker_that_never_ran_is_cancelled(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with supervisor(startup=NEVER_RUNNING) as client:
        with paused(client):
            unnoticed = client.register(workers.append, str(trace))
            unnoticed.terminate()
        waiting = client.register(workers.append, str(trace))
        poll_until(lambda: (waiting.slot, waiting.generation) in noticed(client))
        waiting.terminate()
        for handle in (unnoticed, waiting):
            outcome = handle.wait_until_gone(30)
            assert (outcome.kind, outcome.exitcode, outcome.signal) == ("cancelled", None, None)
            assert (outcome.final, outcome.restarts) == (True, 0)
            assert str(outcome) == "cancelled before it started"
        assert lines(trace) == []


def test_D08_the_outcome_of_a_forbidden_entry_point_is_rejected() -> None:
    with supervisor(allow=["support.workers:*"]) as client:
        assert client.register(workers.noop).wait_until_gone(30).exitcode == 0
        with pytest.raises(EntryNotAllowedError):
            client.register(observed_workers.leave_record, "/nowhere")
        client._allow = None  # a client that does not look at the list
        handle = client.register(observed_workers.leave_record, "/nowhere")
        assert handle.wait_until_gone(30).kind == "rejected"
        outcome = handle.outcome
        assert outcome is not None
        assert outcome.final
        assert "observed_workers:leave_record" in (outcome.error or "")


def test_D08_an_outcome_in_a_restart_gap_is_not_final_and_the_next_run_knows_it(
    tmp_path: Path,
) -> None:
    trace = tmp_path / "trace"
    with supervisor() as client:
        handle = client.register(observed_workers.ready_in_second_run, str(trace), restart_time=0.3)
        handle.wait_for_startup(30)
        assert handle.outcome is None
        (tmp_path / "trace.go").touch()
        handle.wait_for_shutdown(30)
        outcome = handle.outcome
        assert outcome is not None
        assert (outcome.kind, outcome.exitcode, outcome.final) == ("exited", 1, False)
        poll_until(lambda: handle.ready)
        handle.terminate()
        last = handle.wait_until_gone(30)
        assert (last.kind, last.exitcode, last.final, last.restarts) == ("exited", 1, True, 1)


def test_D08_an_outcome_is_remembered_by_who_heard_of_it_when_the_slot_was_used_on() -> None:
    with supervisor(max_worker_processes=1, preload=["support.workers"]) as client:
        handles = [client.register(workers.exit_with, 100)]
        for code in range(101, 105):
            handles[-1].wait_until_gone(30)
            handles.append(client.register(workers.exit_with, code))
        handles[-1].wait_until_gone(30)
        outcomes = [handle.outcome for handle in handles]
        assert [o and o.exitcode for o in outcomes] == [100, 101, 102, 103, 104]
        # Of all that was there to be shown only two generations are.
        with pytest.raises(PgbgwError, match="nothing is known"):
            handles[0].info()
        assert handles[-1].info().outcome == outcomes[-1]


def test_D09_asking_needs_no_supervisor_that_answers() -> None:
    with supervisor() as client:
        running = client.register(workers.sleep_until_stopped, name="running", type="kind")
        running.wait_for_ready(30)
        gone = client.register(workers.exit_with, 3)
        gone.wait_until_gone(30)
        with paused(client):
            new = client.register(workers.noop)
            assert running.status() is STARTED
            assert gone.status() is STOPPED
            assert new.status() is NOT_YET
            assert gone.outcome is not None
            assert running.info().name == "running"
            assert client.worker_type(running.pid or 0) == "kind"
            assert client.find(name="running") == running
            names = [info.name for info in client.workers()]
            assert sorted(names) == ["running", "support.workers:noop"]  # noticed or not
            assert client.phase.name == "RUNNING"
            # Nor do the waits whose end is known, nor a terminate.
            assert running.wait_for_startup() is STARTED
            assert running.wait_for_ready() is STARTED
            assert gone.wait_for_shutdown() is STOPPED
            assert gone.wait_until_gone().exitcode == 3
            running.terminate()
            assert running.status() is STARTED
        assert running.wait_for_shutdown(30) is STOPPED
        assert new.wait_until_gone(30).exitcode == 0


def test_a_handle_is_a_value(tmp_path: Path) -> None:
    path = tmp_path / "handle"
    with supervisor() as client:
        handle = client.register(observed_workers.leave_handle, str(path), flags=Flags.SHMEM_ACCESS)
        handle.wait_for_ready(30)
        same = pickle.loads(pickle.dumps(handle))
        from_worker = pickle.loads(path.read_bytes())
        listed = client.handle(client.workers()[0])
        for other in (same, from_worker, listed):
            assert other == handle
            assert hash(other) == hash(handle)
            assert (other.epoch, other.slot, other.generation) == (
                client.epoch,
                handle.slot,
                handle.generation,
            )
            assert other.pid == handle.pid
            with pytest.raises(AttributeError):
                other.slot = 1  # type: ignore[misc]
        assert handle != (handle.epoch, handle.slot, handle.generation)
        from_worker.terminate()
        assert same.wait_until_gone(30) == handle.outcome
