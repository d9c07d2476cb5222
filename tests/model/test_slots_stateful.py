"""The slot table against a reference model: random histories, compared after every step.

The model is the sequential specification of the protocol: a table of slots, each with a generation
and a status, one sequential process that accepts, starts, stops and frees, and clients that
register, terminate and ask, die at awkward moments, and come again.  What is left to chance in the
real table (which slot, which token) the model is told, and checks that it was to be had.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from pgbgw._slots import LIMIT, NO_SLOT, ClientView, SlotHandle
from pgbgw.worker import OUTCOME_KINDS, HandleStatus
from support.slot_tables import (
    CLAIMED,
    FREE,
    NOW,
    READY,
    Event,
    Handle,
    SlotClient,
    Table,
    Word,
    image,
    record,
    word,
)

seldom = st.sampled_from([False, False, False, False, True])
SIZES = st.sampled_from([(1, 0), (1, 1), (2, 1), (3, 2), (64, 2), (65, 3)])
MAX_CLIENTS = 3
REJECTED, CANCELLED = OUTCOME_KINDS.index("rejected"), OUTCOME_KINDS.index("cancelled")


@dataclass
class Slot:
    """What the model knows of a slot."""

    generation: int = 1
    status: str = "free"  # claimed, pending, accepted, running, stopped
    cid: int = 0
    token: int = 0  # index + 1
    terminate: bool = False  # as in the inbox
    noticed: bool = False  # the supervisor has told of the terminate
    bad: bool = False  # its record cannot be run
    pid: int = 0
    ready: bool = False  # while it runs
    fates: dict[int, int] = field(default_factory=dict)  # kinds of past generations' outcomes

    @property
    def published(self) -> bool:
        return self.status not in ("free", "claimed")

    @property
    def known(self) -> bool:
        """To the supervisor."""
        return self.status in ("accepted", "running", "stopped")

    def free(self, kind: int = 0) -> None:
        self.fates[self.generation] = kind
        self.generation += 1
        self.status, self.cid, self.token, self.pid = "free", 0, 0, 0
        self.terminate = self.noticed = self.bad = False


class Foreign(SlotHandle):
    """A handle from another epoch, asked here."""

    view: ClientView

    def _find_view(self) -> ClientView:
        return self.view


class SlotTable(RuleBasedStateMachine):
    handles = Bundle("handles")
    claims = Bundle("claims")

    @initialize(size=SIZES)
    def start(self, size: tuple[int, int]) -> None:
        self.nslots, self.ntokens = size
        self.table = Table(*size)
        self.view = self.table.view
        self.clients: list[SlotClient] = []
        self.slots = [Slot() for _ in range(self.nslots)]
        self.tokens = [1] * self.ntokens  # their generations
        self.holders: dict[int, int] = {}  # token index -> cid, while it is taken
        self.dirty: set[int] = set()
        self.gone: set[int] = set()  # cids whose round is due
        self.accepting = True
        self.asleep = False
        self.rung: set[int] = set()  # cids, for this sleep
        self.pids = 1000
        self.attach()

    def some(self, *statuses: str) -> bool:
        return any(s.status in statuses for s in self.slots)

    def teardown(self) -> None:
        if hasattr(self, "table"):
            del self.view
            self.table.close()

    # --- clients ----------------------------------------------------------------------------

    @precondition(lambda self: len(self.clients) < MAX_CLIENTS)
    @rule()
    def attach(self) -> None:
        client = self.table.client()
        assert client.cid not in self.gone
        assert client.cid not in {c.cid for c in self.clients}
        self.clients.append(client)

    def client(self, n: int) -> SlotClient:
        return self.clients[n % len(self.clients)]

    def ring(self, client: SlotClient, x: int) -> None:
        """The model's side of a change by a client: the bit, and the bell once a sleep."""
        self.dirty.add(x)
        expected = self.asleep and client.cid not in self.rung
        if expected:
            self.rung.add(client.cid)
        assert client.rings() == expected

    @precondition(lambda self: self.clients)
    @rule(target=handles, n=st.integers(0, 9), parallel=st.booleans(), bad=seldom)
    def register(self, n: int, parallel: bool, bad: bool) -> Handle | object:
        client = self.client(n)
        what = image(version=7, flags=0x10 if parallel else 0) if bad else record(parallel=parallel)
        result = client.register(what, parallel=parallel)
        if parallel and len(self.holders) == self.ntokens:
            assert result == LIMIT
            return multiple()
        if all(s.status != "free" for s in self.slots):
            assert result == NO_SLOT
            return multiple()
        assert isinstance(result, Handle)
        slot = self.slots[result.slot]
        assert (slot.status, slot.generation) == ("free", result.generation)
        slot.status, slot.cid, slot.bad = "pending", client.cid, bad
        if parallel:
            self.take_token(slot, self.table.req(result.slot).token, client.cid)
        self.ring(client, result.slot)
        return result

    def take_token(self, slot: Slot, token: int, cid: int) -> None:
        assert 1 <= token <= self.ntokens
        assert token - 1 not in self.holders
        slot.token = token
        self.holders[token - 1] = cid

    def give_token(self, token: int) -> None:
        if token:
            del self.holders[token - 1]
            self.tokens[token - 1] += 1

    def free(self, x: int, kind: int = 0) -> None:
        self.give_token(self.slots[x].token)
        self.slots[x].free(kind)

    @precondition(lambda self: self.clients)
    @rule(target=claims, n=st.integers(0, 9), x=st.integers(0, 64), parallel=st.booleans())
    def claim(self, n: int, x: int, parallel: bool) -> tuple[int, int] | object:
        """A client as it is between the claim and the publication: by another's hand, word for
        word what register() does."""
        client, x = self.client(n), x % self.nslots
        slot = self.slots[x]
        if slot.status != "free" or (parallel and len(self.holders) == self.ntokens):
            return multiple()
        token = 0
        if parallel:
            token = next(i for i in range(self.ntokens) if i not in self.holders) + 1
            generation = self.tokens[token - 1]
            self.table.set_token(token - 1, word(generation, client.cid, 0, CLAIMED))
            self.take_token(slot, token, client.cid)
        slot.status, slot.cid = "claimed", client.cid
        self.table.set_req(x, word(slot.generation, client.cid, token, CLAIMED))
        self.table.hints = self.table.hints - {x}
        return x, slot.generation

    @rule(target=handles, claim=consumes(claims))
    def publish(self, claim: tuple[int, int]) -> Handle | object:
        """That client goes on, if it is still there, and is stopped before it sets its bit."""
        x, generation = claim
        slot = self.slots[x]
        client = next((c for c in self.clients if c.cid == slot.cid), None)
        if client is None or (slot.status, slot.generation) != ("claimed", generation):
            return multiple()
        self.table.write_record(x, record(parallel=slot.token != 0))
        self.table.set_req(x, word(generation, slot.cid, slot.token, READY))
        slot.status = "pending"
        return client.handle(x, generation)

    @precondition(lambda self: self.clients)
    @rule(n=st.integers(0, 9), handle=handles)
    def terminate(self, n: int, handle: Handle) -> None:
        client = self.client(n)
        slot = self.slots[handle.slot]
        there = slot.published and slot.generation == handle.generation
        assert client.handle(handle.slot, handle.generation)._set_terminate() == there
        if there:
            if not slot.terminate:
                self.ring(client, handle.slot)
            slot.terminate = True

    @precondition(lambda self: self.clients)
    @rule(n=st.integers(0, 9), handle=handles, ahead=st.integers(1, 3))
    def terminate_what_does_not_exist(self, n: int, handle: Handle, ahead: int) -> None:
        """By a handle of another epoch, and by one of a generation that is yet to come."""
        view = self.client(n).view
        foreign = Foreign(handle.epoch + 1, handle.slot, handle.generation, "elsewhere")
        foreign.view = view
        later = Foreign(
            handle.epoch, handle.slot, self.slots[handle.slot].generation + ahead, "here"
        )
        later.view = view
        for stranger in (foreign, later):
            assert not stranger._set_terminate()
            assert stranger.status() is HandleStatus.STOPPED
            assert stranger.pid is None
            assert not stranger.ready

    @precondition(lambda self: self.clients)
    @rule(n=st.integers(0, 9))
    def die(self, n: int) -> None:
        client = self.client(n)
        self.clients.remove(client)
        self.gone.add(client.cid)
        self.view.client_gone(client.cid)

    @rule(hints=st.booleans())
    def lose_bits(self, hints: bool) -> None:
        """As when clients die just before they set them, or a rogue clears them."""
        if hints:
            self.table.hints = set()
        else:
            self.table.dirty = set()
            self.dirty.clear()

    # --- the supervisor ---------------------------------------------------------------------

    def look(self, x: int) -> list[Event]:
        """What the supervisor has to find at a slot."""
        slot = self.slots[x]
        generation, cid = slot.generation, slot.cid
        if slot.status == "claimed" and cid in self.gone:
            self.free(x)
            return [Event("reclaimed", x, generation, 0, None)]
        if slot.status == "pending":
            if slot.bad:
                self.free(x, REJECTED)
                return [Event("rejected", x, generation, cid, "the record has an unknown version")]
            if slot.terminate or not self.accepting:
                self.free(x, CANCELLED)
                return [Event("cancelled", x, generation, cid, None)]
            slot.status = "accepted"
            return [Event("accepted", x, generation, cid, None)]
        if slot.known and slot.terminate and not slot.noticed:
            slot.noticed = True
            return [Event("terminated", x, generation, cid, None)]
        return []

    @rule(again=st.booleans())
    def notice(self, again: bool) -> None:
        """Drain the dirty bits; sometimes of slots where nothing is new."""
        if again:
            self.dirty |= {x for x, s in enumerate(self.slots) if s.status != "claimed"}
            self.table.dirty = self.dirty
        expected = [e for x in sorted(self.dirty) for e in self.look(x)]
        self.dirty.clear()
        self.awake()
        assert sorted(self.table.settle()) == sorted(expected)

    @rule()
    def sweep(self) -> None:
        """A whole round: nothing is missed, and the dead are buried."""
        expected = [e for x in range(self.nslots) for e in self.look(x)]
        self.awake()
        assert sorted(self.table.sweep()) == sorted(expected)
        for token, cid in list(self.holders.items()):
            if cid in self.gone and not any(s.token == token + 1 for s in self.slots):
                self.give_token(token + 1)
        self.gone.clear()
        assert not self.view.sweep_due
        free = {x for x, s in enumerate(self.slots) if s.status == "free"}
        assert free <= self.table.hints  # lost ones are set again

    @precondition(lambda self: not self.asleep)
    @rule()
    def fall_asleep(self) -> None:
        self.asleep = self.view.prepare_sleep()
        assert self.asleep == (not self.dirty)
        self.rung.clear()

    def awake(self) -> None:
        self.view.awake()
        self.asleep = False
        self.rung.clear()

    def pick(self, n: int, *statuses: str) -> int:
        found = [x for x, s in enumerate(self.slots) if s.status in statuses]
        return found[n % len(found)]

    @precondition(lambda self: self.some("accepted", "stopped"))
    @rule(n=st.integers(0, 64), ready=st.booleans())
    def start_worker(self, n: int, ready: bool) -> None:
        x = self.pick(n, "accepted", "stopped")
        self.pids += 1
        self.slots[x].status, self.slots[x].pid = "running", self.pids
        self.slots[x].ready = ready
        self.view.set_running(x, self.pids, NOW)
        if ready:
            self.view.set_ready(x)

    @precondition(lambda self: self.some("accepted", "running", "stopped"))
    @rule(n=st.integers(0, 64), kind=st.integers(1, 5), final=st.booleans())
    def end_worker(self, n: int, kind: int, final: bool) -> None:
        """A worker that runs exits, for good or not; one that does not is forgotten."""
        x = self.pick(n, "accepted", "running", "stopped")
        final = final or self.slots[x].status != "running"
        self.view.set_outcome(x, kind, 3, 4, 5, final, NOW, b"why")
        if final:
            self.free(x, kind)
            self.view.free(x)
        else:
            self.slots[x].status, self.slots[x].pid = "stopped", 0
            self.view.set_stopped(x)

    @precondition(lambda self: not self.some("claimed", "pending"))
    @rule()
    def register_static(self) -> None:
        """In truth only before anybody attaches: it takes no notice of claims."""
        x = next((x for x, s in enumerate(self.slots) if not s.known), None)
        result = self.view.register(record(), NOW)
        assert result == (NO_SLOT if x is None else x)
        if x is not None:
            self.slots[x].status = "accepted"

    @rule(stop=seldom)
    def stop_accepting(self, stop: bool) -> None:
        self.accepting = self.view.accepting = not stop

    # --- what must agree after every step ---------------------------------------------------

    @invariant()
    def the_words_are_those_of_the_model(self) -> None:
        states = {"free": FREE, "claimed": CLAIMED}
        for x, slot in enumerate(self.slots):
            expected = Word(
                slot.generation,
                slot.cid,
                slot.token,
                slot.terminate,
                states.get(slot.status, READY),
            )
            assert self.table.req(x) == expected
            assert self.view.generation(x) == slot.generation
            assert self.view.in_use(x, slot.generation) == slot.known
        for i in range(self.ntokens):
            state = CLAIMED if i in self.holders else FREE
            expected = Word(self.tokens[i], self.holders.get(i, 0), 0, False, state)
            assert self.table.token(i) == expected
        assert self.view.free_slots == sum(not s.known for s in self.slots)
        assert self.table.free_seq % 2 == 0
        assert self.view.repairs == 0
        assert self.view.pending == 0
        assert self.table.dirty == self.dirty

    @invariant()
    def every_client_sees_the_same(self) -> None:
        codes = {"accepted": 1, "running": 2, "stopped": 3}
        published = [(x, s.generation) for x, s in enumerate(self.slots) if s.published]
        for client in self.clients:
            assert client.view.occupied() == published
            for x, slot in enumerate(self.slots):
                generation, state, ready, pid = client.view.status(x)
                assert (generation, pid) == (slot.generation, slot.pid)
                assert ready == (slot.status == "running" and slot.ready)
                assert state == codes.get(slot.status, 0)
                if slot.pid:
                    assert client.view.slot_of_pid(slot.pid) == (x, slot.generation)
                previous = slot.fates.get(slot.generation - 1)
                detail = client.view.detail(x, slot.generation - 1)
                if previous:  # one that was only claimed has no detail
                    assert detail is not None
                    assert detail[0] == previous
                    assert detail[4]
                assert (client.view.detail(x, slot.generation) is not None) == slot.published

    @rule(handle=handles)
    def ask(self, handle: Handle) -> None:
        slot = self.slots[handle.slot]
        if slot.generation != handle.generation:
            expected = HandleStatus.STOPPED
        else:
            expected = {
                "running": HandleStatus.STARTED,
                "stopped": HandleStatus.STOPPED,
            }.get(slot.status, HandleStatus.NOT_YET_STARTED)
        assert handle.status() is expected
        assert handle.pid == (slot.pid if expected is HandleStatus.STARTED else None)
        assert handle._freed == (slot.generation != handle.generation)


TestSlotTable = SlotTable.TestCase
TestSlotTable.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
