/*
 * _slots.h - the slot protocol: words, layout, and both sides of it in plain C11
 *
 * Two shared segments.  The OUTBOX is written by the supervisor alone and sealed read-only for
 * everybody else; the INBOX is written by clients and never trusted.  The truth is in the
 * supervisor's private memory (slot_t): the outbox is its broadcast, the inbox its request box.
 *
 * There is no lock anywhere.  A slot's inbox word ("req") says who owns the slot:
 *
 *     FREE --claim (C1)--> CLAIMED --publish (C3)--> READY --free (S7)--> FREE, generation + 1
 *                             |                        | terminate (C5): sets TERM
 *                             +--owner died: free (S8)-+
 *
 *   req   [63:26] generation | [25:14] client id | [13:3] token index + 1 | [2] TERM | [1:0] state
 *   st    [63:26] generation | [25:22] state, READY bit | [21:0] pid            (outbox)
 *
 * Who may write what, and when
 *   FREE      any client, by C1 (one compare-and-swap)
 *   CLAIMED   the claiming client alone: its record, then the word by C3.  The supervisor takes a
 *             claim away only once the claimer's pidfd was readable: its last store has landed.
 *   READY     any client may set TERM (C5).  The supervisor reads the record once, frees by S7.
 *   The outbox, all of it: the supervisor alone.
 *
 * Invariants
 *   I1  A client changes req by single compare-and-swaps, the supervisor by single exchanges: no
 *       step of the supervisor waits for, or loops because of, a client.
 *   I2  Only the supervisor advances a generation, by one, in S7; never back, never to 0 within
 *       an epoch.  A slot whose generations are used up is retired.  (epoch, slot, generation)
 *       names one registration for ever.
 *   I3  The outbox shows generation g + 1 before the inbox word is FREE with g + 1: whoever holds
 *       a handle never reads an older status than the handle's.
 *   I4  Every client operation compares the generation inside the very word that it changes.
 *   I5  The supervisor decides by slot_t and by its private copy of a record, never by shared
 *       memory read twice.  What does not agree with slot_t is repaired in place (S9).
 *   I6  A parallel registration takes its token before its slot and names it in req; the
 *       supervisor binds the token when it accepts and frees both together.  Published parallel
 *       registrations never exceed the number of tokens.
 *   I7  Zero is not a valid inbox word: a client can punch holes, and a hole reads as zero.
 *   I8  A client sets the dirty bit after publish or terminate, then loads the sleep word; the
 *       supervisor makes the sleep word odd, then scans the dirty bits.  Both sequentially
 *       consistent: one of the two sees the other, so no change is slept over.
 *   I9  The hint of a slot is set after it was freed, cleared before it is published.  A stale
 *       set hint is harmless, a lost one is set again by the sweep; nobody decides by hints.
 *   I10 Negative answers ("no free slot") are exact when free_seq was even and unchanged: see
 *       client_register().
 *   I11 A dead client's cid is reused only after a full round of the sweep that began after its
 *       death was noticed: published slots accepted, claims freed, then its unbound tokens freed.
 */
#ifndef PGBGW_SLOTS_H
#define PGBGW_SLOTS_H

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "64-bit atomics must be lock free");
_Static_assert(sizeof(void *) == 8, "64-bit platforms only");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "little-endian platforms only");

typedef _Atomic uint64_t word_t;

#define load_relaxed(p)         atomic_load_explicit((p), memory_order_relaxed)
#define load_acquire(p)         atomic_load_explicit((p), memory_order_acquire)
#define load_seq_cst(p)         atomic_load_explicit((p), memory_order_seq_cst)
#define store_relaxed(p, v)     atomic_store_explicit((p), (v), memory_order_relaxed)
#define store_release(p, v)     atomic_store_explicit((p), (v), memory_order_release)
#define store_seq_cst(p, v)     atomic_store_explicit((p), (v), memory_order_seq_cst)
#define exchange_acq_rel(p, v)  atomic_exchange_explicit((p), (v), memory_order_acq_rel)
#define or_seq_cst(p, v)        atomic_fetch_or_explicit((p), (v), memory_order_seq_cst)
#define or_release(p, v)        atomic_fetch_or_explicit((p), (v), memory_order_release)
#define and_acq_rel(p, v)       atomic_fetch_and_explicit((p), (v), memory_order_acq_rel)

