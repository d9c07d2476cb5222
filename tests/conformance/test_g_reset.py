"""Conformance, group G: the crash of a worker with shared memory, and the reset of its domain."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from pgbgw import (
    BackgroundWorker,
    Client,
    Flags,
    HandleStatus,
    ParallelLimitError,
    Phase,
    StartTime,
    Supervisor,
    WorkerHandle,
)
from support import poll_until
from support.control import Faults, Log, Startup, paused, processes
from support.supervisors import lines, supervisor

NOOP = "support.workers:noop"
SLEEP = "support.workers:sleep_until_stopped"
APPEND = "support.workers:append"
MARK_AND_SLEEP = "support.workers:append_and_sleep"

CRASHED = "terminating the other workers with shared memory access"
RESET = "all are gone"


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(tmp_path / "faults", monkeypatch)


@pytest.fixture
def startup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Startup:
    return Startup(tmp_path / "startup", monkeypatch)


def member(client: Client, entry: str = SLEEP, *args: object, **fields: object) -> WorkerHandle:
    """A worker of the crash domain, which says that it is ready."""
    handle = client.register(entry, *args, flags=Flags.SHMEM_ACCESS, **fields)
    assert handle.wait_for_ready(30) is HandleStatus.STARTED
    return handle


def kill(handle: WorkerHandle, number: int = signal.SIGKILL) -> None:
    """End its process, and wait until that is dead, whether the supervisor has noticed or not."""
    with processes(handle.pid) as (process,):
        os.kill(process.pid, number)
        process.wait()


def crash(client: Client) -> None:
    """Let a worker of the domain die, and wait until those that follow it may start again."""
    culprit = client.register("support.workers:exit_at_once", 3, flags=Flags.SHMEM_ACCESS)
    culprit.wait_until_gone(30)
    client.register(NOOP, flags=Flags.SHMEM_ACCESS).wait_until_gone(30)


def back(handle: WorkerHandle, old: int | None) -> bool:
    return handle.pid not in (None, old)


@contextmanager
def dying_supervisor(starter: Supervisor) -> Iterator[Client]:
    """A supervisor that ends by itself; the exit status is checked by the caller."""
    client = starter.start()
    try:
        yield client
    finally:
        client.stop("immediate", timeout=30)
        client.close()


def exit_status(client: Client) -> int:
    """Of a supervisor that ends by itself."""
    process = client._process
    assert process is not None
    return process.wait(30)


# -- the reset -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "arguments"),
    [
        pytest.param("support.workers:exit_at_once", (2,), id="exits 2"),
        pytest.param("support.workers:exit_with", (2,), id="exits 2 after a clean end"),
        pytest.param("support.workers:exit_at_once", (1,), id="exits 1 without a clean end"),
        pytest.param("support.workers:kill_self", (signal.SIGKILL,), id="is killed"),
        pytest.param("support.workers:kill_self", (signal.SIGSEGV,), id="segfaults"),
    ],
)
def test_G01_a_crash_sends_the_emergency_signal_to_all_others_of_the_domain(
    entry: str, arguments: tuple[int, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    log = Log(capfd)
    with supervisor() as client:
        members = [member(client) for _ in range(2)]
        outside = [client.register(SLEEP, flags=f) for f in (Flags.NONE, Flags.CLASS_PARALLEL)]
        for handle in outside:
            handle.wait_for_ready(30)
        pids = [h.pid for h in outside]
        client.register(entry, *arguments, flags=Flags.SHMEM_ACCESS, name="culprit")
        for handle in members:
            outcome = handle.wait_until_gone(30)
            assert (outcome.kind, outcome.exitcode) == ("exited", 2)  # what SIGQUIT means
        crash(client)
        assert [h.pid for h in outside] == pids
        assert 'worker "culprit"' in log.wait_for(CRASHED)
        log.wait_for(RESET)


def test_G02_after_a_reset_the_restartable_are_back_at_once_whatever_their_interval() -> None:
    starter = Supervisor()
    static = BackgroundWorker(
        entry=SLEEP, name="static", restart_time=3600, flags=Flags.SHMEM_ACCESS
    )
    starter.register(static)
    with starter as client:
        handles = [
            poll_until(lambda: client.find(name="static")),
            member(client, restart_time=3600),
            member(client, restart_time=3600, name="culprit"),
        ]
        handles[0].wait_for_ready(30)
        # One more sits in a restart gap of an hour, which the reset cuts short.
        gap = client.register(
            "support.workers:exit_with", 1, flags=Flags.SHMEM_ACCESS, restart_time=3600
        )
        gap.wait_for_shutdown(30)
        old = [h.pid for h in handles]
        kill(handles[-1])
        poll_until(lambda: all(back(h, p) for h, p in zip(handles, old, strict=True)))
        assert all(h.info().restarts == 1 for h in handles)
        poll_until(lambda: (o := gap.outcome) is not None and o.restarts == 1)


def test_G03_after_a_reset_the_never_restarted_are_gone_static_ones_too(tmp_path: Path) -> None:
    path = str(tmp_path / "log")
    starter = Supervisor()
    once = BackgroundWorker(
        entry=MARK_AND_SLEEP, name="static", args=(path,), flags=Flags.SHMEM_ACCESS
    )
    starter.register(once)
    with starter as client:
        static = poll_until(lambda: client.find(name="static"))
        static.wait_for_ready(30)
        dynamic = member(client, MARK_AND_SLEEP, path)
        crash(client)
        for handle in (static, dynamic):
            assert handle.wait_until_gone(30).exitcode == 2
        crash(client)
        assert client.workers() == []
        assert len(lines(path)) == 2


def test_G04_an_early_worker_of_the_domain_waits_for_the_recovery_after_a_reset(
    startup: Startup, tmp_path: Path
) -> None:
    path = tmp_path / "log"
    with supervisor(startup=startup.entry) as client:
        startup.wait_for_run(1)
        # At a cold start it does not wait for anything ...
        early = member(
            client,
            MARK_AND_SLEEP,
            str(path),
            start_time=StartTime.SUPERVISOR_START,
            restart_time=0,
        )
        startup.finish()
        poll_until(lambda: client.phase is Phase.RUNNING)
        late = member(client, restart_time=0)
        startup.forget_orders()
        old = early.pid, late.pid
        kill(late)
        startup.wait_for_run(2)
        # ... but now it does, while a worker outside the domain is not held back at all.
        outside = client.register(NOOP)
        assert outside.wait_until_gone(30).kind == "exited"
        assert early.status() is late.status() is HandleStatus.STOPPED
        assert client.phase is Phase.RUNNING
        startup.consistent()
        poll_until(lambda: back(early, old[0]))
        assert client.register(NOOP).wait_until_gone(30).kind == "exited"
        assert late.status() is HandleStatus.STOPPED
        startup.finish()
        poll_until(lambda: back(late, old[1]))
        poll_until(lambda: len(lines(path)) == 2)


def test_G05_a_registration_that_nobody_had_noticed_survives_the_crash(tmp_path: Path) -> None:
    path = str(tmp_path / "log")
    with supervisor(max_worker_processes=16) as client:
        first = member(client)
        with paused(client, idle=True):
            kill(first)
            unseen = [
                client.register(APPEND, path, str(i), flags=flags, restart_time=restart_time)
                for i, (flags, restart_time) in enumerate(
                    (f, r) for f in (Flags.NONE, Flags.SHMEM_ACCESS) for r in (None, 60)
                )
            ]
            withdrawn = client.register(APPEND, path, "withdrawn", flags=Flags.SHMEM_ACCESS)
            withdrawn.terminate()
        for handle in unseen:
            outcome = handle.wait_until_gone(30)
            assert (outcome.kind, outcome.exitcode, outcome.restarts) == ("exited", 0, 0)
        assert withdrawn.wait_until_gone(30).kind == "cancelled"
        assert sorted(lines(path)) == ["0", "1", "2", "3"]


def test_G05_a_registration_that_waits_for_its_phase_survives_the_crash(startup: Startup) -> None:
    with supervisor(startup=startup.entry) as client:
        startup.wait_for_run(1)
        early = member(client, start_time=StartTime.SUPERVISOR_START)
        waiting = [client.register(NOOP, flags=f) for f in (Flags.NONE, Flags.SHMEM_ACCESS)]
        kill(early)
        startup.wait_for_run(2)
        startup.finish()
        assert {h.wait_until_gone(30).kind for h in waiting} == {"exited"}


def test_G06_resets_do_not_eat_up_the_parallel_limit() -> None:
    limit = 4
    with supervisor(max_worker_processes=12, max_parallel_workers=limit) as client:
        for _ in range(6):  # the resets back off from the third on, so there cannot be hundred
            inside = [
                client.register(SLEEP, flags=Flags.CLASS_PARALLEL | Flags.SHMEM_ACCESS)
                for _ in range(limit - 1)
            ]
            withdrawn = client.register(NOOP, flags=Flags.CLASS_PARALLEL | Flags.SHMEM_ACCESS)
            inside[0].wait_for_ready(30)
            withdrawn.terminate()
            kill(inside[0])
            client.wait([*inside, withdrawn], 30, "ALL_GONE")
        check_capacity(client, limit)


def test_G06_crashes_of_parallel_workers_do_not_eat_up_their_limit() -> None:
    limit = 4
    with supervisor(max_worker_processes=12, max_parallel_workers=limit) as client:
        for _ in range(25):  # times four
            handles = [
                client.register(
                    "support.workers:kill_self", signal.SIGKILL, flags=Flags.CLASS_PARALLEL
                )
                for _ in range(limit)
            ]
            assert client.wait(handles, 30, "ALL_GONE")[1] == set()
        check_capacity(client, limit)


def check_capacity(client: Client, limit: int) -> None:
    """Exactly so many parallel workers fit in."""
    handles = [client.register(SLEEP, flags=Flags.CLASS_PARALLEL) for _ in range(limit)]
    with pytest.raises(ParallelLimitError):
        client.register(NOOP, flags=Flags.CLASS_PARALLEL)
    for handle in handles:
        assert handle.wait_for_ready(30) is HandleStatus.STARTED


def test_G06_a_static_parallel_worker_takes_its_token_and_gives_it_back() -> None:
    starter = Supervisor(max_parallel_workers=2)
    worker = BackgroundWorker(entry=SLEEP, name="static", flags=Flags.CLASS_PARALLEL)
    starter.register(worker)
    with starter as client:
        static = poll_until(lambda: client.find(name="static"))
        static.wait_for_ready(30)
        second = client.register(SLEEP, flags=Flags.CLASS_PARALLEL)
        with pytest.raises(ParallelLimitError):
            client.register(SLEEP, flags=Flags.CLASS_PARALLEL)
        for handle in (static, second):
            handle.terminate()
            handle.wait_until_gone(30)
        check_capacity(client, 2)


def test_G07_a_handle_from_before_the_reset_is_no_handle_on_the_next_in_its_slot() -> None:
    with supervisor(max_worker_processes=2) as client:
        old = member(client)
        neighbour = client.register(SLEEP)
        kill(old)
        old.wait_until_gone(30)
        new = member(client)
        assert new.slot == old.slot
        assert new.generation > old.generation
        assert old.status() is HandleStatus.STOPPED
        assert old.pid is None
        assert new != old
        old.terminate()
        neighbour.terminate()  # which the supervisor notices after the one before
        neighbour.wait_until_gone(30)
        assert new.status() is HandleStatus.STARTED
        assert new.outcome is None
        new.terminate()
        assert new.wait_until_gone(30).exitcode == 1


def test_G07_the_handle_of_a_worker_that_comes_back_stays_good() -> None:
    with supervisor() as client:
        handle = member(client, restart_time=0)
        epoch, old = client.epoch, handle.pid
        crash(client)
        poll_until(lambda: back(handle, old))
        assert client.epoch == epoch
        handle.terminate()
        assert handle.wait_until_gone(30).restarts >= 1


def test_G08_whoever_waits_for_a_worker_of_the_domain_is_released_by_the_reset() -> None:
    with supervisor() as client:
        never = member(client)
        comes_back = member(client, restart_time=3600)
        culprit = member(client)
        results: dict[str, object] = {}

        def wait(name: str, handle: WorkerHandle, method: str) -> None:
            results[name] = getattr(handle, method)(30)

        waiters = [
            threading.Thread(target=wait, args=arguments)
            for arguments in (
                ("never, shutdown", never, "wait_for_shutdown"),
                ("never, gone", never, "wait_until_gone"),
                ("back, shutdown", comes_back, "wait_for_shutdown"),
                ("back, gone", comes_back, "wait_until_gone"),
            )
        ]
        # So that the gap can be seen: the client that waits samples, like PostgreSQL's.
        watch = client.watch(never, comes_back)
        for waiter in waiters:
            waiter.start()
        old = comes_back.pid
        kill(culprit)
        poll_until(lambda: "never, shutdown" in results and "never, gone" in results)
        poll_until(lambda: back(comes_back, old))
        assert {never, comes_back} <= set(watch.changes())
        watch.close()
        # This one is not gone, only restarted: its waiter goes on to the true end.
        assert "back, gone" not in results
        comes_back.terminate()
        for waiter in waiters:
            waiter.join(30)
        assert results["never, shutdown"] is results["back, shutdown"] is HandleStatus.STOPPED
        assert len(results) == len(waiters)


def test_G09_leaving_at_once_with_exit_0_is_a_crash_and_the_end_of_the_worker(
    tmp_path: Path,
) -> None:
    path = tmp_path / "log"
    with supervisor() as client:
        other = member(client, restart_time=0)
        old = other.pid
        handle = client.register(
            "support.workers:exit_at_once", 0, flags=Flags.SHMEM_ACCESS, restart_time=0
        )
        outcome = handle.wait_until_gone(30)
        assert (outcome.kind, outcome.exitcode, outcome.final) == ("exited", 0, True)
        poll_until(lambda: back(other, old))
        member(client, MARK_AND_SLEEP, str(path))
        assert handle.status() is HandleStatus.STOPPED
        assert handle.wait_until_gone(0).restarts == 0


def test_G10_a_worker_that_crashes_at_every_start_is_held_back_more_and_more(
    tmp_path: Path,
) -> None:
    path, allowed = tmp_path / "starts", tmp_path / "allowed"
    with supervisor() as client:
        outside = client.register(SLEEP)
        outside.wait_for_ready(30)
        pid = outside.pid
        handle = client.register(
            "support.lifecycle_workers:crash_until",
            str(path),
            str(allowed),
            flags=Flags.SHMEM_ACCESS,
            restart_time=0,
        )
        poll_until(lambda: len(lines(path)) >= 7)
        allowed.touch()
        starts = [int(line) for line in lines(path)[:7]]
        gaps = [(later - earlier) / 1e6 for earlier, later in pairwise(starts)]
        # Two at once, then 20, 40, 80, 160 ms, each give or take a fifth.
        least = [0, 0, 16, 32, 64, 128]
        assert all(gap >= low for gap, low in zip(gaps, least, strict=True))
        assert outside.pid == pid
        handle.wait_for_ready(30)


def test_G10_the_resets_that_others_cause_are_no_failures_of_a_worker() -> None:
    with supervisor() as client:
        innocent = member(client, restart_time=0)
        witness = client.register(SLEEP, restart_time=0.15)
        witness.wait_for_ready(30)
        for _ in range(6):
            crash(client)
            poll_until(lambda: innocent.ready)
        # Its first failure is followed by the shortest delay, 10 ms; its seventh would be by a
        # third of a second, and the witness, who fails later, would be back before it.
        old = innocent.pid, witness.pid
        kill(innocent, signal.SIGTERM)
        poll_until(lambda: innocent.pid != old[0])
        kill(witness, signal.SIGTERM)
        poll_until(lambda: back(innocent, old[0]) and back(witness, old[1]))
        started = [h.info().started_at or 0 for h in (innocent, witness)]
        assert started == sorted(started)


def test_G11_a_second_crash_while_the_domain_winds_down_is_part_of_the_first(
    capfd: pytest.CaptureFixture[str],
) -> None:
    log = Log(capfd)
    with supervisor() as client:
        stubborn = member(client, "support.lifecycle_workers:on_sigquit", "crash", name="second")
        twins = [member(client) for _ in range(2)]
        with paused(client, idle=True):
            for handle in twins:
                kill(handle)  # both are dead before the supervisor knows of either
        assert stubborn.wait_until_gone(30).signal == signal.SIGSEGV
        for handle in twins:
            assert handle.wait_until_gone(30).signal == signal.SIGKILL
        client.register(NOOP, flags=Flags.SHMEM_ACCESS).wait_until_gone(30)
        client.register("support.workers:exit_with", 7, name="last").wait_until_gone(30)
        log.wait_for('worker "last"', "exited with exit code 7")
        assert log.count(CRASHED) == 1
        assert log.count(RESET) == 1


def test_G12_a_clean_exit_0_while_the_domain_winds_down_is_a_success() -> None:
    with supervisor() as client:
        clean = member(
            client, "support.lifecycle_workers:on_sigquit", "exit cleanly", restart_time=0
        )
        crash(client)
        outcome = clean.wait_until_gone(30)
        assert (outcome.kind, outcome.exitcode, outcome.restarts) == ("exited", 0, 0)
        member(client)
        assert clean.status() is HandleStatus.STOPPED


def test_G13_a_worker_that_ignores_the_emergency_signal_is_killed_after_the_grace_period(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = Log(capfd)
    path = tmp_path / "log"
    with supervisor() as client:
        stubborn = member(client, "support.lifecycle_workers:ignore_all_signals")
        comes_back = member(client, restart_time=0)
        old = comes_back.pid
        culprit = member(client)
        kill(culprit)
        culprit.wait_until_gone(30)
        # Until then the domain stands still, and nothing else does.
        held = client.register(APPEND, str(path), "held", flags=Flags.SHMEM_ACCESS)
        assert client.register(APPEND, str(path), "outside").wait_until_gone(30).exitcode == 0
        assert held.status() is HandleStatus.NOT_YET_STARTED
        assert lines(path) == ["outside"]
        assert stubborn.status() is HandleStatus.STARTED
        outcome = stubborn.wait_until_gone(30)
        assert (outcome.kind, outcome.signal) == ("signaled", signal.SIGKILL)
        poll_until(lambda: back(comes_back, old))
        assert held.wait_until_gone(30).exitcode == 0
        log.wait_for("did not obey SIGQUIT: sending SIGKILL")
        log.wait_for(RESET)


# -- when there is no reset ------------------------------------------------------------------------


def test_G14_without_restart_after_crash_the_supervisor_ends_with_status_1(
    capfd: pytest.CaptureFixture[str],
) -> None:
    log = Log(capfd)
    with dying_supervisor(Supervisor(restart_after_crash=False)) as client:
        inside, outside = member(client, restart_time=0), client.register(SLEEP, restart_time=0)
        outside.wait_for_ready(30)
        # Outside the domain nothing is changed by the setting.
        client.register("support.workers:kill_self", signal.SIGKILL).wait_until_gone(30)
        culprit = member(client, restart_time=0)
        with processes(inside.pid, outside.pid) as others:
            kill(culprit)
            assert exit_status(client) == 1
            assert all(process.gone for process in others)
        assert all(h.status() is not HandleStatus.STARTED for h in (inside, outside, culprit))
        log.wait_for("restart_after_crash is off")
        assert log.count(RESET) == 0


def test_G15_memory_that_cannot_be_renewed_ends_the_supervisor_with_status_1(
    faults: Faults, capfd: pytest.CaptureFixture[str]
) -> None:
    log = Log(capfd)
    with dying_supervisor(Supervisor(shared_memory=4096, preload=faults.preload)) as client:
        inside, outside = member(client, restart_time=0), client.register(SLEEP)
        outside.wait_for_ready(30)
        faults.fail("memfd")
        with processes(outside.pid) as (other,):
            kill(inside)
            assert exit_status(client) == 1
            assert other.gone
        log.wait_for("could not renew the shared memory")


@pytest.mark.parametrize("how", ["exits 1", "exits 2", "is killed", "cannot be forked"])
def test_G15_a_startup_worker_that_fails_in_the_recovery_ends_the_supervisor_with_status_1(
    how: str, startup: Startup, faults: Faults, capfd: pytest.CaptureFixture[str]
) -> None:
    log = Log(capfd)
    starter = Supervisor(startup=startup.entry, preload=faults.preload)
    with dying_supervisor(starter) as client:
        startup.finish()
        inside, outside = member(client, restart_time=0), client.register(SLEEP, restart_time=0)
        outside.wait_for_ready(30)
        startup.forget_orders()
        with processes(outside.pid) as (other,):
            if how == "cannot be forked":
                faults.fail("fork")
                kill(inside)
            else:
                kill(inside)
                startup.wait_for_run(2)
                if how == "is killed":
                    os.kill(startup.pid, signal.SIGKILL)
                else:
                    startup.finish(int(how[-1]))
            assert exit_status(client) == 1
            assert other.gone
        assert inside.status() is not HandleStatus.STARTED
        log.wait_for("FATAL", "startup worker")


def test_a_startup_worker_that_dies_by_a_reset_runs_again(startup: Startup) -> None:
    with supervisor(startup=startup.entry) as client:
        startup.wait_for_run(1)
        early = member(client, start_time=StartTime.SUPERVISOR_START, restart_time=0)
        old = early.pid
        kill(early)
        startup.wait_for_run(2)
        assert client.phase is Phase.STARTUP
        assert not back(early, old)
        startup.finish()
        poll_until(lambda: client.phase is Phase.RUNNING)
        poll_until(lambda: back(early, old))


# -- the memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_all_workers_of_the_domain_see_the_same_memory_and_a_reset_zeroes_it(
    start_method: str, tmp_path: Path
) -> None:
    path = tmp_path / "log"

    def added(number: int) -> list[str]:
        poll_until(lambda: len(lines(path)) >= number)
        return lines(path)[number - 1 :]

    with supervisor(shared_memory=5000, start_method=start_method) as client:
        entry = "support.lifecycle_workers:use_memory"
        one = member(client, entry, str(path), 0, 17, restart_time=0)
        assert added(1) == ["5000 0"]
        two = member(client, entry, str(path), 1, 18)
        assert added(2) == ["5000 17"]
        one.wake()
        assert added(3) == ["0: 1112000000000000"]
        old = one.pid
        kill(two)
        poll_until(lambda: back(one, old))
        assert added(4) == ["5000 0"]
        one.wait_for_ready(30)
        one.wake()
        assert added(5) == ["0: 1100000000000000"]
        # It is there for them alone, and nobody can make it larger or smaller.
        outside = client.register(entry, str(path), 2, 19)
        assert outside.wait_until_gone(30).exitcode == 1
        assert (outcome := outside.outcome) is not None
        assert "has no access to shared memory" in (outcome.error or "")


def test_last_outcome_tells_a_worker_of_its_crash(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with supervisor() as client:
        handle = client.register(
            "support.lifecycle_workers:note_last_outcome",
            str(path),
            7,
            flags=Flags.SHMEM_ACCESS,
            restart_time=0,
        )
        poll_until(lambda: len(lines(path)) >= 2)
        handle.terminate()
        handle.wait_until_gone(30)
    assert lines(path)[:2] == ["None", "('exited', 7, None, 0)"]
