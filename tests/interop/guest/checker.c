/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The only program of the Linux guest: it uses memory at random and tells what it finds in it.
 *
 * Each of its threads, one per processor, visits pages of its own part in random order. A page holds
 * a pattern of its number and of its generation, the count of how often it was written, which is
 * kept elsewhere. A visit checks 8 bytes in each eighth of the page, now and then all 4096, and some
 * visits write the page anew. Further pages hold zeros, and stay so.
 *
 * The kernel passes what it does not know on its command line on to here, as the environment:
 *     checker_mib=300        MiB that are written and checked
 *     checker_zero_mib=0     MiB that hold zeros and are only checked
 *     checker_write=500      visits of a thousand that write
 *     checker_beat_ms=100    between two heartbeats
 *
 * It prints READY when all memory holds its pattern, and from then on, for ever:
 *     HB 17 iterations=... bad=0 waits=... wait_us=... max_wait_us=... late_us=...
 *     BAD page=... word=... expected=... found=...
 * The first four count from the beginning, the last two are of this heartbeat alone. A wait is a
 * visit whose first read of its page or of its generation took over 0.25 ms, less what a heartbeat
 * took meanwhile. Nothing else of a visit is timed, so that what the host's scheduler does is hardly
 * ever mistaken for a wait. late_us is how much later than planned the heartbeat came; the next one is
 * planned from there.
 *
 * All times are CLOCK_MONOTONIC of the guest. It goes on while a processor waits for a page, and
 * stands still while the machine is stopped: waits are seen here, the downtime is not.
 *
 * It prints to QEMU's debug console, a port that takes a byte and is never busy. A line on the serial
 * console takes the processor 0.7 ms, half of it in interrupts, and would be seen as a wait.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/io.h>
#include <sys/mman.h>
#include <time.h>

#define PAGE 4096
#define WORDS (PAGE / sizeof(uint64_t))
#define CHECKED 8          /* words of a page that each visit checks */
#define WHOLE_EVERY 64     /* visits, of which one checks all words */
#define WAIT_NS 250000
#define MOST_PROCESSORS 64
#define DEBUG_CONSOLE 0xe9

struct worker {
    pthread_t thread;
    uint64_t *memory;      /* pages with a pattern, then pages of zeros */
    uint64_t first;        /* number of the first page, for the pattern and for what is printed */
    uint64_t pages, all_pages;
    uint32_t *generations;
    uint64_t random;
    uint64_t iterations, bad, waits, wait_ns, max_wait_ns;
} __attribute__((aligned(64)));

static struct worker workers[MOST_PROCESSORS];
static unsigned writes_of_thousand;
static pthread_mutex_t console = PTHREAD_MUTEX_INITIALIZER;
static volatile uint64_t beating_ns;   /* what heartbeats have taken processor 0 */

static void die(const char *what)
{
    perror(what);
    exit(1);               /* the kernel panics, and with it ends the machine */
}

static uint64_t number(const char *name, uint64_t otherwise)
{
    const char *text = getenv(name);
    return text ? strtoull(text, 0, 10) : otherwise;
}

__attribute__((format(printf, 1, 2))) static void tell(const char *format, ...)
{
    char line[256];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    pthread_mutex_lock(&console);
    outsb(DEBUG_CONSOLE, line, (unsigned long)length);
    pthread_mutex_unlock(&console);
}

static uint64_t now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static uint64_t random_number(uint64_t *state)
{
    uint64_t x = *state;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return *state = x;
}

/* What a page holds at a word; the words of a page differ, and so do those of two generations. */
static uint64_t pattern(uint64_t page, uint32_t generation, unsigned word)
{
    uint64_t x = (page << 32 | generation) * 0x9e3779b97f4a7c15u;
    return (x ^ x >> 29) + word * 0xbf58476d1ce4e5b9u;
}

static void write_page(struct worker *worker, uint64_t page)
{
    uint64_t *words = worker->memory + page * WORDS;
    uint32_t generation = ++worker->generations[page];
    for (unsigned word = 0; word < WORDS; word++)
        words[word] = pattern(worker->first + page, generation, word);
}

/* A page found bad is told of once: it is written anew, and counted for ever. */
static void report_bad(struct worker *worker, uint64_t page, unsigned word, uint64_t expected)
{
    uint64_t *words = worker->memory + page * WORDS;
    tell("BAD page=%lu word=%u expected=%016lx found=%016lx\n", worker->first + page, word, expected,
         words[word]);
    __atomic_add_fetch(&worker->bad, 1, __ATOMIC_RELAXED);
    if (page < worker->pages)
        write_page(worker, page);
    else
        for (word = 0; word < WORDS; word++)
            words[word] = 0;
}

static void check_page(struct worker *worker, uint64_t page, uint32_t generation, uint64_t random)
{
    int whole = random % WHOLE_EVERY == 0;
    unsigned step = whole ? 1 : WORDS / CHECKED;
    unsigned offset = whole ? 0 : random / WHOLE_EVERY % step;
    uint64_t *words = worker->memory + page * WORDS;
    for (unsigned word = offset; word < WORDS; word += step) {
        uint64_t expected =
            page < worker->pages ? pattern(worker->first + page, generation, word) : 0;
        if (words[word] != expected) {
            report_bad(worker, page, word, expected);
            return;
        }
    }
}

