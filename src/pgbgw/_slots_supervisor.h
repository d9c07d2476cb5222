/*
 * _slots_supervisor.h - the supervisor's side of the slot protocol (see _slots.h)
 *
 * The supervisor has no lock to take here and no loop that a client can lengthen: it loads a word
 * or exchanges one, and every bound comes from its private memory (I1, I5).
 */
#ifndef PGBGW_SLOTS_SUPERVISOR_H
#define PGBGW_SLOTS_SUPERVISOR_H

#define DRAIN_MAX 256                   /* looks in one pass of the loop: 2 ms of what follows */
#define SLICE_MAX 16384                 /* words in one slice of a sweep */
#define SLICE_EVENTS 1024               /* a slice ends early when it has found so much */
#define HEADROOM ((size_t) 4 << 20)     /* bytes to spare: see supervisor_has_memory() */
#define HEADROOM_PER_SLOT 64

/* The truth about a slot. */
typedef struct {
    uint64_t  generation;
    uint16_t  cid, token;               /* token: index + 1, 0 = none */
    uint8_t   state;                    /* ST_x */
    bool      terminate;                /* TERM was seen; sticky until the slot is freed */
    bool      ready;
    int32_t   pid;
    record_t *record;                   /* private copy, cut after the payload; NULL if ST_NONE */
} slot_t;

typedef struct { uint64_t generation; uint32_t slot; } token_t;     /* slot + 1, 0 = unbound */

enum cid_state { CID_FREE, CID_LIVE, CID_GONE };
typedef struct { uint8_t state; uint64_t due; } cid_t;      /* due: see supervisor_cid_gone() */

enum { KIND_NONE, KIND_EXITED, KIND_SIGNALED, KIND_REJECTED, KIND_CANCELLED, KIND_LAUNCH_FAILED };

typedef struct {
    map_t     m;
    unsigned  fork_count;
    slot_t   *slots;
    token_t  *tokens;
    cid_t     cids[CIDS];
    uint32_t  ngone, next_cid;
    uint64_t *pending;                  /* bits taken from dirty and not looked at yet */
    uint32_t  npending, next_pending;
    uint64_t *populated;                /* a bit per chunk of details; NULL: all are */
    uint64_t  swept;                    /* words the sweep has looked at, ever */
    uint64_t  sweep_until;              /* where the round that was asked for last ends */
    uint64_t  repairs;
    bool      has_memory, asked_memory; /* see supervisor_has_memory() */
    bool      accepting;                /* false: what is not known yet is cancelled */
} supervisor_t;

/* What supervisor_look() found; the supervisor's Python side acts on it. */
enum action { NOTHING, ACCEPTED, TERMINATED, REJECTED, CANCELLED, RECLAIMED, REPAIRED };
typedef struct {
    uint64_t generation;                /* of the registration that the event is about */
    uint32_t slot;
    uint16_t cid;
    uint8_t  action;
    const char *reason;                 /* with REJECTED */
} event_t;

/* ------------------------------------------------------------------------------------------
 * Details
 * ---------------------------------------------------------------------------------------- */

/* A detail is written between open and close.  Release on every word: seq is odd before any of
 * them is seen, and even only after all are.  Pairs with the acquire loads in map_read_detail(). */
static inline void
detail_open(detail_t *shared)
{
    store_relaxed(&shared->seq, load_relaxed(&shared->seq) | 1);
}
static inline void
detail_close(detail_t *shared)
{
    store_release(&shared->seq, (load_relaxed(&shared->seq) | 1) + 1);
}
static inline void
detail_put(detail_t *shared, size_t offset, const void *value, size_t n)
{
    word_t *words = (word_t *) shared;

    for (size_t i = offset / 8; i < (offset + n + 7) / 8; i++) {
        uint64_t w = load_relaxed(&words[i]);   /* only the supervisor writes here */
        size_t   from = i * 8 < offset ? offset - i * 8 : 0;
        size_t   to = i * 8 + 8 > offset + n ? offset + n - i * 8 : 8;

        memcpy((char *) &w + from, (const char *) value + i * 8 + from - offset, to - from);
        store_release(&words[i], w);
    }
}
#define PUT(d, field, value) detail_put((d), offsetof(detail_t, field), &(value), sizeof(value))