static inline bool
cas_acq_rel(word_t *p, uint64_t expected, uint64_t desired)
{
    return atomic_compare_exchange_strong_explicit(p, &expected, desired, memory_order_acq_rel,
                                                   memory_order_acquire);
}

/* ------------------------------------------------------------------------------------------
 * Words
 * ---------------------------------------------------------------------------------------- */

enum { REQ_INVALID = 0, REQ_FREE = 1, REQ_CLAIMED = 2, REQ_READY = 3 };
#define REQ_TERM        ((uint64_t) 4)
#define GENERATION_MAX  (((uint64_t) 1 << 38) - 1)
#define CID_SUPERVISOR  0               /* owner of static workers; no client ever has it */
#define CIDS            4096
#define MAX_SLOTS       262143
#define MAX_TOKENS      1024

static inline uint64_t
req_word(uint64_t generation, unsigned cid, unsigned token, unsigned state)
{
    return generation << 26 | (uint64_t) cid << 14 | (uint64_t) token << 3 | state;
}
static inline uint64_t word_generation(uint64_t w) { return w >> 26; }
static inline unsigned req_cid(uint64_t w) { return (unsigned) (w >> 14) & 0xfff; }
static inline unsigned req_token(uint64_t w) { return (unsigned) (w >> 3) & 0x7ff; }
static inline unsigned req_state(uint64_t w) { return (unsigned) w & 3; }

/* States of a slot as the supervisor sees it; those up to ST_STOPPED are broadcast in st. */
enum { ST_NONE = 0, ST_ACCEPTED = 1, ST_RUNNING = 2, ST_STOPPED = 3, ST_RETIRED = 4 };
#define ST_READY_BIT 8                  /* with ST_RUNNING: the worker said it is ready */

static inline uint64_t
st_word(uint64_t generation, unsigned state, uint32_t pid)
{
    return generation << 26 | (uint64_t) state << 22 | (pid & 0x3fffff);
}
static inline unsigned st_state(uint64_t w) { return (unsigned) (w >> 22) & 7; }
static inline bool st_ready(uint64_t w) { return (w >> 22) & ST_READY_BIT; }
static inline uint32_t st_pid(uint64_t w) { return (uint32_t) w & 0x3fffff; }

/* ------------------------------------------------------------------------------------------
 * Layout
 * ---------------------------------------------------------------------------------------- */

#define OUTBOX_MAGIC    UINT64_C(0x3178656b77676270)
#define ABI_MAJOR       1
#define ABI_MINOR       0
#define ENDIAN_TAG      0x01020304
#define PAGE            4096
#define POPULATE_LIMIT  ((uint64_t) 64 << 20)   /* records and details populated at the start */
#define CHUNK_SLOTS     64                      /* else they are populated this many at a time */
#define FEATURE_POPULATED 1                     /* all records and details have their pages */

/* The registration record, as BackgroundWorker packs it; the arrays are used up to their lengths. */
typedef struct {
    uint32_t version, flags, start_time, notify;
    uint32_t name_len, type_len, entry_len, extra_len, payload_len, zero;
    int64_t  restart_ns, stop_timeout_ns;       /* -1: never */
    uint64_t main_arg;
    uint64_t registered_ns;                     /* CLOCK_MONOTONIC at registration: launch order */
    char     reserve[24];
    char     name[96], type[96], entry[512], extra[128];
    char     payload[];                         /* up to PAYLOAD_MAX bytes */
} record_t;
#define RECORD_VERSION 1
#define RECORD_HEADER  offsetof(record_t, name)
#define RECORD_STRIDE  2048                     /* in the inbox */
#define PAYLOAD_MAX    1024
_Static_assert(RECORD_HEADER == 96 && offsetof(record_t, registered_ns) == 64, "as worker.py");
_Static_assert(sizeof(record_t) == 928 && sizeof(record_t) + PAYLOAD_MAX <= RECORD_STRIDE,
               "as worker.py");