/* The first access to the page and to its generation, and how long it took. */
static uint32_t touch(struct worker *worker, uint64_t page)
{
    uint64_t before = now_ns(), beaten = beating_ns;
    uint32_t generation = 0;
    if (page < worker->pages)
        generation = ((volatile uint32_t *)worker->generations)[page];
    (void)*(volatile uint64_t *)(worker->memory + page * WORDS);
    beaten = worker == workers ? beating_ns - beaten : 0;
    uint64_t took = now_ns() - before - beaten;
    if (took > WAIT_NS) {
        __atomic_add_fetch(&worker->waits, 1, __ATOMIC_RELAXED);
        __atomic_add_fetch(&worker->wait_ns, took, __ATOMIC_RELAXED);
        if (took > __atomic_load_n(&worker->max_wait_ns, __ATOMIC_RELAXED))
            __atomic_store_n(&worker->max_wait_ns, took, __ATOMIC_RELAXED);
    }
    return generation;
}

static void *visit_for_ever(void *argument)
{
    struct worker *worker = argument;
    for (;;) {
        uint64_t random = random_number(&worker->random);
        uint64_t page = (random >> 32) % worker->all_pages;
        uint32_t generation = touch(worker, page);
        check_page(worker, page, generation, random & 0xffffff);
        if (page < worker->pages && (random >> 24) % 1000 < writes_of_thousand)
            write_page(worker, page);
        __atomic_add_fetch(&worker->iterations, 1, __ATOMIC_RELAXED);
    }
    return 0;
}

static void *map(uint64_t length)
{
    void *memory = mmap(0, length, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED)
        die("mmap");
    return memory;
}

static void begin(unsigned processors, uint64_t pages, uint64_t zero_pages)
{
    for (unsigned index = 0; index < processors; index++) {
        struct worker *worker = &workers[index];
        worker->pages = pages / processors;
        worker->all_pages = worker->pages + zero_pages / processors;
        worker->first = index * worker->all_pages;
        worker->random = 88172645463325252u + index;
        worker->memory = map(worker->all_pages * PAGE);
        worker->generations = map(worker->pages * sizeof *worker->generations);
        for (uint64_t page = 0; page < worker->pages; page++)
            write_page(worker, page);
    }
    for (unsigned index = 0; index < processors; index++) {
        cpu_set_t processor;
        pthread_attr_t attributes;
        CPU_ZERO(&processor);
        CPU_SET(index, &processor);
        pthread_attr_init(&attributes);
        pthread_attr_setaffinity_np(&attributes, sizeof processor, &processor);
        if (pthread_create(&workers[index].thread, &attributes, visit_for_ever, &workers[index]))
            die("pthread_create");
    }
}

static void beat(unsigned count, unsigned processors, uint64_t late_ns)
{
    uint64_t iterations = 0, bad = 0, waits = 0, wait_ns = 0, max_wait_ns = 0;
    for (unsigned index = 0; index < processors; index++) {
        struct worker *worker = &workers[index];
        uint64_t longest = __atomic_exchange_n(&worker->max_wait_ns, 0, __ATOMIC_RELAXED);
        iterations += __atomic_load_n(&worker->iterations, __ATOMIC_RELAXED);
        bad += __atomic_load_n(&worker->bad, __ATOMIC_RELAXED);
        waits += __atomic_load_n(&worker->waits, __ATOMIC_RELAXED);
        wait_ns += __atomic_load_n(&worker->wait_ns, __ATOMIC_RELAXED);
        if (longest > max_wait_ns)
            max_wait_ns = longest;
    }
    tell("HB %u iterations=%lu bad=%lu waits=%lu wait_us=%lu max_wait_us=%lu late_us=%lu\n", count,
         iterations, bad, waits, wait_ns / 1000, max_wait_ns / 1000, late_ns / 1000);
}

int main(void)
{
    uint64_t beat_ns = number("checker_beat_ms", 100) * 1000000u;
    cpu_set_t all;
    if (ioperm(DEBUG_CONSOLE, 1, 1) < 0)
        die("ioperm");
    if (sched_getaffinity(0, sizeof all, &all) < 0)
        die("sched_getaffinity");
    unsigned processors = (unsigned)CPU_COUNT(&all);
    if (processors > MOST_PROCESSORS)
        processors = MOST_PROCESSORS;
    writes_of_thousand = (unsigned)number("checker_write", 500);
    begin(processors, number("checker_mib", 300) << 8, number("checker_zero_mib", 0) << 8);

    /* The heartbeat goes before the walk, and what it uses is there from the beginning. */
    struct sched_param priority = {.sched_priority = 1};
    cpu_set_t first;
    CPU_ZERO(&first);
    CPU_SET(0, &first);
    if (sched_setscheduler(0, SCHED_FIFO, &priority) < 0 ||
        sched_setaffinity(0, sizeof first, &first) < 0)
        die("sched_setscheduler");
    tell("READY\n");
    uint64_t planned = now_ns();
    for (unsigned count = 1;; count++) {
        planned += beat_ns;
        struct timespec until = {(time_t)(planned / 1000000000u), (long)(planned % 1000000000u)};
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, 0);
        uint64_t now = now_ns();
        beat(count, processors, now - planned);
        planned = now;
        beating_ns += now_ns() - now;
    }
}
