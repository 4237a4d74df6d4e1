"""How each VMM is started on the same kernel, memory, vCPUs and program, as a command of measure.c.

A row of the benchmark is a function of this file's `ROWS`, which makes its command for a `Machine`. All paths are below
`base`, where the run finds what `start.py` has put together."""

import dataclasses
import json
import os

# mote's own (src/boot.rs). How a guest is to end its VMM is each VMM's.
COMMAND_LINE = ("console=ttyS0 panic=-1 noreplace-smp swiotlb=noforce cgroup_no_v1=all rcupdate.rcu_expedited=1 "
                "dummy.numdummies=0 quiet rdinit=/init")
RESET_BY_KEYBOARD = "reboot=k,force"
RESET_BY_TRIPLE_FAULT = "reboot=t"
# Tells init.c to wait for one.
SNAPSHOT = "snapshot=1"
# Of a box that has a network.
PASST_SOCKET = "passt/socket"
NETWORK = {"ip_address": "10.77.0.2", "gateway": "10.77.0.1", "prefix_len": 24, "mac_address": [2, 66, 10, 77, 0, 2], "dns_servers": []}


@dataclasses.dataclass(frozen=True)
class Machine:
    """What is asked of a VMM."""

    memory_mib: int = 256
    vcpus: int = 1
    shares: int = 1
    # The entrypoint sleeps rather than ends.
    idle: bool = False
    # An interface on passt, which only mote's rows have.
    network: bool = False
    # The entrypoint opens a socket before it says that it runs, in mote's rows.
    socket: bool = False

    def command_line(self, reset, *more):
        words = [COMMAND_LINE, reset, *more]
        # A word that the kernel does not know is an argument of init, which passes it on.
        return " ".join(words + ["stay"] * self.idle)


@dataclasses.dataclass
class Run:
    """What measure.c is to run, and what is done just before."""

    command: list
    environment: dict = dataclasses.field(default_factory=dict)
    options: list = dataclasses.field(default_factory=list)
    prepare: list = dataclasses.field(default_factory=list)


class Stage:
    """The directory that the runs have as `base`, and what is in it."""

    def __init__(self, directory, base, counted=False):
        # Whether it is the lab that runs.
        self.counted = counted
        self.directory = directory
        self.base = base
        self.extra_words = ""

    def path(self, name):
        return f"{self.base}/{name}"

    def write(self, name, value):
        """Writes a VMM's configuration, as JSON, and returns its path in the run."""
        (self.directory / name).write_text(json.dumps(value) + "\n")
        return self.path(name)


def floor(stage, machine):
    return Run([stage.path("bin/floor"), machine.vcpus, machine.memory_mib, stage.path("vmlinux"), stage.path("initramfs"),
                machine.command_line(RESET_BY_KEYBOARD)])


def mote_spec(stage, machine):
    shares = [{"tag": f"share{number}", "host_path": stage.path("share"), "read_only": False}
              for number in range(1, machine.shares)]
    network = {"passt_socket_path": stage.path(PASST_SOCKET), **NETWORK} if machine.network else None
    return {
        "box_id": "bench", "vcpus": machine.vcpus, "memory_mib": machine.memory_mib, "rootfs_path": stage.path("root"),
        "exec_socket_path": stage.path("exec.sock"), "fs_mounts": shares, "workdir": "/", "network": network,
        "entrypoint": {"executable": "/entrypoint", "args": ["stay"] * machine.idle + ["socket"] * machine.socket, "env": []},
    }


def passt(stage):
    """What is done before a run with a network: a passt that listens, and ends with the box. It gives up root, and its
    socket's directory is open to who it is then."""
    socket = stage.path(PASST_SOCKET)
    return [["mkdir", "-p", "-m", "777", os.path.dirname(socket)], ["rm", "-f", socket],
            ["passt", "--one-off", "--quiet", "--log-file", f"{socket}.log", "--runas", "65534", "--socket", socket, "--address", NETWORK["ip_address"],
             "--netmask", NETWORK["prefix_len"], "--gateway", NETWORK["gateway"], "--ipv4-only"]]


