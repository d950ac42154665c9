/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GUEST_H
#define GUEST_H

#include <stdint.h>

/* Touch pages until `count` were missing; returns how many were, their waits (ns) in `latencies`. */
uint64_t walk(unsigned char *memory, uint64_t pages, uint64_t page_size, uint64_t count,
              int expect_zero, uint64_t *latencies, uint64_t *wrong);

/* Compare every target page with what the source sent; returns the number of wrong ones. */
uint64_t verify(const unsigned char *memory, uint64_t pages, int expect_zero);

#endif
