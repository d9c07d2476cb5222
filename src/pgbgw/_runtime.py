"""Where supervisors and clients meet: the runtime directory, addresses, locks and sockets.

An address is a directory and a name in it.  Three files belong to it:

    NAME.sock             the supervisor listens here while it runs
    NAME.supervisor.lock  fcntl lock of the supervisor: gone with that process, not inherited
    NAME.workers.lock     flock of a descriptor that every worker inherits: gone with the last one

Everything is done through a descriptor of the directory, so a path of any length works and nobody
can put another directory in its place half-way.

**One descriptor of a supervisor.lock per process.**  The kernel drops a process's fcntl locks on a
file as soon as the process closes *any* descriptor of it.  So the supervisor opens its own lock
file once, in `Locks.take`, and never calls `supervisor_locked` for its own address.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
import time
from dataclasses import dataclass
from typing import NoReturn

from pgbgw import _kernel
from pgbgw.errors import AttachError, ConfigurationError, StartError

__all__ = [
    "Address",
    "Locks",
    "connect",
    "listen",
    "open_directory",
    "private",
    "resolve",
    "runtime_directory",
    "supervisor_locked",
    "unlink_socket",
]

NAME_BYTES = 100
"""The longest name of an address, in bytes: with ".supervisor.lock" it must be a file name."""
BACKLOG = 4096
"""Connections that may wait to be accepted; the kernel cuts it to net.core.somaxconn."""

_DIRECTORY_HINT = (
    "the runtime directory (PGBGW_RUNTIME_DIR) must be a directory of this user, mode 0700, and no"
    " link; the directory of an address with a path must exist, and others must not write to it"
)
_PRIVATE = "private-"
_LOCK_SUFFIX = ".supervisor.lock"
_FLOCK = struct.Struct("@hhqqi0q")  # struct flock on 64-bit Linux: type, whence, start, length, pid
_UCRED = struct.Struct("@3i")  # struct ucred: pid, uid, gid


# --- addresses ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Address:
    """Where one supervisor is to be found; `str()` gives the path of its socket."""

    directory: str
    """Absolute."""
    name: str

    @property
    def path(self) -> str:
        return os.path.join(self.directory, self.name + ".sock")

    @property
    def socket_name(self) -> str:
        return self.name + ".sock"

    @property
    def lock_name(self) -> str:
        return self.name + _LOCK_SUFFIX

    @property
    def workers_lock_name(self) -> str:
        return self.name + ".workers.lock"

    def __str__(self) -> str:
        return self.path


def runtime_directory() -> str:
    """Return the directory of addresses that are a mere name; it need not exist yet.

    $PGBGW_RUNTIME_DIR, else /run/user/UID/pgbgw if /run/user/UID is ours, else /tmp/pgbgw-UID.
    """
    if chosen := os.environ.get("PGBGW_RUNTIME_DIR"):
        return os.path.abspath(chosen)
    uid = os.geteuid()
    session = f"/run/user/{uid}"
    try:
        status = os.lstat(session)
    except OSError:
        pass
    else:
        if stat.S_ISDIR(status.st_mode) and status.st_uid == uid:
            return session + "/pgbgw"
    return f"/tmp/pgbgw-{uid}"


def resolve(address: str | os.PathLike[str] | None) -> Address:
    """Return the address that a user means.

    None is $PGBGW_ADDRESS, else "default".  A name lives in the runtime directory; what has a "/"
    is the path of a socket, as `Address.path` gives it or without ".sock".
    Raises ConfigurationError for names that cannot be.
    """
    if address is None:
        address = os.environ.get("PGBGW_ADDRESS") or "default"
    directory, slash, name = os.fspath(address).rpartition("/")
    name = name.removesuffix(".sock")
    if problem := "its directory has a NUL byte" if "\0" in directory else _name_problem(name):
        raise ConfigurationError(
            f"invalid address {address!r}",
            detail=problem,
            hint='use a name such as "main", or the path of a socket such as "/run/app/main.sock"',
        )
    # "/main" has the root as its directory, "./main" the working one.
    return Address(os.path.abspath(directory or "/") if slash else runtime_directory(), name)


def private() -> Address:
    """Return a fresh address in the runtime directory, for a supervisor that one process owns."""
    return Address(runtime_directory(), f"{_PRIVATE}{os.getpid()}-{os.urandom(8).hex()}")


def _name_problem(name: str) -> str | None:
    if name in ("", ".", ".."):
        return f"the name {name!r} is not that of a file"
    if not name.isprintable():  # NUL, line ends, terminal escapes, lone surrogates, bidi marks
        return f"the name {name!r} has characters that cannot be printed"
    if len(name.encode()) > NAME_BYTES:
        return f"the name {name!r} is longer than {NAME_BYTES} bytes"
    return None


# --- the directory --------------------------------------------------------------------------------


def open_directory(address: Address, *, create: bool) -> int:
    """Open the address's directory, after a check that nobody else can put things into it.

    The runtime directory must be ours, a directory and no link, and closed to everybody else; with
    `create` (the supervisor's side) it is made, mode 0700.  A directory that the user named by path
    is taken as it is if only we, root, or (sticky, as /tmp) the owners of files can change what is
    in it: there the mode of the socket and the checks of owners have to do.

    The descriptor is closed on exec.  Raises StartError with `create`, else AttachError.
    """
    path = address.directory
    ours = path == runtime_directory()
    error = StartError if create else AttachError
    try:
        if create and ours:
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        fd = os.open(path, flags | os.O_NOFOLLOW if ours else flags)
    except OSError as exc:
        if not create and isinstance(exc, FileNotFoundError):
            raise AttachError(
                f'no supervisor is running at "{address}"',
                detail=f'the directory "{path}" does not exist',
                hint="start one with `pgbgw run`, or check the address and PGBGW_RUNTIME_DIR",
            ) from exc
        raise error(
            f'could not open the directory "{path}"', detail=exc.strerror, hint=_DIRECTORY_HINT
        ) from exc
    if problem := _directory_problem(os.fstat(fd), ours):
        os.close(fd)
        raise error(
            f'the directory "{path}" is not safe to use', detail=problem, hint=_DIRECTORY_HINT
        )
    return fd


def _directory_problem(status: os.stat_result, ours: bool) -> str | None:
    uid, mode = status.st_uid, stat.S_IMODE(status.st_mode)
    if uid != os.geteuid() and (ours or uid != 0):
        return f"it belongs to user {uid}, not to user {os.geteuid()}"
    if ours and mode & 0o077:
        return f"its mode is {mode:04o}: others can look into it"
    if not ours and mode & 0o022 and not mode & stat.S_ISVTX:
        return f"its mode is {mode:04o}: others can write to it"
    return None


# --- locks ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Locks:
    """The two locks of a running supervisor, held until `close` or the end of the process."""

    address: Address
    supervisor_fd: int
    """Not for workers; closing it in a forked child does no harm."""
    workers_fd: int
    """For every worker to inherit (closed on exec unless passed on)."""
    warning: str | None
    """Which workers of an earlier supervisor are still alive, if any."""

    @classmethod
    def take(cls, address: Address, dirfd: int, *, survivors_timeout: float = 2.0) -> Locks:
        """Become the supervisor of `address`.

        Waits up to `survivors_timeout` seconds for workers of an earlier supervisor, then goes on
        with a warning: nothing of the old epoch is shared with the new.
        Raises StartError if another supervisor runs, or if the lock files are not usable.
        """
        fds = [_take_supervisor_lock(address, dirfd)]
        try:
            os.ftruncate(fds[0], 0)
            os.pwrite(fds[0], b"%d\n" % os.getpid(), 0)  # for humans; nobody reads it back
            fds.append(_open_lock(address.workers_lock_name, dirfd))
            warning = _wait_for_survivors(fds[1], survivors_timeout)
            return cls(address, fds[0], fds[1], warning)
        except BaseException as exc:
            for fd in fds:
                os.close(fd)
            if isinstance(exc, OSError):
                _fail_to_lock(address, exc)
            raise

    def sweep_private(self, dirfd: int) -> int:
        """Remove what dead private supervisors left in `dirfd`; return how many there were.

        Lock files are never unlinked otherwise: a private address is used once, so that nobody
        waits for its lock.
        """
        swept = 0
        for lock_name in os.listdir(dirfd):
            name = lock_name.removesuffix(_LOCK_SUFFIX)
            if name == lock_name or not name.startswith(_PRIVATE):
                continue
            # To open and close our own lock file would drop our lock.
            if lock_name != self.address.lock_name and _sweep(Address("", name), dirfd):
                swept += 1
        return swept

    def close(self) -> None:
        """Give both locks up; workers that still live keep theirs."""
        os.close(self.workers_fd)
        os.close(self.supervisor_fd)


def supervisor_locked(address: Address, dirfd: int) -> int | None:
    """Return the pid of the supervisor that holds `address`, None if there is none.

    It is 0 if the supervisor lives in a pid namespace that is not ours: test for None.
    Takes nothing, so it cannot get in a starting supervisor's way.  Not for that supervisor itself:
    it would lose its lock.  Raises AttachError if the lock file is not ours to look at.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(address.lock_name, flags, dir_fd=dirfd)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise _not_ours(address, f'"{address.lock_name}": {exc.strerror}') from exc
    try:
        return _lock_holder(fd)
    finally:
        os.close(fd)


def _take_supervisor_lock(address: Address, dirfd: int) -> int:
    """Open the lock file, this process's only time, and lock it."""
    # A sweep, or a supervisor that is just ending, may hold the lock for a moment.
    tries = 10
    while True:
        try:
            fd = _open_lock(address.lock_name, dirfd)
        except OSError as exc:
            _fail_to_lock(address, exc)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink > 0:
                return fd
            # A sweep unlinked it between our open and our lock.
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, says POSIX
            tries -= 1
            if tries <= 0 and (holder := _lock_holder(fd)) is not None:
                os.close(fd)
                raise StartError(
                    f'another supervisor is running at "{address}"',
                    detail=(f"process {holder}" if holder else "a process that is not visible here")
                    + f' holds "{address.lock_name}"',
                    hint="stop it with `pgbgw stop`, or choose another address",
                ) from None
            time.sleep(0.01)
        except OSError as exc:
            os.close(fd)
            _fail_to_lock(address, exc)
        os.close(fd)


def _open_lock(name: str, dirfd: int) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(name, flags, 0o600, dir_fd=dirfd)
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
        return fd
    os.close(fd)
    raise StartError(
        f'could not use the lock file "{name}"',
        detail=f"it is not a regular file of user {os.geteuid()}",
        hint="remove it, or choose another address",
    )


def _fail_to_lock(address: Address, exc: OSError) -> NoReturn:
    raise StartError(
        f'could not lock the address "{address}"',
        detail=exc.strerror,
        hint="the directory must be writable, and on a file system with locks",
    ) from exc


def _lock_holder(fd: int) -> int | None:
    """Return the pid of the other process that holds an fcntl lock on `fd`'s file (F_GETLK)."""
    query = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, query))
    return None if kind == fcntl.F_UNLCK else max(int(pid), 0)