static inline bool
supervisor_populate(supervisor_t *s, uint32_t slot)
{
    uint32_t chunk = slot / CHUNK_SLOTS, first = chunk * CHUNK_SLOTS;
    uint32_t left = s->m.g.nslots - first, n = left < CHUNK_SLOTS ? left : CHUNK_SLOTS;

    if (!s->populated || (s->populated[chunk / 64] >> (chunk % 64) & 1))
        return true;
    if (madvise(&s->m.detail[(uint64_t) first * 2],
                page_align((uint64_t) n * 2 * sizeof(detail_t)), MADV_POPULATE_WRITE) != 0)
        return false;
    s->populated[chunk / 64] |= UINT64_C(1) << (chunk % 64);
    return true;
}

/* A new generation's detail; now is Unix time in ns.  When it was registered is the client's
 * word, which is only shown: never in the future. */
static inline void
detail_begin(supervisor_t *s, uint32_t x, const record_t *r, int64_t now)
{
    detail_t  d = {0};
    detail_t *shared = detail_of(&s->m, x, s->slots[x].generation);
    uint64_t  age = (uint64_t) monotonic_ns(CLOCK_MONOTONIC) - r->registered_ns;

    d.generation = s->slots[x].generation;
    d.flags = r->flags;
    d.start_time = r->start_time < START_TIMES ? r->start_time : 0;  /* what is refused may ... */
    d.restart_ns = r->restart_ns;
    d.registered_at = age < (uint64_t) now ? now - (int64_t) age : now;
    if (r->name_len < sizeof r->name)           /* ... have any values and lengths */
        sanitise(d.name, sizeof d.name, r->name, r->name_len, false);
    if (r->type_len < sizeof r->type)
        sanitise(d.type, sizeof d.type, r->type, r->type_len, false);
    detail_open(shared);
    detail_put(shared, 8, (char *) &d + 8, sizeof d - 8);
    detail_close(shared);
}

/* A worker was launched: its start time, and a clean sheet for this run. */
static inline void
supervisor_note_start(supervisor_t *s, uint32_t x, int64_t now)
{
    detail_t *d = detail_of(&s->m, x, s->slots[x].generation);
    const char none[sizeof d->activity] = {0};

    detail_open(d);
    PUT(d, activity, none);
    PUT(d, started_at, now);
    detail_close(d);
}

/* Why it stopped; error is a traceback's end or another reason in words. */
static inline void
supervisor_note_exit(supervisor_t *s, uint32_t x, uint32_t kind, int32_t exitcode, int32_t signal,
                     uint32_t restarts, uint32_t final, int64_t now, const char *error, size_t n)
{
    detail_t *d = detail_of(&s->m, x, s->slots[x].generation);
    char      clean[sizeof d->error];

    sanitise(clean, sizeof clean, error, n, true);
    detail_open(d);
    PUT(d, kind, kind);
    PUT(d, exitcode, exitcode);
    PUT(d, signal, signal);
    PUT(d, restarts, restarts);
    PUT(d, final, final);
    PUT(d, stopped_at, now);
    PUT(d, error, clean);
    detail_close(d);
}

static inline void
supervisor_note_activity(supervisor_t *s, uint32_t x, const char *activity, size_t n)
{
    detail_t *d = detail_of(&s->m, x, s->slots[x].generation);
    char      clean[sizeof d->activity];

    sanitise(clean, sizeof clean, activity, n, false);
    detail_open(d);
    PUT(d, activity, clean);
    detail_close(d);
}

/* ------------------------------------------------------------------------------------------
 * Start
 * ---------------------------------------------------------------------------------------- */

