"""Conformance, group H: smart, fast and immediate shutdown, and a supervisor that is killed."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pgbgw import (
    AttachError,
    Client,
    Flags,
    HandleStatus,
    Phase,
    ShutdownMode,
    StartTime,
    Supervisor,
    WaitTimeoutError,
    WorkerHandle,
    attach,
)
from support import poll_until
from support.clients import ClientProcess
from support.control import Log, Startup, ask_to_stop, paused, processes
from support.processes import Script
from support.supervisors import lines, supervisor

NOOP = "support.workers:noop"
SLEEP = "support.workers:sleep_until_stopped"
IGNORE = "support.workers:ignore_sigterm"
BUSY = "support.workers:busy_until_killed"
LINGER = "support.lifecycle_workers:linger"

MODES = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}


@pytest.fixture
def startup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Startup:
    return Startup(tmp_path / "startup", monkeypatch)


def ready(client: Client, entry: str = SLEEP, *args: object, **fields: object) -> WorkerHandle:
    handle = client.register(entry, *args, **fields)
    assert handle.wait_for_ready(30) is HandleStatus.STARTED
    return handle


def ending(handle: WorkerHandle) -> tuple[str, int | None]:
    """How it ended: can be told even when the supervisor is gone."""
    outcome = handle.outcome
    assert outcome is not None
    assert outcome.final
    return outcome.kind, outcome.signal if outcome.exitcode is None else outcome.exitcode


def gone(client: Client) -> None:
    """Wait for the end of a supervisor that was asked to stop."""
    poll_until(client._view.supervisor_gone)


def mode(client: Client) -> ShutdownMode:
    return ShutdownMode(client._view.phase >> 8 & 0xFF)


TERMINATED = ("exited", 1)  # by SIGTERM
QUIT = ("exited", 2)  # by SIGQUIT


# -- smart -----------------------------------------------------------------------------------------


def test_H01_a_smart_stop_serves_the_clients_that_are_there_until_the_last_has_gone(
    tmp_path: Path,
) -> None:
    restarts = tmp_path / "restarts"
    with (
        supervisor() as client,
        ClientProcess(client.address) as one,
        ClientProcess(client.address) as two,
        ClientProcess(client.address, attached=False) as late,
    ):
        worker = ready(client)
        repeated = client.register(
            "support.workers:append_and_exit", str(restarts), "x", 1, restart_time=0.02
        )
        ask_to_stop(client, "smart")
        poll_until(lambda: mode(client) is ShutdownMode.SMART)
        assert client.phase is Phase.RUNNING

        # New processes are refused ...
        with pytest.raises(AttachError, match="refused"):
            late.attach()
        # ... while registrations, waits, restarts and further connections go on.
        for other in (one, two):
            handle = other.call("register", NOOP)
            assert other.call_handle(handle, "wait_until_gone", 30).exitcode == 0
        so_far = len(lines(restarts))
        poll_until(lambda: len(lines(restarts)) > so_far)
        with client.watch(worker):  # a connection of its own
            one.end()
            handle = two.call("register", NOOP)
            assert two.call_handle(handle, "wait_until_gone", 30).exitcode == 0
        assert worker.status() is HandleStatus.STARTED
        assert worker.outcome is None

        two.end()
        gone(client)
        assert ending(worker) == TERMINATED
        assert repeated.outcome is not None
        assert repeated.outcome.final


def test_H01_a_client_that_dies_is_no_longer_waited_for() -> None:
    with supervisor() as client, ClientProcess(client.address) as other:
        worker = ready(client)
        ask_to_stop(client, "smart")
        poll_until(lambda: mode(client) is ShutdownMode.SMART)
        assert client.register(NOOP).wait_until_gone(30).exitcode == 0
        other.kill()
        gone(client)
        assert ending(worker) == TERMINATED


def test_H01_whoever_asks_for_a_smart_stop_is_not_waited_for() -> None:
    with supervisor() as client, ClientProcess(client.address) as other:
        other.begin("stop", "smart", 30)
        poll_until(lambda: mode(client) is ShutdownMode.SMART)
        # Two that ask do not wait for each other either.
        client.stop("smart", timeout=30)
        other.finish()


def test_H01_workers_are_not_waited_for_even_if_they_are_clients() -> None:
    with supervisor() as client:
        worker = ready(client, "support.lifecycle_workers:be_a_client", flags=Flags.SHMEM_ACCESS)
        outsider = ready(client, "support.lifecycle_workers:attach_and_sleep")
        client.stop("smart", timeout=30)
        assert ending(worker) == ending(outsider) == TERMINATED


def test_H01_a_worker_may_become_a_client_during_a_smart_stop(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with supervisor() as client, ClientProcess(client.address) as other:
        ask_to_stop(client, "smart")
        poll_until(lambda: mode(client) is ShutdownMode.SMART)
        for flags, entry in (
            (Flags.SHMEM_ACCESS, "be_a_client"),
            (Flags.NONE, "attach_and_sleep"),
        ):
            ready(client, f"support.lifecycle_workers:{entry}", str(path), flags=flags)
        assert lines(path) == ["be_a_client", "attach_and_sleep"]
        other.end()
        gone(client)


def test_H01_a_crash_during_a_smart_stop_is_followed_by_a_reset() -> None:
    with supervisor() as client, ClientProcess(client.address) as other:
        worker = ready(client, flags=Flags.SHMEM_ACCESS, restart_time=3600)
        ask_to_stop(client, "smart")
        poll_until(lambda: mode(client) is ShutdownMode.SMART)
        old = worker.pid
        assert old is not None
        os.kill(old, signal.SIGKILL)
        poll_until(lambda: worker.pid not in (None, old))
        other.end()
        gone(client)
        assert ending(worker) == TERMINATED


# -- fast ------------------------------------------------------------------------------------------


def test_H02_a_fast_stop_sends_sigterm_once_to_each_worker_and_its_group(tmp_path: Path) -> None:
    path, path_of_linger = tmp_path / "signals", tmp_path / "linger"
    with supervisor() as client:
        family = ready(client, "support.lifecycle_workers:record_sigterm_with_a_child", str(path))
        plain = ready(client)
        linger = ready(client, LINGER, str(path_of_linger))
        linger.terminate()  # it has had its SIGTERM already
        poll_until(lambda: lines(path_of_linger))
        another = ready(client, LINGER, str(path_of_linger))
        ask_to_stop(client, "fast")
        poll_until(lambda: len(lines(path_of_linger)) == 2)
        ask_to_stop(client, "fast")
        another.terminate()
        assert family.wait_until_gone(30).exitcode == 0
        assert plain.wait_until_gone(30).exitcode == 1
        assert sorted(lines(path)) == ["child", "worker"]
        # The supervisor waits for the two, as long as they need.
        assert linger.status() is another.status() is HandleStatus.STARTED
        Path(f"{path_of_linger}.release").touch()
        client.stop("fast", timeout=30)
        assert ending(linger) == ending(another) == ("exited", 0)
        assert lines(path_of_linger) == ["asked to stop"] * 2


def test_H02_a_worker_with_a_stop_timeout_is_killed_when_it_is_over() -> None:
    with supervisor() as client:
        stubborn = ready(client, IGNORE, stop_timeout=0.2)
        patient = ready(client, SLEEP, stop_timeout=0.2)
        client.stop("fast", timeout=30)
        assert ending(stubborn) == ("signaled", signal.SIGKILL)
        assert ending(patient) == TERMINATED


def test_H02_without_a_stop_timeout_a_fast_stop_waits_for_ever_and_immediate_helps() -> None:
    with supervisor() as client:
        stubborn = ready(client, IGNORE)
        plain = ready(client)
        with pytest.raises(WaitTimeoutError):
            client.stop("fast", timeout=0.3)
        assert plain.wait_until_gone(30).exitcode == 1
        assert stubborn.status() is HandleStatus.STARTED
        client.stop("immediate", timeout=30)
        assert ending(stubborn) == QUIT


def test_H02_a_fast_stop_reaches_the_startup_worker(
    startup: Startup, capfd: pytest.CaptureFixture[str]
) -> None:
    log = Log(capfd)
    client = Supervisor(startup=startup.entry).start()
    startup.wait_for_run(1)
    waiting = client.register(NOOP)
    client.stop("fast", timeout=30)
    assert client._process is not None
    assert client._process.returncode == 0  # its death was our own doing
    assert ending(waiting)[0] == "cancelled"
    log.wait_for("startup worker exited with exit code 1")
    client.close()


def test_H02_a_member_that_crashes_during_a_fast_stop_makes_it_an_abnormal_one(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log, path = Log(capfd), tmp_path / "linger"
    with supervisor() as client:
        outside = ready(client, LINGER, str(path))
        stubborn = ready(client, IGNORE, flags=Flags.SHMEM_ACCESS)
        other = ready(client, LINGER, str(path), flags=Flags.SHMEM_ACCESS)
        ask_to_stop(client, "fast")
        poll_until(lambda: len(lines(path)) == 2)
        pid = stubborn.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        other.wait_until_gone(30)
        assert ending(other) == QUIT
        assert outside.status() is HandleStatus.STARTED  # not its memory
        Path(f"{path}.release").touch()
        client.stop("fast", timeout=30)
        assert client._process is not None
        assert client._process.returncode == 1
        log.wait_for("abnormal shutdown")


# -- immediate -------------------------------------------------------------------------------------


def test_H03_an_immediate_stop_sends_sigquit_and_kills_what_is_left_after_the_grace_period(
    capfd: pytest.CaptureFixture[str],
) -> None:
    log = Log(capfd)
    with supervisor() as client:
        stubborn = ready(client, "support.lifecycle_workers:ignore_all_signals")
        workers = [ready(client, entry) for entry in (SLEEP, IGNORE, BUSY)]
        members = [ready(client, flags=Flags.SHMEM_ACCESS, restart_time=0) for _ in range(2)]
        client.stop("immediate", timeout=30)
        assert {ending(h) for h in (*workers, *members)} == {QUIT}
        assert ending(stubborn) == ("signaled", signal.SIGKILL)
        log.wait_for("supervisor is shut down")
        # Nobody calls that a crash.
        assert log.count("terminating the other workers") == 0


# -- what is not launched yet ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "when",
    [
        pytest.param("before", id="H04_registered_before"),
        pytest.param("after", id="H05_registered_after"),
    ],
)
def test_H04_H05_a_worker_that_waits_for_one_never_launched_does_not_hold_up_the_stop(
    when: str, startup: Startup, tmp_path: Path
) -> None:
    path = tmp_path / "log"
    with supervisor(startup=startup.entry) as client:
        startup.consistent()
        poll_until(lambda: client.phase is Phase.CONSISTENT)
        waiting = client.register(NOOP)  # this process waits for one as well
        worker = ready(
            client,
            "support.lifecycle_workers:wait_for_helper_when_stopped",
            str(path),
            when,
            flags=Flags.SHMEM_ACCESS,
            start_time=StartTime.CONSISTENT_STATE,
        )
        client.stop("fast", timeout=30)
        assert ending(worker) == ("exited", 0)
        assert lines(path) == ["STOPPED cancelled before it started"]
        assert ending(waiting)[0] == "cancelled"


def test_H05_a_registration_after_the_stop_began_is_cancelled_and_its_waiter_released(
    tmp_path: Path,
) -> None:
    path = tmp_path / "linger"
    with supervisor() as client, ClientProcess(client.address) as other:
        ready(client, LINGER, str(path))
        ask_to_stop(client, "fast")
        poll_until(lambda: client.phase is Phase.STOPPING)
        mine, theirs = client.register(NOOP), other.call("register", NOOP, restart_time=1)
        assert mine.wait_for_startup(30) is HandleStatus.STOPPED
        assert mine.wait_until_gone(30).kind == "cancelled"
        assert other.call_handle(theirs, "wait_for_shutdown", 30) is HandleStatus.STOPPED
        with paused(client):  # noticed by nobody until the last worker is gone
            last = client.register(NOOP)
            Path(f"{path}.release").touch()
        assert last.wait_for_shutdown(30) is HandleStatus.STOPPED
        gone(client)


# -- one request after the other -------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(MODES)), ids=" ".join)
def test_H06_of_several_requests_at_once_the_strongest_is_obeyed(order: tuple[str, ...]) -> None:
    with supervisor() as client:
        worker = ready(client, IGNORE)
        with paused(client):
            for each in order:
                ask_to_stop(client, each)
        gone(client)
        assert ending(worker) == QUIT


def test_H06_of_several_signals_at_once_the_strongest_is_obeyed() -> None:
    with supervisor() as client:
        worker = ready(client, IGNORE)
        with paused(client):
            for number in MODES.values():  # pending signals are in no order
                os.kill(client.supervisor_pid, number)
        gone(client)
        assert ending(worker) == QUIT


@pytest.mark.parametrize(
    ("first", "second"), list(itertools.permutations(MODES, 2)), ids=lambda mode: mode
)
def test_H06_a_stronger_request_overrides_a_weaker_one_and_never_the_reverse(
    first: str, second: str, tmp_path: Path
) -> None:
    path = tmp_path / "linger"
    strongest = max(first, second, key=list(MODES).index)
    with supervisor() as client, ClientProcess(client.address) as other:
        # This one goes at SIGTERM when it is allowed to; of SIGQUIT it takes no notice, for less
        # than the five seconds until SIGKILL.
        worker = ready(client, "support.lifecycle_workers:linger_through_sigquit", str(path))
        for each in (first, second):
            other.begin("stop", each, 0)
            with pytest.raises(WaitTimeoutError):
                other.finish()
        poll_until(lambda: mode(client) is ShutdownMode[strongest.upper()])
        if strongest == "fast":
            poll_until(lambda: lines(path))
            assert lines(path) == ["SIGTERM"]
        else:
            poll_until(lambda: "SIGQUIT" in lines(path))
        # The supervisor has been round since: whatever the second brings about has come by now.
        for _ in range(2):
            assert client.register(NOOP).wait_for_shutdown(30) is HandleStatus.STOPPED
        assert mode(client) is ShutdownMode[strongest.upper()]
        if (first, second) == ("immediate", "fast"):
            assert lines(path) == ["SIGQUIT"]
        assert worker.status() is HandleStatus.STARTED
        Path(f"{path}.release").touch()
        gone(client)


@pytest.mark.parametrize("mode", MODES)
def test_a_signal_to_the_supervisor_asks_for_the_shutdown_of_its_kind(
    mode: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the foreground, as a service manager would run it."""
    log = Log(capfd)
    with Script("from pgbgw import Supervisor\nraise SystemExit(Supervisor().run())") as running:
        client = poll_until(try_attach)
        worker = ready(client)
        os.kill(running.pid, MODES[mode])
        log.wait_for(f"received {MODES[mode].name} from process {os.getpid()}")
        log.wait_for(f"received {mode} shutdown request")
        if mode == "smart":
            assert client.register(NOOP).wait_until_gone(30).exitcode == 0
            assert worker.status() is HandleStatus.STARTED
            client.close()
        assert running.wait() == 0
        if mode != "smart":
            assert ending(worker) == {"fast": TERMINATED, "immediate": QUIT}[mode]
            client.close()


