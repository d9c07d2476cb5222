"""No client can make the supervisor wait: one test for each way to try.

Meanwhile this process, an honest client, registers workers and waits for their ends; how long that
takes is noted, and how long the supervisor's loop could not answer.
"""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from fix_trials import Trial
from pgbgw import Client, Flags, Supervisor, _kernel
from pgbgw._wire import Message, pack
from support.figures import spread
from support.honest import Pauses
from support.processes import Script
from support.rogues import Rogue, hear, punch, raw_connection, welcomed
from support.supervisors import lines, supervisor
from support.waiting import poll_until

pytestmark = [pytest.mark.xdist_group("live"), pytest.mark.timeout_s(900)]
LONG = pytest.mark.at_least("fault")

NOOP = "support.workers:noop"
SLEEP = "support.workers:sleep_until_stopped"
HANG = 30.0  # seconds


def work(trial: Trial, client: Client, during: Callable[[], object] = lambda: None) -> None:
    """Be the honest client for a while."""
    pauses, took = Pauses(client), []
    until = time.monotonic() + trial.pick(0.3, 2.0, 30.0)
    while time.monotonic() < until:
        during()
        began = time.monotonic()
        outcome = client.register(NOOP).wait_until_gone(HANG)
        if outcome.exitcode != 0:
            trial.violation(f"an honest client's worker: {outcome}")
        took.append(time.monotonic() - began)
        trial.count()
    trial.note(f"honest operations: {spread(took)}; {pauses}")


def admitted(client: Client) -> socket.socket:
    """A further connection, on which the supervisor has answered."""
    sock = welcomed(client)
    assert sock is not None
    return sock


# --- shared descriptions, descriptors that come along ---------------------------------------------


def test_T18_a_client_that_clears_O_NONBLOCK_blocks_nobody(trial: Trial) -> None:
    """On all that it holds, and never reads; a worker on all that it has inherited."""
    with supervisor() as client, Rogue.of(client) as rogue:
        for fd in (rogue.sock.fileno(), rogue.outbox, rogue._inbox, rogue._pidfd):
            os.set_blocking(fd, True)
        worker = client.register("support.blocking_workers:clear_nonblocking_everywhere")
        worker.wait_for_ready(HANG)

        def press() -> None:
            worker.wake()  # which it does not read
            with suppress(BlockingIOError):
                rogue.sock.send(pack(Message.SUBSCRIBE, worker.slot, 1), socket.MSG_DONTWAIT)

        work(trial, client, press)


@contextmanager
def lingering() -> Iterator[socket.socket]:
    """A TCP socket whose last close takes 20 s: it has data that its peer never takes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with socket.create_connection(server.getsockname()) as sock:
            peer, _ = server.accept()
            with peer:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 20))
                with suppress(BlockingIOError):
                    while True:
                        sock.send(bytes(65536), socket.MSG_DONTWAIT)
                yield sock
                # Ours is closed when the peer has reset the connection: at once.
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_T18_a_lingering_socket_does_not_reach_the_supervisor(trial: Trial) -> None:
    """Neither on an accepted connection nor on one that waits to be accepted."""
    with supervisor() as client, lingering() as tcp, admitted(client) as sock:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            if not _kernel.refuse_rights(probe.fileno()):
                pytest.skip("this kernel cannot refuse descriptors (SO_PASSRIGHTS: Linux 6.16)")

        def press() -> None:
            for connection in (sock, raw_connection(client)):
                with connection if connection is not sock else ExitStack():
                    try:
                        socket.send_fds(connection, [pack(Message.KICK)], [tcp.fileno()])
                        trial.violation("a descriptor was taken")
                    except PermissionError:
                        pass

        work(trial, client, press)
        worker = client.register("support.blocking_workers:send_a_descriptor")
        if worker.wait_until_gone(HANG).exitcode != 0:
            trial.violation("a worker's descriptor was taken")


# --- clients that stall -----------------------------------------------------------------------


_STALL = """
import threading
from pgbgw import attach
from pgbgw._wire import Message, pack
from support import stalled
client = attach(address)
sock = client._channels._sock
try:
    page = stalled.stalling_page()
except OSError as exc:
    test.send(str(exc))
else:
    if how == "sending":
        threads = [threading.Thread(target=stalled.send_from, args=(sock.fileno(), page))]
    else:
        threads = [threading.Thread(target=stalled.receive_into, args=(sock.fileno(), page))]
    for thread in threads:
        thread.start()
    test.send(None)
    if how == "receiving":
        for slot in range(8):
            sock.send(pack(Message.SUBSCRIBE, slot, 1))
    for thread in threads:
        thread.join()
