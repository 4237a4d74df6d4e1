/* PID 1 of the guests of the floor and of the peers: the least that stands for what mote's agent does there. It makes
 * the mounts that a container expects, starts /entrypoint with its own arguments, waits for its end, and restarts the
 * machine, which ends the VMM. With `snapshot=1` on the kernel's command line it is then to be taken a snapshot of, and
 * goes on when somebody connects to it. */

#include "guest.h"
#include "ready.h"
#include <linux/vm_sockets.h>
#include <sys/socket.h>

#define RESTART_MAGIC_1 0xfee1deadL
#define RESTART_MAGIC_2 672274793L
#define RESTART 0x01234567L
#define SIGCHLD_NUMBER 17

static void mount(const char *type, const char *path)
{
    system_call(__NR_mkdir, (long)path, 0755, 0, 0, 0);
    system_call(__NR_mount, (long)type, (long)path, (long)type, 0, 0);
}

static int is_for_snapshot(char **environment)
{
    for (; *environment; environment++)
        if (same(*environment, "snapshot=1"))
            return 1;
    return 0;
}

static void wait_for_restore(void)
{
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = READY_PORT};
    long fd = system_call(__NR_socket, AF_VSOCK, SOCK_STREAM, 0, 0, 0);
    system_call(__NR_bind, fd, (long)&address, sizeof address, 0, 0);
    system_call(__NR_listen, fd, 1, 0, 0, 0);
    system_call(__NR_write, 1, (long)READY "\n", sizeof READY, 0, 0);
    system_call(__NR_accept4, fd, 0, 0, 0, 0);
    mark(MARK_INIT);
}

static void start(long *stack)
{
    char **arguments = (char **)(stack + 1), **environment = arguments + stack[0] + 1;
    mark(MARK_INIT);
    mount("proc", "/proc");
    mount("sysfs", "/sys");
    mount("devtmpfs", "/dev");
    mount("devpts", "/dev/pts");
    mount("tmpfs", "/dev/shm");
    mount("cgroup2", "/sys/fs/cgroup");
    if (is_for_snapshot(environment))
        wait_for_restore();
    long pid = system_call(__NR_clone, SIGCHLD_NUMBER, 0, 0, 0, 0);
    if (pid == 0) {
        system_call(__NR_execve, (long)"/entrypoint", (long)arguments, (long)environment, 0, 0);
        system_call(__NR_exit_group, 127, 0, 0, 0, 0);
    }
    system_call(__NR_wait4, pid, 0, 0, 0, 0);
    system_call(__NR_sync, 0, 0, 0, 0, 0);
    for (;;)
        system_call(__NR_reboot, RESTART_MAGIC_1, RESTART_MAGIC_2, RESTART, 0, 0);
}
