"""Conformance, group I: robustness and accounting."""

from __future__ import annotations

import mmap
import os
import random
import resource
import signal
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from pgbgw import (
    Client,
    Flags,
    HandleStatus,
    NoFreeSlotError,
    ParallelLimitError,
    WorkerHandle,
)
from support import poll_until
from support.control import Log, Startup, paused
from support.processes import Script
from support.rogues import Rogue
from support.slot_tables import CLAIMED, FREE, NOW, all_free, record, table
from support.supervisors import lines, noticed, supervisor

NOOP = "support.workers:noop"
SLEEP = "support.workers:sleep_until_stopped"
AGAIN = "support.workers:append_and_exit"
COUNT = "support.robustness_workers:count_each_other"

PARALLEL = Flags.CLASS_PARALLEL


def ready(client: Client, **fields: object) -> WorkerHandle:
    handle = client.register(SLEEP, **fields)
    assert handle.wait_for_ready(30) is HandleStatus.STARTED
    return handle


def assert_room(client: Client) -> None:
    """Exactly as many workers can be registered as there are slots, and tokens."""
    nslots, ntokens = client.max_worker_processes, client.max_parallel_workers
    handles: list[WorkerHandle] = []

    def one_more(**fields: object) -> bool:
        handle = client.try_register(SLEEP, **fields)
        if handle is not None:
            handles.append(handle)
        return handle is not None

    for _ in range(min(ntokens, nslots)):
        poll_until(lambda: one_more(flags=PARALLEL), message="a token")
    if ntokens < nslots:
        with pytest.raises(ParallelLimitError):
            client.register(NOOP, flags=PARALLEL)
    for _ in range(nslots - len(handles)):
        poll_until(one_more, message="a slot")
    with pytest.raises(NoFreeSlotError):
        client.register(NOOP)
    assert handles[-1].wait_for_ready(30) is HandleStatus.STARTED
    for handle in handles:
        handle.terminate()
    assert client.wait(handles, 30, "ALL_GONE")[1] == set()


def enough(script: Script) -> None:
    """Let a script that reports its progress come to its end."""
    script.say("enough")
    while script.hear() is not None:
        pass


def in_supervisor(client: Client) -> psutil.Process:
    return psutil.Process(client.supervisor_pid)


# --- accounting ---------------------------------------------------------------------------------


def test_I01_a_million_parallel_registrations_leave_the_capacity_exact() -> None:
    """The core alone: the tokens, which stand for what are counters in PostgreSQL."""
    rounds, ntokens = 1 << 15, 32
    with table(ntokens, ntokens) as t:
        client = t.client()
        register, drain, free = client.must_register, t.view.drain, t.view.free
        image = record(parallel=True)
        for _ in range(rounds):
            slots = [register(image, parallel=True).slot for _ in range(ntokens)]
            drain(NOW)
            for slot in slots:
                free(slot)
        assert all_free(t)
        assert {t.token(i).generation for i in range(ntokens)} == {rounds + 1}
        assert t.view.repairs == 0


def test_I01_parallel_workers_that_come_and_go_leave_the_capacity_exact() -> None:
    with supervisor(max_worker_processes=8, max_parallel_workers=3) as client:
        for n in range(60):
            handles = [client.register(NOOP, flags=PARALLEL) for _ in range(n % 3 + 1)]
            if n % 2:
                handles[0].terminate()
            for handle in handles:
                handle.wait_until_gone(30)
        assert_room(client)


def test_I02_the_parallel_limit_holds_for_a_supervisor_that_does_not_look() -> None:
    with supervisor(max_worker_processes=16, max_parallel_workers=3) as client:
        with paused(client):
            handles = [client.register(NOOP, flags=PARALLEL) for _ in range(3)]
            for _ in range(3):
                with pytest.raises(ParallelLimitError):
                    client.register(NOOP, flags=PARALLEL)
            # Its view is the more stale the more has happened since.
            for handle in handles:
                handle.terminate()
            with pytest.raises(ParallelLimitError):
                client.register(NOOP, flags=PARALLEL)
        for handle in handles:
            handle.wait_until_gone(30)
        assert_room(client)


_REGISTER_PARALLEL = """
from pgbgw import Flags, attach
client = attach(address)
test.send("attached")
refused = 0
handles = []
for _ in range(40):
    handle = client.try_register(entry, directory, flags=Flags.CLASS_PARALLEL)
    if handle is None:
        refused += 1
        handles[-1].wait_until_gone(30) if handles else None
    else:
        handles.append(handle)
client.wait(handles, 30, "ALL_GONE")
test.send((len(handles), refused))
client.close()
"""