"""


def is_stalled(pid: int) -> bool:
    """Does a thread of the process wait for its page?"""
    tasks = [*Path(f"/proc/{pid}/task").iterdir()]
    if any("userfault" in (task / "wchan").read_text() for task in tasks):
        return True
    # A kernel that does not tell where its threads sleep says 0 of all of them, of ours, too.  Then
    # that the thread sleeps must do; whether it receives already, only the stack would tell.
    if sleeping_place() != "0":
        return False
    return len(tasks) > 1 and all(state_of(task) in "SD" for task in tasks)


def sleeping_place() -> str:
    """What the kernel says of a thread of ours that certainly sleeps."""
    enough = threading.Event()
    sleeper = threading.Thread(target=enough.wait)
    sleeper.start()
    try:
        task = Path(f"/proc/self/task/{sleeper.native_id}")
        poll_until(lambda: state_of(task) == "S")
        return (task / "wchan").read_text()
    finally:
        enough.set()
        sleeper.join()


def state_of(task: Path) -> str:
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("how", ["sending", pytest.param("receiving", marks=LONG)])
def test_T18_a_client_that_stalls_in_a_page_fault_stalls_alone(trial: Trial, how: str) -> None:
    """In the middle of the very system call, with the socket's locks in its hands."""
    with supervisor() as client, Script(_STALL, address=client.address, how=how) as stalled:
        problem = stalled.hear()
        if problem is not None:
            stalled.kill()
            pytest.skip(f"userfaultfd: {problem}")

        poll_until(lambda: is_stalled(stalled.pid))
        work(trial, client)
        stalled.kill()


_STOP_HALFWAY = """
import os, signal
from pgbgw import attach
from support.rogues import raw_connection
client = attach(address)
socks = [raw_connection(client) for _ in range(100)]
test.send(os.getpid())
os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_T18_clients_stopped_in_the_middle_of_the_handshake_hold_up_nobody(trial: Trial) -> None:
    with supervisor() as client, ExitStack() as stack:
        scripts = [
            stack.enter_context(Script(_STOP_HALFWAY, address=client.address))
            for _ in range(trial.pick(1, 3, 20))
        ]
        for script in scripts:
            pid = script.hear()
            poll_until(lambda pid=pid: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
        opened: list[socket.socket] = []

        def press() -> None:
            """And half-open ones of our own, that come and go."""
            opened.append(stack.enter_context(raw_connection(client)))
            if len(opened) > 50:
                opened.pop(0).close()

        work(trial, client, press)
        for script in scripts:
            script.kill()


def test_T18_a_client_that_never_reads_its_notifications_is_not_waited_for(trial: Trial) -> None:
    with supervisor() as client, ExitStack() as stack:
        deaf = [stack.enter_context(admitted(client)) for _ in range(8)]
        worker = client.register(SLEEP)
        worker.wait_for_ready(HANG)

        def press() -> None:
            for sock in deaf:
                with suppress(BlockingIOError):
                    while True:
                        message = pack(Message.SUBSCRIBE, worker.slot, worker.generation)
                        sock.send(message, socket.MSG_DONTWAIT)

        work(trial, client, press)


# --- the log ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["stalled", pytest.param("dead", marks=LONG)])
def test_T18_nobody_who_reads_the_log_is_waited_for(trial: Trial, reader: str) -> None:
    """stderr is a full pipe, or one without a reader."""
    read, write = os.pipe()
    ours = os.dup(2)
    try:
        os.set_blocking(write, False)
        with suppress(BlockingIOError):
            while True:
                os.write(write, bytes(4096))
        os.set_blocking(write, True)
        os.dup2(write, 2)
        try:
            client = Supervisor().start()
        finally:
            os.dup2(ours, 2)
        if reader == "dead":
            os.close(read)
            read = -1
        noisy = [client.register("support.workers:exit_with", 1, restart_time=0) for _ in range(4)]
        work(trial, client)
        for handle in noisy:
            handle.terminate(grace=1)
            handle.wait_until_gone(HANG)
        client.stop("fast", timeout=HANG)
        client.close()
    finally:
        for fd in (read, write, ours):
            if fd >= 0:
                os.close(fd)


# --- memory and files ---------------------------------------------------------------------------


_PUNCH_FOR_EVER = """
from support.rogues import Rogue, punch
rogue = Rogue(address, nslots, 8)
test.send("ready")
while True:
    punch(rogue._inbox, 0, len(rogue.inbox))
"""


@pytest.mark.parametrize("nslots", [64, pytest.param(50_000, marks=LONG)])
def test_T18_holes_and_truncations_do_not_fault_the_supervisor(trial: Trial, nslots: int) -> None:
    """SIGBUS is out of the question, and to fill a hole takes no longer than to zero a page."""
    with supervisor(max_worker_processes=nslots) as client:
        with Rogue.of(client) as rogue:
            size, records = len(rogue.inbox), rogue.at["records"]

            def refused(attempt: Callable[[], object]) -> None:
                try:
                    attempt()
                    trial.violation("a segment could be changed")
                except PermissionError:
                    pass

            def press() -> None:
                for fd in (rogue.outbox, rogue._inbox):
                    for length in (0, 4096, 2 * size):
                        refused(lambda fd=fd, length=length: os.ftruncate(fd, length))
                    refused(lambda fd=fd: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE))
                refused(lambda: punch(rogue.outbox, 0, 4096))
                refused(lambda: os.pwrite(rogue.outbox, b"x", 0))
                punch(rogue._inbox, records, size - records)

            work(trial, client, press)
        pauses = Pauses(client)
        with Script(_PUNCH_FOR_EVER, address=client.address, nslots=nslots) as script:
            assert script.hear() == "ready"
            began = time.monotonic()
            while time.monotonic() - began < trial.pick(0.3, 2.0, 30.0):
                client.try_register(NOOP)  # which is lost
            script.kill()
        trial.note(f"while all is holes: {pauses}")

        def works() -> bool:
            handle = client.try_register(NOOP)
            return handle is not None and handle.wait_until_gone(HANG).exitcode == 0

        poll_until(works)


def test_T18_a_supervisor_out_of_descriptors_neither_dies_nor_spins(trial: Trial) -> None:
    """Connections wait to be accepted, and there is no descriptor for them."""
    with supervisor() as client, ExitStack() as stack:
        pid, process = client.supervisor_pid, psutil.Process(client.supervisor_pid)
        client.register(NOOP).wait_until_gone(HANG)
        poll_until(lambda: len(process.children()) == 1)
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        highest = max(int(fd.name) for fd in Path(f"/proc/{pid}/fd").iterdir())
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
        pauses = Pauses(client)
        waiting = [stack.enter_context(raw_connection(client)) for _ in range(20)]
        failed = [client.register(NOOP) for _ in range(5)]
        restarting = client.register(NOOP, restart_time=0)
        for handle in failed:
            outcome = handle.wait_until_gone(HANG)
            trial.count()
            if outcome.kind != "launch_failed" and outcome.exitcode != 0:
                trial.violation(f"without descriptors: {outcome}")
        before = process.cpu_times()
        began = time.monotonic()
        poll_until(lambda: time.monotonic() - began > trial.pick(0.3, 2.0, 10.0))
        spent = sum(process.cpu_times()[:2]) - sum(before[:2])
        if spent > 0.2 * (time.monotonic() - began) + 0.02:
            trial.violation(f"it spins: {spent:.2f} s of CPU")
        for sock in waiting:
            hear(sock)
        trial.note(f"{spent / (time.monotonic() - began):.0%} of a CPU; {pauses}")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        if restarting.wait_until_gone(HANG).exitcode != 0:
            trial.violation("what is restarted did not come to run")
        work(trial, client)


# --- what it must not touch -----------------------------------------------------------------------


def test_T18_the_supervisor_opens_imports_and_unpickles_nothing(
    trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it serves: no /proc of clients, no file, no module, no object of theirs."""
    spy = tmp_path / "spy"
    monkeypatch.setenv("PGBGW_TEST_SPY", str(spy))
    with supervisor(preload=["support.spying"], max_worker_processes=8) as client:
        client.register(NOOP).wait_until_gone(HANG)
        served = time.monotonic_ns()
        attach = "from pgbgw import attach; attach(address).close(); test.send(None)"
        with Script(attach, address=client.address) as script:
            script.hear()
        raw_connection(client).close()
        client.register("no.such.module:at_all").wait_until_gone(HANG)
        member = client.register(SLEEP, flags=Flags.SHMEM_ACCESS)
        member.wait_for_startup(HANG)
        member.terminate(grace=HANG)
        member.wait_until_gone(HANG)
        work(trial, client)
        assert lines(spy), "the spy sees nothing"
        for line in lines(spy):
            at, what = line.split(" ", 1)
            if int(at) > served:
                trial.violation(what)
