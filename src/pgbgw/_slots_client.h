/*
 * _slots_client.h - a client's side of the slot protocol (see _slots.h, which includes this)
 *
 * Every function returns after a bounded number of steps, takes no lock, and may be cut short by
 * SIGKILL between any two instructions: the supervisor puts right what is left behind.
 */
#ifndef PGBGW_SLOTS_CLIENT_H
#define PGBGW_SLOTS_CLIENT_H

/* The doorbell: tells a sleeping supervisor to look at its dirty bits. */
typedef struct { uint32_t type, slot; uint64_t generation; } kick_t;
#define MESSAGE_KICK 1

typedef struct {
    map_t    m;
    uint16_t cid;
    int      connection;                /* for doorbells */
    int      supervisor;                /* pidfd: readable once the supervisor is dead */
    unsigned fork_count;
    word_t   rung;                      /* sleep word's value that this process rang for */
    word_t   looked;                    /* coarse time of the last look at the pidfd */
    word_t   dead;
    word_t   next;                      /* where the next claim begins: spreads contention */
    word_t  *populated;                 /* a bit per chunk of records; NULL: all are */
} client_t;

enum registration { REG_OK, REG_NO_SLOT, REG_LIMIT, REG_NO_MEMORY, REG_AGAIN };

/* Why the segments cannot be ours, or NULL. */
static inline const char *
client_check(const outbox_t *o, uint64_t outbox_size, uint64_t inbox_size)
{
    geometry_t g;

    if (outbox_size < PAGE || o->magic != OUTBOX_MAGIC)
        return "not a pgbgw segment";
    if (o->abi_major != ABI_MAJOR || o->endian != ENDIAN_TAG || o->layout_hash != layout_hash())
        return "the supervisor runs another version of pgbgw";
    if (o->checksum != fnv1a(FNV1A_START, o, offsetof(outbox_t, checksum)) || o->nslots == 0 ||
        o->nslots > MAX_SLOTS || o->ntokens > MAX_TOKENS)
        return "the segment's header is damaged";
    g = geometry_of(o->nslots, o->ntokens);
    if (g.outbox_size != outbox_size || g.inbox_size != inbox_size)
        return "the segments' sizes do not fit their header";
    return NULL;
}

static inline int
client_open(client_t *c, int outbox, uint64_t outbox_size, int inbox, uint64_t inbox_size,
            const char **problem)
{
    void *p;

    *problem = NULL;
    if (map_segment(&p, outbox, outbox_size, PROT_READ) != 0)
        return -1;
    c->m.outbox = p;
    c->m.g.outbox_size = outbox_size;
    *problem = client_check(c->m.outbox, outbox_size, inbox_size);
    if (*problem || map_segment(&p, inbox, inbox_size, PROT_READ | PROT_WRITE) != 0) {
        map_close(&c->m);
        return -1;
    }
    c->m.inbox = p;
    c->m.g = geometry_of(c->m.outbox->nslots, c->m.outbox->ntokens);
    c->m.epoch = c->m.outbox->epoch;
    map_place(&c->m);
    c->fork_count = fork_count;
    if (!(c->m.outbox->features & FEATURE_POPULATED)) {
        c->populated = calloc(c->m.g.nslots / CHUNK_SLOTS / 64 + 1, sizeof(word_t));
        if (!c->populated) {
            map_close(&c->m);
            errno = ENOMEM;
            return -1;
        }
    }
    return 0;
}

static inline void
client_close(client_t *c)
{
    map_close(&c->m);
    free(c->populated);
    c->populated = NULL;
}

/* Is the supervisor dead?  A system call at most once a tick of the coarse clock (1 to 4 ms). */
static inline bool
client_supervisor_gone(client_t *c)
{
    uint64_t now;
    struct pollfd p = {.fd = c->supervisor, .events = POLLIN};

    if (load_relaxed(&c->dead))
        return true;
    now = (uint64_t) monotonic_ns(CLOCK_MONOTONIC_COARSE);
    if (load_relaxed(&c->looked) == now)
        return false;
    store_relaxed(&c->looked, now);
    if (poll(&p, 1, 0) <= 0)
        return false;
    store_relaxed(&c->dead, 1);
    return true;
}

