/* What programs do to a file system, timed in the guest, in the directory /work:
 *   files         on the root file system as it is
 *   files tmpfs   on a tmpfs of the guest's own, mounted there: what the guest's kernel costs by itself
 *   files tree P  only makes the tree that the others walk over, at P: for the host
 * It is the guest's entrypoint, under each VMM. A line on standard output for each figure: "figure NAME NANOSECONDS", each time,
 * and at last "figures end".
 *
 * `cold` is after the guest's caches were dropped; what the host has in memory stays there. The clock is the guest's,
 * which in the lab counts instructions, those of the host and of its daemons too. */

#define _GNU_SOURCE
#include "figures.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

/* As installed packages are: folders in each of them, with some small files each. Writing costs most, so fewer are
 * installed than walked over: TREE_FILES, which files.py names. */
enum {
    FOLDERS = 4,
    FILES = 10,
    PACKAGES = TREE_FILES / (FOLDERS * FILES),
    INSTALLED_PACKAGES = 20,
    INSTALLED_FILES = INSTALLED_PACKAGES * FOLDERS * FILES,
    STAT_LATER_FILES = TREE_FILES / 5,
    SMALLEST = 200,
    LARGEST = 8000,
    BLOCK = 1 << 20,
    BLOCKS = 32,
    PAGE = 4096,
    RANDOM_READS = 512,
    EXECS = 20,
    /* Longer than either VMM lets its guest believe what it knows of a file. */
    FORGOTTEN_S = 2
};

#define TREE "/work/tree"
/* A program of a shell's size, in the root. */
#define PROGRAM "/busybox"

static char block[BLOCK];

static void fail(const char *what, const char *on)
{
    printf("files: %s %s: %s\n", what, on, strerror(errno));
    exit(1);
}

static void write_all(int fd, const char *data, size_t length, const char *path)
{
    while (length) {
        ssize_t written = write(fd, data, length);
        if (written < 0)
            fail("write", path);
        data += written;
        length -= written;
    }
}

/* Writes back what is dirty, and forgets pages, directory entries and inodes. */
static void drop_caches(void)
{
    sync();
    int fd = open("/proc/sys/vm/drop_caches", O_WRONLY);
    if (fd < 0 || write(fd, "3", 1) != 1)
        fail("write", "/proc/sys/vm/drop_caches");
    close(fd);
}

static uint32_t random_state;

/* xorshift32: the same numbers in each run. */
static uint32_t random_number(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    random_state ^= random_state << 5;
    return random_state;
}

static void file_name(char *path, size_t size, const char *tree, int number)
{
    snprintf(path, size, "%s/package%03d/folder%d/file%d.js", tree, number / (FOLDERS * FILES),
             number / FILES % FOLDERS, number % FILES);
}

static void make_directory(const char *path)
{
    if (mkdir(path, 0755) < 0)
        fail("make", path);
}

static void make_tree(const char *tree, int packages)
{
    char path[128];
    make_directory(tree);
    for (int package = 0; package < packages; package++) {
        snprintf(path, sizeof path, "%s/package%03d", tree, package);
        make_directory(path);
        for (int folder = 0; folder < FOLDERS; folder++) {
            snprintf(path, sizeof path, "%s/package%03d/folder%d", tree, package, folder);
            make_directory(path);
            for (int file = 0; file < FILES; file++) {
                file_name(path, sizeof path, tree, (package * FOLDERS + folder) * FILES + file);
                int fd = open(path, O_WRONLY | O_CREAT | O_EXCL, 0644);
                if (fd < 0)
                    fail("create", path);
                write_all(fd, block, SMALLEST + random_number() % (LARGEST - SMALLEST), path);
                if (close(fd) < 0)
                    fail("close", path);
            }
        }
    }
}

/* How many files there are, by their type in the directory. */
static int walk(int at, const char *name)
{
    int fd = openat(at, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC), files = 0;
    DIR *directory = fd < 0 ? NULL : fdopendir(fd);
    if (!directory)
        fail("open", name);
    for (struct dirent *entry; (entry = readdir(directory));) {
        if (entry->d_type == DT_REG)
            files++;
        else if (entry->d_type == DT_DIR && strcmp(entry->d_name, ".") && strcmp(entry->d_name, ".."))
            files += walk(fd, entry->d_name);
    }
    closedir(directory);
    return files;
}

