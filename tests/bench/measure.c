/* Measures one run of one VMM from the host kernel's side: nothing of it need take part.
 *   measure LABEL MODE [-s SOCKET DAEMON] [-c CLIENT] [-n BOXES] -- VMM…
 *
 * MODE is one of
 *   start       when what happened, from just before fork and exec of the VMM
 *   exits       the guest's exits by reason, until the entrypoint runs
 *   processes   CPU time by thread name, until the entrypoint runs
 *   memory      what all processes of the box have in memory while its entrypoint idles; then kills it
 *   density     as memory, of BOXES at a time; and how often their threads and vCPUs wake up in IDLE_S while all idle
 *   exec        when CLIENT, started with the VMM, has ended; then kills the box
 *   client      what CLIENT says, as figures, started when the entrypoint runs; then kills the box
 *   figures     what the guest says: lines "figure NAME NUMBER", and at last "figures end"
 * -s makes a listening Unix socket and starts DAEMON, which has it as descriptor 3, just before the VMM.
 * DAEMON and CLIENT are one argument each, split at spaces. In all words "{}" is the box's number, from 0.
 *
 * One line on standard output: "RUN LABEL MODE key=value…", with times in microseconds, or "FAIL LABEL MODE reason" and
 * the end of the VMM's output. Needs root, for tracefs; /sys/kernel/tracing must be mounted.
 *
 * The tracepoints: kvm_cpuid, for the guest's marks (guest.h); kvm_entry, for the guest's first instruction, until the
 * first CPUID: recording every entry would charge some 20 us each to VMMs that have more of them. */

#define _GNU_SOURCE
#include "mark.h"
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define TRACE "/sys/kernel/tracing/instances/mote-bench/"
#define BUFFER_KIB "8192"
/* Of all VMs of this machine. */
#define EXITS "/sys/kernel/debug/kvm/exits"
#define OUTPUT "/tmp/mote-bench-vmm.log"
enum {
    LONG_LIMIT_S = 600,
    /* Between two figures. */
    FIGURE_LIMIT_S = 10,
    SETTLE_US = 50000,
    IDLE_US = 400000,
    /* Until what a guest's kernel does after its start is over. */
    DENSITY_SETTLE_S = 5,
    IDLE_S = 10,
    MOST_BOXES = 64,
    MARKS = 4,
    MOST_WORDS = 64,
    MOST_NAMES = 256
};

static const char *label, *mode;
static int limit_s = START_LIMIT_S;
static pid_t vmms[MOST_BOXES];
static int boxes;
static bool vmm_ended;

static uint64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000ull + now.tv_nsec / 1000;
}

/* Kills the VMM, and what is left beside it: those are this process's children once their parents have ended, since it is
 * their subreaper. */
static void end_box(void);

static void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    printf("FAIL %s %s ", label, mode);
    vprintf(format, arguments);
    va_end(arguments);
    putchar('\n');
    FILE *output = fopen(OUTPUT, "r");
    char line[512];
    if (output && !fseek(output, 0, SEEK_END)) {
        long length = ftell(output);
        fseek(output, length > 1500 ? length - 1500 : 0, SEEK_SET);
        while (fgets(line, sizeof line, output))
            printf("LOG %s%s", line, strchr(line, '\n') ? "" : "\n");
    }
    fflush(stdout);
    end_box();
    exit(1);
}

static void set(const char *file, const char *value)
{
    char path[256];
    snprintf(path, sizeof path, TRACE "%s", file);
    int fd = open(path, O_WRONLY | O_TRUNC | O_CLOEXEC);
    if (fd < 0 || write(fd, value, strlen(value)) < 0)
        fail("write \"%s\" to %s: %s", value, path, strerror(errno));
    close(fd);
}

/* As set, for what is not an error if it does not apply. */
static void set_if_possible(const char *file, const char *value)
{
    char path[256];
    snprintf(path, sizeof path, TRACE "%s", file);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return;
    if (write(fd, value, strlen(value)) < 0)
        errno = 0;
    close(fd);
}

