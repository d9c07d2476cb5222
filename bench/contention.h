/*
 * contention.h - bursts of registrations and terminations by many processes, timed
 *
 * bursts.py tells the method.  A program that includes this says what its table is: the functions
 * declared below.  It is called as PROGRAM SLOTS PROCESSES SIZE BEATS and prints one JSON line,
 *
 *     [[begun, registered, terminated, CPU time of the supervisor before, and after], ...]
 *
 * a row per burst, for bursts.py to judge.  The process itself is the supervisor, the clients are
 * its children.
 */
#ifndef CONTENTION_H
#define CONTENTION_H

#include "../src/pgbgw/_slots.h"

#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#define BEAT    INT64_C(1000000)        /* ns */
#define PAUSE   INT64_C(100000)         /* ns between two looks at what is not timed */
#define TIRED   10                      /* ms that the supervisor sleeps if nobody wakes it */

typedef struct { uint64_t generation; uint32_t slot; } handle_t;
typedef union { record_t record; char bytes[RECORD_STRIDE]; } image_t;

/* Before the clients are forked. */
static void table_open(uint32_t slots, int clients);
/* In a client, first: map the table, touch its pages. */
static void client_attach(int client);
static handle_t client_ask(const image_t *image);
static void client_end(handle_t handle);
static bool client_gone(handle_t handle);
/* In the supervisor: sleep until something has changed, or TIRED; take over, let go. */
static void supervise(void);

#define MUST(condition)                                                                           \
    do {                                                                                          \
        if (!(condition)) {                                                                       \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #condition, strerror(errno));  \
            exit(1);                                                                              \
        }                                                                                         \
    } while (0)

typedef struct { int64_t begun, registered, terminated, cpu_before, cpu_after; } burst_t;

typedef struct {
    _Atomic int ready, finished;
    _Atomic int64_t begin_at;           /* 0: not all are ready */
} start_t;

static void
sleep_until(int64_t moment)
{
    struct timespec t = {.tv_sec = moment / 1000000000, .tv_nsec = moment % 1000000000};

    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) != 0)
        ;
}

static inline int64_t now(void) { return monotonic_ns(CLOCK_MONOTONIC); }

/* What BackgroundWorker(entry="pgbgw._bench_workers:noop", notify=False) packs. */
static void
pack_small(image_t *image)
{
    static const char entry[] = "pgbgw._bench_workers:noop";
    record_t *r = &image->record;

    *image = (image_t) {.record = {.version = RECORD_VERSION, .start_time = 2, .restart_ns = -1,
                                   .stop_timeout_ns = -1}};
    memcpy(r->entry, entry, r->entry_len = sizeof entry - 1);
    memcpy(r->name, entry, r->name_len = sizeof entry - 1);
    memcpy(r->type, entry, r->type_len = sizeof entry - 1);
}

/* Returns how many bursts there were. */
static int
bursts_of(burst_t *bursts, int size, int64_t begin_at, int64_t end_at)
{
    image_t   image;
    handle_t *handles = calloc((size_t) size, sizeof *handles);
    int       n = 0;
    clockid_t supervisor;

    MUST(handles && clock_getcpuclockid(getppid(), &supervisor) == 0);
    pack_small(&image);
    for (int64_t at = begin_at; at < end_at; at = (now() / BEAT + 1) * BEAT) {
        burst_t *b = &bursts[n++];

        sleep_until(at);
        b->cpu_before = monotonic_ns(supervisor);
        b->begun = now();
        for (int i = 0; i < size; i++)
            handles[i] = client_ask(&image);
        b->registered = now();
        for (int i = 0; i < size; i++)
            client_end(handles[i]);
        b->terminated = now();
        for (int i = 0; i < size; i++)
            while (!client_gone(handles[i]))
                sleep_until(now() + PAUSE);
        b->cpu_after = monotonic_ns(supervisor);
    }
    free(handles);
    return n;
}

static void *
shared_memory(size_t size)
{
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE,
                   -1, 0);

    MUST(p != MAP_FAILED);
    return p;
}

int
main(int argc, char **argv)
{
    int      slots, clients, size, beats;
    start_t *start;
    burst_t *bursts;
    int     *counts;
    bool     first = true;

    if (argc != 5 || (slots = atoi(argv[1])) < 1 || (clients = atoi(argv[2])) < 1 ||
        (size = atoi(argv[3])) < 1 || (beats = atoi(argv[4])) < 1) {
        fprintf(stderr, "usage: %s SLOTS PROCESSES SIZE BEATS\n", argv[0]);
        return 2;
    }
    start = shared_memory(sizeof *start);
    counts = shared_memory((size_t) clients * sizeof *counts);
    bursts = shared_memory((size_t) (clients * beats) * sizeof *bursts);
    MUST(prctl(PR_SET_TIMERSLACK, 1) == 0);
    alarm(60 + (unsigned) beats / 100);     /* the end of all, if a client fails */
    table_open((uint32_t) slots, clients);
    for (int i = 0; i < clients; i++) {
        pid_t pid = fork();

        MUST(pid >= 0);
        if (pid == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            client_attach(i);
            start->ready++;
            while (start->begin_at == 0)
                sleep_until(now() + PAUSE);
            counts[i] = bursts_of(&bursts[i * beats], size, start->begin_at,
                                  start->begin_at + beats * BEAT);
            start->finished++;
            _exit(0);
        }
    }
    while (start->ready < clients)
        supervise();
    start->begin_at = (now() / BEAT + 2) * BEAT;
    while (start->finished < clients)
        supervise();
    while (wait(NULL) > 0)
        ;
    printf("[");
    for (int i = 0; i < clients; i++)
        for (int j = 0; j < counts[i]; j++, first = false) {
            const burst_t *b = &bursts[i * beats + j];

            printf("%s[%" PRId64 ", %" PRId64 ", %" PRId64 ", %" PRId64 ", %" PRId64 "]",
                   first ? "" : ", ", b->begun, b->registered, b->terminated, b->cpu_before,
                   b->cpu_after);
        }
    printf("]\n");
    return 0;
}

#endif
