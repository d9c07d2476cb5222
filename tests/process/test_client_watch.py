"""Watch: a set of workers as one descriptor."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
from pathlib import Path

import pytest

from pgbgw import (
    AttachError,
    HandleStatus,
    Supervisor,
    SupervisorDiedError,
    Watch,
    WorkerHandle,
)
from support import observed_workers, poll_until, workers
from support.control import paused
from support.processes import kill_supervisor
from support.supervisors import supervisor

STARTED, STOPPED = HandleStatus.STARTED, HandleStatus.STOPPED


def readable(watch: Watch, timeout: float = 30.0) -> bool:
    return bool(select.select([watch], [], [], timeout)[0])


def next_changes(watch: Watch) -> list[WorkerHandle]:
    """What changes() says when it says something; the descriptor is what we wait for."""
    while True:
        assert readable(watch)
        if changed := watch.changes():
            return changed


def quiet(watch: Watch) -> bool:
    """Nothing to tell, for a twentieth of a second; being readable for no reason is no fault."""
    while readable(watch, 0.05):
        if watch.changes():
            return False
    return watch.changes() == []


def test_each_change_is_told_once_and_the_end_last(tmp_path: Path) -> None:
    go = tmp_path / "go"
    with supervisor() as client, client.watch() as watch:
        with paused(client):
            handle = client.register(observed_workers.ready_when_told, str(go))
            watch.add(handle)
            assert quiet(watch)
        with watch:
            assert next_changes(watch) == [handle]
            assert handle.status() is STARTED
            assert quiet(watch)
            go.touch()
            assert next_changes(watch) == [handle]
            assert handle.ready
            assert quiet(watch)
            handle.terminate()
            assert next_changes(watch) == [handle]
            assert handle.status() is STOPPED
            assert quiet(watch)
            # It is not watched any longer, and its slot free for others.
            other = client.register(workers.noop)
            assert other.wait_until_gone(30).exitcode == 0
            assert quiet(watch)


def test_who_is_added_late_is_told_once() -> None:
    with supervisor(max_worker_processes=2) as client:
        gone = client.register(workers.noop)
        gone.wait_until_gone(30)
        running = client.register(workers.sleep_until_stopped)
        running.wait_for_ready(30)
        with client.watch() as watch:
            assert quiet(watch)
            watch.add(gone, running)
            changed: list[WorkerHandle] = []
            poll_until(lambda: changed.extend(watch.changes()) or len(changed) >= 2)
            assert set(changed) == {gone, running}
            assert quiet(watch)
            # One whose slot others have used meanwhile, too.
            for _ in range(5):
                client.register(workers.noop).wait_until_gone(30)
            watch.add(gone)
            assert next_changes(watch) == [gone]
            assert quiet(watch)


def test_what_was_removed_is_told_no_longer() -> None:
    with supervisor() as client:
        handles = [client.register(workers.sleep_until_stopped) for _ in range(2)]
        for handle in handles:
            handle.wait_for_ready(30)
        first, second = handles
        with client.watch(first, second) as watch:
            changed: set[WorkerHandle] = set()
            poll_until(lambda: changed.update(watch.changes()) or changed == set(handles))
            watch.remove(first)
            watch.remove(first)
            first.terminate()
            first.wait_until_gone(30)
            second.terminate()
            assert next_changes(watch) == [second]
            assert quiet(watch)
            watch.remove(second)
            watch.add(first)
            assert next_changes(watch) == [first]


def test_a_removal_is_heeded_though_the_news_has_come() -> None:
    with supervisor() as client:
        handle = client.register(workers.noop)
        with client.watch(handle) as watch:
            handle.wait_until_gone(30)
            assert readable(watch)
            watch.remove(handle)
            assert quiet(watch)


def test_restarts_are_told_as_they_come(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with supervisor() as client:
        handle = client.register(observed_workers.ready_in_second_run, str(trace), restart_time=0.3)
        with client.watch(handle) as watch:
            assert next_changes(watch) == [handle]
            first = handle.pid
            (tmp_path / "trace.go").touch()
            assert next_changes(watch) == [handle]
            assert handle.status() is STOPPED
            assert next_changes(watch) == [handle]
            assert handle.status() is STARTED
            assert handle.pid != first
            handle.terminate()
            poll_until(lambda: watch.changes() and handle.status() is STOPPED)


def test_it_waits_for_those_of_others_too() -> None:
    with supervisor() as client:
        handle = client.register(workers.sleep_until_stopped, notify=False)
        found = client.find(name=handle.info().name) if client.workers() else handle
        assert found is not None
        with client.watch(found) as one, client.watch(handle) as two:
            for watch in (one, two):
                assert next_changes(watch) == [handle]
            handle.wait_for_ready(30)
            handle.terminate()
            handle.wait_until_gone(30)
            for watch in (one, two):
                poll_until(lambda: watch.changes() and handle.status() is STOPPED)  # noqa: B023
                assert quiet(watch)


@pytest.mark.leaves_sockets
def test_the_supervisors_death_makes_it_readable_and_is_raised_again_and_again() -> None:
    with supervisor() as client:
        handle = client.register(workers.sleep_until_stopped)
        handle.wait_for_ready(30)
        with client.watch(handle) as watch, client.watch() as empty:
            assert next_changes(watch) == [handle]
            assert quiet(watch)
            kill_supervisor(client)
            for each in (watch, empty):
                assert readable(each)
                for _ in range(2):
                    with pytest.raises(SupervisorDiedError):
                        each.changes()
                assert readable(each, 0)
            assert handle.status() is HandleStatus.SUPERVISOR_DIED


@pytest.mark.leaves_sockets
def test_a_supervisor_that_hangs_up_before_it_is_dead_keeps_no_event_loop_busy() -> None:
    with supervisor() as client:
        handle = client.register(workers.sleep_until_stopped)
        handle.wait_for_ready(30)
        with client.watch(handle) as watch:
            assert next_changes(watch) == [handle]
            watch._sock.shutdown(socket.SHUT_RDWR)
            assert readable(watch)
            assert watch.changes() == []
            assert not readable(watch, 0)
            kill_supervisor(client)
            assert readable(watch)
            with pytest.raises(SupervisorDiedError):
                watch.changes()


def test_what_came_before_the_supervisors_end_is_told_first() -> None:
    with supervisor() as client:
        handle = client.register(workers.sleep_until_stopped)
        handle.wait_for_ready(30)
        with client.watch(handle) as watch:
            client.stop("fast", timeout=30)
            assert watch.changes() == [handle]
            assert handle.status() is STOPPED
            assert readable(watch)
            with pytest.raises(SupervisorDiedError):
                watch.changes()


def test_an_event_loop_can_wait_for_it() -> None:
    async def wait_for(client_handle: WorkerHandle, watch: Watch) -> list[HandleStatus]:
        loop = asyncio.get_running_loop()
        seen = []
        done = asyncio.Event()

        def look() -> None:
            for handle in watch.changes():
                seen.append(handle.status())
                if handle.status() is STOPPED:
                    done.set()

        loop.add_reader(watch.fileno(), look)
        try:
            client_handle.terminate()
            await asyncio.wait_for(done.wait(), 30)
        finally:
            loop.remove_reader(watch.fileno())
        return seen

    with supervisor() as client:
        handle = client.register(workers.sleep_until_stopped)
        handle.wait_for_ready(30)
        with client.watch(handle) as watch:
            assert asyncio.run(wait_for(handle, watch))[-1] is STOPPED


def test_closing_is_final_and_may_be_repeated() -> None:
    with supervisor() as client:
        handle = client.register(workers.sleep_until_stopped)
        watch = client.watch(handle)
        watch.close()
        watch.close()
        with pytest.raises(ValueError, match="closed"):
            watch.fileno()
        # The workers are not affected, nor the client.
        assert handle.wait_for_ready(30) is STARTED


def test_it_ends_with_its_client() -> None:
    client = Supervisor().start()
    process = client._process
    assert process is not None
    with client.watch(client.register(workers.sleep_until_stopped)) as watch:
        client.close()
        assert readable(watch)  # whoever waits for it is told
        with pytest.raises(AttachError, match="closed"):
            watch.changes()
    process.send_signal(signal.SIGINT)
    process.wait(30)


def test_a_watch_that_could_not_be_made_leaves_nothing_open() -> None:
    with supervisor() as one, supervisor() as two:
        handle = two.register(workers.noop)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with pytest.raises(ValueError, match="another supervisor"):
                one.watch(handle)
        assert len(os.listdir("/proc/self/fd")) == before
        with one.watch() as watch, pytest.raises(ValueError, match="another supervisor"):
            watch.add(handle)


def test_a_restart_that_nobody_saw_is_seen_by_its_pid() -> None:
    with supervisor() as client:
        handle = client.register(workers.sleep_until_stopped, restart_time=0)
        handle.wait_for_ready(30)
        with client.watch(handle) as watch:
            assert next_changes(watch) == [handle]
            first = handle.pid
            os.kill(first or 0, signal.SIGKILL)
            # Stopped and started again before anybody looks: that is one change.
            poll_until(lambda: handle.pid not in (None, first) and handle.ready)
            assert watch.changes() == [handle]
            assert quiet(watch)
