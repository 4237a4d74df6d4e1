"""The machine that counts: QEMU's software emulation with nested SVM and `-icount`, where one executed instruction is
one virtual nanosecond, so that a result is a number of instructions (and what slept), and repeats to 0.3 % whatever
else this machine does. It has one processor, a kernel of Debian's and only what a run needs, all of it in memory."""

import lzma
import os
import pathlib
import re
import select
import shlex
import shutil
import subprocess
import time

HERE = pathlib.Path(__file__).resolve().parent
# Without CMPXCHG16B, which is not always right under emulation (tests/lab/lab.sh). XSAVE stays: Firecracker wants it.
CPU = "EPYC,+svm,+npt,+invtsc,-cx16"
# For guests whose programs have a C library, which uses vector registers where it finds them: nested emulation mixes them up, since it
# does not intercept XSETBV, and such guests spin for ever (tests/lab/lab.sh).
NO_VECTORS = ",-xsave,-avx,-avx2,-f16c,-fma,-aes,-pclmulqdq,-sha-ni"
MEMORY = "6G"
# A copy of QEMU (tests/lab/qemu.py) does not find it by itself.
FIRMWARE = ["-L", "/usr/share/qemu", "-L", "/usr/share/seabios"]
# A halted lab may miss the interrupt that it waits for (tests/lab/lab.sh says why); another one, of a byte for its serial
# port, wakes it. No run takes that long by itself.
NUDGE_AFTER_S = 20
# What that does not help is ended, and a new lab goes on behind it.
SILENCE_LIMIT_S = 90
# So is a command that has no result: each virtual second of a guest that spins takes a minute.
COMMAND_LIMIT_S = 900
ATTEMPTS = 3

# The order in which they can be loaded. Those that the kernel has built in are not there.
MODULES = ["irqbypass", "ccp", "kvm", "kvm-amd", "vhost_iotlb", "vhost", "vsock", "vmw_vsock_virtio_transport_common", "vhost_vsock",
           "dummy"]

INIT = """#!/bin/busybox sh
# A VMM's sandbox needs a root that can be unmounted, which an initramfs cannot: everything moves to a tmpfs.
if [ "$1" != moved ]; then
    /bin/busybox mkdir /new
    /bin/busybox mount -t tmpfs -o size=80% tmpfs /new
    /bin/busybox cp -a /bin /init /new/
    for entry in /*; do
        case $entry in /new | /dev | /bin | /init) ;; *) /bin/busybox mv "$entry" /new/ ;; esac
    done
    /bin/busybox mkdir -p /new/proc /new/sys /new/dev /new/tmp /new/run
    exec /bin/busybox switch_root /new /init moved
fi
export PATH=/bin:/usr/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t debugfs debugfs /sys/kernel/debug
mount -t tracefs tracefs /sys/kernel/tracing
mkdir /dev/shm
for at in /dev/shm /tmp /run; do mount -t tmpfs tmpfs $at; done
for module in MODULES; do [ ! -e /modules/$module.ko ] || insmod /modules/$module.ko; done
# Else KVM_CREATE_VM sleeps 11 ms on kernels before 6.13, for one more cgroup migration of KVM's own thread.
mount -t cgroup2 -o favordynmods cgroup2 /sys/fs/cgroup
ip link set lo up
# passt takes the network of the interface that leads elsewhere.
ip link add outside type dummy && ip link set outside up && ip address add 198.51.100.1/24 dev outside && ip route add default dev outside
echo LAB kernel $(uname -r)
. /plan
echo LAB end
poweroff -f
"""


