/* What client.c talks with, as the guest's entrypoint: on TCP, or with the argument `vsock` on vsock. One service on each port:
 *   ECHO   sends back what comes, until the client has no more
 *   GIVE   sends zeros until the client goes
 *   TAKE   reads to the end, and then sends one byte
 *   RUN    runs "/true exec", and then sends one byte: the least that an agent for commands can do
 * Each connection has a process of its own. */

#define _GNU_SOURCE
#include "mark.h"
#include "services.h"
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <signal.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static void fail(const char *what)
{
    printf("server: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int listen_on(bool vsock, int port)
{
    struct sockaddr_vm vm = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port};
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_port = htons(port)};
    int fd = socket(vsock ? AF_VSOCK : AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        fail("make a socket");
    if (bind(fd, vsock ? (void *)&vm : (void *)&in, vsock ? sizeof vm : sizeof in) < 0 || listen(fd, 128) < 0)
        fail("listen");
    return fd;
}

static char block[BLOCK];

static void echo(int client)
{
    ssize_t length;
    while ((length = read(client, block, sizeof block)) > 0)
        if (write(client, block, length) != length)
            return;
}

static void give(int client)
{
    while (write(client, block, sizeof block) > 0)
        continue;
}

static void take(int client)
{
    while (read(client, block, sizeof block) > 0)
        continue;
    if (write(client, "x", 1) != 1)
        return;
}

static void run(int client)
{
    char *words[] = {"true", "exec", NULL}, *environment[] = {NULL};
    pid_t pid;
    int status;
    if (posix_spawn(&pid, "/true", NULL, NULL, words, environment) == 0 && waitpid(pid, &status, 0) == pid && status == 0 &&
        write(client, "x", 1) != 1)
        return;
}

static void serve(int listener, void (*service)(int))
{
    for (;;) {
        int client = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (client < 0)
            fail("accept");
        pid_t pid = fork();
        if (pid == 0) {
            signal(SIGCHLD, SIG_DFL);
            service(client);
            _exit(0);
        }
        close(client);
    }
}

int main(int argc, char **argv)
{
    bool vsock = argc > 1 && !strcmp(argv[1], "vsock");
    static const struct {
        int port;
        void (*service)(int);
    } services[] = {{ECHO, echo}, {GIVE, give}, {TAKE, take}, {RUN, run}};
    enum { SERVICES = sizeof services / sizeof *services };
    int listeners[SERVICES];
    if (fcntl(1, F_GETFD) < 0 && (open("/dev/console", O_RDWR) < 0 || dup2(0, 1) < 0))
        return 1;
    signal(SIGPIPE, SIG_IGN);
    signal(SIGCHLD, SIG_IGN);
    for (int which = 0; which < SERVICES; which++)
        listeners[which] = listen_on(vsock, services[which].port);
    for (int which = 0; which < SERVICES; which++)
        if (fork() == 0)
            serve(listeners[which], services[which].service);
    mark(MARK_ENTRYPOINT);
    for (;;)
        pause();
}
