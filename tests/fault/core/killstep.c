/*
 * killstep.c - SIGKILL at every instruction (the test plan's T02)
 *
 *     killstep SEED STRIDE [OPERATION]
 *
 * A traced child does one operation of the slot protocol and is stopped after k instructions, for
 * every k (every STRIDE-th from a random phase; a third of these after pass 0 if the operation is
 * long).  Either the child is a client and this process is the supervisor, or the other way round.
 * Then
 *
 *     pass 0   the child is killed, and the supervisor goes through its death procedure
 *     pass 1   the supervisor looks while the child stands still at a step before; it goes on to
 *              step k and is killed there
 *     pass 2   others act between two instructions of the child (a slot is freed and taken, say),
 *              which then goes on to the end: its answer must fit one moment of the meantime
 *
 * and all invariants are checked.  Stepping there would take time quadratic in the length of an
 * operation; instead the child runs to a breakpoint and steps the rest.  Should its way differ
 * from the recorded one, that is a trial, too, and the position is tried again.
 */
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* The clock by a system call: the usual way reads again when it ticks, and steps make it slow. */
static int
clock_by_call(clockid_t clock, struct timespec *t)
{
    return (int) syscall(SYS_clock_gettime, clock, t);
}
#define clock_gettime clock_by_call
#include "core.h"
#undef clock_gettime

#include <elf.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>

/* On machines with load-exclusive instructions build for atomics of one instruction: a step
 * between the two loses the reservation, and the operation would never end. */
#if defined(__x86_64__)
#define TRAP_CODE    0xcc
#define TRAP_MASK    0xff
#define TRAP_LENGTH  1                          /* the program counter stands behind it */
#define PC           rip
#elif defined(__aarch64__)
#define TRAP_CODE    0xd4200000
#define TRAP_MASK    0xffffffff
#define TRAP_LENGTH  0
#define PC           pc
#endif

enum { NSLOTS = 3, NTOKENS = 2, PAYLOAD = 16 };
enum { LONG = 300, TRIES = 10 };                /* instructions; to get to one of them */
enum { CHILD = 1, OTHER = 2, VICTIM = 3 };      /* cids where the child is the supervisor */

/* What the child's operation answered, in memory that outlives the child. */
typedef struct {
    int      done, result;
    uint32_t slot;
    uint64_t generation;
    detail_t detail;
} answer_t;
static volatile answer_t *answer;

static int           outbox, inbox;
static supervisor_t  s;                         /* of whoever is the supervisor */
static client_t      other;                     /* of this process */
static int           doors[2];
static image_t       image;                     /* what the child registers */
static uint32_t      old_slot;                  /* a registration from before the operation */
static uint64_t      old_generation;
static const char   *what;                      /* for messages: operation, pass, position */
static uint64_t      positions, missed;

/* ------------------------------------------------------------------------------------------
 * Stepping
 * ---------------------------------------------------------------------------------------- */

#define STEPS_MAX 60000
static struct {
    uintptr_t pc[STEPS_MAX];
    uint32_t  visit[STEPS_MAX];                 /* how often pc[i] was there up to step i */
    uint32_t  n;
} path;
extern char __executable_start, etext;

static struct user_regs_struct
registers_of(pid_t pid)
{
    struct user_regs_struct r;
    struct iovec v = {&r, sizeof r};

    MUST(ptrace(PTRACE_GETREGSET, pid, (void *) NT_PRSTATUS, &v) == 0);
    return r;
}

/* Let the child go on; false if it has ended. */
static bool
resume(pid_t pid, int request)
{
    int status;

    MUST(ptrace(request, pid, NULL, NULL) == 0);
    MUST(waitpid(pid, &status, 0) == pid);
    if (WIFEXITED(status) || WIFSIGNALED(status)) {
        PROMISE(WIFEXITED(status) && WEXITSTATUS(status) == 0, "%s: the child ended with %x", what,
                (unsigned) status);
        return false;
    }
    MUST(WSTOPSIG(status) == SIGTRAP);
    return true;
}

/* Begin: in a new process prepare, stop, operate, end. */
static pid_t
start(void (*operate)(void), void (*prepare)(void), void (*finish)(void))
{
    pid_t pid = fork();
    int   status;

    MUST(pid >= 0);
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        prepare();
        if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) != 0)
            _exit(3);
        raise(SIGSTOP);
        operate();
        finish();
    }
    MUST(waitpid(pid, &status, 0) == pid && WIFSTOPPED(status));
    MUST(ptrace(PTRACE_SETOPTIONS, pid, NULL, (void *) PTRACE_O_EXITKILL) == 0);
    return pid;
}

