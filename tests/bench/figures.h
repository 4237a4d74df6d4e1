/* How files.c and client.c say what they have timed: a line for each figure, which measure.c passes on. */

#include <stdint.h>
#include <stdio.h>
#include <time.h>

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static void figure(const char *name, uint64_t since_ns, int times)
{
    printf("figure %s %llu\n", name, (unsigned long long)((now_ns() - since_ns) / times));
    fflush(stdout);
}
