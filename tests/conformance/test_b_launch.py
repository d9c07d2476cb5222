"""Conformance, group B: from the registration to the first instruction of the entry point."""

from __future__ import annotations

import os
import resource
import signal
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from pgbgw import (
    BackgroundWorker,
    Client,
    Flags,
    HandleStatus,
    NoFreeSlotError,
    ParallelLimitError,
    Phase,
    StartTime,
    Supervisor,
    WorkerHandle,
)
from support import poll_until
from support.clients import ClientProcess
from support.control import Faults, Log, Startup, ask_to_stop, paused
from support.supervisors import lines, supervisor

NOOP = "support.workers:noop"
SLEEP = "support.workers:sleep_until_stopped"

METHODS = pytest.mark.parametrize("start_method", ["fork", "spawn"])


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(tmp_path / "faults", monkeypatch)


@pytest.fixture
def startup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Startup:
    return Startup(tmp_path / "startup", monkeypatch)


def pending(handles: list[WorkerHandle]) -> list[WorkerHandle]:
    return [h for h in handles if h.status() is HandleStatus.NOT_YET_STARTED]


# -- batches ---------------------------------------------------------------------------------------


def test_B01_all_registrations_made_during_a_pause_are_launched_from_one_wakeup() -> None:
    with supervisor(max_worker_processes=20) as client:
        with paused(client, idle=True):
            handles = [client.register(SLEEP) for _ in range(20)]
            assert pending(handles) == handles
        # To look is a load from shared memory: nothing here wakes the supervisor a second time.
        poll_until(lambda: all(h.status() is HandleStatus.STARTED for h in handles))


def test_B02_workers_of_a_batch_are_launched_in_the_order_of_their_registration() -> None:
    with supervisor(max_worker_processes=24) as client:
        # Holes, so that the order of the slots is another one.
        first = [client.register(SLEEP) for _ in range(12)]
        client.wait(first, 30, "ALL_STARTED")
        for handle in first[::2]:
            handle.terminate()
        client.wait(first[::2], 30, "ALL_GONE")
        with ClientProcess(client.address) as other, paused(client):
            batch = []
            for _ in range(8):
                batch.append(client.register(SLEEP))
                batch.append(other.call("register", SLEEP))
        assert client.wait(batch, 30, "ALL_STARTED")[1] == set()
        # Registering is a compare-and-swap on any free slot, so these orders hardly agree.
        assert sorted(batch, key=lambda h: h.slot) != batch
        assert sorted(batch, key=lambda h: h.info().started_at or 0) == batch


def test_B02_static_workers_are_launched_in_the_order_of_their_registration() -> None:
    starter = Supervisor()
    for i in range(5):
        starter.register(BackgroundWorker(entry=SLEEP, name=f"static {i}"))
    with starter as client:
        poll_until(lambda: all(info.pid for info in client.workers()))
        found = sorted(client.workers(), key=lambda info: info.started_at or 0)
        assert [info.name for info in found] == [f"static {i}" for i in range(5)]


def test_B03_a_large_batch_is_launched_whole_and_others_are_served_meanwhile(
    faults: Faults,
) -> None:
    with (
        supervisor(max_worker_processes=256, preload=faults.preload) as client,
        ClientProcess(client.address, attached=False) as other,
    ):
        faults.set("slow_fork", 0.003)  # the batch must outlast what comes into its way
        with paused(client):
            batch = [client.register(NOOP) for _ in range(250)]
        poll_until(lambda: batch[0].status() is not HandleStatus.NOT_YET_STARTED)

        batch[-1].terminate()
        assert batch[-1].wait_for_shutdown(30) is HandleStatus.STOPPED
        assert pending(batch), "the terminate was served only after the batch"
        other.attach()
        assert pending(batch), "the new client was served only after the batch"

        faults.clear("slow_fork")
        # No wait, which would be a message: the batch needs no event from outside.
        poll_until(lambda: all(h.status() is HandleStatus.STOPPED for h in batch), 50)
        outcomes = [h.outcome for h in batch]
        assert [o.kind for o in outcomes if o] == ["exited"] * 249 + ["cancelled"]


# -- phases ----------------------------------------------------------------------------------------


