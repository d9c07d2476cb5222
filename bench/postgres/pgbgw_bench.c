/*
 * pgbgw_bench.c - PostgreSQL's background worker functions, timed inside a backend
 *
 * Question: what do RegisterDynamicBackgroundWorker, GetBackgroundWorkerPid,
 * TerminateBackgroundWorker and the waits cost, and how long does a worker take to start, stop and
 * restart?
 *
 * Method: SQL functions that call them in a loop and return the moments (CLOCK_MONOTONIC, ns),
 * nothing computed.  Workers leave theirs in shared memory.  What shall not be launched is asked
 * for with BgWorkerStart_RecoveryFinished on a hot standby: the postmaster accepts it, keeps it,
 * and lets it go when it is terminated, as it would any other.
 *
 * Bias: for PostgreSQL.  The library is preloaded, so that a worker loads nothing; workers connect
 * to no database; nobody asks for notification where nobody waits.
 */
#include "postgres.h"

#include <fcntl.h>
#include <sys/prctl.h>
#include <time.h>

#include "access/xlog.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "port/atomics.h"
#include "postmaster/bgworker.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/shmem.h"
#include "tcop/tcopprot.h"
#include "utils/tuplestore.h"

PG_MODULE_MAGIC;

#define LIBRARY   "pgbgw_bench"
#define MOMENTS   65536                 /* launches in flight, at most */
#define BEAT      1000000               /* ns: bursts of all processes begin on a multiple of it */
#define PAUSE     100                   /* us between two looks at what is not timed */

typedef BackgroundWorkerHandle *Handle;

typedef struct
{
    pg_atomic_uint64 launches;          /* tickets */
    pg_atomic_uint64 moments[MOMENTS];  /* when the worker with that ticket was there, or left */
} Shared;

static Shared *shared;
static shmem_request_hook_type next_request_hook;
static shmem_startup_hook_type next_startup_hook;

/* ------------------------------------------------------------------------------------------
 * Start
 * ---------------------------------------------------------------------------------------- */

static void
request_memory(void)
{
    if (next_request_hook)
        next_request_hook();
    RequestAddinShmemSpace(MAXALIGN(sizeof(Shared)));
}

static void
find_memory(void)
{
    bool        found;

    if (next_startup_hook)
        next_startup_hook();
    shared = ShmemInitStruct("pgbgw_bench", sizeof(Shared), &found);
    if (!found)
    {
        pg_atomic_init_u64(&shared->launches, 0);
        for (int i = 0; i < MOMENTS; i++)
            pg_atomic_init_u64(&shared->moments[i], 0);
    }
}

void _PG_init(void);

void
_PG_init(void)
{
    if (!process_shared_preload_libraries_in_progress)
        ereport(ERROR, errmsg(LIBRARY " must be in shared_preload_libraries"));
    next_request_hook = shmem_request_hook;
    shmem_request_hook = request_memory;
    next_startup_hook = shmem_startup_hook;
    shmem_startup_hook = find_memory;
}

/* ------------------------------------------------------------------------------------------
 * Time
 * ---------------------------------------------------------------------------------------- */

static inline int64
clock_ns(clockid_t clock)
{
    struct timespec t;

    clock_gettime(clock, &t);
    return (int64) t.tv_sec * 1000000000 + t.tv_nsec;
}

static inline int64
now(void)
{
    return clock_ns(CLOCK_MONOTONIC);
}

static void
sleep_until(int64 moment)
{
    struct timespec t = {.tv_sec = moment / 1000000000, .tv_nsec = moment % 1000000000};

    prctl(PR_SET_TIMERSLACK, 1L, 0, 0, 0);
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) != 0)
        CHECK_FOR_INTERRUPTS();
}

/* CPU time that the postmaster has used. */
static int64
postmaster_ns(void)
{
    char        path[64],
                text[64] = {0};
    int         file;

    snprintf(path, sizeof path, "/proc/%d/schedstat", (int) PostmasterPid);
    file = open(path, O_RDONLY);
    if (file < 0 || read(file, text, sizeof text - 1) <= 0)
        ereport(ERROR, errcode_for_file_access(), errmsg("could not read \"%s\": %m", path));
    close(file);
    return strtoll(text, NULL, 10);
}

