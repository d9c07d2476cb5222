"""Who dies with whom: what workers have started, when they are terminated, end, crash, or lose
their supervisor.

docs/security.md has the same as a table.  Where something survives, the test says so: a reader must
be able to rely on that, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pgbgw import (
    BackgroundWorker,
    Client,
    Flags,
    StartError,
    Supervisor,
    WorkerHandle,
)
from support import poll_until
from support.control import Log, ask_to_stop
from support.family_workers import KINDS
from support.processes import fork_as, is_alive, kill_supervisor, pending_signals, signals_of
from support.supervisors import lines, supervisor

FAMILY = "support.family_workers:have_family"
NOOP = "support.workers:noop"
EVERYBODY = list(KINDS)
# Bound to their parent by the parent-death signal, one to the next.
BOUND = {"bound_program", "fork", "fork_of_a_fork", "multiprocessing_fork"}
# In the worker's process group.
GROUP = {"program", "stubborn_program", "fork_of_another_thread"} | BOUND
FREE = {"program_in_its_own_session"}
# Bound to the fork in the middle, which goes: so it goes with that, and never stays.
NEVER = {"daemon"}


class Family:
    """The children of one worker, by kind; killed at the end of the test."""

    def __init__(self, client: Client, path: Path, kinds: list[str], *args: str, **fields: object):
        self.path = path
        self.handle = client.register(FAMILY, str(path), kinds, *args, **fields)
        self.handle.wait_for_ready(30)
        poll_until(path.exists)
        self.processes = {}
        for kind, pid in json.loads(path.read_text()).items():
            with contextlib.suppress(psutil.NoSuchProcess):
                self.processes[kind] = psutil.Process(pid)

    def alive(self) -> set[str]:
        # Identified by number and start time.
        return {
            kind
            for kind, process in self.processes.items()
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        }

    def settles_at(self, expected: set[str]) -> None:
        poll_until(lambda: self.alive() <= expected, message=f"{self.alive()} <= {expected}")
        time.sleep(0.1)  # whoever is to stay is not just a little slow to go
        assert self.alive() == expected

    def __enter__(self) -> Family:
        return self

    def __exit__(self, *args: object) -> None:
        for process in self.processes.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def all_of(client: Client, tmp_path: Path, *args: str, **fields: object) -> Family:
    return Family(client, tmp_path / "family", EVERYBODY, *args, **fields)


# --- one worker --------------------------------------------------------------------------------


def test_terminate_signals_the_worker_alone_and_its_forks_follow_it(tmp_path: Path) -> None:
    with supervisor() as client, all_of(client, tmp_path) as family:
        family.settles_at(set(EVERYBODY) - NEVER)
        family.handle.terminate()
        assert family.handle.wait_until_gone(30).exitcode == 0
        family.settles_at((GROUP | FREE) - BOUND)


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
@pytest.mark.parametrize("end", ["obey", "ignore"])
def test_terminate_with_a_grace_period_takes_the_process_group_along(
    end: str, start_method: str, tmp_path: Path
) -> None:
    with (
        supervisor(start_method=start_method) as client,
        all_of(client, tmp_path, end) as family,
    ):
        family.handle.terminate(grace=0.1 if end == "ignore" else 60)
        outcome = family.handle.wait_until_gone(30)
        if end == "ignore":
            assert outcome.signal == signal.SIGKILL
        else:
            assert outcome.exitcode == 0  # in good time: that the others were killed is not its end
        family.settles_at(FREE)


def test_a_worker_that_obeys_at_once_still_takes_its_group_along(tmp_path: Path) -> None:
    """However soon it is gone, the supervisor knows by then what was asked for."""
    with supervisor() as client:
        for n in range(10):
            with Family(client, tmp_path / str(n), ["program"]) as family:
                family.handle.terminate(grace=60)
                family.handle.wait_until_gone(30)
                family.settles_at(set())


def test_a_stop_timeout_is_a_grace_period(tmp_path: Path) -> None:
    with supervisor() as client, all_of(client, tmp_path, stop_timeout=60) as family:
        family.handle.terminate()
        family.handle.wait_until_gone(30)
        family.settles_at(FREE)


@pytest.mark.parametrize("end", ["return", "crash"])
def test_a_worker_that_ends_by_itself_leaves_what_is_not_bound_to_it(
    end: str, tmp_path: Path
) -> None:
    with supervisor() as client, all_of(client, tmp_path, end, stop_timeout=1) as family:
        family.handle.wait_until_gone(30)
        family.settles_at((GROUP | FREE) - BOUND)


# --- shutdown ----------------------------------------------------------------------------------


def test_a_fast_stop_asks_the_group_and_who_does_not_listen_stays(tmp_path: Path) -> None:
    with supervisor() as client, all_of(client, tmp_path) as family:
        client.stop("fast", timeout=30)
        family.settles_at(FREE | {"stubborn_program"})


def test_a_fast_stop_with_a_stop_timeout_leaves_nobody_in_the_group(tmp_path: Path) -> None:
    with supervisor() as client, all_of(client, tmp_path, stop_timeout=60) as family:
        client.stop("fast", timeout=30)
        family.settles_at(FREE)


def test_an_immediate_stop_leaves_nobody_in_the_group(tmp_path: Path) -> None:
    with supervisor() as client, all_of(client, tmp_path) as family:
        client.stop("immediate", timeout=30)
        family.settles_at(FREE)


def test_a_fast_stop_asks_the_group_of_a_worker_that_was_terminated_before(
    tmp_path: Path,
) -> None:
    path = tmp_path / "family"
    with supervisor() as client:
        handle = client.register("support.family_workers:wait_for_its_program", str(path))
        handle.wait_for_ready(30)
        other = Family(client, tmp_path / "other", ["program"], "ignore")
        with other:
            handle.terminate()
            poll_until(Path(f"{path}.asked").exists)
            assert is_alive(json.loads(path.read_text())["program"])
            ask_to_stop(client, "fast")
            # Its program was asked to stop, which it was waiting for; it was not asked again.
            assert handle.wait_until_gone(30).exitcode == 11
            poll_until(lambda: lines(f"{other.path}.signals") == ["worker"])
            client.stop("immediate", timeout=30)


# --- the end of the supervisor -----------------------------------------------------------------


@pytest.mark.leaves_sockets
def test_with_a_killed_supervisor_go_workers_and_whoever_is_bound_to_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = Log(capfd)
    client = Supervisor(address="again").start()
    with all_of(client, tmp_path) as family:
        kill_supervisor(client)
        family.settles_at((GROUP | FREE) - BOUND)
        client.stop("fast")  # reaps it
        # The next supervisor starts all the same.  It warns of a fork that nobody could bind, and
        # not of programs: those have no part in the lock of the workers.
        stray = family.processes["fork_of_another_thread"]
        with supervisor(address="again") as successor:
            line = log.wait_for("workers of an earlier supervisor are still running")
            assert f"(pid {stray.pid})" in line
            stray.kill()
            assert successor.register(NOOP).wait_until_gone(30).exitcode == 0
        client.close()
        family.settles_at({"program", "stubborn_program", "program_in_its_own_session"})
        with supervisor(address="again"):
            pass
        assert log.count("are still running") == 1


# --- strangers ---------------------------------------------------------------------------------


def stand_by() -> None:
    os.setsid()
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while True:
        time.sleep(3600)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_group_that_got_the_number_of_a_dead_worker_is_never_signalled(
    mode: str, tmp_path: Path
) -> None:
    """All signals to a group are sent before its leader is reaped, so the number cannot be
    another's; and nothing is left that could be sent later."""
    with supervisor() as client, Family(client, tmp_path / "family", ["program"]) as family:
        pid = family.handle.pid
        assert pid is not None
        family.handle.terminate(grace=0.2)
        family.handle.wait_until_gone(30)
        stranger = fork_as(pid, stand_by)
        if stranger is None:
            pytest.skip("may not choose the number of a process")
        try:
            poll_until(lambda: os.getpgid(pid) == pid and len(signals_of(pid, "SigBlk")) > 50)
            family.handle.terminate(grace=0)
            time.sleep(0.3)  # the grace period is over by now
            client.stop(mode, timeout=30)
            assert pending_signals(pid) == set()
        finally:
            os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(AssertionError):  # it dies without a word
                stranger()