static void
kill_and_reap(pid_t pid)
{
    MUST(kill(pid, SIGKILL) == 0 && waitpid(pid, NULL, 0) == pid);
}

/* The way that the operation takes, up to its answer. */
static void
record_path(pid_t pid)
{
    path.n = 0;
    while (!answer->done && resume(pid, PTRACE_SINGLESTEP)) {
        MUST(++path.n < STEPS_MAX);
        path.pc[path.n] = registers_of(pid).PC;
        path.visit[path.n] = 1;
        for (uint32_t i = path.n - 1; i > 0; i--)
            if (path.pc[i] == path.pc[path.n]) {
                path.visit[path.n] = path.visit[i] + 1;
                break;
            }
    }
}

/* Run to the n-th visit of pc; false if the child ended first. */
static bool
run_to(pid_t pid, uintptr_t pc, uint32_t n)
{
    long code;

    errno = 0;
    code = ptrace(PTRACE_PEEKTEXT, pid, (void *) pc, NULL);
    MUST(errno == 0);
    for (;;) {
        struct user_regs_struct r;
        struct iovec v = {&r, sizeof r};

        MUST(ptrace(PTRACE_POKETEXT, pid, (void *) pc, (code & ~(long) TRAP_MASK) | TRAP_CODE) == 0);
        if (!resume(pid, PTRACE_CONT))
            return false;
        r = registers_of(pid);
        r.PC -= TRAP_LENGTH;
        MUST(r.PC == pc && ptrace(PTRACE_SETREGSET, pid, (void *) NT_PRSTATUS, &v) == 0);
        MUST(ptrace(PTRACE_POKETEXT, pid, (void *) pc, code) == 0);
        if (--n == 0)
            return true;
        if (!resume(pid, PTRACE_SINGLESTEP))
            return false;
    }
}

/* Put the child, which stands at the beginning, behind its k-th instruction. */
enum place { THERE, ELSEWHERE, ENDED };
static enum place
step_to(pid_t pid, uint32_t k, bool by_breakpoint)
{
    uint32_t best = 0, cost = by_breakpoint ? k : 0;

    for (uint32_t j = k; j > 0 && k - j < cost; j--)
        if (path.pc[j] >= (uintptr_t) &__executable_start && path.pc[j] < (uintptr_t) &etext &&
            3 * path.visit[j] + k - j < cost) {
            best = j;
            cost = 3 * path.visit[j] + k - j;
        }
    if (best > 0 && !run_to(pid, path.pc[best], path.visit[best]))
        return ENDED;
    for (uint32_t i = best; i < k; i++)
        if (!resume(pid, PTRACE_SINGLESTEP))
            return ENDED;
    return k == 0 || registers_of(pid).PC == path.pc[k] ? THERE : ELSEWHERE;
}

/* ------------------------------------------------------------------------------------------
 * The child is a client
 * ---------------------------------------------------------------------------------------- */

typedef struct {
    const char *name;
    void (*arrange)(void);                      /* this process: the table before */
    void (*open)(void);                         /* the child, before it is traced */
    void (*operate)(void);                      /* the child */
    void (*between)(void);                      /* this process, in pass 2 */
    void (*judge)(bool ended);                  /* this process: the child's answer */
} operation_t;

static client_t mine;                           /* of the child */
static unsigned cid;
static struct {
    uint64_t generation[NSLOTS], word[NSLOTS];  /* before the operation; when the child died */
    uint64_t repairs;
    uint32_t freed[NSLOTS], terminated[NSLOTS];
    uint32_t accepted;                          /* of the child */
    uint32_t slot;
} seen;

static void
open_client(client_t *c, unsigned id, pid_t supervisor)
{
    const char *problem;

    memset(c, 0, sizeof *c);
    MUST(client_open(c, outbox, geometry_of(NSLOTS, NTOKENS).outbox_size, inbox,
                     geometry_of(NSLOTS, NTOKENS).inbox_size, &problem) == 0);
    c->cid = (uint16_t) id;
    c->connection = doors[1];
    c->supervisor = pidfd_of(supervisor);
}

