/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A page source in C, so that what is measured is the destination.
 *
 * source PORT PREAMBLE NAME PAGES HOST_PAGE ORDER REQUESTS
 *
 * Sends the file PREAMBLE (a stream up to the package), then pages of the block NAME:
 * ORDER none        only what is asked for, until REQUESTS faults have been answered
 * ORDER contiguous  every page in order; scattered: in random order; zero: zero pages in order.
 * Requests go first; between them the background fills the socket, never further ahead than
 * TCP_NOTSENT_LOWAT. Then the end of the stream; leaves when it has read SHUT.
 */
#include "stream.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#define BATCH 16
#define NOT_SENT (128 << 10)

static int sock;
static const char *name;
static uint64_t pages, per_host_page, answered;
static unsigned char *sent;
static uint32_t *order;
static int zero;
static int finished;

/* One host page as records. The first record of the stream names the block. */
static size_t records(unsigned char *at, uint64_t host_page)
{
    static int named;
    static unsigned char body[PAGE];
    unsigned char *start = at;
    if (!body[PAGE - 1])
        memset(body, FILL, PAGE);
    for (uint64_t part = 0; part < per_host_page; part++) {
        uint64_t page = host_page * per_host_page + part;
        put_u64(at, page * PAGE | (zero ? FLAG_ZERO : FLAG_PAGE) | (named ? FLAG_CONTINUE : 0));
        at += 8;
        if (!named) {
            *at++ = (unsigned char)strlen(name);
            memcpy(at, name, strlen(name));
            at += strlen(name);
            named = 1;
        }
        if (zero) {
            *at++ = 0;
        } else {
            memcpy(at, body, PAGE);
            uint64_t head = stamp(page);
            memcpy(at, &head, 8);
            at += PAGE;
        }
    }
    return (size_t)(at - start);
}

static void answer(uint64_t offset, uint64_t length, unsigned char *buffer)
{
    uint64_t host_page = offset / PAGE / per_host_page;
    uint64_t beyond = (offset + length) / PAGE / per_host_page;
    for (; host_page < beyond && host_page < pages; host_page++) {
        if (sent[host_page])
            continue;
        sent[host_page] = 1;
        write_all(sock, buffer, records(buffer, host_page));
    }
}

/* Return path: PONG and SHUT carry 4 bytes; requests carry offset and length. The guest is one
 * thread, so what comes in one go is one fault and the pages that are asked for around it. */
static void read_return_path(unsigned char *buffer)
{
    static unsigned char input[65536];
    static size_t filled;
    ssize_t got = recv(sock, input + filled, sizeof input - filled, MSG_DONTWAIT);
    if (got == 0) {
        finished = 1;
        return;
    }
    if (got < 0) {
        if (errno == EAGAIN)
            return;
        die("return path");
    }
    filled += (size_t)got;
    size_t place = 0;
    int asked = 0;
    while (filled - place >= 4) {
        unsigned type = input[place] << 8 | input[place + 1];
        unsigned length = input[place + 2] << 8 | input[place + 3];
        if (filled - place < 4 + length)
            break;
        if (type == 1)
            finished = 1;
        if (type == 3 || type == 4) {
            asked = 1;
            answer(get_u64(input + place + 4), get_u32(input + place + 12), buffer);
        }
        place += 4 + length;
    }
    answered += asked;
    memmove(input, input + place, filled - place);
    filled -= place;
}

static void begin_part(void)
{
    static const unsigned char part[5] = {2, 0, 0, 0, 2};
    write_all(sock, part, sizeof part);
}

static void end_stream(void)
{
    unsigned char end[64], *at = end;
    for (int last = 0; last < 2; last++) {
        put_u64(at, FLAG_EOS);
        at += 8;
        memcpy(at, "\x7e\0\0\0\2", 5);
        at += 5;
        if (!last) {
            memcpy(at, "\3\0\0\0\2", 5);
            at += 5;
        }
    }
    *at++ = 0;
    write_all(sock, end, (size_t)(at - end));
}

int main(int argc, char **argv)
{
    if (argc != 8) {
        fprintf(stderr, "usage: source PORT PREAMBLE NAME PAGES HOST_PAGE ORDER REQUESTS\n");
        return 2;
    }
    name = argv[3];
    per_host_page = strtoull(argv[5], 0, 0) / PAGE;
    pages = strtoull(argv[4], 0, 0) / per_host_page;
    int background = strcmp(argv[6], "none") != 0;
    uint64_t requests = strtoull(argv[7], 0, 0);
    zero = strcmp(argv[6], "zero") == 0;
    sent = calloc(pages, 1);
    order = malloc(pages * sizeof *order);
    unsigned char *buffer = malloc((size_t)BATCH * per_host_page * RECORD + 512);
    for (uint64_t page = 0; page < pages; page++)
        order[page] = (uint32_t)page;
    if (strcmp(argv[6], "scattered") == 0) {
        srandom(7);
        for (uint64_t page = pages - 1; page; page--) {
            uint64_t other = (uint64_t)random() % (page + 1);
            uint32_t kept = order[page];
            order[page] = order[other];
            order[other] = kept;
        }
    }
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons((uint16_t)atoi(argv[1])),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    sock = socket(AF_INET, SOCK_STREAM, 0);
    int one = 1, lowat = NOT_SENT;
    setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(sock, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &lowat, sizeof lowat);
    if (connect(sock, (struct sockaddr *)&address, sizeof address) < 0)
        die("connect");
    FILE *file = fopen(argv[2], "rb");
    if (!file)
        die(argv[2]);
    unsigned char *preamble = malloc(1 << 20);
    size_t length = fread(preamble, 1, 1 << 20, file);
    fclose(file);
    write_all(sock, preamble, length);
    begin_part();

    /* A huge page is a megabyte and more: one at a time is batch enough. */
    uint64_t batch = per_host_page > 1 ? 1 : BATCH;
    uint64_t next = 0;
    while (background ? next < pages : answered < requests) {
        struct pollfd polled = {sock, (short)(POLLIN | (background ? POLLOUT : 0)), 0};
        if (poll(&polled, 1, 60000) <= 0)
            die("poll");
        if (polled.revents & (POLLIN | POLLHUP | POLLERR)) {
            read_return_path(buffer);
            if (finished)
                return 1;
        } else if (polled.revents & POLLOUT) {
            size_t filled = 0;
            for (uint64_t count = 0; count < batch && next < pages; next++) {
                uint64_t page = order[next];
                if (sent[page])
                    continue;
                sent[page] = 1;
                filled += records(buffer + filled, page);
                count++;
            }
            write_all(sock, buffer, filled);
        }
    }
    end_stream();
    while (!finished) {
        struct pollfd polled = {sock, POLLIN, 0};
        if (poll(&polled, 1, 60000) <= 0)
            die("waiting for SHUT");
        read_return_path(buffer);
    }
    return 0;
}
