"""T02b: a Python client is killed at random instructions of what it calls, and nothing is left.

A warm zygote forks victims; each attaches anew, stops itself, and is then taken by ptrace to one
instruction of register, terminate, status, wait or attach, where SIGKILL meets it: anywhere in
the interpreter, in the extension or in libc.  The position is drawn uniformly from all instructions
that the operation was seen to execute.  After each kill the table must come back to what it was:
no slot, token or client id is lost, what the victim had published is whole, and the handles of
others say what they said before.

The supervisor never leaves its startup phase until the end, so that no worker runs meanwhile and
there is time for many victims.
"""

from __future__ import annotations

import platform
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from fix_trials import Trial
from pgbgw import BackgroundWorker, Client, Flags, HandleStatus, WorkerHandle
from support.builds import build_library
from support.processes import Script
from support.rogues import Rogue
from support.slot_tables import FREE, READY
from support.startup_workers import RELEASE
from support.supervisors import supervisor
from support.waiting import poll_until

pytestmark = [
    pytest.mark.xdist_group("core"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="steps x86-64 instructions"),
]

OPERATIONS = ("register", "register parallel", "terminate", "status", "wait", "attach")
SLOTS, TOKENS = 4, 2
KILLED, HUNG, LOST = -1, -2, -3  # as in stepper.c; else an exit status
REFUSED, WRONG = 3, 4  # exit statuses of victims that came through

_ZYGOTE = """
import ctypes, gc, os, signal
from pgbgw import BackgroundWorker, Flags, PgbgwError, attach

stepper = ctypes.CDLL(library)
stepper.stepper_profile.restype = ctypes.c_long
stepper.stepper_profile.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_long]
stepper.stepper_kill.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_long]
trace = ctypes.CDLL(None).ptrace
plain = BackgroundWorker(entry="support.workers:noop", name="victim", main_arg=4711)
parallel = BackgroundWorker(
    entry="support.workers:noop", name="victim", main_arg=4711, flags=Flags.CLASS_PARALLEL
)

operations = {
    "register": lambda client, handle: client.register(plain),
    "register parallel": lambda client, handle: client.register(parallel),
    "terminate": lambda client, handle: handle.terminate(),
    "status": lambda client, handle: (handle.status(), handle.pid),
    "wait": lambda client, handle: client.wait([handle], 0.001, "ALL_STARTED"),
    "attach": lambda client, handle: attach(address),
}

def start(name, handle):
    pid = os.fork()
    if pid:
        return pid
    status = wrong
    try:
        operation = operations[name]
        client = None if name == "attach" else attach(address)
        if client is not None:
            handle.status()  # finds its table
        trace(0, 0, None, None)  # PTRACE_TRACEME
        os.kill(os.getpid(), signal.SIGSTOP)
        operation(client, handle)
        status = 0
    except PgbgwError:
        status = refused
    finally:
        os._exit(status)

with attach(address) as client:  # warm up: what follows is inherited by all victims
    handle = test.recv()
    for _ in range(20):
        for name in ("status", "wait", "attach"):
            operations[name](client, handle)
        for name in ("register", "register parallel"):
            made = operations[name](client, handle)
            operations["terminate"](client, made)
            made.wait_until_gone(30)
    for _ in range(20):
        client.close()
del client
gc.collect()
gc.freeze()
gc.disable()  # victims do the same work each time

while (order := test.recv()) is not None:
    name, handle, address_of_stop, steps = order
    pid = start(name, handle)
    if steps is None:
        addresses = (ctypes.c_uint64 * 1_000_000)()
        n = stepper.stepper_profile(pid, addresses, len(addresses))
        test.send(addresses[:n] if n > 0 else n)
        del addresses
    else:
        test.send(stepper.stepper_kill(pid, address_of_stop, steps))
"""


