"""Addresses, the runtime directory, locks and sockets.

fcntl locks belong to processes, so what concerns two supervisors runs one of them in a child that
says "ready" and lives until its standard input is closed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pgbgw._runtime import (
    Address,
    Locks,
    connect,
    listen,
    open_directory,
    private,
    resolve,
    runtime_directory,
    supervisor_locked,
    unlink_socket,
)
from pgbgw.errors import AttachError, ConfigurationError, PgbgwError, StartError

OURS = os.geteuid()


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runtime directory of this test; not made yet."""
    directory = tmp_path / "run"
    monkeypatch.setenv("PGBGW_RUNTIME_DIR", str(directory))
    monkeypatch.delenv("PGBGW_ADDRESS", raising=False)
    return directory


@pytest.fixture
def dirfd(runtime: Path) -> Iterator[int]:
    fd = open_directory(resolve("any"), create=True)
    yield fd
    os.close(fd)


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before


@contextmanager
def child(code: str) -> Iterator[subprocess.Popen[str]]:
    """Run `code` in another process; it has `dirfd` and `address` ("main") and prints first."""
    prelude = """
        import os, sys
        from pgbgw._runtime import *
        address = resolve("main")
        dirfd = open_directory(address, create=True)
    """
    script = textwrap.dedent(prelude) + textwrap.dedent(code) + "\nsys.stdin.read()\n"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process


SUPERVISOR = "locks = Locks.take(address, dirfd); print('ready', flush=True)"


def check_error(error: PgbgwError, *words: str) -> None:
    """Every error has a message, a detail and a hint, and says these words."""
    message = str(error)
    assert message[0].islower()
    assert not message.endswith(".")
    assert error.detail
    assert error.hint
    for word in words:
        assert word in f"{message}\n{error.detail}\n{error.hint}"


# --- addresses ------------------------------------------------------------------------------------


def test_an_address_names_its_three_files() -> None:
    address = Address("/run/app", "main")
    assert str(address) == address.path == "/run/app/main.sock"
    assert address.socket_name == "main.sock"
    assert address.lock_name == "main.supervisor.lock"
    assert address.workers_lock_name == "main.workers.lock"
    assert str(Address("/", "main")) == "/main.sock"


def test_a_mere_name_lives_in_the_runtime_directory(runtime: Path) -> None:
    assert resolve("main") == Address(str(runtime), "main")
    assert resolve("main.sock") == resolve("main")
    assert resolve("private-1") == Address(str(runtime), "private-1")
    assert resolve("größe 2") == Address(str(runtime), "größe 2")


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("/run/app/main", "/run/app/main.sock"),
        ("/run/app/main.sock", "/run/app/main.sock"),
        ("/run//app/../app/main", "/run/app/main.sock"),
        ("/main", "/main.sock"),
        (Path("/run/app/main.sock"), "/run/app/main.sock"),
    ],
)
def test_what_has_a_slash_is_the_path_of_a_socket(given: str | Path, path: str) -> None:
    assert resolve(given).path == path


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("./main") == Address(str(tmp_path), "main")
    assert resolve("app/main") == Address(f"{tmp_path}/app", "main")


def test_the_path_of_an_address_leads_back_to_it(runtime: Path) -> None:
    for given in ("main", "/run/app/main", "./here"):
        assert resolve(str(resolve(given))) == resolve(given)


