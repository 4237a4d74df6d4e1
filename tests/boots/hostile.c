/* A guest kernel that drives mote's devices as no driver should. It boots in place of Linux; the
   initramfs is its order, one line of words:

       MODE SEED ROUNDS END VCPUS

   MODE   registers | queues | broken | files | vsock: see the functions; halt; spin; crash
   SEED   of all that is random: the same order does the same again
   ROUNDS how many; 0 for no end
   END    reset | halt, after them
   VCPUS  how many processors take part

   It says the order on the serial port before it starts, and `hostile: done` before its end. What it
   makes devices write into is above LOWEST, and it itself is below; but for `broken`, which may well
   destroy itself. */

#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

/* src/layout.rs */
#define MMIO 0xd0000000ul
#define PAGE 0x1000ul
#define IO_APIC 0xfec00000ul
#define LOCAL_APIC 0xfee00000ul
/* include/uapi/asm/bootparam.h */
#define E820_ENTRIES 0x1e8
#define RAMDISK_IMAGE 0x218
#define E820_TABLE 0x2d0

#define LOWEST 0x2000000ul   /* 32 MiB: everything that devices may touch is above */
#define RINGS LOWEST         /* 1 MiB for each device, 64 KiB of it for each queue */
#define TABLES 0x3800000ul   /* indirect descriptor tables */
#define BUFFERS 0x4000000ul  /* 16 MiB of buffers */
#define BUFFERS_LEN 0x1000000ul
#define PACKETS 0x6000000ul  /* buffers of the vsock driver's, which other devices leave alone */
#define WINDOW (8ul << 30)   /* a GiB of addresses that show random others */
#define TRAMPOLINE 0x8000ul  /* where the second processor wakes up */

#define MAX_DEVICES 8
#define MAX_QUEUES 3

/* ---- the machine ---------------------------------------------------------------------------- */

static u64 pml4[512] __attribute__((aligned(4096)));
static u64 pdpt[512] __attribute__((aligned(4096)));
static u64 pd[9][512] __attribute__((aligned(4096)));
u8 stacks[2][16384] __attribute__((aligned(16)));

__asm__(".globl _start\n"
        "_start:\n"
        "    cli\n"
        "    mov $stacks + 16384, %rsp\n"
        "    mov %rsi, %rdi\n"
        "    call boot\n"
        /* The second processor: from real mode straight to long mode, with mote's boot GDT. */
        ".globl wake_start, wake_end, wake_tables\n"
        ".code16\n"
        "wake_start:\n"
        "    cli\n"
        "    xorw %ax, %ax\n"
        "    movw %ax, %ds\n"
        "    lgdtl 0x8000 + wake_gdt - wake_start\n"
        "    movl %cr4, %eax\n"
        "    orl $0x20, %eax\n"
        "    movl %eax, %cr4\n"
        "    movl 0x8000 + wake_tables - wake_start, %eax\n"
        "    movl %eax, %cr3\n"
        "    movl $0xc0000080, %ecx\n"
        "    rdmsr\n"
        "    orl $0x100, %eax\n"
        "    wrmsr\n"
        "    movl %cr0, %eax\n"
        "    orl $0x80000001, %eax\n"
        "    movl %eax, %cr0\n"
        "    ljmpl $0x10, $awake\n"
        "wake_gdt: .word 31\n"
        "    .long 0x500\n"
        "wake_tables: .long 0\n"
        "wake_end:\n"
        ".code64\n"
        "awake:\n"
        "    mov $0x18, %eax\n"
        "    mov %eax, %ds\n"
        "    mov %eax, %es\n"
        "    mov %eax, %ss\n"
        "    mov $stacks + 32768, %rsp\n"
        "    call second\n");

extern u8 wake_start[], wake_end[], wake_tables[];

static void out8(u16 port, u8 value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }

static void halt(void)
{
    for (;;)
        __asm__ volatile("cli; hlt");
}

static void map(void)
{
    pml4[0] = (u64)pdpt | 3;
    for (u64 gib = 0; gib < 9; gib++) {
        pdpt[gib] = (u64)pd[gib] | 3;
        for (u64 entry = 0; entry < 512; entry++)
            pd[gib][entry] = gib << 30 | entry << 21 | 0x83;
    }
    __asm__ volatile("mov %0, %%cr3" ::"r"(pml4) : "memory");
}

static void say(const char *text)
{
    while (*text)
        out8(0x3f8, *text++);
}

/* A fault of this kernel's own is told rather than taken for mote's doing. */
struct gate {
    u16 low, selector, flags, middle;
    u32 high, zero;
};
static struct gate gates[32] __attribute__((aligned(16)));

static void say_number(u64 number)
{
    say(" ");
    for (int shift = 60; shift >= 0; shift -= 4)
        out8(0x3f8, "0123456789abcdef"[number >> shift & 15]);
}

