/* A process to be stopped in the middle of something. It prints `ready` when it is about to do what
 * its argument says, and how that has ended; most of it lasts until the standard input ends. */

#define _GNU_SOURCE
#include <errno.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/rseq.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

volatile uint64_t stop; /* for target.S too */
volatile uint64_t holding;
static volatile sig_atomic_t handled;
static volatile uint64_t counters[4];
static uint32_t word;
static pthread_t main_thread;

static void ready(void)
{
    puts("ready");
    fflush(stdout);
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

static void wait_for_end_of_input(void)
{
    char byte;
    while (read(0, &byte, 1) > 0)
        ;
}

static void print_result(long result, double since)
{
    printf("%ld %s %.3f\n", result, result < 0 ? strerrorname_np(errno) : "-", now() - since);
}

static void count_signal(int number)
{
    (void)number;
    handled++;
}

static void handle(int number, int flags)
{
    struct sigaction action = {.sa_handler = count_signal, .sa_flags = flags};
    sigaction(number, &action, NULL);
}

static void start(void *(*function)(void *), void *argument)
{
    pthread_t thread;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (pthread_create(&thread, NULL, function, argument) != 0)
        abort();
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* -- threads that end what the main thread does ------------------------------------------------ */

static void *set_stop(void *unused)
{
    wait_for_end_of_input();
    stop = 1;
    return unused;
}

static void *set_stop_after_held(void *unused)
{
    while (!holding)
        ;
    ready();
    return set_stop(unused);
}

static void *wake(void *unused)
{
    wait_for_end_of_input();
    word = 1;
    syscall(SYS_futex, &word, FUTEX_WAKE, 1, NULL, NULL, 0);
    return unused;
}

static void *interrupt(void *unused)
{
    wait_for_end_of_input();
    pthread_kill(main_thread, SIGUSR1);
    return unused;
}

static void *flood(void *unused)
{
    union sigval value = {.sival_int = 0};
    struct timespec pause = {.tv_nsec = 100 * 1000};
    while (!stop) {
        if (pthread_sigqueue(main_thread, SIGRTMIN, value) == 0)
            counters[0]++;
        nanosleep(&pause, NULL);
    }
    counters[1] = 1;
    return unused;
}

static void *count(void *counter)
{
    while (!stop)
        ++*(volatile uint64_t *)counter;
    return NULL;
}

/* -- all registers: target.S ------------------------------------------------------------ */

#define HELD_SIZE (320 + 32 * 64)
uint8_t vectors_in[32 * 64];
uint8_t held[HELD_SIZE];
uint64_t with_avx512;
void hold_registers(void);
uint64_t hold_critical_section(void *rseq);

/* Print how many bytes of the registers are not what they are in a run that nobody disturbs. */
static void registers(void)
{
    uint8_t expected[HELD_SIZE];
    long different = 0;
    with_avx512 = __builtin_cpu_supports("avx512f");
    for (size_t i = 0; i < sizeof vectors_in; i++)
        vectors_in[i] = 1 + i * 7 % 251;
    stop = 1;
    hold_registers();
    memcpy(expected, held, sizeof held);
    stop = 0;
    holding = 0;
    start(set_stop_after_held, NULL);
    hold_registers();
    for (size_t i = 0; i < sizeof held; i++)
        different += held[i] != expected[i];
    printf("%ld\n", different);
}

static void critical_section(void)
{
    start(set_stop_after_held, NULL);
    uint64_t guarded = hold_critical_section((char *)__builtin_thread_pointer() + __rseq_offset);
    puts(guarded ? "guarded" : "unguarded");
}

/* -- waits ---------------------------------------------------------------------------------------- */

static const struct timespec half_a_second = {.tv_nsec = 500 * 1000 * 1000};

static void in_nanosleep(void)
{
    ready();
    double since = now();
    print_result(nanosleep(&half_a_second, NULL), since);
}

static void in_ppoll(const struct timespec *timeout)
{
    struct pollfd input = {.fd = 0, .events = POLLIN};
    sigset_t none;
    sigemptyset(&none);
    ready();
    double since = now();
    print_result(ppoll(&input, 1, timeout, &none), since);
}

static void in_futex(const struct timespec *timeout)
{
    if (timeout == NULL)
        start(wake, NULL);
    ready();
    double since = now();
    print_result(syscall(SYS_futex, &word, FUTEX_WAIT, 0, timeout, NULL, 0), since);
}

static void in_read(void)
{
    char byte;
    ready();
    double since = now();
    print_result(read(0, &byte, 1), since);
}

static void in_epoll_wait(void)
{
    struct epoll_event event = {.events = EPOLLIN};
    int epoll = epoll_create1(0);
    epoll_ctl(epoll, EPOLL_CTL_ADD, 0, &event);
    ready();
    double since = now();
    print_result(epoll_wait(epoll, &event, 1, -1), since);
}

static void in_pause(void)
{
    stack_t alternate = {.ss_sp = malloc(1 << 16), .ss_size = 1 << 16}, now_alternate;
    sigaltstack(&alternate, NULL);
    handle(SIGUSR1, SA_RESTART | SA_ONSTACK);
    start(interrupt, NULL);
    ready();
    double since = now();
    print_result(pause(), since);
    sigaltstack(NULL, &now_alternate);
    printf("%d %d\n", handled, now_alternate.ss_sp == alternate.ss_sp);
}

static void in_sigsuspend(void)
{
    sigset_t usr1, before, none;
    handle(SIGUSR1, SA_RESTART);
    sigemptyset(&none);
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    sigprocmask(SIG_BLOCK, &usr1, &before);
    start(interrupt, NULL);
    ready();
    double since = now();
    print_result(sigsuspend(&none), since);
    sigprocmask(SIG_SETMASK, NULL, &none);
    printf("%d %d\n", handled, sigismember(&none, SIGUSR1));
}

/* -- signals and threads ------------------------------------------------------------------------- */

/* Each signal of the flood is queued, so none may get lost. */
static void flooded(void)
{
    volatile uint64_t sum = 0;
    handle(SIGRTMIN, SA_RESTART);
    start(flood, NULL);
    start(set_stop, NULL);
    ready();
    while (counters[1] == 0)
        sum++;
    printf("%ld\n", (long)(counters[0] - handled));
}

static void threads(void)
{
    uint64_t before[4];
    for (int i = 0; i < 4; i++)
        start(count, (void *)&counters[i]);
    ready();
    wait_for_end_of_input();
    memcpy(before, (void *)counters, sizeof before);
    for (int i = 0; i < 4; i++)
        while (counters[i] == before[i])
            usleep(1000);
    puts("all go on");
}

static void stopped(void)
{
    ready();
    raise(SIGSTOP);
    wait_for_end_of_input();
    puts("continued");
}

/* A vfork(2) cannot be stopped before the child lets go of its memory. */
static void in_vfork(void)
{
    char byte;
    ready();
    if (vfork() == 0) {
        while (read(0, &byte, 1) > 0)
            ;
        _exit(0);
    }
    puts("back");
}

/* At the lowest address that the stack has: what is put below it takes a page more. */
static void deep(void)
{
    char line[256], byte;
    uintptr_t lowest = 0;
    FILE *maps = fopen("/proc/self/maps", "r");
    while (fgets(line, sizeof line, maps))
        if (strstr(line, "[stack]"))
            lowest = strtoul(line, NULL, 16);
    fclose(maps);
    uintptr_t here = (uintptr_t)__builtin_frame_address(0);
    volatile char *room = __builtin_alloca(here - lowest - 2048);
    room[0] = 1;
    ready();
    long result = syscall(SYS_read, 0, &byte, 1);
    printf("%ld %d\n", result, room[0]);
}

static void wait_in_half_a_page(void)
{
    char room[2048];
    while (read(0, room, sizeof room) > 0)
        ;
}

/* On a stack of one page, with no memory below. */
static void cornered(void)
{
    static ucontext_t there, back;
    char *pages = mmap(NULL, 8192, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(pages + 4096, 4096, PROT_READ | PROT_WRITE);
    getcontext(&there);
    there.uc_stack.ss_sp = pages + 4096;
    there.uc_stack.ss_size = 4096;
    there.uc_link = &back;
    makecontext(&there, wait_in_half_a_page, 0);
    ready();
    swapcontext(&back, &there);
    puts("back");
}

/* -- who is to be adopted ------------------------------------------------------------------------ */

#define PAGES 16

/* Print where memory is, whose pages hold 1, 2, ...; then read the pages that the input names. */
static void memory(void)
{
    char line[32];
    char *pages = mmap(NULL, PAGES * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < PAGES; i++)
        pages[i * 4096] = i + 1;
    ready();
    printf("%lu\n", (unsigned long)pages);
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        printf("%d\n", pages[atoi(line) * 4096]);
        fflush(stdout);
    }
}

/* userfaultfd(2) is answered by a seccomp filter. */
static void filtered(uint32_t action)
{
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, action),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {.len = sizeof filter / sizeof *filter, .filter = filter};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) < 0)
        abort();
    ready();
    wait_for_end_of_input();
    puts("back");
}

