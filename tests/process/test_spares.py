"""Spares: processes that wait for a worker to be, and what must not be different with them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from pgbgw import Client, Flags, HandleStatus
from support import poll_until, spare_workers, workers
from support.processes import kill_supervisor
from support.supervisors import lines, supervisor

METHODS = pytest.mark.parametrize("start_method", ["fork", "spawn"])


def spares(client: Client, count: int) -> set[int]:
    """The pids of the spares, once there are so many: of the children that are nobody's worker."""

    def waiting() -> set[int]:
        children = psutil.Process(client.supervisor_pid).children()
        named = {child.pid for child in children if child.name() != "pgbgw: log"}
        return named - {info.pid for info in client.workers() if info.pid is not None}

    poll_until(lambda: len(waiting()) == count)
    return waiting()


@METHODS
def test_a_worker_is_a_spare_that_was_there_before_and_another_takes_its_place(
    start_method: str,
) -> None:
    with supervisor(spares=2, start_method=start_method) as client:
        before = spares(client, 2)
        handle = client.register(workers.sleep_until_stopped)
        handle.wait_for_ready(30)
        assert handle.pid in before
        assert len(spares(client, 2) - before) == 1
        handle.terminate()
        assert handle.wait_until_gone(30).exitcode == 1


def test_more_workers_than_spares_are_all_started() -> None:
    with supervisor(spares=1, max_worker_processes=16) as client:
        handles = [client.register(workers.noop) for _ in range(16)]
        assert [h.wait_until_gone(30).exitcode for h in handles] == [0] * 16


def test_a_spare_is_one_worker_only(tmp_path: Path) -> None:
    """What a worker leaves in its modules, the next one does not find."""
    path = str(tmp_path / "seen")
    with supervisor(spares=1) as client:
        for _ in range(5):
            assert client.register(spare_workers.count, path).wait_until_gone(30).exitcode == 0
    assert lines(path) == ["1"] * 5


@METHODS
def test_a_spare_learns_all_that_a_fork_would_know(start_method: str, tmp_path: Path) -> None:
    path = str(tmp_path / "told")
    with supervisor(spares=2, start_method=start_method, shared_memory=4096) as client:
        spares(client, 2)
        handle = client.register(
            spare_workers.tell,
            path,
            name="told",
            main_arg=7,
            extra=b"extra",
            env={"PGBGW_TEST_TOLD": "yes"},
            flags=Flags.SHMEM_ACCESS,
            restart_time=0,
        )
        poll_until(lambda: len(lines(path)) >= 2)
        handle.terminate()
        slot = f"{handle.slot}/{handle.generation}"
    first, second = lines(path)[:2]
    assert first == f"told {slot} 7 b'extra' yes 4096 None"
    assert second == f"told {slot} 7 b'extra' yes 4096 exited with code 1"


def test_a_spare_that_dies_is_replaced_and_missed_by_nobody() -> None:
    with supervisor(spares=2) as client:
        for pid in spares(client, 2):
            os.kill(pid, signal.SIGKILL)
            poll_until(lambda pid=pid: not psutil.pid_exists(pid))  # type: ignore[misc]
        assert client.register(workers.noop).wait_until_gone(30).exitcode == 0
        spares(client, 2)


def test_after_a_reset_spares_get_the_new_memory_of_the_domain(tmp_path: Path) -> None:
    path = str(tmp_path / "seen")
    with supervisor(spares=2, shared_memory=4096) as client:
        spares(client, 2)
        for _ in range(2):
            crashing = client.register(spare_workers.dirty, path, flags=Flags.SHMEM_ACCESS)
            assert crashing.wait_until_gone(30).signal == signal.SIGKILL
        assert client.register(workers.noop, flags=Flags.SHMEM_ACCESS).wait_until_gone(30)
    assert lines(path) == ["0", "0"]


@pytest.mark.leaves_sockets
def test_spares_die_with_the_supervisor() -> None:
    with supervisor(spares=3) as client:
        waiting = [psutil.Process(pid) for pid in spares(client, 3)]
        kill_supervisor(client)
        assert psutil.wait_procs(waiting, 30)[1] == []


@pytest.mark.parametrize("mode", ["smart", "fast", "immediate"])
def test_spares_hold_up_no_stop(mode: str) -> None:
    with supervisor(spares=3) as client:
        waiting = [psutil.Process(pid) for pid in spares(client, 3)]
        worker = client.register(workers.noop)
        assert worker.wait_for_shutdown(30) is HandleStatus.STOPPED
        client.stop(mode, timeout=30)
        assert psutil.wait_procs(waiting, 30)[1] == []
