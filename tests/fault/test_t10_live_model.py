"""T10: a live system against a reference model, after every step of random histories.

Hypothesis draws the steps: processes register, ask, wait, terminate (by handles of the present, of
the past, and of supervisors that are dead), workers are told to exit, fail or crash, clients and
the supervisor are killed.  The model is a table of the slots of `support.linearizability`: each
step is told to it as the operations that it consists of, which it must allow, and then every
process must see of every handle what the model says.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyStrategyDefinition
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fix_trials import Trial
from pgbgw import (
    BackgroundWorker,
    Flags,
    HandleStatus,
    NoFreeSlotError,
    ParallelLimitError,
    Supervisor,
    WaitTimeoutError,
    WorkerHandle,
)
from support.linearizability import SHOWN, Operation, Slot, slot_allows
from support.model_workers import CRASH, EXIT, FAIL
from support.processes import kill_supervisor
from support.waiting import poll_until
from support.zygote import Fork, Zygote

pytestmark = [pytest.mark.xdist_group("core"), pytest.mark.leaves_sockets]

SLOTS, TOKENS, CLIENTS = 3, 2, 2
NEVER, SOON, LATER = None, 0.0, 3600.0  # restart_time
REMEMBERED = 12  # handles that every step looks at
MOST_FAILURES = 4  # of one worker: its backoff doubles


@dataclass
class Registration:
    handle: WorkerHandle
    parallel: bool
    restart: float | None
    fifo: str
    orders: int  # our descriptor of it
    failures: int = 0


class World:
    """What examples share: a supervisor, which they may kill, and two client processes."""

    def __init__(self, zygote: Zygote, directory: Path) -> None:
        self.zygote = zygote
        self.directory = directory
        self.address = str(directory / "live.sock")
        self.names = 0
        self.slots = [Slot(1) for _ in range(SLOTS)]
        self.start()

    def start(self) -> None:
        self.client = Supervisor(
            max_worker_processes=SLOTS, max_parallel_workers=TOKENS, address=self.address
        ).start()
        self.slots = [Slot(1) for _ in range(SLOTS)]
        self.others = [self.other() for _ in range(CLIENTS)]

    def other(self) -> Fork:
        fork = self.zygote.fork("support.model_workers:client", self.address)
        assert fork.hear() == "attached"
        return fork

    def kill_other(self, n: int) -> None:
        self.others[n].end(signal.SIGKILL)
        self.others[n].pipe.close()
        self.others[n] = self.other()

    def end_others(self) -> None:
        for fork in self.others:
            fork.say(None)
            assert fork.end() == 0
            fork.pipe.close()

    def restart(self) -> None:
        """The supervisor is dead: another one, for all."""
        self.client.close()
        process = self.client._process
        assert process is not None
        process.wait()
        self.end_others()
        self.start()

    def end(self) -> None:
        self.end_others()
        self.client.stop("fast", timeout=30)
        self.client.close()


class LiveSystem(RuleBasedStateMachine):
    world: ClassVar[World]
    covered: ClassVar[Counter[str]]

    def __init__(self) -> None:
        super().__init__()
        self.running: dict[int, Registration] = {}  # by slot; in a restart gap, too
        self.old: list[WorkerHandle] = []
        self.kills = self.client_kills = 0

    # --- the model --------------------------------------------------------------------------------

    def tell(self, what: str, handle: WorkerHandle, *arguments: object) -> None:
        """This has happened to the handle's slot; the specification must allow it."""
        operation = Operation(what, 0, 0, (handle.generation, *arguments))
        states = list(slot_allows(self.world.slots[handle.slot], operation))
        assert len(states) == 1, f"{what} of {self.world.slots[handle.slot]}"
        self.world.slots[handle.slot] = states[0]

    def status_of(self, handle: WorkerHandle) -> tuple[HandleStatus, int | None]:
        slot = self.world.slots[handle.slot]
        if (handle.epoch, handle.generation) != (self.world.client.epoch, slot.generation):
            return HandleStatus.STOPPED, None
        return HandleStatus[SHOWN.get(slot.status, "STOPPED")], slot.pid or None

    def pick(self, n: int, *statuses: str) -> Registration:
        found = [r for x, r in self.running.items() if self.world.slots[x].status in statuses]
        return found[n % len(found)]

    def some(self, *statuses: str) -> bool:
        return any(self.world.slots[x].status in statuses for x in self.running)

    def gone(self, r: Registration) -> None:
        self.tell("free", r.handle)
        del self.running[r.handle.slot]
        self.old = [*self.old[-REMEMBERED:], r.handle]
        os.close(r.orders)
        os.unlink(r.fifo)

    def started(self, r: Registration) -> None:
        """It runs (again), and is ready for orders."""
        r.handle.wait_for_ready(30)
        self.tell("start", r.handle, r.handle.pid)

    def by(self, who: int, handle: WorkerHandle | None, method: str, *arguments: object) -> Any:
        """Let one of the clients do it: this process or one of the others."""
        if who == CLIENTS:
            try:
                answer: Any = getattr(handle or self.world.client, method)
                return answer(*arguments) if callable(answer) else answer
            except Exception as exc:
                return exc
        self.world.others[who].say((handle, method, arguments))
        return self.world.others[who].hear()

    # --- steps ------------------------------------------------------------------------------------

    who = st.integers(0, CLIENTS)
    number = st.integers(0, 9)

    @rule(who=who, parallel=st.booleans(), restart=st.sampled_from([NEVER, SOON, LATER]))
    def register(self, who: int, parallel: bool, restart: float | None) -> None:
        self.covered["register"] += 1
        self.world.names += 1
        fifo = str(self.world.directory / str(self.world.names))
        restart = NEVER if parallel else restart
        worker = BackgroundWorker(
            entry="support.model_workers:obey",
            args=(fifo,),
            restart_time=restart,
            flags=Flags.CLASS_PARALLEL if parallel else Flags(0),
        )
        os.mkfifo(fifo)
        answer = self.by(who, None, "register", worker)
        if parallel and sum(r.parallel for r in self.running.values()) == TOKENS:
            assert isinstance(answer, ParallelLimitError), repr(answer)
        elif len(self.running) == SLOTS:
            assert isinstance(answer, NoFreeSlotError), repr(answer)
        else:
            assert isinstance(answer, WorkerHandle), repr(answer)
            r = Registration(answer, parallel, restart, fifo, os.open(fifo, os.O_RDWR))
            for what in ("register", "accept"):
                self.tell(what, answer)
            self.running[answer.slot] = r
            self.started(r)
            return
        os.unlink(fifo)

    @precondition(lambda self: self.running)
    @rule(who=who, n=number)
    def terminate(self, who: int, n: int) -> None:
        """Of a worker that runs, or waits for its restart."""
        r = self.pick(n, "running", "stopped")
        was = self.world.slots[r.handle.slot].status
        self.covered[f"terminate, {was}"] += 1
        assert self.by(who, r.handle, "terminate") is None
        self.tell("terminate", r.handle)
        outcome = r.handle.wait_until_gone(30)
        assert outcome.final
        if was == "running":
            assert (outcome.kind, outcome.exitcode) == ("exited", 1)
        self.tell("notice", r.handle)
        self.gone(r)

    @precondition(lambda self: self.old)
    @rule(who=who, n=number)
    def terminate_what_is_gone(self, who: int, n: int) -> None:
        """Nothing happens, to whoever has the slot now above all: the invariant looks."""
        found = [h for h in self.old if h.slot in self.running] or self.old
        handle = found[n % len(found)]
        foreign = handle.epoch != self.world.client.epoch
        self.covered["terminate, foreign epoch" if foreign else "terminate, stale"] += 1
        assert self.by(who, handle, "terminate") is None

    @precondition(lambda self: self.some("running"))
    @rule(n=number)
    def exit(self, n: int) -> None:
        self.covered["exit 0"] += 1
        r = self.pick(n, "running")
        os.write(r.orders, EXIT)
        outcome = r.handle.wait_until_gone(30)
        assert (outcome.kind, outcome.exitcode, outcome.final) == ("exited", 0, True)
        self.gone(r)

    @precondition(lambda self: self.some("running"))
    @rule(n=number, crash=st.booleans())
    def fail(self, n: int, crash: bool) -> None:
        """Exit 1, or a signal: restarted, or gone, as the registration wants it."""
        r = self.pick(n, "running")
        if r.failures == MOST_FAILURES:
            return
        r.failures += 1
        self.covered[f"{'crash' if crash else 'exit 1'}, restart_time {r.restart}"] += 1
        pid = r.handle.pid
        os.write(r.orders, CRASH if crash else FAIL)
        if r.restart is NEVER:
            outcome = r.handle.wait_until_gone(30)
            assert outcome.final
        elif r.restart == LATER:
            assert r.handle.wait_for_shutdown(30) is HandleStatus.STOPPED
            self.tell("stop", r.handle)
            outcome = r.handle.outcome
        else:
            poll_until(lambda: r.handle.pid not in (pid, None))
            self.tell("stop", r.handle)
            self.started(r)
            outcome = r.handle.outcome
        assert outcome is not None
        assert (outcome.exitcode, outcome.signal) == ((None, 9) if crash else (1, None))
        if r.restart is NEVER:
            self.gone(r)

    @precondition(lambda self: self.running)
    @rule(who=who, n=number)
    def wait_in_vain(self, who: int, n: int) -> None:
        """No wait ends before what it waits for."""
        self.covered["wait in vain"] += 1
        r = self.pick(n, "running", "stopped")
        answer = self.by(who, r.handle, "wait_until_gone", 0.002)
        assert isinstance(answer, WaitTimeoutError), repr(answer)

    @precondition(lambda self: self.old)
    @rule(who=who, n=number)
    def wait_for_what_is_gone(self, who: int, n: int) -> None:
        self.covered["wait for what is gone"] += 1
        handle = self.old[n % len(self.old)]
        assert self.by(who, handle, "wait_for_startup", 30) is HandleStatus.STOPPED
        assert self.by(who, handle, "wait_until_gone", 30).final

    @precondition(lambda self: self.client_kills < len(self.running))
    @rule(who=st.integers(0, CLIENTS - 1))
    def kill_a_client(self, who: int) -> None:
        """What it registered stays."""
        self.client_kills += 1
        self.covered["client killed"] += 1
        self.world.kill_other(who)

    @precondition(lambda self: self.kills == 0 and len(self.old) > 2)
    @rule()
    def kill_the_supervisor(self) -> None:
        self.covered["supervisor killed"] += 1
        self.kills += 1
        before, epoch = self.world.client, self.world.client.epoch
        now = {r.handle: self.world.slots[r.handle.slot] for r in self.running.values()}
        expected = dict.fromkeys(now, HandleStatus.SUPERVISOR_DIED)
        expected |= {h: HandleStatus.STOPPED for h in self.old if h.epoch == epoch}
        kill_supervisor(before)
        before.wait(now, 30)
        for handle, status in expected.items():
            assert handle.status() is status
        self.world.restart()
        assert self.world.client.epoch != epoch
        for r in self.running.values():
            os.close(r.orders)
            os.unlink(r.fifo)
        self.old += now
        self.running.clear()

    # --- what must agree after every step ---------------------------------------------------------

    @invariant()
    def everybody_sees_what_the_model_says(self) -> None:
        handles = [r.handle for r in self.running.values()] + self.old[-REMEMBERED:]
        for who in range(CLIENTS + 1):
            for handle in handles[who :: CLIENTS + 1] if len(handles) > 4 else handles:
                status, pid = self.status_of(handle)
                assert self.by(who, handle, "status") is status
                assert self.by(who, handle, "pid") == pid
        infos = {i.slot: i for i in self.world.client.workers()}
        assert infos.keys() == self.running.keys()
        for x, info in infos.items():
            slot = self.world.slots[x]
            assert (info.generation, info.pid) == (slot.generation, slot.pid or None)

    def teardown(self) -> None:
        """All that is left ends: the next example finds an empty table."""
        for r in list(self.running.values()):
            r.handle.terminate()
            r.handle.wait_until_gone(30)
            self.tell("terminate", r.handle)
            self.gone(r)