/* Build both segments in outbox and inbox (memfds of geometry_of()'s sizes).  0, or -1 with errno. */
static inline int
supervisor_open(supervisor_t *s, int outbox, int inbox, uint32_t nslots, uint32_t ntokens,
                uint64_t epoch)
{
    outbox_t   *o;
    geometry_t *g = &s->m.g;
    void       *p;

    *g = geometry_of(nslots, ntokens);
    if (map_segment(&p, outbox, g->outbox_size, PROT_READ | PROT_WRITE) != 0)
        return -1;
    s->m.outbox = p;
    if (map_segment(&p, inbox, g->inbox_size, PROT_READ | PROT_WRITE) != 0)
        return -1;
    s->m.inbox = p;
    map_place(&s->m);
    /* Reserve the pages before they are touched: too little memory is an error now, not SIGBUS. */
    if (madvise(s->m.outbox, g->populated ? g->outbox_size : g->at_detail,
                MADV_POPULATE_WRITE) != 0 ||
        madvise(s->m.inbox, g->populated ? g->inbox_size : g->at_records,
                MADV_POPULATE_WRITE) != 0)
        return -1;

    s->slots = calloc(nslots, sizeof(slot_t));
    s->tokens = calloc(ntokens + 1, sizeof(token_t));
    s->pending = calloc(g->nwords, sizeof(uint64_t));
    if (!g->populated)
        s->populated = calloc(nslots / CHUNK_SLOTS / 64 + 1, sizeof(uint64_t));
    if (!s->slots || !s->tokens || !s->pending || (!g->populated && !s->populated)) {
        errno = ENOMEM;
        return -1;
    }
    s->m.epoch = epoch;
    s->fork_count = fork_count;
    s->accepting = true;
    s->next_cid = 1;

    o = s->m.outbox;
    o->magic = OUTBOX_MAGIC;
    o->abi_major = ABI_MAJOR;
    o->abi_minor = ABI_MINOR;
    o->header_size = sizeof(outbox_t);
    o->endian = ENDIAN_TAG;
    o->layout_hash = layout_hash();
    o->epoch = epoch;
    o->nslots = nslots;
    o->ntokens = ntokens;
    o->ncids = CIDS;
    o->features = g->populated ? FEATURE_POPULATED : 0;
    o->outbox_size = g->outbox_size;
    o->inbox_size = g->inbox_size;
    o->supervisor_pid = (uint32_t) getpid();
    o->checksum = fnv1a(FNV1A_START, o, offsetof(outbox_t, checksum));
    store_relaxed(&o->nfree, nslots);
    for (uint32_t x = 0; x < nslots; x++) {
        s->slots[x].generation = 1;
        store_relaxed(&s->m.status[x].st, st_word(1, ST_NONE, 0));
        store_relaxed(&s->m.controls[x].req, req_word(1, 0, 0, REQ_FREE));
        s->m.hints[x / 64] |= UINT64_C(1) << (x % 64);
    }
    for (uint32_t t = 0; t < ntokens; t++) {
        s->tokens[t].generation = 1;
        store_relaxed(&s->m.tokens[t].req, req_word(1, 0, 0, REQ_FREE));
    }
    return 0;
}

static inline void
supervisor_close(supervisor_t *s)
{
    map_close(&s->m);
    if (s->slots)
        for (uint32_t x = 0; x < s->m.g.nslots; x++)
            free(s->slots[x].record);
    free(s->slots);
    free(s->tokens);
    free(s->pending);
    free(s->populated);
    s->slots = NULL;
    s->tokens = NULL;
    s->pending = s->populated = NULL;
}

/* ------------------------------------------------------------------------------------------
 * Slots
 * ---------------------------------------------------------------------------------------- */

/* Broadcast a slot's state.  Release: whoever sees it sees the detail written before.  Pairs with
 * client_status(). */
static inline void
supervisor_publish(supervisor_t *s, uint32_t x)
{
    const slot_t *p = &s->slots[x];
    unsigned state = p->state | (p->state == ST_RUNNING && p->ready ? ST_READY_BIT : 0);

    store_release(&s->m.status[x].st,
                  st_word(p->generation, state, p->state == ST_RUNNING ? (uint32_t) p->pid : 0));
}

