"""A process that damages the inbox at full speed, or floods the socket, hurts nobody else.

While the damage is done honest clients may lose what they register, as that is what is damaged; but
nothing hangs, the supervisor lives and its loop goes round.  When the rogue is dead, all is put
right: every slot and token is free again and every operation works.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from fix_trials import Trial
from pgbgw import Client
from support.builds import build_library
from support.figures import spread
from support.honest import HonestClients, Pauses
from support.processes import Script, is_alive
from support.rogues import Rogue
from support.slot_tables import FREE
from support.supervisors import supervisor
from support.waiting import poll_until

pytestmark = pytest.mark.xdist_group("live")
LONG = pytest.mark.at_least("fault")

NOOP = "support.workers:noop"
SLEEP = "support.workers:sleep_until_stopped"
HANG = 30.0  # seconds

_ROGUE = """
import ctypes
from support.rogues import Rogue

write = ctypes.CDLL(library).rogue_write
numbers = lambda *values: (ctypes.c_uint64 * len(values))(*values)
rogue = Rogue(address, nslots, ntokens)
at = numbers(*(rogue.at[name] for name in ("tokens", "controls", "dirty", "hints", "records")))
cids = numbers(rogue.cid, *cids)
big = ctypes.c_uint64
test.send(rogue.cid)
while True:
    failed = write(rogue._inbox, big(20_000), big(seed), big(nslots), big(ntokens), at, cids,
                   big(len(cids)))
    if failed:
        test.send("failed")
        break
    seed += 1
    test.send(20_000)
"""


def all_free(client: Client, observer: Rogue) -> bool:
    """Are all slots and tokens, once what runs by now is told to go?"""
    for info in client.workers():
        client.handle(info).terminate(grace=0.1)
    return set(observer.states()) == {FREE}


@pytest.mark.timeout_s(3600)
@pytest.mark.parametrize("nslots", [64, pytest.param(4096, marks=LONG)])
def test_T04_a_rogue_that_writes_at_full_speed_is_survived(
    trial: Trial, tmp_path: Path, nslots: int
) -> None:
    library = str(build_library("rogue_writer.c", tmp_path))
    ntokens = 8
    rounds = trial.pick(1, 2, 10)
    seconds = trial.pick(0.8, 5.0, 60.0)
    recovered = []
    writes = 0
    took = 0.0
    with supervisor(max_worker_processes=nslots, max_parallel_workers=ntokens) as client:
        pauses = Pauses(client)
        for _ in range(rounds):
            told = {"address": client.address, "nslots": nslots, "ntokens": ntokens}
            seed = trial.random.getrandbits(32)
            # In the name of nobody, of itself, and of one who may be there, but never in ours: a
            # claim of a live client's is its own.
            cids = [0, trial.random.randrange(100, 4096), client._view.cid + 1]
            with HonestClients(client.address, 4, seed, damaged=True) as honest:
                with Script(_ROGUE, library=library, seed=seed, cids=cids, **told) as rogue:
                    rogue.hear()
                    began = time.monotonic()
                    while time.monotonic() - began < seconds:
                        written = rogue.hear()
                        assert written != "failed"
                        writes += written
                    took += time.monotonic() - began
                    rogue.kill()
                killed = time.monotonic()
                assert is_alive(client.supervisor_pid)
                honest.stop()
                for wrong in honest.wrong:
                    trial.violation(f"an honest client: {wrong}")
            with Rogue.of(client) as observer:
                poll_until(lambda: all_free(client, observer), HANG, message="free slots")
            handles = [client.register(NOOP) for _ in range(nslots if nslots < 100 else 100)]
            for handle in handles:
                outcome = handle.wait_until_gone(HANG)
                if outcome.exitcode != 0:
                    trial.violation(f"afterwards: {outcome}")
            recovered.append(time.monotonic() - killed)
        trial.note(str(pauses))
    trial.count(writes)
    trial.note(f"{writes / took:.0f} writes/s")
    trial.note(f"{honest.done} honest operations in the last round")
    trial.note(f"all usable again after at most {max(recovered):.2f} s")


# --- floods ---------------------------------------------------------------------------------------

_MESSAGES = """
import os, socket
from pgbgw import attach
from pgbgw._wire import HEAD, Message, pack
from support.rogues import GARBAGE
client = attach(address)
sock = client._channels._sock
messages = GARBAGE[kind]
sent = 0
test.send("attached")
while not test.poll():
    for message in messages * 100:
        try:
            sock.send(message, socket.MSG_DONTWAIT)
            sent += 1
        except BlockingIOError:
            pass
test.send(sent)
client.close()
"""

_ATTACH = """
import socket
from contextlib import suppress
from pgbgw import attach
from support.rogues import raw_connection
client = attach(address)
test.send("attached")
sent = 0
kept = []
while not test.poll():
    with suppress(OSError):
        sock = raw_connection(client)
        kept.append(sock)
        if kind == "hello":
            sock.send(b"never mind what you say", socket.MSG_DONTWAIT)
        sent += 1
    if len(kept) > 200:
        kept.pop(0).close()
for sock in kept:
    sock.close()
test.send(sent)
client.close()
"""


@pytest.mark.timeout_s(3600)
@pytest.mark.parametrize(
    ("kind", "flood"),
    [
        ("doorbells", _MESSAGES),
        pytest.param("garbage", _MESSAGES, marks=LONG),
        pytest.param("subscriptions", _MESSAGES, marks=LONG),
        pytest.param("silent", _ATTACH, marks=LONG),
        ("hello", _ATTACH),
    ],
    ids=["doorbells", "garbage", "subscriptions", "silent-connections", "rude-connections"],
)
def test_T04_floods_leave_the_others_their_share(trial: Trial, kind: str, flood: str) -> None:
    """Three flooding processes; none of them ever reads."""
    seconds = trial.pick(0.4, 3.0, 60.0)
    with supervisor(max_worker_processes=64) as client:
        steady = client.register(SLEEP)
        steady.wait_for_ready(HANG)
        pauses = Pauses(client)
        with ExitStack() as stack:
            floods = [
                stack.enter_context(Script(flood, address=client.address, kind=kind))
                for _ in range(3)
            ]
            for script in floods:
                assert script.hear() == "attached"
            with HonestClients(client.address, 2, trial.seed) as honest:
                time.sleep(seconds)
            for script in floods:
                script.say("enough")
            sent = sum(script.hear() for script in floods)
        for wrong in honest.wrong:
            trial.violation(f"an honest client: {wrong}")
        if not honest.done:
            trial.violation("no honest client got anything done")
        trial.count(sent)
        trial.note(f"{honest.done} honest operations, {spread(honest.took)}")
        trial.note(str(pauses))
        steady.terminate()
        if steady.wait_until_gone(HANG).exitcode != 1:
            trial.violation("a bystander was hit")