/* Tell the supervisor that slot has changed (I8).  Costs a system call only if the supervisor
 * sleeps and nobody in this process has rung for this sleep.  A full socket holds a doorbell
 * already; a broken one means that the supervisor is dead: neither is an error here. */
static inline void
client_ring(client_t *c, uint32_t slot, uint64_t generation)
{
    uint64_t sleep;

    or_seq_cst(&c->m.dirty[slot / 64], UINT64_C(1) << (slot % 64));
    /* Pairs with supervisor_prepare_sleep(): it stores sleep, then loads dirty. */
    sleep = load_seq_cst(&c->m.outbox->sleep);
    if ((sleep & 1) && load_relaxed(&c->rung) != sleep) {
        kick_t kick = {MESSAGE_KICK, slot, generation};

        (void) !send(c->connection, &kick, sizeof kick, MSG_DONTWAIT | MSG_NOSIGNAL);
        store_relaxed(&c->rung, sleep);
    }
}

/* Make sure that writing the slot's record cannot fail for want of memory (SIGBUS). */
static inline bool
client_populate(client_t *c, uint32_t slot)
{
    uint32_t chunk = slot / CHUNK_SLOTS, first = chunk * CHUNK_SLOTS;
    uint64_t bit = UINT64_C(1) << (chunk % 64);
    uint32_t n = c->m.g.nslots - first < CHUNK_SLOTS ? c->m.g.nslots - first : CHUNK_SLOTS;

    if (!c->populated || (load_relaxed(&c->populated[chunk / 64]) & bit))
        return true;
    if (madvise(record_of(&c->m, first), page_align((uint64_t) n * RECORD_STRIDE),
                MADV_POPULATE_WRITE) != 0)
        return false;
    atomic_fetch_or_explicit(&c->populated[chunk / 64], bit, memory_order_relaxed);
    return true;
}

/* C1.  Acquire: what the supervisor wrote before it freed the slot is visible from here on, the
 * newer generation in st above all (I3).  Pairs with the exchange in supervisor_free(). */
static inline bool
client_claim(client_t *c, uint32_t slot, unsigned token, uint64_t *generation)
{
    word_t  *req = &c->m.controls[slot].req;
    uint64_t w = load_acquire(req);

    if (req_state(w) != REQ_FREE)
        return false;
    *generation = word_generation(w);
    return cas_acq_rel(req, w, req_word(*generation, c->cid, token, REQ_CLAIMED));
}

/* Claim a slot whose free hint is set (I9).  Acquire-release on the hints: if a set by the
 * supervisor came before our clearing, the second load sees the freed word. */
static inline bool
client_claim_hinted(client_t *c, uint32_t slot, unsigned token, uint64_t *generation)
{
    word_t  *hints = &c->m.hints[slot / 64];
    uint64_t bit = UINT64_C(1) << (slot % 64);
    bool     claimed = client_claim(c, slot, token, generation);

    and_acq_rel(hints, ~bit);
    if (!claimed && req_state(load_acquire(&c->m.controls[slot].req)) == REQ_FREE)
        or_release(hints, bit);
    return claimed;
}

/* Find and claim a slot: by the hints first, by all words if the hints are empty but the
 * supervisor's count is not.
 *
 * The refusal is exact (I10).  free_seq even and the same before and after: no slot was freed
 * meanwhile, so slots only left the state FREE, and there was an instant at which none was free:
 * the load of nfree that saw 0, or the end of the scan that saw each word not free. */
