/* SPDX-License-Identifier: Apache-2.0 */
/* The bare round trip: a request's 16 bytes one way, a page record the other, two processes, loopback. */
#include "stream.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/wait.h>

#define REQUEST 16

int main(int argc, char **argv)
{
    int count = argc > 1 ? atoi(argv[1]) : 10000, one = 1;
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    if (bind(listener, (struct sockaddr *)&address, size) < 0 || listen(listener, 1) < 0)
        die("listen");
    getsockname(listener, (struct sockaddr *)&address, &size);
    unsigned char request[REQUEST] = {0}, *record = calloc(1, RECORD);
    if (fork() == 0) {
        int sock = socket(AF_INET, SOCK_STREAM, 0);
        setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        if (connect(sock, (struct sockaddr *)&address, size) < 0)
            die("connect");
        for (int i = 0; i < count; i++) {
            read_all(sock, request, REQUEST);
            write_all(sock, record, RECORD);
        }
        _exit(0);
    }
    int sock = accept(listener, 0, 0);
    setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    printf("[");
    for (int i = 0; i < count; i++) {
        uint64_t before = now_ns();
        write_all(sock, request, REQUEST);
        read_all(sock, record, RECORD);
        printf("%s%lu", i ? "," : "", (unsigned long)(now_ns() - before));
    }
    printf("]\n");
    wait(0);
    return 0;
}