static void start_tracing(void)
{
    if (mkdir(TRACE, 0700) == 0) {
        set("trace_clock", "mono");
        set("buffer_size_kb", BUFFER_KIB);
    } else if (errno != EEXIST) {
        fail("make %s: %s; is this root, and tracefs mounted?", TRACE, strerror(errno));
    }
    set("tracing_on", "0");
    set("events/enable", "0");
    set("trace", "");
    set("events/kvm/kvm_cpuid/filter", "function == 0x5eed0001");
    set("events/kvm/kvm_cpuid/enable", "1");
    if (!strcmp(mode, "exits")) {
        set("events/kvm/kvm_exit/enable", "1");
        set("events/kvm/kvm_userspace_exit/enable", "1");
    } else {
        set("events/kvm/kvm_entry/enable", "1");
        set_if_possible("events/kvm/kvm_cpuid/trigger", "!disable_event:kvm:kvm_entry:1");
        set("events/kvm/kvm_cpuid/trigger", "disable_event:kvm:kvm_entry:1");
    }
    if (!strcmp(mode, "processes"))
        set("events/sched/sched_stat_runtime/enable", "1");
    set("tracing_on", "1");
}

static void split(char *text, char **words)
{
    int count = 0;
    for (char *word = strtok(text, " "); word && count < MOST_WORDS - 1; word = strtok(NULL, " "))
        words[count++] = word;
    words[count] = NULL;
}

/* The word for this box: with its number for "{}". */
static char *numbered(const char *word, int box)
{
    const char *at = strstr(word, "{}");
    char *text = NULL;
    if (!at)
        return (char *)word;
    if (asprintf(&text, "%.*s%d%s", (int)(at - word), word, box, at + 2) < 0)
        fail("no memory");
    return text;
}

/* A child, with its output in the log; `inherited`, if there is one, becomes its descriptor 3. */
static pid_t spawn(char **words, int inherited)
{
    pid_t pid = fork();
    if (pid < 0)
        fail("fork: %s", strerror(errno));
    if (pid > 0)
        return pid;
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    setpgid(0, 0);
    int null = open("/dev/null", O_RDONLY), log = open(OUTPUT, O_WRONLY | O_CREAT | O_APPEND, 0600);
    dup2(null, 0);
    dup2(log, 1);
    dup2(log, 2);
    if (inherited >= 0 && inherited != 3)
        dup2(inherited, 3);
    if (inherited >= 0)
        fcntl(3, F_SETFD, 0);
    close_range(inherited >= 0 ? 4 : 3, ~0u, 0);
    for (char **word = words; *word; word++)
        *word = numbered(*word, boxes);
    execvp(words[0], words);
    dprintf(2, "measure: run %s: %s\n", words[0], strerror(errno));
    _exit(127);
}

static int listen_on(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    unlink(path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, 1) < 0)
        fail("listen on %s: %s", path, strerror(errno));
    return fd;
}

/* In a lab, silence is taken for its end. */
static void say_alive(void)
{
    puts("LAB goes on");
    fflush(stdout);
}

/* Whether there is one more than the last time. */
static bool has_more_figures(void)
{
    static off_t length;
    struct stat output;
    if ((strcmp(mode, "figures") && strcmp(mode, "client")) || stat(OUTPUT, &output) < 0 || output.st_size == length)
        return false;
    length = output.st_size;
    return true;
}

/* Waits for the end of a child, or of any with -1. Returns its status, or -1 if there is no such child. */
static int wait_for(pid_t which, uint64_t deadline_us)
{
    sigset_t child;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    for (;;) {
        int status;
        pid_t ended = waitpid(-1, &status, WNOHANG);
        if (ended < 0)
            return -1;
        if (ended == vmms[0])
            vmm_ended = true;
        if (ended > 0 && (which == ended || which < 0))
            return status;
        if (ended > 0)
            continue;
        uint64_t now = now_us();
        if (now >= deadline_us)
            fail("not done within %d s", limit_s);
        struct timespec second = {1, 0};
        if (sigtimedwait(&child, NULL, &second) < 0)
            say_alive();
        if (has_more_figures())
            deadline_us = now_us() + FIGURE_LIMIT_S * 1000000ull;
    }
}

static void end_box(void)
{
    for (int box = vmm_ended; box < boxes; box++) {
        kill(vmms[box], SIGKILL);
        kill(-vmms[box], SIGKILL);
    }
    /* Most end by themselves when the VMM is gone; a daemon that waits for another client does not. */
    uint64_t deadline = now_us() + 2000000;
    while (now_us() < deadline) {
        if (waitpid(-1, NULL, WNOHANG) < 0)
            return;
        usleep(1000);
    }
    char path[64], children[4096];
    snprintf(path, sizeof path, "/proc/self/task/%d/children", getpid());
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? 0 : read(fd, children, sizeof children - 1);
    if (fd >= 0)
        close(fd);
    children[length < 0 ? 0 : length] = 0;
    for (char *pid = strtok(children, " "); pid; pid = strtok(NULL, " "))
        kill(atoi(pid), SIGKILL);
    while (waitpid(-1, NULL, 0) > 0)
        continue;
}

