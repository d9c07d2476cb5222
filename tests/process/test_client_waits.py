"""Waiting for several workers, from several threads, and with more news than anybody reads."""

from __future__ import annotations

import os
import select
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pgbgw import (
    AttachError,
    BackgroundWorker,
    Client,
    HandleStatus,
    StartTime,
    Supervisor,
    WaitTimeoutError,
    WorkerHandle,
)
from pgbgw._channels import POOL, REMEMBERED
from support import observed_workers, poll_until, workers
from support.control import paused
from support.supervisors import supervisor

STARTED, STOPPED, DIED = (
    HandleStatus.STARTED,
    HandleStatus.STOPPED,
    HandleStatus.SUPERVISOR_DIED,
)
# A startup worker that never ends: nothing that waits for recovery is launched, so that workers
# come and go at the speed of the slots.
NEVER_RUNNING = "support.workers:sleep_until_stopped"
NOOP = BackgroundWorker(entry=workers.noop)


# --- several workers ----------------------------------------------------------------------------


def test_wait_for_any_and_for_all_of_each_condition() -> None:
    with supervisor() as client:
        with paused(client):
            running = client.register(workers.sleep_until_stopped)
            other = client.register(workers.sleep_until_stopped)
            both = {running, other}
            for condition in ("STARTED", "STOPPED", "GONE"):
                for how in ("ALL", "ANY"):
                    assert client.wait(both, 0, f"{how}_{condition}") == (set(), both)
        assert client.wait(both, 30, "ALL_STARTED") == (both, set())
        assert client.wait(both, 0, "ANY_STARTED")[0]
        running.wait_for_ready(30)
        running.terminate()
        for what in ("ANY_STOPPED", "ANY_GONE"):
            assert client.wait(both, 30, what) == ({running}, {other})
        # What has ended counts as started, as with wait_for_startup().
        assert client.wait(both, 0, "ALL_STARTED") == (both, set())
        for what in ("ALL_STOPPED", "ALL_GONE"):
            assert client.wait(both, 0, what) == ({running}, {other})
        other.terminate()
        assert client.wait(both, 30, "ALL_GONE") == (both, set())
        assert client.wait(both, 30) == (both, set())


def test_a_restart_gap_counts_as_stopped_and_not_as_gone() -> None:
    with supervisor() as client:
        gap = client.register(workers.exit_with, 1, restart_time=3600)
        end = client.register(workers.exit_with, 1)
        assert client.wait([gap, end], 30, "ALL_STOPPED") == ({gap, end}, set())
        assert client.wait([gap, end], 30, "ANY_GONE") == ({end}, {gap})
        gap.terminate()
        assert client.wait([gap], 30, "ALL_GONE") == ({gap}, set())


def test_waiting_for_nobody_is_over_at_once() -> None:
    with supervisor() as client:
        assert client.wait([]) == (set(), set())
        assert client.wait(iter(()), None, "ANY_GONE") == (set(), set())


def test_the_same_worker_twice_is_one() -> None:
    with supervisor() as client:
        handle = client.register(workers.noop)
        again = WorkerHandle(handle.epoch, handle.slot, handle.generation, handle.address)
        assert client.wait([handle, again, handle], 30, "ALL_GONE") == ({handle}, set())


@pytest.mark.parametrize("what", ["", "ALL", "ALL_", "SOME_STOPPED", "all_stopped", "ANY_READY"])
def test_an_unknown_condition_is_an_error(what: str) -> None:
    with supervisor() as client, pytest.raises(ValueError, match="return_when"):
        client.wait([], None, what)


def test_handles_of_two_supervisors_cannot_be_waited_for_together() -> None:
    with supervisor() as one, supervisor() as two:
        handles = [one.register(workers.noop), two.register(workers.noop)]
        with pytest.raises(ValueError, match="another supervisor"):
            one.wait(handles)
        with pytest.raises(ValueError, match="another supervisor"):
            one.watch(*handles)
        for handle in handles:
            assert handle.wait_until_gone(30).exitcode == 0


# --- ready --------------------------------------------------------------------------------------


def test_waiting_for_ready_ends_when_the_worker_does() -> None:
    with supervisor() as client:
        handle = client.register(workers.noop)
        assert handle.wait_for_ready(30) is STOPPED
        assert not handle.ready