def test_I02_the_parallel_limit_is_never_exceeded_by_clients_that_race(tmp_path: Path) -> None:
    limit = 3
    with (
        supervisor(max_worker_processes=32, max_parallel_workers=limit) as client,
        ExitStack() as s,
    ):
        told = {"address": client.address, "entry": COUNT, "directory": str(tmp_path)}
        scripts = [s.enter_context(Script(_REGISTER_PARALLEL, **told)) for _ in range(3)]
        for script in scripts:
            assert script.hear() == "attached"
        made, refused = map(sum, zip(*(script.hear() for script in scripts), strict=True))
        counts = [int(line) for line in lines(tmp_path / "counts")]
        assert len(counts) == made
        assert refused
        # A worker is there only while its registration is, so at most as many as there are tokens.
        assert max(counts) <= limit
        assert_room(client)


# --- clients that are stopped or killed --------------------------------------------------------

_REGISTER_FROM_THREADS = """
import random, threading
from pgbgw import Flags, attach
client = attach(address)

def register(seed):
    rng = random.Random(seed)
    while True:
        flags = Flags.CLASS_PARALLEL if rng.random() < 0.5 else Flags.NONE
        handle = client.try_register("support.workers:noop", flags=flags)
        if handle is not None and rng.random() < 0.3:
            handle.terminate()

for seed in range(8):
    threading.Thread(target=register, args=(seed,), daemon=True).start()
test.send(client._view.cid)
test.recv()
"""


def stop(script: Script) -> None:
    os.kill(script.pid, signal.SIGSTOP)
    poll_until(lambda: psutil.Process(script.pid).status() == psutil.STATUS_STOPPED)


@pytest.mark.parametrize("attempt", range(2))
def test_I03_a_client_stopped_in_mid_registration_holds_up_nobody(
    tmp_path: Path, attempt: int
) -> None:
    path = tmp_path / "runs"
    with (
        supervisor(max_worker_processes=24, max_parallel_workers=6) as client,
        Rogue.of(client) as rogue,
        Script(_REGISTER_FROM_THREADS, address=client.address) as script,
    ):
        cid = script.hear()
        sleeper = poll_until(lambda: client.try_register(SLEEP))
        assert sleeper.wait_for_ready(30) is HandleStatus.STARTED
        again = poll_until(
            lambda: client.try_register(AGAIN, str(path), "run", 1, restart_time=0.2)
        )
        poll_until(lambda: any(w.name == NOOP and w.pid for w in client.workers()))
        stop(script)
        # Where its threads are now is luck; this is the worst place.
        poll_until(lambda: FREE in rogue.states()[:24] and FREE in rogue.states()[24:])
        slot, index = rogue.claim(cid)

        # Restarting, signalling, reaping, registering: all as if that client were not there.
        before = len(lines(path))
        poll_until(lambda: len(lines(path)) > before + 1)
        sleeper.terminate()
        assert sleeper.wait_until_gone(30).exitcode == 1
        other = poll_until(lambda: client.try_register(NOOP))
        assert other.wait_until_gone(30).exitcode == 0
        again.terminate()
        again.wait_until_gone(30)
        assert rogue.req(slot).state == rogue.token(index).state == CLAIMED

        script.kill()  # while it is stopped: nothing of it will ever be heard again
        poll_until(lambda: set(rogue.states()) == {FREE})
        assert_room(client)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_I03_a_supervisor_shuts_down_though_a_client_is_stopped_in_mid_registration(
    mode: str,
) -> None:
    with supervisor(max_worker_processes=24, max_parallel_workers=6) as client:
        sleeper = ready(client)
        with Script(_REGISTER_FROM_THREADS, address=client.address) as script:
            cid = script.hear()
            stop(script)
            with Rogue.of(client) as rogue:
                poll_until(lambda: FREE in rogue.states()[:24] and FREE in rogue.states()[24:])
                rogue.claim(cid)
            client.stop(mode, timeout=30)
            assert sleeper.status() in (HandleStatus.STOPPED, HandleStatus.SUPERVISOR_DIED)
            script.kill()


# --- damage -------------------------------------------------------------------------------------

