"""Other processes of a test: fresh interpreters, forks, bystanders, a dead supervisor."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair
from types import TracebackType
from typing import Any, NoReturn

import psutil

from pgbgw import Client
from support.waiting import poll_until

GUARD = 30.0  # seconds: far more than anything takes, so that a hang is a failure and not for ever


# --- fresh interpreters -----------------------------------------------------------------------

_MAIN = """
import sys
from multiprocessing.connection import Connection
test = Connection(int(sys.argv[1]))
code, variables = test.recv()
variables.update(__name__="script", test=test)
exec(compile(code, "<script of a test>", "exec"), variables)
"""


class Script:
    """A fresh interpreter that runs code, with our sys.path; its end of a pipe to us is `test`.

    With `say()` and `hear()` we talk to the script's `test.recv()` and `test.send()`.  It is killed
    when the block ends and it has not.
    """

    def __init__(self, code: str, **variables: object) -> None:
        ours, theirs = socketpair()
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-P", "-W", "error", "-c", _MAIN, str(theirs.fileno())]
        with theirs:
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environ)
        self._pipe = Connection(ours.detach())
        self._pipe.send((textwrap.dedent(code), variables))

    @property
    def pid(self) -> int:
        return self.process.pid

    def say(self, thing: object) -> None:
        self._pipe.send(thing)

    def hear(self) -> Any:
        """What the script sent next; it fails the test if that never comes."""
        if not self._pipe.poll(GUARD):
            raise AssertionError("the script says nothing")
        try:
            return self._pipe.recv()
        except EOFError:
            raise AssertionError(f"the script ended: {self.wait()}") from None

    def wait(self) -> int:
        """Its exit status, when it has ended; below zero for a signal."""
        return self.process.wait(GUARD)

    def kill(self, signum: int = signal.SIGKILL) -> int:
        """Signal it, and wait until it is dead and reaped: its pid is free then."""
        self.process.send_signal(signum)
        return self.wait()

    def __enter__(self) -> Script:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is None:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GUARD)
        self.process.kill()
        status = self.process.wait()
        self._pipe.close()
        if exc_type is None and status not in (0, -signal.SIGKILL):
            raise AssertionError(f"the script ended with status {status}")


def run_script(code: str, **variables: object) -> Any:
    """Run code in a fresh interpreter; what it sends by `test.send()`, once."""
    with Script(code, **variables) as script:
        return script.hear()


LAST_PID = Path("/proc/sys/kernel/ns_last_pid")


# --- forks ------------------------------------------------------------------------------------


def in_fork(function: Callable[[], object]) -> Any:
    """Call function in a fork of this process; what it returns, or the failure that it raised."""
    return _start_fork(None, function)()


def fork_as(pid: int, function: Callable[[], object]) -> Callable[[], Any] | None:
    """Begin that in a fork with that very number; a callable that waits for its answer.

    None if we may not choose the number.
    """
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:  # other processes are forked meanwhile
        try:
            LAST_PID.write_text(str(pid - 1))
        except OSError:
            return None
        if answer := _start_fork(pid, function):
            return answer
    return None


def _start_fork(wanted: int | None, function: Callable[[], object]) -> Callable[[], Any] | None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        if wanted not in (None, os.getpid()):
            os._exit(0)
        _report(function, write)
    os.close(write)

    def answer() -> Any:
        with os.fdopen(read, "rb") as file:
            data = file.read()
        os.waitpid(pid, 0)
        assert data, "the fork died without a word"
        result, failure = pickle.loads(data)
        if failure is not None:
            raise AssertionError(f"in the fork: {failure}")
        return result

    if wanted in (None, pid):
        return answer
    os.close(read)
    os.waitpid(pid, 0)
    return None


def _report(function: Callable[[], object], write: int) -> NoReturn:
    try:
        try:
            data = pickle.dumps((function(), None))
        except BaseException:
            import traceback

            data = pickle.dumps((None, traceback.format_exc()))
        with os.fdopen(write, "wb") as file:
            file.write(data)
    finally:
        os._exit(0)


@contextmanager
def bystander(pid: int) -> Iterator[Callable[[], set[signal.Signals]] | None]:
    """A process with that number that has nothing to do with anything; None if we may not choose.

    The callable tells which signals it was sent: they stay pending, as all are blocked.
    """

    def stand_by() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            time.sleep(3600)

    found = fork_as(pid, stand_by)
    try:
        if found is None:
            yield None
        else:
            poll_until(lambda: len(signals_of(pid, "SigBlk")) > 50)
            yield lambda: pending_signals(pid)
    finally:
        if found is not None:
            os.kill(pid, signal.SIGKILL)
            with suppress(AssertionError):  # it dies without a word
                found()


def signals_of(pid: int, line: str) -> set[int]:
    """A set of signals in /proc/PID/status: SigBlk, SigIgn, SigCgt, SigPnd, ShdPnd."""
    for text in Path(f"/proc/{pid}/status").read_text().splitlines():
        key, _, value = text.partition(":")
        if key == line:
            mask = int(value, 16)
            return {n for n in range(1, 65) if mask >> (n - 1) & 1}
    raise AssertionError(f"no {line} of process {pid}")


def pending_signals(pid: int) -> set[signal.Signals]:
    pending = signals_of(pid, "SigPnd") | signals_of(pid, "ShdPnd")
    return {signal.Signals(n) for n in pending}


def is_alive(pid: int) -> bool:
    """Is there a process with that number that has not ended?"""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# --- a dead supervisor -------------------------------------------------------------------------


def kill_supervisor(client: Client) -> None:
    """SIGKILL, and wait until it is dead, as every observer sees it."""
    process = psutil.Process(client.supervisor_pid)
    process.kill()
    poll_until(lambda: not is_alive(process.pid))
