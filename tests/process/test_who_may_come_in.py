"""Who may come in, and what a guest can make the supervisor do: strangers and rogue clients.

Directories, locks and sockets themselves are in unit/test_runtime.py, floods and nonsense on
connections in test_survival.py; docs/security.md names the test for each promise.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pgbgw import (
    AttachError,
    BackgroundWorker,
    EntryNotAllowedError,
    Supervisor,
    _runtime,
    attach,
)
from support import poll_until
from support.control import Log, Startup
from support.processes import in_fork
from support.stranger_workers import HARMFUL, Bomb
from support.supervisors import lines, supervisor

LEAVE_PID = "support.stranger_workers:leave_pid"
NOOP = "support.workers:noop"
STRANGER = 54321

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")


def as_stranger(function: Callable[[], object]) -> object:
    """What function returns in a process of another user, or the OSError's name."""

    def run() -> object:
        os.setgroups([])
        os.setresgid(STRANGER, STRANGER, STRANGER)
        os.setresuid(STRANGER, STRANGER, STRANGER)
        try:
            return function()
        except OSError as exc:
            return type(exc).__name__

    return in_fork(run)


# --- other users ---------------------------------------------------------------------------------


@as_root
def test_another_user_does_not_get_to_the_socket(runtime_dir: Path) -> None:
    def connect() -> object:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(path)
        return "connected"

    with supervisor(address="main") as client:
        path = client.address
        assert as_stranger(connect) == "PermissionError"
        # The socket itself is closed to him, too.
        runtime_dir.chmod(0o711)
        assert as_stranger(connect) == "PermissionError"
        runtime_dir.chmod(0o700)


