/*
 * slot_contention.c - pgbgw's own slot core, without an interpreter: see contention.h
 *
 * Question: how many registrations and terminations per second do many processes together get out
 * of one table?
 *
 * Method: the shipped protocol unchanged, on memfds, with a connection per client for doorbells.
 * The supervisor drains, accepts, keeps what it accepted, and frees what is terminated, as the
 * real one does before its phase is reached.
 *
 * Bias: for pgbgw.  A supervisor without Python takes over and frees sooner.
 */
#include "contention.h"

#include <sys/syscall.h>

static supervisor_t supervisor;
static client_t     client;
static int          outbox, inbox, nclients;
static struct pollfd (*connections), *client_ends;

static int
memory_file(uint64_t size)
{
    int fd = (int) syscall(SYS_memfd_create, "slots", 1u /* MFD_CLOEXEC */);

    MUST(fd >= 0 && ftruncate(fd, (off_t) size) == 0);
    return fd;
}

static void
table_open(uint32_t slots, int clients)
{
    geometry_t g = geometry_of(slots, 1);

    outbox = memory_file(g.outbox_size);
    inbox = memory_file(g.inbox_size);
    MUST(supervisor_open(&supervisor, outbox, inbox, slots, 1, 1) == 0);
    nclients = clients;
    connections = calloc((size_t) clients, sizeof *connections);
    client_ends = calloc((size_t) clients, sizeof *client_ends);
    MUST(connections && client_ends);
    for (int i = 0; i < clients; i++) {
        int pair[2];

        MUST(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, pair) == 0);
        connections[i] = (struct pollfd) {.fd = pair[0], .events = POLLIN};
        client_ends[i].fd = pair[1];
        MUST(supervisor_cid_new(&supervisor) == (unsigned) i + 1);
    }
}

static void
client_attach(int i)
{
    const char *problem;

    MUST(client_open(&client, outbox, supervisor.m.g.outbox_size, inbox,
                     supervisor.m.g.inbox_size, &problem) == 0);
    client.cid = (uint16_t) (i + 1);
    client.connection = client_ends[i].fd;
    client.supervisor = (int) syscall(SYS_pidfd_open, getppid(), 0);
    MUST(client.supervisor >= 0);
    MUST(madvise(client.m.inbox, client.m.g.inbox_size, MADV_POPULATE_WRITE) == 0);
}

static handle_t
client_ask(const image_t *image)
{
    handle_t h;
    enum registration result;

    MUST(!client_supervisor_gone(&client));
    while ((result = client_register(&client, image->bytes, false, &h.slot,
                                     &h.generation)) == REG_AGAIN)
        sleep_until(now() + PAUSE / 2);
    MUST(result == REG_OK);
    return h;
}

static void
client_end(handle_t h)
{
    MUST(!client_supervisor_gone(&client));
    MUST(client_terminate(&client, h.slot, h.generation));
}

static bool
client_gone(handle_t h)
{
    return client_freed(&client, h.slot, h.generation);
}

static void
supervise(void)
{
    event_t events[DRAIN_MAX];
    int64_t wall;
    uint32_t n;

    if (supervisor_prepare_sleep(&supervisor)) {
        if (poll(connections, (nfds_t) nclients, TIRED) > 0)
            for (int i = 0; i < nclients; i++) {
                char bells[64];

                if (connections[i].revents & POLLIN)
                    while (recv(connections[i].fd, bells, sizeof bells, 0) > 0)
                        ;
            }
        supervisor_awake(&supervisor);
    }
    wall = monotonic_ns(CLOCK_REALTIME);
    n = supervisor_drain(&supervisor, DRAIN_MAX, wall, events);
    for (uint32_t i = 0; i < n; i++) {
        MUST(events[i].action == ACCEPTED || events[i].action == TERMINATED ||
             events[i].action == CANCELLED);
        if (events[i].action == TERMINATED)
            supervisor_refuse(&supervisor, events[i].slot, KIND_CANCELLED, NULL, wall);
    }
}
