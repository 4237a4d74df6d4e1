/* The host's half of the streams and commands, timed from there:
 *   client tcp ADDRESS -- COMMAND…   with server.c behind published ports; COMMAND runs /true in the box
 *   client vsock CID                 with server.c on the vsock of the guest of that number; its RUN runs /true
 * A line on standard output for each figure: "figure NAME NANOSECONDS", each time, and at last "figures end". */

#define _GNU_SOURCE
#include "figures.h"
#include "services.h"
#include <arpa/inet.h>
#include <errno.h>
#include <linux/vm_sockets.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    ROUND_TRIPS = 1000,
    CONNECTIONS = 100,
    STREAMS = 16,
    /* Of all streams together. */
    MIB = 32,
    BYTES = MIB << 20,
    COMMANDS = 20,
    COMMANDS_AT_ONCE = 100
};

static bool vsock;
static const char *peer;
static char **command;
static char block[BLOCK];

static void fail(const char *what)
{
    printf("client: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int connect_to(int port)
{
    struct sockaddr_vm vm = {.svm_family = AF_VSOCK, .svm_cid = atoi(peer), .svm_port = port};
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_port = htons(port)};
    int fd = socket(vsock ? AF_VSOCK : AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    inet_pton(AF_INET, peer, &in.sin_addr);
    if (fd < 0 || connect(fd, vsock ? (void *)&vm : (void *)&in, vsock ? sizeof vm : sizeof in) < 0)
        fail("connect");
    return fd;
}

static void round_trip(int fd)
{
    char byte = 'x';
    if (write(fd, &byte, 1) != 1 || read(fd, &byte, 1) != 1)
        fail("make a round trip");
}

static void one_connection(void)
{
    int fd = connect_to(ECHO);
    round_trip(fd);
    close(fd);
}

static void download(size_t length)
{
    int fd = connect_to(GIVE);
    while (length) {
        ssize_t got = read(fd, block, length < sizeof block ? length : sizeof block);
        if (got <= 0)
            fail("read");
        length -= got;
    }
    close(fd);
}

static void upload(size_t length)
{
    int fd = connect_to(TAKE);
    char byte;
    while (length) {
        ssize_t put = write(fd, block, length < sizeof block ? length : sizeof block);
        if (put <= 0)
            fail("write");
        length -= put;
    }
    if (shutdown(fd, SHUT_WR) < 0 || read(fd, &byte, 1) != 1)
        fail("end");
    close(fd);
}

/* By COMMAND, or by the guest's own service where there is none. */
static void run_one(void)
{
    char byte, *environment[] = {NULL};
    pid_t pid;
    int status;
    if (command) {
        if ((errno = posix_spawn(&pid, command[0], NULL, NULL, command, environment)))
            fail(command[0]);
        if (waitpid(pid, &status, 0) < 0 || status != 0)
            fail("run the command");
        return;
    }
    int fd = connect_to(RUN);
    if (read(fd, &byte, 1) != 1)
        fail("run the command");
    close(fd);
}

/* Some processes do it at a time. */
static void at_once(int count, void (*what)(size_t), size_t length)
{
    int status;
    for (int number = 0; number < count; number++)
        if (fork() == 0) {
            what(length);
            _exit(0);
        }
    while (wait(&status) > 0)
        if (status != 0)
            fail("do it at once");
}

static void run_and_forget(size_t length)
{
    (void)length;
    run_one();
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    vsock = !strcmp(argv[1], "vsock");
    peer = argv[2];
    command = argc > 4 ? argv + 4 : NULL;

    one_connection();
    int fd = connect_to(ECHO);
    round_trip(fd);
    uint64_t start = now_ns();
    for (int number = 0; number < ROUND_TRIPS; number++)
        round_trip(fd);
    figure("round_trip", start, ROUND_TRIPS);
    close(fd);
    start = now_ns();
    for (int number = 0; number < CONNECTIONS; number++)
        one_connection();
    figure("connection", start, CONNECTIONS);
    start = now_ns();
    download(BYTES);
    figure("download", start, MIB);
    start = now_ns();
    upload(BYTES);
    figure("upload", start, MIB);
    start = now_ns();
    at_once(STREAMS, download, BYTES / STREAMS);
    figure("downloads", start, MIB);
    start = now_ns();
    at_once(STREAMS, upload, BYTES / STREAMS);
    figure("uploads", start, MIB);
    run_one();
    start = now_ns();
    for (int number = 0; number < COMMANDS; number++)
        run_one();
    figure("command", start, COMMANDS);
    start = now_ns();
    at_once(COMMANDS_AT_ONCE, run_and_forget, 0);
    figure("commands", start, COMMANDS_AT_ONCE);
    puts("figures end");
    return 0;
}
