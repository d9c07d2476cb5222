"""Control groups: what a worker has started ends with it, wherever it has gone.

With Supervisor(cgroup=DIRECTORY), a control group (version 2) that we may write to, a supervisor
makes a group of its own in there, and in that one for every process that it launches.  A process
cannot leave its group by fork, exec, setsid or a death-signal that it clears, and the kernel kills
a group as a whole (cgroup.kill).

A supervisor's group is its own as long as it holds a lock (flock) on the directory; workers close
that descriptor.  So what a killed supervisor has left is known, and the next one that starts with
the same DIRECTORY kills it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import time
from collections import deque
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from pgbgw import _kernel
from pgbgw.errors import StartError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

logger = logging.getLogger(__name__)

PREFIX = "pgbgw-"
REMOVALS = 8  # of earlier groups, tried at a time
PATIENCE = 2.0  # seconds for the killed to be gone, at start and at the end

_HINT = (
    "it must be a cgroup v2 directory that this user may write to, such as that of a systemd unit"
    " with Delegate=yes, and the supervisor must run in it or below"
)


class SupervisorCgroup:
    """A supervisor's group: `make` one, `new` groups of workers in it, `close` it."""

    def __init__(self, base: int, name: str, fd: int) -> None:
        self.fd = fd  # of the directory, locked: not for workers
        self._base = base
        self._name = name
        self._made = 0
        self._leaving: deque[str] = deque()  # groups whose last members have not gone yet

    @classmethod
    def make(cls, directory: str) -> Self:
        """A fresh group in `directory`, once it is known to work; kill what the dead have left.

        Raises StartError.
        """
        with _start_error(directory):
            base = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.stat("cgroup.controllers", dir_fd=base)  # only version 2 has it
                for name in os.listdir(base):
                    if name.startswith(PREFIX) and _end_dead(base, name):
                        logger.info('killed what a dead supervisor left in cgroup "%s"', name)
                made = cls(base, *_make_locked(base))
            except BaseException:
                os.close(base)
                raise
        try:
            with _start_error(directory):
                made._try_out()
        except BaseException:
            made.close()
            raise
        return made

    @property
    def descriptors(self) -> tuple[int, int]:
        """Those that workers close."""
        return self._base, self.fd

    def _try_out(self) -> None:
        """Have a process enter a group and be killed in it: permissions are found out by trying."""
        group = self.new(-1)
        error, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                _kernel.set_parent_death_signal(signal.SIGKILL)
                group.enter()
                os.close(self.fd)  # it holds the lock, which a dead supervisor's must not be
                os.write(told, b"0")
                time.sleep(60)
            except OSError as exc:
                os.write(told, b"%d" % (exc.errno or -1))
            finally:
                os._exit(1)
        os.close(told)
        try:
            number = int(os.read(error, 16) or b"0")
            if number:
                raise OSError(number, f"no process can enter: {os.strerror(number)}")
            _write(self.fd, f"{group.name}/cgroup.kill", b"1")
        finally:
            os.close(error)
            group.remove()
            os.kill(pid, signal.SIGKILL)  # if that has failed
            os.waitpid(pid, 0)

    def new(self, slot: int) -> WorkerCgroup:
        """A group for a process that is about to be launched.  May raise OSError."""
        self._remove_some()
        self._made += 1
        name = f"worker-{slot}-{self._made}"
        os.mkdir(name, 0o700, dir_fd=self.fd)
        return WorkerCgroup(self, name)

    def remove(self, name: str) -> None:
        self._leaving.append(name)
        self._remove_some()

    def _remove_some(self) -> None:
        """A killed process is in its group until it has ended: what cannot go now goes later."""
        for _ in range(min(REMOVALS, len(self._leaving))):
            name = self._leaving.popleft()
            try:
                os.rmdir(name, dir_fd=self.fd)
            except FileNotFoundError:
                pass
            except OSError:
                self._leaving.append(name)

    def close(self) -> None:
        """Kill all that is left in the group, and remove it."""
        _end(self._base, self._name, self.fd)
        os.close(self.fd)
        os.close(self._base)


class WorkerCgroup:
    """The group of one process, and of all that it starts."""

    __slots__ = ("_parent", "name")

    def __init__(self, parent: SupervisorCgroup, name: str) -> None:
        self._parent = parent
        self.name = name

    def enter(self) -> None:
        """Put the calling process into it; where this fails nothing may be run."""
        _write(self._parent.fd, f"{self.name}/cgroup.procs", b"0")

    def kill(self) -> None:
        """SIGKILL to every process in it, also to those that are being forked just now."""
        with suppress(OSError):
            _write(self._parent.fd, f"{self.name}/cgroup.kill", b"1")

    def remove(self) -> None:
        """Kill what is left in it; it goes when the last member has."""
        self.kill()
        self._parent.remove(self.name)


@contextmanager
def _start_error(directory: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise StartError(
            f'could not use "{directory}" for the workers\' control groups',
            detail=exc.strerror or str(exc),
            hint=_HINT,
        ) from exc


def _make_locked(base: int) -> tuple[str, int]:
    """A new group and a descriptor of it that holds its lock."""
    while True:
        name = f"{PREFIX}{os.getpid()}-{os.urandom(8).hex()}"
        os.mkdir(name, 0o700, dir_fd=base)
        with suppress(FileNotFoundError):
            fd = _open(base, name)
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.stat(name, dir_fd=base)
                return name, fd
            os.close(fd)
        # Somebody took it for one that a dead supervisor had left, between our two steps.


def _end_dead(base: int, name: str) -> bool:
    """End the group of a supervisor that is dead; whether it was one, and is gone."""
    try:
        fd = _open(base, name)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _end(base, name, fd)
    except OSError:  # its supervisor lives
        return False
    finally:
        os.close(fd)


def _end(base: int, name: str, fd: int) -> bool:
    """Kill all in a group and remove it, with those in it; False if something stays."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with suppress(OSError):
            _write(fd, "cgroup.kill", b"1")
        for _, inner, _, above in os.fwalk(".", topdown=False, dir_fd=fd):
            for one in inner:
                with suppress(OSError):
                    os.rmdir(one, dir_fd=above)
        try:
            os.rmdir(name, dir_fd=base)
        except FileNotFoundError:
            return True
        except OSError as exc:
            if time.monotonic() >= deadline:
                logger.warning('cgroup "%s" could not be removed: %s', name, exc.strerror)
                return False
            time.sleep(0.005)
        else:
            return True


def _open(base: int, name: str) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.open(name, flags, dir_fd=base)


def _write(directory: int, name: str, value: bytes) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.write(fd, value)
    finally:
        os.close(fd)
