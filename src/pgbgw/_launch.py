"""Processes the supervisor starts: fork, or a fresh interpreter; their signals and their end.

The order in a new process is fixed: parent-death signal first, then the check that the parent is
still there (the other order leaks an orphan), then a session of its own.  Stop signals stay blocked
until the worker's own handlers are in, so none is lost and none meets the supervisor's.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import struct
import sys
import time
from array import array
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NoReturn

from pgbgw import _kernel
from pgbgw._cgroup import WorkerCgroup
from pgbgw._wire import HEAD, MAX_MESSAGE, MAX_READS, Message, pack

logger = logging.getLogger(__name__)

# Everything that asks a process for something, or would end it for nothing that it has done: all
# but faults, what stops and continues, and what Python or the kernel ignores anyway.
BLOCKED_SIGNALS = frozenset(signal.valid_signals()) - {
    signal.SIGKILL,
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGABRT,
    signal.SIGTRAP,
    signal.SIGSYS,
    signal.SIGSTOP,
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGCONT,
    signal.SIGCHLD,
    signal.SIGPIPE,
    signal.SIGURG,
    signal.SIGWINCH,
}


def fill_standard_descriptors() -> list[int]:
    """Open /dev/null for each of 0, 1 and 2 that is closed; which they were.  Otherwise a file of
    ours would get the number, and take what somebody prints."""
    filled = []
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number
            filled.append(fd)
    return filled


def interpreter_command(module: str, function: str, path: Sequence[str], *args: str) -> list[str]:
    """The command line of a fresh interpreter that calls module.function(*args).

    The module search path is handed on as it is, the flags of this interpreter too; nothing is
    added to the path and the user's `__main__` is not run.
    """
    import subprocess  # not for a supervisor that forks

    code = (
        "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
        f"from {module} import {function}; {function}(*sys.argv[2:])"
    )
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    if "-P" not in flags:
        flags.append("-P")
    return [sys.executable, *flags, "-c", code, json.dumps(list(path)), *args]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every worker of a supervisor finds around it; fixed when the supervisor starts."""

    address: str
    path: list[str]  # sys.path, absolute
    directory: str
    environ: dict[str, str]
    open_files: tuple[int, int]  # RLIMIT_NOFILE as it was
    workers_lock: int  # a descriptor that every worker inherits
    own_descriptors: tuple[int, ...]  # ours below first_descriptor: workers close them
    first_descriptor: int  # from here on all descriptors are ours
    log_level: int
    delay: float = 0.0  # post_auth_delay
    supervisor: int = field(default_factory=os.getpid)


