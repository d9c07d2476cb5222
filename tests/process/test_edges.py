"""Edges at which a supervisor, a worker or a client once went wrong."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from pgbgw import (
    AttachError,
    BackgroundWorker,
    Flags,
    HandleStatus,
    InvalidWorkerError,
    Phase,
    Supervisor,
    _attachment,
    attach,
)
from pgbgw._runtime import resolve
from pgbgw._wire import GRACE, Message, pack
from pgbgw.client import Client
from support import edge_workers, poll_until, workers
from support.books import Books
from support.control import paused, processes
from support.processes import kill_supervisor
from support.supervisors import lines, supervisor

NEVER_RUNNING = "support.workers:sleep_until_stopped"  # as the startup worker


def environ() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def test_a_starter_that_ignores_sigchld_does_not_make_every_exit_a_crash() -> None:
    code = """
import signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
from pgbgw import Flags, Supervisor
with Supervisor() as client:
    member = client.register("support.workers:sleep_until_stopped", flags=Flags.SHMEM_ACCESS)
    member.wait_for_ready(30)
    done = client.register("support.workers:noop", flags=Flags.SHMEM_ACCESS).wait_until_gone(30)
    print(done, member.status().name)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environ(), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == "exited with code 0 STARTED\n"


def test_who_detaches_and_attaches_again_at_once_is_not_detached_by_his_own_past() -> None:
    with supervisor() as owner:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = _detach_and_attach(owner.address)
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _detach_and_attach(address: str) -> int:
    for _ in range(20):
        client = attach(address)
        handle = client.register(workers.noop)
        for _ in range(200):  # more than the supervisor reads at once: DETACH comes behind them
            handle.wake()
        client.close()
        with attach(address) as again:
            if again.register(workers.noop).wait_until_gone(30).kind != "exited":
                return 2
    return 0


