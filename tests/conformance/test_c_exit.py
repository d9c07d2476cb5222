"""Conformance, group C: what the end of a process means, and when it runs again."""

from __future__ import annotations

import ast
import logging
import os
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import pgbgw
from pgbgw import Client, Flags, HandleStatus, NoFreeSlotError, Outcome, WorkerHandle
from support import poll_until
from support.control import Faults, Log
from support.supervisors import lines, supervisor

NOOP = "support.workers:noop"
SLEEP = "support.workers:sleep_until_stopped"
NOTE_TIMES = "support.lifecycle_workers:note_times"


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(tmp_path / "faults", monkeypatch)


@pytest.fixture
def debug_level() -> Iterator[None]:
    logger = logging.getLogger("pgbgw")
    before = logger.level
    logger.setLevel(logging.DEBUG)
    yield
    logger.setLevel(before)


class Runs:
    """What support.lifecycle_workers:note_times has left in a file."""

    def __init__(self, path: str | Path) -> None:
        self._rows = [[int(word) for word in line.split()] for line in lines(path)]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def pids(self) -> list[int]:
        return [pid for pid, _, _ in self._rows]

    @property
    def gaps(self) -> list[float]:
        """Seconds from each end to the next start."""
        return [(later[1] - earlier[2]) / 1e9 for earlier, later in pairwise(self._rows)]


def sleepers(client: Client) -> dict[str, WorkerHandle]:
    """Workers that must survive: one in the crash domain, one outside."""
    found = {
        "inside": client.register(SLEEP, flags=Flags.SHMEM_ACCESS, restart_time=3600),
        "outside": client.register(SLEEP, restart_time=3600),
    }
    for handle in found.values():
        assert handle.wait_for_ready(30) is HandleStatus.STARTED
    return found


# -- whether it runs again -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exitcode", "restart_time"),
    [
        pytest.param(0, 0, id="C01_restartable_exits_0"),
        pytest.param(1, None, id="C02_never_restart_exits_1"),
        pytest.param(57, None, id="C02_never_restart_exits_57"),
    ],
)
def test_C01_C02_an_end_for_good_frees_the_slot(exitcode: int, restart_time: float | None) -> None:
    with supervisor(max_worker_processes=1) as client:
        for _ in range(3):
            handle = client.register(
                "support.workers:exit_with", exitcode, restart_time=restart_time
            )
            assert handle.wait_for_shutdown(30) is HandleStatus.STOPPED
            outcome = handle.wait_until_gone(30)
            assert (outcome.kind, outcome.exitcode) == ("exited", exitcode)
            assert outcome.final
            assert outcome.restarts == 0
        last = client.register(SLEEP)
        with pytest.raises(NoFreeSlotError):
            client.register(NOOP)
        # Nobody comes back into the slot that is in use again.
        last.wait_for_ready(30)
        assert [info.pid for info in client.workers()] == [last.pid]


def test_C03_exit_1_is_followed_by_a_restart_after_the_interval(tmp_path: Path) -> None:
    path = tmp_path / "runs"
    with supervisor() as client:
        handle = client.register(NOTE_TIMES, str(path), 1, restart_time=0.25)
        assert handle.wait_for_shutdown(30) is HandleStatus.STOPPED
        assert handle.pid is None
        outcome = handle.outcome
        assert outcome is not None
        assert (outcome.kind, outcome.exitcode, outcome.final) == ("exited", 1, False)
        poll_until(lambda: len(lines(path)) >= 2)
        # Not from start to start: the interval begins with the exit.
        assert all(gap >= 0.25 for gap in Runs(path).gaps)
        assert len(set(Runs(path).pids)) == len(Runs(path))
        handle.terminate()
        assert handle.wait_until_gone(30).final


def test_C03_a_restarted_worker_is_told_how_its_last_run_ended(tmp_path: Path) -> None:
    for start_method in ("fork", "spawn"):
        path = tmp_path / start_method
        with supervisor(start_method=start_method) as client:
            handle = client.register(
                "support.lifecycle_workers:note_last_outcome", str(path), 7, restart_time=0
            )
            poll_until(lambda: len(lines(path)) >= 3)  # noqa: B023
            handle.terminate()
            handle.wait_until_gone(30)
        assert lines(path)[:3] == [
            "None",
            "('exited', 7, None, 0)",
            "('exited', 7, None, 1)",
        ]


