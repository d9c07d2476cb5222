"""How tests pause a supervisor, read its log, make it fail, and direct its startup worker."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from pgbgw import Client, WaitTimeoutError
from support.supervisors import lines
from support.waiting import poll_until


@contextmanager
def paused(client: Client, *, idle: bool = False) -> Iterator[None]:
    """Keep the supervisor from noticing anything.

    idle: stop it in its sleep, so that it goes on with the start of a pass: deaths are noticed
    before registrations.  What it does while it is awake never makes it sleep.
    """
    pid = client.supervisor_pid
    supervisor = psutil.Process(pid)
    if idle:
        poll_until(lambda: supervisor.status() == psutil.STATUS_SLEEPING)
    os.kill(pid, signal.SIGSTOP)
    try:
        poll_until(lambda: supervisor.status() == psutil.STATUS_STOPPED)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def ask_to_stop(client: Client, mode: str) -> None:
    """Request a shutdown that something holds up, without waiting for its end."""
    with pytest.raises(WaitTimeoutError):
        client.stop(mode, timeout=0)


class Process:
    """A process that is not our child, or may be gone any moment; identified by its pidfd."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)

    @property
    def gone(self) -> bool:
        return bool(select.select([self._pidfd], [], [], 0)[0])

    def wait(self, timeout: float = 30.0) -> None:
        assert select.select([self._pidfd], [], [], timeout)[0], f"process {self.pid} is still here"

    def close(self) -> None:
        os.close(self._pidfd)


@contextmanager
def processes(*pids: int | None) -> Iterator[list[Process]]:
    found = [Process(pid) for pid in pids if pid is not None]
    assert len(found) == len(pids), "one of them does not run"
    try:
        yield found
    finally:
        for process in found:
            process.close()


class Log:
    """What the supervisor and its workers have written to stderr so far."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd
        self._text = ""

    @property
    def text(self) -> str:
        self._text += self._capfd.readouterr().err
        return self._text

    def wait_for(self, *parts: str) -> str:
        """The first line that has all the parts; it may take a while to come through the relay."""

        def found() -> str:
            hits = (line for line in self.text.splitlines() if all(p in line for p in parts))
            return next(hits, "")

        return poll_until(found, message=f"{parts} in the log:\n{self.text}")

    def count(self, part: str) -> int:
        return sum(part in line for line in self.text.splitlines())


class Faults:
    """Orders to support.failing_fork, which the supervisor must preload."""

    preload = ("support.failing_fork",)

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._directory = directory
        directory.mkdir()
        monkeypatch.setenv("PGBGW_TEST_FAULTS", str(directory))

    def fail(self, name: str, times: int | None = None) -> None:
        """Let "fork", "pidfd_open" or "memfd" fail so many times, or until clear()."""
        self.set(name, "" if times is None else str(times))

    def set(self, name: str, value: object) -> None:
        """Order "slow_fork" or "slow_child" (seconds), or "exit_after_fork" (a code, once)."""
        whole = self._directory / f"{name}.new"
        whole.write_text(str(value))
        whole.rename(self._directory / name)  # never seen half written

    def clear(self, name: str) -> None:
        (self._directory / name).unlink(missing_ok=True)

    def attempts(self, name: str) -> list[int]:
        """When it has failed, in monotonic nanoseconds."""
        return [int(line) for line in lines(self._directory / f"{name}.attempts")]


class Startup:
    """Orders to support.lifecycle_workers:startup_on_command, which must be the startup worker."""

    entry = "support.lifecycle_workers:startup_on_command"

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._directory = directory
        directory.mkdir()
        monkeypatch.setenv("PGBGW_TEST_STARTUP", str(directory))

    @property
    def runs(self) -> int:
        return len(lines(self._directory / "runs"))

    @property
    def pid(self) -> int:
        """Of the latest run."""
        return int(lines(self._directory / "runs")[-1])

    def wait_for_run(self, number: int) -> None:
        poll_until(lambda: self.runs == number)

    def consistent(self) -> None:
        (self._directory / "consistent").touch()

    def finish(self, code: int = 0) -> None:
        """Let it report consistency, if it has not, and exit with this code."""
        self.consistent()
        whole = self._directory / "code"
        whole.write_text(str(code))
        whole.rename(self._directory / "finish")

    def leave_at_once(self) -> None:
        """Let it leave by os._exit(0), without a clean end."""
        (self._directory / "leave").touch()
        self.finish()

    def forget_orders(self) -> None:
        """The next run waits for orders again."""
        for name in ("consistent", "finish"):
            (self._directory / name).unlink(missing_ok=True)
