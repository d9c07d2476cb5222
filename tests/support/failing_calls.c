/*
 * failing_calls.c - preloaded into a supervisor: the n-th call of a function fails, on demand
 *
 * The plan is a file that the test maps as well.  It names one process (forked children inherit
 * the mapping and are not meant), one function, an errno, and how many calls go well before how
 * many fail.  What CPython calls by syscall(2) is found by its number.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* The order is that of support.failing_calls. */
enum {
    FORK, PIDFD_OPEN, ACCEPT4, EPOLL_CTL, EPOLL_WAIT, SEND, SENDMSG, RECV, WAITID, MMAP, MADVISE,
    SOCKETPAIR, MEMFD_CREATE, OPEN, READ, POLL, IOCTL, GETSOCKOPT, SETSOCKOPT, PIDFD_SEND_SIGNAL,
    MALLOC, CALLS
};

typedef struct {
    _Atomic int32_t  pid;               /* whose calls fail; 0: nobody's, -1: the next's to start */
    _Atomic uint32_t call;
    _Atomic int32_t  error;
    _Atomic uint32_t passes;            /* so many go well first */
    _Atomic uint32_t fails;             /* then so many fail */
    _Atomic uint32_t failed;            /* so many have */
    _Atomic uint64_t counts[CALLS];     /* calls of that process since it was named */
} plan_t;

static plan_t *plan;

__attribute__((constructor)) static void
open_plan(void)
{
    const char *path = getenv("PGBGW_TEST_PLAN");
    int fd = path ? (int) syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC) : -1;
    void *p;

    if (fd < 0)
        return;
    p = (void *) syscall(SYS_mmap, NULL, sizeof(plan_t), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    if (p != MAP_FAILED) {
        int32_t next = -1;

        plan = p;
        atomic_compare_exchange_strong(&plan->pid, &next, getpid());
    }
}

static int
fails(unsigned call)
{
    uint32_t passes, left;

    if (!plan || atomic_load(&plan->pid) == 0 || atomic_load(&plan->pid) != getpid())
        return 0;
    atomic_fetch_add(&plan->counts[call], 1);
    if (atomic_load(&plan->call) != call)
        return 0;
    if ((passes = atomic_load(&plan->passes)) > 0) {
        atomic_store(&plan->passes, passes - 1);
        return 0;
    }
    if ((left = atomic_load(&plan->fails)) == 0)
        return 0;
    atomic_store(&plan->fails, left - 1);
    atomic_fetch_add(&plan->failed, 1);
    errno = atomic_load(&plan->error);
    return 1;
}

#define REAL(name) ((__typeof__(&name)) real(&real_##name, #name))
static void *
real(void *_Atomic *known, const char *name)
{
    void *p = atomic_load(known);

    if (!p) {
        p = dlsym(RTLD_NEXT, name);
        atomic_store(known, p);
    }
    return p;
}

#define FUNCTION(call, result, failure, name, parameters, arguments) \
    static void *_Atomic real_##name;                                \
    result name parameters                                           \
    {                                                                \
        return fails(call) ? (failure) : REAL(name) arguments;       \
    }

FUNCTION(FORK, pid_t, -1, fork, (void), ())
FUNCTION(ACCEPT4, int, -1, accept4, (int fd, struct sockaddr *a, socklen_t *n, int flags),
         (fd, a, n, flags))
FUNCTION(EPOLL_WAIT, int, -1, epoll_wait, (int e, struct epoll_event *events, int n, int timeout),
         (e, events, n, timeout))
FUNCTION(SEND, ssize_t, -1, send, (int fd, const void *p, size_t n, int flags), (fd, p, n, flags))
FUNCTION(SENDMSG, ssize_t, -1, sendmsg, (int fd, const struct msghdr *m, int flags), (fd, m, flags))
FUNCTION(RECV, ssize_t, -1, recv, (int fd, void *p, size_t n, int flags), (fd, p, n, flags))
FUNCTION(WAITID, int, -1, waitid, (idtype_t type, id_t id, siginfo_t *info, int options),
         (type, id, info, options))
FUNCTION(MMAP, void *, MAP_FAILED, mmap64,
         (void *p, size_t n, int prot, int flags, int fd, off64_t at), (p, n, prot, flags, fd, at))
FUNCTION(MADVISE, int, -1, madvise, (void *p, size_t n, int advice), (p, n, advice))
FUNCTION(SOCKETPAIR, int, -1, socketpair, (int domain, int type, int protocol, int fds[2]),
         (domain, type, protocol, fds))
FUNCTION(MEMFD_CREATE, int, -1, memfd_create, (const char *name, unsigned flags), (name, flags))
FUNCTION(READ, ssize_t, -1, read, (int fd, void *p, size_t n), (fd, p, n))
FUNCTION(POLL, int, -1, poll, (struct pollfd *fds, nfds_t n, int timeout), (fds, n, timeout))
FUNCTION(GETSOCKOPT, int, -1, getsockopt,
         (int fd, int level, int option, void *restrict p, socklen_t *restrict n),
         (fd, level, option, p, n))
FUNCTION(SETSOCKOPT, int, -1, setsockopt,
         (int fd, int level, int option, const void *p, socklen_t n), (fd, level, option, p, n))

/* Only to add a descriptor takes memory. */
static void *_Atomic real_epoll_ctl;
int
epoll_ctl(int e, int op, int fd, struct epoll_event *event)
{
    return op == EPOLL_CTL_ADD && fails(EPOLL_CTL) ? -1 : REAL(epoll_ctl)(e, op, fd, event);
}

static void *_Atomic real_open64;
int
open64(const char *path, int flags, ...)
{
    va_list more;
    mode_t  mode;

    va_start(more, flags);
    mode = va_arg(more, mode_t);
    va_end(more);
    return fails(OPEN) ? -1 : REAL(open64)(path, flags, mode);
}

static void *_Atomic real_ioctl;
int
ioctl(int fd, unsigned long request, ...)
{
    va_list more;
    void   *p;

    va_start(more, request);
    p = va_arg(more, void *);
    va_end(more);
    return fails(IOCTL) ? -1
                        : ((int (*)(int, unsigned long, ...)) real(&real_ioctl, "ioctl"))(
                              fd, request, p);
}

static void *_Atomic real_syscall;
long
syscall(long number, ...)
{
    va_list more;
    long    a[6];

    va_start(more, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(more, long);
    va_end(more);
    if ((number == SYS_pidfd_open && fails(PIDFD_OPEN)) ||
        (number == SYS_pidfd_send_signal && fails(PIDFD_SEND_SIGNAL)))
        return -1;
    return REAL(syscall)(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

/* ---- memory ---------------------------------------------------------------------------------- */

void *__libc_malloc(size_t n);
void *__libc_calloc(size_t n, size_t size);
void *__libc_realloc(void *p, size_t n);

void *
malloc(size_t n)
{
    return fails(MALLOC) ? NULL : __libc_malloc(n);
}
void *
calloc(size_t n, size_t size)
{
    return fails(MALLOC) ? NULL : __libc_calloc(n, size);
}
void *
realloc(void *p, size_t n)
{
    return fails(MALLOC) ? NULL : __libc_realloc(p, n);
}
