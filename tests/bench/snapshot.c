/* Firecracker's snapshots, which its API socket makes and loads: what stands beside `mote template`.
 *   snapshot make FIRECRACKER API STATE MEMORY CONFIG     of a guest whose init says that it is ready; nothing if it is there
 *   snapshot restore FIRECRACKER API STATE MEMORY VSOCK   runs the VMM with it, tells init to go on, and ends with the VMM */

#include "ready.h"
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { RETRY_NS = 100000, RETRIES = 100000 };

static pid_t vmm;

static void fail(const char *what)
{
    perror(what);
    if (vmm)
        kill(vmm, SIGKILL);
    exit(1);
}

/* Starts the VMM; its output goes to `output`, if that is a descriptor. */
static void start(char **words, int output)
{
    vmm = fork();
    if (vmm < 0)
        fail("fork");
    if (vmm > 0)
        return;
    if (output >= 0)
        dup2(output, 1);
    execv(words[0], words);
    perror(words[0]);
    _exit(127);
}

/* Waits until somebody listens there. */
static int connect_to(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timespec moment = {0, RETRY_NS};
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    for (int retry = 0; retry < RETRIES; retry++) {
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd < 0)
            fail("socket");
        if (connect(fd, (struct sockaddr *)&address, sizeof address) == 0)
            return fd;
        close(fd);
        nanosleep(&moment, NULL);
    }
    fail(path);
    return -1;
}

/* Sends this, and reads an answer that has to begin so. */
static void talk(int fd, const char *request, const char *expected)
{
    char answer[1024];
    size_t length = 0;
    if (write(fd, request, strlen(request)) < 0)
        fail(request);
    while (length < strlen(expected)) {
        ssize_t got = read(fd, answer + length, sizeof answer - 1 - length);
        if (got <= 0)
            fail(request);
        length += got;
    }
    answer[length] = 0;
    if (strncmp(answer, expected, strlen(expected))) {
        fprintf(stderr, "%s\nwas answered by: %s\n", request, answer);
        kill(vmm, SIGKILL);
        exit(1);
    }
}

static void call(int api, const char *method, const char *path, const char *body)
{
    char request[2048];
    snprintf(request, sizeof request,
             "%s %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s", method, path,
             strlen(body), body);
    talk(api, request, "HTTP/1.1 204");
}

static int make(char *firecracker, char *api, const char *state, const char *memory, char *config)
{
    char *words[] = {firecracker, "--api-sock", api, "--id", "bench", "--level", "Error", "--config-file", config, NULL};
    char body[1024], line[256] = "";
    int output[2];
    if (access(state, F_OK) == 0)
        return 0;
    if (pipe(output) < 0)
        fail("pipe");
    start(words, output[1]);
    close(output[1]);
    FILE *said = fdopen(output[0], "r");
    while (!strstr(line, READY))
        if (!said || !fgets(line, sizeof line, said))
            fail("wait for the guest's init");
    int fd = connect_to(api);
    call(fd, "PATCH", "/vm", "{\"state\": \"Paused\"}");
    snprintf(body, sizeof body, "{\"snapshot_type\": \"Full\", \"snapshot_path\": \"%s\", \"mem_file_path\": \"%s\"}", state, memory);
    call(fd, "PUT", "/snapshot/create", body);
    kill(vmm, SIGKILL);
    waitpid(vmm, NULL, 0);
    return 0;
}

static int restore(char *firecracker, char *api, const char *state, const char *memory, char *vsock)
{
    char *words[] = {firecracker, "--api-sock", api, "--id", "bench", "--level", "Error", NULL};
    char body[1024], request[32];
    int status;
    start(words, -1);
    snprintf(body, sizeof body,
             "{\"snapshot_path\": \"%s\", \"mem_backend\": {\"backend_type\": \"File\", \"backend_path\": \"%s\"}, \"resume_vm\": true}",
             state, memory);
    call(connect_to(api), "PUT", "/snapshot/load", body);
    snprintf(request, sizeof request, "CONNECT %d\n", READY_PORT);
    talk(connect_to(vsock), request, "OK ");
    if (waitpid(vmm, &status, 0) < 0 || !WIFEXITED(status))
        fail("wait for the VMM");
    return WEXITSTATUS(status);
}

int main(int argc, char **argv)
{
    if (argc != 7) {
        fprintf(stderr, "usage: snapshot make|restore FIRECRACKER API STATE MEMORY CONFIG|VSOCK\n");
        return 2;
    }
    int (*what)(char *, char *, const char *, const char *, char *) = strcmp(argv[1], "make") ? restore : make;
    return what(argv[2], argv[3], argv[4], argv[5], argv[6]);
}
