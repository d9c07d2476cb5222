"""Notification and waiting: nothing is lost, nothing hangs, no bystander is hit (E01 to E17)."""

from __future__ import annotations

import os
import pickle
import select
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from pgbgw import (
    AttachError,
    BackgroundWorker,
    Client,
    Flags,
    HandleStatus,
    Supervisor,
    SupervisorDiedError,
    WaitTimeoutError,
    WorkerHandle,
    attach,
)
from pgbgw._channels import Channels
from pgbgw._wire import Message
from support import observed_workers, poll_until, workers
from support.control import paused
from support.processes import Script, bystander, is_alive, kill_supervisor
from support.supervisors import lines, supervisor

STARTED, STOPPED, DIED = (
    HandleStatus.STARTED,
    HandleStatus.STOPPED,
    HandleStatus.SUPERVISOR_DIED,
)
# A startup worker that never ends: nothing that waits for recovery is launched.
NEVER_RUNNING = "support.workers:sleep_until_stopped"
PRELOADED = ["support.workers", "support.observed_workers"]


def left_by(path: Path) -> Any:
    poll_until(path.exists)
    return pickle.loads(path.read_bytes())


def heard(client: Client, handle: WorkerHandle) -> list[Message]:
    """What the registrant was told of a worker meanwhile, though it never asked."""
    messages = client._channels.first.drain()
    client._channels._note(messages)
    return [
        Message(type)
        for type, slot, generation, _ in messages
        if (slot, generation) == (handle.slot, handle.generation)
    ]


@contextmanager
def waiting(client: Client, wait: Any) -> Iterator[Any]:
    """Another thread calls wait(); it is waiting when the block begins."""
    before = client._channels.waiting
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(wait)
        poll_until(lambda: client._channels.waiting > before)
        yield future


# --- notification -------------------------------------------------------------------------------


def test_E01_the_registrant_is_told_of_each_launch_exit_and_relaunch(tmp_path: Path) -> None:
    go = tmp_path / "go"
    with supervisor() as client:
        handle = client.register(observed_workers.fail_while_missing, str(go), restart_time=0.2)
        told: list[Message] = []
        # Launch, exit, relaunch, exit: each of them a message.
        poll_until(lambda: told.extend(heard(client, handle)) or len(told) >= 4)
        assert set(told) == {Message.NOTIFY}
        go.touch()
        poll_until(lambda: told.extend(heard(client, handle)) or Message.FINAL in told)
        assert told[-1] == Message.FINAL
        assert handle.status() is STOPPED
        assert handle.outcome is not None
        # One launch and one exit per run, the last exit being the final message.
        assert len(told) == 2 * (handle.outcome.restarts + 1)


def test_E01_who_does_not_want_to_be_told_is_not_and_may_wait_all_the_same() -> None:
    with supervisor() as client:
        quiet = client.register(workers.noop, notify=False)
        loud = client.register(workers.noop)
        poll_until(lambda: quiet.status() is STOPPED and loud.status() is STOPPED)
        messages = client._channels.first.drain()
        told = {(slot, generation) for _, slot, generation, _ in messages}
        assert told == {(loud.slot, loud.generation)}
        another = client.register(workers.noop, notify=False)
        assert another.wait_until_gone(30).exitcode == 0


def test_E02_with_room_for_one_waiting_for_the_end_makes_room_for_the_next() -> None:
    with supervisor(max_worker_processes=1, preload=PRELOADED) as client:
        worker = BackgroundWorker(entry=workers.noop)
        for generation in range(1, 301):
            handle = client.register(worker)
            assert handle.generation == generation
            assert handle.wait_for_shutdown(30) is STOPPED


def test_E02_the_same_for_every_way_to_wait(tmp_path: Path) -> None:
    with supervisor(max_worker_processes=1, preload=PRELOADED) as client:
        for _ in range(20):
            client.register(workers.noop).wait_until_gone(30)
            handle = client.register(workers.noop)
            assert client.wait([handle], 30, "ANY_STOPPED") == ({handle}, set())
            handle = client.register(workers.noop)
            # Started or, if it was quick, gone already: then there is room.
            if handle.wait_for_startup(30) is STARTED:
                handle.wait_for_shutdown(30)
            handle = client.register(workers.noop)
            with client.watch(handle) as watch:
                poll_until(lambda: watch.changes() and handle.status() is STOPPED)  # noqa: B023