static void without_rights(void)
{
    if (setresgid(65534, 65534, 65534) < 0 || setresuid(65534, 65534, 65534) < 0)
        abort();
    ready();
    wait_for_end_of_input();
    puts("back");
}

int main(int count, char **arguments)
{
    const char *what = count > 1 ? arguments[1] : "";
    main_thread = pthread_self();
    if (strcmp(what, "registers") == 0)
        registers();
    else if (strcmp(what, "critical section") == 0)
        critical_section();
    else if (strcmp(what, "nanosleep") == 0)
        in_nanosleep();
    else if (strcmp(what, "ppoll") == 0)
        in_ppoll(NULL);
    else if (strcmp(what, "ppoll timed") == 0)
        in_ppoll(&half_a_second);
    else if (strcmp(what, "futex") == 0)
        in_futex(NULL);
    else if (strcmp(what, "futex timed") == 0)
        in_futex(&half_a_second);
    else if (strcmp(what, "read") == 0)
        in_read();
    else if (strcmp(what, "epoll_wait") == 0)
        in_epoll_wait();
    else if (strcmp(what, "pause") == 0)
        in_pause();
    else if (strcmp(what, "sigsuspend") == 0)
        in_sigsuspend();
    else if (strcmp(what, "flooded") == 0)
        flooded();
    else if (strcmp(what, "threads") == 0)
        threads();
    else if (strcmp(what, "stopped") == 0)
        stopped();
    else if (strcmp(what, "vfork") == 0)
        in_vfork();
    else if (strcmp(what, "deep") == 0)
        deep();
    else if (strcmp(what, "cornered") == 0)
        cornered();
    else if (strcmp(what, "memory") == 0)
        memory();
    else if (strcmp(what, "filtered, error") == 0)
        filtered(SECCOMP_RET_ERRNO | EPERM);
    else if (strcmp(what, "filtered, trap") == 0)
        filtered(SECCOMP_RET_TRAP);
    else if (strcmp(what, "filtered, kill") == 0)
        filtered(SECCOMP_RET_KILL_PROCESS);
    else if (strcmp(what, "without rights") == 0)
        without_rights();
    else
        return 2;
    return 0;
}
