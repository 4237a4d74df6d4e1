/* The floor: the least that a program can do to run this kernel, and so what no VMM can be much faster than.
 *   floor VCPUS MIB KERNEL INITRAMFS COMMAND_LINE
 *
 * It loads an ELF vmlinux into memory, starts it by the 64-bit boot protocol (Documentation/arch/x86/boot.rst), and has
 * no device at all: ports and memory read as ones. A write of 0xfe to port 0x64, by which Linux resets a
 * machine through its keyboard controller, ends it. No sandbox, no check of what the guest or the files say. */

#include <asm/bootparam.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define MIB ((uint64_t)1 << 20)
#define HUGE_PAGE (2 * MIB)
/* RAM below the hole for devices, which ends at 4 GiB; what is beyond lies above it. */
#define LOW_RAM_END (3328 * MIB)
#define HIGH_RAM (4096 * MIB)

/* Guest physical addresses of what the kernel is given. */
enum {
    GDT = 0x500,
    BOOT_PARAMS = 0x7000,
    STACK_TOP = 0x8ff0,
    PML4 = 0x9000,
    PDPT = 0xa000,
    PD = 0xb000,
    COMMAND_LINE = 0x20000,
    MP_TABLE = 0x9fc00,
    LOCAL_APIC = 0xfee00000,
    IO_APIC = 0xfec00000,
};
enum {
    IO_APIC_PINS = 24,
    MOST_VCPUS = 64
};

static uint8_t *ram;
static uint64_t ram_bytes;
static int kvm, vm, vcpus, vcpu_fds[MOST_VCPUS];
static size_t run_size;

static void die(const char *doing)
{
    fprintf(stderr, "floor: %s: %s\n", doing, strerror(errno));
    exit(1);
}

static long checked(const char *doing, long result)
{
    if (result < 0)
        die(doing);
    return result;
}

static void *run_vcpu(void *fd_pointer)
{
    int fd = *(int *)fd_pointer;
    struct kvm_run *run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (run == MAP_FAILED)
        die("map a vCPU's kvm_run");
    for (;;) {
        if (ioctl(fd, KVM_RUN, 0) < 0) {
            if (errno == EINTR || errno == EAGAIN)
                continue;
            die("KVM_RUN");
        }
        switch (run->exit_reason) {
        case KVM_EXIT_IO: {
            uint8_t *data = (uint8_t *)run + run->io.data_offset;
            /* Linux waits for the keyboard controller's status to have no bits before it resets the machine by it. */
            int nobody = run->io.port == 0x64 ? 0 : 0xff;
            if (run->io.direction == KVM_EXIT_IO_IN)
                memset(data, nobody, (size_t)run->io.size * run->io.count);
            else if (run->io.port == 0x64 && *data == 0xfe)
                exit(0);
            break;
        }
        case KVM_EXIT_MMIO:
            if (!run->mmio.is_write)
                memset(run->mmio.data, 0xff, sizeof run->mmio.data);
            break;
        case KVM_EXIT_SHUTDOWN:
        case KVM_EXIT_SYSTEM_EVENT:
            exit(0);
        default:
            fprintf(stderr, "floor: KVM_RUN: exit reason %u\n", run->exit_reason);
            exit(1);
        }
    }
}

static uint8_t *append(uint8_t *at, const void *entry, size_t length)
{
    memcpy(at, entry, length);
    return at + length;
}

static uint8_t checksum(const uint8_t *from, const uint8_t *to)
{
    uint8_t sum = 0;
    while (from < to)
        sum += *from++;
    return -sum;
}

/* The MultiProcessor Specification 1.4's table: processors, one ISA bus, one I/O APIC with its pins one to one. */
static void write_mp_table(void)
{
    uint8_t *pointer = ram + MP_TABLE, *table = pointer + 16, *at = table + 44;
    memset(pointer, 0, 0x400);
    int entries = 0;
    for (int id = 0; id < vcpus; id++, entries++)
        at = append(at, (uint8_t[20]){0, id, 0x14, id == 0 ? 3 : 1, 0, 6, 0, 0, 1, 2}, 20);
    at = append(at, (uint8_t[8]){1, 0, 'I', 'S', 'A', ' ', ' ', ' '}, 8);
    at = append(at, (uint8_t[8]){2, vcpus, 0x11, 1, 0, 0, IO_APIC >> 16 & 0xff, IO_APIC >> 24 & 0xff}, 8);
    entries += 2;
    for (int pin = 0; pin < IO_APIC_PINS; pin++, entries++)
        at = append(at, (uint8_t[8]){3, 0, 0, 0, 0, pin, vcpus, pin}, 8);
    at = append(at, (uint8_t[8]){4, 3, 0, 0, 0, 0, 0xff, 0}, 8);
    at = append(at, (uint8_t[8]){4, 1, 0, 0, 0, 0, 0xff, 1}, 8);
    entries += 2;
    uint32_t local_apic = LOCAL_APIC, table_address = MP_TABLE + 16;
    uint16_t length = at - table;
    memcpy(table, "PCMP", 4);
    memcpy(table + 4, &length, 2);
    table[6] = 4;
    memcpy(table + 8, "MOTE    FLOOR       ", 20);
    table[34] = entries;
    memcpy(table + 36, &local_apic, 4);
    table[7] = checksum(table, at);
    memcpy(pointer, "_MP_", 4);
    memcpy(pointer + 4, &table_address, 4);
    pointer[8] = 1;
    pointer[9] = 4;
    pointer[10] = checksum(pointer, pointer + 16);
}