static void
note(const event_t *events, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        const event_t *e = &events[i];

        PROMISE(e->action != REPAIRED && e->action != REJECTED, "%s: slot %u: event %u, %s", what,
                e->slot, e->action, e->reason ? e->reason : "");
        seen.freed[e->slot] += e->action == RECLAIMED || e->action == CANCELLED;
        seen.terminated[e->slot] += e->action == TERMINATED;
        if (e->action == ACCEPTED) {
            const slot_t *p = &s.slots[e->slot];
            image_t       theirs;

            image_fill(&theirs, p->record->main_arg, PAYLOAD, p->token != 0);
            PROMISE(record_is(p->record, e->cid == cid ? &image : &theirs),
                    "%s: slot %u: another record", what, e->slot);
            if (e->cid == cid) {
                seen.accepted++;
                seen.slot = e->slot;
            }
        }
    }
}

static void
drain_all(void)
{
    event_t events[2];

    do
        note(events, supervisor_drain(&s, 2, NOW, events));
    while (s.npending > 0);
}

static void
sweep_round(void)
{
    event_t events[1];

    for (uint32_t i = 0; i < NSLOTS; i++)
        note(events, supervisor_sweep(&s, 1, NOW, events));
}

/* The supervisor does what it may do at any time. */
static void
supervisor_looks(void)
{
    if (below(3) > 0)
        drain_all();
    if (below(3) > 0)
        sweep_round();
}

static void
silence_doors(void)
{
    char message[64];

    while (recv(doors[0], message, sizeof message, MSG_DONTWAIT) > 0)
        ;
}

/* Somebody else registers and is accepted, in slot first if that is free. */
static void
other_registers(uint32_t first, uint64_t serial)
{
    image_t theirs;

    image_fill(&theirs, serial, PAYLOAD, false);
    store_relaxed(&other.next, first);
    MUST(client_register(&other, theirs.bytes, false, &old_slot, &old_generation) == REG_OK);
    drain_all();
}

static void arrange_nothing(void) {}
static void arrange_one(void) { other_registers(1, 50); }
static void arrange_two(void) { other_registers(0, 50); other_registers(1, 51); }
static void arrange_full(void) { arrange_two(); other_registers(2, 52); }
static void
arrange_lost_hints(void)
{
    arrange_two();
    store_relaxed(&s.m.hints[0], 0);
}
/* Tokens run out before slots do. */
static void
arrange_no_token(void)
{
    image_t theirs;

    image_fill(&theirs, 50, PAYLOAD, true);
    for (int i = 0; i < NTOKENS; i++)
        MUST(client_register(&other, theirs.bytes, true, &old_slot, &old_generation) == REG_OK);
    drain_all();
}
/* The handle is of a generation that has gone, and its slot is in use again. */
static void
arrange_stale(void)
{
    uint64_t stale;

    other_registers(1, 50);
    stale = old_generation;
    supervisor_free(&s, 1);
    other_registers(1, 51);
    old_generation = stale;
    old_slot = 1;
}
/* The handle's registration is published and not noticed. */
static void
arrange_unnoticed(void)
{
    image_t theirs;

    image_fill(&theirs, 50, PAYLOAD, false);
    MUST(client_register(&other, theirs.bytes, false, &old_slot, &old_generation) == REG_OK);
}

static void open_mine(void) { open_client(&mine, cid, getppid()); }
static void open_nothing(void) {}

static void
answer_registration(bool parallel)
{
    uint32_t slot = 0;
    uint64_t generation = 0;
    int      result = client_register(&mine, image.bytes, parallel, &slot, &generation);

    answer->slot = slot;
    answer->generation = generation;
    answer->result = result;
}
static void operate_register(void) { answer_registration(false); }
static void operate_parallel(void) { answer_registration(true); }
static void
operate_terminate(void)
{
    answer->result = client_terminate(&mine, old_slot, old_generation);
}
static void
operate_status(void)
{
    uint64_t generation;
    bool gone = client_supervisor_gone(&mine);
    uint64_t st = client_status(&mine, old_slot);

    answer->generation = word_generation(st);
    answer->slot = st_state(st);
    answer->result = client_freed(&mine, old_slot, old_generation) << 1 |
                     client_occupied(&mine, old_slot, &generation) | gone << 2;
}
static void
operate_detail(void)
{
    answer->result = map_read_detail(&mine.m, old_slot, old_generation, (detail_t *) &answer->detail);
}
static void
operate_pending(void)
{
    answer->result = client_read_pending(&mine, old_slot, old_generation,
                                         (detail_t *) &answer->detail);
}
static void
operate_attach(void)
{
    const char *problem;

    answer->result = client_open(&mine, outbox, geometry_of(NSLOTS, NTOKENS).outbox_size, inbox,
                                 geometry_of(NSLOTS, NTOKENS).inbox_size, &problem);
    client_close(&mine);
}

