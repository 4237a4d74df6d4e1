/* A plugin of QEMU's emulation (docs/devel/tcg-plugins.rst) that counts the lab's instructions, by address and by
 * address space: `make bench PROFILE=1` builds it and reads what it writes (hot.py).
 *
 * Debian packages no qemu-plugin.h. What is used of it is declared below, as version 4 of the API has it (QEMU 9.2 to 10.0).
 *
 * The lab's guest marks where it is by CPUID (guest.h), and so does measure.c when it starts a VMM: with index 0 all counts
 * begin anew, and with any other they are written to a file, OUT.INDEX. The first VMRUN after index 0 writes OUT.vmrun, and
 * OUT.init is written when its guest, once in its kernel, comes to the first program.
 * A file has a line for each block of code: "SPACE ADDRESS INSTRUCTIONS", SPACE being "guest", for code between VMRUN and
 * the exit, or the page tables' address.
 *
 * With stores=START-END, two addresses, the file also has those between them that the guest has written to, by 16 bytes, as
 * lines of the space "stores".
 *
 * A block counts whole, even if an exception ends it early: some tenths of a percent are counted that were not executed. */

#include "mark.h"
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t qemu_plugin_id_t;
typedef struct qemu_info_t qemu_info_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct qemu_plugin_register;
enum qemu_plugin_cb_flags {
    QEMU_PLUGIN_CB_NO_REGS,
    QEMU_PLUGIN_CB_R_REGS,
    QEMU_PLUGIN_CB_RW_REGS
};
enum qemu_plugin_mem_rw {
    QEMU_PLUGIN_MEM_R = 1,
    QEMU_PLUGIN_MEM_W
};
typedef uint32_t qemu_plugin_meminfo_t;
typedef struct {
    uint8_t *data;
    unsigned len;
} GByteArray;
typedef struct {
    char *data;
    unsigned len;
} GArray;
typedef struct {
    struct qemu_plugin_register *handle;
    const char *name;
    const char *feature;
} qemu_plugin_reg_descriptor;
typedef void (*qemu_plugin_vcpu_udata_cb_t)(unsigned vcpu, void *userdata);
typedef void (*qemu_plugin_vcpu_simple_cb_t)(qemu_plugin_id_t id, unsigned vcpu);
typedef void (*qemu_plugin_vcpu_tb_trans_cb_t)(qemu_plugin_id_t id, struct qemu_plugin_tb *tb);

GByteArray *g_byte_array_new(void);
GByteArray *g_byte_array_set_size(GByteArray *array, unsigned length);
GArray *qemu_plugin_get_registers(void);
int qemu_plugin_read_register(struct qemu_plugin_register *handle, GByteArray *buf);
void qemu_plugin_register_vcpu_init_cb(qemu_plugin_id_t id, qemu_plugin_vcpu_simple_cb_t cb);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, qemu_plugin_vcpu_tb_trans_cb_t cb);
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *tb, qemu_plugin_vcpu_udata_cb_t cb,
                                          enum qemu_plugin_cb_flags flags, void *userdata);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *insn, qemu_plugin_vcpu_udata_cb_t cb,
                                            enum qemu_plugin_cb_flags flags, void *userdata);
typedef void (*qemu_plugin_vcpu_mem_cb_t)(unsigned vcpu, qemu_plugin_meminfo_t info, uint64_t address, void *userdata);
void qemu_plugin_register_vcpu_mem_cb(struct qemu_plugin_insn *insn, qemu_plugin_vcpu_mem_cb_t cb,
                                      enum qemu_plugin_cb_flags flags, enum qemu_plugin_mem_rw rw, void *userdata);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *tb);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *tb, size_t idx);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *insn);
size_t qemu_plugin_insn_data(const struct qemu_plugin_insn *insn, void *dest, size_t len);

#define EXPORTED __attribute__((visibility("default")))
EXPORTED int qemu_plugin_version = 4;

#define BUCKETS (1u << 18)
#define PAGE_TABLES 0x000ffffffffff000ull
#define KERNEL 0xffff800000000000ull

