"""Entry points that look at their own process, and that show what current_worker() does."""

from __future__ import annotations

import atexit
import json
import os
import pickle
import re
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from pgbgw import Flags, WorkerTerminated, WrongProcessError, attach, current_worker
from support.waiting import poll_until
from support.workers import append, sleep_until_stopped


def leave(path: str, value: object) -> None:
    """Leave a value for the test, whole or not at all."""
    file = Path(path)
    part = file.with_name(f"{file.name}.{os.getpid()}")
    part.write_text(json.dumps(value))
    part.replace(file)


# --- what is there ----------------------------------------------------------------------------


def facts(path: str) -> None:
    """What the kernel and the interpreter say about this process."""
    descriptors = _descriptors()  # before a mapping brings its own
    if current_worker().worker.flags & Flags.SHMEM_ACCESS:
        assert len(current_worker().shared_memory) == 4096
    leave(
        path,
        {
            "pid": os.getpid(),
            "parent": os.getppid(),
            "group": os.getpgid(0),
            "session": os.getsid(0),
            "comm": Path("/proc/self/comm").read_text().rstrip("\n"),
            "path": sys.path,
            "directory": os.getcwd(),
            "environ": dict(os.environ),
            "descriptors": descriptors,
            "inheritable": [int(fd) for fd in descriptors if os.get_inheritable(int(fd))],
            "mapped": re.findall(r"/memfd:(pgbgw-\S*)", Path("/proc/self/maps").read_text()),
            "open files": resource.getrlimit(resource.RLIMIT_NOFILE),
            "blocked": _signals("SigBlk"),
            "ignored": _signals("SigIgn"),
            "caught": _signals("SigCgt"),
            "interpreter": [sys.flags.isolated, sys.flags.ignore_environment],
        },
    )