class Lab:
    """An image with everything that runs, and the means to run lists of commands on it."""

    def __init__(self, work, vectors=True):
        self.work = work
        self.cpu = CPU if vectors else CPU + NO_VECTORS
        self.root = work / "lab"
        self.kernel = newest_kernel()
        self.qemu = subprocess.run([HERE.parent / "lab/qemu.py"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()

    def pack(self, stage, programs):
        """Makes the image: `stage` as /bench, and programs of this system, by their paths, with their libraries."""
        for name in ("bin", "modules"):
            (self.root / name).mkdir(parents=True)
        shutil.copytree(stage, self.root / "bench", symlinks=True)
        shutil.copy("/bin/busybox", self.root / "bin/busybox")
        for module in MODULES:
            copy_module(self.kernel.name.removeprefix("vmlinuz-"), module, self.root / "modules")
        for program in programs:
            self.copy_with_libraries(program)
        for program in (stage / "bin").iterdir():
            self.copy_libraries(program)
        if any(program.name.startswith("qemu") for program in programs):
            self.copy_qemu_data()
        init = self.root / "init"
        init.write_text(INIT.replace("MODULES", " ".join(MODULES)))
        init.chmod(0o755)
        archive(self.root, self.work / "lab.cpio")

    def copy_with_libraries(self, program):
        self.copy(program)
        self.copy_libraries(program)

    def copy_libraries(self, program):
        libraries = subprocess.run(["ldd", program], capture_output=True, text=True).stdout
        for library in re.findall(r"(/\S+) \(0x", libraries):
            self.copy(pathlib.Path(library))

    def copy(self, file):
        target = self.root / str(file).lstrip("/")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)

    def copy_qemu_data(self):
        for folder in ("/usr/share/qemu", "/usr/share/seabios"):
            for pattern in ("bios*.bin", "pvh.bin", "qboot.rom"):
                for file in pathlib.Path(folder).glob(pattern):
                    self.copy(file)

    def run(self, commands, extra=(), plugin=None):
        """Runs shell commands, each of which prints lines, the last of them with `RUN` or `FAIL` first. Yields all
        lines. A command in which the lab hangs has failed, and a new lab goes on after it: one that began with the same
        command might go the same way to where the last one hung."""
        done, in_vain = 0, 0
        while done < len(commands):
            begun = False
            for line in self.boot(commands[done:], plugin, extra):
                begun = begun or line.startswith(("LAB kernel", "RUN ", "FAIL "))
                if line.startswith(("RUN ", "FAIL ")):
                    done += 1
                yield line
            if done == len(commands):
                return
            in_vain = 0 if begun else in_vain + 1
            if in_vain == ATTEMPTS:
                raise RuntimeError(f"the lab did not start {ATTEMPTS} times")
            if begun:
                done += 1
                yield f"FAIL the lab hung or died in: {commands[done - 1]}"

    def boot(self, commands, plugin, extra):
        plan = self.work / "plan"
        shutil.rmtree(plan, ignore_errors=True)
        plan.mkdir()
        (plan / "plan").write_text("\n".join(commands) + "\n")
        archive(plan, self.work / "plan.cpio")
        with open(self.work / "initrd", "wb") as initrd:
            for part in ("lab.cpio", "plan.cpio"):
                initrd.write((self.work / part).read_bytes())
        command = [
            "nice", "-n", "5", self.qemu, *FIRMWARE, "-M", "microvm,auto-kernel-cmdline=off", "-accel", "tcg",
            "-icount", "shift=0,sleep=off", "-cpu", self.cpu, "-m", MEMORY, "-kernel", str(self.kernel),
            "-initrd", str(self.work / "initrd"), "-append",
            "console=ttyS0 quiet loglevel=1 tsc=reliable clocksource=tsc mitigations=off audit=0 panic=-1 reboot=t "
            f"nokaslr norandmaps {' '.join(extra)}".strip(),
            "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot",
            *(["-plugin", plugin] if plugin else []),
        ]
        qemu = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            yield from lines_of(qemu)
        finally:
            qemu.kill()
            qemu.communicate()


def lines_of(process):
    """The lines of a process's output, until it ends, or is silent or without a result for too long. Its errors are shown at
    its end."""
    rest, last, errors = b"", time.monotonic(), b""
    result = last
    streams = {process.stdout.fileno(), process.stderr.fileno()}
    while streams:
        ready, _, _ = select.select(list(streams), [], [], 1)
        silence = time.monotonic() - last
        if silence > SILENCE_LIMIT_S or time.monotonic() - result > COMMAND_LIMIT_S:
            return
        if not ready and silence > NUDGE_AFTER_S:
            os.write(process.stdin.fileno(), b"\n")
        for stream in ready:
            data = os.read(stream, 65536)
            if not data:
                streams.remove(stream)
            elif stream == process.stderr.fileno():
                errors += data
            else:
                last = time.monotonic()
                *whole, rest = (rest + data).split(b"\n")
                if any(line.startswith((b"RUN ", b"FAIL ")) for line in whole):
                    result = last
                yield from (line.decode(errors="replace").rstrip("\r") for line in whole)
    said = [line for line in errors.decode(errors="replace").splitlines() if "TCG doesn't support" not in line]
    if said:
        print("bench: the lab's QEMU says:", *said, sep="\n  ")


def newest_kernel():
    kernels = sorted(pathlib.Path("/boot").glob("vmlinuz-*-cloud-amd64"), key=lambda path: [
        int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)])
    if not kernels:
        raise RuntimeError("no cloud kernel in /boot for the lab; run 'make tools'")
    return kernels[-1]


def copy_module(version, name, to):
    for file in pathlib.Path("/lib/modules", version).rglob(f"{name}.ko*"):
        data = file.read_bytes()
        (to / f"{name}.ko").write_bytes(lzma.decompress(data) if file.suffix == ".xz" else data)


def archive(tree, to):
    """Packs a tree as a cpio archive, as an initramfs is one."""
    names = subprocess.run(["find", ".", "-mindepth", "1", "-print0"], cwd=tree, capture_output=True, check=True).stdout
    with open(to, "wb") as out:
        subprocess.run(["cpio", "-o", "-0", "-H", "newc", "-R", "0:0", "--quiet"], cwd=tree, input=names, stdout=out, check=True)


def quoted(words):
    return shlex.join(str(word) for word in words)
