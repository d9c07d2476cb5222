/*
 * core.h - what the programs of this directory share
 *
 * Each program includes the shipped slot protocol unchanged, plays both of its sides without an
 * interpreter, and ends with one line "tried=N violations=N ..." that a test reads.
 */
#ifndef CORE_H
#define CORE_H

#include "../../../src/pgbgw/_slots.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/syscall.h>

#define NOW INT64_C(1700000000000000000)        /* the supervisor's Unix time: any will do */

/* ------------------------------------------------------------------------------------------
 * Chance and verdict
 * ---------------------------------------------------------------------------------------- */

/* splitmix64; threads have a state each. */
static inline uint64_t
chance_of(uint64_t *state)
{
    uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);

    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}
static uint64_t the_chance;
static inline uint64_t chance(void) { return chance_of(&the_chance); }
static inline uint64_t below(uint64_t n) { return chance() % n; }

static uint64_t tried;
static _Atomic uint64_t violations;
#define ENOUGH 20                               /* violations: no need to look for more */

__attribute__((format(printf, 1, 2))) static inline void
violation(const char *format, ...)
{
    va_list arguments;

    if (violations++ >= ENOUGH)
        return;
    va_start(arguments, format);
    printf("VIOLATION ");
    vprintf(format, arguments);
    printf("\n");
    va_end(arguments);
    fflush(stdout);
}
#define PROMISE(condition, ...)                                                                   \
    do {                                                                                          \
        if (!(condition))                                                                         \
            violation(__VA_ARGS__);                                                               \
    } while (0)