_OUTCOME_SIZE = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one worker is told besides its record."""

    epoch: int
    slot: int  # -1: the startup worker, which has none
    generation: int
    memory: int  # descriptor of the domain's shared memory, -1: none
    last_outcome: dict[str, Any] | None = None  # fields of an Outcome

    def message(self, record: bytes) -> bytes:
        """A LAUNCH that tells a waiting process what it is to be; its memory travels beside it."""
        last = b"" if self.last_outcome is None else json.dumps(self.last_outcome).encode()
        body = _OUTCOME_SIZE.pack(len(last)) + last + record
        return pack(Message.LAUNCH, self.slot & 0xFFFFFFFF, self.generation, body)

    @classmethod
    def from_message(cls, epoch: int, data: bytes, fds: Sequence[int]) -> tuple[Assignment, bytes]:
        """The assignment and the record in a LAUNCH."""
        _, slot, generation = HEAD.unpack_from(data)
        start = HEAD.size + _OUTCOME_SIZE.size
        end = start + _OUTCOME_SIZE.unpack_from(data, HEAD.size)[0]
        last = json.loads(data[start:end]) if end > start else None
        slot = -1 if slot == 0xFFFFFFFF else slot
        return cls(epoch, slot, generation, fds[0] if fds else -1, last), data[end:]


class Child:
    """A process we launched and have not reaped.  Until then its pid cannot be anybody else's."""

    __slots__ = (
        "attached",
        "cgroup",
        "channel",
        "clean",
        "error",
        "hung_up",
        "pid",
        "pidfd",
        "started",
    )

    def __init__(
        self, pid: int, pidfd: int, channel: socket.socket, cgroup: WorkerCgroup | None
    ) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.channel = channel
        self.cgroup = cgroup
        self.started = time.monotonic_ns()
        self.attached = False  # the dead-man switch: see Message.ATTACHED, CLEAN
        self.clean = False
        self.error = b""
        self.hung_up = False  # nothing more will come on the channel

    def signal(self, signum: int) -> None:
        """Signal the process alone; nothing happens if it has just died."""
        try:
            signal.pidfd_send_signal(self.pidfd, signum)
        except ProcessLookupError:
            pass
        except OSError as exc:  # another user's by now: it may have become a setuid program
            logger.warning("could not send signal %d to process %d: %s", signum, self.pid, exc)

    def signal_group(self, signum: int) -> None:
        """Signal the process and its group once; the process alone if it has no group yet.

        SIGKILL goes to its whole cgroup, if it has one.
        """
        if signum == signal.SIGKILL and self.cgroup is not None:
            self.cgroup.kill()
        try:
            os.killpg(self.pid, signum)
        except (ProcessLookupError, PermissionError):
            self.signal(signum)

    def messages(self, limit: int = MAX_READS) -> list[tuple[int, bytes]]:
        """What the process has sent, at most `limit` messages.

        Keeps the dead-man switch and the error up to date.
        """
        found: list[tuple[int, bytes]] = []
        while len(found) < limit:
            try:
                data = self.channel.recv(MAX_MESSAGE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if len(data) < HEAD.size:
                self.hung_up = True
                break
            type, body = HEAD.unpack_from(data)[0], data[HEAD.size :]
            if type == Message.ATTACHED:
                self.attached = True
            elif type == Message.CLEAN:
                self.clean = True
            elif type == Message.ERROR:
                self.error = body
            found.append((type, body))
        return found

    def reap(self, leftovers: int = 0) -> tuple[int | None, int | None] | None:
        """(exit code, signal) of the process; None if it lives, (None, None) if the kernel does
        not know how it ended.

        leftovers: a signal for those of its group that it has left behind.  A group has its
        leader's number, which is nobody else's until the leader is reaped: so look whether it is
        dead, signal, and reap only then.  Afterwards no group is ever signalled.
        """
        try:
            status = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if status is None:
                return None
            if leftovers:
                self.signal_group(leftovers)
            os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            return None, None
        if status.si_code == os.CLD_EXITED:
            return status.si_status, None
        return None, status.si_status

    def hand_over(self, assignment: Assignment, record: bytes) -> None:
        """Tell a process that waits for it what it is to be.  OSError: it is gone.

        Its channel is empty and has room.  The memory of the domain goes along as a descriptor.
        """
        message = assignment.message(record)
        if assignment.memory >= 0:
            send_descriptors(self.channel, message, [assignment.memory])
        else:
            self.channel.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        self.started = time.monotonic_ns()

    def close(self) -> None:
        """Forget it; it is reaped.  What is left of its cgroup goes with it."""
        os.close(self.pidfd)
        self.channel.close()
        if self.cgroup is not None:
            self.cgroup.remove()

    def abandon(self) -> None:
        """Kill and reap a process that was just launched: we cannot look after it."""
        self.signal(signal.SIGKILL)
        os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        self.close()


def signal_groups_but_leaders(leaders: Collection[int], signum: int) -> None:
    """Signal what belongs to the process groups of these processes, but not them.

    They are not reaped.  A member is found by its number and signalled by a pidfd: if the number
    was in the group after the pidfd was opened, it is that process, or nobody is signalled.
    OSError if there is no descriptor to be had for that.
    """
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        try:
            if pid in leaders or os.getpgid(pid) not in leaders:
                continue
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:  # gone
            continue
        try:
            if os.getpgid(pid) in leaders:
                signal.pidfd_send_signal(pidfd, signum)
        except (ProcessLookupError, PermissionError):  # gone, or of another user by now
            pass
        finally:
            os.close(pidfd)


# What runs in a forked worker: it is given its end of the channel and never returns.
Body = Callable[[socket.socket], NoReturn]


def fork(
    surroundings: Surroundings, memory: int, body: Body, cgroup: WorkerCgroup | None = None
) -> Child:
    """Fork a process that runs body, in a cgroup.  OSError if there is no room for one."""
    ours, theirs = _channel()
    try:
        pid = os.fork()
        if pid == 0:
            _run_child(surroundings, memory, theirs, body, cgroup)
        return _adopt(pid, ours, cgroup)
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()


def spawn(
    surroundings: Surroundings, epoch: int, function: str, cgroup: WorkerCgroup | None = None
) -> Child:
    """Start a fresh interpreter that calls pgbgw._child.<function>: PostgreSQL's EXEC_BACKEND.

    It finds its surroundings on its channel, and then waits for its LAUNCH there.
    """

    def body(channel: socket.socket) -> NoReturn:
        for fd in (channel.fileno(), surroundings.workers_lock):
            os.set_inheritable(fd, True)
        command = interpreter_command(
            "pgbgw._child", function, surroundings.path, str(channel.fileno())
        )
        os.chdir(surroundings.directory)
        os.execve(command[0], command, surroundings.environ)

    child = fork(surroundings, -1, body, cgroup)
    # The environment went by exec; it may be larger than a message.
    told = {"epoch": epoch, "surroundings": asdict(replace(surroundings, environ={}))}
    try:
        message = pack(Message.LAUNCH, body=json.dumps(told).encode())
        child.channel.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except OSError:
        child.abandon()
        raise
    return child


def _channel() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    _kernel.refuse_rights(ours.fileno())
    return ours, theirs


def _adopt(pid: int, channel: socket.socket, cgroup: WorkerCgroup | None) -> Child:
    try:
        return Child(pid, os.pidfd_open(pid), channel, cgroup)
    except OSError:
        # Out of descriptors: as if the fork had failed.  The pid is still ours to kill and reap.
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _run_child(
    surroundings: Surroundings,
    memory: int,
    channel: socket.socket,
    body: Body,
    cgroup: WorkerCgroup | None,
) -> NoReturn:
    """The first instructions of every process we launch.  Nothing may get out of here."""
    try:
        _kernel.set_parent_death_signal(signal.SIGKILL)
        if os.getppid() != surroundings.supervisor:
            os._exit(1)
        os.setsid()  # and a process group, which it can never leave
        if cgroup is not None:
            cgroup.enter()
        signal.set_wakeup_fd(-1)
        for fd in surroundings.own_descriptors:
            os.close(fd)
        keep = {channel.fileno(), surroundings.workers_lock, memory}
        first = surroundings.first_descriptor
        for fd in sorted(k for k in keep if k >= first):
            if first < fd:
                _kernel.close_range(first, fd - 1)
            first = fd + 1
        _kernel.close_range(first)
        body(channel)
    except BaseException:  # an exec that failed, above all: tell why and be gone
        try:
            import traceback

            text = traceback.format_exc()
            channel.send(pack(Message.ERROR, body=text.encode()[-512:]), socket.MSG_DONTWAIT)
            os.write(2, text.encode())
        except BaseException:
            pass
    finally:
        os._exit(1)


def send_descriptors(channel: socket.socket, message: bytes, fds: Sequence[int]) -> None:
    """One message with descriptors, without waiting."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))]
    channel.sendmsg([message], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
