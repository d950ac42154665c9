/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The floor: a destination in C that does what must be done and nothing else. One thread reads
 * faults and the stream and places with UFFDIO_COPY; the guest is a second thread.
 *
 * floor SKIP NAME PAGES HOST_PAGE FAULTS EXPECT_ZERO VERIFY
 *
 * Prints its port, then, when all is done, one line of JSON. SKIP is the length of the stream up
 * to the package, which is read and not looked at.
 */
#include "stream.h"
#include "guest.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>

#define BUFFER (1u << 20)

static int uffd, sock;
static unsigned char *memory, *requested;
static uint64_t pages, host_page_size, fault_count, faults, wrong, *latencies;
static const char *name;
static int expect_zero, named;
static unsigned char *assembly;
static uint64_t assembled;
static int eof;

static void *run_guest(void *unused)
{
    (void)unused;
    faults = walk(memory, pages * PAGE / host_page_size, host_page_size, fault_count, expect_zero,
                  latencies, &wrong);
    return 0;
}

/* Ask once for each host page, however often it faults. */
static void read_faults(void)
{
    struct uffd_msg messages[16];
    ssize_t got = read(uffd, messages, sizeof messages);
    if (got < 0) {
        if (errno == EAGAIN)
            return;
        die("userfaultfd");
    }
    for (ssize_t i = 0; i < got / (ssize_t)sizeof messages[0]; i++) {
        uint64_t offset = messages[i].arg.pagefault.address - (uint64_t)memory;
        offset &= ~(host_page_size - 1);
        if (requested[offset / host_page_size])
            continue;
        requested[offset / host_page_size] = 1;
        unsigned char request[300];
        size_t length = named ? 12 : 13 + strlen(name);
        request[0] = 0;
        request[1] = named ? 4 : 3;
        request[2] = (unsigned char)(length >> 8);
        request[3] = (unsigned char)length;
        put_u64(request + 4, offset);
        uint32_t size = htobe32((uint32_t)host_page_size);
        memcpy(request + 12, &size, 4);
        if (!named) {
            request[16] = (unsigned char)strlen(name);
            memcpy(request + 17, name, strlen(name));
            named = 1;
        }
        write_all(sock, request, 4 + length);
    }
}

static void place(uint64_t offset, const unsigned char *from, uint64_t length)
{
    struct uffdio_copy copy = {.dst = (uint64_t)memory + offset, .src = (uint64_t)from, .len = length};
    if (ioctl(uffd, UFFDIO_COPY, &copy) < 0 && errno != EEXIST)
        die("UFFDIO_COPY");
}

/* A host page of 2 MiB comes as 512 records back to back and is placed when all are here. */
static void place_page(uint64_t offset, const unsigned char *from)
{
    if (host_page_size == PAGE) {
        place(offset, from, PAGE);
        return;
    }
    memcpy(assembly + (offset & (host_page_size - 1)), from, PAGE);
    if (++assembled == host_page_size / PAGE) {
        assembled = 0;
        place(offset & ~(host_page_size - 1), assembly, host_page_size);
    }
}

static void place_zero(uint64_t offset)
{
    struct uffdio_zeropage zero = {.range = {(uint64_t)memory + offset, PAGE}};
    if (ioctl(uffd, UFFDIO_ZEROPAGE, &zero) < 0 && errno != EEXIST)
        die("UFFDIO_ZEROPAGE");
}

/* Take whole records off the buffer; returns how many bytes they were. */
static size_t take(const unsigned char *data, size_t length)
{
    static int inside = 0;
    size_t place = 0;
    while (!eof) {
        const unsigned char *at = data + place;
        size_t left = length - place;
        if (!inside) {
            if (left < 1)
                break;
            if (*at == 0) {
                eof = 1;
                break;
            }
            if (left < 5)
                break;
            if (*at == 2 || *at == 3)
                inside = 1;
            place += 5; /* PART, END or FOOTER with its section id */
            continue;
        }
        if (left < 8)
            break;
        uint64_t word = get_u64(at);
        uint64_t flags = word & (PAGE - 1), offset = word & ~(uint64_t)(PAGE - 1);
        size_t head = 8;
        if (flags == FLAG_EOS) {
            inside = 0;
            place += 8;
            continue;
        }
        if (!(flags & FLAG_CONTINUE)) {
            if (left < 9 || left < 9u + at[8])
                break;
            head = 9u + at[8];
        }
        if (flags & FLAG_ZERO) {
            if (left < head + 1)
                break;
            place_zero(offset);
            place += head + 1;
        } else {
            if (left < head + PAGE)
                break;
            place_page(offset, at + head);
            place += head + PAGE;
        }
    }
    return place;
}