/* What the inbox word of a slot in use must read. */
static inline uint64_t
canonical(const slot_t *p)
{
    return req_word(p->generation, p->cid, p->token, REQ_READY) | (p->terminate ? REQ_TERM : 0);
}

/* S7, ForgetBackgroundWorker: give the slot back, with its token, under the next generation.
 * Outbox before inbox (I3); nfree inside the bracket of free_seq (I10).  The count is not raised
 * for a slot that was only claimed: it never went down.  Release and acquire-release: whoever
 * claims the slot sees all of it.  Pairs with client_claim(), client_find(). */
static inline void
supervisor_free(supervisor_t *s, uint32_t x)
{
    slot_t   *p = &s->slots[x];
    outbox_t *o = s->m.outbox;
    uint64_t  free_seq = load_relaxed(&o->free_seq);
    bool      counted = p->state != ST_NONE;

    store_relaxed(&o->free_seq, free_seq + 1);
    if (p->token) {
        token_t *t = &s->tokens[p->token - 1];

        t->slot = 0;
        t->generation++;
        exchange_acq_rel(&s->m.tokens[p->token - 1].req, req_word(t->generation, 0, 0, REQ_FREE));
    }
    free(p->record);
    if (p->generation == GENERATION_MAX) {      /* I2: never reused, so never mistaken */
        *p = (slot_t) {.state = ST_RETIRED};    /* generation 0, which no handle has */
        store_release(&s->m.status[x].st, st_word(0, ST_NONE, 0));
        exchange_acq_rel(&s->m.controls[x].req, canonical(p));
        if (!counted)
            store_release(&o->nfree, load_relaxed(&o->nfree) - 1);
        store_release(&o->free_seq, free_seq + 2);
        return;
    }
    *p = (slot_t) {.generation = p->generation + 1};
    store_release(&s->m.status[x].st, st_word(p->generation, ST_NONE, 0));
    if (counted)
        store_release(&o->nfree, load_relaxed(&o->nfree) + 1);
    exchange_acq_rel(&s->m.controls[x].req, req_word(p->generation, 0, 0, REQ_FREE));
    store_release(&o->free_seq, free_seq + 2);
    or_release(&s->m.hints[x / 64], UINT64_C(1) << (x % 64));
}

/* Why a record cannot be run, or NULL.  The same rules as BackgroundWorker.check(), for clients
 * that do not keep them. */
static inline const char *
record_problem(const record_t *r, bool has_token)
{
    if (r->version != RECORD_VERSION)
        return "the record has an unknown version";
    if (r->name_len >= sizeof r->name || r->type_len >= sizeof r->type ||
        r->entry_len >= sizeof r->entry || r->extra_len > sizeof r->extra ||
        r->payload_len > PAYLOAD_MAX)
        return "a length in the record is out of range";
    if (r->entry_len == 0)
        return "the entry point is empty";
    if (r->flags & ~(uint32_t) FLAGS_KNOWN)
        return "unknown flags";
    if (r->start_time >= START_TIMES)
        return "invalid start time";
    if ((r->flags & FLAG_DATABASE_CONNECTION) &&
        (!(r->flags & FLAG_SHMEM_ACCESS) || r->start_time == 0))
        return "a database connection needs shared memory access and a later start";
    if (r->restart_ns < -1 || r->restart_ns > MAX_INTERVAL_NS || r->stop_timeout_ns < -1 ||
        r->stop_timeout_ns > MAX_INTERVAL_NS)
        return "an interval is out of range";
    if ((r->flags & FLAG_CLASS_PARALLEL) && r->restart_ns != -1)
        return "parallel workers cannot be restarted";
    if (!!(r->flags & FLAG_CLASS_PARALLEL) != has_token)
        return "the parallel flag and the parallel token do not agree";
    return NULL;
}

