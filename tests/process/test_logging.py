"""What supervisor and workers log, and that nobody who does not read it holds them up."""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pgbgw import Client, HandleStatus, Supervisor
from support import poll_until
from support.control import Log
from support.processes import is_alive
from support.supervisors import supervisor

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}"


@pytest.fixture
def log(capfd: pytest.CaptureFixture[str]) -> Log:
    return Log(capfd)


@pytest.fixture
def debug_level() -> Iterator[None]:
    logger = logging.getLogger("pgbgw")
    logger.setLevel(logging.DEBUG)
    yield
    logger.setLevel(logging.NOTSET)


# --- the lines ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("debug_level")
def test_lines_carry_level_name_type_pid_slot_and_generation(log: Log) -> None:
    with supervisor() as client:
        handle = client.register("support.workers:exit_with", 3, name="report", type="daily")
        assert handle.wait_until_gone(30).exitcode == 3
        failing = client.register("support.workers:fail", name="other")
        failing.wait_until_gone(30)
        last = log.wait_for("unregistering", "other")
    place = f"slot {handle.slot}/{handle.generation}"
    by_supervisor = rf"{TIME} \[{client_pid(last)}\]"
    for line in (
        rf'{by_supervisor} DEBUG1:  registering worker "report" \(type "daily", {place}\)',
        rf'{by_supervisor} DEBUG1:  starting worker "report" \(type "daily", {place}\)',
        rf'{by_supervisor} LOG:  worker "report" \(type "daily", pid \d+, {place}\)'
        " exited with exit code 3",
        rf'{by_supervisor} DEBUG1:  unregistering worker "report" \(type "daily", {place}\)',
        # By the worker itself.
        rf'{TIME} \[(\d+)\] ERROR:  worker "other" \(type "other", pid \1, slot \d+/\d+\) failed',
        "\tTraceback .*",
    ):
        assert re.search(f"^{line}$", log.text, re.MULTILINE), line


def client_pid(line: str) -> str:
    found = re.match(rf"{TIME} \[(\d+)\]", line)
    assert found
    return found[1]


def test_successes_and_starts_are_for_debugging_alone(log: Log) -> None:
    with supervisor() as client:
        client.register("support.workers:noop", name="quiet").wait_until_gone(30)
        client.register("support.workers:exit_with", 1, name="loud").wait_until_gone(30)
        log.wait_for('"loud"', "exit code 1")
    assert '"quiet"' not in log.text
    assert log.count('"loud"') == 1


def test_control_characters_in_names_are_replaced(log: Log) -> None:
    name = 'x\n2026-01-01 00:00:00.000 [1] PANIC:  forged\r\x1b[31m\u2028\u202e\x85"'
    with supervisor() as client:
        client.register("support.workers:fail", name=name, type="\ttype").wait_until_gone(30)
        by_worker = log.wait_for("ERROR:  worker", "failed")
        by_supervisor = log.wait_for("exited with exit code 1")
    shown = 'worker "x?2026-01-01 00:00:00.000 [1] PANIC:  forged??[31m???"" (type "?type", '
    assert shown in by_worker
    assert shown in by_supervisor
    assert not re.search(r"^2026-01-01", log.text, re.MULTILINE)


def test_a_worker_that_is_stopped_says_so_in_one_line(log: Log) -> None:
    with supervisor() as client:
        handle = client.register("support.workers:sleep_until_stopped", name="stopped")
        assert handle.wait_for_ready(30) is HandleStatus.STARTED
        pid = handle.pid
        handle.terminate()
        handle.wait_until_gone(30)
        line = log.wait_for("terminated on request")
    assert re.fullmatch(rf'{TIME} \[{pid}\] LOG:  worker "stopped" \(.*\): .*', line)


# --- nobody reads ---------------------------------------------------------------------------------


# To be preloaded: more lines than any socket buffer holds, before connections are accepted.
TALKATIVE = """
import logging
for i in range(2000):
    logging.getLogger("pgbgw.talkative").info("%d %s", i, "x" * 4000)
"""