void on_fault(const u64 *stack)
{
    u64 address;
    __asm__("mov %%cr2, %0" : "=r"(address));
    say("\nhostile: fault");
    for (int i = 0; i < 3; i++)
        say_number(stack[i]);
    say_number(address);
    say("\n");
    out8(0x64, 0xfe);
    halt();
}

__asm__("fault:\n"
        "    mov %rsp, %rdi\n"
        "    and $-16, %rsp\n"
        "    call on_fault\n");
extern u8 fault[];

static void catch_faults(void)
{
    struct {
        u16 limit;
        u64 base;
    } __attribute__((packed)) idt = {sizeof gates - 1, (u64)gates};
    for (int i = 0; i < 32; i++) {
        struct gate gate = {(u64)fault, 0x10, 0x8e00, (u64)fault >> 16, 0, 0};
        gates[i] = gate;
    }
    __asm__ volatile("lidt %0" ::"m"(idt));
}

static u32 read32(u64 address) { return *(volatile u32 *)address; }
static void write32(u64 address, u32 value) { *(volatile u32 *)address = value; }

static void pause(void) { __asm__ volatile("pause" ::: "memory"); }

/* Sends a message to the second processor (Intel SDM 3A, 11.4.4), and gives it time. */
static void interrupt_second(u32 command)
{
    write32(LOCAL_APIC + 0x310, 1 << 24);
    write32(LOCAL_APIC + 0x300, command);
    while (read32(LOCAL_APIC + 0x300) & 1 << 12)
        pause();
    for (int i = 0; i < 1000; i++)
        pause();
}

void *memcpy(void *to, const void *from, unsigned long len)
{
    for (u8 *t = to, *end = t + len; t < end;)
        *t++ = *(const u8 *)from++;
    return to;
}

void *memset(void *to, int value, unsigned long len)
{
    for (u8 *t = to, *end = t + len; t < end;)
        *t++ = value;
    return to;
}

/* ---- the order ------------------------------------------------------------------------------ */

static char mode; /* its first letter */
static u64 seed, rounds, ram_end;
static u32 vcpus;
static int then_halt;
/* Whether the box is to live on: what ends it is left out. */
static int careful;
static volatile int second_awake, second_stopped, stopping;

static const char *word(const char *at)
{
    while (*at && *at != ' ' && *at != '\n')
        at++;
    return *at == ' ' ? at + 1 : at;
}

static u64 number(const char *at)
{
    u64 value = 0;
    while (*at >= '0' && *at <= '9')
        value = value * 10 + *at++ - '0';
    return value;
}

static void take_order(const u8 *params)
{
    const u8 *ram = params + E820_TABLE;
    for (int i = 0; i < params[E820_ENTRIES]; i++, ram += 20) {
        u64 end = *(const u64 *)ram + *(const u64 *)(ram + 8);
        if (end <= MMIO)
            ram_end = end;
    }
    const char *order = (const char *)(u64) * (const u32 *)(params + RAMDISK_IMAGE);
    char line[80];
    int len = 0;
    while (len < 79 && order[len] && order[len] != '\n') {
        line[len] = order[len];
        len++;
    }
    line[len] = 0;
    say("hostile: ");
    say(line);
    say("\n");
    mode = line[0];
    const char *at = word(line);
    seed = number(at);
    at = word(at);
    rounds = number(at);
    at = word(at);
    then_halt = *at == 'h';
    vcpus = number(word(at));
    careful = rounds == 0 || then_halt;
}

/* ---- chance --------------------------------------------------------------------------------- */

/* splitmix64 */
static u64 any(u64 *state)
{
    u64 x = *state += 0x9e3779b97f4a7c15ul;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ul;
    x = (x ^ x >> 27) * 0x94d049bb133111ebul;
    return x ^ x >> 31;
}

static u64 below(u64 *state, u64 limit) { return any(state) % limit; }
static int one_in(u64 *state, u64 n) { return any(state) % n == 0; }

static u32 odd_number(u64 *state)
{
    static const u32 odd[] = {0,      1,      2,       3,          4,          8,          0xb,        0xf,
                              0x10,   0x80,   0xff,    0x100,      0x101,      0x7fff,     0x8000,     0xfffe,
                              0xffff, 0x10000, 1 << 20, 0x7fffffff, 0x80000000, 0xfffffff0, 0xfffffffe, 0xffffffff};
    return one_in(state, 4) ? (u32)any(state) : odd[below(state, sizeof odd / sizeof *odd)];
}