class Table:
    """What everybody else sees of the table: an honest client, and a hand that reads all words."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.words = Rogue.of(client)
        self.target = self.old = self.register("target")
        self.old.terminate()
        self.old.wait_until_gone(30)
        self.new_target()

    def register(self, name: str, **fields: object) -> WorkerHandle:
        return self.client.register(
            BackgroundWorker(entry="support.workers:noop", name=name, **fields)  # type: ignore[arg-type]
        )

    def new_target(self) -> None:
        self.target = self.register("target")

    def only_the_target(self) -> bool:
        states = self.words.states()
        return states.pop(self.target.slot) == READY and set(states) == {FREE}

    def tidy(self, trial: Trial, name: str) -> None:
        """Judge what a victim has left, and make room for the next."""
        if name == "terminate" and self.words.req(self.target.slot).term:
            # The bit is the whole operation: the supervisor comes across it, if nobody rings.
            self.target.wait_until_gone(30)
        if name == "terminate" and self.target.status() is HandleStatus.STOPPED:
            outcome = self.target.outcome
            if outcome is None or outcome.kind != "cancelled":
                trial.violation(f"{name}: the target ended as {outcome}")
            self.new_target()
        if self.target.status() is not HandleStatus.NOT_YET_STARTED:
            trial.violation(f"{name}: the target is {self.target.status()}")
            self.new_target()
        self.old.terminate()
        if self.old.status() is not HandleStatus.STOPPED:
            trial.violation(f"{name}: a stale handle says {self.old.status()}")
        for info in self.client.workers():
            if info.slot == self.target.slot:
                continue
            if (info.name, info.type) != ("victim", "victim") or not name.startswith("register"):
                trial.violation(f"{name}: left {info}")
            elif bool(info.flags & Flags.CLASS_PARALLEL) != (name == "register parallel"):
                trial.violation(f"{name}: left a worker with {info.flags}")
            self.client.handle(info).terminate()
        poll_until(self.only_the_target, message=f"the table after a kill in {name}")

    def use_it_all(self, trial: Trial) -> None:
        """Every slot and every token can be had."""
        made = [
            self.register("all", flags=Flags.CLASS_PARALLEL if i < TOKENS else Flags(0))
            for i in range(SLOTS - 1)
        ]
        if self.client.try_register("support.workers:noop") is not None:
            trial.violation("there were more slots than there are")
        for handle in made:
            handle.terminate()
            handle.wait_until_gone(30)
        poll_until(self.only_the_target)


@contextmanager
def zygote(client: Client, library: Path, target: WorkerHandle) -> Iterator[Script]:
    variables = {"address": client.address, "library": str(library), "refused": REFUSED}
    with Script(_ZYGOTE, wrong=WRONG, **variables) as script:
        script.say(target)
        yield script
        script.say(None)


def first_times(addresses: list[int]) -> list[int]:
    """The positions at which an address is executed for the first time: places to run to."""
    seen: set[int] = set()
    return [i for i, a in enumerate(addresses) if not (a in seen or seen.add(a))]  # type: ignore[func-returns-value]


def instructions(addresses: list[int]) -> list[int]:
    """The positions at which another instruction begins, not the next round of the same one: a
    copy by `rep movsb` is stepped byte by byte."""
    return [i for i, (a, b) in enumerate(pairwise([0, *addresses])) if a != b]


@pytest.mark.timeout_s(7200)
def test_T02b_a_client_killed_at_any_instruction_of_a_call_leaves_nothing_behind(
    trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = build_library("stepper.c", tmp_path)
    release = tmp_path / "release"
    monkeypatch.setenv(RELEASE, str(release))
    operations = trial.pick(OPERATIONS[:4], OPERATIONS, OPERATIONS)
    kills = trial.pick(40, 2150, 20000)  # one in twenty comes through
    settings = {"max_worker_processes": SLOTS, "max_parallel_workers": TOKENS}
    through = hung = 0
    startup = "support.startup_workers:wait_for_release"
    with supervisor(startup=startup, **settings) as client:
        table = Table(client)
        with zygote(client, library, table.target) as script:
            lengths = []
            for number, name in enumerate(operations):
                script.say((name, table.target, 0, None))
                addresses = script.hear()
                if addresses == LOST and number == 0:
                    pytest.skip("ptrace is not permitted here")
                assert isinstance(addresses, list), f"{name}: could not be stepped: {addresses}"
                table.tidy(trial, name)
                stops, positions = first_times(addresses), instructions(addresses)
                lengths.append(f"{name} {len(positions)}")
                for _ in range(number, kills, len(operations)):
                    # A little beyond the end, too: who gets that far ends as it should.
                    n = trial.random.randrange(len(positions) * 21 // 20)
                    position = positions[n] if n < len(positions) else len(addresses) + n
                    stop = stops[bisect_right(stops, position) - 1]
                    script.say((name, table.target, addresses[stop], position - stop))
                    result = script.hear()
                    trial.count(result == KILLED)
                    through += result >= 0
                    hung += result == HUNG
                    if result not in (KILLED, 0, REFUSED):
                        trial.violation(f"{name}: at {position} the victim ended with {result}")
                    table.tidy(trial, name)
                table.use_it_all(trial)
        release.touch()
        assert table.target.wait_until_gone(30).exitcode == 0
        last = [
            table.register("last", flags=Flags.CLASS_PARALLEL if i < TOKENS else Flags(0))
            for i in range(SLOTS)
        ]
        assert [handle.wait_until_gone(30).exitcode for handle in last] == [0] * SLOTS
        table.words.close()
    trial.note(f"instructions: {', '.join(lengths)}; {through} came through, {hung} hung")
