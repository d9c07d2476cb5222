"""Once through all that the extensions do, in one process and without a test runner: for valgrind.

Prints how many rounds it made.  Run as: python extension_tour.py SEED ROUNDS.
"""

from __future__ import annotations

import os
import random
import sys

# Valgrind does not know the system call.  An eventfd is as unreadable as a living process's pidfd.
os.pidfd_open = lambda pid, flags=0: os.eventfd(0)

from support.slot_tables import (  # noqa: E402
    NO_SLOT,
    NOW,
    Handle,
    Table,
    assert_usable,
    image,
    record,
    table,
    word,
)

LENGTHS = [1, 96, 128, 512, 513, 1024, 1025, 2048, 2**32 - 1]


def main(seed: int, rounds: int) -> None:
    chance = random.Random(seed)
    for _ in range(rounds):
        with table(chance.choice([1, 63, 64, 65, 200]), 3) as t:
            visit(t, chance)
            damage(t, chance)
            while t.view.sweep_due:
                t.sweep()
            t.view.request_sweep()
            t.sweep()
            t.settle()
            for slot in range(t.nslots):
                if t.view.in_use(slot, t.view.generation(slot)):
                    t.view.free(slot)
            assert_usable(t)
    print(rounds)


def visit(t: Table, chance: random.Random) -> None:
    """A client's and a worker's life, with and without mistakes."""
    client = t.client()
    images = [
        record(),
        record(parallel=True),
        image(payload=b"p" * 1024, name="näm\u202e".encode()),
    ]
    images += [image(name_len=97), image(entry=b""), image(flags=0x80), b"short"]
    handles = []
    for data in images:
        try:
            handle = client.register(data, parallel=data == images[1])
        except ValueError:
            continue
        if isinstance(handle, Handle):
            handles.append(handle)
        else:
            assert handle == NO_SLOT
    for slot, generation in client.view.occupied():
        client.view.detail(slot, generation)
    t.settle()
    for handle in handles:
        if not t.view.in_use(handle.slot, handle.generation):
            continue
        t.view.record(handle.slot)
        t.view.registration(handle.slot)
        t.view.set_running(handle.slot, 4711, NOW)
        t.view.set_ready(handle.slot)
        t.view.set_activity(handle.slot, bytes(chance.randbytes(80)))
        client.view.detail(handle.slot, handle.generation)
        handle._set_terminate()
        t.view.set_outcome(handle.slot, 1, 0, 0, 0, True, NOW, b"\xffTraceback\n" * 100)
    t.settle()
    for handle in handles[::2]:
        if t.view.in_use(handle.slot, handle.generation):
            t.view.free(handle.slot)
    for handle in handles:
        handle.status()
        client.view.detail(handle.slot, handle.generation)
    t.view.prepare_sleep()
    client.register(record())
    t.view.awake()
    t.gone(client)


def damage(t: Table, chance: random.Random) -> None:
    """Words, records and bitmaps that nobody should have written, some in a live client's name."""
    client = t.client()
    for slot in range(t.nslots):
        state, token = chance.randrange(4), chance.choice([0, 0, 1, t.ntokens, t.ntokens + 1])
        likely = word(t.view.generation(slot), client.cid, token, state)
        t.set_req(slot, chance.choice([likely, chance.getrandbits(64)]))
        lengths = {f"{text}_len": chance.choice(LENGTHS) for text in ("name", "entry", "payload")}
        t.write_record(slot, chance.choice([image(**lengths), chance.randbytes(2048)]))
    for token in range(t.ntokens):
        t.set_token(token, chance.getrandbits(64))
    t.dirty = set(range((t.nslots + 63) // 64 * 64))
    t.settle()
    t.gone(client)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
