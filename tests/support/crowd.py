"""The clients of a storm: forked from a zygote, listened to, replaced when they are killed."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from multiprocessing import connection

from fix_trials import Trial
from pgbgw import Client, WorkerHandle, WorkerInfo
from support.processes import GUARD
from support.zygote import Fork, Zygote


class Crowd:
    """Clients, the handles that they were given, and what else they counted."""

    def __init__(self, client: Client, zygote: Zygote, trial: Trial) -> None:
        self._client = client
        self._zygote = zygote
        self._trial = trial
        self._lives: dict[Fork, tuple[str, tuple[object, ...]]] = {}
        self.handles: set[WorkerHandle] = set()
        self.attached: list[Fork] = []
        self.counts: Counter[str] = Counter()
        self.times: dict[str, list[int]] = {}  # in nanoseconds

    def add(self, function: str, *arguments: object) -> None:
        """A client that lives by function(test, address, seed, ...)."""
        seed = self._trial.random.getrandbits(32)
        fork = self._zygote.fork(function, self._client.address, seed, *arguments)
        self._lives[fork] = (function, arguments)

    @property
    def clients(self) -> list[Fork]:
        return list(self._lives)

    def listen(self, until: float) -> None:
        """Take down what the clients say, up to a moment in monotonic time."""
        while (left := until - time.monotonic()) > 0:
            pipes = {fork.pipe: fork for fork in self._lives}
            for pipe in connection.wait(list(pipes), left):
                fork = pipes[pipe]  # type: ignore[index]
                self._note(fork)
                if fork.hung_up:
                    status = self._remove(fork, None)
                    self._trial.violation(f"client {fork.pid} ended by itself, with {status}")

    def _note(self, fork: Fork) -> None:
        for what, *rest in fork.heard():
            if what == "registered":
                self.handles.add(self._client._view.handle(*rest, WorkerHandle))
            elif what == "attached":
                self.attached.append(fork)
            elif what == "counted":
                self.counts[rest[0]] += rest[1]
            elif what == "took":
                self.times.setdefault(rest[0], []).extend(rest[1])
            else:
                self._trial.violation(f"client {fork.pid}: {what} {rest[0]}")

    def _remove(self, fork: Fork, signum: int | None) -> int:
        status = fork.end(signum)
        self._note(fork)
        fork.pipe.close()
        del self._lives[fork]
        if fork in self.attached:
            self.attached.remove(fork)
        return status

    def replace(self, fork: Fork) -> None:
        """Kill a client, and have another one live its life at once."""
        function, arguments = self._lives[fork]
        self._remove(fork, signal.SIGKILL)
        self.add(function, *arguments)

    def kill(self) -> None:
        for fork in self.clients:
            self._remove(fork, signal.SIGKILL)

    def end(self) -> None:
        """Tell all to end by themselves, and see that they do."""
        for fork in self.clients:
            fork.say("end")
        deadline = time.monotonic() + 2 * GUARD
        for fork in self.clients:
            while not fork.hung_up and time.monotonic() < deadline:
                connection.wait([fork.pipe], deadline - time.monotonic())
                self._note(fork)
            if not fork.hung_up:
                self._trial.violation(f"client {fork.pid} does not end")
            status = self._remove(fork, None if fork.hung_up else signal.SIGKILL)
            if fork.hung_up and status:
                self._trial.violation(f"client {fork.pid} ended with {status}")


def open_worker(client: Client, info: WorkerInfo) -> int | None:
    """A pidfd of a worker's present process; None if that is gone, the number being another's."""
    try:
        pidfd = os.pidfd_open(info.pid or 0)
    except OSError:
        return None
    if client.handle(info).pid == info.pid:
        return pidfd
    os.close(pidfd)
    return None
