/*
 * images.c - the supervisor's side of the slot protocol fed with inboxes of every kind (T04)
 *
 *     images SEED IMAGES
 *
 * An image is an inbox, or a part of one, overwritten: with noise, with words that are nearly
 * right, with holes.  After each one the supervisor goes on with its work - drains, sweeps, its
 * own steps, clients that come and go - and its private memory and outbox must agree with
 * themselves; the last third of the images is written over by a second thread while the supervisor
 * looks.  Every hundred images the damage ends: after two rounds of the sweep every slot must be
 * usable.  Memory runs out at random.  Meant for the address and undefined-behaviour sanitizers.
 */
#include <stdlib.h>

/* The core's allocations: some fail, and the reserve that supervisor_has_memory() asks for does
 * not cost a sanitizer half a megabyte of shadow memory each time. */
static char reserve[1];
static void *core_malloc(size_t n);
static void *core_calloc(size_t n, size_t size);
static void core_free(void *p);
#define malloc core_malloc
#define calloc core_calloc
#define free core_free
#include "core.h"
#undef malloc
#undef calloc
#undef free

#include <fcntl.h>

static bool scarce;                             /* one allocation in sixteen fails */

static void *
core_malloc(size_t n)
{
    if (scarce && below(16) == 0)
        return NULL;
    return n >= HEADROOM ? reserve : malloc(n);
}
static void *
core_calloc(size_t n, size_t size)
{
    return scarce && below(16) == 0 ? NULL : calloc(n, size);
}
static void
core_free(void *p)
{
    if (p != reserve)
        free(p);
}

static supervisor_t s;
static client_t     honest;
static int          outbox, inbox;
static uint32_t     nslots, ntokens;
static uint64_t     accepted, refused, repaired, retired, *generations;

/* ------------------------------------------------------------------------------------------
 * Images
 * ---------------------------------------------------------------------------------------- */

static uint64_t
edge(uint64_t *r)
{
    static const uint64_t edges[] = {0, 1, 2, 3, 7, 8, ~UINT64_C(0), UINT64_C(1) << 63, 0xfff};

    return edges[chance_of(r) % (sizeof edges / sizeof *edges)];
}

/* A word that is nearly right, and often right, for slot or token x. */
static uint64_t
plausible(uint64_t *r, uint64_t generation, bool token)
{
    uint64_t c = chance_of(r);
    unsigned cid = c % 8 ? 1 + (unsigned) (c >> 8) % 3 : (unsigned) (c >> 8) % CIDS;
    unsigned held = token || c >> 24 & 1 ? 0 : (unsigned) (c >> 32) % (ntokens + 3);
    unsigned state = (unsigned) (c >> 40) % 8 < 5 ? REQ_READY : (unsigned) (c >> 44) % 4;

    if (token)
        state = (unsigned) (c >> 44) % 4 ? REQ_CLAIMED : (unsigned) (c >> 46) % 4;
    if ((c >> 50) % 8 == 0)
        generation += (c >> 53) % 5 - 2;
    return req_word(generation & GENERATION_MAX, cid, held, state) |
           ((c >> 56) % 4 == 0 ? REQ_TERM : 0);
}

static uint64_t
word_like(uint64_t *r, const uint64_t *shared, uint64_t generation, bool token)
{
    switch (chance_of(r) % 6) {
    case 0:
        return chance_of(r);
    case 1:
        return edge(r);
    case 2:                                     /* one bit of what is there */
        return load_relaxed((word_t *) shared) ^ UINT64_C(1) << chance_of(r) % 64;
    default:
        return plausible(r, generation, token);
    }
}

/* A record: right, or with fields out of range, or noise. */
static void
scribble_record(uint64_t *r, uint32_t x)
{
    image_t image;
    word_t *to = (word_t *) record_of(&s.m, x);

    switch (chance_of(r) % 4) {
    case 0:
        for (size_t i = 0; i < RECORD_STRIDE / 8; i++)
            store_relaxed(&to[i], chance_of(r));
        break;
    case 1:                                     /* two words of the header, or of the rest */
        for (int i = 0; i < 2; i++)
            store_relaxed(&to[chance_of(r) % (i ? RECORD_HEADER / 8 : RECORD_STRIDE / 8)],
                          chance_of(r) % 2 ? edge(r) : chance_of(r));
        break;
    default:
        image_fill(&image, chance_of(r), chance_of(r) % (PAYLOAD_MAX + 1), chance_of(r) % 2);
        if (chance_of(r) % 2) {
            uint32_t *lengths = &image.r.name_len;

            lengths[chance_of(r) % 5] = chance_of(r) % 2 ? (uint32_t) edge(r)
                                                         : (uint32_t) chance_of(r) % 2000;
        }
        words_store(to, &image, sizeof image);
    }
}