def register_one_of_each(client: Client) -> dict[StartTime, WorkerHandle]:
    """Three workers, and the certainty that all of them have had their chance to start."""
    handles = {time: client.register(NOOP, start_time=time) for time in StartTime}
    # First registered, first launched: when this one has come, each of the others could have.
    witness = client.register(NOOP, start_time=StartTime.SUPERVISOR_START)
    witness.wait_until_gone(30)
    return handles


def launched(handles: dict[StartTime, WorkerHandle]) -> set[StartTime]:
    """The start times of those that were launched; they have run to their end."""
    started = {t for t, h in handles.items() if h.status() is not HandleStatus.NOT_YET_STARTED}
    assert all(handles[t].wait_until_gone(30).kind == "exited" for t in started)
    return started


def test_B04_each_phase_launches_exactly_the_workers_whose_start_time_has_come(
    startup: Startup, tmp_path: Path
) -> None:
    at_start, when_consistent, when_recovered = (
        StartTime.SUPERVISOR_START,
        StartTime.CONSISTENT_STATE,
        StartTime.RECOVERY_FINISHED,
    )
    path = str(tmp_path / "lingering")
    with supervisor(startup=startup.entry, max_worker_processes=32) as client:
        startup.wait_for_run(1)
        assert client.phase is Phase.STARTUP
        in_startup = register_one_of_each(client)
        assert launched(in_startup) == {at_start}
        assert client.phase is Phase.STARTUP

        startup.consistent()
        poll_until(lambda: client.phase is Phase.CONSISTENT)
        in_startup[when_consistent].wait_until_gone(30)  # the phase itself has launched it
        in_consistent = register_one_of_each(client)
        assert launched(in_startup) == launched(in_consistent) == {at_start, when_consistent}

        startup.finish()
        poll_until(lambda: client.phase is Phase.RUNNING)
        for before in (in_startup, in_consistent):
            assert before[when_recovered].wait_until_gone(30).kind == "exited"
        assert launched(register_one_of_each(client)) == set(StartTime)

        lingering = client.register("support.lifecycle_workers:linger", path)
        lingering.wait_for_ready(30)
        ask_to_stop(client, "fast")
        poll_until(lambda: client.phase is Phase.STOPPING)
        in_stopping = [client.register(NOOP, start_time=time) for time in StartTime]
        for handle in in_stopping:
            assert handle.wait_until_gone(30).kind == "cancelled"
        Path(f"{path}.release").touch()


@pytest.mark.parametrize("how", ["exits 1", "exits 2", "leaves at once with 0", "is killed"])
def test_B04_a_startup_worker_that_fails_ends_the_supervisor_with_status_1(
    how: str, startup: Startup, capfd: pytest.CaptureFixture[str]
) -> None:
    log = Log(capfd)
    client = Supervisor(startup=startup.entry).start()
    startup.wait_for_run(1)
    early = client.register(SLEEP, start_time=StartTime.SUPERVISOR_START)
    early.wait_for_ready(30)
    waiting = client.register(NOOP)
    if how == "is killed":
        os.kill(startup.pid, signal.SIGKILL)
    elif how == "leaves at once with 0":
        startup.leave_at_once()
    else:
        startup.finish(int(how[-1]))
    process = client._process
    assert process is not None
    assert process.wait(30) == 1
    log.wait_for("FATAL", "the startup worker failed")
    assert (outcome := early.outcome) is not None
    assert (outcome.exitcode, outcome.final) == (2, True)
    assert (outcome := waiting.outcome) is not None
    assert outcome.kind == "cancelled"
    client.close()


def test_B05_an_advancing_phase_stops_no_worker(startup: Startup, tmp_path: Path) -> None:
    path = str(tmp_path / "signals")
    recorder = ("support.lifecycle_workers:record_signals", path, "SIGTERM", "SIGUSR1")
    with supervisor(startup=startup.entry) as client:
        early = [
            client.register(*recorder, start_time=StartTime.SUPERVISOR_START, flags=flags)
            for flags in (Flags.NONE, Flags.SHMEM_ACCESS)
        ]
        for handle in early:
            handle.wait_for_ready(30)
        pids = [h.pid for h in early]
        startup.consistent()
        poll_until(lambda: client.phase is Phase.CONSISTENT)
        startup.finish()
        poll_until(lambda: client.phase is Phase.RUNNING)
        client.register(NOOP).wait_until_gone(30)
        assert [h.pid for h in early] == pids
        assert lines(path) == []
        for handle in early:
            handle.terminate()
            # They only note it.
            poll_until(lambda: len(lines(path)) == 1 + early.index(handle))  # noqa: B023
        client.stop("immediate", timeout=30)


