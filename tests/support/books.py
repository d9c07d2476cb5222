"""A supervisor's books: what it holds, and after a storm, whether all is given back and everybody
agrees."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import psutil

from fix_trials import Trial
from pgbgw import Client, Outcome, PgbgwError, WorkerHandle
from support.rogues import Rogue
from support.slot_tables import FREE, NONE, Word
from support.waiting import poll_until

PATIENCE = 60.0  # seconds: a guard


class Books:
    """What a supervisor holds: descriptors, children, memory, slots and tokens."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.supervisor = psutil.Process(client.supervisor_pid)
        self._descriptors = -1  # when they were opened

    @property
    def descriptors(self) -> int:
        return self.supervisor.num_fds()

    @property
    def children(self) -> int:
        """The log's relay is one."""
        return len(self.supervisor.children())

    @property
    def memory(self) -> int:
        """Bytes that are its alone, so that what it shares with workers does not count."""
        return int(self.supervisor.memory_full_info().uss)

    @property
    def states(self) -> set[int]:
        """Of all slots and tokens."""
        with Rogue.of(self._client) as observer:
            return set(observer.states())

    # --- a storm ----------------------------------------------------------------------------

    def open(self) -> Books:
        """Run a worker, and note what is held while nothing else has happened yet."""
        self._run_one()
        self._descriptors = self.descriptors
        return self

    def _run_one(self) -> None:
        worker = self._client.register("support.workers:exit_with", 7)
        assert worker.wait_until_gone(PATIENCE).exitcode == 7

    def see_out(self, handles: Iterable[WorkerHandle], trial: Trial) -> list[Outcome]:
        """Terminate these, and see each reach its final state."""
        handles = list(handles)
        outcomes = []
        for handle in handles:
            handle.terminate()
        for handle in handles:
            try:
                outcomes.append(handle.wait_until_gone(PATIENCE))
            except PgbgwError as exc:
                trial.violation(f"{exc}; it is {handle.status().name}")
        return outcomes

    def settle(self, trial: Trial) -> None:
        """Terminate what is left, whoever registered it; then everything must be given back."""
        with _noting(trial):
            poll_until(self._empty, PATIENCE, message="the table is empty")
        for holds in (self._words_agree, self._only_the_relay, self._descriptors_as_before):
            with _noting(trial):
                poll_until(holds, PATIENCE)
        with _noting(trial):
            self._run_one()
            command = [sys.executable, "-P", "-m", "pgbgw", "ps", "-a", self._client.address]
            subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)

    def _empty(self) -> bool:
        for info in self._client.workers():
            self._client.handle(info).terminate()
        return not self._client._view.occupied()

    def _words_agree(self) -> bool:
        """Inbox and outbox of each slot say free, of one generation; the supervisor's own count of
        free slots says so, too, and each token is free."""
        client = self._client
        view = client._view
        with Rogue.of(client) as observer:
            slots = all(
                observer.req(slot) == Word(generation, 0, 0, False, FREE)
                and (state, pid) == (NONE, 0)
                for slot in range(client.max_worker_processes)
                for generation, state, _, pid in [view.status(slot)]
            )
            tokens = all(
                observer.token(i)[1:] == (0, 0, False, FREE)
                for i in range(client.max_parallel_workers)
            )
            return slots and tokens and observer.free_slots == client.max_worker_processes

    def _only_the_relay(self) -> bool:
        """No zombie, no worker: the log's relay is the one child."""
        return self.children == 1

    def _descriptors_as_before(self) -> bool:
        return self.descriptors == self._descriptors


@contextmanager
def _noting(trial: Trial) -> Iterator[None]:
    try:
        yield
    except (AssertionError, PgbgwError, subprocess.SubprocessError) as exc:
        trial.violation(f"{type(exc).__name__}: {exc}")


def check_log(text: str, trial: Trial) -> None:
    """Whatever happened, the supervisor was not surprised, and had nothing to repair: a death is
    no damage."""
    for surprise in ("Traceback", "was damaged", "CRITICAL"):
        if surprise in text:
            at = text.index(surprise)
            trial.violation(f"in the log: {text[max(0, at - 300) : at + 1500]}")