/* An address space: the guest's, or one of the lab's, by CR3. */
struct space {
    uint64_t cr3;
    struct space *next;
};
struct count {
    struct space *space;
    uint64_t executions;
    struct count *next;
};
/* A run of instructions without a jump, at one address. QEMU translates it again now and then: it stays one. */
struct block {
    uint64_t address;
    uint64_t instructions;
    struct count *counts;
    struct block *next;
};

static struct space guest, first_space, *spaces = &first_space, *current = &first_space,
                                        *before_guest = &first_space;
static struct block *blocks[BUCKETS];
static uint64_t after_vmrun;
static bool vmrun_seen = true, kernel_seen, program_seen = true;
static const char *out = "profile";
/* The guest's stores: a byte for each 16. */
static uint64_t stores_start, stores_end;
static bool *stored;

static const char *const register_names[16] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                               "r8",  "r9",  "r10", "r11", "r12", "r13", "r14", "r15"};
enum {
    RAX,
    RCX
};
static struct qemu_plugin_register *registers[16];
static GByteArray *buffer;

static uint64_t read_register(unsigned number)
{
    uint64_t value = 0;
    g_byte_array_set_size(buffer, 0);
    if (registers[number] && qemu_plugin_read_register(registers[number], buffer) >= (int)sizeof value)
        memcpy(&value, buffer->data, sizeof value);
    return value;
}

static void write_counts(const char *name)
{
    char path[512];
    snprintf(path, sizeof path, "%s.%s", out, name);
    FILE *file = fopen(path, "w");
    if (!file) {
        fprintf(stderr, "profile: cannot write %s\n", path);
        return;
    }
    for (unsigned i = 0; i < BUCKETS; i++)
        for (struct block *block = blocks[i]; block; block = block->next)
            for (struct count *count = block->counts; count; count = count->next)
                if (count->executions) {
                    if (count->space == &guest)
                        fputs("guest", file);
                    else
                        fprintf(file, "%" PRIx64, count->space->cr3);
                    fprintf(file, " %" PRIx64 " %" PRIu64 "\n", block->address,
                            count->executions * block->instructions);
                }
    for (uint64_t address = stores_start; address < stores_end; address += 16)
        if (stored[(address - stores_start) / 16])
            fprintf(file, "stores %" PRIx64 " 1\n", address);
    fclose(file);
}

static void start_counting(void)
{
    for (unsigned i = 0; i < BUCKETS; i++)
        for (struct block *block = blocks[i]; block; block = block->next)
            for (struct count *count = block->counts; count; count = count->next)
                count->executions = 0;
    if (stored)
        memset(stored, 0, (stores_end - stores_start) / 16);
    vmrun_seen = kernel_seen = program_seen = false;
}

static void on_store(unsigned vcpu, qemu_plugin_meminfo_t info, uint64_t address, void *userdata)
{
    (void)vcpu, (void)info, (void)userdata;
    if (current == &guest && address >= stores_start && address < stores_end)
        stored[(address - stores_start) / 16] = true;
}

static void on_block(unsigned vcpu, void *userdata)
{
    (void)vcpu;
    struct block *block = userdata;
    /* An exit of the guest goes on behind the VMRUN that entered it. */
    if (current == &guest && block->address == after_vmrun)
        current = before_guest;
    /* A kernel's first code runs at low addresses, too. */
    if (current == &guest && !program_seen) {
        program_seen = kernel_seen && block->address < KERNEL;
        kernel_seen |= block->address >= KERNEL;
        if (program_seen)
            write_counts("init");
    }
    struct count *count = block->counts;
    while (count && count->space != current)
        count = count->next;
    if (!count) {
        count = calloc(1, sizeof *count);
        count->space = current;
        count->next = block->counts;
        block->counts = count;
    }
    count->executions++;
}

static void on_vmrun(unsigned vcpu, void *next)
{
    (void)vcpu;
    if (!vmrun_seen) {
        vmrun_seen = true;
        write_counts("vmrun");
    }
    after_vmrun = (uintptr_t)next;
    if (current != &guest)
        before_guest = current;
    current = &guest;
}

