"""Entry points for the tests of launch, exit, reset and shutdown."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from pathlib import Path

from pgbgw import StartTime, WorkerHandle, attach, current_worker
from support.waiting import poll_until
from support.workers import append, sleep_until_stopped


def startup_on_command() -> None:
    """The startup worker: see support.control.Startup."""
    directory = Path(os.environ["PGBGW_TEST_STARTUP"])
    append(str(directory / "runs"), str(os.getpid()))
    worker = current_worker()
    poll_until((directory / "consistent").exists)
    worker.consistent()
    poll_until((directory / "finish").exists)
    if (directory / "leave").exists():
        os._exit(0)
    sys.exit(int((directory / "finish").read_text()))


# -- signals ---------------------------------------------------------------------------------------


def linger(path: str) -> None:
    """When asked to stop, say so in the file and stay until the file `path`.release is there."""
    worker = current_worker()
    worker.on_terminate(lambda: append(path, "asked to stop"))
    worker.ready()
    while worker.sleep(3600):
        pass
    poll_until(Path(f"{path}.release").exists)


def record_signals(path: str, *names: str) -> None:
    """Add the name of every such signal to a file; say ready, stay."""
    for name in names:
        number = signal.Signals[name]
        signal.signal(number, lambda signum, _: append(path, signal.Signals(signum).name))
    current_worker().ready()
    while True:
        time.sleep(3600)


def record_sigterm_with_a_child(path: str) -> None:
    """The worker and a process it has forked each note their SIGTERMs; it ends after the child."""
    worker = current_worker()
    worker.on_terminate(lambda: append(path, "worker"))
    pid = os.fork()
    if pid == 0:
        asked = []
        signal.signal(signal.SIGTERM, lambda *_: asked.append(append(path, "child")))
        append(f"{path}.child", str(os.getpid()))
        while not asked:
            time.sleep(0.01)
        os._exit(0)
    note = Path(f"{path}.child")
    poll_until(lambda: note.exists() and note.read_text())
    worker.ready()
    while worker.sleep(3600):
        pass
    os.waitpid(pid, 0)


def ignore_all_signals() -> None:
    """Only SIGKILL helps."""
    for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    current_worker().ready()
    while True:
        time.sleep(3600)


def block_signals() -> None:
    """Say ready and stay with all signals held back."""
    with current_worker().signals_blocked():
        current_worker().ready()
        while True:
            time.sleep(3600)


def never_back_in_python() -> None:
    """Say ready, then stay in C, where no handler written in Python runs."""
    current_worker().ready()
    sum(range(10**15))


def on_sigquit(action: str) -> None:
    """Answer the emergency signal with a clean exit, or with another crash."""

    def handler(*_: object) -> None:
        if action == "exit cleanly":
            sys.exit(0)
        os.kill(os.getpid(), signal.SIGSEGV)

    signal.signal(signal.SIGQUIT, handler)
    current_worker().ready()
    while True:
        time.sleep(3600)


# -- exits -----------------------------------------------------------------------------------------


def note_times(path: str, code: int) -> None:
    """Leave the monotonic time, twice: just after the start and just before the exit."""
    append(path, f"{os.getpid()} {time.monotonic_ns()} {time.monotonic_ns()}")
    sys.exit(code)


def exit_with_atexit(path: str) -> None:
    """Leave by sys.exit(0) from inside calls, with atexit functions."""
    atexit.register(append, path, "atexit")
    append(path, "exits")
    sys.exit(0)


def crash_until(path: str, allowed: str) -> None:
    """Note the time, then die, unless the file `allowed` is there: then stay."""
    append(path, str(time.monotonic_ns()))
    if not Path(allowed).exists():
        os.kill(os.getpid(), signal.SIGKILL)
    sleep_until_stopped()


# -- what a worker knows ---------------------------------------------------------------------------


def describe_self(path: str, *args: object, **kwargs: object) -> None:
    """Write down the registration as the worker sees it."""
    me = current_worker()
    seen = {
        "entry": me.worker.entry,
        "name": me.worker.name,
        "type": me.worker.type,
        "args": (path, *args),
        "kwargs": kwargs,
        "record args": me.worker.args,
        "record kwargs": dict(me.worker.kwargs),
        "main_arg": (me.worker.main_arg, me.main_arg),
        "extra": (me.worker.extra, me.extra),
        "flags": int(me.worker.flags),
        "start_time": me.worker.start_time is StartTime.CONSISTENT_STATE,
        "restart_time": me.worker.restart_time,
        "stop_timeout": me.worker.stop_timeout,
        "env": dict(me.worker.env),
        "variable": os.environ.get("PGBGW_TEST_VARIABLE"),
        "handle": (me.handle.slot, me.handle.generation),
    }
    append(path, repr(seen))


def note_last_outcome(path: str, code: int) -> None:
    """Leave what the worker is told of its previous run, then exit."""
    last = current_worker().last_outcome
    what = None if last is None else (last.kind, last.exitcode, last.signal, last.restarts)
    append(path, repr(what))
    sys.exit(code)


def use_memory(path: str, offset: int, value: int) -> None:
    """Put a byte into the domain's memory, note the whole of it whenever the worker is woken."""
    worker = current_worker()
    memory = worker.shared_memory
    append(path, f"{len(memory)} {sum(memory)}")
    memory[offset] = value
    worker.ready()
    while not worker.stopping:
        worker.wait()
        append(path, f"{offset}: {bytes(memory[:8]).hex()}")


# -- workers as clients ----------------------------------------------------------------------------


def wait_for_helper_when_stopped(path: str, when: str) -> None:
    """On SIGTERM wait for the end of a worker that was not launched yet, and never will be."""
    worker = current_worker()
    client = worker.client
    helper: list[WorkerHandle] = []

    def ask() -> None:
        helper.append(client.register("support.workers:append", path, "the helper runs"))

    if when == "before":
        ask()
    worker.on_terminate(lambda: None)
    worker.ready()
    while worker.sleep(3600):
        pass
    if when == "after":
        ask()
    status = helper[0].wait_for_shutdown(30)
    append(path, f"{status.name} {helper[0].outcome}")


def be_a_client(path: str | None = None) -> None:
    """Use the client that a worker of the domain has."""
    client = current_worker().client
    client.register("support.workers:noop").wait_until_gone(30)
    if path is not None:
        append(path, "be_a_client")
    sleep_until_stopped()


def attach_and_sleep(path: str | None = None) -> None:
    """Attach like any other process."""
    with attach() as client:
        client.register("support.workers:noop").wait_until_gone(30)
        if path is not None:
            append(path, "attach_and_sleep")
        sleep_until_stopped()


def linger_through_sigquit(path: str) -> None:
    """Note stop signals and stay until the file `path`.release is there."""
    for number in (signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, lambda signum, _: append(path, signal.Signals(signum).name))
    current_worker().ready()
    poll_until(Path(f"{path}.release").exists)