/* Something of the inbox, anything, is written over.  generation is a guess of the thread that
 * may not look into private memory. */
static void
scribble(uint64_t *r, bool guess)
{
    uint32_t x = (uint32_t) (chance_of(r) % nslots), t = ntokens ? chance_of(r) % ntokens : 0;
    uint64_t generation = guess ? chance_of(r) % 64 : s.slots[x].generation;
    word_t  *req = &s.m.controls[x].req;

    switch (chance_of(r) % 8) {
    case 0:
        store_relaxed(&s.m.dirty[chance_of(r) % s.m.g.nwords], chance_of(r));
        break;
    case 1:
        store_relaxed(&s.m.hints[chance_of(r) % s.m.g.nwords], chance_of(r));
        break;
    case 2:
    case 3:
        if (ntokens) {
            word_t *word = &s.m.tokens[t].req;

            generation = guess ? chance_of(r) % 64 : s.tokens[t].generation;
            store_relaxed(word, word_like(r, (uint64_t *) word, generation, true));
        }
        break;
    case 4:
        scribble_record(r, x);
        break;
    default:
        if (guess)
            generation = word_generation(load_relaxed(req)) + chance_of(r) % 2;
        store_relaxed(req, word_like(r, (uint64_t *) req, generation, false));
        if (chance_of(r) % 2) {                 /* with a record that fits */
            image_t image;

            image_fill(&image, chance_of(r), chance_of(r) % (PAYLOAD_MAX + 1),
                       req_token(load_relaxed(req)) != 0);
            words_store(record_of(&s.m, x), &image, sizeof image);
        }
        or_seq_cst(&s.m.dirty[x / 64], UINT64_C(1) << x % 64);
    }
}

static void
punch(void)
{
    uint64_t at = below(s.m.g.inbox_size / PAGE) * PAGE;
    uint64_t n = below(4) ? PAGE : s.m.g.inbox_size - at;

    MUST(fallocate(inbox, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t) at, (off_t) n) == 0);
}

static void
make_image(void)
{
    if (below(64) == 0)
        punch();
    if (below(64) == 0) {                       /* pure noise, all of it */
        word_t *words = (word_t *) s.m.inbox;

        for (size_t i = 0; i < s.m.g.inbox_size / 8; i++)
            store_relaxed(&words[i], chance());
        return;
    }
    for (uint64_t n = 1 + below(12); n-- > 0;)
        scribble(&the_chance, false);
}

/* ------------------------------------------------------------------------------------------
 * The supervisor's work meanwhile
 * ---------------------------------------------------------------------------------------- */

/* Everything that the supervisor takes from a record once it has accepted it. */
static uint64_t
read_all(const record_t *r)
{
    uint64_t h = fnv1a(FNV1A_START, r->name, r->name_len);

    h = fnv1a(h, r->type, r->type_len);
    h = fnv1a(h, r->entry, r->entry_len);
    h = fnv1a(h, r->extra, r->extra_len);
    return fnv1a(h, r->payload, r->payload_len);
}

