# cython: language_level=3, auto_pickle=False, autotestdict=False
# cython: boundscheck=False, wraparound=False, cdivision=True
"""The slot table, from both sides: the Python face of _slots.h, which tells the protocol.

`ClientView` and `SlotHandle` are a client's, `SupervisorView` is the supervisor's.  There is no
policy here and no logging.  No method releases the GIL, and none can block: a view is never
closed under an operation in flight.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport errno
from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport strlen

import os
from time import time_ns

from pgbgw.errors import AttachError, WrongProcessError
from pgbgw.worker import HandleStatus


cdef extern from "_slots.h" nogil:
    unsigned fork_count
    void count_fork()
    int pthread_atfork(void (*)() noexcept, void (*)() noexcept, void (*)() noexcept)
    ctypedef struct word_t:
        pass
    ctypedef struct outbox_t:
        uint32_t supervisor_pid
        word_t sleep, phase, nfree, free_seq, longest_pause
        word_t *pauses
    ctypedef struct geometry_t:
        uint32_t nslots, ntokens
        uint64_t outbox_size, inbox_size, at_status, at_detail, at_tokens, at_controls
        uint64_t at_dirty, at_hints, at_records
    ctypedef struct status_t:
        word_t refused
    ctypedef struct map_t:
        outbox_t *outbox
        geometry_t g
        uint64_t epoch
        status_t *status
    ctypedef struct detail_t:
        uint64_t generation
        uint32_t kind, restarts, final, flags, start_time
        int32_t exitcode
        int32_t signal_ "signal"
        int64_t restart_ns, registered_at, started_at, stopped_at
        char *name
        char *type
        char *activity
        char *error
    ctypedef struct record_t:
        uint32_t flags, start_time, notify, name_len, type_len, entry_len, extra_len, payload_len
        int64_t restart_ns, stop_timeout_ns
        uint64_t registered_ns
        char *name
        char *type
        char *entry
    enum:
        MAX_SLOTS, MAX_TOKENS, CIDS, DRAIN_MAX, SLICE_MAX, PAUSES
        ST_NONE, ST_ACCEPTED, ST_RUNNING, ST_STOPPED, ST_RETIRED
        REG_OK, REG_NO_SLOT, REG_LIMIT, REG_NO_MEMORY, REG_AGAIN
        NOTHING, ACCEPTED, TERMINATED, REJECTED, CANCELLED, RECLAIMED, REPAIRED
        KIND_NONE, KIND_REJECTED, RECORD_PAYLOAD "sizeof(record_t)"
    uint64_t GENERATION_MAX
    geometry_t geometry_of(uint32_t, uint32_t)
    uint64_t load_relaxed(word_t *)
    uint64_t load_acquire(word_t *)
    void store_relaxed(word_t *, uint64_t)
    void store_release(word_t *, uint64_t)
    uint64_t word_generation(uint64_t)
    unsigned st_state(uint64_t)
    bint st_ready(uint64_t)
    uint32_t st_pid(uint64_t)
    bint map_read_detail(const map_t *, uint32_t, uint64_t, detail_t *)

    ctypedef struct client_t:
        map_t m
        uint16_t cid
        int connection, supervisor
        unsigned fork_count
        word_t dead, next
    int client_open(client_t *, int, uint64_t, int, uint64_t, const char **)
    void client_close(client_t *)
    bint client_supervisor_gone(client_t *)
    int client_register(client_t *, const char *, bint, uint32_t *, uint64_t *)
    bint client_terminate(client_t *, uint32_t, uint64_t)
    uint64_t client_status(const client_t *, uint32_t)
    bint client_freed(const client_t *, uint32_t, uint64_t)
    bint client_occupied(const client_t *, uint32_t, uint64_t *)
    bint client_read_pending(const client_t *, uint32_t, uint64_t, detail_t *)

    ctypedef struct slot_t:
        uint64_t generation
        uint16_t cid, token
        unsigned char state
        bint terminate, ready
        int32_t pid
        record_t *record
    ctypedef struct supervisor_t:
        map_t m
        unsigned fork_count
        slot_t *slots
        uint32_t npending
        uint64_t swept, sweep_until
        uint64_t repairs
        bint accepting
    ctypedef struct event_t:
        uint64_t generation
        uint32_t slot
        uint16_t cid
        unsigned char action
        const char *reason
    int supervisor_open(supervisor_t *, int, int, uint32_t, uint32_t, uint64_t)
    void supervisor_close(supervisor_t *)
    int supervisor_register(supervisor_t *, const char *, size_t, int64_t, uint32_t *)
    void supervisor_publish(supervisor_t *, uint32_t)
    void supervisor_free(supervisor_t *, uint32_t)
    void supervisor_look(supervisor_t *, uint32_t, int64_t, event_t *)
    uint32_t supervisor_drain(supervisor_t *, uint32_t, int64_t, event_t *)
    uint32_t supervisor_sweep(supervisor_t *, uint32_t, int64_t, event_t *)
    void supervisor_request_sweep(supervisor_t *)
    bint supervisor_prepare_sleep(supervisor_t *)
    void supervisor_awake(supervisor_t *)
    void supervisor_note_pass(supervisor_t *, uint64_t)
    unsigned supervisor_cid_new(supervisor_t *)
    void supervisor_cid_gone(supervisor_t *, unsigned)
    void supervisor_note_start(supervisor_t *, uint32_t, int64_t)
    void supervisor_note_exit(supervisor_t *, uint32_t, uint32_t, int32_t, int32_t, uint32_t,
                              uint32_t, int64_t, const char *, size_t)
    void supervisor_note_activity(supervisor_t *, uint32_t, const char *, size_t)

pthread_atfork(NULL, NULL, count_fork)

# HandleStatus by ST_x.
cdef tuple STATUS = (HandleStatus.NOT_YET_STARTED, HandleStatus.NOT_YET_STARTED,
                     HandleStatus.STARTED, HandleStatus.STOPPED)
cdef object STATUS_STOPPED = HandleStatus.STOPPED
cdef object STATUS_DIED = HandleStatus.SUPERVISOR_DIED

# What ClientView.register() and SupervisorView.register() answer instead of a handle or a slot.
NO_SLOT = -<int>REG_NO_SLOT
LIMIT = -<int>REG_LIMIT
NO_MEMORY = -<int>REG_NO_MEMORY
AGAIN = -<int>REG_AGAIN
DIED = AGAIN - 1

EVENT_ACCEPTED = <int>ACCEPTED
EVENT_TERMINATED = <int>TERMINATED
EVENT_REJECTED = <int>REJECTED
EVENT_CANCELLED = <int>CANCELLED
EVENT_RECLAIMED = <int>RECLAIMED
EVENT_REPAIRED = <int>REPAIRED

# How many slots one SupervisorView.drain() looks at, at most.
LOOKS = <int>DRAIN_MAX


def segment_sizes(uint32_t nslots, uint32_t ntokens):
    """Bytes of the (outbox, inbox) of such a table.  BackgroundWorkerShmemSize."""
    cdef geometry_t g

    if not 1 <= nslots <= <uint32_t>MAX_SLOTS or ntokens > <uint32_t>MAX_TOKENS:
        raise ValueError("table size out of range")
    g = geometry_of(nslots, ntokens)
    return g.outbox_size, g.inbox_size


def segment_layout(uint32_t nslots, uint32_t ntokens):
    """The offsets of everything in both segments, by name: for tools and tests."""
    cdef geometry_t g = geometry_of(nslots, ntokens)

    return {
        "status": g.at_status, "detail": g.at_detail, "tokens": g.at_tokens,
        "controls": g.at_controls, "dirty": g.at_dirty, "hints": g.at_hints,
        "records": g.at_records,
    }


cdef str text(const char *s):
    return s[:strlen(s)].decode("utf-8", "replace")


@cython.final
cdef class ClientView:
    """Both segments as a client has them mapped.  The descriptors stay the caller's."""

    cdef client_t c
    cdef readonly str address
    cdef public object owner

    def __cinit__(self, int outbox, int inbox, int supervisor, int connection, uint16_t cid,
                  str address not None):
        cdef const char *problem = NULL
        cdef int failed

        failed = client_open(&self.c, outbox, os.fstat(outbox).st_size, inbox,
                             os.fstat(inbox).st_size, &problem)
        if problem != NULL:
            raise AttachError(f"cannot use the slot table of {address}", detail=text(problem),
                              hint="Supervisor and clients must run the same version of pgbgw.")
        if failed:
            raise OSError(errno, os.strerror(errno))
        self.c.cid = cid
        self.c.supervisor = supervisor
        self.c.connection = connection
        store_relaxed(&self.c.next, <uint64_t>cid * 67)
        self.address = address

    def __dealloc__(self):
        if self.c.fork_count == fork_count:     # a child has no mapping to give back
            client_close(&self.c)

    cdef client_t *_open(self) except NULL:
        if self.c.fork_count != fork_count:
            raise WrongProcessError("this client belongs to the parent process",
                                    hint="Call attach() in the child.")
        if self.c.m.outbox == NULL:
            raise AttachError("this client is closed", hint="Call attach() again.")
        return &self.c

    @property
    def usable(self):
        """Neither closed nor inherited from a parent process."""
        return self.c.m.outbox != NULL and self.c.fork_count == fork_count

    def close(self):
        """Drop the mappings.  From here on every operation raises."""
        if self.c.fork_count == fork_count:
            client_close(&self.c)

    @property
    def epoch(self):
        return self._open().m.epoch

    @property
    def cid(self):
        return self._open().cid

    @property
    def nslots(self):
        return self._open().m.g.nslots

    @property
    def ntokens(self):
        return self._open().m.g.ntokens

    @property
    def supervisor_pid(self):
        return self._open().m.outbox.supervisor_pid

    @property
    def phase(self):
        """Phase | ShutdownMode << 8, as the supervisor last said."""
        return load_acquire(&self._open().m.outbox.phase)

    @property
    def sleeping(self):
        """True while the supervisor waits for something to do."""
        return load_relaxed(&self._open().m.outbox.sleep) & 1

    @property
    def pauses(self):
        """How long the supervisor's loop could not answer, since its start: the longest pass in ns,
        and how many passes took less than 1, 2, 4, 8 ... us, each counted once."""
        cdef client_t *c = self._open()

        return (load_relaxed(&c.m.outbox.longest_pause),
                [load_relaxed(&c.m.outbox.pauses[i]) for i in range(PAUSES)])

    def supervisor_gone(self):
        """True once the supervisor is dead; asks the kernel at most once a clock tick."""
        return client_supervisor_gone(self._open())

    def note_death(self):
        """The caller has seen that the supervisor is dead: from now on everybody knows."""
        store_relaxed(&self._open().dead, 1)

    def register(self, bytes image not None, bint parallel, type handle not None):
        """Publish a record image; a new handle, or NO_SLOT, LIMIT, NO_MEMORY, AGAIN or DIED.

        RegisterDynamicBackgroundWorker.  Wakes the supervisor if it sleeps.  The handle is
        allocated first: a failure leaves nothing registered.
        """
        return self._register(image, parallel, handle)

    def register_many(self, list workers not None, type handle not None):
        """Publish the records of BackgroundWorkers up to the first that finds no place; handles."""
        cdef list handles = []

        for worker in workers:
            result = self._register(worker._record, worker._parallel, handle)
            if not isinstance(result, SlotHandle):
                break
            handles.append(result)
        return handles

    cdef object _register(self, bytes image, bint parallel, type handle):
        cdef client_t *c = self._open()
        cdef SlotHandle h
        cdef int result

        if client_supervisor_gone(c):
            return DIED
        if image is None or PyBytes_GET_SIZE(image) < <Py_ssize_t>RECORD_PAYLOAD:
            raise ValueError("not a record image")
        h = handle.__new__(handle)
        result = client_register(c, PyBytes_AS_STRING(image), parallel, &h.slot, &h.generation)
        if result != REG_OK:
            return -result
        h.epoch = c.m.epoch
        h.view = self
        h.address = self.address
        return h

    def handle(self, uint32_t slot, uint64_t generation, type handle not None):
        """A handle on a registration of this table."""
        cdef SlotHandle h = handle.__new__(handle)

        h.epoch = self._open().m.epoch
        h.slot = slot
        h.generation = generation
        h.view = self
        h.address = self.address
        return h

    def status(self, uint32_t slot):
        """What the outbox says of a slot now: (generation, ST_x, ready, pid)."""
        cdef client_t *c = self._open()
        cdef uint64_t st

        if slot >= c.m.g.nslots:
            raise ValueError("no such slot")
        st = client_status(c, slot)
        return word_generation(st), st_state(st), st_ready(st), st_pid(st)

    def occupied(self):
        """The slots that hold a registration, noticed or not: [(slot, generation)]."""
        cdef client_t *c = self._open()
        cdef uint32_t slot
        cdef uint64_t generation
        cdef list found = []

        for slot in range(c.m.g.nslots):
            if client_occupied(c, slot, &generation):
                found.append((slot, generation))
        return found

    def slot_of_pid(self, uint32_t pid):
        """The (slot, generation) of the running worker with this pid, or None.

        Acquire loads alone: GetBackgroundWorkerTypeByPid without its lock.
        """
        cdef client_t *c = self._open()
        cdef uint32_t slot
        cdef uint64_t st

        for slot in range(c.m.g.nslots if pid else 0):
            st = client_status(c, slot)
            if st_pid(st) == pid and st_state(st) == ST_RUNNING:
                return slot, word_generation(st)
        return None

    def detail(self, uint32_t slot, uint64_t generation):
        """The detail of a slot's generation, or None if it is no longer there.

        (kind, exitcode, signal, restarts, final, flags, start_time, restart_ns, registered_at,
        started_at, stopped_at, name, type, activity, error); times in ns since 1970, 0 = not yet.
        """
        cdef client_t *c = self._open()
        cdef detail_t d

        if slot >= c.m.g.nslots:
            return None
        if (not map_read_detail(&c.m, slot, generation, &d)
                and not client_read_pending(c, slot, generation, &d)):
            if load_acquire(&c.m.status[slot].refused) != generation:
                return None
            return (<int>KIND_REJECTED, 0, 0, 0, True, 0, 0, -1, 0, 0, time_ns(), "", "", "",
                    "no memory")
        return (d.kind, d.exitcode, d.signal_, d.restarts, bool(d.final), d.flags, d.start_time,
                d.restart_ns, d.registered_at, d.started_at, d.stopped_at, text(d.name),
                text(d.type), text(d.activity), text(d.error))


