/* The program that a box exists for, here the least that one can be: it says that it runs, and ends.
 *   entrypoint        mark ENTRYPOINT, end
 *   entrypoint stay   mark ENTRYPOINT, sleep until killed
 *   entrypoint socket open a socket, mark ENTRYPOINT, end
 *   entrypoint exec   mark EXEC, end: what `mote exec` runs in a box */

#include "guest.h"
#include <sys/socket.h>

static void start(long *stack)
{
    const char *mode = stack[0] > 1 ? (const char *)stack[2] : "";
    if (same(mode, "socket"))
        system_call(__NR_socket, AF_INET, SOCK_STREAM, 0, 0, 0);
    mark(same(mode, "exec") ? MARK_EXEC : MARK_ENTRYPOINT);
    while (same(mode, "stay"))
        system_call(__NR_pause, 0, 0, 0, 0, 0);
    for (;;)
        system_call(__NR_exit_group, 0, 0, 0, 0, 0);
}