/* CPU time of all tasks since boot: the seventh number of each processor's line. */
static uint64_t busy_us(void)
{
    FILE *file = fopen("/proc/schedstat", "r");
    char line[1024];
    uint64_t sum_ns = 0;
    while (file && fgets(line, sizeof line, file)) {
        unsigned long long ns;
        if (sscanf(line, "cpu%*d %*u %*u %*u %*u %*u %*u %llu", &ns) == 1)
            sum_ns += ns;
    }
    if (file)
        fclose(file);
    return sum_ns / 1000;
}

static struct counted {
    char name[64];
    uint64_t count;
} counted[MOST_NAMES];
static int names;

static void count(const char *prefix, const char *name, int length, uint64_t much)
{
    char full[64];
    snprintf(full, sizeof full, "%s.%.*s", prefix, length, name);
    for (char *c = full; *c; c++)
        if (isspace((unsigned char)*c) || *c == '=')
            *c = '_';
    for (int i = 0; i < names; i++)
        if (!strcmp(counted[i].name, full)) {
            counted[i].count += much;
            return;
        }
    if (names == MOST_NAMES)
        return;
    snprintf(counted[names].name, sizeof full, "%s", full);
    counted[names++].count = much;
}

/* One line of the trace: "  TASK-PID [CPU] FLAGS SECONDS.MICROSECONDS: EVENT: …". Returns its time and where the event's
 * name begins, or NULL. */
static const char *event_of(char *line, uint64_t *at_us)
{
    char *cpu = strstr(line, "] "), *end, *at;
    if (line[0] == '#' || !cpu || !(end = strchr(cpu, ':')))
        return NULL;
    for (at = end; at > cpu && at[-1] != ' '; at--)
        continue;
    unsigned long long seconds, us;
    if (sscanf(at, "%llu.%llu:", &seconds, &us) != 2)
        return NULL;
    *at_us = seconds * 1000000 + us;
    return end + 2;
}

static bool starts(const char *text, const char *with)
{
    return !strncmp(text, with, strlen(with));
}

/* When what was first reached: [0] the guest's first instruction, the others as guest.h numbers them. */
static uint64_t reached_us[MARKS];
/* How many guests have reached it. */
static int reached[MARKS];

static void take(char *line)
{
    uint64_t at_us;
    const char *event = event_of(line, &at_us), *field;
    if (!event)
        return;
    bool running = reached_us[2] == 0;
    unsigned which;
    if (starts(event, "kvm_entry:")) {
        if (!reached_us[0])
            reached_us[0] = at_us;
    } else if (starts(event, "kvm_cpuid:")) {
        if ((field = strstr(event, "idx ")) && sscanf(field, "idx %x", &which) == 1 && which < MARKS) {
            if (!reached[which]++)
                reached_us[which] = at_us;
        }
    } else if (running && (starts(event, "kvm_exit:") || starts(event, "kvm_userspace_exit:"))) {
        if ((field = strstr(event, "reason ")))
            count(event[4] == 'u' ? "user" : "exit", field + 7, strcspn(field + 7, " \n"), 1);
    } else if (running && starts(event, "sched_stat_runtime:")) {
        const char *name = strstr(event, "comm="), *pid = strstr(event, " pid="),
                   *runtime = strstr(event, " runtime=");
        if (name && pid && runtime)
            count("cpu", name + 5, pid - name - 5, strtoull(runtime + 9, NULL, 10));
    }
}

static void read_trace(void)
{
    set("tracing_on", "0");
    FILE *trace = fopen(TRACE "trace", "r");
    char line[1024];
    if (!trace)
        fail("open " TRACE "trace: %s", strerror(errno));
    while (fgets(line, sizeof line, trace))
        take(line);
    fclose(trace);
    set("events/enable", "0");
    set("trace", "");
}