def test_the_default_address_comes_from_the_environment(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve(None) == Address(str(runtime), "default")
    monkeypatch.setenv("PGBGW_ADDRESS", "/run/app/main.sock")
    assert resolve(None) == Address("/run/app", "main")
    monkeypatch.setenv("PGBGW_ADDRESS", "")
    assert resolve(None) == Address(str(runtime), "default")


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "a\0b", "/a\0b/c", "/run/app/", "/run/..", "a\nb", "\x1b[31m", "\udc80"),
        *("\u202eevil", ".sock", "x" * 101, "ö" * 51),
    ],
)
def test_a_name_that_cannot_be_is_a_clear_error(runtime: Path, name: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        resolve(name)
    check_error(caught.value, "invalid address")
    assert str(caught.value).isprintable()


def test_a_name_of_a_hundred_bytes_is_allowed(runtime: Path) -> None:
    assert resolve("x" * 100).name == "x" * 100
    assert resolve("ö" * 50).name == "ö" * 50


def test_private_addresses_are_never_the_same(runtime: Path) -> None:
    one, other = private(), private()
    assert one != other
    assert one.directory == str(runtime)
    assert one.name.startswith(f"private-{os.getpid()}-")
    assert resolve(str(one)) == one


# --- the runtime directory ------------------------------------------------------------------------


def test_the_runtime_directory_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGBGW_RUNTIME_DIR", "/somewhere/./else/")
    assert runtime_directory() == "/somewhere/else"
    monkeypatch.chdir("/")
    monkeypatch.setenv("PGBGW_RUNTIME_DIR", "here")
    assert runtime_directory() == "/here"


@pytest.mark.parametrize(
    ("mode", "uid", "expected"),
    [
        (stat.S_IFDIR | 0o700, 4711, "/run/user/4711/pgbgw"),
        (stat.S_IFDIR | 0o700, 4712, "/tmp/pgbgw-4711"),
        (stat.S_IFLNK | 0o777, 4711, "/tmp/pgbgw-4711"),
        (None, 0, "/tmp/pgbgw-4711"),
    ],
)
def test_the_session_s_directory_is_taken_if_it_is_ours_and_else_one_in_tmp(
    monkeypatch: pytest.MonkeyPatch, mode: int | None, uid: int, expected: str
) -> None:
    def lstat(path: str) -> os.stat_result:
        assert path == "/run/user/4711"
        if mode is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        return os.stat_result((mode, 0, 0, 1, uid, 0, 0, 0, 0, 0))

    monkeypatch.setenv("PGBGW_RUNTIME_DIR", "")
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    monkeypatch.setattr(os, "lstat", lstat)
    assert runtime_directory() == expected


def test_a_supervisor_makes_the_runtime_directory_for_itself_alone(runtime: Path) -> None:
    before = os.umask(0)
    try:
        fd = open_directory(resolve("main"), create=True)
    finally:
        os.umask(before)
    assert stat.S_IMODE(runtime.stat().st_mode) == 0o700
    assert os.fstat(fd).st_ino == runtime.stat().st_ino
    assert not os.get_inheritable(fd)
    os.close(fd)
    os.close(open_directory(resolve("main"), create=True))
    os.close(open_directory(resolve("main"), create=False))


def test_a_client_makes_no_directory(runtime: Path) -> None:
    with pytest.raises(AttachError) as caught:
        open_directory(resolve("main"), create=False)
    check_error(caught.value, "no supervisor is running", "pgbgw run")
    assert not runtime.exists()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o701, 0o1777, 0o750])
@pytest.mark.parametrize(("create", "error"), [(True, StartError), (False, AttachError)])
def test_a_runtime_directory_that_others_can_enter_is_refused(
    runtime: Path, mode: int, create: bool, error: type[PgbgwError]
) -> None:
    runtime.mkdir()
    runtime.chmod(mode)
    with pytest.raises(error) as caught:
        open_directory(resolve("main"), create=create)
    check_error(caught.value, "not safe", f"{mode:04o}", "0700")


def test_a_runtime_directory_of_another_user_is_refused(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: OURS + 1)
    with pytest.raises(StartError) as caught:
        open_directory(resolve("main"), create=True)
    check_error(caught.value, f"user {OURS}", f"user {OURS + 1}")


