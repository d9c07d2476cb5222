# cython: language_level=3, auto_pickle=False, autotestdict=False
"""The system calls that CPython's os module lacks; the C is in _kernel.h.

No policy and no logging here: what the kernel refuses is an OSError with its errno.
"""

from cpython.exc cimport PyErr_SetFromErrno
from libc.errno cimport EAGAIN, EINTR, ENOPROTOOPT, errno
from posix.signal cimport SIG_UNBLOCK, sigaddset, sigemptyset, sigprocmask, sigset_t
from posix.types cimport off_t
from posix.unistd cimport read

from os import strerror

cdef extern from "_kernel.h" nogil:
    const unsigned c_F_SEAL_SEAL "F_SEAL_SEAL"
    const unsigned c_F_SEAL_SHRINK "F_SEAL_SHRINK"
    const unsigned c_F_SEAL_GROW "F_SEAL_GROW"
    const unsigned c_F_SEAL_WRITE "F_SEAL_WRITE"
    const unsigned c_F_SEAL_FUTURE_WRITE "F_SEAL_FUTURE_WRITE"
    const int SFD_CLOEXEC
    const int SFD_NONBLOCK
    const int KERNEL_NFEATURES

    struct signalfd_siginfo:
        unsigned int ssi_signo
        unsigned int ssi_pid
        unsigned int ssi_uid

    ctypedef struct kernel_feature_t:
        const char *name
        int (*probe)() noexcept nogil

    const kernel_feature_t *kernel_features
    int c_signalfd "signalfd"(int fd, const sigset_t *mask, int flags) noexcept
    int kernel_set_parent_death_signal(int signum) noexcept
    int kernel_set_thread_name(const char *name) noexcept
    int kernel_close_range(unsigned first, unsigned last) noexcept
    int kernel_install_quit_handler() noexcept
    int kernel_refuse_rights(int fd) noexcept
    int kernel_peer_pidfd(int fd) noexcept
    int kernel_memfd(const char *name, off_t size, unsigned seals) noexcept
    int kernel_add_seals(int fd, unsigned seals) noexcept
    void kernel_relay(int fd, int out_fd) noexcept

F_SEAL_SEAL = c_F_SEAL_SEAL
F_SEAL_SHRINK = c_F_SEAL_SHRINK
F_SEAL_GROW = c_F_SEAL_GROW
F_SEAL_WRITE = c_F_SEAL_WRITE
F_SEAL_FUTURE_WRITE = c_F_SEAL_FUTURE_WRITE


cdef int checked(int result) except -1:
    """The result of a system call, or its errno as an OSError."""
    if result < 0:
        PyErr_SetFromErrno(OSError)
    return result


cdef const char *c_string(bytes value) except NULL:
    if b"\0" in value:
        raise ValueError("embedded null byte")
    return value


def set_parent_death_signal(int signum):
    """Have the kernel send signum to this process when the thread that forked it ends; 0: do not.

    The caller must check afterwards that its parent is still the one it expects: that may have died
    before.
    """
    checked(kernel_set_parent_death_signal(signum))


def set_thread_name(bytes name not None):
    """Name the calling thread (for ps: the process, in its main thread); 15 bytes count."""
    checked(kernel_set_thread_name(c_string(name)))


def close_range(unsigned int first, unsigned int last=0xFFFFFFFF):
    """Close all descriptors from first to last, both included, whether they are open or not."""
    cdef int result
    with nogil:
        result = kernel_close_range(first, last)
    checked(result)


def unblock_signals(signals):
    """signal.pthread_sigmask(SIG_UNBLOCK, signals), for the only thread; without what that takes
    for its result, a hundred microseconds."""
    cdef sigset_t mask

    sigemptyset(&mask)
    for signum in signals:
        sigaddset(&mask, signum)
    checked(sigprocmask(SIG_UNBLOCK, &mask, NULL))


def signalfd(signals):
    """Return a descriptor that is readable while one of the signals is pending.

    It is close-on-exec and non-blocking.  The caller blocks the signals; what is not blocked is
    delivered and never seen here.
    """
    cdef sigset_t mask
    cdef int signum
    sigemptyset(&mask)
    for signum in signals:
        checked(sigaddset(&mask, signum))
    return checked(c_signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK))


def read_signals(int fd):
    """Take what is pending at a signalfd: a list of (signal, pid, uid), of the sender or the child.

    Both ids are 0 for a signal of the kernel's own.  At most 128 at a time, twice what the kernel
    keeps of the ordinary signals, so that no flood holds the caller up; the descriptor stays
    readable if there are more.
    """
    cdef signalfd_siginfo batch[16]
    cdef ssize_t size
    cdef Py_ssize_t i
    result = []
    for _ in range(8):
        size = read(fd, batch, sizeof(batch))
        if size < 0:
            if errno == EAGAIN:
                break
            if errno == EINTR:
                continue
            PyErr_SetFromErrno(OSError)
        for i in range(size // <ssize_t>sizeof(signalfd_siginfo)):
            result.append((batch[i].ssi_signo, batch[i].ssi_pid, batch[i].ssi_uid))
        if size < <ssize_t>sizeof(batch):
            break
    return result


def install_quit_handler():
    """Make SIGQUIT end this process at once with code 2, without Python's help, and unblock it.

    PostgreSQL: bgworker_quickdie.
    """
    checked(kernel_install_quit_handler())


def refuse_rights(int sock_fd):
    """Refuse descriptors sent to this Unix socket and to what it accepts: the sender gets EPERM.

    Return False if the kernel cannot do that (before 6.16).
    """
    return checked(kernel_refuse_rights(sock_fd)) == 1


def peer_pidfd(int sock_fd):
    """Return a pidfd of the process at the other end of this Unix socket.

    Return -1 if the kernel cannot do that (before 6.5).
    """
    cdef int pidfd = kernel_peer_pidfd(sock_fd)
    if pidfd < 0 and errno == ENOPROTOOPT:
        return -1
    return checked(pidfd)


def memfd(bytes name not None, off_t size, unsigned int seals=0):
    """Return a new, zeroed memory file of size bytes, close-on-exec, with these seals."""
    return checked(kernel_memfd(c_string(name), size, seals))


def add_seals(int fd, unsigned int seals):
    """Add F_SEAL_ bits to a memory file; what FUTURE_WRITE finds mapped stays writable."""
    checked(kernel_add_seals(fd, seals))


def relay(int fd, int out_fd):
    """Write each message that comes to the SEQPACKET socket fd to out_fd; exit at end-of-file.

    Never returns, ignores SIGPIPE, and goes on whatever happens to out_fd.  An empty message
    counts as end-of-file, one of more than 64 KiB is cut.  If out_fd stops taking data and the
    senders are gone, the relay waits for five seconds and exits with 1.
    """
    with nogil:
        kernel_relay(fd, out_fd)


def missing_features():
    """Try what pgbgw needs of the kernel; return "feature: reason" for each that does not work."""
    cdef int i
    cdef int error
    result = []
    for i in range(KERNEL_NFEATURES):
        error = kernel_features[i].probe()
        if error != 0:
            result.append(f"{kernel_features[i].name.decode()}: {strerror(error)}")
    return result