static void
pause_shortly(void)
{
    pg_usleep(PAUSE);
    CHECK_FOR_INTERRUPTS();
}

/* ------------------------------------------------------------------------------------------
 * Workers
 * ---------------------------------------------------------------------------------------- */

PGDLLEXPORT void bench_noop_main(Datum ticket);
PGDLLEXPORT void bench_resident_main(Datum unused);
PGDLLEXPORT void bench_restart_main(Datum ticket);

static pg_atomic_uint64 *
moment_of(uint64 ticket)
{
    return &shared->moments[ticket % MOMENTS];
}

void
bench_noop_main(Datum ticket)
{
    pg_atomic_write_u64(moment_of(DatumGetUInt64(ticket)), now());
}

void
bench_resident_main(Datum unused)
{
    BackgroundWorkerUnblockSignals();
    for (;;)
    {
        WaitLatch(MyLatch, WL_LATCH_SET | WL_EXIT_ON_PM_DEATH, 0, PG_WAIT_EXTENSION);
        ResetLatch(MyLatch);
        CHECK_FOR_INTERRUPTS();
    }
}

/* Leave with status 1 as soon as the moment is 0, having written when. */
void
bench_restart_main(Datum ticket)
{
    pg_atomic_uint64 *moment = moment_of(DatumGetUInt64(ticket));

    BackgroundWorkerUnblockSignals();
    while (pg_atomic_read_u64(moment) != 0)
        pg_usleep(PAUSE);
    pg_atomic_write_u64(moment, now());
    proc_exit(1);
}

static BackgroundWorker
worker_of(const char *function, bool notify)
{
    BackgroundWorker worker = {
        .bgw_flags = BGWORKER_SHMEM_ACCESS,
        .bgw_start_time = BgWorkerStart_RecoveryFinished,
        .bgw_restart_time = BGW_NEVER_RESTART,
        .bgw_notify_pid = notify ? MyProcPid : 0,
    };

    strlcpy(worker.bgw_name, function, BGW_MAXLEN);     /* cluster.py looks for it in the title */
    strlcpy(worker.bgw_type, LIBRARY, BGW_MAXLEN);
    strlcpy(worker.bgw_library_name, LIBRARY, BGW_MAXLEN);
    strlcpy(worker.bgw_function_name, function, BGW_MAXLEN);
    return worker;
}

/* A ticket whose moment is 0. */
static uint64
take_ticket(void)
{
    uint64      ticket = pg_atomic_fetch_add_u64(&shared->launches, 1);

    pg_atomic_write_u64(moment_of(ticket), 0);
    return ticket;
}

static inline Handle
register_one(BackgroundWorker *worker)
{
    Handle      handle;

    if (!RegisterDynamicBackgroundWorker(worker, &handle))
        ereport(ERROR, errmsg("no free slot"), errhint("Ask for less than max_worker_processes."));
    return handle;
}

static void
wait_until_stopped(Handle handle)
{
    pid_t       pid;

    while (GetBackgroundWorkerPid(handle, &pid) != BGWH_STOPPED)
        pause_shortly();
}

/* ------------------------------------------------------------------------------------------
 * Rows
 * ---------------------------------------------------------------------------------------- */

static void
add_row(FunctionCallInfo fcinfo, int n, const int64 *values)
{
    ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;
    Datum       row[8];
    bool        nulls[8] = {false};

    for (int i = 0; i < n; i++)
        row[i] = Int64GetDatum(values[i]);
    tuplestore_putvalues(result->setResult, result->setDesc, row, nulls);
}
#define ADD_ROW(...) \
    add_row(fcinfo, lengthof(((int64[]) {__VA_ARGS__})), (int64[]) {__VA_ARGS__})

/* ------------------------------------------------------------------------------------------
 * Questions
 * ---------------------------------------------------------------------------------------- */

/* Register and terminate size workers; wait until they are stopped.  False if the table was full:
 * GetBackgroundWorkerPid says "stopped" a moment before the postmaster lets go of the slot, so that
 * some of an earlier burst may still be there. */
