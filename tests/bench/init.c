/* PID 1 of the guests of the floor and of the peers: the least that stands for what mote's agent does there. It makes
 * the mounts that a container expects, starts /entrypoint with its own arguments, waits for its end, and restarts the
 * machine, which ends the VMM. */

#include "guest.h"

#define RESTART_MAGIC_1 0xfee1deadL
#define RESTART_MAGIC_2 672274793L
#define RESTART 0x01234567L
#define SIGCHLD_NUMBER 17

static void mount(const char *type, const char *path)
{
    system_call(__NR_mkdir, (long)path, 0755, 0, 0, 0);
    system_call(__NR_mount, (long)type, (long)path, (long)type, 0, 0);
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