/* Copy a record out of the inbox, once (I5): the header, then as much of each array as the copied
 * header says.  NULL without memory; lengths that do not fit are kept for record_problem(). */
static inline record_t *
record_copy(const record_t *shared)
{
    record_t  header = {0};
    record_t *r;
    size_t    payload;

    words_load(&header, shared, RECORD_HEADER);
    payload = header.payload_len <= PAYLOAD_MAX ? header.payload_len : 0;
    r = calloc(1, sizeof *r + ((payload + 7) & ~(size_t) 7));
    if (!r)
        return NULL;
    memcpy(r, &header, RECORD_HEADER);
    if (r->name_len < sizeof r->name)
        words_load(r->name, shared->name, r->name_len);
    if (r->type_len < sizeof r->type)
        words_load(r->type, shared->type, r->type_len);
    if (r->entry_len < sizeof r->entry)
        words_load(r->entry, shared->entry, r->entry_len);
    if (r->extra_len <= sizeof r->extra)
        words_load(r->extra, shared->extra, r->extra_len);
    words_load(r->payload, shared->payload, payload);
    return r;
}

/* Bind the token that w names (I6); false if the claimer does not hold it. */
static inline bool
supervisor_bind(supervisor_t *s, uint32_t x, uint64_t w)
{
    unsigned token = req_token(w);

    if (token == 0)
        return true;
    if (token > s->m.g.ntokens || s->tokens[token - 1].slot != 0 ||
        load_acquire(&s->m.tokens[token - 1].req) !=
            req_word(s->tokens[token - 1].generation, req_cid(w), 0, REQ_CLAIMED))
        return false;
    s->tokens[token - 1].slot = x + 1;
    s->slots[x].token = (uint16_t) token;
    return true;
}

/* Write why a registration will never run into its detail, if that has a page, then free the slot. */
static inline void
supervisor_refuse(supervisor_t *s, uint32_t x, bool page, uint32_t kind, const char *reason,
                  int64_t now)
{
    if (page)
        supervisor_note_exit(s, x, kind, 0, 0, 0, 1, now, reason ? reason : "",
                             reason ? strlen(reason) : 0);
    else
        store_release(&s->m.status[x].refused, s->slots[x].generation);
    supervisor_free(s, x);
}

/* Is there memory for one more registration?  Its private copy is the smallest part: lists, sets
 * and dictionaries on the Python side grow with it, and no memory there would be our end.  So none
 * is accepted without room to spare for all else that the supervisor does (I06).  Asked once a
 * drain, whose registrations are a small part of that room. */
static inline bool
supervisor_has_memory(supervisor_t *s)
{
    if (!s->asked_memory) {
        void *reserve = malloc(HEADROOM + (size_t) s->m.g.nslots * HEADROOM_PER_SLOT);

        __asm__ volatile("" : "+r"(reserve));   /* a compiler may drop a malloc that is not used */
        s->has_memory = reserve != NULL;
        s->asked_memory = true;
        free(reserve);
    }
    return s->has_memory;
}

/* S2 and S3: take a published registration over, or refuse it. */
static inline void
supervisor_accept(supervisor_t *s, uint32_t x, uint64_t w, int64_t now, event_t *e)
{
    slot_t     *p = &s->slots[x];
    bool        bound = supervisor_bind(s, x, w);
    bool        page = supervisor_populate(s, x);
    const char *problem;
    record_t    nothing = {0};

    p->state = ST_ACCEPTED;             /* from here on the slot is in use: I10 */
    store_release(&s->m.outbox->nfree, load_relaxed(&s->m.outbox->nfree) - 1);
    p->cid = (uint16_t) req_cid(w);
    e->cid = p->cid;
    p->record = supervisor_has_memory(s) ? record_copy(record_of(&s->m, x)) : NULL;
    if (!p->record || !page)
        problem = "no memory";
    else if (!bound)
        problem = "the parallel token is not the registrant's";
    else
        problem = record_problem(p->record, p->token != 0);
    if (page)
        detail_begin(s, x, p->record ? p->record : &nothing, now);
    if (problem) {
        e->action = REJECTED;
        e->reason = problem;
        supervisor_refuse(s, x, page, KIND_REJECTED, problem, now);
    } else if ((w & REQ_TERM) || !s->accepting) {
        e->action = CANCELLED;
        supervisor_refuse(s, x, page, KIND_CANCELLED, NULL, now);
    } else {
        e->action = ACCEPTED;
        supervisor_publish(s, x);
    }
}