class FullPipe:
    """A pipe for use as stderr that has no room, until read() makes some."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.filling = 0
        try:
            while True:
                self.filling += os.write(self.writer, b"#" * 4096)
        except BlockingIOError:
            os.set_blocking(self.writer, True)

    @contextmanager
    def as_stderr(self) -> Iterator[None]:
        saved = os.dup(2)
        os.dup2(self.writer, 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)

    def read(self) -> str:
        """All that is written until everybody else has closed it."""
        os.close(self.writer)
        with os.fdopen(self.reader, "rb") as file:
            data = file.read()
        return data[self.filling :].decode()


@pytest.fixture
def full_pipe() -> FullPipe:
    return FullPipe()


def use(client: Client, file: Path) -> None:
    """Launch, restart and stop workers; the supervisor logs that at the normal level.

    The workers themselves write nothing: that would hold them up.
    """
    handle = client.register(
        "support.observed_workers:fail_while_missing", str(file), restart_time=0
    )
    poll_until(lambda: handle.outcome is not None and handle.outcome.restarts >= 2)
    file.touch()
    assert handle.wait_until_gone(30).exitcode == 0
    sleeper = client.register("support.workers:ignore_sigterm")
    assert sleeper.wait_for_ready(30) is HandleStatus.STARTED
    sleeper.terminate(grace=0)
    assert sleeper.wait_until_gone(30).signal == signal.SIGKILL


def test_a_full_stderr_does_not_hold_up_the_supervisor(
    full_pipe: FullPipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "talkative.py").write_text(TALKATIVE)
    monkeypatch.syspath_prepend(tmp_path)
    with full_pipe.as_stderr():
        client = Supervisor(preload=["talkative"]).start()
    use(client, tmp_path / "file")
    client.stop("fast", timeout=30)
    client.close()
    text = full_pipe.read()
    # What had room comes first; then, perhaps, that the rest had none.
    assert "LOG:  0 xxx" in text
    assert "LOG:  1999 xxx" not in text


def test_lines_that_were_dropped_are_counted_when_there_is_room_again(
    full_pipe: FullPipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "talkative.py").write_text(TALKATIVE)
    monkeypatch.syspath_prepend(tmp_path)
    with full_pipe.as_stderr():
        client = Supervisor(preload=["talkative"]).start()
    received = bytearray()
    os.set_blocking(full_pipe.reader, False)

    def drained() -> bool:
        """Read what is there, cause one more line, and look for the confession."""
        try:
            while chunk := os.read(full_pipe.reader, 1 << 16):
                received.extend(chunk)
        except BlockingIOError:
            pass
        client.register("support.workers:exit_with", 3).wait_until_gone(30)
        return b"dropped" in received

    poll_until(drained)
    os.set_blocking(full_pipe.reader, True)
    client.stop("fast", timeout=30)
    client.close()
    full_pipe.filling = 0
    text = received.decode() + full_pipe.read()
    came = set(re.findall(r"LOG:  (\d+) x{4000}$", text, re.MULTILINE))
    confessions = re.findall(r"WARNING:  \.\.\. (\d+) log lines? (?:was|were) dropped", text)
    # More than those 2000 may be missing: the one about accepting connections, at least.
    assert 0 < 2000 - len(came) <= sum(map(int, confessions))
    assert "supervisor is shut down" in text


@pytest.mark.leaves_sockets
def test_the_last_lines_of_a_killed_supervisor_come_out(full_pipe: FullPipe) -> None:
    with full_pipe.as_stderr():
        client = Supervisor().start()
    pid = client.supervisor_pid
    handle = client.register("support.workers:exit_with", 3, name="the last one")
    handle.wait_until_gone(30)
    os.kill(pid, signal.SIGKILL)
    poll_until(lambda: not is_alive(pid))
    text = full_pipe.read()  # to the end: the relay is gone, too
    client.stop("immediate", timeout=30)
    client.close()
    assert "supervisor ready to accept connections" in text
    assert 'worker "the last one"' in text
    assert text.endswith("exited with exit code 3\n")


def test_signals_to_everybody_do_not_end_the_relay_before_its_work_is_done(log: Log) -> None:
    with supervisor() as client:
        (relay,) = [p for p in children(client.supervisor_pid) if comm(p) == "pgbgw: log"]
        for name in ("SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "SIGUSR1", "SIGPIPE"):
            os.kill(relay, signal.Signals[name])
        client.register("support.workers:exit_with", 3).wait_until_gone(30)
        log.wait_for("exited with exit code 3")
        assert is_alive(relay)
        assert os.getsid(relay) == relay


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