def _wait_for_survivors(workers_fd: int, timeout: float) -> str | None:
    """Lock `workers_fd` for our workers, once those of the last supervisor are gone or time is up.

    The lock that we keep, and that workers inherit, is a shared one: so it can be had while
    survivors hold theirs, and the supervisor after us sees our workers, too.  An exclusive lock is
    the question whether there are any; the supervisor's lock makes us the only one who asks.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(workers_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            warning = None
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                pids = ", ".join(map(str, _holders(workers_fd))) or "unknown"
                warning = f"workers of an earlier supervisor are still running (pid {pids})"
                break
            time.sleep(0.02)
    # Refused only if somebody who is no worker has it for himself: the warning names him.
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(workers_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return warning


def _holders(fd: int) -> list[int]:
    """Return the pids of our user's other processes that have the file of `fd` open."""
    wanted = os.readlink(f"/proc/self/fd/{fd}")
    return [
        pid
        for pid in sorted(int(entry) for entry in os.listdir("/proc") if entry.isdecimal())
        if pid != os.getpid() and wanted in _open_files(pid)
    ]


def _open_files(pid: int) -> set[str]:
    """Return what the descriptors of a process point to; nothing if it is gone or not ours."""
    directory = f"/proc/{pid}/fd"
    files = set()
    with contextlib.suppress(OSError):
        for number in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                files.add(os.readlink(f"{directory}/{number}"))
    return files