def test_B06_while_the_supervisor_stops_nothing_starts_not_even_a_due_restart(
    tmp_path: Path,
) -> None:
    log, path = str(tmp_path / "log"), str(tmp_path / "lingering")
    with supervisor() as client:
        lingering = client.register("support.lifecycle_workers:linger", path)
        lingering.wait_for_ready(30)
        restarted = client.register(
            "support.workers:append_and_exit", log, "restarted", 1, restart_time=0.2
        )
        restarted.wait_for_shutdown(30)  # in the gap now
        ask_to_stop(client, "fast")
        poll_until(lambda: client.phase is Phase.STOPPING)
        late = client.register("support.workers:append", log, "late")
        assert late.wait_for_shutdown(30) is HandleStatus.STOPPED
        assert restarted.wait_until_gone(30).exitcode == 1
        runs = len(lines(log))
        time.sleep(0.25)  # past the time of the restart, and the supervisor is still there
        assert lingering.status() is HandleStatus.STARTED
        Path(f"{path}.release").touch()
        client.stop("fast", timeout=30)
    assert len(lines(log)) == runs
    assert "late" not in lines(log)


# -- the first moments of a process ----------------------------------------------------------------


@METHODS
@pytest.mark.parametrize("where", ["before its handlers are in", "before its entry is called"])
def test_B07_a_terminate_just_after_the_fork_is_not_lost(
    where: str, start_method: str, faults: Faults, tmp_path: Path
) -> None:
    delay = 0.3 if where == "before its entry is called" else 0.0
    with supervisor(
        preload=faults.preload, post_auth_delay=delay, start_method=start_method
    ) as client:
        if not delay:
            faults.set("slow_child", 0.3)
        handle = client.register(
            "support.workers:append_and_sleep", str(tmp_path / "log"), restart_time=0
        )
        assert handle.wait_for_startup(30) is HandleStatus.STARTED
        handle.terminate()
        outcome = handle.wait_until_gone(30)
        assert (outcome.kind, outcome.exitcode) == ("exited", 1)
        assert lines(tmp_path / "log") == []


@METHODS
@pytest.mark.parametrize("where", ["before its handlers are in", "before its entry is called"])
def test_B07_an_emergency_stop_just_after_the_fork_is_not_lost(
    where: str, start_method: str, faults: Faults
) -> None:
    delay = 0.3 if where == "before its entry is called" else 0.0
    with supervisor(
        preload=faults.preload, post_auth_delay=delay, start_method=start_method
    ) as client:
        if not delay:
            faults.set("slow_child", 0.3)
        handle = client.register(SLEEP)
        assert handle.wait_for_startup(30) is HandleStatus.STARTED
        client.stop("immediate", timeout=30)
        outcome = handle.outcome
        assert outcome is not None
        assert (outcome.kind, outcome.exitcode) == ("exited", 2)


@pytest.mark.parametrize("entry", ["block_signals", "never_back_in_python"])
def test_B08_an_emergency_stop_ends_a_worker_that_takes_no_signals(entry: str) -> None:
    with supervisor() as client:
        handle = client.register(f"support.lifecycle_workers:{entry}")
        handle.wait_for_ready(30)
        client.stop("immediate", timeout=30)
        outcome = handle.outcome
        assert outcome is not None
        # The SIGKILL that follows after five seconds would have been a signal.
        assert (outcome.kind, outcome.exitcode) == ("exited", 2)


def test_B08_a_reset_ends_a_worker_that_takes_no_signals() -> None:
    with supervisor() as client:
        deaf = client.register("support.lifecycle_workers:block_signals", flags=Flags.SHMEM_ACCESS)
        deaf.wait_for_ready(30)
        client.register("support.workers:exit_at_once", 3, flags=Flags.SHMEM_ACCESS)
        outcome = deaf.wait_until_gone(30)
        assert (outcome.kind, outcome.exitcode) == ("exited", 2)