/* S1, S6, S8, S9: compare a slot's inbox word with the truth and do what is due.  now is Unix
 * time in ns, for the detail.  BackgroundWorkerStateChange, one slot of it. */
static inline void
supervisor_look(supervisor_t *s, uint32_t x, int64_t now, event_t *e)
{
    slot_t  *p = &s->slots[x];
    word_t  *req = &s->m.controls[x].req;
    uint64_t w = load_acquire(req);     /* pairs with C3 in client_register() */
    unsigned owner = s->cids[req_cid(w)].state;

    *e = (event_t) {.slot = x, .generation = p->generation, .cid = p->cid, .action = NOTHING};
    if (p->state == ST_NONE) {
        if (w == req_word(p->generation, 0, 0, REQ_FREE)) {
            uint64_t bit = UINT64_C(1) << (x % 64);

            if (!(load_relaxed(&s->m.hints[x / 64]) & bit))
                or_release(&s->m.hints[x / 64], bit);       /* I9: a lost hint */
            return;
        }
        if (word_generation(w) == p->generation && owner != CID_FREE) {
            if (req_state(w) == REQ_READY) {
                supervisor_accept(s, x, w, now, e);
                return;
            }
            if (req_state(w) == REQ_CLAIMED && !(w & REQ_TERM) && owner == CID_LIVE)
                return;                 /* a client between C1 and C3 */
            if (req_state(w) == REQ_CLAIMED && owner == CID_GONE) {
                e->action = RECLAIMED;
                supervisor_free(s, x);
                return;
            }
        }
        e->action = REPAIRED;
        s->repairs++;
        supervisor_free(s, x);
        return;
    }
    if ((w & ~REQ_TERM) != (canonical(p) & ~REQ_TERM)) {
        w = exchange_acq_rel(req, canonical(p));
        e->action = REPAIRED;
        s->repairs++;
        /* A TERM that came with the right generation is honoured all the same. */
        if (word_generation(w) != p->generation || req_state(w) != REQ_READY)
            return;
    }
    if ((w & REQ_TERM) && !p->terminate) {
        p->terminate = true;
        e->action = TERMINATED;
    }
}

/* Take over what clients marked dirty, then look at up to max slots; what is left over waits in
 * the private set.  Returns the number of events, at most max. */
static inline uint32_t
supervisor_drain(supervisor_t *s, uint32_t max, int64_t now, event_t *events)
{
    const geometry_t *g = &s->m.g;
    uint32_t n = 0, looks = 0;

    s->asked_memory = false;
    for (uint32_t i = 0; i < g->nwords; i++) {
        uint64_t bits;

        if (load_relaxed(&s->m.dirty[i]) == 0)
            continue;
        bits = exchange_acq_rel(&s->m.dirty[i], 0);
        if (i == g->nwords - 1 && g->nslots % 64)
            bits &= (UINT64_C(1) << (g->nslots % 64)) - 1;  /* damage: no such slots */
        s->npending += (uint32_t) __builtin_popcountll(bits & ~s->pending[i]);
        s->pending[i] |= bits;
    }
    for (uint32_t i = 0; i < g->nwords && s->npending > 0; i++) {
        uint32_t word = s->next_pending;

        while (s->pending[word]) {
            if (looks == max)
                return n;
            supervisor_look(s, word * 64 + (uint32_t) __builtin_ctzll(s->pending[word]), now,
                            &events[n]);
            s->pending[word] &= s->pending[word] - 1;
            s->npending--;
            looks++;
            if (events[n].action != NOTHING)
                n++;
        }
        s->next_pending = (word + 1) % g->nwords;
    }
    return n;
}