# --- cgroups -----------------------------------------------------------------------------------


def own_cgroup() -> str | None:
    """The directory of our own cgroup of version 2."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    root = next((fields[1] for fields in mounts if fields[2] == "cgroup2"), None)
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if root is not None and line.startswith("0::"):
            return root + line.removeprefix("0::").rstrip("/")
    return None


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup that is ours to use, inside of our own."""
    own = own_cgroup()
    if own is None:
        pytest.skip("there is no cgroup of version 2")
    path = Path(own, f"pgbgw-test.{os.getpid()}")
    try:
        path.mkdir()
    except OSError as exc:
        pytest.skip(f"cgroups cannot be made here: {exc.strerror}")
    try:
        if not (path / "cgroup.kill").exists():
            pytest.skip("this kernel has no cgroup.kill")
        yield path
        assert [p.name for p in path.iterdir() if p.is_dir()] == [], "groups were left behind"
    finally:
        with contextlib.suppress(OSError):
            (path / "cgroup.kill").write_text("1")

        def gone() -> bool:
            for directory, _, _ in os.walk(path, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
            return not path.exists()

        poll_until(gone)


Ending = Callable[[Client, WorkerHandle], object]
ENDINGS: dict[str, Ending] = {
    "terminate": lambda client, handle: handle.terminate(),
    "grace": lambda client, handle: handle.terminate(grace=0),
    "killed": lambda client, handle: os.kill(handle.pid or 0, signal.SIGKILL),
    "fast": lambda client, handle: client.stop("fast", timeout=30),
    "immediate": lambda client, handle: client.stop("immediate", timeout=30),
}


@pytest.mark.parametrize(
    ("start_method", "ending"), [("spawn", "terminate"), *(("fork", name) for name in ENDINGS)]
)
def test_in_a_cgroup_everybody_goes_with_the_worker(
    start_method: str, ending: str, cgroup: Path, tmp_path: Path
) -> None:
    with (
        supervisor(start_method=start_method, cgroup=cgroup) as client,
        all_of(client, tmp_path) as family,
    ):
        bystander = client.register("support.workers:sleep_until_stopped")
        bystander.wait_for_ready(30)
        ENDINGS[ending](client, family.handle)
        family.handle.wait_until_gone(30)
        family.settles_at(set())
        if ending not in ("fast", "immediate"):
            assert bystander.pid is not None


def test_in_a_cgroup_even_those_who_run_from_process_to_process_are_caught(
    cgroup: Path, tmp_path: Path
) -> None:
    script, stop, ran = tmp_path / "runner", tmp_path / "stop", tmp_path / "runner.ran"
    script.write_text(
        '#!/bin/sh\n[ -e "$1" ] && exit\necho >> "$0.ran"\nsleep 0.01\nsetsid "$0" "$1" &\n'
    )
    script.chmod(0o700)
    try:
        with supervisor(cgroup=cgroup) as client:
            handle = client.register(
                "support.family_workers:release_runners", str(script), str(stop)
            )
            handle.wait_for_ready(30)
            poll_until(lambda: ran.exists() and ran.stat().st_size > 20)
            (line,) = (
                line
                for line in Path(f"/proc/{handle.pid}/cgroup").read_text().splitlines()
                if line.startswith("0::")
            )
            (group,) = cgroup.glob(f"*/{line.rpartition('/')[2]}")
            handle.terminate(grace=0)
            handle.wait_until_gone(30)

            def removed() -> bool:
                """It can be only when nobody is in it."""
                client.register(NOOP).wait_until_gone(30)
                return not group.exists()

            poll_until(removed)
            size = ran.stat().st_size
            time.sleep(0.1)
            assert ran.stat().st_size == size
    finally:
        stop.touch()


def test_many_workers_leave_no_group_behind(cgroup: Path) -> None:
    with supervisor(cgroup=cgroup, max_worker_processes=16, spares=0) as client:
        for _ in range(5):
            handles = client.register_many([BackgroundWorker(entry=NOOP) for _ in range(16)])
            assert client.wait(handles, 30, "ALL_GONE")[1] == set()
        (group,) = (path for path in cgroup.iterdir() if path.is_dir())

        def tidy() -> bool:
            """One that its last process was slow to leave goes with the next."""
            client.register(NOOP).wait_until_gone(30)
            return sum(path.is_dir() for path in group.iterdir()) <= 1

        poll_until(tidy)


@pytest.mark.leaves_sockets
def test_what_a_killed_supervisor_left_in_its_cgroup_goes_with_the_next_start(
    cgroup: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = Log(capfd)
    client = Supervisor(cgroup=cgroup).start()
    with (
        supervisor(cgroup=cgroup) as other,
        Family(other, tmp_path / "other", ["program_in_its_own_session"]) as others,
        all_of(client, tmp_path, flags=Flags.SHMEM_ACCESS) as family,
    ):
        kill_supervisor(client)
        family.settles_at((GROUP | FREE) - BOUND)
        with supervisor(cgroup=cgroup) as successor:
            family.settles_at(set())
            assert successor.register(NOOP).wait_until_gone(30).exitcode == 0
            log.wait_for("killed what a dead supervisor left in cgroup")
        # That of a supervisor that lives is left alone.
        assert others.alive() == {"program_in_its_own_session"}
    client.stop("fast")
    client.close()


@pytest.mark.parametrize("place", ["missing", "no cgroup"])
def test_a_directory_that_cannot_be_used_is_a_clear_error(place: str, tmp_path: Path) -> None:
    directory = tmp_path / "missing" if place == "missing" else tmp_path
    with pytest.raises(StartError, match="for the workers' control groups") as caught:
        Supervisor(cgroup=directory).start()
    assert caught.value.detail == "No such file or directory"
    assert "cgroup v2" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []
