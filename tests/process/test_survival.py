"""What a supervisor survives: killed clients, crashing workers, garbage, floods, long service."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest

from pgbgw import (
    AttachError,
    Client,
    Flags,
    HandleStatus,
    StartTime,
    Supervisor,
    WaitTimeoutError,
    attach,
)
from pgbgw._wire import GRACE, HEAD, HELLO, PROTOCOL, Message, pack, unpack
from pgbgw.worker import MAX_RESTART_TIME
from support import poll_until
from support.books import Books
from support.control import Startup, paused
from support.processes import Script, kill_supervisor
from support.rogues import Rogue, raw_connection
from support.slot_tables import FREE
from support.supervisors import lines, noticed, supervisor

NOOP = "support.workers:noop"
SLEEP = "support.workers:sleep_until_stopped"
AGAIN = "support.workers:append_and_exit"
SEGFAULT = "support.robustness_workers:segfault"


def assert_works(client: Client) -> None:
    assert client.register(NOOP).wait_until_gone(30).exitcode == 0


# --- clients that are killed --------------------------------------------------------------------


def work_at_random(address: str, seed: int, attached: int) -> None:
    """A client's life in a fork: register, terminate, ask and wait, until it is killed."""
    rng = random.Random(seed)
    client = attach(address)
    os.write(attached, b".")
    handles = []
    while True:
        flags = rng.choice([Flags.NONE, Flags.CLASS_PARALLEL])
        handle = client.try_register(rng.choice([NOOP, SLEEP]), flags=flags)
        if handle is not None:
            handles.append(handle)
        if handles:
            victim = rng.choice(handles)
            with contextlib.suppress(WaitTimeoutError):
                rng.choice([victim.status, lambda h=victim: h.wait_for_startup(0.01)])()
            victim.terminate()
            with contextlib.suppress(WaitTimeoutError):
                rng.choice([victim.status, lambda h=victim: h.wait_until_gone(0.01)])()