@as_root
def test_another_user_who_gets_to_the_socket_is_hung_up_on_and_told_nothing(
    runtime_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def connect_and_read() -> object:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(30)
            sock.connect(path)
            return sock.recvmsg(4096, 4096)[:2]

    with supervisor(address="main") as client:
        path = client.address
        runtime_dir.chmod(0o711)  # somebody has opened all doors
        os.chmod(path, 0o666)
        assert as_stranger(connect_and_read) in ((b"", []), "ConnectionResetError")
        Log(capfd).wait_for(f"connection from another user ({STRANGER})")
        runtime_dir.chmod(0o700)
        assert client.register(NOOP).wait_until_gone(30).exitcode == 0


@as_root
def test_nobody_attaches_to_the_listener_of_another_user(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)  # as /tmp
    path = tmp_path / "main.sock"
    # He may not pass through the directories above this one.
    directory = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    ready, said = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setresuid(STRANGER, STRANGER, STRANGER)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            os.fchdir(directory)
            sock.bind("main.sock")
            sock.listen()
            os.write(said, b"x")
            signal.pause()
        finally:
            os._exit(1)
    try:
        os.close(said)
        assert os.read(ready, 1) == b"x"
        assert path.stat().st_uid == STRANGER
        with pytest.raises(AttachError, match="belongs to another user") as caught:
            attach(path, timeout=1)
        assert str(STRANGER) in str(caught.value.detail)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(directory)


# --- what clients may ask for --------------------------------------------------------------------


def test_the_supervisor_keeps_the_allow_list_though_a_client_does_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = Log(capfd)
    path = tmp_path / "ran"
    with supervisor(allow=["support.workers:*"], max_worker_processes=16) as client:
        with pytest.raises(EntryNotAllowedError):
            client.register(LEAVE_PID, str(path))
        client._allow = None  # a client that does not care
        for entry in (LEAVE_PID, "support.workers:os.system", "os:system"):
            outcome = client.register(entry, str(path)).wait_until_gone(30)
            assert outcome.kind == "rejected"
            assert outcome.error == f'entry point "{entry}" is not allowed'
        assert client.register(NOOP).wait_until_gone(30).exitcode == 0
        assert not path.exists()
        # However often he tries, the log stays readable and says how often it was.
        for _ in range(150):
            assert client.register("os:abort").wait_until_gone(30).kind == "rejected"

        def told() -> bool:  # a second later a line gets through
            client.register("os:abort").wait_until_gone(30)
            return "more before, not shown" in log.text

        poll_until(told)
        assert log.count("is not allowed") < 150


def test_static_workers_and_the_startup_worker_need_no_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    startup = Startup(tmp_path / "startup", monkeypatch)
    path = tmp_path / "ran"
    supervisor = Supervisor(allow=[], startup=startup.entry)
    supervisor.register(BackgroundWorker(entry=LEAVE_PID, args=(str(path),)))
    with supervisor:
        startup.finish()
        poll_until(path.exists)


def test_arguments_are_unpickled_in_the_worker_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted, ran, modules = tmp_path / "noted", tmp_path / "ran", tmp_path / "modules"
    monkeypatch.setenv("PGBGW_TEST_MODULES", str(modules))
    bomb = Bomb(str(noted))
    startup = Startup(tmp_path / "startup", monkeypatch)
    starting = Supervisor(
        preload=["support.stranger_workers"], allow=["support.*"], startup=startup.entry
    )
    starting.register(BackgroundWorker(entry=LEAVE_PID, args=(str(ran), bomb)))
    with starting as client:
        startup.wait_for_run(1)
        # Looked at, shown, cancelled, rejected: nobody opens the parcel.
        waiting = client.register(LEAVE_PID, str(ran), bomb, restart_time=1)
        assert len(client.workers()) == 2
        waiting.terminate()
        assert waiting.wait_until_gone(30).kind == "cancelled"
        client._allow = None
        assert client.register("os:abort", bomb).wait_until_gone(30).kind == "rejected"
        assert not noted.exists()
        startup.finish()
        poll_until(lambda: ran.exists() and ran.read_text())
        poll_until(lambda: not client.workers())
        assert lines(noted) == [ran.read_text()]
        assert client.register(LEAVE_PID, str(ran), bomb).wait_until_gone(30).exitcode == 0
        assert len(lines(noted)) == 2
        assert str(client.supervisor_pid) not in lines(noted)
        assert str(os.getpid()) not in lines(noted)


# --- what is shown -------------------------------------------------------------------------------


def test_what_a_worker_says_drives_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    def command(*args: str) -> str:
        run = [sys.executable, "-P", "-m", "pgbgw", args[0], "-a", client.address, *args[1:]]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(run, capture_output=True, env=environ, timeout=60, check=False)
        return (done.stdout + done.stderr).decode()

    log = Log(capfd)
    with supervisor() as client:
        worker = client.register("support.stranger_workers:behave_badly", name="bad")
        worker.wait_for_ready(30)
        poll_until(lambda: "titled" in worker.info().activity)
        shown = command("ps")
        assert "titled" in shown
        pid = worker.pid
        assert Path(f"/proc/{pid}/comm").read_text() == "bad\n"
        worker.terminate()
        outcome = worker.wait_until_gone(30)
        assert outcome.error is not None
        log.wait_for("ValueError: bad ")
        waited = command("register", "--wait", "support.workers:fail", f"bad {HARMFUL} news")
        assert "bad " in waited
        for text in (shown, waited, log.text):
            for line in text.split("\n"):
                assert line.replace("\t", "").isprintable(), ascii(line)


# --- the files -----------------------------------------------------------------------------------


def test_whatever_the_umask_nobody_else_can_read_what_a_supervisor_makes(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = runtime_dir / "new"
    monkeypatch.setenv("PGBGW_RUNTIME_DIR", str(directory))
    before = os.umask(0)
    try:
        with supervisor(address="main"):
            assert stat.S_IMODE(directory.stat().st_mode) == 0o700
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}
            assert modes == dict.fromkeys(
                ("main.sock", "main.supervisor.lock", "main.workers.lock"), 0o600
            )
        assert _runtime.runtime_directory() == str(directory)
    finally:
        os.umask(before)