def test_C04_a_sigterm_from_outside_is_followed_by_a_restart() -> None:
    with supervisor() as client:
        handle = client.register(SLEEP, restart_time=0)
        handle.wait_for_ready(30)
        first = handle.pid
        assert first is not None
        os.kill(first, signal.SIGTERM)
        poll_until(lambda: handle.pid not in (None, first))
        outcome = handle.outcome
        assert outcome is not None
        assert (outcome.kind, outcome.exitcode, outcome.final) == ("exited", 1, False)
        handle.terminate()
        assert handle.wait_until_gone(30).restarts == 1


def test_C05_with_interval_0_the_restarts_are_prompt_and_then_back_off(tmp_path: Path) -> None:
    path = tmp_path / "runs"
    with supervisor() as client:
        handle = client.register(NOTE_TIMES, str(path), 1, restart_time=0)
        poll_until(lambda: len(lines(path)) >= 6)
        handle.terminate()
        handle.wait_until_gone(30)
        # 10, 10, then 20, 40, 80 ms, each give or take a fifth.
        least = [0.010, 0.010, 0.016, 0.032, 0.064]
        assert all(gap >= low for gap, low in zip(Runs(path).gaps, least, strict=False))


def test_C05_a_long_interval_is_not_made_shorter_by_the_backoff(tmp_path: Path) -> None:
    path = tmp_path / "runs"
    with supervisor() as client:
        handle = client.register(NOTE_TIMES, str(path), 1, restart_time=0.06)
        poll_until(lambda: len(lines(path)) >= 5)
        handle.terminate()
        handle.wait_until_gone(30)
        assert all(gap >= 0.06 for gap in Runs(path).gaps)


def context_switches(pid: int) -> int:
    """How often the process has gone to sleep."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("voluntary_ctxt")]
    return int(line.split()[1])


def test_C06_each_worker_has_a_schedule_of_its_own_and_the_supervisor_sleeps(
    tmp_path: Path,
) -> None:
    quick, slow = tmp_path / "quick", tmp_path / "slow"
    with supervisor() as client:
        handles = [
            client.register(NOTE_TIMES, str(quick), 1, restart_time=0.15),
            client.register(NOTE_TIMES, str(slow), 1, restart_time=0.5),
        ]
        poll_until(lambda: all(len(lines(path)) >= 2 for path in (quick, slow)))
        assert all(gap >= 0.15 for gap in Runs(quick).gaps)
        assert all(gap >= 0.5 for gap in Runs(slow).gaps)
        handles[0].terminate()
        handles[0].wait_until_gone(30)

        # One gap alone: a few for exit, timer and launch, and one per second for the sweep.  A loop
        # that looked every 10 ms would sleep fifty times.
        runs, began = len(lines(slow)), time.monotonic()
        before = context_switches(client.supervisor_pid)
        poll_until(lambda: len(lines(slow)) > runs)
        slept = context_switches(client.supervisor_pid) - before
        assert slept < 20 + 5 * (time.monotonic() - began)
        handles[1].terminate()
        handles[1].wait_until_gone(30)


def test_C07_registrations_during_the_gap_do_not_shorten_it(tmp_path: Path) -> None:
    path = tmp_path / "runs"
    with supervisor() as client:
        handle = client.register(NOTE_TIMES, str(path), 1, restart_time=0.3)
        handle.wait_for_shutdown(30)
        meanwhile = 0
        while len(lines(path)) < 2:
            client.register(NOOP).wait_until_gone(30)
            meanwhile += 1
        assert meanwhile >= 1
        assert Runs(path).gaps[0] >= 0.3
        handle.terminate()
        handle.wait_until_gone(30)


@pytest.mark.parametrize("interval", [2_147_484, 86_400_000])
def test_C08_a_very_long_interval_is_no_short_one(interval: int, tmp_path: Path) -> None:
    path, other = tmp_path / "runs", tmp_path / "other"
    with supervisor() as client:
        handle = client.register(NOTE_TIMES, str(path), 1, restart_time=interval)
        assert handle.wait_for_shutdown(30) is HandleStatus.STOPPED
        # Had its timer been due, it would have gone before these.
        often = client.register(NOTE_TIMES, str(other), 1, restart_time=0.01)
        poll_until(lambda: len(lines(other)) >= 4)
        assert handle.status() is HandleStatus.STOPPED
        assert len(Runs(path)) == 1
        for each in (handle, often):
            each.terminate()
            each.wait_until_gone(30)


@pytest.mark.parametrize("step", [3600, -3600])
def test_C09_a_step_of_the_wall_clock_does_not_move_a_restart(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor's idea of the time of day is moved, before it starts and during the gap."""
    clock, path, other = tmp_path / "clock", tmp_path / "runs", tmp_path / "other"
    clock.write_text("0")
    monkeypatch.setenv("PGBGW_TEST_CLOCK", str(clock))
    with supervisor(preload=["support.stepped_clock"]) as client:
        soon = client.register(NOTE_TIMES, str(path), 1, restart_time=0.3)
        late = client.register(NOTE_TIMES, str(other), 1, restart_time=1000)
        for handle in (soon, late):
            handle.wait_for_shutdown(30)
        stepped = tmp_path / "stepped"
        stepped.write_text(str(step))
        stepped.rename(clock)
        poll_until(lambda: len(lines(path)) >= 2)
        assert all(gap >= 0.3 for gap in Runs(path).gaps)
        assert len(Runs(other)) == 1
        for handle in (soon, late):
            handle.terminate()
            handle.wait_until_gone(30)
        # It was really moved.
        outcome = soon.outcome
        assert outcome is not None
        assert abs(outcome.at - path.stat().st_mtime) > 3000