def _descriptors() -> dict[str, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            pass  # that of the listing itself
    return found


def _signals(line: str) -> list[str]:
    match = re.search(rf"^{line}:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.M)
    assert match
    return [s.name for s in signal.Signals if int(match[1], 16) >> (s - 1) & 1]


# --- the end ----------------------------------------------------------------------------------


def end_in_order(path: str, how: str) -> None:
    """Leave a thread, an atexit function and unflushed text; then return, raise or exit."""
    atexit.register(append, path, "atexit function")

    def outlive() -> None:
        threading.main_thread().join()  # returns when the main thread waits for the others
        append(path, "thread")

    threading.Thread(target=outlive).start()
    sys.stdout.write("unflushed text")
    append(path, how)
    if how == "raise":
        raise ValueError
    if how == "exit":
        sys.exit(3)


def wait_in_a_thread(path: str) -> None:
    """A thread that waits for ever, as long as nobody asks to stop."""

    def body() -> None:
        append(path, "thread waits")
        assert current_worker().wait() == []
        assert current_worker().sleep(3600) is False
        append(path, f"stopping: {current_worker().stopping}")

    threading.Thread(target=body).start()
    sleep_until_stopped()


def raise_interrupt() -> NoReturn:
    raise KeyboardInterrupt


class Explosive:
    """Cannot be unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return explode, ()


def explode() -> NoReturn:
    raise RuntimeError("cannot be unpickled")


not_callable = 1


def clean_up_slowly(path: str, go: str) -> None:
    """Asked to stop, clean up until the file `go` is there."""
    try:
        sleep_until_stopped()
    finally:
        append(path, "cleaning up")
        poll_until(Path(go).exists)
        append(path, "cleaned up")


# --- signals ----------------------------------------------------------------------------------


def echo(path: str) -> None:
    """A line for every wake-up; ends when asked to stop."""
    worker = current_worker()
    worker.on_terminate(lambda: append(path, "asked to stop"))
    worker.ready()
    stopping = False
    while not stopping:
        worker.wait()
        stopping = worker.stopping
        append(path, "stopped" if stopping else "woken")


def stop_in(path: str, call: str) -> None:
    """SIGTERM raises WorkerTerminated out of the call."""
    worker = current_worker()
    try:
        worker.ready()
        if call == "sleep":
            worker.sleep(3600)
        elif call == "wait":
            worker.wait()
        elif call == "endless timeout":
            worker.wait(timeout=float("inf"))
        else:
            while True:
                pass
    except WorkerTerminated as exc:
        append(path, f"{type(exc).__name__} {exc.code} {worker.stopping}")
        raise


def reload(path: str) -> None:
    """SIGHUP with a callback, then without; then with one that raises."""
    worker = current_worker()
    worker.on_reload(lambda: append(path, "reload"))
    worker.ready()
    worker.wait()
    append(path, "wait is over")
    worker.on_reload(None)
    os.kill(os.getpid(), signal.SIGHUP)
    append(path, "ignored")
    worker.on_reload(explode)
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        worker.sleep(3600)
    except RuntimeError:
        append(path, "raised")


def hold_signals_back(path: str) -> None:
    """SIGTERM in the inner of two blocks is delivered after the outer one."""
    worker = current_worker()
    worker.on_reload(lambda: append(path, "reload"))
    try:
        with worker.signals_blocked():
            with worker.signals_blocked():
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGHUP)
                append(path, "inner")
            append(path, "outer")
            assert not worker.stopping
        append(path, "not reached")
    finally:
        append(path, f"stopping: {worker.stopping}")


def fault_with_signals_blocked(signum: int) -> None:
    with current_worker().signals_blocked():
        os.kill(os.getpid(), signum)
        time.sleep(3600)


# --- waiting ----------------------------------------------------------------------------------


def wait_when_told(path: str, go: str) -> None:
    """Wait once the file `go` is there: for what has come before."""
    worker = current_worker()
    worker.ready()
    poll_until(Path(go).exists)
    before = time.monotonic()
    worker.wait(timeout=30)
    leave(path, time.monotonic() - before)


def sleep_then_wait(path: str) -> None:
    worker = current_worker()
    worker.ready()
    before = time.monotonic()
    result = worker.sleep(0.5)
    slept = time.monotonic() - before
    worker.wait(timeout=30)
    leave(path, [result, slept, time.monotonic() - before - slept])


def wait_for_descriptors(path: str) -> None:
    """wait() with pipes that are empty, full or hung up, and with timeouts."""
    worker = current_worker()
    pipes = [os.pipe() for _ in range(4)]
    empty, full, also_full, hung_up = (read for read, _ in pipes)
    for _, write in pipes[1:3]:
        os.write(write, b"x")
    os.close(pipes[3][1])
    seen: dict[str, object] = {}
    seen["full"] = worker.wait([empty, full], 30) == [full]
    seen["both"] = worker.wait({also_full, full, empty}) == sorted([full, also_full])
    seen["hung up"] = worker.wait([hung_up], 30) == [hung_up]
    seen["at once"] = worker.wait([empty], 0) == []
    before = time.monotonic()
    seen["none"] = worker.wait([empty], 0.05) == [] and worker.wait(timeout=0.05) == []
    seen["not early"] = time.monotonic() - before >= 0.1
    seen["sleep"] = worker.sleep(0) is True
    leave(path, seen)


def wait_for_pipe_or_wake(path: str, fifo: str) -> None:
    """Leave what ends each of three waits: a fifo that is readable, a wake-up, a stop."""
    worker = current_worker()
    worker.on_terminate(lambda: None)
    fd = os.open(fifo, os.O_RDWR)
    worker.ready()
    for _ in range(3):
        what = "descriptor" if worker.wait([fd]) == [fd] else "nothing readable"
        if what == "descriptor":
            os.read(fd, 1)
        append(path, f"{what}, stopping: {worker.stopping}")


# --- other workers, forks ---------------------------------------------------------------------


def launch_another(path: str, how: str) -> None:
    """Register a worker as a client, wait for it; one of our own or an attached one."""
    worker = current_worker()
    client = worker.client if how == "client" else attach()
    other = client.register("support.workers:sleep_until_stopped")
    statuses = [other.wait_for_ready(30).name]
    other.terminate()
    statuses.append(other.wait_for_shutdown(30).name)
    same = client is (worker.client if how == "client" else attach())
    leave(path, [*statuses, other.wait_until_gone(30).kind, same])


def show_title(activity: str) -> None:
    current_worker().title(activity)
    sleep_until_stopped()


def try_everything(path: str) -> None:
    """What a worker without flags may not have, and a worker that is not the startup one."""
    worker = current_worker()
    seen = {}
    for name in ("client", "shared_memory", "consistent", "connect"):
        try:
            thing = getattr(worker, name)
            if name in ("consistent", "connect"):
                thing(*(["sqlite://"] if name == "connect" else []))
        except WrongProcessError as exc:
            seen[name] = [str(exc), exc.hint]
    leave(path, seen)


def startup() -> None:
    """The startup worker: what it has and has not."""
    worker = current_worker()
    try:
        _ = worker.handle
    except WrongProcessError as exc:
        refused = str(exc)
    worker.consistent()
    leave(os.environ["PGBGW_TEST_OUT"], [refused, worker.worker.name, len(worker.shared_memory)])


def leave_handle(path: str) -> None:
    Path(path).write_bytes(pickle.dumps(current_worker().handle))
    sleep_until_stopped()


def terminate_by_handle(handle_path: str) -> None:
    """Terminate a worker by a handle that another process has pickled."""
    with attach():
        handle = pickle.loads(Path(handle_path).read_bytes())
        handle.terminate()
        assert handle.wait_until_gone(30).exitcode == 1


def count_runs_in_memory(path: str) -> None:
    """Note how often this memory was met; ready in the first run only; exit 1 when woken."""
    worker = current_worker()
    worker.shared_memory[0] += 1
    last = worker.last_outcome
    append(path, f"run {worker.shared_memory[0]} after {last}")
    if last is None:
        worker.ready()
    worker.wait()
    sys.exit(1)


def fork_twice(path: str) -> None:
    """A child and a grandchild that would stay for ever; what they are told and can ask."""
    current_worker().title("with children")
    if os.fork() == 0:
        if os.fork() == 0:
            try:
                current_worker()
            except WrongProcessError:
                append(path, str(os.getpid()))
        else:
            append(path, str(os.getpid()))
        time.sleep(3600)
        os._exit(0)
    poll_until(lambda: len(Path(path).read_text().split()) == 2 if Path(path).exists() else False)
    sleep_until_stopped()


def fork_and_wait(path: str) -> None:
    """Be woken while a child gets a signal that it handles."""
    worker = current_worker()
    worker.on_reload(lambda: append(path, f"reload in {os.getpid()}"))
    child = os.fork()
    if child == 0:
        append(path, "child")
        while True:
            time.sleep(3600)
    poll_until(Path(path).exists)
    worker.title(str(child))
    worker.ready()
    worker.wait()
    append(path, "woken")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def fork_comes_back(path: str) -> None:
    """The child returns from the entry point; the worker then leaves without a clean end."""
    worker = current_worker()
    child = os.fork()
    if child == 0:
        return
    append(path, f"child exited with {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}")
    worker.ready()
    worker.wait()
    os._exit(0)
