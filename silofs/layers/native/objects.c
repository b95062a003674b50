/* Puts objects of the store together: header, checksums and pages of many at a time, in one pass over the pages' bytes.
 *
 * It is done here for one reason: what runs here holds no lock of Python's, and a commit packs as many bytes as guests can
 * write meanwhile. docs/format.md has the layout, silofs/layers/schema.py its constants and the same in Python; a test
 * compares the two. Integers are little-endian, as on every machine that has a store.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

#if defined(__x86_64__)
#include <xxh_x86dispatch.h> /* takes what vectors this processor has */
#else
#include <xxhash.h>
#endif

#define EXPORT __attribute__((visibility("default")))

enum { PAGE = 4096, SLOTS = 31, PAD = 16, HEADER = PAGE - PAD, OBJECT = HEADER + SLOTS * PAGE, SUMS_AT = 32, HEADER_SUM_AT = HEADER - 8 };
enum { CELL = PAD + OBJECT, EARLY = 1 << 20 }; /* bytes of a cell; of what the disk is told to begin with */

static void put32(unsigned char *at, uint32_t value) { memcpy(at, &value, sizeof value); }
static void put64(unsigned char *at, uint64_t value) { memcpy(at, &value, sizeof value); }

static int outside(uint64_t length, int64_t at) { return at < 0 || length < PAGE || (uint64_t)at > length - PAGE; }

static void begin_header(unsigned char *header, uint64_t id, uint32_t pages) {
    memset(header, 0, HEADER);
    memcpy(header, "SILOOBJ1", 8);
    put64(header + 8, id);
    put32(header + 16, pages);
}

static void put_sum(unsigned char *header, uint64_t id, uint32_t slot, const unsigned char *page) {
    put64(header + SUMS_AT + 8 * (size_t)slot, XXH3_64bits_withSeed(page, PAGE, id << 8 | slot));
}

static void end_header(unsigned char *header, uint64_t id) {
    put64(header + HEADER_SUM_AT, XXH3_64bits_withSeed(header, HEADER_SUM_AT, id));
}

/* Writes objects `first`, `first` + 1, … one after the other to `values`: `count` pages, which lie at `at` in `base` (of
 * `length` bytes), 31 to an object. 0, or -1 when a page lies outside of `base`; then `values` is worth nothing. */
EXPORT int silofs_objects(unsigned char *values, uint64_t first, const unsigned char *base, uint64_t length, const int64_t *at,
                          uint64_t count) {
    for (uint64_t done = 0; done < count; first++, values += OBJECT) {
        uint32_t pages = count - done < SLOTS ? (uint32_t)(count - done) : SLOTS;
        begin_header(values, first, pages);
        for (uint32_t slot = 0; slot < pages; slot++, done++) {
            if (outside(length, at[done]))
                return -1;
            unsigned char *page = values + HEADER + (size_t)slot * PAGE;
            memcpy(page, base + at[done], PAGE);
            put_sum(values, first, slot, page);
        }
        memset(values + HEADER + (size_t)pages * PAGE, 0, (size_t)(SLOTS - pages) * PAGE);
        end_header(values, first);
    }
    return 0;
}

/* Writes all of `parts` at `offset`; 0, or the number of the error. */
static int write_all(int fd, struct iovec *parts, int count, off_t offset) {
    while (count) {
        ssize_t written = pwritev(fd, parts, count, offset);
        if (written < 0 && errno == EINTR)
            continue;
        if (written <= 0)
            return written ? errno : EIO;
        offset += written;
        for (; count && (size_t)written >= parts->iov_len; parts++, count--)
            written -= (ssize_t)parts->iov_len;
        if (count) {
            parts->iov_base = (char *)parts->iov_base + written;
            parts->iov_len -= (size_t)written;
        }
    }
    return 0;
}

/* Writes objects `first`, `first` + 1, … as above, but to `cells` of a file, straight from where their pages are; the disk
 * begins with what has come together, and nothing is durable. 0, the number of the error, or -1 when a page lies outside of
 * `base`. What lies in a cell behind the object's last page stays. */
EXPORT int silofs_cells(int fd, uint64_t first, const unsigned char *base, uint64_t length, const int64_t *at, uint64_t count,
                        const uint64_t *cells) {
    unsigned char header[PAD + HEADER];
    off_t begun = 0, end = 0; /* written, and not yet told to the disk */
    memset(header, 0, PAD);
    for (uint64_t done = 0; done < count; first++, cells++) {
        uint32_t pages = count - done < SLOTS ? (uint32_t)(count - done) : SLOTS;
        struct iovec parts[1 + SLOTS] = {{header, sizeof header}};
        int used = 1;
        begin_header(header + PAD, first, pages);
        for (uint32_t slot = 0; slot < pages; slot++, done++) {
            if (outside(length, at[done]))
                return -1;
            unsigned char *page = (unsigned char *)base + at[done];
            put_sum(header + PAD, first, slot, page);
            if (used > 1 && (unsigned char *)parts[used - 1].iov_base + parts[used - 1].iov_len == page)
                parts[used - 1].iov_len += PAGE;
            else
                parts[used++] = (struct iovec){page, PAGE};
        }
        end_header(header + PAD, first);
        off_t offset = (off_t)*cells * CELL;
        int error = write_all(fd, parts, used, offset);
        if (error)
            return error;
        if (end != offset || end - begun >= EARLY) {
            if (end > begun)
                sync_file_range(fd, begun, end - begun, SYNC_FILE_RANGE_WRITE);
            begun = offset;
        }
        end = offset + CELL;
    }
    if (end > begun)
        sync_file_range(fd, begun, end - begun, SYNC_FILE_RANGE_WRITE);
    return 0;
}

/* Reads a byte of every page of `length` bytes, so that they are in memory. */
EXPORT void silofs_touch(const volatile unsigned char *from, uint64_t length) {
    for (uint64_t at = 0; at < length; at += PAGE)
        (void)from[at];
    if (length)
        (void)from[length - 1];
}

/* Says of each of `count` pages, which lie at `at` in `base`, whether it is all zeros. 0, or -1 when one lies outside. */
EXPORT int silofs_zeros(const unsigned char *base, uint64_t length, const int64_t *at, uint64_t count, unsigned char *zero) {
    for (uint64_t index = 0; index < count; index++) {
        if (outside(length, at[index]))
            return -1;
        const unsigned char *page = base + at[index];
        zero[index] = page[0] == 0 && memcmp(page, page + 1, PAGE - 1) == 0;
    }
    return 0;
}