/* Waits, by reading the trace as it grows, until all guests have made a mark. */
static void wait_for_mark(unsigned which, uint64_t deadline_us)
{
    int pipe = open(TRACE "trace_pipe", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    char text[65536];
    size_t length = 0;
    if (pipe < 0)
        fail("open " TRACE "trace_pipe: %s", strerror(errno));
    while (reached[which] < boxes) {
        struct pollfd readable = {pipe, POLLIN, 0};
        poll(&readable, 1, 20);
        ssize_t got = read(pipe, text + length, sizeof text - 1 - length);
        if (got > 0) {
            length += got;
            text[length] = 0;
            char *line = text, *end;
            for (; (end = strchr(line, '\n')); line = end + 1) {
                *end = 0;
                take(line);
            }
            length = strlen(line);
            memmove(text, line, length + 1);
        }
        int status;
        if (waitpid(vmms[0], &status, WNOHANG) == vmms[0]) {
            vmm_ended = true;
            fail("the VMM ended (%x) before its guest was ready", status);
        }
        if (now_us() > deadline_us)
            fail("not done within %d s", limit_s);
    }
    close(pipe);
}

static struct memory {
    uint64_t processes, threads, rss, pss, anonymous, ram_rss, ram_pss, page_tables;
} memory;

/* Mappings that are one behind the other. */
struct mappings {
    uint64_t end, rss, pss, anonymous;
};

static void add_mappings(const struct mappings *of, bool ram)
{
    *(ram ? &memory.ram_rss : &memory.rss) += of->rss;
    *(ram ? &memory.ram_pss : &memory.pss) += of->pss;
    memory.anonymous += ram ? 0 : of->anonymous;
}

/* Adds what a process has. A mapping of 64 MiB and more that it can use is taken for the guest's RAM, with those of files right
 * before it that it can write to: where RAM starts, mote has text of the guest's kernel from a file. */
static void add_process(pid_t pid)
{
    char path[64], line[1024];
    snprintf(path, sizeof path, "/proc/%d/smaps", pid);
    FILE *file = fopen(path, "r");
    struct mappings of = {0};
    bool any = false, ram = false, can_be_ram = false;
    while (file && fgets(line, sizeof line, file)) {
        unsigned long long start, end, inode, kib;
        char permissions[8];
        if (sscanf(line, "%llx-%llx %7s %*s %*s %llu", &start, &end, permissions, &inode) == 4) {
            bool is_ram = end - start >= 64u << 20 && permissions[0] == 'r';
            if (!can_be_ram || start != of.end || ram) {
                add_mappings(&of, ram);
                of = (struct mappings){0};
            }
            ram = is_ram;
            can_be_ram = inode && permissions[1] == 'w';
            of.end = end;
            any = true;
        } else if (sscanf(line, "Rss: %llu", &kib) == 1) {
            of.rss += kib;
        } else if (sscanf(line, "Pss: %llu", &kib) == 1) {
            of.pss += kib;
        } else if (sscanf(line, "Anonymous: %llu", &kib) == 1) {
            of.anonymous += kib;
        }
    }
    add_mappings(&of, ram);
    if (file)
        fclose(file);
    if (!any)
        return; /* A kernel thread, or one that has just ended. */
    memory.processes++;
    snprintf(path, sizeof path, "/proc/%d/status", pid);
    file = fopen(path, "r");
    while (file && fgets(line, sizeof line, file)) {
        unsigned long long number;
        if (sscanf(line, "VmPTE: %llu", &number) == 1)
            memory.page_tables += number;
        if (sscanf(line, "Threads: %llu", &number) == 1)
            memory.threads += number;
    }
    if (file)
        fclose(file);
}

/* A number of a file that has one on each line, after this name. */
static uint64_t number_in(const char *path, const char *name)
{
    FILE *file = fopen(path, "r");
    char line[256];
    unsigned long long number = 0;
    if (!file)
        fail("open %s: %s", path, strerror(errno));
    while (fgets(line, sizeof line, file))
        if (starts(line, name) && sscanf(line + strlen(name), "%llu", &number) == 1)
            break;
    fclose(file);
    return number;
}

static void say_memory(void)
{
    printf("RUN %s %s processes=%llu threads=%llu rss_kib=%llu pss_kib=%llu anonymous_kib=%llu "
           "ram_rss_kib=%llu ram_pss_kib=%llu page_tables_kib=%llu",
           label, mode, (unsigned long long)memory.processes, (unsigned long long)memory.threads,
           (unsigned long long)memory.rss, (unsigned long long)memory.pss,
           (unsigned long long)memory.anonymous, (unsigned long long)memory.ram_rss,
           (unsigned long long)memory.ram_pss, (unsigned long long)memory.page_tables);
}

/* How often the threads of a process have gone to sleep or made room for others. */
static uint64_t switches_of(pid_t pid)
{
    char path[300], line[256];
    uint64_t sum = 0;
    snprintf(path, sizeof path, "/proc/%d/task", pid);
    DIR *threads = opendir(path);
    for (struct dirent *entry; threads && (entry = readdir(threads));) {
        unsigned long long number;
        snprintf(path, sizeof path, "/proc/%d/task/%s/status", pid, entry->d_name);
        FILE *file = entry->d_name[0] == '.' ? NULL : fopen(path, "r");
        while (file && fgets(line, sizeof line, file))
            if (sscanf(line, "voluntary_ctxt_switches: %llu", &number) == 1 ||
                sscanf(line, "nonvoluntary_ctxt_switches: %llu", &number) == 1)
                sum += number;
        if (file)
            fclose(file);
    }
    if (threads)
        closedir(threads);
    return sum;
}

static uint64_t switches;

static void add_switches(pid_t pid)
{
    switches += switches_of(pid);
}

static void for_descendants(pid_t of, void (*what)(pid_t))
{
    DIR *processes = opendir("/proc");
    for (struct dirent *entry; processes && (entry = readdir(processes));) {
        char path[300], text[512] = "";
        pid_t pid = atoi(entry->d_name), parent = 0;
        if (pid <= 0)
            continue;
        snprintf(path, sizeof path, "/proc/%d/stat", pid);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            continue;
        if (read(fd, text, sizeof text - 1) < 0)
            text[0] = 0;
        close(fd);
        char *after_name = strrchr(text, ')');
        if (!after_name || sscanf(after_name, ") %*c %d", &parent) != 1 || parent != of)
            continue;
        what(pid);
        for_descendants(pid, what);
    }
    if (processes)
        closedir(processes);
}

/* What the guest has said, or the client, from the output of all. */
static void say_figures(void)
{
    FILE *output = fopen(OUTPUT, "r");
    char line[512], name[64], said[4096] = "";
    unsigned long long number;
    size_t length = 0;
    bool ended = false;
    while (output && fgets(line, sizeof line, output)) {
        if (sscanf(line, "figure %63s %llu", name, &number) == 2 && length < sizeof said - sizeof line)
            length += snprintf(said + length, sizeof said - length, " %s=%llu", name, number);
        ended |= starts(line, "figures end");
    }
    if (output)
        fclose(output);
    if (!ended)
        fail("nobody has said the figures' end");
    printf("RUN %s %s%s\n", label, mode, said);
}

static void say_since(const char *name, uint64_t at_us, uint64_t start_us)
{
    if (at_us)
        printf(" %s=%llu", name, (unsigned long long)(at_us - start_us));
}

int main(int argc, char **argv)
{
    char *served = NULL, *daemon_words[MOST_WORDS], *client_words[MOST_WORDS] = {NULL};
    int wanted = 1;
    if (argc < 5) {
        fprintf(stderr, "usage: measure LABEL MODE [-s SOCKET DAEMON] [-c CLIENT] [-n BOXES] -- VMM...\n");
        return 2;
    }
    label = argv[1];
    mode = argv[2];
    if (!strcmp(mode, "density"))
        limit_s = LONG_LIMIT_S;
    if (!strcmp(mode, "figures") || !strcmp(mode, "client"))
        limit_s = FIGURE_LIMIT_S;
    char **argument = argv + 3;
    for (; *argument && strcmp(*argument, "--"); argument++) {
        if (!strcmp(*argument, "-s") && argument[1] && argument[2]) {
            served = *++argument;
            split(*++argument, daemon_words);
        } else if (!strcmp(*argument, "-n") && argument[1]) {
            wanted = atoi(*++argument);
        } else if (!strcmp(*argument, "-c") && argument[1]) {
            split(*++argument, client_words);
        } else {
            fail("wrong option %s", *argument);
        }
    }
    if (!*argument || !argument[1])
        fail("no VMM to run");
    if (wanted < 1 || wanted > MOST_BOXES)
        fail("-n takes 1 to %d boxes", MOST_BOXES);
    argument++;

    sigset_t child;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    sigprocmask(SIG_BLOCK, &child, NULL);
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    unlink(OUTPUT);
    start_tracing();

    /* The kernel frees some of what the run before had a while after its end. */
    if (!strcmp(mode, "density"))
        sleep(DENSITY_SETTLE_S);
    int64_t available_kib = number_in("/proc/meminfo", "MemAvailable:");
    int listeners[MOST_BOXES];
    for (int box = 0; served && box < wanted; box++)
        listeners[box] = listen_on(numbered(served, box));
    uint64_t busy_before = busy_us(), start_us = now_us(), deadline_us = start_us + limit_s * 1000000ull;
    /* Tells profile.c, if that counts: index 0 begins, all others end something. Nothing else sees it. */
    mark(0);
    while (boxes < wanted) {
        if (served) {
            spawn(daemon_words, listeners[boxes]);
            close(listeners[boxes]);
        }
        vmms[boxes] = spawn(argument, -1);
        boxes++;
        if (wanted > 1) {
            wait_for_mark(2, deadline_us);
            say_alive();
        }
    }

    if (!strcmp(mode, "memory")) {
        wait_for_mark(2, deadline_us);
        usleep(IDLE_US);
        for_descendants(getpid(), add_process);
        end_box();
        say_memory();
        putchar('\n');
        set("events/enable", "0");
    } else if (!strcmp(mode, "density")) {
        wait_for_mark(2, deadline_us);
        set("events/enable", "0");
        sleep(DENSITY_SETTLE_S);
        for_descendants(getpid(), add_process);
        int64_t taken_kib = available_kib - (int64_t)number_in("/proc/meminfo", "MemAvailable:");
        for_descendants(getpid(), add_switches);
        uint64_t switches_before = switches, exits_before = number_in(EXITS, "");
        switches = 0;
        sleep(IDLE_S);
        uint64_t exits = number_in(EXITS, "") - exits_before;
        for_descendants(getpid(), add_switches);
        end_box();
        say_memory();
        printf(" taken_kib=%lld seconds=%d switches=%llu exits=%llu\n", (long long)taken_kib, IDLE_S,
               (unsigned long long)(switches - switches_before), (unsigned long long)exits);
    } else if (!strcmp(mode, "client")) {
        if (!client_words[0])
            fail("no client to run");
        wait_for_mark(2, deadline_us);
        set("events/enable", "0");
        int status = wait_for(spawn(client_words, -1), deadline_us);
        if (status != 0)
            fail("the client ended with status %x", status);
        end_box();
        say_figures();
    } else if (!strcmp(mode, "exec")) {
        if (!client_words[0])
            fail("no client to run");
        int status = wait_for(spawn(client_words, -1), deadline_us);
        uint64_t answered_us = now_us();
        if (status != 0)
            fail("the client ended with status %x", status);
        read_trace();
        end_box();
        printf("RUN %s exec", label);
        say_since("entrypoint", reached_us[2], start_us);
        say_since("exec_started", reached_us[3], start_us);
        say_since("exec_answered", answered_us, start_us);
        putchar('\n');
    } else {
        int status = wait_for(vmms[0], deadline_us);
        uint64_t gone_us = now_us();
        if (!WIFEXITED(status) || WEXITSTATUS(status) == 127)
            fail("the VMM ended with status %x", status);
        /* What was beside the VMM ends after it. */
        while (wait_for(-1, deadline_us) >= 0)
            continue;
        uint64_t all_gone_us = now_us(), busy_after = busy_us();
        mark(4);
        read_trace();
        if (!strcmp(mode, "figures")) {
            say_figures();
            return 0;
        }
        if (!reached_us[1] && !reached_us[2])
            fail("the guest made no mark; the VMM ended with status %x", status);
        printf("RUN %s %s", label, mode);
        say_since("first_run", reached_us[0], start_us);
        say_since("init", reached_us[1], start_us);
        say_since("entrypoint", reached_us[2], start_us);
        say_since("gone", gone_us, start_us);
        say_since("all_gone", all_gone_us, start_us);
        printf(" busy=%llu status=%d", (unsigned long long)(busy_after - busy_before), WEXITSTATUS(status));
        for (int i = 0; i < names; i++)
            printf(" %s=%llu", counted[i].name, (unsigned long long)counted[i].count);
        putchar('\n');
    }
    fflush(stdout);
    usleep(SETTLE_US);
    return 0;
}