def test_waiting_for_ready_times_out_and_can_be_done_again(tmp_path: Path) -> None:
    go = tmp_path / "go"
    with supervisor() as client:
        handle = client.register(observed_workers.ready_when_told, str(go))
        for _ in range(2):
            with pytest.raises(WaitTimeoutError, match="get ready"):
                handle.wait_for_ready(0.05)
        go.touch()
        assert handle.wait_for_ready(30) is STARTED
        assert handle.wait_for_ready(0) is STARTED


def test_ready_is_said_anew_in_every_run(tmp_path: Path) -> None:
    go = tmp_path / "go"
    go.touch()
    with supervisor() as client:
        handle = client.register(observed_workers.ready_when_told, str(go), restart_time=0)
        assert handle.wait_for_ready(30) is STARTED
        first = handle.pid or 0
        go.unlink()
        os.kill(first, signal.SIGKILL)
        poll_until(lambda: handle.pid not in (None, first))
        assert not handle.ready
        with pytest.raises(WaitTimeoutError):
            handle.wait_for_ready(0.05)
        go.touch()
        assert handle.wait_for_ready(30) is STARTED


# --- several threads ----------------------------------------------------------------------------


def test_more_threads_wait_than_there_are_connections_for() -> None:
    threads = POOL + 16
    with supervisor() as client, ThreadPoolExecutor(threads) as pool:
        handle = client.register(workers.sleep_until_stopped)
        handle.wait_for_ready(30)
        before = len(os.listdir("/proc/self/fd"))
        waits = (handle.wait_for_shutdown, lambda t: client.wait([handle], t, "ALL_GONE"))
        results = [pool.submit(waits[i % 2], 30) for i in range(threads)]
        poll_until(
            lambda: client._channels.waiting == threads and len(client._channels.lent) == POOL - 1
        )
        assert len(os.listdir("/proc/self/fd")) <= before + POOL - 1
        assert not any(result.done() for result in results)
        handle.terminate()
        for i, result in enumerate(results):
            assert result.result(30) == (STOPPED if i % 2 == 0 else ({handle}, set()))
        # The connections are used again.
        other = client.register(workers.sleep_until_stopped)
        results = [pool.submit(other.wait_for_startup, 30) for i in range(threads)]
        for result in results:
            assert result.result(30) is STARTED
        assert len(os.listdir("/proc/self/fd")) <= before + POOL - 1