/* Aligned as the guest's huge pages are, so that each becomes one of the host's. */
static void map_ram(void)
{
    uint8_t *mapped = mmap(NULL, ram_bytes + HUGE_PAGE, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED)
        die("map the guest's memory");
    ram = (uint8_t *)(((uintptr_t)mapped + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1));
    madvise(ram, ram_bytes, MADV_HUGEPAGE);
}

static void read_into_ram(int fd, uint64_t address, uint64_t length, off_t from)
{
    if (address > ram_bytes || length > ram_bytes - address)
        errno = ENOMEM, die("load a file into the guest's memory");
    while (length > 0) {
        ssize_t got = checked("read a file into the guest's memory", pread(fd, ram + address, length, from));
        if (got == 0)
            errno = EIO, die("read a file that ends too early");
        address += got, from += got, length -= got;
    }
}

static uint64_t load_kernel(const char *path)
{
    int fd = checked("open the kernel", open(path, O_RDONLY | O_CLOEXEC));
    Elf64_Ehdr header;
    Elf64_Phdr segments[16];
    if (pread(fd, &header, sizeof header, 0) != sizeof header || header.e_phnum > 16)
        errno = ENOEXEC, die("read the kernel's header");
    size_t length = sizeof *segments * header.e_phnum;
    if (pread(fd, segments, length, header.e_phoff) != (ssize_t)length)
        errno = ENOEXEC, die("read the kernel's segments");
    for (int i = 0; i < header.e_phnum; i++)
        if (segments[i].p_type == PT_LOAD)
            read_into_ram(fd, segments[i].p_paddr, segments[i].p_filesz, segments[i].p_offset);
    close(fd);
    return header.e_entry;
}

static void add_ram(struct boot_params *params, uint64_t start, uint64_t end)
{
    params->e820_table[params->e820_entries++] = (struct boot_e820_entry){start, end - start, 1};
}

static void write_boot_params(const char *command_line, uint64_t low_end, uint64_t initramfs,
                              uint64_t initramfs_bytes)
{
    struct boot_params *params = (void *)(ram + BOOT_PARAMS);
    params->hdr.type_of_loader = 0xff;
    params->hdr.boot_flag = 0xaa55;
    params->hdr.header = 0x53726448; /* "HdrS" */
    params->hdr.kernel_alignment = 16 * MIB;
    params->hdr.cmd_line_ptr = COMMAND_LINE;
    params->hdr.cmdline_size = strlen(command_line);
    params->hdr.ramdisk_image = initramfs;
    params->hdr.ramdisk_size = initramfs_bytes;
    strcpy((char *)ram + COMMAND_LINE, command_line);
    add_ram(params, 0, MP_TABLE);
    add_ram(params, MIB, low_end);
    if (ram_bytes > low_end)
        add_ram(params, HIGH_RAM, HIGH_RAM + ram_bytes - low_end);
}

/* The first GiB mapped one to one, and flat segments: what the boot protocol asks for. */
static void write_tables(void)
{
    uint64_t *pml4 = (void *)(ram + PML4), *pdpt = (void *)(ram + PDPT), *pd = (void *)(ram + PD),
             *gdt = (void *)(ram + GDT);
    pml4[0] = PDPT | 3;
    pdpt[0] = PD | 3;
    for (uint64_t entry = 0; entry < 512; entry++)
        pd[entry] = entry << 21 | 0x83;
    gdt[2] = 0x00af9b000000ffff;
    gdt[3] = 0x00cf93000000ffff;
}

