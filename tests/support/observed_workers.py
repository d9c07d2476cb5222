"""Entry points of tests that register, wait and terminate: "support.observed_workers:function"."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

from pgbgw import Flags, WorkerHandle, attach, current_worker
from support.waiting import poll_until
from support.workers import append, sleep_until_stopped


def _leave(path: str, thing: object) -> None:
    """Pickle it to a file, which is there only when it is complete."""
    file = Path(path)
    part = file.with_suffix(".part")
    part.write_bytes(pickle.dumps(thing))
    part.rename(file)


def leave_arguments(path: str, *args: object, **kwargs: object) -> None:
    _leave(path, (args, kwargs))


def leave_record(path: str) -> None:
    """What the worker sees of its own registration."""
    worker = current_worker()
    record = worker.worker
    fields = {
        name: getattr(record, name)
        for name in ("entry", "name", "type", "flags", "start_time", "restart_time", "stop_timeout")
    }
    _leave(path, {**fields, "main_arg": worker.main_arg, "extra": worker.extra})


def leave_handle(path: str) -> None:
    """A handle on itself for others, then sleep until stopped."""
    _leave(path, current_worker().handle)
    sleep_until_stopped()


def ready_when_told(path: str) -> None:
    """Say ready once the file is there, then sleep until stopped."""
    poll_until(Path(path).exists)
    sleep_until_stopped()


def ready_in_second_run(path: str) -> None:
    """The first run ends with exit code 1 without having been ready, the second one is ready."""
    append(path)
    if Path(path).read_text() == "x\n":
        poll_until(Path(path + ".go").exists)
        sys.exit(1)
    sleep_until_stopped()


def fail_while_missing(path: str) -> None:
    """Exit 1, at once, until the file is there; then exit 0."""
    if not Path(path).exists():
        sys.exit(1)


def exit_when_told(path: str, code: int = 0) -> None:
    """Say ready, and exit with that code once the file is there."""
    current_worker().ready()
    poll_until(Path(path).exists)
    sys.exit(code)


def count_stop_signals(path: str) -> None:
    """Leave a line per SIGTERM, and go on; SIGINT ends it, after all SIGTERMs before."""
    signal.signal(signal.SIGTERM, lambda *_: append(path))
    done = []
    signal.signal(signal.SIGINT, lambda *_: done.append(True))
    current_worker().ready()
    while not done:
        time.sleep(0.01)


def exit_on_stop(code: int) -> None:
    """Asked to stop, exit with that code; killed by a signal if it is below zero."""

    def stop() -> None:
        if code < 0:
            os.kill(os.getpid(), -code)
        sys.exit(code)

    worker = current_worker()
    worker.on_terminate(stop)
    worker.ready()
    while True:
        worker.sleep(3600)


def stopped_in_finalizer(path: str) -> None:
    """Be asked to stop while in __del__, where no exception gets out; then compute for ever."""

    class Trap:
        def __del__(self) -> None:
            append(path)
            current_worker().ready()
            while True:
                time.sleep(0.01)

    trap = Trap()
    del trap
    append(path)
    while True:
        pass


def launch_and_wait(path: str, own_client: bool) -> None:
    """Register another worker, be told of all that becomes of it, and leave that in a file."""
    worker = current_worker()
    client = worker.client if own_client else attach()
    other = client.register("support.workers:sleep_until_stopped", name="launched by a worker")
    seen = [other.wait_for_startup(30), other.wait_for_ready(30)]
    other.terminate()
    seen += [other.wait_for_shutdown(30), other.wait_until_gone(30).kind]
    _leave(path, seen)


def launch_and_leave(path: str) -> None:
    """Register another worker that goes on when this one has ended."""
    other = current_worker().client.register(sleep_until_stopped, name="left alone")
    other.wait_for_ready(30)
    _leave(path, other)


def woken_while_waiting(path: str, other: WorkerHandle) -> None:
    """Wait for another worker's end; then see whether wake-ups that came meanwhile are kept."""
    worker = current_worker()
    assert worker.client.supervisor_pid == os.getppid()
    worker.ready()
    status = other.wait_for_shutdown(30)
    # A wake-up that was kept ends this at once, else it takes half a minute.
    before = time.monotonic()
    worker.wait(timeout=30)
    _leave(path, (status, time.monotonic() - before < 10))


def have_children(path: str) -> None:
    """A child by exec and a child by fork, both deaf to nothing; then sleep until stopped."""
    program = subprocess.Popen(["sleep", "3600"])
    fork = os.fork()
    if fork == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3600)
        os._exit(0)
    _leave(path, (program.pid, fork))
    worker = current_worker()
    worker.on_terminate(lambda: os._exit(0))  # no warning about children that still run
    worker.ready()
    while True:
        worker.sleep(3600)


def have_child_and_ignore_stop(path: str) -> None:
    """A child by exec, in the same process group; SIGTERM is ignored by both."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    program = subprocess.Popen(["sleep", "3600"])
    _leave(path, program.pid)
    current_worker().ready()
    while True:
        time.sleep(3600)


def needs_memory(path: str) -> None:
    """A member of the crash domain: leave a line per run, sleep until stopped."""
    worker = current_worker()
    assert worker.worker.flags & Flags.SHMEM_ACCESS
    append(path)
    sleep_until_stopped()