def _sweep(address: Address, dirfd: int) -> bool:
    """Remove the files of a private address if its lock is free."""
    try:
        fd = os.open(address.lock_name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=dirfd)
    except OSError:
        return False
    try:
        # Held while the files go; who waits for it sees that its file is unlinked, and starts over.
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The lock file last: by its name another sweep finds the rest, if this one is interrupted.
        passing = _passing_name(address, dirfd)
        for name in (passing, address.socket_name, address.workers_lock_name, address.lock_name):
            _unlink(name, dirfd)
    except OSError:
        return False  # it lives, or the files are not ours
    finally:
        os.close(fd)
    return True


# --- sockets --------------------------------------------------------------------------------------


def listen(address: Address, dirfd: int, backlog: int = BACKLOG) -> socket.socket:
    """Listen at `address`, whose lock the caller holds; return the non-blocking SEQPACKET socket.

    The socket has mode 0600 and takes no descriptors from clients (where the kernel can say so).
    It appears at its place, over one that a dead supervisor left, when it already listens: nobody
    finds it half-made.  Raises StartError.
    """
    sock = _seqpacket()
    short = None
    try:
        _check_replaceable(address, dirfd)
        short = _passing_name(address, dirfd)
        _unlink(short, dirfd)
        sock.bind(f"/proc/self/fd/{dirfd}/{short}")
        os.chmod(short, 0o600, dir_fd=dirfd)
        _kernel.refuse_rights(sock.fileno())
        sock.listen(backlog)
        os.rename(short, address.socket_name, src_dir_fd=dirfd, dst_dir_fd=dirfd)
    except OSError as exc:
        sock.close()
        if short is not None:
            with contextlib.suppress(OSError):
                os.unlink(short, dir_fd=dirfd)
        raise StartError(
            f'could not listen at "{address}"',
            detail=exc.strerror or str(exc),
            hint="the directory must be writable, and nothing but a socket may have that name",
        ) from exc
    return sock


