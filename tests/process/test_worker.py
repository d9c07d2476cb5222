"""The worker's side: from fork to exit, and what current_worker() offers."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pgbgw import (
    BackgroundWorker,
    Client,
    Flags,
    HandleStatus,
    Phase,
    WorkerHandle,
    WrongProcessError,
    current_worker,
)
from support import poll_until
from support.control import Log
from support.processes import in_fork, is_alive
from support.supervisors import lines, supervisor

MODULE = "support.probe_workers"
SHMEM = Flags.SHMEM_ACCESS

both_start_methods = pytest.mark.parametrize("start_method", ["fork", "spawn"])


def launch(client: Client, entry: str, *args: object, **fields: object) -> WorkerHandle:
    """Register a worker of support.probe_workers, or of another module of support."""
    entry = f"support.{entry}" if "workers:" in entry else f"{MODULE}:{entry}"
    return client.register(BackgroundWorker(entry=entry, args=args, **fields))  # type: ignore[arg-type]


def wait_for_ready(handle: WorkerHandle) -> int:
    """Its pid, once it is ready."""
    assert handle.wait_for_ready(30) is HandleStatus.STARTED
    assert handle.pid is not None
    return handle.pid


def read(path: str | Path) -> Any:
    """What a worker has left; it may take a while."""
    poll_until(Path(path).exists)
    return json.loads(Path(path).read_text())


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(tmp_path / "out")


@pytest.fixture
def log(capfd: pytest.CaptureFixture[str]) -> Log:
    return Log(capfd)


# --- what a worker finds ------------------------------------------------------------------------


@contextmanager
def soft_limit_of_open_files(limit: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


_known_facts: dict[tuple[str, Flags], dict[str, Any]] = {}


@pytest.fixture(params=["fork", "spawn", "fork, shmem", "spawn, shmem"])
def facts(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """What one worker says about its process, whose supervisor had a meddlesome preload.

    One worker of each kind is enough: the first test that asks starts it.
    """
    start_method, _, shmem = request.param.partition(", ")
    flags = SHMEM if shmem else Flags.NONE
    if (start_method, flags) not in _known_facts:
        known = _known_facts[start_method, flags] = {"start_method": start_method, "flags": flags}
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PGBGW_TEST_KEPT", "as at the start")
        monkeypatch.syspath_prepend("relative")
        with (
            soft_limit_of_open_files(500),
            supervisor(
                start_method=start_method, shared_memory=4096, preload=["support.preload_changes"]
            ) as client,
        ):
            # Connections and workers that are there already, whose descriptors are not for others.
            wait_for_ready(launch(client, "workers:sleep_until_stopped", flags=flags))
            handle = launch(
                client, "facts", "facts", name="a worker's name", flags=flags, env={"EXTRA": "é"}
            )
            outcome = handle.wait_until_gone(30)
            assert outcome.exitcode == 0, outcome.error
            known |= read("facts")
            known["supervisor"] = client.supervisor_pid
            known["address"] = client.address
            known["expected environ"] = dict(os.environ)
            known["expected path"] = [os.path.abspath(p) for p in sys.path]
            known["expected directory"] = str(tmp_path)
    return _known_facts[start_method, flags]


def test_a_worker_has_a_session_and_a_process_group_of_its_own(facts: dict[str, Any]) -> None:
    assert facts["parent"] == facts["supervisor"]
    assert facts["session"] == facts["group"] == facts["pid"]


def test_a_worker_is_named_after_its_registration(facts: dict[str, Any]) -> None:
    assert facts["comm"] == "a worker's name"


def test_a_workers_environment_is_the_one_of_the_supervisors_start(facts: dict[str, Any]) -> None:
    expected = {**facts["expected environ"], "PGBGW_ADDRESS": facts["address"], "EXTRA": "é"}
    # The readline library puts these into our environment, behind the back of os.environ.
    seen = {k: v for k, v in facts["environ"].items() if k not in ("COLUMNS", "LINES")}
    assert seen == {k: v for k, v in expected.items() if k not in ("COLUMNS", "LINES")}
    assert facts["environ"]["PGBGW_TEST_KEPT"] == "as at the start"
    assert facts["interpreter"] == [0, 0]  # neither -I nor -E


def test_a_worker_has_the_path_and_the_directory_of_the_supervisors_start(
    facts: dict[str, Any],
) -> None:
    assert facts["path"] == facts["expected path"]
    assert facts["directory"] == facts["expected directory"]


def test_a_worker_has_no_descriptors_but_its_own(facts: dict[str, Any]) -> None:
    found = {int(fd): target for fd, target in facts["descriptors"].items()}
    assert found.keys() >= {0, 1, 2}
    targets = sorted(target for fd, target in found.items() if fd > 2)
    sockets = [t for t in targets if t.startswith("socket:")]
    assert len(sockets) == 3  # the channel and the wake-up pair
    address = facts["address"].removesuffix(".sock")
    expected = [f"{address}.workers.lock"]
    if facts["flags"] & SHMEM:
        expected.append("/memfd:pgbgw-memory (deleted)")
    if facts["start_method"] == "fork":
        assert found[20].endswith("support/preload_changes.py")
        expected.append(found[20])
    assert targets == sorted(expected + sockets)
    assert facts["inheritable"] == [0, 1, 2]  # programs that the worker execs get no others


def test_a_worker_maps_no_segment_but_the_memory_of_its_domain(facts: dict[str, Any]) -> None:
    assert facts["mapped"] == (["pgbgw-memory"] if facts["flags"] & SHMEM else [])


def test_a_workers_limit_of_open_files_is_that_of_the_start(facts: dict[str, Any]) -> None:
    assert facts["open files"][0] == 500


def test_a_workers_signals_are_open_and_handled_as_the_table_says(facts: dict[str, Any]) -> None:
    assert facts["blocked"] == []
    assert facts["caught"] == ["SIGQUIT", "SIGTERM"]
    # Python ignores SIGXFSZ everywhere.
    ignored = {"SIGHUP", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGXFSZ"}
    assert set(facts["ignored"]) == ignored


def test_current_worker_raises_outside_of_a_worker() -> None:
    with pytest.raises(WrongProcessError, match="not a background worker"):
        current_worker()


@both_start_methods
def test_a_worker_works_with_descriptors_beyond_1024(
    start_method: str, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a supervisor with many clients: a forked worker's channel has a number beyond theirs.
    (tmp_path / "high.py").write_text("import os; os.dup2(0, 1200)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with supervisor(start_method=start_method, preload=["high"]) as client:
        handle = launch(client, "launch_another", out, "client", flags=SHMEM)
        outcome = handle.wait_until_gone(30)
    assert outcome.exitcode == 0, outcome.error
    assert read(out) == ["STARTED", "STOPPED", "exited", True]


# --- the end of a worker ------------------------------------------------------------------------


@both_start_methods
def test_a_worker_ends_by_joining_threads_calling_atexit_functions_and_flushing(
    start_method: str, out: str, capfd: pytest.CaptureFixture[str]
) -> None:
    codes = {"return": 0, "raise": 1, "exit": 3}
    with supervisor(start_method=start_method) as client:
        handles = {how: launch(client, "end_in_order", f"{out}.{how}", how) for how in codes}
        assert {how: h.wait_until_gone(30).exitcode for how, h in handles.items()} == codes
    for how in codes:
        assert lines(f"{out}.{how}") == [how, "thread", "atexit function"]
    assert capfd.readouterr().out.count("unflushed text") == 3


def test_atexit_functions_of_preloaded_modules_are_not_the_workers(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGBGW_TEST_ATEXIT", str(tmp_path / "atexit"))
    with supervisor(preload=["support.preload_changes"]) as client:
        assert launch(client, "end_in_order", out, "return").wait_until_gone(30).exitcode == 0
    assert lines(out)[-1] == "atexit function"
    assert not (tmp_path / "atexit").exists()


@pytest.mark.parametrize("flags", [Flags.NONE, SHMEM])
def test_the_code_of_system_exit_is_the_exit_code_as_a_shell_sees_it(
    flags: Flags, log: Log
) -> None:
    codes = {None: 0, 0: 0, 1: 1, "last words": 1, 256: 0, 257: 1}
    if not flags:  # with shared memory these crash the domain
        codes |= {3: 3, 300: 44, -1: 255}
    with supervisor(max_worker_processes=16) as client:
        handles = {code: launch(client, "workers:exit_with", code, flags=flags) for code in codes}
        seen = {code: handle.wait_until_gone(30) for code, handle in handles.items()}
    assert {code: outcome.exitcode for code, outcome in seen.items()} == codes
    log.wait_for("last words")
    assert "Traceback" not in log.text
    assert "terminating the other workers" not in log.text


@both_start_methods
def test_an_exception_is_logged_with_its_traceback_and_its_tail_is_the_outcomes_error(
    start_method: str, log: Log
) -> None:
    with supervisor(start_method=start_method) as client:
        handle = launch(client, "workers:fail", "it is brökén", name="failing")
        outcome = handle.wait_until_gone(30)
        long = launch(client, "workers:fail", "é" * 400).wait_until_gone(30)
    assert (outcome.kind, outcome.exitcode) == ("exited", 1)
    assert outcome.error is not None
    assert outcome.error.startswith("Traceback (most recent call last):\n")
    assert outcome.error.endswith("\nValueError: it is brökén\n")
    # 512 bytes are kept, of whole lines where there are several.
    assert long.error is not None
    assert len(long.error.encode()) <= 512
    assert long.error.endswith("é\n")
    log.wait_for("ERROR:  worker", '"failing"', "failed")
    assert log.wait_for("ValueError: it is brökén").startswith("\t")


def test_exceptions_that_are_no_errors_end_a_worker_with_1_too() -> None:
    with supervisor() as client:
        outcome = launch(client, "raise_interrupt").wait_until_gone(30)
    assert outcome.exitcode == 1
    assert outcome.error is not None
    assert outcome.error.endswith("KeyboardInterrupt\n")


@both_start_methods
def test_arguments_that_cannot_be_unpickled_are_the_workers_failure(start_method: str) -> None:
    from support.probe_workers import Explosive

    explosive = BackgroundWorker(entry="support.workers:noop", args=(Explosive(),))
    garbage = BackgroundWorker(entry="support.workers:noop", args=("x" * 100,))
    object.__setattr__(garbage, "_payload", b"\x80" + b"\xff" * 100)
    with supervisor(start_method=start_method) as client:
        handles = [client.register(worker) for worker in (explosive, garbage)]
        outcomes = [handle.wait_until_gone(30) for handle in handles]
        assert client.register("support.workers:noop").wait_until_gone(30).exitcode == 0
    assert [outcome.exitcode for outcome in outcomes] == [1, 1]
    assert "RuntimeError: cannot be unpickled" in str(outcomes[0].error)
    assert "Error" in str(outcomes[1].error)


@both_start_methods
def test_an_entry_that_is_not_there_is_named_by_module_and_function(
    start_method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {
        "no_such_module:f": 'could not find module "no_such_module" of entry point',
        "support.nothing:f": 'could not find module "support.nothing"',
        f"{MODULE}:no.such": f'could not find function "no.such" in module "{MODULE}"',
        f"{MODULE}:not_callable": f'"{MODULE}:not_callable" is not callable',
        "incomplete:f": "No module named 'missing_from_it'",
    }
    (tmp_path / "incomplete.py").write_text("import missing_from_it\n")
    monkeypatch.syspath_prepend(tmp_path)
    with supervisor(start_method=start_method) as client:
        handles = {entry: client.register(entry) for entry in parts}
        outcomes = {entry: handle.wait_until_gone(30) for entry, handle in handles.items()}
    for entry, part in parts.items():
        assert outcomes[entry].exitcode == 1
        assert part in str(outcomes[entry].error)


# --- signals ------------------------------------------------------------------------------------


@both_start_methods
def test_signals_that_nobody_asked_for_are_ignored(start_method: str, out: str) -> None:
    with supervisor(start_method=start_method) as client:
        handle = launch(client, "echo", out)
        pid = wait_for_ready(handle)
        for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGPIPE"):
            os.kill(pid, signal.Signals[name])
        handle.cancel()  # SIGINT is only for those with a connection
        handle.wake()
        poll_until(lambda: lines(out))
        assert handle.pid == pid
        handle.terminate()
        assert handle.wait_until_gone(30).exitcode == 0
    # They have not ended a wait either.
    assert lines(out) == ["woken", "asked to stop", "stopped"]


@pytest.mark.parametrize("call", ["sleep", "wait", "endless timeout", "busy"])
def test_sigterm_raises_worker_terminated_whatever_the_worker_does(
    call: str, out: str, log: Log
) -> None:
    with supervisor() as client:
        handle = launch(client, "stop_in", out, call, name="to be stopped")
        wait_for_ready(handle)
        handle.terminate()
        outcome = handle.wait_until_gone(30)
    assert (outcome.kind, outcome.exitcode, outcome.error) == ("exited", 1, None)
    assert lines(out) == ["WorkerTerminated 1 True"]
    log.wait_for("LOG:", "to be stopped", "terminated on request")
    assert "Traceback" not in log.text


def test_a_second_sigterm_does_not_break_into_the_clean_up(out: str, tmp_path: Path) -> None:
    go = tmp_path / "go"
    with supervisor() as client:
        handle = launch(client, "clean_up_slowly", out, str(go))
        pid = wait_for_ready(handle)
        os.kill(pid, signal.SIGTERM)
        poll_until(lambda: lines(out))
        os.kill(pid, signal.SIGTERM)
        go.touch()
        assert handle.wait_until_gone(30).exitcode == 1
    assert lines(out) == ["cleaning up", "cleaned up"]


def test_a_stop_ends_the_waits_of_threads_too(out: str) -> None:
    with supervisor() as client:
        handle = launch(client, "wait_in_a_thread", out)
        wait_for_ready(handle)
        poll_until(lambda: lines(out))
        handle.terminate()
        assert handle.wait_until_gone(30).exitcode == 1
    assert lines(out) == ["thread waits", "stopping: True"]


@both_start_methods
def test_sigquit_ends_a_worker_with_2_before_it_has_done_anything(
    start_method: str, out: str
) -> None:
    # The delay comes before everything that is the user's.
    with supervisor(start_method=start_method, post_auth_delay=3600) as client:
        handle = launch(client, "workers:append", out)
        assert handle.wait_for_startup(30) is HandleStatus.STARTED
        assert handle.pid is not None
        os.kill(handle.pid, signal.SIGQUIT)
        outcome = handle.wait_until_gone(30)
    assert (outcome.kind, outcome.exitcode) == ("exited", 2)
    assert not Path(out).exists()


@both_start_methods
def test_sigterm_that_comes_before_the_handlers_is_not_lost(start_method: str, out: str) -> None:
    with supervisor(start_method=start_method, post_auth_delay=0.2) as client:
        handle = launch(client, "workers:append", out)
        assert handle.wait_for_startup(30) is HandleStatus.STARTED
        handle.terminate()
        outcome = handle.wait_until_gone(30)
    assert (outcome.kind, outcome.exitcode, outcome.error) == ("exited", 1, None)
    assert not Path(out).exists()


def test_sigquit_and_faults_are_open_where_signals_are_blocked() -> None:
    with supervisor() as client:
        quits = launch(client, "fault_with_signals_blocked", signal.SIGQUIT).wait_until_gone(30)
        aborts = launch(client, "fault_with_signals_blocked", signal.SIGABRT).wait_until_gone(30)
    assert (quits.kind, quits.exitcode) == ("exited", 2)
    assert (aborts.kind, aborts.signal) == ("signaled", signal.SIGABRT)


def test_blocked_signals_are_delivered_when_the_outermost_block_ends(out: str) -> None:
    with supervisor() as client:
        assert launch(client, "hold_signals_back", out).wait_until_gone(30).exitcode == 1
    assert lines(out)[:2] == ["inner", "outer"]
    assert set(lines(out)[2:]) <= {"reload", "stopping: True"}
    assert lines(out)[-1] == "stopping: True"


def test_sighup_calls_back_ends_a_wait_and_is_ignored_again(out: str) -> None:
    with supervisor() as client:
        handle = launch(client, "reload", out)
        pid = wait_for_ready(handle)
        os.kill(pid, signal.SIGHUP)
        assert handle.wait_until_gone(30).exitcode == 0
    assert lines(out) == ["reload", "wait is over", "ignored", "raised"]


def test_with_a_callback_a_stop_only_ends_waits(out: str) -> None:
    with supervisor() as client:
        handle = launch(client, "echo", out)
        wait_for_ready(handle)
        handle.terminate()
        assert handle.wait_until_gone(30).exitcode == 0
    assert lines(out) == ["asked to stop", "stopped"]


# --- waiting ------------------------------------------------------------------------------------


def test_a_wake_up_before_the_wait_ends_it(out: str, tmp_path: Path) -> None:
    go = tmp_path / "go"
    with supervisor() as client:
        early = launch(client, "wait_when_told", out, str(go))
        other = launch(client, "echo", f"{out}.other")
        for handle in (early, other):
            wait_for_ready(handle)
        early.wake()
        early.wake()
        # The other one hears after the first: it has its wake-up, and does not wait yet.
        other.wake()
        poll_until(lambda: lines(f"{out}.other"))
        go.touch()
        assert read(out) < 10


def test_a_wake_up_does_not_end_a_sleep_but_the_next_wait(out: str) -> None:
    with supervisor() as client:
        handle = launch(client, "sleep_then_wait", out)
        wait_for_ready(handle)
        handle.wake()
        result, slept, waited = read(out)
    assert result is True
    assert slept >= 0.5
    assert waited < 10


def test_wait_returns_the_readable_descriptors_and_nothing_after_a_timeout(out: str) -> None:
    with supervisor() as client:
        outcome = launch(client, "wait_for_descriptors", out).wait_until_gone(30)
    assert outcome.exitcode == 0, outcome.error
    seen = read(out)
    assert all(seen.values()), seen


def test_what_ends_a_wait_is_a_descriptor_a_wake_up_or_a_stop(out: str, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with supervisor() as client:
        handle = launch(client, "wait_for_pipe_or_wake", out, str(fifo))
        wait_for_ready(handle)
        with fifo.open("wb", buffering=0) as file:
            file.write(b"x")
        poll_until(lambda: len(lines(out)) == 1)
        handle.wake()
        poll_until(lambda: len(lines(out)) == 2)
        handle.terminate()
        assert handle.wait_until_gone(30).exitcode == 0
    assert lines(out) == [
        "descriptor, stopping: False",
        "nothing readable, stopping: False",
        "nothing readable, stopping: True",
    ]


# --- what others see, and what a worker may ask for ---------------------------------------------


@both_start_methods
def test_ready_and_activity_are_visible_and_good_for_one_run(start_method: str, out: str) -> None:
    with supervisor(start_method=start_method, shared_memory=1) as client:
        handle = launch(
            client, "count_runs_in_memory", out, restart_time=0, name="counter", flags=SHMEM
        )
        wait_for_ready(handle)
        assert handle.info().ready
        handle.wake()
        poll_until(lambda: len(lines(out)) == 2)
        assert handle.wait_for_startup(30) is HandleStatus.STARTED
        assert not handle.info().ready
        assert handle.info().restarts == 1
    first, second = lines(out)
    assert first == "run 1 after None"
    assert second.startswith("run 2 after exited with code 1")


@both_start_methods
def test_after_a_crash_the_restarted_worker_meets_fresh_memory(start_method: str, out: str) -> None:
    with supervisor(start_method=start_method, shared_memory=1) as client:
        handle = launch(client, "count_runs_in_memory", out, restart_time=60, flags=SHMEM)
        os.kill(wait_for_ready(handle), signal.SIGKILL)
        poll_until(lambda: len(lines(out)) == 2)
    assert lines(out) == ["run 1 after None", "run 1 after killed by SIGKILL"]


def test_a_title_is_cut_to_63_bytes_between_characters() -> None:
    with supervisor() as client:
        handle = launch(client, "show_title", "indexing " + "é" * 100)
        wait_for_ready(handle)
        assert handle.info().activity == "indexing " + "é" * 27


@both_start_methods
def test_a_worker_without_flags_is_refused_what_needs_one(start_method: str, out: str) -> None:
    with supervisor(start_method=start_method, shared_memory=4096) as client:
        launch(client, "try_everything", out, name="plain").wait_until_gone(30)
    shmem_hint = "Register it with Flags.SHMEM_ACCESS."
    assert read(out) == {
        "client": ['worker "plain" has no client of its own', shmem_hint],
        "shared_memory": ['worker "plain" has no access to shared memory', shmem_hint],
        "consistent": [
            "only the startup worker may report consistency",
            'It is named by Supervisor(startup="module:function").',
        ],
        "connect": [
            'worker "plain" has no database connection',
            "Register it with Flags.DATABASE_CONNECTION.",
        ],
    }


@both_start_methods
def test_the_startup_worker_reports_consistency_and_has_memory_but_no_handle(
    start_method: str, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGBGW_TEST_OUT", out)
    with supervisor(
        start_method=start_method, startup=f"{MODULE}:startup", shared_memory=10
    ) as client:
        poll_until(lambda: client.phase is Phase.RUNNING)
    assert read(out) == ["the startup worker has no slot and no handle", "startup", 10]


@both_start_methods
def test_E12_a_worker_registers_another_and_waits_for_it(start_method: str, out: str) -> None:
    ways = [("client", SHMEM), ("attach", SHMEM), ("attach", Flags.NONE)]
    with supervisor(start_method=start_method) as client:
        handles = {
            f"{out}.{i}": launch(client, "launch_another", f"{out}.{i}", how, flags=flags)
            for i, (how, flags) in enumerate(ways)
        }
        for path, handle in handles.items():
            outcome = handle.wait_until_gone(30)
            assert outcome.exitcode == 0, outcome.error
            assert read(path) == ["STARTED", "STOPPED", "exited", True]


@both_start_methods
def test_a_workers_handle_serves_other_processes(start_method: str, out: str) -> None:
    with supervisor(start_method=start_method) as client:
        handle = launch(client, "leave_handle", out)
        wait_for_ready(handle)
        copy = pickle.loads(Path(out).read_bytes())
        assert copy == handle
        assert copy.pid == handle.pid
        terminator = launch(client, "terminate_by_handle", out)
        assert terminator.wait_until_gone(30).exitcode == 0
        assert handle.status() is HandleStatus.STOPPED


# --- forks of a worker --------------------------------------------------------------------------


def test_forks_of_a_worker_and_their_forks_die_with_it(out: str) -> None:
    with supervisor() as client:
        handle = launch(client, "fork_twice", out)
        pid = wait_for_ready(handle)
        children = [int(line) for line in lines(out)]
        assert len(children) == 2
        assert all(map(is_alive, children))
        os.kill(pid, signal.SIGKILL)
        poll_until(lambda: not any(map(is_alive, children)))


def test_a_signal_to_a_fork_does_not_wake_the_worker(out: str) -> None:
    with supervisor() as client:
        handle = launch(client, "fork_and_wait", out)
        wait_for_ready(handle)
        child = int(handle.info().activity)
        os.kill(child, signal.SIGHUP)
        poll_until(lambda: f"reload in {child}" in lines(out))
        # What woke the worker would have been written before the child called back.
        until = time.monotonic() + 0.2
        while time.monotonic() < until:
            assert "woken" not in lines(out)
            time.sleep(0.01)
        handle.wake()
        assert handle.wait_until_gone(30).exitcode == 0
    assert lines(out)[-1] == "woken"


def test_a_fork_that_returns_from_the_entry_does_not_end_the_worker_cleanly(
    out: str, log: Log
) -> None:
    with supervisor() as client:
        bystander = launch(client, "workers:sleep_until_stopped", flags=SHMEM, restart_time=0)
        pid = wait_for_ready(bystander)
        handle = launch(client, "fork_comes_back", out, flags=SHMEM)
        wait_for_ready(handle)
        handle.wake()
        assert handle.wait_until_gone(30).exitcode == 0
        poll_until(lambda: bystander.pid not in (pid, None))
    assert lines(out) == ["child exited with 0"]
    log.wait_for("terminating the other workers")


def test_current_worker_of_a_client_is_nobody_in_its_forks_either() -> None:
    def ask() -> str:
        try:
            current_worker()
        except WrongProcessError as exc:
            return str(exc)
        return "a worker"

    with supervisor():
        assert in_fork(ask) == "this process is not a background worker"
