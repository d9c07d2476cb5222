"""The system calls of _kernel, in a child process where they would change or end this one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import pytest

from pgbgw import _kernel


@pytest.fixture
def fork() -> Iterator[Callable[[Callable[[], object]], int]]:
    """Fork a child that runs a function and exits with 0, or with 99 if it raised."""
    pids = []

    def fork_child(function: Callable[[], object]) -> int:
        pid = os.fork()
        if pid == 0:
            run_and_exit(function)
        pids.append(pid)
        return pid

    yield fork_child
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def run_and_exit(function: Callable[[], object]) -> NoReturn:
    status = 99
    _kernel.set_parent_death_signal(signal.SIGKILL)  # the watchdog ends a test without a clean-up
    try:
        function()
        status = 0
    finally:
        os._exit(status)


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# -- features --------------------------------------------------------------------------------------


def test_nothing_is_missing_here():
    assert _kernel.missing_features() == []


def test_a_probe_that_fails_is_named_with_the_reason(fork):
    def without_descriptors():
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
        missing = _kernel.missing_features()
        assert f"pidfd_open: {os.strerror(errno.EMFILE)}" in missing
        assert not any("POPULATE" in feature for feature in missing)

    assert exit_code(fork(without_descriptors)) == 0


def test_probing_leaves_no_descriptor():
    before = os.listdir("/proc/self/fd")
    _kernel.missing_features()
    assert os.listdir("/proc/self/fd") == before


# -- processes -------------------------------------------------------------------------------------


def test_a_process_dies_with_its_parent(fork):
    alive, held_by_both = os.pipe()

    def parent():
        if os.fork() == 0:
            run_and_exit(child)
        signal.pause()

    def child():
        os.write(held_by_both, b"armed")  # run_and_exit did it
        signal.pause()

    pid = fork(parent)
    os.close(held_by_both)
    assert os.read(alive, 5) == b"armed"
    os.kill(pid, signal.SIGKILL)
    assert exit_code(pid) == -signal.SIGKILL
    assert os.read(alive, 5) == b""  # end-of-file: the grandchild is gone as well
    os.close(alive)


def test_a_parent_death_signal_must_be_a_signal():
    with pytest.raises(OSError, match="Invalid argument"):
        _kernel.set_parent_death_signal(1000)


def test_a_thread_name_is_cut_to_15_bytes(fork):
    def renamed():
        _kernel.set_thread_name(b"pgbgw: a very long name")
        with open("/proc/self/comm") as comm:
            assert comm.read() == "pgbgw: a very l\n"

    assert exit_code(fork(renamed)) == 0


@pytest.mark.parametrize("call", [_kernel.set_thread_name, lambda name: _kernel.memfd(name, 1)])
def test_a_name_with_a_null_byte_is_refused(call):
    with pytest.raises(ValueError, match="embedded null byte"):
        call(b"a\0b")


@pytest.mark.parametrize("call", [_kernel.set_thread_name, lambda name: _kernel.memfd(name, 1)])
def test_a_name_must_be_bytes(call):
    for name in (None, "text"):
        with pytest.raises(TypeError):
            call(name)


def test_close_range_closes_both_ends_and_nothing_else(fork):
    def closes():
        first, *_, last = [os.dup(0) for _ in range(5)]
        above = os.dup(0)
        _kernel.close_range(first + 1, last)
        os.fstat(first)
        os.fstat(above)
        for fd in range(first + 1, last + 1):
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)
        _kernel.close_range(first)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(above)

    assert exit_code(fork(closes)) == 0


def test_close_range_refuses_a_range_that_runs_backwards():
    with pytest.raises(OSError, match="Invalid argument"):
        _kernel.close_range(20, 10)


# -- signals ---------------------------------------------------------------------------------------


def test_signals_are_read_with_their_sender(fork):
    def reads():
        signals = {signal.SIGTERM, signal.SIGCHLD}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        fd = _kernel.signalfd(signals)
        assert _kernel.read_signals(fd) == []
        os.kill(os.getpid(), signal.SIGTERM)
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitid(os.P_PID, child, os.WEXITED)
        assert set(_kernel.read_signals(fd)) == {
            (signal.SIGTERM, os.getpid(), os.getuid()),
            (signal.SIGCHLD, child, os.getuid()),
        }
        assert _kernel.read_signals(fd) == []

    assert exit_code(fork(reads)) == 0


def test_a_flood_of_signals_is_read_in_bounded_parts(fork):
    def floods():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGRTMIN})
        fd = _kernel.signalfd([signal.SIGRTMIN])
        for _ in range(130):  # real-time signals queue, each on its own
            os.kill(os.getpid(), signal.SIGRTMIN)
        assert len(_kernel.read_signals(fd)) == 128
        assert select.select([fd], [], [], 0)[0] == [fd]
        assert len(_kernel.read_signals(fd)) == 2

    assert exit_code(fork(floods)) == 0


def test_a_signalfd_is_non_blocking_and_ends_at_exec():
    fd = _kernel.signalfd([signal.SIGUSR2])
    assert not os.get_blocking(fd)
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_what_is_not_a_signal_is_refused():
    with pytest.raises(OSError, match="Invalid argument"):
        _kernel.signalfd([signal.SIGTERM, 1000])
    with pytest.raises(TypeError):
        _kernel.signalfd([None])


def test_reading_signals_from_no_descriptor_is_an_error():
    with pytest.raises(OSError, match="Bad file descriptor"):
        _kernel.read_signals(-1)


def test_quit_ends_a_process_with_2_although_python_is_busy(fork):
    ready, set_ready = os.pipe()

    def busy():
        _kernel.install_quit_handler()
        os.write(set_ready, b".")
        sum(range(10**15))  # one bytecode instruction: a Python handler would never get its turn

    pid = fork(busy)
    os.read(ready, 1)
    os.kill(pid, signal.SIGQUIT)
    assert exit_code(pid) == 2
    os.close(ready)
    os.close(set_ready)


def test_a_quit_that_came_while_it_was_blocked_is_not_lost(fork):
    def quits():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGQUIT})
        os.kill(os.getpid(), signal.SIGQUIT)
        _kernel.install_quit_handler()

    assert exit_code(fork(quits)) == 2


# -- sockets ---------------------------------------------------------------------------------------


def test_descriptors_are_refused_where_asked_for():
    sender, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with sender, receiver:
        if not _kernel.refuse_rights(receiver.fileno()):
            pytest.skip("this kernel has no SO_PASSRIGHTS")
        with pytest.raises(PermissionError):
            socket.send_fds(sender, [b"x"], [0])
        assert receiver.send(b"x") == 1
        socket.send_fds(receiver, [b"x"], [0])  # the other direction is its owner's affair


def test_the_refusal_of_a_listener_holds_before_accept(runtime_dir):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        if not _kernel.refuse_rights(listener.fileno()):
            pytest.skip("this kernel has no SO_PASSRIGHTS")
        path = str(runtime_dir / "listener")
        listener.bind(path)
        listener.listen()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(path)
            with pytest.raises(PermissionError):
                socket.send_fds(client, [b"x"], [0])


def test_the_peer_of_a_socket_is_the_process_that_made_it(fork):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        pidfd = _kernel.peer_pidfd(ours.fileno())
        if pidfd < 0:
            pytest.skip("this kernel has no SO_PEERPIDFD")
        with open(f"/proc/self/fdinfo/{pidfd}") as info:
            assert f"Pid:\t{os.getpid()}\n" in info.readlines()
        assert not os.get_inheritable(pidfd)
        os.close(pidfd)


@pytest.mark.parametrize("call", [_kernel.refuse_rights, _kernel.peer_pidfd])
def test_what_is_no_socket_is_an_error(call):
    read_end, write_end = os.pipe()
    with pytest.raises(OSError, match="non-socket"):
        call(read_end)
    os.close(read_end)
    os.close(write_end)


# -- shared memory ---------------------------------------------------------------------------------

ALL_BUT_WRITE = (
    _kernel.F_SEAL_SHRINK | _kernel.F_SEAL_GROW | _kernel.F_SEAL_FUTURE_WRITE | _kernel.F_SEAL_SEAL
)


def test_a_memory_file_is_empty_private_and_of_the_size_asked_for():
    fd = _kernel.memfd(b"pgbgw-test", 10_000)
    assert os.readlink(f"/proc/self/fd/{fd}") == "/memfd:pgbgw-test (deleted)"
    assert os.pread(fd, 20_000, 0) == bytes(10_000)
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_a_size_seal_holds_and_seals_are_final():
    seals = _kernel.F_SEAL_SHRINK | _kernel.F_SEAL_GROW | _kernel.F_SEAL_SEAL
    fd = _kernel.memfd(b"pgbgw-test", mmap.PAGESIZE, seals)
    for size in (0, 2 * mmap.PAGESIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    with pytest.raises(PermissionError):
        _kernel.add_seals(fd, _kernel.F_SEAL_WRITE)
    os.close(fd)


def test_future_write_spares_the_mapping_of_whoever_sealed():
    fd = _kernel.memfd(b"pgbgw-test", mmap.PAGESIZE)
    with mmap.mmap(fd, mmap.PAGESIZE) as ours:
        _kernel.add_seals(fd, ALL_BUT_WRITE)
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & ALL_BUT_WRITE == ALL_BUT_WRITE
        with pytest.raises(PermissionError):
            mmap.mmap(fd, mmap.PAGESIZE)
        with mmap.mmap(fd, mmap.PAGESIZE, prot=mmap.PROT_READ) as theirs:
            ours[:5] = b"hello"
            assert theirs[:5] == b"hello"
    os.close(fd)


@pytest.mark.parametrize(("size", "seals"), [(-1, 0), (1, 0x8000)])
def test_a_memory_file_that_cannot_be_leaves_no_descriptor(size, seals):
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="Invalid argument"):
        _kernel.memfd(b"pgbgw-test", size, seals)
    assert os.listdir("/proc/self/fd") == before


def test_only_a_memory_file_can_be_sealed():
    with open(__file__) as file, pytest.raises(OSError):  # EINVAL or EPERM
        _kernel.add_seals(file.fileno(), _kernel.F_SEAL_SEAL)


# -- the log relay ---------------------------------------------------------------------------------


class Relay:
    """A relay process between `sender` and the pipe `out`."""

    def __init__(self, fork, kind=socket.SOCK_SEQPACKET) -> None:
        self.sender, receiver = socket.socketpair(socket.AF_UNIX, kind)
        self.out, out_write = os.pipe()

        def child():
            self.sender.close()
            os.close(self.out)
            _kernel.relay(receiver.fileno(), out_write)

        self.pid = fork(child)
        receiver.close()
        os.close(out_write)

    def read_all(self) -> bytes:
        with open(self.out, "rb", closefd=False) as file:
            return file.read()

    def stop_reading(self) -> None:
        os.close(self.out)
        self.out = -1

    def close(self) -> None:
        self.sender.close()
        if self.out >= 0:
            self.stop_reading()


@pytest.fixture
def relay(fork) -> Iterator[Relay]:
    with contextlib.closing(Relay(fork)) as a_relay:
        yield a_relay


def test_a_relay_writes_what_it_is_sent_and_ends_with_its_sender(relay):
    for i in range(100):
        relay.sender.send(b"line %d\n" % i)
    relay.sender.close()
    assert relay.read_all() == b"".join(b"line %d\n" % i for i in range(100))
    assert exit_code(relay.pid) == 0


def test_a_relay_passes_a_message_larger_than_a_pipe_takes_at_a_time(relay):
    message = bytes(range(256)) * 255
    relay.sender.send(message)
    relay.sender.send(message)
    relay.sender.close()
    assert relay.read_all() == message * 2
    assert exit_code(relay.pid) == 0


def test_a_relay_drains_its_sender_when_the_reader_is_gone(relay):
    relay.stop_reading()
    for _ in range(1000):  # more than the socket holds: a relay that stopped would block us
        relay.sender.send(b"x" * 10_000)
    relay.sender.close()
    assert exit_code(relay.pid) == 0


def test_a_reader_that_pauses_loses_nothing(relay):
    relay.sender.setblocking(False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            relay.sender.send(b"x" * 10_000)
            sent += 10_000
    relay.sender.setblocking(True)
    assert len(os.read(relay.out, 65536)) + 10_000 <= sent
    relay.sender.close()
    assert sent - 65536 <= len(relay.read_all()) < sent
    assert exit_code(relay.pid) == 0


def test_a_relay_does_not_outlive_its_sender_for_a_reader_that_stopped(relay):
    for _ in range(8):
        relay.sender.send(b"x" * 10_000)  # the pipe holds 65,536
    relay.sender.close()
    started = time.monotonic()
    assert exit_code(relay.pid) == 1
    assert time.monotonic() - started > 3


def test_a_relay_ignores_a_broken_pipe_and_non_blocking_descriptors(fork):
    sender, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    receiver.setblocking(False)
    out, out_write = os.pipe()
    os.set_blocking(out_write, False)

    def child():
        sender.close()
        os.close(out)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        _kernel.relay(receiver.fileno(), out_write)

    pid = fork(child)
    receiver.close()
    os.close(out_write)
    sender.send(b"first\n")
    assert os.read(out, 100) == b"first\n"
    for _ in range(3):
        sender.send(b"x" * 60_000)  # more than the pipe takes
    unread = 180_000
    while unread > 0:
        unread -= len(os.read(out, 10_000))
    os.close(out)
    sender.send(b"into the void\n")
    sender.close()
    assert exit_code(pid) == 0


def test_an_empty_datagram_ends_a_relay(fork):
    with contextlib.closing(Relay(fork, socket.SOCK_DGRAM)) as relay:
        relay.sender.send(b"last words\n")
        relay.sender.send(b"")
        assert relay.read_all() == b"last words\n"
        assert exit_code(relay.pid) == 0


def test_a_relay_without_a_socket_gives_up(fork):
    assert exit_code(fork(lambda: _kernel.relay(-1, 2))) == 1