def mote(stage, machine, **environment):
    spec = mote_spec(stage, machine)
    name = f"mote-{machine.memory_mib}-{machine.vcpus}-{machine.shares}{'-idle' * machine.idle}{'-network' * machine.network}{'-socket' * machine.socket}.json"
    environment = {"MOTE_TEMPLATES": "off"} | environment
    return Run([stage.path("bin/mote"), "--config-file", stage.write(name, spec)], environment,
               prepare=passt(stage) if machine.network else [])


def mote_from_template(stage, machine):
    directory = stage.path("templates")
    run = mote(stage, machine, MOTE_TEMPLATES=directory)
    # Made once: afterwards it is there. A start looks through one that is younger than two seconds, and through none twice.
    run.prepare += [["env", f"MOTE_TEMPLATES={directory}", stage.path("bin/mote"), "template", *run.command[1:]], ["sleep", 3]]
    return run


def mote_without_sandbox(stage, machine, **environment):
    return mote(stage, machine, MOTE_NO_SANDBOX="1", **environment)


def to_init(row, stage, machine):
    """mote's agent makes no mark. So the peers' init takes its place, and only its first mark counts: what follows is
    the agent's work, which this init does not do."""
    return row.run(stage, machine, MOTE_INITRAMFS=stage.path("initramfs"))


def firecracker(stage, machine, *append, **more):
    config = {
        "boot-source": {"kernel_image_path": stage.path("vmlinux"), "initrd_path": stage.path("initramfs"),
                        "boot_args": machine.command_line(RESET_BY_KEYBOARD, *append)},
        "machine-config": {"vcpu_count": machine.vcpus, "mem_size_mib": machine.memory_mib},
        "drives": [],
    }
    config |= more
    if config["drives"]:
        del config["boot-source"]["initrd_path"]
    kind = f"{'-devices' * bool(more)}{'-snapshot' * (SNAPSHOT in append)}{'-idle' * machine.idle}"
    name = f"firecracker-{machine.memory_mib}-{machine.vcpus}{kind}.json"
    return Run([stage.path("bin/firecracker"), "--no-api", "--id", "bench", "--level", "Error", "--config-file", stage.write(name, config)])


def firecracker_with_devices(stage, machine, *append):
    """What a box has under mote, as far as Firecracker has it: vsock, entropy, and a root that is not in memory."""
    socket, disk = stage.path("firecracker.vsock"), stage.path("root.run")
    run = firecracker(
        stage, machine, "init=/init", *append, entropy={}, vsock={"guest_cid": 3, "uds_path": socket},
        drives=[{"drive_id": "root", "path_on_host": disk, "is_root_device": True, "is_read_only": False}])
    run.prepare = [["rm", "-f", socket], ["cp", stage.path("root.ext4"), disk]]
    return run


def firecracker_from_snapshot(stage, machine):
    """As with devices, but of a snapshot, in which init has made its mounts and waits to be told to go on."""
    name = f"firecracker{'-idle' * machine.idle}"
    api, socket, disk = (stage.path(file) for file in ("firecracker.api", "firecracker.vsock", "root.run"))
    config = firecracker_with_devices(stage, machine, SNAPSHOT).command[-1]
    run = Run([stage.path("bin/snapshot"), "restore", stage.path("bin/firecracker"), api, stage.path(f"{name}.state"),
               stage.path(f"{name}.memory"), socket])
    clean = [["rm", "-f", api, socket], ["cp", stage.path("root.ext4"), disk]]
    # Made once: afterwards it is there. What the guest has in memory of the disk is true of each copy.
    run.prepare = [*clean, [run.command[0], "make", *run.command[2:6], config], *clean]
    return run


def qemu(stage, machine, append, *devices):
    return Run([
        "qemu-system-x86_64", "-M", "microvm,accel=kvm,acpi=off,x-option-roms=off,rtc=off,pit=off,pic=off,isa-serial=on",
        "-cpu", "host,tsc-deadline=on", "-smp", machine.vcpus, "-m", f"{machine.memory_mib}M", "-nodefaults",
        "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", stage.path("vmlinux"), *devices,
        "-append", machine.command_line(RESET_BY_TRIPLE_FAULT, *append),
    ])


