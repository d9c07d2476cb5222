"""Where processes meet: directories, sockets, the handshake; and supervisors that cannot start."""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from pgbgw import (
    AttachError,
    Client,
    HandleStatus,
    InvalidWorkerError,
    StartError,
    Supervisor,
    WrongProcessError,
    _attachment,
    _runtime,
    _wire,
    attach,
)
from pgbgw._wire import Message, pack, receive, unpack
from support import poll_until
from support.clients import ClientProcess
from support.control import Log, ask_to_stop, paused
from support.processes import Script, run_script
from support.supervisors import lines, supervisor


@pytest.fixture
def log(capfd: pytest.CaptureFixture[str]) -> Log:
    return Log(capfd)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in the path of supervisors, for modules to preload."""
    directory = tmp_path / "modules"
    directory.mkdir()
    monkeypatch.syspath_prepend(directory)
    return directory


def works(client: Client) -> bool:
    return client.register("support.workers:noop").wait_until_gone(30).exitcode == 0


# --- directories ----------------------------------------------------------------------------------


def test_a_runtime_directory_that_others_can_enter_is_refused_on_both_sides(
    runtime_dir: Path,
) -> None:
    runtime_dir.chmod(0o750)
    for use, error in ((Supervisor().start, StartError), (lambda: attach("x"), AttachError)):
        with pytest.raises(error, match="is not safe to use") as caught:
            use()
        assert caught.value.detail == "its mode is 0750: others can look into it"
        assert "0700" in str(caught.value.hint)
    assert list(runtime_dir.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_runtime_directory_of_somebody_else_is_refused_on_both_sides(runtime_dir: Path) -> None:
    os.chown(runtime_dir, 12345, -1)
    for use, error in ((Supervisor().start, StartError), (lambda: attach("x"), AttachError)):
        with pytest.raises(error, match="is not safe to use") as caught:
            use()
        assert caught.value.detail == "it belongs to user 12345, not to user 0"


def test_a_missing_runtime_directory_is_made_by_a_supervisor_alone(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = runtime_dir / "new"
    monkeypatch.setenv("PGBGW_RUNTIME_DIR", str(directory))
    with pytest.raises(AttachError, match="no supervisor is running") as caught:
        attach("main", timeout=1000)
    assert "does not exist" in str(caught.value.detail)
    assert not directory.exists()
    with supervisor(address="main") as client:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert stat.S_IMODE((directory / "main.sock").stat().st_mode) == 0o600
        assert run_script("from pgbgw import attach\ntest.send(attach('main').epoch)") == (
            client.epoch
        )


def test_a_runtime_directory_in_a_missing_one_is_a_clear_error(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGBGW_RUNTIME_DIR", str(runtime_dir / "missing" / "new"))
    with pytest.raises(StartError, match="could not open the directory") as caught:
        Supervisor().start()
    assert caught.value.detail == "No such file or directory"


# --- addresses ------------------------------------------------------------------------------------


def test_an_address_in_use_is_an_error_that_names_the_holder() -> None:
    with supervisor(address="main") as client:
        with pytest.raises(StartError, match="another supervisor is running") as caught:
            Supervisor(address="main").start()
        assert f"process {client.supervisor_pid} holds" in str(caught.value.detail)
        assert "pgbgw stop" in str(caught.value.hint)
        assert works(client)
        with ClientProcess(client.address) as other:
            assert other.call("find", name="x") is None
            other.end()


def test_of_several_that_start_at_one_address_one_does() -> None:
    def start(_: int) -> Client | StartError:
        try:
            return Supervisor(address="main").start()
        except StartError as exc:
            return exc

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(start, range(4)))
    (client,) = [result for result in results if isinstance(result, Client)]
    try:
        for error in results:
            if error is not client:
                assert "another supervisor is running" in str(error)
        assert works(client)
    finally:
        client.stop("immediate", timeout=30)
        client.close()


def test_without_an_address_every_supervisor_has_one_of_its_own(runtime_dir: Path) -> None:
    with supervisor() as one, supervisor() as two:
        assert one.address != two.address
        for client in (one, two):
            assert Path(client.address).parent == runtime_dir
            assert Path(client.address).name.startswith("private-")
            with ClientProcess(client.address) as other:
                handle = other.call("register", "support.workers:noop")
                assert handle.wait_until_gone(30).exitcode == 0
                other.end()
    # Their lock files stay until the next one starts, which has no use for them.
    assert len(list(runtime_dir.glob("private-*.lock"))) >= 2
    with supervisor(address="main"):
        assert list(runtime_dir.glob("private-*")) == []


def test_a_path_may_be_longer_than_the_name_of_a_socket_can_be(tmp_path: Path) -> None:
    directory = tmp_path.joinpath(*(letter * 200 for letter in "abc"))
    directory.mkdir(parents=True)
    with supervisor(address=directory / "name") as client:
        assert client.address == f"{directory}/name.sock"
        assert len(client.address) > 600
        with ClientProcess(client.address) as other:
            handle = other.call("register", "support.workers:noop")
            assert handle.wait_until_gone(30).exitcode == 0
            other.end()
        # A worker finds the way, too.
        handle = client.register("support.probe_workers:launch_another", f"{tmp_path}/x", "attach")
        assert handle.wait_until_gone(30).exitcode == 0
    assert sorted(path.name for path in directory.iterdir()) == [
        "name.supervisor.lock",
        "name.workers.lock",
    ]


def test_the_directory_of_a_path_must_exist_and_be_closed_to_other_writers(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="could not open the directory"):
        Supervisor(address=tmp_path / "missing" / "name").start()
    tmp_path.chmod(0o777)
    with pytest.raises(StartError, match="is not safe to use") as caught:
        Supervisor(address=tmp_path / "name").start()
    assert "others can write to it" in str(caught.value.detail)


def test_a_file_in_the_place_of_the_socket_is_not_replaced(runtime_dir: Path) -> None:
    (runtime_dir / "main.sock").write_text("a user's")
    with pytest.raises(StartError, match="could not listen"):
        Supervisor(address="main").start()
    assert (runtime_dir / "main.sock").read_text() == "a user's"
    (runtime_dir / "main.sock").unlink()


# --- coming at a bad moment -----------------------------------------------------------------------


def test_attaching_waits_while_a_supervisor_starts(modules: Path, tmp_path: Path) -> None:
    begun, go = tmp_path / "begun", tmp_path / "go"
    (modules / "slow_to_load.py").write_text(
        "from pathlib import Path\n"
        "from support import poll_until\n"
        f"Path({str(begun)!r}).touch()\n"
        f"poll_until(Path({str(go)!r}).exists)\n"
    )
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(Supervisor(address="main", preload=["slow_to_load"]).start)
        try:
            poll_until(begun.exists)
            with pytest.raises(AttachError, match=r"could not attach .* in time") as caught:
                attach("main", timeout=0.1)
            assert caught.value.detail == "a supervisor is starting or stopping there"
            code = """
                from pgbgw import attach
                test.send("here")
                with attach("main", timeout=30) as client:
                    test.send(client.epoch)
            """
            with Script(code) as script:
                assert script.hear() == "here"
                go.touch()
                client = starting.result(30)
                assert script.hear() == client.epoch
        finally:
            go.touch()
            client = starting.result(30)
            client.stop("fast", timeout=30)
            client.close()


def test_a_supervisor_with_a_full_queue_of_connections_is_asked_again_and_again() -> None:
    with supervisor() as client:
        address = _runtime.resolve(client.address)
        dirfd = _runtime.open_directory(address, create=False)
        waiting: list[socket.socket] = []
        try:
            with paused(client):
                with suppress(BlockingIOError):
                    while True:
                        waiting.append(_runtime.connect(address, dirfd))
                with pytest.raises(AttachError, match=r"could not attach .* in time") as caught:
                    _attachment.connect(address, time.monotonic() + 0.1, first=False)
                assert caught.value.detail == "too many processes are attaching"
            with ClientProcess(client.address) as other:
                assert other.call("find", name="x") is None
                other.end()
        finally:
            os.close(dirfd)
            for sock in waiting:
                sock.close()
        assert works(client)


# Modules to preload: they take effect in the supervisor alone, before it accepts anybody.
NO_CONNECTIONS_LEFT = """
from pgbgw import _connections
_connections.MAX_CONNECTIONS = 2
"""
NO_CLIENT_IDS_LEFT = """
from pgbgw import _serve

