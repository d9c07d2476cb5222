/*
 * The system calls that CPython's os module lacks, as plain C11: nothing here knows of Python, so
 * that sanitizers and stress harnesses can use it without an interpreter.
 *
 * Unless a comment says otherwise a function returns 0 or a descriptor, or -1 with errno set.
 */
#ifndef PGBGW_KERNEL_H
#define PGBGW_KERNEL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1 /* for whoever includes this before Python.h, which defines it as well */
#endif

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/*
 * Numbers that the C library of a build machine may be too old to know.  System calls from 424 on
 * have one number on every architecture that pgbgw runs on; the socket options are asm-generic's.
 */
#ifndef SYS_pidfd_send_signal
#define SYS_pidfd_send_signal 424
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef CLOSE_RANGE_CLOEXEC
#define CLOSE_RANGE_CLOEXEC 4U
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8U
#endif
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif
#if defined(__mips__) || defined(__sparc__) || defined(__hppa__) || defined(__alpha__)
#error "SO_PEERPIDFD and SO_PASSRIGHTS have numbers of their own on this architecture"
#endif
#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif
#ifndef SO_PASSRIGHTS
#define SO_PASSRIGHTS 83
#endif

/* ---- processes and signals ------------------------------------------------------------------- */

static inline int
kernel_set_parent_death_signal(int signum)
{
    return prctl(PR_SET_PDEATHSIG, (unsigned long) signum, 0UL, 0UL, 0UL);
}

static inline int
kernel_set_thread_name(const char *name)
{
    return prctl(PR_SET_NAME, name, 0UL, 0UL, 0UL);
}

static inline int
kernel_close_range(unsigned first, unsigned last)
{
    return (int) syscall(SYS_close_range, first, last, 0U);
}

/* Not for the address sanitizer: it allocates before _exit, and may have interrupted just that. */
__attribute__((no_sanitize_address)) static void
kernel_on_quit(int signum)
{
    (void) signum;
    _exit(2); /* no atexit function, no flush: whatever made us quit may have ruined their data */
}

/*
 * PostgreSQL's bgworker_quickdie.  The handler stands before the signal is let in, so that one
 * which came while it was blocked ends the process in the same way.
 */
static inline int
kernel_install_quit_handler(void)
{
    struct sigaction action = {.sa_handler = kernel_on_quit, .sa_flags = SA_ONSTACK};
    sigset_t quit;

    sigemptyset(&action.sa_mask);
    if (sigaction(SIGQUIT, &action, NULL) < 0)
        return -1;
    sigemptyset(&quit);
    sigaddset(&quit, SIGQUIT);
    errno = pthread_sigmask(SIG_UNBLOCK, &quit, NULL);
    return errno == 0 ? 0 : -1;
}

/* ---- sockets --------------------------------------------------------------------------------- */

/*
 * Let nobody attach a file to what he sends to this socket: closing a file that lingers would
 * block us. Return 1, or 0 where the kernel does not have the option (before 6.16).
 */
static inline int
kernel_refuse_rights(int fd)
{
    int no = 0;

    if (setsockopt(fd, SOL_SOCKET, SO_PASSRIGHTS, &no, sizeof no) == 0)
        return 1;
    return errno == ENOPROTOOPT ? 0 : -1;
}

/* A pidfd of the process at the other end; -1 with errno = ENOPROTOOPT before Linux 6.5. */
static inline int
kernel_peer_pidfd(int fd)
{
    int pidfd = -1;
    socklen_t size = sizeof pidfd;

    return getsockopt(fd, SOL_SOCKET, SO_PEERPIDFD, &pidfd, &size) == 0 ? pidfd : -1;
}

/* ---- shared memory --------------------------------------------------------------------------- */

static inline int
kernel_add_seals(int fd, unsigned seals)
{
    return fcntl(fd, F_ADD_SEALS, seals);
}

static inline int
kernel_memfd(const char *name, off_t size, unsigned seals)
{
    /* vm.memfd_noexec may forbid executable memfds; before Linux 6.3 the flag is unknown. */
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
    int saved;

    if (fd < 0 && errno == EINVAL)
        fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return -1;
    if (ftruncate(fd, size) == 0 && (seals == 0 || kernel_add_seals(fd, seals) == 0))
        return fd;
    saved = errno;
    close(fd);
    errno = saved;
    return -1;
}

/* ---- the log relay --------------------------------------------------------------------------- */

enum {
    KERNEL_RELAY_BUFFER = 65536,  /* bytes; a longer message is cut */
    KERNEL_RELAY_GRACE_MS = 5000, /* how long a reader that stopped holds up the end of a relay */
};

/*
 * Wait until out_fd takes PIPE_BUF bytes without blocking, or is broken (then write says so).
 * Exit instead if nothing moves and nobody is left at fd: the last lines are worth some seconds,
 * not an orphan.
 */