static bool
burst(int size, BackgroundWorker *worker, Handle *handles, int64 *registered, int64 *terminated)
{
    int         n = 0;

    while (n < size && RegisterDynamicBackgroundWorker(worker, &handles[n]))
        n++;
    *registered = now();
    for (int i = 0; i < n; i++)
        TerminateBackgroundWorker(handles[i]);
    *terminated = now();
    for (int i = 0; i < n; i++)
    {
        wait_until_stopped(handles[i]);
        pfree(handles[i]);
    }
    return n == size;
}

/*
 * Bursts, the first of them to warm up and not timed; then from begin_at to end_at, each on the
 * next beat after the one before.  A row per burst that the table had room for; the last two
 * columns are the CPU time that the postmaster had used before it and after.
 */
PG_FUNCTION_INFO_V1(bench_pairs);
Datum
bench_pairs(PG_FUNCTION_ARGS)
{
    int         size = PG_GETARG_INT32(0);
    int64       begin_at = PG_GETARG_INT64(1);
    int64       end_at = PG_GETARG_INT64(2);
    BackgroundWorker worker = worker_of("bench_resident_main", false);
    Handle     *handles = palloc(size * sizeof(Handle));
    int64       cpu,
                begun,
                registered,
                terminated;

    if (!RecoveryInProgress())
        ereport(ERROR, errmsg("only a hot standby does not launch what is registered here"));
    InitMaterializedSRF(fcinfo, 0);
    burst(size, &worker, handles, &registered, &terminated);
    for (int64 at = begin_at; at < end_at; at = (now() / BEAT + 1) * BEAT)
    {
        sleep_until(at);
        cpu = postmaster_ns();
        begun = now();
        if (burst(size, &worker, handles, &registered, &terminated))
            ADD_ROW(begun, registered, terminated, cpu, postmaster_ns());
    }
    sleep_until(end_at + 20 * BEAT);    /* the postmaster does not reap us while others measure */
    PG_RETURN_NULL();
}

/*
 * From begin_at on: register size workers that return at once, wait for all to start, wait for all
 * to stop.  A row per round; entered: when the last of them was in its entry function.
 */
PG_FUNCTION_INFO_V1(bench_launches);
Datum
bench_launches(PG_FUNCTION_ARGS)
{
    int         rounds = PG_GETARG_INT32(0);
    int         size = PG_GETARG_INT32(1);
    int64       begin_at = PG_GETARG_INT64(2);
    BackgroundWorker worker = worker_of("bench_noop_main", true);
    Handle     *handles = palloc(size * sizeof(Handle));
    uint64     *tickets = palloc(size * sizeof(uint64));

    InitMaterializedSRF(fcinfo, 0);
    sleep_until(begin_at);
    for (int round = 0; round < rounds; round++)
    {
        int64       begun,
                    registered,
                    entered = 0,
                    started,
                    stopped;
        pid_t       pid;

        for (int i = 0; i < size; i++)
            tickets[i] = take_ticket();
        begun = now();
        for (int i = 0; i < size; i++)
        {
            worker.bgw_main_arg = UInt64GetDatum(tickets[i]);
            handles[i] = register_one(&worker);
        }
        registered = now();
        for (int i = 0; i < size; i++)
            WaitForBackgroundWorkerStartup(handles[i], &pid);
        started = now();
        for (int i = 0; i < size; i++)
            WaitForBackgroundWorkerShutdown(handles[i]);
        stopped = now();
        for (int i = 0; i < size; i++)
        {
            entered = Max(entered, (int64) pg_atomic_read_u64(moment_of(tickets[i])));
            pfree(handles[i]);
        }
        ADD_ROW(begun, registered, entered, started, stopped);
    }
    PG_RETURN_NULL();
}

/* Ask for the pid of a running worker again and again, from begin_at on.  One row. */
PG_FUNCTION_INFO_V1(bench_polls);
Datum
bench_polls(PG_FUNCTION_ARGS)
{
    int64       polls = PG_GETARG_INT64(0);
    int64       begin_at = PG_GETARG_INT64(1);
    BackgroundWorker worker = worker_of("bench_resident_main", true);
    Handle      handle = register_one(&worker);
    pid_t       pid;
    int64       begun,
                ended,
                cpu;

    InitMaterializedSRF(fcinfo, 0);
    WaitForBackgroundWorkerStartup(handle, &pid);
    sleep_until(begin_at);
    cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    begun = now();
    for (int64 i = 0; i < polls; i++)
        GetBackgroundWorkerPid(handle, &pid);
    ended = now();
    cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    TerminateBackgroundWorker(handle);
    WaitForBackgroundWorkerShutdown(handle);
    ADD_ROW(begun, ended, cpu);
    PG_RETURN_NULL();
}