/* An address for a device: proper, at an edge, or nowhere. */
static u64 odd_address(u64 *state)
{
    switch (below(state, 12)) {
    case 0: return ram_end - below(state, 64);
    case 1: return ram_end + below(state, 64);
    case 2: return MMIO - below(state, 64);
    case 3: return MMIO + below(state, 16 * PAGE);
    case 4: return 1ul << 32;
    case 5: return -below(state, 4096);
    case 6: return any(state) | 1ul << 40;
    case 7: return LOCAL_APIC + below(state, PAGE);
    case 8: /* the rings themselves, which may be the end of vsock, and so of the box */
        if (!careful)
            return RINGS + below(state, 0x800000);
        /* fallthrough */
    case 9: return TABLES + below(state, 0x10000);
    default: return BUFFERS + below(state, BUFFERS_LEN);
    }
}

/* ---- virtio-mmio (virtio 1.2, 4.2.2) --------------------------------------------------------- */

enum {
    DEVICE_ID = 0x08,
    DEVICE_FEATURES = 0x10,
    DEVICE_FEATURES_SEL = 0x14,
    DRIVER_FEATURES = 0x20,
    DRIVER_FEATURES_SEL = 0x24,
    QUEUE_SEL = 0x30,
    QUEUE_NUM_MAX = 0x34,
    QUEUE_NUM = 0x38,
    QUEUE_READY = 0x44,
    QUEUE_NOTIFY = 0x50,
    INTERRUPT_ACK = 0x64,
    STATUS = 0x70,
    QUEUE_DESC = 0x80,
    QUEUE_AVAIL = 0x90,
    QUEUE_USED = 0xa0,
};
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8 };
enum { INDIRECT_DESC = 1 << 28, EVENT_IDX = 1 << 29 };
enum { NEXT = 1, WRITE = 2, INDIRECT = 4 };
/* The balloon stays a placeholder here, since there is no agent; behind the page is the device. */
enum { ID_BALLOON = 0, ID_NET = 1, ID_RNG = 4, ID_VSOCK = 19, ID_FS = 26 };

struct descriptor {
    u64 address;
    u32 len;
    u16 flags, next;
};

struct queue {
    u32 size;
    volatile struct descriptor *table;
    volatile u16 *avail; /* flags, index, ring, used_event */
    volatile u16 *used;  /* flags, index, elements, avail_event */
};

struct device {
    u64 page;
    u32 id, queues;
    struct queue queue[MAX_QUEUES];
};

static struct device devices[MAX_DEVICES];
static u32 device_count;

static void set(struct device *device, u32 reg, u32 value) { write32(device->page + reg, value); }
static u32 value(struct device *device, u32 reg) { return read32(device->page + reg); }

static void find_devices(void)
{
    for (u64 page = MMIO; device_count < MAX_DEVICES && read32(page) == 0x74726976; page += PAGE) {
        struct device *device = &devices[device_count++];
        device->page = page;
        device->id = value(device, DEVICE_ID);
        for (u32 q = 0; q < MAX_QUEUES; q++) {
            set(device, QUEUE_SEL, q);
            device->queues += value(device, QUEUE_NUM_MAX) > 0;
        }
    }
}