static inline void
kernel_relay_wait(int fd, int out_fd)
{
    struct pollfd wait[2] = {
        {.fd = out_fd, .events = POLLOUT},
        {.fd = fd, .events = POLLRDHUP},
    };

    while (poll(wait, 2, -1) < 0)
        if (errno != EINTR && errno != EAGAIN)
            _exit(1);
    if (wait[0].revents == 0 && poll(wait, 1, KERNEL_RELAY_GRACE_MS) == 0)
        _exit(1);
}

/*
 * Write each message that arrives at fd, a SEQPACKET socket, to out_fd; never return.  At
 * end-of-file, and at an empty message (all that a DGRAM socket has for it), exit with 0.  An
 * error of out_fd costs the rest of that message only: a full disk may have room again, and a
 * reader who went for good must not make the sender's buffer fill up.  No write is larger than
 * what poll promises a pipe has room for.
 */
_Noreturn static inline void
kernel_relay(int fd, int out_fd)
{
    static char buffer[KERNEL_RELAY_BUFFER];

    signal(SIGPIPE, SIG_IGN);
    for (;;) {
        const char *rest = buffer;
        ssize_t left = recv(fd, buffer, sizeof buffer, 0);

        if (left == 0)
            _exit(0);
        if (left < 0) {
            struct pollfd wait = {.fd = fd, .events = POLLIN};

            if (errno == EAGAIN)
                (void) poll(&wait, 1, -1); /* somebody made the socket non-blocking */
            else if (errno != EINTR && errno != ECONNRESET) /* a reset comes before the data */
                _exit(1);
            continue;
        }
        while (left > 0) {
            ssize_t done;

            kernel_relay_wait(fd, out_fd);
            done = write(out_fd, rest, left < PIPE_BUF ? (size_t) left : (size_t) PIPE_BUF);
            if (done >= 0) {
                rest += done;
                left -= done;
            } else if (errno != EINTR && errno != EAGAIN)
                break;
        }
    }
}

/* ---- what this kernel can do: found out by trying, never by its version ---------------------- */

/* Each probe returns 0, or the errno that tells what is wrong.  None leaves anything behind. */

static int
kernel_probe_64_bit(void)
{
    return sizeof(void *) == 8 && sizeof(off_t) == 8 ? 0 : ENOSYS;
}

static int
kernel_probe_pidfd_open(void)
{
    int pidfd = (int) syscall(SYS_pidfd_open, getpid(), 0U);

    if (pidfd < 0)
        return errno;
    close(pidfd);
    return 0;
}

static int
kernel_probe_pidfd_send_signal(void)
{
    int pidfd = (int) syscall(SYS_pidfd_open, getpid(), 0U);
    int error;

    if (pidfd < 0)
        return errno;
    error = syscall(SYS_pidfd_send_signal, pidfd, 0, NULL, 0U) < 0 ? errno : 0;
    close(pidfd);
    return error;
}

static int
kernel_probe_waitid_pidfd(void)
{
    int pidfd = (int) syscall(SYS_pidfd_open, getpid(), 0U);
    siginfo_t info;
    int error;

    if (pidfd < 0)
        return errno;
    /* We are no child of ours, and to say so the kernel must have understood P_PIDFD (3). */
    error = waitid((idtype_t) 3, (id_t) pidfd, &info, WEXITED | WNOHANG) < 0 ? errno : 0;
    close(pidfd);
    return error == ECHILD ? 0 : error;
}

static int
kernel_probe_sealing(void)
{
    size_t page = (size_t) sysconf(_SC_PAGESIZE);
    unsigned seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL;
    int fd = kernel_memfd("pgbgw-probe", (off_t) page, seals);
    void *memory;

    if (fd < 0)
        return errno;
    memory = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (memory == MAP_FAILED)
        return errno == EPERM ? 0 : errno;
    munmap(memory, page);
    return ENOTSUP; /* the seal was accepted, yet does not hold */
}

static int
kernel_probe_populate_write(void)
{
    size_t page = (size_t) sysconf(_SC_PAGESIZE);
    void *memory = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int error;

    if (memory == MAP_FAILED)
        return errno;
    error = madvise(memory, page, MADV_POPULATE_WRITE) < 0 ? errno : 0;
    munmap(memory, page);
    return error;
}

static int
kernel_probe_close_range(void)
{
    return syscall(SYS_close_range, UINT_MAX, UINT_MAX, CLOSE_RANGE_CLOEXEC) < 0 ? errno : 0;
}

typedef struct {
    const char *name;
    int (*probe)(void);
} kernel_feature_t;

static const kernel_feature_t kernel_features[] = {
    {"64-bit addresses", kernel_probe_64_bit},
    {"pidfd_open", kernel_probe_pidfd_open},
    {"pidfd_send_signal", kernel_probe_pidfd_send_signal},
    {"waitid(P_PIDFD)", kernel_probe_waitid_pidfd},
    {"F_SEAL_FUTURE_WRITE", kernel_probe_sealing},
    {"MADV_POPULATE_WRITE", kernel_probe_populate_write},
    {"close_range", kernel_probe_close_range},
};

enum { KERNEL_NFEATURES = sizeof kernel_features / sizeof kernel_features[0] };

#endif /* PGBGW_KERNEL_H */
