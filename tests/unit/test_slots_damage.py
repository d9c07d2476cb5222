"""What dead clients and broken memory leave behind, and that the supervisor puts it right.

Damage is anything that no honest client writes: to words, tokens, bitmaps and records.  Nothing is
ever raised for it, and afterwards every slot and every token can be used again.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgbgw.worker import OUTCOME_KINDS, HandleStatus, StartTime
from support.slot_tables import (
    ACCEPTED,
    CLAIMED,
    FREE,
    INVALID,
    NOW,
    READY,
    RUNNING,
    STOPPED,
    Event,
    Handle,
    Table,
    Word,
    accepted,
    all_free,
    assert_usable,
    image,
    record,
    running,
    table,
    word,
)

KIND = {name: code for code, name in enumerate(OUTCOME_KINDS)}


@pytest.fixture
def small() -> Iterator[Table]:
    with table(8, 4) as t:
        yield t


# --- clients that are gone ----------------------------------------------------------------------


def test_S8_a_claim_and_a_token_of_a_dead_client_come_back(small: Table) -> None:
    dead, alive = small.client(), small.client()
    # Killed between the claim and the publication of a parallel registration; and between the
    # token and the slot of another.
    small.set_token(0, word(1, dead.cid, 0, CLAIMED))
    small.set_req(2, word(1, dead.cid, 1, CLAIMED))
    small.set_token(1, word(1, dead.cid, 0, CLAIMED))
    small.set_req(5, word(1, alive.cid, 0, CLAIMED))
    small.hints = small.hints - {2, 5}
    assert small.sweep() == []  # both may go on at any moment
    assert small.req(2).state == CLAIMED

    assert small.gone(dead) == [Event("reclaimed", 2, 1, 0, None)]
    assert small.req(2) == Word(2, 0, 0, False, FREE)
    assert 2 in small.hints
    assert small.token(0) == small.token(1) == Word(2, 0, 0, False, FREE)
    assert small.req(5).state == CLAIMED  # the living one's is not touched
    assert 5 not in small.hints
    assert small.view.repairs == 0
    assert small.view.free_slots == 8  # what was only claimed was never counted as used


def test_what_a_dead_client_had_published_is_accepted_with_its_token(small: Table) -> None:
    dead = small.client()
    plain, parallel = dead.must_register(), dead.must_register(parallel=True)
    small.dirty = set()  # killed before it marked them
    assert small.settle() == []
    index = small.req(parallel.slot).token - 1
    events = small.gone(dead)
    assert {(e.action, e.slot, e.cid) for e in events} == {
        ("accepted", plain.slot, dead.cid),
        ("accepted", parallel.slot, dead.cid),
    }
    assert small.token(index).state == CLAIMED
    assert small.view.in_use(parallel.slot, 1)
    small.view.free(parallel.slot)
    small.view.free(plain.slot)
    assert all_free(small)


def test_a_lost_terminate_of_a_dead_client_is_found_by_the_sweep(small: Table) -> None:
    owner, dead = small.client(), small.client()
    handle = running(small, owner.must_register())
    dead.handle(handle.slot, 1)._set_terminate()
    small.dirty = set()
    assert small.gone(dead) == [Event("terminated", handle.slot, 1, owner.cid, None)]


def test_registrations_outlive_their_client(small: Table) -> None:
    owner = small.client()
    handle = running(small, owner.must_register())
    assert small.gone(owner) == []
    assert small.view.in_use(handle.slot, 1)
    assert small.sweep() == []  # nor is its word damage now, though nobody has that cid
    assert small.view.repairs == 0
    other = small.client()
    other.handle(handle.slot, 1)._set_terminate()
    assert [e.action for e in small.settle()] == ["terminated"]


def test_a_client_id_is_used_again_only_after_a_whole_round() -> None:
    with table(40_000) as t:  # a round is three slices
        cids = [t.view.new_client() for _ in range(4095)]
        assert cids == list(range(1, 4096))
        assert t.view.new_client() == 0
        t.view.sweep(NOW)  # in mid-round
        t.view.client_gone(77)
        assert t.view.sweep_due
        for _ in range(2):  # to the end of the round that had begun before
            t.view.sweep(NOW)
            assert t.view.new_client() == 0
        t.view.sweep(NOW)
        assert not t.view.sweep_due
        assert t.view.new_client() == 77
        assert t.view.new_client() == 0


def test_client_ids_are_given_out_in_turn(small: Table) -> None:
    first = small.view.new_client()
    small.view.client_gone(first)
    small.sweep()
    assert small.view.new_client() == first + 1  # the old one rests as long as it can


def test_a_sweep_that_is_asked_for_goes_once_round_from_there() -> None:
    with table(40_000) as t:  # three slices
        t.view.sweep(NOW)
        assert not t.view.sweep_due
        t.view.request_sweep()
        for _ in range(3):
            assert t.view.sweep_due
            t.view.sweep(NOW)
        assert not t.view.sweep_due


@pytest.mark.parametrize("cid", [0, 5, 4095, 4096, 2**32 - 1])
def test_who_was_never_there_cannot_go(small: Table, cid: int) -> None:
    small.view.client_gone(cid)
    assert not small.view.sweep_due


def test_a_client_goes_once(small: Table) -> None:
    client = small.client()
    small.view.client_gone(client.cid)
    small.view.client_gone(client.cid)
    small.sweep()
    assert not small.view.sweep_due
    assert small.view.new_client() == client.cid + 1


def test_many_clients_go_in_one_round(small: Table) -> None:
    clients = [small.client() for _ in range(8)]
    for x, client in enumerate(clients):
        small.set_req(x, word(1, client.cid, 0, CLAIMED))
        small.view.client_gone(client.cid)
    events = small.sweep()
    assert [e.action for e in events] == ["reclaimed"] * 8
    assert not small.view.sweep_due


# --- damage -------------------------------------------------------------------------------------

# Words that no honest client can have written into a slot of generation 1, by what they claim.
# Cid 1 is attached, cid 9 is nobody's.
BAD_WORDS = {
    "a hole": 0,
    "all ones": 2**64 - 1,
    "invalid state": word(1, 1, 0, INVALID),
    "free with an owner": word(1, 1, 0, FREE),
    "free with a token": word(1, 0, 1, FREE),
    "free with TERM": word(1, 0, 0, FREE, True),
    "free, later generation": word(2, 0, 0, FREE),
    "free, no generation": word(0, 0, 0, FREE),
    "claimed by nobody": word(1, 9, 0, CLAIMED),
    "claimed by the supervisor": word(1, 0, 0, CLAIMED),
    "claimed with TERM": word(1, 1, 0, CLAIMED, True),
    "claimed, later generation": word(2, 1, 0, CLAIMED),
    "published by nobody": word(1, 9, 0, READY),
    "published by the supervisor": word(1, 0, 0, READY),
    "published, earlier generation": word(0, 1, 0, READY),
    "published, last generation": word(2**38 - 1, 1, 0, READY),
}


@pytest.mark.parametrize("noticed_by", ["a bit", "the sweep"])
@pytest.mark.parametrize("bad", BAD_WORDS.values(), ids=BAD_WORDS)
def test_S9_a_damaged_word_of_a_free_slot_is_repaired(
    small: Table, bad: int, noticed_by: str
) -> None:
    small.client()
    small.set_req(3, bad)
    if noticed_by == "a bit":
        small.dirty = {3}
        events = small.settle()
    else:
        events = small.sweep()
    assert [(e.action, e.slot) for e in events] == [("repaired", 3)]
    assert small.req(3) == Word(2, 0, 0, False, FREE)
    assert small.view.repairs == 1
    assert small.sweep() == []
    assert_usable(small)


@pytest.mark.parametrize("state", [ACCEPTED, RUNNING, STOPPED])
@pytest.mark.parametrize("bad", BAD_WORDS.values(), ids=BAD_WORDS)
def test_S9_a_damaged_word_of_a_used_slot_is_repaired_and_its_worker_kept(
    small: Table, bad: int, state: int
) -> None:
    client = small.client()
    handle = accepted(small, client.must_register(parallel=True))
    honest = small.req(handle.slot)
    if state != ACCEPTED:
        small.view.set_running(handle.slot, 4711, NOW)
    if state == STOPPED:
        small.view.set_stopped(handle.slot)
    status = handle.status()
    small.set_req(handle.slot, bad)
    events = small.sweep()
    assert [(e.action, e.slot) for e in events] == [("repaired", handle.slot)]
    assert small.req(handle.slot) == honest
    assert handle.status() is status
    assert small.view.in_use(handle.slot, 1)
    small.view.free(handle.slot)
    assert_usable(small)


def test_a_terminate_that_comes_with_damage_is_honoured(small: Table) -> None:
    client = small.client()
    handle = running(small, client.must_register())
    small.set_req(handle.slot, word(1, 9, 3, READY, True))  # wrong owner and token
    assert [e.action for e in small.sweep()] == ["terminated"]
    assert small.view.repairs == 1
    assert small.req(handle.slot).cid == client.cid
    # And once seen it is not taken back by more damage.
    small.set_req(handle.slot, word(1, client.cid, 0, READY))
    small.sweep()
    small.set_req(handle.slot, 0)
    assert [e.action for e in small.sweep()] == ["repaired"]
    assert small.req(handle.slot).term


def test_a_forged_claim_lives_as_long_as_the_client_it_names(small: Table) -> None:
    victim = small.client()
    small.set_req(3, word(1, victim.cid, 0, CLAIMED))
    small.set_token(2, word(1, victim.cid, 0, CLAIMED))
    assert small.sweep() == []
    small.gone(victim)
    assert all_free(small)
    assert_usable(small)


def test_a_forged_publication_is_judged_by_its_record(small: Table) -> None:
    victim = small.client()
    small.set_req(3, word(1, victim.cid, 0, READY))
    assert [e.action for e in small.sweep()] == ["rejected"]  # nobody has written a record there
    small.write_record(3, record())
    small.set_req(3, word(2, victim.cid, 0, READY))
    assert [e.action for e in small.sweep()] == ["accepted"]  # may do what clients may do
    small.view.free(3)
    assert_usable(small)


@pytest.mark.parametrize(
    "bad",
    [
        0,
        2**64 - 1,
        word(1, 9, 0, CLAIMED),
        word(1, 0, 0, CLAIMED),
        word(2, 0, 0, FREE),
        word(1, 1, 0, READY),
        word(1, 1, 3, CLAIMED),
        word(1, 1, 0, FREE),
    ],
)
def test_a_damaged_token_is_repaired(small: Table, bad: int) -> None:
    client = small.client()
    handle = accepted(small, client.must_register(parallel=True))
    bound = small.req(handle.slot).token - 1
    free = (bound + 1) % 4
    small.set_token(bound, bad)
    small.set_token(free, bad)
    small.sweep()
    assert small.token(bound) == Word(1, client.cid, 0, False, CLAIMED)
    assert small.token(free) == Word(2, 0, 0, False, FREE)
    assert small.view.repairs == 2
    small.view.free(handle.slot)
    assert_usable(small)


def test_a_registration_whose_token_was_taken_away_is_rejected(small: Table) -> None:
    client, thief = small.client(), small.client()
    handle = client.must_register(parallel=True)
    index = small.req(handle.slot).token - 1
    small.set_token(index, word(1, thief.cid, 0, CLAIMED))
    (event,) = small.settle()
    assert (event.action, event.reason) == (
        "rejected",
        "the parallel token is not the registrant's",
    )
    assert handle.status() is HandleStatus.STOPPED
    small.gone(thief)
    assert all_free(small)


@pytest.mark.parametrize("token", [5, 4, 2046, 2047])
def test_a_registration_that_names_no_token_of_its_own_is_rejected(
    small: Table, token: int
) -> None:
    client = small.client()
    handle = client.must_register()
    small.write_record(handle.slot, record(parallel=True))
    small.set_req(handle.slot, word(1, client.cid, token, READY))
    assert [e.action for e in small.settle()] == ["rejected"]
    assert all_free(small)


def test_a_token_is_bound_to_one_slot_alone(small: Table) -> None:
    client = small.client()
    honest = accepted(small, client.must_register(parallel=True))
    forger = client.must_register(record(parallel=True))
    token = small.req(honest.slot).token
    small.set_req(forger.slot, word(1, client.cid, token, READY))
    assert [e.action for e in small.settle()] == ["rejected"]
    assert small.token(token - 1).state == CLAIMED
    assert small.view.in_use(honest.slot, 1)
    small.view.free(honest.slot)
    assert all_free(small)


def test_a_registration_in_the_midst_of_damage_may_be_lost_but_nothing_else_is(
    small: Table,
) -> None:
    client = small.client()
    for x in range(8):
        small.set_req(x, word(2, 0, 0, FREE))  # looks free; the supervisor knows better
    lost = client.must_register(parallel=True)
    assert lost.generation == 2
    assert [e.action for e in small.sweep()] == ["repaired"] * 8
    assert not small.view.in_use(lost.slot, 2)
    small.gone(client)  # with it goes its token, which no slot names any more
    assert all_free(small)
    assert_usable(small)


REJECTED: dict[str, tuple[dict[str, object], str]] = {
    "no version": ({"version": 0}, "unknown version"),
    "a later version": ({"version": 2}, "unknown version"),
    "a name of 96 bytes": ({"name_len": 96}, "length"),
    "a name of 4 GiB": ({"name_len": 2**32 - 1}, "length"),
    "a type of 96 bytes": ({"type_len": 96}, "length"),
    "an entry of 512 bytes": ({"entry_len": 512}, "length"),
    "an entry of 4 GiB": ({"entry_len": 2**32 - 1}, "length"),
    "129 bytes of extra": ({"extra_len": 129}, "length"),
    "a payload of 1025 bytes": ({"payload_len": 1025}, "length"),
    "a payload of 4 GiB": ({"payload_len": 2**32 - 1}, "length"),
    "no entry": ({"entry": b""}, "entry point is empty"),
    "unknown flags": ({"flags": 4}, "unknown flags"),
    "all flags": ({"flags": 2**32 - 1}, "unknown flags"),
    "no such start time": ({"start_time": 3}, "start time"),
    "a database without memory": ({"flags": 2}, "database"),
    "a database at the very start": ({"flags": 3, "start_time": 0}, "database"),
    "a negative interval": ({"restart_ns": -2}, "interval"),
    "a long interval": ({"restart_ns": 86_400_000 * 10**9 + 1}, "interval"),
    "a negative timeout": ({"stop_timeout_ns": -2}, "interval"),
    "a long timeout": ({"stop_timeout_ns": 2**63 - 1}, "interval"),
    "a token it has not": ({"flags": 0x10}, "token"),
}


@pytest.mark.parametrize(("fields", "reason"), REJECTED.values(), ids=REJECTED)
def test_a_record_that_cannot_run_is_rejected_with_its_reason(
    small: Table, fields: dict[str, object], reason: str
) -> None:
    client = small.client()
    handle = client.must_register()
    small.write_record(handle.slot, image(**fields))  # what check() would not have let through
    (event,) = small.settle()
    assert (event.action, event.slot, event.cid) == ("rejected", handle.slot, client.cid)
    assert event.reason is not None
    assert reason in event.reason
    assert handle.status() is HandleStatus.STOPPED
    detail = client.view.detail(handle.slot, 1)
    assert detail is not None
    assert (detail[0], detail[4], detail[14]) == (KIND["rejected"], True, event.reason)
    assert detail[6] in list(StartTime)  # fit to be shown, whatever the record said
    assert small.view.repairs == 0
    assert all_free(small)
    assert_usable(small)


@pytest.mark.parametrize("restart_ns", [0, 1, 86_400_000 * 10**9])
def test_a_parallel_record_that_wants_to_be_restarted_is_rejected(
    small: Table, restart_ns: int
) -> None:
    client = small.client()
    handle = client.must_register(image(flags=0x10, restart_ns=restart_ns), parallel=True)
    (event,) = small.settle()
    assert event.reason == "parallel workers cannot be restarted"
    assert handle.status() is HandleStatus.STOPPED
    assert all_free(small)


def test_a_token_without_the_flag_is_rejected_and_given_back(small: Table) -> None:
    client = small.client()
    client.must_register(image(flags=0), parallel=True)
    (event,) = small.settle()
    assert event.reason == "the parallel flag and the parallel token do not agree"
    assert all_free(small)


def test_the_widest_record_is_accepted(small: Table) -> None:
    """The other side of each limit above."""
    client = small.client()
    for fields in (
        {"restart_ns": 0, "stop_timeout_ns": 0, "start_time": 0},
        {"restart_ns": 86_400_000 * 10**9, "stop_timeout_ns": 86_400_000 * 10**9},
        {"flags": 3, "start_time": 1},
        {"name": b"", "type": b"", "entry": b"e" * 511},
        {"name": b"n" * 95, "type": b"t" * 95, "extra": b"x" * 128, "payload": b"p" * 1024},
    ):
        accepted(small, client.must_register(image(**fields)))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_damage_to_the_inbox_is_more_than_repaired(data: st.DataObject) -> None:
    """Random bytes anywhere in the inbox, several times, between honest work."""
    with table(65, 4) as t:
        rogue, honest = t.client(), t.client()
        words = st.one_of(
            st.integers(0, 2**64 - 1),
            st.builds(
                word,
                st.integers(0, 3),
                st.sampled_from([0, 1, 2, 3, 9, 4095]),
                st.sampled_from([0, 1, 4, 5, 2047]),
                st.integers(0, 3),
                st.booleans(),
            ),
        )
        running_slots = {}
        for _ in range(data.draw(st.integers(1, 4))):
            handle = honest.register(parallel=data.draw(st.booleans()))
            for x in data.draw(st.lists(st.integers(0, 64), max_size=8)):
                t.set_req(x, data.draw(words))
            for i in data.draw(st.lists(st.integers(0, 3), max_size=4)):
                t.set_token(i, data.draw(words))
            for x in data.draw(st.lists(st.integers(0, 64), max_size=4)):
                t.write_record(x, data.draw(st.binary(min_size=1, max_size=200)))
            where = data.draw(st.sampled_from(["dirty", "hints", "header", "nothing"]))
            at = {"header": 0, "nothing": t.sizes[1] - 16}.get(where, t.at.get(where, 0))
            t.inbox_map[at : at + 16] = data.draw(st.binary(min_size=16, max_size=16))
            for event in t.settle() + t.sweep():
                if event.action == "accepted":
                    t.view.set_running(event.slot, 4711, NOW)
                    running_slots[event.slot] = event.generation
            if isinstance(handle, Handle):
                assert handle.status() in HandleStatus
        assert running_slots.items() >= {
            (x, t.view.generation(x)) for x in range(65) if t.view.in_use(x, t.view.generation(x))
        }
        # Those that run are not harmed; all else is free again when both are gone.
        for client in (rogue, honest):
            t.gone(client)
        for x, generation in running_slots.items():
            assert t.view.in_use(x, generation)
            t.view.free(x)
        assert all_free(t)
        assert_usable(t)


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=0, max_size=2048), st.integers(0, 2047))
def test_no_record_is_more_than_rejected(garbage: bytes, offset: int) -> None:
    with table(2, 1) as t:
        client = t.client()
        handle = client.must_register(image(payload=b"p" * 1000))
        t.write_record(handle.slot, garbage[: 2048 - offset], offset)
        (event,) = t.settle()
        detail = client.view.detail(handle.slot, 1)
        assert detail is not None
        if event.action == "accepted":
            t.view.registration(handle.slot)
            assert len(t.view.record(handle.slot)) <= 2048
            t.view.free(handle.slot)
        else:
            assert event.action == "rejected"
        assert all_free(t)