#define FLAG_SHMEM_ACCESS        0x01
#define FLAG_DATABASE_CONNECTION 0x02
#define FLAG_CLASS_PARALLEL      0x10
#define FLAGS_KNOWN (FLAG_SHMEM_ACCESS | FLAG_DATABASE_CONNECTION | FLAG_CLASS_PARALLEL)
#define START_TIMES 3
#define MAX_INTERVAL_NS (INT64_C(86400000) * 1000000000)

/* What a slot's current or previous generation was and how it ended.  seq is odd while the
 * supervisor writes; a reader tries again a bounded number of times and then does without. */
typedef struct {
    word_t   seq;
    uint64_t generation;
    uint32_t kind;                              /* OUTCOME_KINDS of worker.py */
    int32_t  exitcode, signal;
    uint32_t restarts, final;
    uint32_t flags, start_time, reserve;
    int64_t  restart_ns;
    int64_t  registered_at, started_at, stopped_at;     /* Unix time, ns; 0: not yet */
    char     name[96], type[96], activity[64], error[512];
    char     tail[1024 - 848];
} detail_t;
_Static_assert(sizeof(detail_t) == 1024, "details are 1024 bytes");
#define DETAIL_WORDS (sizeof(detail_t) / 8 - 1)         /* without seq */

/* A cache line each: no false sharing. */
typedef struct {
    alignas(64) word_t st;
    word_t   refused;           /* the last generation rejected without a page for its detail */
} status_t;
typedef struct { alignas(64) word_t req; } control_t;
_Static_assert(sizeof(status_t) == 64 && sizeof(control_t) == 64, "one line each");

/* How long the supervisor's loop could not answer: its passes, from a wait's end to the next wait,
 * counted by their length.  pauses[0] counts those under 1 us, pauses[i] those under 2^i us and
 * not under half of that, the last all that are longer. */
#define PAUSES 24

typedef struct {
    uint64_t magic;
    uint32_t abi_major, abi_minor, header_size, endian;
    uint64_t layout_hash;
    uint64_t epoch;                             /* random, not 0, new for every supervisor */
    uint32_t nslots, ntokens, ncids, features;
    uint64_t outbox_size, inbox_size;
    uint32_t supervisor_pid, reserve;           /* to show, never to decide by */
    uint64_t checksum;                          /* of all above */
    alignas(64) word_t free_seq;                /* odd while the supervisor frees something */
    word_t   nfree;                             /* slots that are ST_NONE; raised inside free_seq */
    alignas(64) word_t sleep;                   /* a counter: odd = the supervisor sleeps (I8) */
    alignas(64) word_t phase;                   /* Phase | ShutdownMode << 8 */
    alignas(64) word_t longest_pause;           /* ns of the loop's longest pass: see PAUSES */
    word_t   pauses[PAUSES];
} outbox_t;
_Static_assert(sizeof(outbox_t) <= PAGE, "the header has a page");

typedef struct {
    uint32_t nslots, ntokens, nwords;           /* nwords: 64-bit words of a bitmap */
    uint64_t at_status, at_detail, outbox_size;
    uint64_t at_tokens, at_controls, at_dirty, at_hints, at_records, inbox_size;
    bool     populated;
} geometry_t;

static inline uint64_t
page_align(uint64_t n)
{
    return (n + PAGE - 1) & ~(uint64_t) (PAGE - 1);
}

/* All offsets follow from these two numbers; nobody reads an offset from shared memory. */
static inline geometry_t
geometry_of(uint32_t nslots, uint32_t ntokens)
{
    geometry_t g = {.nslots = nslots, .ntokens = ntokens, .nwords = (nslots + 63) / 64};

    g.at_status = PAGE;
    g.at_detail = page_align(g.at_status + (uint64_t) nslots * sizeof(status_t));
    g.outbox_size = page_align(g.at_detail + (uint64_t) nslots * 2 * sizeof(detail_t));
    g.at_tokens = PAGE;
    g.at_controls = g.at_tokens + (uint64_t) ntokens * sizeof(control_t);
    g.at_dirty = g.at_controls + (uint64_t) nslots * sizeof(control_t);
    g.at_hints = (g.at_dirty + (uint64_t) g.nwords * 8 + 63) & ~UINT64_C(63);
    g.at_records = page_align(g.at_hints + (uint64_t) g.nwords * 8);
    g.inbox_size = page_align(g.at_records + (uint64_t) nslots * RECORD_STRIDE);
    g.populated = (uint64_t) nslots * (RECORD_STRIDE + 2 * sizeof(detail_t)) <= POPULATE_LIMIT;
    return g;
}

