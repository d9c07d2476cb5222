/*
 * threads.c - clients and a supervisor as threads on one mapping (the test plan's T09)
 *
 *     threads SEED SECONDS
 *
 * Meant for the sanitizers; the thread sanitizer follows addresses, hence one mapping.  The core
 * touches shared memory by atomics alone, so a memory order that is too weak is no data race there.
 * Witnesses make it one: plain memory that a client writes between claim and publish and the
 * supervisor reads when it accepts, and the other way round between accept and status.  Nothing
 * but the protocol orders these.
 */
#include <time.h>

/* client_register() reads the clock between claim and publish: the place for its witness. */
static int witnessing_clock(clockid_t clock, struct timespec *t);
#define clock_gettime witnessing_clock
#include "core.h"
#undef clock_gettime

enum { CLIENTS = 3, NSLOTS = 5, NTOKENS = 2, HELD = 3, RING = 4096, STILL_MS = 3000 };

typedef struct { uint64_t by_client, by_supervisor; } witness_t;
typedef struct { uint32_t slot; uint64_t generation, serial; bool running, ended; } held_t;

typedef struct {
    pthread_t thread;
    client_t  c;
    int       index;
    uint64_t  chance, serial;
    held_t    held[HELD];
    uint64_t  registered, full, limit, again, terminated, deaths, details;
    word_t    mail;                             /* DEAD, or the new cid */
    alignas(64) witness_t witness[RING];
} peer_t;

#define DEAD (~UINT64_C(0))

static supervisor_t     s;
static peer_t           peers[CLIENTS];
static int              doors[2];
static _Atomic bool     stopping;
static _Atomic int      running;
static word_t           shown[NSLOTS];          /* generations that anybody may terminate */
static _Thread_local witness_t *witness;

static int
witnessing_clock(clockid_t clock, struct timespec *t)
{
    if (witness)
        witness->by_client++;
    return clock_gettime(clock, t);
}

/* main_arg names the registrant and the serial number. */
static uint64_t name_of(const peer_t *p) { return (uint64_t) p->index << 56 | p->serial; }
static witness_t *
witness_of(uint64_t name)
{
    return &peers[name >> 56].witness[name % RING];
}

/* ------------------------------------------------------------------------------------------
 * A client
 * ---------------------------------------------------------------------------------------- */

static void
try_to_register(peer_t *p, held_t *h)
{
    image_t image;
    bool    parallel = chance_of(&p->chance) % 3 == 0;

    p->serial++;
    image_fill(&image, name_of(p), chance_of(&p->chance) % 200, parallel);
    h->serial = name_of(p);
    witness = witness_of(h->serial);
    witness->by_client = p->serial - 1;         /* one less than is read, see above */
    switch (client_register(&p->c, image.bytes, parallel, &h->slot, &h->generation)) {
    case REG_OK:
        p->registered++;
        store_relaxed(&shown[h->slot], h->generation);
        break;
    case REG_NO_SLOT:
        p->full++;
        h->generation = 0;
        break;
    case REG_LIMIT:
        p->limit++;
        h->generation = 0;
        break;
    case REG_AGAIN:
        p->again++;
        h->generation = 0;
        break;
    default:
        violation("no memory");
    }
    witness = NULL;
}

static void
look_at(peer_t *p, held_t *h)
{
    uint64_t st = client_status(&p->c, h->slot);
    detail_t d = {0};

    PROMISE(word_generation(st) >= h->generation, "slot %u: a status older than the handle",
            h->slot);
    if (word_generation(st) != h->generation) {
        if (client_freed(&p->c, h->slot, h->generation))
            h->generation = 0;
        h->ended = true;
        return;
    }
    PROMISE(!h->ended, "slot %u: a registration comes back", h->slot);
    PROMISE(!h->running || st_state(st) >= ST_RUNNING, "slot %u: back to state %u", h->slot,
            st_state(st));
    h->running = st_state(st) >= ST_RUNNING;
    if (h->running)
        PROMISE(witness_of(h->serial)->by_supervisor == h->serial,
                "slot %u: what the supervisor wrote before its status is not seen", h->slot);
    if (map_read_detail(&p->c.m, h->slot, h->generation, &d)) {
        p->details++;
        PROMISE(d.name[0] == filler(h->serial, 5) && d.name[1] == filler(h->serial, 6),
                "slot %u: the detail is another's", h->slot);
        PROMISE(d.activity[0] == d.activity[62], "slot %u: a torn detail", h->slot);
    }
    if (client_read_pending(&p->c, h->slot, h->generation, &d))
        PROMISE(d.name[0] == filler(h->serial, 5), "slot %u: pending, another's name", h->slot);
}