def qemu_initramfs(stage, machine):
    return qemu(stage, machine, [], "-initrd", stage.path("initramfs"))


def qemu_virtiofs(stage, machine):
    socket = stage.path("virtiofsd.sock")
    run = qemu(
        stage, machine, ["root=root rootfstype=virtiofs rw init=/init"],
        "-global", "virtio-mmio.force-legacy=false",
        "-object", f"memory-backend-memfd,id=ram,size={machine.memory_mib}M,share=on", "-machine", "memory-backend=ram",
        "-chardev", f"socket,id=fs,path={socket}", "-device", "vhost-user-fs-device,chardev=fs,tag=root")
    daemon = f"{stage.path('bin/virtiofsd')} --fd=3 --shared-dir={stage.path('root')} --cache=auto --log-level=error"
    run.options = ["-s", socket, daemon]
    return run


def cloud_hypervisor(stage, machine):
    return Run([
        stage.path("bin/cloud-hypervisor"), "--cpus", f"boot={machine.vcpus}", "--memory", f"size={machine.memory_mib}M",
        "--serial", "tty", "--console", "off", "--kernel", stage.path("vmlinux"), "--initramfs", stage.path("initramfs"),
        "--cmdline", machine.command_line(RESET_BY_KEYBOARD),
    ])


def libkrun(stage, machine):
    return Run([stage.path("bin/libkrun"), stage.path("bin/libkrun.so"), machine.vcpus, machine.memory_mib,
                stage.path("vmlinux"), stage.path("initramfs"), machine.command_line(RESET_BY_KEYBOARD)])


@dataclasses.dataclass(frozen=True)
class Row:
    """A VMM as it is measured: the name that readers see, what makes its command, and what it needs."""

    name: str
    run: callable
    # The entrypoint's root, for readers.
    root: str
    # A program that is not there by itself: its name in bin/, and the variable that names it.
    program: str = ""
    variable: str = ""
    # Measured over memory and vCPUs, too.
    swept: bool = False
    # PID 1 is mote's agent, so that when it starts is measured by runs of their own.
    has_agent: bool = False
    # No other init can take its place: mote itself says when it has started.
    says_when: bool = False

    def is_there(self):
        return not self.variable or bool(os.environ.get(self.variable))


ROWS = {
    "floor": Row("floor: no devices, no sandbox", floor, "initramfs", swept=True),
    "mote": Row("mote", mote, "virtio-fs", swept=True, has_agent=True),
    "mote-template": Row("mote from a template", mote_from_template, "virtio-fs", swept=True, has_agent=True, says_when=True),
    "mote-open": Row("mote without its sandbox", mote_without_sandbox, "virtio-fs", has_agent=True),
    "firecracker": Row("Firecracker, no devices", firecracker, "initramfs", "firecracker", "MOTE_BENCH_FIRECRACKER"),
    "firecracker-devices": Row("Firecracker + vsock + rng", firecracker_with_devices, "ext4 on virtio-blk", "firecracker",
                               "MOTE_BENCH_FIRECRACKER", swept=True),
    "firecracker-snapshot": Row("Firecracker from a snapshot", firecracker_from_snapshot, "ext4 on virtio-blk", "firecracker",
                                "MOTE_BENCH_FIRECRACKER"),
    "cloud-hypervisor": Row("Cloud Hypervisor, no devices", cloud_hypervisor, "initramfs", "cloud-hypervisor",
                            "MOTE_BENCH_CLOUD_HYPERVISOR"),
    "libkrun": Row("libkrun, its usual devices", libkrun, "initramfs", "libkrun.so", "MOTE_BENCH_LIBKRUN"),
    "qemu": Row("QEMU microvm, no devices", qemu_initramfs, "initramfs"),
    "qemu-virtiofs": Row("QEMU microvm + virtiofsd", qemu_virtiofs, "virtio-fs", "virtiofsd", "MOTE_BENCH_VIRTIOFSD",
                         swept=True),
}