@contextmanager
def world(directory: Path) -> Iterator[World]:
    with Zygote("support.model_workers") as zygote:
        it = World(zygote, directory)
        try:
            yield it
        finally:
            it.end()


@pytest.mark.timeout_s(14_400)
def test_T10_a_live_system_does_what_the_model_says(trial: Trial, tmp_path: Path) -> None:
    directory = Path(os.environ["PGBGW_RUNTIME_DIR"])
    covered: Counter[str] = Counter()
    examples, steps = trial.pick((3, 30), (50, 50), (1500, 50))
    with world(directory) as it:
        machine = type("Machine", (LiveSystem,), {"world": it, "covered": covered})
        # The same each time in `make test`: what it finds there must not be luck.
        first = trial.pick(5, trial.seed, trial.seed)
        for example in range(examples):
            # One by one: hypothesis compares the choices of its examples, and those of a live
            # system may differ though they begin alike.  What it did until then counts.
            with suppress(FlakyStrategyDefinition):
                run_state_machine_as_test(
                    seed(first + example)(machine),
                    settings=settings(
                        max_examples=2,  # the trivial one comes first
                        stateful_step_count=steps,
                        deadline=None,
                        database=None,
                        phases=[Phase.generate],
                        suppress_health_check=list(HealthCheck),
                    ),
                )
    trial.count(sum(covered.values()))
    trial.note(
        f"steps in {examples} examples: "
        + ", ".join(f"{what} {n}" for what, n in sorted(covered.items()))
    )