static void on_cr3(unsigned vcpu, void *from)
{
    (void)vcpu;
    if (current == &guest)
        return;
    uint64_t cr3 = read_register((uintptr_t)from) & PAGE_TABLES;
    struct space *space = spaces;
    while (space && space->cr3 != cr3)
        space = space->next;
    if (!space) {
        space = calloc(1, sizeof *space);
        space->cr3 = cr3;
        space->next = spaces;
        spaces = space;
    }
    current = space;
}

static void on_cpuid(unsigned vcpu, void *userdata)
{
    (void)vcpu, (void)userdata;
    if ((uint32_t)read_register(RAX) != MARK_LEAF)
        return;
    unsigned index = read_register(RCX);
    if (index == 0) {
        start_counting();
    } else {
        char name[16];
        snprintf(name, sizeof name, "%u", index);
        write_counts(name);
    }
}

static struct block *block_at(uint64_t address, uint64_t instructions)
{
    struct block **bucket = &blocks[(address * 0x9e3779b97f4a7c15ull + instructions) >> 46];
    for (struct block *block = *bucket; block; block = block->next)
        if (block->address == address && block->instructions == instructions)
            return block;
    struct block *block = calloc(1, sizeof *block);
    block->address = address;
    block->instructions = instructions;
    block->next = *bucket;
    return *bucket = block;
}

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
    (void)id;
    size_t instructions = qemu_plugin_tb_n_insns(tb);
    qemu_plugin_register_vcpu_tb_exec_cb(tb, on_block, QEMU_PLUGIN_CB_NO_REGS,
                                         block_at(qemu_plugin_tb_vaddr(tb), instructions));
    for (size_t i = 0; i < instructions; i++) {
        struct qemu_plugin_insn *instruction = qemu_plugin_tb_get_insn(tb, i);
        if (stored)
            qemu_plugin_register_vcpu_mem_cb(instruction, on_store, QEMU_PLUGIN_CB_NO_REGS, QEMU_PLUGIN_MEM_W, NULL);
        uint8_t code[16] = {0};
        size_t length = qemu_plugin_insn_data(instruction, code, sizeof code);
        /* A REX prefix, whose lowest bit is the register's highest. */
        size_t prefix = (code[0] & 0xf0) == 0x40;
        const uint8_t *opcode = code + prefix;
        if (length < prefix + 2 || opcode[0] != 0x0f)
            continue;
        if (opcode[1] == 0x01 && opcode[2] == 0xd8) /* VMRUN */
            qemu_plugin_register_vcpu_insn_exec_cb(
                instruction, on_vmrun, QEMU_PLUGIN_CB_NO_REGS,
                (void *)(uintptr_t)(qemu_plugin_insn_vaddr(instruction) + length));
        else if (opcode[1] == 0x22 && (opcode[2] & 0x38) == 0x18) /* MOV to CR3 */
            qemu_plugin_register_vcpu_insn_exec_cb(
                instruction, on_cr3, QEMU_PLUGIN_CB_R_REGS,
                (void *)(uintptr_t)((opcode[2] & 7) | (prefix ? (code[0] & 1) << 3 : 0)));
        else if (opcode[1] == 0xa2) /* CPUID */
            qemu_plugin_register_vcpu_insn_exec_cb(instruction, on_cpuid, QEMU_PLUGIN_CB_R_REGS, NULL);
    }
}

static void on_vcpu(qemu_plugin_id_t id, unsigned vcpu)
{
    (void)id, (void)vcpu;
    buffer = g_byte_array_new();
    GArray *known = qemu_plugin_get_registers();
    const qemu_plugin_reg_descriptor *descriptors = (const void *)known->data;
    for (unsigned i = 0; i < known->len; i++)
        for (int number = 0; number < 16; number++)
            if (!strcmp(descriptors[i].name, register_names[number]))
                registers[number] = descriptors[i].handle;
}

EXPORTED int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
    (void)info;
    for (int i = 0; i < argc; i++)
        if (!strncmp(argv[i], "out=", 4))
            out = strdup(argv[i] + 4);
        else if (sscanf(argv[i], "stores=%" SCNx64 "-%" SCNx64, &stores_start, &stores_end) == 2)
            stored = calloc((stores_end - stores_start) / 16 + 1, sizeof *stored);
    qemu_plugin_register_vcpu_init_cb(id, on_vcpu);
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
    return 0;
}