/* May the supervisor sleep?  If so the sleep word is odd and clients ring (I8).  Sequentially
 * consistent, pairs with client_ring(): it sets dirty, then loads sleep. */
static inline bool
supervisor_prepare_sleep(supervisor_t *s)
{
    uint64_t sleep = load_relaxed(&s->m.outbox->sleep);

    if (s->npending > 0)
        return false;
    store_seq_cst(&s->m.outbox->sleep, sleep + 1);
    for (uint32_t i = 0; i < s->m.g.nwords; i++)
        if (load_seq_cst(&s->m.dirty[i]) != 0) {
            store_seq_cst(&s->m.outbox->sleep, sleep + 2);
            return false;
        }
    return true;
}

static inline void
supervisor_awake(supervisor_t *s)
{
    uint64_t sleep = load_relaxed(&s->m.outbox->sleep);

    if (sleep & 1)
        store_seq_cst(&s->m.outbox->sleep, sleep + 1);
}

/* A pass of the loop took so long.  Figures to show: nobody decides by them. */
static inline void
supervisor_note_pass(supervisor_t *s, uint64_t ns)
{
    outbox_t *o = s->m.outbox;
    unsigned  i = 0;

    for (uint64_t us = ns / 1000; us > 0 && i < PAUSES - 1; us >>= 1)
        i++;
    store_relaxed(&o->pauses[i], load_relaxed(&o->pauses[i]) + 1);
    if (ns > load_relaxed(&o->longest_pause))
        store_relaxed(&o->longest_pause, ns);
}

/* ------------------------------------------------------------------------------------------
 * Clients, sweeps
 * ---------------------------------------------------------------------------------------- */

/* A client id for a process that attaches; 0 if all are taken. */
static inline unsigned
supervisor_cid_new(supervisor_t *s)
{
    for (uint32_t i = 0; i < CIDS - 1; i++) {
        uint32_t cid = s->next_cid;

        s->next_cid = cid == CIDS - 1 ? 1 : cid + 1;
        if (s->cids[cid].state == CID_FREE) {
            s->cids[cid].state = CID_LIVE;
            return cid;
        }
    }
    return 0;
}

/* Ask for a full round of the sweep, from here on. */
static inline void
supervisor_request_sweep(supervisor_t *s)
{
    s->sweep_until = s->swept + s->m.g.nslots;
}

/* The client is dead, or has detached with nothing in flight.  Its cid is free once the sweep has
 * gone once round the table from here (I11). */
static inline void
supervisor_cid_gone(supervisor_t *s, unsigned cid)
{
    if (cid == CID_SUPERVISOR || cid >= CIDS || s->cids[cid].state != CID_LIVE)
        return;
    supervisor_request_sweep(s);
    s->cids[cid] = (cid_t) {.state = CID_GONE, .due = s->sweep_until};
    s->ngone++;
}

/* Put token words right; unbound tokens of a gone client are left until its round is over. */
static inline void
supervisor_sweep_tokens(supervisor_t *s)
{
    for (uint32_t t = 0; t < s->m.g.ntokens; t++) {
        token_t *p = &s->tokens[t];
        word_t  *word = &s->m.tokens[t].req;
        uint64_t w = load_acquire(word);

        if (p->slot) {
            uint64_t bound = req_word(p->generation, s->slots[p->slot - 1].cid, 0, REQ_CLAIMED);

            if (w != bound) {
                exchange_acq_rel(word, bound);
                s->repairs++;
            }
        } else if (w != req_word(p->generation, 0, 0, REQ_FREE) &&
                   !(w == req_word(p->generation, req_cid(w), 0, REQ_CLAIMED) &&
                     s->cids[req_cid(w)].state != CID_FREE)) {
            p->generation++;
            exchange_acq_rel(word, req_word(p->generation, 0, 0, REQ_FREE));
            s->repairs++;
        }
    }
}