static void
act(const event_t *events, uint32_t n, uint32_t max)
{
    static volatile uint64_t sink;

    PROMISE(n <= max, "%u events, room for %u", n, max);
    for (uint32_t i = 0; i < n; i++) {
        const event_t *e = &events[i];
        const slot_t  *p = &s.slots[e->slot];

        PROMISE(e->slot < nslots, "an event of slot %u", e->slot);
        switch (e->action) {
        case ACCEPTED:
            accepted++;
            PROMISE(p->state == ST_ACCEPTED && p->record && p->generation == e->generation,
                    "slot %u: accepted, and is in state %u", e->slot, p->state);
            sink += read_all(p->record);
            if (below(2)) {
                s.slots[e->slot].state = ST_RUNNING;
                s.slots[e->slot].pid = (int32_t) below(1 << 22);
                s.slots[e->slot].ready = below(2);
                supervisor_note_start(&s, e->slot, NOW);
                supervisor_publish(&s, e->slot);
            }
            break;
        case TERMINATED:
            PROMISE(p->terminate && (p->record || p->state == ST_RETIRED),
                    "slot %u: terminated, and is not", e->slot);
            if (p->record && below(2)) {
                supervisor_note_exit(&s, e->slot, KIND_EXITED, 1, 0, 0, 1, NOW, "end\xff", 4);
                supervisor_free(&s, e->slot);
            }
            break;
        case REJECTED:
            PROMISE(e->reason != NULL, "slot %u: rejected without a reason", e->slot);
            refused++;
            break;
        case REPAIRED:
            repaired++;
        }
    }
}

/* A slice.  One that ends early must say so: else the rest waits for the leisurely sweep. */
static uint32_t
sweep(uint32_t max, event_t *events)
{
    uint32_t n = supervisor_sweep(&s, max, NOW, events);

    PROMISE(n < SLICE_EVENTS || s.swept < s.sweep_until, "%u events, and no more is asked for", n);
    return n;
}

static void
look(void)
{
    uint32_t max = 1 + (uint32_t) below(nslots + 2);
    event_t *events = malloc(max * sizeof *events);     /* its bounds are known to a sanitizer */

    MUST(events != NULL);
    if (below(2))
        act(events, supervisor_drain(&s, max, NOW, events), max);
    else
        act(events, sweep(max, events), max);
    free(events);
}

static void
step(void)
{
    image_t  image;
    uint32_t x = (uint32_t) below(nslots), slot;
    detail_t detail;

    look();
    switch (below(8)) {
    case 0:
        supervisor_cid_gone(&s, (unsigned) below(20));
        break;
    case 1:
        if (s.ngone < 16) {
            s.next_cid = 1 + (uint32_t) below(3);       /* the ones that words are made of */
            supervisor_cid_new(&s);
        }
        break;
    case 2:
        if (s.slots[x].record)
            supervisor_free(&s, x);
        break;
    case 3:
        image_fill(&image, chance(), below(PAYLOAD_MAX + 1), below(2));
        supervisor_register(&s, image.bytes, sizeof image, NOW, &slot);
        break;
    case 4:
        s.accepting = below(4) > 0;
        break;
    case 5:
        if (supervisor_prepare_sleep(&s))
            supervisor_awake(&s);
        break;
    case 6:
        map_read_detail(&s.m, x, s.slots[x].generation, &detail);
        client_read_pending(&honest, x, s.slots[x].generation, &detail);
        break;
    default:                                    /* an honest client among all that */
        image_fill(&image, chance(), below(PAYLOAD_MAX + 1), below(2));
        if (client_register(&honest, image.bytes, image.r.flags != 0, &slot,
                            &(uint64_t) {0}) == REG_OK)
            client_terminate(&honest, slot, s.slots[slot].generation);
    }
}

static void
check_generations(void)
{
    for (uint32_t x = 0; x < nslots; x++) {
        PROMISE(s.slots[x].state == ST_RETIRED || s.slots[x].generation >= generations[x],
                "slot %u went back to generation %" PRIu64, x, s.slots[x].generation);
        generations[x] = s.slots[x].generation;
    }
}

/* New processes attach: cids 1 to 3, which words are made of, and an honest one. */
static void
welcome(void)
{
    s.next_cid = 1;
    for (int i = 0; i < 3; i++)
        supervisor_cid_new(&s);
    s.cids[honest.cid = 4000].state = CID_LIVE;
}

