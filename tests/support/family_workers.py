"""Workers that have children, of every kind there is."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from pgbgw import current_worker

_kept: list[object] = []  # a Popen that is forgotten complains


def _forever() -> NoReturn:
    while True:
        time.sleep(3600)


def _program(**options: object) -> int:
    process = subprocess.Popen(["sleep", "3600"], **options)  # type: ignore[call-overload]
    _kept.append(process)
    return int(process.pid)


def _fork(then: Callable[[], object] = _forever) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            then()
        finally:
            os._exit(0)
    return pid


def _told_by_a_fork(then: Callable[[int], object]) -> int:
    """The number that a fork of ours writes into a pipe."""
    read, write = os.pipe()
    _fork(lambda: then(write))
    os.close(write)
    number = int(os.read(read, 32))
    os.close(read)
    return number


def program() -> int:
    """Another program, in the worker's process group."""
    return _program()


def stubborn_program() -> int:
    """Another program that ignores all that can be ignored, and inherits all that can be."""
    process = subprocess.Popen(
        ["sh", "-c", "trap '' TERM QUIT; echo; exec sleep 3600"],
        stdout=subprocess.PIPE,
        close_fds=False,
    )
    assert process.stdout is not None
    process.stdout.read(1)
    _kept.append(process)
    return process.pid


def bound_program() -> int:
    """Another program; with a preexec_fn, so that what a fork does is done in it, too."""
    return _program(preexec_fn=lambda: None)


def program_in_its_own_session() -> int:
    return _program(start_new_session=True)


def fork() -> int:
    return _fork()


def fork_of_a_fork() -> int:
    def then(write: int) -> None:
        os.write(write, str(_fork()).encode())
        _forever()

    return _told_by_a_fork(then)


def fork_of_another_thread() -> int:
    pids: list[int] = []
    thread = threading.Thread(target=lambda: pids.append(_fork()))
    thread.start()
    thread.join()
    return pids[0]


def multiprocessing_fork() -> int:
    process = multiprocessing.get_context("fork").Process(target=_forever)
    process.start()
    _kept.append(process)
    assert process.pid is not None
    return process.pid


def daemon() -> int:
    """The classic: fork, setsid, fork, and the one in the middle goes."""

    def then(write: int) -> None:
        os.setsid()
        os.write(write, str(_fork()).encode())

    return _told_by_a_fork(then)


KINDS = {
    kind.__name__: kind
    for kind in (
        program,
        stubborn_program,
        bound_program,
        program_in_its_own_session,
        fork,
        fork_of_a_fork,
        fork_of_another_thread,
        multiprocessing_fork,
        daemon,
    )
}


def have_family(path: str, kinds: list[str], end: str = "obey") -> None:
    """Have children of these kinds, leave their numbers in a file, say ready; then, at SIGTERM or
    at once, end as told: "obey", "ignore" (note SIGTERMs), "return", "crash"."""
    worker = current_worker()
    if end == "obey":
        worker.on_terminate(lambda: os._exit(0))
    elif end == "ignore":
        notes = os.open(f"{path}.signals", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        worker.on_terminate(lambda: os.write(notes, b"worker\n"))
    pids = {kind: KINDS[kind]() for kind in kinds}
    whole = Path(f"{path}.new")
    whole.write_text(json.dumps(pids))
    whole.rename(path)
    worker.ready()
    if end == "return":
        os._exit(0)  # multiprocessing would wait for its own
    if end == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    _forever()


def release_runners(script: str, stop: str) -> None:
    """Start programs that go on running in ever new processes, each in a session of its own."""
    for _ in range(4):
        subprocess.run([script, stop], check=True)
    current_worker().ready()
    _forever()


def wait_for_its_program(path: str) -> None:
    """At SIGTERM wait for the end of a program that was started, as long as that takes."""
    worker = current_worker()
    signals: list[int] = []
    worker.on_terminate(lambda: signals.append(1))
    process = subprocess.Popen(["sleep", "3600"])
    Path(path).write_text(json.dumps({"program": process.pid}))
    worker.ready()
    worker.wait()
    Path(f"{path}.asked").touch()
    process.wait()
    os._exit(10 + len(signals))
