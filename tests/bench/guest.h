/* What the benchmark's guest programs (init.c, entrypoint.c) share: system calls without a C library, so that a
 * start costs what the VMM and the kernel make it cost, and the mark that the host sees.
 *
 * A mark is CPUID with a leaf that means nothing to anybody. CPUID always leaves the guest, on Intel as on AMD, and the
 * host's kernel stamps the exit in its tracepoint kvm:kvm_cpuid, with leaf and index: no device takes part, so
 * every VMM's guest can say where it is, at the price of one exit. */

#include <asm/unistd.h>
#include <stddef.h>

#define MARK_LEAF 0x5eed0001u
/* The index in ECX says which mark it is. tests/bench/measure.c has the same numbers. */
#define MARK_INIT 1u
#define MARK_ENTRYPOINT 2u
#define MARK_EXEC 3u

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

static inline void mark(unsigned which)
{
    unsigned eax = MARK_LEAF, ebx, ecx = which, edx;
    __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
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
