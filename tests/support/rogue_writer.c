/*
 * rogue_writer.c - damage an inbox at full speed
 *
 * Random words, words that look right, records, bitmaps, tokens; and holes.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static uint64_t state;

/* xorshift64* */
static uint64_t
chance(void)
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * UINT64_C(0x2545f4914f6cdd1d);
}
static uint64_t below(uint64_t n) { return n ? (chance() >> 11) % n : 0; }

/* Write so many times, anywhere in the inbox, and in the name of any of these clients; at: the
 * offsets of tokens, controls, dirty bits, hints, records.  0, or -1 with errno. */
int
rogue_write(int fd, uint64_t times, uint64_t seed, uint64_t nslots, uint64_t ntokens,
            const uint64_t at[5], const uint64_t *cids, uint64_t ncids)
{
    uint64_t tokens = at[0], controls = at[1], bitmaps = at[2], hints = at[3], records = at[4];
    struct stat status;
    char *inbox;

    state = seed | 1;
    if (fstat(fd, &status) != 0)
        return -1;
    inbox = mmap(NULL, (size_t) status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (inbox == MAP_FAILED)
        return -1;
    while (times-- > 0) {
        uint64_t slot = below(nslots), what = below(64);
        _Atomic uint64_t *word = (_Atomic uint64_t *) (inbox + controls + 64 * slot);

        /* Often a word that might be right: of another owner, state, token or generation. */
        uint64_t forged = ((*word >> 26) + below(3) - (what & 1)) << 26 |
                          cids[below(ncids)] << 14 | below(ntokens + 2) << 3 | below(8);

        if (what < 24) {
            atomic_store(word, forged);
        } else if (what < 30) {
            atomic_store(word, what & 1 ? 0 : chance());
        } else if (what < 40 && ntokens > 0) {
            word = (_Atomic uint64_t *) (inbox + tokens + 64 * below(ntokens));
            atomic_store(word, what & 1 ? forged & ~UINT64_C(0x3ff8) : chance());
        } else if (what < 50) {
            uint64_t at = (what & 1 ? bitmaps : hints) + 8 * below((nslots + 63) / 64);

            atomic_store((_Atomic uint64_t *) (inbox + at), what & 2 ? ~UINT64_C(0) : chance());
        } else if (what < 62) {
            word = (_Atomic uint64_t *) (inbox + records + 2048 * slot + 8 * below(256));
            atomic_store(word, what & 1 ? chance() : chance() & 0xff);
        } else if (what < 63) {
            memset(inbox + below(4096 - 64), (int) chance(), 64);
        } else if (below(16) == 0) {
            off_t page = (off_t) below((uint64_t) status.st_size / 4096) * 4096;

            (void) fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, page, 4096);
        }
    }
    return munmap(inbox, (size_t) status.st_size);
}