_WRITE_GARBAGE = """
import random, time
from support.rogues import Rogue
rng = random.Random(seed)
with Rogue(address, nslots, ntokens) as rogue:
    test.send(rogue.cid)
    cids = [*test.recv(), rogue.cid, 3000]
    while not test.poll():
        for _ in range(20):
            rogue.damage(rng, cids)
        time.sleep(0.001)
    test.recv()
"""

_WORK_HONESTLY = """
from pgbgw import WaitTimeoutError, attach
client = attach(address)
test.send(client._view.cid)
done = 0
while not test.poll():
    handle = client.try_register("support.workers:noop", name=f"honest {done}")
    if handle is None:
        continue
    try:
        handle.wait_until_gone(1)
    except WaitTimeoutError:
        handle.terminate()
    done += 1
    test.send(done)
test.send(None)
client.close()
"""


@pytest.mark.timeout_s(120)
def test_I04_garbage_all_over_the_inbox_is_survived_and_repaired(
    capfd: pytest.CaptureFixture[str],
) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    with supervisor(max_worker_processes=16, max_parallel_workers=4) as client:
        steady = ready(client, name="steady")
        pid = steady.pid
        where = {"address": client.address}
        with (
            Script(_WRITE_GARBAGE, seed=seed, nslots=16, ntokens=4, **where) as rogue,
            Script(_WORK_HONESTLY, **where) as one,
            Script(_WORK_HONESTLY, **where) as two,
        ):
            honest = (one, two)
            rogue.hear()
            rogue.say([script.hear() for script in honest])
            for _ in range(25):  # rounds of honest work, in the midst of it
                for script in honest:
                    script.hear()
            rogue.kill()  # in the middle of a write
            for script in honest:
                enough(script)
        assert in_supervisor(client).is_running()
        Log(capfd).wait_for("damaged and is repaired")
        # Whatever the garbage made run, or made restartable, can be told to stop; the steady one
        # may have been told so by a damaged word.
        assert steady.pid in (pid, None)

        def all_gone() -> bool:
            for info in client.workers():
                client.handle(info).terminate()
            return not client.workers()

        poll_until(all_gone)
        with Rogue.of(client) as observer:
            poll_until(lambda: set(observer.states()) == {FREE})
        assert_room(client)


def test_I04_a_client_cannot_write_what_the_supervisor_says() -> None:
    with supervisor() as client, Rogue.of(client) as rogue:
        with pytest.raises(PermissionError):
            mmap.mmap(rogue.outbox, 0)
        with pytest.raises(PermissionError):
            os.pwrite(rogue.outbox, b"x", 4096)
        with pytest.raises(PermissionError):
            os.ftruncate(rogue.outbox, 0)
        with pytest.raises(PermissionError):
            os.ftruncate(rogue._inbox, 0)
        mmap.mmap(rogue.outbox, 0, prot=mmap.PROT_READ).close()
        assert client.register(NOOP).wait_until_gone(30).exitcode == 0


# --- many at once -------------------------------------------------------------------------------

_HAMMER = """
import random
from pgbgw import HandleStatus, attach
from support.robustness_workers import blob_of, code_of, expected_of
client = attach(address)
test.send("attached")
test.recv()
rng = random.Random(seed)
pending, wrong = {}, []

def finish(handle):
    want, stopped = pending.pop(handle)
    outcome = handle.wait_until_gone(30)
    if not (outcome.exitcode == want or (stopped and outcome.kind in ("cancelled", "exited"))):
        wrong.append((str(handle), str(outcome), want))
    if handle.status() is not HandleStatus.STOPPED or handle.pid is not None:
        wrong.append((str(handle), "has a pid", handle.pid))

for n in range(rounds):
    number = seed * 1000 + n
    handle = None
    while handle is None:
        handle = client.try_register(
            "support.robustness_workers:exit_as_expected", number, blob_of(number),
            **expected_of(number),
        )
        if handle is None or len(pending) > 6:
            finish(rng.choice(list(pending)))
    pending[handle] = (code_of(number), stop := rng.random() < 0.2)
    if stop:
        handle.terminate()
    for slot in range(client.max_worker_processes):
        _, state, _, pid = client._view.status(slot)
        if (pid != 0) != (state == 2):
            wrong.append((slot, state, pid))
for handle in list(pending):
    finish(handle)
test.send(wrong)
client.close()
"""


