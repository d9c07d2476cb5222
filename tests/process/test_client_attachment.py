"""Attaching: one client per supervisor and process, however often; forks, copies, the end."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from pgbgw import (
    AttachError,
    BackgroundWorker,
    Client,
    ConfigurationError,
    HandleStatus,
    Supervisor,
    WrongProcessError,
    attach,
)
from support import observed_workers, poll_until, workers
from support.control import paused
from support.processes import Script, fork_as, in_fork, run_script
from support.supervisors import supervisor

STARTED, STOPPED = HandleStatus.STARTED, HandleStatus.STOPPED
NEVER_RUNNING = "support.workers:sleep_until_stopped"


def descriptors(client: Client) -> int:
    """How many the supervisor has open."""
    return psutil.Process(client.supervisor_pid).num_fds()


# --- counting -----------------------------------------------------------------------------------


def test_attaching_again_gives_the_same_client_which_counts() -> None:
    with supervisor(address="main") as client:
        first, second = attach("main"), attach(client.address)
        assert first is second is client
        second.close()
        assert client.register(workers.noop).wait_until_gone(30).exitcode == 0
        with attach("main") as third:
            assert third is client
        assert client.register(workers.noop).wait_until_gone(30).exitcode == 0
        first.close()
        assert client.max_worker_processes == 8


def test_after_the_last_close_everything_raises_and_attaching_anew_works() -> None:
    with supervisor(address="main") as client:
        # The supervisor's owner stays attached in its own process; here is another one.
        code = """
            from pgbgw import AttachError, HandleStatus, attach
            first = attach("main")
            handle = first.register(worker)
            assert handle.wait_for_ready(30) is HandleStatus.STARTED
            first.close()
            first.close()
            for use in (
                lambda: first.register(worker), lambda: first.try_register(worker),
                lambda: first.register_many([worker]), lambda: first.workers(),
                lambda: first.find(name="x"), lambda: first.find(pid=1),
                lambda: first.worker_type(1), lambda: first.wait([handle]), lambda: first.watch(),
                lambda: first.stop(), lambda: first.phase, lambda: first.epoch,
                lambda: first.supervisor_pid, lambda: first.max_worker_processes,
                lambda: first.max_parallel_workers,
                lambda: handle.status(), lambda: handle.pid, lambda: handle.outcome,
                lambda: handle.wait_for_startup(), lambda: handle.terminate(),
                lambda: handle.wake(), lambda: handle.info(),
            ):
                try:
                    use()
                except AttachError as error:
                    assert "attach" in error.hint, error.hint
                else:
                    raise AssertionError("did not raise")
            second = attach("main")
            assert second is not first
            assert handle.status() is HandleStatus.STARTED
            handle.terminate()
            test.send(handle.wait_until_gone(30))
            second.close()
        """
        worker = BackgroundWorker(entry=workers.sleep_until_stopped)
        assert run_script(code, worker=worker).exitcode == 1
        assert client.workers() == []


def test_workers_outlive_the_client_that_registered_them() -> None:
    code = """
        from pgbgw import attach
        with attach(address) as client:
            test.send(client.register("support.workers:sleep_until_stopped"))
    """
    with supervisor() as client:
        handle = run_script(code, address=client.address)
        assert handle.wait_for_ready(30) is STARTED


def test_threads_that_attach_at_once_get_one_client() -> None:
    code = """
        from concurrent.futures import ThreadPoolExecutor
        from pgbgw import attach
        with ThreadPoolExecutor(16) as pool:
            clients = list(pool.map(lambda _: attach(address), range(16)))
        test.send(len(set(map(id, clients))))
        for client in clients:
            assert client.phase.name == "RUNNING"
            client.close()
        test.send(clients[0]._view.usable)
    """
    with supervisor() as client, Script(code, address=client.address) as script:
        assert script.hear() == 1
        assert script.hear() is False


def test_attaching_and_closing_at_once_never_gives_a_dead_client() -> None:
    code = """
        from concurrent.futures import ThreadPoolExecutor
        from pgbgw import attach

        def use(number):
            for _ in range(number):
                with attach(address) as client:
                    handle = client.register("support.workers:noop")
                    handle.terminate()
                    assert handle.wait_until_gone(10).kind == "cancelled"

        with ThreadPoolExecutor(4) as pool:
            for result in [pool.submit(use, 50) for _ in range(4)]:
                result.result(60)
        test.send(True)
    """
    with supervisor(startup=NEVER_RUNNING, max_worker_processes=16, spares=0) as client:
        before = descriptors(client)
        assert run_script(code, address=client.address)
        poll_until(lambda: descriptors(client) == before)
        assert client.workers() == []


def test_who_comes_and_goes_leaves_nothing_in_the_supervisor() -> None:
    code = """
        from pgbgw import attach
        for _ in range(100):
            with attach(address) as client, client.watch():
                assert client.workers() == []
        test.send(True)
        client = attach(address)
        client.watch(client.register("support.workers:noop"))
        test.recv()
    """
    with supervisor(spares=0) as client:
        before = descriptors(client)
        with Script(code, address=client.address) as script:
            assert script.hear()
            poll_until(lambda: descriptors(client) > before)
            script.kill()
        poll_until(lambda: descriptors(client) == before)


def test_two_supervisors_have_a_client_each() -> None:
    with supervisor() as one, supervisor() as two:
        assert one is not two
        assert one.epoch != two.epoch
        handles = [
            c.register(workers.sleep_until_stopped, name=c.address[-20:]) for c in (one, two)
        ]
        for handle, client in zip(handles, (one, two), strict=True):
            assert handle.wait_for_ready(30) is STARTED
            assert [i.name for i in client.workers()] == [client.address[-20:]]
        handles[0].terminate()
        handles[0].wait_until_gone(30)
        assert handles[1].status() is STARTED


# --- finding a supervisor -----------------------------------------------------------------------


def test_the_address_may_be_a_name_a_path_or_in_the_environment(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with supervisor(address="main") as client:
        assert client.address == str(runtime_dir / "main.sock")
        monkeypatch.setenv("PGBGW_ADDRESS", "main")
        for address in (None, "main", runtime_dir / "main.sock", str(runtime_dir / "main")):
            with attach(address) as found:
                assert found is client
        monkeypatch.delenv("PGBGW_ADDRESS")
        with pytest.raises(AttachError, match=r"default\.sock"):
            attach()
    with pytest.raises(ConfigurationError):
        attach("")


def test_a_worker_finds_its_supervisor_in_its_environment(tmp_path: Path) -> None:
    path = tmp_path / "seen"
    with supervisor() as client:
        handle = client.register(observed_workers.launch_and_wait, str(path), False)
        assert handle.wait_until_gone(30).exitcode == 0
        assert path.exists()


def test_nobody_there_is_said_at_once_and_one_that_does_not_answer_after_the_timeout() -> None:
    with pytest.raises(AttachError, match="no supervisor is running") as caught:
        attach("nobody", timeout=1000)
    assert "pgbgw run" in (caught.value.hint or "")
    code = """
        from pgbgw import AttachError, attach
        try:
            attach(address, timeout=0.1)
        except AttachError as error:
            test.send((str(error), error.hint))
    """
    with supervisor() as client, paused(client):
        message, hint = run_script(code, address=client.address)
        assert "did not answer in time" in message
        assert "SIGSTOP" in hint


@pytest.mark.leaves_sockets
def test_the_socket_of_a_dead_supervisor_is_nobody() -> None:
    client = Supervisor(address="main").start()
    os.kill(client.supervisor_pid, signal.SIGKILL)
    client.stop()
    client.close()
    assert os.path.exists(client.address)
    with pytest.raises(AttachError, match="no supervisor is running"):
        attach("main", timeout=1000)
    # And no obstacle for the next.
    with supervisor(address="main") as client:
        assert client.register(workers.noop).wait_until_gone(30).exitcode == 0


def test_the_pid_of_a_dead_client_may_be_that_of_the_next() -> None:
    """A client dies, and before the supervisor has noticed another one comes with its pid."""
    code = """
        from pgbgw import attach
        client = attach(address)
        test.send(client.register("support.workers:sleep_until_stopped"))
        test.recv()
    """
    with supervisor() as client:
        with Script(code, address=client.address) as script:
            first = script.hear()
            assert first.wait_for_ready(30) is STARTED
            with paused(client):
                script.kill()

                def next_client() -> HandleStatus:
                    with attach(client.address) as mine:
                        assert mine.phase.name == "RUNNING"
                        handle = mine.register(workers.sleep_until_stopped)
                        # Not taken for what the dead one left behind, and told what it waits for.
                        status = handle.wait_for_ready(30)
                        handle.terminate()
                        handle.wait_until_gone(30)
                        return status

                found = fork_as(script.pid, next_client)
                if found is None:
                    pytest.skip("needs the right to choose a pid")
                os.kill(client.supervisor_pid, signal.SIGCONT)
                assert found() is STARTED
        assert first.status() is STARTED
        assert len(client.workers()) == 1


# --- forks --------------------------------------------------------------------------------------


def test_in_a_forked_child_the_parents_client_refuses_and_the_parent_goes_on() -> None:
    with supervisor() as client, client.watch() as watch:
        handle = client.register(workers.sleep_until_stopped)
        handle.wait_for_ready(30)

        def child() -> list[str]:
            with pytest.raises(AttachError) as caught:
                handle.status()
            assert caught.value.hint == f"attach({client.address!r}) before using the handle."
            uses = {
                "register": lambda: client.register(workers.noop),
                "try_register": lambda: client.try_register(workers.noop),
                "register_many": lambda: client.register_many([]) or client.phase,
                "workers": client.workers,
                "find": lambda: client.find(name="x"),
                "find pid": lambda: client.find(pid=os.getpid()),
                "type": lambda: client.worker_type(os.getpid()),
                "wait": lambda: client.wait([handle]),
                "wait for nobody": lambda: client.wait([]),
                "watch": client.watch,
                "add": lambda: watch.add(handle),
                "remove": lambda: watch.remove(handle),
                "changes": watch.changes,
                "stop": client.stop,
                "phase": lambda: client.phase,
                "epoch": lambda: client.epoch,
            }
            wrong = []
            for name, use in uses.items():
                try:
                    use()
                except WrongProcessError as error:
                    if error.hint != "Call attach() in the child.":
                        wrong.append(f"{name}: {error.hint}")
                else:
                    wrong.append(name)
            client.close()
            return wrong

        assert in_fork(child) == []
        assert handle.status() is STARTED
        assert client.register(workers.noop).wait_until_gone(30).exitcode == 0


def test_a_forked_child_attaches_anew_and_its_handles_work() -> None:
    with supervisor() as client:
        before = descriptors(client)
        handle = client.register(workers.sleep_until_stopped)
        handle.wait_for_ready(30)

        def child() -> tuple[object, ...]:
            mine = attach(client.address)
            assert mine is not client
            assert handle.status() is STARTED
            other = mine.register(workers.exit_with, 5)
            code = other.wait_until_gone(30).exitcode
            handle.terminate()
            # The parent's is no good for all that.
            with pytest.raises(WrongProcessError):
                client.wait([handle])
            last = handle.wait_until_gone(30)
            mine.close()
            return mine._view is client._view, code, last, other

        same, code, last, other = in_fork(child)
        assert not same
        assert code == 5
        assert handle.wait_until_gone(30) == last
        assert other.outcome is not None
        assert other.outcome.exitcode == 5
        poll_until(lambda: descriptors(client) == before)


def test_a_fork_while_other_threads_wait_disturbs_nobody() -> None:
    with supervisor() as client, ThreadPoolExecutor(3) as pool:
        handle = client.register(workers.sleep_until_stopped)
        handle.wait_for_ready(30)
        results = [pool.submit(handle.wait_for_shutdown, 30) for _ in range(3)]
        poll_until(lambda: client._channels.waiting == 3)

        def child() -> HandleStatus:
            with attach(client.address):
                handle.terminate()
                return handle.wait_for_shutdown(30)

        assert in_fork(child) is STOPPED
        for result in results:
            assert result.result(30) is STOPPED


def test_the_end_of_a_forked_child_does_not_stop_its_parents_supervisor() -> None:
    with supervisor() as client:
        for _ in range(3):
            in_fork(lambda: None)
        assert client.register(workers.noop).wait_until_gone(30).exitcode == 0


# --- copies -------------------------------------------------------------------------------------


def test_a_handle_in_a_process_without_a_client_says_to_attach_and_then_works() -> None:
    code = """
        from pgbgw import AttachError, HandleStatus, attach
        for use in (handle.status, lambda: handle.pid, lambda: handle.outcome,
                    handle.wait_for_startup, handle.terminate, handle.info,
                    lambda: handle.terminate(grace=1), handle.cancel, handle.wake):
            try:
                use()
            except AttachError as error:
                assert f"attach({handle.address!r})" in error.hint, error.hint
            else:
                raise AssertionError("did not raise")
        with attach(handle.address) as client:
            assert handle.status() is HandleStatus.STARTED
            assert handle.info().name == "mine"
            assert client.find(name="mine") == handle
            handle.terminate()
            test.send((handle, handle.wait_until_gone(30)))
    """
    with supervisor() as client:
        handle = client.register(workers.sleep_until_stopped, name="mine")
        handle.wait_for_ready(30)
        back, outcome = run_script(code, handle=handle)
        assert back == handle
        assert handle.wait_until_gone(30) == outcome
        # Printing and comparing needs no client.
        assert repr(back) == repr(handle)
        assert pickle.loads(pickle.dumps(back)) in {handle}


def test_a_handle_of_another_supervisor_at_the_same_address_is_stopped() -> None:
    with supervisor(address="main") as client:
        old = pickle.dumps(client.register(workers.sleep_until_stopped))
    with supervisor(address="main") as client:
        handle = pickle.loads(old)
        new = client.register(workers.sleep_until_stopped)
        new.wait_for_ready(30)
        assert (handle.slot, handle.generation) == (new.slot, new.generation)
        assert handle != new
        assert handle.status() is STOPPED
        assert handle.pid is None
        assert not handle.ready
        assert handle.wait_for_startup() is STOPPED
        assert handle.wait_until_gone().kind == "lost"
        handle.terminate()
        handle.terminate(grace=0)
        assert new.status() is STARTED


# --- the end ------------------------------------------------------------------------------------


def test_stop_waits_reaps_and_can_be_repeated() -> None:
    client = Supervisor().start()
    pid = client.supervisor_pid
    handle = client.register(workers.sleep_until_stopped)
    handle.wait_for_ready(30)
    client.stop()
    assert not psutil.pid_exists(pid)
    client.stop("immediate")
    assert handle.status() is STOPPED
    with pytest.raises(ValueError, match="mode must be"):
        client.stop("gently")
    client.close()


def test_stop_gives_up_after_its_timeout_and_the_request_stands() -> None:
    client = Supervisor().start()
    handle = client.register(workers.ignore_sigterm)
    handle.wait_for_ready(30)
    before = time.monotonic()
    with pytest.raises(TimeoutError, match="did not stop in time"):
        client.stop("fast", timeout=0.1)
    assert time.monotonic() - before >= 0.1
    assert client.phase.name == "STOPPING"
    handle.terminate(grace=0)
    client.stop("fast", timeout=1e9)
    outcome = handle.outcome
    assert outcome is not None
    assert outcome.signal == signal.SIGKILL
    client.close()


@pytest.mark.parametrize("stop", [True, False], ids=["stopped", "left"])
def test_a_program_that_closes_nothing_ends_without_a_word(stop: bool) -> None:
    """No warning about sockets or processes left open; an owned supervisor stops by itself."""
    code = f"""
        import logging
        logging.getLogger("pgbgw").setLevel(logging.CRITICAL)
        from pgbgw import Supervisor
        client = Supervisor().start()
        handle = client.register("support.workers:noop")
        handle.wait_until_gone(30)
        if {stop}:
            client.stop()
    """
    command = [sys.executable, "-W", "error", "-P", "-c", textwrap.dedent(code)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environ, stderr=subprocess.PIPE, timeout=30, text=True)
    problems = [line for line in done.stderr.splitlines() if "LOG:" not in line]
    assert (done.returncode, problems) == (0, [])