static inline enum registration
client_find(client_t *c, unsigned token, uint32_t *slot, uint64_t *generation)
{
    const geometry_t *g = &c->m.g;
    uint64_t free_seq = load_acquire(&c->m.outbox->free_seq);
    uint64_t start = load_relaxed(&c->next) % g->nslots;

    for (uint32_t i = 0; i <= g->nwords; i++) {
        uint32_t word = (uint32_t) (start / 64 + i) % g->nwords;
        uint64_t bits = load_relaxed(&c->m.hints[word]);

        if (i == 0)                             /* the start word's upper part first ... */
            bits &= ~UINT64_C(0) << (start % 64);
        else if (i == g->nwords)                /* ... and its lower part last */
            bits &= ~(~UINT64_C(0) << (start % 64));
        for (; bits; bits &= bits - 1) {
            uint32_t x = word * 64 + (uint32_t) __builtin_ctzll(bits);

            if (x >= g->nslots)
                break;                          /* damage: no such slot */
            if (!client_populate(c, x))
                return REG_NO_MEMORY;
            if (client_claim_hinted(c, x, token, generation)) {
                *slot = x;
                return REG_OK;
            }
        }
    }
    if (load_acquire(&c->m.outbox->nfree) != 0)
        for (uint32_t x = 0; x < g->nslots; x++) {
            if (req_state(load_acquire(&c->m.controls[x].req)) != REQ_FREE)
                continue;
            if (!client_populate(c, x))
                return REG_NO_MEMORY;
            if (client_claim_hinted(c, x, token, generation)) {
                *slot = x;
                return REG_OK;
            }
        }
    if ((free_seq & 1) || load_relaxed(&c->m.outbox->free_seq) != free_seq)
        return REG_AGAIN;
    return REG_NO_SLOT;
}

/* I6: 0 if no token is free, else its index + 1. */
static inline unsigned
client_take_token(client_t *c)
{
    uint32_t n = c->m.g.ntokens;

    for (uint32_t i = 0; i < n; i++) {
        uint32_t t = (c->cid + i) % n;
        word_t  *word = &c->m.tokens[t].req;
        uint64_t w = load_acquire(word);

        if (req_state(w) == REQ_FREE &&
            cas_acq_rel(word, w, req_word(word_generation(w), c->cid, 0, REQ_CLAIMED)))
            return t + 1;
    }
    return 0;
}

static inline void
client_return_token(client_t *c, unsigned token)
{
    word_t  *word = &c->m.tokens[token - 1].req;
    uint64_t w = load_acquire(word);

    if (req_state(w) == REQ_CLAIMED && req_cid(w) == c->cid)
        cas_acq_rel(word, w, req_word(word_generation(w), 0, 0, REQ_FREE));
}

/* RegisterDynamicBackgroundWorker.  image is a packed record, its payload last.  REG_AGAIN: the
 * supervisor was freeing slots all the while; the caller pauses and tries again, or gives up. */
static inline enum registration
client_register(client_t *c, const char *image, bool parallel, uint32_t *slot,
                uint64_t *generation)
{
    const record_t *from = (const record_t *) image;
    record_t *to;
    uint64_t  claimed;
    unsigned  token = 0;
    enum registration result;

    if (parallel && !(token = client_take_token(c)))
        return REG_LIMIT;
    result = client_find(c, token, slot, generation);
    if (result != REG_OK) {
        if (token)
            client_return_token(c, token);
        return result;
    }
    to = record_of(&c->m, *slot);
    words_store(to, from, offsetof(record_t, registered_ns));
    store_relaxed((word_t *) &to->registered_ns, (uint64_t) monotonic_ns(CLOCK_MONOTONIC));
    words_store(to->name, from->name, from->name_len);
    words_store(to->type, from->type, from->type_len);
    words_store(to->entry, from->entry, from->entry_len);
    words_store(to->extra, from->extra, from->extra_len);
    words_store(to->payload, from->payload, from->payload_len);
    /* C3.  Release: who sees READY sees the record.  Pairs with supervisor_look().  It can only
     * fail if the word was damaged; the slot is then the supervisor's to repair. */
    claimed = req_word(*generation, c->cid, token, REQ_CLAIMED);
    if (!cas_acq_rel(&c->m.controls[*slot].req, claimed, claimed ^ REQ_CLAIMED ^ REQ_READY)) {
        if (token)
            client_return_token(c, token);
        return REG_AGAIN;
    }
    store_relaxed(&c->next, *slot + 1);
    client_ring(c, *slot, *generation);
    return REG_OK;
}

