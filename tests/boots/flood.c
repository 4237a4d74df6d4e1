/* Floods the host with vsock connections, as any program in a guest can: half-open ones, ones to every
   port, ones that end at once. Says `flooding` after its first round, and goes on for ever. */

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define HOST 2
/* guest/src/protocol.rs, guest/src/flow.rs */
#define CONTROL_PORT 0x6d6f7465u
#define FLOW_PORT (CONTROL_PORT + 5)

/* More than mote takes: 4,096 connections, 3,072 of them flows. */
#define HELD 5000

/* <linux/vm_sockets.h>, which musl-gcc does not find. */
struct vsock_address {
    unsigned short family, reserved;
    uint32_t port, cid;
    unsigned char zero[4];
};

/* Starts a connection, and does not wait for it. */
static int start(uint32_t port)
{
    struct vsock_address address = {AF_VSOCK, 0, port, HOST, {0}};
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS) {
        close(fd);
        return -1;
    }
    return fd;
}

int main(void)
{
    struct rlimit limit = {HELD + 100, HELD + 100};
    setrlimit(RLIMIT_NOFILE, &limit);
    static int held[HELD];
    memset(held, -1, sizeof held);
    uint32_t any = 1;
    for (uint32_t turn = 0;; turn++) {
        int *slot = &held[turn % HELD];
        if (*slot >= 0)
            close(*slot);
        /* Asks for a flow, and never says where to. */
        *slot = start(FLOW_PORT);
        /* Says half of it, and hangs up. */
        int fd = start(FLOW_PORT);
        (void)!write(fd, "\6\0\0", 3);
        shutdown(fd, turn % 2 ? SHUT_WR : SHUT_RDWR);
        close(fd);
        /* All ports in turn, the agent's own, and any. */
        close(start(turn));
        close(start(CONTROL_PORT + turn % 8));
        any = any * 1664525 + 1013904223;
        close(start(any));
        if (turn == HELD)
            puts("flooding"), fflush(stdout);
    }
}