/* The damage has ended: clients are gone, workers end, the sweep goes round. */
static void
recover(void)
{
    event_t *events = malloc(nslots * sizeof *events);

    MUST(events != NULL);
    scarce = false;
    s.accepting = true;
    for (unsigned cid = 1; cid < CIDS; cid++)
        supervisor_cid_gone(&s, cid);
    for (int round = 0; round < 2; round++) {
        for (uint32_t x = 0; x < nslots; x++)
            if (s.slots[x].record)
                supervisor_free(&s, x);
        while (supervisor_drain(&s, nslots, NOW, events) > 0 || s.npending > 0)
            ;
        supervisor_request_sweep(&s);
        while (s.swept < s.sweep_until)
            sweep(1 + (uint32_t) below(nslots), events);
    }
    for (uint32_t x = 0; x < nslots; x++)
        if (s.slots[x].record)
            supervisor_free(&s, x);
    PROMISE(s.ngone == 0, "%u cids are never free", s.ngone);
    check_quiet(&s, "recovered");
    welcome();
    check_usable(&s, &honest, "recovered");
    free(events);
}

/* ------------------------------------------------------------------------------------------
 * Tables, and the second hand
 * ---------------------------------------------------------------------------------------- */

enum { END = -1 };
static _Atomic int  order;                      /* counts: odd, go; even, stand still */
static _Atomic int  obeyed;                     /* the last order that was seen */
static uint64_t     scribbles;

static void *
scribbler(void *seed)
{
    uint64_t r = *(uint64_t *) seed;
    int      seen;

    while ((seen = atomic_load(&order)) != END) {
        atomic_store(&obeyed, seen);
        if (seen % 2 == 0) {
            sched_yield();
            continue;
        }
        scribble(&r, true);
        scribbles++;
    }
    return NULL;
}

static void
hold_scribbler(void)
{
    int even = ++order;

    while (atomic_load(&obeyed) != even)
        sched_yield();
}

static void
open_table(void)
{
    static const uint32_t sizes[] = {1, 3, 5, 63, 64, 65, 70};
    geometry_t  g;
    const char *problem;

    nslots = sizes[below(sizeof sizes / sizeof *sizes)];
    if (below(4))                               /* mostly the smallest: more images a second */
        nslots = 1 + (uint32_t) below(6);
    ntokens = (uint32_t) below(4);
    g = geometry_of(nslots, ntokens);
    outbox = memory_file(g.outbox_size);
    inbox = memory_file(g.inbox_size);
    memset(&s, 0, sizeof s);
    MUST(supervisor_open(&s, outbox, inbox, nslots, ntokens, 1) == 0);
    generations = calloc(nslots, sizeof *generations);
    if (below(3) == 0) {                        /* a slot near its end */
        uint32_t x = (uint32_t) below(nslots);

        s.slots[x].generation = GENERATION_MAX - below(40);
        supervisor_publish(&s, x);
        store_relaxed(&s.m.controls[x].req, req_word(s.slots[x].generation, 0, 0, REQ_FREE));
    }
    memset(&honest, 0, sizeof honest);
    MUST(client_open(&honest, outbox, g.outbox_size, inbox, g.inbox_size, &problem) == 0);
    welcome();
    honest.connection = honest.supervisor = -1;
}

static void
close_table(void)
{
    for (uint32_t x = 0; x < nslots; x++)
        retired += s.slots[x].state == ST_RETIRED;
    free(generations);
    client_close(&honest);
    supervisor_close(&s);
    close(outbox);
    close(inbox);
}

int
main(int argc, char **argv)
{
    uint64_t  images = argc > 2 ? strtoull(argv[2], NULL, 0) : 10000, seed;
    pthread_t thread;
    bool      together = false;

    the_chance = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
    seed = chance();
    while (tried < images && violations < ENOUGH) {
        open_table();
        for (int i = 0; i < 20; i++) {
            if (!together && tried >= images / 3 * 2) {
                together = true;
                MUST(pthread_create(&thread, NULL, scribbler, &seed) == 0);
            }
            if (together)
                order++;
            scarce = below(3) == 0;
            for (int n = 0; n < 100; n++) {
                make_image();
                for (uint64_t steps = 1 + below(3); steps-- > 0;)
                    step();
                check_private(&s, "after an image");
                check_generations();
                tried++;
            }
            if (together)
                hold_scribbler();
            recover();
        }
        close_table();
    }
    atomic_store(&order, END);
    if (together)
        pthread_join(thread, NULL);
    return verdict(" accepted=%" PRIu64 " refused=%" PRIu64 " repaired=%" PRIu64 " retired=%" PRIu64
                   " scribbles=%" PRIu64, accepted, refused, repaired, retired, scribbles);
}
