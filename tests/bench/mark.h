/* The mark by which a program in the guest says where it is.
 *
 * A mark is CPUID with a leaf that means nothing to anybody. CPUID always leaves the guest, on Intel as on AMD, and the
 * host's kernel stamps the exit in its tracepoint kvm:kvm_cpuid, with leaf and index: no device takes part, so
 * every VMM's guest can say where it is, at the price of one exit. */

#define MARK_LEAF 0x5eed0001u
/* The index in ECX says which mark it is. tests/bench/measure.c has the same numbers. */
#define MARK_INIT 1u
#define MARK_ENTRYPOINT 2u
#define MARK_EXEC 3u

static inline void mark(unsigned which)
{
    unsigned eax = MARK_LEAF, ebx, ecx = which, edx;
    __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
}