cdef class SlotHandle:
    """(epoch, slot, generation): one registration, for ever.  Immutable; hashable.

    A subclass says, in `_find_view`, where a handle that came from elsewhere finds its table.
    """

    cdef readonly uint64_t epoch
    cdef readonly uint32_t slot
    cdef readonly uint64_t generation
    cdef readonly str address
    cdef ClientView view

    def __init__(self, uint64_t epoch, uint32_t slot, uint64_t generation, str address not None):
        self.epoch = epoch
        self.slot = slot
        self.generation = generation
        self.address = address

    def __hash__(self):
        return hash((self.epoch, self.slot, self.generation))

    def __eq__(self, other):
        cdef SlotHandle o

        if not isinstance(other, SlotHandle):
            return NotImplemented
        o = other
        return (self.slot == o.slot and self.generation == o.generation
                and self.epoch == o.epoch)

    def _find_view(self):
        raise AttachError("this handle has no table")

    cdef client_t *_client(self) except NULL:
        if (self.view is None or self.view.c.m.outbox == NULL
                or self.view.c.fork_count != fork_count):
            self.view = self._find_view()
        return &self.view.c

    cdef bint _ours(self, client_t *c) noexcept:
        return c.m.epoch == self.epoch and self.slot < c.m.g.nslots

    @property
    def _view(self):
        """The table this handle reads, found anew if it must be."""
        self._client()
        return self.view

    def status(self):
        """GetBackgroundWorkerPid without the pid: one load of the outbox.  Never blocks.

        STOPPED for a registration that is gone, for ever; otherwise SUPERVISOR_DIED once the
        supervisor is dead.  STARTED promises a process, not that it is ready.
        """
        cdef client_t *c = self._client()
        cdef uint64_t st

        if not self._ours(c):
            return STATUS_STOPPED
        st = client_status(c, self.slot)
        if word_generation(st) != self.generation:
            return STATUS_STOPPED
        if client_supervisor_gone(c):
            return STATUS_DIED
        return STATUS[st_state(st)]

    @property
    def pid(self):
        """The process id while the worker is STARTED, else None.  To show: it may be reused."""
        cdef client_t *c = self._client()
        cdef uint64_t st

        if not self._ours(c):
            return None
        st = client_status(c, self.slot)
        if (word_generation(st) != self.generation or st_state(st) != ST_RUNNING
                or client_supervisor_gone(c)):
            return None
        return st_pid(st)

    @property
    def ready(self):
        """True while the worker runs and has called current_worker().ready() in this run."""
        cdef client_t *c = self._client()
        cdef uint64_t st

        if not self._ours(c):
            return False
        st = client_status(c, self.slot)
        return (word_generation(st) == self.generation and bool(st_ready(st))
                and not client_supervisor_gone(c))

    @property
    def _freed(self):
        """True once the slot is free for others, in both segments (not only said to be)."""
        cdef client_t *c = self._client()

        return not self._ours(c) or client_freed(c, self.slot, self.generation)

    @property
    def _state(self):
        """The state's word as an integer, 0 once the registration is gone: changes when it does."""
        cdef client_t *c = self._client()
        cdef uint64_t st

        if not self._ours(c):
            return 0
        st = client_status(c, self.slot)
        return st if word_generation(st) == self.generation else 0

    def _set_terminate(self):
        """Set TERM; False if the registration is gone."""
        cdef client_t *c = self._client()

        return self._ours(c) and client_terminate(c, self.slot, self.generation)