static void
client_ends(void)
{
    answer->done = 1;
    _exit(0);
}

/* While the child stands still: a slot of the full, or nearly full, table is freed, and before
 * the child goes on another registrant may take the one that was free. */
static void
between_free(void)
{
    if (s.slots[0].state != ST_NONE)
        supervisor_free(&s, 0);
}
static void
between_free_and_take(void)
{
    sweep_round();                              /* its hint is there at the latest now */
    between_free();
    other_registers(2, 60);
}
static void
between_renew(void)
{
    uint64_t generation = old_generation;
    uint32_t slot = old_slot;

    drain_all();
    supervisor_free(&s, slot);
    other_registers(slot, 60);
    MUST(old_slot == slot);
    old_generation = generation;
}
/* It lies down to sleep; if it does, the operation must wake it (I8). */
static bool asleep;
static void
between_sleep(void)
{
    supervisor_awake(&s);
    silence_doors();
    asleep = supervisor_prepare_sleep(&s);
}

/* The second next generation's detail stands where the old one's was. */
static void
between_renew_twice(void)
{
    uint64_t generation = old_generation;

    between_renew();
    between_renew();
    old_generation = generation;
}

static void
judge_registration(bool ended)
{
    PROMISE(seen.accepted <= 1, "%s: accepted %u times", what, seen.accepted);
    if (!ended)
        return;
    PROMISE(answer->result != REG_OK || (seen.accepted == 1 && seen.slot == answer->slot),
            "%s: the registration in slot %u was not accepted", what, answer->slot);
    PROMISE(answer->result == REG_OK || seen.accepted == 0, "%s: refused with %d, and accepted",
            what, answer->result);
}
static void
judge_success(bool ended)
{
    judge_registration(ended);
    PROMISE(!ended || answer->result == REG_OK, "%s: refused with %d", what, answer->result);
}
static bool
somebody_rang(void)
{
    struct pollfd door = {.fd = doors[0], .events = POLLIN};

    return poll(&door, 1, 0) > 0;
}
static void
judge_bell(bool ended)
{
    judge_success(ended);
    PROMISE(!ended || !asleep || somebody_rang(), "%s: the supervisor sleeps over it", what);
}
/* There was always a free slot, though not always the same: "no slot" is wrong, "again" is not. */
static void
judge_never_full(bool ended)
{
    judge_registration(ended);
    PROMISE(!ended || answer->result == REG_OK || answer->result == REG_AGAIN,
            "%s: refused with %d, and the table was never full", what, answer->result);
}
static void
judge_full(bool ended)
{
    judge_registration(ended);
    PROMISE(!ended || answer->result != REG_LIMIT, "%s: no token", what);
}
static void
judge_no_token(bool ended)
{
    judge_registration(ended);
    PROMISE(!ended || answer->result == REG_LIMIT, "%s: answered %d", what, answer->result);
}
static void
judge_termination(bool ended)
{
    bool current = s.slots[old_slot].generation == old_generation;

    PROMISE(!ended || !current || (answer->result && s.slots[old_slot].terminate) ||
            seen.freed[old_slot], "%s: the wish to terminate is lost", what);
    PROMISE(current || !s.slots[old_slot].terminate, "%s: another registration is terminated", what);
}
static void
judge_stale(bool ended)
{
    PROMISE(!ended || !answer->result, "%s: a stale handle terminated something", what);
    PROMISE(!s.slots[old_slot].terminate, "%s: another registration is terminated", what);
}
static void
judge_status(bool ended)
{
    if (!ended)
        return;
    PROMISE(!(answer->result & 4), "%s: the supervisor is not dead", what);
    PROMISE(answer->generation == old_generation || answer->generation == old_generation + 1,
            "%s: generation %" PRIu64, what, answer->generation);
    PROMISE(answer->generation > old_generation || answer->slot == ST_ACCEPTED, "%s: state %u",
            what, answer->slot);
    PROMISE(answer->result & 3, "%s: neither freed nor occupied", what);
}
static void
judge_detail(bool ended)
{
    image_t theirs;

    if (!ended || !answer->result)
        return;
    image_fill(&theirs, 50, PAYLOAD, false);
    PROMISE(answer->detail.generation == old_generation &&
            memcmp((const char *) answer->detail.name, theirs.r.name, theirs.r.name_len) == 0,
            "%s: a detail of generation %" PRIu64, what, answer->detail.generation);
}
static void
judge_attachment(bool ended)
{
    PROMISE(!ended || answer->result == 0, "%s: no attachment", what);
    for (uint32_t x = 0; x < NSLOTS; x++)
        PROMISE(seen.word[x] == req_word(seen.generation[x], 0, 0, REQ_FREE), "%s: slot %u", what, x);
}