static int negotiate(struct device *device, u32 without)
{
    u32 features[2];
    set(device, STATUS, 0);
    set(device, STATUS, ACKNOWLEDGE);
    set(device, STATUS, ACKNOWLEDGE | DRIVER);
    for (u32 half = 0; half < 2; half++) {
        set(device, DEVICE_FEATURES_SEL, half);
        features[half] = value(device, DEVICE_FEATURES);
    }
    features[0] &= ~without;
    for (u32 half = 0; half < 2; half++) {
        set(device, DRIVER_FEATURES_SEL, half);
        set(device, DRIVER_FEATURES, features[half]);
    }
    set(device, STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    return value(device, STATUS) & FEATURES_OK;
}

static void set_address(struct device *device, u32 reg, u64 address)
{
    set(device, reg, address);
    set(device, reg + 4, address >> 32);
}

/* Sets a queue up where `queue` says. */
static void place(struct device *device, u32 index, struct queue *queue)
{
    set(device, QUEUE_SEL, index);
    set(device, QUEUE_NUM, queue->size);
    set_address(device, QUEUE_DESC, (u64)queue->table);
    set_address(device, QUEUE_AVAIL, (u64)queue->avail);
    set_address(device, QUEUE_USED, (u64)queue->used);
    set(device, QUEUE_READY, 1);
}

static void start(struct device *device)
{
    set(device, STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
}

static void kick(struct device *device, u32 queue) { set(device, QUEUE_NOTIFY, queue); }

/* The usual place of a queue, emptied. */
static void lay_out(struct device *device, u32 index, u32 size)
{
    u64 base = RINGS + (device - devices) * 0x100000 + index * 0x10000;
    struct queue *queue = &device->queue[index];
    memset((void *)base, 0, 0x8000);
    queue->size = size;
    queue->table = (void *)base;
    queue->avail = (void *)(base + 0x2000);
    queue->used = (void *)(base + 0x4000);
}

static u32 largest(struct device *device, u32 index)
{
    set(device, QUEUE_SEL, index);
    return value(device, QUEUE_NUM_MAX);
}

/* ---- registers: random accesses of every width, to every page and beyond, and to every port ---- */

static void poke(u64 *state, u64 address)
{
    u64 what = one_in(state, 2) ? odd_number(state) : any(state);
    switch (below(state, 8)) {
    case 0: *(volatile u8 *)address = what; break;
    case 1: *(volatile u16 *)address = what; break;
    case 2: *(volatile u64 *)address = what; break;
    case 3: (void)*(volatile u8 *)address; break;
    case 4: (void)*(volatile u16 *)address; break;
    case 5: (void)*(volatile u64 *)address; break;
    case 6: (void)*(volatile u32 *)address; break;
    default: *(volatile u32 *)address = what;
    }
}

static void port(u64 *state)
{
    u16 port = any(state);
    switch (below(state, 6)) {
    case 0: port = 0x3f8 + below(state, 8); break;
    case 1: port = 0x60 + below(state, 8); break;
    case 2: port = below(state, 0x100); break;
    }
    u32 what = any(state);
    /* Anything but the reset: that is the end. */
    if (port <= 0x64 && port + 3 >= 0x64)
        what &= 0x7f7f7f7f;
    static u8 string[64];
    u64 count = 1 + below(state, 16);
    u8 *at = string;
    switch (below(state, 8)) {
    case 0: __asm__ volatile("outb %b0, %w1" ::"a"(what), "d"(port)); break;
    case 1: __asm__ volatile("outw %w0, %w1" ::"a"(what), "d"(port)); break;
    case 2: __asm__ volatile("outl %0, %w1" ::"a"(what), "d"(port)); break;
    case 3: __asm__ volatile("inb %w1, %b0" : "=a"(what) : "d"(port)); break;
    case 4: __asm__ volatile("inw %w1, %w0" : "=a"(what) : "d"(port)); break;
    case 5: __asm__ volatile("inl %w1, %0" : "=a"(what) : "d"(port)); break;
    case 6: __asm__ volatile("rep insl" : "+D"(at), "+c"(count) : "d"(port) : "memory"); break;
    default:
        memset(string, what, sizeof string);
        __asm__ volatile("rep outsb" : "+S"(at), "+c"(count) : "d"(port) : "memory");
    }
}

static void registers(u64 *state)
{
    static const u16 known[] = {0x10, 0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x70,
                                0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0xac, 0xb0, 0xfc, 0x100};
    struct device *device = &devices[below(state, device_count)];
    switch (below(state, 10)) {
    case 0: case 1: case 2:
        /* Never all that starts vsock with rings of nothing. */
        if (careful && device->id == ID_VSOCK)
            break;
        set(device, known[below(state, sizeof known / sizeof *known)], odd_number(state));
        break;
    case 3:
        poke(state, device->page + below(state, PAGE));
        break;
    case 4: /* no page, or half of the last one */
        poke(state, MMIO + device_count * PAGE - 4 + below(state, one_in(state, 2) ? 64 : 64 * PAGE));
        break;
    case 5: case 6:
        port(state);
        break;
    case 7: /* no memory: behind RAM, before the IO-APIC, above 4 GiB */
        switch (below(state, 3)) {
        case 0: poke(state, ram_end + below(state, MMIO - ram_end)); break;
        case 1: poke(state, MMIO + 64 * PAGE + below(state, IO_APIC - MMIO - 65 * PAGE)); break;
        default: poke(state, (4ul << 30) + below(state, (4ul << 30) - 8));
        }
        break;
    case 8: { /* the same anywhere in 512 GiB */
        u64 entry = below(state, 512);
        pd[8][entry] = ((4ul << 30) + (below(state, 508ul << 30) & ~0x1ffffful)) | 0x83;
        u64 address = WINDOW + (entry << 21) + below(state, 0x1ffff8);
        __asm__ volatile("invlpg (%0)" ::"r"(address) : "memory");
        poke(state, address);
        break;
    }
    default: /* a device that is set up, for the others to break */
        if (device->id == ID_VSOCK || device->id == ID_FS || !negotiate(device, any(state)))
            break;
        for (u32 q = 0; q < device->queues; q++) {
            lay_out(device, q, largest(device, q));
            place(device, q, &device->queue[q]);
        }
        start(device);
    }
}

/* ---- queues: proper negotiation, malicious chains and, but for vsock's, malicious rings ---------- */

static void odd_descriptor(u64 *state, volatile struct descriptor *at, u32 size)
{
    static const u16 flags[] = {0, WRITE, NEXT, NEXT | WRITE, INDIRECT, INDIRECT | NEXT, INDIRECT | WRITE, 7};
    at->address = odd_address(state);
    at->len = one_in(state, 2) ? below(state, 5000) : odd_number(state);
    at->flags = one_in(state, 32) ? any(state) : flags[below(state, 8)];
    at->next = one_in(state, 8) ? any(state) : below(state, size);
    if (at->flags & INDIRECT && !one_in(state, 4)) {
        at->address = TABLES + 16 * below(state, 0x1000);
        at->len = 16 * (one_in(state, 4) ? 0xffff : below(state, 512));
    }
}

static void odd_chains(u64 *state, struct queue *queue)
{
    for (u32 i = 0; i < queue->size; i++) {
        odd_descriptor(state, &queue->table[i], queue->size);
        queue->avail[2 + i] = below(state, queue->size);
    }
    volatile struct descriptor *indirect = (void *)TABLES;
    for (int i = 0; i < 64; i++)
        odd_descriptor(state, &indirect[below(state, 0x1000)], 0x1000);
}

/* Makes as much available as a driver may, again and again. */
static void feed(struct queue *queue) { queue->avail[1] = queue->used[1] + queue->size; }

/* Overlapping or far away. Descriptors that are made of what a device writes may point anywhere. */
static void misplace(u64 *state, struct queue *queue)
{
    switch (below(state, 8)) {
    case 0: queue->used = (void *)queue->table; break;
    case 1: queue->used = queue->avail; break;
    case 2: queue->used = queue->avail + 2; break;
    case 3: queue->avail = (void *)queue->table; break;
    case 4: queue->table = (void *)(ram_end - 16 * queue->size); break;
    case 5: queue->used = (void *)(odd_address(state) & ~3ul); break;
    case 6: queue->avail = (void *)(odd_address(state) & ~1ul); break;
    case 7: queue->table = (void *)(odd_address(state) & ~15ul); break;
    }
}

static int is_ram(volatile void *at) { return (u64)at >= LOWEST && (u64)at + 0x1000 <= ram_end; }

/* Whether a queue is where this kernel can write to it. */
static int is_writable(struct queue *queue)
{
    return is_ram(queue->table) && is_ram(queue->avail) && is_ram(queue->used);
}

enum malice { CHAINS, RINGS_TOO, PLACES_TOO };

static void attack(u64 *state, struct device *device, enum malice malice)
{
    u32 without = (one_in(state, 2) ? EVENT_IDX : 0) | (one_in(state, 8) ? INDIRECT_DESC : 0);
    if (!negotiate(device, without | (one_in(state, 8) ? any(state) : 0)))
        return;
    for (u32 q = 0; q < device->queues; q++) {
        struct queue *queue = &device->queue[q];
        u32 size = largest(device, q);
        lay_out(device, q, one_in(state, 2) ? size : 1u << below(state, 9) & (2 * size - 1));
        if (queue->size == 0)
            queue->size = size;
        if (malice == PLACES_TOO && one_in(state, 4))
            misplace(state, queue);
        if (is_writable(queue)) {
            odd_chains(state, queue);
            if (one_in(state, 2))
                feed(queue);
        }
        place(device, q, queue);
    }
    start(device);
    for (u64 turns = 1 + below(state, 64); turns > 0; turns--) {
        u32 q = below(state, device->queues);
        struct queue *queue = &device->queue[q];
        if (!is_writable(queue)) {
            kick(device, q);
            continue;
        }
        int broken = 0;
        switch (below(state, 6)) {
        case 0:
            odd_descriptor(state, &queue->table[below(state, queue->size)], queue->size);
            break;
        case 1:
            odd_chains(state, queue);
            break;
        case 2: /* a storm */
            for (int i = 0; i < 20; i++)
                kick(device, below(state, device->queues + 1));
            break;
        case 3: /* what nobody may do while it runs */
            place(device, q, queue);
            set(device, QUEUE_READY, 0);
            break;
        case 4:
            if (malice >= RINGS_TOO && one_in(state, 8))
                queue->avail[2 + below(state, queue->size)] = any(state);
            broken = malice >= RINGS_TOO && one_in(state, 8);
            if (one_in(state, 16))
                set(device, STATUS, 0);
            break;
        }
        feed(queue);
        if (broken)
            queue->avail[1] += odd_number(state);
        kick(device, q);
    }
    if (one_in(state, 2))
        set(device, STATUS, 0);
}

static struct device *device_with(u32 id)
{
    for (u32 i = 0; i < device_count; i++)
        if (devices[i].id == id)
            return &devices[i];
    return 0;
}

/* A broken ring of vsock's ends the box, and about anything ends virtiofsd, and so the box. */
static void queues(u64 *state, u32 processor)
{
    /* Two processors have two devices: each negotiation is whole. */
    u32 small = one_in(state, 2) ? ID_RNG : ID_BALLOON;
    struct device *device = device_with(processor == 1 ? small : one_in(state, 2) ? ID_NET : ID_VSOCK);
    if (!device)
        device = device_with(vcpus == 1 && one_in(state, 2) ? small : ID_VSOCK);
    /* mote may look at the rings once more after a reset, and find those of the next start. */
    if (careful && device->id == ID_VSOCK)
        device = device_with(ID_RNG);
    attack(state, device, device->id == ID_VSOCK ? CHAINS : RINGS_TOO);
}

/* ---- broken: the same with malicious rings of vsock too, which may be anywhere ------------------- */

static void broken(u64 *state)
{
    static const u32 ids[] = {ID_VSOCK, ID_RNG, ID_NET, ID_BALLOON};
    struct device *device = device_with(ids[below(state, sizeof ids / sizeof *ids)]);
    if (device)
        attack(state, device, PLACES_TOO);
}

/* ---- files: the same with the queues of virtiofsd ------------------------------------------------- */

static void files(u64 *state)
{
    enum malice malice = below(state, 3);
    attack(state, device_with(ID_FS), malice);
}

/* ---- vsock: a proper driver that lies (virtio 1.2, 5.10) ---------------------------------------- */

enum { REQUEST = 1, RESPONSE, RESET, SHUTDOWN, DATA, CREDIT_UPDATE, CREDIT_REQUEST };
enum { RECEIVE, TRANSMIT, EVENT };
enum { BUFFER = 4096 + 64, SLOTS = 256, KNOWN = 64 };
/* guest/src/protocol.rs, guest/src/flow.rs */
enum { CONTROL_PORT = 0x6d6f7465, STDOUT_PORT, STDERR_PORT, FLOW_PORT = CONTROL_PORT + 5 };

struct packet {
    u64 from, to;
    u32 from_port, to_port;
    u32 len;
    u16 type, op;
    u32 flags, buf_alloc, fwd_cnt;
} __attribute__((packed));

static struct device *vsock;
static u32 received, sent;
/* Connections that may be there. */
static struct { u32 host, guest; } known[KNOWN];
static int asked;  /* for the control channel */
static int greeted; /* on it */
static u32 output; /* bytes to the box's output, of which there is an end */

static u8 *buffer_of(u32 queue, u32 slot) { return (u8 *)PACKETS + (queue * SLOTS + slot) * BUFFER; }

static int start_vsock(u64 *state)
{
    vsock = device_with(ID_VSOCK);
    if (!negotiate(vsock, one_in(state, 2) ? EVENT_IDX : 0))
        return 0;
    for (u32 q = 0; q < 3; q++) {
        lay_out(vsock, q, largest(vsock, q));
        place(vsock, q, &vsock->queue[q]);
    }
    struct queue *receive = &vsock->queue[RECEIVE];
    for (u32 slot = 0; slot < SLOTS; slot++) {
        receive->table[slot].address = (u64)buffer_of(RECEIVE, slot);
        receive->table[slot].len = BUFFER;
        receive->table[slot].flags = WRITE;
        receive->avail[2 + slot] = slot;
    }
    receive->avail[1] = SLOTS;
    received = sent = 0;
    start(vsock);
    return 1;
}

/* Waits for room in the queue and sends a packet with `real` bytes of data, whatever it says. A
   device that takes nothing any more has been closed: false. */
static int send(u64 *state, const struct packet *packet, const u8 *data, u32 real)
{
    struct queue *queue = &vsock->queue[TRANSMIT];
    for (u64 waited = 0; (u16)(sent - queue->used[1]) >= SLOTS / 2; waited++) {
        if (waited > 20000000)
            return 0;
        pause();
    }
    u32 slot = 2 * (sent % (SLOTS / 2));
    u8 *buffer = buffer_of(TRANSMIT, slot);
    memcpy(buffer, packet, sizeof *packet);
    memcpy(buffer + sizeof *packet, data, real);
    volatile struct descriptor *at = &queue->table[slot];
    u32 split = one_in(state, 3) ? below(state, sizeof *packet + real) : 0;
    at[0].address = (u64)buffer;
    at[0].len = split ? split : sizeof *packet + real;
    at[0].flags = split ? NEXT : 0;
    at[0].next = slot + 1;
    at[1].address = (u64)buffer + split;
    at[1].len = sizeof *packet + real - split;
    at[1].flags = 0;
    queue->avail[2 + sent % SLOTS] = slot;
    __asm__ volatile("mfence" ::: "memory");
    queue->avail[1] = ++sent;
    if (one_in(state, 4))
        kick(vsock, TRANSMIT);
    return 1;
}

static void remember(u64 *state, u32 host, u32 guest)
{
    /* The agent's own must not end. */
    if (careful && host - CONTROL_PORT < 3)
        return;
    u32 i = below(state, KNOWN);
    known[i].host = host;
    known[i].guest = guest;
}

/* Reads what has come, answers the host's requests with anything, and gives the buffers back. */
static void drain(u64 *state)
{
    struct queue *queue = &vsock->queue[RECEIVE];
    while ((u16)received != queue->used[1]) {
        u32 slot = queue->used[2 + 4 * (received % SLOTS)];
        struct packet *packet = (void *)buffer_of(RECEIVE, slot % SLOTS);
        if (packet->op == REQUEST || packet->op == RESPONSE)
            remember(state, packet->from_port, packet->to_port);
        queue->avail[2 + received % SLOTS] = slot;
        received++;
        __asm__ volatile("mfence" ::: "memory");
        queue->avail[1] = received + SLOTS;
    }
    kick(vsock, RECEIVE);
}

static u32 odd_port(u64 *state)
{
    static const u32 ports[] = {0, 1, 22, 1024, 4089, 4090, 4091, 0xfffffffe, 0xffffffff};
    switch (below(state, 3)) {
    case 0: return CONTROL_PORT - 1 + below(state, 9);
    case 1: return ports[below(state, sizeof ports / sizeof *ports)];
    default: return one_in(state, 2) ? FLOW_PORT : any(state);
    }
}

/* Where to, for the agent's connections: never anywhere that mote would go. */
static u32 flow_request(u64 *state, u8 *bytes)
{
    static const u8 nowhere[][16] = {
        {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 127, 0, 0, 1},
        {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0},
        {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 224, 0, 0, 1},
        {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1},
        {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 127, 0, 0, 1},
        {0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1},
    };
    static const u8 protocols[] = {6, 17, 6, 17, 1, 0, 255};
    bytes[0] = protocols[below(state, 7)];
    bytes[1] = any(state);
    /* Not 53: a name server on loopback may be meant. */
    u16 port = 1024 + below(state, 60000);
    bytes[2] = port >> 8;
    bytes[3] = port;
    memcpy(bytes + 4, nowhere[below(state, 6)], 16);
    return one_in(state, 4) ? below(state, 20) : 20 + below(state, 64);
}

#define PROTOCOL_VERSION 6 /* VERSION in guest/src/protocol.rs */

/* Messages of the control channel (guest/src/protocol.rs): proper ones, and none. Not the end. */
static u32 control_message(u64 *state, u8 *bytes)
{
    u32 len = 0;
    if (!careful && one_in(state, 500)) {
        for (len = 0; len < 40; len++)
            bytes[len] = any(state) | 0x80;
        return len;
    }
    for (u64 count = 1 + below(state, 50); count > 0; count--) {
        int hello = one_in(state, 2);
        u8 *at = bytes + len;
        at[0] = hello ? 1 : 2;
        at[1] = at[2] = at[3] = 0;
        at[4] = hello ? 12 : 9;
        at += 5;
        if (hello) {
            /* The first must be right, or the box ends; what comes later is ignored. */
            at[0] = at[1] = at[2] = 0;
            at[3] = greeted && one_in(state, 4) ? any(state) : PROTOCOL_VERSION;
            greeted = 1;
            at += 4;
        } else {
            *at++ = below(state, 4);
        }
        u64 time = one_in(state, 2) ? any(state) : odd_number(state);
        for (int i = 0; i < 8; i++)
            at[i] = time >> (56 - 8 * i);
        len += 5 + (hello ? 12 : 9);
    }
    return len;
}

static int lie(u64 *state)
{
    static u8 data[4096];
    struct packet packet = {3, 2, 0, 0, 0, 1, 0, 0, 0, 0};
    u32 connection = below(state, KNOWN), real = 0;
    packet.to_port = known[connection].host;
    packet.from_port = known[connection].guest;
    packet.buf_alloc = one_in(state, 2) ? 65536 : odd_number(state);
    packet.fwd_cnt = one_in(state, 2) ? 0 : odd_number(state);
    switch (below(state, 16)) {
    case 0: case 1: /* a request, to anybody, and perhaps nothing more */
        packet.op = REQUEST;
        packet.to_port = odd_port(state);
        packet.from_port = one_in(state, 2) ? below(state, 64) : any(state);
        break;
    case 2: /* half-open, by the dozen */
        packet.op = REQUEST;
        packet.to_port = FLOW_PORT;
        for (int i = 0; i < 40; i++) {
            packet.from_port = any(state);
            if (!send(state, &packet, data, 0))
                return 0;
        }
        break;
    case 3: /* an answer to nothing, or to a client of the host's */
        packet.op = RESPONSE;
        if (one_in(state, 2))
            packet.from_port = any(state);
        break;
    case 4:
        packet.op = RESET;
        break;
    case 5:
        packet.op = SHUTDOWN;
        packet.flags = odd_number(state);
        break;
    case 6: /* far beyond the credit */
        packet.op = DATA;
        packet.len = real = 4096;
        for (int i = 0; i < 100; i++)
            if (packet.to_port - STDOUT_PORT > 1 && !send(state, &packet, data, real))
                return 0;
        break;
    case 7: /* less or more than it says */
        packet.op = one_in(state, 2) ? DATA : odd_number(state);
        packet.len = odd_number(state);
        real = below(state, 4096);
        break;
    case 8:
        packet.op = one_in(state, 2) ? CREDIT_UPDATE : CREDIT_REQUEST;
        break;
    case 9:
        packet.op = odd_number(state);
        packet.type = odd_number(state);
        break;
    case 10:
        packet.op = REQUEST;
        if (one_in(state, 2))
            packet.from = one_in(state, 2) ? below(state, 5) : any(state);
        else
            packet.to = one_in(state, 2) ? below(state, 5) : any(state);
        break;
    case 11: case 12: /* a flow, with a request that is refused, and then anything */
        packet.op = REQUEST;
        packet.to_port = FLOW_PORT;
        packet.from_port = any(state);
        if (!send(state, &packet, data, 0))
            return 0;
        packet.op = DATA;
        packet.len = real = flow_request(state, data);
        if (!send(state, &packet, data, real))
            return 0;
        packet.op = one_in(state, 2) ? SHUTDOWN : RESET;
        packet.flags = below(state, 4);
        packet.len = real = 0;
        if (one_in(state, 2))
            return 1;
        break;
    case 13: case 14: /* the control channel's words */
        packet.op = REQUEST;
        packet.to_port = CONTROL_PORT;
        packet.from_port = 1;
        /* Asking twice is its end. */
        if (!(careful && asked) && !send(state, &packet, data, 0))
            return 0;
        asked = 1;
        packet.op = DATA;
        packet.len = real = control_message(state, data);
        break;
    default:
        packet.op = DATA;
        packet.to_port = STDOUT_PORT;
        packet.from_port = 1;
        packet.len = real = output < 1 << 20 ? below(state, 100) : 0;
        memset(data, '.', real);
        output += real;
    }
    return send(state, &packet, data, real);
}

static void lies(u64 *state)
{
    if (!vsock && !start_vsock(state))
        return;
    for (int i = 0; i < 20; i++)
        if (!lie(state))
            return;
    kick(vsock, TRANSMIT);
    /* Now and then it takes nothing, and now and then it starts anew. */
    if (!one_in(state, 8))
        drain(state);
    if (!careful && one_in(state, 200))
        start_vsock(state);
}

/* ---- the life of it ----------------------------------------------------------------------------- */

/* The second processor does the same, but for vsock, of which there is one: it has the others then. */
static void live(u32 processor)
{
    u64 state = 2 * seed + processor;
    for (u64 turn = 0; processor == 0 ? rounds == 0 || turn < rounds : !stopping; turn++) {
        switch (mode) {
        case 'r': registers(&state); break;
        case 'b': broken(&state); break;
        case 'f': files(&state); break;
        case 'v':
            if (processor == 0) {
                lies(&state);
                break;
            }
            /* fallthrough */
        default: queues(&state, processor);
        }
    }
}

void second(void)
{
    catch_faults();
    second_awake = 1;
    live(1);
    second_stopped = 1;
    halt();
}

static void start_second(void)
{
    memcpy((void *)TRAMPOLINE, wake_start, wake_end - wake_start);
    *(volatile u32 *)(TRAMPOLINE + (wake_tables - wake_start)) = (u64)pml4;
    write32(LOCAL_APIC + 0xf0, 0x1ff);
    interrupt_second(0x4500);
    while (!second_awake)
        interrupt_second(0x4600 | TRAMPOLINE >> 12);
}

void boot(const u8 *params)
{
    map();
    catch_faults();
    take_order(params);
    if (mode == 'c') {
        static const u8 no_handlers[10];
        __asm__ volatile("lidt (%0); int3" ::"r"(no_handlers));
    }
    if (mode != 'h' && mode != 's') {
        find_devices();
        if (vcpus == 2)
            start_second();
        live(0);
    }
    /* Before a halt both are at rest; a reset comes while the other is at work. */
    if (then_halt && vcpus == 2 && second_awake) {
        stopping = 1;
        while (!second_stopped)
            pause();
    }
    /* A serial port that may have been set up in any way. */
    out8(0x3fb, 0);
    out8(0x3fc, 0);
    out8(0x3f9, 0);
    say("\nhostile: done\n");
    if (mode == 's')
        for (;;)
            pause();
    if (!then_halt)
        out8(0x64, 0xfe);
    halt();
}