def test_a_link_in_the_place_of_the_runtime_directory_is_refused(
    runtime: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    runtime.symlink_to("elsewhere")
    with pytest.raises(StartError) as caught:
        open_directory(resolve("main"), create=True)
    check_error(caught.value, "no link")


def test_a_file_in_the_place_of_the_runtime_directory_is_refused(runtime: Path) -> None:
    runtime.write_text("")
    with pytest.raises(StartError) as caught:
        open_directory(resolve("main"), create=True)
    check_error(caught.value)


def test_the_parent_of_the_runtime_directory_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGBGW_RUNTIME_DIR", str(tmp_path / "not" / "there"))
    with pytest.raises(StartError) as caught:
        open_directory(resolve("main"), create=True)
    check_error(caught.value, "could not open")


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o1777])
def test_a_directory_named_by_path_may_be_open_to_readers_and_sticky(
    runtime: Path, tmp_path: Path, mode: int
) -> None:
    directory = tmp_path / "app"
    directory.mkdir()
    directory.chmod(mode)
    (tmp_path / "link").symlink_to("app")
    for path in (f"{directory}/main", f"{tmp_path}/link/main"):
        for create in (True, False):
            os.close(open_directory(resolve(path), create=create))


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o702])
def test_a_directory_named_by_path_that_others_can_write_to_is_refused(
    runtime: Path, tmp_path: Path, mode: int
) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(StartError) as caught:
        open_directory(resolve(f"{tmp_path}/main"), create=True)
    check_error(caught.value, "others can write", f"{mode:04o}")


def test_a_directory_named_by_path_is_not_made(runtime: Path, tmp_path: Path) -> None:
    with pytest.raises(StartError):
        open_directory(resolve(f"{tmp_path}/app/main"), create=True)
    assert not (tmp_path / "app").exists()


@pytest.mark.skipif(OURS == 0, reason="root may use what belongs to root")
def test_a_directory_named_by_path_may_belong_to_root(runtime: Path) -> None:
    os.close(open_directory(resolve("/usr/main"), create=False))