static const operation_t client_operations[] = {
    {"register", arrange_nothing, open_mine, operate_register, supervisor_looks, judge_success},
    {"register-parallel", arrange_one, open_mine, operate_parallel, supervisor_looks,
     judge_success},
    {"register-while-it-lies-down", arrange_nothing, open_mine, operate_register, between_sleep,
     judge_bell},
    {"register-around-a-free", arrange_two, open_mine, operate_register, between_free_and_take,
     judge_never_full},
    {"register-without-hints", arrange_lost_hints, open_mine, operate_register,
     between_free_and_take, judge_never_full},
    {"register-parallel-full", arrange_full, open_mine, operate_parallel, between_free, judge_full},
    {"register-no-token", arrange_no_token, open_mine, operate_parallel, NULL, judge_no_token},
    {"terminate", arrange_one, open_mine, operate_terminate, between_renew, judge_termination},
    {"terminate-unnoticed", arrange_unnoticed, open_mine, operate_terminate, supervisor_looks,
     judge_termination},
    {"terminate-stale", arrange_stale, open_mine, operate_terminate, between_renew, judge_stale},
    {"status", arrange_one, open_mine, operate_status, between_renew, judge_status},
    {"detail", arrange_one, open_mine, operate_detail, between_renew_twice, judge_detail},
    {"pending", arrange_unnoticed, open_mine, operate_pending, between_renew, judge_detail},
    {"attach", arrange_nothing, open_nothing, operate_attach, NULL, judge_attachment},
};

static void
begin_trial(const operation_t *o)
{
    memset(&seen, 0, sizeof seen);
    memset((void *) answer, 0, sizeof *answer);
    asleep = false;
    s.next_cid = 2;                             /* the same way in every trial */
    cid = supervisor_cid_new(&s);
    o->arrange();
    image_fill(&image, chance() % 1000000, PAYLOAD,
               o->operate == operate_parallel);
    silence_doors();
    supervisor_awake(&s);
    supervisor_prepare_sleep(&s);               /* so that the operation rings */
    memset(&seen, 0, sizeof seen);
    for (uint32_t x = 0; x < NSLOTS; x++)
        seen.generation[x] = s.slots[x].generation;
    seen.repairs = s.repairs;
}

/* The death procedure, and all that must be true after it. */
static void
end_trial(const operation_t *o, bool ended, bool undisturbed)
{
    event_t events[1];
    uint32_t rounds = 0;

    for (uint32_t x = 0; x < NSLOTS; x++)
        seen.word[x] = load_acquire(&s.m.controls[x].req);
    if (below(2))
        drain_all();
    supervisor_cid_gone(&s, cid);
    for (; s.cids[cid].state == CID_GONE && rounds < 100; rounds++)
        note(events, supervisor_sweep(&s, 1, NOW, events));
    PROMISE(rounds < 100, "%s: the cid is never free", what);
    check_quiet(&s, what);
    drain_all();
    check_quiet(&s, what);

    for (uint32_t x = 0; x < NSLOTS; x++) {
        const slot_t *p = &s.slots[x];

        if (undisturbed)
            PROMISE(p->generation == seen.generation[x] + seen.freed[x],
                    "%s: slot %u: generation %" PRIu64 " from %" PRIu64 " by %u frees", what, x,
                    p->generation, seen.generation[x], seen.freed[x]);
        if (req_state(seen.word[x]) == REQ_READY && (seen.word[x] & REQ_TERM))
            PROMISE(p->terminate || seen.freed[x] == 1, "%s: slot %u: TERM had no effect", what, x);
        PROMISE(p->state == ST_NONE || p->cid == other.cid ||
                (p->cid == cid && seen.accepted == 1), "%s: slot %u is left in use", what, x);
    }
    PROMISE(s.repairs == seen.repairs, "%s: repaired what a death left behind", what);
    o->judge(ended);

    for (uint32_t x = 0; x < NSLOTS; x++)
        if (s.slots[x].state != ST_NONE)
            supervisor_free(&s, x);
    check_quiet(&s, what);
    check_usable(&s, &other, what);
    silence_doors();
}