static inline uint64_t
fnv1a(uint64_t h, const void *data, size_t n)
{
    const unsigned char *p = data;

    for (size_t i = 0; i < n; i++)
        h = (h ^ p[i]) * UINT64_C(0x100000001b3);
    return h;
}
#define FNV1A_START UINT64_C(0xcbf29ce484222325)

/* Changes whenever a struct that two processes share does. */
static inline uint64_t
layout_hash(void)
{
    static const uint32_t facts[] = {
        sizeof(record_t), RECORD_STRIDE, sizeof(detail_t), sizeof(status_t), sizeof(control_t),
        sizeof(outbox_t),
        offsetof(record_t, restart_ns), offsetof(record_t, registered_ns),
        offsetof(record_t, name), offsetof(record_t, type), offsetof(record_t, entry),
        offsetof(record_t, extra), offsetof(record_t, payload),
        offsetof(detail_t, kind), offsetof(detail_t, restart_ns), offsetof(detail_t, name),
        offsetof(detail_t, activity), offsetof(detail_t, error),
        offsetof(status_t, refused),
        offsetof(outbox_t, epoch), offsetof(outbox_t, features), offsetof(outbox_t, checksum),
        offsetof(outbox_t, free_seq), offsetof(outbox_t, nfree), offsetof(outbox_t, sleep),
        offsetof(outbox_t, phase), offsetof(outbox_t, longest_pause), PAUSES,
    };
    return fnv1a(FNV1A_START, facts, sizeof(facts));
}

/* Both segments as one process sees them. */
typedef struct {
    outbox_t  *outbox;
    char      *inbox;
    geometry_t g;
    uint64_t   epoch;
    status_t  *status;
    detail_t  *detail;
    control_t *tokens, *controls;
    word_t    *dirty, *hints;
    char      *records;
} map_t;

/* Forked children must not touch the mappings (MADV_DONTFORK: they do not have them): each view
 * remembers this count, and a child sees that it has changed. */
static unsigned fork_count;
static void count_fork(void) { fork_count++; }

static inline void
map_place(map_t *m)
{
    char *outbox = (char *) m->outbox;

    m->status = (status_t *) (outbox + m->g.at_status);
    m->detail = (detail_t *) (outbox + m->g.at_detail);
    m->tokens = (control_t *) (m->inbox + m->g.at_tokens);
    m->controls = (control_t *) (m->inbox + m->g.at_controls);
    m->dirty = (word_t *) (m->inbox + m->g.at_dirty);
    m->hints = (word_t *) (m->inbox + m->g.at_hints);
    m->records = m->inbox + m->g.at_records;
}

/* 0, or -1 with errno. */
static inline int
map_segment(void **where, int fd, uint64_t size, int protection)
{
    void *p = mmap(NULL, size, protection, MAP_SHARED, fd, 0);

    if (p == MAP_FAILED)
        return -1;
    if (madvise(p, size, MADV_DONTFORK) != 0) {
        munmap(p, size);
        return -1;
    }
    *where = p;
    return 0;
}

static inline void
map_close(map_t *m)
{
    if (m->outbox)
        munmap(m->outbox, m->g.outbox_size);
    if (m->inbox)
        munmap(m->inbox, m->g.inbox_size);
    m->outbox = NULL;
    m->inbox = NULL;
}

static inline record_t *
record_of(const map_t *m, uint32_t slot)
{
    return (record_t *) (m->records + (uint64_t) slot * RECORD_STRIDE);
}

/* Where generation's detail stands: each slot keeps those of two generations. */
static inline detail_t *
detail_of(const map_t *m, uint32_t slot, uint64_t generation)
{
    return &m->detail[(uint64_t) slot * 2 + (generation & 1)];
}