@METHODS
def test_B09_an_entry_that_raises_is_logged_and_exits_1(
    start_method: str, capfd: pytest.CaptureFixture[str]
) -> None:
    log = Log(capfd)
    with supervisor(start_method=start_method) as client:
        once = client.register("support.workers:fail", "no way", name="unlucky", type="kind")
        outcome = once.wait_until_gone(30)
        assert (outcome.kind, outcome.exitcode, outcome.final) == ("exited", 1, True)
        outcome = once.outcome
        assert outcome is not None
        assert outcome.error is not None
        assert outcome.error.endswith("ValueError: no way\n")
        line = log.wait_for("ERROR", "failed")
        assert 'worker "unlucky" (type "kind", pid ' in line
        assert f", slot {once.slot}/{once.generation})" in line
        log.wait_for("ValueError: no way")

        again = client.register("support.workers:fail", restart_time=0)
        assert again.wait_for_shutdown(30) is HandleStatus.STOPPED
        poll_until(lambda: (o := again.outcome) and o.restarts >= 1)
        again.terminate()
        assert again.wait_until_gone(30).exitcode == 1


@METHODS
def test_B10_an_entry_that_returns_exits_0_and_is_done_for_good(
    start_method: str, tmp_path: Path
) -> None:
    with supervisor(start_method=start_method) as client:
        handle = client.register("support.workers:append", str(tmp_path / "log"), restart_time=0)
        outcome = handle.wait_until_gone(30)
        assert (outcome.kind, outcome.exitcode, outcome.final) == ("exited", 0, True)
        assert client.workers() == []
        # Whatever has a restart due by now would have gone first.
        twice = client.register(
            "support.workers:append_and_exit", str(tmp_path / "other"), "x", 1, restart_time=0.02
        )
        poll_until(lambda: len(lines(tmp_path / "other")) >= 2)
        twice.terminate()
        twice.wait_until_gone(30)
        assert lines(tmp_path / "log") == ["x"]


@METHODS
@pytest.mark.parametrize(
    ("entry", "module", "function"),
    [
        ("support.no_such_module:run", "support.no_such_module", "run"),
        ("support.workers:os.no_such_function", "support.workers", "os.no_such_function"),
    ],
)
def test_B11_an_entry_that_is_not_there_exits_1_and_is_named(
    entry: str, module: str, function: str, start_method: str, capfd: pytest.CaptureFixture[str]
) -> None:
    log = Log(capfd)
    with supervisor(start_method=start_method) as client:
        handle = client.register(entry, name="typo")
        assert handle.wait_until_gone(30).exitcode == 1
        outcome = handle.outcome
        assert outcome is not None
        assert outcome.error is not None
        for where in (outcome.error, log.wait_for("Error: could not find")):
            assert module in where
            assert function in where
        again = client.register(entry, restart_time=0)
        poll_until(lambda: again.outcome is not None and again.info().restarts >= 1)
        again.terminate()
        again.wait_until_gone(30)


@METHODS
def test_B12_a_worker_can_read_its_own_registration(start_method: str, tmp_path: Path) -> None:
    path = str(tmp_path / "log")
    worker = BackgroundWorker(
        entry="support.lifecycle_workers:describe_self",
        name="naïve",
        type="kind",
        args=(path, 1, None),
        kwargs={"key": [1.5]},
        main_arg=2**64 - 1,
        extra=bytes(range(128)),
        flags=Flags.SHMEM_ACCESS,
        start_time=StartTime.CONSISTENT_STATE,
        restart_time=7.25,
        stop_timeout=3.5,
        env={"PGBGW_TEST_VARIABLE": "héllo"},
    )
    with supervisor(start_method=start_method) as client:
        handle = client.register(worker)
        assert handle.wait_until_gone(30).exitcode == 0
        (line,) = Path(path).read_text().splitlines()
        assert eval(line) == {
            "entry": worker.entry,
            "name": "naïve",
            "type": "kind",
            "args": (path, 1, None),
            "kwargs": {"key": [1.5]},
            "record args": (path, 1, None),
            "record kwargs": {"key": [1.5]},
            "main_arg": (2**64 - 1, 2**64 - 1),
            "extra": (bytes(range(128)),) * 2,
            "flags": int(Flags.SHMEM_ACCESS),
            "start_time": True,
            "restart_time": 7.25,
            "stop_timeout": 3.5,
            "env": {"PGBGW_TEST_VARIABLE": "héllo"},
            "variable": "héllo",
            "handle": (handle.slot, handle.generation),
        }