def test_a_directory_named_by_path_of_a_third_user_is_refused(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fstat

    def fstat(fd: int) -> os.stat_result:
        status = real(fd)
        return os.stat_result((*status[:4], OURS + 1, *status[5:10]))

    monkeypatch.setattr(os, "fstat", fstat)
    with pytest.raises(AttachError) as caught:
        open_directory(resolve(f"{tmp_path}/main"), create=False)
    check_error(caught.value, f"user {OURS + 1}")


# --- locks ----------------------------------------------------------------------------------------


def test_a_supervisor_holds_its_address_until_it_ends(dirfd: int) -> None:
    address = resolve("main")
    assert supervisor_locked(address, dirfd) is None
    with child(SUPERVISOR) as process:
        for _ in range(3):  # to ask does not disturb
            assert supervisor_locked(address, dirfd) == process.pid
        with pytest.raises(StartError) as caught:
            Locks.take(address, dirfd)
        check_error(caught.value, "another supervisor is running", str(process.pid), "pgbgw stop")
        assert supervisor_locked(address, dirfd) == process.pid
        assert supervisor_locked(resolve("other"), dirfd) is None
        process.kill()
        process.wait()
    assert supervisor_locked(address, dirfd) is None
    Locks.take(address, dirfd).close()


def test_the_lock_file_tells_humans_the_pid_and_stays_when_the_supervisor_is_gone(
    runtime: Path, dirfd: int
) -> None:
    lock = runtime / "main.supervisor.lock"
    with child(SUPERVISOR) as process:
        assert lock.read_text() == f"{process.pid}\n"
        inode = lock.stat().st_ino
    lock.write_text("a much longer text of somebody else\n")
    locks = Locks.take(resolve("main"), dirfd)
    assert lock.read_text() == f"{os.getpid()}\n"
    assert lock.stat().st_ino == inode
    assert stat.S_IMODE(lock.stat().st_mode) == 0o600
    assert locks.warning is None
    assert not os.get_inheritable(locks.supervisor_fd)
    assert not os.get_inheritable(locks.workers_fd)
    locks.close()
    assert lock.exists()


def test_a_forked_child_that_closes_its_copy_leaves_the_supervisor_its_lock(dirfd: int) -> None:
    code = """
        locks = Locks.take(address, dirfd)
        if (pid := os.fork()) == 0:
            os.close(locks.supervisor_fd)
            os._exit(0)
        os.waitpid(pid, 0)
        print("ready", flush=True)
    """
    with child(code) as process:
        assert supervisor_locked(resolve("main"), dirfd) == process.pid


def test_a_forked_child_that_keeps_its_copy_does_not_keep_the_supervisor_s_lock(dirfd: int) -> None:
    code = """
        locks = Locks.take(address, dirfd)
        read, write = os.pipe()
        if os.fork() == 0:
            os.close(write)
            os.read(read, 1)  # until the parent and this test have seen enough
            os._exit(0)
        print("ready", flush=True)
    """
    with child(code):
        assert supervisor_locked(resolve("main"), dirfd) is not None
    # The forked child may still be there, the lock is not.
    assert supervisor_locked(resolve("main"), dirfd) is None


# A supervisor that ends while a worker of it lives on: the worker holds workers.lock.
ORPHANING_SUPERVISOR = """
    locks = Locks.take(address, dirfd)
    if worker := os.fork():
        print(worker, flush=True)
        os._exit(0)
    os.close(locks.supervisor_fd)
"""


@contextmanager
def survivor(supervisor: str = ORPHANING_SUPERVISOR) -> Iterator[int]:
    """A worker whose supervisor is gone; yields its pid."""
    with child('print("ready", flush=True)\n' + textwrap.dedent(supervisor)) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.wait()  # it has said so before it is gone, and its lock with it
        yield pid


def test_surviving_workers_of_an_earlier_supervisor_are_named_and_do_not_prevent_a_start(
    dirfd: int,
) -> None:
    with survivor() as pid:
        with child(SUPERVISOR.replace("dirfd)", "dirfd, survivors_timeout=0)")):
            pass  # a supervisor between, without workers, must not hide the survivor
        locks = Locks.take(resolve("main"), dirfd, survivors_timeout=0.05)
        assert locks.warning == f"workers of an earlier supervisor are still running (pid {pid})"
        locks.close()


def test_the_next_supervisor_sees_the_workers_of_one_that_started_beside_survivors(
    dirfd: int,
) -> None:
    code = ORPHANING_SUPERVISOR.replace("dirfd)", "dirfd, survivors_timeout=0)")
    with ExitStack() as second:
        with survivor():
            worker = second.enter_context(survivor(code))
        # The first survivor is gone, the second supervisor's worker is not.
        locks = Locks.take(resolve("main"), dirfd, survivors_timeout=1.0)
        assert locks.warning is not None
        assert locks.warning.endswith(f"(pid {worker})")
        locks.close()
    locks = Locks.take(resolve("main"), dirfd)
    assert locks.warning is None
    locks.close()


def test_a_new_supervisor_waits_for_survivors_that_are_just_ending(
    dirfd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    naps = []
    with survivor() as pid:

        def sleep(seconds: float) -> None:
            naps.append(seconds)
            os.kill(pid, 9)
            os.sched_yield()

        monkeypatch.setattr(time, "sleep", sleep)
        locks = Locks.take(resolve("main"), dirfd, survivors_timeout=10.0)
    assert naps
    assert locks.warning is None
    locks.close()


@pytest.mark.parametrize("name", ["main.supervisor.lock", "main.workers.lock"])
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda path: path.mkdir(), id="directory"),
        pytest.param(lambda path: path.symlink_to("elsewhere"), id="link"),
        pytest.param(os.mkfifo, id="fifo"),
    ],
)
def test_lock_files_that_are_no_files_are_a_clear_error(
    runtime: Path, dirfd: int, name: str, spoil: Callable[[Path], None]
) -> None:
    spoil(runtime / name)
    with pytest.raises(StartError) as caught:
        Locks.take(resolve("main"), dirfd)
    check_error(caught.value)


def test_a_lock_file_of_another_user_is_a_clear_error(
    dirfd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: OURS + 1)
    with pytest.raises(StartError) as caught:
        Locks.take(resolve("main"), dirfd)
    check_error(caught.value, "main.supervisor.lock")