WALL_CLOCK = {"time", "time_ns", "localtime", "gmtime", "CLOCK_REALTIME", "datetime"}
SHOWN_ONLY = {
    # Times of registrations, launches and exits, as people read them; log lines have theirs from
    # the standard library.
    "_loop.py",
    "_serve.py",
    "_workers.py",
    # The command line, which subtracts what it has read there.
    "_show.py",
}


def test_C09_only_what_is_shown_is_read_from_the_wall_clock() -> None:
    source = Path(pgbgw.__file__).parent
    found = set()
    for path in source.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Attribute(value=ast.Name(id="time"), attr=name) if name in WALL_CLOCK:
                    found.add(path.name)
                case ast.ImportFrom(module="time" | "datetime", names=names):
                    if any(alias.name in WALL_CLOCK for alias in names):
                        found.add(path.name)
                case ast.Import(names=names) if any(a.name == "datetime" for a in names):
                    found.add(path.name)
    assert found <= SHOWN_ONLY
    # Where both clocks are read, the one does not get into the other's sums.
    for name in SHOWN_ONLY - {"_show.py"}:
        for node in ast.walk(ast.parse((source / name).read_text())):
            if isinstance(node, ast.BinOp | ast.Compare):
                assert "time.time" not in ast.unparse(node)
    # In C only a client reads it, to say when a worker was registered that nobody has noticed yet.
    for path in (*source.glob("*.h"), *source.glob("*.pyx")):
        once = path.name == "_slots_client.h"
        assert path.read_text().count("CLOCK_REALTIME") <= once


# -- what an exit means ----------------------------------------------------------------------------