def test_a_process_that_only_connects_takes_no_descriptors_from_workers(runtime_dir: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with supervisor(address="crowded") as client, ExitStack() as stack:
            for _ in range(300):
                sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                sock.connect(str(runtime_dir / "crowded.sock"))
            assert client.register(workers.noop).wait_until_gone(30).exitcode == 0
            directory = f"/proc/{client.supervisor_pid}/fd"
            poll_until(lambda: len(os.listdir(directory)) < 2 * 256 + 60)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_failed_worker_that_joins_its_threads_can_still_be_stopped(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with supervisor() as client:
        handle = client.register(
            "support.edge_workers:fail_beside_a_thread", str(trace), restart_time=0
        )
        poll_until(lambda: lines(trace))
        handle.terminate()
        assert handle.wait_until_gone(30).exitcode == 1


def test_the_startup_worker_may_be_a_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "trace"
    monkeypatch.setenv("PGBGW_TEST_TRACE", str(trace))
    with supervisor(startup="support.edge_workers:startup") as client:
        poll_until(lambda: client.phase is Phase.RUNNING)
        assert lines(trace) == ["x"]


def test_what_a_preload_prints_is_printed_once(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text("print('loaded')\n")
    code = """
from pgbgw import Supervisor
with Supervisor(preload=["loud"]) as client:
    for _ in range(3):
        client.register("support.workers:noop").wait_until_gone(30)
"""
    env = environ()
    env["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{env['PYTHONPATH']}"
    env.pop("PYTHONUNBUFFERED", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
    assert done.stdout == b"loaded\n", done.stderr


def test_a_supervisor_ends_with_its_block_though_its_client_was_closed_in_it() -> None:
    kept: list[Client] = []
    with Supervisor() as client:
        kept.append(client)
        client.close()
    assert kept[0]._process is not None
    assert kept[0]._process.returncode == 0


def test_a_wake_up_before_the_worker_starts_is_kept_for_it(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with supervisor() as client:
        os.kill(client.supervisor_pid, signal.SIGSTOP)  # so that the wake-up comes before the start
        try:
            handle = client.register("support.edge_workers:wait_once", str(trace))
            handle.wake()
            assert handle.status() is HandleStatus.NOT_YET_STARTED
        finally:
            os.kill(client.supervisor_pid, signal.SIGCONT)
        assert handle.wait_until_gone(30).exitcode == 0
        assert lines(trace) == ["x"]


@pytest.mark.parametrize("flags", [Flags.NONE, Flags.SHMEM_ACCESS])
def test_a_toml_file_like_the_documented_one_is_understood(tmp_path: Path, flags: Flags) -> None:
    file = tmp_path / "pgbgw.toml"
    wanted = '["shmem-access"]' if flags else "[]"
    file.write_text(
        f"""
[supervisor]
max_worker_processes = 64
spares = 4
[[worker]]
name = "idle-{{i}}"
count = 2
entry = "support.workers:sleep_until_stopped"
flags = {wanted}
"""
    )
    with Supervisor.from_toml(file) as client:
        poll_until(lambda: [w.name for w in client.workers() if w.ready] == ["idle-0", "idle-1"])


def test_what_was_just_registered_is_found_at_once() -> None:
    with supervisor(max_worker_processes=64) as client:
        for number in range(50):
            handle = client.register(workers.noop, name=f"number {number}")
            found = client.find(name=f"number {number}")
            assert found in (handle, None)
            if found is None:  # only if it has run and ended meanwhile
                assert handle.wait_until_gone(30).exitcode == 0
        os.kill(client.supervisor_pid, signal.SIGSTOP)
        try:
            handle = client.register(workers.noop, name="early\x07", type="bird")
            assert client.find(name="early\x07") == handle
            assert [w.name for w in client.workers(type="bird")] == ["early?"]
            assert handle.info().status is HandleStatus.NOT_YET_STARTED
        finally:
            os.kill(client.supervisor_pid, signal.SIGCONT)
        assert handle.wait_until_gone(30).exitcode == 0


def test_a_closed_watch_says_so_and_does_no_harm() -> None:
    with supervisor() as client:
        watch = client.watch(client.register(workers.noop))
        watch.close()
        for use in (watch.changes, watch.add, watch.remove):
            with pytest.raises(AttachError, match="closed"):
                use()
        assert client.register(workers.noop).wait_until_gone(30).exitcode == 0


def test_register_many_registers_nothing_if_one_of_them_can_never_run() -> None:
    with supervisor() as client:
        good = BackgroundWorker(entry=workers.sleep_until_stopped)
        for bad in (BackgroundWorker(entry="bad"), "support.workers:noop", 5):
            with pytest.raises((InvalidWorkerError, TypeError)):
                client.register_many([good, bad])  # type: ignore[list-item]
        assert client.workers() == []


@pytest.mark.parametrize("closed", [(2,), (0, 1, 2)])
def test_a_starter_without_standard_descriptors_gets_a_supervisor_all_the_same(
    closed: tuple[int, ...], tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    code = f"""
import os
for fd in {closed}:
    os.close(fd)
from pgbgw import Supervisor
with Supervisor() as client:
    handle = client.register("support.edge_workers:list_standard", {str(trace)!r})
    outcome = handle.wait_until_gone(30)
os._exit(outcome.exitcode)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environ(), stdin=subprocess.DEVNULL)
    assert done.returncode == 0
    targets = lines(trace)
    assert all(targets[fd] == "/dev/null" for fd in closed)


def test_a_supervisor_in_the_foreground_needs_no_stderr(runtime_dir: Path) -> None:
    command = f"exec {sys.executable} -m pgbgw run --name quiet 2>&-"
    with subprocess.Popen(["sh", "-c", command], env=environ()) as server:
        poll_until((runtime_dir / "quiet.sock").exists)
        with attach("quiet") as client:
            client.stop("fast", timeout=30)
        assert server.wait(30) == 0


def test_more_stop_signals_than_one_do_not_spoil_the_exit_status(runtime_dir: Path) -> None:
    command = [sys.executable, "-m", "pgbgw", "run", "--name", "stubborn"]
    with subprocess.Popen(command, env=environ()) as server:
        poll_until((runtime_dir / "stubborn.sock").exists)
        while server.poll() is None:
            server.send_signal(signal.SIGINT)
        assert server.returncode == 0


def test_a_grace_that_comes_before_its_terminate_bit_finds_a_worker_behind_thousands() -> None:
    """One message must not be lost, nor have the supervisor look at all others first."""
    with supervisor(max_worker_processes=2048, startup=NEVER_RUNNING) as client:
        with paused(client):
            last = [client.register(workers.ignore_sigterm) for _ in range(1500)][-1]
            # The first half of terminate(grace=1): the client may be held up before the second.
            grace = pack(Message.TERMINATE, last.slot, last.generation, GRACE.pack(10**9))
            assert client._channels.send(grace)
        assert last.wait_until_gone(30).kind == "cancelled"


def test_a_fast_stop_without_a_descriptor_to_spare_is_one_all_the_same() -> None:
    """The group of a worker that was terminated before is signalled by way of a descriptor."""
    with supervisor() as client:
        deaf = client.register(workers.ignore_sigterm)
        obedient = client.register(workers.sleep_until_stopped)
        for worker in (deaf, obedient):
            worker.wait_for_ready(30)
        deaf.terminate()
        deaf_pid, supervisor_pid = deaf.pid, client.supervisor_pid
        assert deaf_pid is not None
        resource.prlimit(supervisor_pid, resource.RLIMIT_NOFILE, (3, 3))
        with ThreadPoolExecutor(1) as pool:
            stopping = pool.submit(client.stop, "fast", timeout=30)
            assert obedient.wait_until_gone(30).exitcode == 1
            os.kill(deaf_pid, signal.SIGKILL)
            stopping.result(30)


def test_a_process_that_attaches_and_hangs_up_for_ever_takes_no_more_than_its_share() -> None:
    with supervisor() as client:
        address = resolve(client.address)
        before = Books(client).descriptors
        for _ in range(300):
            attachment = _attachment.connect(address, time.monotonic() + 30, first=True)
            attachment.close_segments()
            os.close(attachment.supervisor)
            attachment.sock.close()
        assert Books(client).descriptors < before + 20


def test_a_worker_that_asks_for_clients_for_ever_takes_no_more_than_its_share() -> None:
    with supervisor(spares=0) as client:
        before = Books(client).descriptors
        worker = client.register(edge_workers.ask_for_clients, 300, flags=Flags.SHMEM_ACCESS)
        assert worker.wait_until_gone(60).exitcode == 0
        poll_until(lambda: Books(client).descriptors <= before)


def test_a_client_that_could_not_say_goodbye_is_gone_when_its_process_attaches_again() -> None:
    with supervisor() as owner:
        before = Books(owner).descriptors
        code = f"""
from pgbgw import attach
from support.control import paused
for _ in range(20):
    client = attach({owner.address!r})
    worker = client.register("support.workers:noop")
    with paused(client):
        try:
            while True:  # until there is no room for a goodbye
                client._channels._sock.send(b"x" * 16, {int(socket.MSG_DONTWAIT)})
        except BlockingIOError:
            client.close()
attach({owner.address!r})
print("attached", flush=True)
input()
"""
        with subprocess.Popen(
            [sys.executable, "-c", code],
            env=environ(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"attached\n"
            poll_until(lambda: Books(owner).descriptors <= before + 4)
            other.communicate(b"\n")


@pytest.mark.leaves_sockets
@pytest.mark.skipif(os.geteuid() != 0, reason="changes its group")
def test_a_worker_that_has_changed_its_group_does_not_outlive_the_supervisor() -> None:
    with supervisor() as client:
        worker = client.register(edge_workers.become_somebody_else)
        worker.wait_for_ready(30)
        with processes(worker.pid) as (process,):
            kill_supervisor(client)
            poll_until(lambda: process.gone)


@pytest.mark.leaves_sockets
def test_a_worker_that_is_forked_while_the_supervisor_dies_does_not_outlive_it() -> None:
    """It arms the parent-death signal first: too late here.  Then it looks who its parent is."""
    with supervisor(preload=["support.slow_to_fork"]) as client:
        process = psutil.Process(client.supervisor_pid)
        before = {child.pid for child in process.children()}
        client.register(workers.sleep_until_stopped)
        (pid,) = poll_until(lambda: {child.pid for child in process.children()} - before)
        with processes(pid) as (forked,):
            kill_supervisor(client)
            poll_until(lambda: forked.gone)


def test_a_worker_that_closes_its_streams_ends_as_it_says() -> None:
    with supervisor() as client:
        for code in (0, 3):
            worker = client.register(edge_workers.close_the_streams, code)
            assert worker.wait_until_gone(30).exitcode == code


def test_a_thread_that_attaches_in_vain_holds_up_no_other_address() -> None:
    with supervisor() as stopped, supervisor() as other, ThreadPoolExecutor(1) as pool:
        address = stopped.address
        code = f"""
import threading
from pgbgw import AttachError, attach
def try_it():
    try:
        attach({address!r}, timeout=5)
    except AttachError:
        print("in vain", flush=True)
thread = threading.Thread(target=try_it)
thread.start()
attach({other.address!r}, timeout=60).close()
try:
    attach({address!r}, timeout=0.1)
except AttachError as exc:
    print(exc.detail, flush=True)
thread.join()
"""
        with paused(stopped):
            done = pool.submit(
                subprocess.run, [sys.executable, "-c", code], env=environ(), capture_output=True
            ).result(50)
        assert done.stdout.decode().split("\n") == [
            "another thread is attaching there",
            "in vain",
            "",
        ]


def test_signals_that_ask_for_nothing_do_not_end_a_supervisor() -> None:
    with supervisor() as client:
        for signum in signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO, signal.SIGRTMIN:
            os.kill(client.supervisor_pid, signum)
        assert client.register(workers.noop).wait_until_gone(30).exitcode == 0