class View:
    left = 2
    def __init__(self, view):
        self.view = view
    def __getattr__(self, name):
        return getattr(self.view, name)
    def new_client(self):
        if not self.left:
            return 0
        self.left -= 1
        return self.view.new_client()
    def client_gone(self, cid):
        self.left += 1
        self.view.client_gone(cid)

connections = _serve.Connections
_serve.Connections = lambda poller, view, *rest: connections(poller, View(view), *rest)
"""


@pytest.mark.parametrize("narrow", [NO_CONNECTIONS_LEFT, NO_CLIENT_IDS_LEFT])
def test_a_full_supervisor_is_asked_again_until_somebody_leaves(narrow: str, modules: Path) -> None:
    (modules / "narrow.py").write_text(narrow)
    code = """
        from pgbgw import AttachError, attach
        detail = None
        while detail is None:  # when time is up before it has answered at all
            try:
                attach(address, timeout=0.1)
            except AttachError as exc:
                detail = exc.detail
        test.send(detail)
        with attach(address, timeout=30) as client:
            test.send(client.epoch)
    """
    with supervisor(preload=["narrow"]) as client:
        with (
            ClientProcess(client.address) as second,
            Script(code, address=client.address) as third,
        ):
            assert third.hear() == "the supervisor hung up"
            second.end()
            assert third.hear() == client.epoch
        assert works(client)


def test_one_process_cannot_take_all_connections() -> None:
    with supervisor() as client:
        address = _runtime.resolve(client.address)
        attachments = []
        try:
            while len(attachments) < 255:  # and the client's own
                attachments.append(_attachment.connect(address, time.monotonic() + 30, first=False))
            with pytest.raises(AttachError, match="refused") as caught:
                _attachment.connect(address, time.monotonic() + 30, first=False)
            assert caught.value.detail == "this process has too many connections"
            assert works(client)
            with ClientProcess(client.address) as other:
                assert other.call("find", name="x") is None
                other.end()
        finally:
            for attachment in attachments:
                attachment.close_segments()
                os.close(attachment.supervisor)
                attachment.sock.close()


def test_a_draining_supervisor_takes_no_new_processes_but_more_of_those_it_has() -> None:
    code = """
        from pgbgw import AttachError, attach
        try:
            attach(address, timeout=30)
        except AttachError as exc:
            test.send((str(exc), exc.detail))
    """
    with supervisor() as client:
        with ClientProcess(client.address) as other:
            ask_to_stop(client, "smart")
            message, detail = run_script(code, address=client.address)
            assert "refused" in message
            assert detail == "the supervisor is shutting down"
            with client.watch():  # a connection of its own
                assert works(client)
            other.end()
        client.stop("smart", timeout=30)


# --- the handshake --------------------------------------------------------------------------------


def test_a_client_with_another_protocol_is_refused() -> None:
    code = """
        from pgbgw import AttachError, _wire, attach
        _wire.PROTOCOL += 1
        try:
            attach(address, timeout=30)
        except AttachError as exc:
            test.send((str(exc), exc.detail))
    """
    with supervisor() as client:
        message, detail = run_script(code, address=client.address)
        assert message == f'the supervisor at "{client.address}" refused'
        assert detail == "the supervisor speaks another version of the protocol"
        assert works(client)


@contextmanager
def raw_connection(client: Client) -> Iterator[socket.socket]:
    address = _runtime.resolve(client.address)
    dirfd = _runtime.open_directory(address, create=False)
    try:
        with _runtime.connect(address, dirfd) as sock:
            sock.setblocking(True)
            yield sock
    finally:
        os.close(dirfd)


def test_who_does_not_answer_the_challenge_is_refused_and_gets_nothing() -> None:
    protocol = _wire.HELLO.pack(_wire.PROTOCOL, 1)
    with supervisor() as client:
        for pid, change, body in (
            (os.getpid(), 1, protocol),
            (os.getppid(), 0, protocol),
            (os.getpid(), 0, b""),
        ):
            with raw_connection(client) as sock:
                challenge = unpack(receive(sock)[0])
                assert challenge is not None
                assert challenge[0] == Message.CHALLENGE
                sock.send(pack(Message.HELLO, pid, challenge[2] ^ change, body))
                data, descriptors = receive(sock)
                assert descriptors == []
                message = unpack(data)
                assert message is not None
                assert message[0] == Message.REFUSED
                assert receive(sock) == (b"", [])
        assert works(client)


def test_who_connects_and_talks_nonsense_or_nothing_bothers_nobody(log: Log) -> None:
    with supervisor(spares=0) as client:
        supervisors = psutil.Process(client.supervisor_pid)
        before = supervisors.num_fds()
        with raw_connection(client), raw_connection(client) as talkative:
            for nonsense in (b"x", b"\xff" * 16, b"\xff" * 5000, pack(Message.STOP, 2)):
                talkative.send(nonsense)
            # Descriptors are turned away by the kernel (since 6.16), or closed unseen.
            pipe = os.pipe()
            with suppress(PermissionError):
                socket.send_fds(talkative, [pack(Message.KICK)], pipe)
            for fd in pipe:
                os.close(fd)
            talkative.send(b"")  # by itself an end-of-file
            log.wait_for("WARNING:", "was ignored")
            log.wait_for("WARNING:", "before it has said who it is")
            assert works(client)
            with ClientProcess(client.address) as other:
                assert other.call("find", name="x") is None
                other.end()
        poll_until(lambda: supervisors.num_fds() == before)


# --- supervisors that cannot start ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message", "detail"),
    [
        ('raise ValueError("not today")', 'could not preload module "broken"', "not today"),
        ("import missing_from_it", 'could not preload module "broken"', "missing_from_it"),
        ("import sys; sys.exit(3)", "SystemExit", "SystemExit: 3"),
        ("import os; os._exit(7)", "the supervisor ended before it accepted", "status is 7"),
        (
            "import threading, time\n"
            "threading.Thread(target=time.sleep, args=(60,), name='sleepy', daemon=True).start()",
            "the supervisor must not have threads",
            "threads: sleepy",
        ),
    ],
    ids=["raises", "cannot import", "exits", "is gone", "starts a thread"],
)
def test_a_module_that_cannot_be_preloaded_is_an_error_of_the_start(
    text: str, message: str, detail: str, modules: Path, runtime_dir: Path
) -> None:
    (modules / "broken.py").write_text(text)
    with pytest.raises(StartError, match=message) as caught:
        Supervisor(address="main", preload=["broken"]).start()
    assert detail in str(caught.value.detail)
    # Nothing stands in the way of the next.
    assert not (runtime_dir / "main.sock").exists()
    with supervisor(address="main") as client:
        assert works(client)


def test_a_startup_name_that_cannot_be_one_is_refused_before_anything_starts() -> None:
    for startup in ("nonsense", "a module:f", "", lambda: None):
        with pytest.raises(InvalidWorkerError):
            Supervisor(startup=startup)  # type: ignore[arg-type]


def test_a_startup_function_that_is_not_there_ends_the_supervisor(log: Log) -> None:
    """Connections are accepted while the startup worker runs, so start() may have returned."""
    try:
        client = Supervisor(startup="support.workers:missing").start()
    except StartError:
        pass
    else:
        with client:
            assert client._process is not None
            assert client._process.wait(30) == 1
    log.wait_for("FATAL:", "aborting startup")
    assert 'could not find function "missing" in module "support.workers"' in log.text


def test_a_supervisor_starts_once() -> None:
    starter = Supervisor()
    with starter:
        with pytest.raises(WrongProcessError, match="was started already"):
            starter.start()
        with pytest.raises(WrongProcessError, match="was started already"):
            starter.run()


def test_a_supervisor_that_could_not_start_leaves_a_worker_of_the_same_name_alone(
    modules: Path, tmp_path: Path
) -> None:
    # The second one's preload must not even run: the address comes first.
    (modules / "leaves_trace.py").write_text(
        f"open({str(tmp_path / 'trace')!r}, 'a').write('preloaded\\n')\n"
    )
    with supervisor(address="main") as client:
        handle = client.register("support.workers:sleep_until_stopped")
        assert handle.wait_for_ready(30) is HandleStatus.STARTED
        with pytest.raises(StartError):
            Supervisor(address="main", preload=["leaves_trace"]).start()
        assert handle.status() is HandleStatus.STARTED
    assert lines(tmp_path / "trace") == []
