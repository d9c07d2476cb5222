/*
 * wall_clock.c - preloaded: CLOCK_REALTIME is off by as many seconds as a file says
 *
 * The file, $PGBGW_TEST_WALL_CLOCK, is mapped: an 8-byte integer that a test may change at any
 * time, for all processes at once.  Every other clock is left alone.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const _Atomic int64_t *offset;

__attribute__((constructor)) static void
map_offset(void)
{
    const char *path = getenv("PGBGW_TEST_WALL_CLOCK");
    int         fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void       *p;

    if (fd < 0)
        return;
    p = mmap(NULL, sizeof *offset, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (p != MAP_FAILED)
        offset = p;
}

/* The system call: the library's own function is this one. */
int
clock_gettime(clockid_t clock, struct timespec *t)
{
    int result = (int) syscall(SYS_clock_gettime, clock, t);

    if (result == 0 && offset && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        t->tv_sec += *offset;
    return result;
}

int
gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    struct timespec t;

    (void) zone;
    clock_gettime(CLOCK_REALTIME, &t);
    *now = (struct timeval) {.tv_sec = t.tv_sec, .tv_usec = t.tv_nsec / 1000};
    return 0;
}

time_t
time(time_t *where)
{
    struct timespec t;

    clock_gettime(CLOCK_REALTIME, &t);
    if (where)
        *where = t.tv_sec;
    return t.tv_sec;
}