/* Copy a detail; false if it is another generation's or was being written at every try (a
 * supervisor that died in mid-write leaves seq odd for ever).  Pairs with detail_store(). */
static inline bool
map_read_detail(const map_t *m, uint32_t slot, uint64_t generation, detail_t *copy)
{
    detail_t *shared = detail_of(m, slot, generation);
    word_t   *from = (word_t *) shared + 1;
    uint64_t *to = (uint64_t *) copy + 1;

    for (int attempt = 0; attempt < 64; attempt++) {
        uint64_t seq = load_acquire(&shared->seq);

        if (seq & 1) {
            sched_yield();                      /* preempted in mid-write, perhaps by us */
            continue;
        }
        for (size_t i = 0; i < DETAIL_WORDS; i++)
            to[i] = load_acquire(&from[i]);     /* acquire: seq is loaded again after them */
        if (load_relaxed(&shared->seq) == seq)
            return copy->generation == generation;
        sched_yield();
    }
    return false;
}

static inline int64_t
monotonic_ns(clockid_t clock)
{
    struct timespec t;

    clock_gettime(clock, &t);
    return (int64_t) t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Copy between private memory and shared words: relaxed atomics, so that neither the compiler
 * nor a sanitizer sees a race.  n is rounded up to whole words. */
static inline void
words_store(void *shared, const void *private, size_t n)
{
    word_t *to = shared;
    const char *from = private;

    for (size_t i = 0; i < (n + 7) / 8; i++) {
        uint64_t w;

        memcpy(&w, from + 8 * i, 8);
        store_relaxed(&to[i], w);
    }
}
static inline void
words_load(void *private, const void *shared, size_t n)
{
    const word_t *from = shared;
    char *to = private;

    for (size_t i = 0; i < (n + 7) / 8; i++) {
        uint64_t w = load_relaxed((word_t *) &from[i]);

        memcpy(to + 8 * i, &w, 8);
    }
}

/* One step through UTF-8: how many bytes to take, and whether they may be shown.  What is no
 * valid sequence, a control character, a line or paragraph separator or a mark that turns the
 * writing direction is not: a name must not forge log lines or terminal output. */
static inline size_t
utf8_step(const unsigned char *s, size_t n, bool *printable)
{
    size_t   length = s[0] < 0x80 ? 1 : s[0] >= 0xf0 ? 4 : s[0] >= 0xe0 ? 3 : 2;
    uint32_t c = length == 1 ? s[0] : s[0] & (0xff >> (length + 1));
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};

    *printable = false;
    if ((s[0] >= 0x80 && s[0] < 0xc2) || s[0] > 0xf4 || length > n)
        return 1;
    for (size_t i = 1; i < length; i++) {
        if ((s[i] & 0xc0) != 0x80)
            return 1;
        c = c << 6 | (s[i] & 0x3f);
    }
    if (c < least[length] || c > 0x10ffff || (c >= 0xd800 && c < 0xe000))
        return 1;
    *printable = !(c < 0x20 || (c >= 0x7f && c < 0xa0) || c == 0x61c || c == 0x200e ||
                   c == 0x200f || (c >= 0x2028 && c <= 0x202e) || (c >= 0x2066 && c <= 0x2069));
    return length;
}

/* Copy n bytes as a terminated string that is safe to show; cut at a character if too long.
 * Newlines and tabs stay if text, as in a traceback. */
static inline size_t
sanitise(char *to, size_t size, const char *from, size_t n, bool text)
{
    size_t out = 0;

    memset(to, 0, size);
    for (size_t i = 0; i < n;) {
        bool   printable;
        size_t step = utf8_step((const unsigned char *) from + i, n - i, &printable);

        if (text && (from[i] == '\n' || from[i] == '\t'))
            printable = true;
        if (out + (printable ? step : 1) >= size)
            break;
        if (printable)
            memcpy(to + out, from + i, step);
        else
            to[out] = '?';
        out += printable ? step : 1;
        i += step;
    }
    return out;
}

#include "_slots_client.h"
#include "_slots_supervisor.h"

#endif