def test_B13_a_worker_has_a_session_of_its_own(tmp_path: Path) -> None:
    path = str(tmp_path / "signals")
    with supervisor() as client:
        handle = client.register(
            "support.lifecycle_workers:record_signals", path, "SIGUSR1", "SIGUSR2"
        )
        handle.wait_for_ready(30)
        pid = handle.pid
        assert pid is not None
        assert os.getsid(pid) == os.getpgid(pid) == pid
        group = os.getpgid(client.supervisor_pid)
        assert group != os.getpgid(0)
        os.killpg(group, signal.SIGUSR1)  # which the supervisor itself takes no notice of
        os.kill(pid, signal.SIGUSR2)
        poll_until(lambda: lines(path))
        assert lines(path) == ["SIGUSR2"]
        client.stop("immediate", timeout=30)


def test_post_auth_delay_holds_a_worker_before_it_does_anything(tmp_path: Path) -> None:
    with supervisor(post_auth_delay=0.25) as client:
        path = str(tmp_path / "log")
        handle = client.register("support.lifecycle_workers:note_times", path, 0)
        assert handle.wait_for_startup(30) is HandleStatus.STARTED
        launched_at = handle.info().started_at
        assert launched_at is not None
        outcome = handle.wait_until_gone(30)
        assert outcome.at - launched_at >= 0.25
        assert len(lines(path)) == 1


# -- when there can be no process ------------------------------------------------------------------


def check_failed_launch_is_final(client: Client, faults: Faults, fault: str) -> None:
    faults.fail(fault)
    handle = client.register(NOOP, flags=Flags.CLASS_PARALLEL)
    assert handle.wait_for_startup(30) is HandleStatus.STOPPED
    outcome = handle.wait_until_gone(30)
    assert (outcome.kind, outcome.final) == ("launch_failed", True)
    outcome = handle.outcome
    assert outcome is not None
    assert outcome.error
    assert str(outcome).startswith("could not be launched: ")
    faults.clear(fault)
    # The only slot and the only token are free again.
    again = client.register(SLEEP, flags=Flags.CLASS_PARALLEL)
    assert again.wait_for_ready(30) is HandleStatus.STARTED
    with pytest.raises((ParallelLimitError, NoFreeSlotError)):
        client.register(NOOP, flags=Flags.CLASS_PARALLEL)
    again.terminate()
    again.wait_until_gone(30)


@METHODS
def test_B14_a_failing_fork_ends_a_worker_that_is_never_restarted(
    start_method: str, faults: Faults
) -> None:
    with supervisor(
        max_worker_processes=1,
        max_parallel_workers=1,
        preload=faults.preload,
        start_method=start_method,
    ) as client:
        check_failed_launch_is_final(client, faults, "fork")


def test_B15_a_failing_fork_is_tried_again_after_the_interval(faults: Faults) -> None:
    with supervisor(preload=faults.preload) as client:
        faults.fail("fork")
        handle = client.register(SLEEP, restart_time=0.1)
        poll_until(lambda: len(faults.attempts("fork")) >= 3)
        assert handle.status() is HandleStatus.NOT_YET_STARTED
        assert handle.outcome is None
        faults.clear("fork")
        assert handle.wait_for_startup(30) is HandleStatus.STARTED
        assert handle.info().restarts == 0
        tried = faults.attempts("fork")
        assert all(b - a >= 100_000_000 for a, b in pairwise(tried))


def test_B15_a_failing_fork_in_the_restart_gap_leaves_the_worker_in_it(
    faults: Faults, tmp_path: Path
) -> None:
    path = str(tmp_path / "log")
    with supervisor(preload=faults.preload) as client:
        handle = client.register("support.workers:append_and_exit", path, "x", 1, restart_time=0.05)
        handle.wait_for_shutdown(30)
        faults.fail("fork")
        poll_until(lambda: len(faults.attempts("fork")) >= 2)
        assert handle.status() is HandleStatus.STOPPED
        runs = len(lines(path))
        faults.clear("fork")
        poll_until(lambda: len(lines(path)) > runs)
        handle.terminate()
        handle.wait_until_gone(30)