static void
open_table(void)
{
    geometry_t g = geometry_of(NSLOTS, NTOKENS);

    MUST(ftruncate(outbox, 0) == 0 && ftruncate(outbox, (off_t) g.outbox_size) == 0);
    MUST(ftruncate(inbox, 0) == 0 && ftruncate(inbox, (off_t) g.inbox_size) == 0);
    memset(&s, 0, sizeof s);
    MUST(supervisor_open(&s, outbox, inbox, NSLOTS, NTOKENS, 1) == 0);
}

/* One trial of a client; where it was stopped. */
static enum place
try_client(const operation_t *o, int pass, uint32_t k, bool by_breakpoint)
{
    uint32_t   stop = pass == 1 ? k - (uint32_t) below((k < 40 ? k : 40) + 1) : k;
    enum place place;
    pid_t      pid;

    begin_trial(o);
    pid = start(o->operate, o->open, client_ends);
    place = step_to(pid, stop, by_breakpoint);
    if (pass == 1 && place != ENDED) {
        supervisor_looks();
        for (uint32_t i = stop; i < k && place != ENDED; i++)
            if (!resume(pid, PTRACE_SINGLESTEP))
                place = ENDED;
    }
    if (pass == 2 && place != ENDED) {
        o->between();
        MUST(!resume(pid, PTRACE_CONT));
    } else if (place != ENDED)
        kill_and_reap(pid);
    end_trial(o, answer->done, pass == 0);
    return place;
}

static void
step_client(const operation_t *o, uint32_t stride)
{
    static char name[160];
    uint32_t    later, detours;
    pid_t       pid;

    open_table();
    open_client(&other, supervisor_cid_new(&s), getpid());
    what = o->name;
    begin_trial(o);
    pid = start(o->operate, o->open, client_ends);
    record_path(pid);
    kill_and_reap(pid);
    end_trial(o, answer->done, true);
    later = path.n > LONG ? 3 * stride : stride;
    for (int pass = 0; pass < (o->between ? 3 : 2); pass++)
        for (uint32_t every = pass ? later : stride, k = (uint32_t) below(every);
             k <= path.n && violations < ENOUGH; k += every) {
            snprintf(name, sizeof name, "%s, pass %d, step %u of %u", o->name, pass, k, path.n);
            what = name;
            for (detours = 0; detours < TRIES; detours++, tried++)
                if (try_client(o, pass, k, detours < TRIES - 2) == THERE)
                    break;
            tried++;
            missed += detours == TRIES;
        }
    positions += path.n + 1;
    close(other.supervisor);
    client_close(&other);
    supervisor_close(&s);
}

/* ------------------------------------------------------------------------------------------
 * The child is the supervisor
 * ---------------------------------------------------------------------------------------- */

typedef struct {
    const char *name;
    void (*arrange)(void);                      /* the child, before it is traced */
    void (*operate)(void);                      /* the child */
} duty_t;

static struct { uint64_t word[NSLOTS], token[NTOKENS]; } mid;   /* when the child stood still */

static void
must_register(client_t *c, uint32_t first, uint64_t serial, bool parallel)
{
    image_t  theirs;
    uint32_t slot;
    uint64_t generation;

    image_fill(&theirs, serial, PAYLOAD, parallel);
    store_relaxed(&c->next, first);
    MUST(client_register(c, theirs.bytes, parallel, &slot, &generation) == REG_OK && slot == first);
}