/* Cids whose round is complete: tokens after slots, the cid last (I11). */
static inline void
supervisor_collect_cids(supervisor_t *s)
{
    for (unsigned cid = 1; s->ngone > 0 && cid < CIDS; cid++) {
        if (s->cids[cid].state != CID_GONE || s->cids[cid].due > s->swept)
            continue;
        for (uint32_t t = 0; t < s->m.g.ntokens; t++) {
            token_t *p = &s->tokens[t];

            if (p->slot == 0 && load_acquire(&s->m.tokens[t].req) ==
                                    req_word(p->generation, cid, 0, REQ_CLAIMED)) {
                p->generation++;
                exchange_acq_rel(&s->m.tokens[t].req, req_word(p->generation, 0, 0, REQ_FREE));
            }
        }
        s->cids[cid].state = CID_FREE;
        s->ngone--;
    }
}

/* One slice of the sweep: look at the next max words, whatever the dirty bits say.  Returns the
 * number of events, at most max.  Where there are many the rest of the round is asked for: the
 * damage is to be put right soon, but not in one pass. */
static inline uint32_t
supervisor_sweep(supervisor_t *s, uint32_t max, int64_t now, event_t *events)
{
    uint32_t n = 0;

    s->asked_memory = false;
    for (uint32_t i = 0; i < max && i < s->m.g.nslots && n < SLICE_EVENTS; i++) {
        supervisor_look(s, (uint32_t) (s->swept % s->m.g.nslots), now, &events[n]);
        s->swept++;
        if (events[n].action != NOTHING)
            n++;
    }
    if (n == SLICE_EVENTS && s->swept >= s->sweep_until)
        supervisor_request_sweep(s);
    supervisor_sweep_tokens(s);
    supervisor_collect_cids(s);
    return n;
}

/* ------------------------------------------------------------------------------------------
 * Static workers
 * ---------------------------------------------------------------------------------------- */

/* RegisterBackgroundWorker: the next free slot, owned by the supervisor itself.  Before clients
 * attach only.  0, or a REG_x; a record that its own check() passed. */
static inline enum registration
supervisor_register(supervisor_t *s, const char *image, size_t size, int64_t now, uint32_t *slot)
{
    const record_t *r = (const record_t *) image;
    uint32_t x = 0, t = 0;
    slot_t  *p;

    while (x < s->m.g.nslots && s->slots[x].state != ST_NONE)
        x++;
    if (x == s->m.g.nslots)
        return REG_NO_SLOT;
    p = &s->slots[x];
    if (r->flags & FLAG_CLASS_PARALLEL) {       /* static parallel workers take tokens too */
        while (t < s->m.g.ntokens && s->tokens[t].slot)
            t++;
        if (t == s->m.g.ntokens)
            return REG_LIMIT;
    }
    if (!supervisor_populate(s, x) || !(p->record = calloc(1, size)))
        return REG_NO_MEMORY;
    memcpy(p->record, image, size);
    p->record->registered_ns = (uint64_t) monotonic_ns(CLOCK_MONOTONIC);
    if (r->flags & FLAG_CLASS_PARALLEL) {
        s->tokens[t].slot = x + 1;
        p->token = (uint16_t) (t + 1);
        store_release(&s->m.tokens[t].req,
                      req_word(s->tokens[t].generation, CID_SUPERVISOR, 0, REQ_CLAIMED));
    }
    p->state = ST_ACCEPTED;
    p->cid = CID_SUPERVISOR;
    store_release(&s->m.outbox->nfree, load_relaxed(&s->m.outbox->nfree) - 1);
    store_release(&s->m.controls[x].req, canonical(p));
    and_acq_rel(&s->m.hints[x / 64], ~(UINT64_C(1) << (x % 64)));
    detail_begin(s, x, p->record, now);
    supervisor_publish(s, x);
    *slot = x;
    return REG_OK;
}

#endif