def test_B16_a_fork_that_keeps_failing_is_tried_and_logged_at_a_bounded_rate(
    faults: Faults, capfd: pytest.CaptureFixture[str]
) -> None:
    log = Log(capfd)
    with supervisor(max_worker_processes=41, preload=faults.preload) as client:
        began = time.monotonic()
        faults.fail("fork")
        alone = client.register(NOOP, restart_time=0)
        poll_until(lambda: len(faults.attempts("fork")) >= 7)
        # 10, 10, then 20, 40, 80, 160 ms, each give or take a fifth.
        tried = faults.attempts("fork")[:7]
        gaps = [(b - a) / 1e6 for a, b in pairwise(tried)]
        assert all(gap >= least for gap, least in zip(gaps, [10, 10, 16, 32, 64, 128], strict=True))

        many = [client.register(NOOP, restart_time=0) for _ in range(40)]
        poll_until(lambda: len(faults.attempts("fork")) >= 7 + 40 * 3)
        assert pending(many) == many
        lines_written = log.count("could not launch")
        assert 1 <= lines_written <= 10 + 1 + (time.monotonic() - began)
        # The supervisor is none the worse.
        many[0].terminate()
        assert many[0].wait_until_gone(30).kind == "cancelled"
        faults.clear("fork")
        assert {h.wait_until_gone(50).exitcode for h in (alone, *many[1:])} == {0}


def test_B17_a_failed_launch_holds_up_no_other(faults: Faults) -> None:
    with supervisor(preload=faults.preload) as client:
        with paused(client):
            faults.fail("fork", times=1)
            first = client.register(NOOP, restart_time=3600)
            others = [client.register(NOOP) for _ in range(3)]
        assert {h.wait_until_gone(30).kind for h in others} == {"exited"}
        assert first.status() is HandleStatus.NOT_YET_STARTED
        assert len(faults.attempts("fork")) == 1


def test_B18_a_process_that_cannot_be_watched_is_a_failed_launch(faults: Faults) -> None:
    with supervisor(
        max_worker_processes=1, max_parallel_workers=1, preload=faults.preload
    ) as client:
        check_failed_launch_is_final(client, faults, "pidfd_open")
        # Nor is it left behind: the log relay is the supervisor's only child.
        assert len(psutil.Process(client.supervisor_pid).children()) == 1
        faults.fail("pidfd_open", times=2)
        handle = client.register(NOOP, restart_time=0)
        assert handle.wait_until_gone(30).exitcode == 0
        assert faults.attempts("pidfd_open")[-2:] == faults.attempts("pidfd_open")[1:]


@METHODS
def test_B18_without_descriptors_a_launch_fails_and_the_supervisor_goes_on(
    start_method: str,
) -> None:
    with supervisor(spares=0, start_method=start_method) as client:
        running = client.register(SLEEP)
        running.wait_for_ready(30)
        limits = resource.prlimit(client.supervisor_pid, resource.RLIMIT_NOFILE)
        opened = max(int(fd) for fd in os.listdir(f"/proc/{client.supervisor_pid}/fd")) + 1
        # With room for none, for one end of a channel, for both, for a pidfd besides ...
        for spare in range(4):
            limit = (opened + spare, limits[1])
            resource.prlimit(client.supervisor_pid, resource.RLIMIT_NOFILE, limit)
            handle = client.register(NOOP)
            assert handle.wait_until_gone(30).kind in ("launch_failed", "exited")
            if spare == 0:
                assert (o := handle.outcome) is not None
                assert o.kind == "launch_failed"
                patient = client.register(NOOP, restart_time=0.01)
        assert running.status() is HandleStatus.STARTED
        resource.prlimit(client.supervisor_pid, resource.RLIMIT_NOFILE, limits)
        assert patient.wait_until_gone(30).exitcode == 0
        assert client.register(NOOP).wait_until_gone(30).exitcode == 0