@pytest.mark.timeout_s(120)
def test_I05_no_registration_is_launched_half_written_and_no_free_slot_has_a_pid() -> None:
    with supervisor(max_worker_processes=20) as client, ExitStack() as stack:
        seed = random.randrange(1 << 20)
        print(f"seed {seed}")
        told = {"address": client.address, "rounds": 50}
        scripts = [stack.enter_context(Script(_HAMMER, seed=seed + n, **told)) for n in range(3)]
        for script in scripts:
            assert script.hear() == "attached"
        for script in scripts:
            script.say("go")
        for script in scripts:
            assert script.hear() == []
        assert_room(client)


@pytest.mark.timeout_s(120)
def test_I06_without_memory_registrations_are_rejected_and_later_ones_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    startup = Startup(tmp_path / "startup", monkeypatch)  # until it ends nothing is launched
    with supervisor(max_worker_processes=4096, startup=startup.entry) as client:
        startup.wait_for_run(1)
        large = "x" * 900

        def decided(handles: list[WorkerHandle]) -> bool:
            accepted = noticed(client)
            return all(
                (h.slot, h.generation) in accepted or h.status() is HandleStatus.STOPPED
                for h in handles
            )

        early = [client.register(NOOP, large) for _ in range(20)]
        poll_until(lambda: decided(early))
        assert all(h.status() is HandleStatus.NOT_YET_STARTED for h in early)

        pid = client.supervisor_pid
        unlimited = resource.prlimit(pid, resource.RLIMIT_AS)
        resource.prlimit(pid, resource.RLIMIT_AS, (1 << 20, unlimited[1]))  # not one page more
        refused: list[WorkerHandle] = []
        while not refused:
            handles = [client.register(NOOP, large) for _ in range(100)]
            poll_until(lambda batch=handles: decided(batch))
            refused = [h for h in handles if h.status() is HandleStatus.STOPPED]
        for handle in refused:
            outcome = handle.wait_until_gone(30)
            assert (outcome.kind, outcome.final) == ("rejected", True)
        assert any(h.outcome is not None and h.outcome.error == "no memory" for h in refused)
        # All else goes on: this needs memory for a connection, a subscription, a message.
        early[0].terminate()
        assert early[0].wait_until_gone(30).kind == "cancelled"
        with Script(
            "from pgbgw import attach; client = attach(address); test.send(len(client.workers()));"
            "client.close()",
            address=client.address,
        ) as script:
            assert script.hear() == len(noticed(client))

        resource.prlimit(pid, resource.RLIMIT_AS, unlimited)
        late = [client.register(NOOP, large) for _ in range(20)]
        poll_until(lambda: decided(late))
        assert all(h.status() is HandleStatus.NOT_YET_STARTED for h in late)
        for handle in [client.handle(w) for w in client.workers()][10:]:
            if handle not in late:
                handle.terminate()
        startup.finish()
        for handle in late:
            assert handle.wait_until_gone(30).exitcode == 0


# --- fairness -----------------------------------------------------------------------------------

_CHURN = """
from pgbgw import attach
client = attach(address)
done = 0
while not test.poll():
    handles = [h for _ in range(10) if (h := client.try_register("support.workers:noop"))]
    client.wait(handles, 30, "ALL_GONE")
    done += len(handles)
    test.send(done)
test.send(None)
client.close()
"""


@pytest.mark.timeout_s(120)
def test_I07_churn_at_full_speed_starves_no_other_duty(tmp_path: Path) -> None:
    path = tmp_path / "runs"
    with supervisor(max_worker_processes=40) as client, ExitStack() as stack:
        churners = [stack.enter_context(Script(_CHURN, address=client.address)) for _ in range(2)]
        storm = [client.register(AGAIN, str(path), "x", 1, restart_time=0) for _ in range(5)]
        timed = client.register(AGAIN, str(tmp_path / "timed"), "x", 1, restart_time=0.1)
        progress = [script.hear() for script in churners]
        for _ in range(6):
            worker = poll_until(lambda: client.try_register(SLEEP))
            assert worker.wait_for_ready(30) is HandleStatus.STARTED  # launch, notification
            worker.terminate()
            assert worker.wait_until_gone(30).exitcode == 1  # signal, reaping, freeing
        poll_until(lambda: len(lines(tmp_path / "timed")) >= 4)  # timers
        assert len(lines(path)) >= 10
        with Script(
            "from pgbgw import attach; attach(address).close(); test.send('attached')",
            address=client.address,
        ) as script:
            assert script.hear() == "attached"
        for handle in (*storm, timed):
            handle.terminate()
        # The churn has gone on all the while.
        for before, script in zip(progress, churners, strict=True):
            poll_until(lambda before=before, script=script: script.hear() > before)
            enough(script)