def try_attach() -> Client | None:
    try:
        return attach("default")
    except AttachError:
        return None


@pytest.mark.parametrize("mode", MODES)
def test_a_stop_during_the_pause_before_a_reset_is_obeyed_at_once(mode: str) -> None:
    with supervisor() as client:
        worker = ready(client, flags=Flags.SHMEM_ACCESS, restart_time=0)
        for _ in range(6):  # the last pause takes a seventh of a second or so
            old = poll_until(lambda: worker.ready and worker.pid)
            os.kill(old, signal.SIGKILL)
            poll_until(lambda: worker.pid != old)  # noqa: B023
        client.stop(mode, timeout=30)
        assert client._process is not None
        assert client._process.returncode == 0
        # Unless we were so slow that the pause was over.
        assert ending(worker) in (("signaled", signal.SIGKILL), TERMINATED, QUIT)


# -- restarts --------------------------------------------------------------------------------------


def test_H07_a_restartable_worker_that_ends_because_of_the_stop_stays_away(tmp_path: Path) -> None:
    path, log = tmp_path / "linger", tmp_path / "log"
    with supervisor() as client:
        ready(client, LINGER, str(path))
        restartable = ready(client, "support.workers:append_and_sleep", str(log), restart_time=0)
        ask_to_stop(client, "fast")
        outcome = restartable.wait_until_gone(30)
        assert (outcome.kind, outcome.exitcode, outcome.restarts) == ("exited", 1, 0)
        time.sleep(0.05)  # the restart would have come after 10 ms, and there is time for it
        assert client.phase is Phase.STOPPING
        Path(f"{path}.release").touch()
        client.stop("fast", timeout=30)
        assert len(lines(log)) == 1


