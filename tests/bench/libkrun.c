/* A launcher for libkrun, which is a library and not a program: the same kernel and initramfs as the others get.
 *   libkrun LIBRARY VCPUS MIB KERNEL INITRAMFS COMMAND_LINE
 * What is used of its API is as include/libkrun.h has it. */

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define KRUN_KERNEL_FORMAT_ELF 1

static void *library;

static void *function(const char *name)
{
    void *found = dlsym(library, name);
    if (!found) {
        fprintf(stderr, "libkrun: the library has no %s\n", name);
        exit(1);
    }
    return found;
}

static void check(const char *doing, int32_t result)
{
    if (result < 0) {
        fprintf(stderr, "libkrun: %s: error %d\n", doing, -result);
        exit(1);
    }
}

int main(int argc, char **argv)
{
    if (argc != 7) {
        fprintf(stderr, "usage: libkrun LIBRARY VCPUS MIB KERNEL INITRAMFS COMMAND_LINE\n");
        return 2;
    }
    library = dlopen(argv[1], RTLD_NOW);
    if (!library) {
        fprintf(stderr, "libkrun: load %s: %s\n", argv[1], dlerror());
        return 1;
    }
    int32_t (*create)(void) = function("krun_create_ctx");
    int32_t (*set_vm)(uint32_t, uint8_t, uint32_t) = function("krun_set_vm_config");
    int32_t (*set_kernel)(uint32_t, const char *, uint32_t, const char *, const char *) =
        function("krun_set_kernel");
    int32_t (*start)(uint32_t) = function("krun_start_enter");
    int32_t context = create();
    check("create a context", context);
    check("set vCPUs and memory", set_vm(context, atoi(argv[2]), atoi(argv[3])));
    check("set the kernel", set_kernel(context, argv[4], KRUN_KERNEL_FORMAT_ELF, argv[5], argv[6]));
    check("start", start(context));
}