/* Registrations 70 (parallel), 71, 72; the last is of a client that will die. */
static void
open_duty(void)
{
    open_table();
    for (unsigned id = CHILD; id <= VICTIM; id++)
        MUST(supervisor_cid_new(&s) == id);
    open_client(&mine, CHILD, getppid());
    must_register(&mine, 0, 70, true);
}
static void
arrange_published(void)
{
    open_duty();
}
static void
arrange_cancelled(void)
{
    open_duty();
    MUST(client_terminate(&mine, 0, 1));
}
static void
arrange_accepted(void)
{
    open_duty();
    must_register(&mine, 1, 71, false);
    must_register(&mine, 2, 72, false);
    drain_all();
    supervisor_prepare_sleep(&s);
}
static void
arrange_dead_claim(void)
{
    client_t dead;
    uint64_t generation;

    open_duty();
    open_client(&dead, VICTIM, getppid());
    drain_all();
    MUST(client_take_token(&dead) == 1 && client_claim_hinted(&dead, 1, 1, &generation));
    client_close(&dead);
}

static void do_drain(void) { drain_all(); }
static void do_free(void) { supervisor_free(&s, 0); }
static void
do_bury(void)
{
    event_t events[NSLOTS];

    supervisor_cid_gone(&s, VICTIM);
    note(events, supervisor_sweep(&s, NSLOTS, NOW, events));
}
static void
do_sleep(void)
{
    answer->slot = supervisor_prepare_sleep(&s);        /* here: whether it sleeps */
}
static void
do_note(void)
{
    supervisor_note_exit(&s, 0, KIND_SIGNALED, 0, 9, 3, 0, NOW, "trace\nback", 10);
    s.slots[0].state = ST_STOPPED;
    supervisor_publish(&s, 0);
}

/* The supervisor goes on: what others did meanwhile is taken over, and all agree in the end. */
static void
supervisor_ends(void)
{
    answer->done = 1;
    what = "the supervisor's end";
    drain_all();
    sweep_round();
    check_quiet(&s, what);
    answer->result = (int) violations;
    _exit(0);
}

static void
arrange_idle(void)
{
    open_duty();
    drain_all();
}

static const duty_t duties[] = {
    {"supervisor-accept", arrange_published, do_drain},
    {"supervisor-cancel", arrange_cancelled, do_drain},
    {"supervisor-free", arrange_accepted, do_free},
    {"supervisor-reclaim", arrange_dead_claim, do_bury},
    {"supervisor-sleep", arrange_idle, do_sleep},
    {"supervisor-outcome", arrange_accepted, do_note},
};

/* What clients rely on while the supervisor stands still, or lies dead, at any instruction. */
static void
clients_go_on(bool dead)
{
    static const uint64_t serials[] = {70, 71, 72};
    uint64_t free_seq = load_acquire(&other.m.outbox->free_seq), generation;
    uint32_t nfree = 0, ntokens = 0, slot;
    enum registration result;
    image_t  theirs;

    for (uint32_t x = 0; x < NSLOTS; x++) {
        uint64_t w = load_acquire(&other.m.controls[x].req), st = client_status(&other, x);
        detail_t d = {0};

        mid.word[x] = w;
        nfree += req_state(w) == REQ_FREE;
        PROMISE(word_generation(w) <= word_generation(st), /* I3 */
                "%s: slot %u: the inbox is ahead of the outbox", what, x);
        PROMISE(!client_freed(&other, x, 1) || word_generation(st) > 1, "%s: slot %u", what, x);
        image_fill(&theirs, serials[x], PAYLOAD, false);
        if (map_read_detail(&other.m, x, 1, &d))
            PROMISE(memcmp(d.name, theirs.r.name, 3) == 0 && d.name[3] == 0 &&
                    (d.kind == KIND_NONE ? d.error[0] == 0 && d.stopped_at == 0
                                         : d.stopped_at == NOW),
                    "%s: slot %u: a torn detail", what, x);
        if (client_read_pending(&other, x, 1, &d))
            PROMISE(memcmp(d.name, theirs.r.name, 3) == 0, "%s: slot %u: pending", what, x);
        client_occupied(&other, x, &generation);
    }
    for (uint32_t t = 0; t < NTOKENS; t++) {
        mid.token[t] = load_acquire(&other.m.tokens[t].req);
        ntokens += req_state(mid.token[t]) == REQ_FREE;
    }
    if (dead) {
        store_relaxed(&other.looked, 0);
        PROMISE(client_supervisor_gone(&other), "%s: nobody notices the death", what);
    }
    PROMISE(client_terminate(&other, 1, 1) == (req_state(mid.word[1]) == REQ_READY &&
                                               word_generation(mid.word[1]) == 1),
            "%s: terminate", what);
    image_fill(&theirs, 80, PAYLOAD, ntokens > 0);
    result = client_register(&other, theirs.bytes, ntokens > 0, &slot, &generation);
    PROMISE(result == (nfree ? REG_OK : free_seq % 2 ? REG_AGAIN : REG_NO_SLOT),        /* I10 */
            "%s: registered with answer %d, though %u slots were free", what, result, nfree);
    if (result == REG_OK)
        PROMISE(mid.word[slot] == req_word(generation, 0, 0, REQ_FREE) &&
                generation == word_generation(client_status(&other, slot)),
                "%s: slot %u, generation %" PRIu64 " was not free", what, slot, generation);
}