def test_C10_a_normal_exit_of_the_interpreter_is_clean(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with supervisor() as client:
        others = sleepers(client)
        pids = {name: h.pid for name, h in others.items()}
        handle = client.register(
            "support.lifecycle_workers:exit_with_atexit",
            str(path),
            flags=Flags.SHMEM_ACCESS,
            restart_time=0,
        )
        outcome = handle.wait_until_gone(30)
        assert (outcome.kind, outcome.exitcode, outcome.final) == ("exited", 0, True)
        assert lines(path) == ["exits", "atexit"]
        # A reset would have come first.
        client.register(NOOP, flags=Flags.SHMEM_ACCESS).wait_until_gone(30)
        assert {name: h.pid for name, h in others.items()} == pids


@pytest.mark.parametrize("exitcode", [0, 1])
def test_C11_leaving_at_once_without_detaching_is_a_crash(exitcode: int, tmp_path: Path) -> None:
    with supervisor() as client:
        others = sleepers(client)
        pids = {name: h.pid for name, h in others.items()}
        handle = client.register("support.workers:exit_at_once", exitcode, flags=Flags.SHMEM_ACCESS)
        outcome = handle.wait_until_gone(30)
        assert (outcome.kind, outcome.exitcode) == ("exited", exitcode)
        poll_until(lambda: others["inside"].pid not in (None, pids["inside"]))
        assert others["outside"].pid == pids["outside"]


@pytest.mark.parametrize("how", ["exit 57", "SIGKILL", "SIGSEGV"])
def test_C12_a_crash_outside_the_domain_is_nobody_elses_business(how: str) -> None:
    if how == "exit 57":
        entry, ended = ("support.workers:exit_at_once", 57), ("exited", 57, None)
    else:
        number = signal.Signals[how]
        entry, ended = ("support.workers:kill_self", int(number)), ("signaled", None, number)

    def seen(outcome: Outcome | None) -> tuple[object, ...]:
        assert outcome is not None
        return (outcome.kind, outcome.exitcode, outcome.signal)

    with supervisor() as client:
        others = sleepers(client)
        pids = {name: h.pid for name, h in others.items()}
        once = client.register(*entry)
        assert seen(once.wait_until_gone(30)) == ended
        again = client.register(*entry, restart_time=0)
        poll_until(lambda: (o := again.outcome) is not None and o.restarts >= 2)
        assert seen(again.outcome) == ended
        again.terminate()
        again.wait_until_gone(30)
        client.register(NOOP, flags=Flags.SHMEM_ACCESS).wait_until_gone(30)
        assert {name: h.pid for name, h in others.items()} == pids


def test_C12_leaving_at_once_with_0_outside_the_domain_is_a_success() -> None:
    with supervisor() as client:
        others = sleepers(client)
        pids = {name: h.pid for name, h in others.items()}
        handle = client.register("support.workers:exit_at_once", 0, restart_time=0)
        outcome = handle.wait_until_gone(30)
        assert (outcome.kind, outcome.exitcode, outcome.final) == ("exited", 0, True)
        client.register(NOOP, flags=Flags.SHMEM_ACCESS).wait_until_gone(30)
        assert {name: h.pid for name, h in others.items()} == pids


def test_C13_ends_are_logged_with_type_pid_and_code_or_signal(
    debug_level: None, capfd: pytest.CaptureFixture[str]
) -> None:
    log = Log(capfd)
    with supervisor() as client:
        client.register(NOOP, name="a", type="fine").wait_until_gone(30)
        client.register("support.workers:exit_with", 7, name="b", type="odd").wait_until_gone(30)
        killed = client.register(SLEEP, name="c", type="doomed")
        killed.wait_for_ready(30)
        pid = killed.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        killed.wait_until_gone(30)

        fine = log.wait_for('worker "a"', "exited")
        assert " DEBUG1:  " in fine
        assert '(type "fine", pid ' in fine
        assert fine.endswith("exited with exit code 0")
        odd = log.wait_for('worker "b"', "exited")
        assert " LOG:  " in odd
        assert '(type "odd", pid ' in odd
        assert odd.endswith("exited with exit code 7")
        doomed = log.wait_for('worker "c"', "terminated by signal")
        assert " LOG:  " in doomed
        assert f'(type "doomed", pid {pid}, slot {killed.slot}/{killed.generation})' in doomed
        assert "signal 9: Killed" in doomed
        # PostgreSQL's other lines of a worker's life.
        for what in ("registering", "starting", "unregistering"):
            assert " DEBUG1:  " in log.wait_for(what, 'worker "a"')


def test_C13_a_success_is_not_logged_at_the_normal_level(
    capfd: pytest.CaptureFixture[str],
) -> None:
    log = Log(capfd)
    with supervisor() as client:
        client.register(NOOP, name="quiet").wait_until_gone(30)
        client.register("support.workers:exit_with", 7, name="loud").wait_until_gone(30)
        log.wait_for('worker "loud"', "exited with exit code 7")
    assert log.count("quiet") == 0


@pytest.mark.parametrize("exitcode", [0, 1, 3])
def test_C14_a_process_that_never_touched_the_memory_is_judged_by_its_exit_code_alone(
    exitcode: int, faults: Faults
) -> None:
    with supervisor(preload=faults.preload) as client:
        others = sleepers(client)
        pids = {name: h.pid for name, h in others.items()}
        faults.set("exit_after_fork", exitcode)
        handle = client.register(NOOP, flags=Flags.SHMEM_ACCESS, restart_time=0.2)
        outcome = poll_until(lambda: handle.outcome)
        assert (outcome.kind, outcome.exitcode) == ("exited", exitcode)
        if exitcode == 0:
            assert handle.wait_until_gone(30).final
        else:
            assert handle.wait_until_gone(30).restarts == 1
        client.register(NOOP, flags=Flags.SHMEM_ACCESS).wait_until_gone(30)
        if exitcode == 3:
            poll_until(lambda: others["inside"].pid not in (None, pids["inside"]))
        else:
            assert others["inside"].pid == pids["inside"]
        assert others["outside"].pid == pids["outside"]
