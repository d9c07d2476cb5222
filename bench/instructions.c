/*
 * instructions.c - register, status and terminate, so often, for a count of instructions
 *
 *     instructions register|status|terminate COUNT
 *
 * The shipped slot protocol without an interpreter, its supervisor awake and idle.  What one call
 * costs is the difference of two runs by the difference of their COUNTs: see instructions.py.
 */
#include "../tests/fault/core/core.h"

enum { NSLOTS = 8192, MOST = 4096 };

static supervisor_t s;
static client_t     c;
static uint32_t     slots[MOST];
static uint64_t     generations[MOST];

static void
register_all(uint32_t count)
{
    image_t image;

    image_fill(&image, 1, 16, false);
    for (uint32_t i = 0; i < count; i++)
        MUST(client_register(&c, image.bytes, false, &slots[i], &generations[i]) == REG_OK);
}

int
main(int argc, char **argv)
{
    geometry_t  g = geometry_of(NSLOTS, 1);
    int         outbox = memory_file(g.outbox_size), inbox = memory_file(g.inbox_size);
    const char *problem, *what = argc > 2 ? argv[1] : "";
    uint32_t    count = argc > 2 ? (uint32_t) strtoul(argv[2], NULL, 10) : 0;

    MUST(count <= MOST);
    MUST(supervisor_open(&s, outbox, inbox, NSLOTS, 1, 1) == 0);
    MUST(client_open(&c, outbox, g.outbox_size, inbox, g.inbox_size, &problem) == 0);
    c.cid = (uint16_t) supervisor_cid_new(&s);
    c.connection = c.supervisor = -1;
    supervisor_awake(&s);
    if (strcmp(what, "register") == 0) {
        register_all(count);
    } else if (strcmp(what, "status") == 0) {
        volatile uint64_t seen;

        register_all(1);
        for (uint32_t i = 0; i < count; i++)
            seen = client_status(&c, slots[0]);
        (void) seen;
    } else if (strcmp(what, "terminate") == 0) {
        register_all(MOST);
        for (uint32_t i = 0; i < count; i++)
            MUST(client_terminate(&c, slots[i], generations[i]));
    } else {
        fprintf(stderr, "usage: instructions register|status|terminate COUNT\n");
        return 2;
    }
    client_close(&c);
    supervisor_close(&s);
    return 0;
}