def forked_client(address: str, seed: int) -> int:
    """The pid of a fork that is attached and works."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            work_at_random(address, seed, write)
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        assert select.select([file], [], [], 30)[0], "the fork does not attach"
        assert file.read(1) == b"."
    return pid


def test_clients_killed_at_any_moment_leave_nothing_behind() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    with supervisor(max_worker_processes=32, max_parallel_workers=8, spares=0) as client:
        books = Books(client)
        assert_works(client)
        descriptors = books.descriptors
        clients: list[int] = []
        for n in range(50):
            clients.append(forked_client(client.address, seed + n))
            if len(clients) < 3:
                continue
            time.sleep(rng.expovariate(1 / 0.02))  # a moment like any other
            victim = clients.pop(rng.randrange(len(clients)))
            if rng.random() < 0.3:
                os.kill(victim, signal.SIGSTOP)
                time.sleep(rng.random() * 0.01)
            os.kill(victim, signal.SIGKILL)
            os.waitpid(victim, 0)
        for victim in clients:
            os.kill(victim, signal.SIGKILL)
            os.waitpid(victim, 0)

        def nothing_left() -> bool:
            """What they had registered lives on, and obeys another client; what they could not
            announce any more is found by the sweep."""
            for info in client.workers():
                client.handle(info).terminate()
            return books.states == {FREE}

        poll_until(nothing_left)
        poll_until(lambda: books.descriptors == descriptors, message="descriptors")
        poll_until(lambda: books.children == 1, message="children")
        assert_works(client)


def test_clients_killed_while_they_attach_leave_nothing_behind() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    with supervisor(spares=0) as client:
        books = Books(client)
        descriptors = books.descriptors
        for _ in range(60):
            pid = os.fork()
            if pid == 0:
                try:
                    while True:
                        attach(client.address).close()
                finally:
                    os._exit(1)
            time.sleep(rng.random() * 0.01)  # in the middle of the first attachment, or of a later
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        poll_until(lambda: books.descriptors == descriptors)
        assert_works(client)


# --- workers that crash -------------------------------------------------------------------------


def test_a_worker_that_segfaults_at_each_start_backs_off_and_disturbs_nobody(
    tmp_path: Path,
) -> None:
    path, steadily = tmp_path / "starts", tmp_path / "steadily"
    with supervisor() as client:
        steady = client.register(SLEEP, name="steady")
        assert steady.wait_for_ready(30) is HandleStatus.STARTED
        pid = steady.pid
        crashing = client.register(SEGFAULT, str(path), restart_time=0)
        other = client.register(AGAIN, str(steadily), "x", 1, restart_time=0.1)
        poll_until(lambda: len(lines(path)) >= 7)
        assert_works(client)
        starts = [int(line) / 1e6 for line in lines(path)]
        gaps = [after - before for before, after in pairwise(starts)]
        # 10 ms twice, then doubled each time, up to 20 % less by chance; never earlier.
        for gap, least in zip(gaps, (10, 10, 16, 32, 64, 128), strict=False):
            assert gap >= least
        outcome = crashing.outcome
        assert outcome is not None
        assert (outcome.kind, outcome.signal, outcome.final) == ("signaled", signal.SIGSEGV, False)
        assert outcome.restarts >= 5
        poll_until(lambda: len(lines(steadily)) >= 3)
        assert (steady.pid, steady.status()) == (pid, HandleStatus.STARTED)
        crashing.terminate()
        assert crashing.wait_until_gone(30).final
        other.terminate()
        other.wait_until_gone(30)


def test_a_crash_loop_in_the_domain_leaves_those_outside_alone(tmp_path: Path) -> None:
    path = tmp_path / "starts"
    with supervisor() as client:
        outside = client.register(SLEEP, name="outside")
        assert outside.wait_for_ready(30) is HandleStatus.STARTED
        pid = outside.pid
        crashing = client.register(SEGFAULT, str(path), restart_time=0, flags=Flags.SHMEM_ACCESS)
        for _ in range(5):  # between the resets, and during them
            assert_works(client)
        poll_until(lambda: len(lines(path)) >= 6)
        starts = [int(line) / 1e6 for line in lines(path)]
        assert starts[5] - starts[4] >= 32  # resets back off as restarts do
        assert (outside.pid, outside.status()) == (pid, HandleStatus.STARTED)
        crashing.terminate()
        assert crashing.wait_until_gone(30).final


# --- workers that are stopped at awkward moments ------------------------------------------------


def test_a_stop_that_becomes_another_error_on_its_way_is_not_taken_for_a_failure() -> None:
    with supervisor() as client:
        worker = client.register("support.robustness_workers:make_another_error_of_the_stop")
        assert worker.wait_for_ready(30) is HandleStatus.STARTED
        worker.terminate()
        outcome = worker.wait_until_gone(30)
        assert (outcome.kind, outcome.exitcode, outcome.error) == ("exited", 1, None)


def test_a_stop_in_the_middle_of_the_imports_is_a_stop() -> None:
    with supervisor(max_worker_processes=16) as client:
        for _ in range(4):
            workers = [client.register(SLEEP) for _ in range(16)]
            for worker in workers:
                worker.wait_for_startup(30)
                worker.terminate()
            for worker in workers:
                outcome = worker.wait_until_gone(30)
                assert (outcome.kind, outcome.exitcode, outcome.error) == ("exited", 1, None)


# --- garbage and floods -------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["zeros", "ones", "noise"])
def test_an_inbox_full_of_garbage_is_put_right(pattern: str) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    with supervisor(max_worker_processes=70, max_parallel_workers=5) as client:
        steady = [
            client.register(SLEEP, flags=flags)
            for flags in (Flags.NONE, Flags.CLASS_PARALLEL, Flags.SHMEM_ACCESS)
        ]
        for handle in steady:
            assert handle.wait_for_ready(30) is HandleStatus.STARTED
        pids = [handle.pid for handle in steady]
        gone = client.register(NOOP)
        gone.wait_until_gone(30)
        with Rogue.of(client) as rogue:
            size = len(rogue.inbox)
            rogue.inbox[:] = {
                "zeros": lambda n: bytes(n),
                "ones": lambda n: b"\xff" * n,
                "noise": random.Random(seed).randbytes,
            }[pattern](size)
            used = {handle.slot for handle in steady}
            poll_until(lambda: {rogue.req(x).state for x in range(70) if x not in used} == {FREE})
            poll_until(lambda: [rogue.token(i).state for i in range(5)].count(FREE) == 4)
        assert [handle.pid for handle in steady] == pids
        for handle in steady:
            handle.terminate()
            assert handle.wait_until_gone(30).exitcode == 1
        poll_until(lambda: Books(client).states == {FREE})
        assert gone.status() is HandleStatus.STOPPED
        assert_works(client)


_DAMAGE_FOR_EVER = """
from support.rogues import Rogue
rogue = Rogue(address, nslots, 8)
at, zeros, ones = rogue.at, bytes(64 * nslots), b"\\xff" * ((nslots + 63) // 64 * 8)
test.send("ready")
while True:
    rogue.inbox[at["controls"] : at["controls"] + len(zeros)] = zeros
    rogue.inbox[at["dirty"] : at["dirty"] + len(ones)] = ones
"""

_REGISTER_FOR_EVER = """
from pgbgw import SupervisorDiedError, attach
client = attach(address)
test.send("ready")
try:
    while True:
        client.try_register("support.workers:noop")
except SupervisorDiedError:
    pass
"""


@pytest.mark.parametrize("nslots", [8, 2000])
@pytest.mark.parametrize("busy", [_DAMAGE_FOR_EVER, _REGISTER_FOR_EVER], ids=["damage", "register"])
def test_clients_that_never_rest_do_not_keep_a_supervisor_from_stopping(
    busy: str, nslots: int
) -> None:
    told = {"nslots": nslots}
    with supervisor(max_worker_processes=nslots) as client, ExitStack() as stack:
        scripts = [
            stack.enter_context(Script(busy, address=client.address, **told)) for _ in range(2)
        ]
        for script in scripts:
            assert script.hear() == "ready"
        client.stop("fast", timeout=30)
        for script in scripts:
            script.kill()


def hello(sock: socket.socket, *, pid: int | None = None, nonce: int | None = None) -> int:
    """Answer the challenge, rightly unless told otherwise; the type of what comes back."""
    message = unpack(sock_recv(sock))
    assert message is not None
    if message[0] == Message.REFUSED:
        return message[0]
    assert message[0] == Message.CHALLENGE
    body = HELLO.pack(PROTOCOL, 0)
    sock.send(pack(Message.HELLO, pid or os.getpid(), nonce or message[2], body))
    answer = unpack(sock_recv(sock))
    return 0 if answer is None else answer[0]


def sock_recv(sock: socket.socket) -> bytes:
    assert select.select([sock], [], [], 30)[0], "no answer"
    data, fds, _, _ = socket.recv_fds(sock, 65536, 8)
    for fd in fds:
        os.close(fd)
    return data


def hung_up(sock: socket.socket) -> bool:
    """Has the supervisor closed its end?  What it sent before is dropped."""
    try:
        while data := sock.recv(65536, socket.MSG_DONTWAIT):
            del data
    except BlockingIOError:
        return False
    except ConnectionResetError:
        pass
    return True


def malformed() -> Iterator[bytes]:
    """Messages that mean nothing, and some that would mean something if they were whole."""
    rng = random.Random(1)
    for size in (1, 4, 15, 16, 17, 1024, 5000):
        yield rng.randbytes(size)
    for type in (*Message, 0, 6, 15, 23, 31, 39, 2**32 - 1):
        if type in (Message.STOP, Message.DETACH):
            continue  # these would be obeyed
        for slot, generation in ((0, 1), (2**32 - 1, 2**64 - 1), (8, 1), (3, 2**38), (0, 0)):
            for body in (
                b"",
                b"x",
                GRACE.pack(-(2**63)),
                GRACE.pack(2**63 - 1),
                rng.randbytes(900),
            ):
                yield HEAD.pack(type, slot, generation) + body
    for mode in (0, 4, 2**32 - 1):
        yield pack(Message.STOP, mode)


def test_malformed_and_unknown_messages_are_ignored() -> None:
    with supervisor(max_worker_processes=8) as client:
        books = Books(client)
        steady = client.register(SLEEP)
        assert steady.wait_for_ready(30) is HandleStatus.STARTED
        descriptors = books.descriptors
        with raw_connection(client) as early, raw_connection(client) as welcomed:
            assert hello(welcomed) == Message.WELCOME
            for message in malformed():
                for sock in (early, welcomed):
                    while True:  # the supervisor reads no more than it wants in one pass
                        try:
                            sock.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                        except BlockingIOError:
                            assert select.select([], [sock], [], 30)[1]
                        except (BrokenPipeError, ConnectionResetError):
                            break  # a wrong HELLO
                        else:
                            break
            assert_works(client)
            # An empty message looks like the end, and is one.
            welcomed.send(b"")
            poll_until(lambda: hung_up(welcomed))
        assert_works(client)
        poll_until(lambda: books.descriptors == descriptors)
        assert steady.status() in (HandleStatus.STARTED, HandleStatus.STOPPED)


@pytest.mark.parametrize("wrong", ["pid", "nonce"])
def test_who_is_not_whom_he_says_is_turned_away(wrong: str) -> None:
    with supervisor() as client, raw_connection(client) as sock:
        answer = hello(sock, pid=1) if wrong == "pid" else hello(sock, nonce=12345)
        assert answer == Message.REFUSED
        poll_until(lambda: hung_up(sock))
        assert_works(client)


def test_a_descriptor_that_a_client_sends_along_does_not_arrive() -> None:
    with supervisor(spares=0) as client, raw_connection(client) as sock:
        books = Books(client)
        assert hello(sock) == Message.WELCOME
        descriptors = books.descriptors
        for _ in range(20):
            with contextlib.suppress(PermissionError):  # what newer kernels say
                socket.send_fds(sock, [pack(Message.KICK)], [0])
        assert_works(client)
        assert books.descriptors == descriptors


_FLOOD = """
import os, socket
from pgbgw import attach
from pgbgw._wire import Message, pack
client = attach(address)
sock = client._channels._sock
messages = [os.urandom(40), pack(Message.KICK, 3, 1), pack(Message.SUBSCRIBE, 3, 1), b"short"]
sent = 0
while not test.poll():
    for message in messages * 50:
        try:
            sock.send(message, socket.MSG_DONTWAIT)
            sent += 1
        except BlockingIOError:
            pass
    test.send(sent)
test.send(None)
client.close()
"""


def test_floods_of_messages_take_only_their_senders_share() -> None:
    with supervisor(max_worker_processes=8) as client, ExitStack() as stack:
        floods = [stack.enter_context(Script(_FLOOD, address=client.address)) for _ in range(2)]
        sent = [script.hear() for script in floods]
        for _ in range(5):
            worker = client.register(SLEEP)
            assert worker.wait_for_ready(30) is HandleStatus.STARTED
            worker.terminate()
            assert worker.wait_until_gone(30).exitcode == 1
        for before, script in zip(sent, floods, strict=True):
            script.say("enough")
            latest = before
            while (now := script.hear()) is not None:
                latest = now
            assert latest > before  # it has gone on all the while


def test_a_client_that_never_reads_loses_its_messages_and_nothing_else() -> None:
    with supervisor(max_worker_processes=8) as client, raw_connection(client) as deaf:
        assert hello(deaf) == Message.WELCOME
        worker = client.register(SLEEP)
        assert worker.wait_for_ready(30) is HandleStatus.STARTED
        # Each is answered: thousands of answers find no room.
        for _ in range(3000):
            while True:
                try:
                    deaf.send(pack(Message.SUBSCRIBE, worker.slot, worker.generation))
                except BlockingIOError:
                    assert select.select([], [deaf], [], 30)[1]
                else:
                    break
        worker.terminate()
        assert worker.wait_until_gone(30).exitcode == 1
        assert_works(client)
        # When it does read at last it is told that it has missed something.
        seen = set()

        def overflow() -> bool:
            with contextlib.suppress(BlockingIOError):
                while message := unpack(deaf.recv(4096, socket.MSG_DONTWAIT)):
                    seen.add(message[0])
            return Message.OVERFLOW in seen

        poll_until(overflow)


def test_thousands_of_subscriptions_are_kept_and_given_up() -> None:
    with supervisor(max_worker_processes=4096, spares=0) as client:
        books = Books(client)
        descriptors = books.descriptors
        with ExitStack() as stack:
            socks = [stack.enter_context(raw_connection(client)) for _ in range(4)]
            for sock in socks:
                assert hello(sock) == Message.WELCOME
            for slot in range(4096):
                for sock in socks:
                    message = pack(Message.SUBSCRIBE, slot, 1)
                    while True:
                        try:
                            sock.send(message, socket.MSG_DONTWAIT)
                        except BlockingIOError:
                            select.select([], [sock], [], 30)
                            hung_up(sock)  # reads, and so makes room for the answers
                        else:
                            break
            handle = client.register(NOOP)
            assert handle.wait_until_gone(30).exitcode == 0

            def told(sock: socket.socket) -> bool:
                with contextlib.suppress(BlockingIOError):
                    while message := unpack(sock.recv(4096, socket.MSG_DONTWAIT)):
                        if message[0] in (Message.FINAL, Message.OVERFLOW):
                            return True
                return False

            for sock in socks:
                poll_until(lambda sock=sock: told(sock))
            assert_works(client)
        poll_until(lambda: books.descriptors == descriptors)
        assert_works(client)


def test_a_process_has_a_bounded_number_of_connections() -> None:
    with supervisor() as client, ExitStack() as stack:
        answers = []
        for _ in range(270):
            sock = stack.enter_context(raw_connection(client))
            answers.append(hello(sock))
        assert set(answers) == {Message.WELCOME, Message.REFUSED}
        assert answers.count(Message.WELCOME) == 255  # and the client's own
        silent = [stack.enter_context(raw_connection(client)) for _ in range(50)]
        assert_works(client)
        with Script(
            "from pgbgw import attach; attach(address).close(); test.send('attached')",
            address=client.address,
        ) as script:
            assert script.hear() == "attached"
        assert len(silent) == 50


# --- a great many at once -----------------------------------------------------------------------


def test_ten_thousand_registrations_at_once_delay_no_terminate() -> None:
    with supervisor(max_worker_processes=16384) as client:
        sleeper, early = client.register(SLEEP), client.register(SLEEP)
        for handle in (sleeper, early):
            assert handle.wait_for_ready(30) is HandleStatus.STARTED
        with paused(client):
            batch = [client.register(NOOP) for _ in range(10_000)]
            early.terminate()
        # One that is there when the batch is found, and one that comes while it is being launched.
        early.wait_until_gone(30)
        poll_until(lambda: any(h.status() is not HandleStatus.NOT_YET_STARTED for h in batch))
        sleeper.terminate()
        sleeper.wait_until_gone(30)
        waiting = sum(h.status() is HandleStatus.NOT_YET_STARTED for h in batch)
        assert waiting > 5000
        client.stop("fast", timeout=30)
        assert {h.status() for h in batch} == {HandleStatus.STOPPED}
        kinds = {h.outcome.kind for h in batch[-100:] if h.outcome is not None}
        assert kinds == {"cancelled"}


def test_ten_thousand_registrations_are_accepted_and_cancelled_without_being_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    startup = Startup(tmp_path / "startup", monkeypatch)
    with supervisor(max_worker_processes=16384, startup=startup.entry) as client:
        startup.wait_for_run(1)
        first = client.register(SLEEP, start_time=StartTime.SUPERVISOR_START)
        assert first.wait_for_ready(30) is HandleStatus.STARTED
        batch = [client.register(NOOP) for _ in range(10_000)]
        first.terminate()
        first.wait_until_gone(30)
        poll_until(lambda: len(noticed(client)) == 10_000)
        assert client.register(NOOP, start_time=StartTime.SUPERVISOR_START).wait_until_gone(30)
        for handle in batch:
            handle.terminate()
        assert client.wait(batch, 30, "ALL_GONE")[1] == set()
        assert {h.status() for h in batch} == {HandleStatus.STOPPED}
        assert client.workers() == []
        startup.finish()
        assert_works(client)


# --- long waits and long service ---------------------------------------------------------------


def test_an_interval_of_a_thousand_days_is_slept_through_with_nobody_attached() -> None:
    client = Supervisor().start()
    owned = client._process
    assert owned is not None
    try:
        resting = client.register(AGAIN, os.devnull, "x", 1, restart_time=MAX_RESTART_TIME)
        resting.wait_for_startup(30)
        assert resting.wait_for_shutdown(30) is HandleStatus.STOPPED
        with Rogue.of(client) as observer:
            client.close()

            def sleeps_for_long() -> bool:
                """A tick wakes the supervisor each second while a client is attached."""
                word = observer.sleep_word
                with contextlib.suppress(subprocess.TimeoutExpired):
                    owned.wait(1.2)
                return word % 2 == 1 and observer.sleep_word == word

            poll_until(sleeps_for_long)
        assert owned.poll() is None
        client = attach(client.address)
        assert [w.restart_time for w in client.workers()] == [MAX_RESTART_TIME]
        assert_works(client)
    finally:
        with contextlib.suppress(AttachError):
            client.stop("fast", timeout=30)
        client.close()
        owned.wait(30)


@pytest.mark.leaves_sockets
def test_a_killed_supervisor_takes_ten_thousand_requests_with_it() -> None:
    with supervisor(max_worker_processes=16384) as client:
        with paused(client):
            batch = [client.register(NOOP) for _ in range(10_000)]
        kill_supervisor(client)
        for handle in batch[-10:]:
            assert handle.wait_for_shutdown(30) is HandleStatus.SUPERVISOR_DIED
        done, rest = client.wait(batch, 30, "ALL_GONE")
        assert rest == set()
        assert len(done) == 10_000