/* The harness itself cannot go on: no verdict. */
#define MUST(condition)                                                                           \
    do {                                                                                          \
        if (!(condition)) {                                                                       \
            fprintf(stderr, "%s:%d: %s: errno %d\n", __FILE__, __LINE__, #condition, errno);      \
            exit(3);                                                                              \
        }                                                                                         \
    } while (0)

/* The last line; the exit status of the program. */
__attribute__((format(printf, 1, 2))) static inline int
verdict(const char *format, ...)
{
    va_list arguments;

    printf("tried=%" PRIu64 " violations=%" PRIu64, tried, (uint64_t) violations);
    va_start(arguments, format);
    vprintf(format, arguments);
    printf("\n");
    va_end(arguments);
    fflush(stdout);
    return violations != 0;
}

/* ------------------------------------------------------------------------------------------
 * A table
 * ---------------------------------------------------------------------------------------- */

static inline int
memory_file(uint64_t size)
{
    int fd = (int) syscall(SYS_memfd_create, "core", 1u /* MFD_CLOEXEC */);

    MUST(fd >= 0 && ftruncate(fd, (off_t) size) == 0);
    return fd;
}

static inline int
pidfd_of(pid_t pid)
{
    int fd = (int) syscall(SYS_pidfd_open, pid, 0);

    MUST(fd >= 0);
    return fd;
}

/* A registration's image; every byte of it follows from its serial number and its lengths. */
typedef union {
    record_t r;
    char     bytes[RECORD_STRIDE];
} image_t;

static inline char
filler(uint64_t serial, size_t i)
{
    return (char) ('a' + (serial * 7 + i) % 26);
}

static inline void
image_fill(image_t *image, uint64_t serial, size_t payload, bool parallel)
{
    memset(image, 0, sizeof *image);
    image->r.version = RECORD_VERSION;
    image->r.flags = parallel ? FLAG_CLASS_PARALLEL : 0;
    image->r.start_time = 2;
    image->r.name_len = 3;
    image->r.type_len = 1;
    image->r.entry_len = 5;
    image->r.extra_len = 2;
    image->r.payload_len = (uint32_t) payload;
    image->r.restart_ns = -1;
    image->r.stop_timeout_ns = -1;
    image->r.main_arg = serial;
    for (size_t i = 0; i < 5; i++)
        image->r.entry[i] = filler(serial, i);
    for (size_t i = 0; i < 3; i++)
        image->r.name[i] = filler(serial, i + 5);
    image->r.type[0] = filler(serial, 8);
    for (size_t i = 0; i < 2; i++)
        image->r.extra[i] = filler(serial, i + 9);
    for (size_t i = 0; i < payload; i++)
        image->r.payload[i] = filler(serial, i + 11);
}

/* Is the private copy of a record what its registrant packed, to the byte? */
static inline bool
record_is(const record_t *r, const image_t *image)
{
    const record_t *w = &image->r;

    return memcmp(r, w, offsetof(record_t, registered_ns)) == 0 &&
           memcmp(r->name, w->name, w->name_len) == 0 &&
           memcmp(r->type, w->type, w->type_len) == 0 &&
           memcmp(r->entry, w->entry, w->entry_len) == 0 &&
           memcmp(r->extra, w->extra, w->extra_len) == 0 &&
           memcmp(r->payload, w->payload, w->payload_len) == 0;
}

/* What only the supervisor writes, private memory and outbox, agrees with itself: true at every
 * moment between two of its steps, whatever is in the inbox. */
static inline void
check_private(const supervisor_t *s, const char *when)
{
    const geometry_t *g = &s->m.g;
    uint64_t nfree = 0, npending = 0, ngone = 0;

    for (uint32_t x = 0; x < g->nslots; x++) {
        const slot_t *p = &s->slots[x];
        uint64_t st = st_word(p->generation, p->state, 0);

        if (p->state == ST_RUNNING)
            st = st_word(p->generation, p->state | (p->ready ? ST_READY_BIT : 0),
                         (uint32_t) p->pid);
        if (p->state == ST_RETIRED)
            st = st_word(0, ST_NONE, 0);
        nfree += p->state == ST_NONE;
        PROMISE(p->state <= ST_RETIRED, "%s: slot %u has state %u", when, x, p->state);
        PROMISE((p->generation == 0) == (p->state == ST_RETIRED),
                "%s: slot %u has generation %" PRIu64, when, x, p->generation);
        PROMISE(load_acquire(&s->m.status[x].st) == st,
                "%s: slot %u: the outbox shows %" PRIx64 ", not %" PRIx64, when, x,
                (uint64_t) load_acquire(&s->m.status[x].st), st);
        PROMISE((p->record != NULL) == (p->state >= ST_ACCEPTED && p->state <= ST_STOPPED),
                "%s: slot %u in state %u: record %s", when, x, p->state,
                p->record ? "left" : "missing");
        PROMISE(p->state != ST_NONE || (!p->cid && !p->token && !p->terminate && !p->ready),
                "%s: slot %u is free but has an owner, a token or a wish", when, x);
        PROMISE(p->token <= g->ntokens && (!p->token || s->tokens[p->token - 1].slot == x + 1),
                "%s: slot %u: its token %u is not bound to it", when, x, p->token);
        if (p->record)
            PROMISE(record_problem(p->record, p->token != 0) == NULL, "%s: slot %u: %s", when, x,
                    record_problem(p->record, p->token != 0));
    }
    for (uint32_t t = 0; t < g->ntokens; t++) {
        uint32_t x = s->tokens[t].slot;

        PROMISE(x <= g->nslots && (!x || s->slots[x - 1].token == t + 1),
                "%s: token %u is bound to slot %d, which has another", when, t, (int) x - 1);
    }
    for (uint32_t i = 0; i < g->nwords; i++)
        npending += (uint64_t) __builtin_popcountll(s->pending[i]);
    for (uint32_t i = 0; i < CIDS && s->ngone > 0; i++)
        ngone += s->cids[i].state == CID_GONE;
    if (g->nslots % 64)
        PROMISE(s->pending[g->nwords - 1] >> (g->nslots % 64) == 0,
                "%s: a slot that does not exist is pending", when);
    PROMISE(npending == s->npending, "%s: %u pending, not %" PRIu64, when, s->npending, npending);
    PROMISE(ngone == s->ngone, "%s: %u cids gone, not %" PRIu64, when, s->ngone, ngone);
    PROMISE(load_acquire(&s->m.outbox->nfree) == nfree, "%s: nfree is %" PRIu64 ", not %" PRIu64,
            when, (uint64_t) load_acquire(&s->m.outbox->nfree), nfree);
    PROMISE(load_acquire(&s->m.outbox->free_seq) % 2 == 0, "%s: free_seq is odd", when);
}

/* The inbox agrees with private memory too: true when no client is at work or has died unnoticed
 * and the sweep has gone round. */
static inline void
check_quiet(const supervisor_t *s, const char *when)
{
    check_private(s, when);
    for (uint32_t x = 0; x < s->m.g.nslots; x++) {
        const slot_t *p = &s->slots[x];
        uint64_t w = load_acquire(&s->m.controls[x].req);
        uint64_t due = p->state == ST_NONE ? req_word(p->generation, 0, 0, REQ_FREE) : canonical(p);

        if (p->state == ST_RETIRED)             /* nobody minds who terminates it */
            due = (due & ~REQ_TERM) | (w & REQ_TERM);
        PROMISE(w == due, "%s: slot %u: the inbox shows %" PRIx64 ", not %" PRIx64, when, x, w, due);
        if (p->state == ST_NONE)
            PROMISE(load_acquire(&s->m.hints[x / 64]) >> (x % 64) & 1,
                    "%s: slot %u is free and has no hint", when, x);
    }
    for (uint32_t t = 0; t < s->m.g.ntokens; t++) {
        const token_t *p = &s->tokens[t];
        uint64_t w = load_acquire(&s->m.tokens[t].req);
        uint64_t due = p->slot ? req_word(p->generation, s->slots[p->slot - 1].cid, 0, REQ_CLAIMED)
                               : req_word(p->generation, 0, 0, REQ_FREE);

        PROMISE(w == due, "%s: token %u shows %" PRIx64 ", not %" PRIx64, when, t, w, due);
    }
}

/* Another client can have every slot and every token that is not retired, and no more.  Before
 * and after, all of them are free. */
static inline void
check_usable(supervisor_t *s, client_t *other, const char *when)
{
    uint32_t n = 0, taken = 0, ntokens = s->m.g.ntokens, slot;
    uint64_t generation;
    event_t  events[DRAIN_MAX];
    image_t  image;

    for (uint32_t x = 0; x < s->m.g.nslots; x++)
        n += s->slots[x].state == ST_NONE;
    for (uint32_t i = 0; i < n; i++) {
        enum registration result;

        image_fill(&image, 1000 + i, 16, i < ntokens);
        result = client_register(other, image.bytes, i < ntokens, &slot, &generation);
        taken += result == REG_OK;
        PROMISE(result == REG_OK, "%s: registration %u of %u: %d", when, i, n, result);
    }
    image_fill(&image, 1, 16, false);
    PROMISE(client_register(other, image.bytes, false, &slot, &generation) == REG_NO_SLOT,
            "%s: a full table takes one more, or does not say that it is full", when);
    if (n >= ntokens && ntokens > 0)
        PROMISE(client_register(other, image.bytes, true, &slot, &generation) == REG_LIMIT,
                "%s: one more token than there are", when);
    do
        for (uint32_t i = supervisor_drain(s, DRAIN_MAX, NOW, events); i-- > 0;) {
            PROMISE(events[i].action == ACCEPTED, "%s: slot %u: event %u, %s", when,
                    events[i].slot, events[i].action, events[i].reason ? events[i].reason : "");
            taken -= events[i].action == ACCEPTED;
        }
    while (s->npending > 0);
    PROMISE(taken == 0, "%s: %u registrations were not accepted", when, taken);
    check_quiet(s, when);
    for (uint32_t x = 0; x < s->m.g.nslots; x++)
        if (s->slots[x].state != ST_NONE && s->slots[x].state != ST_RETIRED)
            supervisor_free(s, x);
    check_quiet(s, when);
}

#endif
