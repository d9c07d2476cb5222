"""Clients that do nothing wrong, to see how they get on while others do; and the loop's pauses.

with HonestClients(client.address, 4, trial.seed) as honest:
    ...
trial.count(honest.done)
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from types import TracebackType

from pgbgw import Client, PgbgwError, SupervisorDiedError, WaitTimeoutError, attach
from support.processes import Script

HANG = 30.0  # seconds: no operation takes so long
NOOP = "support.workers:noop"
SLEEP = "support.workers:sleep_until_stopped"

_LIVE = """
from support.honest import live
live(test, address, damaged, seed)
"""


def live(test: Connection, address: str, damaged: bool, seed: int) -> None:
    """Register, wait, terminate, wait, until told to stop; then report.

    damaged: somebody writes into the inbox, and what is registered may be lost; but nothing hangs.
    """
    chance = random.Random(seed)
    client = attach(address)
    test.send("attached")
    done, took, wrong = 0, [], []
    patience = 0.05 if damaged else HANG
    while not test.poll():
        entry = chance.choice([NOOP, NOOP, SLEEP])
        began = time.monotonic()
        try:
            worker = client.try_register(entry)
            if worker is None:
                continue
            if entry == SLEEP:
                with suppress(WaitTimeoutError):
                    worker.wait_for_startup(patience)
                worker.terminate()
            outcome = worker.wait_until_gone(patience)
            if not damaged and outcome.kind not in ("exited", "cancelled"):
                wrong.append(f"{entry}: {outcome}")
        except WaitTimeoutError as exc:
            if not damaged:
                wrong.append(f"{entry}: {exc}")
        except PgbgwError as exc:
            wrong.append(f"{entry}: {exc!r}")
            if isinstance(exc, SupervisorDiedError):
                break
        else:
            done += 1
            took.append(time.monotonic() - began)
        if time.monotonic() - began > HANG:
            wrong.append(f"{entry} took {time.monotonic() - began:.1f} s")
    client.close()
    test.send((done, took, wrong))


class HonestClients:
    """So many of them, each in a process of its own, until the block ends."""

    def __init__(self, address: str, clients: int, seed: int, *, damaged: bool = False) -> None:
        self._address, self._clients, self._seed = address, clients, seed
        self._damaged = damaged
        self._scripts: list[Script] = []
        self._stack = ExitStack()
        self.done = 0
        self.wrong: list[str] = []
        self.took: list[float] = []  # seconds, of each whole operation

    def __enter__(self) -> HonestClients:
        with ExitStack() as stack:
            for n in range(self._clients):
                told = {"address": self._address, "damaged": self._damaged, "seed": self._seed + n}
                self._scripts.append(stack.enter_context(Script(_LIVE, **told)))
            for script in self._scripts:
                assert script.hear() == "attached"
            self._stack = stack.pop_all()
        return self

    def stop(self) -> None:
        """End them, and take their reports; the block's end does so, too."""
        scripts, self._scripts = self._scripts, []
        for script in scripts:
            script.say("enough")
        for script in scripts:
            done, took, wrong = script.hear()
            self.done += done
            self.took += took
            self.wrong += wrong

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if exc_type is None:
                self.stop()
        finally:
            self._stack.__exit__(exc_type, exc, traceback)


class Pauses:
    """The passes of a supervisor's loop from here on."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._before = client._view.pauses[1]

    def __str__(self) -> str:
        """Passes are counted by powers of two: that is how exact it is."""
        counts = [
            now - then for now, then in zip(self._client._view.pauses[1], self._before, strict=True)
        ]
        return f"{sum(counts)} passes, p99 < {_limit(counts, 0.99)}, max < {_limit(counts, 1)}"


def _limit(counts: Sequence[int], share: float) -> str:
    below = 0
    for i, count in enumerate(counts):
        below += count
        if below and below >= share * sum(counts):
            return f"{(1 << i) / 1000:g} ms"
    return "?"