static void create_vcpu(int id, uint64_t entry)
{
    static struct {
        struct kvm_cpuid2 head;
        struct kvm_cpuid_entry2 entries[256];
    } cpuid;
    if (id == 0) {
        cpuid.head.nent = 256;
        checked("KVM_GET_SUPPORTED_CPUID", ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid));
    }
    int fd = vcpu_fds[id] = checked("KVM_CREATE_VCPU", ioctl(vm, KVM_CREATE_VCPU, id));
    for (unsigned i = 0; i < cpuid.head.nent; i++) {
        struct kvm_cpuid_entry2 *leaf = &cpuid.head.entries[i];
        if (leaf->function == 1) {
            leaf->ebx = (leaf->ebx & 0xffff) | (unsigned)vcpus << 16 | (unsigned)id << 24;
            /* The TSC-deadline timer, which KVM has but does not list on old kernels: without it Linux
             * measures its timer for 200 ms. And that there is a hypervisor. */
            leaf->ecx |= 1u << 24 | 1u << 31;
            if (vcpus > 1)
                leaf->edx |= 1u << 28;
        } else if (leaf->function == 0xb || leaf->function == 0x1f) {
            leaf->eax = leaf->index == 1 ? 6 : 0;
            leaf->ebx = leaf->index == 0 ? 1 : leaf->index == 1 ? (unsigned)vcpus : 0;
            leaf->ecx = leaf->index | (leaf->index < 2 ? leaf->index + 1 : 0) << 8;
            leaf->edx = id;
        }
    }
    checked("KVM_SET_CPUID2", ioctl(fd, KVM_SET_CPUID2, &cpuid));
    if (id != 0)
        return; /* The others wait for the first one's INIT and SIPI. */
    struct kvm_sregs sregs;
    checked("KVM_GET_SREGS", ioctl(fd, KVM_GET_SREGS, &sregs));
    struct kvm_segment code = {
        .limit = ~0u, .selector = 0x10, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1};
    struct kvm_segment data = {
        .limit = ~0u, .selector = 0x18, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1};
    sregs.cs = code;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 31;
    sregs.idt.limit = 0;
    sregs.cr3 = PML4;
    sregs.cr4 = 1 << 5;     /* PAE */
    sregs.cr0 = 0x80000011; /* PG, ET, PE */
    sregs.efer = 0x500;     /* LMA, LME */
    checked("KVM_SET_SREGS", ioctl(fd, KVM_SET_SREGS, &sregs));
    struct kvm_regs regs = {.rip = entry, .rsi = BOOT_PARAMS, .rsp = STACK_TOP, .rflags = 2};
    checked("KVM_SET_REGS", ioctl(fd, KVM_SET_REGS, &regs));
}

static void add_memory(unsigned slot, uint64_t guest, uint64_t length, uint8_t *host)
{
    struct kvm_userspace_memory_region region = {slot, 0, guest, length, (uintptr_t)host};
    checked("KVM_SET_USER_MEMORY_REGION", ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region));
}

int main(int argc, char **argv)
{
    if (argc != 6 || (vcpus = atoi(argv[1])) < 1 || vcpus > MOST_VCPUS || atoi(argv[2]) < 64) {
        fprintf(stderr, "usage: floor VCPUS MIB KERNEL INITRAMFS COMMAND_LINE\n");
        return 2;
    }
    ram_bytes = (uint64_t)atoi(argv[2]) * MIB;
    uint64_t low_end = ram_bytes < LOW_RAM_END ? ram_bytes : LOW_RAM_END;
    map_ram();
    uint64_t entry = load_kernel(argv[3]);
    int initramfs = checked("open the initramfs", open(argv[4], O_RDONLY | O_CLOEXEC));
    struct stat stat;
    checked("stat the initramfs", fstat(initramfs, &stat));
    uint64_t initramfs_start = (low_end - stat.st_size) & ~(uint64_t)0xfff;
    read_into_ram(initramfs, initramfs_start, stat.st_size, 0);
    write_boot_params(argv[5], low_end, initramfs_start, stat.st_size);
    write_tables();
    write_mp_table();

    kvm = checked("open /dev/kvm", open("/dev/kvm", O_RDWR | O_CLOEXEC));
    vm = checked("KVM_CREATE_VM", ioctl(kvm, KVM_CREATE_VM, 0));
    run_size = checked("KVM_GET_VCPU_MMAP_SIZE", ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
    checked("KVM_SET_TSS_ADDR", ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000));
    checked("KVM_CREATE_IRQCHIP", ioctl(vm, KVM_CREATE_IRQCHIP, 0));
    add_memory(0, 0, low_end, ram);
    if (ram_bytes > low_end)
        add_memory(1, HIGH_RAM, ram_bytes - low_end, ram + low_end);
    for (int id = 0; id < vcpus; id++)
        create_vcpu(id, entry);
    for (int id = 1; id < vcpus; id++) {
        pthread_t thread;
        errno = pthread_create(&thread, NULL, run_vcpu, &vcpu_fds[id]);
        if (errno != 0)
            die("start a vCPU's thread");
    }
    run_vcpu(&vcpu_fds[0]);
}