@cython.final
cdef class SupervisorView:
    """Both segments as the supervisor has them mapped, and the truth about each slot."""

    cdef supervisor_t s
    cdef event_t *events

    def __cinit__(self, int outbox, int inbox, uint32_t nslots, uint32_t ntokens, uint64_t epoch):
        segment_sizes(nslots, ntokens)
        self.events = <event_t *>calloc(<size_t>SLICE_MAX, sizeof(event_t))
        if self.events == NULL:
            raise MemoryError
        if supervisor_open(&self.s, outbox, inbox, nslots, ntokens, epoch) != 0:
            raise OSError(errno, os.strerror(errno))

    def __dealloc__(self):
        free(self.events)
        if self.s.fork_count == fork_count:
            supervisor_close(&self.s)

    @property
    def epoch(self):
        return self.s.m.epoch

    @property
    def nslots(self):
        return self.s.m.g.nslots

    @property
    def ntokens(self):
        return self.s.m.g.ntokens

    @property
    def accepting(self):
        """False: registrations that are not known yet are cancelled when they are noticed."""
        return self.s.accepting

    @accepting.setter
    def accepting(self, bint value):
        self.s.accepting = value

    @property
    def free_slots(self):
        return load_relaxed(&self.s.m.outbox.nfree)

    @property
    def pending(self):
        """Changes taken over and not looked at yet."""
        return self.s.npending

    @property
    def sweep_due(self):
        """True until the round of the sweep that was asked for is over."""
        return self.s.swept < self.s.sweep_until

    def request_sweep(self):
        """Look at every slot, in slices, from here on."""
        supervisor_request_sweep(&self.s)

    @property
    def repairs(self):
        """How many inbox words were not what they must be, ever."""
        return self.s.repairs

    def set_phase(self, uint32_t phase):
        store_release(&self.s.m.outbox.phase, phase)

    # --- noticing -------------------------------------------------------------------------

    cdef list _events(self, uint32_t n):
        cdef list result = []
        cdef event_t *e
        cdef uint32_t i

        for i in range(n):
            e = &self.events[i]
            result.append((e.action, e.slot, e.generation, e.cid,
                           None if e.reason == NULL else text(e.reason)))
        return result

    def drain(self, int64_t now):
        """Look at slots that clients changed, a bounded number: [(EVENT_x, slot, generation, cid,
        reason)].  now: Unix time in ns, for the records.  BackgroundWorkerStateChange."""
        return self._events(supervisor_drain(&self.s, <uint32_t>DRAIN_MAX, now, self.events))

    def look(self, uint32_t slot, int64_t now):
        """Look at one slot, whatever the dirty bits say; what drain() returns."""
        if slot >= self.s.m.g.nslots:
            raise ValueError("no such slot")
        supervisor_look(&self.s, slot, now, self.events)
        return self._events(1 if self.events[0].action != NOTHING else 0)

    def sweep(self, int64_t now):
        """Look at the next slice of all slots, changed or not; as drain()."""
        return self._events(supervisor_sweep(&self.s, <uint32_t>SLICE_MAX, now, self.events))

    def prepare_sleep(self):
        """Announce sleep; False if there is something to look at after all."""
        return supervisor_prepare_sleep(&self.s)

    def awake(self):
        supervisor_awake(&self.s)

    def note_pass(self, uint64_t ns):
        """A pass of the loop took so long: it could not answer."""
        supervisor_note_pass(&self.s, ns)

    # --- clients --------------------------------------------------------------------------

    def new_client(self):
        """A client id, 0 if none is left."""
        return supervisor_cid_new(&self.s)

    def client_gone(self, unsigned cid):
        """The process behind the client id is dead, or has detached: see I11."""
        supervisor_cid_gone(&self.s, cid)

    # --- slots ----------------------------------------------------------------------------

    cdef slot_t *_used(self, uint32_t slot) except NULL:
        if slot >= self.s.m.g.nslots or self.s.slots[slot].record == NULL:
            raise ValueError("slot is not in use")
        return &self.s.slots[slot]

    def generation(self, uint32_t slot):
        """The slot's current generation; 0 for no such slot."""
        return self.s.slots[slot].generation if slot < self.s.m.g.nslots else 0

    def in_use(self, uint32_t slot, uint64_t generation):
        """Is this registration known and not gone?"""
        return (slot < self.s.m.g.nslots and self.s.slots[slot].record != NULL
                and self.s.slots[slot].generation == generation)

    def register(self, bytes image not None, int64_t now):
        """A static worker into the next free slot: its number, or NO_SLOT, LIMIT, NO_MEMORY."""
        cdef uint32_t slot = 0
        cdef int result

        if PyBytes_GET_SIZE(image) < <Py_ssize_t>RECORD_PAYLOAD:
            raise ValueError("not a record image")
        result = supervisor_register(&self.s, PyBytes_AS_STRING(image), PyBytes_GET_SIZE(image),
                                     now, &slot)
        return slot if result == REG_OK else -result

    def record(self, uint32_t slot):
        """The private copy of a registration's record, as an image."""
        cdef record_t *r = self._used(slot).record

        return PyBytes_FromStringAndSize(<char *>r, RECORD_PAYLOAD + (r.payload_len + 7) // 8 * 8)

    def registration(self, uint32_t slot):
        """What the supervisor itself needs of a record: (name, type, entry, flags, start_time,
        notify, restart_ns, stop_timeout_ns, registered_ns)."""
        cdef record_t *r = self._used(slot).record

        return (r.name[:r.name_len].decode("utf-8", "replace"),
                r.type[:r.type_len].decode("utf-8", "replace"),
                r.entry[:r.entry_len].decode("utf-8", "replace"),
                r.flags, r.start_time, bool(r.notify), r.restart_ns, r.stop_timeout_ns,
                r.registered_ns)

    def set_running(self, uint32_t slot, int32_t pid, int64_t now):
        """Publish the pid of a worker that was just launched.  ReportBackgroundWorkerPID."""
        cdef slot_t *p = self._used(slot)

        supervisor_note_start(&self.s, slot, now)
        p.state = ST_RUNNING
        p.ready = False
        p.pid = pid
        supervisor_publish(&self.s, slot)

    def set_ready(self, uint32_t slot):
        self._used(slot).ready = True
        supervisor_publish(&self.s, slot)

    def set_outcome(self, uint32_t slot, uint32_t kind, int32_t exitcode, int32_t signal,
                    uint32_t restarts, bint final, int64_t now, bytes error not None):
        """Write why the worker stopped into its detail: before stop() or free() publishes it.

        error: the end of a traceback, or another reason in words.
        """
        self._used(slot)
        supervisor_note_exit(&self.s, slot, kind, exitcode, signal, restarts, final, now,
                             PyBytes_AS_STRING(error), PyBytes_GET_SIZE(error))

    def set_activity(self, uint32_t slot, bytes activity not None):
        self._used(slot)
        supervisor_note_activity(&self.s, slot, PyBytes_AS_STRING(activity),
                                 PyBytes_GET_SIZE(activity))

    def set_stopped(self, uint32_t slot):
        """Publish that the worker does not run now and will run again."""
        cdef slot_t *p = self._used(slot)

        p.state = ST_STOPPED
        p.ready = False
        p.pid = 0
        supervisor_publish(&self.s, slot)

    def free(self, uint32_t slot):
        """Give the slot back for good.  ForgetBackgroundWorker."""
        self._used(slot)
        supervisor_free(&self.s, slot)