# -- the death of the supervisor, and of its owner -------------------------------------------------


@pytest.mark.leaves_sockets
def test_H08_no_worker_outlives_its_supervisor_or_keeps_the_next_from_starting(
    tmp_path: Path,
) -> None:
    path = tmp_path / "signals"
    client = Supervisor(address="again", max_worker_processes=16).start()
    workers = [
        ready(client, entry, flags=flags)
        for entry in (SLEEP, BUSY, IGNORE, "support.lifecycle_workers:ignore_all_signals")
        for flags in (Flags.NONE, Flags.SHMEM_ACCESS)
    ]
    # And one that has forked.
    workers.append(
        ready(client, "support.lifecycle_workers:record_sigterm_with_a_child", str(path))
    )
    (child,) = lines(f"{path}.child")
    with processes(*(h.pid for h in workers), int(child)) as found:
        os.kill(client.supervisor_pid, signal.SIGKILL)
        for process in found:
            process.wait()
    assert {h.status() for h in workers} == {HandleStatus.SUPERVISOR_DIED}
    client.stop("fast")  # reaps it
    with Supervisor(address="again") as successor:
        assert successor.epoch != client.epoch
        assert successor.register(NOOP).wait_until_gone(30).exitcode == 0
        assert {h.status() for h in workers} <= {
            HandleStatus.SUPERVISOR_DIED,
            HandleStatus.STOPPED,
        }
    client.close()