/* Leave a claim and perhaps a token behind and die; live on as another process. */
static void
die(peer_t *p)
{
    uint64_t generation, mail;
    unsigned token = chance_of(&p->chance) % 2 ? client_take_token(&p->c) : 0;
    uint32_t slot = (uint32_t) (chance_of(&p->chance) % NSLOTS);

    client_claim_hinted(&p->c, slot, token, &generation);
    p->deaths++;
    store_release(&p->mail, DEAD);
    while ((mail = load_acquire(&p->mail)) == DEAD)
        sched_yield();
    p->c.cid = (uint16_t) mail;
}

static void *
client(void *argument)
{
    peer_t *p = argument;
    bool    busy = true;

    while (busy) {
        held_t *h = &p->held[chance_of(&p->chance) % HELD];
        uint64_t c = chance_of(&p->chance) % 64;
        uint32_t slot = (uint32_t) (chance_of(&p->chance) % NSLOTS);

        if (!h->generation && !stopping) {
            memset(h, 0, sizeof *h);
            try_to_register(p, h);
        } else if (h->generation && (c < 16 || stopping))
            p->terminated += client_terminate(&p->c, h->slot, h->generation);
        else if (c == 16)                       /* whoever's that is, if it is still there */
            client_terminate(&p->c, slot, load_relaxed(&shown[slot]));
        else if (c == 17 && !stopping)
            die(p);
        busy = !stopping;
        for (int i = 0; i < HELD; i++)
            if (p->held[i].generation) {
                look_at(p, &p->held[i]);
                busy = true;
            }
        if (c % 4 == 0)
            sched_yield();
    }
    running--;
    return NULL;
}

/* ------------------------------------------------------------------------------------------
 * The supervisor
 * ---------------------------------------------------------------------------------------- */

static uint64_t accepted, cancelled, reclaimed, frees, sleeps, wakes;

static void
end(uint32_t x)
{
    supervisor_note_exit(&s, x, KIND_EXITED, 0, 0, 0, 1, NOW, "", 0);
    s.slots[x].state = ST_STOPPED;
    supervisor_publish(&s, x);
    supervisor_free(&s, x);
    frees++;
}

static void
act(const event_t *events, uint32_t n)
{
    char activity[64];

    for (uint32_t i = 0; i < n; i++) {
        const event_t *e = &events[i];
        slot_t        *p = &s.slots[e->slot];
        image_t        image;

        switch (e->action) {
        case ACCEPTED:
            accepted++;
            image_fill(&image, p->record->main_arg, p->record->payload_len, p->token != 0);
            PROMISE(record_is(p->record, &image), "slot %u: a torn record", e->slot);
            PROMISE(witness_of(p->record->main_arg)->by_client ==
                        (p->record->main_arg & (((uint64_t) 1 << 56) - 1)),
                    "slot %u: what was written before publish is not seen", e->slot);
            witness_of(p->record->main_arg)->by_supervisor = p->record->main_arg;
            p->state = ST_RUNNING;
            p->pid = 1 + (int32_t) e->slot;
            supervisor_note_start(&s, e->slot, NOW);
            supervisor_publish(&s, e->slot);
            memset(activity, 'a' + (int) below(26), sizeof activity);
            supervisor_note_activity(&s, e->slot, activity, sizeof activity);
            if (below(8) == 0)
                end(e->slot);
            break;
        case TERMINATED:
            end(e->slot);
            break;
        case CANCELLED:
            cancelled++;
            frees++;
            break;
        case RECLAIMED:
            reclaimed++;
            frees++;
            break;
        default:
            violation("slot %u: event %u, %s", e->slot, e->action, e->reason ? e->reason : "");
        }
    }
}

static void
answer_deaths(void)
{
    for (int i = 0; i < CLIENTS; i++)
        if (load_acquire(&peers[i].mail) == DEAD) {
            supervisor_cid_gone(&s, peers[i].c.cid);
            store_release(&peers[i].mail, supervisor_cid_new(&s));
        }
}

