/* Puts objects of the store together: header, checksums and pages of many at a time, in one pass over the pages' bytes.
 *
 * It is done here for one reason: what runs here holds no lock of Python's, and a commit packs as many bytes as guests can
 * write meanwhile. docs/format.md has the layout, silofs/layers/schema.py its constants and the same in Python; a test
 * compares the two. Integers are little-endian, as on every machine that has a store.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#define EXPORT __attribute__((visibility("default")))

enum { PAGE = 4096, SLOTS = 31, HEADER = PAGE - 16, OBJECT = HEADER + SLOTS * PAGE, SUMS_AT = 32, HEADER_SUM_AT = HEADER - 8 };

static void put32(unsigned char *at, uint32_t value) { memcpy(at, &value, sizeof value); }
static void put64(unsigned char *at, uint64_t value) { memcpy(at, &value, sizeof value); }

/* Writes objects `first`, `first` + 1, … one after the other to `values`: `count` pages, which lie at `at` in `base` (of
 * `length` bytes), 31 to an object. 0, or -1 when a page lies outside of `base`; then `values` is worth nothing. */
EXPORT int silofs_objects(unsigned char *values, uint64_t first, const unsigned char *base, uint64_t length, const int64_t *at,
                          uint64_t count) {
    for (uint64_t done = 0; done < count; first++, values += OBJECT) {
        uint32_t pages = count - done < SLOTS ? (uint32_t)(count - done) : SLOTS;
        memset(values, 0, HEADER);
        memcpy(values, "SILOOBJ1", 8);
        put64(values + 8, first);
        put32(values + 16, pages);
        for (uint32_t slot = 0; slot < pages; slot++, done++) {
            if (at[done] < 0 || length < PAGE || (uint64_t)at[done] > length - PAGE)
                return -1;
            unsigned char *page = values + HEADER + (size_t)slot * PAGE;
            memcpy(page, base + at[done], PAGE);
            put64(values + SUMS_AT + 8 * (size_t)slot, XXH3_64bits_withSeed(page, PAGE, first << 8 | slot));
        }
        memset(values + HEADER + (size_t)pages * PAGE, 0, (size_t)(SLOTS - pages) * PAGE);
        put64(values + HEADER_SUM_AT, XXH3_64bits_withSeed(values, HEADER_SUM_AT, first));
    }
    return 0;
}