static int compare(const void *one, const void *other)
{
    uint64_t a = *(const uint64_t *)one, b = *(const uint64_t *)other;
    return a < b ? -1 : a > b;
}

static double cpu_seconds(const struct rusage *usage)
{
    return (double)(usage->ru_utime.tv_sec + usage->ru_stime.tv_sec) +
           (double)(usage->ru_utime.tv_usec + usage->ru_stime.tv_usec) / 1e6;
}

int main(int argc, char **argv)
{
    if (argc != 8)
        return 2;
    size_t skip = strtoull(argv[1], 0, 0);
    name = argv[2];
    pages = strtoull(argv[3], 0, 0);
    host_page_size = strtoull(argv[4], 0, 0);
    fault_count = strtoull(argv[5], 0, 0);
    expect_zero = atoi(argv[6]);
    latencies = malloc((fault_count + 1) * sizeof *latencies);
    requested = calloc(pages, 1);
    int huge = host_page_size > PAGE;
    memory = mmap(0, pages * PAGE, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | (huge ? MAP_HUGETLB | 21 << MAP_HUGE_SHIFT : 0), -1,
                  0);
    if (memory == MAP_FAILED)
        die("mmap");
    assembly = mmap(0, host_page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (!huge)
        madvise(memory, pages * PAGE, MADV_NOHUGEPAGE);
    uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (uffd < 0)
        die("userfaultfd");
    struct uffdio_api api = {.api = UFFD_API, .features = huge ? UFFD_FEATURE_MISSING_HUGETLBFS : 0};
    if (ioctl(uffd, UFFDIO_API, &api) < 0)
        die("UFFDIO_API");
    struct uffdio_register range = {.range = {(uint64_t)memory, pages * PAGE},
                                    .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (ioctl(uffd, UFFDIO_REGISTER, &range) < 0)
        die("UFFDIO_REGISTER");

    int listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    if (bind(listener, (struct sockaddr *)&address, size) < 0 || listen(listener, 1) < 0)
        die("listen");
    getsockname(listener, (struct sockaddr *)&address, &size);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    sock = accept(listener, 0, 0);
    if (sock < 0)
        die("accept");
    int one = 1;
    setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    unsigned char *buffer = malloc(BUFFER);
    for (size_t done = 0; done < skip;) {
        size_t part = skip - done < BUFFER ? skip - done : BUFFER;
        read_all(sock, buffer, part);
        done += part;
    }

    struct rusage before, after;
    getrusage(RUSAGE_THREAD, &before);
    uint64_t started = now_ns();
    pthread_t guest;
    pthread_create(&guest, 0, run_guest, 0);
    size_t filled = 0;
    while (!eof) {
        struct pollfd polled[2] = {{uffd, POLLIN, 0}, {sock, POLLIN, 0}};
        if (poll(polled, 2, 60000) <= 0)
            die("poll");
        if (polled[0].revents & POLLIN)
            read_faults();
        if (polled[1].revents) {
            ssize_t got = recv(sock, buffer + filled, BUFFER - filled, MSG_DONTWAIT);
            if (got == 0 || (got < 0 && errno != EAGAIN))
                die("recv");
            if (got > 0) {
                filled += (size_t)got;
                size_t taken = take(buffer, filled);
                memmove(buffer, buffer + taken, filled - taken);
                filled -= taken;
            }
        }
    }
    uint64_t ended = now_ns();
    struct uffdio_range whole = {(uint64_t)memory, pages * PAGE};
    ioctl(uffd, UFFDIO_UNREGISTER, &whole);
    getrusage(RUSAGE_THREAD, &after);
    pthread_join(guest, 0);
    write_all(sock, (const unsigned char *)"\0\1\0\4\0\0\0\0", 8);
    uint64_t verified = 0;
    if (atoi(argv[7])) {
        wrong += verify(memory, pages, expect_zero);
        verified = pages;
    }
    qsort(latencies, faults, sizeof *latencies, compare);
    printf("{\"seconds\": %.6f, \"cpu\": %.6f, \"wrong\": %lu, \"verified\": %lu, \"latencies\": [",
           (double)(ended - started) / 1e9, cpu_seconds(&after) - cpu_seconds(&before),
           (unsigned long)wrong, (unsigned long)verified);
    for (uint64_t i = 0; i < faults; i++)
        printf("%s%lu", i ? "," : "", (unsigned long)latencies[i]);
    printf("]}\n");
    return 0;
}