def test_timed_waits_for_many_end_though_the_supervisor_reads_nothing() -> None:
    with (
        supervisor(startup=NEVER_RUNNING, max_worker_processes=400) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        first = client.register(workers.sleep_until_stopped, start_time=StartTime.SUPERVISOR_START)
        results = [pool.submit(first.wait_for_shutdown, 30) for _ in range(2)]
        poll_until(
            lambda: client._channels.waiting == 2 and client._channels.lent
        )  # both have a connection now
        first.terminate()
        for result in results:
            result.result(30)
        with paused(client):
            # More to subscribe to, and to unsubscribe from, than a connection holds.
            handles = {client.register(NOOP) for _ in range(399)}
            results = [pool.submit(client.wait, handles, 0.1, "ALL_GONE") for _ in range(2)]
            for result in results:
                assert result.result(30) == (set(), handles)
        for handle in handles:
            handle.terminate()
        assert client.wait(handles, 60, "ALL_GONE") == (handles, set())


@pytest.mark.leaves_sockets
def test_threads_without_a_connection_notice_the_supervisors_death_too() -> None:
    threads = POOL + 4
    with supervisor() as client, ThreadPoolExecutor(threads) as pool:
        handle = client.register(workers.sleep_until_stopped)
        handle.wait_for_ready(30)
        results = [pool.submit(handle.wait_until_gone) for _ in range(threads - 1)]
        results.append(pool.submit(handle.wait_for_shutdown))
        poll_until(lambda: client._channels.waiting == threads)
        os.kill(client.supervisor_pid, signal.SIGKILL)
        for result in results[:-1]:
            assert result.exception(30) is not None
        assert results[-1].result(30) is DIED


def test_closing_the_client_ends_the_waits_of_other_threads() -> None:
    client = Supervisor().start()
    process = client._process
    assert process is not None
    with ThreadPoolExecutor(3) as pool:
        handle = client.register(workers.sleep_until_stopped)
        handle.wait_for_ready(30)
        results = [pool.submit(handle.wait_until_gone) for _ in range(3)]
        poll_until(lambda: client._channels.waiting == 3)
        client.close()
        for result in results:
            with pytest.raises(AttachError):
                result.result(30)
    process.send_signal(signal.SIGINT)
    process.wait(30)


def test_wide_programs_can_wait_too(tmp_path: Path) -> None:
    """Descriptors beyond those that select() takes."""
    with supervisor() as client:
        files = []
        try:
            while not files or files[-1] < 1100:
                files.append(os.dup(0))
            handle = client.register(workers.sleep_until_stopped)
            with ThreadPoolExecutor(2) as pool, client.watch(handle) as watch:
                assert watch.fileno() > 1024
                results = [pool.submit(handle.wait_for_shutdown, 30) for _ in range(2)]
                poll_until(lambda: client._channels.waiting == 2)
                poll_until(watch.changes)
                handle.terminate()
                for result in results:
                    assert result.result(30) is STOPPED
                poll_until(watch.changes)
        finally:
            for fd in files:
                os.close(fd)


# --- more than anybody reads --------------------------------------------------------------------


def come_and_go(client: Client, number: int) -> list[WorkerHandle]:
    """So many registrations that are cancelled at once; of what is told of them nothing is read."""
    handles: list[WorkerHandle] = []
    while len(handles) < number:
        handle = client.try_register(NOOP)
        if handle is not None:
            handle.terminate()
            handles.append(handle)
    return handles


def test_who_has_not_read_for_long_learns_that_all_are_gone() -> None:
    with supervisor(startup=NEVER_RUNNING, max_worker_processes=64) as client:
        handles = come_and_go(client, 3000)
        poll_until(lambda: client.workers() == [])
        # The socket is full, and what came later was dropped.
        assert client._channels.first.has_message()
        assert client.wait(handles, 30, "ALL_GONE") == (set(handles), set())
        kinds = [handle.outcome and handle.outcome.kind for handle in handles]
        # What was told first had room; what the slots show still is known as well.
        assert set(kinds[:100]) == {"cancelled"}
        assert kinds[-1] == "cancelled"
        assert kinds.count("cancelled") >= 100 + 64
        assert set(kinds) == {"cancelled", "lost"}
        lost = handles[kinds.index("lost")]
        assert lost.status() is STOPPED
        assert lost.outcome is not None
        assert lost.outcome.final
        assert str(lost.outcome) == "outcome lost"
        # From now on it is told as ever.
        new = come_and_go(client, 3)
        for handle in new:
            assert handle.wait_until_gone(30).kind == "cancelled"


def test_a_wait_that_meets_the_overflow_misses_nothing() -> None:
    with supervisor(startup=NEVER_RUNNING, max_worker_processes=64) as client:
        # Waited for among many others, of which more is told than there is room for.
        kept = client.register(NOOP)
        for _ in range(3):
            come_and_go(client, 700)
            with pytest.raises(TimeoutError):
                kept.wait_for_shutdown(0.02)
        with ThreadPoolExecutor(1) as pool:
            waiter = pool.submit(kept.wait_for_shutdown, 30)
            come_and_go(client, 700)
            kept.terminate()
            come_and_go(client, 700)
            assert waiter.result(30) is STOPPED
        # Its end may have been among what was dropped, and its slot used on since.
        assert kept.wait_until_gone().kind in ("cancelled", "lost")


def test_who_listens_remembers_the_last_4096_outcomes() -> None:
    with supervisor(startup=NEVER_RUNNING, max_worker_processes=1) as client:
        handles = []
        for _ in range(REMEMBERED + 200):
            (handle,) = come_and_go(client, 1)
            handle.wait_for_shutdown(30)
            handles.append(handle)
        kinds = [handle.outcome and handle.outcome.kind for handle in handles]
        assert set(kinds[:190]) == {"lost"}
        assert set(kinds[200:]) == {"cancelled"}
        assert [handle.status() for handle in handles[:3]] == [STOPPED] * 3


def test_what_is_told_of_workers_does_not_hold_up_the_supervisor() -> None:
    """A client that reads nothing for ever, next to one that wants to know."""
    with (
        supervisor(startup=NEVER_RUNNING, max_worker_processes=64) as client,
        client.watch(*come_and_go(client, 10)) as deaf,
    ):
        come_and_go(client, 1000)
        deaf.add(*come_and_go(client, 1000))
        handle = client.register(NOOP)
        handle.terminate()
        assert handle.wait_until_gone(30).kind == "cancelled"
        assert select.select([deaf], [], [], 30)[0]
        # All of them are gone; what was not told one by one is found by looking.
        changed: set[WorkerHandle] = set()
        poll_until(lambda: changed.update(deaf.changes()) or len(changed) == 1010)
