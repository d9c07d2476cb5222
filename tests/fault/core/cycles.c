/*
 * cycles.c - a million registrations leave nothing behind (the test plan's T12, the core's part)
 *
 *     cycles SEED CYCLES [MEMCHECK]
 *
 * Register, accept, run, terminate, free, round and round, with claims of dead clients, refusals
 * and cancellations in between.  Memory, descriptors and the sum of generations are as they must be; MEMCHECK, anything,
 * leaves the memory to another judge.
 */
#include "core.h"

#include <dirent.h>
#include <malloc.h>

enum { NSLOTS = 7, NTOKENS = 3 };

static supervisor_t s;
static client_t     c;
static uint64_t     frees, accepted, cancelled, rejected, reclaimed;

static uint64_t
resident_bytes(void)
{
    FILE *f = fopen("/proc/self/statm", "re");
    unsigned long size, resident;

    MUST(f && fscanf(f, "%lu %lu", &size, &resident) == 2);
    fclose(f);
    return (uint64_t) resident * PAGE;
}

static uint32_t
descriptors(void)
{
    DIR     *d = opendir("/proc/self/fd");
    uint32_t n = 0;

    MUST(d != NULL);
    while (readdir(d))
        n++;
    closedir(d);
    return n;
}

static void
act(const event_t *events, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        const event_t *e = &events[i];

        accepted += e->action == ACCEPTED;
        cancelled += e->action == CANCELLED;
        rejected += e->action == REJECTED;
        reclaimed += e->action == RECLAIMED;
        frees += e->action == CANCELLED || e->action == REJECTED || e->action == RECLAIMED;
        PROMISE(e->action != REPAIRED, "slot %u: repaired, and nothing was damaged", e->slot);
        if (e->action == ACCEPTED) {
            s.slots[e->slot].state = ST_RUNNING;
            s.slots[e->slot].pid = 4711;
            supervisor_note_start(&s, e->slot, NOW);
            supervisor_publish(&s, e->slot);
        }
        if (e->action == TERMINATED) {
            supervisor_note_exit(&s, e->slot, KIND_EXITED, 1, 0, 0, 1, NOW, "trace", 5);
            s.slots[e->slot].state = ST_STOPPED;
            supervisor_publish(&s, e->slot);
            supervisor_free(&s, e->slot);
            frees++;
        }
    }
}

static void
drain(void)
{
    event_t events[NSLOTS];

    act(events, supervisor_drain(&s, NSLOTS, NOW, events));
}

/* A client claims, with a token, and dies. */
static void
die(void)
{
    client_t dead = c;
    event_t  events[NSLOTS];
    uint64_t generation;
    uint32_t slot;

    dead.cid = (uint16_t) supervisor_cid_new(&s);
    PROMISE(client_find(&dead, client_take_token(&dead), &slot, &generation) == REG_OK, "full");
    supervisor_cid_gone(&s, dead.cid);
    while (s.ngone > 0)
        act(events, supervisor_sweep(&s, NSLOTS, NOW, events));
}

static void
cycle(void)
{
    image_t  image;
    uint32_t slot;
    uint64_t generation, kind = below(64);
    bool     parallel = below(2);

    image_fill(&image, tried, below(PAYLOAD_MAX + 1), parallel);
    if (kind == 0)
        image.r.start_time = START_TIMES;       /* refused */
    if (kind == 1)
        die();
    PROMISE(client_register(&c, image.bytes, parallel, &slot, &generation) == REG_OK, "refused");
    if (kind == 0 || kind > 2)                  /* else it is cancelled before it is noticed */
        drain();
    PROMISE(client_terminate(&c, slot, generation) == (kind != 0), "not terminated");
    drain();
    PROMISE(client_freed(&c, slot, generation), "slot %u is not free", slot);
    tried++;
}

static void
check_memory(uint64_t used, uint64_t resident)
{
    /* Some slack: the allocator counts what it keeps for its thread as used. */
    PROMISE(mallinfo2().uordblks <= used + 4 * PAGE, "%zu bytes in use, %" PRIu64 " in the beginning",
            mallinfo2().uordblks, used);
    PROMISE(resident_bytes() <= resident + 32 * PAGE, "%" PRIu64 " bytes resident, %" PRIu64
            " in the beginning", resident_bytes(), resident);
}

int
main(int argc, char **argv)
{
    uint64_t   cycles = argc > 2 ? strtoull(argv[2], NULL, 0) : 10000, generations = 0;
    geometry_t g = geometry_of(NSLOTS, NTOKENS);
    int        outbox = memory_file(g.outbox_size), inbox = memory_file(g.inbox_size);
    const char *problem;
    uint64_t   used = 0, resident = 0;
    uint32_t   open = 0;

    the_chance = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
    MUST(supervisor_open(&s, outbox, inbox, NSLOTS, NTOKENS, 1) == 0);
    MUST(client_open(&c, outbox, g.outbox_size, inbox, g.inbox_size, &problem) == 0);
    c.cid = (uint16_t) supervisor_cid_new(&s);
    c.connection = c.supervisor = -1;
    for (uint64_t warm = cycles / 10; tried < cycles;) {
        cycle();
        if (tried == warm) {                    /* the allocator has settled */
            used = mallinfo2().uordblks;
            resident = resident_bytes();
            open = descriptors();
        }
    }
    check_quiet(&s, "in the end");
    for (uint32_t x = 0; x < NSLOTS; x++)
        generations += s.slots[x].generation - 1;
    PROMISE(generations == frees, "%" PRIu64 " generations, %" PRIu64 " frees", generations, frees);
    PROMISE(frees == tried + reclaimed, "%" PRIu64 " frees of %" PRIu64 " registrations", frees,
            tried);
    if (argc <= 3)
        check_memory(used, resident);
    PROMISE(descriptors() == open, "%u descriptors, %u in the beginning", descriptors(), open);
    client_close(&c);
    supervisor_close(&s);
    return verdict(" accepted=%" PRIu64 " cancelled=%" PRIu64 " rejected=%" PRIu64
                   " reclaimed=%" PRIu64 " frees=%" PRIu64, accepted, cancelled, rejected,
                   reclaimed, frees);
}