/* Sleep until a client rings; nobody rings for ever only if nothing has changed (I8). */
static void
sleep_until_rung(void)
{
    struct pollfd door = {.fd = doors[0], .events = POLLIN};
    char   message[64];
    int    waited = 0;

    sleeps++;
    while (poll(&door, 1, 10) == 0 && running > 0 && waited < STILL_MS) {
        bool dead = false;

        for (int i = 0; i < CLIENTS; i++)       /* the dead do not ring: their pidfds do */
            dead |= load_acquire(&peers[i].mail) == DEAD;
        if (dead)
            break;
        waited += 10;
    }
    /* A client may stand between the bit and the doorbell. */
    if (waited >= STILL_MS && poll(&door, 1, 1000) == 0)
        for (uint32_t i = 0; i < s.m.g.nwords; i++)
            PROMISE(load_acquire(&s.m.dirty[i]) == 0, "slept over a change");
    while (recv(doors[0], message, sizeof message, MSG_DONTWAIT) > 0)
        wakes++;
    supervisor_awake(&s);
}

static void *
supervise(void *nothing)
{
    event_t events[NSLOTS];

    (void) nothing;
    while (running > 0) {
        answer_deaths();
        if (below(2))
            act(events, supervisor_drain(&s, 1 + (uint32_t) below(NSLOTS), NOW, events));
        for (uint64_t n = below(6); n-- > 0;)   /* finds what has not rung yet */
            act(events, supervisor_sweep(&s, 1, NOW, events));
        if (below(8) == 0 && s.ngone == 0 && supervisor_prepare_sleep(&s))
            sleep_until_rung();
    }
    return NULL;
}

static void
check_counts(void)
{
    event_t  events[NSLOTS];
    uint64_t registered = 0, generations = 0;

    for (int i = 0; i < CLIENTS; i++)
        supervisor_cid_gone(&s, peers[i].c.cid);
    do
        act(events, supervisor_sweep(&s, NSLOTS, NOW, events));
    while (s.ngone > 0);
    while (s.npending > 0 || load_acquire(&s.m.dirty[0]))
        act(events, supervisor_drain(&s, NSLOTS, NOW, events));
    check_quiet(&s, "in the end");
    for (uint32_t x = 0; x < NSLOTS; x++) {
        PROMISE(s.slots[x].state == ST_NONE, "slot %u is left", x);
        generations += s.slots[x].generation - 1;
    }
    for (int i = 0; i < CLIENTS; i++)
        registered += peers[i].registered;
    PROMISE(registered == accepted + cancelled,
            "%" PRIu64 " registered, %" PRIu64 " accepted, %" PRIu64 " cancelled", registered,
            accepted, cancelled);
    PROMISE(generations == frees, "%" PRIu64 " generations, %" PRIu64 " frees", generations, frees);
    PROMISE(s.repairs == 0, "%" PRIu64 " repairs", s.repairs);
}

int
main(int argc, char **argv)
{
    geometry_t g = geometry_of(NSLOTS, NTOKENS);
    double     seconds = argc > 2 ? atof(argv[2]) : 1;
    pthread_t  supervisor;
    uint64_t   sums[7] = {0};
    int        outbox = memory_file(g.outbox_size), inbox = memory_file(g.inbox_size);

    the_chance = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
    MUST(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, doors) == 0);
    MUST(supervisor_open(&s, outbox, inbox, NSLOTS, NTOKENS, 1) == 0);
    running = CLIENTS;
    for (int i = 0; i < CLIENTS; i++) {
        peer_t *p = &peers[i];

        p->index = i;
        p->chance = chance();
        p->c.m = s.m;
        p->c.cid = (uint16_t) supervisor_cid_new(&s);
        p->c.connection = doors[1];
        p->c.supervisor = -1;
    }
    MUST(pthread_create(&supervisor, NULL, supervise, NULL) == 0);
    for (int i = 0; i < CLIENTS; i++)
        MUST(pthread_create(&peers[i].thread, NULL, client, &peers[i]) == 0);
    usleep((useconds_t) (seconds * 1e6));
    stopping = true;
    for (int i = 0; i < CLIENTS; i++)
        pthread_join(peers[i].thread, NULL);
    pthread_join(supervisor, NULL);
    check_counts();
    for (int i = 0; i < CLIENTS; i++) {
        const peer_t *p = &peers[i];

        tried += p->registered;
        sums[0] += p->full;
        sums[1] += p->limit;
        sums[2] += p->again;
        sums[3] += p->deaths;
        sums[4] += p->details;
    }
    supervisor_close(&s);
    return verdict(" full=%" PRIu64 " limit=%" PRIu64 " again=%" PRIu64 " deaths=%" PRIu64
                   " details=%" PRIu64 " cancelled=%" PRIu64 " reclaimed=%" PRIu64
                   " sleeps=%" PRIu64 " wakes=%" PRIu64, sums[0], sums[1], sums[2], sums[3],
                   sums[4], cancelled, reclaimed, sleeps, wakes);
}
