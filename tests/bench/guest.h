/* What the benchmark's guest programs (init.c, entrypoint.c) share: system calls without a C library, so that a
 * start costs what the VMM and the kernel make it cost. */

#include "mark.h"
#include <asm/unistd.h>
#include <stddef.h>

static inline long system_call(long number, long a, long b, long c, long d, long e)
{
    long result;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
                     : "rcx", "r11", "memory");
    return result;
}

static inline int same(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

/* The kernel starts a program with its argument count on the stack, then the arguments and the environment. */
__attribute__((used, noreturn)) static void start(long *stack);
__asm__(".globl _start\n_start: mov %rsp, %rdi\nand $-16, %rsp\ncall start\n");