/* A worker with restart_time 0 leaves with status 1, again and again.  A row per restart: when it
 * left, and when another pid was seen. */
PG_FUNCTION_INFO_V1(bench_restarts);
Datum
bench_restarts(PG_FUNCTION_ARGS)
{
    int         rounds = PG_GETARG_INT32(0);
    BackgroundWorker worker = worker_of("bench_restart_main", true);
    uint64      ticket = take_ticket();
    pg_atomic_uint64 *moment = moment_of(ticket);
    Handle      handle;
    pid_t       pid;

    InitMaterializedSRF(fcinfo, 0);
    worker.bgw_restart_time = 0;
    worker.bgw_main_arg = UInt64GetDatum(ticket);
    pg_atomic_write_u64(moment, 1);
    handle = register_one(&worker);
    WaitForBackgroundWorkerStartup(handle, &pid);
    for (int round = 0; round < rounds; round++)
    {
        pid_t       next = pid;
        int64       visible;

        pg_atomic_write_u64(moment, 0);
        while (GetBackgroundWorkerPid(handle, &next) != BGWH_STARTED || next == pid)
            CHECK_FOR_INTERRUPTS();
        visible = now();
        ADD_ROW((int64) pg_atomic_read_u64(moment), visible);
        pid = next;
        pg_usleep(10000);               /* until it has come to rest */
    }
    TerminateBackgroundWorker(handle);
    WaitForBackgroundWorkerShutdown(handle);
    PG_RETURN_NULL();
}

/* Fill the table, have that many more registrations refused, empty it.  One row.  The postmaster is
 * stopped meanwhile: what is terminated before it looks it never launches. */
PG_FUNCTION_INFO_V1(bench_refusals);
Datum
bench_refusals(PG_FUNCTION_ARGS)
{
    int         calls = PG_GETARG_INT32(0);
    BackgroundWorker worker = worker_of("bench_resident_main", false);
    Handle     *handles = palloc(max_worker_processes * sizeof(Handle));
    Handle      unwanted;
    int         n = 0;
    int         refused = 0;
    int64       begun,
                ended;

    InitMaterializedSRF(fcinfo, 0);
    kill(PostmasterPid, SIGSTOP);
    while (n < max_worker_processes && RegisterDynamicBackgroundWorker(&worker, &handles[n]))
        n++;
    begun = now();
    for (int i = 0; i < calls; i++)
        refused += !RegisterDynamicBackgroundWorker(&worker, &unwanted);
    ended = now();
    for (int i = 0; i < n; i++)
        TerminateBackgroundWorker(handles[i]);
    kill(PostmasterPid, SIGCONT);
    for (int i = 0; i < n; i++)
        wait_until_stopped(handles[i]);
    if (refused < calls)
        ereport(ERROR, errmsg("the table was not full"));
    ADD_ROW(begun, ended);
    PG_RETURN_NULL();
}

/* Start workers that stay, idle, after this backend has gone.  On a hot standby they are registered
 * and wait there.  The number of those that run. */
PG_FUNCTION_INFO_V1(bench_residents);
Datum
bench_residents(PG_FUNCTION_ARGS)
{
    int         n = PG_GETARG_INT32(0);
    bool        launched = !RecoveryInProgress();
    BackgroundWorker worker = worker_of("bench_resident_main", launched);
    Handle     *handles = palloc(n * sizeof(Handle));
    int         running = 0;
    pid_t       pid;

    for (int i = 0; i < n; i++)
        handles[i] = register_one(&worker);
    for (int i = 0; launched && i < n; i++)
        running += WaitForBackgroundWorkerStartup(handles[i], &pid) == BGWH_STARTED;
    PG_RETURN_INT32(running);
}
