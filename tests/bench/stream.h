/* SPDX-License-Identifier: Apache-2.0 */
/* What the C side of the bench shares: the numbers of the stream, big-endian words, page content. */
#ifndef STREAM_H
#define STREAM_H

#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096u
#define RECORD (8 + PAGE)
#define FLAG_ZERO 0x02
#define FLAG_PAGE 0x08
#define FLAG_EOS 0x10
#define FLAG_CONTINUE 0x20
#define FILL 0x5a /* every byte of a page that is not its stamp */

static inline void die(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static inline void put_u64(unsigned char *at, uint64_t value)
{
    value = htobe64(value);
    memcpy(at, &value, 8);
}

static inline uint64_t get_u64(const unsigned char *at)
{
    uint64_t value;
    memcpy(&value, at, 8);
    return be64toh(value);
}

static inline uint32_t get_u32(const unsigned char *at)
{
    uint32_t value;
    memcpy(&value, at, 4);
    return be32toh(value);
}

static inline uint64_t now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/* The first eight bytes of target page number `page`: tells every page from every other. */
static inline uint64_t stamp(uint64_t page)
{
    return (page + 1) * 0x9e3779b97f4a7c15u;
}

static inline void write_all(int fd, const unsigned char *data, size_t length)
{
    while (length) {
        ssize_t done = write(fd, data, length);
        if (done < 0) {
            if (errno == EINTR)
                continue;
            die("write");
        }
        data += done;
        length -= (size_t)done;
    }
}

static inline void read_all(int fd, unsigned char *data, size_t length)
{
    while (length) {
        ssize_t done = read(fd, data, length);
        if (done <= 0)
            die("read");
        data += done;
        length -= (size_t)done;
    }
}

#endif
