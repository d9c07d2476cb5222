"""The slot protocol, step by step: both sides of a table in this process.

The names of the transitions (C1 to C7 a client's, S1 to S9 the supervisor's) and of the invariants
(I1 to I11) are those of _slots.h.  What dead clients and damage leave behind is the subject of
test_slots_damage.py.  Not here: the retirement of a slot whose generations are used up, which takes
2^38 registrations in one slot, or a hook that the core does not have.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pgbgw import _kernel, _slots
from pgbgw import worker as worker_module
from pgbgw._slots import AGAIN, LIMIT, LOOKS, NO_SLOT, ClientView, SupervisorView
from pgbgw.errors import AttachError, WrongProcessError
from pgbgw.worker import OUTCOME_KINDS, BackgroundWorker, Flags, HandleStatus
from support.slot_tables import (
    AT_NFREE,
    CLAIMED,
    FREE,
    NONE,
    NOW,
    READY,
    Event,
    Handle,
    Table,
    Word,
    accepted,
    all_free,
    assert_usable,
    image,
    image_of,
    record,
    running,
    table,
    word,
)

SIZES = [1, 8, 63, 64, 65, 1024]
LARGEST = 262_143

KIND = {name: code for code, name in enumerate(OUTCOME_KINDS)}


@pytest.fixture
def small() -> Iterator[Table]:
    with table(8, 4) as t:
        yield t


# --- layout -------------------------------------------------------------------------------------


def source(name: str) -> str:
    return Path(_slots.__file__).with_name(name).read_text()


def constant(name: str) -> int:
    match = re.search(rf"#define {name}\s+(0x[0-9a-f]+|\d+)", source("_slots.h"))
    assert match is not None, name
    return int(match[1], 0)


def test_the_constants_of_worker_py_are_those_of_the_core() -> None:
    assert constant("RECORD_STRIDE") == worker_module.RECORD_SIZE
    assert constant("PAYLOAD_MAX") == worker_module.PAYLOAD_MAX
    assert constant("RECORD_VERSION") == worker_module._RECORD_VERSION
    assert constant("MAX_SLOTS") == worker_module.MAX_WORKER_PROCESSES_LIMIT
    assert constant("MAX_TOKENS") == worker_module.MAX_PARALLEL_WORKER_LIMIT
    assert constant("START_TIMES") == len(worker_module.StartTime)
    for flag in Flags:
        assert constant(f"FLAG_{flag.name}") == flag
    kinds = re.search(r"enum \{ (KIND_NONE[^}]*)\}", source("_slots_supervisor.h"))
    assert kinds is not None
    names = [k.strip().removeprefix("KIND_").lower() for k in kinds[1].split(",")]
    assert tuple(names) == OUTCOME_KINDS[: len(names)]
    assert f"MAX_INTERVAL_NS (INT64_C({worker_module.MAX_RESTART_TIME})" in source("_slots.h")


def test_a_record_arrives_as_it_was_packed_and_says_the_same_on_both_sides(small: Table) -> None:
    worker = BackgroundWorker(
        entry="package.module:function",
        name="n" * 95,
        type="t" * 94 + "x",
        args=("a" * 400,),
        kwargs={"key": "b" * 300},
        env={"NAME": "value"},
        main_arg=2**64 - 1,
        extra=bytes(range(128)),
        flags=Flags.SHMEM_ACCESS | Flags.DATABASE_CONNECTION,
        start_time=worker_module.StartTime.CONSISTENT_STATE,
        restart_time=86_400_000,
        stop_timeout=0.5,
        notify=False,
    )
    worker.check()
    client = small.client()
    handle = accepted(small, client.must_register(worker._record))

    copy = small.view.record(handle.slot)
    at = 64  # when it was registered: written by the core
    assert copy[:at] + bytes(8) + copy[at + 8 :] == worker._record
    assert BackgroundWorker._from_record(copy) == worker
    name, type_, entry, flags, start, notify, restart, timeout, registered = (
        small.view.registration(handle.slot)
    )
    assert (name, type_, entry) == ("n" * 95, worker.type, "package.module:function")
    assert (flags, start, notify) == (3, 1, False)
    assert (restart, timeout) == (86_400_000 * 10**9, 500_000_000)
    assert 0 < registered <= time.monotonic_ns()


def test_the_longest_record_fits_and_its_neighbours_are_not_touched(small: Table) -> None:
    longest = image(
        name=b"n" * 95, type=b"t" * 95, entry=b"e" * 511, extra=b"x" * 128, payload=b"p" * 1024
    )
    client = small.client()
    handles = [client.must_register(longest) for _ in range(8)]
    small.settle()
    for handle in handles:
        copy = small.view.record(handle.slot)
        assert copy[96:] == longest[96:]


@pytest.mark.parametrize(("nslots", "ntokens"), [(0, 0), (LARGEST + 1, 0), (1, 1025)])
def test_a_table_of_an_impossible_size_is_refused(nslots: int, ntokens: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        _slots.segment_sizes(nslots, ntokens)
    with pytest.raises(ValueError, match="out of range"):
        SupervisorView(-1, -1, nslots, ntokens, 1)


@pytest.mark.parametrize("nslots", [*SIZES, LARGEST])
def test_the_parts_of_the_segments_do_not_overlap(nslots: int) -> None:
    at = _slots.segment_layout(nslots, 1024)
    outbox, inbox = _slots.segment_sizes(nslots, 1024)
    words = (nslots + 63) // 64 * 8
    assert at["status"] >= 4096
    assert at["status"] + 64 * nslots <= at["detail"]
    assert at["detail"] + 2048 * nslots <= outbox
    assert at["tokens"] >= 4096
    assert at["tokens"] + 64 * 1024 <= at["controls"]
    assert at["controls"] + 64 * nslots <= at["dirty"]
    assert at["dirty"] + words <= at["hints"]
    assert at["hints"] + words <= at["records"]
    assert at["records"] + 2048 * nslots <= inbox
    assert at["records"] % 4096 == at["detail"] % 4096 == 0


# --- one slot's life ----------------------------------------------------------------------------


def test_C1_C3_a_registration_is_published_by_one_word_and_marked_dirty(small: Table) -> None:
    client = small.client()
    handle = client.must_register()
    x = handle.slot
    assert small.req(x) == Word(1, client.cid, 0, False, READY)
    assert small.dirty == {x}
    assert x not in small.hints
    assert (handle.epoch, handle.generation) == (small.epoch, 1)
    assert handle.status() is HandleStatus.NOT_YET_STARTED
    assert handle.pid is None
    assert client.view.occupied() == [(x, 1)]  # though the supervisor has not seen it
    assert small.view.free_slots == 8


def test_S3_a_noticed_registration_is_accepted_once(small: Table) -> None:
    client = small.client()
    handle = client.must_register()
    assert small.settle() == [Event("accepted", handle.slot, 1, client.cid, None)]
    assert small.dirty == set()
    assert small.view.free_slots == 7
    assert small.view.in_use(handle.slot, 1)
    assert client.view.occupied() == [(handle.slot, 1)]
    # Noticed again, by the bits or by the sweep, it is nothing new.
    small.dirty = set(range(8))
    assert small.settle() == []
    assert small.sweep() == []
    assert small.view.repairs == 0


def test_S4_S5_a_run_and_a_restart_gap_are_published(small: Table) -> None:
    handle = accepted(small, small.client().must_register())
    assert handle.status() is HandleStatus.NOT_YET_STARTED
    small.view.set_running(handle.slot, 0x3FFFFF, NOW)  # the largest pid there is
    assert (handle.status(), handle.pid) == (HandleStatus.STARTED, 0x3FFFFF)
    assert not handle.ready
    small.view.set_ready(handle.slot)
    assert handle.ready
    small.view.set_stopped(handle.slot)
    assert (handle.status(), handle.pid, handle.ready) == (HandleStatus.STOPPED, None, False)
    assert handle._state != 0  # stopped, not gone
    small.view.set_running(handle.slot, 7, NOW)
    assert (handle.status(), handle.pid, handle.ready) == (HandleStatus.STARTED, 7, False)


def test_S7_a_freed_slot_is_reusable_under_the_next_generation(small: Table) -> None:
    client = small.client()
    handle = running(small, client.must_register())
    before = small.free_seq
    small.view.free(handle.slot)
    x = handle.slot
    assert small.req(x) == Word(2, 0, 0, False, FREE)
    assert client.view.status(x) == (2, NONE, False, 0)
    assert x in small.hints
    assert small.free_seq == before + 2
    assert small.view.free_slots == 8
    assert not small.view.in_use(x, 1)
    assert handle.status() is HandleStatus.STOPPED
    assert handle._state == 0
    assert handle._freed
    with pytest.raises(ValueError, match="not in use"):
        small.view.free(x)


def test_a_handle_counts_as_freed_only_when_the_inbox_agrees(small: Table) -> None:
    handle = running(small, small.client().must_register())
    published = small.req(handle.slot)
    small.view.free(handle.slot)
    freed = small.req(handle.slot)
    small.set_req(handle.slot, published.value)  # as it is between the two stores of S7
    assert handle.status() is HandleStatus.STOPPED
    assert not handle._freed
    small.set_req(handle.slot, freed.value)
    assert handle._freed


def test_a_handle_never_speaks_of_its_successor(small: Table) -> None:
    with table(1) as t:
        client = t.client()
        first = running(t, client.must_register())
        t.view.free(0)
        second = running(t, client.must_register(), pid=99)
        assert (first.slot, second.slot) == (0, 0)
        assert first != second
        assert first.status() is HandleStatus.STOPPED
        assert first.pid is None
        assert not first._set_terminate()
        assert t.settle() == []
        assert not t.req(0).term
        assert (second.status(), second.pid) == (HandleStatus.STARTED, 99)


def test_a_handle_of_another_epoch_is_stopped_and_terminates_nobody() -> None:
    with table(1) as old, table(1) as new:
        stranger = running(old, old.client().must_register())
        client = new.client()
        handle = running(new, client.must_register())
        lost = client.handle(handle.slot, handle.generation)
        assert lost == handle
        foreign = Handle(stranger.epoch, handle.slot, handle.generation, "nowhere")
        assert foreign != handle
        # It reads this table all the same, as a handle does that was unpickled here.
        with pytest.raises(AttachError):
            foreign.status()

        class Lost(_slots.SlotHandle):
            def _find_view(self) -> ClientView:
                return client.view

        foreign_here = Lost(stranger.epoch, handle.slot, handle.generation, "nowhere")
        assert foreign_here.status() is HandleStatus.STOPPED
        assert foreign_here.pid is None
        assert not foreign_here.ready
        assert not foreign_here._set_terminate()
        assert foreign_here._freed
        assert new.settle() == []
        out_of_range = Lost(new.epoch, 5, 1, "nowhere")
        assert out_of_range.status() is HandleStatus.STOPPED
        assert not out_of_range._set_terminate()


def test_handles_are_values(small: Table) -> None:
    client = small.client()
    handle = client.must_register()
    same = client.handle(handle.slot, handle.generation)
    assert same == handle
    assert hash(same) == hash(handle)
    assert len({same, handle, client.handle(handle.slot, 2)}) == 2
    assert handle != (handle.epoch, handle.slot, handle.generation)
    for field in ("epoch", "slot", "generation", "address"):
        with pytest.raises(AttributeError):
            setattr(handle, field, 0)


# --- terminating --------------------------------------------------------------------------------


def test_C5_S6_terminate_sets_one_bit_and_takes_effect_once(small: Table) -> None:
    client, other = small.client(), small.client()
    handle = running(small, client.must_register())
    elsewhere = other.handle(handle.slot, handle.generation)
    assert elsewhere._set_terminate()
    assert small.req(handle.slot) == Word(1, client.cid, 0, True, READY)
    assert small.dirty == {handle.slot}
    assert small.settle() == [Event("terminated", handle.slot, 1, client.cid, None)]
    assert handle._set_terminate()  # again: no error, no effect
    small.dirty = {handle.slot}
    assert small.settle() == []
    assert small.sweep() == []
    assert handle.status() is HandleStatus.STARTED  # until the supervisor says otherwise


def test_terminate_before_acceptance_cancels(small: Table) -> None:
    client = small.client()
    handle = client.must_register()
    handle._set_terminate()
    assert small.settle() == [Event("cancelled", handle.slot, 1, client.cid, None)]
    assert handle.status() is HandleStatus.STOPPED
    detail = client.view.detail(handle.slot, 1)
    assert detail is not None
    assert (detail[0], detail[4]) == (KIND["cancelled"], True)
    assert all_free(small)


def test_terminate_between_acceptance_and_start_and_in_a_gap_is_noticed(small: Table) -> None:
    client = small.client()
    waiting = accepted(small, client.must_register())
    gap = running(small, client.must_register())
    small.view.set_stopped(gap.slot)
    for handle in (waiting, gap):
        assert handle._set_terminate()
    events = small.settle()
    assert {(e.action, e.slot) for e in events} == {
        ("terminated", waiting.slot),
        ("terminated", gap.slot),
    }


def test_a_supervisor_that_stops_cancels_what_it_does_not_know_yet(small: Table) -> None:
    client = small.client()
    known = accepted(small, client.must_register())
    late = client.must_register(parallel=True)
    small.view.accepting = False
    assert not small.view.accepting
    assert small.settle() == [Event("cancelled", late.slot, 1, client.cid, None)]
    assert late.status() is HandleStatus.STOPPED
    assert small.token(small.req(late.slot).token)[1:] == (0, 0, False, FREE)
    assert small.view.in_use(known.slot, 1)


# --- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("nslots", SIZES)
def test_every_slot_can_be_taken_once_and_no_more(nslots: int) -> None:
    with table(nslots, min(nslots, 3)) as t:
        for _ in range(3):
            assert_usable(t)
        assert {t.view.generation(x) for x in range(nslots)} == {4}
        assert t.view.generation(nslots) == 0
        assert t.view.repairs == 0


def test_the_largest_table_has_a_first_and_a_last_slot() -> None:
    with table(LARGEST, 1024) as t:
        client = t.client()
        for x in (0, 1, 63, 64, 16384, LARGEST // 2, LARGEST - 1):
            t.hints = {x}  # the only slot that a claim looks at first
            handle = running(t, client.must_register(image(name=b"slot")))
            assert handle.slot == x
            assert client.view.detail(x, 1)[11] == "slot"  # type: ignore[index]
            assert client.view.slot_of_pid(4711) == (x, 1)
            t.view.free(x)
            assert handle.status() is HandleStatus.STOPPED
            assert t.hints == {x}
        t.sweep()
        assert len(t.hints) == LARGEST


def test_only_used_parts_of_a_large_table_take_memory() -> None:
    def resident(fd: int) -> int:
        return os.fstat(fd).st_blocks * 512

    with table(LARGEST, 1024) as t:
        empty = resident(t.outbox) + resident(t.inbox)
        # Status and control words, bits and tokens: the rest of the 192 bytes is private.
        assert empty <= LARGEST * 130 + 1024 * 64 + 10 * 4096
        client = t.client()
        for x in (0, 1000, 200_000):
            t.hints = {x}
            accepted(t, client.must_register())
        # A record and a detail come with their neighbours, 64 slots at a time.
        assert resident(t.outbox) + resident(t.inbox) == empty + 3 * 64 * (2048 + 2048)
        t.hints = {1}
        accepted(t, client.must_register())
        assert resident(t.outbox) + resident(t.inbox) == empty + 3 * 64 * (2048 + 2048)


def test_a_small_table_is_populated_from_the_start() -> None:
    with table(1024, 8) as t:
        assert os.fstat(t.outbox).st_blocks * 512 == t.sizes[0]
        assert os.fstat(t.inbox).st_blocks * 512 == t.sizes[1]


# --- noticing -----------------------------------------------------------------------------------


def test_one_pass_is_bounded_and_nothing_is_forgotten() -> None:
    assert LOOKS <= 1024
    with table(2048) as t:
        client = t.client()
        handles = [client.must_register() for _ in range(LOOKS + 100)]
        assert len(t.drain()) == LOOKS
        assert t.view.pending == 100
        assert t.dirty == set()
        assert not t.view.prepare_sleep()
        # What comes meanwhile is not starved by what waits, and does not starve it.
        handles[0]._set_terminate()
        events = t.drain()
        assert sorted(e.action for e in events) == ["accepted"] * 100 + ["terminated"]
        assert t.view.pending == 0
        assert t.view.prepare_sleep()


def test_what_is_marked_over_and_over_does_not_keep_others_from_being_looked_at() -> None:
    with table(4096) as t:
        client = t.client()
        t.hints = {4095}
        handle = client.must_register()
        for _ in range(4096 // LOOKS + 1):
            t.dirty = t.dirty | set(range(4095))
            if any(e.slot == handle.slot for e in t.drain()):
                break
        else:
            pytest.fail("not looked at in the passes that all slots take")


def test_the_dirty_bits_of_a_table_are_taken_by_words(small: Table) -> None:
    small.dirty = set(range(64))  # 56 of them are damage: there are 8 slots
    assert small.settle() == []
    assert small.view.pending == 0
    assert small.dirty == set()


def test_a_sleeping_supervisor_is_rung_once_by_each_process(small: Table) -> None:
    client, other = small.client(), small.client()
    assert not client.view.sleeping
    client.must_register()
    assert client.rings() == 0  # it is awake and will look
    small.settle()

    assert small.view.prepare_sleep()
    assert client.view.sleeping
    assert small.sleep_word % 2 == 1
    first = client.must_register()
    assert client.rings() == 1
    client.must_register()
    first._set_terminate()
    assert client.rings() == 0  # rung already, for this sleep
    other.must_register()
    assert other.rings() == 1

    small.view.awake()
    assert small.sleep_word % 2 == 0
    small.view.awake()  # awake already: nothing changes
    assert small.sleep_word % 2 == 0
    small.settle()
    client.must_register()
    assert client.rings() == 0
    small.settle()
    assert small.view.prepare_sleep()  # a new sleep, a new bell
    client.must_register()
    assert client.rings() == 1


def test_the_passes_of_the_loop_are_counted_by_their_length(small: Table) -> None:
    client = small.client()
    assert client.view.pauses == (0, [0] * 24)
    for ns in (0, 999, 1_000, 1_999, 2_000, 1_000_000, 3_600_000_000_000):
        small.view.note_pass(ns)
    longest, pauses = client.view.pauses
    assert longest == 3_600_000_000_000
    assert {i: count for i, count in enumerate(pauses) if count} == {0: 2, 1: 2, 2: 1, 10: 1, 23: 1}


def test_a_supervisor_does_not_fall_asleep_over_a_change(small: Table) -> None:
    client = small.client()
    client.must_register()
    before = small.sleep_word
    assert not small.view.prepare_sleep()
    # Even again, yet another value: who rang for the odd one in between must ring anew.
    assert small.sleep_word == before + 2
    small.settle()
    assert small.view.prepare_sleep()


def test_a_full_or_broken_connection_does_not_fail_a_registration(small: Table) -> None:
    client, other = small.client(), small.client()
    sock = client.sock
    with suppress(BlockingIOError):
        while True:
            sock.send(bytes(16), socket.MSG_DONTWAIT)
    other.doors.close()
    assert small.view.prepare_sleep()
    assert client.must_register().status() is HandleStatus.NOT_YET_STARTED
    assert other.must_register().status() is HandleStatus.NOT_YET_STARTED  # nor is there SIGPIPE
    assert [e.action for e in small.settle()] == ["accepted"] * 2


# --- free hints and refusals --------------------------------------------------------------------


def test_hints_that_were_lost_are_done_without_and_set_again_by_the_sweep() -> None:
    with table(65) as t:
        client = t.client()
        t.hints = set()
        handles = [client.must_register() for _ in range(65)]
        assert len({h.slot for h in handles}) == 65
        assert client.register() == NO_SLOT
        t.settle()
        for handle in handles[:30]:
            t.view.free(handle.slot)
        t.hints = set()
        t.sweep()
        assert t.hints == {h.slot for h in handles[:30]}


def test_stale_hints_are_cleared_on_the_way(small: Table) -> None:
    client = small.client()
    handles = [client.must_register() for _ in range(7)]
    small.settle()
    free = set(range(8)) - {h.slot for h in handles}
    small.hints = set(range(8))
    assert {client.must_register().slot} == free
    assert free & small.hints == set()
    small.settle()
    small.hints = set(range(8))
    assert client.register() == NO_SLOT
    assert small.hints == set()


def test_hints_beyond_the_table_lead_nowhere() -> None:
    with table(65) as t:
        t.inbox_map[t.at["hints"] : t.at["hints"] + 16] = b"\xff" * 16
        client = t.client()
        assert {client.must_register().slot for _ in range(65)} == set(range(65))
        assert client.register() == NO_SLOT


def test_a_full_table_refuses_without_a_look_at_the_words(small: Table) -> None:
    client = small.client()
    for _ in range(8):
        client.must_register()
    small.settle()
    assert small.view.free_slots == 0
    # A word that looks free would be found by a scan.
    honest = small.req(3)
    small.set_req(3, word(1, 0, 0, FREE))
    assert client.register() == NO_SLOT
    small.set_req(3, honest.value)


def test_a_table_full_of_what_the_supervisor_does_not_know_refuses_after_a_scan(
    small: Table,
) -> None:
    client = small.client()
    for _ in range(8):
        client.must_register()
    assert small.view.free_slots == 8  # published, not accepted
    assert client.register() == NO_SLOT
    assert [e.action for e in small.settle()] == ["accepted"] * 8


def test_a_refusal_in_the_middle_of_a_free_is_not_taken_for_exact(small: Table) -> None:
    client = small.client()
    handles = [client.must_register() for _ in range(8)]
    small.settle()
    before = small.free_seq
    small.free_seq = before + 1  # the supervisor was stopped inside S7
    assert client.register() == AGAIN
    assert client.register(parallel=True) == AGAIN
    assert small.token(client.cid % 4).state == FREE  # given back
    small.free_seq = before
    assert client.register() == NO_SLOT
    small.view.free(handles[0].slot)
    assert client.must_register().slot == handles[0].slot


def test_clients_begin_to_search_at_different_places() -> None:
    with table(1024) as t:
        slots = [t.client().must_register().slot for _ in range(10)]
        assert len(set(slots)) == 10
        assert len({s // 64 for s in slots}) > 3  # and so contend for different words of hints


def test_a_record_that_is_too_short_is_an_error_before_anything_is_claimed(small: Table) -> None:
    client = small.client()
    with pytest.raises(ValueError, match="not a record image"):
        client.register(record()[:-1])
    with pytest.raises(ValueError, match="not a record image"):
        small.view.register(b"", NOW)
    assert all_free(small)


# --- tokens -------------------------------------------------------------------------------------


def test_a_parallel_registration_takes_a_token_and_gives_it_back_with_its_slot(
    small: Table,
) -> None:
    client = small.client()
    handle = client.must_register(parallel=True)
    index = small.req(handle.slot).token - 1
    assert small.token(index) == Word(1, client.cid, 0, False, CLAIMED)
    accepted(small, handle)
    assert small.token(index) == Word(1, client.cid, 0, False, CLAIMED)
    small.view.free(handle.slot)
    assert small.token(index) == Word(2, 0, 0, False, FREE)


def test_the_parallel_limit_holds_whether_or_not_the_supervisor_has_looked(small: Table) -> None:
    one, two = small.client(), small.client()
    handles = [c.must_register(parallel=True) for c in (one, two, one, two)]
    assert one.register(parallel=True) == LIMIT
    assert two.register(parallel=True) == LIMIT
    small.settle()
    assert one.register(parallel=True) == LIMIT
    plain = one.must_register()  # the limit is for parallel ones alone
    assert small.req(plain.slot).token == 0
    small.view.free(handles[2].slot)
    again = two.must_register(parallel=True)
    assert small.token(small.req(again.slot).token - 1).generation == 2
    assert one.register(parallel=True) == LIMIT


def test_without_tokens_nothing_parallel_is_registered() -> None:
    with table(4, 0) as t:
        assert t.client().register(parallel=True) == LIMIT
        assert t.view.register(record(parallel=True), NOW) == LIMIT
        assert all_free(t)


def test_a_token_is_given_back_if_there_is_no_slot_for_it() -> None:
    with table(1, 2) as t:
        client = t.client()
        accepted(t, client.must_register())
        for _ in range(3):
            assert client.register(parallel=True) == NO_SLOT
        assert [t.token(i) for i in range(2)] == [Word(1, 0, 0, False, FREE)] * 2


@pytest.mark.parametrize("ntokens", [1, 4, 1024])
def test_all_tokens_can_be_taken_at_once(ntokens: int) -> None:
    with table(1024, ntokens) as t:
        client = t.client()
        taken = [client.must_register(parallel=True) for _ in range(ntokens)]
        assert client.register(parallel=True) == LIMIT  # asked for first, before a slot
        assert len({t.req(h.slot).token for h in taken}) == ntokens
        t.settle()
        for handle in taken:
            t.view.free(handle.slot)
        assert all_free(t)


# --- details ------------------------------------------------------------------------------------


def test_a_detail_tells_the_whole_story(small: Table) -> None:
    client = small.client()
    handle = client.must_register(
        image_of(
            name="reports",
            type="etl",
            flags=Flags.SHMEM_ACCESS,
            start_time=worker_module.StartTime.SUPERVISOR_START,
            restart_time=2.5,
        )
    )
    early = client.view.detail(handle.slot, 1)  # its record, before the supervisor says anything
    assert early is not None
    assert early[11:13] == ("reports", "etl")
    small.settle()
    x = handle.slot
    told = client.view.detail(x, 1)
    assert told is not None
    registered = told[8]  # by the client's clock: some time before the supervisor noticed
    assert NOW - 60_000_000_000 < registered < NOW
    head = (1, 0, 2_500_000_000, registered)
    assert told == (
        0, 0, 0, 0, False, *head, 0, 0, "reports", "etl", "", "",
    )  # fmt: skip
    small.view.set_running(x, 4711, NOW + 1)
    small.view.set_activity(x, b"counting")
    assert client.view.detail(x, 1) == (
        0, 0, 0, 0, False, *head, NOW + 1, 0, "reports", "etl", "counting", "",
    )  # fmt: skip
    small.view.set_outcome(x, KIND["exited"], 1, 0, 0, False, NOW + 2, b"Traceback\n\tboom")
    small.view.set_stopped(x)
    ended = (KIND["exited"], 1, 0, 0, False, *head, NOW + 1, NOW + 2, "reports", "etl")
    assert client.view.detail(x, 1) == (*ended, "counting", "Traceback\n\tboom")
    small.view.set_running(x, 4712, NOW + 3)  # a clean sheet for the next run, the outcome kept
    detail = client.view.detail(x, 1)
    assert detail is not None
    assert (detail[0], detail[9], detail[13]) == (KIND["exited"], NOW + 3, "")
    small.view.set_outcome(x, KIND["signaled"], 0, 9, 1, True, NOW + 4, b"")
    small.view.free(x)
    detail = client.view.detail(x, 1)
    assert detail is not None
    assert detail[:5] == (KIND["signaled"], 0, 9, 1, True)
    assert detail[14] == ""


def test_a_slot_keeps_the_details_of_two_generations() -> None:
    with table(1) as t:
        client = t.client()
        for generation in range(1, 6):
            running(t, client.must_register(image(name=b"run %d" % generation)))
            t.view.set_outcome(0, KIND["exited"], generation, 0, 0, True, NOW, b"")
            known = [g for g in range(1, 8) if client.view.detail(0, g) is not None]
            assert known == [g for g in (generation - 1, generation) if g]
            t.view.free(0)
            detail = client.view.detail(0, generation)
            assert detail is not None
            assert (detail[1], detail[11]) == (generation, f"run {generation}")
        assert client.view.detail(0, 6) is None  # not yet
        assert client.view.detail(1, 1) is None  # no such slot


def test_a_detail_left_half_written_is_no_detail_and_no_hang(small: Table) -> None:
    client = small.client()
    handle = accepted(small, client.must_register())
    at = small.at["detail"] + 2048 * handle.slot + 1024  # that of odd generations
    seq = small.get(small.outbox_map, at)
    small.put(small.outbox_map, at, seq + 1)
    assert client.view.detail(handle.slot, 1) is None
    small.view.set_activity(handle.slot, b"again")  # the next writer finishes the sequence
    detail = client.view.detail(handle.slot, 1)
    assert detail is not None
    assert detail[13] == "again"


NAMES = {
    b"plain name": "plain name",
    "Grüße, 世界 🎉".encode(): "Grüße, 世界 🎉",
    b"two\nlines\r\x00and\x1b[31m more\x7f": "two?lines??and?[31m more?",
    "c1 \x85\x9b, \u2028 \u2029".encode(): "c1 ??, ? ?",
    "\u202eeman\u202c \u200e\u200f\u061c\u2066\u2069".encode(): "?eman? ?????",
    b"\xff\xfe\x80": "???",
    b"overlong \xc0\xaf \xe0\x80\xaf \xf0\x80\x80\xaf": "overlong ?? ??? ????",
    b"surrogate \xed\xa0\x80": "surrogate ???",
    b"too far \xf4\x90\x80\x80 \xf8\x88\x80\x80\x80": "too far ???? ?????",
    b"cut off \xe4\xb8": "cut off ??",
    b"": "",
}


@pytest.mark.parametrize(("raw", "shown"), NAMES.items(), ids=range(len(NAMES)))
def test_a_name_is_shown_without_what_could_forge_a_line(
    small: Table, raw: bytes, shown: str
) -> None:
    client = small.client()
    handle = accepted(small, client.must_register(image(name=raw, type=raw)))
    detail = client.view.detail(handle.slot, 1)
    assert detail is not None
    assert detail[11:13] == (shown, shown)
    small.view.set_activity(handle.slot, raw)
    assert client.view.detail(handle.slot, 1)[13] == shown  # type: ignore[index]


def test_a_rejected_record_with_a_name_of_any_length_is_shown_without_one(small: Table) -> None:
    client = small.client()
    handle = client.must_register(image(name=b"n" * 95))
    small.write_record(handle.slot, (1000).to_bytes(4, "little"), 16)  # name_len
    assert [e.action for e in small.settle()] == ["rejected"]
    detail = client.view.detail(handle.slot, 1)
    assert detail is not None
    assert detail[11:13] == ("", "type")


def test_long_texts_are_cut_between_characters(small: Table) -> None:
    client = small.client()
    handle = accepted(small, client.must_register())
    small.view.set_activity(handle.slot, "é".encode() * 60)
    small.view.set_outcome(handle.slot, KIND["exited"], 1, 0, 0, False, NOW, "€".encode() * 400)
    detail = client.view.detail(handle.slot, 1)
    assert detail is not None
    assert detail[13] == "é" * 31  # 62 of 63 bytes
    assert detail[14] == "€" * 170  # 510 of 511
    small.view.set_activity(handle.slot, b"a" * 63)
    assert client.view.detail(handle.slot, 1)[13] == "a" * 63  # type: ignore[index]


# --- looking around -----------------------------------------------------------------------------


def test_running_workers_are_found_by_their_pid(small: Table) -> None:
    client = small.client()
    one, two = (
        running(small, client.must_register(), 11),
        running(small, client.must_register(), 12),
    )
    assert client.view.slot_of_pid(11) == (one.slot, 1)
    assert client.view.slot_of_pid(12) == (two.slot, 1)
    assert client.view.slot_of_pid(13) is None
    assert client.view.slot_of_pid(0) is None  # what idle slots have
    small.view.set_stopped(one.slot)
    assert client.view.slot_of_pid(11) is None


def test_what_is_not_there_is_an_error_or_nothing(small: Table) -> None:
    client = small.client()
    with pytest.raises(ValueError, match="no such slot"):
        client.view.status(8)
    for call in (
        small.view.record,
        small.view.registration,
        small.view.set_ready,
        small.view.set_stopped,
        small.view.free,
        lambda slot: small.view.set_running(slot, 1, NOW),
        lambda slot: small.view.set_activity(slot, b""),
        lambda slot: small.view.set_outcome(slot, 1, 0, 0, 0, True, NOW, b""),
    ):
        for slot in (0, 8, 2**32 - 1):
            with pytest.raises(ValueError, match="not in use"):
                call(slot)
    assert small.view.generation(8) == 0
    assert not small.view.in_use(8, 1)
    assert not small.view.in_use(0, 1)


def test_the_phase_is_told_to_all(small: Table) -> None:
    client = small.client()
    assert client.view.phase == 0
    small.view.set_phase(3 | 2 << 8)
    assert client.view.phase == 3 | 2 << 8


def test_static_workers_take_slots_and_tokens_like_others(small: Table) -> None:
    client = small.client()
    assert small.view.register(record(), NOW) == 0
    assert small.view.register(record(parallel=True), NOW) == 1
    assert small.req(0) == Word(1, 0, 0, False, READY)
    assert small.req(1) == Word(1, 0, 1, False, READY)
    assert small.token(0) == Word(1, 0, 0, False, CLAIMED)
    assert small.hints == set(range(2, 8))
    assert small.view.free_slots == 6
    assert client.view.occupied() == [(0, 1), (1, 1)]
    assert small.sweep() == []  # owner 0 is the supervisor, and no damage
    for _ in range(3):
        client.must_register(parallel=True)
    assert client.register(parallel=True) == LIMIT
    client.handle(0, 1)._set_terminate()
    assert {e.action for e in small.settle()} == {"accepted", "terminated"}
    small.view.free(1)
    assert small.token(0) == Word(2, 0, 0, False, FREE)
    for _ in range(4):
        assert small.view.register(record(), NOW) >= 0
    assert small.view.register(record(), NOW) == NO_SLOT
    assert small.view.register(record(parallel=True), NOW) == NO_SLOT


# --- both ends of the segments ------------------------------------------------------------------


def sealed(t: Table) -> Table:
    """As the supervisor seals them, its own mappings being there already."""
    fixed = _kernel.F_SEAL_SHRINK | _kernel.F_SEAL_GROW | _kernel.F_SEAL_SEAL
    _kernel.add_seals(t.outbox, fixed | _kernel.F_SEAL_FUTURE_WRITE)
    _kernel.add_seals(t.inbox, fixed)
    return t


def test_nobody_but_the_supervisor_can_write_to_the_outbox(small: Table) -> None:
    sealed(small)
    with pytest.raises(PermissionError):
        mmap.mmap(small.outbox, small.sizes[0])
    with pytest.raises(PermissionError):
        os.pwrite(small.outbox, b"x", 0)
    for fd in (small.outbox, small.inbox):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 1 << 30)
        with pytest.raises(PermissionError):
            _kernel.add_seals(fd, _kernel.F_SEAL_WRITE)
    assert_usable(small)  # the mappings made before the seals work


def test_a_hole_punched_into_the_inbox_is_damage_like_any_other(small: Table) -> None:
    sealed(small)
    client = small.client()
    handle = running(small, client.must_register(parallel=True))
    small.inbox_map[:] = bytes(len(small.inbox_map))  # a hole reads as zeros
    events = small.sweep()
    assert {e.action for e in events} == {"repaired"}
    assert len(events) == 8
    assert handle.status() is HandleStatus.STARTED
    assert small.req(handle.slot).state == READY
    small.view.free(handle.slot)
    assert_usable(small)


def test_segments_of_another_kind_are_refused(small: Table) -> None:
    def attach(outbox: int, inbox: int) -> str:
        with pytest.raises(AttachError) as info:
            ClientView(outbox, inbox, -1, -1, 1, "there")
        assert info.value.detail is not None
        return info.value.detail

    with table(9, 4) as other:
        assert "sizes" in attach(small.outbox, other.inbox)
    assert attach(small.inbox, small.outbox) == "not a pgbgw segment"
    tiny = _kernel.memfd(b"tiny", 100)
    try:
        assert attach(tiny, small.inbox) == "not a pgbgw segment"
    finally:
        os.close(tiny)
    for offset, problem in (
        (0, "not a pgbgw segment"),
        (8, "another version"),
        (20, "another version"),
        (24, "another version"),
        (32, "header is damaged"),
        (40, "header is damaged"),
        (80, "header is damaged"),
    ):
        before = small.outbox_map[offset]
        small.outbox_map[offset] = before ^ 1
        assert problem in attach(small.outbox, small.inbox)
        small.outbox_map[offset] = before
    small.client()


def test_descriptors_that_are_no_segments_are_os_errors(small: Table) -> None:
    with pytest.raises(OSError) as info:
        ClientView(-1, small.inbox, -1, -1, 1, "there")
    assert info.value.errno == errno.EBADF
    empty = _kernel.memfd(b"empty", 0)
    try:
        with pytest.raises(OSError):
            ClientView(empty, small.inbox, -1, -1, 1, "there")
        with pytest.raises(OSError):
            SupervisorView(empty, small.inbox, 8, 4, 1)
    finally:
        os.close(empty)


def test_a_closed_client_is_closed_for_good(small: Table) -> None:
    client = small.client()
    handle = client.must_register()
    client.view.close()
    client.view.close()
    assert not client.view.usable
    for operation in (
        lambda: client.register(),
        lambda: client.view.epoch,
        lambda: client.view.status(0),
        lambda: client.view.occupied(),
        lambda: client.view.detail(0, 1),
        lambda: client.view.supervisor_gone(),
        lambda: client.handle(0, 1),
        lambda: handle.status(),  # it knows no other table
    ):
        with pytest.raises(AttachError):
            operation()


def test_a_forked_child_has_no_part_in_its_parents_table(small: Table) -> None:
    client = small.client()
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            assert not client.view.usable
            for operation in (client.register, lambda: client.view.epoch):
                try:
                    operation()
                except WrongProcessError:
                    status = 0
                else:
                    os._exit(98)
            client.view.close()  # and closing it is harmless
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert_usable(small)


def test_a_dead_supervisor_is_told_from_a_worker_that_stopped() -> None:
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    with table(2, supervisor_pid=pid) as t:
        client = t.client()
        gone, here = client.must_register(), client.must_register()
        t.settle()
        t.view.set_running(here.slot, 4711, NOW)
        t.view.free(gone.slot)
        assert not client.view.supervisor_gone()
        os.kill(pid, signal.SIGKILL)
        # Waited for, not reaped: the pidfd says so once it is dead, not once it is reaped.
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        deadline = time.monotonic() + 10
        while not client.view.supervisor_gone():  # it looks once in a clock tick
            assert time.monotonic() < deadline
        assert here.status() is HandleStatus.SUPERVISOR_DIED
        assert here.pid is None
        assert gone.status() is HandleStatus.STOPPED
        assert client.view.supervisor_gone()
        os.waitpid(pid, 0)


def test_the_free_count_never_counts_a_slot_twice(small: Table) -> None:
    client = small.client()
    assert small.get(small.outbox_map, AT_NFREE) == 8
    for _ in range(3):
        handles = [client.must_register() for _ in range(8)]
        small.write_record(handles[0].slot, bytes(4))  # rejected
        handles[1]._set_terminate()  # cancelled
        small.settle()
        assert small.view.free_slots == 2
        for handle in handles[2:]:
            small.view.free(handle.slot)
        small.set_req(3, 0)  # repaired
        small.sweep()
        assert small.view.free_slots == 8