OWNER = """
from pgbgw import Supervisor

client = Supervisor(address="owned").start()
test.send(client.supervisor_pid)
test.recv()
"""


@contextmanager
def owned_supervisor() -> Iterator[tuple[Script, Client]]:
    """A supervisor of another process, and that process."""
    with ExitStack() as stack:
        owner = stack.enter_context(Script(OWNER))
        owner.hear()
        client = stack.enter_context(attach("owned"))
        yield owner, client


def test_a_started_supervisor_stops_when_its_owner_dies(
    capfd: pytest.CaptureFixture[str],
) -> None:
    log = Log(capfd)
    with owned_supervisor() as (owner, client):
        worker = ready(client)
        owner.kill()
        gone(client)
        assert ending(worker) == TERMINATED
        log.wait_for("the owner of this supervisor is gone")
        log.wait_for("received fast shutdown request")


def test_half_a_second_after_its_owners_death_the_supervisor_stops_immediately() -> None:
    with owned_supervisor() as (owner, client):
        stubborn, plain = ready(client, IGNORE), ready(client)
        owner.kill()
        gone(client)
        assert ending(stubborn) == QUIT
        assert ending(plain) == TERMINATED


def test_a_foreground_supervisor_has_no_owner() -> None:
    """Whoever started `run` may go."""
    code = """
    import os, subprocess, sys
    run = "from pgbgw import Supervisor; raise SystemExit(Supervisor().run())"
    process = subprocess.Popen([sys.executable, "-P", "-c", run])
    test.send(process.pid)
    """
    with Script(code) as starter, processes(starter.hear()) as (running,):
        client = poll_until(try_attach)
        starter.kill()
        assert client.register(NOOP).wait_until_gone(30).exitcode == 0
        assert not running.gone
        client.stop("fast", timeout=30)
        client.close()
        running.wait()