def connect(address: Address, dirfd: int) -> socket.socket:
    """Connect to the supervisor at `address`; return the non-blocking SEQPACKET socket.

    Never waits.  Raises what the kernel says: FileNotFoundError or ConnectionRefusedError (nobody
    listens), BlockingIOError (too many are waiting to be accepted: try again); and AttachError if
    another user listens there.
    """
    # Through a descriptor of the socket file itself, since its name may be too long: see listen().
    file = os.open(address.socket_name, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=dirfd)
    sock = _seqpacket()
    try:
        sock.connect(f"/proc/self/fd/{file}")
        # The credentials are those of the process that called listen(), as they were then.
        peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        _, uid, _ = _UCRED.unpack(peer)
        if uid != os.geteuid():
            raise _not_ours(address, f"user {uid} listens there")
    except BaseException as exc:
        sock.close()
        if isinstance(exc, PermissionError):
            raise _not_ours(address, exc.strerror) from exc
        raise
    finally:
        os.close(file)
    return sock


def _seqpacket() -> socket.socket:
    kind = socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    return socket.socket(socket.AF_UNIX, kind)


def _passing_name(address: Address, dirfd: int) -> str:
    """Return the name under which the socket of `address` is made.

    A short one, since the address of a socket has 108 bytes and /proc/self/fd in front; with the
    lock file's inode, which makes it ours alone in this directory as long as we hold the lock.
    """
    return f".{os.stat(address.lock_name, dir_fd=dirfd).st_ino:x}.new"


def _check_replaceable(address: Address, dirfd: int) -> None:
    """Refuse to put the socket in the place of a user's file."""
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(address.socket_name, dir_fd=dirfd, follow_symlinks=False).st_mode
        if not stat.S_ISSOCK(mode):
            raise FileExistsError(errno.EEXIST, "a file that is not a socket is in its place")


def _not_ours(address: Address, detail: str | None) -> AttachError:
    return AttachError(
        f'the supervisor at "{address}" belongs to another user',
        detail=f"{detail}; this process is of user {os.geteuid()}",
        hint="use an address of your own; a supervisor serves one user",
    )


def unlink_socket(address: Address, dirfd: int, inode: int) -> None:
    """Remove the socket's file if it is there and has that inode; its lock files stay.

    Who removes the lock files of a running supervisor lets another one start, whose socket then
    has the name.
    """
    with contextlib.suppress(FileNotFoundError):
        if os.lstat(address.socket_name, dir_fd=dirfd).st_ino == inode:
            os.unlink(address.socket_name, dir_fd=dirfd)


def _unlink(name: str, dirfd: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=dirfd)