static enum place
try_duty(const duty_t *o, int pass, uint32_t k, bool by_breakpoint)
{
    enum place place;
    pid_t      pid;

    memset((void *) answer, 0, sizeof *answer);
    pid = start(o->operate, o->arrange, supervisor_ends);
    open_client(&other, OTHER, pid);
    silence_doors();
    place = step_to(pid, k, by_breakpoint);
    if (place != ENDED && pass == 0) {
        kill_and_reap(pid);
        clients_go_on(true);
    } else if (place != ENDED) {
        clients_go_on(false);
        MUST(!resume(pid, PTRACE_CONT));
        violations += (uint64_t) answer->result;
        PROMISE(answer->result == 0, "%s: and then the supervisor", what);
        PROMISE(o->operate != do_sleep || !answer->slot || somebody_rang(),
                "%s: it sleeps over a change", what);
    }
    close(other.supervisor);
    client_close(&other);
    return place;
}

static void
step_supervisor(const duty_t *o, uint32_t stride)
{
    static char name[160];
    uint32_t    later, detours;
    pid_t       pid;

    what = o->name;
    cid = CID_SUPERVISOR;                       /* of nobody's registration */
    memset((void *) answer, 0, sizeof *answer);
    pid = start(o->operate, o->arrange, supervisor_ends);
    record_path(pid);
    kill_and_reap(pid);
    later = path.n > LONG ? 3 * stride : stride;
    for (int pass = 0; pass < 2; pass++)
        for (uint32_t every = pass ? later : stride, k = (uint32_t) below(every);
             k <= path.n && violations < ENOUGH; k += every) {
            snprintf(name, sizeof name, "%s, pass %d, step %u of %u", o->name, pass, k, path.n);
            what = name;
            for (detours = 0; detours < TRIES; detours++, tried++)
                if (try_duty(o, pass, k, detours < TRIES - 2) == THERE)
                    break;
            tried++;
            missed += detours == TRIES;
        }
    positions += path.n + 1;
}

/* Both processes on one processor, the less busy one: a step costs half. */
static void
stay_here(const cpu_set_t *everywhere)
{
    cpu_set_t here;

    sched_setaffinity(0, sizeof *everywhere, everywhere);
    usleep(1000);
    CPU_ZERO(&here);
    CPU_SET(sched_getcpu(), &here);
    sched_setaffinity(0, sizeof here, &here);
}

int
main(int argc, char **argv)
{
    uint32_t    stride = argc > 2 ? (uint32_t) atoi(argv[2]) : 1;
    cpu_set_t   everywhere;
    geometry_t  g = geometry_of(NSLOTS, NTOKENS);

    the_chance = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
    MUST(sched_getaffinity(0, sizeof everywhere, &everywhere) == 0);
    MUST(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, doors) == 0);
    answer = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    MUST(answer != MAP_FAILED);
    outbox = memory_file(g.outbox_size);
    inbox = memory_file(g.inbox_size);
    for (size_t i = 0; i < sizeof client_operations / sizeof *client_operations; i++)
        if (argc <= 3 || strcmp(argv[3], client_operations[i].name) == 0) {
            stay_here(&everywhere);
            step_client(&client_operations[i], stride);
            printf("%s: %u instructions\n", client_operations[i].name, path.n);
        }
    for (size_t i = 0; i < sizeof duties / sizeof *duties; i++)
        if (argc <= 3 || strcmp(argv[3], duties[i].name) == 0) {
            stay_here(&everywhere);
            step_supervisor(&duties[i], stride);
            printf("%s: %u instructions\n", duties[i].name, path.n);
        }
    return verdict(" positions=%" PRIu64 " missed=%" PRIu64, positions, missed);
}