def test_a_file_system_without_locks_is_a_clear_error(
    dirfd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lockf(fd: int, command: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with pytest.raises(StartError) as caught:
        Locks.take(resolve("main"), dirfd)
    check_error(caught.value, "could not lock", os.strerror(errno.ENOLCK), "file system")


# --- the sweep ------------------------------------------------------------------------------------


def leftovers(directory: Path, name: str) -> list[str]:
    return sorted(path.name for path in directory.glob(f"*{name}*"))


def test_a_start_removes_what_dead_private_supervisors_left_and_nothing_else(
    runtime: Path, dirfd: int
) -> None:
    for name in ("private-1-a", "private-2-b", "main", "private"):
        for suffix in (".sock", ".supervisor.lock", ".workers.lock"):
            (runtime / f"{name}{suffix}").touch()
    (runtime / "private-3.txt").touch()
    (runtime / "private-4.supervisor.lock").touch()  # of a sweep that was interrupted
    (runtime / "private-5.supervisor.lock").mkdir()
    keep = {path.name for path in runtime.iterdir() if not path.name.startswith("private-")}
    locks = Locks.take(resolve("own"), dirfd)
    assert locks.sweep_private(dirfd) == 3
    assert locks.sweep_private(dirfd) == 0
    left = {path.name for path in runtime.iterdir()}
    keep |= {"private-3.txt", "private-5.supervisor.lock"}
    assert left == keep | {"own.supervisor.lock", "own.workers.lock"}
    locks.close()


def test_a_sweep_leaves_living_private_supervisors_alone(runtime: Path, dirfd: int) -> None:
    living = private()
    with child(SUPERVISOR.replace("address", f'resolve("{living}")')) as process:
        before = leftovers(runtime, living.name)
        locks = Locks.take(resolve("own"), dirfd)
        assert locks.sweep_private(dirfd) == 0
        locks.close()
        assert (
            leftovers(runtime, living.name)
            == before
            == [
                living.lock_name,
                living.workers_lock_name,
            ]
        )
        assert supervisor_locked(living, dirfd) == process.pid


def test_a_private_supervisor_that_sweeps_keeps_its_own_lock(runtime: Path, dirfd: int) -> None:
    own = private()
    code = f"""
        own = resolve("{own}")
        locks = Locks.take(own, dirfd)
        locks.sweep_private(dirfd)
        print("ready", flush=True)
    """
    with child(code) as process:
        assert supervisor_locked(own, dirfd) == process.pid


def test_a_supervisor_whose_lock_file_is_swept_between_open_and_lock_makes_a_new_one(
    runtime: Path, dirfd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = private()
    real = fcntl.lockf
    swept: list[str] = []

    def lockf(fd: int, command: int) -> None:
        if not swept:
            swept.append(own.lock_name)
            (runtime / own.lock_name).unlink()
        real(fd, command)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    locks = Locks.take(own, dirfd)
    assert swept
    assert os.fstat(locks.supervisor_fd).st_ino == (runtime / own.lock_name).stat().st_ino
    locks.close()


# --- sockets --------------------------------------------------------------------------------------


@contextmanager
def listening(address: Address, dirfd: int, backlog: int = 16) -> Iterator[socket.socket]:
    locks = Locks.take(address, dirfd)
    try:
        with listen(address, dirfd, backlog) as listener:
            yield listener
    finally:
        locks.close()


def exchange(listener: socket.socket, address: Address, dirfd: int) -> None:
    """A message goes each way and keeps its limits."""
    with connect(address, dirfd) as client:
        connection, _ = listener.accept()
        with connection:
            client.send(b"one")
            client.send(b"two")
            assert [connection.recv(64), connection.recv(64)] == [b"one", b"two"]
            connection.send(b"three")
            assert client.recv(64) == b"three"


def test_client_and_supervisor_meet(runtime: Path, dirfd: int) -> None:
    address = resolve("main")
    with listening(address, dirfd) as listener:
        exchange(listener, address, dirfd)
        assert stat.S_IMODE((runtime / "main.sock").stat().st_mode) == 0o600
        assert not listener.getblocking()
        assert not os.get_inheritable(listener.fileno())
        with pytest.raises(BlockingIOError):
            listener.accept()
        with connect(address, dirfd) as client:
            assert not client.getblocking()
            assert not os.get_inheritable(client.fileno())
        assert leftovers(runtime, ".new") == []


def test_paths_and_names_of_any_length_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 200) / ("e" * 200) / ("f" * 200)
    deep.parent.mkdir(parents=True)
    monkeypatch.setenv("PGBGW_RUNTIME_DIR", str(deep))
    address = resolve("x" * 100)
    dirfd = open_directory(address, create=True)
    with listening(address, dirfd) as listener:
        exchange(listener, address, dirfd)
        assert os.path.exists(address.path)
    os.close(dirfd)


def test_the_socket_is_for_us_alone_whatever_the_umask_says(runtime: Path, dirfd: int) -> None:
    for umask in (0, 0o777):
        before = os.umask(umask)
        try:
            with listening(resolve(f"main{umask}"), dirfd):
                mode = (runtime / f"main{umask}.sock").stat().st_mode
        finally:
            os.umask(before)
        assert stat.S_IMODE(mode) == 0o600


def test_the_socket_of_a_dead_supervisor_refuses_and_is_replaced(dirfd: int) -> None:
    address = resolve("main")
    with listening(address, dirfd):
        pass
    with pytest.raises(ConnectionRefusedError):
        connect(address, dirfd)
    with listening(address, dirfd) as listener:
        exchange(listener, address, dirfd)


def test_where_no_socket_is_the_kernel_s_word_for_it_is_raised(dirfd: int) -> None:
    with pytest.raises(FileNotFoundError):
        connect(resolve("main"), dirfd)


def test_a_full_backlog_is_told_at_once(dirfd: int) -> None:
    address = resolve("main")
    with listening(address, dirfd, backlog=1), ExitStack() as clients:
        for _ in range(2):  # the kernel lets one more wait than it was told
            clients.enter_context(connect(address, dirfd))
        with pytest.raises(BlockingIOError):
            connect(address, dirfd)


def test_a_link_in_the_place_of_the_socket_is_not_followed(runtime: Path, dirfd: int) -> None:
    with listening(resolve("main"), dirfd):
        (runtime / "link.sock").symlink_to("main.sock")
        with pytest.raises(ConnectionRefusedError):
            connect(resolve("link"), dirfd)


@pytest.mark.parametrize("content", ["file", "directory", "link"])
def test_listening_does_not_replace_what_is_no_socket(
    runtime: Path, dirfd: int, content: str
) -> None:
    place = runtime / "main.sock"
    if content == "file":
        place.write_text("precious")
    elif content == "directory":
        place.mkdir()
    else:
        place.symlink_to("elsewhere")
    with pytest.raises(StartError) as caught, listening(resolve("main"), dirfd):
        pass
    check_error(caught.value, "could not listen", "not a socket")
    assert os.path.lexists(place)
    assert leftovers(runtime, ".new") == []


def test_listening_that_fails_half_way_leaves_nothing(
    runtime: Path, dirfd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "read-only file system")

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(StartError) as caught, listening(resolve("main"), dirfd):
        pass
    check_error(caught.value, "read-only file system")
    assert not [path for path in runtime.iterdir() if not path.name.endswith(".lock")]


def test_a_client_refuses_a_listener_of_another_user(
    dirfd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = resolve("main")
    with listening(address, dirfd):
        monkeypatch.setattr(os, "geteuid", lambda: OURS + 1)
        with pytest.raises(AttachError) as caught:
            connect(address, dirfd)
        check_error(caught.value, "another user", f"user {OURS} ", f"user {OURS + 1}")


def test_a_socket_or_lock_that_we_may_not_touch_belongs_to_another_user(
    dirfd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "permission denied")

    address = resolve("main")
    with listening(address, dirfd):
        with monkeypatch.context() as patch:
            patch.setattr(socket.socket, "connect", refuse)
            with pytest.raises(AttachError) as caught:
                connect(address, dirfd)
            check_error(caught.value, "another user", "permission denied")
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refuse)
            with pytest.raises(AttachError) as caught:
                supervisor_locked(address, dirfd)
            check_error(caught.value, "another user", "permission denied", address.lock_name)


def test_unlinking_removes_the_socket_and_leaves_the_locks(runtime: Path, dirfd: int) -> None:
    address = resolve("main")
    with listening(address, dirfd):
        inode = os.lstat(address.socket_name, dir_fd=dirfd).st_ino
        unlink_socket(address, dirfd, inode + 1)
        assert address.socket_name in leftovers(runtime, "main")
        unlink_socket(address, dirfd, inode)
        unlink_socket(address, dirfd, inode)
    assert leftovers(runtime, "main") == [address.lock_name, address.workers_lock_name]
