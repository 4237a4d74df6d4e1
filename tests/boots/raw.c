/* A client without a C library, as Go programs are: it makes its system calls itself. */

#include <netinet/in.h>
#include <sys/epoll.h>
#include <sys/syscall.h>

#define HOST 0xc6336401 /* 198.51.100.1 */

static long call(long number, long a, long b, long c, long d, long e)
{
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = 0;
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

static void say(const char *text)
{
    long length = 0;
    while (text[length])
        length++;
    call(SYS_write, 1, (long)text, length, 0, 0);
}

static void say_number(unsigned number)
{
    char text[12];
    char *start = text + 11;
    *start = 0;
    do
        *--start = '0' + number % 10;
    while (number /= 10);
    say(start);
}

/* Sends "hi", and says what comes back. */
static void talk(long fd)
{
    char reply[3] = {0};
    call(SYS_write, fd, (long)"hi", 2, 0, 0);
    for (long length = 0, got; length < 2; length += got) {
        got = call(SYS_read, fd, (long)reply + length, 2 - length, 0, 0);
        if (got <= 0)
            break;
    }
    say(", said ");
    say(reply);
    say("\n");
    call(SYS_close, fd, 0, 0, 0, 0);
}

static long attempt(long fd, int port)
{
    struct sockaddr_in address;
    address.sin_family = AF_INET;
    address.sin_port = __builtin_bswap16(port);
    address.sin_addr.s_addr = __builtin_bswap32(HOST);
    for (int i = 0; i < 8; i++)
        address.sin_zero[i] = 0;
    return -call(SYS_connect, fd, (long)&address, sizeof address, 0, 0);
}

static void say_peer(long fd)
{
    struct sockaddr_in peer;
    unsigned length = sizeof peer;
    call(SYS_getpeername, fd, (long)&peer, (long)&length, 0, 0);
    unsigned address = __builtin_bswap32(peer.sin_addr.s_addr);
    for (int shift = 24; shift >= 0; shift -= 8) {
        say_number(address >> shift & 255);
        say(shift ? "." : ":");
    }
    say_number(__builtin_bswap16(peer.sin_port));
}

/* Connects without waiting, waits with epoll, and says both errors. */
static long attempt_later(int port)
{
    long fd = call(SYS_socket, AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, 0, 0);
    say("errno ");
    say_number(attempt(fd, port));
    long poll = call(SYS_epoll_create1, 0, 0, 0, 0, 0);
    struct epoll_event event = {.events = EPOLLOUT};
    call(SYS_epoll_ctl, poll, EPOLL_CTL_ADD, fd, (long)&event, 0);
    call(SYS_epoll_wait, poll, (long)&event, 1, 60000, 0);
    int error = -1;
    unsigned length = sizeof error;
    call(SYS_getsockopt, fd, SOL_SOCKET, SO_ERROR, (long)&error, (long)&length);
    say(", then ");
    say_number(error);
    call(SYS_fcntl, fd, 4 /* F_SETFL */, 0, 0, 0);
    return fd;
}

__attribute__((force_align_arg_pointer)) void _start(void)
{
    long fd = call(SYS_socket, AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0, 0, 0);
    say("blocking: ");
    if (attempt(fd, 7001) == 0)
        say("connected to ");
    say_peer(fd);
    talk(fd);

    say("non-blocking: ");
    talk(attempt_later(7001));

    fd = call(SYS_socket, AF_INET, SOCK_STREAM, 0, 0, 0);
    say("refused: errno ");
    say_number(attempt(fd, 1));
    say("\nrefused, non-blocking: ");
    attempt_later(1);
    say("\n");
    call(SYS_exit_group, 0, 0, 0, 0, 0);
}
