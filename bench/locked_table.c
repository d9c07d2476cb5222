/*
 * locked_table.c - the design that pgbgw started from, over the same records: see contention.h
 *
 * Question: what do one lock and a linear scan cost, everything else being equal?
 *
 * Method: PostgreSQL's table.  One array of slots, 2048 bytes each; a registration takes the lock,
 * scans for the first free slot, copies its record (the same bytes that pgbgw copies) and marks it
 * in use; a termination takes the lock and sets a flag.  The supervisor scans the whole array,
 * copies what is new and frees what is terminated.  Clients may die at any time, so that the lock
 * is a robust mutex, which the supervisor takes as well: that is what sharing memory with clients
 * one does not trust with a spinlock comes to.
 *
 * Bias: for the lock.  PostgreSQL signals its postmaster at every change; here a client wakes the
 * supervisor only if it sleeps, which it knows under the lock.  Nothing is checked or repaired.
 */
#include "contention.h"

#include <sys/eventfd.h>

typedef struct {
    bool     in_use, terminate;
    int32_t  pid;                       /* -1: the supervisor has not seen it yet */
    uint64_t generation;
    record_t record;
    char     payload[PAYLOAD_MAX];
    char     tail[RECORD_STRIDE - 16 - sizeof(record_t) - PAYLOAD_MAX];
} entry_t;
_Static_assert(sizeof(entry_t) == RECORD_STRIDE, "the stride of pgbgw's records");

typedef struct {
    alignas(64) pthread_mutex_t lock;
    bool     sleeping;                  /* the supervisor, or it will as soon as it can */
    alignas(RECORD_STRIDE) entry_t slots[];
} table_t;

static table_t  *table;
static record_t *taken;                 /* the supervisor's copies */
static uint32_t  nslots;
static int       bell;

static void
lock(void)
{
    int error = pthread_mutex_lock(&table->lock);

    if (error == EOWNERDEAD)
        error = pthread_mutex_consistent(&table->lock);
    MUST(error == 0);
}

static void
unlock(void)
{
    MUST(pthread_mutex_unlock(&table->lock) == 0);
}

/* Unlock, and wake the supervisor if it sleeps. */
static void
unlock_and_ring(void)
{
    uint64_t one = 1;
    bool     ring = table->sleeping;

    table->sleeping = false;
    unlock();
    if (ring)
        MUST(write(bell, &one, sizeof one) == sizeof one);
}

static void
copy_record(record_t *to, const record_t *from)
{
    memcpy(to, from, RECORD_HEADER);
    memcpy(to->name, from->name, from->name_len);
    memcpy(to->type, from->type, from->type_len);
    memcpy(to->entry, from->entry, from->entry_len);
    memcpy(to->extra, from->extra, from->extra_len);
    memcpy(to->payload, from->payload, from->payload_len);
}

static void
table_open(uint32_t slots, int clients)
{
    pthread_mutexattr_t how;

    (void) clients;
    nslots = slots;
    table = shared_memory(sizeof *table + slots * sizeof *table->slots);
    taken = calloc(slots, sizeof *taken);
    bell = eventfd(0, 0);
    MUST(taken && bell >= 0);
    MUST(pthread_mutexattr_init(&how) == 0 &&
         pthread_mutexattr_setpshared(&how, PTHREAD_PROCESS_SHARED) == 0 &&
         pthread_mutexattr_setrobust(&how, PTHREAD_MUTEX_ROBUST) == 0 &&
         pthread_mutex_init(&table->lock, &how) == 0);
}

static void
client_attach(int client)
{
    (void) client;
    MUST(madvise(table, sizeof *table + nslots * sizeof *table->slots, MADV_POPULATE_WRITE) == 0);
}

static handle_t
client_ask(const image_t *image)
{
    handle_t h = {.slot = 0};
    entry_t *e;

    lock();
    while (h.slot < nslots && table->slots[h.slot].in_use)
        h.slot++;
    MUST(h.slot < nslots);
    e = &table->slots[h.slot];
    copy_record(&e->record, &image->record);
    e->record.registered_ns = (uint64_t) now();
    e->pid = -1;
    h.generation = ++e->generation;
    e->terminate = false;
    e->in_use = true;
    unlock_and_ring();
    return h;
}

static void
client_end(handle_t h)
{
    entry_t *e = &table->slots[h.slot];

    lock();
    MUST(e->in_use && e->generation == h.generation);
    e->terminate = true;
    unlock_and_ring();
}

static bool
client_gone(handle_t h)
{
    entry_t *e = &table->slots[h.slot];
    bool     gone;

    lock();
    gone = !e->in_use || e->generation != h.generation;
    unlock();
    return gone;
}

static void
supervise(void)
{
    struct pollfd p = {.fd = bell, .events = POLLIN};
    uint64_t      rung;
    bool          changed = false;

    lock();
    for (uint32_t x = 0; x < nslots; x++) {
        entry_t *e = &table->slots[x];

        if (!e->in_use)
            continue;
        if (e->terminate) {
            e->in_use = false;
            changed = true;
        } else if (e->pid == -1) {
            copy_record(&taken[x], &e->record);
            e->pid = 0;
            changed = true;
        }
    }
    table->sleeping = !changed;
    unlock();
    if (!changed && poll(&p, 1, TIRED) > 0)
        MUST(read(bell, &rung, sizeof rung) == sizeof rung);
}