def test_E03_waiting_for_the_start_of_one_that_has_ended_says_stopped() -> None:
    with supervisor() as client:
        handle = client.register(workers.noop)
        poll_until(lambda: handle.outcome)
        assert handle.wait_for_startup() is STOPPED
        assert handle.wait_for_ready() is STOPPED


def test_E04_waiting_for_the_end_of_one_that_never_ran_says_stopped() -> None:
    with supervisor(startup=NEVER_RUNNING) as client:
        known = client.register(workers.noop)
        poll_until(client.workers)
        with paused(client):
            unknown = client.register(workers.noop)
            known.terminate()
            unknown.terminate()
        assert known.wait_for_shutdown(30) is STOPPED
        assert unknown.wait_for_shutdown(30) is STOPPED
        assert known.wait_for_startup() is STOPPED
        assert client.wait([known, unknown], 0, "ALL_GONE")[1] == set()


def test_E04_a_wait_that_began_before_the_terminate_ends_too() -> None:
    with supervisor(startup=NEVER_RUNNING) as client:
        handle = client.register(workers.noop)
        with waiting(client, lambda: handle.wait_for_shutdown(30)) as result:
            handle.terminate()
            assert result.result(30) is STOPPED


REGISTRANT = """
    from pgbgw import attach
    client = attach(address)
    test.send("attached")
    test.recv()
    handle = client.register(entry, *args)
    if terminate:
        handle.terminate()
    test.send(handle)
    test.recv()
"""


@contextmanager
def registrant(
    client: Client, entry: str, *args: str, terminate: bool = False
) -> Iterator[tuple[Script, WorkerHandle]]:
    """Another process that has registered this, unnoticed as yet if the supervisor is paused.

    It was attached before the block began; it is to be killed in it.
    """
    script = Script(REGISTRANT, address=client.address, entry=entry, args=args, terminate=terminate)
    with script:
        assert script.hear() == "attached"
        with suppress(ProcessLookupError), paused(client):  # the test may have ended it
            script.say("go on")
            yield script, script.hear()


