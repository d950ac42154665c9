/* SPDX-License-Identifier: Apache-2.0 */
/* The guest: one thread that touches pages in random order and times those that are missing. */
#include "stream.h"
#include "guest.h"

#include <sys/mman.h>

static uint64_t random_number(uint64_t *state)
{
    uint64_t x = *state;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return *state = x;
}

uint64_t walk(unsigned char *memory, uint64_t pages, uint64_t page_size, uint64_t count,
              int expect_zero, uint64_t *latencies, uint64_t *wrong)
{
    uint64_t state = 88172645463325252u, faults = 0;
    uint32_t *order = malloc(pages * sizeof *order);
    for (uint64_t page = 0; page < pages; page++)
        order[page] = (uint32_t)page;
    for (uint64_t page = pages - 1; page; page--) {
        uint64_t other = random_number(&state) % (page + 1);
        uint32_t kept = order[page];
        order[page] = order[other];
        order[other] = kept;
    }
    *wrong = 0;
    for (uint64_t place = 0; place < pages && faults < count; place++) {
        unsigned char *at = memory + order[place] * page_size;
        unsigned char resident = 0;
        /* A page that is there costs nothing and tells nothing: only the missing ones count. */
        if (mincore(at, PAGE, &resident) < 0)
            die("mincore");
        uint64_t before = now_ns();
        uint64_t head = *(volatile uint64_t *)at;
        uint64_t after = now_ns();
        if (!(resident & 1))
            latencies[faults++] = after - before;
        if (head != (expect_zero ? 0 : stamp(order[place] * (page_size / PAGE))))
            ++*wrong;
    }
    free(order);
    return faults;
}

uint64_t verify(const unsigned char *memory, uint64_t pages, int expect_zero)
{
    unsigned char expected[PAGE];
    uint64_t wrong = 0;
    memset(expected, expect_zero ? 0 : FILL, PAGE);
    for (uint64_t page = 0; page < pages; page++) {
        if (!expect_zero) {
            uint64_t head = stamp(page);
            memcpy(expected, &head, sizeof head);
        }
        wrong += memcmp(memory + page * PAGE, expected, PAGE) != 0;
    }
    return wrong;
}
