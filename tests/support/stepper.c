/*
 * stepper.c - take a traced process to an exact instruction and kill it there
 *
 * The process is our child, has asked to be traced, and has stopped itself (SIGSTOP) right before
 * the operation.  stepper_profile() steps through all of it once and notes every instruction's
 * address.  stepper_kill() then needs to step only the last bit of the way: it lets the process run
 * to a breakpoint at an address that is first reached shortly before the position.  x86-64 only.
 */
#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define GUARD 20                        /* seconds for what takes milliseconds: else it hangs */

enum { KILLED = -1, HUNG = -2, LOST = -3 };     /* above: the exit status of who was not killed */

static uint64_t
seconds(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t) t.tv_sec;
}

/* Wait for the next stop or the end; false if neither comes. */
static int
wait_for(pid_t pid, int *status)
{
    uint64_t deadline = seconds() + GUARD;

    for (;;) {
        pid_t got = waitpid(pid, status, __WALL | WNOHANG);

        if (got == pid)
            return 1;
        if (got < 0 || seconds() > deadline)
            return 0;
        usleep(50);
    }
}

static int
kill_and_reap(pid_t pid, int result)
{
    int status;

    kill(pid, SIGKILL);
    while (waitpid(pid, &status, __WALL) == pid && !WIFEXITED(status) && !WIFSIGNALED(status))
        ;
    return result;
}

/* One instruction.  Busy: a stop comes within microseconds, but for system calls that wait. */
static int
step(pid_t pid, int *status)
{
    return ptrace(PTRACE_SINGLESTEP, pid, NULL, NULL) == 0 && waitpid(pid, status, __WALL) == pid;
}

static uint64_t
program_counter(pid_t pid)
{
    return (uint64_t) ptrace(PTRACE_PEEKUSER, pid, offsetof(struct user_regs_struct, rip), NULL);
}

/* Step to the end of the process; the addresses of the first n instructions, and how many. */
long
stepper_profile(pid_t pid, uint64_t *addresses, long n)
{
    int  status;
    long i = 0;

    if (!wait_for(pid, &status) || !WIFSTOPPED(status))
        return LOST;
    while (i < n) {
        addresses[i++] = program_counter(pid);
        if (!step(pid, &status))
            return kill_and_reap(pid, LOST);
        if (!WIFSTOPPED(status))
            return i;
    }
    return kill_and_reap(pid, HUNG);
}

/* Run to the first time that address is reached, make so many steps from there, and kill.  Returns
 * KILLED; or the exit status of a process that was through by then; or what went wrong. */
int
stepper_kill(pid_t pid, uint64_t address, long steps)
{
    int  status;
    long text;

    if (!wait_for(pid, &status) || !WIFSTOPPED(status))
        return LOST;
    if (program_counter(pid) != address) {
        errno = 0;
        text = ptrace(PTRACE_PEEKTEXT, pid, address, NULL);
        if (errno != 0 ||
            ptrace(PTRACE_POKETEXT, pid, address, (text & ~0xffL) | 0xcc) != 0 ||
            ptrace(PTRACE_CONT, pid, NULL, NULL) != 0)
            return kill_and_reap(pid, LOST);
        if (!wait_for(pid, &status))
            return kill_and_reap(pid, HUNG);
        if (WIFEXITED(status))
            return WEXITSTATUS(status);
        if (!WIFSTOPPED(status) || WSTOPSIG(status) != SIGTRAP ||
            program_counter(pid) != address + 1 ||
            ptrace(PTRACE_POKETEXT, pid, address, text) != 0 ||
            ptrace(PTRACE_POKEUSER, pid, offsetof(struct user_regs_struct, rip), address) != 0)
            return kill_and_reap(pid, LOST);
    }
    for (long i = 0; i < steps; i++) {
        if (!step(pid, &status))
            return kill_and_reap(pid, LOST);
        if (WIFEXITED(status))
            return WEXITSTATUS(status);
        if (!WIFSTOPPED(status))
            return LOST;
    }
    return kill_and_reap(pid, KILLED);
}