def test_E05_a_worker_runs_though_whom_to_tell_is_dead(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with supervisor() as client:
        with registrant(client, "support.workers:append_and_sleep", str(trace)) as (other, handle):
            other.kill()
        assert handle.wait_for_ready(30) is STARTED
        assert lines(trace) == ["x"]


def test_E06_a_rejected_request_tells_nobody_who_has_the_registrants_pid_now(
    tmp_path: Path,
) -> None:
    trace = tmp_path / "trace"
    append = ("support.workers:append", str(trace))
    with supervisor() as client:
        with registrant(client, *append, terminate=True) as (other, handle):
            other.kill()
            with bystander(other.pid) as signals:
                if signals is None:
                    pytest.skip("needs the right to choose a pid")
                os.kill(client.supervisor_pid, signal.SIGCONT)
                assert handle.wait_until_gone(30).kind == "cancelled"
                assert signals() == set()
                assert is_alive(other.pid)
        assert lines(trace) == []


def test_E06_a_request_that_meets_the_shutdown_tells_nobody_either(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with supervisor() as client:
        with registrant(client, "support.workers:append", str(trace)) as (other, handle):
            other.kill()
            with bystander(other.pid) as signals:
                if signals is None:
                    pytest.skip("needs the right to choose a pid")
                os.kill(client.supervisor_pid, signal.SIGINT)
                os.kill(client.supervisor_pid, signal.SIGCONT)
                client.stop("fast", timeout=30)
                assert handle.status() is STOPPED
                outcome = handle.outcome
                assert outcome is not None
                assert outcome.kind == "cancelled"
                assert signals() == set()
                assert is_alive(other.pid)
        assert lines(trace) == []


def test_E07_a_worker_outlives_its_registrant_undisturbed() -> None:
    with supervisor() as client:
        with registrant(client, "support.workers:sleep_until_stopped") as (other, handle):
            os.kill(client.supervisor_pid, signal.SIGCONT)
            assert handle.wait_for_ready(30) is STARTED
            pid = handle.pid
            other.kill()
        # The supervisor has noticed: the dead registrant does not hold up a smart shutdown, ...
        assert client.register(workers.noop).wait_until_gone(30).exitcode == 0
        assert (handle.status(), handle.pid) == (STARTED, pid)
        # ... and the worker can be stopped by others.
        handle.terminate()
        assert handle.wait_until_gone(30).exitcode == 1


def test_E07_who_gets_the_pid_of_a_dead_registrant_is_told_nothing() -> None:
    with supervisor() as client:
        script = registrant(client, "support.workers:sleep_until_stopped")
        with script as (other, handle):
            os.kill(client.supervisor_pid, signal.SIGCONT)
            handle.wait_for_ready(30)
            other.kill()
            with bystander(other.pid) as signals:
                if signals is None:
                    pytest.skip("needs the right to choose a pid")
                handle.terminate()
                handle.wait_until_gone(30)
                assert signals() == set()
                assert is_alive(other.pid)


def test_E08_a_worker_outlives_the_worker_that_registered_it(tmp_path: Path) -> None:
    path = tmp_path / "handle"
    with supervisor(preload=PRELOADED) as client:
        first = client.register(
            observed_workers.launch_and_leave, str(path), flags=Flags.SHMEM_ACCESS
        )
        first.wait_for_startup(30)
        pid = first.pid or 0
        assert first.wait_until_gone(30).exitcode == 0
        other = left_by(path)
        with bystander(pid) as signals:
            assert (other.status(), other.ready) == (STARTED, True)
            other.terminate()
            assert other.wait_until_gone(30).exitcode == 1
            if signals is not None:
                assert signals() == set()
                assert is_alive(pid)


# --- waiting ------------------------------------------------------------------------------------


INTERRUPTED = """
    from pgbgw import attach
    client = attach(address)
    waits = [
        handle.wait_for_shutdown,
        handle.wait_until_gone,
        unready.wait_for_ready,
        lambda: client.wait([handle, unready], None, "ANY_GONE"),
        lambda: client.stop("smart"),
    ]
    for wait in waits:
        try:
            test.send("waiting")
            wait()
        except KeyboardInterrupt:
            test.send(handle.status())
    handle.terminate()
    test.send(handle.wait_until_gone(30))
    client.close()
"""


def test_E09_an_interrupted_wait_raises_and_the_worker_goes_on(tmp_path: Path) -> None:
    with supervisor() as client:
        handle = client.register(workers.sleep_until_stopped)
        handle.wait_for_ready(30)
        unready = client.register(observed_workers.ready_when_told, str(tmp_path / "never"))
        unready.wait_for_startup(30)
        variables = {"address": client.address, "handle": handle, "unready": unready}
        with Script(INTERRUPTED, **variables) as script:
            process = psutil.Process(script.pid)
            for _ in range(5):
                assert script.hear() == "waiting"
                poll_until(lambda: process.status() == psutil.STATUS_SLEEPING)
                script.process.send_signal(signal.SIGINT)
                assert script.hear() is STARTED
            assert script.hear().exitcode == 1
        assert unready.status() is STARTED


def test_E10_what_becomes_of_others_neither_ends_a_wait_nor_is_swallowed_by_it() -> None:
    with supervisor(preload=PRELOADED) as client:
        handle = client.register(workers.sleep_until_stopped)
        handle.wait_for_ready(30)
        with waiting(client, lambda: handle.wait_for_shutdown(30)) as result:
            codes = list(range(2, 22))
            others = [client.register(workers.exit_with, codes[0])]
            for code in codes[1:]:
                others[-1].wait_until_gone(30)
                others.append(client.register(workers.exit_with, code))
            others[-1].wait_until_gone(30)
            assert not result.done()
            assert [o.outcome and o.outcome.exitcode for o in others] == codes
            handle.terminate()
            assert result.result(30) is STOPPED


def test_E10_a_wake_up_that_comes_during_a_wait_for_a_worker_ends_the_next_own_wait(
    tmp_path: Path,
) -> None:
    path = tmp_path / "seen"
    with supervisor() as client:
        other = client.register(workers.sleep_until_stopped)
        other.wait_for_ready(30)
        waiter = client.register(
            observed_workers.woken_while_waiting, str(path), other, flags=Flags.SHMEM_ACCESS
        )
        assert waiter.wait_for_ready(30) is STARTED
        waiter.wake()
        # After the wake-up the supervisor does this, too; the waiter waits on.
        assert client.register(workers.noop).wait_until_gone(30).exitcode == 0
        assert waiter.status() is STARTED
        assert not path.exists()
        other.terminate()
        assert waiter.wait_until_gone(30).exitcode == 0
        assert left_by(path) == (STOPPED, True)


def cycles(client: Client, number: int) -> None:
    """Register and terminate, and wait for the end each time.  Nothing is launched, so all of it
    happens at the speed of the slots: the message comes just when the waiter goes to sleep."""
    worker = BackgroundWorker(entry=workers.noop)
    for _ in range(number):
        handle = client.register(worker)
        handle.terminate()
        # No wait may stall; ten seconds are more than the machine is ever away.
        assert handle.wait_until_gone(10).kind == "cancelled"


def test_E11_no_notification_is_lost_between_look_and_sleep() -> None:
    with supervisor(startup=NEVER_RUNNING) as client:
        cycles(client, 1000)
        assert client.workers() == []


def test_E11_no_notification_is_lost_when_several_threads_wait() -> None:
    with (
        supervisor(startup=NEVER_RUNNING, max_worker_processes=3) as client,
        ThreadPoolExecutor(3) as pool,
    ):
        for result in [pool.submit(cycles, client, 200) for _ in range(3)]:
            result.result(60)


def test_E11_no_notification_of_a_real_worker_is_lost() -> None:
    with supervisor(preload=PRELOADED) as client:
        worker = BackgroundWorker(entry=workers.noop)
        for _ in range(100):
            handle = client.register(worker)
            assert handle.wait_for_startup(10) in (STARTED, STOPPED)
            assert handle.wait_for_shutdown(10) is STOPPED


@pytest.mark.at_least("soak")
@pytest.mark.timeout_s(1200)
def test_E11_no_notification_is_lost_in_100000_cycles() -> None:
    with (
        supervisor(startup=NEVER_RUNNING) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        for result in [pool.submit(cycles, client, 50_000) for _ in range(2)]:
            result.result(1000)


@pytest.mark.parametrize("own_client", [True, False], ids=["member", "attached"])
def test_E12_a_worker_without_a_database_launches_another_and_is_woken(
    own_client: bool, tmp_path: Path
) -> None:
    path = tmp_path / "seen"
    flags = Flags.SHMEM_ACCESS if own_client else Flags.NONE
    with supervisor() as client:
        handle = client.register(
            observed_workers.launch_and_wait, str(path), own_client, flags=flags
        )
        assert handle.wait_until_gone(30).exitcode == 0
        assert left_by(path) == [STARTED, STARTED, STOPPED, "exited"]


def test_E13_who_did_not_register_a_worker_is_woken_as_well() -> None:
    code = """
        from pgbgw import attach
        with attach(address) as client:
            for wait in handle.wait_for_ready, handle.wait_for_shutdown, handle.wait_until_gone:
                test.send("waiting")
                test.send(wait(30))
    """
    with supervisor() as client:
        handle = client.register(workers.sleep_until_stopped, notify=False)
        with (
            Script(code, address=client.address, handle=handle) as first,
            Script(code, address=client.address, handle=handle) as second,
        ):
            for script in (first, second):
                assert script.hear() == "waiting"
                assert script.hear() is STARTED
                assert script.hear() == "waiting"
            handle.terminate()
            for script in (first, second):
                assert script.hear() is STOPPED
                assert script.hear() == "waiting"
                assert script.hear() == handle.outcome


@pytest.mark.leaves_sockets
def test_E14_the_supervisors_death_ends_every_wait() -> None:
    with supervisor(startup=NEVER_RUNNING) as client:
        handle = client.register(workers.noop)
        watch = client.watch(handle)
        waits = (
            handle.wait_for_startup,
            handle.wait_for_ready,
            handle.wait_for_shutdown,
            handle.wait_until_gone,
            lambda: client.wait([handle], None, "ALL_GONE"),
            lambda: client.wait([handle], None, "ANY_STARTED"),
        )
        with ThreadPoolExecutor(len(waits)) as pool, watch:
            results = [pool.submit(wait) for wait in waits]
            poll_until(lambda: client._channels.waiting == len(waits))
            os.kill(client.supervisor_pid, signal.SIGKILL)
            for i in (0, 1, 2):
                assert results[i].result(30) is DIED
            with pytest.raises(SupervisorDiedError):
                results[3].result(30)
            for i in (4, 5):
                assert results[i].result(30) == ({handle}, set())
            assert select.select([watch], [], [], 30)[0]
            with suppress(SupervisorDiedError):  # there may be something to tell before that
                watch.changes()
            assert select.select([watch], [], [], 0)[0]
            with pytest.raises(SupervisorDiedError):
                watch.changes()


@pytest.mark.leaves_sockets
def test_E14_a_wait_that_begins_while_the_supervisor_dies_ends_with_its_death() -> None:
    for _ in range(3):
        with supervisor() as client:
            handle = client.register(workers.sleep_until_stopped)
            handle.wait_for_ready(30)
            os.kill(client.supervisor_pid, signal.SIGKILL)
            # It is not quite dead yet: a look says so, and is remembered for some milliseconds.
            handle.status()
            assert handle.wait_for_shutdown(30) is DIED


@pytest.mark.leaves_sockets
def test_E15_a_dead_supervisor_is_reported_by_every_call() -> None:
    with supervisor() as client:
        handle = client.register(workers.sleep_until_stopped)
        handle.wait_for_ready(30)
        pid = handle.pid or 0
        gap = client.register(workers.exit_with, 1, restart_time=3600)
        gap.wait_for_startup(30)
        gap.wait_for_shutdown(30)
        gone = client.register(workers.exit_with, 3)
        gone.wait_until_gone(30)
        kill_supervisor(client)
        poll_until(lambda: not is_alive(pid))  # its workers die with it
        assert client._view.supervisor_gone()
        for lost in (handle, gap):
            assert lost.status() is DIED
            assert lost.pid is None
            assert not lost.ready
            assert lost.wait_for_startup() is DIED
            assert lost.wait_for_shutdown() is DIED
            assert lost.wait_for_ready() is DIED
            with pytest.raises(SupervisorDiedError):
                lost.wait_until_gone()
            lost.terminate()
            lost.terminate(grace=1)
            lost.wake()
        assert client.wait([handle, gap, gone]) == ({handle, gap, gone}, set())
        with pytest.raises(SupervisorDiedError) as caught:
            client.register(workers.noop)
        assert "attach()" in (caught.value.hint or "")
        with pytest.raises(SupervisorDiedError):
            client.try_register(workers.noop)
        # What had ended before is known to have ended.
        assert gone.status() is STOPPED
        assert gone.wait_until_gone().exitcode == 3


@pytest.mark.leaves_sockets
def test_E15_handles_of_a_dead_supervisor_say_so_whatever_is_attached_to_next() -> None:
    address = "again"
    first = Supervisor(address=address).start()
    handle = first.register(workers.sleep_until_stopped)
    handle.wait_for_ready(30)
    kill_supervisor(first)
    with pytest.raises(AttachError):
        attach(address)
    assert handle.status() is DIED
    assert handle.wait_for_shutdown() is DIED
    assert handle.outcome is None
    with Supervisor(address=address) as second:
        assert second is not first
        assert second.epoch != first.epoch
        assert handle.status() is DIED
        assert handle.wait_for_shutdown() is DIED
        # One that finds the new supervisor only knows that its worker is gone.
        other = pickle.loads(pickle.dumps(handle))
        assert other.status() is STOPPED
        assert other.wait_for_startup() is STOPPED
        assert other.wait_until_gone().kind == "lost"
        other.terminate()
        first.stop()
        first.close()
        assert handle.status() is STOPPED
        assert second.register(workers.noop).wait_until_gone(30).exitcode == 0


def test_E16_waiting_for_a_worker_that_fails_all_the_time_never_hangs(tmp_path: Path) -> None:
    go = tmp_path / "go"
    with supervisor(preload=PRELOADED) as client:
        handle = client.register(observed_workers.fail_while_missing, str(go), restart_time=0)
        with waiting(client, lambda: handle.wait_until_gone(30)) as gone:
            # A wait for its end may see a gap or miss it; it is to return, now or at the end.
            for _ in range(5):
                assert handle.wait_for_shutdown(30) is STOPPED
            poll_until(lambda: handle.info().restarts >= 3)
            assert not gone.done()
            go.touch()
            outcome = gone.result(30)
        assert (outcome.kind, outcome.exitcode, outcome.final) == ("exited", 0, True)
        assert outcome.restarts >= 3
        assert handle.wait_for_shutdown() is STOPPED


def test_E16_a_wait_tells_what_ended_it_though_the_worker_runs_again_by_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = Channels.wait

    def slow(channels: Channels, *args: Any) -> set[WorkerHandle]:
        """As if the waiting thread were not scheduled for long."""
        pending = wait(channels, *args)
        poll_until(lambda: handle.status() is STARTED)
        return pending

    trace = tmp_path / "trace"
    with supervisor() as client:
        handle = client.register(observed_workers.ready_in_second_run, str(trace), restart_time=0.2)
        handle.wait_for_startup(30)
        (tmp_path / "trace.go").touch()
        monkeypatch.setattr(Channels, "wait", slow)
        assert handle.wait_for_shutdown(30) is STOPPED


def test_E17_a_wait_with_a_timeout_returns_in_time_and_leaves_the_worker_alone(
    tmp_path: Path,
) -> None:
    with supervisor() as client:
        handle = client.register(observed_workers.ready_when_told, str(tmp_path / "never"))
        handle.wait_for_startup(30)
        pid = handle.pid
        for wait in (handle.wait_for_ready, handle.wait_for_shutdown, handle.wait_until_gone):
            for timeout in (0.05, 0, -1):
                before = time.monotonic()
                with pytest.raises(WaitTimeoutError) as caught:
                    wait(timeout)
                assert isinstance(caught.value, TimeoutError)
                assert time.monotonic() - before >= timeout
        before = time.monotonic()
        assert client.wait([handle], 0.05, "ALL_GONE") == (set(), {handle})
        assert time.monotonic() - before >= 0.05
        assert (handle.status(), handle.pid) == (STARTED, pid)


def test_E17_a_wait_with_a_timeout_ends_though_the_supervisor_does_not_answer() -> None:
    with supervisor() as client:
        handle = client.register(workers.sleep_until_stopped)
        handle.wait_for_ready(30)
        with paused(client):
            with pytest.raises(WaitTimeoutError):
                handle.wait_for_shutdown(0.05)
            assert client.wait([handle], 0.05) == (set(), {handle})


def test_E17_a_timed_wait_of_a_second_thread_ends_though_the_supervisor_does_not_answer() -> None:
    with supervisor() as client, ThreadPoolExecutor(2) as pool:
        handle = client.register(workers.sleep_until_stopped)
        handle.wait_for_ready(30)
        with paused(client):
            results = [pool.submit(handle.wait_for_shutdown, 0.1) for _ in range(2)]
            for result in results:
                with pytest.raises(WaitTimeoutError):
                    result.result(30)
        assert handle.status() is STARTED
