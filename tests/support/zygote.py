"""Processes that are there in a millisecond or two: forks of an interpreter that is warm.

with Zygote("support.load") as zygote:
    fork = zygote.fork("support.load:random_client", address, 4711)
    fork.hear()                       # what it sent by test.send()
    fork.end(signal.SIGKILL)          # its status

The function is called with a Connection to us, its end of the pipe, and the arguments.  Pids are
safe to signal until the fork is reaped, as the zygote reaps only when it is told to.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from types import TracebackType
from typing import Any

from support.processes import GUARD, Script

_FORK_ON_ORDER = """
import gc, importlib, os, socket, traceback
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle

import pgbgw
from pgbgw import client, handle, watch  # all that a client needs, or each fork would import it

for module in modules:
    importlib.import_module(module)
gc.freeze()
test.send("warm")
main = test
while (order := main.recv()) is not None:
    what, *rest = order
    if what == "reap":
        main.send(os.waitstatus_to_exitcode(os.waitpid(rest[0], 0)[1]))
        continue
    name, arguments = rest
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            main.close()
            ours.close()
            test = Connection(theirs.detach())
            module, _, function = name.partition(":")
            try:
                getattr(importlib.import_module(module), function)(test, *arguments)
                status = 0
            except BaseException:
                test.send(("failed", traceback.format_exc()))
        finally:
            os._exit(status)
    theirs.close()
    main.send(pid)
    send_handle(main, ours.fileno(), None)
    ours.close()
"""


class Fork:
    """A process of the zygote, with a pipe to it."""

    def __init__(self, zygote: Zygote, pid: int, pipe: Connection) -> None:
        self._zygote = zygote
        self.pid = pid
        self.pipe = pipe
        self.hung_up = False

    def say(self, thing: object) -> None:
        self.pipe.send(thing)

    def hear(self, timeout: float = GUARD) -> Any:
        """What it sent next; it fails the test if that never comes."""
        if not self.pipe.poll(timeout):
            raise AssertionError(f"fork {self.pid} says nothing")
        return self.pipe.recv()

    def heard(self) -> list[Any]:
        """All that it has sent; what was cut short by its death does not count."""
        found = []
        try:
            while self.pipe.poll():
                found.append(self.pipe.recv())
        except (EOFError, OSError):
            self.hung_up = True
        return found

    def signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def end(self, signum: int | None = None) -> int:
        """Wait for its end, or bring it about; its exit status, below zero for a signal."""
        if signum is not None:
            self.signal(signum)
        return self._zygote.reap(self)


class Zygote(Script):
    """The warm interpreter; modules are imported in it, once for all forks."""

    def __init__(self, *modules: str) -> None:
        super().__init__(_FORK_ON_ORDER, modules=modules)
        self.forks: dict[int, Fork] = {}
        assert self.hear() == "warm"

    def fork(self, function: str, *arguments: object) -> Fork:
        """Call "module:function" in a new fork, with its end of a pipe and the arguments."""
        self.say(("fork", function, arguments))
        pid = self.hear()
        fork = self.forks[pid] = Fork(self, pid, Connection(recv_handle(self._pipe)))
        return fork

    def reap(self, fork: Fork) -> int:
        """Wait for the end of a fork; what it has said can still be heard."""
        self.say(("reap", fork.pid))
        status: int = self.hear()
        del self.forks[fork.pid]
        return status

    def end_all(self) -> None:
        for fork in list(self.forks.values()):
            fork.end(signal.SIGKILL)
            fork.pipe.close()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            with suppress(AssertionError):
                self.end_all()
                self.say(None)
        super().__exit__(exc_type, exc, traceback)