/* As git does for all that its index names, in that order. */
static void stat_all(int files)
{
    char path[128];
    struct stat status;
    for (int number = 0; number < files; number++) {
        file_name(path, sizeof path, TREE, number);
        if (lstat(path, &status) < 0)
            fail("stat", path);
    }
}

static void write_in_order(const char *path)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL, 0644);
    if (fd < 0)
        fail("create", path);
    for (int number = 0; number < BLOCKS; number++)
        write_all(fd, block, BLOCK, path);
    if (fsync(fd) < 0 || close(fd) < 0)
        fail("write", path);
}

static void read_in_order(const char *path)
{
    int fd = open(path, O_RDONLY);
    if (fd < 0)
        fail("open", path);
    for (int number = 0; number < BLOCKS; number++)
        if (read(fd, block, BLOCK) != BLOCK)
            fail("read", path);
    close(fd);
}

static void read_at_random(const char *path)
{
    int fd = open(path, O_RDONLY);
    if (fd < 0)
        fail("open", path);
    for (int number = 0; number < RANDOM_READS; number++) {
        off_t at = (off_t)(random_number() % (BLOCKS * (BLOCK / PAGE))) * PAGE;
        if (pread(fd, block, PAGE, at) != PAGE)
            fail("read", path);
    }
    close(fd);
}

static void run(const char *program)
{
    char *words[] = {"busybox", "true", NULL}, *environment[] = {NULL};
    pid_t pid;
    int status;
    if ((errno = posix_spawn(&pid, program, NULL, NULL, words, environment)))
        fail("run", program);
    if (waitpid(pid, &status, 0) < 0 || status != 0)
        fail("run", program);
}

static void copy(const char *from, const char *to)
{
    int in = open(from, O_RDONLY), out = open(to, O_WRONLY | O_CREAT | O_EXCL, 0755);
    if (in < 0 || out < 0)
        fail("copy", from);
    for (ssize_t length; (length = read(in, block, BLOCK)) > 0;)
        write_all(out, block, length, to);
    close(in);
    if (close(out) < 0)
        fail("close", to);
}

int main(int argc, char **argv)
{
    /* A kernel whose root has no /dev yet starts its first program without any. */
    if (fcntl(1, F_GETFD) < 0 && (open("/dev/console", O_RDWR) < 0 || dup2(0, 1) < 0))
        return 1;
    const char *mode = argc > 1 ? argv[1] : "";
    memset(block, 'x', sizeof block);
    random_state = 1;
    if (!strcmp(mode, "tree") && argc > 2) {
        make_tree(argv[2], PACKAGES);
        return 0;
    }
    if (!strcmp(mode, "tmpfs")) {
        if (mount("tmpfs", "/work", "tmpfs", 0, NULL) < 0)
            fail("mount", "/work");
        make_tree(TREE, PACKAGES);
    }

    uint64_t start = now_ns();
    make_tree("/work/installed", INSTALLED_PACKAGES);
    figure("install", start, INSTALLED_FILES);

    drop_caches();
    start = now_ns();
    int files = walk(AT_FDCWD, TREE);
    figure("walk", start, TREE_FILES);
    if (files != TREE_FILES) {
        printf("files: found %d files of %d\n", files, TREE_FILES);
        return 1;
    }

    drop_caches();
    start = now_ns();
    stat_all(TREE_FILES);
    figure("stat", start, TREE_FILES);
    sleep(FORGOTTEN_S);
    start = now_ns();
    stat_all(STAT_LATER_FILES);
    figure("stat_later", start, STAT_LATER_FILES);

    start = now_ns();
    write_in_order("/work/large");
    figure("write", start, BLOCKS);
    drop_caches();
    start = now_ns();
    read_in_order("/work/large");
    figure("read", start, BLOCKS);
    drop_caches();
    start = now_ns();
    read_at_random("/work/large");
    figure("random", start, RANDOM_READS);

    copy(PROGRAM, "/work/program");
    /* Programs are older than what they are run for. */
    sleep(FORGOTTEN_S);
    drop_caches();
    start = now_ns();
    run("/work/program");
    figure("exec", start, 1);
    start = now_ns();
    for (int number = 0; number < EXECS; number++)
        run("/work/program");
    figure("exec_again", start, EXECS);
    puts("figures end");
    return 0;
}