/* TerminateBackgroundWorker.  True if TERM is set; false if that registration is gone, which is
 * no error.  At most two failures a word: TERM set by another, or freed; the bound is against
 * damage. */
static inline bool
client_terminate(client_t *c, uint32_t slot, uint64_t generation)
{
    word_t *req = &c->m.controls[slot].req;

    for (int attempt = 0; attempt < 8; attempt++) {
        uint64_t w = load_acquire(req);

        if (word_generation(w) != generation || req_state(w) != REQ_READY)
            return false;
        if (w & REQ_TERM)
            return true;
        if (cas_acq_rel(req, w, w | REQ_TERM)) {
            client_ring(c, slot, generation);
            return true;
        }
    }
    return false;
}

/* GetBackgroundWorkerPid's one load.  Acquire: pairs with supervisor_publish(). */
static inline uint64_t
client_status(const client_t *c, uint32_t slot)
{
    return load_acquire(&c->m.status[slot].st);
}

/* Has the slot been given back for good, in both segments?  Waits end on this, so that "wait,
 * then register" never meets a slot that is not free yet. */
static inline bool
client_freed(const client_t *c, uint32_t slot, uint64_t generation)
{
    return word_generation(client_status(c, slot)) != generation &&
           word_generation(load_acquire(&c->m.controls[slot].req)) != generation;
}

/* Is there a registration in the slot, noticed by the supervisor or not? */
static inline bool
client_occupied(const client_t *c, uint32_t slot, uint64_t *generation)
{
    uint64_t st = client_status(c, slot), w;

    *generation = word_generation(st);
    if (st_state(st) != ST_NONE)
        return true;
    w = load_acquire(&c->m.controls[slot].req);
    return word_generation(w) == *generation && req_state(w) == REQ_READY;
}

/* The detail of a registration that the supervisor has not taken over yet, from its record: the
 * word of a client, to show.  False if it is not there, or changes meanwhile. */
static inline bool
client_read_pending(const client_t *c, uint32_t slot, uint64_t generation, detail_t *d)
{
    word_t  *req = &c->m.controls[slot].req;
    uint64_t w = load_acquire(req), st = client_status(c, slot), age;
    int64_t  now = monotonic_ns(CLOCK_REALTIME);
    record_t r;

    if (word_generation(w) != generation || req_state(w) != REQ_READY ||
        word_generation(st) != generation || st_state(st) != ST_NONE)
        return false;
    words_load(&r, record_of(&c->m, slot), sizeof r);
    if (((load_acquire(req) ^ w) & ~REQ_TERM) != 0)
        return false;
    memset(d, 0, sizeof *d);
    age = (uint64_t) monotonic_ns(CLOCK_MONOTONIC) - r.registered_ns;
    d->generation = generation;
    d->flags = r.flags & FLAGS_KNOWN;
    d->start_time = r.start_time < START_TIMES ? r.start_time : 0;
    d->restart_ns = r.restart_ns;
    d->registered_at = age < (uint64_t) now ? now - (int64_t) age : now;
    if (r.name_len < sizeof r.name)
        sanitise(d->name, sizeof d->name, r.name, r.name_len, false);
    if (r.type_len < sizeof r.type)
        sanitise(d->type, sizeof d->type, r.type, r.type_len, false);
    return true;
}

#endif
